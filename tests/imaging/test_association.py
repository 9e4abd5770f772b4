"""Associations that we request: what the peer said becomes a typed error, and no thread stays behind."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from pynetdicom import AE

from xca_imaging import settings, uids
from xca_imaging.errors import ConnectFailed, PeerBusy, PeerRefused, PeerTimeout
from xca_imaging.imaging.backends import association

STUDY_ROOT_MOVE = "1.2.840.10008.5.1.4.1.2.2.2"


def pacs_at(port: int, ae_title: str = "PACS") -> settings.Pacs:
    return settings.Pacs(
        name="main", ae_title=ae_title, host="127.0.0.1", port=port, retrieve_location_uid="1.2.3.4", max_associations=2
    )


@contextmanager
def verification_scp(**options: object) -> Iterator[int]:
    ae = AE("PACS")
    ae.add_supported_context(uids.VERIFICATION_SOP_CLASS)
    for name, value in options.items():
        setattr(ae, name, value)
    server = ae.start_server(("127.0.0.1", 0), block=False)
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


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    left = [t for t in threading.enumerate() if t not in before and t.is_alive() and "Requestor" in t.name]
    assert left == []


def test_echo() -> None:
    with verification_scp() as port:
        association.echo(pacs_at(port), calling_ae_title="XCAI")


def test_threads_end_after_use_and_after_an_exception() -> None:
    with verification_scp() as port:
        before = threading.active_count()
        with association.associate(
            pacs_at(port), calling_ae_title="XCAI", contexts=[uids.VERIFICATION_SOP_CLASS]
        ) as established:
            own = {established, established.dul}
        assert not any(thread.is_alive() for thread in own)
        with (  # noqa: PT012 - the body raises after it has looked
            pytest.raises(ZeroDivisionError),
            association.associate(
                pacs_at(port), calling_ae_title="XCAI", contexts=[uids.VERIFICATION_SOP_CLASS]
            ) as established,
        ):
            own = {established, established.dul}
            raise ZeroDivisionError
        assert not any(thread.is_alive() for thread in own)
        assert threading.active_count() <= before + 4  # the peer's own threads may still be ending


def test_refused_connection_names_host_and_cause() -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with pytest.raises(ConnectFailed, match=rf"127\.0\.0\.1:{port}.*refused"):
        association.echo(pacs_at(port), calling_ae_title="XCAI")


def test_unknown_host_is_a_failed_connection() -> None:
    pacs = pacs_at(104).model_copy(update={"host": "pacs.invalid"})
    with pytest.raises(ConnectFailed, match=r"pacs\.invalid"):
        association.echo(pacs, calling_ae_title="XCAI")


@pytest.mark.parametrize("rejection", [(2, 3, 2), (2, 3, 1), (1, 3, 2), (2, 1, 1)])
def test_congestion_is_busy(rejection: tuple[int, int, int]) -> None:
    with (
        raw_peer(reject(*rejection)) as port,
        pytest.raises(PeerBusy, match="/".join(map(str, rejection))),
    ):
        association.echo(pacs_at(port), calling_ae_title="XCAI")


def test_busy_is_told_apart_from_aborted_every_time() -> None:
    """pynetdicom flags about one rejection in twelve as an abort; ours are read from the PDU."""
    with raw_peer(reject(2, 3, 2)) as port:
        for _ in range(40):
            with pytest.raises(PeerBusy):
                association.echo(pacs_at(port), calling_ae_title="XCAI")


def test_unknown_calling_ae_title_says_what_to_configure() -> None:
    with (
        verification_scp(require_calling_aet=["OTHER"]) as port,
        pytest.raises(PeerRefused, match=r"add 'XCAI' at 127\.0\.0\.1:11112 to the PACS's list"),
    ):
        association.echo(pacs_at(port), calling_ae_title="XCAI", listener=("127.0.0.1", 11112))


def test_unknown_called_ae_title_says_what_to_configure() -> None:
    with verification_scp(require_called_aet=True) as port, pytest.raises(PeerRefused, match=r"pacs\.ae_title"):
        association.echo(pacs_at(port, "WRONG"), calling_ae_title="XCAI")


def test_no_accepted_context_is_refused_with_its_name() -> None:
    with (
        verification_scp() as port,
        pytest.raises(PeerRefused, match=STUDY_ROOT_MOVE),
        association.associate(pacs_at(port), calling_ae_title="XCAI", contexts=[STUDY_ROOT_MOVE]),
    ):
        pass


def test_silence_is_a_timeout() -> None:
    stop = threading.Event()
    with raw_peer(lambda connection: stop.wait(5) and None) as port:
        with (
            pytest.raises(PeerTimeout, match=r"0\.2 s"),
            association.associate(
                pacs_at(port), calling_ae_title="XCAI", contexts=[uids.VERIFICATION_SOP_CLASS], connect_timeout=0.2
            ),
        ):
            pass
        stop.set()


def test_abort_and_close_are_tried_again_then_told() -> None:
    tried: list[int] = []

    def abort(connection: socket.socket) -> None:
        tried.append(1)
        connection.sendall(struct.pack(">BBLBBBB", 7, 0, 4, 0, 0, 2, 0))  # PS3.8 Table 9-26

    with raw_peer(abort) as port, pytest.raises(ConnectFailed, match="A-ABORT"):
        association.echo(pacs_at(port), calling_ae_title="XCAI")
    assert len(tried) == 3
    with raw_peer(lambda connection: None) as port, pytest.raises(ConnectFailed, match="without an answer"):
        association.echo(pacs_at(port), calling_ae_title="XCAI")


def test_garbage_and_nul_padded_answers_do_not_crash() -> None:
    # An A-ASSOCIATE-AC whose reserved AE titles are NULs and which has no items at all (PS3.8 Table 9-17).
    body = struct.pack(">HH", 1, 0) + bytes(16) + bytes(16) + bytes(32)
    answer = struct.pack(">BBL", 2, 0, len(body)) + body
    for pdu in (answer, b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x02\x00\xff\xff\xff\xff"):
        with (
            raw_peer(lambda connection, pdu=pdu: connection.sendall(pdu)) as port,
            pytest.raises((ConnectFailed, PeerRefused)),
        ):
            association.echo(pacs_at(port), calling_ae_title="XCAI")
