"""THE PATH of one SOAP request, top to bottom.

`handle` reads the message, finds the operation that its action names at this endpoint, has it performed and writes the
answer; every error becomes a SOAP fault or a RegistryResponse here and nowhere else.

* What is not SOAP at all gets an HTTP status without a body: 415, 408.
* A message that breaks SOAP, WS-Addressing, MIME or the transaction's schema gets a fault, with HTTP 500: clients built
  on Apache CXF lose the reason of a 400.
* A request that was understood and cannot be met gets its transaction's response with RegistryErrors, with HTTP 200.

References
----------
* IHE ITI TF-2, Appendix V; IHE ITI TF-3, 4.2.4; SOAP 1.2 Part 1, 5.4; RFC 2046, 5.1.1 (the preamble is ignored)
"""

from __future__ import annotations

import asyncio
import functools
import logging
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

from aiohttp import HttpVersion11, web
from lxml import etree

from xca_imaging import uids
from xca_imaging.errors import (
    ActionNotSupported,
    InvalidAddressingHeader,
    PeerError,
    RegistryError,
    RemoteProtocolError,
    RepositoryOutOfResources,
    SpoolFull,
    SubmissionRefused,
    XcaImagingError,
)
from xca_imaging.gateway.callers import Caller, Callers
from xca_imaging.gateway.delivery import DeliveryBroken, Output, Part, Stream
from xca_imaging.imaging.spool import Attachment, AttachmentWriter, Spool
from xca_imaging.operations.metrics import Metrics
from xca_imaging.settings import Limits
from xca_imaging.transactions.table import Transaction
from xca_imaging.wire import addressing, mtom, soap, xml

log = logging.getLogger(__name__)

# After this long without an answer the response is begun and kept alive with MIME preamble lines; common client and
# proxy read time-outs are 30 s and 60 s. An answer that is ready before goes out with its Content-Length.
_KEEP_ALIVE_AFTER = 5.0
_KEEP_ALIVE_EVERY = 5.0
_SMALL_ROOT = 256 * 1024  # bytes that are parsed on the event loop: some 5 ms
_LARGE_ROOTS = 2  # parsed at a time: the worst that the limits let pass costs 500 MB as a tree
_MAX_ATTACHMENTS = 10_000  # parts of one request: a submission of so many documents is past any seen


@dataclass(frozen=True, slots=True)
class Answer:
    """What an operation answers: the body (an element, or serialised fragments to be joined) and the parts it names.

    A body whose fragments are read while they are written is an asynchronous generator: only where the transaction is
    not MTOM. Parts that still come are a `Stream`: only where `Context.caller.delivery` says so.
    """

    body: etree._Element | Sequence[bytes] | AsyncGenerator[bytes, None]
    parts: Sequence[Part] | Stream = ()


@dataclass(slots=True)
class Context:
    """What an operation may know of the message beside its typed request.

    `resources` is unwound when the answer has been written or can no longer be: an operation enters there what its
    parts need for so long.
    """

    caller: Caller
    message_id: str
    attachments: Mapping[str, Attachment]
    resources: AsyncExitStack


@dataclass(frozen=True, slots=True)
class Operation:
    """One transaction as one endpoint does it.

    `decode` reads the body, `perform` does it, `refuse` writes the transaction's response that holds nothing but
    errors. Attachments of a transaction that takes none are read past.
    """

    transaction: Transaction
    decode: Callable[[etree._Element | None], Any]
    perform: Callable[[Any, Context], Awaitable[Answer]]
    refuse: Callable[[Sequence[RegistryError]], etree._Element | Sequence[bytes]]
    takes_attachments: bool = False


@dataclass(slots=True)
class _Message:
    """What has been read of a request so far; enough for a fault at any point."""

    is_multipart: bool
    message_id: str = ""
    operation: Operation | None = None
    request: Any = None
    refused: SubmissionRefused | None = None
    attachments: dict[str, Attachment] = field(default_factory=dict)


class Exchange:
    """Reads, dispatches and answers the SOAP messages of all endpoints.

    Parameters
    ----------
    spool : Spool
        Where attachments of requests go.
    limits : Limits
        `root_part` bounds the SOAP part, `stall_timeout` a client that sends nothing.
    callers : Callers
        Who is asking.
    """

    def __init__(self, spool: Spool, limits: Limits, metrics: Metrics, callers: Callers) -> None:
        self._spool, self._limits, self._metrics, self._callers = spool, limits, metrics, callers
        self._large_roots = asyncio.Semaphore(_LARGE_ROOTS)

    async def handle(self, request: web.Request, operations: Mapping[str, Operation]) -> web.StreamResponse:
        """Answer one HTTP request at an endpoint that does `operations`, by action."""
        content_type = request.headers.get("Content-Type", "")
        message = _Message(content_type.lower().startswith("multipart/"))
        out = Output(request, self._limits.stall_timeout)
        async with AsyncExitStack() as resources:
            try:
                reader = mtom.Reader(content_type, max_root=self._limits.root_part, max_parts=_MAX_ATTACHMENTS)
                await self._read(request, reader, operations, message, resources)
                if message.refused is not None:
                    raise message.refused
            except mtom.UnsupportedMedia as exc:
                raise web.HTTPUnsupportedMediaType(text=f"{exc}\n") from exc
            except web.RequestPayloadError as exc:
                raise web.HTTPBadRequest(text="the body breaks its transfer coding\n") from exc
            except TimeoutError:
                raise web.HTTPRequestTimeout(text="nothing came for too long\n") from None
            except ConnectionError:
                raise  # the client went away: there is nobody to tell
            except (SpoolFull, SubmissionRefused) as exc:
                if message.operation is None:
                    return await self._answer_fault(message, out, exc)
                return await self._answer_refusal(message, out, exc)
            except Exception as exc:
                return await self._answer_fault(message, out, exc)
            return await self._perform(message, out, resources)

    # ------------------------------------------------------------------------------------------------------------------
    # Reading
    # ------------------------------------------------------------------------------------------------------------------

    async def _read(
        self,
        request: web.Request,
        reader: mtom.Reader,
        operations: Mapping[str, Operation],
        message: _Message,
        resources: AsyncExitStack,
    ) -> None:
        writer: AttachmentWriter | None = None
        part_id = ""
        try:
            while True:
                async with asyncio.timeout(self._limits.stall_timeout):
                    chunk = await request.content.readany()
                events = reader.receive(chunk) if chunk else reader.close()
                for event in events:
                    match event:
                        case mtom.Root(data=data, charset=charset):
                            await self._open(data, charset, operations, message)
                        case mtom.AttachmentStart(content_id=content_id):
                            part_id = content_id
                            if message.operation is None or message.operation.takes_attachments:
                                writer = self._spool.create_attachment()
                        case mtom.AttachmentData(view=view):
                            if writer is not None:
                                writer.write(view)
                        case mtom.AttachmentEnd():
                            if writer is not None:
                                attachment = writer.commit()
                                writer = None
                                resources.callback(attachment.discard)
                                message.attachments[part_id] = attachment
                        case _:
                            pass
                if not chunk:
                    break
        finally:
            if writer is not None:
                writer.discard()
        if message.operation is None:
            raise RemoteProtocolError("the message has no SOAP part")

    async def _open(
        self, data: bytes, charset: str | None, operations: Mapping[str, Operation], message: _Message
    ) -> None:
        """Read the SOAP part as soon as it is there: a message that nobody wants ends before its attachments."""
        if len(data) <= _SMALL_ROOT:
            root = xml.parse(data, charset=charset)
        else:
            async with self._large_roots:
                parse = functools.partial(xml.parse, data, charset=charset, max_bytes=self._limits.root_part)
                root = await asyncio.get_running_loop().run_in_executor(None, parse)
        envelope = soap.read_envelope(root)
        message.message_id = addressing.peek_message_id(envelope)
        properties = addressing.read_request(envelope)
        operation = operations.get(properties.action)
        if operation is None:
            raise ActionNotSupported(properties.action)
        if properties.reply_to != uids.WSA_ANONYMOUS:
            text = "an answer elsewhere than in the HTTP response is not supported"
            raise InvalidAddressingHeader("ReplyTo", "OnlyAnonymousAddressSupported", text)
        message.operation = operation
        try:
            message.request = operation.decode(envelope.body)
        except SubmissionRefused as exc:
            message.refused = exc
        except RegistryError as exc:
            message.refused = SubmissionRefused([exc])

    # ------------------------------------------------------------------------------------------------------------------
    # Performing
    # ------------------------------------------------------------------------------------------------------------------

    async def _perform(self, message: _Message, out: Output, resources: AsyncExitStack) -> web.StreamResponse:
        operation = message.operation
        assert operation is not None
        caller = self._callers.identify(out.request)
        context = Context(caller, message.message_id, message.attachments, resources)
        task = asyncio.ensure_future(operation.perform(message.request, context))
        try:
            pause = _KEEP_ALIVE_AFTER
            while not (await asyncio.wait({task}, timeout=pause))[0]:
                # HTTP/1.0 has no chunked coding, and an answer that ends by closing can come out short unnoticed.
                if operation.transaction.mtom and out.request.version >= HttpVersion11:
                    await out.keep_alive()
                    pause = _KEEP_ALIVE_EVERY
        finally:
            # Not done: this request was cancelled, or its client went away between two lines.
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        try:
            answer = task.result()
        except (RegistryError, SubmissionRefused, SpoolFull, PeerError) as exc:
            return await self._answer_refusal(message, out, exc)
        except Exception as exc:
            return await self._answer_fault(message, out, exc)
        return await self._answer(message, out, answer, "answered")

    # ------------------------------------------------------------------------------------------------------------------
    # Answering
    # ------------------------------------------------------------------------------------------------------------------

    async def _answer_refusal(self, message: _Message, out: Output, exc: Exception) -> web.StreamResponse:
        assert message.operation is not None
        return await self._answer(message, out, Answer(message.operation.refuse(_registry_errors(exc))), "refused")

    async def _answer(self, message: _Message, out: Output, answer: Answer, outcome: str) -> web.StreamResponse:
        assert message.operation is not None
        transaction = message.operation.transaction
        headers = addressing.response_headers(
            transaction.response_action, message.message_id, message_id=f"urn:uuid:{uuid.uuid4()}"
        )
        try:
            if isinstance(answer.body, AsyncGenerator):
                return await out.send_body(*soap.envelope_around(headers), answer.body)
            envelope = soap.write_envelope(headers, answer.body)
            if isinstance(answer.parts, Sequence):
                return await out.send(envelope, answer.parts, packed=transaction.mtom)
            return await out.stream(envelope, answer.parts)
        except DeliveryBroken as exc:
            outcome = "broken"
            log.info("the answer of %s to %s broke off: %s", transaction.name, out.request.remote, exc)
            return exc.response
        finally:
            self._metrics.request(transaction.name, outcome)

    async def _answer_fault(self, message: _Message, out: Output, exc: Exception) -> web.StreamResponse:
        """Answer with a fault, packed as the request was."""
        if not isinstance(exc, XcaImagingError):
            log.error("message %s failed by a defect", message.message_id, exc_info=exc)
        fault = soap.fault_of(exc if isinstance(exc, XcaImagingError) else XcaImagingError())
        log.info("fault %s to %s: %s", fault.code, out.request.remote, fault.reason)
        self._metrics.request(message.operation.transaction.name if message.operation else "none", "fault")
        headers = [
            *addressing.response_headers(
                addressing.fault_action(fault), message.message_id, message_id=f"urn:uuid:{uuid.uuid4()}"
            ),
            *soap.fault_headers(fault),
        ]
        envelope = soap.write_envelope(headers, soap.write_fault(fault))
        return await out.send(envelope, (), packed=message.is_multipart, status=500)


def _registry_errors(exc: Exception) -> Sequence[RegistryError]:
    match exc:
        case SubmissionRefused():
            return exc.errors
        case RegistryError():
            return (exc,)
        case SpoolFull():
            return (RepositoryOutOfResources(str(exc)),)
        case PeerError():
            return (exc.registry_error(str(exc)),)
        case _:
            raise AssertionError(exc)
