"""Associations that are kept: which are used again, when they end, and that there are never too many."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from pynetdicom import AE, evt

from tests.support import peers, scripted_pacs
from xca_imaging import settings, uids
from xca_imaging.errors import PeerBusy
from xca_imaging.imaging.backends.pool import Associations
from xca_imaging.imaging.backends.requester import Association, Proposal
from xca_imaging.wire import dimse

ECHO = (Proposal(uids.VERIFICATION_SOP_CLASS),)
MOVE = (Proposal(scripted_pacs.MOVE), *ECHO)


@pytest.fixture(autouse=True)
def quiet_pynetdicom() -> None:
    logging.getLogger("pynetdicom").setLevel(logging.CRITICAL)


class Scp:
    """Takes C-ECHO, counts associations."""

    def __init__(self, limit: int = 100) -> None:
        self.ae = AE("PACS")
        self.ae.maximum_associations = limit
        self.ae.add_supported_context(uids.VERIFICATION_SOP_CLASS)
        self.ae.add_supported_context(scripted_pacs.MOVE)
        self.requested = self.most = 0
        self.open: set[Any] = set()

    def __enter__(self) -> Scp:
        handlers = [(evt.EVT_ACCEPTED, self._accepted), (evt.EVT_CONN_CLOSE, self._closed)]
        self.server: Any = self.ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=handlers)
        return self

    def __exit__(self, *_: object) -> None:
        self.ae.shutdown()

    def _accepted(self, event: Any) -> None:
        self.requested += 1
        self.open.add(event.assoc)
        self.most = max(self.most, len(self.open))

    def _closed(self, event: Any) -> None:
        self.open.discard(event.assoc)


@pytest.fixture
def scp() -> Iterator[Scp]:
    with Scp() as scp:
        yield scp


@asynccontextmanager
async def pool_of(scp: Scp, *, limit: int = 2, idle_timeout: float = 3.0) -> AsyncIterator[Associations]:
    pacs = settings.Pacs(
        name="main",
        ae_title="PACS",
        host="127.0.0.1",
        port=scp.server.server_address[1],
        retrieve_location_uid="1.2.3",
        max_associations=limit,
    )
    pool = Associations(pacs, calling_ae_title="XCAI", connect_timeout=5.0, idle_timeout=idle_timeout)
    try:
        async with asyncio.timeout(10):
            yield pool
    finally:
        await pool.close()


async def echo(association: Association) -> int:
    association.request(association.context_of(uids.VERIFICATION_SOP_CLASS), dimse.C_ECHO_RQ)
    return (await association.answer(5.0)).response.status


async def test_used_again_by_the_next_of_its_kind(scp: Scp) -> None:
    async with pool_of(scp) as pool:
        for _ in range(3):
            async with pool.lease(ECHO) as association:
                assert await echo(association) == 0
        assert association.operations == 3
        async with pool.lease(MOVE) as other:
            assert other is not association
        assert scp.requested == 2
    await asyncio.to_thread(peers.wait_until, lambda: not scp.open, 5, "all associations to end")


async def test_never_more_than_the_budget_idle_ones_make_place(scp: Scp) -> None:
    async with pool_of(scp, limit=2) as pool:
        async with AsyncExitStack() as both:
            for _ in range(2):
                assert await echo(await both.enter_async_context(pool.lease(ECHO))) == 0
        for _ in range(2):  # two are idle
            async with pool.lease(MOVE) as first, pool.lease(MOVE) as second:
                assert [await echo(each) for each in (first, second)] == [0, 0]
    assert scp.most == 2
    assert scp.requested == 4


async def test_those_that_are_being_opened_count_too(scp: Scp) -> None:
    """An idle one of another kind, and as many asked for at once as the budget has."""
    async with pool_of(scp, limit=4) as pool:
        async with pool.lease(ECHO):
            pass

        async def use() -> None:
            async with pool.lease(MOVE):
                await asyncio.sleep(0.1)

        await asyncio.gather(*(use() for _ in range(4)))
        assert scp.requested == 5
        assert scp.most <= 4


async def test_idle_ones_end_after_a_while(scp: Scp) -> None:
    async with pool_of(scp, idle_timeout=0.1) as pool:
        async with pool.lease(ECHO) as association:
            await echo(association)
        await asyncio.to_thread(peers.wait_until, lambda: not scp.open, 5, "the idle association to end")
        assert not association.is_usable


async def test_an_idle_one_that_the_peer_ended_is_not_used(scp: Scp) -> None:
    async with pool_of(scp) as pool:
        async with pool.lease(ECHO) as association:
            await echo(association)
        for each in list(scp.open):
            each.abort()
        async with asyncio.timeout(5):
            while association.is_usable:
                await asyncio.sleep(0.01)
        async with pool.lease(ECHO) as other:
            assert await echo(other) == 0
        assert other is not association


async def test_what_was_broken_off_is_not_used_again(scp: Scp) -> None:
    async with pool_of(scp) as pool:
        with pytest.raises(ZeroDivisionError):  # noqa: PT012 - the body raises after it has asked
            async with pool.lease(ECHO) as association:
                association.request(association.context_of(uids.VERIFICATION_SOP_CLASS), dimse.C_ECHO_RQ)
                raise ZeroDivisionError
        async with pool.lease(ECHO) as other:
            assert other is not association


async def test_a_rejection_for_want_of_room_ends_the_idle_ones() -> None:
    with Scp(limit=1) as scp:
        async with pool_of(scp, limit=2) as pool:
            async with pool.lease(ECHO) as association:
                await echo(association)
            with pytest.raises(PeerBusy):
                async with pool.lease(MOVE):
                    pass
            await asyncio.to_thread(peers.wait_until, lambda: not scp.open, 5, "the idle association to end")
            async with pool.lease(MOVE) as other:
                assert await echo(other) == 0
