"""An archive, a registry with its repository, and a clock, in memory: what publishing talks to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

from tests.imaging import studies
from xca_imaging import settings, uids
from xca_imaging.data_files import data_folder
from xca_imaging.errors import DocumentUniqueIdError, StudyNotFound
from xca_imaging.imaging.ledger import Want
from xca_imaging.imaging.profile import Profile, read_profile
from xca_imaging.imaging.study import SeriesFacts, StudyContents, StudyFacts
from xca_imaging.metadata.model import DocumentEntry, Submission
from xca_imaging.metadata.stored_query import FindDocuments, StoredQuery
from xca_imaging.metadata.validate import validate_submission
from xca_imaging.transactions.adhoc_query import QueryResponse
from xca_imaging.transactions.registry_response import RegistryResponse

PACS = settings.Pacs(
    name="main",
    ae_title="PACS",
    host="127.0.0.1",
    port=104,
    retrieve_location_uid="1.3.6.1.4.1.21367.13.80.110",
    assigning_authority=studies.AUTHORITY,
)


@cache
def profile() -> Profile:
    """Return the default profile, read once."""
    return read_profile(data_folder("profiles") / "ihe.toml")


class Objects:
    """Objects of the archive, by SOP Instance UID."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.fetched: list[str] = []
        self.error: Exception | None = None

    async def fetch(self, wants: Sequence[Want], max_bytes: int) -> Mapping[str, bytes]:
        if self.error is not None:
            raise self.error
        uids_wanted = [want.sop_instance_uid for want in wants]
        self.fetched += uids_wanted
        found = {uid: self.objects[uid] for uid in uids_wanted}
        assert sum(map(len, found.values())) <= max_bytes
        return found


class Archive:
    """A PACS with the studies it is given."""

    def __init__(self, *all_studies: StudyContents) -> None:
        self.studies = {each.facts.study_instance_uid: each for each in all_studies}
        self.errors: dict[str, Exception] = {}
        self.asked: dict[str, Any] = {}
        self.queries: list[str] = []
        """Level of each query, and the study that it is about."""

    async def find_studies(self, **asked: Any) -> list[StudyFacts]:
        self.asked = asked
        self.queries.append("STUDY")
        if "" in self.errors:
            raise self.errors[""]
        uid, since, until = asked["study_instance_uid"], asked["since"], asked["until"]
        return [
            each.facts
            for each in self.studies.values()
            if uid in ("", each.facts.study_instance_uid)
            and (since is None or each.facts.date >= f"{since:%Y%m%d}")
            and (until is None or each.facts.date <= f"{until:%Y%m%d}")
        ]

    async def find_series(self, study_instance_uid: str, *, patient_id: str = "") -> list[SeriesFacts]:
        self.queries.append(f"SERIES {study_instance_uid}")
        return [series.facts for series in self.studies[study_instance_uid].series]

    async def read_study(self, study_instance_uid: str) -> StudyContents:
        self.queries.append(f"IMAGE {study_instance_uid}")
        if study_instance_uid in self.errors:
            raise self.errors[study_instance_uid]
        if study_instance_uid not in self.studies:
            raise StudyNotFound(f"main has no study {study_instance_uid}")
        return self.studies[study_instance_uid]


class Registry:
    """A registry and repository in memory that keeps to the rules that matter here."""

    repository_unique_id = "1.3.6.1.4.1.21367.2017.1.2"

    def __init__(self) -> None:
        self.entries: dict[str, DocumentEntry] = {}
        self.documents: dict[str, bytes] = {}
        self.submissions: list[Submission] = []
        self.updates: list[Submission] = []
        self.queries: list[FindDocuments] = []
        self.query_response: QueryResponse | None = None
        self.response: RegistryResponse | None = None

    async def stored_query(self, query: StoredQuery) -> QueryResponse:
        asked = query.query
        assert isinstance(asked, FindDocuments)
        self.queries.append(asked)
        if self.query_response is not None:
            return self.query_response
        (references,) = asked.reference_ids
        found = [
            entry
            for entry in self.entries.values()
            if entry.patient_id == asked.patient_id
            and entry.availability_status in asked.status
            and (not asked.format_codes or entry.format_code in asked.format_codes)
            and set(references) & set(entry.reference_ids)
        ]
        return QueryResponse(uids.STATUS_SUCCESS, (), Submission(documents=tuple(found)))

    async def current_patient_id(self, patient_id: str) -> str:
        return patient_id

    async def retrieve_document(self, repository_unique_id: str, document_unique_id: str) -> bytes:
        assert repository_unique_id == self.repository_unique_id
        if document_unique_id not in self.documents:
            raise DocumentUniqueIdError("no such document", document_unique_id)
        return self.documents[document_unique_id]

    async def provide_and_register(self, submission: Submission, documents: Mapping[str, bytes]) -> RegistryResponse:
        if self.response is not None:
            return self.response
        assert validate_submission(submission, repository_side=True) == []
        self.submissions.append(submission)
        for entry in submission.documents:
            self.documents[entry.unique_id] = documents[entry.entry_uuid]
            self.entries[entry.entry_uuid] = replace(
                entry, availability_status=uids.APPROVED, repository_unique_id=self.repository_unique_id
            )
        for association in submission.associations:
            if association.type == uids.RPLC:
                old = self.entries[association.target]
                self.entries[association.target] = replace(old, availability_status=uids.DEPRECATED)
        return RegistryResponse(uids.STATUS_SUCCESS)

    async def update(self, submission: Submission) -> RegistryResponse:
        if self.response is not None:
            return self.response
        self.updates.append(submission)
        (submission_set,) = submission.submission_sets
        for association in submission.associations:
            entry = self.entries[association.target]
            assert association.type == uids.UPDATE_AVAILABILITY_STATUS
            assert association.source == submission_set.entry_uuid
            assert submission_set.patient_id == entry.patient_id
            assert (association.original_status, association.new_status) == (uids.APPROVED, uids.DEPRECATED)
            assert entry.availability_status == uids.APPROVED
            self.entries[association.target] = replace(entry, availability_status=uids.DEPRECATED)
        return RegistryResponse(uids.STATUS_SUCCESS)

    @property
    def approved(self) -> list[DocumentEntry]:
        return [entry for entry in self.entries.values() if entry.availability_status == uids.APPROVED]


class Clock:
    """A minute later each time."""

    def __init__(self) -> None:
        self._now = datetime(2026, 3, 4, 4, 59, tzinfo=UTC)

    def __call__(self) -> datetime:
        self._now += timedelta(minutes=1)
        return self._now
