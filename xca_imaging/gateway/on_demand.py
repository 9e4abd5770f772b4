"""On-demand documents: manifests that are made when they are asked for, of what the PACSs hold now (ITI-43, ITI-39).

An on-demand entry names its study among its reference ids. Its manifest is built as publishing builds one, under the
patient of the entry, with a uniqueId of its own. Where snapshots are kept, it is registered as a stable document before
it is handed out, so that who got it can get it again.

References
----------
* IHE ITI TF-2, 3.43.4.1.3, 3.43.5 (NewDocumentUniqueId, NewRepositoryUniqueId); IHE ITI TF-3, 4.2.2.2.6 (IsSnapshotOf)
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial

from xca_imaging import uids
from xca_imaging.errors import (
    DocumentUniqueIdError,
    ManifestError,
    PeerError,
    RegistryError,
    RepositoryError,
    StudyNotFound,
    SubmissionRefused,
)
from xca_imaging.gateway.publishing import Prepared, Publisher, identifier_of
from xca_imaging.gateway.publishing_peers import NotPublished
from xca_imaging.metadata.model import Association, DocumentEntry, Submission
from xca_imaging.registry.administration import Administration
from xca_imaging.registry.documents import Content
from xca_imaging.registry.events import Requester
from xca_imaging.registry.provide import Repository

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A document that was made: `repository_unique_id` is where it can be had again, empty where it is not kept."""

    document_unique_id: str
    repository_unique_id: str
    mime_type: str
    content: bytes


class OnDemandDocuments:
    """Makes the documents of on-demand entries.

    Parameters
    ----------
    publishers : sequence of Publisher
        One for each PACS; the first that has the study is asked.
    keep : bool
        Whether a stable copy of what is handed out is registered.
    executor : Executor
        For database and files.
    """

    def __init__(
        self,
        administration: Administration,
        repository: Repository,
        publishers: Sequence[Publisher],
        executor: Executor,
        *,
        keep: bool,
    ) -> None:
        self._administration, self._repository, self._publishers = administration, repository, publishers
        self._executor, self._keep = executor, keep

    async def make(self, document_unique_id: str, requester: Requester) -> Snapshot | None:
        """Return the document of an on-demand entry, None where there is no such entry.

        Raises
        ------
        RegistryError
            There is one, and its document cannot be made now.
        """
        repository_unique_id = self._repository.repository_unique_id
        loop = asyncio.get_running_loop()
        find = partial(self._administration.on_demand_entry, repository_unique_id, document_unique_id)
        entry = await loop.run_in_executor(self._executor, find)
        if entry is None:
            return None
        prepared = await self._prepare(entry)
        if self._keep:
            await loop.run_in_executor(self._executor, partial(self._register, entry, prepared))
        new_unique_id = prepared.entry.unique_id
        record = partial(self._administration.record_retrieval, entry, new_unique_id, requester, kept=self._keep)
        await loop.run_in_executor(self._executor, record)
        kept_in = repository_unique_id if self._keep else ""
        return Snapshot(new_unique_id, kept_in, prepared.entry.mime_type, prepared.content)

    async def _prepare(self, entry: DocumentEntry) -> Prepared:
        unique_id = entry.unique_id
        if entry.mime_type != uids.MIME_DICOM or len(entry.study_instance_uids) != 1:
            text = "only manifests of one study are made on demand: application/dicom, with the study as a reference id"
            raise RepositoryError(text, unique_id)
        patient_id = identifier_of(entry.patient_id)
        failures: list[RegistryError] = []
        for publisher in self._publishers:
            try:
                found = await replace(publisher, patient_id=patient_id).prepare(entry.study_instance_uids[0])
            except StudyNotFound:
                continue
            except PeerError as exc:
                failures.append(exc.registry_error(str(exc), unique_id))
            except RegistryError as exc:
                failures.append(exc.at(unique_id))
            except (ManifestError, NotPublished) as exc:
                failures.append(RepositoryError(str(exc), unique_id))
            else:
                if found is not None:
                    return found
        if failures:
            raise failures[0]
        raise DocumentUniqueIdError("no PACS here has anything of its study now", unique_id)

    def _register(self, entry: DocumentEntry, prepared: Prepared) -> None:
        submission = _snapshot(prepared.submission, entry)
        try:
            self._repository.provide(submission, {prepared.entry.entry_uuid: Content.of(prepared.content)})
        except SubmissionRefused as exc:
            # The entry was withdrawn, or its patient merged, since it was read: the next request finds it so.
            raise exc.errors[0].at(entry.unique_id) from exc


def _snapshot(submission: Submission, entry: DocumentEntry) -> Submission:
    """Return the submission that registers a manifest as a snapshot of an on-demand entry."""
    (document,) = submission.documents
    snapshot_of = Association(
        entry_uuid="IsSnapshotOf", type=uids.IS_SNAPSHOT_OF, source=document.entry_uuid, target=entry.entry_uuid
    )
    return replace(submission, associations=(*submission.associations, snapshot_of))
