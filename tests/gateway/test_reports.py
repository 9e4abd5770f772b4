"""Reports beside the manifest: registered once, withdrawn with what they lie in, never in the manifest's way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.gateway.test_life_cycle import Desk, reject
from tests.imaging import studies
from tests.support import reports
from tests.support.reports import CDA, CDA_CLASS, PDF, PDF_CLASS
from xca_imaging import uids
from xca_imaging.errors import RepositoryError
from xca_imaging.imaging import manifest
from xca_imaging.imaging.study import InstanceFacts, SeriesContents, SeriesFacts, StudyContents
from xca_imaging.metadata.model import DocumentEntry

SERIES = f"{studies.STUDY}.8"


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path)
    desk.publisher = replace(desk.publisher, with_reports=True)
    yield desk
    desk.memory.close()


def with_reports(desk: Desk, *documents: bytes, study: StudyContents | None = None) -> StudyContents:
    """Return a study with encapsulated documents, and put those into the archive."""
    instances = []
    for number, content in enumerate(documents, 1):
        sop_class = CDA_CLASS if content.startswith(b"<?xml") else PDF_CLASS
        uid = f"{SERIES}.{number}"
        ds = reports.encapsulated(content, studies.STUDY, SERIES, uid, sop_class=sop_class)
        desk.objects.objects[uid] = reports.part10(ds)
        instances.append(InstanceFacts(sop_instance_uid=uid, sop_class_uid=sop_class))
    study = study or studies.study()
    series = SeriesContents(SeriesFacts(series_instance_uid=SERIES, modality="DOC"), tuple(instances))
    return replace(study, series=(*study.series, series))


def registered(desk: Desk) -> dict[str, DocumentEntry]:
    """Return the approved reports by MIME type."""
    return {entry.mime_type: entry for entry in desk.registry.approved if entry.mime_type != uids.MIME_DICOM}


async def test_reports_are_registered_beside_the_manifest(desk: Desk) -> None:
    desk.hold(with_reports(desk, PDF, CDA))
    result = await desk.publish()
    assert (result.outcome, result.instances) == ("registered", 4)
    assert "2 reports registered" in result.reason
    (submission,) = desk.registry.submissions
    assert len(submission.documents) == 3
    found = registered(desk)
    pdf, cda = found["application/pdf"], found["text/xml"]
    assert desk.registry.documents[pdf.unique_id] == PDF
    assert desk.registry.documents[cda.unique_id] == CDA
    assert pdf.format_code is not None
    assert pdf.format_code.code == "urn:ihe:rad:PDF"
    assert pdf.type_code is not None
    assert (pdf.type_code.code, pdf.type_code.scheme) == ("18782-3", "2.16.840.1.113883.6.1")
    assert (pdf.title, pdf.creation_time) == ("Befund", "20260103101112")
    assert f"{SERIES}.1^^^^urn:ihe:iti:xds:2013:uniqueId" in pdf.reference_ids
    assert f"{studies.STUDY}^^^^{uids.REFERENCE_STUDY_INSTANCE_UID}" in pdf.reference_ids
    assert pdf.unique_id != f"{SERIES}.1"
    # the manifest lists the objects as well: they are images of the study like any other
    (kos,) = [entry for entry in desk.registry.approved if entry.mime_type == uids.MIME_DICOM]
    assert manifest.read(desk.registry.documents[kos.unique_id]).number_of_instances == 4


async def test_what_is_registered_is_left_alone(desk: Desk) -> None:
    desk.hold(with_reports(desk, PDF))
    await desk.publish()
    desk.objects.fetched.clear()
    assert (await desk.publish()).outcome == "unchanged"
    desk.hold(with_reports(desk, PDF, study=studies.study(studies.series(count=3))))
    assert (await desk.publish()).outcome == "replaced"
    assert desk.objects.fetched == []
    assert len(registered(desk)) == 1
    assert len(desk.registry.entries) == 3


async def test_the_option_is_off_by_default(desk: Desk) -> None:
    desk.publisher = replace(desk.publisher, with_reports=False)
    desk.hold(with_reports(desk, PDF))
    await desk.publish()
    assert registered(desk) == {}
    assert desk.objects.fetched == []
    # and when it is turned on, the reports of a study whose manifest stays are registered alone
    desk.publisher = replace(desk.publisher, with_reports=True)
    result = await desk.publish()
    assert (result.outcome, result.reason) == ("registered", "1 reports registered")
    assert len(desk.registry.submissions[1].documents) == 1
    assert len(desk.registry.approved) == 2


async def test_a_report_that_is_rejected_or_gone_is_withdrawn(desk: Desk) -> None:
    desk.hold(with_reports(desk, PDF, CDA))
    await desk.publish()
    desk.hold(with_reports(desk, PDF, CDA), reject(f"{SERIES}.1"))
    result = await desk.publish()
    assert result.outcome == "replaced"
    assert "1 reports withdrawn" in result.reason
    assert set(registered(desk)) == {"text/xml"}
    desk.hold(studies.study())
    assert "1 reports withdrawn" in (await desk.publish()).reason
    assert registered(desk) == {}


async def test_reports_go_with_their_study(desk: Desk) -> None:
    desk.hold(with_reports(desk, PDF))
    await desk.publish()
    desk.archive.studies.clear()
    assert (await desk.publish()).outcome == "withdrawn"
    assert desk.registry.approved == []


async def test_reports_follow_their_patient(desk: Desk) -> None:
    desk.hold(with_reports(desk, PDF))
    await desk.publish()
    moved = studies.study(patient=replace(studies.PATIENT, id="DEPT-2"))
    desk.hold(with_reports(desk, PDF, study=moved))
    result = await desk.publish()
    assert {entry.patient_id for entry in desk.registry.approved} == {result.patient_id}
    assert len(desk.registry.approved) == 2


async def test_a_report_that_cannot_be_had_does_not_keep_the_manifest_back(desk: Desk) -> None:
    desk.hold(with_reports(desk, b"GIF89a", CDA))
    result = await desk.publish()
    assert result.outcome == "registered"
    assert f"report {SERIES}.1 left out" in result.reason
    assert set(registered(desk)) == {"text/xml"}
    desk.hold(with_reports(desk, PDF, CDA))
    desk.objects.error = RepositoryError("not to be had")
    assert "not to be had" in (await desk.publish()).reason
    desk.objects.error = None
    assert (await desk.publish()).reason == "1 reports registered"


async def test_documents_of_others_are_left_alone(desk: Desk) -> None:
    desk.hold(with_reports(desk, PDF))
    await desk.publish()
    ours = registered(desk)["application/pdf"]
    theirs = replace(
        ours,
        entry_uuid="urn:uuid:00000000-0000-4000-8000-00000000ffff",
        unique_id="1.2.3.4",
        reference_ids=(f"{studies.STUDY}^^^^{uids.REFERENCE_STUDY_INSTANCE_UID}",),
    )
    desk.registry.entries[theirs.entry_uuid] = theirs
    desk.archive.studies.clear()
    await desk.publish()
    assert desk.registry.approved == [theirs]
