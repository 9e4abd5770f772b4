"""Document metadata as plain frozen values (ITI TF-3, 4.2.3).

Every object keeps what it does not know by name (`extra_slots`, `extra_classifications`, `extra_identifiers`) and its
texts in other languages (`translations`), so that reading and writing again loses nothing. What is not kept carries no
meaning: ids of nested elements, their order, white space around values.

Times are DTM strings in UTC as they stand on the wire (`YYYY[MM[DD[hh[mm[ss]]]]]`), identifiers are strings in their
HL7 v2 data type (CX, XCN, XON), because the registry must give back exactly what it was given.

References
----------
* IHE ITI TF-3, 4.2.1 (object types), 4.2.2 (associations), 4.2.3 (attributes), 4.2.3.1.7 (data types)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from xca_imaging import uids


@dataclass(frozen=True, slots=True)
class Code:
    """A coded value: code, coding scheme (an OID where there is one), display name."""

    code: str
    scheme: str
    display: str = ""


@dataclass(frozen=True, slots=True)
class Slot:
    """A named list of strings: rim:Slot."""

    name: str
    values: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Classification:
    """A rim:Classification of a scheme that IHE does not define, or of a node (ebRIM 3.0, 2.11)."""

    scheme: str = ""
    node: str = ""
    representation: str = ""
    name: str = ""
    slots: tuple[Slot, ...] = ()


@dataclass(frozen=True, slots=True)
class ExternalIdentifier:
    """A rim:ExternalIdentifier of a scheme that IHE does not define (ebRIM 3.0, 2.5)."""

    scheme: str
    value: str
    name: str = ""


@dataclass(frozen=True, slots=True)
class Translation:
    """A further text of a title or of comments: each is a rim:LocalizedString (ebRIM 3.0, 2.8)."""

    attribute: Literal["title", "comments"]
    text: str
    language: str = ""


@dataclass(frozen=True, slots=True)
class Author:
    """One author (4.2.3.1.4): a person (XCN) or device, institutions (XON), roles, specialties, telecommunication."""

    person: str = ""
    institutions: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    specialties: tuple[str, ...] = ()
    telecommunications: tuple[str, ...] = ()
    extra_slots: tuple[Slot, ...] = ()


@dataclass(frozen=True, slots=True)
class Identifier:
    """CX as XDS restricts it: `id^^^&OID&ISO` (4.2.3.1.7)."""

    id: str
    assigning_authority: str

    def __str__(self) -> str:
        return f"{self.id}^^^&{self.assigning_authority}&ISO"


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentEntry:
    """XDSDocumentEntry, stable or on-demand (4.2.3.2)."""

    entry_uuid: str
    unique_id: str
    patient_id: str
    mime_type: str = ""
    object_type: str = uids.STABLE_DOCUMENT
    logical_id: str = ""
    home_community_id: str = ""
    repository_unique_id: str = ""
    availability_status: str = ""
    version: str = ""
    title: str = ""
    title_language: str = ""
    comments: str = ""
    comments_language: str = ""
    translations: tuple[Translation, ...] = ()
    creation_time: str = ""
    service_start_time: str = ""
    service_stop_time: str = ""
    hash: str = ""
    size: int | None = None
    language_code: str = ""
    uri: str = ""
    legal_authenticator: str = ""
    document_availability: str = ""
    source_patient_id: str = ""
    source_patient_info: tuple[str, ...] = ()
    class_code: Code | None = None
    type_code: Code | None = None
    format_code: Code | None = None
    healthcare_facility_type_code: Code | None = None
    practice_setting_code: Code | None = None
    confidentiality_codes: tuple[Code, ...] = ()
    event_codes: tuple[Code, ...] = ()
    authors: tuple[Author, ...] = ()
    reference_ids: tuple[str, ...] = ()
    extra_slots: tuple[Slot, ...] = ()
    extra_classifications: tuple[Classification, ...] = ()
    extra_identifiers: tuple[ExternalIdentifier, ...] = ()

    @property
    def study_instance_uids(self) -> tuple[str, ...]:
        """Study Instance UIDs among the reference ids (CXi.5 = urn:ihe:iti:xds:2016:studyInstanceUID)."""
        suffix = "^" + uids.REFERENCE_STUDY_INSTANCE_UID
        return tuple(ref.split("^", 1)[0] for ref in self.reference_ids if ref.endswith(suffix))


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmissionSet:
    """XDSSubmissionSet (4.2.3.3)."""

    entry_uuid: str
    unique_id: str
    patient_id: str
    source_id: str = ""
    submission_time: str = ""
    logical_id: str = ""
    home_community_id: str = ""
    availability_status: str = ""
    version: str = ""
    title: str = ""
    title_language: str = ""
    comments: str = ""
    comments_language: str = ""
    translations: tuple[Translation, ...] = ()
    content_type_code: Code | None = None
    authors: tuple[Author, ...] = ()
    intended_recipients: tuple[str, ...] = ()
    extra_slots: tuple[Slot, ...] = ()
    extra_classifications: tuple[Classification, ...] = ()
    extra_identifiers: tuple[ExternalIdentifier, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """XDSFolder (4.2.3.4)."""

    entry_uuid: str
    unique_id: str
    patient_id: str
    last_update_time: str = ""
    logical_id: str = ""
    home_community_id: str = ""
    availability_status: str = ""
    version: str = ""
    title: str = ""
    title_language: str = ""
    comments: str = ""
    comments_language: str = ""
    translations: tuple[Translation, ...] = ()
    codes: tuple[Code, ...] = ()
    extra_slots: tuple[Slot, ...] = ()
    extra_classifications: tuple[Classification, ...] = ()
    extra_identifiers: tuple[ExternalIdentifier, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Association:
    """rim:Association (4.2.2): `source` --type--> `target`, both entryUUIDs or symbolic ids.

    `previous_version` and `association_propagation` stand on the membership of an updated object, `original_status`
    and `new_status` on an UpdateAvailabilityStatus association (ITI-57).
    """

    entry_uuid: str
    type: str
    source: str
    target: str
    logical_id: str = ""
    home_community_id: str = ""
    availability_status: str = ""
    version: str = ""
    submission_set_status: str = ""
    previous_version: str = ""
    association_propagation: str = ""
    original_status: str = ""
    new_status: str = ""
    documentation: Code | None = None
    extra_slots: tuple[Slot, ...] = ()
    extra_classifications: tuple[Classification, ...] = ()
    extra_identifiers: tuple[ExternalIdentifier, ...] = ()


@dataclass(frozen=True, slots=True)
class ObjectRef:
    """rim:ObjectRef: a reference to a registry object, with its home when it comes from a gateway."""

    id: str
    home_community_id: str = ""


RegistryObject = DocumentEntry | SubmissionSet | Folder | Association


@dataclass(frozen=True, slots=True)
class Submission:
    """What one lcm:SubmitObjectsRequest holds (ITI-41, ITI-42, ITI-57, ITI-61)."""

    submission_sets: tuple[SubmissionSet, ...] = ()
    documents: tuple[DocumentEntry, ...] = ()
    folders: tuple[Folder, ...] = ()
    associations: tuple[Association, ...] = ()
    object_refs: tuple[ObjectRef, ...] = field(default=())

    def __iter__(self) -> Iterator[RegistryObject]:
        """All objects, in the order in which they are written."""
        yield from self.submission_sets
        yield from self.documents
        yield from self.folders
        yield from self.associations
