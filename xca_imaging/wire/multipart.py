"""multipart messages, read and written piece by piece.

Layout, with CRLF line ends (bare LF is read, never written)::

    [preamble CRLF]
    --boundary [padding] CRLF
    *(Name: value CRLF)
    CRLF
    octets
    CRLF --boundary [padding] CRLF      the CRLF before the dashes belongs to the delimiter, not to the octets
    ...
    CRLF --boundary--
    [epilogue]

The octets of a part are never copied: `PartData` holds views of the chunk that was received. Only what may turn out
to be the beginning of a delimiter is held back until the next chunk, at most one boundary line.

References
----------
* RFC 2046, 5.1.1 (syntax of multipart), RFC 2045, 5.1 (Content-Type), RFC 5322, 2.2.3 (folding)
* RFC 2387 (multipart/related)
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from xca_imaging.errors import LocalProtocolError, MalformedMime, MessageTooLarge

MAX_PARTS = 10_001
"""A root and 10 000 instances: more than any study that is retrieved in one request."""

MAX_HEADER = 8192
"""Bytes of one part's header; real ones have 150."""

MAX_HEADER_FIELDS = 64
"""Fields of one part's header; real ones have three."""

MAX_PREAMBLE = 1024 * 1024
"""Bytes before the first boundary: hours of keep-alive lines. They are dropped: this bounds work, not memory."""

MAX_EPILOGUE = 64 * 1024
"""Bytes after the closing boundary, dropped too."""

MAX_CONTENT_TYPE = 8192
"""Characters of a Content-Type value: what HTTP servers allow for a field."""

_MAX_PADDING = 64  # white space after a boundary; gateways that pad do so with a blank or two
_WINDOW = 1024  # bytes looked at in one step for the end of a header

_AFTER_BOUNDARY = re.compile(rb"(--)|[ \t]{0,%d}(\r?)\n" % _MAX_PADDING)
_AFTER_BOUNDARY_SO_FAR = re.compile(rb"(?:-|[ \t]{0,%d}\r?)\Z" % _MAX_PADDING)
_BLANK_LINE = re.compile(rb"\n\r?\n")
_FOLD = re.compile(r"\r?\n[ \t]+")
_FIELD_NAME = re.compile(r"[!-9;-~]+\Z")  # RFC 5322, 2.2: printable ASCII but the colon
_FIELD_VALUE = re.compile(r"[\t -~\x80-\U0010ffff]*\Z")
_MEDIA_TYPE = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+/[!#$%&'*+\-.^_`|~0-9A-Za-z]+\Z")
_PARAMETER = re.compile(r"""[ \t]*([^=;\s]+)[ \t]*=[ \t]*(?:"((?:[^"\\]|\\.)*)"|([^;]*))""", re.DOTALL)
_BOUNDARY = re.compile(rb"[0-9A-Za-z'()+_,\-./:=? ]{0,69}[0-9A-Za-z'()+_,\-./:=?]\Z")  # RFC 2046, 5.1.1
_LENIENT_BOUNDARY = re.compile(rb"[ -~]{0,255}[!-~]\Z")  # some stacks use other characters and more than 70 of them


@dataclass(frozen=True, slots=True)
class ContentType:
    """A Content-Type value: media type in lower case, parameters by lower-case name."""

    media_type: str
    parameters: Mapping[str, str] = field(default_factory=dict)

    @property
    def charset(self) -> str | None:
        return self.parameters.get("charset") or None


def parse_content_type(value: str, *, max_length: int = MAX_CONTENT_TYPE) -> ContentType:
    """Return the parts of a Content-Type value.

    Lenient where stacks are sloppy: values with special characters and without quotes (`boundary=uuid:1`,
    `start=<root>`), quotes inside quotes without a backslash (what follows is skipped), empty parameters. Of a
    parameter given twice, the first counts.

    Raises
    ------
    MalformedMime
        There is no media type, or the value is longer than `max_length`.
    """
    if len(value) > max_length:
        raise MalformedMime(f"Content-Type over {max_length} characters")
    media_type, _, rest = value.partition(";")
    media_type = media_type.strip().lower()
    if not _MEDIA_TYPE.match(media_type):
        raise MalformedMime(f"Content-Type without a media type: {media_type[:80]!r}")
    parameters: dict[str, str] = {}
    at = 0
    while at < len(rest):
        found = _PARAMETER.match(rest, at)
        if found:
            name, quoted, plain = found.groups()
            text = plain.strip() if quoted is None else re.sub(r"\\(.)", r"\1", quoted, flags=re.DOTALL)
            parameters.setdefault(name.lower(), text)
            at = found.end()
        semicolon = rest.find(";", at)
        at = len(rest) if semicolon < 0 else semicolon + 1
    return ContentType(media_type, parameters)


class Headers(Mapping[str, str]):
    """The header of a part: values by name, whatever the case of the name."""

    __slots__ = ("_fields",)

    def __init__(self, fields: Sequence[tuple[str, str]] = ()) -> None:
        self._fields: dict[str, str] = {}
        for name, value in fields:
            self._fields.setdefault(name.lower(), value)

    def __getitem__(self, name: str) -> str:
        return self._fields[name.lower()]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def __repr__(self) -> str:
        return f"Headers({self._fields!r})"

    @property
    def content_type(self) -> str:
        return self._fields.get("content-type", "")

    @property
    def content_id(self) -> str:
        return self._fields.get("content-id", "")

    @property
    def content_transfer_encoding(self) -> str:
        return self._fields.get("content-transfer-encoding", "")


@dataclass(frozen=True, slots=True)
class PartStart:
    """A part begins; its header is complete."""

    headers: Headers


@dataclass(frozen=True, slots=True)
class PartData:
    """Octets of the current part: a view of the chunk that was received, never empty."""

    view: memoryview


@dataclass(frozen=True, slots=True)
class PartEnd:
    """The current part is complete."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The closing boundary came; what follows is ignored."""


Event = PartStart | PartData | PartEnd | Finished


class _State(enum.Enum):
    PREAMBLE = enum.auto()
    HEADER = enum.auto()
    OCTETS = enum.auto()
    EPILOGUE = enum.auto()


class Reader:
    """A multipart message that arrives in pieces.

    Parameters
    ----------
    boundary : bytes
        Without the leading dashes.
    max_header, max_header_fields, max_parts, max_preamble, max_epilogue : int
        Limits, with their reasons at the defaults.

    Raises
    ------
    MalformedMime
        The bytes are no such message, or it ends too early (`close`).
    MessageTooLarge
        A limit is passed.
    """

    # Mutable state: _state; _held (bytes that may begin a delimiter, _virtual of them never received); _header (of the
    # part that begins); _bare_lf (line ends of the current part); _parts, _dropped (counters).

    def __init__(
        self,
        boundary: bytes,
        *,
        max_header: int = MAX_HEADER,
        max_header_fields: int = MAX_HEADER_FIELDS,
        max_parts: int = MAX_PARTS,
        max_preamble: int = MAX_PREAMBLE,
        max_epilogue: int = MAX_EPILOGUE,
    ) -> None:
        if not _LENIENT_BOUNDARY.match(boundary):
            raise MalformedMime(f"not a MIME boundary: {boundary[:80]!r}")
        self._needle = b"\n--" + boundary
        self._seam = len(self._needle) + _MAX_PADDING + 4  # longer than any boundary line that is read
        self._max_header, self._max_header_fields, self._max_parts = max_header, max_header_fields, max_parts
        self._max_preamble, self._max_epilogue = max_preamble, max_epilogue
        self._state = _State.PREAMBLE
        # A delimiter begins with a line end. At the very beginning, and right after a header, there is none of its
        # own: a line feed that was never received stands in for it.
        self._held, self._virtual = b"\n", 1
        self._header = bytearray()
        self._bare_lf = False
        self._parts = self._dropped = 0

    def receive(self, data: bytes | bytearray | memoryview) -> list[Event]:
        """Take the next bytes and return what they complete.

        Views are of `data` itself where it is `bytes` (anything else is copied first).
        """
        chunk = data if isinstance(data, bytes) else bytes(data)
        events: list[Event] = []
        at, end = 0, len(chunk)
        while at < end:
            if self._state is _State.HEADER:
                at = self._read_header(chunk, at, events)
            elif self._state is _State.EPILOGUE:
                self._drop(end - at, self._max_epilogue, "after the closing MIME boundary")
                at = end
            elif self._held:
                at = self._read_seam(chunk, at, events)
            else:
                at = self._read_octets(chunk, at, events)
        return events

    def close(self) -> None:
        """Say that no more bytes come.

        Raises
        ------
        MalformedMime
            The closing boundary is missing: the message is not whole, however complete its parts look.
        """
        if self._state is _State.PREAMBLE:
            raise MalformedMime("the MIME boundary never came")
        if self._state is not _State.EPILOGUE:
            raise MalformedMime(f"the message ends in part {self._parts}, without its closing MIME boundary")

    def _read_seam(self, chunk: bytes, at: int, events: list[Event]) -> int:
        """Decide whether the bytes held back begin a delimiter, and go on after it or after them."""
        held = self._held
        seam = held + chunk[at : at + self._seam]
        line = seam[1:] if seam[:1] == b"\r" else seam
        if self._needle.startswith(line):
            self._held = seam
            return at + len(seam) - len(held)
        if line.startswith(self._needle):
            boundary_end = len(seam) - len(line) + len(self._needle)
            found = _AFTER_BOUNDARY.match(seam, boundary_end)
            if found:
                self._held, self._virtual = b"", 0
                self._delimiter(found, events)
                return at + found.end() - len(held)
            if _AFTER_BOUNDARY_SO_FAR.match(seam, boundary_end):
                self._held = seam
                return at + len(seam) - len(held)
        octets = held[self._virtual :]
        self._held, self._virtual = b"", 0
        self._octets(octets, 0, len(octets), events)
        return at

    def _read_octets(self, chunk: bytes, at: int, events: list[Event]) -> int:
        """Hand out octets up to the next delimiter, or up to what may be the beginning of one."""
        needle, search = self._needle, at
        while (hit := chunk.find(needle, search)) >= 0:
            found = _AFTER_BOUNDARY.match(chunk, hit + len(needle))
            if found:
                self._octets(chunk, at, self._line_end(chunk, hit, at), events)
                self._delimiter(found, events)
                return found.end()
            if _AFTER_BOUNDARY_SO_FAR.match(chunk, hit + len(needle)):
                break
            search = hit + 1  # a line that only begins like the boundary
        else:
            hit = chunk.find(b"\n", max(at, len(chunk) - len(needle) + 1))
            while hit >= 0 and not needle.startswith(chunk[hit:]):
                hit = chunk.find(b"\n", hit + 1)
        hold = self._line_end(chunk, len(chunk) if hit < 0 else hit, at)
        self._octets(chunk, at, hold, events)
        self._held = chunk[hold:]
        return len(chunk)

    def _line_end(self, chunk: bytes, line_feed: int, at: int) -> int:
        """Return where the line end begins whose LF is given: at its CR, if it has one."""
        has_cr = line_feed > at and chunk[line_feed - 1] == 0x0D and not self._bare_lf
        return line_feed - 1 if has_cr else line_feed

    def _octets(self, chunk: bytes, start: int, end: int, events: list[Event]) -> None:
        if start == end:
            return
        if self._state is _State.OCTETS:
            events.append(PartData(memoryview(chunk)[start:end]))
        else:
            self._drop(end - start, self._max_preamble, "before the first MIME boundary")

    def _drop(self, count: int, limit: int, where: str) -> None:
        self._dropped += count
        if self._dropped > limit:
            raise MalformedMime(f"more than {limit} bytes {where}")

    def _delimiter(self, found: re.Match[bytes], events: list[Event]) -> None:
        """Leave a part (or the preamble) at a delimiter."""
        if self._state is _State.OCTETS:
            events.append(PartEnd())
        if found[1]:
            if not self._parts:
                raise MalformedMime("a multipart message without a part")
            self._state, self._dropped = _State.EPILOGUE, 0
            events.append(Finished())
            return
        self._parts += 1
        if self._parts > self._max_parts:
            raise MessageTooLarge(f"more than {self._max_parts} MIME parts")
        self._state = _State.HEADER
        self._bare_lf = not found[2]
        self._header[:] = b"\n"  # the end of the boundary line: a blank line may follow at once

    def _read_header(self, chunk: bytes, at: int, events: list[Event]) -> int:
        header, before = self._header, len(self._header)
        header += chunk[at : at + _WINDOW]
        blank = _BLANK_LINE.search(header, max(0, before - 2))
        length = blank.start() if blank else len(header)
        if length > self._max_header:
            raise MessageTooLarge(f"header of MIME part {self._parts} over {self._max_header} bytes")
        if not blank:
            return at + len(header) - before
        block = bytes(header[1 : blank.end()])
        header.clear()
        # Only with bare LF throughout is a CR at the end of the octets theirs.
        self._bare_lf = self._bare_lf and b"\r" not in block
        events.append(PartStart(self._parse_header(block)))
        self._state = _State.OCTETS
        self._held, self._virtual = b"\n", 1  # of a part without octets, the blank line is the delimiter's line end
        return at + blank.end() - before

    def _parse_header(self, block: bytes) -> Headers:
        try:
            text = block.decode("utf-8")
        except UnicodeDecodeError:
            text = block.decode("latin-1")
        fields: list[tuple[str, str]] = []
        for line in _FOLD.sub(" ", text).split("\n"):
            line = line.removesuffix("\r")
            if not line:
                continue
            name, colon, value = line.partition(":")
            name, value = name.rstrip(" \t"), value.strip(" \t")
            if not colon or not _FIELD_NAME.match(name) or not _FIELD_VALUE.match(value):
                raise MalformedMime(f"header of MIME part {self._parts} has a line that is no field: {line[:80]!r}")
            fields.append((name, value))
        if len(fields) > self._max_header_fields:
            raise MessageTooLarge(f"header of MIME part {self._parts} has over {self._max_header_fields} fields")
        names = [name.lower() for name, _ in fields if name.lower().startswith("content-")]
        if len(names) != len(set(names)):
            raise MalformedMime(f"header of MIME part {self._parts} has a Content field twice")
        return Headers(fields)


def new_boundary(randomness: bytes) -> bytes:
    """Return a boundary made of random bytes, at least 16 of them.

    Long and random because CXF finds `--boundary` anywhere in a part, also in mid-line, and because octets are sent
    before anybody has looked through them.
    """
    if len(randomness) < 16:
        raise LocalProtocolError("a MIME boundary needs at least 16 random bytes")
    return b"xcai-" + randomness.hex().encode("ascii")[:64]


class Writer:
    """The bytes around the octets of a multipart message; the octets themselves go straight to the peer.

    For each part: `part_header`, octets, `part_end`; after the last one `end`.
    """

    def __init__(self, boundary: bytes) -> None:
        if not _BOUNDARY.match(boundary):
            raise LocalProtocolError(f"not a MIME boundary: {boundary!r}")
        self._boundary = boundary

    def part_header(self, headers: Sequence[tuple[str, str]]) -> bytes:
        """Return boundary line, header and blank line."""
        lines = [b"--" + self._boundary]
        for name, value in headers:
            if not _FIELD_NAME.match(name) or not _FIELD_VALUE.match(value):
                raise LocalProtocolError(f"not a MIME header field: {name}: {value!r}")
            lines.append(f"{name}: {value}".encode())
        return b"\r\n".join([*lines, b"", b""])

    def part_end(self) -> bytes:
        """Return what follows the octets of a part."""
        return b"\r\n"

    def end(self) -> bytes:
        """Return the closing boundary."""
        return b"--" + self._boundary + b"--\r\n"
