"""Answers on the wire: streamed, whole, broken off; read from raw sockets and by Python's own MIME parser."""

from __future__ import annotations

import asyncio
import email
import email.policy
import hashlib
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tests.gateway.test_exchange import request, retrieval, serving
from xca_imaging import errors, uids
from xca_imaging.gateway import delivery
from xca_imaging.gateway.delivery import GrowingPart, Part
from xca_imaging.gateway.exchange import Answer, Context
from xca_imaging.transactions import iti43
from xca_imaging.transactions.document_set import DocumentResponse, RetrieveResponse
from xca_imaging.transactions.registry_response import response_to
from xca_imaging.wire import mtom

NAMES = ("1@x", "2@x", "3@x")
LAST_CHUNK = b"\r\n0\r\n\r\n"
DEADLINE = 10

Parts = AsyncGenerator[Sequence[Part] | GrowingPart, None]


def body(names: Sequence[str] = NAMES) -> object:
    documents = tuple(DocumentResponse(None, "1.2", name, uids.MIME_DICOM, mtom.Reference(name)) for name in names)
    return iti43.encode_response(RetrieveResponse(response_to(found=1), documents))


def streaming(parts: Callable[[], Parts]) -> Callable[[object, Context], Awaitable[Answer]]:
    async def perform(asked: object, context: Context) -> Answer:
        return Answer(body(), parts())  # type: ignore[arg-type]

    return perform


class Client:
    """A raw HTTP client that keeps every byte."""

    def __init__(self, resources: AsyncExitStack, url: str) -> None:
        self._resources = resources
        host, port = url.removeprefix("http://").rstrip("/").split(":")
        self._address = host, int(port)
        self.raw = b""

    async def send(self, version: str = "1.1") -> None:
        data = request(iti43.TRANSACTION)
        self.reader, self.writer = await asyncio.open_connection(*self._address)
        self._resources.callback(self.writer.close)
        self.writer.write(
            f"POST / HTTP/{version}\r\nHost: x\r\nContent-Type: application/soap+xml\r\n"
            f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode()
            + data
        )

    async def until(self, needle: bytes) -> None:
        async with asyncio.timeout(DEADLINE):
            while needle not in self.raw:
                data = await self.reader.read(1 << 20)
                assert data, f"{needle!r} never came"
                self.raw += data

    async def rest(self) -> None:
        async with asyncio.timeout(DEADLINE):
            while data := await self.reader.read(1 << 20):
                self.raw += data

    @property
    def head(self) -> bytes:
        return self.raw.partition(b"\r\n\r\n")[0]

    @property
    def content(self) -> bytes:
        """The body without its chunked coding, as far as it came."""
        rest, content = self.raw.partition(b"\r\n\r\n")[2], b""
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            content += rest[: int(size, 16)]
            rest = rest[int(size, 16) + 2 :]
        return content


def mime_parts(head: bytes, content: bytes) -> dict[str, bytes]:
    """Read a package with Python's email package: content by Content-ID."""
    headers = [line for line in head.split(b"\r\n") if line.lower().startswith(b"content-type")]
    message = email.message_from_bytes(headers[0] + b"\r\n\r\n" + content, policy=email.policy.HTTP)
    assert message.is_multipart()
    assert not message.defects
    found = {}
    for part in message.iter_parts():  # type: ignore[attr-defined]
        payload = part.get_payload(decode=True)
        assert isinstance(payload, bytes)
        found[str(part["Content-ID"]).strip("<>")] = payload
    return found


def file(folder: Path, name: str, content: bytes) -> Part:
    path = folder / name
    path.write_bytes(content)
    return Part(name, uids.MIME_DICOM, len(content), path)


async def test_the_root_goes_out_before_the_instances_have_come(tmp_path: Path) -> None:
    gate = asyncio.Event()
    # The email package reads lines: binary octets of its own kind only.
    contents = {"3@x": b"third " * 50_000, "1@x": b"first " * 50_000, "2@x": b"second"}

    async def growing() -> AsyncGenerator[bytes, None]:
        yield contents["1@x"][:1000]
        await gate.wait()
        yield contents["1@x"][1000:]

    async def parts() -> Parts:
        yield [file(tmp_path, "3@x", contents["3@x"])]
        yield GrowingPart("1@x", uids.MIME_DICOM, growing())
        yield [file(tmp_path, "2@x", contents["2@x"])]

    async with serving(tmp_path, retrieval(streaming(parts))) as url, AsyncExitStack() as resources:
        client = Client(resources, url)
        await client.send()
        await client.until(contents["1@x"][:1000])
        assert uids.STATUS_SUCCESS.encode() in client.raw
        assert all(f"cid:{name}".encode() in client.raw for name in NAMES)
        assert b"second" not in client.raw
        gate.set()
        await client.rest()
    assert b"Transfer-Encoding: chunked" in client.head
    assert client.raw.endswith(LAST_CHUNK)
    found = mime_parts(client.head, client.content)
    assert list(found) == ["root@xca-imaging", "3@x", "1@x", "2@x"]
    assert {name: found[name] for name in NAMES} == contents


@pytest.mark.parametrize("inside", [False, True])
async def test_a_failure_breaks_the_answer_inside_its_coding(tmp_path: Path, inside: bool) -> None:
    async def growing() -> AsyncGenerator[bytes, None]:
        yield b"half"
        raise errors.ArrivalBroken("gone")

    async def parts() -> Parts:
        yield [file(tmp_path, "1@x", b"whole")]
        if inside:
            yield GrowingPart("2@x", uids.MIME_DICOM, growing())
        raise errors.RepositoryError("gone")

    async with serving(tmp_path, retrieval(streaming(parts))) as url, AsyncExitStack() as resources:
        client = Client(resources, url)
        await client.send()
        await client.rest()
    assert b"whole" in client.raw  # what was written before comes
    assert b"half" in client.raw or not inside
    assert not client.raw.endswith(LAST_CHUNK)
    assert client.raw.count(b"HTTP/1.1") == 1
    reader = mtom.Reader(client.head.split(b"Content-Type: ")[1].split(b"\r\n")[0].decode())
    reader.receive(client.content)
    with pytest.raises(errors.MalformedMime, match="closing"):
        reader.close()


@pytest.mark.parametrize("damage", ["shorter", "gone"])
async def test_a_file_that_is_not_what_it_was_breaks_the_answer(tmp_path: Path, damage: str) -> None:
    async def perform(asked: object, context: Context) -> Answer:
        large = file(tmp_path, "1@x", bytes(3 << 20))
        assert isinstance(large.source, Path)
        if damage == "gone":
            large.source.unlink()
        else:
            os.truncate(large.source, 2 << 20)
        return Answer(body(NAMES[:1]), [large])  # type: ignore[arg-type]

    async with serving(tmp_path, retrieval(perform)) as url, AsyncExitStack() as resources:
        client = Client(resources, url)
        await client.send()
        await client.rest()
    length = int(client.head.split(b"Content-Length: ")[1].split(b"\r\n")[0])
    assert len(client.raw) - len(client.head) - 4 < length
    assert client.raw.count(b"HTTP/1.1") == 1


async def test_each_part_is_told_when_it_is_sent_with_its_digest(tmp_path: Path) -> None:
    contents = [os.urandom(size) for size in (3, 100_000, 2_000_000, 1, 0, 700_000)]
    told: list[tuple[int, str]] = []

    def part(index: int, content: bytes) -> Part:
        made = file(tmp_path, str(index), content)
        known = "known before" if index == 1 else ""
        return Part(f"{index}@x", made.content_type, made.size, made.source, lambda s: told.append((index, s)), known)

    async def perform(asked: object, context: Context) -> Answer:
        return Answer(body(), [part(*each) for each in enumerate(contents)])  # type: ignore[arg-type]

    async with serving(tmp_path, retrieval(perform)) as url, AsyncExitStack() as resources:
        client = Client(resources, url)
        await client.send()
        await client.rest()
    expected = [hashlib.sha256(content).hexdigest() for content in contents]
    expected[1] = "known before"
    assert told == list(enumerate(expected))
    reader = mtom.Reader(client.head.split(b"Content-Type: ")[1].split(b"\r\n")[0].decode())
    received: list[bytes] = []
    for event in reader.receive(client.raw.partition(b"\r\n\r\n")[2]):
        match event:
            case mtom.AttachmentStart():
                received.append(b"")
            case mtom.AttachmentData(view=view):
                received[-1] += view
    assert received == contents


async def test_http_1_0_gets_a_length(tmp_path: Path) -> None:
    """Its caller is never one that is streamed to (see test_callers); the rest is the same answer."""
    seen: list[str] = []

    async def perform(asked: object, context: Context) -> Answer:
        seen.append(context.caller.delivery)
        return Answer(body(NAMES[:1]), [file(tmp_path, "1@x", b"content")])  # type: ignore[arg-type]

    async with serving(tmp_path, retrieval(perform)) as url, AsyncExitStack() as resources:
        client = Client(resources, url)
        await client.send("1.0")
        await client.rest()
    assert seen == ["spooled"]
    assert b"Content-Length: " in client.head
    assert b"chunked" not in client.head


async def test_a_client_that_goes_away_ends_the_stream_within_a_second(tmp_path: Path) -> None:
    ended = asyncio.Event()

    async def parts() -> Parts:
        try:
            yield [file(tmp_path, "1@x", b"content")]
            await asyncio.sleep(60)
        finally:
            ended.set()

    async with serving(tmp_path, retrieval(streaming(parts))) as url, AsyncExitStack() as resources:
        client = Client(resources, url)
        await client.send()
        await client.until(b"content")
        client.writer.transport.abort()
        await asyncio.wait_for(ended.wait(), 1)


async def test_a_client_that_takes_nothing_of_a_stream_is_cut_off(tmp_path: Path) -> None:
    ended = asyncio.Event()

    async def growing() -> AsyncGenerator[bytes, None]:
        try:
            while True:
                yield bytes(1 << 20)
        finally:
            ended.set()

    async def parts() -> Parts:
        yield GrowingPart("1@x", uids.MIME_DICOM, growing())

    async with serving(tmp_path, retrieval(streaming(parts)), stall_timeout=0.5) as url, AsyncExitStack() as resources:
        client = Client(resources, url)
        await client.send()
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await asyncio.wait_for(ended.wait(), DEADLINE)


def test_batches_hold_all_octets_in_order_and_little_at_a_time(tmp_path: Path) -> None:
    writer = mtom.Writer(b"boundary", "root@x")
    contents = [os.urandom(size) for size in [10, 3_000_000, 0, *[60_000] * 30, 70_000, 5]]
    parts = [file(tmp_path, f"{index}@x", content) for index, content in enumerate(contents)]
    batches = list(delivery._batches(writer, parts))
    expected = b"".join(
        writer.attachment_header(part.content_id, part.content_type) + content + writer.attachment_end()
        for part, content in zip(parts, contents, strict=True)
    )
    assert b"".join(piece for batch in batches for piece in batch.pieces) == expected
    assert max(sum(map(len, batch.pieces)) for batch in batches) <= 1.2 * (delivery._BATCH + delivery._READ)
    assert [part for batch in batches for part, _ in batch.sent] == parts
