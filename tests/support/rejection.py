"""Rejection notes as an archive or a workstation writes them, made with pydicom alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
KEY_OBJECT = "1.2.840.10008.5.1.4.1.1.88.59"


def note(
    study: str,
    series: Mapping[str, Iterable[str]],
    *,
    code: str = "113001",
    patient_id: str = "DEPT-1",
    sop_class: str = CT_IMAGE,
) -> Dataset:
    """Return a Key Object Selection (TID 2010) of that title that names instances by series."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = KEY_OBJECT
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid(None)
    ds.StudyInstanceUID, ds.SeriesInstanceUID = study, generate_uid(None)
    ds.PatientID, ds.PatientName, ds.PatientBirthDate, ds.PatientSex = patient_id, "Test^Rejection", "", ""
    ds.StudyDate = ds.StudyTime = ds.AccessionNumber = ds.ReferringPhysicianName = ds.StudyID = ""
    ds.Modality, ds.SeriesNumber, ds.InstanceNumber, ds.Manufacturer = "KO", "900", "1", "test"
    ds.ContentDate, ds.ContentTime = "20260304", "050607"
    ds.ReferencedPerformedProcedureStepSequence = []
    ds.ValueType, ds.ContinuityOfContent = "CONTAINER", "SEPARATE"
    title = Dataset()
    title.CodeValue, title.CodingSchemeDesignator, title.CodeMeaning = code, "DCM", "title"
    ds.ConceptNameCodeSequence = [title]
    evidence, content = [], []
    for series_uid, instances in series.items():
        sops = []
        for uid in instances:
            sop = Dataset()
            sop.ReferencedSOPClassUID, sop.ReferencedSOPInstanceUID = sop_class, uid
            sops.append(sop)
            item = Dataset()
            item.RelationshipType, item.ValueType, item.ReferencedSOPSequence = "CONTAINS", "IMAGE", [sop]
            content.append(item)
        referenced = Dataset()
        referenced.SeriesInstanceUID, referenced.ReferencedSOPSequence = series_uid, sops
        evidence.append(referenced)
    study_item = Dataset()
    study_item.StudyInstanceUID, study_item.ReferencedSeriesSequence = study, evidence
    ds.CurrentRequestedProcedureEvidenceSequence = [study_item]
    ds.ContentSequence = content
    return ds


def write(ds: Dataset, folder: Path) -> Path:
    """Write a note as a file and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{ds.SOPInstanceUID}.dcm"
    ds.save_as(file, enforce_file_format=True)
    return file
