"""Encapsulated documents: what comes out is what went in, and nothing else passes for one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pydicom.dataset import Dataset

from tests.support import peers, reports
from tests.support.reports import CDA, CDA_CLASS, PDF, PDF_CLASS
from xca_imaging.errors import ReportError
from xca_imaging.imaging.reports import read_report
from xca_imaging.metadata.model import Code

STUDY, SERIES, UID = "1.2.3", "1.2.3.8", "1.2.3.8.1"


def made(content: bytes = PDF, sop_class: str = PDF_CLASS) -> Dataset:
    return reports.encapsulated(content, STUDY, SERIES, UID, sop_class=sop_class)


@pytest.mark.parametrize("content", [PDF, PDF + b"x", PDF + b"\0", PDF + b"x\0"])
def test_a_pdf_comes_out_as_it_went_in(content: bytes) -> None:
    report = read_report(reports.part10(made(content)))
    assert report.content == content
    assert (report.mime_type, report.sop_instance_uid) == ("application/pdf", UID)
    assert (report.title, report.content_date, report.content_time) == ("Befund", "20260103", "101112")
    assert report.codes == (Code("18782-3", "LN", "Radiology Study observation"),)


@pytest.mark.parametrize("content", [CDA, CDA + b"\n"])
def test_a_cda_comes_out_as_it_went_in(content: bytes) -> None:
    report = read_report(reports.part10(made(content, CDA_CLASS)))
    assert (report.content, report.mime_type) == (content, "text/xml")


@pytest.mark.parametrize("content", [PDF, PDF + b"x", CDA, CDA + b"\n"])
def test_padding_is_removed_where_the_length_is_not_told(content: bytes) -> None:
    ds = made(content, CDA_CLASS if content.startswith(CDA) else PDF_CLASS)
    del ds.EncapsulatedDocumentLength
    assert read_report(reports.part10(ds)).content == content


def _empty(ds: Dataset) -> None:
    ds.EncapsulatedDocument = b""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda ds: setattr(ds, "SOPClassUID", "1.2.840.10008.5.1.4.1.1.2"), "not an encapsulated"),
        (lambda ds: setattr(ds, "MIMETypeOfEncapsulatedDocument", "model/stl"), "says that it holds"),
        (lambda ds: setattr(ds, "SOPClassUID", CDA_CLASS), "says that it holds"),
        (lambda ds: setattr(ds, "EncapsulatedDocument", b"GIF89a"), "no PDF"),
        (lambda ds: delattr(ds, "EncapsulatedDocument"), "no PDF"),
        (_empty, "no PDF"),
    ],
)
def test_what_is_no_report_is_refused(change: Callable[[Dataset], None], said: str) -> None:
    ds = made()
    change(ds)
    with pytest.raises(ReportError, match=said):
        read_report(reports.part10(ds))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<html xmlns='http://www.w3.org/1999/xhtml'/>", "no CDA"),
        (b"<ClinicalDocument/>", "no CDA"),
        (b"<ClinicalDocument xmlns='urn:hl7-org:v3'>", "cannot be read"),
        (
            b"<!DOCTYPE a [<!ENTITY b 'c'>]><ClinicalDocument xmlns='urn:hl7-org:v3'>&b;</ClinicalDocument>",
            "read as CDA",
        ),
    ],
)
def test_what_is_no_cda_is_refused(content: bytes, said: str) -> None:
    with pytest.raises(ReportError, match=said):
        read_report(reports.part10(made(content, CDA_CLASS)))


def test_what_is_no_dicom_is_refused() -> None:
    for data in (b"", PDF, reports.part10(made())[:200]):
        with pytest.raises(ReportError):
            read_report(data)


@pytest.mark.peer
@pytest.mark.parametrize(("program", "content"), [("pdf2dcm", PDF + b"x"), ("cda2dcm", CDA)])
def test_what_dcmtk_encapsulates(tmp_path: Path, program: str, content: bytes) -> None:
    source, target = tmp_path / "document", tmp_path / "report.dcm"
    source.write_bytes(content)
    peers.run(peers.program(program), str(source), str(target))
    assert read_report(target.read_bytes()).content == content
