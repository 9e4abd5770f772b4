"""Transfers against scripted PACSs, through the real Storage SCP and spool."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydicom
import pytest

from tests.imaging import test_transcode as transcoding
from tests.support.scripted_pacs import LOCATION, Archive, ScriptedPacs
from xca_imaging import uids
from xca_imaging.errors import (
    DocumentUniqueIdError,
    LocalProtocolError,
    RepositoryBusy,
    RepositoryError,
    RepositoryOutOfResources,
    UnknownRepositoryId,
)
from xca_imaging.imaging.ledger import Outcome, State, Want
from xca_imaging.imaging.spool import Spool
from xca_imaging.imaging.store_scp import StoreScp
from xca_imaging.imaging.transfer import Arrived, Failed, Transfer, Transfers

EXPLICIT = uids.EXPLICIT_VR_LITTLE_ENDIAN
JPEG_2000 = "1.2.840.10008.1.2.4.90"
DEADLINE = 8.0


@pytest.fixture(autouse=True)
def quiet_pynetdicom() -> None:
    logging.getLogger("pynetdicom").setLevel(logging.CRITICAL)


@dataclass
class Bench:
    """A PACS, and the transfer core of a node before it."""

    pacs: ScriptedPacs
    transfers: Transfers
    spool: Spool
    scp: StoreScp

    async def fetch(self, wants: Sequence[Want], accept: Sequence[str] = (EXPLICIT,)) -> Outcome:
        async with self.transfers.fetch(wants, accept=accept) as transfer:
            await asyncio.wait_for(transfer.wait(), DEADLINE)
            outcome = transfer.ledger.outcome()
        await self.pacs_is_idle()
        return outcome

    async def pacs_is_idle(self) -> None:
        """Wait for the PACS to end its moves: a transfer is complete before the last C-STORE response has come home."""
        async with asyncio.timeout(DEADLINE):
            while self.pacs.active:
                await asyncio.sleep(0.01)


@asynccontextmanager
async def bench(
    tmp_path: Path,
    archive: Archive,
    *scripts: str,
    stall_timeout: float = 4.0,
    grace: float = 0.4,
    max_bytes: int = 10**8,
    associations: int = 4,
    pacs_settings: Mapping[str, Any] = {},
    **pacs_options: Any,
) -> AsyncIterator[Bench]:
    spool = Spool(tmp_path / "spool", max_bytes=max_bytes, retention=600, reserve_free=0)

    class Late:
        """Stands in for the receiver until there is one: the PACS must know our port, and we its."""

        def __getattr__(self, name: str) -> Any:
            return getattr(transfers, name)

    scp = StoreScp(Late(), ae_title="XCAI", host="127.0.0.1", port=0, stall_timeout=stall_timeout)
    await scp.start()
    with ScriptedPacs(archive, scp.sockets[0], *scripts, **pacs_options) as pacs:
        transfers = Transfers(
            pacs=[pacs.settings.model_copy(update={"max_associations": associations, **pacs_settings})],
            ae_title="XCAI",
            spool=spool,
            stall_timeout=stall_timeout,
            grace=grace,
            backoff=0.05,
            seed=1,
        )
        transfers.listener = scp.sockets[0]
        await transfers.start()
        try:
            yield Bench(pacs, transfers, spool, scp)
        finally:
            await transfers.close(0.0)
            await scp.close(0.0)
            spool.close()


def errors(outcome: Outcome) -> dict[str, tuple[type, str]]:
    return {want.sop_instance_uid: (type(error), error.context) for want, error in outcome.failed}


# --------------------------------------------------------------------------------------------------------------------
# What comes
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script",
    [
        "good",
        "no_pending",
        "store_before_first_response",
        "store_after_final",
        "unwanted_uid",
        "same_uid_twice",
        "wrong_ae",
    ],
)
async def test_whole_series(tmp_path: Path, script: str) -> None:
    archive = Archive()
    wants = archive.add_series(4)
    async with bench(tmp_path, archive, script) as b:
        async with b.transfers.fetch(wants, accept=[EXPLICIT]) as transfer:
            await asyncio.wait_for(transfer.wait(), DEADLINE)
            assert transfer.ledger.outcome().status == uids.STATUS_SUCCESS
            for want in wants:
                held = transfer.held(want)
                sent = archive.series[want.study_instance_uid, want.series_instance_uid][want.sop_instance_uid]
                read = pydicom.dcmread(held.path)
                assert read == sent
                assert transfer.ledger[want].size == held.path.stat().st_size
                assert transfer.ledger[want].transfer_syntax_uid == EXPLICIT
                assert transfer.ledger[want].attempts == 1
        assert b.pacs.moves == [("SERIES", ())]
        assert b.pacs.finds == ["SERIES"]


async def test_unwanted_instance_is_refused_and_second_copy_taken(tmp_path: Path) -> None:
    archive = Archive()
    wants = archive.add_series(1)
    async with bench(tmp_path, archive, "unwanted_uid") as b:
        assert (await b.fetch(wants)).status == uids.STATUS_SUCCESS
        assert [status for _, status in b.pacs.sent] == [0x0124, 0x0000]
    async with bench(tmp_path / "other", archive, "same_uid_twice") as b:
        assert (await b.fetch(wants)).status == uids.STATUS_SUCCESS
        assert [status for _, status in b.pacs.sent] == [0x0000, 0x0000]
        assert b.spool.find(wants[0].sop_instance_uid).size == b.spool.used_bytes


async def test_series_move_in_parallel_within_the_budget(tmp_path: Path) -> None:
    archive = Archive()
    study = "1.2.3"
    wants = [want for _ in range(5) for want in archive.add_series(3, study=study)]
    async with bench(tmp_path, archive, latency=0.05, associations=2) as b:
        assert (await b.fetch(wants)).status == uids.STATUS_SUCCESS
        assert b.pacs.most_active == 2
        assert b.pacs.most_storing <= 2
        assert len(b.pacs.moves) == 5


async def test_part_of_a_series_is_asked_by_list(tmp_path: Path) -> None:
    archive = Archive()
    wants = archive.add_series(5)
    async with bench(tmp_path, archive) as b:
        assert (await b.fetch(wants[1:3])).status == uids.STATUS_SUCCESS
        assert b.pacs.moves == [("IMAGE", (wants[1].sop_instance_uid, wants[2].sop_instance_uid))]
        assert b.pacs.finds == ["SERIES", "IMAGE"]


async def test_without_c_find_the_objects_are_looked_into(tmp_path: Path) -> None:
    archive = Archive()
    wants = archive.add_series(2)
    other = archive.add_series(1, study=wants[0].study_instance_uid)
    misplaced = Want(wants[0].study_instance_uid, wants[0].series_instance_uid, other[0].sop_instance_uid, LOCATION)
    async with bench(tmp_path, archive, "wrong_series", finds=False) as b:
        outcome = await b.fetch([*wants, misplaced])
        assert set(outcome.held) == set(wants)
        assert errors(outcome)[misplaced.sop_instance_uid][0] is DocumentUniqueIdError


async def test_held_instances_serve_again_without_the_pacs(tmp_path: Path) -> None:
    archive = Archive()
    wants = archive.add_series(3)
    async with bench(tmp_path, archive) as b:
        await b.fetch(wants)
        asked = len(b.pacs.moves), len(b.pacs.finds)
        outcome = await b.fetch(wants)
        assert outcome.status == uids.STATUS_SUCCESS
        assert (len(b.pacs.moves), len(b.pacs.finds)) == asked
        # ... but not in a series where they are not.
        elsewhere = Want(wants[0].study_instance_uid, "1.2.99", wants[0].sop_instance_uid, LOCATION)
        assert errors(await b.fetch([elsewhere]))[elsewhere.sop_instance_uid][0] is DocumentUniqueIdError


async def test_identical_requests_at_once_fetch_each_instance_once(tmp_path: Path) -> None:
    archive = Archive()
    wants = archive.add_series(5)
    async with bench(tmp_path, archive, latency=0.02) as b:
        outcomes = await asyncio.gather(*(b.fetch(wants) for _ in range(30)))
        assert {outcome.status for outcome in outcomes} == {uids.STATUS_SUCCESS}
        assert len(b.pacs.sent) == 5
        assert b.pacs.finds == ["SERIES"]


async def test_events_name_each_want_once(tmp_path: Path) -> None:
    archive = Archive()
    wants = archive.add_series(3)
    bogus = Want(wants[0].study_instance_uid, wants[0].series_instance_uid, "1.2.3.4", LOCATION)
    async with bench(tmp_path, archive) as b, b.transfers.fetch([*wants, bogus], accept=[EXPLICIT]) as transfer:
        seen = [event async for event in transfer.events()]
        assert {event.want for event in seen if isinstance(event, Arrived)} == set(wants)
        assert [event.want for event in seen if isinstance(event, Failed)] == [bogus]
        with pytest.raises(LocalProtocolError):
            transfer.held(bogus)


async def test_a_restarted_node_does_not_fetch_again(tmp_path: Path) -> None:
    archive = Archive()
    wants = archive.add_series(3)
    async with bench(tmp_path, archive) as b:
        await b.fetch(wants)
    spooled = sorted((tmp_path / "spool" / "objects").iterdir())
    spooled[1].write_bytes(b"x" + spooled[1].read_bytes()[1:])
    async with bench(tmp_path, archive) as b:
        async with b.transfers.fetch(wants, accept=[EXPLICIT]) as transfer:
            await asyncio.wait_for(transfer.wait(), DEADLINE)
            assert sorted(entry.attempts for entry in transfer.ledger) == [0, 0, 1]
            for want in wants:
                assert pydicom.dcmread(transfer.held(want).path).SOPInstanceUID == want.sop_instance_uid
        await b.pacs_is_idle()
        assert len(b.pacs.sent) == 1, "only what was damaged comes again"


async def test_a_transfer_knows_what_it_is_made_of(tmp_path: Path) -> None:
    archive = Archive()
    wants = archive.add_series(2)
    async with bench(tmp_path, archive) as b, b.transfers.fetch(wants, accept=[EXPLICIT]) as transfer:
        assert await asyncio.wait_for(transfer.planned(), DEADLINE)
        await asyncio.wait_for(transfer.wait(), DEADLINE)
        entry = transfer.ledger[wants[0]]
        assert (entry.pacs, entry.method, entry.bytes_changed) == ("scripted", "c-move", False)
        instance = transfer.held(wants[0])
        assert (instance.source, instance.study_instance_uid) == ("scripted", wants[0].study_instance_uid)


# --------------------------------------------------------------------------------------------------------------------
# Fairness
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("weight", [1.0, 3.0])
async def test_communities_share_a_pacs_by_weight(tmp_path: Path, weight: float) -> None:
    """50 requests of each of two communities at a PACS of four associations; those of the first all come first.

    Counted while both have something waiting: Jain's index of what each got for its weight.
    """
    archive = Archive()
    requests = [archive.add_series(4) for _ in range(100)]
    asker_of = {want.sop_instance_uid: n >= 50 for n, wants in enumerate(requests) for want in wants}
    async with bench(tmp_path, archive, "no_pending", latency=0.01, limit=4, stall_timeout=20.0) as b:

        async def ask(wants: Sequence[Want], asker: str, weight: float) -> Outcome:
            async with b.transfers.fetch(wants, accept=[EXPLICIT], asker=asker, weight=weight) as transfer:
                await asyncio.wait_for(transfer.wait(), 40)
                return transfer.ledger.outcome()

        tasks = [asyncio.create_task(ask(wants, "west", weight)) for wants in requests[:50]]
        await asyncio.sleep(0.05)
        tasks += [asyncio.create_task(ask(wants, "east", 1.0)) for wants in requests[50:]]
        outcomes = await asyncio.gather(*tasks)
        assert [outcome.failed for outcome in outcomes if outcome.failed] == []
        await b.pacs_is_idle()
        assert b.pacs.rejected == 0
        assert b.pacs.most_associations <= 4
        order = [asker_of[uid] for uid, _ in b.pacs.sent]
    assert len(order) == 400
    first_east = order.index(True)
    assert first_east <= 40, "who comes later does not wait for all that was there"
    last = min(len(order) - order[::-1].index(False), len(order) - order[::-1].index(True))
    shared = order[first_east : int(0.9 * last)]
    shares = [shared.count(False) / weight, float(shared.count(True))]
    jain = sum(shares) ** 2 / (2 * sum(share**2 for share in shares))
    assert jain >= 0.95, shares


# --------------------------------------------------------------------------------------------------------------------
# Transcoding
# --------------------------------------------------------------------------------------------------------------------


async def test_transcoded_copies_serve_only_who_cannot_have_the_original(tmp_path: Path) -> None:
    archive = Archive()
    original = transcoding.image(bits=(8, 8))
    stream = transcoding.jpeg_2000(original, photometric_interpretation=2)
    stored = transcoding.packed(original, [stream], transcoding.JPEG_2000_LOSSLESS)
    place = (str(stored.StudyInstanceUID), str(stored.SeriesInstanceUID))
    archive.series[place] = {stored.SOPInstanceUID: stored}
    want = Want(*place, str(stored.SOPInstanceUID), LOCATION)
    both = [EXPLICIT, transcoding.JPEG_2000_LOSSLESS]
    async with bench(tmp_path, archive, "no_pending", pacs_settings={"transcode": True}) as b:

        async def get(accept: Sequence[str]) -> tuple[str, bool, int]:
            async with b.transfers.fetch([want], accept=accept) as transfer:
                await asyncio.wait_for(transfer.wait(), 20)
                entry = transfer.ledger[want]
                assert entry.error is None
                return entry.transfer_syntax_uid, entry.bytes_changed, entry.attempts

        assert await get([EXPLICIT]) == (EXPLICIT, True, 1)
        assert await get([EXPLICIT]) == (EXPLICIT, True, 0)
        assert await get(both) == (transcoding.JPEG_2000_LOSSLESS, False, 0)
        assert await get([uids.IMPLICIT_VR_LITTLE_ENDIAN]) == (uids.IMPLICIT_VR_LITTLE_ENDIAN, True, 0)
        assert len(b.pacs.sent) == 1
        assert b.transfers.stock.transcoders.counts.done == 2
    # Over a restart, with the original gone.
    (record,) = [each for each in (tmp_path / "spool" / "objects").iterdir() if stream in each.read_bytes()]
    record.unlink()
    async with bench(tmp_path, archive, "no_pending", pacs_settings={"transcode": True}) as b:
        async with b.transfers.fetch([want], accept=[EXPLICIT]) as transfer:
            await asyncio.wait_for(transfer.wait(), 20)
            assert (transfer.ledger[want].bytes_changed, transfer.ledger[want].attempts) == (True, 0)
        async with b.transfers.fetch([want], accept=both) as transfer:
            await asyncio.wait_for(transfer.wait(), 20)
            assert (transfer.ledger[want].bytes_changed, transfer.ledger[want].attempts) == (False, 1)
        await b.pacs_is_idle()


async def test_a_transfer_that_is_left_while_it_is_transcoded_leaves_nothing_held(tmp_path: Path) -> None:
    archive = Archive()
    original = transcoding.image(bits=(8, 8))
    stored = transcoding.packed(
        original, [transcoding.jpeg_2000(original, photometric_interpretation=2)], transcoding.JPEG_2000_LOSSLESS
    )
    place = (str(stored.StudyInstanceUID), str(stored.SeriesInstanceUID))
    archive.series[place] = {stored.SOPInstanceUID: stored}
    want = Want(*place, str(stored.SOPInstanceUID), LOCATION)
    async with bench(tmp_path, archive, "no_pending", pacs_settings={"transcode": True}) as b:
        async with b.transfers.fetch([want], accept=[EXPLICIT]) as transfer, asyncio.timeout(DEADLINE):
            while b.spool.find(want.sop_instance_uid) is None:
                await asyncio.sleep(0.001)
            assert not transfer.ledger.complete
        await b.pacs_is_idle()
        await asyncio.sleep(0.05)
        instance = b.spool.find(want.sop_instance_uid)
        assert instance is not None
        assert instance._holders == 0
        assert b.spool.used_bytes == instance.size


# --------------------------------------------------------------------------------------------------------------------
# What is asked again
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script", ["success_with_missing", "b000_without_list", "abort_mid_object", "abort_move", "nothing_found", "a702"]
)
async def test_only_what_is_missing_is_asked_again(tmp_path: Path, script: str) -> None:
    archive = Archive()
    wants = archive.add_series(5)
    async with bench(tmp_path, archive, script, "good") as b:
        assert (await b.fetch(wants)).status == uids.STATUS_SUCCESS
        assert len(b.pacs.moves) == 2
        stored = [uid for uid, status in b.pacs.sent if status == 0]
        assert len(stored) == len(set(stored)) == 5


async def test_every_7th_is_dropped_and_asked_again(tmp_path: Path) -> None:
    archive = Archive()
    wants = archive.add_series(30)
    async with (
        bench(tmp_path, archive, "drops_every_7th", "good") as b,
        b.transfers.fetch(wants, accept=[EXPLICIT]) as transfer,
    ):
        await asyncio.wait_for(transfer.wait(), DEADLINE)
        assert transfer.ledger.outcome().status == uids.STATUS_SUCCESS
        dropped = {want.sop_instance_uid for want in wants[6::7]}
        assert [set(uids_) for _, uids_ in b.pacs.moves] == [set(), dropped]
        assert sorted(entry.attempts for entry in transfer.ledger) == [1] * 26 + [2] * 4


async def test_lists_that_bring_nothing_are_asked_one_by_one_and_remembered(tmp_path: Path) -> None:
    archive = Archive()
    wants = archive.add_series(6)
    async with bench(tmp_path, archive, "zero_suboperations") as b:
        assert (await b.fetch(wants[:3])).status == uids.STATUS_SUCCESS
        assert [len(listed) for _, listed in b.pacs.moves] == [3, 1, 1, 1]
        assert (await b.fetch(wants[3:5])).status == uids.STATUS_SUCCESS
        assert [len(listed) for _, listed in b.pacs.moves] == [3, 1, 1, 1, 1, 1]


async def test_busy_then_ok(tmp_path: Path) -> None:
    archive = Archive()
    wants = archive.add_series(2)
    async with bench(tmp_path, archive, busy=2) as b:
        assert (await b.fetch(wants)).status == uids.STATUS_SUCCESS
        assert b.pacs.rejected == 2


# --------------------------------------------------------------------------------------------------------------------
# What does not come
# --------------------------------------------------------------------------------------------------------------------


async def test_always_busy_is_told(tmp_path: Path) -> None:
    archive = Archive()
    wants = archive.add_series(2)
    async with bench(tmp_path, archive, busy=1000) as b:
        outcome = await b.fetch(wants)
        assert outcome.status == uids.STATUS_FAILURE
        assert {kind for kind, _ in errors(outcome).values()} == {RepositoryBusy}


async def test_always_missing_fails_with_the_last_status(tmp_path: Path) -> None:
    archive = Archive()
    wants = archive.add_series(3)
    async with bench(tmp_path, archive, "success_with_missing") as b:
        outcome = await b.fetch(wants)
        assert outcome.status == uids.STATUS_PARTIAL_SUCCESS
        kind, text = errors(outcome)[wants[2].sop_instance_uid]
        assert kind is RepositoryError
        assert "0x0000" in text
        assert len(b.pacs.moves) == 3


async def test_not_there_is_told_before_and_after_a_move(tmp_path: Path) -> None:
    archive = Archive()
    wants = archive.add_series(3)
    study, series = wants[0].study_instance_uid, wants[0].series_instance_uid
    async with bench(tmp_path, archive) as b:
        unknown = [
            Want(study, series, "1.2.3.4", LOCATION),
            Want(study, "1.2.3.5", wants[0].sop_instance_uid, LOCATION),
            Want("1.2.3.6", series, wants[0].sop_instance_uid, LOCATION),
        ]
        for want in unknown:
            outcome = await b.fetch([want])
            assert outcome.failed[0][1].code == "XDSDocumentUniqueIdError"
            assert outcome.failed[0][1].location == want.sop_instance_uid
        assert b.pacs.moves == []
        # As many wanted as the series has, but one of them is another: found out after the move.
        outcome = await b.fetch([*wants[:2], unknown[0]])
        assert set(outcome.held) == set(wants[:2])
        assert errors(outcome)["1.2.3.4"][0] is DocumentUniqueIdError
        assert [level for level, _ in b.pacs.moves] == ["SERIES"]


async def test_refused_requests(tmp_path: Path) -> None:
    archive = Archive()
    (want,) = archive.add_series(1)
    async with bench(tmp_path, archive) as b:
        foreign = Want(want.study_instance_uid, want.series_instance_uid, want.sop_instance_uid, "1.9.9")
        assert errors(await b.fetch([foreign]))[want.sop_instance_uid][0] is UnknownRepositoryId
        assert errors(await b.fetch([want], accept=()))[want.sop_instance_uid][0] is RepositoryError
        assert b.pacs.moves == []


async def test_unknown_destination_says_what_to_configure(tmp_path: Path) -> None:
    archive = Archive()
    wants = archive.add_series(2)
    async with bench(tmp_path, archive, "a801") as b:
        outcome = await b.fetch(wants)
        host, port = b.scp.sockets[0]
        for kind, text in errors(outcome).values():
            assert kind is RepositoryError
            assert f"0xA801, move destination unknown: on the PACS, add the remote AE 'XCAI' with host {host}" in text
            assert str(port) in text
        assert len(b.pacs.moves) == 1


@pytest.mark.parametrize("finds", [True, False])
async def test_transfer_syntax_that_is_not_listed(tmp_path: Path, finds: bool) -> None:
    archive = Archive()
    wants = archive.add_series(3)
    async with bench(tmp_path, archive, "no_pending", finds=finds) as b:
        outcome = await b.fetch(wants, accept=[JPEG_2000])
        for kind, text in errors(outcome).values():
            assert kind is RepositoryError
            assert "no listed transfer syntax" in text
            assert EXPLICIT in text
        assert (await b.fetch(wants, accept=[JPEG_2000, EXPLICIT])).status == uids.STATUS_SUCCESS


async def test_different_lists_never_run_together(tmp_path: Path) -> None:
    archive = Archive()
    first, second = archive.add_series(4), archive.add_series(4)
    async with bench(tmp_path, archive, latency=0.03) as b:
        one, other = await asyncio.gather(
            b.fetch(first, accept=[EXPLICIT]), b.fetch(second, accept=[EXPLICIT, JPEG_2000])
        )
        assert one.status == other.status == uids.STATUS_SUCCESS
        assert b.pacs.most_active == 1


@pytest.mark.parametrize("script", ["endless_pending", "deaf"])
async def test_no_progress_fails_within_the_time_out(tmp_path: Path, script: str) -> None:
    archive = Archive()
    wants = archive.add_series(2)
    async with bench(tmp_path, archive, script, stall_timeout=0.8) as b:
        started = time.monotonic()
        async with b.transfers.fetch(wants, accept=[EXPLICIT]) as transfer:
            await asyncio.wait_for(transfer.wait(), DEADLINE)
            outcome = transfer.ledger.outcome()
        assert time.monotonic() - started < 1.6
        for kind, text in errors(outcome).values():
            assert kind is RepositoryError
            assert "0.8 s" in text
        assert len(errors(outcome)) == 2


async def test_a_silent_pacs_is_left_alone_for_a_while_and_that_is_told(tmp_path: Path) -> None:
    archive = Archive()
    wants = archive.add_series(2)
    async with bench(tmp_path, archive, "deaf", stall_timeout=0.8) as b:
        await b.fetch(wants[:1])
        moves, finds = len(b.pacs.moves), len(b.pacs.finds)
        kind, text = errors(await b.fetch(wants[1:]))[wants[1].sop_instance_uid]
        assert kind is RepositoryBusy
        assert "not asked since" in text
        assert "0.8 s" in text
        assert (len(b.pacs.moves), len(b.pacs.finds)) == (moves, finds)


async def test_pacs_that_dies_in_mid_transfer(tmp_path: Path) -> None:
    archive = Archive()
    wants = archive.add_series(40)
    async with (
        bench(tmp_path, archive, latency=0.02, stall_timeout=3.0) as b,
        b.transfers.fetch(wants, accept=[EXPLICIT]) as transfer,
    ):
        async for _ in transfer.events():
            break
        died = time.monotonic()
        await asyncio.to_thread(b.pacs.kill)
        await asyncio.wait_for(transfer.wait(), DEADLINE)
        assert time.monotonic() - died < 4.5
        outcome = transfer.ledger.outcome()
        assert outcome.status == uids.STATUS_PARTIAL_SUCCESS
        assert len(outcome.held) + len(outcome.failed) == 40
        assert outcome.missing == ()


async def test_full_spool_fails_what_does_not_fit(tmp_path: Path) -> None:
    archive = Archive()
    wants = archive.add_series(4, size=1_000_000)
    async with bench(tmp_path, archive, "no_pending", max_bytes=2_500_000) as b:
        outcome = await b.fetch(wants)
        assert len(outcome.held) == 2
        assert {kind for kind, _ in errors(outcome).values()} == {RepositoryOutOfResources}
        assert [status for _, status in b.pacs.sent] == [0, 0, 0xA700, 0xA700]
        assert len(b.pacs.moves) == 1


async def test_request_is_refused_when_the_spool_has_no_room(tmp_path: Path) -> None:
    archive = Archive()
    wants = archive.add_series(1)
    async with bench(tmp_path, archive, max_bytes=1000) as b:
        assert errors(await b.fetch(wants))[wants[0].sop_instance_uid][0] is RepositoryOutOfResources
        assert b.pacs.moves == []


# --------------------------------------------------------------------------------------------------------------------
# Who goes away
# --------------------------------------------------------------------------------------------------------------------


async def test_leaving_cancels_within_a_second(tmp_path: Path) -> None:
    archive = Archive()
    wants = archive.add_series(200)
    async with bench(tmp_path, archive, latency=0.02) as b:
        async with b.transfers.fetch(wants, accept=[EXPLICIT]) as transfer:
            async for _ in transfer.events():
                break
            held = next(transfer.held(e.want) for e in transfer.ledger if e.state is State.HELD)
        left = time.monotonic()
        while b.pacs.active and time.monotonic() - left < 3:
            await asyncio.sleep(0.02)
        assert time.monotonic() - left < 1.0
        assert len(b.pacs.sent) < 100
        assert held.path.exists()  # for the retention time


async def test_others_keep_what_they_wait_for(tmp_path: Path) -> None:
    archive = Archive()
    wants = archive.add_series(20)
    async with bench(tmp_path, archive, latency=0.02) as b:
        stays = asyncio.create_task(b.fetch(wants))
        async with b.transfers.fetch(wants, accept=[EXPLICIT]) as transfer:
            async for _ in transfer.events():
                break
        assert (await asyncio.wait_for(stays, DEADLINE)).status == uids.STATUS_SUCCESS
        assert len({uid for uid, _ in b.pacs.sent}) == len(b.pacs.sent) == 20


async def test_closing_fails_what_is_open_and_ends_threads(tmp_path: Path) -> None:
    archive = Archive()
    wants = archive.add_series(200)
    async with bench(tmp_path, archive, latency=0.02) as b:
        waiting = asyncio.create_task(b.fetch(wants))
        while not b.pacs.sent:
            await asyncio.sleep(0.01)
        await b.transfers.close(0.1)
        outcome = await waiting
        assert {kind for kind, _ in errors(outcome).values()} == {RepositoryBusy}
        assert not [thread for thread in threading.enumerate() if "Requestor" in thread.name and thread.is_alive()] or (
            b.pacs.active == 0
        )


async def test_holds_are_released(tmp_path: Path) -> None:
    archive = Archive()
    wants = archive.add_series(2)
    async with bench(tmp_path, archive) as b:
        transfer: Transfer
        async with b.transfers.fetch(wants, accept=[EXPLICIT]) as transfer:
            await asyncio.wait_for(transfer.wait(), DEADLINE)
            instances = [transfer.held(want) for want in wants]
        for instance in instances:
            with pytest.raises(ValueError, match="more often than held"):
                instance.release()
