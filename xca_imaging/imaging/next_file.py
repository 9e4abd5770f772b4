"""The file that the next instance will be written to, made while no peer waits for it.

Between the answer to one instance and the first byte of the next a sender thinks and we wait. A file made in that time,
with its space on the disk, is not made while the sender waits for us: of what it takes to write 512 KB, finding room is
a third on ext4 and more than a half in a memory file system.

References
----------
* fallocate(2); FALLOC_FL_KEEP_SIZE leaves the length of the file alone: what has not been written never looks as if it
  had.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, TypeVar

from xca_imaging.errors import SpoolFull

Key = TypeVar("Key")

LEAST_ROOM = 64 * 1024
"""Bytes from which on room is made ahead: for less, a call costs what it saves."""

MOST_ROOM = 4 * 1024 * 1024
"""Bytes made ahead at most: 1 ms in a memory file system, where it takes longest; they are outside the quota."""

_PAGE = 4096  # sizes that differ by less are the same: UIDs and numbers are now a digit longer, now shorter
_KEEP_SIZE = 0x01  # FALLOC_FL_KEEP_SIZE

_libc = ctypes.CDLL(None)
_fallocate = getattr(_libc, "fallocate64", None) or getattr(_libc, "fallocate", None)
"""os.posix_fallocate sets the length, and where the file system knows no such call, the C library writes zeros."""
if _fallocate is not None:
    _fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def make_room(fd: int, length: int) -> bool:
    """Have the file system find room for the first `length` bytes of an empty file; false where that does not work."""
    return _fallocate is not None and _fallocate(fd, _KEEP_SIZE, 0, length) == 0


def give_back_room(fd: int, made: int, size: int) -> None:
    """Return what of `made` bytes a file of `size` bytes does not need."""
    if made - size >= _PAGE:
        os.ftruncate(fd, size)  # to the length that it has: what lies behind is let go


class NextFile(Generic[Key]):
    """The next file of a folder, if there is one.

    Parameters
    ----------
    create : callable
        Makes an empty file; returns what the caller knows it by and its descriptor, or raises SpoolFull or OSError.
    remove : callable
        Removes it when nobody needed it; its descriptor is closed by then.
    """

    # Mutable state: the file (what it is known by, descriptor, room made in it) or None, and the size of the last
    # instance.
    __slots__ = ("_create", "_file", "_last_size", "_remove")

    def __init__(self, create: Callable[[], tuple[Key, int]], remove: Callable[[Key], None]) -> None:
        self._create, self._remove = create, remove
        self._file: tuple[Key, int, int] | None = None
        self._last_size = 0

    def take(self) -> tuple[Key, int, int]:
        """Return a file, its descriptor and the bytes that there is room for: the one made ahead, else a new one."""
        file, self._file = self._file, None
        return file or (*self._create(), 0)

    def prepare(self, size: int) -> None:
        """Make the next file, after an instance of `size` bytes.

        It gets room for as much again if the one before was of the same size: a series of images mostly goes on so.
        Where sizes change, room would have to be given back, which takes longer than to make it.
        """
        last, self._last_size = self._last_size, size
        if self._file is None:
            with suppress(SpoolFull, OSError):  # whoever needs it will see
                key, fd = self._create()
                is_alike = size >= LEAST_ROOM and -(-size // _PAGE) == -(-last // _PAGE)
                room = min(size, MOST_ROOM) if is_alike else 0
                self._file = key, fd, room if room and make_room(fd, room) else 0

    def drop(self) -> None:
        """Remove it; does nothing when there is none."""
        file, self._file = self._file, None
        if file is not None:
            os.close(file[1])
            self._remove(file[0])
