"""The answer to one request on its way out: from files, or from instances that still arrive, to the connection.

*Spooled*: everything is there; the answer has a Content-Length, or is chunked when it was begun by keep-alive lines.
*Streaming*: the root goes out at once and the attachments follow as they come, in chunked coding. An answer that cannot
be finished breaks off inside its coding, so that nobody takes the part that came for the whole: Apache CXF notices a
missing last chunk, but no missing closing boundary.

References
----------
* RFC 2046, 5.1.1 (the preamble is ignored); RFC 9112, 7.1 and 8 (chunked coding, incomplete messages)
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import secrets
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

from aiohttp import HttpVersion11, web

from xca_imaging.wire import mtom, multipart

log = logging.getLogger(__name__)

_SOAP = "application/soap+xml; charset=UTF-8"
_READ = 512 * 1024  # bytes read from a file at a time
_BATCH = 512 * 1024  # bytes read before they are written: two batches are in memory per answer
_SMALL = 64 * 1024  # shorter pieces are copied together: one write for a few small objects


@dataclass(frozen=True, slots=True)
class Part:
    """One attachment of an answer: a file, or bytes where it is small and has none.

    `on_sent` is called once all its octets have gone to the connection, with their SHA-256 (lower-case hexadecimal):
    `sha256` where that is known, else computed while they pass.
    """

    content_id: str
    content_type: str
    size: int
    source: Path | bytes
    on_sent: Callable[[str], None] | None = None
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class GrowingPart:
    """One attachment whose octets still come; its iterator raises when they do not come to their end."""

    content_id: str
    content_type: str
    octets: AsyncGenerator[bytes, None]


Stream = AsyncGenerator[Sequence[Part] | GrowingPart, None]
"""Attachments as they come; it raises when one will not."""


class DeliveryBroken(Exception):
    """The answer could not be finished; its connection was closed inside the coding of `response`."""

    def __init__(self, cause: Exception, response: web.StreamResponse) -> None:
        self.response = response
        super().__init__(str(cause) or type(cause).__name__)


class Output:
    """The HTTP response to one request, from its first keep-alive line to its end.

    A client that takes nothing for `stall_timeout` is cut off: what is held for it must not be held for ever.
    """

    # Mutable state: the response, once it has been begun.

    def __init__(self, request: web.Request, stall_timeout: float) -> None:
        self.request = request
        self._stall_timeout = stall_timeout
        self._writer = mtom.Writer(multipart.new_boundary(secrets.token_bytes(24)), "root@xca-imaging")
        self._response: web.StreamResponse | None = None

    async def keep_alive(self) -> None:
        """Begin the response, in chunked coding, and send a line that receivers skip."""
        await self._write(await self._begin_chunked(), self._writer.preamble_line())

    async def send(
        self, envelope: bytes, parts: Sequence[Part], *, packed: bool, status: int = 200
    ) -> web.StreamResponse:
        """Send the whole answer; `packed` = MTOM. Once begun the response stays what it is: MTOM with status 200."""
        response = self._response
        if response is None and not packed:
            return web.Response(body=envelope, status=status, headers={"Content-Type": _SOAP})
        if response is None:
            response = web.StreamResponse(status=status, headers={"Content-Type": self._writer.content_type})
            sizes = [(part.content_id, part.content_type, part.size) for part in parts]
            response.content_length = self._writer.total_length(len(envelope), sizes)
            await response.prepare(self.request)
        try:
            await self._write(response, self._writer.root(envelope))
            await self._send_parts(response, parts)
            await self._end(response)
        except Exception as exc:
            raise self._broken(exc, response) from exc
        return response

    async def stream(self, envelope: bytes, parts: Stream) -> web.StreamResponse:
        """Send the root now, and the attachments as they come."""
        response = await self._begin_chunked()
        try:
            await self._write(response, self._writer.root(envelope))
            async with aclosing(parts):
                async for each in parts:
                    if isinstance(each, GrowingPart):
                        await self._send_growing(response, each)
                    else:
                        await self._send_parts(response, each)
            await self._end(response)
        except Exception as exc:
            raise self._broken(exc, response) from exc
        return response

    async def send_body(self, start: bytes, end: bytes, body: AsyncGenerator[bytes, None]) -> web.StreamResponse:
        """Send a message without attachments whose body comes in fragments, between the ends of its envelope."""
        async with aclosing(body):
            if self.request.version < HttpVersion11:
                # No chunked coding, and an answer that ends by closing can come out short unnoticed.
                whole = b"".join([start, *[piece async for piece in body], end])
                return web.Response(body=whole, headers={"Content-Type": _SOAP})
            response = web.StreamResponse(headers={"Content-Type": _SOAP})
            response.enable_chunked_encoding()
            await response.prepare(self.request)
            try:
                await self._write(response, start)
                async for piece in body:
                    await self._write(response, piece)
                await self._write(response, end)
                await response.write_eof()
            except Exception as exc:
                raise self._broken(exc, response) from exc
        return response

    async def _begin_chunked(self) -> web.StreamResponse:
        if self._response is None:
            self._response = web.StreamResponse(headers={"Content-Type": self._writer.content_type})
            self._response.enable_chunked_encoding()
            await self._response.prepare(self.request)
        return self._response

    async def _send_parts(self, response: web.StreamResponse, parts: Sequence[Part]) -> None:
        """Send attachments, one batch being read while the one before is written."""
        loop = asyncio.get_running_loop()
        batches = _batches(self._writer, parts)
        ahead = loop.run_in_executor(None, next, batches, None)
        try:
            while (batch := await ahead) is not None:
                ahead = loop.run_in_executor(None, next, batches, None)
                for piece in batch.pieces:
                    if piece:
                        await self._write(response, piece)
                for part, sha256 in batch.sent:
                    if part.on_sent is not None:
                        part.on_sent(sha256)
        finally:
            if not ahead.done():
                ahead.cancel()
            elif not ahead.cancelled():
                ahead.exception()  # who waits for nothing more needs not hear that it failed

    async def _send_growing(self, response: web.StreamResponse, part: GrowingPart) -> None:
        await self._write(response, self._writer.attachment_header(part.content_id, part.content_type))
        async with aclosing(part.octets) as octets:
            async for piece in octets:
                await self._write(response, piece)
        await self._write(response, self._writer.attachment_end())

    async def _end(self, response: web.StreamResponse) -> None:
        await self._write(response, self._writer.end())
        await response.write_eof()

    async def _write(self, response: web.StreamResponse, data: bytes) -> None:
        try:
            async with asyncio.timeout(self._stall_timeout):
                await response.write(data)
        except TimeoutError:
            log.info("%s took nothing for %g s and is cut off", self.request.remote, self._stall_timeout)
            if self.request.transport is not None:
                self.request.transport.abort()  # closing would wait for what is never taken
            raise ConnectionResetError("the client takes nothing") from None

    def _broken(self, cause: Exception, response: web.StreamResponse) -> DeliveryBroken:
        """Close the connection where it stands, after what was written: no last chunk, less than Content-Length."""
        transport = self.request.transport
        if transport is not None:
            transport.close()
            asyncio.get_running_loop().call_later(self._stall_timeout, transport.abort)  # if that is never taken
        return DeliveryBroken(cause, response)


@dataclass(frozen=True, slots=True)
class _Batch:
    pieces: list[bytes]
    sent: list[tuple[Part, str]]  # parts that end in it, with their SHA-256


def _batches(writer: mtom.Writer, parts: Sequence[Part]) -> Iterator[_Batch]:
    """Yield the bytes of attachments in pieces to be written one by one: large ones as they were read."""
    batch, small, size = _Batch([], []), bytearray(), 0
    for part in parts:
        digest = hashlib.sha256() if part.on_sent is not None and not part.sha256 else None
        small += writer.attachment_header(part.content_id, part.content_type)
        for piece in _pieces(part):
            if digest is not None:
                digest.update(piece)
            if len(piece) < _SMALL:
                small += piece
            else:
                if small:
                    batch.pieces.append(bytes(small))
                    small.clear()
                batch.pieces.append(piece)
                size += len(piece)
            if size + len(small) >= _BATCH:
                batch.pieces.append(bytes(small))
                small.clear()
                yield batch
                batch, size = _Batch([], []), 0
        small += writer.attachment_end()
        batch.sent.append((part, digest.hexdigest() if digest is not None else part.sha256))
    batch.pieces.append(bytes(small))
    yield batch


def _pieces(part: Part) -> Iterator[bytes]:
    """Yield exactly `size` octets of a part; a file that is shorter breaks the answer off rather than end it short."""
    if isinstance(part.source, bytes):
        yield part.source
        return
    descriptor = os.open(part.source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        left = part.size
        while left:
            data = os.read(descriptor, min(left, _READ))
            if not data:
                raise OSError(f"file {part.source.name} is {left} bytes shorter than it was")
            left -= len(data)
            yield data
    finally:
        os.close(descriptor)
