"""RAD-69 and RAD-75: images asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lxml import etree

from tests.metadata.samples import TEXT, UIDS
from tests.support.shared import shared_path
from tests.transactions import schemas
from tests.transactions.test_document_set import _DOCUMENTS, REQUESTS
from tests.transactions.test_registry_response import ERROR
from xca_imaging import uids
from xca_imaging.errors import MalformedMessage
from xca_imaging.transactions import rad69, rad75
from xca_imaging.transactions.document_set import DocumentRequest, RetrieveResponse
from xca_imaging.transactions.imaging_document_set import RetrieveImagingRequest, SeriesRequest, StudyRequest
from xca_imaging.transactions.registry_response import response_to
from xca_imaging.wire import xml

A, B, C = (DocumentRequest("urn:oid:1.9", f"1.8.{number}", f"1.2.3.{number}") for number in range(3))
REQUEST = RetrieveImagingRequest(
    (
        StudyRequest("1.2.1", (SeriesRequest("1.2.1.1", (A, B)), SeriesRequest("1.2.1.2", (C,)))),
        StudyRequest("1.2.2", (SeriesRequest("1.2.2.1", (replace(A, document_unique_id="1.2.9"),)),)),
    ),
    (uids.EXPLICIT_VR_LITTLE_ENDIAN, uids.IMPLICIT_VR_LITTLE_ENDIAN),
)
_UIDS = st.one_of(st.just(""), UIDS)
_SERIES = st.builds(SeriesRequest, _UIDS, st.lists(REQUESTS, max_size=3).map(tuple))
_STUDIES = st.builds(StudyRequest, _UIDS, st.lists(_SERIES, max_size=3).map(tuple))
IMAGING_REQUESTS = st.builds(
    RetrieveImagingRequest, st.lists(_STUDIES, max_size=3).map(tuple), st.lists(TEXT, max_size=3).map(tuple)
).filter(len)


@given(request=IMAGING_REQUESTS, module=st.sampled_from([rad69, rad75]))
def test_a_request_is_read_again(request, module):
    assert module.decode_request(xml.parse(xml.serialize(module.encode_request(request)))) == request


def test_a_request_is_valid():
    element = rad69.encode_request(REQUEST)
    schemas.assert_valid(element)
    assert rad69.decode_request(element) == REQUEST


def test_document_requests_are_in_the_namespace_of_xds_b_and_the_list_is_last():
    element = rad75.encode_request(REQUEST)
    names = {child.tag for child in element.iter() if xml.local_name(child) == "DocumentRequest"}
    assert names == {xml.qname(uids.NS_XDSB, "DocumentRequest")}
    assert [xml.local_name(child) for child in element] == ["StudyRequest", "StudyRequest", "TransferSyntaxUIDList"]


def test_every_document_with_its_study_and_series():
    assert [(study, series, document.document_unique_id) for study, series, document in REQUEST] == [
        ("1.2.1", "1.2.1.1", "1.2.3.0"),
        ("1.2.1", "1.2.1.1", "1.2.3.1"),
        ("1.2.1", "1.2.1.2", "1.2.3.2"),
        ("1.2.2", "1.2.2.1", "1.2.9"),
    ]
    assert len(REQUEST) == 4


def test_a_part_of_a_request_keeps_its_place():
    """What a gateway passes on: no empty series or study, the same syntaxes."""
    assert REQUEST.only([C]) == RetrieveImagingRequest(
        (StudyRequest("1.2.1", (SeriesRequest("1.2.1.2", (C,)),)),), REQUEST.transfer_syntax_uids
    )
    assert REQUEST.only(document for _, _, document in REQUEST) == REQUEST
    assert len(REQUEST.only([])) == 0


@pytest.mark.parametrize(
    "response",
    [RetrieveResponse(response_to(found=3), _DOCUMENTS), RetrieveResponse(response_to([ERROR]))],
    ids=["success", "failure"],
)
def test_answers_are_those_of_a_document_set(response):
    for module in (rad69, rad75):
        element = module.encode_response(response)
        schemas.assert_valid(element)
        assert module.decode_response(element).documents == response.documents


# --- Tolerance --------------------------------------------------------------------------------------------------------

_DOCUMENT = (
    "<{p}:DocumentRequest><{p}:HomeCommunityId>urn:oid:1.9</{p}:HomeCommunityId>"
    "<{p}:RepositoryUniqueId>1.8.0</{p}:RepositoryUniqueId><{p}:DocumentUniqueId>1.2.3.0</{p}:DocumentUniqueId>"
    "</{p}:DocumentRequest>"
)
_XDSB, _RAD = _DOCUMENT.format(p="b"), _DOCUMENT.format(p="r")
_LIST = (
    "<r:TransferSyntaxUIDList><r:TransferSyntaxUID>1.2.840.10008.1.2.1</r:TransferSyntaxUID></r:TransferSyntaxUIDList>"
)


def _study(document: str, study: str = 'studyInstanceUID="1.2.1"', series: str = 'seriesInstanceUID="1.2.1.1"') -> str:
    return f"<r:StudyRequest {study}><r:SeriesRequest {series}>{document}</r:SeriesRequest></r:StudyRequest>"


def _parse(content: str) -> etree._Element:
    root = "r:RetrieveImagingDocumentSetRequest"
    return xml.parse(f'<{root} xmlns:r="{uids.NS_XDSI}" xmlns:b="{uids.NS_XDSB}">{content}</{root}>'.encode())


_EXPECTED = RetrieveImagingRequest(
    (StudyRequest("1.2.1", (SeriesRequest("1.2.1.1", (A,)),)),), (uids.EXPLICIT_VR_LITTLE_ENDIAN,)
)


@pytest.mark.parametrize(
    "content",
    [_study(_XDSB) + _LIST, _study(_RAD) + _LIST, _LIST + _study(_XDSB)],
    ids=["exact", "DocumentRequest in the namespace of XDS-I.b", "list first"],
)
def test_what_is_read_though_the_schema_says_otherwise(content):
    assert rad69.decode_request(_parse(content)) == _EXPECTED


def test_empty_values_are_read():
    """They fail their documents with XDSRepositoryError, not the message with a fault."""
    empty = "<r:TransferSyntaxUIDList><r:TransferSyntaxUID/></r:TransferSyntaxUIDList>"
    request = rad69.decode_request(_parse(_study(_XDSB, 'studyInstanceUID=""', 'seriesInstanceUID=" "') + empty))
    assert list(request) == [("", "", A)]
    assert request.transfer_syntax_uids == ("",)
    none = rad69.decode_request(_parse(_study(_XDSB) + "<r:TransferSyntaxUIDList/>"))
    assert none.transfer_syntax_uids == ()


@pytest.mark.parametrize(
    "content",
    [
        "",
        _LIST,
        _study(_XDSB),
        _study(_XDSB) + _LIST + _LIST,
        _study("") + _LIST,
        '<r:StudyRequest studyInstanceUID="1.2.1"/>' + _LIST,
        _study(_XDSB, study="") + _LIST,
        _study(_XDSB, series="") + _LIST,
        _study("<b:DocumentRequest/>") + _LIST,
    ],
    ids=[
        "nothing",
        "no study",
        "no list",
        "two lists",
        "empty series",
        "empty study",
        "no study UID",
        "no series UID",
        "document without ids",
    ],
)
def test_what_is_no_request(content):
    with pytest.raises(MalformedMessage):
        rad69.decode_request(_parse(content))


def test_requests_of_the_conformance_data():
    files = sorted(shared_path("conformance/data/requests").glob("*.xml"))
    assert len(files) == 12
    for file in files:
        body = xml.parse(file.read_bytes())
        request = rad69.decode_request(body)
        assert rad75.decode_request(body) == request
        again = rad69.encode_request(request)
        assert rad69.decode_request(again) == request
        schemas.assert_valid(body)
        schemas.assert_valid(again)
        assert [child.text for child in again.iter("{*}DocumentUniqueId")] == [
            child.text for child in body.iter("{*}DocumentUniqueId")
        ]
