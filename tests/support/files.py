"""What tests ask of the file system."""

from __future__ import annotations

from pathlib import Path

import pytest

from xca_imaging.imaging.next_file import make_room


def need_room_ahead(folder: Path) -> None:
    """Skip the test, by name, where the file system knows no fallocate(2)."""
    with (folder / "probe").open("wb") as probe:
        if not make_room(probe.fileno(), 1):
            pytest.skip("a file system without fallocate(2)")


def blocks(path: Path) -> int:
    """Return the bytes that a file takes of its file system."""
    return path.stat().st_blocks * 512
