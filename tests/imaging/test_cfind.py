"""C-FIND against scripted PACSs that misbehave by name, and against real ones."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydicom.dataset import Dataset
from pynetdicom import AE, evt

from tests.support import images, peers
from tests.support.shared import shared_path
from xca_imaging import settings
from xca_imaging.errors import ManifestError, PeerBusy, PeerError, PeerProtocolError, PeerRefused, PeerTimeout
from xca_imaging.imaging.backends import cfind
from xca_imaging.imaging.backends.cfind import Queries
from xca_imaging.imaging.backends.pool import Associations
from xca_imaging.imaging.study import Patient

STUDY, OTHER_STUDY = "1.2.826.0.1.3680043.8.498.1", "1.2.826.0.1.3680043.8.498.2"
SERIES = f"{STUDY}.1"
CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"


def pacs_of(peer: Any) -> settings.Pacs:
    return settings.Pacs(
        name="main", ae_title=peer.ae_title, host=peer.host, port=peer.port, retrieve_location_uid="1.2.3"
    )


def match(**values: Any) -> Dataset:
    ds = Dataset()
    for keyword, value in values.items():
        setattr(ds, keyword, value)
    return ds


STUDY_MATCH = {"StudyInstanceUID": STUDY, "PatientID": "P1", "StudyDate": "20260102"}


@pytest.fixture(scope="module", autouse=True)
def _listeners() -> Iterator[None]:
    yield
    ScriptedPacs.stop_listening()


class Finder:
    """The methods of `Queries`, each in an event loop and on associations of its own."""

    def __init__(self, pacs: settings.Pacs, calling_ae_title: str, *, connect_timeout: float = 10.0, **options: Any):
        self.pacs = pacs
        associations = Associations(pacs, calling_ae_title=calling_ae_title, connect_timeout=connect_timeout)
        associations.stop_reusing()  # an association cannot outlive its event loop
        self._queries = Queries(associations, **options)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._queries, name)
        return lambda *args, **named: asyncio.run(method(*args, **named))


Answer = tuple[int | Dataset, Dataset | None]


class ScriptedPacs:
    """A Find SCP that answers each query with what `script` makes of its identifier; `asked` keeps the identifiers.

    Its listener outlives it, for the next one with the same models: stopping one takes pynetdicom half a second.
    """

    ae_title = "PACS"
    host = "127.0.0.1"
    _listening: ClassVar[dict[tuple[str, ...], tuple[AE, int, list[ScriptedPacs]]]] = {}

    def __init__(
        self,
        script: Callable[[Dataset], Sequence[Answer | str]],
        *,
        models: Sequence[str] = (cfind.STUDY_ROOT_FIND, cfind.PATIENT_ROOT_FIND),
    ) -> None:
        self.script = script
        self.asked: list[Dataset] = []
        self.models: list[str] = []
        self._supported = tuple(models)

    def __enter__(self) -> ScriptedPacs:
        if self._supported not in self._listening:
            current: list[ScriptedPacs] = []
            ae = AE(self.ae_title)
            for model in self._supported:
                ae.add_supported_context(model)
            handlers = [(evt.EVT_C_FIND, lambda event: current[-1]._find(event))]
            server = ae.start_server((self.host, 0), block=False, evt_handlers=handlers)
            self._listening[self._supported] = ae, server.server_address[1], current
        _, self.port, current = self._listening[self._supported]
        current.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @classmethod
    def stop_listening(cls) -> None:
        for ae, _, _ in cls._listening.values():
            ae.shutdown()
        cls._listening.clear()

    def _find(self, event: Any) -> Iterator[Answer]:
        identifier = event.identifier
        self.asked.append(identifier)
        self.models.append(str(event.request.AffectedSOPClassUID))
        for step in self.script(identifier):
            if step == "abort":
                event.assoc.abort()
                return
            if step == "silence":
                time.sleep(1.0)
                continue
            assert isinstance(step, tuple)
            yield step

    def finder(self, **options: Any) -> Finder:
        return Finder(pacs_of(self), "TEST", **({"response_timeout": 10.0} | options))


def pending(*matches: dict[str, Any]) -> list[Answer]:
    return [(0xFF00, match(**each)) for each in matches]


def small_pacs(
    study: dict[str, Any] | None = None, series: dict[str, Any] | None = None, instances: int = 2, **image: Any
) -> Callable[[Dataset], list[Answer]]:
    """A PACS with one study of one series."""

    def script(identifier: Dataset) -> list[Answer]:
        level = identifier.QueryRetrieveLevel
        if level == "STUDY":
            return pending(STUDY_MATCH | (study or {}))
        if level == "SERIES":
            return pending({"SeriesInstanceUID": SERIES, "Modality": "CT"} | (series or {}))
        return pending(
            *({"SOPInstanceUID": f"{SERIES}.{n}", "SOPClassUID": CT_IMAGE} | image for n in range(instances))
        )

    return script


# --- What is asked ----------------------------------------------------------------------------------------------------


def test_study_attributes_are_asked_and_read() -> None:
    issuer = match(UniversalEntityID="1.2.3.4", UniversalEntityIDType="ISO")
    answer = STUDY_MATCH | {
        "SpecificCharacterSet": "ISO_IR 100",
        "PatientName": "Müller^Jürgen",
        "IssuerOfPatientIDQualifiersSequence": [issuer],
        "ModalitiesInStudy": ["CT", "SR"],
        "NumberOfStudyRelatedInstances": "7",
        "ProcedureCodeSequence": [match(CodeValue="24627-2", CodingSchemeDesignator="LN", CodeMeaning="CT Chest")],
    }
    with ScriptedPacs(lambda _: pending(answer)) as pacs:
        (study,) = pacs.finder().find_studies(study_instance_uid=STUDY)
    assert study.patient == Patient(id="P1", name="Müller^Jürgen", issuer_oid="1.2.3.4")
    assert study.modalities == ("CT", "SR")
    assert study.number_of_instances == 7
    assert study.procedure_codes[0].scheme == "LN"
    (asked,) = pacs.asked
    assert (asked.QueryRetrieveLevel, asked.StudyInstanceUID) == ("STUDY", STUDY)
    for keyword in ("PatientBirthDate", "PatientSex", "NumberOfStudyRelatedSeries", "ProcedureCodeSequence"):
        assert keyword in asked
        assert not asked[keyword].value


def test_patient_id_beyond_ascii() -> None:
    with ScriptedPacs(lambda _: pending(STUDY_MATCH | {"SpecificCharacterSet": "ISO_IR 192", "PatientID": "Ä-1"})) as p:
        assert len(p.finder().find_studies(patient_id="Ä-1")) == 1
    assert (p.asked[0].SpecificCharacterSet, p.asked[0].PatientID) == ("ISO_IR 192", "Ä-1")


@pytest.mark.parametrize(
    ("since", "until", "asked"),
    [
        (date(2026, 1, 1), date(2026, 1, 31), ["20260101-20260131"]),
        (date(2026, 1, 2), date(2026, 1, 2), ["20260102"]),
        (date(2026, 1, 1), None, ["20260101-"]),
        (None, date(2026, 1, 31), ["-20260131"]),
        (None, None, [""]),
    ],
)
def test_date_ranges(since: date | None, until: date | None, asked: list[str]) -> None:
    with ScriptedPacs(lambda _: pending(STUDY_MATCH)) as pacs:
        assert len(pacs.finder().find_studies(since=since, until=until)) == 1
    assert [str(each.StudyDate or "") for each in pacs.asked] == asked


def test_a_pacs_that_finds_nothing_for_an_open_range() -> None:
    def script(identifier: Dataset) -> list[Answer]:
        return [] if str(identifier.StudyDate).endswith("-") else pending(STUDY_MATCH)

    with ScriptedPacs(script) as pacs:
        found = pacs.finder(today=lambda: date(2026, 2, 1)).find_studies(since=date(2026, 1, 1))
    assert len(found) == 1
    assert [str(each.StudyDate) for each in pacs.asked] == ["20260101-", "20260101-20260202"]


def test_patient_root_where_study_root_is_refused() -> None:
    with ScriptedPacs(small_pacs(), models=[cfind.PATIENT_ROOT_FIND]) as pacs:
        contents = pacs.finder().read_study(STUDY)
    assert contents.number_of_instances == 2
    assert set(pacs.models) == {cfind.PATIENT_ROOT_FIND}
    assert [each.PatientID for each in pacs.asked[1:]] == ["P1", "P1"]


def test_neither_model() -> None:
    with ScriptedPacs(small_pacs(), models=["1.2.840.10008.1.1"]) as pacs, pytest.raises(PeerRefused):
        pacs.finder().find_studies(study_instance_uid=STUDY)


@pytest.mark.parametrize("refusal", [[(0xA900, None)], [(0xC001, None)], ["abort"]])
def test_a_pacs_that_refuses_optional_keys(refusal: list[Answer | str]) -> None:
    def script(identifier: Dataset) -> Sequence[Answer | str]:
        return refusal if "ProcedureCodeSequence" in identifier else pending(STUDY_MATCH)

    with ScriptedPacs(script) as pacs:
        finder = pacs.finder()
        assert len(finder.find_studies(study_instance_uid=STUDY)) == 1
        assert len(finder.find_studies(study_instance_uid=STUDY)) == 1
    assert len(pacs.asked) == 3  # it is not tried again


# --- What is answered -------------------------------------------------------------------------------------------------


def test_a_pacs_that_ignores_keys() -> None:
    everything = [STUDY_MATCH, {"StudyInstanceUID": OTHER_STUDY, "PatientID": "P2", "StudyDate": "20250101"}]
    with ScriptedPacs(lambda _: pending(*everything)) as pacs:
        finder = pacs.finder()
        assert len(finder.find_studies()) == 2
        assert [s.study_instance_uid for s in finder.find_studies(study_instance_uid=STUDY)] == [STUDY]
        assert [s.study_instance_uid for s in finder.find_studies(patient_id="P1")] == [STUDY]
        assert [s.study_instance_uid for s in finder.find_studies(since=date(2026, 1, 1))] == [STUDY]
        assert [s.study_instance_uid for s in finder.find_studies(until=date(2025, 12, 31))] == [OTHER_STUDY]
        assert finder.find_studies(patient_id="*") == []


def test_series_and_instances_of_others_are_not_taken() -> None:
    def script(identifier: Dataset) -> list[Answer]:
        if identifier.QueryRetrieveLevel == "SERIES":
            return pending(
                {"StudyInstanceUID": STUDY, "SeriesInstanceUID": SERIES},
                {"StudyInstanceUID": OTHER_STUDY, "SeriesInstanceUID": f"{OTHER_STUDY}.1"},
            )
        return pending(
            {"StudyInstanceUID": STUDY, "SeriesInstanceUID": SERIES, "SOPInstanceUID": f"{SERIES}.1"},
            {"StudyInstanceUID": STUDY, "SeriesInstanceUID": f"{STUDY}.2", "SOPInstanceUID": f"{STUDY}.2.1"},
            {"StudyInstanceUID": OTHER_STUDY, "SeriesInstanceUID": SERIES, "SOPInstanceUID": f"{OTHER_STUDY}.1.1"},
        )

    with ScriptedPacs(script) as pacs:
        assert [s.series_instance_uid for s in pacs.finder().find_series(STUDY)] == [SERIES]
        assert [i.sop_instance_uid for i in pacs.finder().find_instances(STUDY, SERIES)] == [f"{SERIES}.1"]


def test_a_whole_study() -> None:
    with ScriptedPacs(
        small_pacs(
            {"NumberOfStudyRelatedInstances": "2", "NumberOfStudyRelatedSeries": "1"},
            {"NumberOfSeriesRelatedInstances": "2", "BodyPartExamined": "CHEST"},
        )
    ) as pacs:
        contents = pacs.finder().read_study(STUDY)
    assert contents.facts.study_instance_uid == STUDY
    assert [(s.facts.body_part_examined, len(s.instances)) for s in contents.series] == [("CHEST", 2)]
    assert {i.sop_class_uid for s in contents.series for i in s.instances} == {CT_IMAGE}


@pytest.mark.parametrize(
    ("study", "series"),
    [
        ({}, {"NumberOfSeriesRelatedInstances": "3"}),
        ({"NumberOfStudyRelatedInstances": "3"}, {}),
        ({"NumberOfStudyRelatedInstances": "1"}, {}),
        ({"NumberOfStudyRelatedSeries": "2"}, {}),
    ],
)
def test_numbers_that_do_not_agree(study: dict[str, Any], series: dict[str, Any]) -> None:
    with ScriptedPacs(small_pacs(study, series)) as pacs, pytest.raises(ManifestError, match="says there are"):
        pacs.finder().read_study(STUDY)


def test_a_pacs_that_repeats_one_match_in_place_of_others() -> None:
    script = small_pacs(None, {"NumberOfSeriesRelatedInstances": "3"}, instances=1)

    def repeating(identifier: Dataset) -> list[Answer]:
        return script(identifier) * 3

    with ScriptedPacs(repeating) as pacs, pytest.raises(ManifestError, match="says there are 3 and lists 1"):
        pacs.finder().read_study(STUDY)


def test_a_study_that_is_gone() -> None:
    with ScriptedPacs(lambda _: []) as pacs, pytest.raises(ManifestError, match="has no study"):
        pacs.finder().read_study(STUDY)


def test_the_same_instance_in_two_series() -> None:
    def script(identifier: Dataset) -> list[Answer]:
        if identifier.QueryRetrieveLevel == "SERIES":
            return pending({"SeriesInstanceUID": SERIES}, {"SeriesInstanceUID": f"{STUDY}.2"})
        return small_pacs()(identifier)

    with ScriptedPacs(script) as pacs, pytest.raises(ManifestError, match="several series"):
        pacs.finder().read_study(STUDY)


@pytest.mark.parametrize(
    ("answers", "error", "text"),
    [
        ([*pending(STUDY_MATCH), (0xA700, None)], PeerBusy, "0xA700 after 1 matches: out of resources"),
        ([(0xA700, None)], PeerBusy, "0xA700 after 0 matches"),
        ([*pending(STUDY_MATCH), (0xC123, None)], PeerRefused, "0xC123 after 1 matches: unable to process"),
        ([*pending(STUDY_MATCH), (0xFE00, None)], PeerRefused, "0xFE00"),
        ([*pending(STUDY_MATCH), (0xB000, None)], PeerRefused, "0xB000"),
        ([*pending(STUDY_MATCH), "abort"], PeerProtocolError, "aborted"),
        (["abort"], PeerProtocolError, "aborted"),
        (pending({"StudyInstanceUID": "", "PatientID": "P1"}), PeerProtocolError, "no usable Study Instance UID"),
    ],
)
def test_a_list_that_does_not_end_well_is_no_list(
    answers: list[Answer | str], error: type[PeerError], text: str
) -> None:
    with ScriptedPacs(lambda _: answers) as pacs, pytest.raises(error, match=text) as caught:
        pacs.finder().find_studies(study_instance_uid=STUDY)
    assert caught.value.peer == "main"


def test_error_comment_is_passed_on() -> None:
    status = match(Status=0xC001, ErrorComment="index is being rebuilt")
    with ScriptedPacs(lambda _: [(status, None)]) as pacs, pytest.raises(PeerRefused, match="index is being rebuilt"):
        pacs.finder().find_studies(study_instance_uid=STUDY)


def test_silence() -> None:
    with (
        ScriptedPacs(lambda _: [*pending(STUDY_MATCH), "silence", "silence"]) as pacs,
        pytest.raises(PeerTimeout, match=r"nothing for 0.3 s after 1 matches"),
    ):
        pacs.finder(response_timeout=0.3).find_studies(study_instance_uid=STUDY)


def test_endless_pending() -> None:
    def script(_: Dataset) -> Any:
        return (answer for _ in range(100_000) for answer in pending(STUDY_MATCH))

    with ScriptedPacs(script) as pacs, pytest.raises(ManifestError, match="more than 20 matches"):
        pacs.finder(max_matches=20).find_studies(study_instance_uid=STUDY)


def test_pending_without_a_match() -> None:
    # pynetdicom's SCP sends such a response for an empty dataset
    with ScriptedPacs(lambda _: [(0xFF00, Dataset())]) as pacs, pytest.raises(PeerError):
        pacs.finder().find_studies(study_instance_uid=STUDY)


def test_nobody_there() -> None:
    peer = peers.Entity("PACS", peers.free_port())
    with pytest.raises(PeerError, match="no connection"):
        Finder(pacs_of(peer), "TEST").find_studies(study_instance_uid=STUDY)


# --- SOP Classes ------------------------------------------------------------------------------------------------------


def test_the_only_sop_class_of_a_study_is_that_of_its_instances() -> None:
    with ScriptedPacs(small_pacs({"SOPClassesInStudy": CT_IMAGE}, SOPClassUID=None)) as pacs:
        contents = pacs.finder().read_study(STUDY)
    assert {i.sop_class_uid for s in contents.series for i in s.instances} == {CT_IMAGE}


@pytest.mark.parametrize("classes", [None, [CT_IMAGE, "1.2.840.10008.5.1.4.1.1.7"]])
def test_sop_classes_that_cannot_be_learnt(classes: list[str] | None) -> None:
    with (
        ScriptedPacs(small_pacs({"SOPClassesInStudy": classes}, SOPClassUID=None)) as pacs,
        pytest.raises(PeerRefused, match="tells no SOP Classes"),
    ):
        pacs.finder().read_study(STUDY)


# --- Real ones --------------------------------------------------------------------------------------------------------


@contextmanager
def filled(peer: Any, studies: Sequence[images.Study]) -> Iterator[Finder]:
    with peer:
        for study in studies:
            peer.upload(study.paths)
        yield Finder(pacs_of(peer), "TEST")


def check(finder: Finder, study: images.Study) -> None:
    contents = finder.read_study(study.uid)
    found = {
        (s.facts.series_instance_uid, i.sop_instance_uid, i.sop_class_uid) for s in contents.series for i in s.instances
    }
    assert found == {(i.series, i.uid, i.sop_class) for i in study.instances}
    assert contents.number_of_instances == len(study.instances)
    patient = contents.facts.patient
    assert (patient.id, patient.name, patient.birth_date, patient.sex) == (
        study.patient_id,
        "Test^Synthetic",
        "19700101",
        "O",
    )


@pytest.mark.peer
@pytest.mark.slow
def test_qrscp(tmp_path: Path) -> None:
    """qrscp answers once for each instance at every level, and tells no SOP Classes."""
    patient = images.new_patient()
    studies = [
        images.dicomdir_series(tmp_path / "series", patient_id=patient),
        images.compressed(tmp_path / "compressed", patient_id=patient),
        images.structured_report(tmp_path / "sr", patient_id=patient),
        images.ct(tmp_path / "other"),
    ]
    with filled(peers.Qrscp(tmp_path / "pacs"), studies) as finder:
        assert {s.study_instance_uid for s in finder.find_studies(patient_id=patient)} == {s.uid for s in studies[:3]}
        for study in studies:
            check(finder, study)


@pytest.mark.peer
@pytest.mark.slow
def test_orthanc(tmp_path: Path) -> None:
    studies = [
        images.dicomdir_series(tmp_path / "series"),
        images.compressed(tmp_path / "compressed"),
        images.structured_report(tmp_path / "sr"),
        images.private_class(tmp_path / "private"),
    ]
    with filled(peers.Orthanc(tmp_path / "pacs"), studies) as finder:
        for study in studies:
            check(finder, study)
        (facts,) = finder.find_studies(patient_id=studies[0].patient_id)
        assert facts.patient.issuer_oid == images.AUTHORITY
        assert facts.number_of_instances == len(studies[0].instances)


@pytest.mark.peer
def test_dcmqrscp(tmp_path: Path) -> None:
    """DCMTK's image server tells no SOP Classes, and no numbers."""
    studies = [images.ct(tmp_path / "ct"), images.mr(tmp_path / "mr")]
    with filled(peers.Dcmqrscp(tmp_path / "pacs"), studies) as finder:
        for study in studies:
            check(finder, study)


@pytest.mark.peer
@pytest.mark.parametrize(
    ("name", "count", "modality", "region"), [("ids_single", 1, "US", ""), ("ids_pet", 10, "PT", "LUNG")]
)
def test_conformance_studies(tmp_path: Path, name: str, count: int, modality: str, region: str) -> None:
    files = sorted(shared_path(f"conformance/data/dicom/{name}").glob("*.dcm"))
    with peers.Orthanc(tmp_path / "pacs") as pacs:
        pacs.upload(files)
        finder = Finder(pacs_of(pacs), "TEST")
        (study,) = finder.find_studies()
        contents = finder.read_study(study.study_instance_uid)
    (series,) = contents.series
    assert (len(series.instances), series.facts.modality, series.facts.body_part_examined) == (count, modality, region)
