"""`make bench`: every benchmark of the tree, side by side with its peers. Figures go to `bench-results/`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

RESULTS = Path("bench-results")


def main() -> int:
    RESULTS.mkdir(exist_ok=True)
    codes = []
    for name in ("bench_receive", "bench_memory"):
        command = [sys.executable, "-m", f"tests.bench.{name}", "--json", str(RESULTS / f"{name}.json")]
        codes.append(subprocess.run(command, check=False).returncode)
    return max(codes)


sys.exit(main())
