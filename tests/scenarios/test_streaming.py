"""Delivery of a real node before a scripted PACS: streamed, broken off, and given up by those who ask."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Self

import pydicom
import pytest

from tests.scenarios.scripted import rad69_of, rad69_request
from tests.support import peers, soap_client
from tests.support.node import Node, pacs_section
from tests.support.scripted_pacs import Archive, ScriptedPacs
from xca_imaging.imaging.ledger import Want

pytestmark = pytest.mark.timeout(120)

SIZE = 20_000
LAST_CHUNK = b"\r\n0\r\n\r\n"


@contextmanager
def serving(
    folder: Path, archive: Archive, *scripts: str, delivery: str = "streaming", **pacs_options: object
) -> Iterator[tuple[Node, ScriptedPacs]]:
    node = Node(folder / "node", {"http": {"delivery": delivery}})
    destination = (peers.LOOPBACK, node.dicom_port)
    with ScriptedPacs(archive, destination, *scripts, **pacs_options) as pacs:  # type: ignore[arg-type]
        node.config["pacs"] = [pacs_section(pacs.settings)]
        with node:
            yield node, pacs


class Client:
    """A raw HTTP client that keeps what it got."""

    def __init__(self, node: Node, wants: list[Want], version: str = "1.1") -> None:
        self.raw = b""
        self.socket = socket.create_connection((peers.LOOPBACK, node.http_port), timeout=30)
        self.socket.sendall(rad69_request(node, wants, version=version))

    def until(self, needle: bytes) -> None:
        while needle not in self.raw:
            data = self.socket.recv(1 << 20)
            assert data, f"{needle!r} never came"
            self.raw += data

    def rest(self) -> bytes:
        with contextlib.suppress(ConnectionResetError):
            while data := self.socket.recv(1 << 20):
                self.raw += data
        return self.raw

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def test_the_root_is_there_before_the_last_instance_has_arrived(tmp_path: Path) -> None:
    archive = Archive()
    wants = archive.add_series(20, size=SIZE)
    with serving(tmp_path, archive, "good", latency=0.1) as (node, pacs), Client(node, wants) as client:
        client.until(b"RetrieveDocumentSetResponse>")
        assert len(pacs.sent) < len(wants)
        assert soap_client.SUCCESS.encode() in client.raw
        client.until(b"1.image@xca-imaging>")
        client.until(b"DICM")
        assert len(pacs.sent) < len(wants)
        assert client.rest().endswith(LAST_CHUNK)
        # The next one is answered from the spool, and streamed too.
        answer = rad69_of(node, wants)
        assert answer.registry_status == soap_client.SUCCESS
        assert list(answer.documents) == [want.sop_instance_uid for want in wants]  # the root keeps the request's order
        for uid, document in answer.documents.items():
            dataset = pydicom.dcmread(BytesIO(document.content))
            assert (dataset.SOPInstanceUID, len(dataset.PixelData)) == (uid, SIZE)
        assert len(pacs.sent) == len(wants)


@pytest.mark.slow
def test_an_instance_that_fails_breaks_the_stream(tmp_path: Path) -> None:
    archive = Archive()
    wants = archive.add_series(5, size=SIZE)
    with (
        serving(tmp_path, archive, "success_with_missing", "nothing_found") as (node, _),
        Client(node, wants) as client,
    ):
        raw = client.rest()
        assert soap_client.SUCCESS.encode() in raw
        assert b"DICM" in raw
        assert not raw.endswith(LAST_CHUNK)
        assert raw.count(b"HTTP/1.1") == 1
        assert node.process is not None
        assert node.process.poll() is None


@pytest.mark.slow
def test_what_is_known_to_fail_stands_in_the_root(tmp_path: Path) -> None:
    archive = Archive()
    wants = archive.add_series(3, size=SIZE)
    absent = Want(wants[0].study_instance_uid, wants[0].series_instance_uid, "1.2.3.4", wants[0].repository_unique_id)
    with serving(tmp_path, archive, "good") as (node, _):
        answer = rad69_of(node, [*wants, absent])
        assert answer.registry_status.endswith("PartialSuccess")
        assert set(answer.documents) == {want.sop_instance_uid for want in wants}
        (error,) = answer.errors
        assert (error.code, error.location) == ("XDSDocumentUniqueIdError", "1.2.3.4")


@pytest.mark.slow
def test_what_nothing_proves_is_not_streamed(tmp_path: Path) -> None:
    """Without C-FIND nobody knows what exists: the answer waits and says what did not come."""
    archive = Archive()
    wants = archive.add_series(3, size=SIZE)
    with serving(tmp_path, archive, "success_with_missing", "nothing_found", finds=False) as (node, _):
        answer = rad69_of(node, wants)
        assert answer.registry_status.endswith("PartialSuccess")
        assert len(answer.documents) == 2


@pytest.mark.slow
def test_http_1_0_is_not_streamed_to(tmp_path: Path) -> None:
    archive = Archive()
    wants = archive.add_series(5, size=SIZE)
    with (
        serving(tmp_path, archive, "good", latency=0.02) as (node, _),
        Client(node, wants, version="1.0") as client,
    ):
        client.until(b"\r\n\r\n")
        head, _, content = client.rest().partition(b"\r\n\r\n")
        assert b"chunked" not in head
        (length,) = [line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
        assert int(length.split(b":")[1]) == len(content)


@pytest.mark.slow
@pytest.mark.parametrize("delivery", ["spooled", "streaming"])
def test_who_goes_away_stops_the_moves_within_a_second(tmp_path: Path, delivery: str) -> None:
    archive = Archive()
    wants = archive.add_series(100, size=SIZE)
    with (
        serving(tmp_path, archive, "good", delivery=delivery, latency=0.1) as (node, pacs),
        Client(node, wants) as client,
    ):
        peers.wait_until(lambda: len(pacs.sent) >= 3, 20, "objects on their way")
        client.close()
        time.sleep(1.0)
        sent = len(pacs.sent)
        time.sleep(1.0)
        # C-CANCEL is heard by the PACS between two objects; then nothing more comes.
        assert len(pacs.sent) <= sent + 1
        assert sent < 40


@pytest.mark.slow
def test_who_goes_away_leaves_the_moves_to_those_who_wait_too(tmp_path: Path) -> None:
    archive = Archive()
    wants = archive.add_series(20, size=SIZE)
    with (
        serving(tmp_path, archive, "good", latency=0.1) as (node, pacs),
        ThreadPoolExecutor(1) as threads,
        Client(node, wants) as client,
    ):
        peers.wait_until(lambda: len(pacs.sent) >= 2, 20, "objects on their way")
        other = threads.submit(rad69_of, node, wants)
        peers.wait_until(lambda: len(pacs.sent) >= 6, 20, "more objects")
        client.close()
        answer = other.result(60)
        assert answer.registry_status == soap_client.SUCCESS
        assert set(answer.documents) == {want.sop_instance_uid for want in wants}
        uids = [uid for uid, _ in pacs.sent]
        assert sorted(uids) == sorted(set(uids))  # each was moved once
