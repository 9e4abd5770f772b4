"""Key Object Selection manifests: built from what a PACS says about a study, and read from anywhere.

The writer is strict (TID 2010, every instance both in the evidence and in the content tree); the reader takes what it
needs from what it gets, and refuses only what would make a wrong or short list of instances.

References
----------
* DICOM PS3.3, A.35.4 (Key Object Selection Document IOD), C.17.6 (Key Object Document Series, Key Object Document)
* DICOM PS3.3, C.17.2.1 (Hierarchical SOP Instance Reference macro), Table C.17-3b (its series items)
* DICOM PS3.16, TID 2010 (Key Object Selection), CID 7010 and 7011 (document titles)
* IHE RAD TF-2, 4.68.4.1.2 (the manifest of XDS-I.b); IHE RAD supplement MADO, 6.X.2
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import TypeVar

from pydicom import config, dcmread
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filewriter import dcmwrite
from pydicom.sequence import Sequence
from pydicom.tag import BaseTag, Tag
from pydicom.uid import UID

from xca_imaging import uids
from xca_imaging.errors import ManifestError
from xca_imaging.imaging.attributes import Attributes
from xca_imaging.imaging.study import (
    ImagingRequest,
    Patient,
    StudyContents,
    read_entity,
    read_patient,
    read_requests,
)
from xca_imaging.metadata.model import Code

Read = TypeVar("Read")

TITLE_MANIFEST = Code("113030", "DCM", "Manifest")  # PS3.16 CID 7010

REJECTION_NOTES = {  # PS3.16 CID 7010 and 7011: instances to hide, the opposite of a manifest
    ("113001", "DCM"): "Rejected for Quality Reasons",
    ("113037", "DCM"): "Rejected for Patient Safety Reasons",
    ("113038", "DCM"): "Incorrect Modality Worklist Entry",
    ("113039", "DCM"): "Data Retention Policy Expired",
}

MAX_BYTES = 32 * 10**6
"""Of a manifest: what a SOAP message may carry by default, and more than `MAX_ITEMS` need."""
MAX_ITEMS = 200_000
"""Sequence items: a manifest has three an instance, one with description about ten, and the largest studies 20 000
instances. Each costs 1.7 kB of memory and 35 us to read, so a small file of empty items could take gigabytes."""

_MAX_DEPTH = 32
"""Of a rejection note's content tree; TID 2010 has one level."""

_DEFLATED = b"1.2.840.10008.1.2.1.99"  # PS3.5 A.5, Deflated Explicit VR Little Endian
_ITEM_TAGS = (b"\xfe\xff\x00\xe0", b"\xff\xfe\xe0\x00")  # PS3.5 7.5.1 (FFFE,E000), little and big endian
_META_LENGTH_END = 144  # preamble 128, "DICM" 4, (0002,0000) UL with its value 12

# Storage classes of images whose names do not say so (PS3.3 A.51, A.75): pixels that a viewer shows.
_MORE_IMAGES = {"Segmentation Storage", "Parametric Map Storage"}


@dataclass(frozen=True, slots=True)
class InstanceReference:
    """An item of the Referenced SOP Sequence (0008,1199)."""

    sop_class_uid: str
    sop_instance_uid: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SeriesReference:
    """An item of the Referenced Series Sequence (0008,1115): where its instances are to be had, and which they are."""

    series_instance_uid: str
    instances: tuple[InstanceReference, ...]
    retrieve_ae_title: str = ""
    retrieve_location_uid: str = ""
    """(0040,E011): the RepositoryUniqueId of a RAD-69 request. Empty in manifests of old sources."""
    retrieve_url: str = ""


@dataclass(frozen=True, slots=True)
class StudyReference:
    """An item of the Current Requested Procedure Evidence Sequence (0040,A375)."""

    study_instance_uid: str
    series: tuple[SeriesReference, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A Key Object Selection document: what it references, and of whom. Dates and times in their DICOM form."""

    sop_instance_uid: str
    series_instance_uid: str
    study_instance_uid: str
    title: Code
    studies: tuple[StudyReference, ...]
    patient: Patient
    content_date: str = ""
    content_time: str = ""
    timezone_offset: str = ""
    study_date: str = ""
    study_time: str = ""
    study_id: str = ""
    study_description: str = ""
    accession_number: str = ""
    accession_issuer: str = ""
    referring_physician: str = ""
    requests: tuple[ImagingRequest, ...] = ()
    warnings: tuple[str, ...] = ()
    """What the reader put up with, in words for a person; without patient data."""

    @property
    def number_of_instances(self) -> int:
        return sum(len(series.instances) for study in self.studies for series in study.series)

    def instances(self) -> Iterator[tuple[StudyReference, SeriesReference, InstanceReference]]:
        """Every reference with its series and study."""
        for study in self.studies:
            for series in study.series:
                for instance in series.instances:
                    yield study, series, instance

    def same_content(self, other: Manifest) -> bool:
        """Tell whether both say the same, whatever they are called, when they were made and in which order."""
        return _unordered(self) == _unordered(other)


@dataclass(frozen=True, slots=True)
class Rejection:
    """A rejection note (IHE Imaging Object Change Management): instances that an archive keeps and nobody is to see."""

    sop_instance_uid: str
    reason: str
    """Its title, in words."""
    sop_instance_uids: frozenset[str]
    """What it rejects, of whatever study."""


def _unordered(manifest: Manifest) -> tuple[Manifest, frozenset[tuple[str, ...]], frozenset[ImagingRequest]]:
    said = replace(
        manifest,
        sop_instance_uid="",
        series_instance_uid="",
        content_date="",
        content_time="",
        studies=(),
        requests=(),
        warnings=(),
    )
    references = frozenset(
        (
            study.study_instance_uid,
            series.series_instance_uid,
            series.retrieve_ae_title,
            series.retrieve_location_uid,
            series.retrieve_url,
            instance.sop_class_uid,
            instance.sop_instance_uid,
        )
        for study, series, instance in manifest.instances()
    )
    return said, references, frozenset(manifest.requests)


# --------------------------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------------------------


def build(
    contents: StudyContents,
    *,
    retrieve_ae_title: str,
    retrieve_location_uid: str,
    now: datetime,
    uid_factory: Callable[[], str],
) -> bytes:
    """Return the manifest of a study as a Part 10 file, Explicit VR Little Endian.

    Patient and study attributes are those of the images, unchanged; the text is UTF-8 where ASCII does not do.

    Parameters
    ----------
    now : datetime
        When the manifest is made, in the zone that the study's own times are in (they are all read in one zone).
    uid_factory : callable
        Gives a new UID for the instance, and one for its series: never one of those referenced.

    Raises
    ------
    ManifestError
        The study has no instances, or one of them has no SOP Class.
    """
    study = contents.facts
    uid = study.study_instance_uid
    referenced = [series for series in contents.series if series.instances]
    if not referenced:
        raise ManifestError(f"study {uid} has no instances: there is nothing to publish")
    for series in referenced:
        for instance in series.instances:
            if not instance.sop_class_uid:
                raise ManifestError(
                    f"study {uid}: the PACS does not tell the SOP Class (0008,0016) of instance "
                    f"{instance.sop_instance_uid} and {len(series.instances) - 1} others of its series; "
                    "a manifest must name it"
                )

    ds = Dataset()
    _set(ds, "SOPClassUID", uids.KOS_SOP_CLASS)
    _set(ds, "SOPInstanceUID", uid_factory())
    _set(ds, "SeriesInstanceUID", uid_factory())
    _set(ds, "StudyInstanceUID", uid)
    _set(ds, "Modality", "KO")
    _set(ds, "SeriesNumber", "1")
    _set(ds, "InstanceNumber", "1")
    _set(ds, "Manufacturer", "xca-imaging")
    _set(ds, "ContentDate", now.strftime("%Y%m%d"))
    _set(ds, "ContentTime", now.strftime("%H%M%S.%f"))
    _set(ds, "StudyDate", study.date)
    _set(ds, "StudyTime", study.time)
    _set(ds, "StudyID", study.id)
    _set(ds, "AccessionNumber", study.accession_number)
    _set(ds, "ReferringPhysicianName", study.referring_physician)
    _set(ds, "PatientName", study.patient.name)
    _set(ds, "PatientID", study.patient.id)
    _set(ds, "PatientBirthDate", study.patient.birth_date)
    _set(ds, "PatientSex", study.patient.sex)
    _set_known(ds, "StudyDescription", study.description)
    _set_known(ds, "TimezoneOffsetFromUTC", study.timezone_offset)
    _set_known(ds, "IssuerOfPatientID", study.patient.issuer)
    if study.patient.issuer_oid:
        _set(ds, "IssuerOfPatientIDQualifiersSequence", [_entity(study.patient.issuer_oid)])
    if study.accession_issuer:
        _set(ds, "IssuerOfAccessionNumberSequence", [_entity(study.accession_issuer)])
    _set(ds, "ReferencedPerformedProcedureStepSequence", [])  # type 2: which steps made the images is not known here
    requests = contents.requests
    if requests:
        _set(ds, "ReferencedRequestSequence", [_request(request, uid) for request in requests])

    _set(ds, "ValueType", "CONTAINER")
    _set(ds, "ContinuityOfContent", "SEPARATE")
    _set(ds, "ConceptNameCodeSequence", [_code(TITLE_MANIFEST)])
    template = Dataset()
    _set(template, "MappingResource", "DCMR")
    _set(template, "TemplateIdentifier", "2010")
    _set(ds, "ContentTemplateSequence", [template])

    evidence: list[Dataset] = []
    content: list[Dataset] = []
    for series in referenced:
        series_item = Dataset()
        _set(series_item, "RetrieveAETitle", retrieve_ae_title)
        _set(series_item, "SeriesInstanceUID", series.facts.series_instance_uid)
        _set(series_item, "RetrieveLocationUID", retrieve_location_uid)
        sops = [_reference(instance.sop_class_uid, instance.sop_instance_uid) for instance in series.instances]
        _set(series_item, "ReferencedSOPSequence", sops)
        evidence.append(series_item)
        for instance in series.instances:
            item = Dataset()
            _set(item, "RelationshipType", "CONTAINS")
            _set(item, "ValueType", value_type(instance.sop_class_uid))
            sop = _reference(instance.sop_class_uid, instance.sop_instance_uid)
            _set(item, "ReferencedSOPSequence", [sop])
            content.append(item)
    study_item = Dataset()
    _set(study_item, "StudyInstanceUID", uid)
    _set(study_item, "ReferencedSeriesSequence", evidence)
    _set(ds, "CurrentRequestedProcedureEvidenceSequence", [study_item])
    _set(ds, "ContentSequence", content)

    texts = [study.patient.name, study.patient.id, study.patient.issuer, study.description, study.id]
    texts += [study.accession_number, study.referring_physician]
    for request in requests:
        texts += [request.accession_number, request.placer_order_number, request.filler_order_number]
        texts += [request.requested_procedure_id, request.requested_procedure_description]
    if not all(map(str.isascii, texts)):
        _set(ds, "SpecificCharacterSet", "ISO_IR 192")

    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID = UID(uids.KOS_SOP_CLASS)
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    ds.file_meta.TransferSyntaxUID = UID(uids.EXPLICIT_VR_LITTLE_ENDIAN)
    ds.file_meta.ImplementationClassUID = UID(uids.IMPLEMENTATION_CLASS_UID)
    ds.file_meta.ImplementationVersionName = uids.IMPLEMENTATION_VERSION_NAME
    target = io.BytesIO()
    dcmwrite(target, ds, enforce_file_format=True)
    return target.getvalue()


@cache
def value_type(sop_class_uid: str) -> str:
    """Return the value type of a content item that references an instance of this class (TID 2010 rows 7 to 9).

    Told from the name of the class in PS3.6; a class that is not there is COMPOSITE, which fits everything.
    """
    name = UID(sop_class_uid, validation_mode=config.IGNORE).name.removesuffix(" (Retired)")
    if "Presentation State" in name:
        return "COMPOSITE"
    if "Waveform Storage" in name:
        return "WAVEFORM"
    return "IMAGE" if "Image Storage" in name or name in _MORE_IMAGES else "COMPOSITE"


def _set(ds: Dataset, keyword: str, value: str | list[Dataset]) -> None:
    """Add an element as it is: departmental values stay unchanged, also those that break their VR's rules."""
    tag, vr = _attribute(keyword)
    content = Sequence(value) if isinstance(value, list) else value
    ds.add(DataElement(tag, vr, content, validation_mode=config.IGNORE))


@cache
def _attribute(keyword: str) -> tuple[BaseTag, str]:
    tag = tag_for_keyword(keyword)
    assert tag is not None
    return Tag(tag), dictionary_VR(tag)


def _set_known(ds: Dataset, keyword: str, value: str) -> None:
    if value:
        _set(ds, keyword, value)


def _reference(sop_class_uid: str, sop_instance_uid: str) -> Dataset:
    item = Dataset()
    _set(item, "ReferencedSOPClassUID", sop_class_uid)
    _set(item, "ReferencedSOPInstanceUID", sop_instance_uid)
    return item


def _code(code: Code) -> Dataset:
    item = Dataset()
    _set(item, "CodeValue", code.code)
    _set(item, "CodingSchemeDesignator", code.scheme)
    _set(item, "CodeMeaning", code.display)
    return item


def _entity(oid: str) -> Dataset:
    """An item of the HL7v2 Hierarchic Designator macro (PS3.3 10.14)."""
    item = Dataset()
    _set(item, "UniversalEntityID", oid)
    _set(item, "UniversalEntityIDType", "ISO")
    return item


def _request(request: ImagingRequest, study_instance_uid: str) -> Dataset:
    """An item of the Referenced Request Sequence (PS3.3 Table C.17-2); the empty elements are of type 2."""
    item = Dataset()
    _set(item, "StudyInstanceUID", study_instance_uid)
    _set(item, "ReferencedStudySequence", [])
    _set(item, "AccessionNumber", request.accession_number)
    if request.accession_issuer:
        _set(item, "IssuerOfAccessionNumberSequence", [_entity(request.accession_issuer)])
    _set(item, "PlacerOrderNumberImagingServiceRequest", request.placer_order_number)
    if request.placer_issuer:
        _set(item, "OrderPlacerIdentifierSequence", [_entity(request.placer_issuer)])
    _set(item, "FillerOrderNumberImagingServiceRequest", request.filler_order_number)
    _set(item, "RequestedProcedureID", request.requested_procedure_id)
    _set(item, "RequestedProcedureDescription", request.requested_procedure_description)
    _set(item, "RequestedProcedureCodeSequence", [])
    return item


# --------------------------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------------------------


def read(source: bytes | Path, *, max_bytes: int = MAX_BYTES, max_items: int = MAX_ITEMS) -> Manifest:
    """Read a manifest: XDS-I.b or MADO, of one study or of several, with or without Retrieve Location UIDs.

    Raises
    ------
    ManifestError
        Not DICOM, not a Key Object Selection, a rejection note, over a limit, or an instance that cannot be named.
    """
    return _read(source, _manifest, max_bytes, max_items)


def read_rejection(source: bytes | Path, *, max_bytes: int = MAX_BYTES, max_items: int = MAX_ITEMS) -> Rejection | None:
    """Read a rejection note; return None for a Key Object Selection document of any other title.

    What the note names anywhere is rejected, in its evidence or in its content tree: one that names an instance in
    one of the two only is wrong in form, but not in what it wants hidden.

    Raises
    ------
    ManifestError
        Not DICOM, not a Key Object Selection, over a limit, or a note that does not say what it rejects.
    """
    return _read(source, _rejection, max_bytes, max_items)


def _read(source: bytes | Path, understand: Callable[[Attributes], Read], max_bytes: int, max_items: int) -> Read:
    """Read a dataset, bounded, and make of it what `understand` does."""
    if isinstance(source, Path):
        try:
            with source.open("rb") as stream:
                data = stream.read(max_bytes + 1)
        except OSError as exc:
            raise ManifestError(f"manifest {source} cannot be read: {exc.strerror}") from exc
    else:
        data = source
    if len(data) > max_bytes:
        raise ManifestError(f"a manifest of more than {max_bytes} bytes is not read")
    data = _inflated(data, max_bytes)
    if sum(data.count(tag) for tag in _ITEM_TAGS) > max_items:
        raise ManifestError(f"a manifest of more than {max_items} sequence items is not read")
    try:
        return understand(Attributes(dcmread(io.BytesIO(data), force=True)))
    except ManifestError:
        raise
    except Exception as exc:
        # What pydicom raises for bytes that are no dataset is not specified: EOFError, KeyError, RecursionError, ...
        raise ManifestError(f"the manifest is not a readable DICOM dataset: {type(exc).__name__}: {exc}") from exc


def _inflated(data: bytes, max_bytes: int) -> bytes:
    """Return the file with its dataset inflated, where it is deflated: pydicom would do that without a limit."""
    length = int.from_bytes(data[_META_LENGTH_END - 4 : _META_LENGTH_END], "little")
    start = _META_LENGTH_END + length
    at = data.find(_DEFLATED, 0, min(start, len(data)))
    if at < 0 or data[128:132] != b"DICM":
        return data
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        dataset = inflater.decompress(data[start:], max_bytes)
    except zlib.error as exc:
        raise ManifestError(f"the manifest's deflated dataset cannot be inflated: {exc}") from exc
    if not inflater.eof:
        raise ManifestError(f"the manifest's deflated dataset is cut off, or of more than {max_bytes} bytes")
    explicit = uids.EXPLICIT_VR_LITTLE_ENDIAN.encode().ljust(len(_DEFLATED), b"\0")
    return data[:at] + explicit + data[at + len(_DEFLATED) : start] + dataset


def _manifest(ds: Attributes) -> Manifest:
    title = _title(ds)
    warnings: list[str] = []
    if (title.code, title.scheme) in REJECTION_NOTES:
        reason = REJECTION_NOTES[title.code, title.scheme]
        raise ManifestError(f"a rejection note ({reason}) is not a manifest")
    if not title.code:
        warnings.append("the document has no title (0040,A043)")
    studies = _studies(ds, warnings)
    return Manifest(
        sop_instance_uid=_uid(ds, "SOPInstanceUID", "the manifest"),
        series_instance_uid=ds.text("SeriesInstanceUID"),
        study_instance_uid=ds.text("StudyInstanceUID") or studies[0].study_instance_uid,
        title=title,
        studies=studies,
        content_date=ds.text("ContentDate"),
        content_time=ds.text("ContentTime"),
        timezone_offset=ds.text("TimezoneOffsetFromUTC"),
        patient=read_patient(ds),
        study_date=ds.text("StudyDate"),
        study_time=ds.text("StudyTime"),
        study_id=ds.text("StudyID"),
        study_description=ds.text("StudyDescription"),
        accession_number=ds.text("AccessionNumber"),
        accession_issuer=read_entity(ds, "IssuerOfAccessionNumberSequence"),
        referring_physician=ds.text("ReferringPhysicianName"),
        requests=read_requests(ds, "ReferencedRequestSequence"),
        warnings=tuple(warnings),
    )


def _title(ds: Attributes) -> Code:
    sop_class = ds.text("SOPClassUID")
    if sop_class != uids.KOS_SOP_CLASS:
        raise ManifestError(f"not a Key Object Selection document: its SOP Class is {sop_class or 'missing'!r}")
    name = ds.first("ConceptNameCodeSequence")
    return Code(name.text("CodeValue"), name.text("CodingSchemeDesignator"), name.text("CodeMeaning"))


def _rejection(ds: Attributes) -> Rejection | None:
    title = _title(ds)
    reason = REJECTION_NOTES.get((title.code, title.scheme))
    if reason is None:
        return None
    uid = _uid(ds, "SOPInstanceUID", "the rejection note")
    where = f"rejection note {uid}"
    found = {
        _uid(sop, "ReferencedSOPInstanceUID", where)
        for study in ds.items("CurrentRequestedProcedureEvidenceSequence")
        for series in study.items("ReferencedSeriesSequence")
        for sop in series.items("ReferencedSOPSequence")
    }
    level = [ds]
    for _ in range(_MAX_DEPTH):
        level = [item for parent in level for item in parent.items("ContentSequence")]
        found.update(
            _uid(sop, "ReferencedSOPInstanceUID", where)
            for item in level
            for sop in item.items("ReferencedSOPSequence")
        )
    if level:
        raise ManifestError(f"{where}: its content tree is deeper than {_MAX_DEPTH} levels")
    if not found:
        raise ManifestError(f"{where} does not say what it rejects")
    return Rejection(uid, reason, frozenset(found))


def _studies(ds: Attributes, warnings: list[str]) -> tuple[StudyReference, ...]:
    """Read the evidence. Items of the same study, or of the same series and location, are one."""
    studies: dict[str, dict[tuple[str, ...], dict[InstanceReference, None]]] = {}
    for study_item in ds.items("CurrentRequestedProcedureEvidenceSequence"):
        study_uid = _uid(study_item, "StudyInstanceUID", "a study item of the evidence")
        all_series = studies.setdefault(study_uid, {})
        for series_item in study_item.items("ReferencedSeriesSequence"):
            series_uid = _uid(series_item, "SeriesInstanceUID", f"a series item of study {study_uid}")
            key = (
                series_uid,
                series_item.text("RetrieveAETitle"),
                series_item.text("RetrieveLocationUID"),
                series_item.text("RetrieveURL") or study_item.text("RetrieveURL"),
            )
            if not key[2]:
                warnings.append(f"series {series_uid} has no Retrieve Location UID (0040,E011)")
            instances = all_series.setdefault(key, {})
            for sop_item in series_item.items("ReferencedSOPSequence"):
                sop_uid = _uid(sop_item, "ReferencedSOPInstanceUID", f"an instance item of series {series_uid}")
                instances[InstanceReference(sop_item.text("ReferencedSOPClassUID"), sop_uid)] = None
    found = tuple(
        StudyReference(
            study_uid,
            tuple(
                SeriesReference(
                    series_instance_uid=series_uid,
                    instances=tuple(instances),
                    retrieve_ae_title=ae_title,
                    retrieve_location_uid=location,
                    retrieve_url=url,
                )
                for (series_uid, ae_title, location, url), instances in all_series.items()
            ),
        )
        for study_uid, all_series in studies.items()
    )
    if not any(series.instances for study in found for series in study.series):
        raise ManifestError("the manifest references no instances: (0040,A375) is missing or empty")
    return found


def _uid(ds: Attributes, keyword: str, where: str) -> str:
    value = ds.text(keyword)
    if not uids.is_uid(value):
        # Leaving the item out would make a short list that looks complete.
        raise ManifestError(f"{where} has no usable {keyword}: {value!r}" if value else f"{where} has no {keyword}")
    return value
