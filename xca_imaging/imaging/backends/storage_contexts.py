"""Which presentation contexts a C-GET proposes: one for each pair of SOP class and transfer syntax, as many as go.

A peer accepts one transfer syntax of each context, and sends nothing in another (PS3.8 9.3.2.2, PS3.4 C.5.3): so each
pair wants a context of its own, and an association has room for 127 beside that of C-GET itself. Where the classes
are not known, those go first that archives hold most of.

References
----------
* DICOM PS3.6, Annex A (UIDs); PS3.5, Annex A (transfer syntaxes)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pydicom.uid import UID_dictionary  # type: ignore[attr-defined]  # re-exported without saying so

from xca_imaging import uids
from xca_imaging.imaging.backends.requester import MAX_CONTEXTS, Proposal

_ROOM = MAX_CONTEXTS - 1  # one is for the service itself

_UNCOMPRESSED = (
    uids.EXPLICIT_VR_LITTLE_ENDIAN,
    uids.IMPLICIT_VR_LITTLE_ENDIAN,
    "1.2.840.10008.1.2.1.99",  # deflated
    uids.EXPLICIT_VR_BIG_ENDIAN,
)

ANY_SYNTAX = (
    uids.EXPLICIT_VR_LITTLE_ENDIAN,
    uids.IMPLICIT_VR_LITTLE_ENDIAN,
    "1.2.840.10008.1.2.4.70",  # JPEG Lossless, first-order prediction
    "1.2.840.10008.1.2.4.90",  # JPEG 2000 Lossless
    "1.2.840.10008.1.2.4.80",  # JPEG-LS Lossless
    "1.2.840.10008.1.2.5",  # RLE Lossless
    "1.2.840.10008.1.2.4.50",  # JPEG Baseline
    "1.2.840.10008.1.2.4.91",  # JPEG 2000
    "1.2.840.10008.1.2.4.201",  # HTJ2K Lossless
    "1.2.840.10008.1.2.4.102",  # MPEG-4 AVC/H.264
)
"""Where any transfer syntax will do: what archives hold, most usual first."""

_IMAGE_CLASSES = (
    "1.2.840.10008.5.1.4.1.1.2",  # CT
    "1.2.840.10008.5.1.4.1.1.4",  # MR
    "1.2.840.10008.5.1.4.1.1.1.1",  # Digital X-Ray, for presentation
    "1.2.840.10008.5.1.4.1.1.1",  # Computed Radiography
    "1.2.840.10008.5.1.4.1.1.7",  # Secondary Capture
    "1.2.840.10008.5.1.4.1.1.3.1",  # Ultrasound Multi-frame
    "1.2.840.10008.5.1.4.1.1.6.1",  # Ultrasound
    "1.2.840.10008.5.1.4.1.1.128",  # PET
    "1.2.840.10008.5.1.4.1.1.12.1",  # X-Ray Angiographic
    "1.2.840.10008.5.1.4.1.1.1.2",  # Digital Mammography, for presentation
    "1.2.840.10008.5.1.4.1.1.20",  # Nuclear Medicine
    "1.2.840.10008.5.1.4.1.1.13.1.3",  # Breast Tomosynthesis
    "1.2.840.10008.5.1.4.1.1.2.1",  # Enhanced CT
    "1.2.840.10008.5.1.4.1.1.4.1",  # Enhanced MR
    "1.2.840.10008.5.1.4.1.1.12.2",  # X-Ray Radiofluoroscopic
    "1.2.840.10008.5.1.4.1.1.66.4",  # Segmentation
    "1.2.840.10008.5.1.4.1.1.77.1.4",  # VL Photographic
    "1.2.840.10008.5.1.4.1.1.77.1.1",  # VL Endoscopic
    "1.2.840.10008.5.1.4.1.1.481.1",  # RT Image
    "1.2.840.10008.5.1.4.1.1.481.2",  # RT Dose
    "1.2.840.10008.5.1.4.1.1.7.4",  # Multi-frame True Color Secondary Capture
    "1.2.840.10008.5.1.4.1.1.7.2",  # Multi-frame Grayscale Byte Secondary Capture
    "1.2.840.10008.5.1.4.1.1.77.1.5.1",  # Ophthalmic Photography, 8 bit
    "1.2.840.10008.5.1.4.1.1.77.1.5.4",  # Ophthalmic Tomography
    "1.2.840.10008.5.1.4.1.1.13.1.1",  # X-Ray 3D Angiographic
    "1.2.840.10008.5.1.4.1.1.1.3",  # Digital Intra-Oral X-Ray, for presentation
    "1.2.840.10008.5.1.4.1.1.77.1.6",  # VL Whole Slide Microscopy
    "1.2.840.10008.5.1.4.1.1.7.3",  # Multi-frame Grayscale Word Secondary Capture
    "1.2.840.10008.5.1.4.1.1.12.1.1",  # Enhanced XA
    "1.2.840.10008.5.1.4.1.1.130",  # Enhanced PET
    "1.2.840.10008.5.1.4.1.1.77.1.1.1",  # Video Endoscopic
    "1.2.840.10008.5.1.4.1.1.1.1.1",  # Digital X-Ray, for processing
    "1.2.840.10008.5.1.4.1.1.1.2.1",  # Digital Mammography, for processing
    "1.2.840.10008.5.1.4.1.1.6",  # Ultrasound, retired
    "1.2.840.10008.5.1.4.1.1.3",  # Ultrasound Multi-frame, retired
    "1.2.840.10008.5.1.4.1.1.5",  # Nuclear Medicine, retired
)
_OTHER_CLASSES = (
    "1.2.840.10008.5.1.4.1.1.11.1",  # Grayscale Softcopy Presentation State
    "1.2.840.10008.5.1.4.1.1.88.67",  # X-Ray Radiation Dose SR
    "1.2.840.10008.5.1.4.1.1.88.59",  # Key Object Selection Document
    "1.2.840.10008.5.1.4.1.1.104.1",  # Encapsulated PDF
    "1.2.840.10008.5.1.4.1.1.88.33",  # Comprehensive SR
    "1.2.840.10008.5.1.4.1.1.88.22",  # Enhanced SR
    "1.2.840.10008.5.1.4.1.1.88.11",  # Basic Text SR
    "1.2.840.10008.5.1.4.1.1.481.3",  # RT Structure Set
    "1.2.840.10008.5.1.4.1.1.481.5",  # RT Plan
    "1.2.840.10008.5.1.4.1.1.66",  # Raw Data
    "1.2.840.10008.5.1.4.1.1.66.1",  # Spatial Registration
    "1.2.840.10008.5.1.4.1.1.88.50",  # Mammography CAD SR
    "1.2.840.10008.5.1.4.1.1.9.1.1",  # 12-lead ECG Waveform
    "1.2.840.10008.5.1.4.1.1.9.1.2",  # General ECG Waveform
    "1.2.840.10008.5.1.4.1.1.11.2",  # Color Softcopy Presentation State
    "1.2.840.10008.5.1.4.1.1.88.34",  # Comprehensive 3D SR
    "1.2.840.10008.5.1.4.1.1.481.4",  # RT Beams Treatment Record
    "1.2.840.10008.5.1.4.1.1.481.8",  # RT Ion Plan
    "1.2.840.10008.5.1.4.1.1.481.9",  # RT Ion Beams Treatment Record
    "1.2.840.10008.5.1.4.1.1.481.7",  # RT Treatment Summary Record
    "1.2.840.10008.5.1.4.1.1.66.3",  # Deformable Spatial Registration
    "1.2.840.10008.5.1.4.1.1.67",  # Real World Value Mapping
    "1.2.840.10008.5.1.4.1.1.88.65",  # Chest CAD SR
    "1.2.840.10008.5.1.4.1.1.104.2",  # Encapsulated CDA
    "1.2.840.10008.5.1.4.1.1.104.3",  # Encapsulated STL
    "1.2.840.10008.5.1.4.1.1.4.2",  # MR Spectroscopy
    "1.2.840.10008.5.1.4.1.1.88.40",  # Procedure Log
    "1.2.840.10008.5.1.4.1.1.9.2.1",  # Hemodynamic Waveform
    "1.2.840.10008.5.1.4.1.1.11.4",  # Blending Softcopy Presentation State
)
_NO_PIXELS = frozenset(_OTHER_CLASSES)
# Of three images one other object: dose reports, presentation states and PDFs stand in most studies.
_BY_USAGE = tuple(
    uid
    for start in range(0, len(_IMAGE_CLASSES), 3)
    for uid in (*_IMAGE_CLASSES[start : start + 3], *_OTHER_CLASSES[start // 3 : start // 3 + 1])
) + tuple(_OTHER_CLASSES[-(-len(_IMAGE_CLASSES) // 3) :])

_NOT_STORED = ("Storage Commitment", "Media Storage Directory", "Stored Print", "Hardcopy", "Inventory")
ALL_CLASSES = _BY_USAGE + tuple(
    str(uid)
    for uid, (name, kind, *_) in UID_dictionary.items()
    if kind == "SOP Class" and "Storage" in name and not name.startswith(_NOT_STORED) and uid not in _BY_USAGE
)
"""Every storage class of PS3.6 Table A-1, retired ones too; those that are used most come first."""


def propose(accept: Sequence[str], known: Iterable[str] = ()) -> tuple[Proposal, ...]:
    """Return the storage contexts of a C-GET, at most 127.

    Every class has the best of its syntaxes first, then each in turn has all the others, as long as there is room: a
    PACS may well be able to decode, but it can send nothing of a class that was not proposed.

    Parameters
    ----------
    accept : sequence of str
        Transfer syntaxes, best first; empty: any.
    known : iterable of str
        SOP classes of what is asked. None known: the classes that are most used.
    """
    classes = tuple(dict.fromkeys(uid for uid in known if uid)) or _BY_USAGE
    syntaxes = tuple(accept) or ANY_SYNTAX
    plain = [uid for uid in syntaxes if uid in _UNCOMPRESSED]
    pairs: dict[tuple[str, str], None] = {}
    for sop_class in classes:
        if plain or sop_class not in _NO_PIXELS:
            pairs[sop_class, (plain or syntaxes)[0]] = None
    for sop_class in classes:
        for syntax in plain if sop_class in _NO_PIXELS else syntaxes:
            pairs[sop_class, syntax] = None
    chosen = list(pairs)[:_ROOM]
    return tuple(Proposal(sop_class, (syntax,), receives=True) for sop_class, syntax in chosen)
