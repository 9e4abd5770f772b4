"""pynetdicom's qrscp as the PACS: keeps every transfer syntax, sends what it has."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.scenarios.holding import Holding, check_images, check_same_dataset, rad69
from tests.support import images, peers, soap_client
from tests.support.node import Node, pacs_section

pytestmark = [pytest.mark.peer, pytest.mark.slow, pytest.mark.timeout(180)]

KINDS = ["ct", "mr", "compressed", "multi_frame", "structured_report"]


@pytest.fixture(scope="module")
def holding(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Holding]:
    folder = tmp_path_factory.mktemp("qrscp")
    patient = images.new_patient()
    studies = {kind: getattr(images, kind)(folder / kind, patient_id=patient) for kind in KINDS}
    node = Node(folder / "node")
    with (
        peers.StoreScp(folder / "reference") as reference,
        peers.Qrscp(folder / "pacs", [node.entity, reference.entity]) as pacs,
    ):
        for study in studies.values():
            pacs.upload(study.paths)
        node.config["pacs"] = [pacs_section(pacs, assigning_authority=images.AUTHORITY)]
        with node:
            yield Holding(pacs, node, reference, studies)


@pytest.mark.parametrize("kind", KINDS)
def test_rad69_gives_the_bytes_that_the_pacs_sends(holding: Holding, kind: str) -> None:
    study = holding.studies[kind]
    check_images(rad69(holding.node, study.instances), study.instances, holding.as_sent(study), home="")


@pytest.mark.parametrize("kind", KINDS)
def test_published_found_and_retrieved(holding: Holding, tmp_path: Path, kind: str) -> None:
    study = holding.publish(kind)
    assert study.uid in {each["study_instance_uid"] for each in holding.node.query(study.cx)}
    receipt = holding.node.retrieve(tmp_path / "out", "--study", study.uid)
    receipt.check(study.instances)
    reference = holding.as_sent(study)
    for each in receipt.content["instances"]:
        check_same_dataset(receipt.path(each).read_bytes(), reference[each["sop_instance_uid"]])


def test_a_pacs_that_transcodes_nothing_leaves_errors(holding: Holding) -> None:
    study = holding.studies["compressed"]
    answer = rad69(holding.node, study.instances, transfer_syntaxes=[soap_client.EXPLICIT_LE])
    assert answer.registry_status == soap_client.FAILURE
    assert {(e.code, e.location) for e in answer.errors} == {("XDSRepositoryError", uid) for uid in study.uids}


def test_many_ask_for_the_same_at_once(holding: Holding) -> None:
    """Each of them gets everything, whether it was fetched once or often."""
    study = holding.studies["mr"]
    reference = holding.as_sent(study)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: rad69(holding.node, study.instances), range(8)))
    for answer in answers:
        check_images(answer, study.instances, reference, home="")


def test_different_syntaxes_are_asked_for_at_once(holding: Holding) -> None:
    """Two requests for the same instances with lists that exclude each other: each keeps to its own."""
    study = holding.studies["ct"]
    listed = [[soap_client.EXPLICIT_LE], [soap_client.IMPLICIT_LE]] * 3
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda ts: rad69(holding.node, study.instances, transfer_syntaxes=ts), listed))
    for wanted, answer in zip(listed, answers, strict=True):
        syntaxes = {images.transfer_syntax(each.content) for each in answer.documents.values()}
        assert syntaxes <= set(wanted)
        assert len(answer.documents) + len(answer.errors) == len(study.uids)
