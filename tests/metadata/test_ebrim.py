"""Metadata to ebRIM and back: nothing is lost, what is written is valid, what is odd is read or named."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from lxml import etree

from tests.metadata import samples
from tests.support.shared import shared_path
from tests.transactions import schemas
from xca_imaging import uids
from xca_imaging.errors import (
    LocalProtocolError,
    RegistryError,
    RegistryMetadataError,
    RepositoryMetadataError,
    SubmissionRefused,
)
from xca_imaging.metadata import ebrim
from xca_imaging.metadata.model import (
    Association,
    Author,
    Classification,
    DocumentEntry,
    ExternalIdentifier,
    ObjectRef,
    Slot,
    Submission,
    Translation,
)
from xca_imaging.wire import xml

RIM = {"rim": uids.NS_RIM}


def _list(*objects: str) -> etree._Element:
    return xml.parse(
        f'<rim:RegistryObjectList xmlns:rim="{uids.NS_RIM}">{"".join(objects)}</rim:RegistryObjectList>'.encode()
    )


def _slot(name: str, *values: str) -> str:
    listed = "".join(f"<rim:Value>{value}</rim:Value>" for value in values)
    return f'<rim:Slot name="{name}"><rim:ValueList>{listed}</rim:ValueList></rim:Slot>'


def _refusals(element: etree._Element) -> list[str]:
    with pytest.raises(SubmissionRefused) as refused:
        ebrim.decode_registry_objects(element)
    return [error.context for error in refused.value.errors]


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(item=samples.OBJECTS)
def test_what_is_written_is_read_again(item):
    element = ebrim.encode_object(item)
    assert ebrim.decode_object(element) == item
    assert ebrim.decode_object(xml.parse(xml.serialize(element))) == item
    # And the other way round: ebRIM that was read is written as it was.
    assert xml.serialize(ebrim.encode_object(ebrim.decode_object(element))) == xml.serialize(element)


@settings(
    max_examples=20,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
@given(submission=samples.SUBMISSIONS)
def test_a_whole_list_is_read_again(submission):
    data = xml.serialize(ebrim.encode_registry_objects(submission))
    assert ebrim.decode_registry_objects(xml.parse(data)) == submission


@pytest.mark.parametrize("item", list(samples.WITH_FOLDER), ids=lambda item: type(item).__name__)
def test_the_same_object_is_always_the_same_bytes(item):
    assert xml.serialize(ebrim.encode_object(item)) == xml.serialize(ebrim.encode_object(item))


def test_ids_inside_follow_the_id_of_the_object():
    """TF-3 4.2.3.1.7: what does not start with urn:uuid: is symbolic, and the registry replaces it."""
    for entry_id, prefix in ((samples.ENTRY_UUID, "urn:uuid:"), ("Document01", "Document01.")):
        element = ebrim.encode_object(replace(samples.ENTRY, entry_uuid=entry_id))
        nested = [child for child in element if child.get("id")]
        ids = [child.get("id") for child in nested]
        assert len(ids) == len(set(ids)) == 10
        assert all(text.startswith(prefix) for text in ids)
        parents = [child.get("classifiedObject") or child.get("registryObject") for child in nested]
        assert set(parents) == {entry_id}


def test_object_types_are_written_everywhere():
    """TF-3 4.2.3.1.2 and 4.2.3.1.3: required in what a registry returns."""
    element = ebrim.encode_registry_objects(samples.WITH_FOLDER)
    for child in element.iter():
        if child.get("id") is not None and child.tag != xml.qname(uids.NS_RIM, "ObjectRef"):
            assert child.get("objectType"), child.tag


def test_a_marker_is_read_inside_and_beside_its_package():
    inside = ebrim.encode_registry_objects(samples.WITH_FOLDER)
    beside = ebrim.encode_registry_objects(samples.WITH_FOLDER)
    for marker in beside.xpath("rim:RegistryPackage/rim:Classification[@classificationNode]", namespaces=RIM):
        marker.getparent().remove(marker)
        beside.insert(0, marker)
    assert len(beside) == len(inside) + 2
    assert ebrim.decode_registry_objects(beside) == ebrim.decode_registry_objects(inside) == samples.WITH_FOLDER


def test_attributes_that_the_schema_leaves_open_need_not_be_there():
    element = ebrim.encode_object(samples.ENTRY)
    for child in element.iterdescendants("{*}Classification", "{*}ExternalIdentifier"):
        del child.attrib["objectType"]
    assert ebrim.decode_object(element) == samples.ENTRY


def test_language_and_charset_of_names_are_tolerated():
    """As CXF writes them."""
    element = ebrim.encode_object(samples.ENTRY)
    title = element.find("rim:Name/rim:LocalizedString", RIM)
    title.set(xml.qname(uids.NS_XML, "lang"), "de-CH")
    title.set("charset", "UTF-8")
    assert ebrim.decode_object(element).title == samples.ENTRY.title


def test_white_space_around_values_is_no_content():
    element = _list(
        f'<rim:ExtrinsicObject id="d">{_slot("creationTime", chr(10) + "  20260102 ")}</rim:ExtrinsicObject>'
    )
    (entry,) = ebrim.decode_registry_objects(element).documents
    assert entry.creation_time == "20260102"


def test_values_of_extra_slots_are_not_touched():
    element = _list(f'<rim:ExtrinsicObject id="d">{_slot("urn:example:x", " a ", "")}</rim:ExtrinsicObject>')
    (entry,) = ebrim.decode_registry_objects(element).documents
    assert [(slot.name, slot.values) for slot in entry.extra_slots] == [("urn:example:x", (" a ", ""))]


def test_object_references_are_kept_with_their_home():
    element = _list('<rim:ObjectRef id="urn:uuid:1" home="urn:oid:1.2.3"/>', '<rim:ObjectRef id="urn:uuid:2"/>')
    expected = (ObjectRef("urn:uuid:1", "urn:oid:1.2.3"), ObjectRef("urn:uuid:2"))
    assert ebrim.decode_registry_objects(element).object_refs == expected


def test_version_home_logical_id_and_status_are_kept():
    entry = replace(
        samples.ENTRY,
        logical_id="urn:uuid:11111111-1111-4111-8111-111111111111",
        home_community_id="urn:oid:1.2.3",
        availability_status=uids.DEPRECATED,
        version="3",
    )
    assert ebrim.decode_object(ebrim.encode_object(entry)) == entry


def test_slots_of_metadata_update_have_names_and_others_stay():
    element = _list(
        '<rim:Association id="a" associationType="t" sourceObject="s" targetObject="d">'
        + _slot("SubmissionSetStatus", "Original")
        + _slot("PreviousVersion", "1")
        + _slot("AssociationPropagation", "no")
        + _slot("OriginalStatus", uids.APPROVED)
        + _slot("NewStatus", uids.DEPRECATED)
        + _slot("urn:example:more", "a", "b")
        + "</rim:Association>"
    )
    (association,) = ebrim.decode_registry_objects(element).associations
    assert association.submission_set_status == "Original"
    assert (association.previous_version, association.association_propagation) == ("1", "no")
    assert (association.original_status, association.new_status) == (uids.APPROVED, uids.DEPRECATED)
    assert association.extra_slots == (Slot("urn:example:more", ("a", "b")),)
    assert ebrim.decode_object(ebrim.encode_object(association)) == association


def test_classifications_and_identifiers_of_other_schemes_stay():
    element = _list(
        f'<rim:ExtrinsicObject id="d" objectType="{uids.STABLE_DOCUMENT}">'
        '<rim:Name><rim:LocalizedString xml:lang="de" value="Bild"/>'
        '<rim:LocalizedString xml:lang="fr" value="Image"/></rim:Name>'
        '<rim:Classification id="c" classifiedObject="d" classificationScheme="urn:example:s" nodeRepresentation="x">'
        + _slot("codingScheme", "1.2.3")
        + '<rim:Name><rim:LocalizedString value="X"/></rim:Name></rim:Classification>'
        '<rim:Classification id="n" classifiedObject="d" classificationNode="urn:example:node"/>'
        '<rim:ExternalIdentifier id="i" registryObject="d" identificationScheme="urn:example:i" value="7">'
        '<rim:Name><rim:LocalizedString value="seven"/></rim:Name></rim:ExternalIdentifier>'
        "</rim:ExtrinsicObject>"
    )
    (entry,) = ebrim.decode_registry_objects(element).documents
    assert (entry.title, entry.title_language) == ("Bild", "de")
    assert entry.translations == (Translation("title", "Image", "fr"),)
    assert entry.extra_classifications == (
        Classification("urn:example:s", "", "x", "X", (Slot("codingScheme", ("1.2.3",)),)),
        Classification(node="urn:example:node"),
    )
    assert entry.extra_identifiers == (ExternalIdentifier("urn:example:i", "7", "seven"),)
    written = ebrim.encode_object(entry)
    assert ebrim.decode_object(written) == entry
    assert etree.tostring(ebrim.encode_object(ebrim.decode_object(written))) == etree.tostring(written)


def test_authors_keep_their_order_and_content():
    authors = (samples.AUTHOR, Author(institutions=("Cleveland Clinic", "Parma Community")))
    entry = replace(samples.ENTRY, authors=authors)
    element = ebrim.encode_object(entry)
    written = element.xpath('rim:Classification[@nodeRepresentation=""]', namespaces=RIM)
    assert len(written) == 2
    assert ebrim.decode_object(element).authors == authors


@pytest.mark.parametrize("change", [{"title": "a\x00"}, {"uri": "\x1b$B"}, {"entry_uuid": "\x01"}])
def test_what_cannot_stand_in_xml_is_not_written(change):
    """A Study Description with an escape sequence of ISO 2022 that nobody decoded."""
    with pytest.raises(LocalProtocolError, match="DocumentEntry"):
        ebrim.encode_object(replace(samples.ENTRY, **change))


# --- What the model has no room for -----------------------------------------------------------------------------------

_SCHEME = "urn:uuid:41a5887f-8865-4c09-adf7-e362475b143a"  # classCode
_PATIENT_SCHEME = "urn:uuid:58a6f841-87b3-4a3e-92fd-a8ffeff98427"


def _entry(content: str, attributes: str = "") -> etree._Element:
    return _list(f'<rim:ExtrinsicObject id="Document01" {attributes}>{content}</rim:ExtrinsicObject>')


def _code(value: str, *schemes: str) -> str:
    return (
        f'<rim:Classification id="c" classifiedObject="Document01" classificationScheme="{_SCHEME}" '
        f'nodeRepresentation="{value}">{_slot("codingScheme", *schemes)}</rim:Classification>'
    )


def _identifier(value: str, parent: str = "Document01") -> str:
    return (
        f'<rim:ExternalIdentifier id="i" registryObject="{parent}" identificationScheme="{_PATIENT_SCHEME}" '
        f'value="{value}"/>'
    )


_LIMITED = "urn:uuid:ab9b591b-83ab-4d03-8f5d-f93b1fb92e85"

_PROBLEMS = {
    "two values": (
        _entry(_slot("creationTime", "2026", "2027")),
        "DocumentEntry Document01: creationTime has 2 values",
    ),
    "slot twice": (_entry(_slot("urn:x:y", "a") + _slot("urn:x:y", "b")), "Document01: slot urn:x:y stands twice"),
    "size no number": (_entry(_slot("size", "2 KB")), "Document01: size '2 KB' is not a number"),
    "size too long": (_entry(_slot("size", "9" * 5000)), "Document01: size '999"),
    "size in other digits": (_entry(_slot("size", "١٢")), "is not a number of bytes"),
    "two codes": (_entry(_code("a", "1.2") + _code("b", "1.2")), "Document01: classCode stands 2 times"),
    "two coding schemes": (_entry(_code("a", "1.2", "1.3")), "classCode: codingScheme has 2 values"),
    "identifier twice": (_entry(_identifier("a") + _identifier("b")), "XDSDocumentEntry.patientId stands twice"),
    "identifier of another": (_entry(_identifier("a", "Document02")), "registryObject of i names 'Document02'"),
    "classification of another": (
        _entry(_code("a", "1.2").replace('classifiedObject="Document01"', 'classifiedObject="x"')),
        "classifiedObject of c names 'x'",
    ),
    "limited metadata inside": (
        _entry(f'<rim:Classification id="l" classifiedObject="Document01" classificationNode="{_LIMITED}"/>'),
        "limitedMetadata",
    ),
    "limited metadata beside": (
        _list(f'<rim:Classification id="l" classifiedObject="Document01" classificationNode="{_LIMITED}"/>'),
        "limitedMetadata",
    ),
    "stray classification": (_list(_code("a", "1.2")), "outside the object"),
    "package without marker": (_list('<rim:RegistryPackage id="p"/>'), "RegistryPackage p"),
    "another registry object": (_list('<rim:Service id="s"/>'), "not an object of XDS"),
    "nested list": (
        _list(
            f'<rim:RegistryPackage id="p"><rim:Classification id="m" classifiedObject="p" '
            f'classificationNode="{uids.FOLDER_NODE}"/><rim:RegistryObjectList/></rim:RegistryPackage>'
        ),
        "nested",
    ),
}


@pytest.mark.parametrize("name", _PROBLEMS)
def test_a_problem_names_object_and_attribute(name):
    element, expected = _PROBLEMS[name]
    contexts = _refusals(element)
    assert len(contexts) == 1
    assert expected in contexts[0]


def test_all_problems_are_told_together():
    contexts = _refusals(_entry(_slot("size", "x") + _slot("hash", "1", "2")))
    assert len(contexts) == 2


def test_a_repository_tells_its_own_code():
    with pytest.raises(SubmissionRefused) as refused:
        ebrim.decode_registry_objects(_entry(_slot("size", "x")), error=RepositoryMetadataError)
    assert refused.value.errors[0].code == "XDSRepositoryMetadataError"
    with pytest.raises(SubmissionRefused) as refused:
        ebrim.decode_object(_entry(_slot("size", "x"))[0])
    assert type(refused.value.errors[0]) is RegistryMetadataError


def test_with_a_list_of_problems_the_rest_is_read():
    problems: list[RegistryError] = []
    element = _entry(_slot("size", "x") + _slot("creationTime", "2026", "2027") + _identifier("P"))
    (entry,) = ebrim.decode_registry_objects(element, problems=problems).documents
    assert (entry.size, entry.creation_time, entry.patient_id) == (None, "2026", "P")
    assert len(problems) == 2


def test_a_package_without_marker_is_guessed_from_its_identifiers():
    problems: list[RegistryError] = []
    element = ebrim.encode_registry_objects(Submission(folders=(samples.FOLDER,)))
    (marker,) = element.xpath("//rim:Classification[@classificationNode]", namespaces=RIM)
    marker.getparent().remove(marker)
    assert ebrim.decode_registry_objects(element, problems=problems).folders == (samples.FOLDER,)
    assert len(problems) == 1


def test_problems_are_bounded():
    problems: list[RegistryError] = []
    element = _list(*['<rim:RegistryPackage id="p"/>'] * 50)
    ebrim.decode_registry_objects(element, problems=problems, max_problems=10)
    assert len(problems) == 10


def test_a_missing_attribute_is_no_problem_of_reading():
    (entry,) = ebrim.decode_registry_objects(_list("<rim:ExtrinsicObject/>")).documents
    assert entry == DocumentEntry(entry_uuid="", unique_id="", patient_id="", object_type="")
    (association,) = ebrim.decode_registry_objects(_list("<rim:Association/>")).associations
    assert association == Association(entry_uuid="", type="", source="", target="")


def test_something_else_is_no_object():
    with pytest.raises(SubmissionRefused, match="not an object of XDS metadata"):
        ebrim.decode_object(_list('<rim:ObjectRef id="x"/>')[0])


# --- Messages of others -----------------------------------------------------------------------------------------------


def test_samples_are_valid():
    """RegistryObjectList is a global element of the published schema and of ours."""
    schemas.assert_valid(ebrim.encode_registry_objects(samples.WITH_FOLDER))


def _conformance_submissions():
    return sorted(shared_path("conformance/data/iti").glob("*/*/*.submission.xml"))


def test_every_submission_of_the_conformance_data_survives():
    files = _conformance_submissions()
    assert len(files) > 30
    for file in files:
        element = xml.parse(file.read_bytes()).find("rim:RegistryObjectList", RIM)
        submission = ebrim.decode_registry_objects(element)
        again = ebrim.encode_registry_objects(submission)
        assert ebrim.decode_registry_objects(again) == submission
        assert _content(again) == _content(element), file


def _content(element: etree._Element) -> list[tuple]:
    """Return what a list says, apart from order, ids of nested objects, and where markers stand."""
    said = []
    for item in element.xpath("rim:ExtrinsicObject | rim:RegistryPackage | rim:Association", namespaces=RIM):
        item_id = item.get("id")
        for name in ("mimeType", "objectType", "associationType", "sourceObject", "targetObject", "status", "home"):
            said.append((item_id, name, item.get(name)))
        for slot in item.findall("rim:Slot", RIM):
            texts = [value.text for value in slot.iterfind(".//rim:Value", RIM)]
            if slot.get("name") == "size":
                texts = [text.lstrip("0") for text in texts]  # one of the samples has 061224
            said.append((item_id, slot.get("name"), *texts))
        for code in item.findall("rim:Classification", RIM):
            texts = [value.text for value in code.iterfind(".//rim:Value", RIM)]
            names = code.xpath("rim:Name/rim:LocalizedString/@value", namespaces=RIM)
            if code.get("classificationNode") is None:
                said.append((item_id, code.get("classificationScheme"), code.get("nodeRepresentation"), *texts, *names))
        for identifier in item.findall("rim:ExternalIdentifier", RIM):
            said.append((item_id, identifier.get("identificationScheme"), identifier.get("value")))
        said.extend(
            (item_id, "name", text) for text in item.xpath("rim:Name/rim:LocalizedString/@value", namespaces=RIM)
        )
        said.extend(
            (item_id, "text", text) for text in item.xpath("rim:Description/rim:LocalizedString/@value", namespaces=RIM)
        )
    nodes = element.xpath("//rim:Classification[@classificationNode]", namespaces=RIM)
    said.extend((node.get("classifiedObject"), "marker", node.get("classificationNode")) for node in nodes)
    return sorted(said, key=repr)
