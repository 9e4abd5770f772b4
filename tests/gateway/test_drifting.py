"""Drift: each kind of difference, and what the comparison costs at most."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path

import pytest

from tests.gateway.doubles import PACS, Registry
from tests.gateway.test_life_cycle import Desk, reject
from tests.gateway.test_watching import numbered
from tests.imaging import studies
from xca_imaging.errors import ConnectFailed, ManifestError, PeerBusy
from xca_imaging.gateway import drifting
from xca_imaging.gateway.drifting import Comparison, RegisteredManifest, by_study, ranges_with
from xca_imaging.imaging import manifest
from xca_imaging.imaging.manifest import Manifest
from xca_imaging.imaging.study import StudyContents
from xca_imaging.metadata.model import DocumentEntry, Identifier

SINCE, UNTIL = date(2026, 1, 1), date(2026, 1, 8)  # the made-up studies are of 2026-01-02


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path)
    yield desk
    desk.memory.close()


def renamed(contents: StudyContents, uid: str, **facts: str) -> StudyContents:
    return replace(contents, facts=replace(contents.facts, study_instance_uid=uid, **facts))


async def publish(desk: Desk, *all_studies: StudyContents) -> None:
    for contents in all_studies:
        desk.archive.studies[contents.facts.study_instance_uid] = contents
        assert (await desk.publisher.attempt(contents.facts.study_instance_uid)).outcome == "registered"
    desk.archive.queries.clear()


class Stock:
    """What a registry in memory holds."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def all(self) -> Iterator[tuple[DocumentEntry, Manifest]]:
        for entry in self._registry.approved:
            yield entry, manifest.read(self._registry.documents[entry.unique_id])

    def one(self, registered: RegisteredManifest) -> tuple[DocumentEntry, Manifest] | None:
        return next((each for each in self.all() if each[0].unique_id == registered.unique_id), None)


async def drift(desk: Desk, *, is_deep: bool = False) -> list[tuple[str, str]]:
    """Return kind and study of each difference."""
    stock = Stock(desk.registry)
    registered = by_study(stock, [PACS])["main"]
    found = await Comparison(desk.publisher, registered, stock, SINCE, UNTIL, is_deep).differences()
    assert all(each.pacs == "main" for each in found)
    return [(each.kind, each.study_instance_uid) for each in found]


async def test_what_agrees_costs_no_query_below_study_level(desk: Desk) -> None:
    await publish(desk, numbered(studies.study()), numbered(renamed(studies.study(), "1.2.3")))
    assert await drift(desk) == []
    assert desk.archive.queries == ["STUDY"] * 8
    assert await drift(desk, is_deep=True) == []


async def test_each_kind(desk: Desk) -> None:
    gone, other, fresh = (numbered(renamed(studies.study(), uid)) for uid in ("1.2.1", "1.2.2", "1.2.3"))
    await publish(desk, gone, other)
    del desk.archive.studies["1.2.1"]
    desk.archive.studies["1.2.2"] = numbered(renamed(studies.study(studies.series(count=3)), "1.2.2"))
    desk.archive.studies["1.2.3"] = fresh
    assert await drift(desk) == [
        ("registered_not_in_pacs", "1.2.1"),
        ("other_content", "1.2.2"),
        ("in_pacs_not_registered", "1.2.3"),
    ]


async def test_a_registered_study_of_any_day_is_looked_for(desk: Desk) -> None:
    old = [numbered(renamed(studies.study(), f"1.2.{year}", date=f"{year}0301")) for year in (1999, 2019, 2025)]
    undated = numbered(renamed(studies.study(), "1.2.4", date=""))
    await publish(desk, *old, undated)
    assert await drift(desk) == []
    assert len(desk.archive.queries) == 3 + 8 + 1  # the undated one is asked for by its UID
    del desk.archive.studies["1.2.1999"]
    del desk.archive.studies["1.2.4"]
    # what is old and not registered is no drift
    desk.archive.studies["1.2.5"] = numbered(renamed(studies.study(), "1.2.5", date="20190301"))
    assert await drift(desk) == [("registered_not_in_pacs", "1.2.1999"), ("registered_not_in_pacs", "1.2.4")]


async def test_rejected_instances_are_no_drift(desk: Desk) -> None:
    desk.hold(studies.study(), reject(f"{studies.STUDY}.1.1"))
    await desk.publish()
    assert await drift(desk) == []
    desk.hold(studies.study(), reject(f"{studies.STUDY}.1.1"), reject(f"{studies.STUDY}.1.2"))
    assert await drift(desk) == [("registered_not_in_pacs", studies.STUDY)]
    await desk.publish()
    assert await drift(desk) == []  # it is not registered, and should not be


async def test_another_patient_is_other_content(desk: Desk) -> None:
    await publish(desk, numbered(studies.study()))
    desk.hold(numbered(studies.study(patient=replace(studies.PATIENT, id="DEPT-2"))))
    assert await drift(desk) == [("other_content", studies.STUDY)]


async def test_a_patient_given_by_hand_is_no_drift(desk: Desk) -> None:
    desk.hold(studies.study())  # without numbers: it is read
    given = replace(desk.publisher, patient_id=Identifier("AD-1", "1.2.3.4.5"))
    assert (await given.attempt(studies.STUDY)).patient_id.startswith("AD-1^^^")
    assert await drift(desk) == []


async def test_only_a_deep_look_sees_other_instances_in_the_same_number(desk: Desk) -> None:
    await publish(desk, numbered(studies.study()))
    desk.hold(numbered(studies.study(studies.series(2))))
    assert await drift(desk) == []
    assert await drift(desk, is_deep=True) == [("other_content", studies.STUDY)]


async def test_registered_twice_is_told(desk: Desk) -> None:
    await publish(desk, numbered(studies.study()))
    hidden, desk.registry.entries = desk.registry.entries, {}
    await desk.publish()
    desk.registry.entries |= hidden
    assert await drift(desk) == [("other_content", studies.STUDY)]


async def test_manifests_of_other_places_are_not_compared(desk: Desk) -> None:
    await publish(desk, numbered(studies.study()))
    elsewhere = PACS.model_copy(update={"retrieve_location_uid": "1.2.3.4.5"})
    assert by_study(Stock(desk.registry), [elsewhere]) == {"main": {}}


async def test_queries_are_bounded_and_what_is_beyond_is_named(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drifting, "MOST_SINGLE", 3)
    await publish(desk, *(numbered(renamed(studies.study(), f"1.2.{n}")) for n in range(12)))
    for number in range(6):
        del desk.archive.studies[f"1.2.{number}"]
    for number in range(6, 12):
        desk.archive.studies[f"1.2.{number}"] = renamed(studies.study(studies.series(count=3)), f"1.2.{number}")
    kinds = [kind for kind, _ in await drift(desk)]
    assert kinds == ["registered_not_in_pacs"] * 3 + ["not_compared"] * 3 + ["other_content"] * 3 + ["not_compared"] * 3
    assert len(desk.archive.queries) == 8 + 3 + 3


@pytest.mark.parametrize("error", [ManifestError("numbers do not agree"), PeerBusy("main", "busy")])
async def test_a_study_that_cannot_be_read_is_named(desk: Desk, error: Exception) -> None:
    await publish(desk, numbered(studies.study()))
    desk.hold(numbered(studies.study(studies.series(count=3))))
    desk.archive.errors[studies.STUDY] = error
    assert await drift(desk) == [("not_compared", studies.STUDY)]
    desk.registry.entries.clear()
    assert await drift(desk) == [("in_pacs_not_registered", studies.STUDY)]


async def test_a_pacs_that_is_away_is_named(desk: Desk) -> None:
    await publish(desk, numbered(studies.study()))
    desk.archive.errors[""] = ConnectFailed("main", "connection refused")
    assert await drift(desk) == [("not_compared", "")]


def test_ranges_hold_every_day_once() -> None:
    assert list(ranges_with([], SINCE)) == []
    assert list(ranges_with([SINCE, UNTIL], SINCE)) == []
    days = [SINCE - timedelta(days=n * n) for n in range(1, 60)]
    ranges = list(ranges_with(days, SINCE))
    assert len(ranges) <= 59
    assert all(sum(first <= day <= last for first, last in ranges) == 1 for day in days)
    assert all(last < SINCE for _, last in ranges)
    many = [SINCE - timedelta(days=n) for n in range(1, 5000)]
    assert len(list(ranges_with(many, SINCE))) <= 366
