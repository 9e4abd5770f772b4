"""The mapping of a manifest to document metadata."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from datetime import UTC, datetime, tzinfo
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from tests.imaging import studies
from xca_imaging import uids
from xca_imaging.data_files import data_folder
from xca_imaging.imaging import manifest
from xca_imaging.imaging.document_entry import describe, escape, same_description, study_reference_id, to_dtm, zone_of
from xca_imaging.imaging.profile import Profile, read_profile
from xca_imaging.imaging.study import ImagingRequest, Patient, StudyContents
from xca_imaging.metadata.model import Author, Code, DocumentEntry, Identifier, Submission
from xca_imaging.metadata.validate import validate_submission

NOW = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)
PATIENT_ID = Identifier("AD-1", studies.AUTHORITY)
SOURCE_ID = "1.3.6.1.4.1.21367.2017.1"
SCT, DCM, LOINC = "2.16.840.1.113883.6.96", "1.2.840.10008.2.16.4", "2.16.840.1.113883.6.1"


@pytest.fixture(scope="module")
def profile() -> Profile:
    return read_profile(data_folder("profiles") / "ihe.toml")


def described(contents: StudyContents, profile: Profile, **changes: Any) -> tuple[Submission, bytes]:
    content = manifest.build(
        contents,
        retrieve_ae_title="PACS",
        retrieve_location_uid="1.2.3",
        now=NOW.astimezone(zone_of(contents.facts.timezone_offset, profile.timezone)),
        uid_factory=studies.uid_factory(),
    )
    given: dict[str, Any] = {
        "profile": profile,
        "patient_id": PATIENT_ID,
        "source_patient_id": Identifier(escape(contents.facts.patient.id), "1.2.3.1"),
        "source_id": SOURCE_ID,
        "now": NOW,
        "uid_factory": studies.uid_factory("1.2.826.0.1.3680043.10"),
        "uuid_factory": studies.uuid_factory(),
    }
    return describe(manifest.read(content), content, contents, **(given | changes)), content


def entry_of(contents: StudyContents, profile: Profile, **changes: Any) -> DocumentEntry:
    submission, _ = described(contents, profile, **changes)
    (entry,) = submission.documents
    return entry


def test_every_attribute(profile: Profile) -> None:
    submission, content = described(studies.full_study(), profile)
    (entry,) = submission.documents
    assert entry == DocumentEntry(
        entry_uuid="urn:uuid:00000000-0000-4000-8000-000000000001",
        unique_id=manifest.read(content).sop_instance_uid,
        patient_id=f"AD-1^^^&{studies.AUTHORITY}&ISO",
        mime_type="application/dicom",
        object_type=uids.STABLE_DOCUMENT,
        title="Röntgen – 胸部",
        creation_time="20260304050607",
        service_start_time="20260102053000",  # 14:30 at +0900
        service_stop_time="20260102053000",
        hash=hashlib.sha1(content).hexdigest(),
        size=len(content),
        language_code="en-US",
        source_patient_id="DEPT-1^^^&1.2.3.1&ISO",
        source_patient_info=("PID-3|DEPT-1^^^&1.2.3.1&ISO", "PID-5|Yamada^Tarou", "PID-7|19700131", "PID-8|M"),
        class_code=Code("IMAGES", "1.3.6.1.4.1.19376.1.2.6.1", "Images"),
        type_code=Code("24627-2", LOINC, "CT Chest"),
        format_code=Code(uids.KOS_SOP_CLASS, "1.2.840.10008.2.6.1", "Key Object Selection Document"),
        healthcare_facility_type_code=profile.codes.healthcare_facility_type,
        practice_setting_code=profile.codes.practice_setting,
        confidentiality_codes=profile.codes.confidentiality,
        event_codes=(Code("CT", DCM, "Computed Tomography"), Code("816094009", SCT, "Chest")),
        authors=(Author(institutions=("Klinik \\T\\ Praxis",)),),
        reference_ids=(
            f"{studies.STUDY}^^^^urn:ihe:iti:xds:2016:studyInstanceUID",
            "ACC-2^^^&1.2.3.2&ISO^urn:ihe:iti:xds:2013:accession",
            "PLACER-2^^^&1.2.3.3&ISO^urn:ihe:iti:xds:2013:order",
            "ACC-1^^^&1.2.3.2&ISO^urn:ihe:iti:xds:2013:accession",
        ),
    )
    assert entry.study_instance_uids == (studies.STUDY,)


def test_submission_set_and_association(profile: Profile) -> None:
    submission, _ = described(studies.study(), profile)
    (submission_set,), (entry,) = submission.submission_sets, submission.documents
    assert submission_set.patient_id == entry.patient_id
    assert submission_set.source_id == SOURCE_ID
    assert submission_set.submission_time == "20260304050607"
    assert submission_set.content_type_code == profile.codes.content_type
    (member,) = submission.associations
    assert (member.type, member.submission_set_status) == (uids.HAS_MEMBER, "Original")
    assert (member.source, member.target) == (submission_set.entry_uuid, entry.entry_uuid)


def test_replacement(profile: Profile) -> None:
    old = "urn:uuid:11111111-1111-4111-8111-111111111111"
    submission, _ = described(studies.study(), profile, replaces=old)
    _, replacement = submission.associations
    assert (replacement.type, replacement.source, replacement.target) == (
        uids.RPLC,
        submission.documents[0].entry_uuid,
        old,
    )


@pytest.mark.parametrize("contents", [studies.study(), studies.full_study(), studies.study(patient=Patient(id="X"))])
def test_is_accepted_by_the_rules_of_a_repository(profile: Profile, contents: StudyContents) -> None:
    submission, _ = described(contents, profile, repository_unique_id="1.2.3.9")
    assert validate_submission(submission, repository_side=True) == []
    assert validate_submission(submission) == []


@pytest.mark.parametrize(
    ("modalities", "codes"),
    [
        (["CT"], ["CT"]),
        (["PT", "CT", "CT"], ["CT", "PT"]),
        (["CT", "KO", "PR", "SR", "SEG"], ["CT"]),
        (["SR"], []),
        ([""], []),
    ],
)
def test_event_codes_are_acquisition_modalities(profile: Profile, modalities: list[str], codes: list[str]) -> None:
    contents = studies.study(*(studies.series(n, modality=each) for n, each in enumerate(modalities, 1)))
    assert [(code.code, code.scheme) for code in entry_of(contents, profile).event_codes] == [(c, DCM) for c in codes]


@pytest.mark.parametrize(
    ("facts", "regions"),
    [
        ({"body_part_examined": "CHEST"}, [("816094009", SCT)]),
        ({"body_part_examined": "Chest"}, [("816094009", SCT)]),
        ({"body_part_examined": "CHEST PA LYING"}, []),
        ({"anatomic_regions": (Code("12738006", "SCT", "Brain"),)}, [("12738006", SCT)]),
        ({"anatomic_regions": (Code("T-A0100", "SRT", "Brain"),)}, [("T-A0100", SCT)]),
        # coded beats free text, a private scheme has no OID
        ({"anatomic_regions": (Code("12738006", "SCT"),), "body_part_examined": "HEAD"}, [("12738006", SCT)]),
        ({"anatomic_regions": (Code("X", "99LOCAL"),), "body_part_examined": "HEAD"}, [("69536005", SCT)]),
    ],
)
def test_event_codes_are_anatomic_regions(
    profile: Profile, facts: dict[str, Any], regions: list[tuple[str, str]]
) -> None:
    contents = studies.study(studies.series(1, **facts), studies.series(2, **facts), studies.series(3, 0))
    codes = entry_of(contents, profile).event_codes
    assert [(code.code, code.scheme) for code in codes if code.scheme != DCM] == regions


@pytest.mark.parametrize(
    ("procedures", "expected"),
    [
        ((), ("18748-4", LOINC)),
        ((Code("24627-2", "LN", "CT Chest"),), ("24627-2", LOINC)),
        ((Code("CTCHEST", "99LOCAL", "CT Chest"),), ("18748-4", LOINC)),
        ((Code("24627-2", "LN"), Code("30600-1", "LN")), ("18748-4", LOINC)),
    ],
)
def test_type_code_is_the_procedure_where_there_is_one(
    profile: Profile, procedures: tuple[Code, ...], expected: tuple[str, str]
) -> None:
    code = entry_of(studies.study(procedure_codes=procedures), profile).type_code
    assert code is not None
    assert (code.code, code.scheme) == expected


@pytest.mark.parametrize(
    ("issuer", "configured", "expected"),
    [
        ("1.2.3", "4.5.6", "ACC-1^^^&1.2.3&ISO^"),
        ("", "1.3.6.1.4.1.21367.13.202.2000", "ACC-1^^^&1.3.6.1.4.1.21367.13.202.2000&ISO^"),
        ("", "", "ACC-1^^^^"),
    ],
)
def test_accession_authority(profile: Profile, issuer: str, configured: str, expected: str) -> None:
    domain = profile.model_copy(update={"accession_assigning_authority": configured})
    _, accession = entry_of(studies.study(accession_issuer=issuer), domain).reference_ids
    assert accession == expected + uids.REFERENCE_ACCESSION


def test_every_accession_number_once(profile: Profile) -> None:
    request = ImagingRequest(accession_number="ACC-1", accession_issuer="1.2.3", placer_order_number="P")
    contents = studies.study(studies.series(1, requests=(request,)), studies.series(2, requests=(request,)))
    assert entry_of(contents, profile).reference_ids == (
        study_reference_id(studies.STUDY),
        f"ACC-1^^^&1.2.3&ISO^{uids.REFERENCE_ACCESSION}",
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # PN is family^given^middle^prefix^suffix, XPN has suffix before prefix
        ("Muster^Erika^M^Dr.^jr.", "PID-5|Muster^Erika^M^jr.^Dr."),
        ("Muster", "PID-5|Muster"),
        ("Muster^^^^", "PID-5|Muster"),
        ("=山田^太郎", "PID-5|山田^太郎"),
        ("O&Hara|x~y\\z^A", r"PID-5|O\T\Hara\F\x\R\y"),
        ("^^", None),
        ("", None),
    ],
)
def test_patient_name(profile: Profile, name: str, expected: str | None) -> None:
    info = entry_of(studies.study(patient=replace(studies.PATIENT, name=name)), profile).source_patient_info
    assert [each for each in info if each.startswith("PID-5")] == ([expected] if expected else [])


@pytest.mark.parametrize(
    ("birth", "sex", "expected"),
    [
        ("19700131", "F", ["PID-7|19700131", "PID-8|F"]),
        ("1970.01.31", "O", ["PID-7|19700131", "PID-8|O"]),
        ("unknown", "female", ["PID-8|U"]),
        ("", "", []),
    ],
)
def test_birth_date_and_sex(profile: Profile, birth: str, sex: str, expected: list[str]) -> None:
    patient = replace(studies.PATIENT, birth_date=birth, sex=sex)
    info = entry_of(studies.study(patient=patient), profile).source_patient_info
    assert [each for each in info if each[:5] in ("PID-7", "PID-8")] == expected


def test_title_without_description(profile: Profile) -> None:
    contents = studies.study(studies.series(1, modality="PT"), studies.series(2, modality="CT"), description="")
    assert entry_of(contents, profile).title == "CT/PT"


def test_author_of_the_profile_where_the_images_name_none(profile: Profile) -> None:
    assert entry_of(studies.study(), profile).authors == ()
    domain = profile.model_copy(update={"author_institution": "Region West"})
    assert entry_of(studies.study(), domain).authors == (Author(institutions=("Region West",)),)


BERLIN = ZoneInfo("Europe/Berlin")


@pytest.mark.parametrize(
    ("day", "time", "offset", "zone", "dtm"),
    [
        ("20260102", "143000", "", UTC, "20260102143000"),
        ("20260102", "143000.123456", "", BERLIN, "20260102133000"),
        ("20260702", "143000", "", BERLIN, "20260702123000"),  # summer time
        ("20260102", "143000", "-0500", BERLIN, "20260102193000"),
        ("20260102", "233000", "-0500", UTC, "20260103043000"),
        ("20260101", "0030", "+0100", UTC, "202512312330"),
        ("20260102", "14", "+0100", UTC, "2026010213"),
        ("20260102", "14", "+0530", UTC, "202601020830"),
        ("20150322", "13:45:00", "", UTC, "20150322134500"),  # ACR-NEMA
        ("2015.03.22", "", "", UTC, "20150322"),
        ("20260102", "", "+0100", UTC, "20260102"),  # a day is no moment: not shifted
        ("20260102", "noon", "", UTC, "20260102"),
        ("20260102", "235960", "", UTC, "20260102235959"),
        ("20260102", "143000", "+9900", BERLIN, "20260102133000"),
        ("20260102", "143000", "CET", BERLIN, "20260102133000"),
        ("20261302", "143000", "", UTC, ""),
        ("20260102", "250000", "", UTC, ""),
        ("00010101", "000000", "+0100", UTC, ""),
        ("", "143000", "", UTC, ""),
        ("last week", "", "", UTC, ""),
    ],
)
def test_times_are_utc(day: str, time: str, offset: str, zone: tzinfo, dtm: str) -> None:
    assert to_dtm(day, time, offset, zone) == dtm


def test_same_description(profile: Profile) -> None:
    one = entry_of(studies.full_study(), profile)
    other = replace(
        one,
        entry_uuid="urn:uuid:22222222-2222-4222-8222-222222222222",
        unique_id="1.2.3",
        creation_time="20300101",
        hash="0" * 40,
        size=1,
        repository_unique_id="1.2.3",
        home_community_id="urn:oid:1.2.3",
        event_codes=tuple(replace(code, display="?") for code in reversed(one.event_codes)),
        reference_ids=tuple(reversed(one.reference_ids)),
    )
    assert same_description(one, other)


@pytest.mark.parametrize(
    "change",
    [
        {"title": "other"},
        {"type_code": Code("1", "2")},
        {"event_codes": ()},
        {"reference_ids": ()},
        {"source_patient_info": ()},
        {"service_start_time": ""},
        {"practice_setting_code": None},
        {"confidentiality_codes": (Code("R", "2.16.840.1.113883.5.25"),)},
    ],
)
def test_other_description(profile: Profile, change: dict[str, Any]) -> None:
    one = entry_of(studies.full_study(), profile)
    assert not same_description(one, replace(one, **change))
