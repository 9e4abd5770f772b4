"""Stored queries: every coding rule of ITI TF-2 3.18.4.1.2.3.5, and every parameter there and back."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.metadata.samples import PATIENT, UIDS
from tests.support.shared import shared_path
from tests.transactions import schemas
from xca_imaging import uids
from xca_imaging.errors import (
    LocalProtocolError,
    MalformedMessage,
    RegistryError,
    StoredQueryMissingParam,
    StoredQueryParamNumber,
    UnknownStoredQuery,
)
from xca_imaging.metadata import adhoc_query
from xca_imaging.metadata.model import Code
from xca_imaging.metadata.stored_query import (
    MULTIPLE_PATIENTS,
    SINGLE_PATIENT,
    Definition,
    FindDocuments,
    GetDocuments,
    Kind,
    StoredQuery,
)
from xca_imaging.wire import xml

FIND = "urn:uuid:14d4debf-8f97-4251-9a74-a90016b0af0d"
BY_REFERENCE = "urn:uuid:12941a89-e02e-4be5-967c-ce4bfc8fe492"
GET = "urn:uuid:5c4f972b-d56b-40ac-a5fc-c8ca9b40b9d4"
ALL = "urn:uuid:10b545ea-725c-446d-9b95-8aeb444eddf3"

PID = ("$XDSDocumentEntryPatientId", f"'{PATIENT}'")
STATUS = ("$XDSDocumentEntryStatus", f"('{uids.APPROVED}')")
CLASS = "$XDSDocumentEntryClassCode"
EVENT = "$XDSDocumentEntryEventCodeList"
FROM = "$XDSDocumentEntryCreationTimeFrom"


def request(query_id: str, *slots: tuple[str, ...], return_type: str = "LeafClass", home: str = ""):
    """Return an AdhocQueryRequest as a peer would send it; each slot is (name, value, value, ...)."""
    nsmap = {"query": uids.NS_QUERY, "rim": uids.NS_RIM}
    from lxml import etree

    root = etree.Element(xml.qname(uids.NS_QUERY, "AdhocQueryRequest"), nsmap=nsmap)
    etree.SubElement(root, xml.qname(uids.NS_QUERY, "ResponseOption"), returnType=return_type)
    query = etree.SubElement(root, xml.qname(uids.NS_RIM, "AdhocQuery"), id=query_id)
    if home:
        query.set("home", home)
    for name, *values in slots:
        slot = etree.SubElement(query, xml.qname(uids.NS_RIM, "Slot"), name=name)
        value_list = etree.SubElement(slot, xml.qname(uids.NS_RIM, "ValueList"))
        for value in values:
            etree.SubElement(value_list, xml.qname(uids.NS_RIM, "Value")).text = value
    return root


def find(*slots: tuple[str, ...]) -> FindDocuments:
    query = adhoc_query.decode_adhoc_query(request(FIND, PID, STATUS, *slots)).query
    assert isinstance(query, FindDocuments)
    return query


def test_the_smallest_query():
    decoded = adhoc_query.decode_adhoc_query(request(FIND, PID, STATUS, home="urn:oid:1.2.3", return_type="ObjectRef"))
    assert decoded == StoredQuery(
        FindDocuments(patient_id=PATIENT, status=(uids.APPROVED,)), "ObjectRef", "urn:oid:1.2.3"
    )
    assert decoded.query.types == (uids.STABLE_DOCUMENT,)


# --- Coding of values -------------------------------------------------------------------------------------------------

A, B = Code("a", "1.2"), Code("b", "1.3")

_LISTS = {
    "one list": ("('a^^1.2','b^^1.3')",),
    "white space": ("\n ( 'a^^1.2' ,\n 'b^^1.3' ) ",),
    "a list in each value": ("('a^^1.2')", "('b^^1.3')"),
    "a list that goes on": ("('a^^1.2',", "'b^^1.3')"),
    "double quotes": ('("a^^1.2","b^^1.3")',),
}


@pytest.mark.parametrize("name", _LISTS)
def test_lists(name):
    assert find((CLASS, *_LISTS[name])).class_codes == (A, B)


def test_a_quote_inside_is_doubled():
    query = find(("$XDSDocumentEntryAuthorPerson", "('^O''Hara%','''')"))
    assert query.author_persons == ("^O'Hara%", "'")


def test_parentheses_and_commas_inside_quotes_are_text():
    assert find(("$XDSDocumentEntryAuthorPerson", "('a,b)','(c')")).author_persons == ("a,b)", "(c")


@pytest.mark.parametrize("coded", ["20260102", "'20260102'", ' "20260102" ', "('20260102')", "(20260102)"])
def test_times_are_numbers_and_quotes_are_tolerated(coded):
    assert find((FROM, coded)).creation_time_from == "20260102"


def test_a_repeated_slot_is_and_its_values_are_or():
    query = find((EVENT, "('a^^1.2','b^^1.3')"), (EVENT, "('b^^1.3')"))
    assert query.event_codes == ((A, B), (B,))


def test_unknown_parameters_are_ignored():
    query = find(("$XDSDocumentEntryPracticeSettingCodeScheme", "('x')"), ("XDSDocumentEntryClassCode", "nonsense"))
    assert query == find()


def test_unknown_status_values_are_ignored():
    slots = (PID, ("$XDSDocumentEntryStatus", f"('urn:x:Sleeping','{uids.DEPRECATED}')"))
    assert adhoc_query.decode_adhoc_query(request(FIND, *slots)).query.status == (uids.DEPRECATED,)


def test_entry_types_are_kept_as_asked():
    """An unknown type among them matches nothing; alone it must not turn into the default."""
    query = find(("$XDSDocumentEntryType", f"('{uids.ON_DEMAND_DOCUMENT}','urn:x')"))
    assert query.types == (uids.ON_DEMAND_DOCUMENT, "urn:x")


def test_a_query_id_in_capitals_is_the_same_uuid():
    assert adhoc_query.decode_adhoc_query(request(FIND.upper().replace("URN:UUID", "urn:uuid"), PID, STATUS))


_NUMBER = {
    "not a list": (CLASS, "'a^^1.2'"),
    "not a list after a list": (CLASS, "('a^^1.2')", "'b^^1.3'"),
    "two values for one": (FROM, "20260102", "20260103"),
    "a list of two for one": (FROM, "('20260102','20260103')"),
    "quote not closed": (CLASS, "('a^^1.2"),
    "string cut in two": (CLASS, "('a^^", "1.2')"),
    "list not closed": (CLASS, "('a^^1.2'"),
    "list not opened": (CLASS, "'a^^1.2')"),
    "list in a list": (CLASS, "(('a^^1.2'))"),
    "closed twice": (CLASS, "('a^^1.2'))"),
    "no quotes": (CLASS, "(a^^1.2)"),
    "code without scheme": (CLASS, "('a')"),
    "code with empty scheme": (CLASS, "('a^^')"),
    "scheme without code": (CLASS, "('^^1.2')"),
    "code of four parts": (CLASS, "('a^^1.2^x')"),
    "no time": (FROM, "yesterday"),
    "time with zone": (FROM, "20260102030405+0100"),
    "month 13": (FROM, "202613"),
    "empty list": (CLASS, "()"),
    "no value": (CLASS,),
    "empty time": (FROM, "''"),
}


@pytest.mark.parametrize("name", _NUMBER)
def test_number_and_form_of_values(name):
    with pytest.raises(StoredQueryParamNumber, match=r"\$XDSDocumentEntry"):
        find(_NUMBER[name])


def test_only_some_parameters_may_stand_twice():
    with pytest.raises(StoredQueryParamNumber, match="stands 2 times"):
        find((CLASS, "('a^^1.2')"), (CLASS, "('b^^1.3')"))


_MISSING = {
    "patient": request(FIND, STATUS),
    "empty patient": request(FIND, STATUS, (PID[0], "''")),
    "patient without value": request(FIND, STATUS, (PID[0],)),
    "status": request(FIND, PID),
    "only unknown status": request(FIND, PID, ("$XDSDocumentEntryStatus", "('urn:x:Sleeping')")),
    "reference ids": request(BY_REFERENCE, PID, STATUS),
    "both ids": request(GET),
    "empty ids": request(GET, ("$XDSDocumentEntryUniqueId", "()")),
    "folder status": request(
        ALL, ("$patientId", f"'{PATIENT}'"), STATUS, ("$XDSSubmissionSetStatus", f"('{uids.APPROVED}')")
    ),
}


@pytest.mark.parametrize("name", _MISSING)
def test_missing_parameters(name):
    with pytest.raises(StoredQueryMissingParam, match="required"):
        adhoc_query.decode_adhoc_query(_MISSING[name])


def test_by_one_kind_of_id_only():
    slots = (("$XDSDocumentEntryUniqueId", "('1.2')"), ("$XDSDocumentEntryEntryUUID", "('urn:uuid:1')"))
    with pytest.raises(StoredQueryParamNumber, match="only one of"):
        adhoc_query.decode_adhoc_query(request(GET, *slots))


@pytest.mark.parametrize("query_id", ["", "urn:uuid:00000000-0000-0000-0000-000000000000", FIND[9:]])
def test_unknown_queries(query_id):
    with pytest.raises(UnknownStoredQuery):
        adhoc_query.decode_adhoc_query(request(query_id, PID, STATUS))


@pytest.mark.parametrize("return_type", ["RegistryObject", "LeafClassWithRepositoryItem", "leafclass", ""])
def test_other_return_types(return_type):
    with pytest.raises(RegistryError, match="returnType") as raised:
        adhoc_query.decode_adhoc_query(request(FIND, PID, STATUS, return_type=return_type))
    assert raised.value.code == "XDSRegistryError"


def test_the_return_type_has_no_default():
    """The schema's default is RegistryObject, which stored queries do not return."""
    message = request(FIND, PID, STATUS)
    message.remove(message[0])
    with pytest.raises(RegistryError, match="returnType"):
        adhoc_query.decode_adhoc_query(message)


def test_a_request_without_query():
    message = request(FIND)
    message.remove(message[1])
    with pytest.raises(MalformedMessage):
        adhoc_query.decode_adhoc_query(message)


def test_the_values_of_a_query_are_bounded():
    message = request(GET, ("$XDSDocumentEntryUniqueId", *["('1.2.3')"] * 10))
    assert adhoc_query.decode_adhoc_query(message, max_text=90)
    with pytest.raises(StoredQueryParamNumber, match="more than 89 characters"):
        adhoc_query.decode_adhoc_query(message, max_text=89)


# --- There and back ---------------------------------------------------------------------------------------------------

_TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Cn", "Co")), min_size=1, max_size=12)
_CODE = st.builds(Code, st.text("abcXYZ019'.-", min_size=1, max_size=8), UIDS)
_VALUES = {
    Kind.STRING: _TEXT,
    Kind.CODE: _CODE,
    Kind.TIME: st.sampled_from(["2026", "20260102", "20260102030405"]),
    Kind.STATUS: st.sampled_from([uids.APPROVED, uids.DEPRECATED]),
}


def _queries(definition: Definition) -> st.SearchStrategy:
    """Return queries of one definition, with every parameter that it has, required ones always."""
    alternatives = definition.either or ("",)
    return st.one_of(*(st.builds(definition.build, **_fields(definition, given)) for given in alternatives))


def _fields(definition: Definition, given: str) -> dict[str, st.SearchStrategy]:
    fields = {}
    for parameter in definition.parameters:
        if parameter.name in definition.either and parameter.name != given:
            continue
        needed = parameter.required or parameter.name in (given, *definition.some[:1])
        value = _VALUES[parameter.kind]
        if parameter.many:
            least = 1 if needed or parameter.kind is Kind.STATUS or parameter.field == "types" else 0
            value = st.lists(value, min_size=least, max_size=3).map(tuple)
        if parameter.repeatable:
            value = st.lists(value.filter(bool), min_size=int(needed), max_size=2).map(tuple)
        elif not parameter.many and not needed:
            value = st.one_of(st.just(""), value)
        fields[parameter.field] = value
    return fields


def _requests(definitions) -> st.SearchStrategy:
    return st.builds(
        StoredQuery,
        st.one_of(*map(_queries, definitions.values())),
        st.sampled_from(["LeafClass", "ObjectRef"]),
        st.sampled_from(["", "urn:oid:1.2.3"]),
    )


QUERIES = _requests(SINGLE_PATIENT)
MULTI_QUERIES = _requests(MULTIPLE_PATIENTS)


@settings(max_examples=200)
@given(query=QUERIES, max_value=st.integers(1, 300))
def test_what_is_written_is_read_again(query, max_value):
    element = adhoc_query.encode_adhoc_query(query, max_value=max_value)
    schemas.assert_valid(element)
    assert adhoc_query.decode_adhoc_query(element) == query
    assert adhoc_query.decode_adhoc_query(xml.parse(xml.serialize(element))) == query


@settings(max_examples=50)
@given(query=MULTI_QUERIES)
def test_queries_for_multiple_patients_are_read_again_and_are_another_transactions(query):
    element = adhoc_query.encode_adhoc_query(query)
    assert adhoc_query.decode_adhoc_query(element, MULTIPLE_PATIENTS) == query
    with pytest.raises(UnknownStoredQuery):
        adhoc_query.decode_adhoc_query(element)


def test_long_lists_go_on_in_the_next_value():
    """rim:LongName has 256 characters: three quoted UUIDs do not fit with four more."""
    entry_uuids = tuple(f"urn:uuid:00000000-0000-4000-8000-{number:012}" for number in range(40))
    element = adhoc_query.encode_adhoc_query(StoredQuery(GetDocuments(entry_uuids=entry_uuids)))
    values = [value.text for value in element.iter(xml.qname(uids.NS_RIM, "Value"))]
    assert len(values) == 8
    assert max(map(len, values)) <= 256
    schemas.assert_valid(element)
    assert adhoc_query.decode_adhoc_query(element).query == GetDocuments(entry_uuids=entry_uuids)


def test_what_is_sent():
    query = FindDocuments(
        patient_id=PATIENT, status=(uids.APPROVED,), event_codes=((A, B), (A,)), creation_time_from="2026"
    )
    element = adhoc_query.encode_adhoc_query(StoredQuery(query, home_community_id="urn:oid:1.2"))
    schemas.assert_valid(element)
    slots = [
        (slot.get("name"), [value.text for value in slot.iter(xml.qname(uids.NS_RIM, "Value"))])
        for slot in element.iter(xml.qname(uids.NS_RIM, "Slot"))
    ]
    assert slots == [
        (PID[0], [PID[1]]),
        (FROM, ["2026"]),
        (EVENT, ["('a^^1.2','b^^1.3')"]),
        (EVENT, ["('a^^1.2')"]),
        (STATUS[0], [STATUS[1]]),
        ("$XDSDocumentEntryType", [f"('{uids.STABLE_DOCUMENT}')"]),
    ]
    assert element[1].get("home") == "urn:oid:1.2"


@pytest.mark.parametrize("code", [Code("a^b", "1.2"), Code("", "1.2"), Code("a", "")])
def test_a_code_that_cannot_be_written_is_not_sent(code):
    query = FindDocuments(patient_id=PATIENT, status=(uids.APPROVED,), class_codes=(code,))
    with pytest.raises(LocalProtocolError):
        adhoc_query.encode_adhoc_query(StoredQuery(query))


@pytest.mark.parametrize(
    "definition", [*SINGLE_PATIENT.values(), *MULTIPLE_PATIENTS.values()], ids=lambda definition: definition.name
)
def test_definitions_fit_their_values(definition):
    fields = set(definition.build.__dataclass_fields__)
    assert {parameter.field for parameter in definition.parameters} <= fields
    names = [parameter.name for parameter in definition.parameters]
    assert len(names) == len(set(names))
    assert {*definition.either, *definition.some} <= set(names)


def test_all_stored_queries_of_the_framework_are_there():
    assert {definition.name for definition in SINGLE_PATIENT.values()} == {
        "FindDocuments",
        "FindSubmissionSets",
        "FindFolders",
        "GetAll",
        "GetDocuments",
        "GetFolders",
        "GetAssociations",
        "GetDocumentsAndAssociations",
        "GetSubmissionSets",
        "GetSubmissionSetAndContents",
        "GetFolderAndContents",
        "GetFoldersForDocument",
        "GetRelatedDocuments",
        "FindDocumentsByReferenceId",
    }
    assert len(MULTIPLE_PATIENTS) == 3


def test_queries_by_ids_must_say_whose_they_are():
    by_ids = {definition.name for definition in SINGLE_PATIENT.values() if definition.by_ids}
    assert by_ids == {name for name in (d.name for d in SINGLE_PATIENT.values()) if name.startswith("Get")} - {"GetAll"}


@pytest.mark.parametrize("definition", MULTIPLE_PATIENTS.values(), ids=lambda definition: definition.name)
def test_a_query_for_multiple_patients_asks_for_something(definition):
    status = next(p.name for p in definition.parameters if p.kind is Kind.STATUS)
    with pytest.raises(StoredQueryMissingParam):
        adhoc_query.decode_adhoc_query(request(definition.id, (status, f"('{uids.APPROVED}')")), MULTIPLE_PATIENTS)


def test_every_query_of_the_conformance_data():
    files = sorted(shared_path("conformance/data/iti").glob("*/*/*.query.xml"))
    for file in files:
        # Placeholders of times stand bare in the data; the kit fills them in.
        message = xml.parse(re.sub(rb">\$[a-z]+\$<", b">2026<", file.read_bytes()))
        query = adhoc_query.decode_adhoc_query(message)
        again = adhoc_query.encode_adhoc_query(query)
        assert adhoc_query.decode_adhoc_query(again) == query
        assert _said(again) == _said(message), file
    assert len(files) > 29


def _said(message) -> list[tuple]:
    """Return the known parameters with their values, without layout of lists and without the default type."""
    definition = SINGLE_PATIENT[message[1].get("id")]
    names = {parameter.name for parameter in definition.parameters} - {"$XDSDocumentEntryType", "$XDSAssociationStatus"}
    said = []
    for slot in message.iter(xml.qname(uids.NS_RIM, "Slot")):
        if slot.get("name") in names:
            texts = [value.text.strip("() ") for value in slot.iter(xml.qname(uids.NS_RIM, "Value"))]
            said.append((slot.get("name"), ",".join(texts).replace("', '", "','")))
    return sorted(said)
