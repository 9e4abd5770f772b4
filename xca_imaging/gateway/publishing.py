"""Imaging Document Source: from the studies of a PACS to registered manifests (RAD-68).

Publishing is idempotent: what is registered already is fetched and compared, so a study that has not changed leaves no
trace, and one that has changed replaces its manifest.

A registered manifest is ours when its images are to be had from the same place: its Retrieve Location UIDs are those of
the PACS, and it has the title of a plain manifest. Others of the same study (of a second archive, or with description)
are left alone. Where several are ours, the newest is compared and replaced.

References
----------
* IHE RAD TF-2, 4.68 (Provide and Register Imaging Document Set); IHE ITI TF-2, 3.18.4.1.2.3.7.14 (query by reference
  id), 3.43 (retrieve); IHE ITI TF-3, 4.2.2.2.3 (RPLC)
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Literal, Protocol, TypeVar, TypeVarTuple

from xca_imaging import settings, uids
from xca_imaging.errors import (
    ConnectFailed,
    ManifestError,
    PeerError,
    PeerTimeout,
    RegistryError,
    SubmissionRefused,
    XcaImagingError,
)
from xca_imaging.imaging import manifest as manifests
from xca_imaging.imaging.document_entry import describe, escape, same_description, study_reference_id, zone_of
from xca_imaging.imaging.manifest import Manifest
from xca_imaging.imaging.profile import Profile
from xca_imaging.imaging.study import Patient, StudyContents, StudyFacts
from xca_imaging.metadata.model import DocumentEntry, Identifier, Submission
from xca_imaging.metadata.stored_query import FindDocuments, StoredQuery
from xca_imaging.transactions.adhoc_query import QueryResponse
from xca_imaging.transactions.registry_response import RegistryResponse

log = logging.getLogger(__name__)

Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result")

Outcome = Literal["registered", "unchanged", "replaced", "refused"]


class StudyFinder(Protocol):
    """What is asked of a PACS; both methods block. `imaging.backends.cfind.Finder` is one."""

    def find_studies(
        self,
        *,
        study_instance_uid: str = "",
        patient_id: str = "",
        since: date | None = None,
        until: date | None = None,
    ) -> list[StudyFacts]: ...

    def read_study(self, study_instance_uid: str) -> StudyContents: ...


class Repository(Protocol):
    """Where manifests are registered: a repository and the registry behind it. All methods raise PeerError."""

    async def stored_query(self, query: StoredQuery) -> QueryResponse:
        """ITI-18."""

    async def retrieve_document(self, repository_unique_id: str, document_unique_id: str) -> bytes:
        """ITI-43; raises RegistryError for a document that is not to be had."""

    async def provide_and_register(self, submission: Submission, documents: Mapping[str, bytes]) -> RegistryResponse:
        """RAD-68, `documents` by entryUUID of their entry."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which studies: those that fit everything given. Dates are Study Dates, inclusive."""

    study_instance_uid: str = ""
    patient_id: str = ""
    since: date | None = None
    until: date | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """What became of one study. `document_unique_id` is that of the manifest registered now, if any is."""

    study_instance_uid: str
    outcome: Outcome
    reason: str = ""
    patient_id: str = ""
    document_unique_id: str = ""
    series: int = 0
    instances: int = 0


class _Refused(XcaImagingError):
    """This study cannot be published as it is; the text says what to do."""


def new_uid() -> str:
    """Return a UID of a random UUID (PS3.5 B.2)."""
    return f"2.25.{uuid.uuid4().int}"


def new_uuid() -> str:
    """Return a random entryUUID."""
    return f"urn:uuid:{uuid.uuid4()}"


async def publish(
    pacs: settings.Pacs,
    selection: Selection,
    *,
    finder: StudyFinder,
    repository: Repository,
    profile: Profile,
    source_id: str,
    patient_id: Identifier | None = None,
    executor: Executor | None = None,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
    uid_factory: Callable[[], str] = new_uid,
    uuid_factory: Callable[[], str] = new_uuid,
) -> list[Published]:
    """Publish the studies of a PACS, one after the other, and say what became of each.

    One study that is refused does not keep the others back. A PACS or repository that can no longer be reached does:
    the rest is refused without waiting for each to time out.

    Parameters
    ----------
    source_id : str
        OID of this document source.
    patient_id : Identifier, optional
        Of the affinity domain, for all studies selected. Without it the department's own id is registered, with the
        issuer found in the images, else with `pacs.assigning_authority`.
    executor : Executor, optional
        For C-FIND, and for building and reading manifests.

    Raises
    ------
    PeerError
        The PACS could not be asked which studies fit.
    """
    source = _Source(pacs, finder, repository, profile, source_id, patient_id, executor, now, uid_factory, uuid_factory)
    loop = asyncio.get_running_loop()
    found = await loop.run_in_executor(
        executor,
        lambda: finder.find_studies(
            study_instance_uid=selection.study_instance_uid,
            patient_id=selection.patient_id,
            since=selection.since,
            until=selection.until,
        ),
    )
    wanted = [study.study_instance_uid for study in found]
    if selection.study_instance_uid and not wanted:
        reason = f"{pacs.name} has no such study"
        return [Published(study_instance_uid=selection.study_instance_uid, outcome="refused", reason=reason)]
    results: list[Published] = []
    lost = ""
    for uid in wanted:
        if lost:
            result = Published(study_instance_uid=uid, outcome="refused", reason=f"not tried: {lost}")
        else:
            try:
                result = await source.publish_study(uid)
            except (ConnectFailed, PeerTimeout) as exc:
                lost = str(exc)
                result = Published(study_instance_uid=uid, outcome="refused", reason=lost)
            except (_Refused, ManifestError, PeerError, RegistryError, SubmissionRefused) as exc:
                result = Published(study_instance_uid=uid, outcome="refused", reason=str(exc))
        log.log(
            logging.WARNING if result.outcome == "refused" else logging.INFO,
            "study %s of %s: %s%s",
            uid,
            pacs.name,
            result.outcome,
            f" ({result.reason})" if result.reason else "",
        )
        results.append(result)
    return results


@dataclass(frozen=True, slots=True)
class _Source:
    """Everything that stays the same from study to study."""

    pacs: settings.Pacs
    finder: StudyFinder
    repository: Repository
    profile: Profile
    source_id: str
    patient_id: Identifier | None
    executor: Executor | None
    now: Callable[[], datetime]
    uid_factory: Callable[[], str]
    uuid_factory: Callable[[], str]

    async def publish_study(self, study_instance_uid: str) -> Published:
        contents = await self._run(self.finder.read_study, study_instance_uid)
        patient = contents.facts.patient
        registered_as = self.patient_id or _own_identifier(patient, self.pacs)
        # An id without a known domain is in the domain of its PACS, of which we know one OID.
        source_authority = _authority(patient, self.pacs) or self.pacs.retrieve_location_uid
        source_patient_id = Identifier(escape(patient.id), source_authority) if patient.id else registered_as

        now = self.now()
        content, manifest = await self._run(self._build, contents, now)
        ours = await self._registered(registered_as, study_instance_uid)
        previous = ours[0] if ours else None
        submission = describe(
            manifest,
            content,
            contents,
            profile=self.profile,
            patient_id=registered_as,
            source_patient_id=source_patient_id,
            source_id=self.source_id,
            replaces=previous[0].entry_uuid if previous else "",
            now=now,
            uid_factory=self.uid_factory,
            uuid_factory=self.uuid_factory,
        )
        (entry,) = submission.documents
        reason = ""
        if len(ours) > 1:
            others = ", ".join(other.unique_id for other, _ in ours[1:])
            reason = f"older manifests of the same images stay registered: {others}"

        def published(outcome: Outcome, document_unique_id: str) -> Published:
            return Published(
                study_instance_uid=study_instance_uid,
                outcome=outcome,
                reason=reason,
                patient_id=str(registered_as),
                document_unique_id=document_unique_id,
                series=sum(1 for series in contents.series if series.instances),
                instances=manifest.number_of_instances,
            )

        if previous is not None and previous[1].same_content(manifest) and same_description(previous[0], entry):
            return published("unchanged", previous[0].unique_id)
        response = await self.repository.provide_and_register(submission, {entry.entry_uuid: content})
        if not response.succeeded:
            raise _failure("repository", response.status, response.errors)
        return published("replaced" if previous else "registered", entry.unique_id)

    async def _run(self, work: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self.executor, work, *arguments)

    def _build(self, contents: StudyContents, now: datetime) -> tuple[bytes, Manifest]:
        """Build a manifest, and read it back: nothing is registered that we could not read ourselves."""
        content = manifests.build(
            contents,
            retrieve_ae_title=self.pacs.ae_title,
            retrieve_location_uid=self.pacs.retrieve_location_uid,
            now=now.astimezone(zone_of(contents.facts.timezone_offset, self.profile.timezone)),
            uid_factory=self.uid_factory,
        )
        return content, manifests.read(content)

    async def _registered(
        self, patient_id: Identifier, study_instance_uid: str
    ) -> list[tuple[DocumentEntry, Manifest]]:
        """Return the approved manifests of a study that are ours, the newest first."""
        query = FindDocuments(
            patient_id=str(patient_id),
            status=(uids.APPROVED,),
            format_codes=(self.profile.codes.format,),
            reference_ids=((study_reference_id(study_instance_uid),),),
        )
        response = await self.repository.stored_query(StoredQuery(query))
        if not response.succeeded or response.problems:
            # An entry that is overlooked would be registered a second time.
            raise _failure("registry", response.status, (*response.errors, *response.problems))
        found = []
        for entry in response.objects.documents:
            if study_instance_uid not in entry.study_instance_uids:
                continue
            if entry.availability_status not in ("", uids.APPROVED):
                continue
            content = await self.repository.retrieve_document(entry.repository_unique_id, entry.unique_id)
            try:
                manifest = await self._run(manifests.read, content)
            except ManifestError as exc:
                log.warning("document %s of study %s is left alone: %s", entry.unique_id, study_instance_uid, exc)
                continue
            if self._is_ours(manifest):
                found.append((entry, manifest))
        return sorted(found, key=lambda each: (each[0].creation_time, each[0].unique_id), reverse=True)

    def _is_ours(self, manifest: Manifest) -> bool:
        title = manifests.TITLE_MANIFEST
        return (manifest.title.code, manifest.title.scheme) == (title.code, title.scheme) and {
            series.retrieve_location_uid for study in manifest.studies for series in study.series
        } == {self.pacs.retrieve_location_uid}


def _failure(who: str, status: str, errors: Sequence[RegistryError]) -> Exception:
    if errors:
        return SubmissionRefused(errors)
    return _Refused(f"the {who} answered {status or 'without a status'} and gave no error")


def _authority(patient: Patient, pacs: settings.Pacs) -> str:
    """Return the OID of the domain of a departmental patient id, empty where it is not known."""
    if patient.issuer_oid:
        return patient.issuer_oid
    return patient.issuer if uids.is_uid(patient.issuer) else pacs.assigning_authority


def _own_identifier(patient: Patient, pacs: settings.Pacs) -> Identifier:
    """Return the department's own identifier as that of the affinity domain."""
    if not patient.id:
        raise _Refused("the images have no Patient ID (0010,0020): say whose they are with --as 'ID^^^&OID&ISO'")
    authority = _authority(patient, pacs)
    if not authority:
        raise _Refused(
            "the images do not say who issued their Patient ID (0010,0021/0024): set pacs.assigning_authority of "
            f"{pacs.name!r}, or give the patient with --as 'ID^^^&OID&ISO'"
        )
    return Identifier(escape(patient.id), authority)
