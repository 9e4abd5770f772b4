"""A node whose instances are received by sibling processes."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.scenarios.scripted import rad69_of
from tests.scenarios.test_restart import check, objects
from tests.support import peers
from tests.support.node import Node, pacs_section
from tests.support.scripted_pacs import Archive, ScriptedPacs

pytestmark = pytest.mark.timeout(120)

SIZE = 300_000
COUNT = 8


@contextmanager
def serving(folder: Path, archive: Archive, latency: float = 0.0) -> Iterator[tuple[Node, ScriptedPacs]]:
    node = Node(folder / "node")
    with ScriptedPacs(archive, (peers.LOOPBACK, node.dicom_port), "good", latency=latency) as pacs:
        node.config["pacs"] = [pacs_section(pacs.settings)]
        node.config.setdefault("dicom", {})["receivers"] = 2
        with node:
            yield node, pacs


def children(node: Node) -> list[psutil.Process]:
    assert node.process is not None
    found = psutil.Process(node.process.pid).children(recursive=True)
    return [each for each in found if any("gateway.receiving" in word for word in each.cmdline())]


def test_every_process_receives_and_none_is_left(tmp_path: Path) -> None:
    archive = Archive()
    wants = [want for _ in range(4) for want in archive.add_series(COUNT, study="1.2.3.4", size=SIZE)]
    with serving(tmp_path, archive) as (node, pacs):
        siblings = children(node)
        assert len(siblings) == 2
        check(rad69_of(node, wants), wants)
        assert len(pacs.sent) == len(wants)
        assert len({name.rsplit("-", 1)[0] for name in objects(node)}) == 2  # names begin with who wrote them
        check(rad69_of(node, wants), wants)
        assert len(pacs.sent) == len(wants)  # they are held
        assert node.terminate() == 0
        gone, alive = psutil.wait_procs(siblings, 10)
        assert (len(gone), alive) == (2, [])
        node.start()
        check(rad69_of(node, wants), wants)
        assert len(pacs.sent) == len(wants)  # also after a restart


@pytest.mark.slow
def test_a_process_that_is_killed_costs_a_second_attempt(tmp_path: Path) -> None:
    archive = Archive()
    wants = [want for _ in range(4) for want in archive.add_series(COUNT, study="1.2.3.4", size=SIZE)]
    with serving(tmp_path, archive, latency=0.1) as (node, pacs), ThreadPoolExecutor(1) as threads:
        running = threads.submit(rad69_of, node, wants)
        peers.wait_until(lambda: len(pacs.sent) >= COUNT, 30, "objects on their way")
        victim = children(node)[0]
        victim.send_signal(signal.SIGKILL)
        check(running.result(60), wants)
        peers.wait_until(lambda: len(children(node)) == 2, 30, "a process in its place")
        assert victim.pid not in [each.pid for each in children(node)]


@pytest.mark.slow
def test_a_node_that_is_killed_leaves_no_process(tmp_path: Path) -> None:
    with serving(tmp_path, Archive()) as (node, _):
        siblings = children(node)
        assert node.process is not None
        node.process.kill()
        node.process.wait(10)
        deadline = time.monotonic() + 10
        while any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in siblings):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        node.start()
