"""Outbound SOAP: one request to a peer, its answer read as it arrives.

The answer is never in memory as a whole: the root part is (bounded by `max_root`), attachments go to the sink that
the caller gives for each. An answer that ends before its closing boundary, its Content-Length or its last chunk is an
error, never a short answer: clients that miss one of the three take a cut study for a whole one.

References
----------
* IHE ITI TF-2, Appendix V (web services); W3C SOAP MTOM, XOP; RFC 2387
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import ssl
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import aiohttp
from lxml import etree

from xca_imaging import uids
from xca_imaging.errors import (
    ConnectFailed,
    PeerBusy,
    PeerFault,
    PeerProtocolError,
    PeerRefused,
    PeerTimeout,
    RegistryError,
    RemoteProtocolError,
    SubmissionRefused,
    mapped,
)
from xca_imaging.metadata.model import Submission
from xca_imaging.metadata.stored_query import StoredQuery
from xca_imaging.transactions import iti18, iti38, iti39, iti41, iti43, iti57, rad69, rad75
from xca_imaging.transactions.adhoc_query import QueryResponse
from xca_imaging.transactions.document_set import DocumentRequest, RetrieveRequest, RetrieveResponse
from xca_imaging.transactions.imaging_document_set import RetrieveImagingRequest
from xca_imaging.transactions.registry_response import RegistryResponse
from xca_imaging.transactions.submission import ProvideRequest
from xca_imaging.transactions.table import Transaction
from xca_imaging.wire import addressing, mtom, multipart, soap, xml

log = logging.getLogger(__name__)

_MAX_ROOT = 64 * 10**6  # bytes: an answer of 5000 LeafClass entries is about 40 MB
_MAX_SMALL_DOCUMENT = 64 * 10**6  # bytes: a manifest of 200 000 instances is about 40 MB
_CONNECT_TIMEOUT = 10.0  # s: TCP and TLS; a gateway that takes longer is away


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a peer answers: its name for messages, URL, and seconds without progress that mean it is away."""

    peer: str
    url: str
    timeout: float


class PartSink(Protocol):
    """Takes the bytes of one attachment."""

    def write(self, data: memoryview) -> None: ...

    def finish(self) -> None:
        """The part is whole."""

    def abandon(self) -> None:
        """It never will be; nothing of it stays."""


class MemorySink:
    """Holds a small document, bounded."""

    def __init__(self, limit: int = _MAX_SMALL_DOCUMENT) -> None:
        self._limit = limit
        self._data = bytearray()

    def write(self, data: memoryview) -> None:
        if len(self._data) + len(data) > self._limit:
            raise RemoteProtocolError(f"a document of more than {self._limit} bytes where a manifest was asked for")
        self._data += data

    def finish(self) -> None:
        pass

    def abandon(self) -> None:
        self._data.clear()

    @property
    def content(self) -> bytes:
        return bytes(self._data)


SinkFactory = Callable[[str, str], PartSink]
"""Called with content id and content type of each attachment as it begins."""


@dataclass(slots=True)
class Reply:
    """A whole answer: body element, addressing, and the finished sink of each attachment by its content id."""

    body: etree._Element
    addressing: addressing.Addressing
    sinks: dict[str, PartSink] = field(default_factory=dict)


class SoapClient:
    """Calls SOAP endpoints of other systems, or of this node.

    Parameters
    ----------
    tls : ssl.SSLContext or None
        For https: our certificate and the peers that we trust.
    """

    def __init__(self, *, tls: ssl.SSLContext | None = None) -> None:
        self._connector = aiohttp.TCPConnector(ssl=tls if tls is not None else True, limit=0)
        self._session = aiohttp.ClientSession(connector=self._connector, auto_decompress=False)

    async def __aenter__(self) -> SoapClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def call(
        self,
        endpoint: Endpoint,
        transaction: Transaction,
        body: etree._Element,
        *,
        attachments: Mapping[str, bytes] | None = None,
        sink_factory: SinkFactory = lambda content_id, content_type: MemorySink(),
        on_body: Callable[[etree._Element], None] = lambda body: None,
        max_parts: int = 10_000,
        message_id: str = "",
    ) -> Reply:
        """Send one request and read its answer.

        `on_body` gets the body of an answer as soon as it is there, usually before the attachments.

        Raises
        ------
        ConnectFailed, PeerTimeout, PeerBusy, PeerRefused, PeerFault, PeerProtocolError
        """
        message_id = message_id or f"urn:uuid:{uuid.uuid4()}"
        headers = addressing.request_headers(transaction.request_action, endpoint.url, message_id)
        envelope = soap.write_envelope(headers, body)
        content_type, data = _package(transaction, envelope, attachments or {})
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT, sock_read=endpoint.timeout)
        table = {
            aiohttp.ClientConnectorError: ConnectFailed,
            aiohttp.ServerTimeoutError: PeerTimeout,
            asyncio.TimeoutError: PeerTimeout,
            aiohttp.InvalidURL: ConnectFailed,
            aiohttp.ClientPayloadError: PeerProtocolError,
            aiohttp.ClientError: PeerProtocolError,
            OSError: ConnectFailed,
        }
        log.debug("%s to %s (%s), message %s", transaction.name, endpoint.peer, endpoint.url, message_id)
        with mapped(table, endpoint.peer):
            async with self._session.post(
                endpoint.url, data=data, headers={"Content-Type": content_type}, timeout=timeout, allow_redirects=False
            ) as response:
                return await self._read(endpoint, response, sink_factory, on_body, max_parts)

    async def _read(
        self,
        endpoint: Endpoint,
        response: aiohttp.ClientResponse,
        sink_factory: SinkFactory,
        on_body: Callable[[etree._Element], None],
        max_parts: int,
    ) -> Reply:
        content_type = response.headers.get("Content-Type", "")
        if response.status == 503:
            raise PeerBusy(endpoint.peer, f"HTTP 503 {response.reason}")
        if response.status != 200 and not content_type.startswith(("multipart/related", "application/soap+xml")):
            raise PeerRefused(endpoint.peer, f"HTTP {response.status} {response.reason}")
        reply: Reply | None = None
        sinks: dict[str, PartSink] = {}
        open_sink: PartSink | None = None
        try:
            reader = mtom.Reader(content_type, max_root=_MAX_ROOT, max_parts=max_parts)
            ended = False
            while not ended:
                chunk = await response.content.readany()
                ended = not chunk
                for event in reader.close() if ended else reader.receive(chunk):
                    match event:
                        case mtom.Root(data=data, charset=charset):
                            root = xml.parse(data, charset=charset, max_bytes=_MAX_ROOT)
                            reply = _open_answer(endpoint, response, root)
                            on_body(reply.body)
                        case mtom.AttachmentStart(content_id=content_id, content_type=part_type):
                            open_sink = sinks[content_id] = sink_factory(content_id, part_type)
                        case mtom.AttachmentData(view=view) if open_sink is not None:
                            open_sink.write(view)
                        case mtom.AttachmentEnd() if open_sink is not None:
                            open_sink.finish()
                            open_sink = None
                        case _:
                            pass
            if reply is None:
                raise PeerProtocolError(endpoint.peer, "the answer has no SOAP part")
            reply.sinks.update(sinks)
            return reply
        except RemoteProtocolError as exc:
            raise PeerProtocolError(endpoint.peer, str(exc)) from exc
        finally:
            if open_sink is not None:
                open_sink.abandon()

    # ------------------------------------------------------------------------------------------------------------------
    # Transactions
    # ------------------------------------------------------------------------------------------------------------------

    async def stored_query(
        self, endpoint: Endpoint, query: StoredQuery, *, cross_gateway: bool = False
    ) -> QueryResponse:
        """ITI-18, or ITI-38 to another community."""
        codec = iti38 if cross_gateway else iti18
        reply = await self.call(endpoint, codec.TRANSACTION, codec.encode_request(query))
        with _answer_of(endpoint):
            response: QueryResponse = codec.decode_response(reply.body)
        return response

    async def provide_and_register(
        self, endpoint: Endpoint, submission: Submission, documents: Mapping[str, bytes]
    ) -> RegistryResponse:
        """ITI-41 / RAD-68: `documents` by DocumentEntry id."""
        names = {entry: f"{index}.{uuid.uuid4()}@xca-imaging" for index, entry in enumerate(documents, 1)}
        references = {entry: mtom.Reference(name) for entry, name in names.items()}
        body = iti41.encode_request(ProvideRequest(submission, references))
        attachments = {names[entry]: content for entry, content in documents.items()}
        reply = await self.call(endpoint, iti41.TRANSACTION, body, attachments=attachments)
        with _answer_of(endpoint):
            return iti41.decode_response(reply.body)

    async def update_document_set(self, endpoint: Endpoint, submission: Submission) -> RegistryResponse:
        """ITI-57."""
        reply = await self.call(endpoint, iti57.TRANSACTION, iti57.encode_request(submission))
        with _answer_of(endpoint):
            return iti57.decode_response(reply.body)

    async def retrieve_documents(
        self, endpoint: Endpoint, documents: Sequence[DocumentRequest], *, cross_gateway: bool = False
    ) -> tuple[RetrieveResponse, dict[str, bytes]]:
        """ITI-43, or ITI-39 to another community: the answer, and the content of each document by its unique id."""
        codec = iti39 if cross_gateway else iti43
        body = codec.encode_request(RetrieveRequest(tuple(documents)))
        reply = await self.call(endpoint, codec.TRANSACTION, body, max_parts=len(documents) + 16)
        with _answer_of(endpoint):
            response = codec.decode_response(reply.body)
            contents = {}
            for document in response.documents:
                content = document.content
                if isinstance(content, mtom.Reference):
                    sink = reply.sinks.get(content.content_id)
                    if not isinstance(sink, MemorySink):
                        raise RemoteProtocolError(f"no part with Content-ID {content.content_id!r}")
                    content = sink.content
                contents[document.document_unique_id] = content
        return response, contents

    async def retrieve_imaging(
        self,
        endpoint: Endpoint,
        request: RetrieveImagingRequest,
        sink_factory: SinkFactory,
        on_response: Callable[[RetrieveResponse], None],
        *,
        cross_gateway: bool = False,
        message_id: str = "",
    ) -> None:
        """RAD-69, or RAD-75 to another community.

        `on_response` gets the typed answer when its root part is there; the attachments that it names have gone to
        their sinks when this returns.
        """
        codec = rad75 if cross_gateway else rad69

        def read_response(body: etree._Element) -> None:
            with _answer_of(endpoint):
                on_response(codec.decode_response(body))

        await self.call(
            endpoint,
            codec.TRANSACTION,
            codec.encode_request(request),
            sink_factory=sink_factory,
            on_body=read_response,
            max_parts=sum(1 for _ in request) + 16,
            message_id=message_id,
        )


def _open_answer(endpoint: Endpoint, response: aiohttp.ClientResponse, root: etree._Element) -> Reply:
    """Return the answer that a SOAP part holds; a fault is raised, whatever the HTTP status says."""
    envelope = soap.read_envelope(root)
    if envelope.body is None:
        raise PeerProtocolError(endpoint.peer, "the answer has an empty SOAP body")
    fault = soap.read_fault(envelope.body)
    if fault is not None:
        raise PeerFault(endpoint.peer, fault.subcodes[-1][1] if fault.subcodes else fault.code, fault.reason)
    if response.status != 200:
        raise PeerRefused(endpoint.peer, f"HTTP {response.status} {response.reason}")
    return Reply(envelope.body, addressing.read_response(envelope))


@contextmanager
def _answer_of(endpoint: Endpoint) -> Iterator[None]:
    """Blame the peer for an answer that cannot be read as its transaction."""
    try:
        yield
    except (RemoteProtocolError, RegistryError, SubmissionRefused) as exc:
        raise PeerProtocolError(endpoint.peer, str(exc)) from exc


def _package(transaction: Transaction, envelope: bytes, attachments: Mapping[str, bytes]) -> tuple[str, bytes]:
    """Return Content-Type and bytes of a request; attachments are manifests and reports, which are small."""
    if not transaction.mtom:
        return f'application/soap+xml; charset=UTF-8; action="{transaction.request_action}"', envelope
    writer = mtom.Writer(multipart.new_boundary(secrets.token_bytes(24)), "root@xca-imaging")
    pieces = [writer.root(envelope)]
    for content_id, content in attachments.items():
        pieces += [writer.attachment_header(content_id, uids.MIME_DICOM), content, writer.attachment_end()]
    pieces.append(writer.end())
    return writer.content_type, b"".join(pieces)
