"""What a PACS says about a study: frozen values, as they stand in the images, and how they are read from datasets.

Dates, times and names keep their DICOM form (DA, TM, PN): the manifest repeats them unchanged, and only the mapping to
document metadata turns them into HL7 forms.

References
----------
* DICOM PS3.4, C.6.2.1 (study root: which attributes a study, series and image have in a query)
* DICOM PS3.3, C.7.1.1 (Patient), C.7.2.1 (General Study), C.7.3.1 (General Series)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, fields, replace
from typing import TypeVar

from xca_imaging.imaging.attributes import Attributes
from xca_imaging.metadata.model import Code
from xca_imaging.uids import is_uid


@dataclass(frozen=True, slots=True, kw_only=True)
class Patient:
    """The patient as the department knows them."""

    id: str = ""
    issuer: str = ""
    """Issuer of Patient ID (0010,0021): a local name, now and then an OID."""
    issuer_oid: str = ""
    """Universal Entity ID of (0010,0024) where its type is ISO."""
    name: str = ""
    birth_date: str = ""
    sex: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagingRequest:
    """One imaging service request that the study answers: an item of (0040,A370) or (0040,0275)."""

    accession_number: str = ""
    accession_issuer: str = ""
    """OID of the issuer of the accession number (0008,0051)."""
    placer_order_number: str = ""
    placer_issuer: str = ""
    """OID of the order placer (0040,0026)."""
    filler_order_number: str = ""
    requested_procedure_id: str = ""
    requested_procedure_description: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyFacts:
    """A study. `codes` carry the coding scheme designator (0008,0102) as their scheme."""

    study_instance_uid: str
    patient: Patient
    date: str = ""
    time: str = ""
    timezone_offset: str = ""
    """(0008,0201), `&ZZXX`: the zone of all dates and times here; empty = unknown."""
    description: str = ""
    id: str = ""
    accession_number: str = ""
    accession_issuer: str = ""
    referring_physician: str = ""
    procedure_codes: tuple[Code, ...] = ()
    modalities: tuple[str, ...] = ()
    sop_class_uids: tuple[str, ...] = ()
    """SOP Classes in Study (0008,0062), where the PACS tells."""
    number_of_series: int | None = None
    number_of_instances: int | None = None

    @property
    def day(self) -> str:
        """The Study Date as YYYYMMDD; ACR-NEMA wrote YYYY.MM.DD."""
        return self.date.replace(".", "")


@dataclass(frozen=True, slots=True, kw_only=True)
class SeriesFacts:
    """A series."""

    series_instance_uid: str
    modality: str = ""
    number: str = ""
    description: str = ""
    body_part_examined: str = ""
    anatomic_regions: tuple[Code, ...] = ()
    institution_name: str = ""
    requests: tuple[ImagingRequest, ...] = ()
    number_of_instances: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceFacts:
    """An instance. `sop_class_uid` is empty where the PACS does not tell."""

    sop_instance_uid: str
    sop_class_uid: str = ""
    number: str = ""


@dataclass(frozen=True, slots=True)
class SeriesContents:
    """A series with all its instances."""

    facts: SeriesFacts
    instances: tuple[InstanceFacts, ...]


@dataclass(frozen=True, slots=True)
class StudyContents:
    """A study with all its series and instances, read in one go."""

    facts: StudyFacts
    series: tuple[SeriesContents, ...]

    @property
    def number_of_instances(self) -> int:
        return sum(len(series.instances) for series in self.series)

    def without(self, sop_instance_uids: Collection[str]) -> StudyContents:
        """Return the study as if it had never had these instances; a series that loses all of them is empty."""
        return replace(
            self,
            series=tuple(
                replace(
                    series,
                    instances=tuple(
                        each for each in series.instances if each.sop_instance_uid not in sop_instance_uids
                    ),
                )
                for series in self.series
            ),
        )

    @property
    def requests(self) -> tuple[ImagingRequest, ...]:
        """Every request found, once: those of the series, and the study's own accession number.

        An accession number without more is left out where a request that says more has the same one.
        """
        found = dict.fromkeys(request for series in self.series for request in series.facts.requests)
        own = self.facts.accession_number
        if own and own not in {request.accession_number for request in found}:
            found[ImagingRequest(accession_number=own, accession_issuer=self.facts.accession_issuer)] = None
        return tuple(found)


# --------------------------------------------------------------------------------------------------------------------
# Signatures: whether a study has changed, told from what its PACS says without listing its instances
# --------------------------------------------------------------------------------------------------------------------


def study_signature(study: StudyFacts) -> str:
    """Return a digest of everything that a PACS says of a study at study level, whatever the order of lists."""
    ordered = replace(
        study, modalities=tuple(sorted(study.modalities)), sop_class_uids=tuple(sorted(study.sop_class_uids))
    )
    return _digest(asdict(ordered))


NO_NUMBERS = "?"
"""How the signature of series begins whose numbers of instances the PACS does not tell: they may grow unseen."""


def series_signature(series: Iterable[SeriesFacts]) -> str:
    """Return a digest of which series there are and how many instances the PACS says each has."""
    numbers = {each.series_instance_uid: each.number_of_instances for each in series}
    return (NO_NUMBERS if None in numbers.values() else "") + _digest(numbers)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# --------------------------------------------------------------------------------------------------------------------
# Reading: the same attributes, whether they stand in a query match, in an image or in a manifest
# --------------------------------------------------------------------------------------------------------------------


def read_study(ds: Attributes) -> StudyFacts:
    """Read the study of a query match or of an image."""
    return StudyFacts(
        study_instance_uid=ds.text("StudyInstanceUID"),
        patient=read_patient(ds),
        date=ds.text("StudyDate"),
        time=ds.text("StudyTime"),
        timezone_offset=ds.text("TimezoneOffsetFromUTC"),
        description=ds.text("StudyDescription"),
        id=ds.text("StudyID"),
        accession_number=ds.text("AccessionNumber"),
        accession_issuer=read_entity(ds, "IssuerOfAccessionNumberSequence"),
        referring_physician=ds.text("ReferringPhysicianName"),
        procedure_codes=read_codes(ds, "ProcedureCodeSequence"),
        modalities=tuple(filter(None, ds.values("ModalitiesInStudy"))),
        sop_class_uids=tuple(filter(is_uid, ds.values("SOPClassesInStudy"))),
        number_of_series=ds.number("NumberOfStudyRelatedSeries"),
        number_of_instances=ds.number("NumberOfStudyRelatedInstances"),
    )


def read_series(ds: Attributes) -> SeriesFacts:
    """Read the series of a query match or of an image."""
    return SeriesFacts(
        series_instance_uid=ds.text("SeriesInstanceUID"),
        modality=ds.text("Modality"),
        number=ds.text("SeriesNumber"),
        description=ds.text("SeriesDescription"),
        body_part_examined=ds.text("BodyPartExamined"),
        anatomic_regions=read_codes(ds, "AnatomicRegionSequence"),
        institution_name=ds.text("InstitutionName"),
        requests=read_requests(ds, "RequestAttributesSequence"),
        number_of_instances=ds.number("NumberOfSeriesRelatedInstances"),
    )


def read_instance(ds: Attributes) -> InstanceFacts:
    """Read the instance of a query match."""
    return InstanceFacts(
        sop_instance_uid=ds.text("SOPInstanceUID"),
        sop_class_uid=ds.text("SOPClassUID"),
        number=ds.text("InstanceNumber"),
    )


def read_patient(ds: Attributes) -> Patient:
    """Read the patient of an image, a manifest or a query match."""
    issuer = ds.text("IssuerOfPatientID")
    return Patient(
        id=ds.text("PatientID"),
        issuer=issuer,
        issuer_oid=read_entity(ds, "IssuerOfPatientIDQualifiersSequence"),
        name=ds.text("PatientName"),
        birth_date=ds.text("PatientBirthDate"),
        sex=ds.text("PatientSex"),
    )


def read_requests(ds: Attributes, keyword: str) -> tuple[ImagingRequest, ...]:
    """Read (0040,A370) or (0040,0275), without the items that say nothing."""
    found = (read_request(item) for item in ds.items(keyword))
    return tuple(dict.fromkeys(request for request in found if request != ImagingRequest()))


def read_request(item: Attributes) -> ImagingRequest:
    """Read one item of such a sequence."""
    return ImagingRequest(
        accession_number=item.text("AccessionNumber"),
        accession_issuer=read_entity(item, "IssuerOfAccessionNumberSequence"),
        placer_order_number=item.text("PlacerOrderNumberImagingServiceRequest"),
        placer_issuer=read_entity(item, "OrderPlacerIdentifierSequence"),
        filler_order_number=item.text("FillerOrderNumberImagingServiceRequest"),
        requested_procedure_id=item.text("RequestedProcedureID"),
        requested_procedure_description=item.text("RequestedProcedureDescription"),
    )


def read_codes(ds: Attributes, keyword: str) -> tuple[Code, ...]:
    """Read a code sequence (PS3.3 8.8); the scheme is the designator (0008,0102). Incomplete codes are left out."""
    found = []
    for item in ds.items(keyword):
        value = item.text("CodeValue") or item.text("LongCodeValue") or item.text("URNCodeValue")
        scheme = item.text("CodingSchemeDesignator")
        if value and scheme:
            found.append(Code(value, scheme, item.text("CodeMeaning")))
    return tuple(dict.fromkeys(found))


def read_entity(ds: Attributes, keyword: str) -> str:
    """Return the OID of a Hierarchic Designator sequence (PS3.3 10.14), empty where it names none."""
    item = ds.first(keyword)
    oid = item.text("UniversalEntityID")
    return oid if item.text("UniversalEntityIDType") == "ISO" and is_uid(oid) else ""


_Facts = TypeVar("_Facts", Patient, StudyFacts, SeriesFacts)


def completed(facts: _Facts, more: _Facts) -> _Facts:
    """Return facts with what they leave empty taken from others about the same thing."""
    filled = {}
    for field in fields(facts):
        value, other = getattr(facts, field.name), getattr(more, field.name)
        if isinstance(value, Patient):
            filled[field.name] = completed(value, other)
        elif value in ("", None, ()):
            filled[field.name] = other
    return replace(facts, **filled)
