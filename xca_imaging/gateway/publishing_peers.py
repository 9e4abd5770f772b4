"""What publishing talks to: a PACS, a repository with the registry behind it, and a source of whole objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from typing import Protocol

from xca_imaging.errors import RegistryError, SubmissionRefused, XcaImagingError
from xca_imaging.imaging.ledger import Want
from xca_imaging.imaging.study import SeriesFacts, StudyContents, StudyFacts
from xca_imaging.metadata.model import Submission
from xca_imaging.metadata.stored_query import StoredQuery
from xca_imaging.transactions.adhoc_query import QueryResponse
from xca_imaging.transactions.registry_response import RegistryResponse


class NotPublished(XcaImagingError):
    """This study cannot be published, or not taken back, as it is; the text says what to do."""


class StudyFinder(Protocol):
    """What is asked of a PACS. `imaging.backends.cfind.Queries` is one."""

    async def find_studies(
        self,
        *,
        study_instance_uid: str = "",
        patient_id: str = "",
        since: date | None = None,
        until: date | None = None,
    ) -> list[StudyFacts]: ...

    async def find_series(self, study_instance_uid: str, *, patient_id: str = "") -> list[SeriesFacts]: ...

    async def read_study(self, study_instance_uid: str) -> StudyContents: ...


class Repository(Protocol):
    """Where manifests are registered: a repository and the registry behind it. All methods raise PeerError."""

    async def stored_query(self, query: StoredQuery) -> QueryResponse:
        """ITI-18."""

    async def current_patient_id(self, patient_id: str) -> str:
        """Return the id that the registry has a patient under now; the same where it cannot be asked about merges."""

    async def retrieve_document(self, repository_unique_id: str, document_unique_id: str) -> bytes:
        """ITI-43; raises RegistryError for a document that is not to be had."""

    async def provide_and_register(self, submission: Submission, documents: Mapping[str, bytes]) -> RegistryResponse:
        """RAD-68, `documents` by entryUUID of their entry."""

    async def update(self, submission: Submission) -> RegistryResponse:
        """ITI-57; raises NotPublished where there is no registry that it could be sent to."""


class ObjectSource(Protocol):
    """Where objects of a study come from that say more than C-FIND does."""

    async def fetch(self, wants: Sequence[Want], max_bytes: int) -> Mapping[str, bytes]:
        """Return whole objects as Part 10 files by SOP Instance UID: all of them.

        Raises
        ------
        RegistryError, PeerError
            One of them is not to be had, or they are longer than `max_bytes` in all.
        """


def failure(who: str, status: str, errors: Sequence[RegistryError]) -> Exception:
    """Return the error of an answer that is no success."""
    if errors:
        return SubmissionRefused(errors)
    return NotPublished(f"the {who} answered {status or 'without a status'} and gave no error")
