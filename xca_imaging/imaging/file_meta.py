"""What stands before the data set of a Part 10 file: preamble and File Meta Information.

References
----------
* DICOM PS3.10, 7.1 (DICOM File Meta Information)
"""

from __future__ import annotations

import functools
import struct

from xca_imaging import uids


def _element(element: int, vr: bytes, value: str) -> bytes:
    """Return one element of group 0002: tag, VR, 16-bit length, value padded to even length (PS3.5 7.1.2)."""
    encoded = value.encode("latin-1", "replace")
    if len(encoded) % 2:
        encoded += b"\0" if vr == b"UI" else b" "
    return struct.pack("<HH2sH", 0x0002, element, vr, len(encoded)) + encoded


_PREAMBLE = struct.Struct("<128x4sHH2sHL")
_META_VERSION = struct.pack("<HH2s2xL", 0x0002, 0x0001, b"OB", 2) + b"\0\1"
_IMPLEMENTATION = _element(0x0012, b"UI", uids.IMPLEMENTATION_CLASS_UID) + _element(
    0x0013, b"SH", uids.IMPLEMENTATION_VERSION_NAME
)


def encode_file_meta(
    *, sop_class_uid: str, sop_instance_uid: str, transfer_syntax_uid: str, source_ae_title: str
) -> bytes:
    """Return what stands before the data set of a Part 10 file.

    ::

        offset  content
        0       preamble, 128 zero bytes
        128     "DICM"
        132     (0002,0000) group length, UL
        144     (0002,0001) version, OB; (0002,0002) SOP class; (0002,0003) SOP instance; (0002,0010) transfer syntax;
                (0002,0012) implementation class; (0002,0013) implementation version; (0002,0016) source AE title

    References
    ----------
    * DICOM PS3.10, 7.1 and Table 7.1-1: Explicit VR Little Endian whatever the data set is
    """
    before, after = _constant_meta(sop_class_uid, transfer_syntax_uid, source_ae_title)
    group = before + _element(0x0003, b"UI", sop_instance_uid) + after
    return _PREAMBLE.pack(b"DICM", 0x0002, 0x0000, b"UL", 4, len(group)) + group


@functools.lru_cache(maxsize=64)  # the classes, syntaxes and peers of the associations at work; an entry is 300 bytes
def _constant_meta(sop_class_uid: str, transfer_syntax_uid: str, source_ae_title: str) -> tuple[bytes, bytes]:
    """Return what is the same for all instances of a presentation context: before and after (0002,0003)."""
    return (
        _META_VERSION + _element(0x0002, b"UI", sop_class_uid),
        _element(0x0010, b"UI", transfer_syntax_uid)
        + _IMPLEMENTATION
        + (_element(0x0016, b"AE", source_ae_title) if source_ae_title else b""),
    )
