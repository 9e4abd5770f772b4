"""The head of a Part 10 stream that arrives in pieces: File Meta Information taken off, the data set left alone.

References
----------
* DICOM PS3.10, 7.1 and Table 7.1-1 (preamble, prefix, File Meta Information: always Explicit VR Little Endian)
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from xca_imaging.imaging.part10 import Part10Error

MAX_FILE_META = 64 * 1024
"""Bytes of File Meta Information that are collected: real ones have 200 to 400, private information adds a little."""

_HEAD = 144  # preamble 128, "DICM" 4, (0002,0000) UL with its value 12
_GROUP_LENGTH = b"\x02\x00\x00\x00UL\x04\x00"
_LONG_VR = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")  # PS3.5 7.1.2
_SOP_CLASS_UID, _SOP_INSTANCE_UID, _TRANSFER_SYNTAX_UID = 0x0002, 0x0003, 0x0010


@dataclass(frozen=True, slots=True)
class FileMeta:
    """What File Meta Information says of its data set; an element that is not there is empty."""

    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str


class HeadReader:
    """File Meta Information that comes in pieces.

    Feed pieces to `receive` until it returns how many bytes of the last one were still head; `meta` is there then.
    """

    # Mutable state: what has been collected (_head), and how long the head is (_length, 144 until that is known).

    def __init__(self) -> None:
        self._head = bytearray()
        self._length = _HEAD
        self.meta: FileMeta | None = None

    def receive(self, data: memoryview) -> int | None:
        """Take the next bytes; return where the data set begins in them, None while the head goes on.

        Raises
        ------
        Part10Error
            Not a Part 10 file, or its File Meta Information is over the limit or broken.
        """
        taken = 0
        while True:
            piece = data[taken : taken + self._length - len(self._head)]
            self._head += piece
            taken += len(piece)
            if len(self._head) < self._length:
                return None
            if self._length > _HEAD:
                self.meta = _parse(bytes(self._head))
                return taken
            if self._head[128:132] != b"DICM" or self._head[132:140] != _GROUP_LENGTH:
                raise Part10Error("not a DICOM Part 10 file with a file meta group length")
            (length,) = struct.unpack_from("<L", self._head, 140)
            if not 0 < length <= MAX_FILE_META:
                raise Part10Error(f"file meta information of {length} bytes; the limit is {MAX_FILE_META}")
            self._length = _HEAD + length


def _parse(head: bytes) -> FileMeta:
    values: dict[int, str] = {}
    at, end = _HEAD, len(head)
    while at < end:
        if end - at < 8:
            raise Part10Error("file meta information is cut short")
        group, element, vr, length = struct.unpack_from("<HH2sH", head, at)
        at += 8
        if vr in _LONG_VR:
            if end - at < 4:
                raise Part10Error("file meta information is cut short")
            (length,) = struct.unpack_from("<L", head, at)
            at += 4
        if group != 0x0002 or length > end - at:
            raise Part10Error(f"file meta information has ({group:04X},{element:04X}) of {length} bytes")
        values[element] = head[at : at + length].decode("latin-1").strip("\0 ")
        at += length
    return FileMeta(
        values.get(_SOP_CLASS_UID, ""), values.get(_SOP_INSTANCE_UID, ""), values.get(_TRANSFER_SYNTAX_UID, "")
    )
