"""Messages of Apache CXF with IPF, byte for byte: what another stack writes is read, and written again it is valid."""

from __future__ import annotations

import pytest
from lxml import etree

from tests.support.feeding import feed_bytewise, feed_whole
from tests.support.shared import shared_path
from tests.transactions import schemas
from xca_imaging import uids
from xca_imaging.metadata.model import ObjectRef
from xca_imaging.metadata.stored_query import FindDocuments
from xca_imaging.metadata.validate import validate_submission
from xca_imaging.transactions import iti18, iti38, iti39, iti41, iti42, iti43, rad69, rad75
from xca_imaging.wire import mtom, soap, xml
from xca_imaging.wire.mtom import Reference

HOME = "urn:oid:2.25.30411.7.1"


def _http(name: str) -> tuple[str, bytes]:
    """Return Content-Type and body of a recorded HTTP message, chunked coding undone (RFC 9112, 7.1)."""
    head, _, body = shared_path(f"examples/cxf/{name}.http").read_bytes().partition(b"\r\n\r\n")
    fields = {}
    for line in head.decode("latin-1").split("\r\n")[1:]:
        key, _, value = line.partition(":")
        fields[key.lower()] = value.strip()
    if fields.get("transfer-encoding") == "chunked":
        whole = b""
        while body:
            size, _, body = body.partition(b"\r\n")
            whole += body[: int(size, 16)]
            body = body[int(size, 16) + 2 :]
            if not int(size, 16):
                break
        body = whole
    return fields["content-type"], body


def _keep(event):
    return bytes(event.view) if isinstance(event, mtom.AttachmentData) else event


def body_of(name: str) -> tuple[etree._Element, dict[str, bytes]]:
    """Return the child of the SOAP body and the attachments, the same whether fed whole or byte by byte."""
    content_type, data = _http(name)
    roots = []
    for feed in (feed_whole, feed_bytewise):
        reader = mtom.Reader(content_type)
        events = feed(reader, data, _keep) + reader.close()
        (root,) = (event for event in events if isinstance(event, mtom.Root))
        attachments: dict[str, bytes] = {}
        current = ""
        for event in events:
            if isinstance(event, mtom.AttachmentStart):
                current = event.content_id
                attachments[current] = b""
            elif isinstance(event, bytes):
                attachments[current] += event
        roots.append((root, attachments))
    assert roots[0] == roots[1]
    root, attachments = roots[0]
    body = soap.read_envelope(xml.parse(root.data, charset=root.charset)).body
    assert body is not None
    schemas.assert_valid(body)
    return body, attachments


def test_iti38():
    query = iti38.decode_request(body_of("iti38-leafclass-request")[0])
    assert query.return_type == "LeafClass"
    assert query.home_community_id == HOME
    assert query.query == FindDocuments(patient_id="CXF-0001^^^&2.25.30411.7.99&ISO", status=(uids.APPROVED,))
    schemas.assert_valid(iti38.encode_request(query))
    response = iti38.decode_response(body_of("iti38-leafclass-response")[0])
    assert response.succeeded
    assert response.problems == ()
    (entry,) = response.objects.documents
    assert entry.home_community_id == HOME
    assert entry.unique_id == "2.25.30411.7.20.1"
    assert entry.title == "Thorax, synthetic"
    assert entry.version == "1"
    assert entry.study_instance_uids == ("2.25.30411.7.10",)
    assert entry.authors[0].person == "^Writer^Ada"
    again = iti38.encode_response(response)
    schemas.assert_valid(again)
    assert iti38.decode_response(again) == response


def test_iti38_in_latin_1():
    assert iti38.decode_response(body_of("iti38-latin1-response")[0]).objects.documents


def test_iti18():
    query = iti18.decode_request(body_of("iti18-objectref-request")[0])
    assert query.return_type == "ObjectRef"
    response = iti18.decode_response(body_of("iti18-objectref-response")[0])
    assert response.succeeded
    assert response.refs
    assert all(isinstance(ref, ObjectRef) for ref in response.refs)
    assert not list(response.objects)


@pytest.mark.parametrize(("module", "name", "home"), [(iti39, "iti39", HOME), (iti43, "iti43", None)])
def test_documents(module, name, home):
    request = module.decode_request(body_of(f"{name}-request")[0])
    (asked,) = request.documents
    assert asked.home_community_id == home
    body, attachments = body_of(f"{name}-response")
    response = module.decode_response(body)
    (document,) = response.documents
    assert response.registry.succeeded
    assert document.answers(asked)
    assert document.mime_type == "application/dicom"
    assert isinstance(document.content, Reference)
    assert len(attachments[document.content.content_id]) == 2140


def test_iti41():
    body, attachments = body_of("iti41-request")
    request = iti41.decode_request(body)
    assert request.unmatched() == []
    assert validate_submission(request.submission, repository_side=True) == []
    (content,) = request.documents.values()
    assert isinstance(content, Reference)
    assert content.content_id in attachments
    again = iti41.encode_request(request)
    schemas.assert_valid(again)
    assert iti41.decode_request(again) == request
    assert iti41.decode_response(body_of("iti41-response")[0]).succeeded


def test_iti42():
    submission = iti42.decode_request(body_of("iti42-refused-request")[0])
    assert len(submission.documents) == 1
    schemas.assert_valid(iti42.encode_request(submission))
    response = iti42.decode_response(body_of("iti42-refused-response")[0])
    assert response.status == uids.STATUS_FAILURE
    assert [error.code for error in response.errors] == ["XDSUnknownPatientId"]


def test_rad69():
    request = rad69.decode_request(body_of("rad69-request")[0])
    body, attachments = body_of("rad69-response")
    response = rad69.decode_response(body)
    assert len(request) == len(response.documents) == 2
    for _, _, asked in request:
        (document,) = (item for item in response.documents if item.answers(asked))
        assert isinstance(document.content, Reference)
        assert attachments[document.content.content_id][128:132] == b"DICM"


def test_rad75_partial():
    """Seven asked, six given, the seventh named in an error."""
    request = rad75.decode_request(body_of("rad75-partial-request")[0])
    response = rad75.decode_response(body_of("rad75-partial-response")[0])
    assert len(request) == 7
    assert len(response.documents) == 6
    assert response.registry.status == uids.STATUS_PARTIAL_SUCCESS
    assert [error.code for error in response.registry.errors] == ["XDSDocumentUniqueIdError"]
    lost = [asked for _, _, asked in request if not any(item.answers(asked) for item in response.documents)]
    assert len(lost) == 1
    (error,) = response.registry.errors
    assert lost[0].document_unique_id in error.context + error.location


def test_rad75_asynchronous_reply():
    assert len(rad75.decode_request(body_of("rad75-async-1-request")[0])) == 1
    assert len(rad75.decode_response(body_of("rad75-async-3-reply")[0]).documents) == 1
