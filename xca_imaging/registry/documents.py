"""Documents on disk by the SHA-256 of their content, and the rows that give them names.

A document is first written whole and synced beside its place (`stage`), then moved there inside the database
transaction that registers it (`place`, `record`). So a document with a row is always whole on disk, and a refused
submission never had more than a file in `incoming/`, which is removed. What a crash between the move and the commit
leaves behind is a whole file without a name: nobody can retrieve it, and the same submission sent again uses it.

Layout: `<directory>/ab/cd/<sha-256 in hex>`, `<directory>/incoming/<random>`. Two levels of 256 keep ten million
documents at 150 files a folder.

With a remote store the same holds of its objects: they are written before the transaction and looked for inside it,
because a removal may have come in between. The directory then keeps what was written or read last, up to a limit.

References
----------
* IHE ITI TF-2, 3.41.4.1.3 (stores durably before it registers), 3.43.4.2.3 (retrieve)
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, delete, insert, select

from xca_imaging import errors
from xca_imaging.registry.database import Database
from xca_imaging.registry.remote import RemoteStore
from xca_imaging.registry.tables import StoredDocumentRow

_CHUNK = 1024 * 1024  # bytes copied at a time: memory stays flat whatever the size of a document


@dataclass(frozen=True, slots=True)
class Content:
    """A document as it was received: in memory, or spooled to a file that the caller removes."""

    size: int
    sha1: str
    data: bytes | None = None
    path: Path | None = None

    @classmethod
    def of(cls, data: bytes) -> Content:
        """Return the content of bytes in memory."""
        return cls(len(data), hashlib.sha1(data, usedforsecurity=False).hexdigest(), data=data)

    def chunks(self) -> Iterator[bytes | memoryview]:
        """Yield the bytes, a bounded number at a time."""
        if self.path is None:
            yield memoryview(self.data or b"")
            return
        with self.path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                yield chunk


@dataclass(frozen=True, slots=True)
class StoredDocument:
    """A document that can be retrieved; `size`, `sha1` and `mime_type` are as registered."""

    path: Path
    size: int
    mime_type: str
    sha1: str


@dataclass(frozen=True, slots=True)
class Orphans:
    """What a check of the store found: contents without a name, and names without content."""

    unnamed: int
    missing: int


@dataclass(frozen=True, slots=True)
class Staged:
    """A document whole and durable on disk, but without a name yet."""

    path: Path
    size: int
    sha1: str
    sha256: str


class DocumentStore:
    """Content-addressed files under one directory.

    Parameters
    ----------
    verify_up_to : int
        Documents up to so many bytes are hashed when they are looked up. Manifests are (a few KB to MB, 1 ms); of a
        bigger document only the size is compared, so that its first byte does not wait for its last.
    incoming_age : float
        Seconds after which a file in `incoming/` is left over from a crash: longer than any transfer lasts.
    remote : RemoteStore, optional
        Where the documents are; `directory` is then a cache.
    cache_bytes : int
        Most bytes of that cache.
    """

    # Mutable state: the files under `directory`; `_cached` (SHA-256 to size, oldest first) with its lock.

    def __init__(
        self,
        directory: Path,
        *,
        verify_up_to: int = 4 * 1024 * 1024,
        incoming_age: float = 86400.0,
        remote: RemoteStore | None = None,
        cache_bytes: int = 10**9,
    ) -> None:
        self._directory = directory
        self._incoming = directory / "incoming"
        self._verify_up_to = verify_up_to
        self._incoming_age = incoming_age
        self.remote = remote
        self._cache_bytes = cache_bytes
        self._cached: OrderedDict[str, int] = OrderedDict()
        self._cache_lock = threading.Lock()
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)  # patient data
        self._incoming.mkdir(mode=0o700, exist_ok=True)
        oldest = time.time() - incoming_age
        for path in self._incoming.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process starts on the same directory
                if path.stat().st_mtime < oldest:
                    path.unlink()
        if remote is not None:
            files = sorted(directory.glob("[0-9a-f][0-9a-f]/*/*"), key=lambda path: path.stat().st_mtime)
            self._cached.update((path.name, path.stat().st_size) for path in files)

    def stage(self, content: Content) -> Staged:
        """Write a document whole and durable, without a name.

        Raises
        ------
        errors.RepositoryOutOfResources
            The disk took less than all of it; nothing is left.
        """
        path = self._incoming / uuid.uuid4().hex
        sha1, sha256, size = hashlib.sha1(usedforsecurity=False), hashlib.sha256(), 0
        try:
            with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
                for chunk in content.chunks():
                    file.write(chunk)
                    sha1.update(chunk)
                    sha256.update(chunk)
                    size += len(chunk)
                file.flush()
                os.fsync(file.fileno())
        except OSError as problem:
            path.unlink(missing_ok=True)
            raise errors.RepositoryOutOfResources(f"a document cannot be stored: {problem.strerror}") from problem
        staged = Staged(path, size, sha1.hexdigest(), sha256.hexdigest())
        if self.remote is not None:
            try:
                self.remote.put(path, staged.sha256)
            except errors.RegistryError:
                self.discard(staged)
                raise
        return staged

    def discard(self, staged: Staged) -> None:
        """Remove a staged document, unless it has been placed."""
        staged.path.unlink(missing_ok=True)

    def place(self, staged: Staged) -> None:
        """Move a staged document to where its content is looked for; durable when it returns.

        Called while the writing transaction is open, so that `remove_unnamed` cannot come in between.
        """
        if self.remote is not None and self.remote.size(staged.sha256) != staged.size:
            self.remote.put(staged.path, staged.sha256)
        try:
            self._keep(staged.path, staged.sha256)
        except OSError as problem:
            raise errors.RepositoryOutOfResources(f"a document cannot be stored: {problem.strerror}") from problem
        self._trim(staged.sha256, staged.size)

    def _keep(self, path: Path, sha256: str) -> None:
        target = self._path(sha256)
        for folder in (target.parent.parent, target.parent):
            if not folder.is_dir():
                folder.mkdir(mode=0o700, exist_ok=True)
                _sync(folder.parent)
        # Also over a file that is there: it has the same content, or is a damaged copy of it. Who has it open
        # reads on.
        path.replace(target)
        _sync(target.parent)

    def _trim(self, sha256: str, size: int) -> None:
        """Note a file of the cache, and remove the oldest ones that are too many."""
        if self.remote is None:
            return
        with self._cache_lock:
            self._cached[sha256] = size
            self._cached.move_to_end(sha256)
            total = sum(self._cached.values())
            while total > self._cache_bytes and len(self._cached) > 1:
                oldest, freed = self._cached.popitem(last=False)
                total -= freed
                self._path(oldest).unlink(missing_ok=True)

    def remove_unnamed(self, connection: Connection, staged: Staged) -> None:
        """Remove a placed document that no row names, because its transaction failed after all."""
        self.remove_content(connection, staged.sha256)

    def remove_content(self, connection: Connection, sha256: str) -> None:
        """Remove the file of a content that no row names; the caller has the writing transaction."""
        named = select(StoredDocumentRow.sha256).where(StoredDocumentRow.sha256 == sha256).limit(1)
        if connection.scalar(named) is None:
            if self.remote is not None:
                self.remote.remove(sha256)
            self._path(sha256).unlink(missing_ok=True)

    def record(
        self, connection: Connection, repository_unique_id: str, document_unique_id: str, mime_type: str, staged: Staged
    ) -> None:
        """Give a placed document its name.

        The same name for the same content again changes nothing (a document may be submitted twice).

        Raises
        ------
        errors.NonIdenticalHash
            The name belongs to other content (TF-2 3.41.4.1.3).
        """
        known = connection.execute(
            select(StoredDocumentRow.sha256).where(
                StoredDocumentRow.repository_unique_id == repository_unique_id,
                StoredDocumentRow.document_unique_id == document_unique_id,
            )
        ).one_or_none()
        if known is None:
            connection.execute(
                insert(StoredDocumentRow),
                {
                    "repository_unique_id": repository_unique_id,
                    "document_unique_id": document_unique_id,
                    "mime_type": mime_type,
                    "size": staged.size,
                    "sha1": staged.sha1,
                    "sha256": staged.sha256,
                },
            )
        elif known.sha256 != staged.sha256:
            # The registry has compared SHA-1 and size before: what differs here is a collision of SHA-1.
            raise errors.NonIdenticalHash(document_unique_id)

    def forget(self, connection: Connection, repository_unique_id: str, document_unique_id: str) -> str | None:
        """Take a document's name away and return the SHA-256 of its content, None if there is no such document.

        Its file goes with `remove_content`, once that is committed.
        """
        named = (
            StoredDocumentRow.repository_unique_id == repository_unique_id,
            StoredDocumentRow.document_unique_id == document_unique_id,
        )
        sha256 = connection.scalar(select(StoredDocumentRow.sha256).where(*named))
        connection.execute(delete(StoredDocumentRow).where(*named))
        return sha256

    def find(self, connection: Connection, repository_unique_id: str, document_unique_id: str) -> StoredDocument | None:
        """Return a document by its name.

        Raises
        ------
        errors.RepositoryError
            It was stored here, but its file is not what was stored.
        """
        row = connection.execute(
            select(
                StoredDocumentRow.mime_type, StoredDocumentRow.size, StoredDocumentRow.sha1, StoredDocumentRow.sha256
            ).where(
                StoredDocumentRow.repository_unique_id == repository_unique_id,
                StoredDocumentRow.document_unique_id == document_unique_id,
            )
        ).one_or_none()
        if row is None:
            return None
        path = self._path(row.sha256)
        if not self._is_whole(path, row.size, row.sha256):
            if self.remote is None or not self._fetch(row.sha256, row.size):
                raise errors.RepositoryError("the stored document is missing or damaged", document_unique_id)
        else:
            self._trim(row.sha256, row.size)
        return StoredDocument(path, row.size, row.mime_type, row.sha1)

    def _is_whole(self, path: Path, size: int, sha256: str) -> bool:
        return _size(path) == size and (size > self._verify_up_to or _sha256(path) == sha256)

    def _fetch(self, sha256: str, size: int) -> bool:
        """Copy a content from the remote store into the cache; False when it is not there, or not whole."""
        assert self.remote is not None
        path = self._incoming / uuid.uuid4().hex
        try:
            if not self.remote.get(sha256, path) or _size(path) != size or _sha256(path) != sha256:
                return False
            self._keep(path, sha256)
        finally:
            path.unlink(missing_ok=True)
        self._trim(sha256, size)
        return True

    def check(self, database: Database) -> Iterator[Orphans]:
        """Compare contents and names: contents that no document names, and documents without their content.

        Yields what was found so far after each part in 256: memory stays small at any number of documents, and the
        caller may rest or stop in between. The last value is that of the whole store.
        """
        unnamed = missing = 0
        for number in range(256):
            prefix = f"{number:02x}"
            named = self._named(database, prefix)
            found = dict(self.remote.names(prefix) if self.remote is not None else self._names(prefix))
            # Young ones may belong to a submission that is being registered.
            unnamed += sum(age > self._incoming_age for sha256, age in found.items() if sha256 not in named)
            if named - found.keys():
                # What was removed since its name was read is no loss.
                missing += len((named & self._named(database, prefix)) - found.keys())
            yield Orphans(unnamed, missing)

    def _named(self, database: Database, prefix: str) -> set[str]:
        row = StoredDocumentRow.sha256
        with database.reading() as connection:
            return set(connection.scalars(select(row).where(row >= prefix, row < prefix + "g").distinct()))

    def _names(self, prefix: str) -> Iterator[tuple[str, float]]:
        now = time.time()
        for path in (self._directory / prefix).glob("*/*"):
            with contextlib.suppress(FileNotFoundError):
                yield path.name, now - path.stat().st_mtime

    def _path(self, sha256: str) -> Path:
        return self._directory / sha256[:2] / sha256[2:4] / sha256


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    """Make a folder's entries durable: a file that was moved into it is there after a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
