"""DCMTK's dcmqrscp as the PACS.

It keeps and sends uncompressed objects of standard classes only, and does not set TCP_NODELAY by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.scenarios.holding import (
    Holding,
    check_images,
    check_same_dataset,
    manifest,
    manifest_instances,
    rad69,
    triples,
)
from tests.support import images, peers, soap_client
from tests.support.node import Node, pacs_section

pytestmark = [pytest.mark.peer, pytest.mark.slow, pytest.mark.timeout(180)]

KINDS = ["ct", "mr", "structured_report", "several_series"]


@pytest.fixture(scope="module")
def holding(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Holding]:
    folder = tmp_path_factory.mktemp("dcmtk")
    patient = images.new_patient()
    studies = {kind: getattr(images, kind)(folder / kind, patient_id=patient) for kind in KINDS[:-1]}
    studies["several_series"] = images.dicomdir_series(folder / "several_series", patient_id=patient)
    studies["large"] = images.big_ct(folder / "large", 24, series_count=3, patient_id=patient)
    node = Node(folder / "node")
    with (
        peers.StoreScp(folder / "reference") as reference,
        peers.Dcmqrscp(folder / "pacs", [node.entity, reference.entity]) as pacs,
    ):
        for study in studies.values():
            pacs.upload(study.paths)
        # its objects carry no issuer that C-FIND would tell: the PACS's own authority counts
        node.config["pacs"] = [pacs_section(pacs, assigning_authority=images.AUTHORITY)]
        with node:
            yield Holding(pacs, node, reference, studies)


@pytest.mark.parametrize("kind", [*KINDS, "large"])
def test_rad69_gives_the_bytes_that_the_pacs_sends(holding: Holding, kind: str) -> None:
    study = holding.studies[kind]
    check_images(rad69(holding.node, study.instances), study.instances, holding.as_sent(study), home="")


@pytest.mark.parametrize("kind", [*KINDS, "large"])
def test_published_found_and_retrieved(holding: Holding, tmp_path: Path, kind: str) -> None:
    study = holding.publish(kind)
    (found,) = [each for each in holding.node.query(study.cx) if each["study_instance_uid"] == study.uid]
    assert manifest_instances(manifest(holding.node, found["unique_id"])[1]) == triples(study)
    receipt = holding.node.retrieve(tmp_path / "out", "--study", study.uid)
    receipt.check(study.instances)
    reference = holding.as_sent(study)
    for each in receipt.content["instances"]:
        check_same_dataset(receipt.path(each).read_bytes(), reference[each["sop_instance_uid"]])


def test_an_unknown_instance_is_named_and_the_rest_comes(holding: Holding) -> None:
    study = holding.studies["ct"]
    unknown = replace(study.instances[0], uid=images.new_uid())
    answer = rad69(holding.node, [*study.instances, unknown])
    assert answer.registry_status == soap_client.PARTIAL
    assert set(answer.documents) == study.uids
    assert [(e.code, e.location) for e in answer.errors] == [("XDSDocumentUniqueIdError", unknown.uid)]


def test_our_store_scp_answers_echoscu(holding: Holding) -> None:
    assert peers.echoscu(holding.node.entity).returncode == 0


def test_an_object_that_nobody_asked_for_is_refused(holding: Holding, tmp_path: Path) -> None:
    """What nobody asked for is refused, never silently kept."""
    stray = images.ct(tmp_path, 1)
    done = peers.storescu(holding.node.entity, stray.paths, check=False)
    assert done.returncode != 0, done.stdout + done.stderr
    kept = [file for file in holding.node.data.rglob("*") if stray.instances[0].uid in file.name]
    assert kept == []
    receipt_of_good_health = rad69(holding.node, holding.studies["ct"].instances)
    assert receipt_of_good_health.registry_status == soap_client.SUCCESS
