"""C-GET against a scripted PACS: whose instances count, what is raised, and how it ends."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from io import BytesIO
from typing import Any

import pytest
from pydicom import Dataset
from pydicom.uid import UID, CTImageStorage, JPEG2000Lossless
from pynetdicom import AE, evt
from pynetdicom.dimse_messages import C_STORE_RQ
from pynetdicom.dimse_primitives import C_GET, C_STORE
from pynetdicom.dsutils import encode

from tests.support.collecting import Collector, Kept
from tests.support.scripted_pacs import CANCEL, PENDING, SUCCESS, WARNING, Archive
from xca_imaging import settings, uids
from xca_imaging.errors import LocalProtocolError, PeerRefused
from xca_imaging.imaging.backends import MoveJob, MoveResult
from xca_imaging.imaging.backends.cget import STUDY_ROOT_GET, CGet
from xca_imaging.imaging.backends.pool import Associations
from xca_imaging.imaging.receiver import StoreRequest

DEADLINE = 10.0
EXPLICIT = uids.EXPLICIT_VR_LITTLE_ENDIAN


@pytest.fixture(autouse=True)
def quiet_pynetdicom() -> None:
    logging.getLogger("pynetdicom").setLevel(logging.CRITICAL)


class Get:
    """One C-GET in the hands of a script."""

    def __init__(self, archive: Archive, event: Any) -> None:
        self.event, self.association = event, event.assoc
        self.matches = archive.matches(event.identifier)
        self.statuses: list[int | None] = []

    @property
    def is_open(self) -> bool:
        return bool(self.association.is_established) and self.association.dul.peek_next_pdu() is None

    def store(self, *datasets: Dataset) -> None:
        for dataset in datasets:
            self.statuses.append(self.association.send_c_store(dataset).get("Status"))

    def respond(self, status: int, failed_uids: list[str] | None = None, **counters: int) -> None:
        response = C_GET()
        response.MessageIDBeingRespondedTo = self.event.message_id
        response.AffectedSOPClassUID = STUDY_ROOT_GET
        response.Status = status
        for name, value in counters.items():
            setattr(response, f"NumberOf{name}Suboperations", value)
        if failed_uids:
            identifier = Dataset()
            identifier.FailedSOPInstanceUIDList = failed_uids
            is_implicit = UID(self.event.context.transfer_syntax).is_implicit_VR
            response.Identifier = BytesIO(encode(identifier, is_implicit, True) or b"")
        self.association.dimse.send_msg(response, self.event.context.context_id)

    def store_half(self, dataset: Dataset) -> None:
        context = next(c for c in self.association.accepted_contexts if c.abstract_syntax == CTImageStorage)
        request = C_STORE()
        request.MessageID, request.Priority = 1, 0
        request.AffectedSOPClassUID, request.AffectedSOPInstanceUID = dataset.SOPClassUID, dataset.SOPInstanceUID
        request.DataSet = BytesIO(encode(dataset, False, True) or b"")
        message = C_STORE_RQ()
        message.primitive_to_message(request)
        fragments = list(message.encode_msg(context.context_id, 1024))
        for fragment in fragments[: max(2, len(fragments) // 2)]:
            self.association.dul.send_pdu(fragment)
        time.sleep(0.1)


class Pacs:
    """Answers each C-GET with what the script does; `got` is the last one."""

    def __init__(self, script: Callable[[Get], None], *, contexts: bool = True) -> None:
        self.archive = Archive()
        self.wants = self.archive.add_series(4)
        self.got: Get | None = None
        self.associations = 0
        self._script = script
        self._ae = AE("SCRIPTED")
        if contexts:
            self._ae.add_supported_context(STUDY_ROOT_GET)
        self._ae.add_supported_context(CTImageStorage, EXPLICIT, scu_role=True, scp_role=True)
        self._ae.add_supported_context(uids.VERIFICATION_SOP_CLASS)

    def __enter__(self) -> Pacs:
        handlers = [(evt.EVT_C_GET, self._get), (evt.EVT_ACCEPTED, self._accepted)]
        self._server: Any = self._ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=handlers)
        return self

    def __exit__(self, *_: object) -> None:
        self._ae.shutdown()

    @property
    def settings(self) -> settings.Pacs:
        port = self._server.server_address[1]
        return settings.Pacs(
            name="scripted", ae_title="SCRIPTED", host="127.0.0.1", port=port, retrieve_location_uid="1.2.3"
        )

    def job(self, accept: tuple[str, ...] = (EXPLICIT,)) -> MoveJob:
        want = self.wants[0]
        return MoveJob("SERIES", want.study_instance_uid, want.series_instance_uid, accept=accept)

    def _accepted(self, _: Any) -> None:
        self.associations += 1

    def _get(self, event: Any) -> Iterator[Any]:
        event.assoc.dimse.__dict__.pop("send_msg", None)
        self.got = Get(self.archive, event)
        self._script(self.got)
        event.assoc.dimse.send_msg = lambda *_: None  # what was to be said has been said
        yield 0


@asynccontextmanager
async def getting(pacs: Pacs, collector: Collector, **options: Any) -> AsyncIterator[CGet]:
    associations = Associations(pacs.settings, calling_ae_title="XCAI", receiver=collector, connect_timeout=5.0)
    backend = CGet(associations, **options)
    try:
        async with asyncio.timeout(DEADLINE):
            yield backend
    finally:
        await backend.close()


async def run(
    script: Callable[[Get], None], collector: Collector | None = None
) -> tuple[MoveResult, Collector, Pacs, list[MoveResult]]:
    collector, responses = collector or Collector(), []
    with Pacs(script) as pacs:
        async with getting(pacs, collector) as backend:
            result = await backend.move(pacs.job(), responses.append)
    return result, collector, pacs, responses


def wanted(pacs: Pacs) -> list[str]:
    return [want.sop_instance_uid for want in pacs.wants]


def good(get: Get) -> None:
    for number, dataset in enumerate(get.matches, 1):
        get.store(dataset)
        get.respond(PENDING, Remaining=len(get.matches) - number, Completed=number, Failed=0, Warning=0)
    get.respond(SUCCESS, Completed=len(get.matches), Failed=0, Warning=0)


async def test_instances_and_counters() -> None:
    result, collector, pacs, responses = await run(good)
    assert (result.status, result.completed, result.failed) == (SUCCESS, 4, 0)
    assert [each.remaining for each in responses] == [3, 2, 1, 0]
    assert list(collector.held) == wanted(pacs)
    for uid, kept in collector.held.items():
        dataset = pacs.archive.series[pacs.wants[0].study_instance_uid, pacs.wants[0].series_instance_uid][uid]
        assert bytes(kept.data) == encode(dataset, False, True)
    association = collector.stores[0].request.association
    assert (association.pacs, association.calling_ae_title) == ("scripted", "SCRIPTED")
    assert [peer.id for peer, _ in collector.closed] == [association.id]


async def test_one_association_for_gets_one_after_the_other() -> None:
    with Pacs(good) as pacs:
        collector = Collector()
        async with getting(pacs, collector) as backend:
            for _ in range(3):
                collector.stores.clear()
                assert (await backend.move(pacs.job(), lambda _: None)).status == SUCCESS
                assert len(collector.held) == 4
            assert pacs.associations == 1


async def test_final_success_with_objects_missing() -> None:
    def script(get: Get) -> None:
        get.store(*get.matches[:-1])
        get.respond(SUCCESS, Completed=4)

    result, collector, pacs, _ = await run(script)
    assert result.status == SUCCESS
    assert set(collector.held) == set(wanted(pacs)[:-1])


@pytest.mark.parametrize("with_list", [True, False])
async def test_warning_with_and_without_a_failed_list(with_list: bool) -> None:
    def script(get: Get) -> None:
        get.store(*get.matches[1:])
        get.respond(WARNING, [str(get.matches[0].SOPInstanceUID)] if with_list else None, Completed=3, Failed=1)

    result, _, pacs, _ = await run(script)
    assert (result.status, result.completed, result.failed) == (WARNING, 3, 1)
    assert result.failed_uids == (tuple(wanted(pacs)[:1]) if with_list else ())


async def test_abort_inside_an_object() -> None:
    def script(get: Get) -> None:
        get.store(get.matches[0])
        get.store_half(get.matches[1])
        get.association.abort()

    result, collector, _, _ = await run(script)
    assert result.status is None
    assert "A-ABORT" in result.error_comment
    assert len(collector.held) == 1
    assert "A-ABORT" in collector.stores[1].discarded
    assert len(collector.closed) == 1


async def test_close_between_objects() -> None:
    def script(get: Get) -> None:
        get.store(*get.matches[:2])
        get.respond(PENDING, Completed=2, Remaining=2)
        time.sleep(0.1)
        get.association.dul.socket.socket.shutdown(socket.SHUT_RDWR)

    result, collector, _, _ = await run(script)
    assert (result.status, result.completed) == (None, 2)
    assert len(collector.held) == 2


async def test_what_the_receiver_refuses_is_refused_to_the_pacs() -> None:
    collector = Collector(decide=lambda request: 0x0124)
    _, _, pacs, _ = await run(good, collector)
    assert pacs.got is not None
    assert pacs.got.statuses == [0x0124] * 4
    assert not collector.held


class Full(Collector):
    def begin(self, request: StoreRequest) -> Kept | int:
        class NoRoom(Kept):
            def write(self, *data: memoryview) -> None:
                raise OSError(28, "no space left")

        return NoRoom(request)


async def test_no_room_is_a700() -> None:
    _, _, pacs, _ = await run(good, Full())
    assert pacs.got is not None
    assert pacs.got.statuses == [0xA700] * 4


async def test_a_status_that_repeating_does_not_change() -> None:
    with pytest.raises(PeerRefused, match="C-GET status 0xA900"):
        await run(lambda get: get.respond(0xA900))
    result, *_ = await run(lambda get: get.respond(0xA702))
    assert result.status == 0xA702


async def test_a_pacs_that_does_not_do_c_get() -> None:
    with Pacs(good, contexts=False) as pacs:
        async with getting(pacs, Collector()) as backend:
            with pytest.raises(PeerRefused, match=STUDY_ROOT_GET):
                await backend.move(pacs.job(), lambda _: None)


async def test_a_syntax_that_the_pacs_does_not_have() -> None:
    """The context of C-GET is accepted, those of the instances are not: its sub-operations fail."""

    def script(get: Get) -> None:
        assert len(get.association.accepted_contexts) == 1
        get.respond(WARNING, [str(each.SOPInstanceUID) for each in get.matches], Completed=0, Failed=4)

    with Pacs(script) as pacs:
        async with getting(pacs, Collector()) as backend:
            result = await backend.move(pacs.job((JPEG2000Lossless,)), lambda _: None)
    assert (result.status, len(result.failed_uids)) == (WARNING, 4)


async def test_data_in_a_context_that_was_not_accepted_is_aborted() -> None:
    def script(get: Get) -> None:
        context = next(c for c in get.association.accepted_contexts if c.abstract_syntax == CTImageStorage)
        context._context_id = 251
        get.store_half(get.matches[0])

    result, collector, _, _ = await run(script)
    assert result.status is None
    assert "context 251" in result.error_comment
    assert collector.stores == []


@pytest.mark.parametrize("hears", [True, False])
async def test_cancel(hears: bool) -> None:
    """Endless Pending: C-CANCEL, and A-ABORT for a PACS that does not hear it."""
    ended = threading.Event()

    def script(get: Get) -> None:
        end = time.monotonic() + DEADLINE
        while get.is_open and time.monotonic() < end and not (hears and get.event.is_cancelled):
            get.respond(PENDING, Remaining=1)
            time.sleep(0.02)
        get.respond(CANCEL)
        ended.set()

    collector, responses = Collector(), []
    with Pacs(script) as pacs:
        async with getting(pacs, collector, cancel_timeout=0.3) as backend:
            task = asyncio.ensure_future(backend.move(pacs.job(), responses.append))
            while len(responses) < 3:
                await asyncio.sleep(0.01)
            started = time.monotonic()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert time.monotonic() - started < 3
            assert await asyncio.to_thread(ended.wait, 5)


async def test_a_paused_association_is_not_read() -> None:
    collector = Collector()
    with Pacs(good) as pacs:
        pacs.wants = pacs.archive.add_series(10, size=3_000_000)
        async with getting(pacs, collector) as backend:
            task = asyncio.ensure_future(backend.move(pacs.job(), lambda _: None))
            while not collector.stores:
                await asyncio.sleep(0.001)
            association = collector.stores[0].request.association
            backend.pause(association)
            await asyncio.sleep(0.1)
            before = sum(len(each.data) for each in collector.stores)
            await asyncio.sleep(0.3)
            assert sum(len(each.data) for each in collector.stores) == before < 30_000_000
            backend.resume(association)
            assert (await task).status == SUCCESS
    assert len(collector.held) == 10


@pytest.mark.parametrize("job", [MoveJob("SERIES", "1.2"), MoveJob("IMAGE", "1.2", "1.3")])
async def test_an_identifier_that_would_match_more_than_asked_is_never_sent(job: MoveJob) -> None:
    with Pacs(good) as pacs:
        async with getting(pacs, Collector()) as backend:
            with pytest.raises(LocalProtocolError):
                await backend.move(job, lambda _: None)
        assert pacs.got is None
