"""Sibling receivers: real processes, scripted peers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.imaging.test_store_scp import (
    CT,
    DEADLINE,
    EXPLICIT,
    IMPLICIT,
    JPEG,
    ScriptedReceiver,
    associate_rq,
    connected,
    context,
    data,
    echo_rq,
    encoded,
    instance,
    notification,
    pynetdicom_send,
    self_signed,
    store_rq,
    until,
)
from tests.support.files import blocks, need_room_ahead
from xca_imaging.imaging.receiver import Arriving, Dropped, StoreRequest
from xca_imaging.imaging.receivers import Siblings
from xca_imaging.imaging.spool import Spool, SpooledInstance
from xca_imaging.wire import pdu

PROGRAM = (sys.executable, "-m", "xca_imaging.gateway.receiving")


class OfferedInstance:
    def __init__(self, receiver: OfferReceiver, request: StoreRequest) -> None:
        self.receiver, self.request = receiver, request

    def progress(self, size: int) -> None:
        self.receiver.progressed += size

    def adopt(self, instance: SpooledInstance) -> int:
        instance.hold()
        self.receiver.adopted[self.request.sop_instance_uid] = instance
        return self.receiver.commit_status

    def discard(self, reason: str, no_room: bool = False) -> None:
        self.receiver.broken.append((self.request.sop_instance_uid, reason, no_room))


class OfferReceiver(ScriptedReceiver):
    """A Receiver of instances that other processes write."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = False
        self.progressed = 0
        self.adopted: dict[str, SpooledInstance] = {}
        self.broken: list[tuple[str, str, bool]] = []

    def offer(self, request: StoreRequest) -> Arriving | Dropped | int:
        self.begun.append(request)
        if self.begin_error is not None:
            raise self.begin_error
        if self.drop:
            return Dropped()
        return OfferedInstance(self, request) if self.refuse is None else self.refuse


@contextlib.asynccontextmanager
async def receiving(
    receiver: OfferReceiver, spool: Spool, *, program: Sequence[str] = PROGRAM, **options: Any
) -> AsyncIterator[Siblings]:
    options = {"count": 1, "ae_title": "XCAI", "host": "127.0.0.1", "port": 0, "backoff": 0.01, **options}
    siblings = Siblings(receiver, spool, program=program, **options)
    await siblings.start()
    processes = [each.process.pid for each in siblings.alive]
    try:
        yield siblings
    finally:
        await siblings.close(0)
    assert not any(psutil.pid_exists(pid) for pid in processes)


@pytest.fixture
def receiver() -> OfferReceiver:
    return OfferReceiver()


@pytest.fixture
def spool(tmp_path: Path) -> AsyncIterator[Spool]:
    spool = Spool(tmp_path / "spool", max_bytes=1_000_000_000, retention=60)
    yield spool  # type: ignore[misc]
    spool.close()


def files(spool: Spool) -> list[str]:
    """Return names, without the file that is made ahead."""
    return sorted(each.name for each in spool.folder.iterdir() if each.stat().st_size)


async def test_instances_arrive_as_sent_and_are_owned(receiver: OfferReceiver, spool: Spool) -> None:
    receiver.accept = (IMPLICIT, EXPLICIT)
    content = bytes(range(256)) * 2000
    async with receiving(receiver, spool, count=2) as siblings:
        async with connected(siblings) as first, connected(siblings) as second:
            for peer, uid in ((first, "1.1"), (second, "1.2")):
                answer = await peer.associate(context(1, CT, JPEG, EXPLICIT, IMPLICIT), context(3, CT, JPEG))
                assert [(c.result, c.transfer_syntax) for c in answer.presentation_contexts] == [
                    (0, IMPLICIT),
                    (4, JPEG),
                ]
                peer.send(store_rq(uid), data(content, max_length=100_000))
                assert (await peer.read()).status == 0
                peer.send(store_rq(uid + ".1"), data(b"short"))
                assert (await peer.read()).status == 0
            assert len({each.id for each in siblings.associations}) == 2
            assert [len(each.associations) for each in siblings.alive] == [1, 1]  # the one with the most room is next
            first.send(pdu.ReleaseRQ().encode())
            assert await first.read() == pdu.ReleaseRP()
        await until(lambda: len(receiver.closed) == 2)
    assert {each.calling_ae_title for each in receiver.associations} == {"PEER"}
    assert sorted(reason for _, reason in receiver.closed) == ["connection closed by the peer", "released"]
    assert receiver.refused == [{CT: (JPEG,)}] * 2
    for uid, sent in (("1.1", content), ("1.2", content), ("1.1.1", b"short")):
        adopted = receiver.adopted[uid]
        written = adopted.path.read_bytes()
        assert (written[128:132], written.endswith(sent), adopted.size) == (b"DICM", True, len(written))
        assert (adopted.sop_class_uid, adopted.transfer_syntax_uid) == (CT, IMPLICIT)
        assert spool.find(uid) is adopted
    assert spool.used_bytes == sum(each.size for each in receiver.adopted.values())  # no byte stays lent


async def test_who_asks_on_before_the_answer_is_answered_in_order(receiver: OfferReceiver, spool: Spool) -> None:
    stream = b"".join(store_rq(f"1.{n}") + data(bytes(n), max_length=1000) + echo_rq() for n in (5, 30_000, 0, 7))
    async with receiving(receiver, spool) as siblings, connected(siblings) as peer:
        await peer.associate()
        peer.send(stream)
        assert [(await peer.read()).command_field for _ in range(8)] == [0x8001, 0x8030] * 4
        for position in range(0, len(stream), 999):
            peer.send(stream[position : position + 999])
            await peer.writer.drain()
        assert [(await peer.read()).command_field for _ in range(8)] == [0x8001, 0x8030] * 4
    assert set(receiver.adopted) == {"1.5", "1.30000", "1.0", "1.7"}


@pytest.mark.parametrize("size", [5, 3_000_000])
async def test_what_is_not_wanted_leaves_nothing(receiver: OfferReceiver, spool: Spool, size: int) -> None:
    async with receiving(receiver, spool) as siblings, connected(siblings) as peer:
        await peer.associate()
        receiver.refuse = 0x0124
        peer.send(store_rq("1.1"), data(bytes(size), max_length=100_000))
        assert (await peer.read()).status == 0x0124
        receiver.refuse, receiver.drop = None, True
        peer.send(store_rq("1.2"), data(bytes(size), max_length=100_000))
        assert (await peer.read()).status == 0
        receiver.drop, receiver.begin_error = False, KeyError("a defect")
        peer.send(store_rq("1.3"), data(bytes(size), max_length=100_000))
        assert (await peer.read()).status == 0x0110
        receiver.begin_error = None
        peer.send(store_rq("1.4"), data(b"abc"))
        assert (await peer.read()).status == 0
        assert len(files(spool)) == 1
    assert (list(receiver.adopted), receiver.broken) == (["1.4"], [])
    assert spool.used_bytes == receiver.adopted["1.4"].size


async def test_a_series_is_written_to_files_made_ahead(receiver: OfferReceiver, spool: Spool, tmp_path: Path) -> None:
    size = 300_000
    need_room_ahead(tmp_path)
    async with receiving(receiver, spool) as siblings:
        async with connected(siblings) as peer:
            await peer.associate()
            for number in range(4):
                peer.send(store_rq(f"1.{number}"), data(bytes(size - number), max_length=100_000))
                assert (await peer.read()).status == 0
            names = {each.path.name for each in receiver.adopted.values()}
            await until(lambda: len(list(spool.folder.iterdir())) == 5)
            (ahead,) = [each for each in spool.folder.iterdir() if each.name not in names]
            await until(lambda: blocks(ahead) >= size)
            assert ahead.stat().st_size == 0
            peer.send(store_rq("1.4"), data(b"short"))
            assert (await peer.read()).status == 0
            assert receiver.adopted["1.4"].path == ahead
            assert blocks(ahead) <= 8192
        await until(lambda: len(list(spool.folder.iterdir())) == 5)
    assert spool.used_bytes == sum(each.size for each in receiver.adopted.values())


async def test_what_is_expected_is_answered_first_and_told_together(receiver: OfferReceiver, spool: Spool) -> None:
    receiver.begin_error = KeyError("a defect")  # it is not asked before the answer
    async with receiving(receiver, spool, count=2) as siblings, connected(siblings) as peer:
        siblings.expect([f"1.{number}" for number in range(20)], [EXPLICIT])
        await peer.associate()
        for number in range(10):
            peer.send(
                store_rq(f"1.{number}", move_originator_ae_title="XCAI", move_originator_message_id=7), data(b"a")
            )
            assert (await peer.read()).status == 0
        await until(lambda: len(receiver.begun) == 10)
        assert (receiver.adopted, receiver.broken) == ({}, [])
        assert (files(spool), spool.used_bytes - sum(each._lease for each in siblings.alive)) == ([], 0)
        receiver.begin_error = None
        for number in range(10, 20):
            peer.send(store_rq(f"1.{number}"), data(bytes(number)))
            assert (await peer.read()).status == 0
        await until(lambda: len(receiver.adopted) == 10)
        receiver.refuse = 0x0124
        peer.send(store_rq("1.19"), data(b"again"))  # it is expected once
        assert (await peer.read()).status == 0x0124
    assert [request.move_originator_message_id for request in receiver.begun[:11]] == [7] * 10 + [None]
    assert files(spool) == sorted(each.name for each in receiver.adopted.values())
    assert spool.used_bytes == sum(each.size for each in receiver.adopted.values())


async def test_what_is_expected_no_more_is_asked_for_first(receiver: OfferReceiver, spool: Spool) -> None:
    async with receiving(receiver, spool) as siblings, connected(siblings) as peer:
        siblings.expect(["1.1", "1.2"], [EXPLICIT])
        siblings.expect_no_more(["1.1", "1.2"])
        await peer.associate()
        receiver.refuse = 0x0124
        peer.send(store_rq("1.1"), data(b"abc"))
        assert (await peer.read()).status == 0x0124
    assert files(spool) == []


async def test_what_comes_in_a_syntax_that_is_not_wanted_is_asked_for_first(
    receiver: OfferReceiver, spool: Spool
) -> None:
    async with receiving(receiver, spool) as siblings, connected(siblings) as peer:
        siblings.expect(["1.1", "1.2"], [JPEG])
        siblings.expect(["1.2"], [IMPLICIT, EXPLICIT])  # asked again, by another move
        await peer.associate()
        receiver.refuse = 0x0124
        for uid, status in (("1.1", 0x0124), ("1.2", 0x0000), ("1.2", 0x0124)):
            peer.send(store_rq(uid), data(b"abc"))
            assert (await peer.read()).status == status
        receiver.refuse = None
        peer.send(store_rq("1.1"), data(b"abc"))
        assert (await peer.read()).status == 0
    assert list(receiver.adopted) == ["1.1"]


async def test_an_expected_instance_that_takes_long_is_told_of_on_its_way(
    receiver: OfferReceiver, spool: Spool
) -> None:
    async with receiving(receiver, spool) as siblings:
        siblings.expect(["1.2.3", "1.1"], [EXPLICIT])
        async with connected(siblings) as peer:
            await peer.associate()
            peer.send(store_rq("1.1"), data(bytes(10_000))[:5000])
            await asyncio.sleep(0.3)
            assert receiver.begun == []
            peer.send(data(bytes(10_000))[5000:])
            await until(lambda: receiver.progressed)
            assert (await peer.read()).status == 0
            peer.send(store_rq(), data(bytes(10_000))[:5000], pdu.Abort(0).encode()[:1])
        await until(lambda: receiver.closed)
    assert list(receiver.adopted) == ["1.1"]
    assert receiver.broken == [("1.2.3", "connection closed by the peer", False)]
    assert files(spool) == [receiver.adopted["1.1"].name]


async def test_the_room_that_expected_instances_may_take_is_that_of_all(
    receiver: OfferReceiver, tmp_path: Path
) -> None:
    spool = Spool(tmp_path / "small", max_bytes=100_000, retention=60)
    async with receiving(receiver, spool) as siblings, connected(siblings) as peer:
        siblings.expect(["1.1", "1.2"], [EXPLICIT])
        await peer.associate()
        for uid, status in (("1.1", 0), ("1.2", 0xA700)):
            peer.send(store_rq(uid), data(bytes(60_000), max_length=20_000))
            assert (await peer.read()).status == status
    assert [(uid, no_room) for uid, _, no_room in receiver.broken] == [("1.2", True)]
    assert spool.used_bytes == sum(each.size for each in receiver.adopted.values())
    spool.close()


async def test_broken_object_and_progress(receiver: OfferReceiver, spool: Spool) -> None:
    async with receiving(receiver, spool) as siblings:
        async with connected(siblings) as peer:
            await peer.associate()
            peer.send(store_rq(), data(bytes(10_000))[:5000])
            await until(lambda: receiver.begun)
            await asyncio.sleep(0.3)
            peer.send(data(bytes(10_000))[5000:6000])
            await until(lambda: receiver.progressed)
            peer.send(pdu.Abort(0).encode()[:1])
        await until(lambda: receiver.closed)
        assert receiver.broken == [("1.2.3", "connection closed by the peer", False)]
        assert files(spool) == []
    assert 5000 < receiver.progressed <= 6000
    assert spool.used_bytes == 0


async def test_full_spool_is_a_status(receiver: OfferReceiver, tmp_path: Path) -> None:
    spool = Spool(tmp_path / "small", max_bytes=100_000, retention=60)
    async with receiving(receiver, spool) as siblings, connected(siblings) as peer:
        await peer.associate()
        peer.send(store_rq("1.1"), data(bytes(60_000)))
        assert (await peer.read()).status == 0
        peer.send(store_rq("1.2"), data(bytes(200_000), max_length=20_000))  # whole before the lease is refused
        assert (await peer.read()).status == 0xA700
        peer.send(store_rq("1.4"), data(bytes(20_000_000), max_length=20_000))
        assert (await peer.read()).status == 0xA700
        peer.send(store_rq("1.3"), data(bytes(10_000)))
        assert (await peer.read()).status == 0
    assert [(uid, no_room) for uid, _, no_room in receiver.broken] == [("1.2", True), ("1.4", True)]
    assert len(files(spool)) == 2
    assert spool.used_bytes == sum(each.size for each in receiver.adopted.values())
    spool.close()


async def test_a_process_that_dies_is_told_and_replaced(
    receiver: OfferReceiver, spool: Spool, caplog: pytest.LogCaptureFixture
) -> None:
    async with receiving(receiver, spool) as siblings:
        async with connected(siblings) as peer:
            await peer.associate()
            peer.send(store_rq("1.1"), data(b"whole"))
            assert (await peer.read()).status == 0
            peer.send(store_rq("1.2"), data(bytes(10_000))[:5000])
            await until(lambda: len(receiver.begun) == 2 and len(files(spool)) == 2)
            (dead,) = siblings.alive
            dead.process.send_signal(signal.SIGKILL)
            await until(lambda: receiver.closed)
            assert await peer.read() is None
        assert [uid for uid, _, _ in receiver.broken] == ["1.2"]
        assert files(spool) == [receiver.adopted["1.1"].name]
        assert spool.used_bytes == receiver.adopted["1.1"].size
        async with connected(siblings) as peer:  # waits in the kernel's queue until there is a process again
            assert isinstance(await peer.associate(), pdu.AssociateAC)
            peer.send(store_rq("1.2"), data(b"again"))
            assert (await peer.read()).status == 0
        assert siblings.alive[0].process.pid != dead.process.pid
        assert len({association.id for association in receiver.associations}) == 2
    assert "died" in caplog.text


async def test_a_program_that_does_not_start_is_an_error(receiver: OfferReceiver, spool: Spool) -> None:
    with pytest.raises(OSError, match="did not start"):
        async with receiving(receiver, spool, program=("/bin/false",)):
            pass
    with pytest.raises(OSError, match="No such file"):
        async with receiving(receiver, spool, program=("/nonexistent/program",)):
            pass


async def test_a_taken_port_is_an_error(receiver: OfferReceiver, spool: Spool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="in use"):
        async with receiving(receiver, spool, port=taken.getsockname()[1]):
            pass


async def test_the_limit_of_associations_is_that_of_all(receiver: OfferReceiver, spool: Spool) -> None:
    async with (
        receiving(receiver, spool, count=2, max_associations=3) as siblings,
        contextlib.AsyncExitStack() as stack,
    ):
        peers = [await stack.enter_async_context(connected(siblings)) for _ in range(7)]
        answers = [await peer.associate() for peer in peers]
        assert [isinstance(answer, pdu.AssociateAC) for answer in answers[:3]] == [True] * 3
        assert answers[3:6] == [pdu.AssociateRJ(2, 3, 2)] * 3
        assert answers[6] is None  # closed unheard
        peers[1].send(pdu.ReleaseRQ().encode())
        assert await peers[1].read() == pdu.ReleaseRP()
        await peers[1].close()
        await until(lambda: len(receiver.closed) == 1)
        for peer in peers[3:6]:
            await peer.close()
        await until(lambda: sum(each.connections for each in siblings.alive) == 2)
        late = await stack.enter_async_context(connected(siblings))
        assert isinstance(await late.associate(), pdu.AssociateAC)


@pytest.mark.slow
async def test_pause_and_resume(receiver: OfferReceiver, spool: Spool) -> None:
    async with receiving(receiver, spool, socket_buffer=4096, stall_timeout=0.5) as siblings:
        async with connected(siblings) as peer:
            await peer.associate()
            (association,) = siblings.associations
            siblings.pause(association)
            peer.send(echo_rq())
            peer.send(store_rq("1.2.4"), data(bytes(3_000_000), max_length=100_000))
            await asyncio.sleep(0.8)  # longer than the stall time-out
            assert receiver.begun == []
            siblings.resume(association)
            assert (await peer.read()).command_field == 0x8030
            assert (await peer.read()).status == 0
        await until(lambda: receiver.closed)
        siblings.pause(association)  # gone: nothing to pause


async def test_close_lets_a_running_object_end(receiver: OfferReceiver, spool: Spool) -> None:
    async with receiving(receiver, spool) as siblings, connected(siblings) as peer:
        await peer.associate()
        address = siblings.sockets[0]
        peer.send(store_rq(), data(bytes(1000))[:600])
        await until(lambda: receiver.begun)
        for sibling in siblings.alive:  # a service manager signals every process of the node
            sibling.process.send_signal(signal.SIGTERM)
        closing = asyncio.create_task(siblings.close(DEADLINE))
        await asyncio.sleep(0.1)
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(*address)
        peer.send(data(bytes(1000))[600:])
        assert (await peer.read()).status == 0
        peer.send(pdu.ReleaseRQ().encode())
        assert await peer.read() == pdu.ReleaseRP()
        await peer.close()
        async with asyncio.timeout(DEADLINE):
            await closing
    assert list(receiver.adopted) == ["1.2.3"]


@pytest.mark.slow
async def test_close_aborts_who_does_not_end(receiver: OfferReceiver, spool: Spool) -> None:
    async with receiving(receiver, spool) as siblings, connected(siblings) as peer:
        await peer.associate()
        peer.send(store_rq(), data(bytes(1000))[:600])
        await until(lambda: receiver.begun)
        async with asyncio.timeout(DEADLINE):
            await siblings.close(0.1)
        assert await peer.read() == pdu.Abort(0)
    assert [reason for _, reason in receiver.closed] == ["aborted by us: the node is going down"]
    assert [uid for uid, _, _ in receiver.broken] == ["1.2.3"]
    assert files(spool) == []


async def test_notifications_reach_the_main_process(receiver: OfferReceiver, spool: Spool) -> None:
    async with receiving(receiver, spool) as siblings, connected(siblings) as peer:
        await notification(peer, receiver)


async def test_calling_ae_titles(receiver: OfferReceiver, spool: Spool) -> None:
    async with receiving(receiver, spool, calling_ae_titles=frozenset({"PEER"})) as siblings:
        async with connected(siblings) as peer:
            assert await peer.associate(calling_ae_title="EVE") == pdu.AssociateRJ(1, 1, 3)
        async with connected(siblings) as peer:
            assert isinstance(await peer.associate(), pdu.AssociateAC)


async def test_tls(receiver: OfferReceiver, spool: Spool, tmp_path: Path) -> None:
    certificate, key = self_signed()
    (tmp_path / "cert.pem").write_bytes(certificate)
    (tmp_path / "key.pem").write_bytes(key)
    tls = 'tls = { certificate = "cert.pem", private_key = "key.pem", client_ca = "cert.pem" }'
    (tmp_path / "node.toml").write_text(f'[node]\nhome_community_id = "urn:oid:1.2.3"\n[dicom]\n{tls}\n')
    client = ssl.create_default_context(cadata=certificate.decode())
    client.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    dataset = instance()
    async with receiving(receiver, spool, program=(*PROGRAM, str(tmp_path / "node.toml"))) as siblings:
        assert await asyncio.to_thread(pynetdicom_send, siblings.sockets[0], [dataset], client) == [0, 0]
        await until(lambda: receiver.closed)
        async with connected(siblings) as peer:  # no TLS at all
            peer.send(associate_rq().encode())
            async with asyncio.timeout(DEADLINE):
                assert b"XCA_IMAGING" not in await peer.reader.read()
        await until(lambda: all(each.connections == 0 for each in siblings.alive))
    assert receiver.adopted[dataset.SOPInstanceUID].path.read_bytes().endswith(encoded(dataset))


@pytest.mark.slow
async def test_no_process_outlives_a_node_that_is_killed(tmp_path: Path) -> None:
    script = f"""
import asyncio, sys
from pathlib import Path
from tests.imaging.test_receivers import *
async def main():
    siblings = Siblings(OfferReceiver(), Spool(Path({str(tmp_path)!r}), max_bytes=10**9, retention=1),
        count=2, program=PROGRAM, ae_title="XCAI", host="127.0.0.1", port=0)
    await siblings.start()
    print(*[each.process.pid for each in siblings.alive], flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""
    node = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2], env=dict(os.environ)
    )
    assert node.stdout is not None
    async with asyncio.timeout(3 * DEADLINE):
        siblings = [psutil.Process(int(pid)) for pid in (await node.stdout.readline()).split()]
        assert len(siblings) == 2
        node.kill()
        await node.wait()
        gone, alive = await asyncio.to_thread(psutil.wait_procs, siblings, DEADLINE)
    assert (len(gone), alive) == (2, [])
