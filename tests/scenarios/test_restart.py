"""A node that is killed in mid-transfer: what it held serves the next run, nothing half-written does."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import pydicom
import pytest

from tests.scenarios.holding import files_below
from tests.scenarios.scripted import rad69_of
from tests.support import peers, soap_client
from tests.support.node import Node, pacs_section
from tests.support.scripted_pacs import SUCCESS, Archive, ScriptedPacs
from xca_imaging.imaging.ledger import Want

pytestmark = pytest.mark.timeout(300)  # several starts of a node

SIZE = 300_000  # bytes of pixels: an object takes several fragments
COUNT = 10


@contextmanager
def serving(folder: Path, archive: Archive, latency: float) -> Iterator[tuple[Node, ScriptedPacs]]:
    node = Node(folder / "node")
    with ScriptedPacs(archive, (peers.LOOPBACK, node.dicom_port), "good", latency=latency) as pacs:
        node.config["pacs"] = [pacs_section(pacs.settings)]
        with node:
            yield node, pacs


def kill(node: Node) -> None:
    assert node.process is not None
    node.process.send_signal(signal.SIGKILL)
    node.process.wait(10)


def objects(node: Node) -> dict[str, int]:
    return files_below(node.data / "spool" / "objects")


def check(answer: soap_client.Answer, wants: list[Want]) -> None:
    """Everything came, whole."""
    assert answer.registry_status == soap_client.SUCCESS, answer.errors
    assert set(answer.documents) == {want.sop_instance_uid for want in wants}
    for uid, document in answer.documents.items():
        dataset = pydicom.dcmread(BytesIO(document.content))
        assert dataset.SOPInstanceUID == uid
        assert len(dataset.PixelData) == SIZE


@pytest.mark.slow
def test_what_was_held_when_the_node_was_killed_is_not_moved_again(tmp_path: Path) -> None:
    archive = Archive()
    wants = [want for _ in range(4) for want in archive.add_series(COUNT, study="1.2.3.4", size=SIZE)]
    with serving(tmp_path, archive, latency=0.05) as (node, pacs), ThreadPoolExecutor(1) as threads:
        broken = threads.submit(rad69_of, node, wants)
        peers.wait_until(lambda: len(pacs.sent) >= COUNT, 30, "objects on their way")
        kill(node)
        assert broken.exception(30) is not None
        peers.wait_until(lambda: not pacs.active, 30, "the PACS gives up")
        held = {uid for uid, status in pacs.sent if status == SUCCESS}
        assert COUNT - 4 <= len(held) < len(wants)
        pacs.sent.clear()

        node.start()
        # What was answered with Success is there, and perhaps what was whole and could not be answered any more.
        kept = objects(node)
        assert len(held) <= len(kept) <= len(held) + 4
        assert min(kept.values()) > SIZE + 500  # the head of an object; fragments are of 16 KB and more
        check(rad69_of(node, wants), wants)
        moved = [uid for uid, _ in pacs.sent]
        assert not held & set(moved)
        assert len(moved) == len(wants) - len(kept)

        # After an orderly end nothing at all is moved again.
        pacs.sent.clear()
        assert node.terminate() == 0
        node.start()
        check(rad69_of(node, wants), wants)
        assert pacs.sent == []


@pytest.mark.slow
def test_nothing_half_written_is_served_whenever_the_node_is_killed(tmp_path: Path) -> None:
    archive = Archive()
    wants = [want for _ in range(4) for want in archive.add_series(COUNT, study="1.2.3.4", size=SIZE)]
    with serving(tmp_path, archive, latency=0.0) as (node, pacs), ThreadPoolExecutor(1) as threads:
        for number in (1, 6, 15, 31):
            pacs.sent.clear()
            before = len(objects(node))
            broken = threads.submit(rad69_of, node, wants)
            peers.wait_until(lambda n=number, b=broken: len(pacs.sent) >= n or b.done(), 30, "objects")
            kill(node)
            broken.exception(30)
            peers.wait_until(lambda: not pacs.active, 30, "the PACS gives up")
            node.start()
            assert len(objects(node)) >= before
        for file in list(objects(node))[:5]:  # what a power failure may leave
            path = node.data / "spool" / "objects" / file
            content = bytearray(path.read_bytes())
            content[-1000:] = bytes(b ^ 0xFF for b in content[-1000:])
            path.write_bytes(content)
        kill(node)
        node.start()
        check(rad69_of(node, wants), wants)


def test_a_data_dir_has_one_node(tmp_path: Path) -> None:
    with Node(tmp_path / "first") as first:
        second = Node(tmp_path / "second", {"node": {"data_dir": str(first.data)}})
        done = second.run("serve", deadline=30)
        assert done.returncode == 2
        assert "node.data_dir" in done.stderr
        assert "in use by another process" in done.stderr
        assert "data_dir of its own" in done.stderr
        assert "Traceback" not in done.stderr
        assert soap_client.send(first, soap_client.ITI18, soap_client.find_documents("1^^^&1.2&ISO"))
