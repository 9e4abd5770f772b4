"""ITI-43 and ITI-39: documents asked for and returned."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lxml import etree

from tests.metadata.samples import FULL, TEXT, UIDS
from tests.support.shared import shared_path
from tests.transactions import schemas
from tests.transactions.test_registry_response import ERROR, ERRORS, said
from xca_imaging import uids
from xca_imaging.errors import MalformedMessage
from xca_imaging.transactions import iti39, iti43
from xca_imaging.transactions.document_set import (
    DocumentRequest,
    DocumentResponse,
    RetrieveRequest,
    RetrieveResponse,
)
from xca_imaging.transactions.registry_response import RegistryResponse, response_to
from xca_imaging.wire import xml
from xca_imaging.wire.mtom import Reference

REQUESTS = st.builds(DocumentRequest, st.one_of(st.none(), TEXT), TEXT, TEXT)
CONTENTS = st.one_of(st.binary(max_size=40), st.text("abc019.@-", min_size=1, max_size=20).map(Reference))
RESPONSES = st.builds(DocumentResponse, st.one_of(st.none(), UIDS), UIDS, UIDS, FULL, CONTENTS, TEXT, TEXT)


@given(documents=st.lists(REQUESTS, min_size=1, max_size=4), module=st.sampled_from([iti43, iti39]))
def test_a_request_is_read_again(documents, module):
    request = RetrieveRequest(tuple(documents))
    assert module.decode_request(xml.parse(xml.serialize(module.encode_request(request)))) == request


@given(
    documents=st.lists(RESPONSES, max_size=3),
    errors=st.lists(ERRORS, max_size=2),
    module=st.sampled_from([iti43, iti39]),
)
def test_an_answer_is_read_again(documents, errors, module):
    response = RetrieveResponse(response_to(errors, found=len(documents)), tuple(documents))
    decoded = module.decode_response(xml.parse(xml.serialize(module.encode_response(response))))
    assert decoded.documents == response.documents
    assert decoded.registry.status == response.registry.status
    assert said(decoded.registry.errors) == said(response.registry.errors)


def test_a_request_is_valid():
    request = RetrieveRequest((DocumentRequest("urn:oid:1.2", "1.3", "1.4"), DocumentRequest(None, "1.3", "1.5")))
    element = iti39.encode_request(request)
    schemas.assert_valid(element)
    assert len(element[0]) == 3
    assert len(element[1]) == 2  # no home asked, none written


_DOCUMENTS = (
    DocumentResponse("urn:oid:1.2", "1.3", "1.4", "application/dicom", Reference("part-1@example")),
    DocumentResponse(None, "1.3", "1.5", "text/plain", b"inline", "1.6", "1.7"),
    DocumentResponse(None, "1.3", "1.8", "text/plain", b""),
)


@pytest.mark.parametrize(
    "response",
    [
        RetrieveResponse(response_to(found=3), _DOCUMENTS),
        RetrieveResponse(response_to([ERROR], found=3), _DOCUMENTS),
        RetrieveResponse(response_to([ERROR])),
    ],
    ids=["success", "partial", "failure"],
)
def test_an_answer_is_valid(response):
    schemas.assert_valid(iti43.encode_response(response))


def test_an_include_stands_alone_in_its_document():
    """XOP 2.1: no other content, no white space."""
    element = iti43.encode_response(RetrieveResponse(response_to(found=1), _DOCUMENTS[:1]))
    document = element.find("{*}DocumentResponse/{*}Document")
    assert document.text is None
    (include,) = document
    assert include.tail is None
    assert include.get("href") == "cid:part-1@example"


@pytest.mark.parametrize(
    ("asked", "returned", "same"),
    [
        (("urn:oid:1.2", "1.3", "1.4"), ("urn:oid:1.2", "1.3", "1.4"), True),
        ((None, "1.3", "1.4"), ("urn:oid:1.2", "1.3", "1.4"), True),
        (("urn:oid:1.2", "1.3", "1.4"), (None, "1.3", "1.4"), True),
        (("urn:oid:1.2", "1.3", "1.4"), ("", "1.3", "1.4"), True),
        (("urn:oid:1.2", "1.3", "1.4"), ("urn:oid:1.9", "1.3", "1.4"), False),
        ((None, "1.3", "1.4"), (None, "1.9", "1.4"), False),
        ((None, "1.3", "1.4"), (None, "1.3", "1.9"), False),
    ],
)
def test_which_request_an_answer_belongs_to(asked, returned, same):
    assert DocumentResponse(*returned, "application/dicom", b"").answers(DocumentRequest(*asked)) is same


def _parse(content: str, root: str = "RetrieveDocumentSetRequest") -> etree._Element:
    return xml.parse(f'<{root} xmlns="{uids.NS_XDSB}" xmlns:rs="{uids.NS_RS}">{content}</{root}>'.encode())


def test_white_space_around_ids_is_no_content_and_an_empty_home_is_not_an_absent_one():
    ids = "<RepositoryUniqueId>\n 1.3 </RepositoryUniqueId><DocumentUniqueId/>"
    request = iti43.decode_request(_parse(f"<DocumentRequest><HomeCommunityId/>{ids}</DocumentRequest>"))
    assert request.documents == (DocumentRequest("", "1.3", ""),)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "<Other/>",
        "<DocumentRequest/>",
        "<DocumentRequest><RepositoryUniqueId>1.2</RepositoryUniqueId></DocumentRequest>",
        "<DocumentRequest><DocumentUniqueId>1.2</DocumentUniqueId></DocumentRequest>",
    ],
    ids=["nothing", "something else", "empty", "no document id", "no repository id"],
)
def test_what_is_no_request(content):
    with pytest.raises(MalformedMessage):
        iti43.decode_request(_parse(content))


_OK = f'<rs:RegistryResponse status="{uids.STATUS_SUCCESS}"/>'
_IDS = "<RepositoryUniqueId>1.2</RepositoryUniqueId><DocumentUniqueId>1.3</DocumentUniqueId><mimeType>a/b</mimeType>"


@pytest.mark.parametrize(
    "content",
    [
        "",
        f"<DocumentResponse>{_IDS}<Document/></DocumentResponse>",
        f"{_OK}<DocumentResponse>{_IDS}</DocumentResponse>",
        f"{_OK}<DocumentResponse><Document/></DocumentResponse>",
        f"{_OK}<DocumentResponse>{_IDS}<Document>%%%%</Document></DocumentResponse>",
    ],
    ids=["nothing", "no RegistryResponse", "no Document", "no ids", "no base64"],
)
def test_what_is_no_answer(content):
    with pytest.raises(MalformedMessage):
        iti43.decode_response(_parse(content, "RetrieveDocumentSetResponse"))


def test_children_in_another_order_are_read():
    """The outcome may stand last, and the Document first."""
    content = f"<DocumentResponse><Document>aGk=</Document>{_IDS}</DocumentResponse>{_OK}"
    response = iti43.decode_response(_parse(content, "RetrieveDocumentSetResponse"))
    assert response.documents == (DocumentResponse(None, "1.2", "1.3", "a/b", b"hi"),)
    assert response.registry == RegistryResponse(uids.STATUS_SUCCESS)


def test_requests_of_the_conformance_data():
    files = sorted(shared_path("conformance/data/iti").glob("*/*/*.retrieve.xml"))
    assert files
    for file in files:
        body = xml.parse(file.read_bytes())
        request = iti43.decode_request(body)
        assert iti39.decode_request(body) == request
        assert iti43.decode_request(iti43.encode_request(request)) == request
        schemas.assert_valid(iti43.encode_request(request))
