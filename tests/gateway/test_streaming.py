"""What a transfer tells, as attachments: order, reading along, breaking off; with the real transfer and spool."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from xca_imaging import errors, uids
from xca_imaging.gateway import streaming
from xca_imaging.gateway.delivery import GrowingPart
from xca_imaging.gateway.streaming import Streaming
from xca_imaging.imaging.holdings import Brought, Transfer
from xca_imaging.imaging.ledger import Want
from xca_imaging.imaging.spool import Spool, SpooledInstance, SpoolWriter

CT = "1.2.840.10008.5.1.4.1.1.2"
WANTS = [Want("1.2", "1.2.3", f"1.2.3.{n}", "1.9") for n in range(4)]
DEADLINE = 10


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    spool = Spool(tmp_path, max_bytes=10**8, retention=60)
    yield spool
    spool.close()


class Taker:
    """Takes the attachments as the connection does: `received` by content id, in order."""

    def __init__(self, transfer: Transfer, wants: list[Want]) -> None:
        self.transfer = transfer
        self.sent: dict[Want, str] = {}
        self.received: dict[str, bytes] = {}
        self.gate = asyncio.Event()
        self.gate.set()
        self._streaming = Streaming(transfer, {want: want.sop_instance_uid for want in wants}, self._on_sent)

    def _on_sent(self, want: Want, sha256: str) -> None:
        self.sent[want] = sha256
        self.transfer.release(want)

    async def run(self) -> None:
        async for each in self._streaming.parts():
            if isinstance(each, GrowingPart):
                self.received[each.content_id] = b""
                async for piece in each.octets:
                    await self.gate.wait()
                    self.received[each.content_id] += piece
            else:
                for part in each:
                    await self.gate.wait()
                    assert isinstance(part.source, Path)
                    content = self.received[part.content_id] = part.source.read_bytes()
                    assert part.on_sent is not None
                    part.on_sent(hashlib.sha256(content).hexdigest())

    async def until(self, uid: str, size: int) -> None:
        async with asyncio.timeout(DEADLINE):
            while len(self.received.get(uid, b"")) < size:
                await asyncio.sleep(0.001)


@asynccontextmanager
async def taking(wants: list[Want]) -> AsyncIterator[tuple[Transfer, Taker, asyncio.Task[None]]]:
    transfer = Transfer(wants, (uids.EXPLICIT_VR_LITTLE_ENDIAN,), is_streaming=True)
    taker = Taker(transfer, wants)
    task = asyncio.create_task(taker.run())
    try:
        yield transfer, taker, task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        transfer.release_all()


def begin(spool: Spool, want: Want) -> SpoolWriter:
    return spool.create(
        sop_class_uid=CT,
        sop_instance_uid=want.sop_instance_uid,
        transfer_syntax_uid=uids.EXPLICIT_VR_LITTLE_ENDIAN,
        source_ae_title="PACS",
    )


def store(spool: Spool, want: Want, content: bytes = b"content") -> SpooledInstance:
    writer = begin(spool, want)
    writer.write(memoryview(content))
    return writer.commit()


async def test_whole_instances_go_in_the_order_in_which_they_came(spool: Spool) -> None:
    async with taking(WANTS) as (transfer, taker, task):
        files = {}
        for want in reversed(WANTS):
            instance = store(spool, want, os.urandom(1000))
            files[want] = instance.path.read_bytes()
            transfer.hold(want, instance, Brought())
            await asyncio.sleep(0.01)
        await asyncio.wait_for(task, DEADLINE)
        assert list(taker.received) == [want.sop_instance_uid for want in reversed(WANTS)]
        assert taker.received == {want.sop_instance_uid: content for want, content in files.items()}
        assert taker.sent == {want: hashlib.sha256(content).hexdigest() for want, content in files.items()}
        assert transfer.backlog == 0


async def test_an_instance_goes_out_while_it_arrives(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "_PIECE", 1000)
    content = os.urandom(100_000)
    async with taking(WANTS[:1]) as (transfer, taker, task):
        writer = begin(spool, WANTS[0])
        transfer.begin(WANTS[0], writer)
        writer.write(memoryview(content[:50_000]))
        await taker.until(WANTS[0].sop_instance_uid, 49_000)
        writer.write(memoryview(content[50_000:]))
        instance = writer.commit()
        transfer.hold(WANTS[0], instance, Brought())
        expected = instance.path.read_bytes()
        await asyncio.wait_for(task, DEADLINE)
        assert taker.received[WANTS[0].sop_instance_uid] == expected
        assert taker.sent[WANTS[0]] == hashlib.sha256(expected).hexdigest()


async def test_whole_ones_go_before_one_that_arrives(spool: Spool) -> None:
    async with taking(WANTS[:2]) as (transfer, taker, _):
        transfer.begin(WANTS[0], begin(spool, WANTS[0]))
        transfer.hold(WANTS[1], store(spool, WANTS[1]), Brought())
        await taker.until(WANTS[1].sop_instance_uid, 1)
        assert next(iter(taker.received)) == WANTS[1].sop_instance_uid


@pytest.mark.parametrize("same", [True, False])
async def test_one_that_breaks_off_goes_on_only_with_the_same_bytes(
    spool: Spool, monkeypatch: pytest.MonkeyPatch, same: bool
) -> None:
    monkeypatch.setattr(streaming, "_PIECE", 1000)
    content = os.urandom(100_000)
    async with taking(WANTS[:1]) as (transfer, taker, task):
        first = begin(spool, WANTS[0])
        transfer.begin(WANTS[0], first)
        first.write(memoryview(content[:50_000]))
        await taker.until(WANTS[0].sop_instance_uid, 49_000)
        first.discard()
        again = begin(spool, WANTS[0])
        transfer.begin(WANTS[0], again)
        again.write(memoryview(content if same else content[:10_000] + b"x" + content[10_001:]))
        instance = again.commit()
        transfer.hold(WANTS[0], instance, Brought())
        if same:
            expected = instance.path.read_bytes()
            await asyncio.wait_for(task, DEADLINE)
            assert taker.received[WANTS[0].sop_instance_uid] == expected
            assert taker.sent[WANTS[0]] == hashlib.sha256(expected).hexdigest()
        else:
            with pytest.raises(errors.ArrivalBroken, match="other bytes"):
                await asyncio.wait_for(task, DEADLINE)
            assert taker.sent == {}


async def test_one_that_breaks_off_and_fails_breaks_the_answer(spool: Spool) -> None:
    async with taking(WANTS[:1]) as (transfer, taker, task):
        writer = begin(spool, WANTS[0])
        transfer.begin(WANTS[0], writer)
        writer.write(memoryview(bytes(1 << 20)))
        await taker.until(WANTS[0].sop_instance_uid, 1)
        writer.discard()
        transfer.fail(WANTS[0], errors.RepositoryError("gone"))
        with pytest.raises(errors.RepositoryError, match="gone"):
            await asyncio.wait_for(task, DEADLINE)


async def test_a_failure_breaks_the_answer(spool: Spool) -> None:
    async with taking(WANTS) as (transfer, taker, task):
        transfer.hold(WANTS[0], store(spool, WANTS[0]), Brought())
        await taker.until(WANTS[0].sop_instance_uid, 1)
        transfer.fail(WANTS[1], errors.RepositoryError("gone"))
        with pytest.raises(errors.RepositoryError, match="gone"):
            await asyncio.wait_for(task, DEADLINE)
        assert list(taker.sent) == [WANTS[0]]


async def test_what_failed_before_the_root_does_not(spool: Spool) -> None:
    transfer = Transfer(WANTS[:2], (uids.EXPLICIT_VR_LITTLE_ENDIAN,), is_streaming=True)
    transfer.fail(WANTS[0], errors.DocumentUniqueIdError("not there"))
    taker = Taker(transfer, WANTS[1:2])
    task = asyncio.create_task(taker.run())
    transfer.hold(WANTS[1], store(spool, WANTS[1]), Brought())
    await asyncio.wait_for(task, DEADLINE)
    assert list(taker.received) == [WANTS[1].sop_instance_uid]


async def test_who_falls_behind_is_told_of_and_catches_up(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "_PIECE", 1000)
    monkeypatch.setattr(streaming, "_PIECE_MOST", 10_000)
    monkeypatch.setattr(streaming, "_BEHIND", 100_000)
    monkeypatch.setattr(streaming, "_LOOK_EVERY", 0.01)

    async def until_slow(transfer: Transfer, is_slow: bool) -> None:
        async with asyncio.timeout(DEADLINE):
            while transfer.is_slow is not is_slow:
                await asyncio.sleep(0.001)

    async with taking(WANTS[:1]) as (transfer, taker, task):
        taker.gate.clear()
        writer = begin(spool, WANTS[0])
        transfer.begin(WANTS[0], writer)
        writer.write(memoryview(bytes(500_000)))
        await until_slow(transfer, True)
        taker.gate.set()
        await until_slow(transfer, False)
        transfer.hold(WANTS[0], writer.commit(), Brought())
        await asyncio.wait_for(task, DEADLINE)


async def test_a_taker_that_goes_away_leaves_nothing_open(spool: Spool) -> None:
    before = len(os.listdir("/proc/self/fd"))
    async with taking(WANTS[:1]) as (transfer, taker, _):
        writer = begin(spool, WANTS[0])
        transfer.begin(WANTS[0], writer)
        writer.write(memoryview(bytes(1 << 20)))
        await taker.until(WANTS[0].sop_instance_uid, 1)
    writer.discard()
    assert len(os.listdir("/proc/self/fd")) <= before
