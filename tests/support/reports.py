"""Encapsulated documents as a reporting system writes them, made with pydicom alone."""

from __future__ import annotations

import io

from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

PDF_CLASS, CDA_CLASS = "1.2.840.10008.5.1.4.1.1.104.1", "1.2.840.10008.5.1.4.1.1.104.2"

PDF = (
    b"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj 2 0 obj<</Type/Pages/Kids[]/Count 0>>endobj\n"
    b"trailer<</Root 1 0 R>>\n%%EOF\n"
)
CDA = (
    b'<?xml version="1.0" encoding="UTF-8"?>\n<ClinicalDocument xmlns="urn:hl7-org:v3">'
    b'<typeId root="2.16.840.1.113883.1.3" extension="POCD_HD000040"/><id root="1.2.3.4.5"/>'
    b'<code code="18748-4" codeSystem="2.16.840.1.113883.6.1"/><title>Report</title></ClinicalDocument>'
)


def encapsulated(content: bytes, study: str, series: str, uid: str, *, sop_class: str = PDF_CLASS) -> Dataset:
    """Return an encapsulated PDF or CDA; an odd content gets a byte, and its own length is told."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = sop_class
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = uid
    ds.StudyInstanceUID, ds.SeriesInstanceUID = study, series
    ds.PatientID, ds.PatientName, ds.PatientBirthDate, ds.PatientSex = "DEPT-1", "Test^Report", "", ""
    ds.StudyDate, ds.StudyTime, ds.AccessionNumber, ds.StudyID, ds.ReferringPhysicianName = "", "", "", "", ""
    ds.Modality, ds.SeriesNumber, ds.InstanceNumber, ds.ConversionType = "DOC", "1", "1", "WSD"
    ds.ContentDate, ds.ContentTime, ds.AcquisitionDateTime, ds.BurnedInAnnotation = "20260103", "101112", "", "YES"
    ds.DocumentTitle = "Befund"
    title = Dataset()
    title.CodeValue, title.CodingSchemeDesignator, title.CodeMeaning = "18782-3", "LN", "Radiology Study observation"
    ds.ConceptNameCodeSequence = [title]
    ds.MIMETypeOfEncapsulatedDocument = "application/pdf" if sop_class == PDF_CLASS else "text/xml"
    ds.EncapsulatedDocument = content + b"\0" * (len(content) % 2)
    ds.EncapsulatedDocumentLength = len(content)
    return ds


def part10(ds: Dataset) -> bytes:
    """Return an object as a file."""
    target = io.BytesIO()
    ds.save_as(target, enforce_file_format=True)
    return target.getvalue()
