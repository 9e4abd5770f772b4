"""A node that fetches from a real PACS by C-GET and by WADO-RS, and that goes over to another way by itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.scenarios.holding import check_images, rad69
from tests.support import images, peers
from tests.support.node import Node, pacs_section

pytestmark = [pytest.mark.peer, pytest.mark.timeout(120)]

GET, WEB, FALLBACK = "1.2.3.1", "1.2.3.2", "1.2.3.3"


class Case:
    """Orthanc, which does not know the node as a move destination, three times a PACS of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.studies = {
            kind: getattr(images, kind)(folder / kind) for kind in ("ct", "compressed", "structured_report")
        }
        self.node = Node(folder / "node", {"limits": {"stall_timeout": "20s"}})

    def sent(self, study: images.Study) -> dict[str, bytes]:
        """Return what Orthanc sends of a study by C-STORE, by SOP Instance UID."""
        peers.movescu(self.pacs, self.reference.ae_title, study.uid)
        return {uid: file.read_bytes() for uid, file in self.reference.files().items() if uid in study.uids}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    case = Case(tmp_path_factory.mktemp("methods"))
    with (
        peers.StoreScp(case.folder / "reference") as case.reference,
        peers.Orthanc(case.folder / "pacs", [case.reference.entity], dicomweb=True) as case.pacs,
    ):
        for study in case.studies.values():
            case.pacs.upload(study.paths)
        web = f"{case.pacs.url}/dicom-web"
        case.node.config["pacs"] = [
            pacs_section(case.pacs, name="get", location=GET, retrieve="c-get"),
            pacs_section(case.pacs, name="web", location=WEB, retrieve="wado-rs", wado_rs=web),
            pacs_section(case.pacs, name="fallback", location=FALLBACK, retrieve="c-move", fallback=["c-get"]),
        ]
        with case.node:
            yield case


@pytest.mark.parametrize("location", [GET, WEB, FALLBACK])
@pytest.mark.parametrize("kind", ["ct", "compressed", "structured_report"])
def test_every_instance_comes_as_the_pacs_gives_it(case: Case, location: str, kind: str) -> None:
    study = case.studies[kind]
    # By HTTP Orthanc gives its files as they are; what it sends by C-STORE it encodes anew.
    files = {each.uid: each.path.read_bytes() for each in study.instances}
    reference = files if location == WEB else case.sent(study)
    answer = rad69(case.node, study.instances, repository=location)
    check_images(answer, study.instances, reference, home="", repository=location)


@pytest.mark.parametrize("location", [GET, WEB, FALLBACK])
def test_one_instance_comes_alone(case: Case, location: str) -> None:
    wanted = case.studies["ct"].instances[1:2]
    answer = rad69(case.node, wanted, repository=location)
    assert set(answer.documents) == {wanted[0].uid}, answer.errors


@pytest.mark.parametrize("location", [GET, WEB])
def test_an_instance_that_is_not_there_is_named(case: Case, location: str) -> None:
    study = case.studies["ct"]
    gone = replace(study.instances[0], uid=images.new_uid())
    answer = rad69(case.node, [*study.instances, gone], repository=location)
    assert set(answer.documents) == study.uids
    assert [each.location for each in answer.errors] == [gone.uid]


def test_echo_asks_both(case: Case) -> None:
    done = case.node.run("echo")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("C-ECHO answered") == 3
    assert "PACS web: WADO-RS" in done.stdout
