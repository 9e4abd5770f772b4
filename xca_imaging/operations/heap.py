"""The garbage collector of a process that serves for long."""

from __future__ import annotations

import gc


def freeze_heap() -> None:
    """Have the garbage collector leave alone what has been loaded; to be called once a process is ready to serve.

    Modules, schemas and settings stay until the end: 146 000 objects in a node, 64 000 in a sibling receiver. To look
    at them all again takes 80 and 45 ms, during which nothing is received or answered, and it is done whenever a
    quarter as many have come and stayed.
    """
    gc.collect()
    gc.freeze()
