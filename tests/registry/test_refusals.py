"""The table of checks of ITI-42, row by row: its code, and that a refused submission leaves no trace.

Each row is a message as it stands on the wire: a good one with one thing wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from lxml import etree
from sqlalchemy import func, select, update

from tests.registry.conftest import NewUrl
from tests.registry.samples import (
    AUTHORITY,
    HOME,
    OTHER_PATIENT,
    PATIENT,
    REPOSITORY,
    association,
    code,
    decoded,
    document,
    folder,
    into_folder,
    new_uid,
    submission,
)
from tests.registry.test_search import ON_DEMAND
from tests.transactions import schemas
from xca_imaging import uids
from xca_imaging.errors import SubmissionRefused
from xca_imaging.metadata.model import (
    Author,
    Classification,
    DocumentEntry,
    ExternalIdentifier,
    Slot,
    Submission,
    Translation,
)
from xca_imaging.metadata.stored_query import GetDocuments, StoredQuery
from xca_imaging.metadata.vocabulary import Vocabulary
from xca_imaging.registry import Content, Registry, Repository
from xca_imaging.registry.tables import Base, ObjectRow
from xca_imaging.transactions import iti41, iti42
from xca_imaging.transactions.submission import ProvideRequest
from xca_imaging.wire import xml

METADATA = "XDSRegistryMetadataError"
NOTHING = "urn:uuid:00000000-1111-4222-8333-444444444444"
VOCABULARY = Vocabulary(
    {"classCode": frozenset({("images", "1.3.6.1.4.1.21367.2017.3")})}, frozenset({"application/dicom"})
)
RIM = {"rim": uids.NS_RIM}


@dataclass(frozen=True)
class Known:
    """What is registered before: its ids."""

    registry: Registry
    unique_ids: dict[str, str]
    uuids: dict[str, str]
    entries: dict[str, DocumentEntry]


@pytest.fixture(scope="module")
def known(new_url: NewUrl) -> Iterator[Known]:
    """A document in a folder, a deprecated document, an on-demand entry, another patient's document."""
    registry = Registry.open(
        new_url(),
        home_community_id=HOME,
        assigning_authorities=[AUTHORITY],
        strict_patients=True,
        vocabulary=VOCABULARY,
    )
    registry.add_patients([PATIENT, OTHER_PATIENT])
    entries = {
        "document": document(entry_uuid="document"),
        "old": document(entry_uuid="old"),
        "other": document(entry_uuid="other", patient_id=OTHER_PATIENT),
        "on-demand": document(entry_uuid="on-demand", **ON_DEMAND),
    }
    case = folder(entry_uuid="folder")
    first = submission(
        entries["document"], entries["old"], folders=[case], associations=into_folder("folder", "document")
    )
    uuids = dict(registry.register(first).entry_uuids)
    uuids |= registry.register(submission(entries["other"], patient_id=OTHER_PATIENT)).entry_uuids
    uuids |= registry.register(submission(entries["on-demand"]), on_demand=True).entry_uuids
    new = document(entry_uuid="new")
    registry.register(submission(new, associations=[association(uids.RPLC, "new", uuids["old"])]))
    closed = folder(entry_uuid="closed")
    uuids |= registry.register(submission(folders=[closed])).entry_uuids
    with registry.database.writing() as connection:
        deprecated = update(ObjectRow).where(ObjectRow.entry_uuid == uuids["closed"]).values(status="Deprecated")
        connection.execute(deprecated)
    unique_ids = {"set": first.submission_sets[0].unique_id, "folder": case.unique_id}
    yield Known(registry, unique_ids | {name: each.unique_id for name, each in entries.items()}, uuids, entries)
    registry.close()


def rows_of(registry: Registry) -> dict[str, int]:
    with registry.database.reading() as connection:
        return {
            table.name: connection.scalar(select(func.count()).select_from(table)) or 0
            for table in Base.metadata.sorted_tables
        }


Change = Callable[[Known], Submission]


def entry(**changes: Any) -> Change:
    return lambda known: submission(document(**changes))


def packaged(**changes: Any) -> Change:
    return lambda known: submission(document(), **changes)


def in_folder(**changes: Any) -> Change:
    return lambda known: submission(document(), folders=[folder(**changes)])


def related(type_: str, target: str) -> Change:
    def change(known: Known) -> Submission:
        new = document()
        return submission(new, associations=[association(type_, new.entry_uuid, known.uuids.get(target, target))])

    return change


def without(field: str) -> Change:
    empty: Any = () if field == "confidentiality_codes" else None if field.endswith("_code") or field == "size" else ""
    return entry(**{field: empty})


def again(name: str, **changes: Any) -> Change:
    return lambda known: submission(replace(known.entries[name], entry_uuid="again", **changes))


def same_unique_id(known: Known) -> Submission:
    used = new_uid()
    return submission(document(unique_id=used), document(unique_id=used))


def foreign_source(known: Known) -> Submission:
    apnd = association(uids.APND, known.uuids["document"], known.uuids["on-demand"])
    return submission(document(), associations=[apnd])


def into(case: str, target: str) -> Change:
    return lambda known: submission(
        document(), associations=into_folder(known.uuids.get(case, case), known.uuids.get(target, target))
    )


def refers_to_nothing(known: Known) -> Submission:
    reference = association(uids.HAS_MEMBER, "SubmissionSet", NOTHING, submission_set_status="Reference")
    return submission(document(), associations=[reference])


def two_sets(known: Known) -> Submission:
    first, second = submission(document()), submission(document())
    other = replace(second.submission_sets[0], entry_uuid="SubmissionSet2")
    return replace(first, submission_sets=(*first.submission_sets, other))


REQUIRED = (
    *("unique_id", "patient_id", "source_patient_id", "mime_type", "object_type", "language_code", "creation_time"),
    *("class_code", "type_code", "format_code", "healthcare_facility_type_code", "practice_setting_code"),
    *("confidentiality_codes", "hash", "size", "repository_unique_id"),
)
DEPRECATED = "XDSRegistryDeprecatedDocumentError"
UNRESOLVED = "UnresolvedReferenceException"
RELATIONS = (uids.RPLC, uids.XFRM, uids.APND, uids.XFRM_RPLC, uids.SIGNS)

ROWS: dict[str, tuple[Change, list[str]]] = {
    **{f"without {field}": (without(field), [METADATA]) for field in REQUIRED if field != "patient_id"},
    "patientId with a namespace": (entry(patient_id=f"a^^^ns&{AUTHORITY}&ISO"), [METADATA, "XDSPatientIdDoesNotMatch"]),
    "sourcePatientId with three components": (entry(source_patient_id="a^b^c^&1.2.3&ISO"), [METADATA]),
    "sourcePatientId of another authority type": (entry(source_patient_id="a^^^&1.2.3&DNS"), [METADATA]),
    "sourcePatientId in two parts": (entry(source_patient_id="a^^^&1.2.3&ISO^PI"), [METADATA]),
    "creationTime with a zone": (entry(creation_time="20240101120000+0100"), [METADATA]),
    "creationTime of a 13th month": (entry(creation_time="202413"), [METADATA]),
    "a UUID in capitals": (entry(entry_uuid="urn:uuid:AAAAAAAA-1111-4222-8333-444444444444"), [METADATA, METADATA]),
    "classCode without scheme": (entry(class_code=code("images", "")), [METADATA]),
    "hash that is none": (entry(hash="abc"), [METADATA]),
    "languageCode that is none": (entry(language_code="en_US"), [METADATA]),
    "mimeType that is none": (entry(mime_type="dicom"), [METADATA, METADATA]),
    "repositoryUniqueId that is none": (entry(repository_unique_id="urn:oid:1.2"), [METADATA]),
    "referenceIdList without type": (entry(reference_ids=("a^^^&1.2&ISO",)), [METADATA]),
    "uniqueId too long": (entry(unique_id="1." + "2" * 130), [METADATA]),
    "title too long": (entry(title="t" * 129), [METADATA]),
    "title in no language": (entry(title="t", title_language="en_US"), [METADATA]),
    "a translation too long": (entry(translations=(Translation("comments", "t" * 1025, "de"),)), [METADATA]),
    "an extra slot too long": (entry(extra_slots=(Slot("urn:example:x", ("v" * 257,)),)), [METADATA]),
    "an extra classification too long": (
        entry(extra_classifications=(Classification("urn:example:s", representation="v" * 257),)),
        [METADATA],
    ),
    "an extra identifier too long": (
        entry(extra_identifiers=(ExternalIdentifier("urn:example:s", "v" * 257),)),
        [METADATA],
    ),
    "author of nobody": (entry(authors=(Author(roles=("writer",)),)), [METADATA]),
    "authorPerson without name and id": (entry(authors=(Author(person="^^^^Dr"),)), [METADATA]),
    "authorInstitution without name": (entry(authors=(Author(institutions=("^^^^^^^^^1.2.3",)),)), [METADATA]),
    "authorInstitution of another authority type": (
        entry(authors=(Author(institutions=("West^^^^^&1.2.3&DNS^^^^7",)),)),
        [METADATA],
    ),
    "legalAuthenticator without name and id": (entry(legal_authenticator="^"), [METADATA]),
    "sourceId that is no OID": (packaged(source_id="here"), [METADATA]),
    "without submissionTime": (packaged(submission_time=""), [METADATA]),
    "without contentTypeCode": (packaged(content_type_code=None), [METADATA]),
    "intendedRecipient that is nobody": (packaged(intended_recipients=("|",)), [METADATA]),
    "folder without codeList": (in_folder(codes=()), [METADATA]),
    "folder without uniqueId": (in_folder(unique_id=""), [METADATA]),
    "no SubmissionSet": (lambda known: replace(submission(), submission_sets=()), [METADATA]),
    "two SubmissionSets": (two_sets, [METADATA]),
    "a code that is not the domain's": (entry(class_code=code("pictures")), [METADATA]),
    "the domain's code in another scheme": (entry(class_code=code("images", "1.2.3")), [METADATA]),
    "a mimeType that is not the domain's": (entry(mime_type="image/gif"), [METADATA]),
    "stop before start": (entry(service_start_time="20240102", service_stop_time="20240101"), [METADATA]),
    "an on-demand entry": (entry(**ON_DEMAND), [METADATA]),
    "the same uniqueId twice": (same_unique_id, ["XDSRegistryDuplicateUniqueIdInMessage"]),
    "SubmissionSet.uniqueId in use": (
        lambda known: submission(document(), unique_id=known.unique_ids["set"]),
        ["XDSDuplicateUniqueIdInRegistry"],
    ),
    "SubmissionSet.uniqueId of a document": (
        lambda known: submission(document(), unique_id=known.unique_ids["document"]),
        ["XDSDuplicateUniqueIdInRegistry"],
    ),
    "Folder.uniqueId in use": (
        lambda known: submission(folders=[folder(unique_id=known.unique_ids["folder"])]),
        ["XDSDuplicateUniqueIdInRegistry"],
    ),
    "another hash": (again("document", hash="0" * 40), ["XDSNonIdenticalHash"]),
    "another size": (again("document", size=7), ["XDSNonIdenticalSize"]),
    "another hash and size": (again("document", hash="0" * 40, size=7), ["XDSNonIdenticalHash", "XDSNonIdenticalSize"]),
    "an unknown patient": (
        lambda known: submission(document(patient_id=f"new^^^&{AUTHORITY}&ISO"), patient_id=f"new^^^&{AUTHORITY}&ISO"),
        ["XDSUnknownPatientId"],
    ),
    "a patient of another domain": (
        lambda known: submission(document(patient_id="a^^^&9.9&ISO"), patient_id="a^^^&9.9&ISO"),
        ["XDSUnknownPatientId"],
    ),
    "two patients": (entry(patient_id=OTHER_PATIENT), ["XDSPatientIdDoesNotMatch"]),
    "a folder of another patient": (in_folder(patient_id=OTHER_PATIENT), ["XDSPatientIdDoesNotMatch"]),
    "another patient's document into a folder": (into("folder", "other"), ["XDSPatientIdDoesNotMatch"]),
    **{f"{kind[33:]} of another patient": (related(kind, "other"), ["XDSPatientIdDoesNotMatch"]) for kind in RELATIONS},
    "a source that is not submitted": (foreign_source, [UNRESOLVED]),
    **{f"{kind[33:]} of nothing": (related(kind, NOTHING), [UNRESOLVED]) for kind in (*RELATIONS, uids.IS_SNAPSHOT_OF)},
    "a snapshot of a stable document": (related(uids.IS_SNAPSHOT_OF, "document"), [UNRESOLVED]),
    "nothing into a folder": (into("folder", NOTHING), [UNRESOLVED]),
    "a document into no folder": (into(NOTHING, "document"), [UNRESOLVED]),
    "a reference to nothing": (refers_to_nothing, [UNRESOLVED]),
    **{f"{kind[33:]} of a deprecated document": (related(kind, "old"), [DEPRECATED]) for kind in RELATIONS},
    "a deprecated document into a folder": (into("folder", "old"), [DEPRECATED]),
    "a document into a deprecated folder": (into("closed", "document"), [DEPRECATED]),
}


def on_the_wire(sent: Submission) -> etree._Element:
    return xml.parse(xml.serialize(iti42.encode_request(sent)))


def refusal(registry: Registry, message: etree._Element) -> list[str]:
    with pytest.raises(SubmissionRefused) as caught:
        registry.register(iti42.decode_request(message))
    schemas.assert_valid(iti42.encode_response(iti42.decode_response(_answer(caught.value))))
    return [error.code for error in caught.value.errors]


def _answer(refused: SubmissionRefused) -> etree._Element:
    from xca_imaging.gateway.documents import refuse_submission

    return refuse_submission(refused.errors)


@pytest.mark.parametrize("row", ROWS)
def test_row(known: Known, row: str) -> None:
    change, codes = ROWS[row]
    before = rows_of(known.registry)
    assert refusal(known.registry, on_the_wire(change(known))) == codes
    assert rows_of(known.registry) == before


STRUCTURE: dict[str, Callable[[etree._Element], None]] = {
    "two values of creationTime": lambda message: message.xpath("//*[@name='creationTime']/*")[0].append(
        etree.fromstring(f'<rim:Value xmlns:rim="{uids.NS_RIM}">2024</rim:Value>')
    ),
    "a slot twice": lambda message: _twice(message, "//rim:ExtrinsicObject/rim:Slot[@name='hash']"),
    "a code twice": lambda message: _twice(
        message, "//*[@classificationScheme='urn:uuid:41a5887f-8865-4c09-adf7-e362475b143a']"
    ),
    "an identifier twice": lambda message: _twice(message, "//rim:ExtrinsicObject/rim:ExternalIdentifier[1]"),
    "a size that is no number": lambda message: _text(message, "//*[@name='size']/*/*", "many"),
    "a package of no kind": lambda message: _remove(message, "//*[@classificationNode]"),
    "limited metadata": lambda message: message.xpath("//rim:ExtrinsicObject/rim:Classification", namespaces=RIM)[
        0
    ].attrib.update(
        {"classificationNode": "urn:uuid:ab9b591b-83ab-4d03-8f5d-f93b1fb92e85", "classificationScheme": ""}
    ),
    "a classification of another object": lambda message: message.xpath(
        "//rim:ExtrinsicObject/rim:Classification", namespaces=RIM
    )[0].set("classifiedObject", "elsewhere"),
}


def _twice(message: etree._Element, path: str) -> None:
    found = message.xpath(path, namespaces=RIM)[0]
    found.addnext(etree.fromstring(etree.tostring(found)))


def _text(message: etree._Element, path: str, text: str) -> None:
    message.xpath(path)[0].text = text


def _remove(message: etree._Element, path: str) -> None:
    found = message.xpath(path)[0]
    found.getparent().remove(found)


@pytest.mark.parametrize("row", STRUCTURE)
def test_a_message_of_wrong_structure(known: Known, row: str) -> None:
    message = on_the_wire(submission(document(), folders=[]))
    STRUCTURE[row](message)
    before = rows_of(known.registry)
    assert set(refusal(known.registry, message)) == {METADATA}
    assert rows_of(known.registry) == before


@pytest.mark.parametrize(
    "row", [row for row, (_, codes) in ROWS.items() if set(codes) == {METADATA} and not row.startswith("without ")]
)
def test_a_repository_says_it_in_its_own_code_and_stores_nothing(known: Known, row: str, tmp_path: Path) -> None:
    repository = Repository(known.registry, tmp_path, repository_unique_id=REPOSITORY)
    sent = ROWS[row][0](known)
    contents = {each.entry_uuid: b"content" for each in sent.documents}
    # Hash and size are the repository's to know; what the source says of them is checked elsewhere.
    stripped = [replace(each, hash=each.hash if row.startswith("hash") else "", size=None) for each in sent.documents]
    message = iti41.encode_request(ProvideRequest(replace(sent, documents=tuple(stripped)), contents))
    request = iti41.decode_request(xml.parse(xml.serialize(message)))
    before = rows_of(known.registry)
    with pytest.raises(SubmissionRefused) as caught:
        repository.provide(request.submission, {each: Content.of(b"content") for each in contents})
    assert {error.code for error in caught.value.errors} == {"XDSRepositoryMetadataError"}
    assert rows_of(known.registry) == before
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_extra_metadata_are_kept_without_a_warning(known: Known) -> None:
    """Hence never XDSExtraMetadataNotSaved. The message is right, also beside an entry of the same content."""
    extra: dict[str, Any] = {
        "extra_slots": (Slot("urn:example:slot", ("a", "b")),),
        "extra_classifications": (
            Classification("urn:example:scheme", "", "x", "X", (Slot("codingScheme", ("1.2",)),)),
        ),
        "extra_identifiers": (ExternalIdentifier("urn:example:identifier", "7", "seven"),),
        "title": "Bild",
        "title_language": "de",
        "translations": (Translation("title", "Image", "fr"),),
    }
    registered = known.registry.register(iti42.decode_request(on_the_wire(again("document", **extra)(known))))
    assert registered.warnings == ()
    query = StoredQuery(GetDocuments(entry_uuids=(registered.entry_uuids["again"],)))
    [found] = decoded(known.registry.query(query).fragments)
    assert {name: getattr(found, name) for name in extra} == extra
