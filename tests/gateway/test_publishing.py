"""Publishing: what is registered, replaced, left alone or refused, and why."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pydicom
import pytest

from tests.gateway.doubles import PACS, Archive, Clock, Registry
from tests.imaging import studies
from tests.support import peers
from tests.support.shared import shared_path
from xca_imaging import settings, uids
from xca_imaging.data_files import data_folder
from xca_imaging.errors import (
    ConnectFailed,
    ManifestError,
    PeerBusy,
    RegistryMetadataError,
    RegistryNotAvailable,
)
from xca_imaging.gateway.publishing import Published, Publisher, Selection, publish
from xca_imaging.imaging import manifest
from xca_imaging.imaging.backends.cfind import Queries
from xca_imaging.imaging.backends.pool import Associations
from xca_imaging.imaging.profile import Profile, read_profile
from xca_imaging.imaging.study import Patient, StudyContents
from xca_imaging.metadata.model import Identifier, Submission
from xca_imaging.transactions.adhoc_query import QueryResponse
from xca_imaging.transactions.registry_response import RegistryResponse

AFFINITY_DOMAIN = Identifier("AD-1", "1.2.3.4.5")
SECOND_ARCHIVE = PACS.model_copy(update={"name": "second", "retrieve_location_uid": "1.3.6.1.4.1.21367.13.80.111"})


@pytest.fixture(scope="module")
def profile() -> Profile:
    return read_profile(data_folder("profiles") / "ihe.toml")


@pytest.fixture
def registry() -> Registry:
    return Registry()


class Publishing:
    """`publish` with what is the same in all tests."""

    def __init__(self, registry: Registry, profile: Profile) -> None:
        self._given: dict[str, Any] = {
            "repository": registry,
            "profile": profile,
            "source_id": "1.3.6.1.4.1.21367.2017.1",
            "now": Clock(),
            "uid_factory": studies.uid_factory(),
            "uuid_factory": studies.uuid_factory(),
        }

    async def all(
        self, archive: Any, pacs: settings.Pacs = PACS, selection: Selection | None = None, **changes: Any
    ) -> list[Published]:
        publisher = Publisher(pacs=pacs, finder=archive, **(self._given | changes))
        return await publish(publisher, selection or Selection())

    async def one(self, archive: Any, pacs: settings.Pacs = PACS, **changes: Any) -> Published:
        (published,) = await self.all(archive, pacs, **changes)
        return published


@pytest.fixture
def publisher(registry: Registry, profile: Profile) -> Publishing:
    return Publishing(registry, profile)


async def test_a_new_study_is_registered(registry: Registry, publisher: Publishing) -> None:
    result = await publisher.one(Archive(studies.full_study()))
    (entry,) = registry.approved
    assert result == Published(
        study_instance_uid=studies.STUDY,
        outcome="registered",
        patient_id="DEPT-1^^^&1.2.3.1&ISO",
        document_unique_id=entry.unique_id,
        series=2,
        instances=4,
    )
    read = manifest.read(registry.documents[entry.unique_id])
    assert read.sop_instance_uid == entry.unique_id
    assert {series.retrieve_location_uid for _, series, _ in read.instances()} == {PACS.retrieve_location_uid}
    assert {series.retrieve_ae_title for _, series, _ in read.instances()} == {"PACS"}
    # in the zone of the study's own times
    assert (read.timezone_offset, read.content_date, read.content_time[:6]) == ("+0900", "20260304", "140000")
    assert entry.creation_time == "20260304050000"
    (query,) = registry.queries
    assert query.patient_id == result.patient_id
    assert query.status == (uids.APPROVED,)
    assert query.reference_ids == ((f"{studies.STUDY}^^^^{uids.REFERENCE_STUDY_INSTANCE_UID}",),)
    assert [code.code for code in query.format_codes] == [uids.KOS_SOP_CLASS]


async def test_an_unchanged_study_changes_nothing(registry: Registry, publisher: Publishing) -> None:
    first = await publisher.one(Archive(studies.full_study()))
    again = await publisher.one(Archive(studies.full_study()))
    assert (again.outcome, again.document_unique_id) == ("unchanged", first.document_unique_id)
    assert len(registry.submissions) == 1


async def test_order_is_no_change(registry: Registry, publisher: Publishing) -> None:
    await publisher.one(Archive(studies.study(studies.series(1), studies.series(2))))
    assert (await publisher.one(Archive(studies.study(studies.series(2), studies.series(1))))).outcome == "unchanged"


@pytest.mark.parametrize(
    "changed",
    [
        studies.study(studies.series(count=3)),
        studies.study(studies.series(count=1)),
        studies.study(studies.series(), studies.series(2)),
        studies.study(studies.series(sop_class=studies.SR_DOCUMENT)),
        studies.study(patient=replace(studies.PATIENT, name="Muster^Eva")),
        studies.study(accession_number="ACC-9"),
        # not in the manifest itself, but in what is registered of it
        studies.study(studies.series(modality="MR")),
        studies.study(studies.series(body_part_examined="CHEST")),
    ],
)
async def test_a_changed_study_replaces_its_manifest(
    registry: Registry, publisher: Publishing, changed: StudyContents
) -> None:
    first = await publisher.one(Archive(studies.study()))
    second = await publisher.one(Archive(changed))
    assert second.outcome == "replaced"
    assert [entry.unique_id for entry in registry.approved] == [second.document_unique_id]
    (old,) = [entry for entry in registry.entries.values() if entry.unique_id == first.document_unique_id]
    (association,) = [each for each in registry.submissions[1].associations if each.type == uids.RPLC]
    assert association.target == old.entry_uuid
    assert (await publisher.one(Archive(changed))).outcome == "unchanged"


async def test_another_place_of_retrieval_is_a_change(registry: Registry, publisher: Publishing) -> None:
    await publisher.one(Archive(studies.study()))
    renamed = PACS.model_copy(update={"ae_title": "NEWPACS"})
    assert (await publisher.one(Archive(studies.study()), renamed)).outcome == "replaced"


async def test_a_study_in_two_archives_has_two_manifests(registry: Registry, publisher: Publishing) -> None:
    await publisher.one(Archive(studies.study()))
    assert (await publisher.one(Archive(studies.study()), SECOND_ARCHIVE)).outcome == "registered"
    assert (await publisher.one(Archive(studies.study()))).outcome == "unchanged"
    assert (await publisher.one(Archive(studies.study(description="x")), SECOND_ARCHIVE)).outcome == "replaced"
    assert len(registry.approved) == 2


async def test_a_manifest_with_description_is_left_alone(registry: Registry, publisher: Publishing) -> None:
    first = await publisher.one(Archive(studies.study()))
    ds = pydicom.dcmread(io.BytesIO(registry.documents[first.document_unique_id]))
    ds.ConceptNameCodeSequence[0].CodeValue, ds.ConceptNameCodeSequence[0].CodingSchemeDesignator = "131560", "DCM"
    target = io.BytesIO()
    ds.save_as(target)
    registry.documents[first.document_unique_id] = target.getvalue()
    assert (await publisher.one(Archive(studies.study()))).outcome == "registered"


async def test_the_newest_of_several_is_compared_and_replaced(registry: Registry, publisher: Publishing) -> None:
    older = await publisher.one(Archive(studies.study()))
    hidden, registry.entries = registry.entries, {}
    newer = await publisher.one(Archive(studies.study(studies.series(count=3))))
    registry.entries |= hidden
    result = await publisher.one(Archive(studies.study(studies.series(count=4))))
    assert result.outcome == "replaced"
    assert older.document_unique_id in result.reason
    assert newer.document_unique_id not in {entry.unique_id for entry in registry.approved}


async def test_what_is_no_manifest_is_left_alone(registry: Registry, publisher: Publishing) -> None:
    first = await publisher.one(Archive(studies.study()))
    registry.documents[first.document_unique_id] = b"%PDF-1.7"
    assert (await publisher.one(Archive(studies.study()))).outcome == "registered"


async def test_a_registry_that_ignores_the_reference_id(registry: Registry, publisher: Publishing) -> None:
    await publisher.one(Archive(studies.study()))
    other = replace(
        studies.study(), facts=replace(studies.study().facts, study_instance_uid="1.2.826.0.1.3680043.8.498.2")
    )
    registry.query_response = QueryResponse(uids.STATUS_SUCCESS, (), Submission(documents=tuple(registry.approved)))
    assert (await publisher.one(Archive(other))).outcome == "registered"
    assert len(registry.approved) == 2


# --- Whose study it is ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patient", "expected"),
    [
        (Patient(id="X", issuer="HOSPITAL", issuer_oid="1.2.9"), "X^^^&1.2.9&ISO"),
        (Patient(id="X", issuer="1.2.8"), "X^^^&1.2.8&ISO"),
        (Patient(id="X", issuer="HOSPITAL"), f"X^^^&{studies.AUTHORITY}&ISO"),
        (Patient(id="X&Y"), rf"X\T\Y^^^&{studies.AUTHORITY}&ISO"),
    ],
)
async def test_patient_of_the_department(
    registry: Registry, publisher: Publishing, patient: Patient, expected: str
) -> None:
    result = await publisher.one(Archive(studies.study(patient=patient)))
    (entry,) = registry.approved
    assert result.patient_id == entry.patient_id == entry.source_patient_id == expected


@pytest.mark.parametrize(
    ("patient", "authority", "source"),
    [
        (studies.PATIENT, studies.AUTHORITY, f"DEPT-1^^^&{studies.AUTHORITY}&ISO"),
        (studies.PATIENT, "", f"DEPT-1^^^&{PACS.retrieve_location_uid}&ISO"),
        (Patient(), "", str(AFFINITY_DOMAIN)),
    ],
)
async def test_patient_of_the_affinity_domain(
    registry: Registry, publisher: Publishing, patient: Patient, authority: str, source: str
) -> None:
    pacs = PACS.model_copy(update={"assigning_authority": authority})
    result = await publisher.one(Archive(studies.study(patient=patient)), pacs, patient_id=AFFINITY_DOMAIN)
    (entry,) = registry.approved
    assert result.patient_id == entry.patient_id == str(AFFINITY_DOMAIN)
    assert registry.submissions[0].submission_sets[0].patient_id == str(AFFINITY_DOMAIN)
    assert entry.source_patient_id == source


@pytest.mark.parametrize(
    ("patient", "hint"), [(Patient(id="X", issuer="HOSPITAL"), "assigning_authority"), (Patient(name="A^B"), "--as")]
)
async def test_a_patient_of_unknown_domain_is_refused(
    registry: Registry, publisher: Publishing, patient: Patient, hint: str
) -> None:
    pacs = PACS.model_copy(update={"assigning_authority": ""})
    result = await publisher.one(Archive(studies.study(patient=patient)), pacs)
    assert result.outcome == "refused"
    assert hint in result.reason
    assert registry.submissions == []


# --- What goes wrong --------------------------------------------------------------------------------------------------


def three_studies() -> Archive:
    first = studies.study()
    others = [
        replace(first, facts=replace(first.facts, study_instance_uid=f"1.2.826.0.1.3680043.8.498.{n}")) for n in (2, 3)
    ]
    return Archive(first, *others)


async def test_a_study_without_instances_is_refused(registry: Registry, publisher: Publishing) -> None:
    result = await publisher.one(Archive(studies.study(studies.series(count=0))))
    assert (result.outcome, result.document_unique_id) == ("refused", "")
    assert "no instances" in result.reason
    assert registry.submissions == []


async def test_one_refusal_does_not_keep_the_others_back(registry: Registry, publisher: Publishing) -> None:
    archive = three_studies()
    archive.errors["1.2.826.0.1.3680043.8.498.2"] = ManifestError("numbers do not agree")
    results = await publisher.all(archive)
    assert [each.outcome for each in results] == ["registered", "refused", "registered"]
    assert results[1].reason == "numbers do not agree"


async def test_a_pacs_that_is_lost_ends_it(registry: Registry, publisher: Publishing) -> None:
    archive = three_studies()
    archive.errors["1.2.826.0.1.3680043.8.498.2"] = ConnectFailed("main", "connection refused")
    results = await publisher.all(archive)
    assert [each.outcome for each in results] == ["registered", "refused", "refused"]
    assert results[2].reason == "not tried: main: connection refused"


async def test_no_such_study(publisher: Publishing) -> None:
    results = await publisher.all(Archive(), selection=Selection(study_instance_uid="1.2.3"))
    assert [(each.study_instance_uid, each.outcome, each.reason) for each in results] == [
        ("1.2.3", "refused", "main has no such study, and nothing is registered of it that could be withdrawn")
    ]
    assert await publisher.all(Archive(), selection=Selection(patient_id="nobody")) == []


async def test_selection_is_passed_on(publisher: Publishing) -> None:
    archive = Archive()
    selection = Selection(patient_id="P", since=date(2026, 1, 1), until=date(2026, 1, 31))
    await publisher.all(archive, selection=selection)
    assert archive.asked == {
        "study_instance_uid": "",
        "patient_id": "P",
        "since": date(2026, 1, 1),
        "until": date(2026, 1, 31),
    }


async def test_a_pacs_that_cannot_be_asked_is_an_error(publisher: Publishing) -> None:
    archive = Archive()
    archive.errors[""] = PeerBusy("main", "busy")
    with pytest.raises(PeerBusy):
        await publisher.all(archive)


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        (RegistryResponse(uids.STATUS_FAILURE, (RegistryMetadataError("classCode"),)), "classCode"),
        (RegistryResponse(uids.STATUS_FAILURE), "gave no error"),
        (RegistryResponse(uids.STATUS_PARTIAL_SUCCESS), "PartialSuccess"),
        (RegistryResponse(""), "without a status"),
    ],
)
async def test_a_submission_that_is_not_accepted(
    registry: Registry, publisher: Publishing, response: RegistryResponse, reason: str
) -> None:
    registry.response = response
    result = await publisher.one(Archive(studies.study()))
    assert result.outcome == "refused"
    assert reason in result.reason


@pytest.mark.parametrize(
    "response",
    [
        QueryResponse(uids.STATUS_FAILURE, (RegistryNotAvailable("away"),)),
        QueryResponse(uids.STATUS_PARTIAL_SUCCESS, (RegistryNotAvailable("away"),)),
        # an entry that cannot be read may be the one that is to be replaced
        QueryResponse(uids.STATUS_SUCCESS, (), Submission(), (), (RegistryNotAvailable("away"),)),
    ],
)
async def test_a_registry_that_does_not_say_what_is_registered(
    registry: Registry, publisher: Publishing, response: QueryResponse
) -> None:
    registry.query_response = response
    result = await publisher.one(Archive(studies.study()))
    assert (result.outcome, "away" in result.reason) == ("refused", True)
    assert registry.submissions == []


async def test_a_registered_manifest_that_cannot_be_fetched(registry: Registry, publisher: Publishing) -> None:
    await publisher.one(Archive(studies.study()))
    registry.documents.clear()
    result = await publisher.one(Archive(studies.study()))
    assert (result.outcome, "no such document" in result.reason) == ("refused", True)


# --- The published conformance case -----------------------------------------------------------------------------------


@pytest.mark.peer
@pytest.mark.parametrize("name", ["ids_single", "ids_pet"])
async def test_conformance_ids_2018_4801a(
    tmp_path: Path, registry: Registry, publisher: Publishing, profile: Profile, name: str
) -> None:
    """The images behind the node, the KOS and its metadata compared with them (cases 3.1)."""
    facts = json.loads(shared_path("conformance/data/dataset.json").read_text())["studies"][name]
    files = sorted(shared_path(f"conformance/data/dicom/{name}").glob("*.dcm"))
    originals = [pydicom.dcmread(file, stop_before_pixels=True) for file in files]
    patient_id = Identifier(facts["xds_patient_id"].split("^")[0], facts["xds_patient_id"].split("&")[1])
    domain = profile.model_copy(update={"accession_assigning_authority": "1.3.6.1.4.1.21367.13.202.2000"})
    with peers.Orthanc(tmp_path / "pacs") as orthanc:
        orthanc.upload(files)
        pacs = PACS.model_copy(update={"ae_title": "ORTHANC", "port": orthanc.port})
        result = await publisher.one(
            Queries(Associations(pacs, calling_ae_title="TEST")), pacs, patient_id=patient_id, profile=domain
        )
    assert result.outcome == "registered", result.reason
    (entry,) = registry.approved
    ds = pydicom.dcmread(io.BytesIO(registry.documents[entry.unique_id]))

    assert ds.SOPClassUID == uids.KOS_SOP_CLASS
    assert ds.Modality == "KO"
    for keyword in (
        "PatientName",
        "PatientID",
        "PatientBirthDate",
        "PatientSex",
        "AccessionNumber",
        "StudyInstanceUID",
    ):
        assert ds[keyword].value == originals[0][keyword].value
    (study,) = ds.CurrentRequestedProcedureEvidenceSequence
    assert study.StudyInstanceUID == facts["study"]
    assert {series.SeriesInstanceUID for series in study.ReferencedSeriesSequence} == {
        series["uid"] for series in facts["series"]
    }
    assert ds.SeriesInstanceUID not in {series["uid"] for series in facts["series"]}
    for series in study.ReferencedSeriesSequence:
        assert series.RetrieveAETitle
        assert series.RetrieveLocationUID == facts["repo"]
    assert {
        (sop.ReferencedSOPClassUID, sop.ReferencedSOPInstanceUID)
        for series in study.ReferencedSeriesSequence
        for sop in series.ReferencedSOPSequence
    } == {(original.SOPClassUID, original.SOPInstanceUID) for original in originals}

    assert registry.submissions[0].submission_sets[0].patient_id == entry.patient_id == facts["xds_patient_id"]
    assert entry.mime_type == "application/dicom"
    assert entry.object_type == uids.STABLE_DOCUMENT
    assert entry.format_code is not None
    assert (entry.format_code.code, entry.format_code.scheme) == (uids.KOS_SOP_CLASS, "1.2.840.10008.2.6.1")
    assert entry.unique_id == ds.SOPInstanceUID
    accession = f"{facts['accession']}^^^&1.3.6.1.4.1.21367.13.202.2000&ISO^urn:ihe:iti:xds:2013:accession"
    assert accession in entry.reference_ids
    regions = {"ids_single": [], "ids_pet": [("39607008", "2.16.840.1.113883.6.96")]}[name]
    modality = facts["series"][0]["instances"][0]["modality"]
    assert [(code.code, code.scheme) for code in entry.event_codes] == [(modality, "1.2.840.10008.2.16.4"), *regions]
    assert entry.source_patient_id.split("^")[0] == facts["patient_id"]
    for code in (
        entry.class_code,
        entry.type_code,
        entry.healthcare_facility_type_code,
        entry.practice_setting_code,
        *entry.confidentiality_codes,
    ):
        assert code is not None
        assert code.code
