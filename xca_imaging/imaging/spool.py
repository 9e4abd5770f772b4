"""The spool: received objects on disk, within a byte quota, shared by many readers.

A spool owns a folder of its own for as long as it lives. Instances are Part 10 files: preamble and File Meta
Information are written here, the data set is what the peer sent, byte for byte. File names are a counter: nothing of
a name comes from a peer.

An instance that nobody holds stays for the retention time and serves further requests; it goes earlier, longest unused
first, when room is needed. All methods are called from one thread; files may be read from any.

References
----------
* DICOM PS3.10, 7.1 (DICOM File Meta Information)
"""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import os
import shutil
import struct
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

from xca_imaging import uids
from xca_imaging.errors import SpoolFull

RESERVE_FREE = 256 * 1024 * 1024
"""Free bytes of the disk that are never used: database, audit queue and logs on the same disk must go on."""

_MEASURE_EVERY = 64 * 1024 * 1024
"""Bytes written between two looks at the free room of the disk: others write to it too. A quarter of the reserve."""

_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

_FOLDER_PREFIX = "run-"


# --------------------------------------------------------------------------------------------------------------------
# File Meta Information
# --------------------------------------------------------------------------------------------------------------------


def _element(element: int, vr: bytes, value: str) -> bytes:
    """Return one element of group 0002: tag, VR, 16-bit length, value padded to even length (PS3.5 7.1.2)."""
    encoded = value.encode("latin-1", "replace")
    if len(encoded) % 2:
        encoded += b"\0" if vr == b"UI" else b" "
    return struct.pack("<HH2sH", 0x0002, element, vr, len(encoded)) + encoded


_PREAMBLE = struct.Struct("<128x4sHH2sHL")
_META_VERSION = struct.pack("<HH2s2xL", 0x0002, 0x0001, b"OB", 2) + b"\0\1"
_IMPLEMENTATION = _element(0x0012, b"UI", uids.IMPLEMENTATION_CLASS_UID) + _element(
    0x0013, b"SH", uids.IMPLEMENTATION_VERSION_NAME
)


def encode_file_meta(
    *, sop_class_uid: str, sop_instance_uid: str, transfer_syntax_uid: str, source_ae_title: str
) -> bytes:
    """Return what stands before the data set of a Part 10 file.

    ::

        offset  content
        0       preamble, 128 zero bytes
        128     "DICM"
        132     (0002,0000) group length, UL
        144     (0002,0001) version, OB; (0002,0002) SOP class; (0002,0003) SOP instance; (0002,0010) transfer syntax;
                (0002,0012) implementation class; (0002,0013) implementation version; (0002,0016) source AE title

    References
    ----------
    * DICOM PS3.10, 7.1 and Table 7.1-1: Explicit VR Little Endian whatever the data set is
    """
    before, after = _constant_meta(sop_class_uid, transfer_syntax_uid, source_ae_title)
    group = before + _element(0x0003, b"UI", sop_instance_uid) + after
    return _PREAMBLE.pack(b"DICM", 0x0002, 0x0000, b"UL", 4, len(group)) + group


@functools.lru_cache(maxsize=64)  # the classes, syntaxes and peers of the associations at work; an entry is 300 bytes
def _constant_meta(sop_class_uid: str, transfer_syntax_uid: str, source_ae_title: str) -> tuple[bytes, bytes]:
    """Return what is the same for all instances of a presentation context: before and after (0002,0003)."""
    return (
        _META_VERSION + _element(0x0002, b"UI", sop_class_uid),
        _element(0x0010, b"UI", transfer_syntax_uid)
        + _IMPLEMENTATION
        + (_element(0x0016, b"AE", source_ae_title) if source_ae_title else b""),
    )


# --------------------------------------------------------------------------------------------------------------------
# The spool
# --------------------------------------------------------------------------------------------------------------------


def _raise_mapped(exc: OSError) -> NoReturn:
    """Raise SpoolFull for a failed write that may work another time, else what it failed with."""
    if exc.errno in _NO_ROOM:
        raise SpoolFull(f"no room on the disk of the spool: {exc.strerror}") from exc
    raise exc


def _write_all(fd: int, view: memoryview) -> None:
    """Finish a write that the kernel cut short; where there is no room, the next call says so."""
    while view:
        view = view[os.write(fd, view) :]


class SpooledInstance:
    """A whole instance on disk.

    Attributes
    ----------
    name : str
        Of the file in the spool's folder.
    size : int
        Of the file, File Meta Information included.
    """

    # Mutable state: how many hold it (_holders), when the last of them let go (_idle_since), and whether the spool has
    # replaced or evicted it (_is_indexed is False then: the last release removes the file).
    __slots__ = (
        "_holders",
        "_idle_since",
        "_is_indexed",
        "_spool",
        "name",
        "size",
        "sop_class_uid",
        "sop_instance_uid",
        "transfer_syntax_uid",
    )

    def __init__(
        self,
        spool: Spool,
        name: str,
        size: int,
        *,
        sop_class_uid: str,
        sop_instance_uid: str,
        transfer_syntax_uid: str,
    ) -> None:
        self.name, self.size = name, size
        self.sop_class_uid, self.sop_instance_uid = sop_class_uid, sop_instance_uid
        self.transfer_syntax_uid = transfer_syntax_uid
        self._spool = spool
        self._holders = 0
        self._idle_since = 0.0
        self._is_indexed = True

    def __repr__(self) -> str:
        return f"<SpooledInstance {self.name} {self.size} bytes, {self._holders} holders>"

    @property
    def path(self) -> Path:
        """The file; it exists as long as somebody holds the instance."""
        return self._spool.folder / self.name

    def hold(self) -> None:
        """Keep the file until `release`; each call wants one of its own."""
        if self._holders == 0:
            self._spool._set_held(self)
        self._holders += 1

    def release(self) -> None:
        """Let go. The file stays for the retention time, or goes when it was replaced meanwhile."""
        if self._holders <= 0:
            raise ValueError(f"{self!r} is released more often than held")
        self._holders -= 1
        if self._holders == 0:
            self._spool._set_idle(self)

    def open(self) -> BinaryIO:
        """Open the Part 10 file for reading; an open file can be read to its end whatever happens to the instance."""
        return open(self.path, "rb", buffering=0)


class _Writer:
    """A file that is being written within the quota; it is either committed or leaves nothing behind."""

    # Mutable state: the open file (_fd), whether it is committed or discarded (_is_done), and the bytes that stand to
    # its account (size).
    __slots__ = ("_fd", "_is_done", "_name", "_spool", "size")

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._is_done = False
        self.size = 0
        self._name, self._fd = spool._create_file()

    def _charge(self, length: int) -> None:
        spool = self._spool
        if spool.used_bytes + length > spool._limit:
            spool._make_room(length)
        spool.used_bytes += length
        self.size += length

    def discard(self) -> None:
        """Remove what was written; does nothing once committed or discarded."""
        if not self._is_done:
            self._is_done = True
            os.close(self._fd)
            self._spool._remove_file(self._name, self.size)

    def _close(self) -> None:
        """Close what was written whole; a file system that only now finds itself full leaves nothing behind."""
        self._is_done = True
        try:
            os.close(self._fd)
        except OSError as exc:
            self._spool._remove_file(self._name, self.size)
            _raise_mapped(exc)


class SpoolWriter(_Writer):
    """An instance that is being received. `write` raises SpoolFull or OSError; call `discard` then."""

    __slots__ = ("_head", "_sop_class_uid", "_sop_instance_uid", "_transfer_syntax_uid")

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
        super().__init__(spool)
        try:
            self._charge(len(self._head))
        except SpoolFull:
            self.discard()
            raise

    def write(self, data: memoryview) -> None:
        """Append the next bytes of the data set; `data` is not kept."""
        length = len(data)
        # _charge, spelled out: this runs once per fragment.
        spool = self._spool
        if spool.used_bytes + length > spool._limit:
            spool._make_room(length)
        spool.used_bytes += length
        self.size += length
        try:
            if self._head:  # File Meta Information goes out with the first bytes: one write for a small object
                head, self._head = self._head, b""
                written = os.writev(self._fd, (head, data))
                if written < len(head) + length:
                    _write_all(self._fd, memoryview(head + data)[written:])
            else:
                written = os.write(self._fd, data)
                if written < length:
                    _write_all(self._fd, data[written:])
        except OSError as exc:
            _raise_mapped(exc)

    def commit(self) -> SpooledInstance:
        """Close the file and let others find it. Nobody holds the instance yet."""
        if self._head:
            self.write(memoryview(b""))
        self._close()
        instance = SpooledInstance(
            self._spool,
            self._name,
            self.size,
            sop_class_uid=self._sop_class_uid,
            sop_instance_uid=self._sop_instance_uid,
            transfer_syntax_uid=self._transfer_syntax_uid,
        )
        self._spool._add(instance)
        return instance


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
            _raise_mapped(exc)

    def commit(self) -> Attachment:
        """Close the file and return it with its length and hashes (lower case hexadecimal)."""
        self._close()
        path = self._spool.folder / self._name
        return Attachment(path, self.size, self._sha1.hexdigest(), self._sha256.hexdigest(), self._spool)


class Spool:
    """A folder of received objects with a byte quota.

    Parameters
    ----------
    directory : Path
        Made if it does not exist. Each spool works in a folder of its own below it, locked while the process lives;
        what a crashed run left there is removed here.
    max_bytes : int
        Bytes of all files together.
    retention : float
        Seconds that an instance stays after the last one let go of it.
    clock : callable
        Monotonic seconds.
    reserve_free : int
        Free bytes of the disk that are left alone.

    Attributes
    ----------
    used_bytes : int
        Bytes of all files, those being written included.
    """

    # Mutable state: the folder's descriptor (_folder_fd), the counter of file names (_count), files that exist and
    # are not yet removed (_files), bytes of all files (used_bytes) and up to where they may grow before the disk is
    # looked at again (_limit), instances by SOP Instance UID and transfer syntax (_instances), and those nobody holds,
    # longest idle first, with their bytes (_idle, _idle_bytes).

    def __init__(
        self,
        directory: Path,
        *,
        max_bytes: int,
        retention: float,
        clock: Callable[[], float] = time.monotonic,
        reserve_free: int = RESERVE_FREE,
    ) -> None:
        self.max_bytes, self.retention, self.reserve_free = max_bytes, retention, reserve_free
        self._clock = clock
        directory.mkdir(parents=True, exist_ok=True)
        self.folder, self._folder_fd = _take_folder(directory)
        self._count = 0
        self._files: set[str] = set()
        self.used_bytes = 0
        self._limit = 0
        self._instances: dict[str, dict[str, SpooledInstance]] = {}
        self._idle: dict[SpooledInstance, None] = {}
        self._idle_bytes = 0

    # --- what callers do ------------------------------------------------------------------------------------------

    @property
    def free_bytes(self) -> int:
        """Room for new bytes: what quota and disk leave, and what could be evicted."""
        free = min(self.max_bytes - self.used_bytes, self._disk_free() - self.reserve_free)
        return max(0, free + self._idle_bytes)

    def create(
        self, *, sop_class_uid: str, sop_instance_uid: str, transfer_syntax_uid: str, source_ae_title: str
    ) -> SpoolWriter:
        """Begin an instance.

        Raises
        ------
        SpoolFull
            No room, and nothing left that could be evicted.
        """
        return SpoolWriter(
            self,
            sop_class_uid=sop_class_uid,
            sop_instance_uid=sop_instance_uid,
            transfer_syntax_uid=transfer_syntax_uid,
            source_ae_title=source_ae_title,
        )

    def create_attachment(self) -> AttachmentWriter:
        """Begin a file for a received MIME part; raises SpoolFull as `create` does."""
        return AttachmentWriter(self)

    def find(self, sop_instance_uid: str, accept: Sequence[str] | None = None) -> SpooledInstance | None:
        """Return a spooled instance in the first of the transfer syntaxes that there is, None takes the newest.

        Nothing is acquired: call `hold` before control is given away.
        """
        by_syntax = self._instances.get(sop_instance_uid)
        if not by_syntax:
            return None
        if accept is None:
            return next(reversed(by_syntax.values()))
        return next((by_syntax[uid] for uid in accept if uid in by_syntax), None)

    def expire(self) -> int:
        """Remove what nobody has held for the retention time; return how many instances went."""
        before = self._clock() - self.retention
        expired = []
        for instance in self._idle:
            if instance._idle_since > before:
                break
            expired.append(instance)
        for instance in expired:
            self._evict(instance)
        return len(expired)

    def close(self) -> None:
        """Remove the folder with all files; nothing may be held or written any more."""
        if self._folder_fd >= 0:
            shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self._folder_fd)
            self._folder_fd = -1

    # --- what writers and instances tell us -----------------------------------------------------------------------

    def _create_file(self) -> tuple[str, int]:
        self._count += 1
        name = f"{self._count:08x}"
        try:
            fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=self._folder_fd)
        except OSError as exc:
            _raise_mapped(exc)
        self._files.add(name)
        return name, fd

    def _remove_file(self, name: str, size: int) -> None:
        if name in self._files:
            self._files.discard(name)
            self.used_bytes -= size
            os.unlink(name, dir_fd=self._folder_fd)

    def _add(self, instance: SpooledInstance) -> None:
        by_syntax = self._instances.setdefault(instance.sop_instance_uid, {})
        replaced = by_syntax.pop(instance.transfer_syntax_uid, None)
        by_syntax[instance.transfer_syntax_uid] = instance
        if replaced is not None:
            replaced._is_indexed = False
            if replaced in self._idle:
                self._forget_idle(replaced)
                self._remove_file(replaced.name, replaced.size)
        self._set_idle(instance)

    def _set_held(self, instance: SpooledInstance) -> None:
        if instance.name not in self._files:
            raise ValueError(f"{instance!r} is gone: it was evicted before it was held")
        self._forget_idle(instance)

    def _set_idle(self, instance: SpooledInstance) -> None:
        if instance._is_indexed:
            instance._idle_since = self._clock()
            self._idle[instance] = None
            self._idle_bytes += instance.size
        else:
            self._remove_file(instance.name, instance.size)

    def _forget_idle(self, instance: SpooledInstance) -> None:
        del self._idle[instance]
        self._idle_bytes -= instance.size

    def _evict(self, instance: SpooledInstance) -> None:
        self._forget_idle(instance)
        instance._is_indexed = False
        by_syntax = self._instances[instance.sop_instance_uid]
        del by_syntax[instance.transfer_syntax_uid]
        if not by_syntax:
            del self._instances[instance.sop_instance_uid]
        self._remove_file(instance.name, instance.size)

    def _make_room(self, length: int) -> None:
        """Look at quota and disk, evict as needed, and set up to where writers may go without asking again."""
        while True:
            disk = self._disk_free() - self.reserve_free
            room = min(self.max_bytes - self.used_bytes, disk)
            if room >= length:
                self._limit = self.used_bytes + min(room, max(length, _MEASURE_EVERY))
                return
            oldest = next(iter(self._idle), None)
            if oldest is None:
                what = f"{self.max_bytes} bytes are the quota" if disk >= length else "the disk is at its reserve"
                raise SpoolFull(f"the spool has no room: {self.used_bytes} bytes are in use, {what}")
            self._evict(oldest)

    def _disk_free(self) -> int:
        disk = os.statvfs(self._folder_fd)
        return disk.f_bavail * disk.f_frsize


def _take_folder(directory: Path) -> tuple[Path, int]:
    """Remove the folders of runs that are gone, make this run's, and lock it for as long as the descriptor lives.

    A folder whose lock is free has no process any more. The directory itself is locked meanwhile, so that no other
    process sees a folder that is made and not yet locked.
    """
    directory_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(directory_fd, fcntl.LOCK_EX)
        for leftover in directory.glob(f"{_FOLDER_PREFIX}*"):
            if _is_free(leftover):
                shutil.rmtree(leftover)
        folder = Path(tempfile.mkdtemp(prefix=_FOLDER_PREFIX, dir=directory))
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return folder, fd
    finally:
        os.close(directory_fd)


def _is_free(folder: Path) -> bool:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True
