"""Stored queries as typed values, and each as data: its id, its parameters, the value that it becomes.

A flat tuple is a list of alternatives (OR), empty = not asked. A tuple of tuples is AND over OR: each inner tuple was
one slot. Times are DTM: from <= value < to. `author_person(s)` are SQL LIKE patterns. `association_status` is the
parameter of metadata update: associations of other states are not for those who do not ask for them.

References
----------
* IHE ITI TF-2, 3.18.4.1.2.3 (parameters), 3.18.4.1.2.3.7 (the queries), 3.51.4.1.2 (queries for multiple patients)
* IHE ITI supplement Restricted Metadata Update ($XDSAssociationStatus, $XDSDocumentEntryLogicalID)
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from xca_imaging import uids
from xca_imaging.metadata.model import Code

ReturnType = Literal["LeafClass", "ObjectRef"]

_STABLE = (uids.STABLE_DOCUMENT,)
_APPROVED = (uids.APPROVED,)


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentCriteria:
    """What a search for documents may ask beside patient ids. `reference_ids` is for queries by reference id only."""

    status: tuple[str, ...]
    types: tuple[str, ...] = _STABLE
    class_codes: tuple[Code, ...] = ()
    type_codes: tuple[Code, ...] = ()
    practice_setting_codes: tuple[Code, ...] = ()
    healthcare_facility_type_codes: tuple[Code, ...] = ()
    format_codes: tuple[Code, ...] = ()
    event_codes: tuple[tuple[Code, ...], ...] = ()
    confidentiality_codes: tuple[tuple[Code, ...], ...] = ()
    reference_ids: tuple[tuple[str, ...], ...] = ()
    author_persons: tuple[str, ...] = ()
    availability: tuple[str, ...] = ()
    creation_time_from: str = ""
    creation_time_to: str = ""
    service_start_time_from: str = ""
    service_start_time_to: str = ""
    service_stop_time_from: str = ""
    service_stop_time_to: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FindDocuments(DocumentCriteria):
    """FindDocuments and FindDocumentsByReferenceId (3.18.4.1.2.3.7.1, .14)."""

    patient_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FindDocumentsForMultiplePatients(DocumentCriteria):
    """The same over some patients, or over all of them (3.51.4.1.2.3)."""

    patient_ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class FindSubmissionSets:
    """FindSubmissionSets (3.18.4.1.2.3.7.2)."""

    patient_id: str
    status: tuple[str, ...]
    source_ids: tuple[str, ...] = ()
    submission_time_from: str = ""
    submission_time_to: str = ""
    author_person: str = ""
    content_type_codes: tuple[Code, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderCriteria:
    """What a search for folders may ask beside patient ids."""

    status: tuple[str, ...]
    last_update_time_from: str = ""
    last_update_time_to: str = ""
    codes: tuple[tuple[Code, ...], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class FindFolders(FolderCriteria):
    """FindFolders (3.18.4.1.2.3.7.3)."""

    patient_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FindFoldersForMultiplePatients(FolderCriteria):
    """The same over some patients, or over all of them (3.51.4.1.2.3)."""

    patient_ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GetAll:
    """GetAll (3.18.4.1.2.3.7.4): everything of one patient, with every association from or to what is returned."""

    patient_id: str
    document_status: tuple[str, ...]
    submission_set_status: tuple[str, ...]
    folder_status: tuple[str, ...]
    types: tuple[str, ...] = _STABLE
    format_codes: tuple[Code, ...] = ()
    confidentiality_codes: tuple[tuple[Code, ...], ...] = ()
    association_status: tuple[str, ...] = _APPROVED


@dataclass(frozen=True, slots=True, kw_only=True)
class GetDocuments:
    """GetDocuments (3.18.4.1.2.3.7.5): exactly one of the lists of ids is not empty."""

    entry_uuids: tuple[str, ...] = ()
    unique_ids: tuple[str, ...] = ()
    logical_ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GetFolders:
    """GetFolders (3.18.4.1.2.3.7.6): exactly one of the lists of ids is not empty."""

    entry_uuids: tuple[str, ...] = ()
    unique_ids: tuple[str, ...] = ()
    logical_ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GetAssociations:
    """GetAssociations (3.18.4.1.2.3.7.7): those from or to the named objects."""

    uuids: tuple[str, ...]
    association_status: tuple[str, ...] = _APPROVED


@dataclass(frozen=True, slots=True, kw_only=True)
class GetDocumentsAndAssociations:
    """GetDocumentsAndAssociations (3.18.4.1.2.3.7.8): GetDocuments and GetAssociations in one."""

    entry_uuids: tuple[str, ...] = ()
    unique_ids: tuple[str, ...] = ()
    logical_ids: tuple[str, ...] = ()
    association_status: tuple[str, ...] = _APPROVED


@dataclass(frozen=True, slots=True, kw_only=True)
class GetSubmissionSets:
    """GetSubmissionSets (3.18.4.1.2.3.7.9): those that submitted the named documents and folders, with memberships."""

    uuids: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GetSubmissionSetAndContents:
    """GetSubmissionSetAndContents (3.18.4.1.2.3.7.10): exactly one of the two ids is not empty."""

    entry_uuid: str = ""
    unique_id: str = ""
    types: tuple[str, ...] = _STABLE
    format_codes: tuple[Code, ...] = ()
    confidentiality_codes: tuple[tuple[Code, ...], ...] = ()
    association_status: tuple[str, ...] = _APPROVED


@dataclass(frozen=True, slots=True, kw_only=True)
class GetFolderAndContents:
    """GetFolderAndContents (3.18.4.1.2.3.7.11): exactly one of the two ids is not empty."""

    entry_uuid: str = ""
    unique_id: str = ""
    types: tuple[str, ...] = _STABLE
    format_codes: tuple[Code, ...] = ()
    confidentiality_codes: tuple[tuple[Code, ...], ...] = ()
    association_status: tuple[str, ...] = _APPROVED


@dataclass(frozen=True, slots=True, kw_only=True)
class GetFoldersForDocument:
    """GetFoldersForDocument (3.18.4.1.2.3.7.12): exactly one of the two ids is not empty."""

    entry_uuid: str = ""
    unique_id: str = ""
    association_status: tuple[str, ...] = _APPROVED


@dataclass(frozen=True, slots=True, kw_only=True)
class GetRelatedDocuments:
    """GetRelatedDocuments (3.18.4.1.2.3.7.13): exactly one of the two ids is not empty."""

    association_types: tuple[str, ...]
    entry_uuid: str = ""
    unique_id: str = ""
    types: tuple[str, ...] = _STABLE
    association_status: tuple[str, ...] = _APPROVED


Query = (
    FindDocuments
    | FindDocumentsForMultiplePatients
    | FindSubmissionSets
    | FindFolders
    | FindFoldersForMultiplePatients
    | GetAll
    | GetDocuments
    | GetFolders
    | GetAssociations
    | GetDocumentsAndAssociations
    | GetSubmissionSets
    | GetSubmissionSetAndContents
    | GetFolderAndContents
    | GetFoldersForDocument
    | GetRelatedDocuments
)


@dataclass(frozen=True, slots=True)
class StoredQuery:
    """One query request: what is asked, how it is to be returned, and of which community (AdhocQuery/@home)."""

    query: Query
    return_type: ReturnType = "LeafClass"
    home_community_id: str = ""

    @property
    def names_patients(self) -> bool:
        """Whether it is asked by patient; a query by the ids of objects must say whose ids they are (3.38.4.1.2)."""
        return not definition_of(self.query).by_ids


# --------------------------------------------------------------------------------------------------------------------
# The queries as data
# --------------------------------------------------------------------------------------------------------------------


class Kind(enum.Enum):
    """How the values of a parameter are coded (3.18.4.1.2.3.5)."""

    STRING = "string"
    """In single quotes."""
    CODE = "code"
    """In single quotes, `code^^scheme`."""
    TIME = "time"
    """A DTM, written as a number: without quotes."""
    STATUS = "status"
    """In single quotes; values that are no availabilityStatus are ignored."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter: `name` on the wire, `field` of the query value.

    `many`: a list in parentheses, its values are alternatives (OR). `repeatable`: the slot may stand several times,
    all of which must match (AND); the field is then a tuple of tuples.
    """

    name: str
    field: str
    kind: Kind = Kind.STRING
    required: bool = False
    many: bool = False
    repeatable: bool = False


@dataclass(frozen=True, slots=True)
class Definition:
    """One stored query: its id, the value that it becomes, its parameters.

    Exactly one of the parameters named in `either`, and at least one of those in `some`, must be given.
    """

    id: str
    name: str
    build: Callable[..., Query]
    parameters: tuple[Parameter, ...]
    either: tuple[str, ...] = ()
    some: tuple[str, ...] = ()

    @property
    def by_ids(self) -> bool:
        """Whether it asks for objects by their ids."""
        return bool(self.either) or self.parameters[0] is _UUIDS


def _code(name: str, field: str) -> Parameter:
    return Parameter(name, field, Kind.CODE, many=True)


def _codes_all(name: str, field: str) -> Parameter:
    return Parameter(name, field, Kind.CODE, many=True, repeatable=True)


def _status(name: str, field: str) -> Parameter:
    return Parameter(name, field, Kind.STATUS, required=True, many=True)


def _times(name: str, field: str) -> tuple[Parameter, Parameter]:
    return (
        Parameter(f"{name}From", f"{field}_from", Kind.TIME),
        Parameter(f"{name}To", f"{field}_to", Kind.TIME),
    )


_UUIDS = Parameter("$uuid", "uuids", required=True, many=True)
_FORMAT_CODE = _code("$XDSDocumentEntryFormatCode", "format_codes")
_CONFIDENTIALITY_CODE = _codes_all("$XDSDocumentEntryConfidentialityCode", "confidentiality_codes")
_ENTRY_TYPE = Parameter("$XDSDocumentEntryType", "types", many=True)
_ASSOCIATION_STATUS = Parameter("$XDSAssociationStatus", "association_status", Kind.STATUS, many=True)
_REFERENCE_IDS = Parameter(
    "$XDSDocumentEntryReferenceIdList", "reference_ids", required=True, many=True, repeatable=True
)


def _ids(of: str) -> tuple[Parameter, ...]:
    names = [("EntryUUID", "entry_uuids"), ("UniqueId", "unique_ids"), ("LogicalID", "logical_ids")]
    return tuple(Parameter(f"$XDS{of}{name}", field, many=True) for name, field in names)


def _id(of: str) -> tuple[Parameter, ...]:
    return (Parameter(f"$XDS{of}EntryUUID", "entry_uuid"), Parameter(f"$XDS{of}UniqueId", "unique_id"))


def _names(parameters: tuple[Parameter, ...]) -> tuple[str, ...]:
    return tuple(parameter.name for parameter in parameters)


_DOCUMENT_CRITERIA = (  # 3.18.4.1.2.3.7.1
    _code("$XDSDocumentEntryClassCode", "class_codes"),
    _code("$XDSDocumentEntryTypeCode", "type_codes"),
    _code("$XDSDocumentEntryPracticeSettingCode", "practice_setting_codes"),
    *_times("$XDSDocumentEntryCreationTime", "creation_time"),
    *_times("$XDSDocumentEntryServiceStartTime", "service_start_time"),
    *_times("$XDSDocumentEntryServiceStopTime", "service_stop_time"),
    _code("$XDSDocumentEntryHealthcareFacilityTypeCode", "healthcare_facility_type_codes"),
    _codes_all("$XDSDocumentEntryEventCodeList", "event_codes"),
    _CONFIDENTIALITY_CODE,
    Parameter("$XDSDocumentEntryAuthorPerson", "author_persons", many=True),
    _FORMAT_CODE,
    _status("$XDSDocumentEntryStatus", "status"),
    _ENTRY_TYPE,
    Parameter("$XDSDocumentEntryDocumentAvailability", "availability", many=True),
)
_FIND_DOCUMENTS = (Parameter("$XDSDocumentEntryPatientId", "patient_id", required=True), *_DOCUMENT_CRITERIA)
_FIND_DOCUMENTS_MULTI = (Parameter("$XDSDocumentEntryPatientId", "patient_ids", many=True), *_DOCUMENT_CRITERIA)
_FOLDER_CRITERIA = (  # 3.18.4.1.2.3.7.3
    *_times("$XDSFolderLastUpdateTime", "last_update_time"),
    _codes_all("$XDSFolderCodeList", "codes"),
    _status("$XDSFolderStatus", "status"),
)
_DOCUMENT_IDS, _FOLDER_IDS = _ids("DocumentEntry"), _ids("Folder")
_DOCUMENT_ID, _FOLDER_ID, _SUBMISSION_SET_ID = _id("DocumentEntry"), _id("Folder"), _id("SubmissionSet")

FIND_DOCUMENTS = Definition(
    "urn:uuid:14d4debf-8f97-4251-9a74-a90016b0af0d", "FindDocuments", FindDocuments, _FIND_DOCUMENTS
)
FIND_DOCUMENTS_BY_REFERENCE_ID = Definition(  # 3.18.4.1.2.3.7.14
    "urn:uuid:12941a89-e02e-4be5-967c-ce4bfc8fe492",
    "FindDocumentsByReferenceId",
    FindDocuments,
    (*_FIND_DOCUMENTS, _REFERENCE_IDS),
)
FIND_DOCUMENTS_FOR_MULTIPLE_PATIENTS = Definition(  # 3.51.4.1.2.3
    "urn:uuid:3d1bdb10-39a2-11de-89c2-2f44d94eaa9f",
    "FindDocumentsForMultiplePatients",
    FindDocumentsForMultiplePatients,
    _FIND_DOCUMENTS_MULTI,
    some=(
        "$XDSDocumentEntryPatientId",
        "$XDSDocumentEntryClassCode",
        "$XDSDocumentEntryEventCodeList",
        "$XDSDocumentEntryHealthcareFacilityTypeCode",
    ),
)
FIND_DOCUMENTS_BY_REFERENCE_ID_FOR_MULTIPLE_PATIENTS = Definition(  # no IHE text: as Open eHealth IPF defines it
    "urn:uuid:1191642d-86c4-42d8-b784-f95445f9f0d5",
    "FindDocumentsByReferenceIdForMultiplePatients",
    FindDocumentsForMultiplePatients,
    (*_FIND_DOCUMENTS_MULTI, _REFERENCE_IDS),
)

SINGLE_PATIENT: Mapping[str, Definition] = {
    definition.id: definition
    for definition in (
        FIND_DOCUMENTS,
        FIND_DOCUMENTS_BY_REFERENCE_ID,
        Definition(
            "urn:uuid:f26abbcb-ac74-4422-8a30-edb644bbc1a9",
            "FindSubmissionSets",
            FindSubmissionSets,
            (
                Parameter("$XDSSubmissionSetPatientId", "patient_id", required=True),
                Parameter("$XDSSubmissionSetSourceId", "source_ids", many=True),
                *_times("$XDSSubmissionSetSubmissionTime", "submission_time"),
                Parameter("$XDSSubmissionSetAuthorPerson", "author_person"),
                _code("$XDSSubmissionSetContentType", "content_type_codes"),
                _status("$XDSSubmissionSetStatus", "status"),
            ),
        ),
        Definition(
            "urn:uuid:958f3006-baad-4929-a4de-ff1114824431",
            "FindFolders",
            FindFolders,
            (Parameter("$XDSFolderPatientId", "patient_id", required=True), *_FOLDER_CRITERIA),
        ),
        Definition(
            "urn:uuid:10b545ea-725c-446d-9b95-8aeb444eddf3",
            "GetAll",
            GetAll,
            (
                Parameter("$patientId", "patient_id", required=True),
                _status("$XDSDocumentEntryStatus", "document_status"),
                _status("$XDSSubmissionSetStatus", "submission_set_status"),
                _status("$XDSFolderStatus", "folder_status"),
                _FORMAT_CODE,
                _CONFIDENTIALITY_CODE,
                _ENTRY_TYPE,
                _ASSOCIATION_STATUS,
            ),
        ),
        Definition(
            "urn:uuid:5c4f972b-d56b-40ac-a5fc-c8ca9b40b9d4",
            "GetDocuments",
            GetDocuments,
            _DOCUMENT_IDS,
            either=_names(_DOCUMENT_IDS),
        ),
        Definition(
            "urn:uuid:5737b14c-8a1a-4539-b659-e03a34a5e1e4",
            "GetFolders",
            GetFolders,
            _FOLDER_IDS,
            either=_names(_FOLDER_IDS),
        ),
        Definition(
            "urn:uuid:a7ae438b-4bc2-4642-93e9-be891f7bb155",
            "GetAssociations",
            GetAssociations,
            (_UUIDS, _ASSOCIATION_STATUS),
        ),
        Definition(
            "urn:uuid:bab9529a-4a10-40b3-a01f-f68a615d247a",
            "GetDocumentsAndAssociations",
            GetDocumentsAndAssociations,
            (*_DOCUMENT_IDS, _ASSOCIATION_STATUS),
            either=_names(_DOCUMENT_IDS),
        ),
        Definition("urn:uuid:51224314-5390-4169-9b91-b1980040715a", "GetSubmissionSets", GetSubmissionSets, (_UUIDS,)),
        Definition(
            "urn:uuid:e8e3cb2c-e39c-46b9-99e4-c12f57260b83",
            "GetSubmissionSetAndContents",
            GetSubmissionSetAndContents,
            (*_SUBMISSION_SET_ID, _FORMAT_CODE, _CONFIDENTIALITY_CODE, _ENTRY_TYPE, _ASSOCIATION_STATUS),
            either=_names(_SUBMISSION_SET_ID),
        ),
        Definition(
            "urn:uuid:b909a503-523d-4517-8acf-8e5834dfc4c7",
            "GetFolderAndContents",
            GetFolderAndContents,
            (*_FOLDER_ID, _FORMAT_CODE, _CONFIDENTIALITY_CODE, _ENTRY_TYPE, _ASSOCIATION_STATUS),
            either=_names(_FOLDER_ID),
        ),
        Definition(
            "urn:uuid:10cae35a-c7f9-4cf5-b61e-fc3278ffb578",
            "GetFoldersForDocument",
            GetFoldersForDocument,
            (*_DOCUMENT_ID, _ASSOCIATION_STATUS),
            either=_names(_DOCUMENT_ID),
        ),
        Definition(
            "urn:uuid:d90e5407-b356-4d91-a89f-873917b4b0e6",
            "GetRelatedDocuments",
            GetRelatedDocuments,
            (
                *_DOCUMENT_ID,
                Parameter("$AssociationTypes", "association_types", required=True, many=True),
                _ENTRY_TYPE,
                _ASSOCIATION_STATUS,
            ),
            either=_names(_DOCUMENT_ID),
        ),
    )
}
"""The queries of ITI-18 and ITI-38, by id."""

MULTIPLE_PATIENTS: Mapping[str, Definition] = {
    definition.id: definition
    for definition in (
        FIND_DOCUMENTS_FOR_MULTIPLE_PATIENTS,
        FIND_DOCUMENTS_BY_REFERENCE_ID_FOR_MULTIPLE_PATIENTS,
        Definition(
            "urn:uuid:50d3f5ac-39a2-11de-a1ca-b366239e58df",
            "FindFoldersForMultiplePatients",
            FindFoldersForMultiplePatients,
            (Parameter("$XDSFolderPatientId", "patient_ids", many=True), *_FOLDER_CRITERIA),
            some=("$XDSFolderPatientId", "$XDSFolderCodeList"),
        ),
    )
}
"""The queries of ITI-51, by id."""

_BY_TYPE: Mapping[Callable[..., Query], Definition] = {
    definition.build: definition
    for definition in (*SINGLE_PATIENT.values(), *MULTIPLE_PATIENTS.values())
    if _REFERENCE_IDS not in definition.parameters
}


def definition_of(query: Query) -> Definition:
    """Return the stored query that a query value is sent as."""
    if isinstance(query, FindDocuments) and query.reference_ids:
        return FIND_DOCUMENTS_BY_REFERENCE_ID
    if isinstance(query, FindDocumentsForMultiplePatients) and query.reference_ids:
        return FIND_DOCUMENTS_BY_REFERENCE_ID_FOR_MULTIPLE_PATIENTS
    return _BY_TYPE[type(query)]
