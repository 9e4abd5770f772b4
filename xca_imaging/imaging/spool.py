"""The spool: received objects on disk, within a byte quota, shared by many readers, kept over restarts.

A spool owns its directory for as long as it lives. Instances are Part 10 files: preamble and File Meta Information are
written here, the data set is what the peer sent, byte for byte. File names are counters: nothing of a name comes from a
peer. Attachments of requests lie there too, for as long as their request.

An instance that nobody holds stays for the retention time and serves further requests; it goes earlier, longest unused
first, when room is needed.

A process that dies leaves its files. The next one trusts those that the journal knows (`spool_journal`) and whose size
is right, after it has read each again and found the checksum right; until then `find` does not return it. Everything
else is removed. All methods are called from one thread; files may be read from any.

References
----------
* DICOM PS3.10, 7.1 (DICOM File Meta Information)
"""

from __future__ import annotations

import asyncio
import fcntl
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from xxhash import xxh3_128

from xca_imaging.errors import LocalProtocolError, SpoolFull, SpoolInUse
from xca_imaging.imaging import spool_journal
from xca_imaging.imaging.next_file import NextFile
from xca_imaging.imaging.spool_journal import Journal, Record
from xca_imaging.imaging.spool_writing import (
    ArrivalReader,
    Attachment,
    AttachmentWriter,
    Digest,
    SpoolWriter,
    raise_mapped,
)
from xca_imaging.imaging.spooled import SpooledInstance

__all__ = ["ArrivalReader", "Attachment", "AttachmentWriter", "Digest", "Spool", "SpoolWriter", "SpooledInstance"]

_log = logging.getLogger(__name__)

RESERVE_FREE = 256 * 1024 * 1024
"""Free bytes of the disk that are never used: database, audit queue and logs on the same disk must go on."""

_MEASURE_EVERY = 64 * 1024 * 1024
"""Bytes written between two looks at the free room of the disk: others write to it too. A quarter of the reserve."""

_TIDY_EVERY = 5.0  # s between looks for instances whose retention has passed
_READ = 1024 * 1024  # bytes read at a time when a file is verified
_GARBAGE = 10_000  # lines of the journal that may be out of date, beside as many as there are instances


class Spool:
    """A folder of received objects with a byte quota.

    Parameters
    ----------
    directory : Path
        Made if it does not exist. One spool at a time uses it: `SpoolInUse` otherwise.
    max_bytes : int
        Bytes of all files together.
    retention : float
        Seconds that an instance stays after the last one let go of it.
    high_water, low_water : float
        Parts of the room (quota or disk, whichever is less). `is_high` becomes true when what cannot be evicted takes
        the one, and false when it takes no more than the other.
    clock, wall_clock : callable
        Seconds: monotonic, and since the epoch. The second one tells only how long instances of an earlier run were
        unused; when it is wrong they go earlier or later, at most a retention time from now.
    reserve_free : int
        Free bytes of the disk that are left alone.

    Attributes
    ----------
    folder : Path
        Where the files are; sibling processes write theirs here too, under names that begin with one of `new_name`.
    used_bytes : int
        Bytes of all files, those being written and what is reserved included.
    is_high : bool
        See `high_water`.
    on_level : callable
        Called with `is_high` when that changes, from within whatever changed it: a write, a hold, a release.
    """

    # Mutable state: descriptors of the lock (_lock_fd, -1 once closed) and of the folder (_folder_fd), the counter of
    # file names in this run (_run, _count), the file made ahead (_next), files of this process that exist and are not
    # yet removed (_files), bytes of all files (used_bytes), up to where they may grow before disk and level are looked
    # at again (_limit), the marks in bytes (_high_bytes, _low_bytes), instances by SOP Instance UID and transfer syntax
    # (_instances), those nobody holds, longest idle first, with their bytes (_idle, _idle_bytes), those that are not
    # verified yet (_doubtful), names of those used since the journal was told (_used), the journal, and a thread to
    # verify and compact.

    def __init__(
        self,
        directory: Path,
        *,
        max_bytes: int,
        retention: float,
        high_water: float = 0.9,
        low_water: float = 0.8,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        reserve_free: int = RESERVE_FREE,
    ) -> None:
        self.max_bytes, self.retention, self.reserve_free = max_bytes, retention, reserve_free
        self._high_water, self._low_water = high_water, low_water
        self._clock, self._wall_clock = clock, wall_clock
        directory.mkdir(parents=True, exist_ok=True)
        self._lock_fd = _lock(directory)
        self.folder = directory / "objects"
        self.folder.mkdir(exist_ok=True)
        self._folder_fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._files: set[str] = set()
        self._next = NextFile(self._make_file, lambda name: self._remove_file(name, 0))
        self.used_bytes = 0
        self.is_high = False
        self.on_level: Callable[[bool], None] = lambda is_high: None
        self._instances: dict[str, dict[str, SpooledInstance]] = {}
        self._idle: dict[SpooledInstance, None] = {}
        self._idle_bytes = 0
        self._doubtful: dict[SpooledInstance, None] = {}
        self._used: dict[str, None] = {}
        self._executor = ThreadPoolExecutor(1, "spool")
        self._limit = 0
        self._high_bytes = self._low_bytes = max_bytes
        self._journal = Journal(directory, self._take_over(spool_journal.read(directory)))
        self._run, self._count = self._journal.number, itertools.count(1)
        self._evict_down_to(max_bytes)
        self._measure()

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

    def prepare(self, size: int) -> None:
        """Make the next file ahead, while no peer waits for it, after an instance of `size` bytes."""
        self._next.prepare(size)

    def reserve(self, length: int) -> None:
        """Lend bytes of the quota to a sibling process, which writes without asking; raises SpoolFull."""
        if self.used_bytes + length > self._limit:
            self._make_room(length)
        self.used_bytes += length

    def unreserve(self, length: int) -> None:
        """Take back what a sibling did not use."""
        self.used_bytes -= length
        self._note_level(self.used_bytes - self._idle_bytes)

    def new_name(self, prefix: str) -> str:
        """Return a file name that nobody uses, nor any that begins with it and a `-`.

        `prefix` tells people whose it is: letters and digits.
        """
        return f"{self._run:x}.{next(self._count):x}-{prefix}"

    def has_file(self, name: str) -> bool:
        """Tell whether a file is one that this spool made or adopted."""
        return name in self._files

    def adopt(
        self,
        name: str,
        size: int,
        *,
        checksum: str,
        sop_class_uid: str,
        sop_instance_uid: str,
        transfer_syntax_uid: str,
        reserved: int,
    ) -> SpooledInstance:
        """Take over an instance that a sibling has written whole to `folder / name`; nobody holds it yet.

        `reserved` of the bytes that were lent stand for it. The checksum is XXH3-128, in hexadecimal.

        Raises
        ------
        LocalProtocolError
            There is no such file, or it has another size.
        """
        try:
            found = os.stat(name, dir_fd=self._folder_fd, follow_symlinks=False).st_size
        except OSError as exc:
            raise LocalProtocolError(f"{name} cannot be adopted: {exc.strerror}") from exc
        if found != size:
            raise LocalProtocolError(f"{name} cannot be adopted: it has {found} bytes, not {size}")
        self.used_bytes += size - reserved
        self._files.add(name)
        instance = SpooledInstance(
            self,
            name,
            size,
            checksum=checksum,
            sop_class_uid=sop_class_uid,
            sop_instance_uid=sop_instance_uid,
            transfer_syntax_uid=transfer_syntax_uid,
        )
        self._add(instance)
        return instance

    def find(self, sop_instance_uid: str, accept: Sequence[str] | None = None) -> SpooledInstance | None:
        """Return a spooled instance in the first of the transfer syntaxes that there is, None takes the newest.

        Nothing is acquired: call `hold` before control is given away. What an earlier run left is not returned before
        it has been verified.
        """
        by_syntax = self._instances.get(sop_instance_uid)
        if not by_syntax:
            return None
        if accept is None:
            return next((each for each in reversed(by_syntax.values()) if each._is_verified), None)
        return next((by_syntax[uid] for uid in accept if uid in by_syntax and by_syntax[uid]._is_verified), None)

    async def verify(self, sop_instance_uids: Iterable[str]) -> None:
        """Read what an earlier run left of these instances, so that `find` may return it; the damaged is removed."""
        if not self._doubtful:
            return
        for uid in sop_instance_uids:
            for instance in tuple(self._instances.get(uid, {}).values()):
                await self._verify(instance)

    async def tidy(self) -> None:
        """Keep the spool in order, until cancelled: expire, verify what an earlier run left, compact the journal."""
        while True:
            try:
                self._next.drop()
                self.expire()
                self._tell_journal()
                if self._journal.lines > _GARBAGE + 2 * len(self._files):
                    await self._compact()
                while self._doubtful:
                    await self._verify(next(iter(self._doubtful)))
            except OSError:
                _log.exception("the spool could not be tidied")
            await asyncio.sleep(_TIDY_EVERY)

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
        """Leave what serves the next run, and nothing else; nothing may be held or written any more."""
        if self._lock_fd < 0:
            return
        self._executor.shutdown(cancel_futures=True)
        self._tell_journal()
        self._journal.close()
        self._next.drop()
        kept = {each.name for each in self._all() if each.source}
        for name in self._files - kept:
            self._unlink(name)
        os.close(self._folder_fd)
        os.close(self._lock_fd)
        self._lock_fd = -1

    # --- what writers and instances tell us -----------------------------------------------------------------------

    def _make_file(self) -> tuple[str, int]:
        name = f"{self._run:x}.{next(self._count):x}"
        try:
            fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=self._folder_fd)
        except OSError as exc:
            raise_mapped(exc)
        self._files.add(name)
        return name, fd

    def _remove_file(self, name: str, size: int) -> None:
        if name in self._files:
            self._files.discard(name)
            self.used_bytes -= size
            self._unlink(name)
            self._note_level(self.used_bytes - self._idle_bytes)

    def _unlink(self, name: str) -> None:
        with suppress(FileNotFoundError):  # somebody tidied by hand
            os.unlink(name, dir_fd=self._folder_fd)

    def _add(self, instance: SpooledInstance) -> None:
        """Let others find an instance that is whole; nobody holds it yet."""
        self._index(instance)
        self._set_idle(instance)

    def _index(self, instance: SpooledInstance) -> None:
        """Let an instance be found, in place of the one before of the same UID and syntax."""
        by_syntax = self._instances.setdefault(instance.sop_instance_uid, {})
        replaced = by_syntax.pop(instance.transfer_syntax_uid, None)
        by_syntax[instance.transfer_syntax_uid] = instance
        if replaced is not None:
            replaced._is_indexed = False
            self._doubtful.pop(replaced, None)
            if replaced in self._idle:
                self._forget_idle(replaced)
                self._remove_file(replaced.name, replaced.size)

    def _record(self, instance: SpooledInstance) -> None:
        if instance._is_indexed:
            self._journal.append(instance, self._wall_clock())

    def _record_sha256(self, instance: SpooledInstance) -> None:
        if instance._is_indexed and instance.source and instance.sha256 is not None:
            self._journal.append_sha256(instance.name, instance.sha256)

    def _set_held(self, instance: SpooledInstance) -> None:
        if instance.name not in self._files:
            raise ValueError(f"{instance!r} is gone: it was evicted before it was held")
        self._forget_idle(instance)
        self._note_level(self.used_bytes - self._idle_bytes)
        if not self.is_high:
            self._limit = min(self._limit, self._high_bytes + self._idle_bytes)

    def _set_idle(self, instance: SpooledInstance) -> None:
        if instance._is_indexed:
            instance._idle_since = self._clock()
            self._idle[instance] = None
            self._idle_bytes += instance.size
            if instance.source:
                self._used[instance.name] = None
            self._note_level(self.used_bytes - self._idle_bytes)
        else:
            self._remove_file(instance.name, instance.size)

    def _forget_idle(self, instance: SpooledInstance) -> None:
        del self._idle[instance]
        self._idle_bytes -= instance.size

    def _evict(self, instance: SpooledInstance) -> None:
        self._forget_idle(instance)
        instance._is_indexed = False
        self._doubtful.pop(instance, None)
        self._used.pop(instance.name, None)
        by_syntax = self._instances[instance.sop_instance_uid]
        del by_syntax[instance.transfer_syntax_uid]
        if not by_syntax:
            del self._instances[instance.sop_instance_uid]
        self._remove_file(instance.name, instance.size)

    # --- room -----------------------------------------------------------------------------------------------------

    def _make_room(self, length: int) -> None:
        """Look at quota, disk and level, evict as needed, and set up to where writers may go without asking again."""
        while True:
            disk = self._disk_free() - self.reserve_free
            room = min(self.max_bytes - self.used_bytes, disk)
            if room >= length:
                break
            oldest = next(iter(self._idle), None)
            if oldest is None:
                what = f"{self.max_bytes} bytes are the quota" if disk >= length else "the disk is at its reserve"
                raise SpoolFull(f"the spool has no room: {self.used_bytes} bytes are in use, {what}")
            self._evict(oldest)
        self._measure(room, length)
        self._note_level(self.used_bytes + length - self._idle_bytes)

    def _measure(self, room: int | None = None, length: int = 0) -> None:
        if room is None:
            room = max(0, min(self.max_bytes - self.used_bytes, self._disk_free() - self.reserve_free))
        whole = self.used_bytes + room
        self._high_bytes, self._low_bytes = int(whole * self._high_water), int(whole * self._low_water)
        self._limit = self.used_bytes + min(room, max(length, _MEASURE_EVERY))
        if not self.is_high:
            self._limit = min(self._limit, max(self._high_bytes + self._idle_bytes, self.used_bytes + length))

    def _note_level(self, pinned: int) -> None:
        """Learn how many bytes cannot be evicted."""
        if self.is_high != (pinned > self._low_bytes if self.is_high else pinned >= self._high_bytes):
            self.is_high = not self.is_high
            self.on_level(self.is_high)

    def _evict_down_to(self, size: int) -> None:
        for instance in tuple(self._idle):
            if self.used_bytes <= size:
                break
            self._evict(instance)

    def _disk_free(self) -> int:
        disk = os.statvfs(self._folder_fd)
        return disk.f_bavail * disk.f_frsize

    # --- over restarts --------------------------------------------------------------------------------------------

    def _take_over(self, records: Iterable[Record]) -> list[tuple[SpooledInstance, float]]:
        """Index what an earlier run left whole, the longest unused first; remove all other files."""
        sizes = {}
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if not entry.is_dir(follow_symlinks=False):
                    sizes[entry.name] = entry.stat(follow_symlinks=False).st_size
        now, now_wall = self._clock(), self._wall_clock()
        kept = []
        for record in records:
            if sizes.get(record.name) != record.size:
                continue
            instance = SpooledInstance(
                self,
                record.name,
                record.size,
                checksum=record.checksum,
                sop_class_uid=record.sop_class_uid,
                sop_instance_uid=record.sop_instance_uid,
                transfer_syntax_uid=record.transfer_syntax_uid,
            )
            instance.study_instance_uid, instance.series_instance_uid = (
                record.study_instance_uid,
                record.series_instance_uid,
            )
            instance.source, instance.accept = record.source, record.accept
            instance.bytes_changed, instance.sha256 = record.bytes_changed, record.sha256
            instance._is_verified = False
            self._files.add(record.name)
            self.used_bytes += record.size
            self._doubtful[instance] = None
            self._index(instance)
            instance._idle_since = now - max(0.0, now_wall - record.used_at)
            self._idle[instance] = None
            self._idle_bytes += record.size
            kept.append((instance, record.used_at))
        for name in sizes.keys() - self._files:
            self._unlink(name)
        return [(instance, used_at) for instance, used_at in kept if instance.name in self._files]

    async def _verify(self, instance: SpooledInstance) -> None:
        if instance not in self._doubtful:
            return
        try:
            loop = asyncio.get_running_loop()
            found = await loop.run_in_executor(self._executor, _checksum_of, instance.path)
        except OSError as exc:
            found = f"unreadable: {exc.strerror}"
        if instance not in self._doubtful:  # evicted meanwhile, or verified by another who waits for it
            return
        if found == instance.checksum:
            instance._is_verified = True
            del self._doubtful[instance]
        else:
            _log.warning("a file that an earlier run left in the spool is damaged and removed: %s", instance.name)
            self._evict(instance)

    def _tell_journal(self) -> None:
        used, self._used = self._used, {}
        self._journal.append_use(used, self._wall_clock())

    async def _compact(self) -> None:
        now, now_wall = self._clock(), self._wall_clock()
        kept = [
            (each, now_wall - (now - each._idle_since if each in self._idle else 0.0))
            for each in self._all()
            if each.source
        ]
        number = self._journal.begin_next()
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._executor, self._journal.rewrite_until, number, kept)

    def _all(self) -> Iterator[SpooledInstance]:
        return (each for by_syntax in self._instances.values() for each in by_syntax.values())


def _checksum_of(path: Path) -> str:
    checksum = xxh3_128()
    with path.open("rb", buffering=0) as stream:
        while data := stream.read(_READ):
            checksum.update(data)
    return checksum.hexdigest()


def _lock(directory: Path) -> int:
    """Return the descriptor that locks the directory for as long as it is open."""
    fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise SpoolInUse(str(directory)) from None
    return fd
