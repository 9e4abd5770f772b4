"""Following a PACS: what a sweep publishes and what it costs, restarts, dead PACSs, notifications."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian

from tests.gateway.doubles import PACS, Archive, Clock, Objects, Registry, profile
from tests.imaging import studies, test_cfind
from tests.imaging.test_availability import notification, written
from tests.support import rejection, reports
from xca_imaging.errors import ConnectFailed, ManifestError, PeerRefused, PeerTimeout
from xca_imaging.gateway import watching
from xca_imaging.gateway.publications import Publications
from xca_imaging.gateway.publishing import Published, Publisher, new_uid, new_uuid
from xca_imaging.gateway.watching import Follower, Watch, windows
from xca_imaging.imaging.backends.cfind import Queries
from xca_imaging.imaging.backends.pool import Associations
from xca_imaging.imaging.study import InstanceFacts, SeriesFacts, StudyContents, StudyFacts
from xca_imaging.operations.metrics import Metrics

TODAY = date(2026, 1, 5)  # the made-up studies are of 2026-01-02
STUDY = studies.STUDY


def numbered(contents: StudyContents) -> StudyContents:
    """Return a study with the numbers that a PACS tells of it."""
    series = tuple(
        replace(each, facts=replace(each.facts, number_of_instances=len(each.instances))) for each in contents.series
    )
    facts = replace(contents.facts, number_of_series=len(series), number_of_instances=contents.number_of_instances)
    return StudyContents(facts, series)


class Desk:
    """A follower of one archive, at a clock that a test moves."""

    def __init__(self, folder: Path, archive: Archive | None = None, registry: Registry | None = None) -> None:
        self.archive, self.registry = archive or Archive(), registry or Registry()
        self.memory = Publications(folder)
        self.metrics = Metrics()
        self.now = 1000.0
        self.published: list[Published] = []
        publisher = Publisher(
            pacs=PACS,
            finder=self.archive,
            repository=self.registry,
            profile=profile(),
            source_id="1.3.6.1.4.1.21367.2017.1",
            objects=Objects(),
            memory=self.memory,
            now=Clock(),
            uid_factory=new_uid,
            uuid_factory=new_uuid,
        )
        self.follower = Follower(
            publisher,
            self.memory,
            self.metrics,
            days=7,
            interval=60.0,
            on_published=self.published.append,
            clock=lambda: self.now,
            wall_clock=lambda: self.now,
            today=lambda: TODAY,
        )

    def hold(self, contents: StudyContents) -> None:
        self.archive.studies[contents.facts.study_instance_uid] = contents

    async def sweep(self, times: int = 1) -> list[str]:
        """Sweep, a minute apart, and return the queries below study level."""
        self.archive.queries.clear()
        for _ in range(times):
            self.now += 60.0
            await self.follower.sweep()
        return [query for query in self.archive.queries if query != "STUDY"]

    @property
    def outcomes(self) -> list[str]:
        return [each.outcome for each in self.published]


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path)
    yield desk
    desk.memory.close()


# --- Sweeps -----------------------------------------------------------------------------------------------------------


async def test_a_new_study_is_published_when_it_was_quiet_for_a_sweep(desk: Desk) -> None:
    desk.hold(numbered(studies.study()))
    assert await desk.sweep() == []
    assert desk.registry.approved == []
    assert await desk.sweep() == [f"IMAGE {STUDY}"]
    assert desk.outcomes == ["registered"]
    assert len(desk.registry.approved) == 1


async def test_a_study_that_grows_waits_until_it_is_quiet(desk: Desk) -> None:
    for count in (1, 2, 3, 4):
        desk.hold(numbered(studies.study(studies.series(count=count))))
        assert await desk.sweep() == []
    assert await desk.sweep() == [f"IMAGE {STUDY}"]
    assert [each.instances for each in desk.published] == [4]


async def test_an_unchanged_study_costs_no_image_level_query_and_no_registration(desk: Desk) -> None:
    desk.hold(numbered(studies.study()))
    await desk.sweep(2)
    queries, submissions = len(desk.registry.queries), len(desk.registry.submissions)
    assert set(await desk.sweep(5)) == {f"SERIES {STUDY}"}
    assert len(desk.archive.queries) == 5 * (9 + 1)
    assert (len(desk.registry.queries), len(desk.registry.submissions)) == (queries, submissions)


async def test_few_of_many_unchanged_studies_are_compared_by_series_in_a_sweep(desk: Desk) -> None:
    for number in range(100):
        contents = numbered(studies.study())
        desk.hold(replace(contents, facts=replace(contents.facts, study_instance_uid=f"1.2.3.{number}")))
    await desk.sweep(2)
    assert len(desk.registry.approved) == 100
    compared = [await desk.sweep() for _ in range(5)]
    assert [len(each) for each in compared] == [20] * 5
    assert len({query for each in compared for query in each}) == 100


async def test_a_late_series_replaces_the_manifest(desk: Desk) -> None:
    desk.hold(numbered(studies.study()))
    await desk.sweep(3)
    desk.hold(numbered(studies.study(studies.series(), studies.series(2))))
    assert await desk.sweep() == []
    assert await desk.sweep() == [f"IMAGE {STUDY}"]
    assert desk.outcomes == ["registered", "replaced"]
    assert len(desk.registry.approved) == 1


async def test_a_series_in_the_place_of_another_is_noticed(desk: Desk) -> None:
    desk.hold(numbered(studies.study()))
    await desk.sweep(3)
    desk.hold(numbered(studies.study(studies.series(2))))
    assert f"IMAGE {STUDY}" in await desk.sweep(2)
    assert desk.outcomes == ["registered", "replaced"]


async def test_another_description_or_patient_is_a_change(desk: Desk) -> None:
    desk.hold(numbered(studies.study()))
    await desk.sweep(2)
    desk.hold(numbered(studies.study(description="CT Abdomen")))
    await desk.sweep(2)
    desk.hold(numbered(studies.study(description="CT Abdomen", patient=replace(studies.PATIENT, id="DEPT-2"))))
    await desk.sweep(2)
    assert desk.outcomes == ["registered", "replaced", "registered"]
    assert [entry.patient_id for entry in desk.registry.approved] == [f"DEPT-2^^^&{studies.AUTHORITY}&ISO"]


async def test_a_study_that_vanishes_is_withdrawn_by_the_second_sweep(desk: Desk) -> None:
    desk.hold(numbered(studies.study()))
    await desk.sweep(2)
    desk.archive.studies.clear()
    assert await desk.sweep() == []
    assert len(desk.registry.approved) == 1
    assert await desk.sweep() == [f"IMAGE {STUDY}"]
    assert desk.outcomes == ["registered", "withdrawn"]
    assert desk.registry.approved == []
    assert await desk.sweep(3) == []
    desk.hold(numbered(studies.study()))
    await desk.sweep(2)
    assert desk.outcomes == ["registered", "withdrawn", "registered"]


async def test_a_study_that_one_sweep_misses_is_not_withdrawn(desk: Desk) -> None:
    desk.hold(numbered(studies.study()))
    await desk.sweep(2)
    held = dict(desk.archive.studies)
    desk.archive.studies.clear()
    await desk.sweep()
    desk.archive.studies.update(held)
    await desk.sweep(3)
    assert desk.outcomes == ["registered"]
    assert len(desk.registry.approved) == 1


async def test_a_list_that_is_cut_off_withdraws_nothing(desk: Desk) -> None:
    """The PACS leaves a study out of its answers for a day, and has it when asked for it."""
    desk.hold(numbered(studies.study()))
    await desk.sweep(2)
    listed = desk.archive.find_studies

    async def find_studies(**asked: Any) -> list[StudyFacts]:
        return await listed(**asked) if asked["study_instance_uid"] else []

    desk.archive.find_studies = find_studies  # type: ignore[method-assign]
    await desk.sweep(4)
    assert desk.outcomes == ["registered"]
    assert len(desk.registry.approved) == 1


async def test_a_study_that_leaves_the_window_stays_registered(desk: Desk) -> None:
    desk.hold(numbered(studies.study()))
    await desk.sweep(2)
    desk.follower._today = lambda: TODAY + timedelta(days=10)
    desk.archive.studies.clear()
    assert await desk.sweep(3) == []
    assert len(desk.registry.approved) == 1


async def test_a_pacs_that_tells_no_numbers_is_asked_by_series_and_read_again_after_an_hour(desk: Desk) -> None:
    desk.hold(studies.study())
    await desk.sweep(2)
    assert await desk.sweep(3) == [f"SERIES {STUDY}"] * 3
    desk.hold(studies.study(studies.series(count=3)))  # nothing but the list of instances shows it
    assert set(await desk.sweep(3)) == {f"SERIES {STUDY}"}
    desk.now += watching._READ_AGAIN
    assert f"IMAGE {STUDY}" in await desk.sweep()
    assert desk.outcomes == ["registered", "replaced"]


async def test_a_refused_study_is_tried_again_ever_less_often(desk: Desk) -> None:
    desk.hold(numbered(studies.study()))
    desk.archive.errors[STUDY] = ManifestError("numbers do not agree")
    read = [await desk.sweep() for _ in range(40)]
    tried = [number for number, queries in enumerate(read) if queries]
    assert tried[0] == 1
    gaps = [later - earlier for earlier, later in itertools.pairwise(tried)]
    assert gaps == sorted(gaps)
    assert gaps[0] == 2
    assert gaps[-1] == 15
    # a change is tried at once
    del desk.archive.errors[STUDY]
    desk.hold(numbered(studies.study(studies.series(count=3))))
    await desk.sweep(2)
    assert desk.outcomes[-1] == "registered"


async def test_one_refused_study_does_not_keep_the_others_back(desk: Desk) -> None:
    desk.hold(numbered(studies.study()))
    other = numbered(studies.study())
    desk.hold(replace(other, facts=replace(other.facts, study_instance_uid="1.2.3")))
    desk.archive.errors[STUDY] = ManifestError("numbers do not agree")
    await desk.sweep(2)
    assert sorted(desk.outcomes) == ["refused", "registered"]


async def test_a_defect_in_one_study_does_not_keep_the_others_back(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    desk.hold(numbered(studies.study()))
    other = numbered(studies.study())
    desk.hold(replace(other, facts=replace(other.facts, study_instance_uid="1.2.3")))
    desk.archive.errors[STUDY] = ZeroDivisionError()
    await desk.sweep(2)
    assert "a defect" in caplog.text
    assert desk.outcomes == ["registered"]
    assert f"IMAGE {STUDY}" not in await desk.sweep()  # it is tried again, later


async def test_series_that_cannot_be_listed_do_not_end_a_sweep(desk: Desk) -> None:
    desk.hold(numbered(studies.study()))
    await desk.sweep(2)

    async def refuse(study_instance_uid: str, *, patient_id: str = "") -> list[SeriesFacts]:
        raise PeerRefused("main", "C-FIND SERIES ended with status 0xC000")

    desk.archive.find_series = refuse  # type: ignore[method-assign]
    assert await desk.follower._try_sweep()


async def test_a_study_that_is_rejected_as_a_whole_is_read_once(desk: Desk) -> None:
    note = rejection.note(STUDY, {f"{STUDY}.1": [f"{STUDY}.1.1", f"{STUDY}.1.2"]})
    series = studies.series(9, 0, modality="KO")
    instance = InstanceFacts(sop_instance_uid=note.SOPInstanceUID, sop_class_uid=note.SOPClassUID)
    objects = Objects()
    objects.objects[note.SOPInstanceUID] = reports.part10(note)
    desk.follower.publisher = replace(desk.follower.publisher, objects=objects)
    desk.hold(numbered(studies.study(studies.series(), replace(series, instances=(instance,)))))
    await desk.sweep(2)
    assert desk.registry.approved == []
    assert set(await desk.sweep(20)) <= {f"SERIES {STUDY}"}
    assert desk.outcomes == []


async def test_the_pacs_that_is_lost_in_mid_sweep_ends_it_and_the_next_goes_on(desk: Desk) -> None:
    desk.hold(numbered(studies.study()))
    other = numbered(studies.study())
    desk.hold(replace(other, facts=replace(other.facts, study_instance_uid="1.2.3")))
    await desk.sweep()
    desk.archive.errors["1.2.3"] = ConnectFailed("main", "connection refused")
    with pytest.raises(ConnectFailed):
        await desk.sweep()
    assert desk.outcomes == ["registered"]
    desk.archive.errors.clear()
    assert await desk.sweep() == ["IMAGE 1.2.3", f"SERIES {STUDY}"]
    assert desk.outcomes == ["registered", "registered"]


# --- Restarts ---------------------------------------------------------------------------------------------------------


async def test_a_restart_publishes_nothing_again(tmp_path: Path) -> None:
    first = Desk(tmp_path)
    first.hold(numbered(studies.study()))
    await first.sweep(2)
    first.memory.close()
    second = Desk(tmp_path, first.archive, first.registry)
    assert await second.sweep(3) == [f"SERIES {STUDY}"] * 3
    assert second.published == []
    # and what has changed meanwhile is seen
    second.hold(numbered(studies.study(studies.series(count=5))))
    await second.sweep(2)
    assert second.outcomes == ["replaced"]
    second.memory.close()


async def test_a_node_that_dies_between_registration_and_memory_registers_nothing_twice(tmp_path: Path) -> None:
    first = Desk(tmp_path)
    first.hold(numbered(studies.study()))
    await first.sweep()

    def die(record: object) -> None:
        raise KeyboardInterrupt

    first.memory.remember = die  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        await first.sweep()
    assert len(first.registry.approved) == 1
    first.memory.close()
    second = Desk(tmp_path, first.archive, first.registry)
    await second.sweep(2)
    assert len(second.registry.submissions) == 1
    assert second.published == []
    assert await second.sweep() == [f"SERIES {STUDY}"]
    second.memory.close()


async def test_a_lost_memory_costs_a_look_and_no_registration(tmp_path: Path) -> None:
    first = Desk(tmp_path / "a")
    first.hold(numbered(studies.study()))
    await first.sweep(2)
    second = Desk(tmp_path / "b", first.archive, first.registry)
    assert await second.sweep(2) == [f"IMAGE {STUDY}"]
    assert len(second.registry.submissions) == 1
    first.memory.close()
    second.memory.close()


async def test_only_one_process_sweeps(tmp_path: Path) -> None:
    first, second = Desk(tmp_path), Desk(tmp_path)
    assert await first.follower._try_sweep()
    assert await second.follower._try_sweep()
    assert second.archive.queries == []
    first.memory.close()
    assert await second.follower._try_sweep()
    assert "STUDY" in second.archive.queries
    second.memory.close()


# --- The loop ---------------------------------------------------------------------------------------------------------


async def test_a_dead_pacs_is_asked_ever_less_often_and_counted(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    desk.archive.errors[""] = PeerTimeout("main", "nothing for 60 s")
    times = []

    async def sleep(until: float) -> None:
        times.append(until - desk.now)
        desk.now = until
        if len(times) == 9:
            raise asyncio.CancelledError

    desk.follower._sleep = sleep  # type: ignore[method-assign]
    with pytest.raises(asyncio.CancelledError):
        await desk.follower.run(is_sweeping=True)
    pauses = times[1:]  # before the first sweep there is a short one
    assert 0 <= times[0] <= 5
    for pause, expected in zip(pauses, [120, 240, 480, 900, 900, 900, 900, 900], strict=True):
        assert 0.9 * expected <= pause <= 1.1 * expected
    assert "sweep given up" in caplog.text
    text = desk.metrics.exposition().decode()
    assert 'xca_imaging_sweeps_total{outcome="failed",pacs="main"} 8.0' in text
    assert "xca_imaging_last_sweep_seconds{" not in text


async def test_sweeps_are_counted_and_jittered(desk: Desk) -> None:
    desk.hold(numbered(studies.study()))
    times = []

    async def sleep(until: float) -> None:
        times.append(until - desk.now)
        desk.now = until
        if len(times) == 8:
            raise asyncio.CancelledError

    desk.follower._sleep = sleep  # type: ignore[method-assign]
    with pytest.raises(asyncio.CancelledError):
        await desk.follower.run(is_sweeping=True)
    assert all(54 <= pause <= 66 for pause in times[1:])
    assert len(set(times[1:])) > 1
    text = desk.metrics.exposition().decode()
    assert 'xca_imaging_sweeps_total{outcome="done",pacs="main"} 7.0' in text
    assert 'xca_imaging_published_total{outcome="registered",pacs="main"} 1.0' in text
    assert 'xca_imaging_last_sweep_seconds{pacs="main"}' in text


async def test_a_defect_ends_a_sweep_and_not_the_following(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    desk.archive.errors[""] = ZeroDivisionError()
    assert not await desk.follower._try_sweep()
    assert "defect" in caplog.text
    desk.archive.errors.clear()
    assert await desk.follower._try_sweep()


def test_a_pacs_that_is_away_for_a_year_is_still_asked() -> None:
    assert [watching._backoff(60.0, attempts) for attempts in (0, 1, 4, 50_000)] == [60.0, 120.0, 900.0, 900.0]
    assert watching._backoff(3600.0, 50_000) == 3600.0


@pytest.mark.parametrize(("days", "ranges", "length"), [(0, 1, 1), (8, 9, 1), (30, 31, 1), (31, 16, 2), (366, 31, 12)])
def test_windows_cover_every_day_once_by_closed_ranges(days: int, ranges: int, length: int) -> None:
    first = date(2026, 1, 1)
    found = list(windows(first, first + timedelta(days=days)))
    assert len(found) == ranges
    assert max((until - since).days + 1 for since, until in found) == length
    covered = [since + timedelta(days=n) for since, until in found for n in range((until - since).days + 1)]
    assert covered == [first + timedelta(days=n) for n in range(days + 1)]


# --- Notifications ----------------------------------------------------------------------------------------------------


def notified(study: str = STUDY, ae_title: str = "PACS", availability: str = "ONLINE") -> bytes:
    ds = notification(1, availability)
    ds.StudyInstanceUID = study
    ds.ReferencedSeriesSequence[0].ReferencedSOPSequence[0].RetrieveAETitle = ae_title
    return written(ds)


async def test_a_notified_study_is_looked_at_once_it_is_quiet(desk: Desk) -> None:
    desk.hold(numbered(studies.study()))
    watch = Watch([desk.follower])
    for _ in range(3):
        assert watch.notify("main", notified(), ExplicitVRLittleEndian) == 0x0000
        desk.now += 3.0
        await desk.follower.look_at_notified()
    assert desk.published == []
    desk.now += 3.0
    await desk.follower.look_at_notified()
    assert desk.outcomes == ["registered"]
    assert desk.archive.queries == [f"IMAGE {STUDY}"]
    assert desk.follower.waiting == 0


async def test_a_study_that_is_notified_without_end_is_looked_at_all_the_same(desk: Desk) -> None:
    desk.hold(numbered(studies.study()))
    watch = Watch([desk.follower])
    for _ in range(25):
        watch.notify("main", notified(), ExplicitVRLittleEndian)
        desk.now += 3.0
        await desk.follower.look_at_notified()
    assert desk.outcomes == ["registered"]


async def test_a_notification_is_not_believed(desk: Desk) -> None:
    desk.hold(numbered(studies.study()))
    await desk.sweep(2)
    watch = Watch([desk.follower])
    watch.notify("main", notified(availability="UNAVAILABLE"), ExplicitVRLittleEndian)
    watch.notify("main", notified("1.2.3.4"), ExplicitVRLittleEndian)
    desk.now += 10.0
    await desk.follower.look_at_notified()
    assert desk.outcomes == ["registered", "refused"]  # the one is there, the other is not
    assert len(desk.registry.approved) == 1
    desk.archive.studies.clear()
    watch.notify("main", notified(availability="UNAVAILABLE"), ExplicitVRLittleEndian)
    desk.now += 10.0
    await desk.follower.look_at_notified()
    assert desk.registry.approved == []


async def test_a_notified_study_that_is_not_ready_is_tried_again_and_then_left(desk: Desk) -> None:
    desk.hold(numbered(studies.study()))
    desk.archive.errors[STUDY] = PeerTimeout("main", "nothing")
    Watch([desk.follower]).notify("main", notified(), ExplicitVRLittleEndian)
    for _ in range(2000):
        desk.now += 5.0
        await desk.follower.look_at_notified()
    assert desk.archive.queries == [f"IMAGE {STUDY}"] * watching._NOTIFIED_ATTEMPTS
    assert desk.follower.waiting == 0
    del desk.archive.errors[STUDY]
    Watch([desk.follower]).notify("main", notified(), ExplicitVRLittleEndian)
    desk.now += 5.0
    await desk.follower.look_at_notified()
    assert desk.outcomes == ["registered"]


async def test_the_pacs_that_is_named_is_asked(tmp_path: Path) -> None:
    desks = [Desk(tmp_path / name) for name in ("main", "second")]
    second = desks[1].follower
    second.name = "second"
    second.publisher = replace(second.publisher, pacs=PACS.model_copy(update={"name": "second", "ae_title": "OTHER"}))
    watch = Watch(desk.follower for desk in desks)

    def waiting(pacs: str | None, ae_title: str) -> list[int]:
        for desk in desks:
            desk.follower._notified.clear()
        assert watch.notify(pacs, notified(ae_title=ae_title), ExplicitVRLittleEndian) == 0x0000
        return [desk.follower.waiting for desk in desks]

    assert waiting("main", "OTHER") == [0, 1]
    assert waiting(None, "PACS") == [1, 0]
    assert waiting("second", "UNKNOWN") == [0, 1]
    assert waiting(None, "UNKNOWN") == [1, 1]
    for desk in desks:
        desk.memory.close()


async def test_what_is_no_notification_or_too_much_is_refused(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch([desk.follower])
    assert watch.notify(None, b"\xff" * 32, ExplicitVRLittleEndian) == 0x0110
    monkeypatch.setattr(watching, "_MOST_NOTIFIED", 3)
    statuses = [watch.notify(None, notified(f"1.2.{n}"), ExplicitVRLittleEndian) for n in range(5)]
    assert statuses == [0, 0, 0, 0x0213, 0x0213]
    assert watch.notify(None, notified("1.2.0"), ExplicitVRLittleEndian) == 0  # it waits already


async def test_a_long_notification_is_answered_before_it_is_read(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    watch = Watch([desk.follower])
    long = written(notification(1000))
    assert len(long) > watching._READ_AT_ONCE
    assert watch.notify("main", long, ExplicitVRLittleEndian) == 0x0000
    assert desk.follower.waiting == 0
    broken = b"\xff" * len(long)
    assert watch.notify("main", broken, ExplicitVRLittleEndian) == 0x0000
    monkeypatch.setattr(watching, "_MOST_READING", 2)
    assert watch.notify("main", long, ExplicitVRLittleEndian) == 0x0213
    await asyncio.gather(*watch._reading)
    assert desk.follower.waiting == 1
    assert "of no use" in caplog.text
    assert watch._reading == set()


async def test_a_notification_wakes_the_follower(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "_NOTIFIED_QUIET", 0.05)
    desk.hold(numbered(studies.study()))
    loop = asyncio.get_running_loop()
    desk.follower._clock = loop.time
    watch = Watch([desk.follower])
    running = asyncio.create_task(watch.run(is_sweeping=False))
    await asyncio.sleep(0.05)
    watch.notify("main", notified(), ExplicitVRLittleEndian)
    async with asyncio.timeout(5):
        while not desk.published:
            await asyncio.sleep(0.01)
    assert "STUDY" not in desk.archive.queries
    running.cancel()
    await asyncio.wait((running,))


# --- On the wire ------------------------------------------------------------------------------------------------------


async def test_what_a_pacs_is_asked(tmp_path: Path) -> None:
    """Closed ranges of one day at study level; no image level query for what has not changed."""
    study = {"StudyDate": "20260102", "NumberOfStudyRelatedSeries": 1, "NumberOfStudyRelatedInstances": 2}
    answer = test_cfind.small_pacs(study, {"NumberOfSeriesRelatedInstances": 2}, SOPClassUID=studies.CT_IMAGE)

    def script(identifier: Dataset) -> Sequence[Any]:
        day = identifier.get("StudyDate") or "20260102"
        return answer(identifier) if day == "20260102" else []

    desk = Desk(tmp_path)
    with test_cfind.ScriptedPacs(script) as pacs:
        settings = PACS.model_copy(update={"host": pacs.host, "port": pacs.port})
        associations = Associations(settings, calling_ae_title="TEST")
        desk.follower.publisher = replace(desk.follower.publisher, pacs=settings, finder=Queries(associations))
        await desk.follower.sweep()
        days = [str(identifier.StudyDate) for identifier in pacs.asked]
        assert days == [f"{TODAY + timedelta(days=n):%Y%m%d}" for n in range(-7, 2)]
        await desk.follower.sweep()
        assert desk.outcomes == ["registered"]
        pacs.asked.clear()
        for _ in range(3):
            await desk.follower.sweep()
        assert Counter(str(each.QueryRetrieveLevel) for each in pacs.asked) == {"STUDY": 27, "SERIES": 3}
        assert desk.outcomes == ["registered"]
        await associations.close()
    desk.memory.close()
    await asyncio.to_thread(test_cfind.ScriptedPacs.stop_listening)
