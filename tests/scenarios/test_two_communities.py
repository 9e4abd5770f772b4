"""Community West asks community East, which has the images: ITI-38, ITI-39 and RAD-75 over real sockets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.scenarios.holding import check_same_dataset
from tests.support import images, peers, soap_client
from tests.support.node import Node, pacs_section

pytestmark = [pytest.mark.peer, pytest.mark.timeout(180)]

EAST, WEST = "urn:oid:1.3.6.1.4.1.21367.2017.2", "urn:oid:1.3.6.1.4.1.21367.2017.1"
EAST_REPOSITORY, EAST_SOURCE = "1.3.6.1.4.1.21367.2017.2.2", "1.3.6.1.4.1.21367.2017.2.3"
AWAY = "urn:oid:1.3.6.1.4.1.21367.2017.3"


@dataclass
class Communities:
    east: Node
    west: Node
    pacs: peers.Qrscp
    studies: list[images.Study]


def _community(node: Node) -> dict[str, object]:
    return {
        "home_community_id": node.home,
        "name": node.name,
        "query": node.url("/services/responding-gateway"),
        "retrieve": node.url("/services/responding-gateway"),
        "imaging": node.url("/services/responding-imaging-gateway"),
        "timeout": "15s",
    }


@pytest.fixture(scope="module")
def communities(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Communities]:
    folder = tmp_path_factory.mktemp("communities")
    patient = images.new_patient()
    studies = [images.ct(folder / "ct", patient_id=patient), images.compressed(folder / "jpeg", patient_id=patient)]
    east = Node(
        folder / "east",
        {"node": {"home_community_id": EAST}, "repository": {"unique_id": EAST_REPOSITORY}},
        name="east",
    )
    west = Node(folder / "west", {"node": {"home_community_id": WEST}}, name="west")
    nobody = f"http://127.0.0.1:{peers.free_port()}/services"
    west.config["community"] = [
        _community(east),
        {
            "home_community_id": AWAY,
            "name": "away",
            "query": f"{nobody}/responding-gateway",
            "retrieve": f"{nobody}/responding-gateway",
            "imaging": f"{nobody}/responding-imaging-gateway",
            "timeout": "5s",
        },
    ]
    east.config["community"] = [_community(west)]
    with peers.Qrscp(folder / "pacs", [east.entity]) as pacs:
        for study in studies:
            pacs.upload(study.paths)
        east.config["pacs"] = [pacs_section(pacs, location=EAST_SOURCE, assigning_authority=images.AUTHORITY)]
        with east, west:
            for study in studies:
                east.publish(study)
            yield Communities(east, west, pacs, studies)


def _found(communities: Communities, study: images.Study) -> dict[str, str]:
    listed = communities.west.query(study.cx, "--community", EAST)
    (found,) = [each for each in listed if each["study_instance_uid"] == study.uid]
    return found


def test_west_finds_in_east_by_iti38(communities: Communities) -> None:
    listed = communities.west.query(communities.studies[0].cx, "--community", EAST)
    assert {each["study_instance_uid"] for each in listed} == {study.uid for study in communities.studies}
    assert {each["home_community_id"] for each in listed} == {EAST}
    assert {each["repository_unique_id"] for each in listed} == {EAST_REPOSITORY}


def test_west_itself_has_nothing(communities: Communities) -> None:
    assert communities.west.query(communities.studies[0].cx) == []


@pytest.mark.parametrize("number", [0, 1])
def test_west_retrieves_from_east_by_iti39_and_rad75(communities: Communities, tmp_path: Path, number: int) -> None:
    study = communities.studies[number]
    found = _found(communities, study)
    receipt = communities.west.retrieve(
        tmp_path / "out",
        *("--document", found["unique_id"], "--repository", found["repository_unique_id"], "--home", EAST),
    )
    receipt.check(study.instances)
    assert receipt.content["manifest"]["home_community_id"] == EAST
    assert receipt.content["manifest"]["repository_unique_id"] == EAST_REPOSITORY
    originals = {each.uid: each.path.read_bytes() for each in study.instances}
    for each in receipt.content["instances"]:
        source = each["source"]
        text = source if isinstance(source, str) else " ".join(map(str, source.values()))
        assert EAST in text
        assert EAST_SOURCE in text
        check_same_dataset(receipt.path(each).read_bytes(), originals[each["sop_instance_uid"]])


def test_the_responding_gateway_answers_another_client(communities: Communities) -> None:
    """ITI-38 then ITI-39 with the identifiers of the answer; home on every object, echoed in every document."""
    study = communities.studies[0]
    query = soap_client.find_documents(study.cx, home=EAST)
    answer = soap_client.send(communities.east, soap_client.ITI38, query)
    assert answer.registry_status == soap_client.SUCCESS
    assert len(answer.entries) == len(communities.studies)
    assert {each.get("home") for each in answer.entries} == {EAST}
    unique_id = _found(communities, study)["unique_id"]
    body = soap_client.retrieve_documents([(EAST_REPOSITORY, unique_id)], home=EAST)
    retrieved = soap_client.send(communities.east, soap_client.ITI39, body)
    assert retrieved.registry_status == soap_client.SUCCESS
    (document,) = retrieved.documents.values()
    assert (document.home, document.repository, document.unique_id) == (EAST, EAST_REPOSITORY, unique_id)
    assert document.mime_type == "application/dicom"


def test_references_only_carry_the_home_too(communities: Communities) -> None:
    query = soap_client.find_documents(communities.studies[0].cx, return_type="ObjectRef")
    answer = soap_client.send(communities.east, soap_client.ITI38, query)
    references = answer.body.findall("rim:RegistryObjectList/rim:ObjectRef", soap_client.NS)
    assert len(references) == len(communities.studies)
    assert {each.get("home") for each in references} == {EAST}


def test_iti38_by_id_needs_the_home_community(communities: Communities) -> None:
    """ITI TF-2 3.38: by entryUUID or uniqueId the home community id is required; another one is unknown."""
    slots = {"$XDSDocumentEntryUniqueId": "('1.2.3.4')"}
    for home, code in (("", "XDSMissingHomeCommunityId"), ("urn:oid:1.2.3.999", "XDSUnknownCommunity")):
        body = soap_client.stored_query(soap_client.GET_DOCUMENTS, slots, home=home)
        answer = soap_client.send(communities.east, soap_client.ITI38, body)
        assert answer.registry_status == soap_client.FAILURE
        assert {error.code for error in answer.errors} == {code}
        assert {error.location for error in answer.errors} == {EAST}
        assert answer.body.find("rim:RegistryObjectList", soap_client.NS) is not None  # the schema wants it


def test_iti39_of_an_unknown_document_fails_with_both_locations(communities: Communities) -> None:
    body = soap_client.retrieve_documents([(EAST_REPOSITORY, "1.2.3.4.5")], home=EAST)
    answer = soap_client.send(communities.east, soap_client.ITI39, body)
    assert answer.registry_status == soap_client.FAILURE
    (error,) = answer.errors
    assert error.code == "XDSDocumentUniqueIdError"
    assert "1.2.3.4.5" in error.context + error.location
    assert EAST in error.context + error.location


def test_an_unknown_community_is_said_so(communities: Communities) -> None:
    done = communities.west.run(
        "query", "--patient", communities.studies[0].cx, "--community", "urn:oid:1.2.3.999", "--json"
    )
    assert done.returncode != 0
    assert "1.2.3.999" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


def test_a_community_that_is_away_is_said_so(communities: Communities) -> None:
    done = communities.west.run("query", "--patient", communities.studies[0].cx, "--community", AWAY, "--json")
    assert done.returncode != 0
    assert "away" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


def test_retrieve_from_a_community_that_is_away_is_incomplete(communities: Communities, tmp_path: Path) -> None:
    done = communities.west.run(
        "retrieve",
        *("--document", "1.2.3.4", "--repository", "1.2.3.5", "--home", AWAY, "--out", str(tmp_path / "out")),
    )
    assert done.returncode != 0
    assert "Traceback" not in done.stderr


def test_the_url_options_ask_another_system(communities: Communities, tmp_path: Path) -> None:
    """West's commands with East's own registry, repository and imaging source, as with those of any other system."""
    east, study = communities.east, communities.studies[0]
    registry = ("--registry-url", east.url("/services/registry"))
    listed = communities.west.query(study.cx, *registry)
    assert study.uid in {each["study_instance_uid"] for each in listed}
    receipt = communities.west.retrieve(
        tmp_path / "out",
        *("--patient", study.cx, *registry),
        *("--repository-url", east.url("/services/repository")),
        *("--imaging-url", east.url("/services/imaging-source")),
    )
    receipt.check([each for every in communities.studies for each in every.instances])
