"""The Document Repository actor: takes documents with their metadata and registers them in this node's registry.

References
----------
* IHE ITI TF-1, 10.1.1.4 (Document Repository); TF-2, 3.41.4.1.3 (ITI-41, expected actions)
* IHE RAD TF-3, 4.68 (RAD-68: ITI-41 with a manifest)
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from sqlalchemy import select

from xca_imaging import errors, uids
from xca_imaging.errors import RegistryError, SubmissionRefused
from xca_imaging.metadata.model import DocumentEntry, Submission
from xca_imaging.metadata.validate import validate_submission
from xca_imaging.registry import events, submit
from xca_imaging.registry.document_registry import Registry
from xca_imaging.registry.documents import Content, DocumentStore, Orphans, Staged, StoredDocument
from xca_imaging.registry.events import Requester
from xca_imaging.registry.remote import RemoteStore
from xca_imaging.registry.submit import Registered
from xca_imaging.registry.tables import DocumentEntryRow, ObjectRow

log = logging.getLogger(__name__)


class Repository:
    """A Document Repository in front of a registry of the same node, whose database holds its names."""

    # Mutable state: none of its own; the store has its files, the registry its database.

    def __init__(
        self, registry: Registry, directory: Path, *, repository_unique_id: str, remote: RemoteStore | None = None
    ) -> None:
        self._registry = registry
        self._store = DocumentStore(directory, remote=remote)
        self.repository_unique_id = repository_unique_id

    def provide(self, submission: Submission, contents: Mapping[str, Content]) -> Registered:
        """Store documents durably and register them (ITI-41, RAD-68): all of it, or nothing.

        Parameters
        ----------
        contents : mapping of str to Content
            Documents by the id of their DocumentEntry in the message.

        Raises
        ------
        errors.SubmissionRefused
            With all that is wrong with message and contents, or with all that the registry has against it.
        """
        vocabulary = self._registry.policy.vocabulary
        wrong = validate_submission(submission, repository_side=True, vocabulary=vocabulary)
        if problems := (*wrong, *_check(submission, contents)):
            raise SubmissionRefused(problems)
        staged: dict[str, Staged] = {}
        try:
            for entry in submission.documents:
                staged[entry.entry_uuid] = self._stage(entry, contents[entry.entry_uuid])
            return self._register(submission, staged)
        except BaseException:
            if self._store.remote is not None:  # staged ones are there already
                self._undo(list(staged.values()))
            raise
        finally:
            for document in staged.values():
                self._store.discard(document)

    def find(self, document_unique_id: str) -> StoredDocument | None:
        """Return a document of this repository, None if there is none of that id (ITI-43).

        Raises
        ------
        errors.RepositoryError
            It was stored here, but its file is missing or damaged.
        """
        with self._registry.database.reading() as connection:
            return self._store.find(connection, self.repository_unique_id, document_unique_id)

    def check(self) -> Iterator[Orphans]:
        """Compare stored contents and their names, part by part; see `DocumentStore.check`."""
        return self._store.check(self._registry.database)

    def remove(self, document_unique_id: str, requester: Requester) -> None:
        """Remove a document for good (ITI-86); its metadata are the registry's to remove (ITI-62).

        Raises
        ------
        errors.DocumentUniqueIdError
            There is none of that id.
        errors.RemoveDocumentsError
            It is made on demand, or its file cannot be removed; then it has lost its name nonetheless.
        """
        database = self._registry.database
        with database.writing() as connection:
            sha256 = self._store.forget(connection, self.repository_unique_id, document_unique_id)
            entries = connection.execute(
                select(ObjectRow.patient_id, DocumentEntryRow.on_demand)
                .join(DocumentEntryRow, DocumentEntryRow.id == ObjectRow.id)
                .where(ObjectRow.unique_id == document_unique_id)
            ).all()
            if sha256 is None:
                if any(entry.on_demand for entry in entries):
                    text = "the document is made on demand: there is nothing stored"
                    raise errors.RemoveDocumentsError(text, document_unique_id)
                text = f"no document {document_unique_id} in this repository"
                raise errors.DocumentUniqueIdError(text, document_unique_id)
            events.record(
                connection,
                now=self._registry.now(),
                transaction="ITI-86",
                action="remove",
                requester=requester,
                patient_id=entries[0].patient_id if entries else "",
                objects=[document_unique_id],
                repository_unique_id=self.repository_unique_id,
                sha256=sha256,
            )
        try:
            # Not in the transaction above: were it rolled back, the document would be without its file.
            with database.writing() as connection:
                self._store.remove_content(connection, sha256)
        except OSError as problem:
            text = f"its file cannot be removed: {problem.strerror}"
            raise errors.RemoveDocumentsError(text, document_unique_id) from problem

    def _stage(self, entry: DocumentEntry, content: Content) -> Staged:
        staged = self._store.stage(content)
        if (staged.size, staged.sha1) != (content.size, content.sha1.lower()):
            self._store.discard(staged)
            raise errors.RepositoryError("the document changed between its receipt and its storage", entry.unique_id)
        return staged

    def _register(self, submission: Submission, staged: Mapping[str, Staged]) -> Registered:
        submission = replace(
            submission,
            documents=tuple(
                replace(
                    entry,
                    repository_unique_id=self.repository_unique_id,
                    hash=staged[entry.entry_uuid].sha1,
                    size=staged[entry.entry_uuid].size,
                )
                for entry in submission.documents
            ),
        )
        placed: list[Staged] = []
        database = self._registry.database
        try:
            with database.writing() as connection:
                registered = submit.apply(connection, submission, self._registry.policy, self._registry.now())
                for entry in submission.documents:
                    document = staged[entry.entry_uuid]
                    try:
                        self._store.record(
                            connection, self.repository_unique_id, entry.unique_id, entry.mime_type, document
                        )
                    except RegistryError as problem:
                        raise SubmissionRefused([problem]) from problem
                # Only now, when nothing can be refused any more; the commit follows.
                for document in staged.values():
                    placed.append(document)
                    self._store.place(document)
        except BaseException:
            self._undo(placed)
            raise
        return registered

    def _undo(self, placed: list[Staged]) -> None:
        """Remove what was placed for a transaction that then failed; best effort, it is only a matter of room."""
        if not placed:
            return
        try:
            with self._registry.database.writing() as connection:
                for document in placed:
                    self._store.remove_unnamed(connection, document)
        except (errors.XcaImagingError, OSError) as problem:
            log.warning("documents of a failed submission stay on disk, without a name: %s", problem)


def _check(submission: Submission, contents: Mapping[str, Content]) -> Iterator[RegistryError]:
    entries = {entry.entry_uuid: entry for entry in submission.documents}
    for entry_id in contents:
        if entry_id not in entries:
            yield errors.MissingDocumentMetadata(f"document {entry_id} has no DocumentEntry")
    for entry_id, entry in entries.items():
        if entry.object_type == uids.ON_DEMAND_DOCUMENT:
            yield errors.RepositoryMetadataError(
                f"DocumentEntry {entry_id} is on-demand: it has no document to provide"
            )
            continue
        content = contents.get(entry_id)
        if content is None:
            yield errors.MissingDocument(f"DocumentEntry {entry_id} has no document")
            continue
        # Not XDSNonIdenticalHash: that is said of a uniqueId that is registered already (3.41.4.1.3).
        if entry.hash and entry.hash.lower() != content.sha1.lower():
            yield errors.RepositoryMetadataError(f"hash of DocumentEntry {entry_id} is not that of its document")
        if entry.size is not None and entry.size != content.size:
            yield errors.RepositoryMetadataError(
                f"size of DocumentEntry {entry_id} is {entry.size}, its document has {content.size} bytes"
            )
