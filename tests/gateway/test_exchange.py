"""One SOAP request through `Exchange`, over real HTTP: packaging, keep-alive, errors, cancellation."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from xca_imaging import errors, uids
from xca_imaging.gateway import exchange
from xca_imaging.gateway.callers import Callers
from xca_imaging.gateway.delivery import Part
from xca_imaging.gateway.documents import refuse_query, refuse_retrieval
from xca_imaging.gateway.exchange import Answer, Context, Exchange, Operation
from xca_imaging.imaging.spool import Spool
from xca_imaging.operations.metrics import Metrics
from xca_imaging.settings import Limits, Node, Settings
from xca_imaging.transactions import iti18, iti43
from xca_imaging.transactions.document_set import DocumentRequest, DocumentResponse, RetrieveRequest, RetrieveResponse
from xca_imaging.transactions.registry_response import response_to
from xca_imaging.transactions.table import Transaction
from xca_imaging.wire import addressing, mtom, soap, xml

CONTENT = bytes(range(256)) * 4096  # 1 MiB: several chunks


def request(transaction: Transaction, *, version: str = uids.NS_SOAP12, reply_to: str = uids.WSA_ANONYMOUS) -> bytes:
    headers = addressing.request_headers(transaction.request_action, "http://x/", "urn:uuid:1", reply_to)
    body = iti43.encode_request(RetrieveRequest((DocumentRequest(None, "1.2", "1.3"),)))
    return soap.write_envelope(headers, body).replace(uids.NS_SOAP12.encode(), version.encode())


def retrieval(perform: Callable[[object, Context], Awaitable[Answer]]) -> Operation:
    return Operation(iti43.TRANSACTION, iti43.decode_request, perform, refuse_retrieval)


async def one_document(asked: object, context: Context) -> Answer:
    with tempfile.NamedTemporaryFile(delete=False) as file:
        file.write(CONTENT)
    context.resources.callback(os.unlink, file.name)
    document = DocumentResponse(None, "1.2", "1.3", uids.MIME_DICOM, mtom.Reference("a@b"))
    body = iti43.encode_response(RetrieveResponse(response_to(found=1), (document,)))
    return Answer(body, [Part("a@b", uids.MIME_DICOM, len(CONTENT), Path(file.name))])


def settings(folder: Path) -> Settings:
    return Settings(file=folder / "node.toml", node=Node(home_community_id="urn:oid:1.2.3"))


@asynccontextmanager
async def serving(tmp_path: Path, operation: Operation, **limits: float) -> AsyncIterator[str]:
    spool = Spool(tmp_path / "spool", max_bytes=10**7, retention=60)
    soap_exchange = Exchange(spool, Limits(**limits), Metrics(), Callers(settings(tmp_path)))
    by_action = {operation.transaction.request_action: operation}

    async def handle(http: web.Request) -> web.StreamResponse:
        return await soap_exchange.handle(http, by_action)

    application = web.Application()
    application.router.add_post("/", handle)
    runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/"
    finally:
        await runner.cleanup()
        assert spool.used_bytes == 0
        spool.close()


async def post(url: str, data: bytes, content_type: str = "application/soap+xml") -> tuple[int, dict[str, str], bytes]:
    async with (
        aiohttp.ClientSession() as session,
        session.post(url, data=data, headers={"Content-Type": content_type}) as response,
    ):
        return response.status, dict(response.headers), await response.read()


def read(headers: dict[str, str], body: bytes) -> tuple[soap.Envelope, dict[str, bytes]]:
    reader = mtom.Reader(headers["Content-Type"])
    envelope: soap.Envelope | None = None
    attachments: dict[str, bytearray] = {}
    current = ""
    for event in [*reader.receive(body), *reader.close()]:
        match event:
            case mtom.Root(data=data, charset=charset):
                envelope = soap.read_envelope(xml.parse(data, charset=charset))
            case mtom.AttachmentStart(content_id=content_id):
                current = content_id
                attachments[current] = bytearray()
            case mtom.AttachmentData(view=view):
                attachments[current] += view
    assert envelope is not None
    return envelope, {key: bytes(value) for key, value in attachments.items()}


async def test_a_document_comes_with_its_length_and_bytes(tmp_path: Path) -> None:
    async with serving(tmp_path, retrieval(one_document)) as url:
        status, headers, body = await post(url, request(iti43.TRANSACTION))
    assert status == 200
    assert int(headers["Content-Length"]) == len(body)
    envelope, attachments = read(headers, body)
    assert attachments == {"a@b": CONTENT}
    assert addressing.read_response(envelope).relates_to == "urn:uuid:1"
    assert addressing.read_response(envelope).action == uids.ITI43_RESPONSE


async def test_a_slow_answer_is_kept_alive_by_its_preamble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "_KEEP_ALIVE_AFTER", 0.05)
    monkeypatch.setattr(exchange, "_KEEP_ALIVE_EVERY", 0.05)

    async def slow(asked: object, context: Context) -> Answer:
        await asyncio.sleep(0.3)
        return await one_document(asked, context)

    async with serving(tmp_path, retrieval(slow)) as url:
        status, headers, body = await post(url, request(iti43.TRANSACTION))
    assert status == 200
    assert headers["Transfer-Encoding"] == "chunked"
    assert body.index(b"--") > 20  # lines of preamble
    assert read(headers, body)[1] == {"a@b": CONTENT}


async def test_a_failure_after_the_preamble_is_a_whole_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "_KEEP_ALIVE_AFTER", 0.05)

    async def fail(asked: object, context: Context) -> Answer:
        await asyncio.sleep(0.2)
        raise RuntimeError("patient 4711")

    async with serving(tmp_path, retrieval(fail)) as url:
        _, headers, body = await post(url, request(iti43.TRANSACTION))
    fault = soap.read_fault(read(headers, body)[0].body)
    assert fault is not None
    assert fault.code == "Receiver"
    assert b"4711" not in body


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.RepositoryBusy("later"), "XDSRepositoryBusy"),
        (errors.SubmissionRefused([errors.UnknownRepositoryId("x")]), "XDSUnknownRepositoryId"),
        (errors.SpoolFull("no room"), "XDSRepositoryOutOfResources"),
        (errors.PeerBusy("main", "rejected"), "XDSRepositoryBusy"),
        (errors.ConnectFailed("main", "refused"), "XDSRepositoryError"),
    ],
)
async def test_errors_become_registry_errors(tmp_path: Path, error: Exception, code: str) -> None:
    async def fail(asked: object, context: Context) -> Answer:
        raise error

    async with serving(tmp_path, retrieval(fail)) as url:
        status, headers, body = await post(url, request(iti43.TRANSACTION))
    assert status == 200
    response = iti43.decode_response(read(headers, body)[0].body)
    assert response.registry.status == uids.STATUS_FAILURE
    assert [each.code for each in response.registry.errors] == [code]


@pytest.mark.parametrize(
    ("data", "fault_code", "subcode"),
    [
        (request(iti43.TRANSACTION, version=uids.NS_SOAP11), "VersionMismatch", ""),
        (request(iti18.TRANSACTION), "Sender", "ActionNotSupported"),
        (request(iti43.TRANSACTION, reply_to="http://evil/"), "Sender", "OnlyAnonymousAddressSupported"),
        (b"<not xml", "Sender", ""),
        (b"", "Sender", ""),
        (b"<!DOCTYPE a [<!ENTITY b 'c'>]><a>&b;</a>", "Sender", ""),
    ],
)
async def test_what_breaks_soap_is_a_fault(tmp_path: Path, data: bytes, fault_code: str, subcode: str) -> None:
    async with serving(tmp_path, retrieval(one_document)) as url:
        status, headers, body = await post(url, data)
    assert status == 500
    fault = soap.read_fault(read(headers, body)[0].body)
    assert fault is not None
    assert fault.code == fault_code
    assert not subcode or fault.subcodes[-1][1] == subcode


async def test_what_is_not_soap_gets_a_status(tmp_path: Path) -> None:
    async with serving(tmp_path, retrieval(one_document)) as url:
        status, _, _ = await post(url, b"{}", "application/json")
    assert status == 415


async def test_a_client_that_leaves_cancels_its_request(tmp_path: Path) -> None:
    cancelled = asyncio.Event()

    async def wait(asked: object, context: Context) -> Answer:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        raise AssertionError

    async with serving(tmp_path, retrieval(wait)) as url:
        with pytest.raises(asyncio.TimeoutError):
            async with asyncio.timeout(0.3):
                await post(url, request(iti43.TRANSACTION))
        async with asyncio.timeout(1):
            await cancelled.wait()


async def test_a_client_that_sends_nothing_more_is_dropped(tmp_path: Path) -> None:
    async with serving(tmp_path, retrieval(one_document), stall_timeout=0.2) as url:
        host, port = url.removeprefix("http://").rstrip("/").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\nContent-Type: text/xml\r\n\r\n<a")
        async with asyncio.timeout(5):
            assert (await reader.readline()).split()[1] == b"408"
        writer.close()


async def test_a_client_that_takes_nothing_is_cut_off_and_lets_go(tmp_path: Path) -> None:
    released = asyncio.Event()

    async def large(asked: object, context: Context) -> Answer:
        path = tmp_path / "large"
        with path.open("wb") as file:
            file.truncate(64 << 20)  # more than any socket buffer
        context.resources.callback(released.set)
        document = DocumentResponse(None, "1.2", "1.3", uids.MIME_DICOM, mtom.Reference("a@b"))
        body = iti43.encode_response(RetrieveResponse(response_to(found=1), (document,)))
        return Answer(body, [Part("a@b", uids.MIME_DICOM, 64 << 20, path)])

    async with serving(tmp_path, retrieval(large), stall_timeout=0.5) as url:
        host, port = url.removeprefix("http://").rstrip("/").split(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
        body = request(iti43.TRANSACTION)
        head = (
            f"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/soap+xml\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        async with asyncio.timeout(10):
            await released.wait()
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await reader.readexactly(64 << 20)
        writer.close()


async def test_a_body_that_breaks_its_transfer_coding_is_refused(tmp_path: Path) -> None:
    async with serving(tmp_path, retrieval(one_document)) as url:
        host, port = url.removeprefix("http://").rstrip("/").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(
            b"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/soap+xml\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n3\r\n<a>\r\nnonsense\r\n"
        )
        async with asyncio.timeout(5):
            assert (await reader.readline()).split()[1] == b"400"
        writer.close()


async def test_a_defect_in_reading_is_a_receiver_fault(tmp_path: Path) -> None:
    def broken(body: object) -> object:
        raise KeyError("patient 4711")

    operation = Operation(iti43.TRANSACTION, broken, one_document, refuse_retrieval)
    async with serving(tmp_path, operation) as url:
        status, headers, body = await post(url, request(iti43.TRANSACTION))
    fault = soap.read_fault(read(headers, body)[0].body)
    assert status == 500
    assert fault is not None
    assert fault.code == "Receiver"
    assert b"4711" not in body


def test_a_refused_query_is_a_schema_valid_failure() -> None:
    response = iti18.decode_response(refuse_query([errors.UnknownStoredQuery("x")]))
    assert response.status == uids.STATUS_FAILURE
