"""Imaging Document Source: from the studies of a PACS to registered manifests (RAD-68), and back out again.

Publishing is idempotent: what is registered already is fetched and compared, so a study that has not changed leaves no
trace, one that has changed replaces its manifest, and one that is gone, or rejected as a whole, has its manifest
deprecated. What a rejection note of the archive names is left out, and so is the note.

A registered manifest is ours when its images are to be had from the same place: its Retrieve Location UIDs are those of
the PACS, and it has the title of a plain manifest. Others of the same study (of a second archive, or with description)
are left alone. Where several are ours, the newest is compared and replaced.

References
----------
* IHE RAD TF-2, 4.68 (Provide and Register Imaging Document Set); IHE ITI TF-2, 3.18.4.1.2.3.7.14 (query by reference
  id), 3.43 (retrieve); IHE ITI TF-3, 4.2.2.2.3 (RPLC); IHE ITI XDS Metadata Update, 3.57 (availabilityStatus)
* IHE RAD, Imaging Object Change Management (rejection notes); DICOM PS3.16, CID 7011 (their titles)
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime
from typing import Literal, TypeVar, TypeVarTuple

from xca_imaging import uids
from xca_imaging.errors import (
    ConnectFailed,
    ManifestError,
    PeerError,
    PeerTimeout,
    RegistryError,
    StudyNotFound,
    SubmissionRefused,
)
from xca_imaging.gateway.publications import Publications
from xca_imaging.gateway.publishing_peers import NotPublished, ObjectSource, Repository, StudyFinder, failure
from xca_imaging.gateway.reports import Reports, compare_reports, instances_of, registered_reports
from xca_imaging.imaging import manifest as manifests
from xca_imaging.imaging.document_entry import (
    describe,
    describe_deprecation,
    escape,
    same_description,
    study_reference_id,
    with_documents,
    zone_of,
)
from xca_imaging.imaging.ledger import Want
from xca_imaging.imaging.manifest import Manifest
from xca_imaging.imaging.profile import Profile, load_profile
from xca_imaging.imaging.study import Patient, StudyContents, StudyFacts, series_signature
from xca_imaging.metadata.model import DocumentEntry, Identifier, Submission
from xca_imaging.metadata.stored_query import FindDocuments, StoredQuery
from xca_imaging.settings import Pacs, Settings

log = logging.getLogger(__name__)

Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result")

Outcome = Literal["registered", "unchanged", "replaced", "withdrawn", "refused"]

_MAX_KEY_OBJECTS = 1000  # of a study: a reading room leaves a few, and each is fetched
_KEY_OBJECTS_AT_ONCE = 20


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


def new_uid() -> str:
    """Return a UID of a random UUID (PS3.5 B.2)."""
    return f"2.25.{uuid.uuid4().int}"


def new_uuid() -> str:
    """Return a random entryUUID."""
    return f"urn:uuid:{uuid.uuid4()}"


async def publish(publisher: Publisher, selection: Selection) -> list[Published]:
    """Publish the studies of a PACS, one after the other, and say what became of each.

    One study that is refused does not keep the others back. A PACS or repository that can no longer be reached does:
    the rest is refused without waiting for each to time out.

    Raises
    ------
    PeerError
        The PACS could not be asked which studies fit.
    """
    found = await publisher.find_studies(selection)
    wanted = [study.study_instance_uid for study in found]
    if selection.study_instance_uid and not wanted:
        wanted = [selection.study_instance_uid]  # it may be gone: then what is registered of it goes too
    results: list[Published] = []
    lost = ""
    for uid in wanted:
        if lost:
            results.append(Published(study_instance_uid=uid, outcome="refused", reason=f"not tried: {lost}"))
            continue
        try:
            results.append(await publisher.attempt(uid))
        except (ConnectFailed, PeerTimeout) as exc:
            lost = str(exc)
            log.warning("study %s: refused (%s)", uid, lost)
            results.append(Published(study_instance_uid=uid, outcome="refused", reason=lost))
    return results


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A study as it would be registered now."""

    contents: StudyContents
    """Without what is rejected."""
    content: bytes
    manifest: Manifest
    submission: Submission
    registered: Sequence[tuple[DocumentEntry, Manifest]]
    """Our approved manifests of it, the newest first; those under another patient last."""
    rejected: int

    @property
    def entry(self) -> DocumentEntry:
        return self.submission.documents[0]

    def is_same(self, entry: DocumentEntry, manifest: Manifest) -> bool:
        """Tell whether a registered manifest says the same, in itself and in its metadata."""
        return manifest.same_content(self.manifest) and same_description(entry, self.entry)


@dataclass(frozen=True, slots=True, kw_only=True)
class Publisher:
    """The studies of one PACS on their way to one repository.

    Attributes
    ----------
    source_id : str
        OID of this document source.
    objects : ObjectSource, optional
        For Key Object Selection documents, which may be rejection notes: without it a study that has one is refused.
    memory : Publications, optional
        Where publications are remembered, and by which nobody else publishes the same study meanwhile.
    patient_id : Identifier, optional
        Of the affinity domain, for all studies. Without it a study stays with the id that was given for it before,
        or is registered with the department's own: with the issuer found in the images, else with
        `pacs.assigning_authority`.
    with_reports : bool
        Register encapsulated PDF and CDA as documents of their own, too.
    executor : Executor, optional
        For building and reading manifests.
    """

    pacs: Pacs
    finder: StudyFinder
    repository: Repository
    profile: Profile
    source_id: str
    objects: ObjectSource | None = None
    memory: Publications | None = None
    patient_id: Identifier | None = None
    with_reports: bool = False
    executor: Executor | None = None
    now: Callable[[], datetime] = field(default=lambda: datetime.now(UTC))
    uid_factory: Callable[[], str] = new_uid
    uuid_factory: Callable[[], str] = new_uuid

    async def find_studies(self, selection: Selection) -> list[StudyFacts]:
        """Ask the PACS which studies fit; raises PeerError and ManifestError."""
        return await self.finder.find_studies(
            study_instance_uid=selection.study_instance_uid,
            patient_id=selection.patient_id,
            since=selection.since,
            until=selection.until,
        )

    async def attempt(self, study_instance_uid: str) -> Published:
        """Publish a study, or say why it cannot be; see `publish_study`.

        Raises
        ------
        ConnectFailed, PeerTimeout
            The PACS or the repository is away, which says nothing about the study.
        """
        try:
            result = await self.publish_study(study_instance_uid)
        except (ConnectFailed, PeerTimeout):
            raise
        except (NotPublished, ManifestError, PeerError, RegistryError, SubmissionRefused) as exc:
            result = Published(study_instance_uid=study_instance_uid, outcome="refused", reason=str(exc))
        log.log(
            logging.WARNING if result.outcome == "refused" else logging.INFO,
            "study %s of %s: %s%s",
            study_instance_uid,
            self.pacs.name,
            result.outcome,
            f" ({result.reason})" if result.reason else "",
        )
        return result

    async def publish_study(self, study_instance_uid: str) -> Published:
        """Register a study as the PACS has it now; replace what is registered, or withdraw it where nothing is left."""
        async with AsyncExitStack() as stack:
            if self.memory is not None:
                await stack.enter_async_context(self.memory.publishing(self.pacs.name, study_instance_uid))
            try:
                contents = await self.finder.read_study(study_instance_uid)
            except StudyNotFound:
                return await self._withdraw(study_instance_uid, f"{self.pacs.name} has no such study", self.patient_id)
            rejected = await self._rejected(contents)
            owner = await self._owner(contents)
            if not contents.number_of_instances:
                return await self._withdraw(study_instance_uid, "it has no instances", owner)
            if not contents.without(rejected).number_of_instances:
                reason = "all its instances are rejected"
                if not await self._registered(study_instance_uid, owner):
                    # As it should be, and there is nothing to try again.
                    await self._remember(contents, "")
                    return Published(study_instance_uid=study_instance_uid, outcome="unchanged", reason=reason)
                return await self._withdraw(study_instance_uid, reason, owner)
            registered = await self._registered(study_instance_uid, owner)
            prepared = await self._prepare(contents, rejected, registered)
            return await self._register(prepared, contents)

    async def prepare(self, study_instance_uid: str) -> Prepared | None:
        """Return a study as it would be registered for the first time now; None where nothing is left of it.

        Raises
        ------
        NotPublished, ManifestError, PeerError, RegistryError
        """
        contents = await self.finder.read_study(study_instance_uid)
        rejected = await self._rejected(contents)
        if not contents.without(rejected).number_of_instances:
            return None
        return await self._prepare(contents, rejected, ())

    async def run(self, work: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
        """Do what blocks in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self.executor, work, *arguments)

    # --- one study ----------------------------------------------------------------------------------------------------

    async def _prepare(
        self,
        contents: StudyContents,
        rejected: frozenset[str],
        registered: Sequence[tuple[DocumentEntry, Manifest]],
    ) -> Prepared:
        contents = contents.without(rejected)
        patient = contents.facts.patient
        registered_as = await self._owner(contents)
        # An id without a known domain is in the domain of its PACS, of which we know one OID.
        source_authority = _authority(patient, self.pacs) or self.pacs.retrieve_location_uid
        source_patient_id = Identifier(escape(patient.id), source_authority) if patient.id else registered_as
        now = self.now()
        content, manifest = await self.run(self._build, contents, now)
        submission = describe(
            manifest,
            content,
            contents,
            profile=self.profile,
            patient_id=registered_as,
            source_patient_id=source_patient_id,
            source_id=self.source_id,
            # A document is replaced by one of the same patient; what went out under another is deprecated.
            replaces=next((each.entry_uuid for each, _ in registered if each.patient_id == str(registered_as)), ""),
            now=now,
            uid_factory=self.uid_factory,
            uuid_factory=self.uuid_factory,
        )
        return Prepared(
            contents=contents,
            content=content,
            manifest=manifest,
            submission=submission,
            registered=registered,
            rejected=len(rejected),
        )

    async def _register(self, prepared: Prepared, contents: StudyContents) -> Published:
        entry, patient_id = prepared.entry, prepared.entry.patient_id
        same_patient = [each for each, _ in prepared.registered if each.patient_id == patient_id]
        others = [each for each, _ in prepared.registered if each.patient_id != patient_id]
        reports = await self._reports(prepared, contents)
        reasons = [*reports.left_out]
        if prepared.rejected:
            reasons.append(f"{prepared.rejected} rejected instances and notes left out")
        if len(same_patient) > 1:
            older = ", ".join(each.unique_id for each in same_patient[1:])
            reasons.append(f"older manifests of the same images stay registered: {older}")
        outcome: Outcome = "replaced" if same_patient else "registered"
        submission, documents = prepared.submission, {entry.entry_uuid: prepared.content}
        if same_patient and prepared.is_same(*prepared.registered[0]):
            outcome, entry = "unchanged", same_patient[0]
            submission, documents = replace(submission, documents=(), associations=()), {}
        if reports.new:
            outcome = "registered" if outcome == "unchanged" else outcome
            reasons.append(f"{len(reports.new)} reports registered")
            documents |= {report.entry_uuid: content for report, content in reports.new}
            submission = with_documents(submission, [report for report, _ in reports.new], self.uuid_factory)
        if documents:
            response = await self.repository.provide_and_register(submission, documents)
            if not response.succeeded:
                raise failure("repository", response.status, response.errors)
        if reports.gone:
            await self._deprecate(reports.gone)
            reasons.append(f"{len(reports.gone)} reports withdrawn")
        if others:
            await self._deprecate([*others, *await self._reports_of(others, contents, prepared.registered)])
            reasons.append("deprecated under the patient that it had before")
        await self._remember(contents, patient_id)
        return Published(
            study_instance_uid=contents.facts.study_instance_uid,
            outcome=outcome,
            reason="; ".join(reasons),
            patient_id=patient_id,
            document_unique_id=entry.unique_id,
            series=sum(1 for series in prepared.contents.series if series.instances),
            instances=prepared.manifest.number_of_instances,
        )

    async def _reports(self, prepared: Prepared, contents: StudyContents) -> Reports:
        if not self.with_reports:
            return Reports()
        study, patient_id = contents.facts.study_instance_uid, prepared.entry.patient_id
        instances = instances_of(contents, [manifest for _, manifest in prepared.registered])
        registered = await registered_reports(self, study, patient_id, instances)
        return await compare_reports(self, prepared.contents, prepared.entry, registered)

    async def _reports_of(
        self,
        entries: Sequence[DocumentEntry],
        contents: StudyContents | None,
        registered: Sequence[tuple[DocumentEntry, Manifest]],
    ) -> list[DocumentEntry]:
        """Return the registered reports beside manifests that are to go."""
        found: list[DocumentEntry] = []
        if self.with_reports:
            instances = instances_of(contents, [manifest for _, manifest in registered])
            study = registered[0][1].study_instance_uid
            for patient_id in dict.fromkeys(entry.patient_id for entry in entries):
                found += await registered_reports(self, study, patient_id, instances)
        return found

    async def _withdraw(self, study_instance_uid: str, reason: str, patient_id: Identifier | None) -> Published:
        """Deprecate what is registered of a study of which nothing is left to be had."""
        registered = await self._registered(study_instance_uid, patient_id)
        if not registered:
            raise NotPublished(f"{reason}, and nothing is registered of it that could be withdrawn")
        entries = [entry for entry, _ in registered]
        await self._deprecate([*entries, *await self._reports_of(entries, None, registered)])
        if self.memory is not None:
            await self.run(self.memory.forget, self.pacs.name, study_instance_uid)
        return Published(
            study_instance_uid=study_instance_uid,
            outcome="withdrawn",
            reason=reason,
            patient_id=entries[0].patient_id,
        )

    async def _deprecate(self, entries: Sequence[DocumentEntry]) -> None:
        for patient_id in dict.fromkeys(entry.patient_id for entry in entries):
            submission = describe_deprecation(
                [entry for entry in entries if entry.patient_id == patient_id],
                profile=self.profile,
                source_id=self.source_id,
                now=self.now(),
                uid_factory=self.uid_factory,
                uuid_factory=self.uuid_factory,
            )
            response = await self.repository.update(submission)
            if not response.succeeded:
                raise failure("registry", response.status, response.errors)

    async def _remember(self, contents: StudyContents, patient_id: str) -> None:
        if self.memory is None:
            return
        record = await self.run(self.memory.study, self.pacs.name, contents.facts.study_instance_uid)
        department = _department(contents.facts.patient)
        is_given = self.patient_id is not None or (record.patient_id, record.given_for) == (patient_id, department)
        record = replace(
            record,
            day=contents.facts.day,
            patient_id=patient_id,
            given_for=department if is_given else "",
            series=series_signature(series.facts for series in contents.series),
        )
        await self.run(self.memory.remember, record)

    # --- what is rejected ---------------------------------------------------------------------------------------------

    async def _rejected(self, contents: StudyContents) -> frozenset[str]:
        """Return the instances that rejection notes of the study name, and the notes themselves.

        C-FIND does not tell what a Key Object Selection says, so each is fetched. One that cannot be read keeps its
        study back: what it may have rejected must not be published.
        """
        study = contents.facts.study_instance_uid
        wants = [
            Want(study, series.facts.series_instance_uid, each.sop_instance_uid, self.pacs.retrieve_location_uid)
            for series in contents.series
            for each in series.instances
            if each.sop_class_uid == uids.KOS_SOP_CLASS
        ]
        if not wants:
            return frozenset()
        if self.objects is None or len(wants) > _MAX_KEY_OBJECTS:
            raise NotPublished(f"it has {len(wants)} Key Object Selections, and they cannot be read for rejections")
        rejected: set[str] = set()
        for start in range(0, len(wants), _KEY_OBJECTS_AT_ONCE):
            objects = await self.objects.fetch(wants[start : start + _KEY_OBJECTS_AT_ONCE], manifests.MAX_BYTES)
            for content in objects.values():
                note = await self.run(manifests.read_rejection, content)
                if note is not None:
                    log.info("study %s of %s: a note says %s", study, self.pacs.name, note.reason)
                    rejected |= {note.sop_instance_uid, *note.sop_instance_uids}
        own = {each.sop_instance_uid for series in contents.series for each in series.instances}
        return frozenset(rejected & own)

    # --- what is registered -------------------------------------------------------------------------------------------

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
        self, study_instance_uid: str, patient_id: Identifier | None
    ) -> list[tuple[DocumentEntry, Manifest]]:
        """Return the approved manifests of a study that are ours, the newest first.

        Those under the patient given come first; those under the patient that the study had when it was published
        last follow.
        """
        patients = [str(patient_id)] if patient_id else []
        if self.memory is not None:
            record = await self.run(self.memory.study, self.pacs.name, study_instance_uid)
            patients += [record.patient_id] if record.patient_id else []
        found = []
        current = [await self.repository.current_patient_id(patient) for patient in patients]
        for patient in dict.fromkeys(current):
            found += await self._registered_of(study_instance_uid, patient)
        return found

    async def _registered_of(self, study_instance_uid: str, patient_id: str) -> list[tuple[DocumentEntry, Manifest]]:
        query = FindDocuments(
            patient_id=patient_id,
            status=(uids.APPROVED,),
            format_codes=(self.profile.codes.format,),
            reference_ids=((study_reference_id(study_instance_uid),),),
        )
        response = await self.repository.stored_query(StoredQuery(query))
        if not response.succeeded or response.problems:
            # An entry that is overlooked would be registered a second time.
            raise failure("registry", response.status, (*response.errors, *response.problems))
        found = []
        for entry in response.objects.documents:
            if study_instance_uid not in entry.study_instance_uids:
                continue
            if entry.availability_status not in ("", uids.APPROVED):
                continue
            content = await self.repository.retrieve_document(entry.repository_unique_id, entry.unique_id)
            try:
                manifest = await self.run(manifests.read, content)
            except ManifestError as exc:
                log.warning("document %s of study %s is left alone: %s", entry.unique_id, study_instance_uid, exc)
                continue
            if is_ours(manifest, self.pacs):
                found.append((entry, manifest))
        return sorted(found, key=lambda each: (each[0].creation_time, each[0].unique_id), reverse=True)

    async def _owner(self, contents: StudyContents) -> Identifier:
        """Return whose study it is to the registry: who was given for it, as long as it is of the same patient.

        A PACS may go on with an id that was merged into another: the registry takes nothing for it any more.
        """
        owner = await self._named_owner(contents)
        return identifier_of(await self.repository.current_patient_id(str(owner)))

    async def _named_owner(self, contents: StudyContents) -> Identifier:
        if self.patient_id is not None:
            return self.patient_id
        patient = contents.facts.patient
        if self.memory is not None:
            record = await self.run(self.memory.study, self.pacs.name, contents.facts.study_instance_uid)
            if record.given_for == _department(patient) and record.patient_id:
                return identifier_of(record.patient_id)
        return _own_identifier(patient, self.pacs)


def publishers_of(
    settings: Settings,
    *,
    repository: Repository,
    objects: ObjectSource,
    memory: Publications | None,
    make_finder: Callable[[Pacs], StudyFinder],
    patient_id: Identifier | None = None,
    executor: Executor | None = None,
) -> list[Publisher]:
    """Return a publisher for each PACS of a node; raises ConfigurationError for a profile that cannot be used."""
    profile = load_profile(settings)
    return [
        Publisher(
            pacs=pacs,
            finder=make_finder(pacs),
            repository=repository,
            profile=profile,
            source_id=settings.node.home_community_id.removeprefix(uids.OID_PREFIX),
            objects=objects,
            memory=memory,
            patient_id=patient_id,
            with_reports=settings.publish.reports,
            executor=executor,
        )
        for pacs in settings.pacs
    ]


def identifier_of(patient_id: str) -> Identifier:
    """Return the parts of a patient identifier in its form as CX."""
    number, _, authority = patient_id.partition("^^^")
    return Identifier(number, authority.split("&")[1])


def is_ours(manifest: Manifest, pacs: Pacs) -> bool:
    """Tell whether a manifest is one that this module would have made for a PACS, by title and place of retrieval."""
    title = manifests.TITLE_MANIFEST
    return (manifest.title.code, manifest.title.scheme) == (title.code, title.scheme) and {
        series.retrieve_location_uid for study in manifest.studies for series in study.series
    } == {pacs.retrieve_location_uid}


def _department(patient: Patient) -> str:
    """Return what tells a patient of the department from others."""
    return f"{patient.id}^^^{patient.issuer_oid or patient.issuer}"


def _authority(patient: Patient, pacs: Pacs) -> str:
    """Return the OID of the domain of a departmental patient id, empty where it is not known."""
    if patient.issuer_oid:
        return patient.issuer_oid
    return patient.issuer if uids.is_uid(patient.issuer) else pacs.assigning_authority


def _own_identifier(patient: Patient, pacs: Pacs) -> Identifier:
    """Return the department's own identifier as that of the affinity domain."""
    if not patient.id:
        raise NotPublished("the images have no Patient ID (0010,0020): say whose they are with --as 'ID^^^&OID&ISO'")
    authority = _authority(patient, pacs)
    if not authority:
        raise NotPublished(
            "the images do not say who issued their Patient ID (0010,0021/0024): set pacs.assigning_authority of "
            f"{pacs.name!r}, or give the patient with --as 'ID^^^&OID&ISO'"
        )
    return Identifier(escape(patient.id), authority)
