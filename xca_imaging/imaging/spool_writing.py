"""Files of the spool while they are written, and who reads along.

An instance is written as its bytes come, one `write(2)` for each fragment, and its checksum is computed from the same
bytes on the way. Nothing is synced: see `spool_journal` for what that means.

References
----------
* DICOM PS3.10, 7.1 (DICOM File Meta Information)
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NoReturn, Protocol

from xxhash import xxh3_128

from xca_imaging.errors import ArrivalBroken, SpoolFull
from xca_imaging.imaging.file_meta import encode_file_meta
from xca_imaging.imaging.next_file import give_back_room
from xca_imaging.imaging.spooled import SpooledInstance

if TYPE_CHECKING:
    from xca_imaging.imaging.spool import Spool


class Digest(Protocol):
    """A hash of `hashlib`."""

    def update(self, data: bytes, /) -> None: ...

    def digest(self) -> bytes: ...

    def hexdigest(self) -> str: ...


_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def raise_mapped(exc: OSError) -> NoReturn:
    """Raise SpoolFull for a failed write that may work another time, else what it failed with."""
    if exc.errno in _NO_ROOM:
        raise SpoolFull(f"no room on the disk of the spool: {exc.strerror}") from exc
    raise exc


def _write_all(fd: int, view: memoryview | bytes) -> None:
    """Finish a write that the kernel cut short; where there is no room, the next call says so."""
    while view:
        view = view[os.write(fd, view) :]


def write_pieces(fd: int, *pieces: memoryview | bytes) -> None:
    """Write all pieces, in one go unless the kernel cuts it short."""
    if len(pieces) == 1:
        written, wanted = os.write(fd, pieces[0]), len(pieces[0])
    else:
        written, wanted = os.writev(fd, pieces), sum(map(len, pieces))
    if written == wanted:
        return
    for piece in pieces:
        if written < len(piece):
            _write_all(fd, piece[written:])
        written = max(0, written - len(piece))


class _Writer:
    """A file that is being written within the quota; it is either committed or leaves nothing behind."""

    # Mutable state: the open file (_fd, -1 once closed), with room made for so many bytes (_room), whether it is
    # committed or discarded (_is_done), and the bytes that stand to its account (size).
    __slots__ = ("_fd", "_is_done", "_name", "_room", "size", "spool")

    def __init__(self, spool: Spool) -> None:
        self.spool = spool
        self._is_done = False
        self.size = 0
        self._name, self._fd, self._room = spool._next.take()

    def _charge(self, length: int) -> None:
        spool = self.spool
        if spool.used_bytes + length > spool._limit:
            spool._make_room(length)
        spool.used_bytes += length
        self.size += length

    def discard(self) -> None:
        """Remove what was written; does nothing once committed or discarded."""
        if not self._is_done:
            self._is_done = True
            if self._fd >= 0:
                os.close(self._fd)
            self.spool._remove_file(self._name, self.size)

    def _close(self) -> None:
        """Close what was written whole; a file system that only now finds itself full leaves nothing behind."""
        fd, self._fd = self._fd, -1
        try:
            try:
                give_back_room(fd, self._room, self.size)
            finally:
                os.close(fd)
        except OSError as exc:
            self._is_done = True
            self.spool._remove_file(self._name, self.size)
            raise_mapped(exc)


class SpoolWriter(_Writer):
    """An instance that is being received. `write` raises SpoolFull or OSError; call `discard` then."""

    # Mutable state beside that of _Writer: the File Meta Information until it is written (_head), the checksum so far
    # (_checksum), bytes that a reader finds in the file (written), the instance once it is whole (instance), and what
    # wakes each reader (_wake).
    __slots__ = (
        "_checksum",
        "_head",
        "_sop_class_uid",
        "_sop_instance_uid",
        "_transfer_syntax_uid",
        "_wake",
        "instance",
        "written",
    )

    def __init__(
        self,
        spool: Spool,
        *,
        sop_class_uid: str,
        sop_instance_uid: str,
        transfer_syntax_uid: str,
        source_ae_title: str,
    ) -> None:
        self._sop_class_uid, self._sop_instance_uid = sop_class_uid, sop_instance_uid
        self._transfer_syntax_uid = transfer_syntax_uid
        self._head = encode_file_meta(
            sop_class_uid=sop_class_uid,
            sop_instance_uid=sop_instance_uid,
            transfer_syntax_uid=transfer_syntax_uid,
            source_ae_title=source_ae_title,
        )
        self._checksum = xxh3_128(self._head)
        self.written = 0
        self.instance: SpooledInstance | None = None
        self._wake: list[Callable[[], None]] | None = None
        super().__init__(spool)
        try:
            self._charge(len(self._head))
        except SpoolFull:
            self.discard()
            raise

    @property
    def is_over(self) -> bool:
        """True once committed or discarded."""
        return self._is_done

    def write(self, *data: memoryview) -> None:
        """Append the next bytes of the data set, in one piece or several; `data` is not kept."""
        # _charge, spelled out: this runs once per read.
        length = len(data[0]) if len(data) == 1 else sum(map(len, data))
        spool = self.spool
        used = spool.used_bytes + length
        if used > spool._limit:
            spool._make_room(length)
            used = spool.used_bytes + length
        spool.used_bytes = used
        self.size += length
        update = self._checksum.update
        for piece in data:
            update(piece)
        try:
            if self._head:  # File Meta Information goes out with the first bytes: one write for a small object
                write_pieces(self._fd, self._head, *data)
                self._head = b""
            else:
                write_pieces(self._fd, *data)
        except OSError as exc:
            raise_mapped(exc)
        self.written = self.size
        if self._wake is not None:
            self._wake_readers()

    def seal(self) -> None:
        """Close the file, which is whole; `commit` or `discard` follows."""
        if self._head:
            self.write(memoryview(b""))
        try:
            self._close()
        except (SpoolFull, OSError):
            self._wake_readers()
            raise

    def commit(self) -> SpooledInstance:
        """Let others find the instance, after `seal` unless that was done. Nobody holds it yet."""
        if self._fd >= 0:
            self.seal()
        self._is_done = True
        try:
            instance = SpooledInstance(
                self.spool,
                self._name,
                self.size,
                checksum=self._checksum.hexdigest(),
                sop_class_uid=self._sop_class_uid,
                sop_instance_uid=self._sop_instance_uid,
                transfer_syntax_uid=self._transfer_syntax_uid,
            )
            self.spool._add(instance)
            self.instance = instance
            return instance
        finally:
            self._wake_readers()

    def discard(self) -> None:
        """Remove what was written, and break who reads along; does nothing once committed or discarded."""
        super().discard()
        self._wake_readers()

    def reader(self) -> ArrivalReader:
        """Return one who reads along, from the first byte; there may be several. Called before the file is over."""
        fd = os.open(self._name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.spool._folder_fd)
        return ArrivalReader(self, fd)

    def _wake_readers(self) -> None:
        for wake in self._wake or ():
            wake()

    def _add_reader(self, wake: Callable[[], None]) -> None:
        self._wake = [*(self._wake or ()), wake]

    def _remove_reader(self, wake: Callable[[], None]) -> None:
        self._wake = [each for each in self._wake or () if each != wake] or None


class ArrivalReader:
    """Reads an instance while it still arrives, on the event loop; use as a context manager, or `close` it."""

    # Mutable state: where it stands (offset), the open file, and what says that there is more.

    def __init__(self, writer: SpoolWriter, fd: int) -> None:
        self.offset = 0
        self._writer, self._fd = writer, fd
        self._more = asyncio.Event()
        writer._add_reader(self._more.set)

    def __enter__(self) -> ArrivalReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def behind(self) -> int:
        """Bytes that have come and were not read."""
        return self._writer.written - self.offset

    async def read(self, at_least: int, at_most: int, digest: Digest | None = None) -> bytes:
        """Return the next bytes: `at_least` so many unless the instance ends before, nothing at its end.

        `digest` is updated with them.

        Raises
        ------
        ArrivalBroken
            The instance broke off; it may arrive another time, in another file.
        """
        writer = self._writer
        while writer.written - self.offset < at_least and not writer.is_over:
            self._more.clear()
            await self._more.wait()
        if writer.is_over and writer.instance is None:
            raise ArrivalBroken("the instance broke off while it arrived")
        length = min(writer.written - self.offset, at_most)
        if length <= 0:
            return b""
        data = await asyncio.get_running_loop().run_in_executor(None, _read, self._fd, length, self.offset, digest)
        self.offset += len(data)
        return data

    def close(self) -> None:
        """Let go of the file; harmless when repeated."""
        if self._fd >= 0:
            self._writer._remove_reader(self._more.set)
            os.close(self._fd)
            self._fd = -1


def _read(fd: int, length: int, offset: int, digest: Digest | None) -> bytes:
    data = os.pread(fd, length, offset)
    if digest is not None:
        digest.update(data)
    return data


@dataclass(frozen=True, slots=True)
class Attachment:
    """A received MIME part on disk; it belongs to whoever committed it, who also discards it."""

    path: Path
    size: int
    sha1: str
    sha256: str
    spool: Spool

    def open(self) -> BinaryIO:
        """Open the part for reading."""
        return open(self.path, "rb", buffering=0)

    def discard(self) -> None:
        """Remove the file; does nothing the second time."""
        self.spool._remove_file(self.path.name, self.size)


class AttachmentWriter(_Writer):
    """A MIME part that is being received, hashed on the way."""

    __slots__ = ("_sha1", "_sha256")

    def __init__(self, spool: Spool) -> None:
        super().__init__(spool)
        self._sha1 = hashlib.sha1(usedforsecurity=False)  # the hash that document metadata carry (ITI TF-3 4.2.3.2.10)
        self._sha256 = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`, which is not kept."""
        self._charge(len(data))
        self._sha1.update(data)
        self._sha256.update(data)
        try:
            _write_all(self._fd, memoryview(data))
        except OSError as exc:
            raise_mapped(exc)

    def commit(self) -> Attachment:
        """Close the file and return it with its length and hashes (lower case hexadecimal)."""
        self._close()
        self._is_done = True
        path = self.spool.folder / self._name
        return Attachment(path, self.size, self._sha1.hexdigest(), self._sha256.hexdigest(), self.spool)
