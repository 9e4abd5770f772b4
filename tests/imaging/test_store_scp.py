"""The store SCP against independent senders, and against raw sockets that break every rule."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import ssl
import struct
import subprocess
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from pydicom import Dataset, dcmread, dcmwrite
from pydicom.dataset import FileMetaDataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pynetdicom import AE
from pynetdicom import _config as pynetdicom_config

from xca_imaging import uids
from xca_imaging.errors import SpoolFull
from xca_imaging.imaging.receiver import Incoming, Later, PeerAssociation, StoreRequest
from xca_imaging.imaging.spool import Spool, SpoolWriter
from xca_imaging.imaging.store_scp import StoreScp
from xca_imaging.uids import is_uid
from xca_imaging.wire import dimse, pdu

CT = "1.2.840.10008.5.1.4.1.1.2"
PRIVATE = "2.25.7777"
NOTIFICATION = "1.2.840.10008.5.1.4.33"
MOVE = "1.2.840.10008.5.1.4.1.2.2.2"
EXPLICIT, IMPLICIT = uids.EXPLICIT_VR_LITTLE_ENDIAN, uids.IMPLICIT_VR_LITTLE_ENDIAN
JPEG = "1.2.840.10008.1.2.4.70"
DEADLINE = 10.0  # seconds for anything that a peer waits for


# --------------------------------------------------------------------------------------------------------------------
# Scripted parts
# --------------------------------------------------------------------------------------------------------------------


class ScriptedIncoming:
    def __init__(self, receiver: ScriptedReceiver, request: StoreRequest) -> None:
        self.receiver, self.request = receiver, request
        self.data = bytearray()

    def write(self, *data: memoryview) -> None:
        if self.receiver.write_error is not None:
            raise self.receiver.write_error
        for piece in data:
            self.data += piece

    def commit(self) -> int:
        if self.receiver.commit_error is not None:
            raise self.receiver.commit_error
        self.receiver.held[self.request.sop_instance_uid] = (self.request, bytes(self.data))
        return self.receiver.commit_status

    def conclude(self) -> None:
        self.receiver.on_conclude(self)

    def discard(self, reason: str) -> None:
        self.receiver.discarded.append(reason)


class ScriptedReceiver:
    """A Receiver in memory that does what the test says and remembers what happened."""

    def __init__(self) -> None:
        self.accept: Sequence[str] | None = None
        self.refuse: int | None = None
        self.begin_error: Exception | None = None
        self.write_error: Exception | None = None
        self.commit_error: Exception | None = None
        self.commit_status = 0x0000
        self.held: dict[str, tuple[StoreRequest, bytes]] = {}
        self.on_conclude: Callable[[ScriptedIncoming], None] = lambda incoming: None
        self.discarded: list[str] = []
        self.begun: list[StoreRequest] = []
        self.refused: list[Mapping[str, tuple[str, ...]]] = []
        self.associations: list[PeerAssociation] = []
        self.closed: list[tuple[PeerAssociation, str]] = []
        self.created: list[tuple[PeerAssociation, str, str, bytes, str]] = []

    def accepted_syntaxes(self, association: PeerAssociation) -> Sequence[str] | None:
        self.associations.append(association)
        return self.accept

    def begin(self, request: StoreRequest) -> Incoming | int:
        self.begun.append(request)
        if self.begin_error is not None:
            raise self.begin_error
        return ScriptedIncoming(self, request) if self.refuse is None else self.refuse

    def create_instance(self, association: PeerAssociation, *created: Any) -> int:
        self.created.append((association, *created))
        return self.commit_status

    def syntaxes_refused(self, association: PeerAssociation, refused: Mapping[str, tuple[str, ...]]) -> None:
        self.refused.append(refused)

    def association_closed(self, association: PeerAssociation, reason: str) -> None:
        self.closed.append((association, reason))


class RawPeer:
    """A requestor on a plain socket, which sends what it is told to."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, *data: bytes) -> None:
        self.writer.write(b"".join(data))

    async def read(self) -> Any:
        """Return the next PDU, or the command that a P-DATA-TF carries; None when the connection is closed."""
        async with asyncio.timeout(DEADLINE):
            try:
                head = await self.reader.readexactly(6)
                body = await self.reader.readexactly(int.from_bytes(head[2:], "big"))
            except (asyncio.IncompleteReadError, ConnectionResetError):
                return None
        (item,) = pdu.Reader().receive(memoryview(head + body))
        return dimse.decode_command(bytes(item.data)) if isinstance(item, pdu.Fragment) else item

    async def associate(self, *contexts: pdu.PresentationContext, **fields: Any) -> Any:
        self.send(associate_rq(*contexts, **fields).encode())
        return await self.read()

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


def context(context_id: int, abstract_syntax: str, *syntaxes: str) -> pdu.PresentationContext:
    return pdu.PresentationContext(context_id, abstract_syntax, syntaxes or (EXPLICIT, IMPLICIT))


def associate_rq(*contexts: pdu.PresentationContext, **fields: Any) -> pdu.AssociateRQ:
    values: dict[str, Any] = {
        "called_ae_title": "XCAI",
        "calling_ae_title": "PEER",
        "application_context": uids.APPLICATION_CONTEXT,
        "presentation_contexts": contexts or (context(1, CT), context(3, uids.VERIFICATION_SOP_CLASS)),
        "user_information": pdu.UserInformation(16384, "2.25.99", "SCRIPTED"),
    }
    return pdu.AssociateRQ(**{**values, **fields})


def store_rq(uid: str = "1.2.3", sop_class: str = CT, context_id: int = 1, **fields: Any) -> bytes:
    command = dimse.encode_c_store_request(dimse.CStoreRequest(7, sop_class, uid, **fields))
    return pdu.encode_p_data(context_id, command, is_command=True)


def echo_rq(context_id: int = 3) -> bytes:
    command = dimse.encode_c_echo_request(dimse.CEchoRequest(9, uids.VERIFICATION_SOP_CLASS))
    return pdu.encode_p_data(context_id, command, is_command=True)


def data(content: bytes = b"data set", context_id: int = 1, max_length: int = 0) -> bytes:
    return pdu.encode_p_data(context_id, content, is_command=False, max_length=max_length)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.fixture
def receiver() -> ScriptedReceiver:
    return ScriptedReceiver()


@contextlib.asynccontextmanager
async def serving(receiver: Any, **options: Any) -> AsyncIterator[StoreScp]:
    options = {"ae_title": "XCAI", "host": "127.0.0.1", "port": 0, **options}
    scp = StoreScp(receiver, **options)
    await scp.start()
    try:
        yield scp
    finally:
        await scp.close(0)


@contextlib.asynccontextmanager
async def connected(scp: Any) -> AsyncIterator[RawPeer]:
    async with asyncio.timeout(DEADLINE):
        peer = RawPeer(*await asyncio.open_connection(*scp.sockets[0]))
    try:
        yield peer
    finally:
        await peer.close()


async def assert_alive(scp: StoreScp) -> None:
    """The node lives: another peer is served."""
    async with connected(scp) as peer:
        assert isinstance(await peer.associate(), pdu.AssociateAC)
        peer.send(echo_rq())
        assert (await peer.read()).status == 0
        peer.send(pdu.ReleaseRQ().encode())
        assert await peer.read() == pdu.ReleaseRP()


# --------------------------------------------------------------------------------------------------------------------
# Independent senders
# --------------------------------------------------------------------------------------------------------------------


def instance(uid: str = "1.2.826.0.1.3680043.8.498.1", sop_class: str = CT, size: int = 300_000) -> Dataset:
    dataset = Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = sop_class, uid
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.2.3.1", "1.2.3.1.1"
    dataset.PatientID, dataset.PatientName, dataset.Modality = "SYNTHETIC", "Test^Synthetic", "OT"
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = size // 250, 125, 1
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 0
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.PixelData = bytes(range(250)) * (size // 250)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = EXPLICIT
    return dataset


def encoded(dataset: Dataset) -> bytes:
    stream = DicomBytesIO()
    stream.is_little_endian, stream.is_implicit_VR = True, False
    write_dataset(stream, dataset)
    return bytes(stream.getvalue())


class SpoolingReceiver(ScriptedReceiver):
    """A Receiver with a real spool."""

    def __init__(self, spool: Spool) -> None:
        super().__init__()
        self.spool = spool

    def begin(self, request: StoreRequest) -> Incoming | int:
        self.begun.append(request)
        writer = self.spool.create(
            sop_class_uid=request.sop_class_uid,
            sop_instance_uid=request.sop_instance_uid,
            transfer_syntax_uid=request.transfer_syntax_uid,
            source_ae_title=request.association.calling_ae_title,
        )
        return _Spooling(writer)


class _Spooling:
    def __init__(self, writer: SpoolWriter) -> None:
        self.writer = writer

    def write(self, *data: memoryview) -> None:
        self.writer.write(*data)

    def commit(self) -> int:
        self.writer.seal()
        return 0

    def conclude(self) -> None:
        self.writer.commit()

    def discard(self, reason: str) -> None:
        self.writer.discard()


def pynetdicom_send(
    address: tuple[str, int], datasets: Sequence[Dataset], tls: ssl.SSLContext | None = None
) -> list[int]:
    ae = AE("PYNETDICOM")
    for sop_class in (CT, PRIVATE):
        ae.add_requested_context(sop_class, [EXPLICIT])
    ae.add_requested_context(uids.VERIFICATION_SOP_CLASS)
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = DEADLINE
    association = ae.associate(*address, ae_title="XCAI", tls_args=(tls, "localhost") if tls else None)
    assert association.is_established
    opened = association.dul.socket.socket
    statuses = [association.send_c_echo().Status]
    statuses += [association.send_c_store(dataset).Status for dataset in datasets]
    association.release()
    association.dul.join(DEADLINE)
    opened.close()  # pynetdicom leaves it open when it cannot be shut down, because the peer was first
    return statuses


async def test_pynetdicom_sends_standard_and_private_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pynetdicom_config, "UNRESTRICTED_STORAGE_SERVICE", True)
    spool = Spool(tmp_path, max_bytes=10_000_000, retention=60)
    receiver = SpoolingReceiver(spool)
    datasets = [instance("1.2.1"), instance("1.2.2", PRIVATE), instance("1.2.3", size=1000)]
    async with serving(receiver) as scp:
        assert await asyncio.to_thread(pynetdicom_send, scp.sockets[0], datasets) == [0, 0, 0, 0]
        await until(lambda: receiver.closed)
    (association,) = receiver.associations
    assert receiver.closed == [(association, "released")]
    assert (association.calling_ae_title, association.called_ae_title, association.host) == (
        "PYNETDICOM",
        "XCAI",
        "127.0.0.1",
    )
    assert association.implementation_version_name.startswith("PYNETDICOM")
    for dataset in datasets:
        spooled = spool.find(dataset.SOPInstanceUID)
        assert spooled is not None
        content = spooled.path.read_bytes()
        assert content.endswith(encoded(dataset))
        assert len(content) == len(encoded(dataset)) + 132 + 12 + dcmread(spooled.path).file_meta[0x00020000].value
        assert spooled.sop_class_uid == dataset.SOPClassUID
    spool.close()


async def test_pynetdicom_aborts_in_mid_object(receiver: ScriptedReceiver) -> None:
    def send(address: tuple[str, int]) -> None:
        ae = AE("PYNETDICOM")
        ae.add_requested_context(CT, [EXPLICIT])
        association = ae.associate(*address, ae_title="XCAI")
        assert association.is_established
        raw = association.dul.socket.socket
        raw.sendall(store_rq() + data(bytes(1000))[:500])
        association.abort()

    async with serving(receiver) as scp:
        await asyncio.to_thread(send, scp.sockets[0])
        await until(lambda: receiver.closed)
        await assert_alive(scp)
    assert receiver.held == {}
    assert len(receiver.discarded) == 1


def needs(tool: str) -> str:
    path = shutil.which(tool)
    if path is None:
        pytest.skip(f"{tool} is not installed")
    return path


async def run(*command: str) -> None:
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    async with asyncio.timeout(3 * DEADLINE):
        output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()


@pytest.mark.peer
async def test_dcmtk_echoscu(receiver: ScriptedReceiver) -> None:
    async with serving(receiver) as scp:
        host, port = scp.sockets[0]
        await run(needs("echoscu"), "-aec", "XCAI", "--repeat", "3", host, str(port))
        await until(lambda: receiver.closed)
    assert [reason for _, reason in receiver.closed] == ["released"]


@pytest.mark.peer
@pytest.mark.parametrize("max_pdu", [4096, 131072])
async def test_dcmtk_storescu_bytes_arrive_as_sent(receiver: ScriptedReceiver, tmp_path: Path, max_pdu: int) -> None:
    tool = needs("storescu")
    datasets = [instance(f"1.2.826.0.1.3680043.8.498.{n}", size=size) for n, size in enumerate((1000, 700_000, 250))]
    for dataset in datasets:
        dcmwrite(tmp_path / f"{dataset.SOPInstanceUID}.dcm", dataset, enforce_file_format=True)
    async with serving(receiver) as scp:
        host, port = scp.sockets[0]
        await run(tool, "-aec", "XCAI", "--max-send-pdu", str(max_pdu), "+sd", host, str(port), str(tmp_path))
        await until(lambda: receiver.closed)
    assert set(receiver.held) == {dataset.SOPInstanceUID for dataset in datasets}
    for dataset in datasets:
        request, content = receiver.held[dataset.SOPInstanceUID]
        assert request.transfer_syntax_uid == EXPLICIT
        assert content == encoded(dataset)


def self_signed() -> tuple[bytes, bytes]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return certificate.public_bytes(serialization.Encoding.PEM), private


async def test_pynetdicom_over_tls(receiver: ScriptedReceiver, tmp_path: Path) -> None:
    certificate, key = self_signed()
    (tmp_path / "node.pem").write_bytes(certificate + key)
    server_context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server_context.load_cert_chain(tmp_path / "node.pem")
    client_context = ssl.create_default_context(cadata=certificate.decode())
    dataset = instance()
    async with serving(receiver, ssl=server_context) as scp:
        assert await asyncio.to_thread(pynetdicom_send, scp.sockets[0], [dataset], client_context) == [0, 0]
        await until(lambda: receiver.closed)
        async with connected(scp) as peer:  # no TLS at all
            peer.send(associate_rq().encode())
            async with asyncio.timeout(DEADLINE):
                assert b"XCA_IMAGING" not in await peer.reader.read()  # closed, at most with a TLS alert
    assert receiver.held[dataset.SOPInstanceUID][1] == encoded(dataset)


# --------------------------------------------------------------------------------------------------------------------
# Negotiation
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "rejection"),
    [
        ({"called_ae_title": "OTHER"}, pdu.AssociateRJ(1, 1, 7)),
        ({"calling_ae_title": "EVE"}, pdu.AssociateRJ(1, 1, 3)),
        ({"application_context": "1.2.3"}, pdu.AssociateRJ(1, 1, 2)),
        ({"protocol_version": 2}, pdu.AssociateRJ(1, 2, 2)),
    ],
)
async def test_rejected(receiver: ScriptedReceiver, fields: dict[str, Any], rejection: pdu.AssociateRJ) -> None:
    async with serving(receiver, calling_ae_titles=frozenset({"PEER"})) as scp, connected(scp) as peer:
        assert await peer.associate(**fields) == rejection
        await assert_alive(scp)
    assert len(receiver.closed) == 1  # of the one that was accepted


async def test_more_associations_than_allowed_are_a_transient_rejection(receiver: ScriptedReceiver) -> None:
    async with serving(receiver, max_associations=1) as scp, connected(scp) as first:
        assert isinstance(await first.associate(), pdu.AssociateAC)
        assert [association.calling_ae_title for association in scp.associations] == ["PEER"]
        async with connected(scp) as second:
            assert await second.associate() == pdu.AssociateRJ(2, 3, 2)
            async with connected(scp) as third:  # not even heard
                assert await third.read() is None
        first.send(pdu.ReleaseRQ().encode())
        assert await first.read() == pdu.ReleaseRP()
        await first.close()
        await assert_alive(scp)


async def test_contexts_are_answered_one_by_one(receiver: ScriptedReceiver) -> None:
    receiver.accept = (EXPLICIT,)
    async with serving(receiver) as scp, connected(scp) as peer:
        answer = await peer.associate(
            context(1, CT, IMPLICIT, EXPLICIT), context(5, CT, JPEG), context(77, MOVE), context(255, PRIVATE)
        )
    assert [(c.context_id, c.result) for c in answer.presentation_contexts] == [(1, 0), (5, 4), (77, 3), (255, 0)]
    assert answer.presentation_contexts[0].transfer_syntax == EXPLICIT
    assert receiver.refused == [{CT: (JPEG,)}]
    assert answer.user_information.maximum_length == 131072
    assert answer.user_information.implementation_version_name == uids.IMPLEMENTATION_VERSION_NAME


async def test_request_with_everything_that_may_be_in_it_bytewise(receiver: ScriptedReceiver) -> None:
    contexts = tuple(context(n, f"{PRIVATE}.{n}", *(f"2.25.{s}" for s in range(12))) for n in range(1, 256, 2))
    encoded_rq = bytearray(associate_rq(*contexts).encode())
    encoded_rq[10:26] = b"XCAI".ljust(16, b"\0")
    identity = struct.pack(">BxHBBH", 0x58, 9006, 5, 1, 9000) + bytes(9000) + b"\0\0"
    information = associate_rq().user_information.encode()
    encoded_rq[-len(information) :] = (
        struct.pack(">BxH", 0x50, len(information) - 4 + 9010) + information[4:] + identity
    )
    encoded_rq[2:6] = (len(encoded_rq) - 6).to_bytes(4, "big")
    async with serving(receiver) as scp, connected(scp) as peer:
        for position in range(300):
            peer.send(encoded_rq[position : position + 1])
            await peer.writer.drain()
        peer.send(encoded_rq[300:])
        answer = await peer.read()
    assert isinstance(answer, pdu.AssociateAC)
    assert [c.result for c in answer.presentation_contexts] == [0] * 128


# --------------------------------------------------------------------------------------------------------------------
# Requests
# --------------------------------------------------------------------------------------------------------------------


async def test_class_is_that_of_the_command_syntax_that_of_the_context(receiver: ScriptedReceiver) -> None:
    async with serving(receiver) as scp, connected(scp) as peer:
        await peer.associate(context(9, CT, IMPLICIT))
        peer.send(
            store_rq("1.2.3", PRIVATE, 9, move_originator_ae_title="XCAI", move_originator_message_id=5),
            data(b"abc", 9),
        )
        assert await peer.read() == dimse.Response(0x8001, 7, 0, PRIVATE, "1.2.3", False)
    request, content = receiver.held["1.2.3"]
    assert (request.sop_class_uid, request.transfer_syntax_uid, content) == (PRIVATE, IMPLICIT, b"abc")
    assert (request.move_originator_ae_title, request.move_originator_message_id) == ("XCAI", 5)
    assert request.association.implementation_version_name == "SCRIPTED"


async def test_pipelined_and_bytewise_requests_are_answered_in_order(receiver: ScriptedReceiver) -> None:
    stream = store_rq("1.1") + data(b"one") + echo_rq() + store_rq("1.2") + data(bytes(300), max_length=100)
    async with serving(receiver) as scp, connected(scp) as peer:
        await peer.associate()
        peer.send(stream)
        assert [(await peer.read()).command_field for _ in range(3)] == [0x8001, 0x8030, 0x8001]
        for position in range(len(stream)):
            peer.send(stream[position : position + 1])
            await peer.writer.drain()
        assert [(await peer.read()).command_field for _ in range(3)] == [0x8001, 0x8030, 0x8001]
    assert {uid: content for uid, (_, content) in receiver.held.items()} == {"1.1": b"one", "1.2": bytes(300)}


async def test_refused_instance_is_drained_and_the_next_one_taken(receiver: ScriptedReceiver) -> None:
    receiver.refuse = dimse.STATUS_REFUSED_NOT_AUTHORIZED
    async with serving(receiver) as scp, connected(scp) as peer:
        await peer.associate()
        peer.send(store_rq("1.1"), data(bytes(100_000), max_length=5000))
        assert (await peer.read()).status == 0x0124
        receiver.refuse = None
        peer.send(store_rq("1.2"), data(b"abc"))
        assert (await peer.read()).status == 0
    assert list(receiver.held) == ["1.2"]


@pytest.mark.parametrize(
    ("where", "error", "status"),
    [
        ("begin_error", SpoolFull("full"), 0xA700),
        ("begin_error", KeyError("a defect"), 0x0110),
        ("write_error", SpoolFull("full"), 0xA700),
        ("write_error", OSError(28, "No space left on device"), 0xA700),
        ("write_error", ZeroDivisionError(), 0x0110),
        ("commit_error", SpoolFull("full"), 0xA700),
        ("commit_error", ValueError("a defect"), 0x0110),
    ],
)
async def test_errors_of_the_receiver_are_statuses(
    receiver: ScriptedReceiver, where: str, error: Exception, status: int
) -> None:
    setattr(receiver, where, error)
    async with serving(receiver) as scp, connected(scp) as peer:
        await peer.associate()
        peer.send(store_rq(), data(bytes(100_000), max_length=5000))
        assert (await peer.read()).status == status
        setattr(receiver, where, None)
        peer.send(store_rq("1.2"), data())
        assert (await peer.read()).status == 0
    assert len(receiver.discarded) == (0 if where == "begin_error" else 1)
    assert list(receiver.held) == ["1.2"]


async def test_status_of_commit_is_the_answer(receiver: ScriptedReceiver) -> None:
    receiver.commit_status = 0xA900
    async with serving(receiver) as scp, connected(scp) as peer:
        await peer.associate()
        peer.send(store_rq(), data())
        assert (await peer.read()).status == 0xA900


class LateReceiver(ScriptedReceiver):
    """A Receiver that answers when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.syntaxes: list[Later[Sequence[str] | None]] = []
        self.statuses: list[Later[int]] = []
        self.incomings: list[ScriptedIncoming] = []

    def accepted_syntaxes(self, association: PeerAssociation) -> Any:
        super().accepted_syntaxes(association)
        self.syntaxes.append(Later())
        return self.syntaxes[-1]

    def begin(self, request: StoreRequest) -> Any:
        incoming: Any = super().begin(request)
        self.statuses.append(Later())
        self.incomings.append(incoming)
        incoming.commit = lambda status=self.statuses[-1]: status
        return incoming


async def test_the_answer_is_sent_before_the_bookkeeping(receiver: ScriptedReceiver) -> None:
    async with serving(receiver) as scp, connected(scp) as peer:
        await peer.associate()
        ours = peer.writer.get_extra_info("socket")
        seen = []

        def look(incoming: ScriptedIncoming) -> None:
            with socket.socket(fileno=os.dup(ours.fileno())) as end:  # the event loop stands still: nobody reads
                seen.append((incoming.request.sop_instance_uid, end.recv(6, socket.MSG_PEEK | socket.MSG_DONTWAIT)))

        receiver.on_conclude = look
        for uid, content in (("1.1", b"small"), ("1.2", bytes(500_000))):
            peer.send(store_rq(uid), data(content, max_length=131_072))
            assert (await peer.read()).status == 0
        await until(lambda: len(seen) == 2)
    assert [uid for uid, _ in seen] == ["1.1", "1.2"]
    assert all(answer[:1] == b"\x04" for _, answer in seen)


async def test_bookkeeping_that_fails_is_told_and_ends_nothing(
    receiver: ScriptedReceiver, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: ScriptedIncoming) -> None:
        raise KeyError("a defect")

    async with serving(receiver) as scp, connected(scp) as peer:
        await peer.associate()
        receiver.on_conclude = fail
        peer.send(store_rq("1.1"), data(), echo_rq())
        assert [(await peer.read()).command_field, (await peer.read()).command_field] == [0x8001, 0x8030]
    assert receiver.discarded == ["'a defect'"]
    assert "could not be kept" in caplog.text


async def test_a_read_that_brings_nothing_while_an_answer_is_due() -> None:
    """A transport may ask for a buffer and find that there is nothing to read: uvloop does so after a full one."""
    receiver = LateReceiver()
    async with serving(receiver) as scp, connected(scp) as peer:
        peer.send(associate_rq().encode())
        await until(lambda: receiver.syntaxes)
        receiver.syntaxes[0].tell(None)
        await peer.read()
        peer.send(store_rq("1.1"), data(b"x"))
        await until(lambda: receiver.statuses)
        (connection,) = scp._connections
        connection.get_buffer(-1)
        receiver.statuses[0].tell(0)
        assert (await peer.read()).status == 0
        peer.send(store_rq("1.2"), data(bytes(range(250)) * 400, max_length=131_072))
        await until(lambda: len(receiver.statuses) == 2)
        receiver.statuses[1].tell(0)
        assert (await peer.read()).status == 0
        assert receiver.incomings[1].data == bytes(range(250)) * 400


async def test_answers_that_come_later() -> None:
    receiver = LateReceiver()
    async with serving(receiver) as scp, connected(scp) as peer, connected(scp) as beside:
        for each in (peer, beside):
            each.send(associate_rq().encode())
        await until(lambda: len(receiver.syntaxes) == 2)
        for later in receiver.syntaxes:
            later.tell((IMPLICIT,))
            later.tell((EXPLICIT,))  # what is said first counts
        for each in (peer, beside):
            assert (await each.read()).presentation_contexts[0].transfer_syntax == IMPLICIT
        peer.send(store_rq("1.1"), data(b"x"), echo_rq())
        await until(lambda: receiver.statuses)
        beside.send(echo_rq())  # who waits stops nobody else
        assert (await beside.read()).status == 0
        peer.send(store_rq("1.2"), data(b"y"), echo_rq())
        await asyncio.sleep(0.05)
        assert len(receiver.statuses) == 1
        receiver.statuses[0].tell(0xA900)
        assert [(await peer.read()).command_field, (await peer.read()).command_field] == [0x8001, 0x8030]
        await until(lambda: len(receiver.statuses) == 2)
        receiver.statuses[1].tell(0)
        assert [(await peer.read()).command_field, (await peer.read()).command_field] == [0x8001, 0x8030]


async def test_answers_that_come_when_the_peer_has_gone() -> None:
    receiver = LateReceiver()
    async with serving(receiver) as scp:
        async with connected(scp) as unheard:
            unheard.send(associate_rq().encode())
            await until(lambda: receiver.syntaxes)
        async with connected(scp) as peer:
            peer.send(associate_rq().encode())
            await until(lambda: len(receiver.syntaxes) == 2)
            receiver.syntaxes[1].tell(None)
            assert isinstance(await peer.read(), pdu.AssociateAC)
            peer.send(store_rq(), data(b"x"))
            await until(lambda: receiver.statuses)
        await until(lambda: len(receiver.closed) == 2)
        receiver.syntaxes[0].tell(None)
        receiver.statuses[0].tell(0)
        async with connected(scp) as peer:
            peer.send(associate_rq().encode())
            await until(lambda: len(receiver.syntaxes) == 3)
            receiver.syntaxes[2].tell(None)
            assert isinstance(await peer.read(), pdu.AssociateAC)
    assert receiver.discarded == []  # it was whole: what becomes of it is the receiver's business


@pytest.mark.parametrize(
    ("uid", "sop_class", "status"),
    [
        ("../../etc/passwd", CT, 0x0117),
        ("1." * 40, CT, 0x0117),
        ("", CT, 0x0117),
        ("1.2", "not a class", 0x0118),
    ],
)
async def test_uids_that_are_none(receiver: ScriptedReceiver, uid: str, sop_class: str, status: int) -> None:
    async with serving(receiver) as scp, connected(scp) as peer:
        await peer.associate()
        peer.send(store_rq(uid, sop_class), data())
        assert (await peer.read()).status == status
    assert receiver.begun == []


async def test_store_without_data_set(receiver: ScriptedReceiver) -> None:
    async with serving(receiver) as scp, connected(scp) as peer:
        await peer.associate()
        peer.send(store_rq(has_data_set=False))
        assert (await peer.read()).status == 0xC000
    assert receiver.begun == []


def command(**elements: int) -> bytes:
    """Return a P-DATA-TF with a command set of US elements, `e0100` being (0000,0100)."""
    body = b"".join(struct.pack("<HHLH", 0, int(name[1:], 16), 2, value) for name, value in sorted(elements.items()))
    return pdu.encode_p_data(1, struct.pack("<HHLL", 0, 0, 4, len(body)) + body, is_command=True)


async def test_other_services_are_unrecognized_and_cancel_is_ignored(receiver: ScriptedReceiver) -> None:
    async with serving(receiver) as scp, connected(scp) as peer:
        await peer.associate()
        peer.send(command(e0100=0x0020, e0110=4, e0800=0x0001), data())  # C-FIND-RQ with its identifier
        answer = await peer.read()
        assert (answer.command_field, answer.message_id_being_responded_to, answer.status) == (0x8020, 4, 0x0211)
        peer.send(command(e0100=0x0FFF, e0120=4, e0800=0x0101), echo_rq())  # C-CANCEL-RQ
        assert (await peer.read()).command_field == 0x8030


def create_rq(uid: str = "", sop_class: str = NOTIFICATION, has_data_set: bool = True) -> bytes:
    """Return an N-CREATE-RQ in context 5."""
    named = dimse.encode_c_echo_request(dimse.CEchoRequest(4, sop_class))[12:]
    elements = named.replace(struct.pack("<HHLH", 0, 0x0100, 2, 0x0030), struct.pack("<HHLH", 0, 0x0100, 2, 0x0140))
    elements = elements.replace(struct.pack("<HHLH", 0, 0x0800, 2, 0x0101), b"")
    elements += struct.pack("<HHLH", 0, 0x0800, 2, 0x0000 if has_data_set else 0x0101)
    if uid:
        value = uid.encode().ljust(len(uid) + len(uid) % 2, b"\0")
        elements += struct.pack("<HHL", 0, 0x1000, len(value)) + value
    return pdu.encode_p_data(5, struct.pack("<HHLL", 0, 0, 4, len(elements)) + elements, is_command=True)


async def notification(peer: RawPeer, receiver: ScriptedReceiver) -> None:
    """Create notifications, good ones and bad ones."""
    answer = await peer.associate(
        context(1, CT), context(5, NOTIFICATION, JPEG, IMPLICIT), context(7, NOTIFICATION, JPEG)
    )
    assert [(c.result, c.transfer_syntax) for c in answer.presentation_contexts][1:] == [(0, IMPLICIT), (4, JPEG)]
    peer.send(create_rq("1.2.9"), data(b"attributes", 5))
    assert await peer.read() == dimse.Response(0x8140, 4, 0, NOTIFICATION, "1.2.9", False)
    receiver.commit_status = 0x0110
    peer.send(create_rq(), data(bytes(900_000), 5, 100_000))
    answer = await peer.read()
    assert (answer.status, is_uid(answer.affected_sop_instance_uid)) == (0x0110, True)  # ours to choose
    (first, second) = receiver.created
    assert first[1:] == (NOTIFICATION, "1.2.9", b"attributes", IMPLICIT)
    assert second[1:] == (NOTIFICATION, answer.affected_sop_instance_uid, bytes(900_000), IMPLICIT)
    assert first[0] == second[0] == receiver.associations[0]
    for wrong, status in (
        ((create_rq(), data(bytes(1_000_001), 5, 100_000)), 0x0213),
        ((create_rq(has_data_set=False),), 0x0120),
        ((create_rq("not a uid"), data(b"x", 5)), 0x0117),
        ((create_rq(sop_class=CT), data(b"x", 5)), 0x0211),
    ):
        peer.send(*wrong)
        assert (await peer.read()).status == status
    assert len(receiver.created) == 2
    receiver.commit_status = 0
    peer.send(store_rq(), data())
    assert (await peer.read()).status == 0


async def test_availability_notifications(receiver: ScriptedReceiver) -> None:
    async with serving(receiver) as scp, connected(scp) as peer:
        await notification(peer, receiver)


async def test_answers_keep_to_a_tiny_maximum_length(receiver: ScriptedReceiver) -> None:
    async with serving(receiver) as scp, connected(scp) as peer:
        await peer.associate(user_information=pdu.UserInformation(16, "1.2"))
        peer.send(echo_rq())
        reader, messages, answer = pdu.Reader(), dimse.MessageReader(), None
        async with asyncio.timeout(DEADLINE):
            while answer is None:
                chunk = await peer.reader.read(1000)
                for fragment in reader.receive(memoryview(chunk)):
                    assert isinstance(fragment, pdu.Fragment)
                    assert len(fragment.data) <= 10
                    answer = messages.receive(fragment)
        assert isinstance(answer, dimse.Response)


# --------------------------------------------------------------------------------------------------------------------
# Peers that break the rules
# --------------------------------------------------------------------------------------------------------------------

PROVIDER = 2
HOSTILE = {
    "unknown_pdu": (b"\x0e\0\0\0\0\4abcd", pdu.Abort(PROVIDER, pdu.ABORT_UNRECOGNIZED_PDU)),
    "second_associate_rq": (associate_rq().encode(), pdu.Abort(PROVIDER, pdu.ABORT_UNEXPECTED_PDU)),
    "release_rp_unasked": (pdu.ReleaseRP().encode(), pdu.Abort(PROVIDER, pdu.ABORT_UNEXPECTED_PDU)),
    "pdu_of_4_gb": (struct.pack(">BxL", 4, 0xFFFFFFF0), pdu.Abort(PROVIDER, pdu.ABORT_INVALID_PDU_PARAMETER)),
    "value_longer_than_pdu": (
        struct.pack(">BxLLBB", 4, 20, 0xFFFFFFF0, 1, 3),
        pdu.Abort(PROVIDER, pdu.ABORT_INVALID_PDU_PARAMETER),
    ),
    "context_not_accepted": (store_rq(context_id=9), pdu.Abort(PROVIDER, pdu.ABORT_INVALID_PDU_PARAMETER)),
    "data_set_first": (data(), pdu.Abort(PROVIDER, pdu.ABORT_UNEXPECTED_PDU)),
    "command_amidst_data_set": (
        store_rq() + data(bytes(100), max_length=56)[:62] + echo_rq(),
        pdu.Abort(PROVIDER, pdu.ABORT_UNEXPECTED_PDU),
    ),
    "endless_command": (
        pdu.encode_p_data(1, bytes(20_000), is_command=True, max_length=4096),
        pdu.Abort(PROVIDER, pdu.ABORT_INVALID_PDU_PARAMETER),
    ),
    "no_command_set": (
        pdu.encode_p_data(1, b"nonsense", is_command=True),
        pdu.Abort(PROVIDER, pdu.ABORT_INVALID_PDU_PARAMETER),
    ),
    "response_unasked": (
        command(e0100=0x8001, e0120=1, e0800=0x0101, e0900=0),
        pdu.Abort(PROVIDER, pdu.ABORT_UNEXPECTED_PDU),
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_hostile_bytes_are_answered_with_abort(receiver: ScriptedReceiver, name: str) -> None:
    sent, abort = HOSTILE[name]
    async with serving(receiver) as scp, connected(scp) as peer:
        await peer.associate()
        peer.send(sent, bytes(10_000))
        assert await peer.read() == abort
        await until(lambda: receiver.closed)
        await assert_alive(scp)
    assert receiver.closed[0][1].startswith("aborted by us")
    assert receiver.held == {}
    assert len(receiver.discarded) == len(receiver.begun)


NO_REQUEST = {
    "data": data(),
    "http": b"GET / HTTP/1.0\r\n\r\n",
    "release": pdu.ReleaseRQ().encode(),
    "request_of_4_gb": b"\1\0\xff\xff\xff\xff",
}


@pytest.mark.parametrize("name", NO_REQUEST)
async def test_anything_but_a_request_for_association(receiver: ScriptedReceiver, name: str) -> None:
    async with serving(receiver) as scp, connected(scp) as peer:
        peer.send(NO_REQUEST[name])
        assert await peer.read() == pdu.Abort(0)
        await assert_alive(scp)


async def test_peer_that_aborts_or_vanishes_in_mid_object(receiver: ScriptedReceiver) -> None:
    async with serving(receiver) as scp:
        async with connected(scp) as peer:
            await peer.associate()
            peer.send(store_rq("1.1"), data(bytes(1000))[:600], b"")
            await until(lambda: receiver.begun)
        await until(lambda: len(receiver.closed) == 1)
        async with connected(scp) as peer:
            await peer.associate()
            peer.send(store_rq("1.2"), data(bytes(100), max_length=56)[:62], pdu.Abort(0).encode())
            assert await peer.read() is None
        await until(lambda: len(receiver.closed) == 2)
    assert len(receiver.discarded) == 2
    assert receiver.held == {}
    assert receiver.closed[1][1] == "aborted by the peer"


async def test_peer_that_releases_in_mid_object(receiver: ScriptedReceiver) -> None:
    async with serving(receiver) as scp, connected(scp) as peer:
        await peer.associate()
        peer.send(store_rq(), data(bytes(100), max_length=56)[:62], pdu.ReleaseRQ().encode())
        assert await peer.read() == pdu.ReleaseRP()
        await until(lambda: receiver.closed)
    assert len(receiver.discarded) == 1
    assert receiver.held == {}


async def test_peer_that_vanishes_after_release_is_normal(
    receiver: ScriptedReceiver, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(receiver) as scp:
        async with connected(scp) as peer:
            await peer.associate()
            peer.send(pdu.ReleaseRQ().encode())
            await peer.writer.drain()
            raw = peer.writer.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close with RST
        await until(lambda: receiver.closed)
    assert [reason for _, reason in receiver.closed] == ["released"]
    assert not caplog.records


async def test_peer_that_closes_between_objects(receiver: ScriptedReceiver) -> None:
    async with serving(receiver) as scp:
        async with connected(scp) as peer:
            await peer.associate()
            peer.send(store_rq("1.1"), data(b"whole"))
            assert (await peer.read()).status == 0
        await until(lambda: receiver.closed)
        await assert_alive(scp)
    assert (list(receiver.held), receiver.discarded) == (["1.1"], [])
    assert receiver.closed[0][1] == "connection closed by the peer"


async def test_titles_padded_with_nul_of_a_peer_that_nobody_knows(receiver: ScriptedReceiver) -> None:
    request = bytearray(associate_rq(calling_ae_title="OTHER").encode())
    request[10:26], request[26:42] = b"XCAI".ljust(16, b"\0"), b"OTHER".ljust(16, b"\0")
    async with serving(receiver) as scp, connected(scp) as peer:
        peer.send(bytes(request))
        assert isinstance(await peer.read(), pdu.AssociateAC)
        peer.send(store_rq(move_originator_ae_title="XCAI"), data())
        assert (await peer.read()).status == 0
    assert (receiver.associations[0].calling_ae_title, receiver.associations[0].called_ae_title) == ("OTHER", "XCAI")


@pytest.mark.parametrize("window", [(0, 0), (1, 1), (8, 8)])
async def test_no_asynchronous_operations_window_is_granted(
    receiver: ScriptedReceiver, window: tuple[int, int]
) -> None:
    information = pdu.UserInformation(16384, "2.25.99", "SCRIPTED", asynchronous_operations_window=window)
    async with serving(receiver) as scp, connected(scp) as peer:
        answer = await peer.associate(user_information=information)
    assert answer.user_information.asynchronous_operations_window is None  # which means 1/1 (PS3.7 D.3.3.3)


async def test_the_same_instance_twice_at_once(tmp_path: Path) -> None:
    spool = Spool(tmp_path, max_bytes=10_000_000, retention=60)
    receiver = SpoolingReceiver(spool)
    async with serving(receiver) as scp, connected(scp) as first, connected(scp) as second:
        objects = {
            first: data(b"first" * 40_000, max_length=50_000),
            second: data(b"other" * 40_000, max_length=50_000),
        }
        for peer, sent in objects.items():
            await peer.associate()
            peer.send(store_rq("1.1"), sent[:100_000])
        await until(lambda: len(receiver.begun) == 2)
        for peer, sent in objects.items():
            peer.send(sent[100_000:])
            assert (await peer.read()).status == 0
    spooled = spool.find("1.1")
    assert spooled is not None
    assert spooled.path.read_bytes()[-200_000:] == b"other" * 40_000  # not a mixture
    assert len(list(spool.folder.iterdir())) == 1
    spool.close()


async def test_many_associations_at_once(receiver: ScriptedReceiver) -> None:
    content = bytes(range(250)) * 200

    async def send(number: int) -> None:
        async with connected(scp) as peer:
            assert isinstance(await peer.associate(calling_ae_title=f"PEER{number}"), pdu.AssociateAC)
            for each in range(3):
                peer.send(store_rq(f"1.{number}.{each}"), data(content, max_length=16384))
                assert (await peer.read()).status == 0
            peer.send(pdu.ReleaseRQ().encode())
            assert await peer.read() == pdu.ReleaseRP()

    async with serving(receiver, max_associations=100) as scp:
        await asyncio.gather(*(send(number) for number in range(100)))
        await until(lambda: len(receiver.closed) == 100)
    assert len(receiver.held) == 300
    assert all(held == content for _, held in receiver.held.values())
    assert {reason for _, reason in receiver.closed} == {"released"}


async def test_short_and_long_pdus_in_one_object(receiver: ScriptedReceiver) -> None:
    """Reads are cut to fit long PDUs; whatever the peer's PDUs are, the bytes are the same."""
    content = bytes(n % 251 for n in range(900_000))
    pieces, position = [], 0
    for length in (131_000, 7, 100_000, 131_000, 70_000, 1, 0, 131_000, 65_530, 65_536, 131_000):
        pieces.append(content[position : position + length])
        position += length
    pieces.append(content[position:][:131_000])
    sent = b"".join(pieces)
    stream = b"".join(
        struct.pack(">BxLLBB", 4, len(piece) + 6, len(piece) + 2, 1, 2 * (number == len(pieces) - 1)) + piece
        for number, piece in enumerate(pieces)
    )
    async with serving(receiver) as scp, connected(scp) as peer:
        await peer.associate()
        for number in range(3):
            peer.send(store_rq(f"1.{number}"), stream)
            assert (await peer.read()).status == 0
        for start in range(0, len(stream), 77_777):
            peer.send(*([store_rq("1.9")] if not start else []), stream[start : start + 77_777])
            await peer.writer.drain()
        assert (await peer.read()).status == 0
    assert [held for _, held in receiver.held.values()] == [sent] * 4


# --------------------------------------------------------------------------------------------------------------------
# Time, backpressure, shutdown
# --------------------------------------------------------------------------------------------------------------------


async def test_artim_closes_who_never_asks(receiver: ScriptedReceiver) -> None:
    async with serving(receiver, artim_timeout=0.1) as scp, connected(scp) as peer:
        peer.send(associate_rq().encode()[:50])
        assert await peer.read() is None


async def test_artim_closes_who_stays_after_release(receiver: ScriptedReceiver) -> None:
    async with serving(receiver, artim_timeout=0.2) as scp, connected(scp) as peer:
        await peer.associate()
        await asyncio.sleep(0.3)  # established: ARTIM does not run
        peer.send(pdu.ReleaseRQ().encode())
        assert await peer.read() == pdu.ReleaseRP()
        assert await peer.read() is None


@pytest.mark.parametrize("is_in_object", [True, False])
async def test_silent_peer_is_aborted(receiver: ScriptedReceiver, is_in_object: bool) -> None:
    async with serving(receiver, stall_timeout=0.15) as scp, connected(scp) as peer:
        await peer.associate()
        if is_in_object:
            peer.send(store_rq(), data(bytes(1000))[:600])
        assert await peer.read() == pdu.Abort(0)
        await until(lambda: receiver.closed)
    assert "nothing moved" in receiver.closed[0][1]
    assert len(receiver.discarded) == is_in_object


async def test_slow_peer_is_not_silent(receiver: ScriptedReceiver) -> None:
    async with serving(receiver, stall_timeout=0.3) as scp, connected(scp) as peer:
        await peer.associate()
        for byte in store_rq()[:-1] + b"":
            peer.send(bytes([byte]))
            await asyncio.sleep(0.004)
        peer.send(store_rq()[-1:], data())
        assert (await peer.read()).status == 0


async def test_pause_stops_reading_and_the_stall_clock(receiver: ScriptedReceiver) -> None:
    async with serving(receiver, stall_timeout=0.2, receive_buffer=4096, socket_buffer=4096) as scp:
        async with connected(scp) as peer:
            await peer.associate()
            (association,) = scp.associations
            peer.send(store_rq(), data(bytes(100)))
            await peer.read()
            scp.pause(association)
            scp.pause(association)
            peer.send(store_rq("1.2.4"), data(bytes(3_000_000), max_length=100_000))
            await asyncio.sleep(0.5)
            assert len(receiver.begun) == 1
            scp.resume(association)
            assert (await peer.read()).status == 0
        await until(lambda: receiver.closed)
        scp.pause(association)  # gone: nothing to pause
        scp.resume(association)
    assert len(receiver.held["1.2.4"][1]) == 3_000_000


async def test_peer_that_never_reads_its_answers_is_not_buffered_for(receiver: ScriptedReceiver) -> None:
    async with serving(receiver, stall_timeout=0.5) as scp:
        with socket.create_connection(scp.sockets[0], timeout=DEADLINE) as raw:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            raw.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(raw, associate_rq().encode())

            async def ask() -> None:
                while True:  # as fast as it is taken, which at some point it is not
                    await loop.sock_sendall(raw, echo_rq() * 500)

            asking = asyncio.create_task(ask())
            await until(lambda: receiver.closed)
            asking.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                await asking
    assert "nothing moved" in receiver.closed[0][1]


async def test_close_lets_a_running_object_end(receiver: ScriptedReceiver) -> None:
    async with serving(receiver) as scp, connected(scp) as peer, connected(scp) as idle:
        await peer.associate()
        await until(lambda: receiver.associations)
        peer.send(store_rq(), data(bytes(1000))[:600])
        await until(lambda: receiver.begun)
        closing = asyncio.create_task(scp.close(DEADLINE))
        assert await idle.read() is None  # no association: nothing to wait for
        peer.send(data(bytes(1000))[600:])
        assert (await peer.read()).status == 0
        peer.send(pdu.ReleaseRQ().encode())
        assert await peer.read() == pdu.ReleaseRP()
        await peer.close()
        async with asyncio.timeout(DEADLINE):
            await closing
    assert scp.sockets == []
    assert list(receiver.held) == ["1.2.3"]


async def test_close_aborts_who_does_not_end(receiver: ScriptedReceiver) -> None:
    async with serving(receiver) as scp, connected(scp) as peer:
        await peer.associate()
        peer.send(store_rq(), data(bytes(1000))[:600])
        await until(lambda: receiver.begun)
        async with asyncio.timeout(DEADLINE):
            await scp.close(0.1)  # the peer stays connected even after the abort
        assert await peer.read() == pdu.Abort(0)
    assert receiver.closed[0][1] == "aborted by us: the node is going down"
    assert len(receiver.discarded) == 1


async def test_a_taken_port_is_an_error(receiver: ScriptedReceiver) -> None:
    async with serving(receiver) as scp:
        with pytest.raises(OSError, match="address already in use"):
            await StoreScp(receiver, ae_title="B", host="127.0.0.1", port=scp.sockets[0][1]).start()
        await StoreScp(receiver, ae_title="C", host="127.0.0.1", port=0).close(0)  # never started


async def test_spool_keeps_nothing_of_a_broken_object(tmp_path: Path) -> None:
    spool = Spool(tmp_path, max_bytes=200_000, retention=60)
    receiver = SpoolingReceiver(spool)
    async with serving(receiver) as scp:
        async with connected(scp) as peer:
            await peer.associate()
            peer.send(store_rq("1.1"), data(bytes(300_000), max_length=50_000))
            assert (await peer.read()).status == 0xA700
            peer.send(store_rq("1.2"), data(bytes(1000))[:600])
            await until(lambda: len(receiver.begun) == 2)
        await until(lambda: receiver.closed)
        assert (list(spool.folder.iterdir()), spool.used_bytes) == ([], 0)
    spool.close()


ON_BOTH_LOOPS = (
    test_artim_closes_who_never_asks,
    test_artim_closes_who_stays_after_release,
    test_close_aborts_who_does_not_end,
    test_close_lets_a_running_object_end,
    test_contexts_are_answered_one_by_one,
    test_more_associations_than_allowed_are_a_transient_rejection,
    test_pause_stops_reading_and_the_stall_clock,
    test_peer_that_aborts_or_vanishes_in_mid_object,
    test_peer_that_never_reads_its_answers_is_not_buffered_for,
    test_peer_that_releases_in_mid_object,
    test_pipelined_and_bytewise_requests_are_answered_in_order,
    test_refused_instance_is_drained_and_the_next_one_taken,
    test_short_and_long_pdus_in_one_object,
)


@pytest.mark.parametrize("scenario", ON_BOTH_LOOPS, ids=lambda each: each.__name__.removeprefix("test_"))
def test_the_same_on_uvloop(scenario: Callable[[ScriptedReceiver], Coroutine[Any, Any, None]]) -> None:
    """A node runs on uvloop where there is one, whose transports close, pause and buffer in their own way."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(scenario(ScriptedReceiver()))


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bytes_on_uvloop(name: str) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(test_hostile_bytes_are_answered_with_abort(ScriptedReceiver(), name))
