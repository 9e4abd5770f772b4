"""The rules of a submission, one test a row (ITI TF-2 3.42.4.1.3, TF-3 4.3.1)."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tests.metadata.samples import (
    ENTRY,
    ENTRY_UUID,
    FOLDER,
    MEMBER,
    PATIENT,
    SET_UUID,
    SUBMISSION,
    SUBMISSION_SET,
    WITH_FOLDER,
)
from tests.support.shared import shared_path
from xca_imaging import uids
from xca_imaging.metadata import ebrim
from xca_imaging.metadata.model import Association, Author, Code, Slot, Submission
from xca_imaging.metadata.validate import RELATIONSHIPS, validate_submission
from xca_imaging.wire import xml

METADATA = "XDSRegistryMetadataError"
OLD_UUID = "urn:uuid:77777777-7777-4777-8777-777777777777"
OTHER_PATIENT = "P-0002^^^&1.3.6.1.4.1.21367.2017.9&ISO"


def told(submission: Submission, **arguments) -> list[tuple[str, str]]:
    return [(error.code, error.context) for error in validate_submission(submission, **arguments)]


def entry(**changes) -> Submission:
    return replace(SUBMISSION, documents=(replace(ENTRY, **changes),))


def submission_set(**changes) -> Submission:
    return replace(SUBMISSION, submission_sets=(replace(SUBMISSION_SET, **changes),))


def folder(**changes) -> Submission:
    return replace(WITH_FOLDER, folders=(replace(FOLDER, **changes),))


def relation(**changes) -> Submission:
    relationship = replace(Association(entry_uuid="a1", type=uids.RPLC, source=ENTRY_UUID, target=OLD_UUID), **changes)
    return replace(SUBMISSION, associations=(MEMBER, relationship))


def only(submission: Submission, code: str, text: str, **arguments) -> None:
    """Check that exactly one thing is wrong."""
    errors = told(submission, **arguments)
    assert len(errors) == 1, errors
    assert errors[0][0] == code
    assert text in errors[0][1]


@pytest.mark.parametrize("submission", [SUBMISSION, WITH_FOLDER, relation()], ids=["document", "folder", "replacement"])
@pytest.mark.parametrize("repository_side", [False, True])
def test_a_right_submission(submission, repository_side):
    assert told(submission, repository_side=repository_side) == []


def test_symbolic_ids_are_right():
    symbolic = Submission(
        submission_sets=(replace(SUBMISSION_SET, entry_uuid="SubmissionSet01"),),
        documents=(replace(ENTRY, entry_uuid="Document01"),),
        associations=(replace(MEMBER, entry_uuid="as1", source="SubmissionSet01", target="Document01"),),
    )
    assert told(symbolic) == []


# --- One SubmissionSet ------------------------------------------------------------------------------------------------


def test_no_submission_set():
    errors = told(replace(SUBMISSION, submission_sets=()))
    assert errors[0] == (METADATA, "a submission holds exactly one SubmissionSet, this one holds 0")


def test_two_submission_sets():
    second = replace(SUBMISSION_SET, entry_uuid="second", unique_id="1.2.3.4")
    only(replace(SUBMISSION, submission_sets=(SUBMISSION_SET, second)), METADATA, "this one holds 2")


# --- Required attributes ----------------------------------------------------------------------------------------------

_ENTRY_ATTRIBUTES = {
    "uniqueId": "unique_id",
    "patientId": "patient_id",
    "sourcePatientId": "source_patient_id",
    "mimeType": "mime_type",
    "objectType": "object_type",
    "languageCode": "language_code",
    "creationTime": "creation_time",
    "classCode": "class_code",
    "typeCode": "type_code",
    "formatCode": "format_code",
    "healthcareFacilityTypeCode": "healthcare_facility_type_code",
    "practiceSettingCode": "practice_setting_code",
    "confidentialityCode": "confidentiality_codes",
    "hash": "hash",
    "size": "size",
    "repositoryUniqueId": "repository_unique_id",
}


@pytest.mark.parametrize("attribute", _ENTRY_ATTRIBUTES)
def test_required_in_a_document_entry(attribute):
    field = _ENTRY_ATTRIBUTES[attribute]
    empty = {"class_code": None, "size": None, "confidentiality_codes": ()}.get(field, None if "code" in field else "")
    if field == "language_code":
        empty = ""
    missing = entry(**{field: empty})
    only(missing, METADATA, f"DocumentEntry {ENTRY_UUID}: {attribute} is required")
    if attribute in ("hash", "size", "repositoryUniqueId"):
        assert told(missing, repository_side=True) == []
    else:
        only(missing, "XDSRepositoryMetadataError", f"{attribute} is required", repository_side=True)


_SET_ATTRIBUTES = {
    "uniqueId": ("unique_id", ""),
    "patientId": ("patient_id", ""),
    "sourceId": ("source_id", ""),
    "submissionTime": ("submission_time", ""),
    "contentTypeCode": ("content_type_code", None),
}


@pytest.mark.parametrize("attribute", _SET_ATTRIBUTES)
def test_required_in_a_submission_set(attribute):
    field, empty = _SET_ATTRIBUTES[attribute]
    only(submission_set(**{field: empty}), METADATA, f"SubmissionSet {SET_UUID}: {attribute} is required")


@pytest.mark.parametrize(
    ("attribute", "change"),
    [("uniqueId", {"unique_id": ""}), ("patientId", {"patient_id": ""}), ("codeList", {"codes": ()})],
)
def test_required_in_a_folder(attribute, change):
    only(folder(**change), METADATA, f"{attribute} is required")


def test_required_in_an_association():
    empty = Association(entry_uuid="", type="", source="", target="")
    errors = told(replace(SUBMISSION, associations=(MEMBER, empty)))
    assert [context.split(": ")[1] for _, context in errors] == [
        "id is required",
        "associationType is required",
        "sourceObject is required",
        "targetObject is required",
    ]


def test_every_object_needs_an_id():
    errors = told(replace(SUBMISSION, documents=(ENTRY, replace(ENTRY, entry_uuid="", unique_id="1.2.3"))))
    assert (METADATA, "DocumentEntry : entryUUID is required") in errors


def test_an_on_demand_entry_has_no_content_yet():
    on_demand = {"object_type": uids.ON_DEMAND_DOCUMENT, "creation_time": "", "hash": "", "size": None}
    assert told(entry(**on_demand)) == []
    only(entry(**on_demand | {"size": 0}), METADATA, "size is not allowed in an on-demand entry")
    only(entry(**on_demand | {"hash": ENTRY.hash}), METADATA, "hash is not allowed")
    only(entry(**on_demand | {"creation_time": "2026"}), METADATA, "creationTime is not allowed")
    only(entry(**on_demand | {"repository_unique_id": ""}), METADATA, "repositoryUniqueId is required")


# --- Formats ----------------------------------------------------------------------------------------------------------

_FORMATS = {
    "source patient id": (entry(source_patient_id="L-0001"), "sourcePatientId 'L-0001' is not id^^^&OID&ISO"),
    "creation time": (entry(creation_time="2026-01-02"), "creationTime"),
    "start time": (entry(service_start_time="20261301"), "serviceStartTime"),
    "stop time": (entry(service_stop_time="yesterday"), "serviceStopTime"),
    "hash": (entry(hash="abc"), "hash 'abc' is not a SHA-1"),
    "language": (entry(language_code="en_US"), "languageCode"),
    "mime type": (entry(mime_type="dicom"), "mimeType"),
    "repository id": (entry(repository_unique_id="urn:oid:1.2.3"), "repositoryUniqueId"),
    "home": (entry(home_community_id="1.2.3"), "homeCommunityId"),
    "negative size": (entry(size=-1), "size -1 is negative"),
    "object type": (entry(object_type="urn:x:y"), "objectType"),
    "reference id": (entry(reference_ids=("1.2.3",)), "referenceIdList '1.2.3'"),
    "uuid in capitals": (
        replace(
            SUBMISSION, associations=(replace(MEMBER, entry_uuid="urn:uuid:0A7B6A54-4a43-4a10-9c7f-2f7f6d5e4c44"),)
        ),
        "is not a UUID in lower case",
    ),
    "logical id": (entry(logical_id="urn:uuid:1"), "lid 'urn:uuid:1'"),
    "target uuid": (relation(target="urn:uuid:1"), "targetObject 'urn:uuid:1'"),
    "start after stop": (
        entry(service_start_time="202601020300", service_stop_time="20260101"),
        "serviceStartTime 202601020300 is later than serviceStopTime 20260101",
    ),
    "code without code": (entry(type_code=Code("", "1.2")), "typeCode without a code"),
    "code without scheme": (entry(type_code=Code("a", "")), "typeCode 'a' without a codingScheme"),
    "event code without scheme": (entry(event_codes=(Code("CT", ""),)), "eventCodeList 'CT'"),
    "author of nothing": (entry(authors=(Author(roles=("Attending",)),)), "author without person"),
    "set unique id": (submission_set(unique_id="abc"), "uniqueId 'abc' is not an OID"),
    "set source id": (submission_set(source_id="urn:oid:1.2"), "sourceId"),
    "set time": (submission_set(submission_time="now"), "submissionTime"),
    "set author": (submission_set(authors=(Author(),)), "author without person"),
    "set content type": (submission_set(content_type_code=Code("a", "")), "contentTypeCode"),
    "folder unique id": (folder(unique_id="abc"), "uniqueId"),
    "folder time": (folder(last_update_time="now"), "lastUpdateTime"),
    "folder code": (folder(codes=(Code("a", ""),)), "codeList"),
    "title": (entry(title="t" * 129), "title is longer than 128 characters"),
    "comments": (entry(comments="c" * 1025), "comments are longer than 1024"),
    "unique id": (entry(unique_id="1." + "2" * 127), "uniqueId is longer than 128"),
    "version": (entry(version="1" * 17), "version is longer than 16"),
    "slot value": (entry(uri="u" * 257), "URI has a value longer than 256"),
    "slot values": (entry(source_patient_info=("PID-5|" + "x" * 257,)), "sourcePatientInfo has a value"),
    "extra slot": (entry(extra_slots=(Slot("urn:x:y", ("v" * 257,)),)), "urn:x:y has a value"),
    "author value": (entry(authors=(Author(person="p" * 257),)), "author has a value"),
    "recipient": (submission_set(intended_recipients=("r" * 257,)), "intendedRecipient has a value"),
    "code value": (entry(type_code=Code("c" * 257, "1.2")), "typeCode has a value"),
    "display": (entry(type_code=Code("c", "1.2", "d" * 1025)), "the display name of typeCode"),
    "association documentation": (relation(documentation=Code("a", "")), "associationDocumentation"),
    "association type": (relation(type="urn:x:y"), "associationType 'urn:x:y'"),
    "submission set status": (
        replace(SUBMISSION, associations=(MEMBER, replace(relation().associations[1], submission_set_status="New"))),
        "SubmissionSetStatus 'New'",
    ),
}


@pytest.mark.parametrize("name", _FORMATS)
def test_format(name):
    submission, text = _FORMATS[name]
    only(submission, METADATA, text)
    only(submission, "XDSRepositoryMetadataError", text, repository_side=True)


def test_patient_id_format():
    wrong = "P-0001^^^West&1.2.3&ISO"
    both = Submission(
        submission_sets=(replace(SUBMISSION_SET, patient_id=wrong),),
        documents=(replace(ENTRY, patient_id=wrong),),
        associations=(MEMBER,),
    )
    assert [code for code, _ in told(both)] == [METADATA, METADATA]


def test_times_of_different_precision_on_the_same_day_are_right():
    assert told(entry(service_start_time="202601022300", service_stop_time="20260102")) == []


# --- Structure --------------------------------------------------------------------------------------------------------


def test_the_same_unique_id_twice():
    second = replace(ENTRY, entry_uuid="Document02")
    members = (MEMBER, replace(MEMBER, entry_uuid="m2", target="Document02"))
    twice = replace(SUBMISSION, documents=(ENTRY, second), associations=members)
    only(twice, "XDSRegistryDuplicateUniqueIdInMessage", ENTRY.unique_id)
    only(twice, "XDSRepositoryDuplicateUniqueIdInMessage", ENTRY.unique_id, repository_side=True)


def test_the_same_unique_id_in_set_and_document():
    only(submission_set(unique_id=ENTRY.unique_id), "XDSRegistryDuplicateUniqueIdInMessage", ENTRY.unique_id)


def test_the_same_id_twice():
    members = (MEMBER, replace(MEMBER, target=SET_UUID))
    only(replace(SUBMISSION, associations=members), METADATA, f"the id {MEMBER.entry_uuid} stands twice")


@pytest.mark.parametrize("submission", [entry(patient_id=OTHER_PATIENT), folder(patient_id=OTHER_PATIENT)])
def test_objects_of_different_patients(submission):
    only(submission, "XDSPatientIdDoesNotMatch", "different patient ids")
    assert PATIENT not in told(submission)[0][1]  # which objects, not which patients


@pytest.mark.parametrize("kind", RELATIONSHIPS)
def test_the_source_of_a_relationship_is_submitted_with_it(kind):
    assert told(relation(type=kind)) == []
    only(relation(type=kind, source=OLD_UUID), "UnresolvedReferenceException", "not a document of this submission")
    only(relation(type=kind, source=SET_UUID), "UnresolvedReferenceException", "not a document of this submission")


def test_a_symbolic_target_is_in_the_message():
    only(relation(target="Document09"), "UnresolvedReferenceException", "target Document09 names nothing")


def test_a_symbolic_source_is_in_the_message():
    lost = replace(WITH_FOLDER.associations[2], entry_uuid="x", source="Folder09")
    submission = replace(WITH_FOLDER, associations=(*WITH_FOLDER.associations, lost))
    only(submission, "UnresolvedReferenceException", "source Folder09 names nothing")


def test_a_document_belongs_to_the_submission_set():
    only(replace(SUBMISSION, associations=()), METADATA, f"DocumentEntry {ENTRY_UUID}: no HasMember association")


def test_a_folder_belongs_to_the_submission_set():
    associations = (WITH_FOLDER.associations[0], *WITH_FOLDER.associations[2:])
    only(replace(WITH_FOLDER, associations=associations), METADATA, "Folder")


@pytest.mark.parametrize("status", ["", "Reference"])
def test_a_new_document_is_an_original(status):
    members = (replace(MEMBER, submission_set_status=status),)
    only(replace(SUBMISSION, associations=members), METADATA, "SubmissionSetStatus Original is required")


def test_a_document_of_the_registry_by_reference():
    reference = replace(MEMBER, entry_uuid="r", target=OLD_UUID, submission_set_status="Reference")
    assert told(replace(SUBMISSION, associations=(MEMBER, reference))) == []


def test_all_errors_are_told_and_bounded():
    broken = entry(hash="x", creation_time="y", language_code="_", size=-1)
    assert len(told(broken)) == 4
    assert len(told(broken, max_errors=2)) == 2


# --- Published test data ----------------------------------------------------------------------------------------------


def test_submissions_of_the_conformance_data():
    """Those that must succeed have no fault, those that lack an attribute name just this one."""
    folder_of_data = shared_path("conformance/data/iti")
    steps = json.loads((folder_of_data / "steps.json").read_text("utf-8"))
    seen = 0
    for test, sections in steps.items():
        for section, items in sections.items():
            for step in items:
                for name in step.get("files", ()):
                    if not name.endswith(".submission.xml"):
                        continue
                    seen += 1
                    errors = _errors_of(folder_of_data / test / section / name, source=step["send"] == "ITI-41")
                    if test == "11998a":
                        assert len(errors) == 1, (test, section)
                        assert errors[0].endswith(f"{section} is required")
                    else:
                        assert errors == [], (test, section)
    assert seen > 30


def _errors_of(file, *, source: bool) -> list[str]:
    text = file.read_text("utf-8").replace("$patientid$", PATIENT.replace("&", "&amp;"))
    text = text.replace("$patientid", PATIENT.replace("&", "&amp;"))
    for number, name in enumerate(("Document01", "Document02", "Document", "SubmissionSet01", "Folder", "Folder01")):
        text = text.replace(f"$uniqueId:{name}$", f"1.3.6.1.4.1.21367.2017.7.{number}")
    for name in ("Folder", "Document", "rplc_doc_uuid"):
        text = text.replace(f"${name}$", OLD_UUID)
    element = xml.parse(text.encode("utf-8")).find(xml.qname(uids.NS_RIM, "RegistryObjectList"))
    errors = validate_submission(ebrim.decode_registry_objects(element), repository_side=source)
    return [error.context for error in errors]
