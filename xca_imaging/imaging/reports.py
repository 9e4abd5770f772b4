"""Reports that lie in a study as documents: encapsulated PDF and CDA, taken out of their DICOM objects.

Structured reports (SR) are DICOM objects like images: the manifest names them, and they are retrieved with it.

References
----------
* DICOM PS3.3, A.45 (Encapsulated PDF and CDA), C.24.2 (Encapsulated Document module)
* IHE RAD TF-3, 4.68 (reports as documents of their own beside the manifest)
"""

from __future__ import annotations

import io
from dataclasses import dataclass

from pydicom import dcmread

from xca_imaging.errors import ReportError, XcaImagingError
from xca_imaging.imaging.attributes import Attributes
from xca_imaging.imaging.study import read_codes
from xca_imaging.metadata.model import Code
from xca_imaging.uids import NS_HL7V3, is_uid
from xca_imaging.wire import xml

ENCAPSULATED_PDF = "1.2.840.10008.5.1.4.1.1.104.1"  # PS3.6 Table A-1
ENCAPSULATED_CDA = "1.2.840.10008.5.1.4.1.1.104.2"

MIME_TYPES = {ENCAPSULATED_PDF: "application/pdf", ENCAPSULATED_CDA: "text/xml"}
"""SOP class -> MIME type of the document inside."""

MAX_BYTES = 64 * 10**6
"""Of the DICOM object: a scanned report of some hundred pages."""

_PDF_HEADER_WITHIN = 1024  # bytes: what readers of PDF search for "%PDF-"
_CLINICAL_DOCUMENT = xml.qname(NS_HL7V3, "ClinicalDocument")


@dataclass(frozen=True, slots=True)
class Report:
    """A document, and what its DICOM object says of it. Dates and times in their DICOM form."""

    sop_instance_uid: str
    sop_class_uid: str
    content: bytes
    title: str = ""
    codes: tuple[Code, ...] = ()
    """Its title as a code (0040,A043), with the coding scheme designator as scheme."""
    content_date: str = ""
    content_time: str = ""
    timezone_offset: str = ""

    @property
    def mime_type(self) -> str:
        return MIME_TYPES[self.sop_class_uid]


def read_report(source: bytes) -> Report:
    """Take the document out of an encapsulated one.

    Parameters
    ----------
    source : bytes
        A Part 10 file of at most `MAX_BYTES`.

    Raises
    ------
    ReportError
        It is none, or holds something else than it says.
    """
    if len(source) > MAX_BYTES:
        raise ReportError(f"an encapsulated document of more than {MAX_BYTES} bytes is not read")
    try:
        ds = dcmread(io.BytesIO(source))
        attributes = Attributes(ds)
        element = ds.get_item("EncapsulatedDocument")
        content = bytes(element.value) if element is not None and element.value else b""
        length = ds.get("EncapsulatedDocumentLength")
    except Exception as exc:
        # What pydicom raises for bytes that are no dataset is not specified.
        raise ReportError(f"not a readable DICOM object: {type(exc).__name__}") from exc
    sop_class, uid = attributes.text("SOPClassUID"), attributes.text("SOPInstanceUID")
    mime_type = MIME_TYPES.get(sop_class)
    if mime_type is None or not is_uid(uid):
        raise ReportError(f"not an encapsulated PDF or CDA: its SOP Class is {sop_class or 'missing'!r}")
    said = attributes.text("MIMETypeOfEncapsulatedDocument").lower()
    if said not in ("", mime_type):
        raise ReportError(f"instance {uid} says that it holds {said!r}, not {mime_type}")
    content = _unpadded(content, length if isinstance(length, int) else None)
    _check(uid, sop_class, content)
    return Report(
        sop_instance_uid=uid,
        sop_class_uid=sop_class,
        content=content,
        title=attributes.text("DocumentTitle"),
        codes=read_codes(attributes, "ConceptNameCodeSequence"),
        content_date=attributes.text("ContentDate"),
        content_time=attributes.text("ContentTime"),
        timezone_offset=attributes.text("TimezoneOffsetFromUTC"),
    )


def _unpadded(content: bytes, length: int | None) -> bytes:
    """Return the document without the byte that makes its length even; its own length is not always told (C.24.2)."""
    if length is not None and 0 <= len(content) - length <= 1:
        return content[:length]
    return content[:-1] if content.endswith(b"\0") else content


def _check(uid: str, sop_class: str, content: bytes) -> None:
    if sop_class == ENCAPSULATED_PDF:
        if b"%PDF-" not in content[:_PDF_HEADER_WITHIN]:
            raise ReportError(f"what instance {uid} holds is no PDF")
        return
    try:
        root = xml.parse(content, max_bytes=MAX_BYTES)
    except XcaImagingError as exc:
        raise ReportError(f"what instance {uid} holds cannot be read as CDA: {exc}") from exc
    if root.tag != _CLINICAL_DOCUMENT:
        raise ReportError(f"what instance {uid} holds is XML, but no CDA")
