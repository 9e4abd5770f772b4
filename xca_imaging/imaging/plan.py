"""What is to be fetched from where, or why not: a request, the routes and what C-FIND proved.

Pure: the facts are asked by `imaging/transfer.py`, in two steps, because the cheap one (SERIES level, once for a
study) mostly makes the dear one (IMAGE level) needless. `unclear_series` says where it does not.

References
----------
* IHE RAD TF-2, 3.69.4.1 (RAD-69 request), 3.69.4.2 (errors by document)
* DICOM PS3.4, C.4.2.1.4 (C-MOVE identifier: unique keys by level)
* DICOM PS3.5, 9.1 (UID encoding)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from xca_imaging.errors import DocumentUniqueIdError, RegistryError, RepositoryError, UnknownRepositoryId
from xca_imaging.imaging.ledger import Want
from xca_imaging.uids import UID_LENGTH, is_uid


@dataclass(frozen=True, slots=True)
class StudyIndex:
    """What C-FIND told about one study.

    `series` maps each Series Instance UID to NumberOfSeriesRelatedInstances (None: not given). `instances` maps the
    series that were asked at IMAGE level to SOP Instance UID -> SOP Class UID.
    """

    series: Mapping[str, int | None]
    instances: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


Facts = Mapping[tuple[str, str], StudyIndex]
"""By (PACS name, Study Instance UID); a study that is not there could not be asked."""


@dataclass(frozen=True, slots=True)
class SeriesFetch:
    """Instances of one series that one PACS is to send.

    `count` is the size of the series there (None: unknown); when all of them are wanted, one move at SERIES level
    brings them. `study_count` is the size of the whole study there, for a move at STUDY level. `sop_classes` names the
    instances that an IMAGE level C-FIND proved to be in this series. `verify` asks for a look into the arrived object,
    because nothing else proves that it belongs to series and study.
    """

    pacs: str
    study_instance_uid: str
    series_instance_uid: str
    wants: tuple[Want, ...]
    count: int | None = None
    sop_classes: Mapping[str, str] = field(default_factory=dict)
    verify: bool = False
    study_count: int | None = None

    def only(self, wants: Iterable[Want]) -> SeriesFetch:
        """Return the same for some of its wants."""
        return replace(self, wants=tuple(wants))

    @property
    def instances(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(want.sop_instance_uid for want in self.wants))

    @property
    def whole(self) -> bool:
        """True when the series is wanted whole."""
        return self.count is not None and self.count == len(self.instances)


@dataclass(frozen=True, slots=True)
class FetchPlan:
    """What to fetch, and what is refused before a byte has moved."""

    fetches: tuple[SeriesFetch, ...]
    refused: tuple[tuple[Want, RegistryError], ...]


def build(
    wants: Iterable[Want],
    *,
    accept: Sequence[str],
    routes: Mapping[str, str],
    facts: Facts | None = None,
) -> FetchPlan:
    """Plan the fetch of a request.

    Parameters
    ----------
    wants : iterable of Want
        The same want listed twice is one.
    accept : sequence of str
        TransferSyntaxUIDList.
    routes : mapping
        RepositoryUniqueId -> name of the PACS behind it.
    facts : mapping, optional
        What C-FIND told. Without them a plan is still right, only less sure: IMAGE level and a look into each object.
    """
    refused: list[tuple[Want, RegistryError]] = []
    series: dict[tuple[str, str, str], list[Want]] = {}
    for want in dict.fromkeys(wants):
        error = _refuse(want, accept, routes)
        if error is not None:
            refused.append((want, error))
            continue
        pacs = routes[want.repository_unique_id]
        series.setdefault((pacs, want.study_instance_uid, want.series_instance_uid), []).append(want)
    fetches = []
    for (pacs, study, uid), wanted in series.items():
        known = facts.get((pacs, study)) if facts else None
        fetch, absent = _plan_series(pacs, study, uid, wanted, known)
        refused += absent
        if fetch is not None:
            fetches.append(fetch)
    return FetchPlan(tuple(fetches), tuple(refused))


def unclear_series(plan: FetchPlan, facts: Facts) -> list[tuple[str, str, str]]:
    """Return (PACS, study, series) of what only an IMAGE level C-FIND can prove.

    That is every series of a study with facts that is not wanted whole, or whose size the PACS does not tell.
    """
    return [
        (fetch.pacs, fetch.study_instance_uid, fetch.series_instance_uid)
        for fetch in plan.fetches
        if (fetch.pacs, fetch.study_instance_uid) in facts and not fetch.whole and not fetch.sop_classes
    ]


def _refuse(want: Want, accept: Sequence[str], routes: Mapping[str, str]) -> RegistryError | None:
    location = want.sop_instance_uid
    for name, value in (
        ("StudyRequest/@studyInstanceUID", want.study_instance_uid),
        ("SeriesRequest/@seriesInstanceUID", want.series_instance_uid),
        ("DocumentUniqueId", want.sop_instance_uid),
    ):
        if not value:
            return RepositoryError(f"{name} is empty", location)
        if not is_uid(value):
            return DocumentUniqueIdError(f"{name} {value[:UID_LENGTH]!r} is not a UID (DICOM PS3.5 9.1)", location)
    if want.repository_unique_id not in routes:
        return UnknownRepositoryId(f"no imaging source with RepositoryUniqueId {want.repository_unique_id!r}", location)
    if not accept:
        return RepositoryError("TransferSyntaxUIDList is empty", location)
    for syntax in accept:
        if not is_uid(syntax):
            text = f"TransferSyntaxUIDList holds {syntax[:UID_LENGTH]!r}, which is not a transfer syntax UID"
            return RepositoryError(text, location)
    return None


def _plan_series(
    pacs: str, study: str, series: str, wanted: list[Want], facts: StudyIndex | None
) -> tuple[SeriesFetch | None, Sequence[tuple[Want, RegistryError]]]:
    if facts is None:
        return SeriesFetch(pacs, study, series, tuple(wanted), verify=True), []
    if series not in facts.series:
        return None, [(want, not_there(want)) for want in wanted]
    count = facts.series[series]
    counts = [each for each in facts.series.values() if each is not None]
    in_study = sum(counts) if len(counts) == len(facts.series) else None
    present = facts.instances.get(series)
    if present is None:
        fetch = SeriesFetch(pacs, study, series, tuple(wanted), count, study_count=in_study)
        # An IMAGE level move of an unproved list may bring an instance of another series: some PACSs look at the SOP
        # Instance UID only.
        return (fetch if fetch.whole else replace(fetch, verify=True)), []
    # Some PACSs repeat one match in place of others: a list shorter than the series proves what it has, not what it
    # lacks.
    complete = count is None or len(present) >= count
    kept = tuple(want for want in wanted if not complete or want.sop_instance_uid in present)
    absent = [(want, not_there(want)) for want in wanted if complete and want.sop_instance_uid not in present]
    if not kept:
        return None, absent
    proved = {uid: present[uid] for want in kept if (uid := want.sop_instance_uid) in present}
    count = len(present) if complete else count
    fetch = SeriesFetch(pacs, study, series, kept, count, proved, len(proved) < len(kept), in_study)
    return fetch, absent


def not_there(want: Want) -> DocumentUniqueIdError:
    """Return the error of an instance that its source does not have in the named study and series."""
    return DocumentUniqueIdError(
        f"not at this imaging source in series {want.series_instance_uid} of study {want.study_instance_uid}",
        want.sop_instance_uid,
    )
