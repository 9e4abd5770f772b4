"""C-FIND: which studies, series and instances a PACS has.

The worst that can happen here is a short list that looks complete: a manifest made of it hides images. So answers are
counted against what the PACS itself says there is, a list that ends with anything but Success is no list, and matches
are told apart by their UIDs, whatever was asked.

References
----------
* DICOM PS3.4, C.4.1 (C-FIND operation), Table C.4-1 (status), C.2.2.2 (matching), C.6.1 and C.6.2 (patient and study
  root models), C.3.4 (attributes that tell numbers of related objects)
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import date, timedelta
from typing import Any

from pydicom import config
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset

from xca_imaging.errors import (
    ManifestError,
    PeerBusy,
    PeerError,
    PeerProtocolError,
    PeerRefused,
    PeerTimeout,
    StudyNotFound,
)
from xca_imaging.imaging.attributes import Attributes
from xca_imaging.imaging.backends import identifiers
from xca_imaging.imaging.backends.pool import Associations
from xca_imaging.imaging.backends.requester import PENDING, Association, AssociationLost, Context, Proposal
from xca_imaging.imaging.backends.sop_classes import learn_from_images
from xca_imaging.imaging.study import (
    InstanceFacts,
    SeriesContents,
    SeriesFacts,
    StudyContents,
    StudyFacts,
    completed,
    read_instance,
    read_series,
    read_study,
)
from xca_imaging.uids import is_uid
from xca_imaging.wire import dimse

_log = logging.getLogger(__name__)


STUDY_ROOT_FIND = "1.2.840.10008.5.1.4.1.2.2.1"  # PS3.4 C.6.2
PATIENT_ROOT_FIND = "1.2.840.10008.5.1.4.1.2.1.1"  # PS3.4 C.6.1

_PROPOSALS = (Proposal(STUDY_ROOT_FIND), Proposal(PATIENT_ROOT_FIND))

# Keys by level. The first group every SCP knows (PS3.4 Tables C.6-1 to C.6-5: unique and required); the second is
# optional, and left out for a PACS that refuses a query because of it.
_STUDY_KEYS = ("StudyInstanceUID", "StudyDate", "StudyTime", "StudyID", "AccessionNumber", "PatientID", "PatientName")
_STUDY_OPTIONAL = (
    "PatientBirthDate",
    "PatientSex",
    "IssuerOfPatientID",
    "IssuerOfPatientIDQualifiersSequence",
    "IssuerOfAccessionNumberSequence",
    "StudyDescription",
    "ReferringPhysicianName",
    "ProcedureCodeSequence",
    "TimezoneOffsetFromUTC",
    "ModalitiesInStudy",
    "SOPClassesInStudy",
    "NumberOfStudyRelatedSeries",
    "NumberOfStudyRelatedInstances",
)
_SERIES_KEYS = ("SeriesInstanceUID", "Modality", "SeriesNumber")
_SERIES_OPTIONAL = (
    "SeriesDescription",
    "BodyPartExamined",
    "AnatomicRegionSequence",
    "InstitutionName",
    "RequestAttributesSequence",
    "NumberOfSeriesRelatedInstances",
)
_IMAGE_KEYS = ("SOPInstanceUID", "InstanceNumber")
_IMAGE_OPTIONAL = ("SOPClassUID",)

_OUT_OF_RESOURCES = range(0xA700, 0xA800)
_FAILURES = {  # PS3.4 Table C.4-1, PS3.7 Annex C
    0x0122: "SOP class not supported",
    0x0124: "not authorised",
    0xA700: "out of resources",
    0xA900: "identifier does not match SOP class",
    0xFE00: "matching ended by a cancel request that was not ours",
}
_EARLIEST = date(1900, 1, 1)


class _QueryRefused(PeerRefused):
    """C-FIND ended with a failure status before the first match: another set of keys may be accepted."""


class _QueryAborted(PeerProtocolError):
    """The PACS aborted before the first match: as above, for those that abort instead of refusing."""


@dataclass(frozen=True, slots=True)
class _Link:
    """An association, and the context of the information model that is used on it."""

    association: Association
    context: Context


class Queries:
    """C-FIND requester for one PACS, on the event loop.

    Parameters
    ----------
    associations : Associations
        With that PACS.
    response_timeout : float
        For each response. A PACS searching a large archive may be silent for half a minute.
    max_matches : int
        Responses to one query. More than any study has instances; it ends a PACS that never stops.
    today : callable
        For the closed form of an open range of dates.

    Raises
    ------
    ConnectFailed, PeerTimeout, PeerBusy, PeerRefused, PeerProtocolError
        From every method: the PACS could not be asked, or did not answer to the end.
    ManifestError
        From every method: an answer that is not complete by the PACS's own numbers, or over `max_matches`.
    """

    # Mutable state: levels at which this PACS refused the optional keys, so that each is tried once
    # (_refused_optional); whether it has been said that it tells no SOP Classes (_said_no_classes).

    def __init__(
        self,
        associations: Associations,
        *,
        response_timeout: float = 60.0,
        max_matches: int = 200_000,
        today: Callable[[], date] = date.today,
    ) -> None:
        self.pacs = associations.pacs
        self._associations = associations
        self._response_timeout = response_timeout
        self._max_matches = max_matches
        self._today = today
        self._refused_optional: set[str] = set()
        self._said_no_classes = False

    async def find_studies(
        self,
        *,
        study_instance_uid: str = "",
        patient_id: str = "",
        since: date | None = None,
        until: date | None = None,
    ) -> list[StudyFacts]:
        """Return the studies that fit everything given (dates inclusive), each once."""
        async with self._link() as link:
            return await self._studies(link, study_instance_uid, patient_id, since, until)

    async def find_series(self, study_instance_uid: str, *, patient_id: str = "") -> list[SeriesFacts]:
        """Return the series of a study. `patient_id` is used by PACSs that know the patient root model only."""
        async with self._link() as link:
            return await self._series(link, study_instance_uid, patient_id)

    async def find_instances(
        self, study_instance_uid: str, series_instance_uid: str, *, patient_id: str = ""
    ) -> list[InstanceFacts]:
        """Return the instances of a series; `sop_class_uid` is empty where the PACS does not tell it."""
        async with self._link() as link:
            return await self._instances(link, study_instance_uid, series_instance_uid, patient_id)

    async def read_study(self, study_instance_uid: str) -> StudyContents:
        """Return a study with everything in it, each instance with its SOP Class.

        A PACS that leaves SOP Classes out of its answers is asked for the images by C-GET, and what their headers say
        completes the other attributes as well.

        Raises
        ------
        StudyNotFound
            There is no such study.
        ManifestError
            Its numbers do not agree (it may be changing), or SOP Classes cannot be learnt.
        """
        async with self._link() as link:
            studies = await self._studies(link, study_instance_uid)
            if not studies:
                raise StudyNotFound(f"{self.pacs.name} has no study {study_instance_uid}")
            study = studies[0]
            patient_id = study.patient.id
            series = [
                SeriesContents(
                    facts, tuple(await self._instances(link, study_instance_uid, facts.series_instance_uid, patient_id))
                )
                for facts in await self._series(link, study_instance_uid, patient_id)
            ]
        contents = StudyContents(study, tuple(series))
        self._check_numbers(contents)
        return await self._with_sop_classes(contents)

    # --- Levels -------------------------------------------------------------------------------------------------------

    async def _studies(
        self,
        link: _Link,
        study_instance_uid: str = "",
        patient_id: str = "",
        since: date | None = None,
        until: date | None = None,
    ) -> list[StudyFacts]:
        wanted = {"StudyInstanceUID": study_instance_uid, "PatientID": patient_id, "StudyDate": _range(since, until)}
        found = await self._ask_studies(link, wanted)
        if not found and (since is None) != (until is None):
            # Some find nothing for an open range.
            closed = _range(since or _EARLIEST, until or self._today() + timedelta(days=1))
            found = await self._ask_studies(link, wanted | {"StudyDate": closed})
        return [study for study in found if _fits(study, study_instance_uid, patient_id, since, until)]

    async def _ask_studies(self, link: _Link, wanted: dict[str, str]) -> list[StudyFacts]:
        found: dict[str, StudyFacts] = {}
        for match in await self._ask(link, "STUDY", wanted, _STUDY_KEYS, _STUDY_OPTIONAL):
            study = read_study(match)
            self._check_uid(study.study_instance_uid, "Study Instance UID")
            found.setdefault(study.study_instance_uid, study)
        return list(found.values())

    async def _series(self, link: _Link, study_instance_uid: str, patient_id: str) -> list[SeriesFacts]:
        wanted = {"StudyInstanceUID": study_instance_uid}
        found: dict[str, SeriesFacts] = {}
        for match in await self._ask(link, "SERIES", wanted, _SERIES_KEYS, _SERIES_OPTIONAL, patient_id):
            # The keys of the levels above may be left out of a response; one that is there must be ours.
            if match.text("StudyInstanceUID") not in ("", study_instance_uid):
                continue
            series = read_series(match)
            self._check_uid(series.series_instance_uid, "Series Instance UID")
            found.setdefault(series.series_instance_uid, series)
        return list(found.values())

    async def _instances(
        self, link: _Link, study_instance_uid: str, series_instance_uid: str, patient_id: str
    ) -> list[InstanceFacts]:
        wanted = {"StudyInstanceUID": study_instance_uid, "SeriesInstanceUID": series_instance_uid}
        found: dict[str, InstanceFacts] = {}
        for match in await self._ask(link, "IMAGE", wanted, _IMAGE_KEYS, _IMAGE_OPTIONAL, patient_id):
            if match.text("StudyInstanceUID") not in ("", study_instance_uid):
                continue
            if match.text("SeriesInstanceUID") not in ("", series_instance_uid):
                continue
            instance = read_instance(match)
            self._check_uid(instance.sop_instance_uid, "SOP Instance UID")
            found.setdefault(instance.sop_instance_uid, instance)
        return list(found.values())

    def _check_uid(self, value: str, name: str) -> None:
        if not is_uid(value):
            raise PeerProtocolError(self.pacs.name, f"a C-FIND match has no usable {name}: {value!r}")

    def _check_numbers(self, contents: StudyContents) -> None:
        """Compare what was found with what the PACS says there is."""
        study = contents.facts

        def check(what: str, found: int, said: int | None) -> None:
            if said is not None and found != said:
                raise ManifestError(
                    f"{what}: {self.pacs.name} says there are {said} and lists {found}; "
                    "publish again once the study no longer changes"
                )

        uid = study.study_instance_uid
        for series in contents.series:
            name = f"instances of series {series.facts.series_instance_uid} of study {uid}"
            check(name, len(series.instances), series.facts.number_of_instances)
        check(f"series of study {uid}", len(contents.series), study.number_of_series)
        check(f"instances of study {uid}", contents.number_of_instances, study.number_of_instances)
        all_uids = {instance.sop_instance_uid for series in contents.series for instance in series.instances}
        if len(all_uids) != contents.number_of_instances:
            raise ManifestError(f"study {uid}: {self.pacs.name} lists the same instance in several series")

    async def _with_sop_classes(self, contents: StudyContents) -> StudyContents:
        missing = {
            series.facts.series_instance_uid: uids
            for series in contents.series
            if (uids := [each.sop_instance_uid for each in series.instances if not each.sop_class_uid])
        }
        if not missing:
            return contents
        study = contents.facts
        if len(study.sop_class_uids) == 1:
            only = study.sop_class_uids[0]
            classes = {uid: only for uids in missing.values() for uid in uids}
            return _completed(contents, classes)
        _log.log(
            logging.INFO if self._said_no_classes else logging.WARNING,
            "%s leaves SOP Class UID (0008,0016) out of its answers: fetching %d instances of study %s to learn it",
            self.pacs.name,
            sum(map(len, missing.values())),
            study.study_instance_uid,
        )
        self._said_no_classes = True
        learnt = await learn_from_images(
            self._associations,
            study.study_instance_uid,
            missing,
            response_timeout=self._response_timeout,
        )
        return _completed(contents, learnt.sop_class_uids, learnt.headers)

    # --- One query ----------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _link(self) -> AsyncIterator[_Link]:
        """Give an association: study root where the PACS accepts it, else patient root."""
        async with self._associations.lease(_PROPOSALS) as association:
            yield _Link(association, association.context_of(STUDY_ROOT_FIND, PATIENT_ROOT_FIND))

    async def _ask(
        self,
        link: _Link,
        level: str,
        wanted: dict[str, str],
        keys: Sequence[str],
        optional: Sequence[str],
        patient_id: str = "",
    ) -> list[Attributes]:
        """Return the matches of one query; ask again without the optional keys where they are refused."""
        if link.context.abstract_syntax == PATIENT_ROOT_FIND and level != "STUDY":
            wanted = {"PatientID": patient_id} | wanted
        if level in self._refused_optional:
            return await self._query(link, _identifier(level, wanted, keys))
        try:
            return await self._query(link, _identifier(level, wanted, [*keys, *optional]))
        except _QueryRefused as exc:
            matches = await self._query(link, _identifier(level, wanted, keys))
            refused: PeerError = exc
        except _QueryAborted as exc:
            async with self._link() as again:
                matches = await self._query(again, _identifier(level, wanted, keys))
            refused = exc
        _log.info("%s takes no optional keys at level %s: %s", self.pacs.name, level, refused)
        self._refused_optional.add(level)
        return matches

    async def _query(self, link: _Link, identifier: Dataset) -> list[Attributes]:
        level = str(identifier.QueryRetrieveLevel)
        matches: list[Attributes] = []
        association, syntax = link.association, link.context.transfer_syntax
        try:
            association.request(link.context, dimse.C_FIND_RQ, identifiers.encode(identifier, syntax))
            while True:
                answer = await association.answer(self._response_timeout)
                status = answer.response.status
                if status == dimse.STATUS_SUCCESS:
                    return matches
                if status not in PENDING:
                    raise self._refused(level, answer.response, len(matches))
                matches.append(self._match(level, answer.data, syntax, len(matches)))
                if len(matches) > self._max_matches:
                    text = f"C-FIND {level} has more than {self._max_matches} matches; narrow the selection"
                    raise ManifestError(f"{self.pacs.name}: {text}")
        except PeerTimeout as exc:
            text = f"C-FIND {level}: nothing for {self._response_timeout:g} s after {len(matches)} matches"
            raise PeerTimeout(self.pacs.name, text) from exc
        except AssociationLost as exc:
            text = f"C-FIND {level}: association aborted after {len(matches)} matches"
            if matches:
                raise PeerProtocolError(self.pacs.name, text) from exc
            raise _QueryAborted(self.pacs.name, text) from exc

    def _match(self, level: str, data: bytes, transfer_syntax_uid: str, number: int) -> Attributes:
        text = f"C-FIND {level}: response {number + 1} has no readable match"
        try:
            match = identifiers.decode(data, transfer_syntax_uid)
        except Exception as exc:  # pydicom raises what it likes for bytes of others
            raise PeerProtocolError(self.pacs.name, text) from exc
        if not match:
            raise PeerProtocolError(self.pacs.name, text)
        return Attributes(match)

    def _refused(self, level: str, response: dimse.Response, matches: int) -> PeerError:
        code = response.status
        text = f"C-FIND {level} ended with status 0x{code:04X} after {matches} matches"
        reason = _FAILURES.get(code, "unable to process" if code >> 12 == 0xC else "")
        text += "".join(f": {each}" for each in (reason, response.error_comment) if each)
        if code in _OUT_OF_RESOURCES:
            return PeerBusy(self.pacs.name, text)
        return PeerRefused(self.pacs.name, text) if matches else _QueryRefused(self.pacs.name, text)


def _range(since: date | None, until: date | None) -> str:
    """Return a date range (PS3.4 C.2.2.2.5), a single date where both ends are the same, empty for any date."""
    if since is None and until is None:
        return ""
    first, last = (f"{day:%Y%m%d}" if day else "" for day in (since, until))
    return first if first == last else f"{first}-{last}"


def _fits(study: StudyFacts, study_uid: str, patient_id: str, since: date | None, until: date | None) -> bool:
    """Tell whether a match is what was asked: there are PACSs that ignore a key, and values that are wildcards."""
    if study_uid and study.study_instance_uid != study_uid:
        return False
    if patient_id and study.patient.id != patient_id:
        return False
    if since is None and until is None:
        return True
    day = study.date.replace(".", "")  # ACR-NEMA wrote YYYY.MM.DD
    return bool(day) and (since is None or day >= f"{since:%Y%m%d}") and (until is None or day <= f"{until:%Y%m%d}")


def _identifier(level: str, wanted: dict[str, str], keys: Sequence[str]) -> Dataset:
    """Return a query identifier: keys with a value are matched, those without are asked back (PS3.4 C.2.2.2.3)."""
    identifier = Dataset()
    values: dict[str, str] = dict.fromkeys(keys, "") | wanted
    if not all(map(str.isascii, values.values())):
        values["SpecificCharacterSet"] = "ISO_IR 192"
    for keyword, value in values.items():
        tag = tag_for_keyword(keyword)
        assert tag is not None
        vr = dictionary_VR(tag)
        content: Any = [] if vr == "SQ" else value or None
        identifier.add(DataElement(tag, vr, content, validation_mode=config.IGNORE))
    identifier.QueryRetrieveLevel = level
    return identifier


def _completed(
    contents: StudyContents, classes: dict[str, str], headers: dict[str, Attributes] | None = None
) -> StudyContents:
    """Return the study with SOP Classes learnt elsewhere, and with what image headers say beyond the answers."""
    study = contents.facts
    all_series = []
    for series in contents.series:
        facts = series.facts
        header = (headers or {}).get(facts.series_instance_uid)
        if header is not None:
            study = completed(study, read_study(header))
            facts = completed(facts, read_series(header))
        instances = tuple(
            replace(each, sop_class_uid=each.sop_class_uid or classes.get(each.sop_instance_uid, ""))
            for each in series.instances
        )
        all_series.append(SeriesContents(facts, instances))
    return StudyContents(study, tuple(all_series))
