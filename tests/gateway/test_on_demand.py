"""On-demand documents: which PACS is asked, what cannot be made, and what happens in between."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.doubles import PACS, Archive, Clock, Objects, profile
from tests.gateway.doubles import Registry as Elsewhere
from tests.imaging import studies
from tests.registry.samples import HOME, document, study_reference, submission
from tests.support import rejection
from xca_imaging import uids
from xca_imaging.errors import ConnectFailed, PeerBusy, RegistryError
from xca_imaging.gateway.on_demand import OnDemandDocuments, Snapshot
from xca_imaging.gateway.publishing import Publisher, new_uid, new_uuid
from xca_imaging.imaging import manifest
from xca_imaging.imaging.study import InstanceFacts, SeriesContents, SeriesFacts
from xca_imaging.metadata.model import DocumentEntry
from xca_imaging.metadata.stored_query import GetAll, StoredQuery
from xca_imaging.registry import Registry, Repository, events
from xca_imaging.registry.administration import Administration
from xca_imaging.registry.events import Requester
from xca_imaging.transactions.identity_feed import FeedMessage, Merged

REPOSITORY = "1.3.6.1.4.1.21367.2017.1.2"
ASKING = Requester("East HIE", "urn:uuid:3")
IMAGES = {f"{studies.STUDY}.1.1", f"{studies.STUDY}.1.2"}
SURVIVOR = f"survivor^^^&{studies.AUTHORITY}&ISO"


class Desk:
    """A registry with two PACSs; `entry` is registered on demand."""

    def __init__(self, folder: Path, executor: ThreadPoolExecutor) -> None:
        self.registry = Registry.open(f"sqlite:///{folder / 'registry.db'}", home_community_id=HOME)
        self.repository = Repository(self.registry, folder / "documents", repository_unique_id=REPOSITORY)
        self.administration = Administration(self.registry)
        self.archives = [Archive(), Archive()]
        self.objects = Objects()
        self.executor = executor
        self.entry = self.register()

    def register(self, **changes: Any) -> DocumentEntry:
        entry = document(
            **{
                "object_type": uids.ON_DEMAND_DOCUMENT,
                "creation_time": "",
                "hash": "",
                "size": None,
                "repository_unique_id": REPOSITORY,
                "reference_ids": (study_reference(studies.STUDY),),
                **changes,
            }
        )
        self.administration.register_on_demand(submission(entry), ASKING)
        return entry

    async def make(self, entry: DocumentEntry | None = None, *, keep: bool = False) -> Snapshot | None:
        publishers = [
            Publisher(
                pacs=PACS.model_copy(update={"name": f"pacs {number}"}),
                finder=archive,
                repository=Elsewhere(),
                profile=profile(),
                source_id="1.3.6.1.4.1.21367.2017.1",
                objects=self.objects,
                now=Clock(),
                uid_factory=new_uid,
                uuid_factory=new_uuid,
            )
            for number, archive in enumerate(self.archives)
        ]
        made = OnDemandDocuments(self.administration, self.repository, publishers, self.executor, keep=keep)
        return await made.make((entry or self.entry).unique_id, ASKING)

    async def refused(self, entry: DocumentEntry | None = None, *, keep: bool = False) -> str:
        with pytest.raises(RegistryError) as raised:
            await self.make(entry, keep=keep)
        assert raised.value.location == (entry or self.entry).unique_id
        return raised.value.code

    def stored(self, patient_id: str) -> int:
        status = (uids.APPROVED, uids.DEPRECATED)
        query = GetAll(patient_id=patient_id, document_status=status, submission_set_status=(), folder_status=())
        return sum(b"ExtrinsicObject" in each for each in self.registry.query(StoredQuery(query)).fragments)


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    with ThreadPoolExecutor(2) as executor:
        desk = Desk(tmp_path, executor)
        yield desk
        desk.registry.close()


def listed(snapshot: Snapshot | None) -> set[str]:
    assert snapshot is not None
    read = manifest.read(snapshot.content)
    assert read.sop_instance_uid == snapshot.document_unique_id
    return {instance.sop_instance_uid for _, _, instance in read.instances()}


async def test_the_first_pacs_that_has_the_study_is_enough(desk: Desk) -> None:
    desk.archives[1] = Archive(studies.study())
    assert listed(await desk.make()) == IMAGES
    desk.archives[0] = Archive(studies.study(studies.series(count=1)))
    assert listed(await desk.make()) == {f"{studies.STUDY}.1.1"}


async def test_a_pacs_that_is_away_is_passed_over_where_another_has_it(desk: Desk) -> None:
    desk.archives[0].errors[studies.STUDY] = ConnectFailed("pacs 0", "connection refused")
    desk.archives[1] = Archive(studies.study())
    assert listed(await desk.make()) == IMAGES


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConnectFailed("pacs 0", "connection refused"), "XDSRepositoryError"),
        (PeerBusy("pacs 0", "too many associations"), "XDSRepositoryBusy"),
        (None, "XDSDocumentUniqueIdError"),
    ],
)
async def test_nobody_has_it_or_nobody_can_be_asked(desk: Desk, error: Exception | None, code: str) -> None:
    if error is not None:
        desk.archives[0].errors[studies.STUDY] = error
    assert await desk.refused() == code


async def test_what_is_rejected_is_left_out(desk: Desk) -> None:
    note = rejection.note(studies.STUDY, {f"{studies.STUDY}.1": [f"{studies.STUDY}.1.1"]}, code="113001")
    key_objects = SeriesContents(
        SeriesFacts(series_instance_uid=f"{studies.STUDY}.900", modality="KO"),
        (InstanceFacts(sop_instance_uid=note.SOPInstanceUID, sop_class_uid=uids.KOS_SOP_CLASS),),
    )
    target = io.BytesIO()
    note.save_as(target, enforce_file_format=True)
    desk.objects.objects[note.SOPInstanceUID] = target.getvalue()
    desk.archives[0] = Archive(studies.study(studies.series(), key_objects))
    assert listed(await desk.make()) == {f"{studies.STUDY}.1.2"}


@pytest.mark.parametrize(
    "changes",
    [
        {"reference_ids": ()},
        {"reference_ids": (study_reference("1.2.3"), study_reference("1.2.4"))},
        {"mime_type": "application/pdf"},
    ],
    ids=["no study", "two studies", "a report"],
)
async def test_entries_whose_documents_are_not_made_here(desk: Desk, changes: dict[str, Any]) -> None:
    desk.archives[0] = Archive(studies.study())
    assert await desk.refused(desk.register(**changes)) == "XDSRepositoryError"


async def test_what_is_no_on_demand_entry_of_this_repository(desk: Desk) -> None:
    desk.archives[0] = Archive(studies.study())
    assert await desk.make(replace(desk.entry, unique_id="1.2.3")) is None
    assert await desk.make(desk.register(repository_unique_id="1.2.3.4")) is None


async def test_a_snapshot_is_the_patients_of_the_entry(desk: Desk) -> None:
    desk.archives[0] = Archive(studies.study())
    desk.administration.feed(FeedMessage("1", Merged((SURVIVOR,), (desk.entry.patient_id,))), "ITI-8", ASKING)
    snapshot = await desk.make(keep=True)
    assert snapshot is not None
    assert snapshot.repository_unique_id == REPOSITORY
    assert desk.stored(SURVIVOR) == 1  # the stable one; on-demand entries are not asked for
    stored = desk.repository.find(snapshot.document_unique_id)
    assert stored is not None
    assert stored.size == len(snapshot.content)


async def test_an_entry_that_was_withdrawn_meanwhile_leaves_no_snapshot(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.archives[0] = Archive(studies.study())
    read_study = desk.archives[0].read_study

    async def slowly(study_instance_uid: str) -> Any:
        merged = Merged((SURVIVOR,), (desk.entry.patient_id,))
        desk.administration.feed(FeedMessage("1", merged), "ITI-8", ASKING)
        return await read_study(study_instance_uid)

    monkeypatch.setattr(desk.archives[0], "read_study", slowly)
    assert await desk.refused(keep=True) == "XDSUnknownPatientId"
    assert desk.stored(SURVIVOR) == desk.stored(desk.entry.patient_id) == 0


async def test_what_was_handed_out_leaves_an_event(desk: Desk) -> None:
    desk.archives[0] = Archive(studies.study())
    snapshot = await desk.make()
    assert snapshot is not None
    with desk.registry.database.reading() as connection:
        _, event = events.read(connection)[-1]
    assert (event.transaction, event.action, event.caller) == ("ITI-43", "retrieve on demand", "East HIE")
    assert event.objects == (desk.entry.unique_id, snapshot.document_unique_id)
    assert event.patient_id == desk.entry.patient_id
