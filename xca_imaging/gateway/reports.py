"""The reports of a study as documents of their own, beside its manifest: which are new, and which are to go.

A registered document is a report of ours when its referenceIdList names an encapsulated document of the study: one
that is in the PACS, or that a registered manifest of ours lists.

References
----------
* IHE RAD TF-2, 4.68 (other documents of XDS-I.b); IHE ITI TF-3, 4.2.3.2.28 (referenceIdList)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xca_imaging import uids
from xca_imaging.errors import PeerError, RegistryError, ReportError
from xca_imaging.gateway.publishing_peers import failure
from xca_imaging.imaging.document_entry import describe_report, report_reference_id, study_reference_id
from xca_imaging.imaging.ledger import Want
from xca_imaging.imaging.manifest import Manifest
from xca_imaging.imaging.reports import MAX_BYTES, MIME_TYPES, read_report
from xca_imaging.imaging.study import StudyContents
from xca_imaging.metadata.model import DocumentEntry
from xca_imaging.metadata.stored_query import FindDocuments, StoredQuery

if TYPE_CHECKING:
    from xca_imaging.gateway.publishing import Publisher


@dataclass(frozen=True, slots=True)
class Reports:
    """What is to be done about the reports of a study."""

    new: tuple[tuple[DocumentEntry, bytes], ...] = ()
    gone: tuple[DocumentEntry, ...] = ()
    left_out: tuple[str, ...] = ()
    """Why others are not registered."""


async def compare_reports(
    publisher: Publisher, contents: StudyContents, beside: DocumentEntry, registered: Sequence[DocumentEntry]
) -> Reports:
    """Compare the reports that a study has with those that are registered, and fetch the new ones.

    A report that cannot be had is left out, and tried again when the study is published next: it keeps neither the
    manifest nor the other reports back.

    Parameters
    ----------
    contents : StudyContents
        The study without what is rejected.
    beside : DocumentEntry
        Of its manifest.
    registered : sequence of DocumentEntry
        Its registered reports.
    """
    study, location = contents.facts.study_instance_uid, publisher.pacs.retrieve_location_uid
    wanted = {
        report_reference_id(each.sop_instance_uid): Want(
            study, series.facts.series_instance_uid, each.sop_instance_uid, location
        )
        for series in contents.series
        for each in series.instances
        if each.sop_class_uid in MIME_TYPES
    }
    known = {reference for entry in registered for reference in entry.reference_ids}
    gone = tuple(entry for entry in registered if not wanted.keys() & set(entry.reference_ids))
    new, left_out = [], []
    for reference, want in wanted.items():
        if reference in known:
            continue
        try:
            if publisher.objects is None:
                raise ReportError("there is nothing to fetch it with")
            objects = await publisher.objects.fetch([want], MAX_BYTES)
            report = await publisher.run(read_report, objects[want.sop_instance_uid])
            if report.sop_instance_uid != want.sop_instance_uid:
                raise ReportError(f"it is instance {report.sop_instance_uid}")
        except (RegistryError, PeerError, ReportError) as exc:
            left_out.append(f"report {want.sop_instance_uid} left out: {exc}")
            continue
        entry = describe_report(
            report,
            beside,
            profile=publisher.profile,
            now=publisher.now(),
            uid_factory=publisher.uid_factory,
            uuid_factory=publisher.uuid_factory,
        )
        new.append((entry, report.content))
    return Reports(tuple(new), gone, tuple(left_out))


async def registered_reports(
    publisher: Publisher, study_instance_uid: str, patient_id: str, sop_instance_uids: Iterable[str]
) -> list[DocumentEntry]:
    """Return the approved reports of a study that come out of one of these instances; raises as `stored_query` does.

    Raises
    ------
    SubmissionRefused, NotPublished
        The registry does not say.
    """
    query = FindDocuments(
        patient_id=patient_id,
        status=(uids.APPROVED,),
        reference_ids=((study_reference_id(study_instance_uid),),),
    )
    response = await publisher.repository.stored_query(StoredQuery(query))
    if not response.succeeded or response.problems:
        raise failure("registry", response.status, (*response.errors, *response.problems))
    ours = {report_reference_id(uid) for uid in sop_instance_uids}
    return [
        entry
        for entry in response.objects.documents
        if entry.mime_type in MIME_TYPES.values()
        and entry.availability_status in ("", uids.APPROVED)
        and ours & set(entry.reference_ids)
    ]


def instances_of(contents: StudyContents | None, manifests: Iterable[Manifest]) -> set[str]:
    """Return every instance of a study that is there, or that manifests list."""
    found = {each.sop_instance_uid for _, _, each in (item for manifest in manifests for item in manifest.instances())}
    if contents is not None:
        found |= {each.sop_instance_uid for series in contents.series for each in series.instances}
    return found
