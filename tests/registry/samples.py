"""Submissions for the registry's tests: synthetic patients, UIDs below a documentation root."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from lxml import etree

from xca_imaging import uids
from xca_imaging.metadata import ebrim
from xca_imaging.metadata.model import (
    Association,
    Author,
    Code,
    DocumentEntry,
    Folder,
    RegistryObject,
    Submission,
    SubmissionSet,
)

HOME = "urn:oid:1.3.6.1.4.1.21367.2017.1"
AUTHORITY = "1.3.6.1.4.1.21367.2005.13.20.1000"
PATIENT = f"test-1^^^&{AUTHORITY}&ISO"
OTHER_PATIENT = f"test-2^^^&{AUTHORITY}&ISO"
REPOSITORY = "1.3.6.1.4.1.21367.2017.1.2"
KOS = Code(uids.KOS_SOP_CLASS, uids.DICOM_UID_REGISTRY, "Key Object Selection Document")

_numbers = itertools.count(1)


def new_uid() -> str:
    """Return a UID that no other call returns, also not in another process."""
    return f"2.25.{uuid.uuid4().int}"


def code(value: str, scheme: str = "1.3.6.1.4.1.21367.2017.3") -> Code:
    return Code(value, scheme, value.title())


def study_reference(study: str) -> str:
    return f"{study}^^^^{uids.REFERENCE_STUDY_INSTANCE_UID}"


def document(**changes: Any) -> DocumentEntry:
    entry = DocumentEntry(
        entry_uuid=f"Document{next(_numbers)}",
        unique_id=new_uid(),
        patient_id=PATIENT,
        mime_type="application/dicom",
        creation_time="20240229101500",
        hash="da39a3ee5e6b4b0d3255bfef95601890afd80709",
        size=0,
        repository_unique_id=REPOSITORY,
        language_code="en",
        source_patient_id="department-1^^^&1.2.3.4&ISO",
        class_code=code("images"),
        type_code=code("ct-chest"),
        format_code=KOS,
        healthcare_facility_type_code=code("hospital"),
        practice_setting_code=code("radiology"),
        confidentiality_codes=(code("N", "2.16.840.1.113883.5.25"),),
        authors=(Author(person="^Sample^Ada^^^"),),
    )
    return replace(entry, **changes)


def folder(**changes: Any) -> Folder:
    return replace(
        Folder(
            entry_uuid=f"Folder{next(_numbers)}", unique_id=new_uid(), patient_id=PATIENT, codes=(code("oncology"),)
        ),
        **changes,
    )


def association(type_: str, source: str, target: str, **changes: Any) -> Association:
    return replace(
        Association(entry_uuid=f"Association{next(_numbers)}", type=type_, source=source, target=target), **changes
    )


def submission(
    *documents: DocumentEntry,
    folders: Iterable[Folder] = (),
    associations: Iterable[Association] = (),
    patient_id: str = PATIENT,
    **changes: Any,
) -> Submission:
    """Return a submission of documents and folders, each made a member of its SubmissionSet."""
    submission_set = replace(
        SubmissionSet(
            entry_uuid="SubmissionSet",
            unique_id=new_uid(),
            patient_id=patient_id,
            source_id="1.3.6.1.4.1.21367.2017.9",
            submission_time="20240229120000",
            content_type_code=code("imaging"),
            authors=(Author(person="^Sample^Ada^^^"),),
        ),
        **changes,
    )
    members = [
        association(uids.HAS_MEMBER, "SubmissionSet", each.entry_uuid, submission_set_status="Original")
        for each in documents
    ]
    members += [association(uids.HAS_MEMBER, "SubmissionSet", each.entry_uuid) for each in folders]
    return Submission((submission_set,), documents, tuple(folders), (*members, *associations))


def into_folder(folder_id: str, document_id: str, **changes: Any) -> list[Association]:
    """Return the two associations that put a document into a folder (TF-3 4.2.2.1.3)."""
    membership = association(uids.HAS_MEMBER, folder_id, document_id, **changes)
    return [membership, association(uids.HAS_MEMBER, "SubmissionSet", membership.entry_uuid)]


def decoded(fragments: Iterable[bytes]) -> list[RegistryObject]:
    """Return the objects of a LeafClass answer."""
    return [ebrim.decode_object(etree.fromstring(fragment)) for fragment in fragments]
