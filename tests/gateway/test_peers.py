"""What other people's servers answer, replayed byte by byte, and cut short."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.support.shared import shared_path
from xca_imaging import errors, uids
from xca_imaging.gateway.peers import Endpoint, MemorySink, SoapClient
from xca_imaging.metadata.stored_query import FindDocuments, StoredQuery
from xca_imaging.transactions.document_set import DocumentRequest, RetrieveResponse
from xca_imaging.transactions.imaging_document_set import RetrieveImagingRequest, SeriesRequest, StudyRequest

QUERY = StoredQuery(FindDocuments(patient_id="1^^^&1.2&ISO", status=(uids.APPROVED,)))


def recorded(name: str) -> bytes:
    return shared_path(f"examples/cxf/{name}.http").read_bytes()


@asynccontextmanager
async def replaying(answer: bytes, *, pause: float = 0.0) -> AsyncIterator[Endpoint]:
    """Serve one recorded HTTP response, whatever is asked, and close."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
            assert length is not None
            await reader.readexactly(int(length[1]))
            await asyncio.sleep(pause)
            writer.write(answer)
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        yield Endpoint("East", f"http://127.0.0.1:{port}/x", 2.0)
        await asyncio.sleep(pause)  # until it has noticed that its client is gone


def asked(count: int) -> RetrieveImagingRequest:
    documents = tuple(DocumentRequest(None, "1.2", f"1.2.{index}") for index in range(count))
    return RetrieveImagingRequest(
        (StudyRequest("1.2.3", (SeriesRequest("1.2.4", documents),)),), (uids.EXPLICIT_VR_LITTLE_ENDIAN,)
    )


async def images(answer: bytes) -> tuple[list[RetrieveResponse], dict[str, MemorySink]]:
    sinks: dict[str, MemorySink] = {}
    responses: list[RetrieveResponse] = []

    def sink(content_id: str, content_type: str) -> MemorySink:
        return sinks.setdefault(content_id, MemorySink())

    async with replaying(answer) as endpoint, SoapClient() as client:
        await client.retrieve_imaging(endpoint, asked(8), sink, responses.append)
    return responses, sinks


async def test_images_of_a_cxf_source() -> None:
    responses, sinks = await images(recorded("rad69-response"))
    assert responses[0].registry.succeeded
    assert len(responses[0].documents) == len(sinks) == 2
    assert all(sink.content[128:132] == b"DICM" for sink in sinks.values())


async def test_a_partial_answer_in_chunks() -> None:
    responses, sinks = await images(recorded("rad75-partial-response"))
    assert responses[0].registry.status == uids.STATUS_PARTIAL_SUCCESS
    assert [error.code for error in responses[0].registry.errors] == ["XDSDocumentUniqueIdError"]
    assert len(sinks) == 6


@pytest.mark.parametrize("name", ["rad69-response", "rad75-partial-response"])
@pytest.mark.parametrize("cut", [1, 5, 60, 600, 2500])
async def test_an_answer_that_was_cut_is_an_error(name: str, cut: int) -> None:
    with pytest.raises(errors.PeerProtocolError):
        await images(recorded(name)[:-cut])


async def test_an_answer_that_ends_by_closing_needs_its_closing_boundary() -> None:
    answer = re.sub(rb"Content-Length: \d+\r\n", b"", recorded("rad69-response"), flags=re.IGNORECASE)
    responses, _ = await images(answer)
    assert responses[0].registry.succeeded
    with pytest.raises(errors.PeerProtocolError):
        await images(answer[: answer.rindex(b"--uuid")])


async def test_a_fault_in_multipart_with_a_bare_status_line() -> None:
    with pytest.raises(errors.PeerFault, match="SOAP fault"):
        await images(recorded("rad69-fault-response"))


async def test_an_addressing_fault() -> None:
    with pytest.raises(errors.PeerFault) as caught:
        await images(recorded("rad69-addressing-fault-response"))
    assert caught.value.code == "MessageAddressingHeaderRequired"


@pytest.mark.parametrize("name", ["iti38-leafclass-response", "iti38-latin1-response"])
async def test_documents_of_a_cxf_gateway(name: str) -> None:
    async with replaying(recorded(name)) as endpoint, SoapClient() as client:
        response = await client.stored_query(endpoint, QUERY, cross_gateway=True)
    assert response.succeeded
    assert all(document.home_community_id for document in response.objects.documents)


async def test_a_manifest_of_a_cxf_repository() -> None:
    async with replaying(recorded("iti43-response")) as endpoint, SoapClient() as client:
        wanted = [DocumentRequest(None, "1.2", "1.3")]
        response, contents = await client.retrieve_documents(endpoint, wanted)
    assert response.registry.succeeded
    assert [content[128:132] for content in contents.values()] == [b"DICM"]


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n", errors.PeerBusy),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\nContent-Type: text/html\r\n\r\n<a/>", errors.PeerRefused),
        (b"HTTP/1.1 302 Found\r\nLocation: http://elsewhere/\r\nContent-Length: 0\r\n\r\n", errors.PeerRefused),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nContent-Type: text/html\r\n\r\n<a/>", errors.PeerProtocolError),
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nContent-Type: application/soap+xml\r\n\r\n<a/>",
            errors.PeerProtocolError,
        ),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", errors.PeerProtocolError),
        (b"SSH-2.0-OpenSSH\r\n", errors.PeerProtocolError),
        (b"", errors.PeerProtocolError),
    ],
)
async def test_what_is_no_answer(answer: bytes, error: type[Exception]) -> None:
    async with replaying(answer) as endpoint, SoapClient() as client:
        with pytest.raises(error, match="East"):
            await client.stored_query(endpoint, QUERY)


async def test_a_silent_peer_times_out() -> None:
    async with replaying(b"", pause=0.5) as endpoint, SoapClient() as client:
        with pytest.raises(errors.PeerTimeout):
            await client.stored_query(Endpoint("East", endpoint.url, 0.2), QUERY)


async def test_nobody_there() -> None:
    async with SoapClient() as client:
        with pytest.raises(errors.ConnectFailed):
            await client.stored_query(Endpoint("East", "http://127.0.0.1:9/x", 2.0), QUERY)
