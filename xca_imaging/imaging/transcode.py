"""Lossless transcoding of one DICOM object: decode what is compressed without loss, and write it uncompressed.

A frame at a time is in memory. What was compressed with loss is left alone: JPEG and irreversible JPEG 2000 decoders
differ in the last bits, so the pixels that one of them writes are not those that another would have shown.

References
----------
* DICOM PS3.5, 8.2 and A.4 (encapsulated pixel data), 8.1.1 (pixel cells); PS3.3, C.7.6.3 (Image Pixel module)
* ITU-T T.81 (JPEG), T.87 (JPEG-LS), T.800 (JPEG 2000)
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from xca_imaging import uids
from xca_imaging.errors import ImagingError
from xca_imaging.imaging import elements
from xca_imaging.imaging.elements import Encoding, Image, Reader, Sink, Writer
from xca_imaging.imaging.part10 import Part10Error

_DEFLATED = "1.2.840.10008.1.2.1.99"
_RLE = "1.2.840.10008.1.2.5"
_JPEG_LOSSLESS = ("1.2.840.10008.1.2.4.70", "1.2.840.10008.1.2.4.57")
_JPEG_LS = "1.2.840.10008.1.2.4.80"
_JPEG_2000 = ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91")

# The one decoder for each, so that the result does not depend on what else is installed. pydicom's names.
_DECODERS = {
    _RLE: "pylibjpeg",
    _JPEG_LS: "pyjpegls",
    **dict.fromkeys(_JPEG_2000, "pylibjpeg"),
    **dict.fromkeys(_JPEG_LOSSLESS, "gdcm"),
}
_NATIVE = {
    uids.EXPLICIT_VR_LITTLE_ENDIAN: Encoding(),
    uids.IMPLICIT_VR_LITTLE_ENDIAN: Encoding(implicit=True),
    uids.EXPLICIT_VR_BIG_ENDIAN: Encoding(big_endian=True),
    _DEFLATED: Encoding(deflated=True),
}

TARGETS = (uids.EXPLICIT_VR_LITTLE_ENDIAN, uids.IMPLICIT_VR_LITTLE_ENDIAN)
"""What is written, best first."""

SOURCES = (*_JPEG_LOSSLESS, *_JPEG_2000, _JPEG_LS, _RLE, *TARGETS, _DEFLATED, uids.EXPLICIT_VR_BIG_ENDIAN)
"""What is read, in the order in which a PACS is offered to send it: smaller first, JPEG lossless the most common."""

MAX_FRAME = 128 << 20
"""Bytes of one uncompressed frame, past any detector (8000 x 8000 x 16 bit). Decoders take up to six times that."""

MAX_ENCODED = 2 * MAX_FRAME
"""Bytes of one compressed frame: what does not compress may grow a little."""

_MAX_VALUE = 0xFFFFFFFE  # bytes of a value of defined length, PS3.5 7.1


class CannotTranscode(ImagingError):
    """Not without loss, not within the limits, or not at all."""


def target_of(accept: Sequence[str]) -> str | None:
    """Return what is written for a request that accepts these transfer syntaxes; None: nothing can be."""
    return next((uid for uid in TARGETS if uid in accept), None)


def with_sources(accept: Sequence[str]) -> tuple[str, ...]:
    """Return what a PACS may send for a request: what is accepted, and then what can be made into it."""
    if target_of(accept) is None:
        return tuple(accept)
    return tuple(dict.fromkeys((*accept, *SOURCES)))


def transcode(source: Path, sink: Sink, *, source_syntax: str, target_syntax: str) -> None:
    """Write the data set of a Part 10 file in another transfer syntax.

    Pixels, SOP Instance UID and everything that is not about encoding stay; Photometric Interpretation names the
    colour space of the pixels that are written, Planar Configuration keeps its value and the pixels follow it.

    Parameters
    ----------
    sink : Sink
        Takes the data set; File Meta Information is not written.

    Raises
    ------
    CannotTranscode
    """
    if target_syntax not in TARGETS or source_syntax not in SOURCES:
        raise CannotTranscode(f"transfer syntax {source_syntax} cannot be written as {target_syntax}")
    encoding = _NATIVE.get(source_syntax, Encoding())
    pixels = _Pixels(source_syntax)
    try:
        with source.open("rb") as stream:
            stream.seek(_data_set_offset(stream))
            reader = Reader(elements.Inflated(stream) if encoding.deflated else stream, encoding)
            writer = Writer(sink, implicit=target_syntax == uids.IMPLICIT_VR_LITTLE_ENDIAN)
            elements.copy(reader, writer, pixels.write, photometric=pixels.photometric)
    except Part10Error as exc:
        raise CannotTranscode(str(exc)) from exc


def _data_set_offset(stream: BinaryIO) -> int:
    """Return where the data set of a Part 10 file begins: behind a file meta group that says its length."""
    head = stream.read(144)  # preamble 128, "DICM" 4, (0002,0000) UL with its value 12
    if head[128:132] != b"DICM" or head[132:140] != b"\x02\x00\x00\x00UL\x04\x00" or len(head) < 144:
        raise Part10Error("not a DICOM Part 10 file with a file meta group length")
    length: int = struct.unpack_from("<L", head, 140)[0]
    return 144 + length


class _Pixels:
    """Encapsulated pixel data of one transfer syntax."""

    def __init__(self, transfer_syntax_uid: str) -> None:
        self._syntax = transfer_syntax_uid

    def photometric(self, declared: str) -> str:
        """Return the Photometric Interpretation of the decoded pixels (PS3.5 8.2.4: the decoder undoes YBR_RCT)."""
        return "RGB" if declared == "YBR_RCT" and self._syntax in _JPEG_2000 else declared

    def write(self, reader: Reader, writer: Writer, image: Image) -> None:
        """Decode pixel data frame by frame; the reader stands at the first item, and ends behind the last."""
        if self._syntax not in _DECODERS:
            raise CannotTranscode(f"encapsulated pixel data in transfer syntax {self._syntax}")
        stream = reader.stream
        if isinstance(stream, elements.Inflated):
            raise CannotTranscode("encapsulated pixel data in a deflated data set")
        _check_image(image)
        total = image.frame_size * image.number_of_frames
        if total > _MAX_VALUE:
            raise CannotTranscode(f"uncompressed, the pixel data are {total} bytes: more than an element can hold")
        start = stream.tell()
        end = _check_fragments(reader, image.number_of_frames)
        stream.seek(start)
        try:
            precision = self._check_frames(stream, image.number_of_frames)
            stream.seek(start)
            writer.header(elements.PIXEL_DATA, b"OW" if image.bits_allocated > 8 else b"OB", total + total % 2)
            for frame in self._decoded(stream, image, precision):
                writer.sink.write(frame)
        except (ImagingError, OSError):
            raise
        except Exception as exc:  # decoders raise whatever the bytes make them raise
            raise CannotTranscode(f"the pixel data cannot be decoded: {exc}") from exc
        if total % 2:
            writer.sink.write(b"\0")
        stream.seek(end)

    def _check_frames(self, stream: BinaryIO, expected: int) -> int:
        """Look at every frame before one is written; return the highest sample precision of JPEG lossless frames."""
        from pydicom.encaps import generate_frames

        number = precision = 0
        # An Extended Offset Table needs one fragment for each frame (PS3.3 C.7.6.3.1.8), so it says nothing more.
        for frame in generate_frames(stream, number_of_frames=expected):
            number += 1
            try:
                problem, bits = _look_into(self._syntax, frame)
            except (IndexError, struct.error):
                problem, bits = "has a damaged header", 0
            if problem:
                raise CannotTranscode(f"frame {number} {problem}")
            precision = max(precision, bits)
        if number != expected:
            raise CannotTranscode(f"{number} frames are there, Number of Frames says {expected}")
        return precision

    def _decoded(self, stream: BinaryIO, image: Image, precision: int) -> Iterator[bytes]:
        import numpy as np
        from pydicom.pixels.decoders.base import get_decoder

        sign = "i" if image.pixel_representation else "u"
        stored = np.dtype(f"<{sign}{image.bits_allocated // 8}")
        frames = get_decoder(self._syntax).iter_array(
            stream,
            raw=True,
            decoding_plugin=_DECODERS[self._syntax],
            # JPEG knows no sign: samples that came without the bits above Bits Stored get them back. Where those were
            # coded too they stay as they are, because a retired overlay may lie in them.
            correct_unused_bits=0 < precision <= image.bits_stored and image.pixel_representation == 1,
            rows=image.rows,
            columns=image.columns,
            number_of_frames=image.number_of_frames,
            samples_per_pixel=image.samples_per_pixel,
            bits_allocated=image.bits_allocated,
            bits_stored=image.bits_stored,
            pixel_representation=image.pixel_representation,
            planar_configuration=0,  # as decoders write, whatever the data set says; those that do not say so
            photometric_interpretation=image.photometric_interpretation,
            pixel_keyword="PixelData",
        )
        for array, _ in frames:
            if array.size * stored.itemsize != image.frame_size:
                raise CannotTranscode("a frame has another size than Rows, Columns and Samples per Pixel say")
            if image.samples_per_pixel > 1 and image.planar_configuration == 1:
                array = array.transpose(2, 0, 1)
            yield np.ascontiguousarray(array).astype(stored, copy=False).tobytes()


def _check_image(image: Image) -> None:
    """Refuse what no decoder of ours writes, or only with more memory than a job may take."""
    if image.bits_allocated not in (8, 16, 32) or image.samples_per_pixel not in (1, 3) or image.number_of_frames < 1:
        raise CannotTranscode(
            f"pixel data of {image.bits_allocated} bits, {image.samples_per_pixel} samples, "
            f"{image.number_of_frames} frames"
        )
    if not 0 < image.frame_size <= MAX_FRAME:
        raise CannotTranscode(f"a frame of {image.columns} x {image.rows} pixels, {image.frame_size} bytes")
    if not 0 < image.bits_stored <= image.bits_allocated:
        raise CannotTranscode(f"Bits Stored {image.bits_stored} of Bits Allocated {image.bits_allocated}")


def _check_fragments(reader: Reader, number_of_frames: int) -> int:
    """Walk the items of encapsulated pixel data (PS3.5 A.4) and return where they end."""
    stream = reader.stream
    assert not isinstance(stream, elements.Inflated)
    total, is_table = 0, True
    while (header := reader.expect()).tag == elements.ITEM:
        if header.length > MAX_ENCODED:
            raise CannotTranscode(f"a fragment of {header.length} bytes")
        total += 0 if is_table else header.length
        is_table = False
        stream.seek(header.length, os.SEEK_CUR)
    if header.tag != elements.SEQUENCE_END:
        raise CannotTranscode(f"({header.tag:08X}) stands where a fragment should")
    if number_of_frames == 1 and total > MAX_ENCODED:
        raise CannotTranscode(f"a compressed frame of {total} bytes")
    return stream.tell()


# --------------------------------------------------------------------------------------------------------------------
# Is it reversible?
# --------------------------------------------------------------------------------------------------------------------


def _look_into(syntax: str, frame: bytes) -> tuple[str, int]:
    """Return why a frame is not losslessly compressed ("" when it is), and the precision of JPEG lossless samples."""
    if syntax in _JPEG_2000:
        return ("" if _is_reversible(frame) else "is compressed by the irreversible transformation of JPEG 2000"), 0
    if syntax == _JPEG_LS:
        # SOS: Ns, Ns x (Cs, Tm), NEAR, ILV, Al (T.87 C.2.3)
        near = [data[1 + 2 * data[0]] for marker, data in _segments(frame, _JPEG_LS_MARKER) if marker == _SOS]
        return ("" if near and not any(near) else "is not JPEG-LS with NEAR = 0"), 0
    if syntax in _JPEG_LOSSLESS:
        precision, is_lossless = 0, True
        for marker, data in _segments(frame, _JPEG_MARKER):
            if marker == _SOF3:
                precision = data[0]
            elif marker == _SOS:
                # Ns, Ns x (Cs, Td/Ta), Ss, Se, Ah/Al: Al is the point transform (T.81 B.2.3, H.1.2.1)
                is_lossless = is_lossless and data[3 + 2 * data[0]] & 0x0F == 0
        return ("" if precision and is_lossless else "is not lossless JPEG without point transform"), precision
    return "", 0


_SOF3, _SOS = 0xC3, 0xDA  # T.81 Table B.1
# Where a marker can follow entropy coded data; restart markers (D0 to D7) belong to the data.
_JPEG_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_JPEG_LS_MARKER = re.compile(rb"\xff[\x80-\xcf\xd8-\xfe]")  # T.87 A.1: after FF comes a bit 0 in data


def _segments(frame: bytes, marker: re.Pattern[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield marker and parameters of the segments of a JPEG or JPEG-LS stream, scans included."""
    position = 0
    while found := marker.search(frame, position):
        position = found.end()
        code = frame[position - 1]
        if code in (0x01, 0xD8, 0xD9):  # TEM, SOI, EOI stand alone
            continue
        (length,) = struct.unpack_from(">H", frame, position)
        yield code, frame[position + 2 : position + length]
        position += max(2, length)


def _is_reversible(frame: bytes) -> bool:
    """Tell whether every component of every tile of a JPEG 2000 code stream uses the 5-3 transformation.

    ::

        SIZ  FF51: ..., Csiz at 34
        COD  FF52: Scod, progression, layers (2), multiple component transformation, then SPcod
        COC  FF53: component (1, or 2 where Csiz > 256), Scoc, then SPcoc
        SPcod, SPcoc: levels, block width, block height, style, transformation (1: reversible 5-3), precincts

    References
    ----------
    * ITU-T T.800, A.5.1 (SIZ), A.6.1 (COD), A.6.2 (COC), A.4.2 (SOT), Table A.20 (transformation)
    """
    if frame[:2] != b"\xff\x4f":
        return False
    position, wide, found, tile_end = 2, False, False, 0
    while True:
        (code,) = struct.unpack_from(">H", frame, position)
        if code == 0xFFD9:  # EOC
            return found
        if code == 0xFF93:  # SOD: the rest of the tile part is data
            position = tile_end
            if not tile_end or tile_end >= len(frame):
                return found  # Psot of 0: up to the end of the stream
            continue
        (length,) = struct.unpack_from(">H", frame, position + 2)
        data = position + 4
        if code == 0xFF51:
            wide = struct.unpack_from(">H", frame, data + 34)[0] > 256
        elif code == 0xFF52:
            found = True
            if frame[data + 9] != 1:
                return False
        elif code == 0xFF53 and frame[data + (7 if wide else 6)] != 1:
            return False
        elif code == 0xFF90:
            (tile_part,) = struct.unpack_from(">L", frame, data + 2)
            tile_end = position + tile_part if tile_part else 0
        position += 2 + max(2, length)
