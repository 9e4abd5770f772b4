"""C-MOVE as a requester, against scripted PACSs: what comes back, what is raised, and how it ends when cancelled."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from pynetdicom import AE, evt
from pynetdicom.presentation import AllStoragePresentationContexts

from tests.support import peers
from tests.support.scripted_pacs import Archive, ScriptedPacs
from xca_imaging import settings
from xca_imaging.errors import ConnectFailed, LocalProtocolError, PeerBusy, PeerRefused
from xca_imaging.imaging.backends import MoveJob, MoveResult
from xca_imaging.imaging.backends.cmove import CMove
from xca_imaging.imaging.backends.pool import Associations
from xca_imaging.imaging.ledger import Want

# A pynetdicom peer that has rejected an association may, when it shuts down, abort it in a state that knows no abort.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture(autouse=True)
def quiet_pynetdicom() -> None:
    logging.getLogger("pynetdicom").setLevel(logging.CRITICAL)


@pytest.fixture(scope="module")
def destination() -> Iterator[tuple[str, int]]:
    """A Storage SCP that takes everything: these tests are about the requester."""
    ae = AE("XCAI")
    ae.maximum_associations = 50
    ae.supported_contexts = AllStoragePresentationContexts
    server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_STORE, lambda _: 0x0000)])
    yield server.server_address
    ae.shutdown()


@contextmanager
def scripted(destination: tuple[str, int], *scripts: str, count: int = 3, **options: Any) -> Iterator[tuple[Any, Any]]:
    archive = Archive()
    wants = archive.add_series(count)
    with ScriptedPacs(archive, destination, *scripts, **options) as pacs:
        yield pacs, wants


def series_of(wants: list[Want]) -> MoveJob:
    return MoveJob("SERIES", wants[0].study_instance_uid, wants[0].series_instance_uid)


LISTENER = ("192.0.2.7", 11112)


def requester(pacs: settings.Pacs, *, idle_timeout: float = 3.0, **options: Any) -> CMove:
    associations = Associations(
        pacs, calling_ae_title="XCAI", listener=LISTENER, connect_timeout=5.0, idle_timeout=idle_timeout
    )
    return CMove(associations, ae_title="XCAI", listener=LISTENER, **options)


async def move(pacs: ScriptedPacs, job: MoveJob, **options: Any) -> tuple[MoveResult, list[MoveResult]]:
    responses: list[MoveResult] = []
    backend = requester(pacs.settings, **options)
    try:
        return await backend.move(job, responses.append), responses
    finally:
        await backend.close()


async def test_responses_and_final_counters(destination: tuple[str, int]) -> None:
    with scripted(destination, "good") as (pacs, wants):
        result, responses = await move(pacs, series_of(wants))
        assert (result.status, result.completed, result.failed) == (0x0000, 3, 0)
        assert [each.remaining for each in responses] == [2, 1, 0]
        assert pacs.moves == [("SERIES", ())]


async def test_levels_and_lists(destination: tuple[str, int]) -> None:
    with scripted(destination, "no_pending") as (pacs, wants):
        study, series = wants[0].study_instance_uid, wants[0].series_instance_uid
        listed = tuple(want.sop_instance_uid for want in wants[:2])
        await move(pacs, MoveJob("STUDY", study))
        await move(pacs, MoveJob("IMAGE", study, series, listed))
        await move(pacs, MoveJob("IMAGE", study, series, listed[:1]))
        assert pacs.moves == [("STUDY", ()), ("IMAGE", listed), ("IMAGE", listed[:1])]


@pytest.mark.parametrize(
    "job",
    [
        MoveJob("STUDY", ""),
        MoveJob("SERIES", "1.2"),
        MoveJob("IMAGE", "1.2", "1.3"),
        MoveJob("IMAGE", "1.2", "1.3", ("1.4", "")),
        MoveJob("IMAGE", "1.2", "1.3", tuple(f"1.4.{n}" for n in range(129))),
    ],
)
async def test_an_identifier_that_would_match_more_than_asked_is_never_sent(
    destination: tuple[str, int], job: MoveJob
) -> None:
    with scripted(destination) as (pacs, _):
        with pytest.raises(LocalProtocolError):
            await move(pacs, job)
        assert pacs.moves == []


async def test_failed_list_is_read(destination: tuple[str, int]) -> None:
    with scripted(destination, "drops_every_7th", count=15) as (pacs, wants):
        result, _ = await move(pacs, series_of(wants))
        assert (result.status, result.completed, result.failed) == (0xB000, 13, 2)
        assert result.failed_uids == (wants[6].sop_instance_uid, wants[13].sop_instance_uid)
    with scripted(destination, "drops_every_7th", count=7) as (pacs, wants):
        assert (await move(pacs, series_of(wants)))[0].failed_uids == (wants[6].sop_instance_uid,)


async def test_warning_without_a_failed_list(destination: tuple[str, int]) -> None:
    with scripted(destination, "b000_without_list") as (pacs, wants):
        result, _ = await move(pacs, series_of(wants))
        assert (result.status, result.completed, result.failed, result.failed_uids) == (0xB000, 2, 1, ())


async def test_a_list_that_is_answered_with_nothing_is_told_as_it_is(destination: tuple[str, int]) -> None:
    """Success and 0 sub-operations: what to make of it is for the scheduler."""
    with scripted(destination, "zero_suboperations") as (pacs, wants):
        study, series = wants[0].study_instance_uid, wants[0].series_instance_uid
        listed = tuple(want.sop_instance_uid for want in wants)
        result, _ = await move(pacs, MoveJob("IMAGE", study, series, listed))
        assert (result.status, result.completed) == (0x0000, 0)


@pytest.mark.parametrize("script", ["store_before_first_response", "store_after_final"])
async def test_instances_before_the_first_response_and_after_the_last(
    destination: tuple[str, int], script: str
) -> None:
    with scripted(destination, script) as (pacs, wants):
        assert (await move(pacs, series_of(wants)))[0].completed == 3


async def test_unknown_destination_says_what_to_configure(destination: tuple[str, int]) -> None:
    text = r"0xA801.*'XCAI' with host 192\.0\.2\.7 and port 11112"
    with scripted(destination, "a801") as (pacs, wants), pytest.raises(PeerRefused, match=text):
        await move(pacs, series_of(wants))


async def test_a_pacs_that_is_unable_without_a_word(destination: tuple[str, int]) -> None:
    """Orthanc answers so for a destination that it does not know."""
    with scripted(destination, "unable") as (pacs, wants):
        result, _ = await move(pacs, series_of(wants))
    assert result.status == 0xC000
    assert "know the remote AE 'XCAI' with host 192.0.2.7 and port 11112" in result.error_comment


async def test_out_of_resources_is_for_the_scheduler(destination: tuple[str, int]) -> None:
    """It also is what some answer when every sub-operation failed, for whatever reason."""
    with scripted(destination, "a702") as (pacs, wants):
        assert (await move(pacs, series_of(wants)))[0].status == 0xA702


async def test_rejected_association_is_busy(destination: tuple[str, int]) -> None:
    with scripted(destination, busy=1) as (pacs, wants):
        with pytest.raises(PeerBusy, match="2/3/2"):
            await move(pacs, series_of(wants))
        assert (await move(pacs, series_of(wants)))[0].status == 0x0000


async def test_pacs_that_is_not_there(destination: tuple[str, int]) -> None:
    with scripted(destination) as (pacs, wants):
        away = pacs.settings
    with pytest.raises(ConnectFailed, match=str(away.port)):
        await requester(away).move(series_of(wants), lambda _: None)


async def test_abort_is_an_end_without_status(destination: tuple[str, int]) -> None:
    with scripted(destination, "abort_move") as (pacs, wants):
        result, _ = await move(pacs, series_of(wants))
        assert result.status is None
        assert "the association ended" in result.error_comment


async def test_slow_move_outlasts_every_response_time_out(destination: tuple[str, int]) -> None:
    with scripted(destination, "no_pending", latency=0.3) as (pacs, wants):
        assert (await move(pacs, series_of(wants)))[0].status == 0x0000


@pytest.mark.parametrize(("script", "longest"), [("endless_pending", 0.8), ("deaf", 1.2)])
async def test_cancel(destination: tuple[str, int], script: str, longest: float) -> None:
    """C-CANCEL first; A-ABORT for a PACS that does not hear it."""
    with scripted(destination, script) as (pacs, wants):
        backend = requester(pacs.settings, cancel_timeout=0.5)
        task = asyncio.ensure_future(backend.move(series_of(wants), lambda _: None))
        await asyncio.sleep(0.2)
        started = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert time.monotonic() - started < longest
        await backend.close()


# --- Associations that are used again ---------------------------------------------------------------------------------


async def test_one_association_for_moves_one_after_the_other(destination: tuple[str, int]) -> None:
    with scripted(destination, "no_pending") as (pacs, wants):
        backend = requester(pacs.settings, idle_timeout=0.2)
        for _ in range(3):
            assert (await backend.move(series_of(wants), lambda _: None)).completed == 3
        assert pacs.associations == 1
        await asyncio.sleep(0.4)
        assert (await backend.move(series_of(wants), lambda _: None)).completed == 3
        assert pacs.associations == 2
        await backend.close()


async def test_moves_at_the_same_time_have_an_association_each(destination: tuple[str, int]) -> None:
    with scripted(destination, "no_pending", latency=0.05) as (pacs, wants):
        backend = requester(pacs.settings)
        await asyncio.gather(*(backend.move(series_of(wants), lambda _: None) for _ in range(3)))
        assert (pacs.associations, pacs.most_active) == (3, 3)
        await backend.close()


@pytest.mark.parametrize("script", ["one_per_association", "aborts_the_second"])
async def test_a_pacs_that_refuses_a_second_move_on_an_association(destination: tuple[str, int], script: str) -> None:
    with scripted(destination, script) as (pacs, wants):
        backend = requester(pacs.settings)
        for _ in range(3):
            assert (await backend.move(series_of(wants), lambda _: None)).completed == 3
        assert pacs.associations == 3
        assert len(pacs.moves) == 4  # the second was asked again; it is not tried a third time
        await backend.close()


async def test_a_failure_that_has_nothing_to_do_with_reuse(destination: tuple[str, int]) -> None:
    with scripted(destination, "no_pending", "abort_at_once", "abort_at_once", "no_pending") as (pacs, wants):
        backend = requester(pacs.settings)
        await backend.move(series_of(wants), lambda _: None)
        assert (await backend.move(series_of(wants), lambda _: None)).status is None
        for _ in range(2):
            await backend.move(series_of(wants), lambda _: None)
        assert (pacs.associations, len(pacs.moves)) == (3, 5)
        await backend.close()


async def test_a_pacs_without_room_is_left_alone(destination: tuple[str, int]) -> None:
    """What it rejects for want of room ends our idle associations too."""
    with scripted(destination, "no_pending", latency=0.05) as (pacs, wants):
        backend = requester(pacs.settings)
        await backend.move(series_of(wants), lambda _: None)
        assert pacs.open_associations == 1
        pacs.reject_next()
        moves = [backend.move(series_of(wants), lambda _: None) for _ in range(2)]
        results = await asyncio.gather(*moves, return_exceptions=True)
        assert sorted(type(each).__name__ for each in results) == ["MoveResult", "PeerBusy"]
        await backend.close()
        peers.wait_until(lambda: not pacs.open_associations, 5, "all associations to end")
