"""WADO-RS against scripted servers: what is asked, what is taken, and what each HTTP outcome means."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from tests.support.collecting import Collector, Kept
from xca_imaging import settings, uids
from xca_imaging.errors import (
    ConnectFailed,
    LocalProtocolError,
    PeerBusy,
    PeerError,
    PeerProtocolError,
    PeerRefused,
    PeerTimeout,
)
from xca_imaging.imaging.backends import MoveJob, MoveResult, wadors
from xca_imaging.imaging.backends.wadors import WadoRs
from xca_imaging.imaging.file_meta import encode_file_meta
from xca_imaging.imaging.receiver import StoreRequest

EXPLICIT, JPEG_2000, RLE = uids.EXPLICIT_VR_LITTLE_ENDIAN, "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.5"
CT = "1.2.840.10008.5.1.4.1.1.2"
STUDY, SERIES = "1.2.3", "1.2.3.1"
ONE, TWO, THREE = "1.2.3.1.1", "1.2.3.1.2", "1.2.3.1.3"
SERIES_JOB = MoveJob("SERIES", STUDY, SERIES, accept=(EXPLICIT,))

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def dataset(uid: str) -> bytes:
    return f"--data of {uid}\r\n--b".encode() * 1000


def part10(uid: str, syntax: str = EXPLICIT) -> bytes:
    meta = encode_file_meta(
        sop_class_uid=CT, sop_instance_uid=uid, transfer_syntax_uid=syntax, source_ae_title="SERVER"
    )
    return meta + dataset(uid)


def parts(*instances: bytes, end: bool = True) -> bytes:
    body = b"".join(b"--xyz\r\nContent-Type: application/dicom\r\n\r\n" + each + b"\r\n" for each in instances)
    return body + (b"--xyz--\r\n" if end else b"")


def related(body: bytes, **headers: str) -> web.Response:
    kind = 'multipart/related; type="application/dicom"; boundary=xyz'
    return web.Response(body=body, headers={"Content-Type": kind, **headers})


class Server:
    """Answers every GET with what the handler makes of it; keeps path and Accept of each."""

    def __init__(self, handler: Handler) -> None:
        self.asked: list[tuple[str, str]] = []
        self._handler = handler
        self.base = ""

    async def answer(self, request: web.Request) -> web.StreamResponse:
        assert request.headers.get("Accept-Encoding") == "identity"
        self.asked.append((request.path, request.headers["Accept"]))
        return await self._handler(request)


@asynccontextmanager
async def serving(handler: Handler, collector: Collector, **options: Any) -> AsyncIterator[tuple[WadoRs, Server]]:
    server = Server(handler)
    application = web.Application()
    application.router.add_get("/{path:.*}", server.answer)
    runner = web.AppRunner(application, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.base = f"http://127.0.0.1:{runner.addresses[0][1]}/dicom-web"
    client = WadoRs(pacs_at(server.base), ae_title="XCAI", receiver=collector, **({"stall_timeout": 5.0} | options))
    try:
        yield client, server
    finally:
        await client.close()
        await runner.cleanup()


def pacs_at(base: str) -> settings.Pacs:
    return settings.Pacs(
        name="main", ae_title="SERVER", host="127.0.0.1", port=104, retrieve_location_uid="1.2.3", wado_rs=base
    )


async def get(handler: Handler, job: MoveJob, **options: Any) -> tuple[MoveResult, Collector, Server]:
    collector = Collector()
    async with serving(handler, collector, **options) as (client, server):
        return await client.move(job, lambda _: None), collector, server


def always(make: Callable[[], web.StreamResponse]) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        return make()

    return handler


# --- What is asked ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("job", "paths"),
    [
        (MoveJob("STUDY", STUDY), [f"/dicom-web/studies/{STUDY}"]),
        (MoveJob("SERIES", STUDY, SERIES), [f"/dicom-web/studies/{STUDY}/series/{SERIES}"]),
        (
            MoveJob("IMAGE", STUDY, SERIES, (ONE, TWO)),
            [f"/dicom-web/studies/{STUDY}/series/{SERIES}/instances/{uid}" for uid in (ONE, TWO)],
        ),
    ],
)
async def test_levels(job: MoveJob, paths: Sequence[str]) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return related(parts(part10(ONE), part10(TWO)))

    result, collector, server = await get(handler, job)
    assert [path for path, _ in server.asked] == paths
    assert set(collector.held) == {ONE, TWO}
    assert (result.status, result.completed) == (0x0000, 2)
    kept = collector.held[ONE]
    assert bytes(kept.data) == dataset(ONE)
    assert (kept.request.sop_class_uid, kept.request.transfer_syntax_uid) == (CT, EXPLICIT)
    association = kept.request.association
    assert (association.pacs, association.calling_ae_title, association.called_ae_title) == ("main", "SERVER", "XCAI")
    assert association.id < 0
    assert collector.closed == [(association, "retrieved")]


@pytest.mark.parametrize(
    "job", [MoveJob("SERIES", STUDY), MoveJob("SERIES", "../admin", SERIES), MoveJob("IMAGE", "1", "2")]
)
async def test_what_is_no_uid_is_never_put_into_a_url(job: MoveJob) -> None:
    with pytest.raises(LocalProtocolError):
        await get(always(web.Response), job)


MEDIA = 'multipart/related; type="application/dicom"; transfer-syntax='


@pytest.mark.parametrize(
    ("accept", "field"),
    [
        ((), MEDIA + "*"),
        ((EXPLICIT,), MEDIA + EXPLICIT),
        ((JPEG_2000, EXPLICIT), f"{MEDIA}{JPEG_2000};q=1, {MEDIA}{EXPLICIT};q=0.99"),
    ],
)
async def test_transfer_syntaxes_are_asked_for_in_their_order(accept: tuple[str, ...], field: str) -> None:
    job = MoveJob("SERIES", STUDY, SERIES, accept=accept)
    _, _, server = await get(always(lambda: related(parts(part10(ONE)))), job)
    assert [each for _, each in server.asked] == [field]


@pytest.mark.parametrize("status", [400, 406, 415, 500])
async def test_a_server_that_reads_one_media_type_is_asked_for_what_it_has(status: int) -> None:
    """And what comes in a syntax that is not accepted is asked for again in one that is."""

    async def handler(request: web.Request) -> web.StreamResponse:
        field = request.headers["Accept"]
        if "," in field:
            return web.Response(status=status)
        if field.endswith("*"):
            return related(parts(part10(ONE, JPEG_2000), part10(TWO, RLE)))
        return related(parts(part10(ONE), part10(TWO)))

    job = MoveJob("SERIES", STUDY, SERIES, accept=(JPEG_2000, EXPLICIT))
    collector = Collector()
    async with serving(handler, collector) as (client, server):
        for _ in range(2):
            collector.stores.clear()
            assert (await client.move(job, lambda _: None)).status == 0x0000
            held = {uid: each.request.transfer_syntax_uid for uid, each in collector.held.items()}
            assert held == {ONE: JPEG_2000, TWO: EXPLICIT}
    # the list once, then it is known
    assert [field.count("multipart") for _, field in server.asked] == [2, 1, 1, 1, 1]


async def test_what_does_not_come_in_an_accepted_syntax_is_named() -> None:
    result, collector, _ = await get(always(lambda: related(parts(part10(ONE, RLE), part10(TWO)))), SERIES_JOB)
    assert set(collector.held) == {TWO}
    assert (result.status, result.failed_uids) == (0xB000, (ONE,))
    assert RLE in result.error_comment


# --- What is taken ----------------------------------------------------------------------------------------------------


async def test_only_the_instance_that_was_asked_is_taken() -> None:
    job = MoveJob("IMAGE", STUDY, SERIES, (ONE,))
    _, collector, _ = await get(always(lambda: related(parts(part10(TWO), part10(ONE), part10(ONE)))), job)
    assert [each.request.sop_instance_uid for each in collector.stores] == [ONE]


async def test_what_the_receiver_refuses_is_read_and_dropped() -> None:
    collector = Collector(decide=lambda request: 0x0124 if request.sop_instance_uid == ONE else None)
    async with serving(always(lambda: related(parts(part10(ONE), part10(TWO)))), collector) as (client, _):
        result = await client.move(SERIES_JOB, lambda _: None)
    assert (set(collector.held), result.completed) == ({TWO}, 1)


class FullAtFirst(Collector):
    """Has no room for the first instance."""

    def begin(self, request: StoreRequest) -> Kept | int:
        kept = super().begin(request)
        return NoRoom(request, kept) if len(self.stores) == 1 else kept


class NoRoom(Kept):
    def __init__(self, request: StoreRequest, kept: Any) -> None:
        super().__init__(request)
        self.kept = kept

    def write(self, *data: memoryview) -> None:
        raise OSError(28, "no space left")

    def discard(self, reason: str) -> None:
        self.kept.discard(reason)


async def test_an_instance_that_cannot_be_written_does_not_stop_the_next() -> None:
    collector = FullAtFirst()
    async with serving(always(lambda: related(parts(part10(ONE), part10(TWO)))), collector) as (client, _):
        result = await client.move(SERIES_JOB, lambda _: None)
    assert set(collector.held) == {TWO}
    assert "no space" in collector.stores[0].discarded
    assert result.completed == 1


@pytest.mark.parametrize(
    "odd",
    [
        b"",
        b"not DICOM at all" * 20,
        part10("1.2.x"),
        part10(ONE)[:140] + b"\xff\xff\xff\xff" + part10(ONE)[144:],
        part10(ONE)[:200],
    ],
)
async def test_a_part_that_is_no_instance_is_left_out(odd: bytes) -> None:
    result, collector, _ = await get(always(lambda: related(parts(odd, part10(TWO)))), SERIES_JOB)
    assert (set(collector.held), result.status) == ({TWO}, 0x0000)


async def test_one_byte_at_a_time() -> None:
    body = parts(part10(ONE)[:700], part10(TWO)[:700])

    async def handler(request: web.Request) -> web.StreamResponse:
        response = related(b"")
        stream = web.StreamResponse(headers=response.headers)
        await stream.prepare(request)
        for byte in body:
            await stream.write(bytes((byte,)))
        return stream

    _, collector, _ = await get(handler, SERIES_JOB)
    assert {uid: len(each.data) for uid, each in collector.held.items()} == {
        uid: 700 - (len(part10(uid)) - len(dataset(uid))) for uid in (ONE, TWO)
    }


async def test_a_single_instance_outside_a_multipart_message() -> None:
    answer = always(lambda: web.Response(body=part10(ONE), content_type="application/dicom"))
    _, collector, _ = await get(answer, MoveJob("IMAGE", STUDY, SERIES, (ONE,)))
    assert bytes(collector.held[ONE].data) == dataset(ONE)


# --- How it may end ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "error", "text"),
    [
        (lambda: web.Response(status=404), PeerRefused, "404"),
        (lambda: web.Response(status=410), PeerRefused, "410"),
        (lambda: web.Response(status=204), PeerRefused, "204"),
        (lambda: web.Response(status=406), PeerRefused, "transfer syntax"),
        (lambda: web.Response(status=401), PeerRefused, "access"),
        (lambda: web.Response(status=503, headers={"Retry-After": "7"}), PeerBusy, "retry after 7"),
        (lambda: web.Response(status=429), PeerBusy, "429"),
        (lambda: web.Response(status=502), ConnectFailed, "502"),
        (lambda: web.Response(status=302, headers={"Location": "http://other.invalid/"}), PeerRefused, "other.invalid"),
        (lambda: web.Response(status=307, headers={"Location": "/dicom-web/again"}), PeerRefused, "redirects"),
        (lambda: web.Response(text="<html>"), PeerProtocolError, "text/plain"),
        (lambda: related(b"no boundary"), PeerProtocolError, "boundary"),
        (lambda: related(parts(part10(ONE)), **{"Content-Encoding": "gzip"}), PeerProtocolError, "gzip"),
    ],
)
async def test_outcomes(answer: Callable[[], web.Response], error: type[PeerError], text: str) -> None:
    with pytest.raises(error, match=text):
        await get(always(answer), SERIES_JOB)


async def test_a_server_that_fails_is_unable_to_process() -> None:
    result, _, _ = await get(always(lambda: web.Response(status=500)), SERIES_JOB)
    assert result.status == 0xC000
    assert "500" in result.error_comment


async def test_a_redirect_within_the_server_is_followed() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        if "moved" not in request.path:
            return web.Response(status=307, headers={"Location": "/moved"})
        return related(parts(part10(ONE)))

    _, collector, _ = await get(handler, SERIES_JOB)
    assert set(collector.held) == {ONE}


async def test_a_missing_instance_of_a_list_is_named_and_the_others_come() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        uid = request.path.rsplit("/", 1)[1]
        return web.Response(status=404) if uid == TWO else related(parts(part10(uid)))

    result, collector, _ = await get(handler, MoveJob("IMAGE", STUDY, SERIES, (ONE, TWO, THREE)))
    assert set(collector.held) == {ONE, THREE}
    assert (result.status, result.completed, result.failed_uids) == (0xB000, 2, (TWO,))


@pytest.mark.parametrize("cut", [1, 400, 4000])
async def test_an_answer_that_breaks_off_keeps_what_is_whole(cut: int) -> None:
    """The last instance counts only once its delimiter has come, however complete it looks."""
    body = parts(part10(ONE), part10(TWO))
    body = body[: len(body) - len(b"\r\n--xyz--\r\n") - cut + 1]

    async def handler(request: web.Request) -> web.StreamResponse:
        response = related(body)
        response.headers["Content-Length"] = str(len(body) + 100)
        stream = web.StreamResponse(headers=response.headers)
        await stream.prepare(request)
        await stream.write(body)
        assert request.transport is not None
        request.transport.close()
        return stream

    result, collector, _ = await get(handler, SERIES_JOB)
    assert (set(collector.held), result.status, result.completed) == ({ONE}, None, 1)
    assert collector.stores[1].discarded


async def test_a_message_without_its_end_keeps_what_is_whole() -> None:
    answer = always(lambda: related(parts(part10(ONE), part10(TWO), end=False)))
    result, collector, _ = await get(answer, SERIES_JOB)
    assert (set(collector.held), result.status) == ({ONE}, None)
    assert "closing MIME boundary" in result.error_comment


async def test_an_instance_that_ends_with_its_connection_is_not_taken() -> None:
    """Neither a length nor chunks: whether it is whole cannot be told."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/dicom\r\n\r\n" + part10(ONE))
        await writer.drain()
        writer.close()

    collector = Collector()
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        base = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        client = WadoRs(pacs_at(base), ae_title="XCAI", receiver=collector)
        with pytest.raises(PeerProtocolError, match="whole"):
            await client.move(MoveJob("IMAGE", STUDY, SERIES, (ONE,)), lambda _: None)
        await client.close()
    assert collector.stores == []


async def stalling(request: web.Request) -> web.StreamResponse:
    stream = web.StreamResponse(headers={"Content-Type": "multipart/related; boundary=xyz"})
    await stream.prepare(request)
    await stream.write(parts(part10(ONE), end=False) + b"--xyz\r\n\r\n" + part10(TWO)[:1000])
    await asyncio.sleep(10)
    return stream


async def test_a_body_that_stalls_times_out() -> None:
    collector = Collector()
    async with serving(stalling, collector, stall_timeout=0.3) as (client, _):
        with pytest.raises(PeerTimeout):
            await client.move(SERIES_JOB, lambda _: None)
    assert set(collector.held) == {ONE}
    assert collector.stores[1].discarded


async def test_cancelled_at_once() -> None:
    collector, responses = Collector(), []
    async with serving(stalling, collector) as (client, _):
        task = asyncio.ensure_future(client.move(SERIES_JOB, responses.append))
        async with asyncio.timeout(5):
            while len(collector.stores) < 2:
                await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert [each.completed for each in responses] == [1]
    assert collector.stores[1].discarded
    assert len(collector.closed) == 1


async def test_nobody_there() -> None:
    client = WadoRs(pacs_at("http://127.0.0.1:9"), ae_title="XCAI", receiver=Collector())
    with pytest.raises(ConnectFailed, match=r"127\.0\.0\.1:9"):
        await client.move(SERIES_JOB, lambda _: None)
    await client.close()


async def test_a_paused_retrieval_is_not_read() -> None:
    """What a slow consumer does not take stays with the server, but for what fits into a few buffers."""
    size, count = 1_000_000, 40

    async def handler(request: web.Request) -> web.StreamResponse:
        stream = web.StreamResponse(headers={"Content-Type": "multipart/related; boundary=xyz"})
        await stream.prepare(request)
        for number in range(count):
            head = part10(f"1.2.3.1.{number}")
            await stream.write(b"--xyz\r\n\r\n" + head + bytes(size) + b"\r\n")
        await stream.write(b"--xyz--\r\n")
        return stream

    collector = Collector()
    async with serving(handler, collector) as (client, _):
        task = asyncio.ensure_future(client.move(SERIES_JOB, lambda _: None))
        async with asyncio.timeout(5):
            while not collector.stores:
                await asyncio.sleep(0.001)
        association = collector.stores[0].request.association
        client.pause(association)
        await asyncio.sleep(0.1)
        before = sum(len(each.data) for each in collector.stores)
        await asyncio.sleep(0.3)
        assert sum(len(each.data) for each in collector.stores) == before < size * count
        client.resume(association)
        async with asyncio.timeout(20):
            assert (await task).completed == count


@pytest.mark.parametrize("status", [200, 204, 404])
async def test_reach(status: int) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        assert (request.path, request.query["limit"]) == ("/dicom-web/studies", "1")
        return web.Response(status=status)

    application = web.Application()
    application.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    pacs = pacs_at(f"http://127.0.0.1:{runner.addresses[0][1]}/dicom-web/")
    assert await wadors.reach(pacs) == f"HTTP {status}"
    await runner.cleanup()
    with pytest.raises(ConnectFailed):
        await wadors.reach(pacs)
