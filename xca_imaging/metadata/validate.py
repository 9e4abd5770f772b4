"""Rules of a submission that can be checked without the registry's content.

What needs to look into the registry (patient known, uniqueId used, target found and approved) is the registry's own
check. Both run before anything is stored: a submission is accepted whole or not at all.

References
----------
* IHE ITI TF-2, 3.42.4.1.3 (checks of the registry), 3.41.4.1.3 (checks of the repository)
* IHE ITI TF-3, 4.2.2 (associations), 4.2.3.1.4 (author), 4.2.3.1.7 (data types), Table 4.3.1-3 (required attributes)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from xca_imaging import uids
from xca_imaging.errors import (
    DuplicateUniqueIdInMessage,
    PatientIdDoesNotMatch,
    RegistryError,
    RegistryMetadataError,
    RepositoryDuplicateUniqueIdInMessage,
    RepositoryMetadataError,
    UnresolvedReference,
)
from xca_imaging.metadata import datatypes
from xca_imaging.metadata.model import (
    Association,
    Author,
    Code,
    DocumentEntry,
    Folder,
    RegistryObject,
    Slot,
    Submission,
    SubmissionSet,
)
from xca_imaging.metadata.vocabulary import ANY, Vocabulary

RELATIONSHIPS = (uids.RPLC, uids.APND, uids.XFRM, uids.XFRM_RPLC, uids.SIGNS, uids.IS_SNAPSHOT_OF)
"""Association types from a new document to one that is there already (4.2.2.2)."""


# Table 4.3.1-3: attribute on the wire, field of the model. `R` in the columns of the Document Source (ITI-41) and of
# the Repository (ITI-42); hash, size and repositoryUniqueId become R only on the way to the registry.
_DOCUMENT_REQUIRED = {
    "entryUUID": "entry_uuid",
    "uniqueId": "unique_id",
    "patientId": "patient_id",
    "sourcePatientId": "source_patient_id",
    "mimeType": "mime_type",
    "objectType": "object_type",
    "languageCode": "language_code",
    "classCode": "class_code",
    "typeCode": "type_code",
    "formatCode": "format_code",
    "healthcareFacilityTypeCode": "healthcare_facility_type_code",
    "practiceSettingCode": "practice_setting_code",
    "confidentialityCode": "confidentiality_codes",
}
_STABLE_REQUIRED = {"creationTime": "creation_time"}
_REPOSITORY_SETS = {"hash": "hash", "size": "size", "repositoryUniqueId": "repository_unique_id"}
_ON_DEMAND_FORBIDDEN = {"creationTime": "creation_time", "hash": "hash", "size": "size"}
_SUBMISSION_SET_REQUIRED = {
    "entryUUID": "entry_uuid",
    "uniqueId": "unique_id",
    "patientId": "patient_id",
    "sourceId": "source_id",
    "submissionTime": "submission_time",
    "contentTypeCode": "content_type_code",
}
_FOLDER_REQUIRED = {
    "entryUUID": "entry_uuid",
    "uniqueId": "unique_id",
    "patientId": "patient_id",
    "codeList": "codes",
}
_ASSOCIATION_REQUIRED = {
    "id": "entry_uuid",
    "associationType": "type",
    "sourceObject": "source",
    "targetObject": "target",
}


@dataclass(frozen=True, slots=True)
class _Format:
    """The form of one attribute, checked where it is given."""

    attribute: str
    field: str
    fits: Callable[[str], bool]
    form: str


_CX_FORM = "id^^^&OID&ISO"
_XCN_FORM = "id^family^given..., with &OID&ISO as authority where there is one"
_XON_FORM = "a name with an OID, or an id with &OID&ISO as authority, where there is one"
_DTM_FORM = "YYYY[MM[DD[hh[mm[ss]]]]] in UTC"
_FORMATS: dict[type[Any], tuple[_Format, ...]] = {
    DocumentEntry: (
        _Format("patientId", "patient_id", datatypes.is_cx, _CX_FORM),
        _Format("sourcePatientId", "source_patient_id", datatypes.is_cx, _CX_FORM),
        _Format("creationTime", "creation_time", datatypes.is_dtm, _DTM_FORM),
        _Format("serviceStartTime", "service_start_time", datatypes.is_dtm, _DTM_FORM),
        _Format("serviceStopTime", "service_stop_time", datatypes.is_dtm, _DTM_FORM),
        _Format("legalAuthenticator", "legal_authenticator", datatypes.is_xcn, _XCN_FORM),
        _Format("hash", "hash", datatypes.is_hash, "a SHA-1 digest, 40 hexadecimal digits"),
        _Format("languageCode", "language_code", datatypes.is_language, "a language tag"),
        _Format("mimeType", "mime_type", datatypes.is_media_type, "type/subtype"),
        _Format("repositoryUniqueId", "repository_unique_id", datatypes.is_oid, "an OID"),
        _Format("homeCommunityId", "home_community_id", datatypes.is_home_community_id, "urn:oid: and an OID"),
    ),
    SubmissionSet: (
        _Format("uniqueId", "unique_id", datatypes.is_oid, "an OID"),
        _Format("patientId", "patient_id", datatypes.is_cx, _CX_FORM),
        _Format("sourceId", "source_id", datatypes.is_oid, "an OID"),
        _Format("submissionTime", "submission_time", datatypes.is_dtm, _DTM_FORM),
        _Format("homeCommunityId", "home_community_id", datatypes.is_home_community_id, "urn:oid: and an OID"),
    ),
    Folder: (
        _Format("uniqueId", "unique_id", datatypes.is_oid, "an OID"),
        _Format("patientId", "patient_id", datatypes.is_cx, _CX_FORM),
        _Format("lastUpdateTime", "last_update_time", datatypes.is_dtm, _DTM_FORM),
        _Format("homeCommunityId", "home_community_id", datatypes.is_home_community_id, "urn:oid: and an OID"),
    ),
    Association: (),
}

_CODES: dict[type[Any], dict[str, str]] = {
    DocumentEntry: {
        "classCode": "class_code",
        "typeCode": "type_code",
        "formatCode": "format_code",
        "healthcareFacilityTypeCode": "healthcare_facility_type_code",
        "practiceSettingCode": "practice_setting_code",
        "confidentialityCode": "confidentiality_codes",
        "eventCodeList": "event_codes",
    },
    SubmissionSet: {"contentTypeCode": "content_type_code"},
    Folder: {"codeList": "codes"},
    Association: {"associationDocumentation": "documentation"},
}


def validate_submission(
    submission: Submission,
    *,
    repository_side: bool = False,
    vocabulary: Vocabulary = ANY,
    max_errors: int = 100,
    max_title: int = 128,
    max_unique_id: int = 128,
    max_value: int = 256,
    max_text: int = 1024,
) -> list[RegistryError]:
    """Return what is wrong with a submission; empty when the message in itself is right.

    Parameters
    ----------
    repository_side : bool
        True for what a Document Source sends to a repository (ITI-41, RAD-68): hash, size and repositoryUniqueId may
        be left out, and the error codes are those of a repository. False for what a registry receives (ITI-42).
    vocabulary : Vocabulary
        The codes and media types of the affinity domain.
    max_errors : int
        More are not looked for: nobody reads them, and a small message must not make a large answer.
    max_title : int
        Characters of a title (TF-3 4.2.3.2: title).
    max_unique_id : int
        Characters of DocumentEntry.uniqueId (TF-3 4.2.3.2: uniqueId).
    max_value : int
        Characters of a slot value, code or scheme: rim:LongName of ebRIM 3.0.
    max_text : int
        Characters of comments and display names: rim:FreeFormText of ebRIM 3.0.
    """
    limits = _Limits(max_title, max_unique_id, max_value, max_text)
    found = _errors(submission, limits, vocabulary, repository_side=repository_side)
    return list(islice(found, max_errors))


def _errors(
    submission: Submission, limits: _Limits, vocabulary: Vocabulary, *, repository_side: bool
) -> Iterator[RegistryError]:
    metadata_error = RepositoryMetadataError if repository_side else RegistryMetadataError
    duplicate_error = RepositoryDuplicateUniqueIdInMessage if repository_side else DuplicateUniqueIdInMessage
    if len(submission.submission_sets) != 1:
        found = len(submission.submission_sets)
        yield metadata_error(f"a submission holds exactly one SubmissionSet, this one holds {found}")
    for item in submission:
        where = f"{type(item).__name__} {item.entry_uuid}"
        for text in chain(
            _required(item, repository_side=repository_side),
            _formats(item),
            _codes(item, vocabulary),
            _lengths(item, limits),
            _document(item, vocabulary) if isinstance(item, DocumentEntry) else (),
            _authors(item.authors) if isinstance(item, DocumentEntry | SubmissionSet) else (),
            _submission_set(item) if isinstance(item, SubmissionSet) else (),
            _association_type(item) if isinstance(item, Association) else (),
        ):
            yield metadata_error(f"{where}: {text}")
    for text in chain(_same_ids(submission), _memberships(submission)):
        yield metadata_error(text)
    for unique_id in _same_unique_ids(submission):
        yield duplicate_error(unique_id)
    yield from _patients(submission)
    yield from _references(submission)


@dataclass(frozen=True, slots=True)
class _Limits:
    title: int
    unique_id: int
    value: int
    text: int


def _required(item: RegistryObject, *, repository_side: bool) -> Iterator[str]:
    required: dict[str, str]
    if isinstance(item, DocumentEntry):
        required = dict(_DOCUMENT_REQUIRED)
        if item.object_type == uids.ON_DEMAND_DOCUMENT:
            required["repositoryUniqueId"] = "repository_unique_id"
            for attribute, field in _ON_DEMAND_FORBIDDEN.items():
                if getattr(item, field) not in ("", None):
                    yield f"{attribute} is not allowed in an on-demand entry"
        else:
            required |= _STABLE_REQUIRED
            if not repository_side:
                required |= _REPOSITORY_SETS
    elif isinstance(item, SubmissionSet):
        required = _SUBMISSION_SET_REQUIRED
    else:
        required = _FOLDER_REQUIRED if isinstance(item, Folder) else _ASSOCIATION_REQUIRED
    for attribute, field in required.items():
        if getattr(item, field) in ("", None, ()):
            yield f"{attribute} is required"


def _formats(item: RegistryObject) -> Iterator[str]:
    for rule in _FORMATS[type(item)]:
        value = getattr(item, rule.field)
        if value and not rule.fits(value):
            yield f"{rule.attribute} {value[:80]!r} is not {rule.form}"
    ids = {"id": item.entry_uuid, "lid": item.logical_id}
    if isinstance(item, Association):
        ids |= {"sourceObject": item.source, "targetObject": item.target}
    for attribute, value in ids.items():
        # Anything else is a symbolic id; urn:uuid: in capitals would be one that only looks like a UUID.
        if value.lower().startswith(uids.UUID_PREFIX) and not datatypes.is_uuid(value):
            yield f"{attribute} {value[:80]!r} is not a UUID in lower case"


def _codes(item: RegistryObject, vocabulary: Vocabulary) -> Iterator[str]:
    for attribute, field in _CODES[type(item)].items():
        for code in _as_codes(getattr(item, field)):
            if not code.code:
                yield f"{attribute} without a code"
            if not code.scheme:
                yield f"{attribute} {code.code[:80]!r} without a codingScheme"
            elif not vocabulary.allows(attribute, code):
                yield f"{attribute} {code.code[:80]!r} of {code.scheme[:80]!r} is not a code of this affinity domain"


def _as_codes(value: Code | Sequence[Code] | None) -> Sequence[Code]:
    if value is None:
        return ()
    return (value,) if isinstance(value, Code) else value


def _authors(authors: Iterable[Author]) -> Iterator[str]:
    for author in authors:
        if not (author.person or any(author.institutions) or any(author.telecommunications)):
            yield "author without person, institution and telecommunication"
        if author.person and not datatypes.is_xcn(author.person):
            yield f"authorPerson {author.person[:80]!r} is not {_XCN_FORM}"
        for institution in author.institutions:
            if institution and not datatypes.is_xon(institution):
                yield f"authorInstitution {institution[:80]!r} is not {_XON_FORM}"


def _submission_set(submission_set: SubmissionSet) -> Iterator[str]:
    for recipient in submission_set.intended_recipients:
        if not datatypes.is_recipient(recipient):
            yield f"intendedRecipient {recipient[:80]!r} is not XON|XCN|XTN"


def _document(entry: DocumentEntry, vocabulary: Vocabulary) -> Iterator[str]:
    if entry.object_type not in ("", uids.STABLE_DOCUMENT, uids.ON_DEMAND_DOCUMENT):
        yield f"objectType {entry.object_type[:80]!r} is neither a stable nor an on-demand document"
    if entry.mime_type and not vocabulary.allows_media_type(entry.mime_type):
        yield f"mimeType {entry.mime_type[:80]!r} is not allowed in this affinity domain"
    if entry.size is not None and entry.size < 0:
        yield f"size {entry.size} is negative"
    start, stop = entry.service_start_time, entry.service_stop_time
    if datatypes.is_dtm(start) and datatypes.is_dtm(stop) and datatypes.is_later(start, stop):
        yield f"serviceStartTime {start} is later than serviceStopTime {stop}"
    for reference in entry.reference_ids:
        if not datatypes.is_cxi(reference):
            yield f"referenceIdList {reference[:80]!r} is not id^^^authority^type"


def _lengths(item: RegistryObject, limits: _Limits) -> Iterator[str]:
    if len(item.version) > 16:  # ebRIM 3.0 VersionInfo: rim:String16
        yield "version is longer than 16 characters"
    if not isinstance(item, Association):
        if len(item.title) > limits.title:
            yield f"title is longer than {limits.title} characters"
        if len(item.comments) > limits.text:
            yield f"comments are longer than {limits.text} characters"
        if len(item.unique_id) > limits.unique_id:
            yield f"uniqueId is longer than {limits.unique_id} characters"
        yield from _texts(item, limits)
    names = [classification.name for classification in item.extra_classifications]
    names += [identifier.name for identifier in item.extra_identifiers]
    if any(len(name) > limits.text for name in names):
        yield f"a name is longer than {limits.text} characters"
    for attribute, text in _values(item):
        if len(text) > limits.value:
            yield f"{attribute} has a value longer than {limits.value} characters"
    for attribute, field in _CODES[type(item)].items():
        if any(len(code.display) > limits.text for code in _as_codes(getattr(item, field))):
            yield f"the display name of {attribute} is longer than {limits.text} characters"


def _values(item: RegistryObject) -> Iterator[tuple[str, str]]:
    """Return everything that is written as a slot value, an identifier or a code."""
    for attribute, field in _CODES[type(item)].items():
        for code in _as_codes(getattr(item, field)):
            yield attribute, code.code
            yield attribute, code.scheme
    yield from _extra_values(item)
    if isinstance(item, Association):
        yield "PreviousVersion", item.previous_version
        yield "AssociationPropagation", item.association_propagation
        yield "OriginalStatus", item.original_status
        yield "NewStatus", item.new_status
    if isinstance(item, DocumentEntry | SubmissionSet):
        for author in item.authors:
            yield from _slot_values(author.extra_slots)
            yield "author", author.person
            for values in (author.institutions, author.roles, author.specialties, author.telecommunications):
                for value in values:
                    yield "author", value
    if isinstance(item, SubmissionSet):
        yield "sourceId", item.source_id
        for value in item.intended_recipients:
            yield "intendedRecipient", value
    if isinstance(item, DocumentEntry):
        yield "legalAuthenticator", item.legal_authenticator
        yield "sourcePatientId", item.source_patient_id
        yield "URI", item.uri
        yield "mimeType", item.mime_type
        yield "documentAvailability", item.document_availability
        for value in item.source_patient_info:
            yield "sourcePatientInfo", value
        for value in item.reference_ids:
            yield "referenceIdList", value
    if not isinstance(item, Association):
        yield "patientId", item.patient_id


def _extra_values(item: RegistryObject) -> Iterator[tuple[str, str]]:
    """Return what IHE does not define, which is kept all the same."""
    yield from _slot_values(item.extra_slots)
    for classification in item.extra_classifications:
        for text in (classification.scheme, classification.node, classification.representation):
            yield "a classification", text
        yield from _slot_values(classification.slots)
    for identifier in item.extra_identifiers:
        yield "an external identifier", identifier.scheme
        yield "an external identifier", identifier.value


def _slot_values(slots: Iterable[Slot]) -> Iterator[tuple[str, str]]:
    for slot in slots:
        yield slot.name[:80], slot.name
        for value in slot.values:
            yield slot.name[:80], value


def _texts(item: DocumentEntry | SubmissionSet | Folder, limits: _Limits) -> Iterator[str]:
    """Check what is written as rim:LocalizedString beside title and comments themselves."""
    languages = [item.title_language, item.comments_language, *(text.language for text in item.translations)]
    for language in languages:
        if language and not datatypes.is_language(language):
            yield f"xml:lang {language[:80]!r} is not a language tag"
    for text in item.translations:
        limit = limits.title if text.attribute == "title" else limits.text
        if len(text.text) > limit:
            yield f"a translation of {text.attribute} is longer than {limit} characters"


def _association_type(association: Association) -> Iterator[str]:
    if association.type and association.type not in (uids.HAS_MEMBER, *RELATIONSHIPS):
        yield f"associationType {association.type[:80]!r} is not one of a submission"
    if association.submission_set_status not in ("", "Original", "Reference"):
        yield f"SubmissionSetStatus {association.submission_set_status[:80]!r} is neither Original nor Reference"


def _same_ids(submission: Submission) -> Iterator[str]:
    seen: set[str] = set()
    for item in submission:
        if item.entry_uuid and item.entry_uuid in seen:
            yield f"the id {item.entry_uuid} stands twice"
        seen.add(item.entry_uuid)


def _same_unique_ids(submission: Submission) -> Iterator[str]:
    seen: set[str] = set()
    told: set[str] = set()
    for item in _identified(submission):
        if item.unique_id and item.unique_id in seen and item.unique_id not in told:
            told.add(item.unique_id)
            yield item.unique_id
        seen.add(item.unique_id)


def _identified(submission: Submission) -> Iterator[SubmissionSet | DocumentEntry | Folder]:
    yield from submission.submission_sets
    yield from submission.documents
    yield from submission.folders


def _memberships(submission: Submission) -> Iterator[str]:
    """Check the HasMember associations that the structure of a submission demands (4.2.2.1)."""
    sets = {item.entry_uuid for item in submission.submission_sets}
    documents = {item.entry_uuid for item in submission.documents}
    folders = {item.entry_uuid for item in submission.folders}
    members = [item for item in submission.associations if item.type == uids.HAS_MEMBER]
    of_sets = {item.target for item in members if item.source in sets}
    for name, ids in (("DocumentEntry", documents), ("Folder", folders)):
        for entry_id in sorted(ids - of_sets):
            yield f"{name} {entry_id}: no HasMember association from the SubmissionSet"
    for member in members:
        if member.source in sets and member.target in documents and member.submission_set_status != "Original":
            yield f"Association {member.entry_uuid}: SubmissionSetStatus Original is required for a new document"


def _patients(submission: Submission) -> Iterator[RegistryError]:
    patients = {item.patient_id: item for item in _identified(submission) if item.patient_id}
    if len(patients) > 1:
        first, second = list(patients.values())[:2]
        names = [f"{type(item).__name__} {item.entry_uuid}" for item in (first, second)]
        yield PatientIdDoesNotMatch(f"{names[0]} and {names[1]} have different patient ids")


def _references(submission: Submission) -> Iterator[RegistryError]:
    """Check what associations name inside the message; a UUID as target may be the registry's (4.2.2)."""
    documents = {item.entry_uuid for item in submission.documents}
    known = {item.entry_uuid for item in submission}
    for association in submission.associations:
        where = f"Association {association.entry_uuid}"
        if association.type in RELATIONSHIPS and association.source not in documents:
            yield UnresolvedReference(f"{where}: source {association.source} is not a document of this submission")
        ends = {"source": association.source, "target": association.target}
        for end, entry_id in ends.items():
            symbolic = not entry_id.startswith(uids.UUID_PREFIX)
            if symbolic and entry_id and entry_id not in known:
                yield UnresolvedReference(f"{where}: {end} {entry_id} names nothing in this submission")
