"""A submission as an imaging source makes it, and strategies for values of every model type."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from xca_imaging import uids
from xca_imaging.metadata.model import (
    Association,
    Author,
    Classification,
    Code,
    DocumentEntry,
    ExternalIdentifier,
    Folder,
    ObjectRef,
    Slot,
    Submission,
    SubmissionSet,
    Translation,
)

PATIENT = "P-0001^^^&1.3.6.1.4.1.21367.2017.9&ISO"
ENTRY_UUID = "urn:uuid:2f1a7cf4-8d0f-4f0e-9d4c-3f1f8f9f2c11"
SET_UUID = "urn:uuid:6d1d3f0a-50f6-4d43-92b8-5a6d3b8c7e22"
FOLDER_UUID = "urn:uuid:91b8a8a2-33f7-4c8e-8a4b-0b5f0f5a6d33"

AUTHOR = Author(
    person="^Writer^Ada",
    institutions=("West General^^^^^&1.3.6.1.4.1.21367.2017.8&ISO^^^^1",),
    roles=("Attending",),
    specialties=("Radiology",),
    telecommunications=("^^Internet^ada@example.org",),
)

ENTRY = DocumentEntry(
    entry_uuid=ENTRY_UUID,
    unique_id="1.3.6.1.4.1.21367.2017.7.1",
    patient_id=PATIENT,
    mime_type="application/dicom",
    repository_unique_id="1.3.6.1.4.1.21367.2017.1.2",
    title="CT thorax",
    comments="Imaging manifest",
    creation_time="20260102030405",
    service_start_time="202601020300",
    service_stop_time="20260102",
    hash="8d0a44875fd70e66646706004f2fb7c6340d01fb",
    size=2140,
    language_code="en-US",
    source_patient_id="L-0001^^^&1.3.6.1.4.1.21367.2017.6&ISO",
    source_patient_info=("PID-5|Doe^Jane", "PID-7|19700101", "PID-8|F"),
    class_code=Code("IMAGES", "1.3.6.1.4.1.19376.1.2.6.1", "Images"),
    type_code=Code("18748-4", "2.16.840.1.113883.6.1", "Diagnostic imaging study"),
    format_code=Code(uids.KOS_SOP_CLASS, uids.DICOM_UID_REGISTRY, "Key Object Selection Document"),
    healthcare_facility_type_code=Code("35971002", "2.16.840.1.113883.6.96", "Ambulatory care site"),
    practice_setting_code=Code("394914008", "2.16.840.1.113883.6.96", "Radiology"),
    confidentiality_codes=(Code("N", "2.16.840.1.113883.5.25", "normal"),),
    event_codes=(Code("CT", uids.DICOM_CONTROLLED_TERMINOLOGY, "Computed Tomography"),),
    authors=(AUTHOR,),
    reference_ids=(
        "1.3.6.1.4.1.21367.2017.5.1^^^^urn:ihe:iti:xds:2016:studyInstanceUID",
        "A-77^^^&1.3.6.1.4.1.21367.2017.4&ISO^urn:ihe:iti:xds:2013:accession",
    ),
    extra_slots=(Slot("urn:example:extra", ("one", "two")),),
)

SUBMISSION_SET = SubmissionSet(
    entry_uuid=SET_UUID,
    unique_id="1.3.6.1.4.1.21367.2017.7.2",
    patient_id=PATIENT,
    source_id="1.3.6.1.4.1.21367.2017.3",
    submission_time="20260102030406",
    content_type_code=Code("UNSPECIFIED", "1.3.6.1.4.1.21367.2017.3", "Unspecified"),
    authors=(AUTHOR,),
    intended_recipients=("West General|^Reader^Bo",),
)

FOLDER = Folder(
    entry_uuid=FOLDER_UUID,
    unique_id="1.3.6.1.4.1.21367.2017.7.3",
    patient_id=PATIENT,
    title="Thorax",
    codes=(Code("Referrals", "1.3.6.1.4.1.21367.2017.3", "Referrals"),),
)

MEMBER = Association(
    entry_uuid="urn:uuid:0a7b6a54-4a43-4a10-9c7f-2f7f6d5e4c44",
    type=uids.HAS_MEMBER,
    source=SET_UUID,
    target=ENTRY_UUID,
    submission_set_status="Original",
)

SUBMISSION = Submission(submission_sets=(SUBMISSION_SET,), documents=(ENTRY,), associations=(MEMBER,))

WITH_FOLDER = replace(
    SUBMISSION,
    folders=(FOLDER,),
    associations=(
        MEMBER,
        Association(entry_uuid="folder-of-set", type=uids.HAS_MEMBER, source=SET_UUID, target=FOLDER_UUID),
        Association(entry_uuid="in-folder", type=uids.HAS_MEMBER, source=FOLDER_UUID, target=ENTRY_UUID),
        Association(entry_uuid="in-folder-of-set", type=uids.HAS_MEMBER, source=SET_UUID, target="in-folder"),
    ),
)

# --- Strategies -------------------------------------------------------------------------------------------------------

_CHARACTERS = st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Cn", "Co"), exclude_characters="￾￿")
TEXT = st.text(_CHARACTERS, min_size=0, max_size=20).map(str.strip)
FULL = TEXT.filter(bool)
TOKENS = st.text("abcdefghijABCDEF0123456789.-", min_size=1, max_size=20)
IDS = st.one_of(st.uuids().map(lambda value: f"urn:uuid:{value}"), TOKENS)
UIDS = st.lists(st.integers(0, 10**6), min_size=2, max_size=6).map(lambda parts: ".".join(map(str, parts)))
CODES = st.builds(Code, FULL.filter(lambda text: "^" not in text), UIDS, TEXT)
SLOTS = st.lists(
    st.builds(
        Slot,
        TOKENS.map(lambda name: f"urn:example:{name}"),
        st.lists(st.text(_CHARACTERS, max_size=20), max_size=3).map(tuple),
    ),
    max_size=3,
    unique_by=lambda slot: slot.name,
).map(tuple)


def tuples(strategy: st.SearchStrategy, max_size: int = 3) -> st.SearchStrategy:
    return st.lists(strategy, max_size=max_size).map(tuple)


AUTHORS = st.builds(
    Author,
    person=TEXT,
    institutions=tuples(FULL),
    roles=tuples(FULL),
    specialties=tuples(FULL),
    telecommunications=tuples(FULL),
    extra_slots=SLOTS,
)
_LANGUAGES = st.sampled_from(["", "en-US", "de"])
_CLASSIFICATIONS = st.builds(
    Classification,
    TOKENS.map(lambda name: f"urn:example:{name}"),
    st.one_of(st.just(""), TOKENS.map(lambda name: f"urn:example:{name}")),
    TEXT,
    TEXT,
    SLOTS,
)
_EXTERNAL_IDENTIFIERS = st.builds(ExternalIdentifier, TOKENS.map(lambda name: f"urn:example:{name}"), FULL, TEXT)
_TRANSLATIONS = st.builds(Translation, st.sampled_from(["title", "comments"]), TEXT, _LANGUAGES)
_COMMON = {
    "entry_uuid": IDS,
    "logical_id": st.one_of(st.just(""), IDS),
    "home_community_id": st.one_of(st.just(""), UIDS.map(lambda uid: f"urn:oid:{uid}")),
    "availability_status": st.sampled_from(["", uids.APPROVED, uids.DEPRECATED]),
    "version": st.sampled_from(["", "1", "2.0"]),
    "extra_slots": SLOTS,
    "extra_classifications": tuples(_CLASSIFICATIONS, 2),
    "extra_identifiers": tuples(_EXTERNAL_IDENTIFIERS, 2),
}
_IDENTIFIED = {
    **_COMMON,
    "unique_id": FULL,
    "patient_id": FULL,
    "title": TEXT,
    "title_language": _LANGUAGES,
    "comments": TEXT,
    "comments_language": _LANGUAGES,
    # Titles first: that is the order in which they are written.
    "translations": st.lists(_TRANSLATIONS, max_size=3).map(
        lambda texts: tuple(sorted(texts, key=lambda text: text.attribute, reverse=True))
    ),
}
_MAYBE_CODE = st.one_of(st.none(), CODES)

DOCUMENT_ENTRIES = st.builds(
    DocumentEntry,
    **_IDENTIFIED,
    mime_type=TOKENS,
    object_type=st.sampled_from([uids.STABLE_DOCUMENT, uids.ON_DEMAND_DOCUMENT]),
    repository_unique_id=st.one_of(st.just(""), UIDS),
    creation_time=TEXT,
    service_start_time=TEXT,
    service_stop_time=TEXT,
    hash=TEXT,
    size=st.one_of(st.none(), st.integers(0, 2**63 - 1)),
    language_code=TEXT,
    uri=TEXT,
    legal_authenticator=TEXT,
    document_availability=TEXT,
    source_patient_id=TEXT,
    source_patient_info=tuples(FULL),
    class_code=_MAYBE_CODE,
    type_code=_MAYBE_CODE,
    format_code=_MAYBE_CODE,
    healthcare_facility_type_code=_MAYBE_CODE,
    practice_setting_code=_MAYBE_CODE,
    confidentiality_codes=tuples(CODES),
    event_codes=tuples(CODES),
    authors=tuples(AUTHORS),
    reference_ids=tuples(FULL),
)
SUBMISSION_SETS = st.builds(
    SubmissionSet,
    **_IDENTIFIED,
    source_id=TEXT,
    submission_time=TEXT,
    content_type_code=_MAYBE_CODE,
    authors=tuples(AUTHORS),
    intended_recipients=tuples(FULL),
)
FOLDERS = st.builds(Folder, **_IDENTIFIED, last_update_time=TEXT, codes=tuples(CODES))
ASSOCIATIONS = st.builds(
    Association,
    **_COMMON,
    type=TOKENS,
    source=IDS,
    target=IDS,
    submission_set_status=st.sampled_from(["", "Original", "Reference"]),
    previous_version=st.sampled_from(["", "1"]),
    association_propagation=st.sampled_from(["", "yes", "no"]),
    original_status=st.sampled_from(["", uids.APPROVED]),
    new_status=st.sampled_from(["", uids.DEPRECATED]),
    documentation=_MAYBE_CODE,
)
OBJECTS = st.one_of(DOCUMENT_ENTRIES, SUBMISSION_SETS, FOLDERS, ASSOCIATIONS)
OBJECT_REFS = st.builds(ObjectRef, IDS, st.one_of(st.just(""), UIDS.map(lambda uid: f"urn:oid:{uid}")))
SUBMISSIONS = st.builds(
    Submission,
    submission_sets=tuples(SUBMISSION_SETS, 2),
    documents=tuples(DOCUMENT_ENTRIES, 2),
    folders=tuples(FOLDERS, 2),
    associations=tuples(ASSOCIATIONS, 2),
    object_refs=tuples(OBJECT_REFS, 2),
)
