"""Drift: where the registry and a PACS disagree about which studies there are, and what is in them.

Study level queries, a range of days each, tell nearly everything. A study is asked for by its UID only where it is
registered and in none of them, and its instances are listed only where numbers or patient differ; both have a limit,
and what is beyond it is named as not compared.

References
----------
* DICOM PS3.4, C.4.1 (C-FIND)
* IHE RAD TF-2, 4.68 (what an approved manifest references can be retrieved)
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, timedelta
from typing import Literal, Protocol

from xca_imaging.errors import ConnectFailed, ManifestError, PeerError, PeerTimeout, RegistryError
from xca_imaging.gateway.publishing import Publisher, Selection, identifier_of, is_ours
from xca_imaging.gateway.publishing_peers import NotPublished
from xca_imaging.gateway.watching import windows
from xca_imaging.imaging.manifest import Manifest
from xca_imaging.imaging.study import StudyFacts
from xca_imaging.metadata.model import DocumentEntry
from xca_imaging.settings import Pacs

log = logging.getLogger(__name__)

MOST_SINGLE = 1000
"""Studies of a PACS that are asked for by UID, and as many that are read to the last instance."""

Kind = Literal["registered_not_in_pacs", "in_pacs_not_registered", "other_content", "not_compared"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One study of one PACS about which the two disagree, or which could not be compared."""

    kind: Kind
    pacs: str
    study_instance_uid: str = ""
    patient_id: str = ""
    document_unique_id: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisteredManifest:
    """An approved manifest, in the few words that most comparisons need: there may be hundreds of thousands."""

    unique_id: str
    patient_id: str
    """CX under which it is registered."""
    creation_time: str
    study_instance_uid: str
    study_date: str
    departmental_id: str
    series: int
    instances: int

    @classmethod
    def of(cls, entry: DocumentEntry, manifest: Manifest) -> RegisteredManifest:
        return cls(
            unique_id=entry.unique_id,
            patient_id=entry.patient_id,
            creation_time=entry.creation_time,
            study_instance_uid=manifest.study_instance_uid,
            study_date=manifest.study_date,
            departmental_id=manifest.patient.id,
            series=sum(len(study.series) for study in manifest.studies),
            instances=manifest.number_of_instances,
        )


class Inventory(Protocol):
    """What is registered. Both methods may block."""

    def all(self) -> Iterator[tuple[DocumentEntry, Manifest]]:
        """Yield every approved manifest with its entry, one at a time."""

    def one(self, registered: RegisteredManifest) -> tuple[DocumentEntry, Manifest] | None:
        """Return one of them, None if it is no longer there."""


@dataclass(slots=True)
class _Allowance:
    """How many queries of a kind are left."""

    left: int

    def take(self) -> bool:
        self.left -= 1
        return self.left >= 0


@dataclass(slots=True)
class Comparison:
    """The comparison of one PACS with what is registered of it.

    Parameters
    ----------
    registered : mapping
        Its approved manifests by Study Instance UID, the newest first.
    inventory : Inventory
        Where they come from.
    since, until : date
        Studies of these days are to be registered; registered ones of any day are to be in the PACS.
    is_deep : bool
        List the instances of every study, also where the numbers agree.
    """

    publisher: Publisher
    registered: Mapping[str, Sequence[RegisteredManifest]]
    inventory: Inventory
    since: date
    until: date
    is_deep: bool = False
    _single: _Allowance = field(default_factory=lambda: _Allowance(MOST_SINGLE))
    _reads: _Allowance = field(default_factory=lambda: _Allowance(MOST_SINGLE))

    async def differences(self) -> list[Difference]:
        """Return where they disagree; a PACS that is lost on the way is a difference of kind `not_compared`."""
        found: list[Difference] = []
        try:
            held = await self._held()
            for uid, manifests in self.registered.items():
                found += await self._compare(uid, manifests, held.get(uid))
            for uid, study in held.items():
                if uid not in self.registered:
                    found += await self._missing(study)
        except (PeerError, ManifestError) as exc:
            found.append(self._difference("not_compared", reason=f"given up: {exc}"))
        return found

    async def _held(self) -> dict[str, StudyFacts]:
        """Return the studies of the days in question, and of the days of what is registered."""
        held: dict[str, StudyFacts] = {}
        for first, last in [*ranges_with(_days(self.registered), self.since), *windows(self.since, self.until)]:
            is_wanted = first >= self.since
            for study in await self.publisher.find_studies(Selection(since=first, until=last)):
                if is_wanted or study.study_instance_uid in self.registered:
                    held[study.study_instance_uid] = study
        return held

    async def _compare(
        self, uid: str, manifests: Sequence[RegisteredManifest], study: StudyFacts | None
    ) -> list[Difference]:
        newest = manifests[0]
        found = [
            self._difference("other_content", uid, older, "registered more than once; this is an older manifest")
            for older in manifests[1:]
        ]
        if study is None:
            if not self._single.take():
                return [*found, self._difference("not_compared", uid, newest, "too many are in no list of days")]
            listed = await self.publisher.find_studies(Selection(study_instance_uid=uid))
            if not listed:
                return [*found, self._difference("registered_not_in_pacs", uid, newest, "no such study")]
            study = listed[0]
        if not self.is_deep and _looks_same(study, newest):
            return found
        return [*found, *await self._read(uid, newest)]

    async def _read(self, uid: str, registered: RegisteredManifest) -> list[Difference]:
        """List a study's instances, and compare with what would be registered now for the same patient."""
        if not self._reads.take():
            return [self._difference("not_compared", uid, registered, "too many have other numbers than registered")]
        publisher = replace(self.publisher, patient_id=identifier_of(registered.patient_id))
        try:
            prepared = await publisher.prepare(uid)
        except (ConnectFailed, PeerTimeout):
            raise
        except (NotPublished, ManifestError, PeerError, RegistryError) as exc:
            return [self._difference("not_compared", uid, registered, str(exc))]
        if prepared is None:
            return [
                self._difference(
                    "registered_not_in_pacs", uid, registered, "nothing of it is left but what is rejected"
                )
            ]
        found = self.inventory.one(registered)
        if found is None or prepared.is_same(*found):
            return []  # it was replaced meanwhile, or is as it should be
        before, now = registered.instances, prepared.manifest.number_of_instances
        reason = f"{before} instances are registered, {now} are there" if before != now else "it has changed"
        return [self._difference("other_content", uid, registered, reason)]

    async def _missing(self, study: StudyFacts) -> list[Difference]:
        """Say that a study is not registered, unless there is nothing of it that could be."""
        uid = study.study_instance_uid
        if not self._reads.take():
            return [self._difference("in_pacs_not_registered", uid, reason="not looked at: too many others")]
        try:
            prepared = await self.publisher.prepare(uid)
        except (ConnectFailed, PeerTimeout):
            raise
        except (NotPublished, ManifestError, PeerError, RegistryError) as exc:
            return [self._difference("in_pacs_not_registered", uid, reason=f"it cannot be published: {exc}")]
        if prepared is None:
            return []
        difference = self._difference("in_pacs_not_registered", uid)
        return [replace(difference, patient_id=prepared.entry.patient_id)]

    def _difference(
        self, kind: Kind, uid: str = "", registered: RegisteredManifest | None = None, reason: str = ""
    ) -> Difference:
        return Difference(
            kind=kind,
            pacs=self.publisher.pacs.name,
            study_instance_uid=uid,
            patient_id=registered.patient_id if registered else "",
            document_unique_id=registered.unique_id if registered else "",
            reason=reason,
        )


def by_study(inventory: Inventory, all_pacs: Sequence[Pacs]) -> dict[str, dict[str, list[RegisteredManifest]]]:
    """Return the manifests that this node makes, by name of the PACS and Study Instance UID, the newest first."""
    found: dict[str, dict[str, list[RegisteredManifest]]] = {pacs.name: {} for pacs in all_pacs}
    for entry, manifest in inventory.all():
        for pacs in all_pacs:
            if is_ours(manifest, pacs):
                study = found[pacs.name].setdefault(manifest.study_instance_uid, [])
                study.append(RegisteredManifest.of(entry, manifest))
    for studies in found.values():
        for manifests in studies.values():
            manifests.sort(key=lambda each: (each.creation_time, each.unique_id), reverse=True)
    return found


def ranges_with(days: Sequence[date], before: date) -> Iterator[tuple[date, date]]:
    """Return closed ranges of days before a day that hold all of these: at most as many as a year has days."""
    earlier = sorted(day for day in days if day < before)
    if not earlier:
        return
    length = -(-(before - earlier[0]).days // 366)
    covered = date.min
    for day in earlier:
        if day > covered:
            covered = min(day + timedelta(days=length - 1), before - timedelta(days=1))
            yield day, covered


def _days(registered: Mapping[str, Sequence[RegisteredManifest]]) -> list[date]:
    found = []
    for manifests in registered.values():
        try:
            found.append(date.fromisoformat(manifests[0].study_date.replace(".", "")))
        except ValueError:
            continue  # without a usable date it is asked for by its UID
    return found


def _looks_same(study: StudyFacts, registered: RegisteredManifest) -> bool:
    """Tell whether numbers and patient agree, as far as study level tells."""
    return (
        study.number_of_instances == registered.instances
        and study.number_of_series in (None, registered.series)
        and study.patient.id == registered.departmental_id
    )
