"""Streaming transfers: who reads along, who lets go, and who stands still for whom."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.imaging.test_transfer import DEADLINE, EXPLICIT, Bench, bench, quiet_pynetdicom
from tests.support.scripted_pacs import Archive, ScriptedPacs
from xca_imaging.imaging.backpressure import Backpressure
from xca_imaging.imaging.holdings import Brought, Transfer
from xca_imaging.imaging.ledger import Want
from xca_imaging.imaging.receiver import PeerAssociation
from xca_imaging.imaging.spool import Spool, SpooledInstance
from xca_imaging.imaging.store_scp import StoreScp
from xca_imaging.imaging.transfer import Arrived, Begun, Failed, Transfers

__all__ = ["quiet_pynetdicom"]

KB = 1024


async def test_who_streams_reads_along_and_lets_go(tmp_path: Path) -> None:
    archive = Archive()
    wants = archive.add_series(4, size=300 * KB)
    async with bench(tmp_path, archive) as b:
        async with b.transfers.fetch(wants, accept=[EXPLICIT], is_streaming=True) as transfer:
            begun: list[Want] = []
            read: dict[Want, bytes] = {}
            async for event in transfer.events():
                match event:
                    case Begun(want, arriving):
                        begun.append(want)
                        with arriving.reader() as reader:
                            while data := await asyncio.wait_for(reader.read(1, 64 * KB), DEADLINE):
                                read[want] = read.get(want, b"") + data
                    case Arrived(want, instance):
                        assert read[want] == instance.path.read_bytes()
                        transfer.release(want)
                    case Failed():
                        pytest.fail(str(event))
            assert begun == wants
            assert transfer.backlog == 0
        await b.pacs_is_idle()
        instance = b.spool.find(wants[0].sop_instance_uid)
        assert instance is not None
        assert instance._holders == 0


async def test_others_are_not_told_that_an_instance_begins(tmp_path: Path) -> None:
    archive = Archive()
    wants = archive.add_series(2)
    async with bench(tmp_path, archive) as b, b.transfers.fetch(wants, accept=[EXPLICIT]) as transfer:
        assert {type(event) async for event in transfer.events()} == {Arrived}


async def test_what_must_be_looked_into_is_not_read_along(tmp_path: Path) -> None:
    """Only its header proves that it belongs where it is wanted: nothing of it may go out before."""
    archive = Archive()
    wants = archive.add_series(2)
    async with (
        bench(tmp_path, archive, finds=False) as b,
        b.transfers.fetch(wants, accept=[EXPLICIT], is_streaming=True) as transfer,
    ):
        assert not await asyncio.wait_for(transfer.planned(), DEADLINE)
        assert [type(event) async for event in transfer.events()] == [Arrived, Arrived]


# --------------------------------------------------------------------------------------------------------------------
# Backpressure
# --------------------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def two_pacs(tmp_path: Path, archives: Sequence[Archive], **options: Any) -> AsyncIterator[tuple[Bench, Bench]]:
    """Two PACSs before one spool of 4 MB."""
    spool = Spool(tmp_path / "spool", max_bytes=4000 * KB, high_water=0.5, low_water=0.3, retention=600, reserve_free=0)

    class Late:
        def __getattr__(self, name: str) -> Any:
            return getattr(transfers, name)

    scp = StoreScp(Late(), ae_title="XCAI", host="127.0.0.1", port=0, stall_timeout=4.0)
    await scp.start()
    destination = scp.sockets[0]
    with (
        ScriptedPacs(archives[0], destination, ae_title="ONE", **options) as one,
        ScriptedPacs(archives[1], destination, ae_title="TWO", **options) as two,
    ):
        settings = [
            pacs.settings.model_copy(update={"name": name, "retrieve_location_uid": f"1.2.{name}"})
            for pacs, name in ((one, "1"), (two, "2"))
        ]
        transfers = Transfers(
            pacs=settings,
            ae_title="XCAI",
            spool=spool,
            stall_timeout=4.0,
            grace=0.4,
            backoff=0.05,
            slow_backlog=500 * KB,
        )
        transfers.listener, transfers.receiving = destination, scp
        await transfers.start()
        try:
            yield Bench(one, transfers, spool, scp), Bench(two, transfers, spool, scp)
        finally:
            await transfers.close(0.0)
            await scp.close(0.0)
            spool.close()


def at(number: int, wants: Sequence[Want]) -> list[Want]:
    return [
        Want(each.study_instance_uid, each.series_instance_uid, each.sop_instance_uid, f"1.2.{number}")
        for each in wants
    ]


async def take_all(transfer: Transfer, pause: float = 0.0) -> int:
    """Let go of each instance as it comes; return how many came."""
    taken = 0
    async for event in transfer.events():
        assert not isinstance(event, Failed), event
        if isinstance(event, Arrived):
            transfer.release(event.want)
            taken += 1
            await asyncio.sleep(pause)
    return taken


async def test_a_slow_consumer_stops_its_own_pacs_only(tmp_path: Path) -> None:
    """More than the spool takes, for one who takes nothing for a while: nothing fails, and the other is served."""
    archives = Archive(), Archive()
    slow = at(1, archives[0].add_series(30, size=300 * KB))
    fast = at(2, archives[1].add_series(30, size=300 * KB))
    async with two_pacs(tmp_path, archives) as (one, _):
        transfers, spool = one.transfers, one.spool
        async with transfers.fetch(slow, accept=[EXPLICIT], is_streaming=True) as slowly:
            async with asyncio.timeout(DEADLINE):
                while not transfers.backpressure.paused:
                    await asyncio.sleep(0.01)
            sent = len(one.pacs.sent)
            assert spool.is_high
            async with transfers.fetch(fast, accept=[EXPLICIT], is_streaming=True) as quickly:
                assert await asyncio.wait_for(take_all(quickly), DEADLINE) == 30
            assert transfers.backpressure.paused == 1
            assert len(one.pacs.sent) <= sent + 2, "its PACS stands still"
            assert len(one.pacs.sent) < 20
            # longer than stall_timeout: standing still for a slow consumer is no stall
            await asyncio.sleep(4.5)
            assert not slowly.ledger.complete
            assert await asyncio.wait_for(take_all(slowly), DEADLINE) == 30
            assert {entry.attempts for entry in slowly.ledger} == {1}
        assert transfers.backpressure.paused == 0
        assert len(one.pacs.moves) == 1


async def test_who_keeps_up_is_served_over_the_association_of_the_slow(tmp_path: Path) -> None:
    archives = Archive(), Archive()
    wants = at(1, archives[0].add_series(20, size=300 * KB))
    async with two_pacs(tmp_path, archives) as (one, _):
        transfers = one.transfers
        async with transfers.fetch(wants, accept=[EXPLICIT], is_streaming=True) as slowly:
            async with asyncio.timeout(DEADLINE):
                while not transfers.backpressure.paused:
                    await asyncio.sleep(0.01)
            have = len(one.pacs.sent)
            async with transfers.fetch(wants[have + 1 : have + 3], accept=[EXPLICIT], is_streaming=True) as quickly:
                assert await asyncio.wait_for(take_all(quickly), DEADLINE) == 2
            assert await asyncio.wait_for(take_all(slowly), DEADLINE) == 20
        assert len(one.pacs.moves) == 1


async def test_a_spooled_transfer_is_never_slowed_down(tmp_path: Path) -> None:
    archives = Archive(), Archive()
    wants = at(1, archives[0].add_series(10, size=300 * KB))
    async with two_pacs(tmp_path, archives) as (one, _), one.transfers.fetch(wants, accept=[EXPLICIT]) as transfer:
        await asyncio.wait_for(transfer.wait(), DEADLINE)
        assert transfer.ledger.outcome().missing == ()
        assert one.spool.is_high
        assert one.transfers.backpressure.paused == 0


@dataclass
class _Level:
    """As much of a spool as backpressure looks at."""

    is_high: bool = False
    on_level: Any = None


def _association(number: int) -> PeerAssociation:
    return PeerAssociation(number, "A", "B", "127.0.0.1", 1, "1.2", "X")


async def test_word_by_word(tmp_path: Path) -> None:
    """The same rules on values: the word of the consumer, hysteresis, joiners, moves and associations that end."""
    level, log, due = _Level(), [], []
    pressure = Backpressure(
        level,  # type: ignore[arg-type]
        slow_backlog=100,
        soon=due.append,
        throttle=lambda transfer, is_slow: log.append(("throttle", is_slow)),
        pause=lambda association: log.append(("pause", association.id)),
        resume=lambda association: log.append(("resume", association.id)),
    )

    def look() -> list[Any]:
        while due:
            due.pop()()
        said = log[:]
        log.clear()
        return said

    wants = [Want("1.2", "1.3", f"1.4.{n}", "1.5") for n in range(4)]
    slow = Transfer(wants, (EXPLICIT,), is_streaming=True)
    pressure.open(slow)
    pressure.start_move(1, tuple(want.sop_instance_uid for want in wants))
    pressure.begin_store(_association(7), "1.4.0")
    slow.set_throttled(True)
    assert look() == []  # the spool is not high
    level.is_high = True
    level.on_level(True)
    assert look() == [("throttle", True), ("pause", 7)]
    pressure.begin_store(_association(8), "1.4.1")
    assert look() == [("pause", 8)]
    joining = Transfer(wants[2:3], (EXPLICIT,))
    pressure.open(joining)
    pressure.judge()
    assert sorted(look()) == [("resume", 7), ("resume", 8)]
    pressure.close(joining)
    assert sorted(look()) == [("pause", 7), ("pause", 8)]
    pressure.forget(_association(7))
    slow.set_throttled(False)
    assert look() == [("throttle", False), ("resume", 8)]
    # By what it leaves untaken: over the limit slow, half of it quick again.
    spool = Spool(tmp_path / "spool", max_bytes=10**6, retention=600, reserve_free=0)
    held = [_spooled(spool, want) for want in wants]
    for want, instance in zip(wants[:2], held, strict=False):
        slow.hold(want, instance, Brought())
    assert slow.backlog > 100
    assert look() == [("throttle", True), ("pause", 8)]
    pressure.finish_move(1)
    assert look() == [("resume", 8)]
    slow.release(wants[0])
    slow.release(wants[1])
    assert look() == [("throttle", False)]
    slow.release_all()
    spool.close()


def _spooled(spool: Spool, want: Want) -> SpooledInstance:
    writer = spool.create(
        sop_class_uid="1.2", sop_instance_uid=want.sop_instance_uid, transfer_syntax_uid=EXPLICIT, source_ae_title="A"
    )
    return writer.commit()
