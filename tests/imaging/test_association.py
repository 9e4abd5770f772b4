"""Associations that we request: what the peer said becomes a typed error, and no connection stays behind."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from pynetdicom import AE, evt

from tests.support import (
    peers,
    scripted_pacs,  # noqa: F401 - makes pynetdicom close its sockets
)
from xca_imaging import settings, uids
from xca_imaging.errors import ConnectFailed, PeerBusy, PeerError, PeerRefused, PeerTimeout
from xca_imaging.imaging.backends import requester
from xca_imaging.wire import dimse, pdu

# A pynetdicom peer that has rejected an association may, when it shuts down, abort it in a state that knows no abort.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")

STUDY_ROOT_MOVE = "1.2.840.10008.5.1.4.1.2.2.2"


def pacs_at(port: int, ae_title: str = "PACS") -> settings.Pacs:
    return settings.Pacs(
        name="main", ae_title=ae_title, host="127.0.0.1", port=port, retrieve_location_uid="1.2.3.4", max_associations=2
    )


@contextmanager
def verification_scp(handlers: Sequence[Any] = (), **options: object) -> Iterator[int]:
    ae = AE("PACS")
    ae.add_supported_context(uids.VERIFICATION_SOP_CLASS)
    for name, value in options.items():
        setattr(ae, name, value)
    server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=list(handlers))
    try:
        yield server.server_address[1]
    finally:
        ae.shutdown()


@contextmanager
def raw_peer(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """A peer that reads the A-ASSOCIATE-RQ and then does what `answer` does, for every connection."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(5)
                header = connection.recv(6, socket.MSG_WAITALL)
                if len(header) == 6:
                    connection.recv(struct.unpack(">BBL", header)[2], socket.MSG_WAITALL)
                    answer(connection)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)


def reject(result: int, source: int, reason: int) -> Callable[[socket.socket], None]:
    # PS3.8 Table 9-21: type 3, reserved, length 4, reserved, result, source, reason
    pdu = struct.pack(">BBLBBBB", 3, 0, 4, 0, result, source, reason)
    return lambda connection: connection.sendall(pdu)


async def echo(port: int, ae_title: str = "PACS", **options: Any) -> None:
    await requester.echo(pacs_at(port, ae_title), calling_ae_title="XCAI", **options)


async def test_echo() -> None:
    with verification_scp() as port:
        await echo(port)


async def test_associations_end_released_or_aborted() -> None:
    ended: list[str] = []
    handlers = [
        (evt.EVT_RELEASED, lambda _: ended.append("released")),
        (evt.EVT_ABORTED, lambda _: ended.append("aborted")),
    ]
    with verification_scp(handlers) as port:
        for count in (1, 2):
            association = await requester.associate(
                pacs_at(port), calling_ae_title="XCAI", proposals=[requester.Proposal(uids.VERIFICATION_SOP_CLASS)]
            )
            if count == 2:
                association.abort("a test")
            await association.close()
            assert not association.is_usable
            peers.wait_until(lambda count=count: len(ended) >= count, 5, "the peer to notice")
    assert ended[:2] == ["released", "aborted"]


async def test_refused_connection_names_host_and_cause() -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with pytest.raises(ConnectFailed, match=rf"127\.0\.0\.1:{port}.*refused"):
        await echo(port)


async def test_unknown_host_is_a_failed_connection() -> None:
    pacs = pacs_at(104).model_copy(update={"host": "pacs.invalid"})
    with pytest.raises(ConnectFailed, match=r"pacs\.invalid"):
        await requester.echo(pacs, calling_ae_title="XCAI")


@pytest.mark.parametrize("rejection", [(2, 3, 2), (2, 3, 1), (1, 3, 2), (2, 1, 1)])
async def test_congestion_is_busy(rejection: tuple[int, int, int]) -> None:
    with (
        raw_peer(reject(*rejection)) as port,
        pytest.raises(PeerBusy, match="/".join(map(str, rejection))),
    ):
        await echo(port)


async def test_busy_is_told_apart_from_aborted_every_time() -> None:
    with raw_peer(reject(2, 3, 2)) as port:
        for _ in range(40):
            with pytest.raises(PeerBusy):
                await echo(port)


async def test_unknown_calling_ae_title_says_what_to_configure() -> None:
    with (
        verification_scp(require_calling_aet=["OTHER"]) as port,
        pytest.raises(PeerRefused, match=r"add 'XCAI' at 127\.0\.0\.1:11112 to the PACS's list"),
    ):
        await echo(port, listener=("127.0.0.1", 11112))


async def test_unknown_called_ae_title_says_what_to_configure() -> None:
    with verification_scp(require_called_aet=True) as port, pytest.raises(PeerRefused, match=r"pacs\.ae_title"):
        await echo(port, "WRONG")


async def test_no_accepted_context_is_refused_with_its_name() -> None:
    with (
        verification_scp() as port,
        pytest.raises(PeerRefused, match=STUDY_ROOT_MOVE),
    ):
        await requester.associate(
            pacs_at(port), calling_ae_title="XCAI", proposals=[requester.Proposal(STUDY_ROOT_MOVE)]
        )


async def test_silence_is_a_timeout() -> None:
    stop = threading.Event()
    with raw_peer(lambda connection: stop.wait(5) and None) as port:
        with pytest.raises(PeerTimeout, match=r"0\.2 s"):
            await echo(port, connect_timeout=0.2)
        stop.set()


async def test_abort_and_close_are_told_at_the_first_time() -> None:
    tried: list[int] = []

    def abort(connection: socket.socket) -> None:
        tried.append(1)
        connection.sendall(struct.pack(">BBLBBBB", 7, 0, 4, 0, 0, 2, 0))  # PS3.8 Table 9-26

    with raw_peer(abort) as port, pytest.raises(ConnectFailed, match="A-ABORT"):
        await echo(port)
    assert len(tried) == 1
    with raw_peer(lambda connection: None) as port, pytest.raises(ConnectFailed, match="without an answer"):
        await echo(port)


async def test_silence_after_the_association_is_a_timeout() -> None:
    stop = threading.Event()
    handlers = [(evt.EVT_C_ECHO, lambda _: stop.wait(5) and 0x0000)]
    with verification_scp(handlers) as port:
        with pytest.raises(PeerTimeout, match=r"no response for 0\.2 s"):
            await echo(port, response_timeout=0.2)
        stop.set()


async def test_a_peer_that_neither_closes_nor_answers_a_release_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requester, "_END_TIMEOUT", 0.2)
    with verification_scp() as port:
        association = await requester.associate(
            pacs_at(port), calling_ae_title="XCAI", proposals=[requester.Proposal(uids.VERIFICATION_SOP_CLASS)]
        )
        transport = association._transport
        assert transport is not None
        transport.pause_reading()  # the A-RELEASE-RP is never read
        async with asyncio.timeout(2):
            await association.close()


async def test_a_request_on_an_association_for_ours_is_aborted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but responses is due where no proposal receives."""
    monkeypatch.setattr(requester, "_CLOSE_TIMEOUT", 0.2)
    association_ac = pdu.AssociateAC(
        "PACS",
        "XCAI",
        uids.APPLICATION_CONTEXT,
        (pdu.PresentationContextResult(1, 0, uids.EXPLICIT_VR_LITTLE_ENDIAN),),
        pdu.UserInformation(16384, "1.2.3"),
    ).encode()
    echo_request = dimse.encode_c_echo_request(dimse.CEchoRequest(1, uids.VERIFICATION_SOP_CLASS))
    heard: list[bytes] = []

    def ask(connection: socket.socket) -> None:
        connection.sendall(association_ac + pdu.encode_p_data(1, echo_request, is_command=True))
        while data := connection.recv(4096):
            heard.append(data)

    with raw_peer(ask) as port, pytest.raises(PeerError, match="request on an association for ours"):
        await echo(port)
    assert b"".join(heard).endswith(pdu.Abort(source=2, reason=pdu.ABORT_UNEXPECTED_PDU).encode())


async def test_garbage_and_nul_padded_answers_do_not_crash() -> None:
    # An A-ASSOCIATE-AC whose reserved AE titles are NULs and which has no items at all (PS3.8 Table 9-17).
    body = struct.pack(">HH", 1, 0) + bytes(16) + bytes(16) + bytes(32)
    answer = struct.pack(">BBL", 2, 0, len(body)) + body
    for data in (answer, b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x02\x00\xff\xff\xff\xff"):
        with (
            raw_peer(lambda connection, data=data: connection.sendall(data)) as port,
            pytest.raises((ConnectFailed, PeerRefused)),
        ):
            await echo(port)
