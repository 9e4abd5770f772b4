"""Where publishing registers: in the node without a message, and at a repository elsewhere that says little."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.doubles import PACS, Archive, Clock, Objects, profile
from tests.imaging import studies
from xca_imaging import uids
from xca_imaging.errors import DocumentUniqueIdError, RegistryMetadataError, UnknownRepositoryId
from xca_imaging.gateway.peers import Endpoint
from xca_imaging.gateway.publications import Publications
from xca_imaging.gateway.publishing import Publisher, new_uid, new_uuid
from xca_imaging.gateway.repositories import NodeRepository, RepositoryElsewhere
from xca_imaging.imaging import manifest
from xca_imaging.metadata.model import Submission
from xca_imaging.registry.administration import Administration
from xca_imaging.registry.document_registry import Registry
from xca_imaging.registry.events import Requester
from xca_imaging.registry.inventory import approved_manifests
from xca_imaging.registry.provide import Repository
from xca_imaging.transactions.identity_feed import FeedMessage, Merged
from xca_imaging.transactions.registry_response import RegistryResponse

HOME = "urn:oid:1.3.6.1.4.1.21367.2017.1"
REPOSITORY = "1.3.6.1.4.1.21367.2017.1.2"
ELSEWHERE = Endpoint("elsewhere", "https://elsewhere.example/rad68", 5.0)


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with closing(Registry.open(f"sqlite:///{tmp_path / 'registry.db'}", home_community_id=HOME)) as opened:
        yield opened


@pytest.fixture
def node(tmp_path: Path, registry: Registry) -> Iterator[NodeRepository]:
    repository = Repository(registry, tmp_path / "documents", repository_unique_id=REPOSITORY)
    update = partial(Administration(registry).update, requester=Requester("publishing"))
    with ThreadPoolExecutor(1) as executor:
        yield NodeRepository(registry, repository, update, executor)


@pytest.fixture
async def memory(tmp_path: Path) -> AsyncIterator[Publications]:
    with closing(Publications(tmp_path)) as opened:
        yield opened


def publisher(archive: Archive, repository: Any, memory: Publications) -> Publisher:
    return Publisher(
        pacs=PACS,
        finder=archive,
        repository=repository,
        profile=profile(),
        source_id="1.3.6.1.4.1.21367.2017.1",
        objects=Objects(),
        memory=memory,
        now=Clock(),
        uid_factory=new_uid,
        uuid_factory=new_uuid,
    )


# --- In the node ------------------------------------------------------------------------------------------------------


async def test_a_manifest_through_its_life_in_the_registry(
    node: NodeRepository, registry: Registry, memory: Publications
) -> None:
    archive = Archive(studies.full_study())
    publish = publisher(archive, node, memory)
    first = await publish.attempt(studies.STUDY)
    assert first.outcome == "registered"
    assert (await publish.attempt(studies.STUDY)).outcome == "unchanged"
    archive.studies[studies.STUDY] = studies.study(patient=studies.full_study().facts.patient)
    second = await publish.attempt(studies.STUDY)
    assert second.outcome == "replaced"
    (entry,) = approved_manifests(registry)
    assert (entry.unique_id, entry.availability_status) == (second.document_unique_id, uids.APPROVED)
    moved = studies.study(patient=replace(studies.full_study().facts.patient, id="DEPT-2"))
    archive.studies[studies.STUDY] = moved
    third = await publish.attempt(studies.STUDY)
    assert (third.outcome, third.patient_id) == ("registered", "DEPT-2^^^&1.2.3.1&ISO")
    (entry,) = approved_manifests(registry)
    assert entry.patient_id == third.patient_id
    archive.studies.clear()
    assert (await publish.attempt(studies.STUDY)).outcome == "withdrawn"
    assert list(approved_manifests(registry)) == []


async def test_a_pacs_that_goes_on_with_a_merged_patient(
    node: NodeRepository, registry: Registry, memory: Publications
) -> None:
    archive = Archive(studies.study())
    publish = publisher(archive, node, memory)
    first = await publish.attempt(studies.STUDY)
    survivor = f"SURVIVOR{first.patient_id[first.patient_id.index('^^^') :]}"
    merge = FeedMessage("1", Merged((survivor,), (first.patient_id,)))
    Administration(registry).feed(merge, "ITI-8", Requester("ADT"))
    assert (await publish.attempt(studies.STUDY)).outcome == "unchanged"
    archive.studies[studies.STUDY] = studies.study(studies.series(count=3))
    changed = await publish.attempt(studies.STUDY)
    assert (changed.outcome, changed.patient_id) == ("replaced", survivor)
    (entry,) = approved_manifests(registry)
    assert entry.patient_id == survivor
    archive.studies.clear()
    assert (await publish.attempt(studies.STUDY)).outcome == "withdrawn"
    assert list(approved_manifests(registry)) == []


async def test_what_the_node_refuses_is_said(node: NodeRepository, memory: Publications) -> None:
    archive = Archive(studies.study())
    publish = publisher(archive, node, memory)
    await publish.attempt(studies.STUDY)
    with pytest.raises(UnknownRepositoryId):
        await node.retrieve_document("1.2.3", "1.2.3")
    with pytest.raises(DocumentUniqueIdError):
        await node.retrieve_document(REPOSITORY, "1.2.3")
    response = await node.update(Submission())
    assert not response.succeeded
    assert response.errors


async def test_a_node_without_repository_publishes_nothing(registry: Registry, memory: Publications) -> None:
    with ThreadPoolExecutor(1) as executor:
        node = NodeRepository(registry, None, lambda submission: pytest.fail("no update"), executor)
        result = await publisher(Archive(studies.study()), node, memory).attempt(studies.STUDY)
    assert (result.outcome, "repository.unique_id" in result.reason) == ("refused", True)


async def test_all_manifests_are_listed_by_pages(
    node: NodeRepository, registry: Registry, memory: Publications, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xca_imaging.registry.inventory._PAGE", 3)
    one = studies.study()
    for number in range(7):
        uid = f"1.2.3.{number}"
        archive = Archive(replace(one, facts=replace(one.facts, study_instance_uid=uid)))
        await publisher(archive, node, memory).attempt(uid)
    assert [entry.study_instance_uids for entry in approved_manifests(registry)] == [
        (f"1.2.3.{number}",) for number in range(7)
    ]


# --- Elsewhere --------------------------------------------------------------------------------------------------------


class Client:
    """A repository elsewhere: it takes what it is given, and answers nothing but RAD-68."""

    def __init__(self) -> None:
        self.submissions: list[Submission] = []
        self.response = RegistryResponse(uids.STATUS_SUCCESS)

    async def provide_and_register(
        self, endpoint: Endpoint, submission: Submission, documents: Mapping[str, bytes]
    ) -> RegistryResponse:
        assert endpoint == ELSEWHERE
        self.submissions.append(submission)
        return self.response


async def test_what_went_elsewhere_is_replaced_there(node: NodeRepository, tmp_path: Path) -> None:
    client, archive = Client(), Archive(studies.study())
    for _ in range(2):  # and again after a restart
        with closing(Publications(tmp_path)) as memory:
            elsewhere = RepositoryElsewhere(client, ELSEWHERE, node, memory)  # type: ignore[arg-type]
            await publisher(archive, elsewhere, memory).attempt(studies.STUDY)
    (first,) = client.submissions
    archive.studies[studies.STUDY] = studies.study(studies.series(count=3))
    with closing(Publications(tmp_path)) as memory:
        elsewhere = RepositoryElsewhere(client, ELSEWHERE, node, memory)  # type: ignore[arg-type]
        publish = publisher(archive, elsewhere, memory)
        assert (await publish.attempt(studies.STUDY)).outcome == "replaced"
        assert (await publish.attempt(studies.STUDY)).outcome == "unchanged"
        ((sent, content),) = memory.all_sent(ELSEWHERE.url)
        assert manifest.read(content).number_of_instances == 3
        (association,) = [each for each in client.submissions[1].associations if each.type == uids.RPLC]
        assert association.target == first.documents[0].entry_uuid
        # RAD-68 cannot say that nothing is left
        archive.studies.clear()
        result = await publish.attempt(studies.STUDY)
        assert result.outcome == "refused"
        assert ELSEWHERE.url in result.reason
        assert sent.entry_uuid in result.reason


async def test_what_is_refused_elsewhere_is_not_remembered(node: NodeRepository, memory: Publications) -> None:
    client = Client()
    client.response = RegistryResponse(uids.STATUS_FAILURE, (RegistryMetadataError("no"),))
    elsewhere = RepositoryElsewhere(client, ELSEWHERE, node, memory)  # type: ignore[arg-type]
    publish = publisher(Archive(studies.study()), elsewhere, memory)
    assert (await publish.attempt(studies.STUDY)).outcome == "refused"
    assert list(memory.all_sent(ELSEWHERE.url)) == []
    client.response = RegistryResponse(uids.STATUS_SUCCESS)
    assert (await publish.attempt(studies.STUDY)).outcome == "registered"
