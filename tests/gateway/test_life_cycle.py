"""Manifests over time: what rejection notes hide, what is withdrawn, and what follows a patient who changes."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from pydicom.dataset import Dataset

from tests.gateway.doubles import PACS, Archive, Clock, Objects, Registry, profile
from tests.imaging import studies
from tests.support import rejection
from xca_imaging import uids
from xca_imaging.errors import RegistryMetadataError, RepositoryError
from xca_imaging.gateway.publications import Publications
from xca_imaging.gateway.publishing import Published, Publisher
from xca_imaging.imaging import manifest
from xca_imaging.imaging.study import InstanceFacts, SeriesContents, SeriesFacts, StudyContents
from xca_imaging.metadata.model import Identifier
from xca_imaging.transactions.registry_response import RegistryResponse

IMAGES = [f"{studies.STUDY}.1.{number}" for number in (1, 2)]


class Desk:
    """One publisher, with everything in memory that it talks to."""

    def __init__(self, folder: Path) -> None:
        self.archive, self.registry, self.objects = Archive(), Registry(), Objects()
        self.memory = Publications(folder)
        self.publisher = Publisher(
            pacs=PACS,
            finder=self.archive,
            repository=self.registry,
            profile=profile(),
            source_id="1.3.6.1.4.1.21367.2017.1",
            objects=self.objects,
            memory=self.memory,
            now=Clock(),
            uid_factory=studies.uid_factory(),
            uuid_factory=studies.uuid_factory(),
        )

    def hold(self, study: StudyContents, *notes: Dataset) -> None:
        """Put a study into the archive, with key objects as a series of their own."""
        series = SeriesContents(
            SeriesFacts(series_instance_uid=f"{studies.STUDY}.900", modality="KO"),
            tuple(InstanceFacts(sop_instance_uid=n.SOPInstanceUID, sop_class_uid=uids.KOS_SOP_CLASS) for n in notes),
        )
        self.archive.studies[studies.STUDY] = replace(study, series=(*study.series, series)) if notes else study
        for note in notes:
            target = io.BytesIO()
            note.save_as(target, enforce_file_format=True)
            self.objects.objects[note.SOPInstanceUID] = target.getvalue()

    async def publish(self) -> Published:
        return await self.publisher.attempt(studies.STUDY)

    def listed(self) -> set[str]:
        """Return the instances of the one manifest that is registered."""
        (entry,) = self.registry.approved
        read = manifest.read(self.registry.documents[entry.unique_id])
        return {instance.sop_instance_uid for _, _, instance in read.instances()}


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path)
    yield desk
    desk.memory.close()


def reject(*instances: str, code: str = "113001") -> Dataset:
    return rejection.note(studies.STUDY, {f"{studies.STUDY}.1": instances}, code=code)


# --- Rejection notes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["113001", "113037", "113038", "113039"])
async def test_rejected_instances_and_the_note_are_left_out(desk: Desk, code: str) -> None:
    desk.hold(studies.study())
    await desk.publish()
    assert desk.listed() == set(IMAGES)
    desk.hold(studies.study(), reject(IMAGES[0], code=code))
    result = await desk.publish()
    assert (result.outcome, result.instances, result.series) == ("replaced", 1, 1)
    assert "2 rejected" in result.reason
    assert desk.listed() == {IMAGES[1]}
    (entry,) = desk.registry.approved
    assert "KO" not in {code.code for code in entry.event_codes}
    assert (await desk.publish()).outcome == "unchanged"


async def test_a_new_study_is_registered_without_what_is_rejected(desk: Desk) -> None:
    desk.hold(studies.study(), reject(IMAGES[1]))
    assert (await desk.publish()).outcome == "registered"
    assert desk.listed() == {IMAGES[0]}


async def test_several_notes_add_up(desk: Desk) -> None:
    desk.hold(studies.study(studies.series(count=3)), reject(IMAGES[0]), reject(IMAGES[1], code="113037"))
    assert (await desk.publish()).outcome == "registered"
    assert desk.listed() == {f"{studies.STUDY}.1.3"}


async def test_other_key_objects_are_instances_like_any_other(desk: Desk) -> None:
    note = reject(IMAGES[0], code="113000")
    desk.hold(studies.study(), note)
    assert (await desk.publish()).outcome == "registered"
    assert desk.listed() == {*IMAGES, note.SOPInstanceUID}


async def test_a_study_that_is_rejected_as_a_whole_is_withdrawn(desk: Desk) -> None:
    desk.hold(studies.study())
    first = await desk.publish()
    desk.hold(studies.study(), reject(*IMAGES))
    result = await desk.publish()
    assert (result.outcome, result.reason) == ("withdrawn", "all its instances are rejected")
    assert result.patient_id == first.patient_id
    assert desk.registry.approved == []
    assert len(desk.registry.updates) == 1
    again = await desk.publish()
    assert (again.outcome, again.reason) == ("unchanged", "all its instances are rejected")
    assert len(desk.registry.updates) == 1
    # the note goes: a new manifest, the old one stays deprecated
    desk.hold(studies.study())
    assert (await desk.publish()).outcome == "registered"


async def test_what_a_note_says_of_other_studies_does_not_matter(desk: Desk) -> None:
    note = rejection.note("1.2.3", {"1.2.3.1": ["1.2.3.1.1"]})
    desk.hold(studies.study(), note)
    result = await desk.publish()
    assert (result.outcome, result.instances) == ("registered", 2)


async def test_a_key_object_that_cannot_be_read_keeps_its_study_back(desk: Desk) -> None:
    desk.hold(studies.study())
    await desk.publish()
    note = reject(IMAGES[0])
    desk.hold(studies.study(), note)
    desk.objects.objects[note.SOPInstanceUID] = b"damaged"
    assert (await desk.publish()).outcome == "refused"
    desk.objects.error = RepositoryError("not to be had", note.SOPInstanceUID)
    result = await desk.publish()
    assert (result.outcome, "not to be had" in result.reason) == ("refused", True)
    assert desk.listed() == set(IMAGES)
    desk.publisher = replace(desk.publisher, objects=None)
    assert "Key Object" in (await desk.publish()).reason


# --- Withdrawal -------------------------------------------------------------------------------------------------------


async def test_a_study_that_is_gone_is_withdrawn(desk: Desk) -> None:
    desk.hold(studies.study())
    first = await desk.publish()
    desk.archive.studies.clear()
    result = await desk.publish()
    assert (result.outcome, result.patient_id) == ("withdrawn", first.patient_id)
    assert "has no such study" in result.reason
    assert desk.registry.approved == []
    (update,) = desk.registry.updates
    assert update.submission_sets[0].patient_id == first.patient_id
    assert desk.memory.study(PACS.name, studies.STUDY).patient_id == ""


async def test_a_study_that_has_lost_all_instances_is_withdrawn(desk: Desk) -> None:
    desk.hold(studies.study())
    await desk.publish()
    desk.hold(studies.study(studies.series(count=0)))
    assert (await desk.publish()).outcome == "withdrawn"


async def test_a_registry_that_does_not_deprecate_is_told(desk: Desk) -> None:
    desk.hold(studies.study())
    await desk.publish()
    desk.archive.studies.clear()
    desk.registry.response = RegistryResponse(uids.STATUS_FAILURE, (RegistryMetadataError("not today"),))
    result = await desk.publish()
    assert (result.outcome, "not today" in result.reason) == ("refused", True)
    desk.registry.response = None
    assert (await desk.publish()).outcome == "withdrawn"


async def test_a_study_of_another_archive_stays(desk: Desk) -> None:
    second = replace(
        desk.publisher,
        pacs=PACS.model_copy(update={"name": "second", "retrieve_location_uid": "1.3.6.1.4.1.21367.13.80.111"}),
    )
    desk.hold(studies.study())
    await desk.publish()
    await second.attempt(studies.STUDY)
    desk.archive.studies.clear()
    assert (await desk.publish()).outcome == "withdrawn"
    assert len(desk.registry.approved) == 1


# --- Another patient --------------------------------------------------------------------------------------------------


async def test_a_study_that_moves_to_another_patient_is_registered_there_and_deprecated_here(desk: Desk) -> None:
    desk.hold(studies.study())
    await desk.publish()
    desk.hold(studies.study(patient=replace(studies.PATIENT, id="DEPT-2")))
    result = await desk.publish()
    assert (result.outcome, result.patient_id) == ("registered", f"DEPT-2^^^&{studies.AUTHORITY}&ISO")
    assert "patient that it had before" in result.reason
    assert [entry.patient_id for entry in desk.registry.approved] == [result.patient_id]
    assert not any(each.type == uids.RPLC for each in desk.registry.submissions[1].associations)
    assert (await desk.publish()).outcome == "unchanged"


async def test_what_could_not_be_deprecated_under_the_old_patient_is_tried_again(desk: Desk) -> None:
    desk.hold(studies.study())
    await desk.publish()
    desk.hold(studies.study(patient=replace(studies.PATIENT, id="DEPT-2")))
    update = desk.registry.update
    desk.registry.update = _refuse  # type: ignore[method-assign,assignment]
    assert (await desk.publish()).outcome == "refused"
    assert len(desk.registry.approved) == 2
    desk.registry.update = update  # type: ignore[method-assign]
    result = await desk.publish()
    assert (result.outcome, "patient that it had before" in result.reason) == ("unchanged", True)
    assert len(desk.registry.approved) == 1


async def _refuse(submission: object) -> RegistryResponse:
    return RegistryResponse(uids.STATUS_FAILURE, (RegistryMetadataError("no"),))


async def test_a_patient_given_by_hand_stays_until_the_department_has_another(desk: Desk) -> None:
    by_hand = replace(desk.publisher, patient_id=Identifier("AD-1", "1.2.3.4.5"))
    desk.hold(studies.study())
    assert (await by_hand.attempt(studies.STUDY)).patient_id == "AD-1^^^&1.2.3.4.5&ISO"
    assert (await desk.publish()).outcome == "unchanged"
    desk.hold(studies.study(studies.series(count=3)))
    result = await desk.publish()
    assert (result.outcome, result.patient_id) == ("replaced", "AD-1^^^&1.2.3.4.5&ISO")
    desk.hold(studies.study(studies.series(count=3), patient=replace(studies.PATIENT, id="DEPT-2")))
    result = await desk.publish()
    assert (result.outcome, result.patient_id) == ("registered", f"DEPT-2^^^&{studies.AUTHORITY}&ISO")
    assert [entry.patient_id for entry in desk.registry.approved] == [result.patient_id]
    # what was not given is not kept: the department's own id follows the department
    desk.hold(studies.study(studies.series(count=3)))
    assert (await desk.publish()).patient_id == f"DEPT-1^^^&{studies.AUTHORITY}&ISO"
