"""Where ebRIM 3.0 keeps each attribute of document metadata, as tables.

`metadata.ebrim` reads and writes by these tables: what is not in them is not known by name.

References
----------
* IHE ITI TF-3, 4.2.3.1 (slots, classifications, external identifiers, authors), 4.2.3.2 to 4.2.3.4 (attributes of
  DocumentEntry, SubmissionSet, Folder), 4.2.5.2 (UUIDs of schemes)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from xca_imaging import uids
from xca_imaging.metadata import model
from xca_imaging.wire.xml import qname

OBJECT_TYPE = "urn:oasis:names:tc:ebxml-regrep:ObjectType:RegistryObject:"
"""Prefix of `@objectType`, ebRIM 3.0 canonical ObjectType scheme."""


@dataclass(frozen=True, slots=True)
class SlotRule:
    """The slot of one attribute."""

    name: str
    field: str
    many: bool = False


@dataclass(frozen=True, slots=True)
class CodeRule:
    """The classification of one coded attribute."""

    scheme: str
    attribute: str
    field: str
    many: bool = False


@dataclass(frozen=True, slots=True)
class IdentifierRule:
    """The external identifier of one attribute; `name` is its rim:Name."""

    scheme: str
    name: str
    field: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where one object type keeps its attributes."""

    name: str
    tag: str
    build: Callable[..., model.RegistryObject]
    attributes: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, str] = field(default_factory=dict)
    slots: tuple[SlotRule, ...] = ()
    codes: tuple[CodeRule, ...] = ()
    identifiers: tuple[IdentifierRule, ...] = ()
    author_scheme: str = ""
    marker: str = ""
    named: bool = True


_COMMON_ATTRIBUTES = {
    "id": "entry_uuid",
    "lid": "logical_id",
    "home": "home_community_id",
    "status": "availability_status",
}

DOCUMENT_ENTRY = Layout(
    name="DocumentEntry",
    tag=qname(uids.NS_RIM, "ExtrinsicObject"),
    build=model.DocumentEntry,
    attributes={**_COMMON_ATTRIBUTES, "mimeType": "mime_type", "objectType": "object_type"},
    slots=(
        SlotRule("creationTime", "creation_time"),
        SlotRule("documentAvailability", "document_availability"),
        SlotRule("hash", "hash"),
        SlotRule("languageCode", "language_code"),
        SlotRule("legalAuthenticator", "legal_authenticator"),
        SlotRule("repositoryUniqueId", "repository_unique_id"),
        SlotRule("serviceStartTime", "service_start_time"),
        SlotRule("serviceStopTime", "service_stop_time"),
        SlotRule("size", "size"),
        SlotRule("sourcePatientId", "source_patient_id"),
        SlotRule("sourcePatientInfo", "source_patient_info", many=True),
        SlotRule("URI", "uri"),
        SlotRule("urn:ihe:iti:xds:2013:referenceIdList", "reference_ids", many=True),
    ),
    author_scheme="urn:uuid:93606bcf-9494-43ec-9b4e-a7748d1a838d",
    codes=(
        CodeRule("urn:uuid:41a5887f-8865-4c09-adf7-e362475b143a", "classCode", "class_code"),
        CodeRule(
            "urn:uuid:f4f85eac-e6cb-4883-b524-f2705394840f", "confidentialityCode", "confidentiality_codes", many=True
        ),
        CodeRule("urn:uuid:2c6b8cb7-8b2a-4051-b291-b1ae6a575ef4", "eventCodeList", "event_codes", many=True),
        CodeRule("urn:uuid:a09d5840-386c-46f2-b5ad-9c3699a4309d", "formatCode", "format_code"),
        CodeRule(
            "urn:uuid:f33fb8ac-18af-42cc-ae0e-ed0b0bdb91e1",
            "healthcareFacilityTypeCode",
            "healthcare_facility_type_code",
        ),
        CodeRule("urn:uuid:cccf5598-8b07-4b77-a05e-ae952c785ead", "practiceSettingCode", "practice_setting_code"),
        CodeRule("urn:uuid:f0306f51-975f-434e-a61c-c59651d33983", "typeCode", "type_code"),
    ),
    identifiers=(
        IdentifierRule("urn:uuid:58a6f841-87b3-4a3e-92fd-a8ffeff98427", "XDSDocumentEntry.patientId", "patient_id"),
        IdentifierRule("urn:uuid:2e82c1f6-a085-4c72-9da3-8640a32e42ab", "XDSDocumentEntry.uniqueId", "unique_id"),
    ),
)

SUBMISSION_SET = Layout(
    name="SubmissionSet",
    tag=qname(uids.NS_RIM, "RegistryPackage"),
    build=model.SubmissionSet,
    attributes=_COMMON_ATTRIBUTES,
    fixed={"objectType": OBJECT_TYPE + "RegistryPackage"},
    slots=(
        SlotRule("submissionTime", "submission_time"),
        SlotRule("intendedRecipient", "intended_recipients", many=True),
    ),
    author_scheme="urn:uuid:a7058bb9-b4e4-4307-ba5b-e3f0ab85e12d",
    codes=(CodeRule("urn:uuid:aa543740-bdda-424e-8c96-df4873be8500", "contentTypeCode", "content_type_code"),),
    identifiers=(
        IdentifierRule("urn:uuid:6b5aea1a-874d-4603-a4bc-96a0a7b38446", "XDSSubmissionSet.patientId", "patient_id"),
        IdentifierRule("urn:uuid:554ac39e-e3fe-47fe-b233-965d2a147832", "XDSSubmissionSet.sourceId", "source_id"),
        IdentifierRule("urn:uuid:96fdda7c-d067-4183-912e-bf5ee74998a8", "XDSSubmissionSet.uniqueId", "unique_id"),
    ),
    marker=uids.SUBMISSION_SET_NODE,
)

FOLDER = Layout(
    name="Folder",
    tag=qname(uids.NS_RIM, "RegistryPackage"),
    build=model.Folder,
    attributes=_COMMON_ATTRIBUTES,
    fixed={"objectType": OBJECT_TYPE + "RegistryPackage"},
    slots=(SlotRule("lastUpdateTime", "last_update_time"),),
    codes=(CodeRule("urn:uuid:1ba97051-7806-41a8-a48b-8fce7af683c5", "codeList", "codes", many=True),),
    identifiers=(
        IdentifierRule("urn:uuid:f64ffdf0-4b97-4e06-b79f-a52b38ec2f8a", "XDSFolder.patientId", "patient_id"),
        IdentifierRule("urn:uuid:75df8f67-9973-4fbe-a900-df66cefecc5a", "XDSFolder.uniqueId", "unique_id"),
    ),
    marker=uids.FOLDER_NODE,
)

ASSOCIATION = Layout(
    name="Association",
    tag=qname(uids.NS_RIM, "Association"),
    build=model.Association,
    attributes={
        **_COMMON_ATTRIBUTES,
        "associationType": "type",
        "sourceObject": "source",
        "targetObject": "target",
    },
    fixed={"objectType": OBJECT_TYPE + "Association"},
    slots=(
        SlotRule("SubmissionSetStatus", "submission_set_status"),
        SlotRule("PreviousVersion", "previous_version"),
        SlotRule("AssociationPropagation", "association_propagation"),
        SlotRule("OriginalStatus", "original_status"),
        SlotRule("NewStatus", "new_status"),
    ),
    codes=(CodeRule("urn:uuid:abd807a3-4432-4053-87b4-fd82c643d1f3", "associationDocumentation", "documentation"),),
    named=False,
)

LAYOUTS: Mapping[type[Any], Layout] = {
    model.DocumentEntry: DOCUMENT_ENTRY,
    model.SubmissionSet: SUBMISSION_SET,
    model.Folder: FOLDER,
    model.Association: ASSOCIATION,
}
PACKAGES: Mapping[str, Layout] = {layout.marker: layout for layout in (SUBMISSION_SET, FOLDER)}

AUTHOR_SLOTS = (
    SlotRule("authorPerson", "person"),
    SlotRule("authorInstitution", "institutions", many=True),
    SlotRule("authorRole", "roles", many=True),
    SlotRule("authorSpecialty", "specialties", many=True),
    SlotRule("authorTelecommunication", "telecommunications", many=True),
)
