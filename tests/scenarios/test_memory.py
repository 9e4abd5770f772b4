"""Memory does not grow with the study: the node answers from files, not from memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.scenarios.holding import check_same_dataset, rad69
from tests.support import images, peers, soap_client
from tests.support.node import Node, Peak, pacs_section

pytestmark = [pytest.mark.peer, pytest.mark.slow, pytest.mark.timeout(300)]

CEILING = 100 * 2**20  # issue: peak RSS at most 100 MB above idle


@pytest.mark.parametrize("count", [600])
def test_rad69_of_a_large_study(tmp_path: Path, count: int) -> None:
    """600 slices of 512 KiB: 300 MB through the spool; `make bench` has the 2 GB of the issue."""
    study = images.big_ct(tmp_path / "study", count, series_count=4)
    node = Node(tmp_path / "node")
    with peers.Dcmqrscp(tmp_path / "pacs", [node.entity]) as pacs:
        pacs.upload(study.paths)
        node.config["pacs"] = [pacs_section(pacs, assigning_authority=images.AUTHORITY)]
        with node:
            small = rad69(node, study.instances[:1])
            assert small.registry_status == soap_client.SUCCESS
            idle = node.rss()
            with Peak(node) as peak:
                answer = rad69(node, study.instances, deadline=200)
            assert answer.registry_status == soap_client.SUCCESS, answer.errors[:3]
            documents = answer.documents
            assert set(documents) == study.uids
            check_same_dataset(documents[study.instances[-1].uid].content, study.instances[-1].path.read_bytes())
            growth = (peak.value - idle) / 2**20
            print(f"idle {idle / 2**20:.0f} MiB, peak {peak.value / 2**20:.0f} MiB, growth {growth:.0f} MiB")
            assert peak.value - idle <= CEILING, f"{growth:.0f} MiB above idle"
