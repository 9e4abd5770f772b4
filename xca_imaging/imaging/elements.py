"""Data sets copied element by element from one encoding into another: explicit or implicit VR, little endian.

Values pass in pieces, so a data set of any size costs no more memory than one of its pieces. What has the same encoding
on both sides is copied as it is; sequences whose headers change length are written with undefined length.

References
----------
* DICOM PS3.5, 7.1 (data element structure), 7.2 (group length), 7.3 (byte ordering), 7.5 (nesting), 6.2.2 (UN)
* DICOM PS3.5, A.1 to A.5 (encodings of the transfer syntaxes)
"""

from __future__ import annotations

import struct
import zlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import BinaryIO, Protocol

from pydicom.datadict import dictionary_VR

from xca_imaging.imaging.part10 import Part10Error, Truncated

UNDEFINED = 0xFFFFFFFF
PIXEL_DATA = 0x7FE00010
_PIXEL_DATA_TAG = struct.pack("<HH", 0x7FE0, 0x0010)
ITEM, ITEM_END, SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD

_PHOTOMETRIC_INTERPRETATION = 0x00280004
_EXTENDED_OFFSETS = (0x7FE00001, 0x7FE00002)  # Extended Offset Table and its lengths: of encapsulated pixel data only
_LONG_VR = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"}  # PS3.5 7.1.2
_SWAPPED = {b"AT": 2, b"OW": 2, b"SS": 2, b"US": 2, b"FL": 4, b"OF": 4, b"OL": 4, b"SL": 4, b"UL": 4}
_SWAPPED |= {b"FD": 8, b"OD": 8, b"OV": 8, b"SV": 8, b"UV": 8}  # PS3.5 7.3: VRs that byte ordering concerns
_WORDS = {2: "H", 4: "I", 8: "Q"}
_MAX_DEPTH = 64  # far past any IOD; bounds the recursion
_PIECE = 1 << 20  # bytes of a value in memory at a time
_MAX_SEQUENCE = 16 << 20  # bytes of a sequence of defined length that is looked through in memory

# Image Pixel module (PS3.3 C.7.6.3): what is needed to decode pixel data, read on the way.
_NUMBERS = {
    0x00280002: "samples_per_pixel",
    0x00280006: "planar_configuration",
    0x00280010: "rows",
    0x00280011: "columns",
    0x00280100: "bits_allocated",
    0x00280101: "bits_stored",
    0x00280103: "pixel_representation",
}
_NUMBER_OF_FRAMES = 0x00280008


@dataclass(frozen=True, slots=True)
class Encoding:
    """How the elements of a data set are written."""

    implicit: bool = False
    big_endian: bool = False
    deflated: bool = False


@dataclass(slots=True)
class Image:
    """The Image Pixel module of one data set or item, as far as it has been read; 0 or empty: not there."""

    samples_per_pixel: int = 1
    planar_configuration: int = 0
    rows: int = 0
    columns: int = 0
    bits_allocated: int = 0
    bits_stored: int = 0
    pixel_representation: int = 0
    number_of_frames: int = 1
    photometric_interpretation: str = ""

    @property
    def frame_size(self) -> int:
        """Bytes of one uncompressed frame."""
        return self.rows * self.columns * self.samples_per_pixel * (self.bits_allocated // 8)


class Sink(Protocol):
    """Where the result goes."""

    def write(self, data: bytes | memoryview) -> object: ...


@dataclass(frozen=True, slots=True)
class Header:
    """Tag, value representation and length of a data element; items and delimiters have VR UN."""

    tag: int
    vr: bytes
    length: int


class Reader:
    """Data elements of one encoding; `stream` stands at the first of them.

    Only pixel data need a stream that can seek, and those of a deflated data set are never encapsulated.
    """

    def __init__(self, stream: BinaryIO | Inflated, encoding: Encoding) -> None:
        self.stream, self.encoding = stream, encoding
        order = ">" if encoding.big_endian else "<"
        self._tag, self._short, self._long = (struct.Struct(order + code) for code in ("HH", "H", "L"))

    def header(self) -> Header | None:
        """Return the next header; None at the end."""
        data = self.stream.read(4)
        if not data:
            return None
        if len(data) < 4:
            raise Truncated("the data set ends inside an element")
        group, element = self._tag.unpack(data)
        tag = group << 16 | element
        if self.encoding.implicit or group == 0xFFFE:
            return Header(tag, b"UN", self._number(self._long))
        vr = self.read(2)
        if vr in _LONG_VR:
            self.read(2)
            return Header(tag, vr, self._number(self._long))
        if not (vr.isalpha() and vr.isupper()):
            raise Part10Error(f"({group:04X},{element:04X}) has no value representation")
        return Header(tag, vr, self._number(self._short))

    def _number(self, layout: struct.Struct) -> int:
        number: int = layout.unpack(self.read(layout.size))[0]
        return number

    def read(self, length: int) -> bytes:
        """Return exactly so many bytes."""
        data = self.stream.read(length)
        if len(data) < length:
            raise Truncated("the data set ends inside an element")
        return data

    def pieces(self, length: int) -> Iterator[bytes]:
        """Yield a value in pieces whose length is a multiple of eight, the last excepted."""
        while length:
            data = self.read(min(length, _PIECE))
            length -= len(data)
            yield data

    def skip(self, length: int) -> None:
        """Read past a value."""
        for _ in self.pieces(length):
            pass

    def expect(self) -> Header:
        """Return the next header, which must be there."""
        header = self.header()
        if header is None:
            raise Truncated("the data set ends inside a sequence")
        return header

    @property
    def position(self) -> int:
        return self.stream.tell()


class Inflated:
    """The inflated bytes of a deflated data set (PS3.5 A.5), at most a piece and what is asked for in memory."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        self._ready = b""
        self._position = 0

    def tell(self) -> int:
        """Return how many inflated bytes were read."""
        return self._position

    def read(self, length: int) -> bytes:
        """Return so many bytes, fewer only at the end."""
        parts, missing = [self._ready[:length]], length - len(self._ready)
        self._ready = self._ready[length:]
        while missing > 0:
            data = self._inflate.unconsumed_tail or self._stream.read(65536)
            if self._inflate.eof or not data:
                break
            try:
                inflated = self._inflate.decompress(data, _PIECE)
            except zlib.error as exc:
                raise Part10Error(f"the deflated data set is damaged: {exc}") from exc
            parts.append(inflated[:missing])
            self._ready = inflated[missing:]
            missing -= len(inflated)
        data = b"".join(parts)
        self._position += len(data)
        return data


class Writer:
    """Data elements in explicit or implicit VR little endian."""

    def __init__(self, sink: Sink, *, implicit: bool) -> None:
        self.sink, self.implicit = sink, implicit

    def header(self, tag: int, vr: bytes, length: int) -> None:
        """Write a header; a value that is too long for a VR with a 16-bit length gets UN (PS3.5 6.2.2)."""
        group, element = tag >> 16, tag & 0xFFFF
        if self.implicit or group == 0xFFFE:
            self.sink.write(struct.pack("<HHL", group, element, length))
        elif vr in _LONG_VR or length > 0xFFFF:
            self.sink.write(
                struct.pack("<HH2sHL", group, element, vr if vr in _LONG_VR else b"UN", 0, length),
            )
        else:
            self.sink.write(struct.pack("<HH2sH", group, element, vr, length))

    def element(self, tag: int, vr: bytes, value: bytes) -> None:
        self.header(tag, vr, len(value))
        self.sink.write(value)


Frames = Callable[[Reader, Writer, Image], None]
"""Called with the reader behind the header of encapsulated pixel data; writes the element and reads to its end."""


def copy(reader: Reader, writer: Writer, frames: Frames, *, photometric: Callable[[str], str]) -> None:
    """Copy a data set.

    Group lengths (retired) and offset tables are left out. `photometric` gives the Photometric Interpretation that
    stands for the decoded pixels.

    Raises
    ------
    Part10Error
        The data set breaks its encoding.
    """
    _Copy(frames, photometric).dataset(reader, writer)


class _Copy:
    def __init__(self, frames: Frames, photometric: Callable[[str], str]) -> None:
        self._frames, self._photometric = frames, photometric

    def dataset(self, reader: Reader, writer: Writer) -> None:
        image = Image()
        while (header := reader.header()) is not None:
            self._element(reader, writer, header, image, 0)

    def _element(self, reader: Reader, writer: Writer, header: Header, image: Image, depth: int) -> None:
        tag, length = header.tag, header.length
        swap = reader.encoding.big_endian
        vr = _vr_of(tag, image) if reader.encoding.implicit else header.vr
        if tag >> 16 == 0xFFFE:
            raise Part10Error(f"an item or delimiter ({tag:08X}) stands where an element should")
        if (tag & 0xFFFF == 0 or tag in _EXTENDED_OFFSETS) and length != UNDEFINED:
            reader.skip(length)
        elif tag == PIXEL_DATA and length == UNDEFINED:
            self._frames(reader, writer, image)
        elif tag == PIXEL_DATA and swap and image.bits_allocated > 16:
            # By the letter the two words of a sample keep their order (PS3.5 7.3); products swap the four bytes.
            raise Part10Error("big endian pixel data of more than 16 bits: the byte order of products differs")
        elif length == UNDEFINED or vr == b"SQ":
            self._sequence(reader, writer, Header(tag, vr, length), image, depth)
        elif tag in _NUMBERS or tag in (_NUMBER_OF_FRAMES, _PHOTOMETRIC_INTERPRETATION):
            value = reader.read(length)
            writer.element(tag, vr, self._note(image, tag, _swap(value, vr) if swap else value))
        else:
            writer.header(tag, vr, length)
            for piece in reader.pieces(length):
                writer.sink.write(_swap(piece, vr) if swap else piece)

    def _note(self, image: Image, tag: int, value: bytes) -> bytes:
        if tag in _NUMBERS:
            if len(value) == 2:
                setattr(image, _NUMBERS[tag], int.from_bytes(value, "little"))
            return value
        text = value.decode("ascii", "replace").strip(" \0")
        if tag == _NUMBER_OF_FRAMES:
            image.number_of_frames = int(text) if text.isdigit() else 1
            return value
        image.photometric_interpretation = text
        changed = self._photometric(text)
        return value if changed == text else (changed + " " * (len(changed) % 2)).encode("ascii")

    def _sequence(self, reader: Reader, writer: Writer, header: Header, image: Image, depth: int) -> None:
        if depth >= _MAX_DEPTH:
            raise Part10Error(f"sequences are nested deeper than {_MAX_DEPTH}")
        length = header.length
        if reader.encoding == Encoding(writer.implicit) and length <= _MAX_SEQUENCE:
            value = reader.read(length)
            if _PIXEL_DATA_TAG not in value:
                writer.element(header.tag, header.vr, value)
                return
            reader = Reader(BytesIO(value), reader.encoding)
        writer.header(header.tag, header.vr, UNDEFINED)
        items = writer
        if header.vr == b"UN":
            # Of undefined length it holds items in implicit VR little endian (PS3.5 6.2.2, note 4); they stay so.
            reader, items = Reader(reader.stream, Encoding(implicit=True)), Writer(writer.sink, implicit=True)
        end = None if length == UNDEFINED else reader.position + length
        while end is None or reader.position < end:
            found = reader.expect()
            if found.tag == SEQUENCE_END:
                break
            if found.tag != ITEM:
                raise Part10Error(f"({found.tag:08X}) stands where an item should")
            items.header(ITEM, b"UN", UNDEFINED)
            self._item(reader, items, found.length, image, depth + 1)
            items.header(ITEM_END, b"UN", 0)
        writer.header(SEQUENCE_END, b"UN", 0)

    def _item(self, reader: Reader, writer: Writer, length: int, outer: Image, depth: int) -> None:
        image = Image(pixel_representation=outer.pixel_representation)
        end = None if length == UNDEFINED else reader.position + length
        while end is None or reader.position < end:
            header = reader.expect()
            if header.tag == ITEM_END and end is None:
                return
            self._element(reader, writer, header, image, depth)


def _swap(value: bytes, vr: bytes) -> bytes:
    """Return a big endian value, or a piece of one, as little endian."""
    size = _SWAPPED.get(vr)
    if size is None:
        return value
    if len(value) % size:
        raise Part10Error(f"a value of VR {vr.decode()} is {len(value)} bytes long")
    words = array(_WORDS[size], value)
    words.byteswap()
    return words.tobytes()


def _vr_of(tag: int, image: Image) -> bytes:
    """Return the VR of an element that was written without (PS3.6; PS3.5 A.1 where the dictionary leaves a choice)."""
    group, element = tag >> 16, tag & 0xFFFF
    if group & 1:
        return b"LO" if 0x10 <= element <= 0xFF else b"UN"  # private creators are LO (PS3.5 7.8.1)
    if element == 0:
        return b"UL"
    try:
        vr = dictionary_VR(tag)
    except KeyError:
        return b"UN"
    match vr:
        case "US or SS":
            return b"SS" if image.pixel_representation else b"US"
        case "OB or OW":
            is_bytes = tag == PIXEL_DATA and 0 < image.bits_allocated <= 8
            return b"OB" if is_bytes else b"OW"
        case "US or OW" | "US or SS or OW":
            return b"OW"
        case _:
            return vr.encode("ascii")
