"""What this node has published, and what its last sweep saw: remembered in `data_dir/publishing`.

The registry is the truth about what is registered. This memory spares asking for what has not changed, and holds what
the registry cannot be asked: under which patient a study went out that its PACS no longer knows, and which documents
went to a repository elsewhere. Without it, or after its loss, each study of this node is read and compared once more.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import sqlite3
import threading
import zlib
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from xca_imaging import uids
from xca_imaging.errors import ConfigurationError
from xca_imaging.metadata import ebrim
from xca_imaging.metadata.model import DocumentEntry
from xca_imaging.wire import xml

# The columns of `studies` are the fields of StudyRecord, in their order.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS studies (
    pacs TEXT NOT NULL,
    study_instance_uid TEXT NOT NULL,
    day TEXT NOT NULL,
    patient_id TEXT NOT NULL,
    given_for TEXT NOT NULL,
    seen TEXT NOT NULL,
    published TEXT NOT NULL,
    series TEXT NOT NULL,
    looked_at REAL NOT NULL,
    missing INTEGER NOT NULL,
    PRIMARY KEY (pacs, study_instance_uid)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS studies_by_day ON studies (pacs, day);
CREATE TABLE IF NOT EXISTS sent (
    entry_uuid TEXT PRIMARY KEY,
    repository TEXT NOT NULL,
    reference_id TEXT NOT NULL,
    unique_id TEXT NOT NULL,
    entry BLOB NOT NULL,
    content BLOB NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS sent_by_reference ON sent (repository, reference_id);
CREATE INDEX IF NOT EXISTS sent_by_unique_id ON sent (repository, unique_id);
"""
_BUSY_TIMEOUT = 30.0  # s: another process of this node writes a row
_LOCKS = 64  # files; two studies that share one wait for each other, which is harmless
_LOCK_POLL = 0.1  # s


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyRecord:
    """One study of one PACS.

    Attributes
    ----------
    day : str
        Its Study Date (0008,0020) when it was seen last, YYYYMMDD: by it a sweep finds what it misses.
    patient_id : str
        CX under which it is registered; empty while it is not.
    given_for : str
        Where a person gave that CX: the department's patient that it was given for. Empty otherwise.
    seen, published, series : str
        Signatures: of the study as the last sweep saw it, of the study that a sweep published, and of the series that
        were published.
    looked_at : float
        When its series were compared last, in seconds since the epoch.
    missing : int
        Sweeps in a row that did not find it.
    """

    pacs: str
    study_instance_uid: str
    day: str = ""
    patient_id: str = ""
    given_for: str = ""
    seen: str = ""
    published: str = ""
    series: str = ""
    looked_at: float = 0.0
    missing: int = 0


@dataclass(frozen=True, slots=True)
class Sent:
    """A document that a repository elsewhere accepted and that nothing has replaced since."""

    entry: DocumentEntry
    content: bytes


class Publications:
    """The memory of one data directory, which several processes of a node may share.

    Methods that are no coroutines block for as long as a small read or write takes, and may be called in any thread.

    Raises
    ------
    ConfigurationError
        The folder or file cannot be used.
    """

    # Mutable state: the connection, one statement at a time under `_lock`; `_sweeping`, the file that is locked while
    # this process is the one that sweeps.

    def __init__(self, data_dir: Path) -> None:
        self._folder = data_dir / "publishing"
        self._lock = threading.Lock()
        self._sweeping: int | None = None
        file = self._folder / "memory.db"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._database = _open(file)
        except (OSError, sqlite3.Error) as exc:
            problem = f"{file} cannot be used: {exc}"
            raise ConfigurationError(str(file), "", problem, "it only spares work: it may be removed") from exc

    def close(self) -> None:
        """Close the file, and let another process sweep."""
        if self._sweeping is not None:
            os.close(self._sweeping)
            self._sweeping = None
        with self._lock:
            self._database.close()

    # --- studies ------------------------------------------------------------------------------------------------------

    def study(self, pacs: str, study_instance_uid: str) -> StudyRecord:
        """Return what is remembered of a study: an empty record where it is nothing."""
        found = self._do("SELECT * FROM studies WHERE pacs = ? AND study_instance_uid = ?", pacs, study_instance_uid)
        return _record(found[0]) if found else StudyRecord(pacs=pacs, study_instance_uid=study_instance_uid)

    def studies(self, pacs: str, first_day: str, last_day: str) -> dict[str, StudyRecord]:
        """Return the studies of a range of days (YYYYMMDD, inclusive) by their UID."""
        found = self._do("SELECT * FROM studies WHERE pacs = ? AND day BETWEEN ? AND ?", pacs, first_day, last_day)
        return {record.study_instance_uid: record for record in map(_record, found)}

    def remember(self, record: StudyRecord) -> None:
        """Write a study's record."""
        self._do("INSERT OR REPLACE INTO studies VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", *astuple(record))

    def forget(self, pacs: str, study_instance_uid: str) -> None:
        """Forget a study that is neither there nor registered."""
        self._do("DELETE FROM studies WHERE pacs = ? AND study_instance_uid = ?", pacs, study_instance_uid)

    # --- documents at a repository elsewhere --------------------------------------------------------------------------

    def keep_sent(self, repository: str, sent: Sequence[Sent], replaced: Sequence[str]) -> None:
        """Remember documents that a repository accepted, and forget those that they replaced (entryUUIDs)."""
        rows = [
            (
                each.entry.entry_uuid,
                repository,
                reference,
                each.entry.unique_id,
                xml.serialize(ebrim.encode_object(each.entry)),
                each.content,
            )
            for each in sent
            for reference in each.entry.reference_ids
            if reference.endswith(f"^{uids.REFERENCE_STUDY_INSTANCE_UID}")
        ]
        with self._lock, self._database:
            self._database.executemany("DELETE FROM sent WHERE entry_uuid = ?", [(each,) for each in replaced])
            self._database.executemany("INSERT OR REPLACE INTO sent VALUES (?, ?, ?, ?, ?, ?)", rows)

    def sent(self, repository: str, reference_id: str) -> list[DocumentEntry]:
        """Return the documents of a study that a repository has, by the study's reference id."""
        found = []
        for (entry,) in self._do(
            "SELECT entry FROM sent WHERE repository = ? AND reference_id = ?", repository, reference_id
        ):
            decoded = ebrim.decode_object(xml.parse(entry))
            assert isinstance(decoded, DocumentEntry)
            found.append(decoded)
        return found

    def sent_content(self, repository: str, document_unique_id: str) -> bytes | None:
        """Return a document that a repository has, None where it is not known here."""
        found = self._do(
            "SELECT content FROM sent WHERE repository = ? AND unique_id = ?", repository, document_unique_id
        )
        return found[0][0] if found else None

    def all_sent(self, repository: str) -> Iterator[tuple[DocumentEntry, bytes]]:
        """Yield every document that a repository has, one at a time."""
        last = ""
        while found := self._do(
            "SELECT entry_uuid, entry, content FROM sent WHERE repository = ? AND entry_uuid > ? "
            "ORDER BY entry_uuid LIMIT 100",
            repository,
            last,
        ):
            last = found[-1][0]
            for _, entry, content in found:
                decoded = ebrim.decode_object(xml.parse(entry))
                assert isinstance(decoded, DocumentEntry)
                yield decoded, content

    # --- one at a time ------------------------------------------------------------------------------------------------

    def may_sweep(self) -> bool:
        """Tell whether this process is the one of this data directory that sweeps; it stays so until `close`."""
        if self._sweeping is None:
            self._sweeping = self._take("sweeping")
        return self._sweeping is not None

    @asynccontextmanager
    async def publishing(self, pacs: str, study_instance_uid: str) -> AsyncIterator[None]:
        """Wait until nobody publishes this study, and keep others from it meanwhile.

        Two that compare it with the same registered manifest would both replace it.
        """
        name = f"{zlib.crc32(f'{pacs}/{study_instance_uid}'.encode()) % _LOCKS:02}"
        while (handle := self._take(name)) is None:  # noqa: ASYNC110 - another process cannot set an event here
            await asyncio.sleep(_LOCK_POLL)
        try:
            yield
        finally:
            os.close(handle)

    def _take(self, name: str) -> int | None:
        handle = os.open(self._folder / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            return None
        return handle

    def _do(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        with self._lock, self._database:
            return self._database.execute(statement, values).fetchall()


def _record(row: tuple[Any, ...]) -> StudyRecord:
    return StudyRecord(**dict(zip(StudyRecord.__slots__, row, strict=True)))


def _open(file: Path) -> sqlite3.Connection:
    """Open the file; a new one in the place of one that is damaged."""
    try:
        return _connect(file)
    except sqlite3.OperationalError:  # no permission, a full disk, a lock: not damaged
        raise
    except sqlite3.DatabaseError:
        for suffix in ("", "-wal", "-shm"):
            with suppress(FileNotFoundError):
                file.with_name(file.name + suffix).unlink()
        return _connect(file)


def _connect(file: Path) -> sqlite3.Connection:
    database = sqlite3.connect(file, timeout=_BUSY_TIMEOUT, check_same_thread=False)
    try:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = NORMAL")  # what a power cut takes is read and compared once more
        database.executescript(_SCHEMA)
    except BaseException:
        database.close()
        raise
    return database
