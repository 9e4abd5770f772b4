"""Manifests: what we write others read, what others write we read, and nothing hostile gets through."""

from __future__ import annotations

import io
import zlib
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian

from tests.imaging import studies
from tests.support import peers, rejection
from tests.support.shared import shared_path
from xca_imaging import uids
from xca_imaging.errors import ManifestError
from xca_imaging.imaging import manifest
from xca_imaging.imaging.study import StudyContents
from xca_imaging.metadata.model import Code

NOW = datetime(2026, 3, 4, 5, 6, 7, 89, tzinfo=UTC)
LOCATION = "1.3.6.1.4.1.21367.13.80.110"


def built(contents: StudyContents | None = None, **changes: Any) -> bytes:
    given: dict[str, Any] = {
        "retrieve_ae_title": "PACS",
        "retrieve_location_uid": LOCATION,
        "now": NOW,
        "uid_factory": studies.uid_factory(),
    }
    return manifest.build(contents or studies.study(), **(given | changes))


def dataset(content: bytes) -> Dataset:
    return pydicom.dcmread(io.BytesIO(content))


def written(ds: Dataset) -> bytes:
    target = io.BytesIO()
    ds.save_as(target, enforce_file_format=True)
    return target.getvalue()


# --- Writing ----------------------------------------------------------------------------------------------------------


def test_what_is_built_is_read_back() -> None:
    contents = studies.full_study()
    read = manifest.read(built(contents, now=NOW.astimezone(timezone(timedelta(hours=9)))))
    facts = contents.facts
    assert read.warnings == ()
    assert read.title == Code("113030", "DCM", "Manifest")
    assert read.patient == facts.patient
    assert (read.study_instance_uid, read.study_date, read.study_time) == (studies.STUDY, facts.date, facts.time)
    assert (read.study_description, read.study_id) == (facts.description, facts.id)
    assert (read.accession_number, read.accession_issuer) == (facts.accession_number, facts.accession_issuer)
    assert read.referring_physician == facts.referring_physician
    assert read.requests == contents.requests
    assert (read.timezone_offset, read.content_date, read.content_time) == ("+0900", "20260304", "140607.000089")
    assert read.sop_instance_uid != read.series_instance_uid
    references = {(s.series_instance_uid, i.sop_class_uid, i.sop_instance_uid) for _, s, i in read.instances()}
    assert references == {
        (s.facts.series_instance_uid, i.sop_class_uid, i.sop_instance_uid) for s in contents.series for i in s.instances
    }
    for _, series, _ in read.instances():
        assert (series.retrieve_ae_title, series.retrieve_location_uid) == ("PACS", LOCATION)


def test_part_10_file_of_the_right_class() -> None:
    ds = dataset(built())
    assert ds.file_meta.TransferSyntaxUID == uids.EXPLICIT_VR_LITTLE_ENDIAN
    assert ds.file_meta.MediaStorageSOPClassUID == ds.SOPClassUID == uids.KOS_SOP_CLASS
    assert ds.file_meta.MediaStorageSOPInstanceUID == ds.SOPInstanceUID
    assert ds.Modality == "KO"
    assert "SpecificCharacterSet" not in ds  # ASCII does


def test_text_beyond_ascii_is_utf_8() -> None:
    ds = dataset(built(studies.full_study()))
    assert ds.SpecificCharacterSet == "ISO_IR 192"
    assert ds.PatientName.ideographic == "山田^太郎"


def test_evidence_and_content_tree_name_the_same_instances() -> None:
    ds = dataset(built(studies.full_study()))
    (study,) = ds.CurrentRequestedProcedureEvidenceSequence
    evidence = [
        (sop.ReferencedSOPClassUID, sop.ReferencedSOPInstanceUID)
        for series in study.ReferencedSeriesSequence
        for sop in series.ReferencedSOPSequence
    ]
    tree = [
        (item.ReferencedSOPSequence[0].ReferencedSOPClassUID, item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID)
        for item in ds.ContentSequence
    ]
    assert evidence == tree
    assert len(set(tree)) == 4
    assert [(item.RelationshipType, item.ValueType) for item in ds.ContentSequence] == [
        *[("CONTAINS", "IMAGE")] * 3,
        ("CONTAINS", "COMPOSITE"),
    ]


def test_series_uid_is_none_of_the_referenced() -> None:
    read = manifest.read(built(studies.full_study()))
    assert read.series_instance_uid not in {series.series_instance_uid for _, series, _ in read.instances()}


@pytest.mark.parametrize(
    ("sop_class", "value_type"),
    [
        ("1.2.840.10008.5.1.4.1.1.2", "IMAGE"),  # CT
        ("1.2.840.10008.5.1.4.1.1.2.1", "IMAGE"),  # Enhanced CT
        ("1.2.840.10008.5.1.4.1.1.3", "IMAGE"),  # Ultrasound Multi-frame, retired
        ("1.2.840.10008.5.1.4.1.1.7", "IMAGE"),  # Secondary Capture
        ("1.2.840.10008.5.1.4.1.1.77.1.5.1", "IMAGE"),  # Ophthalmic Photography
        ("1.2.840.10008.5.1.4.1.1.66.4", "IMAGE"),  # Segmentation
        ("1.2.840.10008.5.1.4.1.1.481.1", "IMAGE"),  # RT Image
        ("1.2.840.10008.5.1.4.1.1.9.1.1", "WAVEFORM"),  # 12-lead ECG
        ("1.2.840.10008.5.1.4.1.1.9.4.1", "WAVEFORM"),  # Basic Voice Audio
        ("1.2.840.10008.5.1.4.1.1.11.1", "COMPOSITE"),  # Grayscale Softcopy Presentation State
        ("1.2.840.10008.5.1.4.1.1.88.22", "COMPOSITE"),  # Enhanced SR
        ("1.2.840.10008.5.1.4.1.1.104.1", "COMPOSITE"),  # Encapsulated PDF
        ("1.2.840.10008.5.1.4.1.1.481.3", "COMPOSITE"),  # RT Structure Set
        ("1.2.840.10008.5.1.4.1.1.66.1", "COMPOSITE"),  # Spatial Registration
        ("1.2.3.4.5", "COMPOSITE"),  # private
    ],
)
def test_value_type_follows_the_sop_class(sop_class: str, value_type: str) -> None:
    assert manifest.value_type(sop_class) == value_type


def test_a_request_is_referenced_only_when_there_is_one() -> None:
    assert "ReferencedRequestSequence" not in dataset(built(studies.study(accession_number="")))
    (request,) = dataset(built()).ReferencedRequestSequence
    assert (request.AccessionNumber, request.StudyInstanceUID) == ("ACC-1", studies.STUDY)
    for keyword in ("ReferencedStudySequence", "RequestedProcedureID", "FillerOrderNumberImagingServiceRequest"):
        assert not request[keyword].value  # type 2: there, and empty


@pytest.mark.parametrize("contents", [studies.study(studies.series(count=0)), studies.study(studies.series(1, 0))])
def test_a_study_without_instances_is_refused(contents: StudyContents) -> None:
    with pytest.raises(ManifestError, match="no instances"):
        built(contents)


def test_an_empty_series_is_left_out() -> None:
    read = manifest.read(built(studies.study(studies.series(1, 0), studies.series(2, 1))))
    assert [series.series_instance_uid for series in read.studies[0].series] == [f"{studies.STUDY}.2"]


def test_an_instance_without_sop_class_is_refused() -> None:
    with pytest.raises(ManifestError, match=r"SOP Class.*\.1\.1 "):
        built(studies.study(studies.series(sop_class="")))


def test_values_that_break_their_vr_stay_as_they_are() -> None:
    """Departmental values are not ours to correct, and not a reason for warnings (which are errors here)."""
    long = "x" * 80
    patient = replace(studies.PATIENT, id=long, birth_date="1970-01-31", sex="female")
    read = manifest.read(built(studies.study(patient=patient, accession_number=long, time="13:45:00")))
    assert (read.patient, read.accession_number, read.study_time) == (patient, long, "13:45:00")


@pytest.mark.parametrize("name", ["ids_single", "ids_pet"])
def test_equals_the_reference_manifest(name: str) -> None:
    """The published KOS of the conformance study, element by element, but for what is new in each."""
    reference = pydicom.dcmread(shared_path(f"conformance/data/kos/{name}.reference-kos.dcm"))
    expected = manifest.read(Path(str(reference.filename)))
    (study,) = expected.studies
    facts = studies.study(
        *(
            studies.SeriesContents(
                studies.SeriesFacts(series_instance_uid=series.series_instance_uid),
                tuple(
                    studies.InstanceFacts(sop_instance_uid=i.sop_instance_uid, sop_class_uid=i.sop_class_uid)
                    for i in series.instances
                ),
            )
            for series in study.series
        ),
        patient=expected.patient,
        date=expected.study_date,
        time=expected.study_time,
        id=expected.study_id,
        accession_number=expected.accession_number,
        referring_physician=expected.referring_physician,
        description="",
    )
    facts = replace(facts, facts=replace(facts.facts, study_instance_uid=expected.study_instance_uid))
    ours = dataset(built(facts, retrieve_ae_title="DCM4CHEE"))
    for ds in (ours, reference):
        for keyword in (
            "SpecificCharacterSet",
            "SOPInstanceUID",
            "SeriesInstanceUID",
            "ContentDate",
            "ContentTime",
            "SeriesNumber",
            "Manufacturer",
            "ReferencedRequestSequence",  # ours has it, as the IOD asks where the accession number is known
        ):
            if keyword in ds:
                delattr(ds, keyword)
    assert ours.to_json_dict() == reference.to_json_dict()


@pytest.mark.peer
def test_dcmtk_reads_it_as_a_key_object_selection(tmp_path: Path) -> None:
    file = tmp_path / "manifest.dcm"
    file.write_bytes(built(studies.full_study()))
    # DCMTK checks the constraints of the IOD while it reads; +Pu prints the UIDs of what is referenced.
    done = peers.run(peers.program("dsrdump"), "-v", "-d", "+Pu", str(file))
    assert "Key Object Selection Document" in done.stdout
    assert done.stdout.count("<contains IMAGE:=") == 3
    assert done.stdout.count("<contains COMPOSITE:=") == 1
    said = {line for line in (done.stdout + done.stderr).splitlines() if line.startswith(("E:", "W:"))}
    # What DCMTK cannot check is no complaint: templates, and UTF-8 where it was built without character sets.
    assert not {line for line in said if "not yet supported" not in line and "Specific Character Set" not in line}


# --- Reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "instances", "title", "requests", "locations"),
    [
        (
            "conformance/data/kos/ids_single.reference-kos.dcm",
            1,
            "113030",
            0,
            ["1.3.6.1.4.1.21367.13.80.110"],
        ),
        ("conformance/data/kos/ids_pet.reference-kos.dcm", 10, "113030", 0, ["1.3.6.1.4.1.21367.13.80.110"]),
        (
            "conformance/data/kos/chest-xray-two-views.reference-kos.dcm",
            1,
            "113030",
            0,
            ["1.3.6.1.4.1.21367.13.80.110"],
        ),
        (
            "examples/mado/MADO_KOS_A.dcm",
            86,
            "MADOTEMP001",
            1,
            ["1.3.6.1.4.1.19376.1.1.200.1", "1.3.6.1.4.1.19376.1.1.200.2"],
        ),
        (
            "examples/mado/MADO_KOS_B.dcm",
            21,
            "MADOTEMP001",
            2,
            ["1.3.6.1.4.1.19376.1.1.202.1", "1.3.6.1.4.1.19376.1.1.202.2"],
        ),
    ],
)
def test_manifests_of_others(name: str, instances: int, title: str, requests: int, locations: list[str]) -> None:
    read = manifest.read(shared_path(name))
    assert read.number_of_instances == instances
    assert read.title.code == title
    assert len(read.requests) == requests
    assert [series.retrieve_location_uid for study in read.studies for series in study.series] == locations
    assert read.warnings == ()


def test_bytes_and_file_are_read_alike(tmp_path: Path) -> None:
    content = built()
    file = tmp_path / "kos.dcm"
    file.write_bytes(content)
    assert manifest.read(file) == manifest.read(content)
    with pytest.raises(ManifestError, match="cannot be read"):
        manifest.read(tmp_path / "missing.dcm")


def test_without_retrieve_location_uid() -> None:
    ds = dataset(built())
    del ds.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0].RetrieveLocationUID
    read = manifest.read(written(ds))
    assert [series.retrieve_location_uid for _, series, _ in read.instances()] == ["", ""]
    assert "0040,E011" in read.warnings[0]


def test_several_studies_and_a_retrieve_url_of_a_study() -> None:
    ds = dataset(built())
    other = dataset(built(uid_factory=studies.uid_factory("1.2.3"))).CurrentRequestedProcedureEvidenceSequence[0]
    other.StudyInstanceUID = "1.2.3.4"
    other.RetrieveURL = "https://pacs.example/rs"
    ds.CurrentRequestedProcedureEvidenceSequence.append(other)
    read = manifest.read(written(ds))
    assert [study.study_instance_uid for study in read.studies] == [studies.STUDY, "1.2.3.4"]
    assert [study.series[0].retrieve_url for study in read.studies] == ["", "https://pacs.example/rs"]
    assert read.number_of_instances == 4


def test_the_same_series_in_two_items_is_one() -> None:
    ds = dataset(built())
    (study,) = ds.CurrentRequestedProcedureEvidenceSequence
    study.ReferencedSeriesSequence.append(study.ReferencedSeriesSequence[0])
    read = manifest.read(written(ds))
    assert len(read.studies[0].series) == 1
    assert read.number_of_instances == 2


def test_deflated() -> None:
    ds = dataset(built())
    ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    assert manifest.read(written(ds)).same_content(manifest.read(built()))


def test_without_file_meta_information() -> None:
    content = built()
    length = int.from_bytes(content[140:144], "little")
    assert manifest.read(content[144 + length :]).same_content(manifest.read(content))


@pytest.mark.parametrize("code", ["113001", "113037", "113038", "113039"])
def test_rejection_notes_are_not_manifests(code: str) -> None:
    ds = dataset(built())
    ds.ConceptNameCodeSequence[0].CodeValue = code
    with pytest.raises(ManifestError, match="rejection note"):
        manifest.read(written(ds))


@pytest.mark.parametrize("code", ["113001", "113037", "113038", "113039"])
def test_a_rejection_note_says_what_it_rejects(code: str) -> None:
    note = rejection.note("1.2.3", {"1.2.3.1": ["1.2.3.1.1", "1.2.3.1.2"]}, code=code)
    found = manifest.read_rejection(written(note))
    assert found is not None
    assert found.sop_instance_uid == note.SOPInstanceUID
    assert found.reason == manifest.REJECTION_NOTES[code, "DCM"]
    assert found.sop_instance_uids == {"1.2.3.1.1", "1.2.3.1.2"}


def test_what_a_rejection_note_names_in_one_place_only_is_rejected() -> None:
    note = rejection.note("1.2.3", {"1.2.3.1": ["1.2.3.1.1", "1.2.3.1.2", "1.2.3.1.3"]})
    del note.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence[0]
    del note.ContentSequence[2]
    deeper = Dataset()
    deeper.RelationshipType, deeper.ValueType = "CONTAINS", "CONTAINER"
    deeper.ContentSequence, note.ContentSequence = note.ContentSequence, [deeper]
    found = manifest.read_rejection(written(note))
    assert found is not None
    assert found.sop_instance_uids == {"1.2.3.1.1", "1.2.3.1.2", "1.2.3.1.3"}


@pytest.mark.parametrize(("code", "scheme"), [("113000", "DCM"), ("113030", "DCM"), ("113001", "99LOCAL")])
def test_other_key_objects_reject_nothing(code: str, scheme: str) -> None:
    note = rejection.note("1.2.3", {"1.2.3.1": ["1.2.3.1.1"]}, code=code)
    note.ConceptNameCodeSequence[0].CodingSchemeDesignator = scheme
    assert manifest.read_rejection(written(note)) is None


def test_a_rejection_note_that_cannot_be_understood_is_refused() -> None:
    note = rejection.note("1.2.3", {"1.2.3.1": ["1.2.3.1.1"]})
    del note.CurrentRequestedProcedureEvidenceSequence
    del note.ContentSequence
    with pytest.raises(ManifestError, match="does not say what it rejects"):
        manifest.read_rejection(written(note))
    note = rejection.note("1.2.3", {"1.2.3.1": ["1.2.3.1.1"]})
    for _ in range(40):
        deeper = Dataset()
        deeper.RelationshipType, deeper.ValueType = "CONTAINS", "CONTAINER"
        deeper.ContentSequence, note.ContentSequence = note.ContentSequence, [deeper]
    with pytest.raises(ManifestError, match="deeper than"):
        manifest.read_rejection(written(note))
    with pytest.raises(ManifestError, match="SOP Class"):
        manifest.read_rejection(b"%PDF-1.7")


def test_an_image_is_not_a_manifest() -> None:
    ds = dataset(built())
    ds.SOPClassUID = studies.CT_IMAGE
    with pytest.raises(ManifestError, match="SOP Class"):
        manifest.read(written(ds))


@pytest.mark.parametrize("uid", ["", "../../etc/passwd", "1.2.3/4"])
def test_an_instance_that_cannot_be_named_is_an_error(uid: str) -> None:
    """Without it the list would be short and look whole."""
    content = built()
    wanted = f"{studies.STUDY}.1.2".encode()
    broken = content.replace(wanted, uid.encode().ljust(len(wanted), b" "))
    with pytest.raises(ManifestError, match="ReferencedSOPInstanceUID"):
        manifest.read(broken)


def test_no_evidence() -> None:
    ds = dataset(built())
    del ds.CurrentRequestedProcedureEvidenceSequence
    with pytest.raises(ManifestError, match="no instances"):
        manifest.read(written(ds))


@pytest.mark.parametrize("content", [b"", b"DICM", b"<xml/>", bytes(200), b"%PDF-1.7" * 100])
def test_garbage(content: bytes) -> None:
    with pytest.raises(ManifestError):
        manifest.read(content)


def test_limits() -> None:
    content = built()
    with pytest.raises(ManifestError, match="1000 bytes"):
        manifest.read(content, max_bytes=1000)
    with pytest.raises(ManifestError, match="5 sequence items"):
        manifest.read(content, max_items=5)


def test_a_deflate_bomb_is_not_inflated() -> None:
    ds = dataset(built())
    ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    content = written(ds)
    start = 144 + int.from_bytes(content[140:144], "little")
    deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    bomb = deflater.compress(bytes(50 * 10**6)) + deflater.flush()
    with pytest.raises(ManifestError, match="more than 1000000 bytes"):
        manifest.read(content[:start] + bomb, max_bytes=10**6)
    with pytest.raises(ManifestError, match="inflated"):
        manifest.read(content[:start] + b"\xff" * 100)


def test_deep_nesting_is_an_error() -> None:
    """Sequences of undefined length in one another: (0008,1115) SQ, item, and so on."""
    content = built()
    level = b"\x08\x00\x15\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
    with pytest.raises(ManifestError):
        manifest.read(content + level * 5000)


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
@given(data=st.data())
def test_damaged_manifests_are_read_or_refused(data: st.DataObject) -> None:
    content = bytearray(built(studies.full_study()))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(132, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    for damaged in (bytes(content), bytes(content[:cut])):
        try:
            read = manifest.read(damaged)
        except ManifestError:
            continue
        assert read.number_of_instances > 0


# --- Comparing --------------------------------------------------------------------------------------------------------


def test_same_content_whatever_it_is_called() -> None:
    one = manifest.read(built())
    other = manifest.read(built(now=NOW + timedelta(days=1), uid_factory=studies.uid_factory("1.2.3")))
    assert one != other
    assert one.same_content(other)


@pytest.mark.parametrize(
    "changed",
    [
        studies.study(studies.series(count=3)),
        studies.study(studies.series(), studies.series(2)),
        studies.study(studies.series(sop_class=studies.SR_DOCUMENT)),
        studies.study(patient=replace(studies.PATIENT, name="Muster^Eva")),
        studies.study(description="CT Abdomen"),
        studies.study(accession_number="ACC-9"),
        studies.study(date="20260103"),
    ],
)
def test_other_content(changed: StudyContents) -> None:
    assert not manifest.read(built()).same_content(manifest.read(built(changed)))


@pytest.mark.parametrize("changed", [{"retrieve_ae_title": "OTHER"}, {"retrieve_location_uid": "1.2.3"}])
def test_other_place(changed: dict[str, str]) -> None:
    assert not manifest.read(built()).same_content(manifest.read(built(**changed)))
