"""What the garbage collector of a serving process looks at."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import gc
from xca_imaging.gateway import receiving
before = len(gc.get_objects())
receiving.uvloop.run = lambda serving: (serving.close(), print(before, len(gc.get_objects())))
receiving.main(["0", "1"])
"""
"""A sibling receiver, up to where it begins to serve."""


def test_what_is_loaded_is_not_looked_at_again() -> None:
    # In a process of its own: what the other tests have loaded is to go when they are done.
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=30)
    before, after = map(int, done.stdout.split())
    assert before > 20_000
    assert after < 100
