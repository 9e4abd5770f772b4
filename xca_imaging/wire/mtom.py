"""SOAP messages with attachments: XOP packages (MTOM), and plain SOAP read through the same reader.

A package is multipart/related: the root part holds the envelope, and in it `xop:Include href="cid:..."` stands for
the octets of another part. Both forms are read anywhere: peers announce one and send the other.

References
----------
* SOAP Message Transmission Optimization Mechanism, 3; XML-binary Optimized Packaging, 2 and 4
* RFC 2387, 3 (type, start, start-info); RFC 2392 (cid URLs); RFC 2045, 6 (Content-Transfer-Encoding)
* IHE ITI TF-2, Appendix V, V.8 (SIMPLE and MTOM)
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import quote, unquote

from lxml import etree

from xca_imaging import uids
from xca_imaging.errors import LocalProtocolError, MalformedMessage, MalformedMime, MessageTooLarge, RemoteProtocolError
from xca_imaging.wire import multipart, xml
from xca_imaging.wire.multipart import Finished

MAX_ROOT = xml.MAX_BYTES
"""Longest root part or plain message: what the parser takes."""

_MAX_LINE = 8192  # of quoted-printable; RFC 2045, 6.7 says 76, what it says is not always done

_PLAIN = frozenset({"application/soap+xml", "text/xml"})  # text/xml is SOAP 1.1: read, so that it gets its fault
_NO_TYPE = "text/plain"  # RFC 2045, 5.2: what a part is that does not say
_ONLY_ROOT = frozenset({"application/xop+xml", "application/soap+xml"})  # no document that is attached has these
_ROOT = _PLAIN | _ONLY_ROOT | {"application/xml", _NO_TYPE}

_INCLUDE = xml.qname(uids.NS_XOP, "Include")
_CONTENT_ID = re.compile(r"[!-;=?-~]+\Z")  # printable ASCII without angle brackets


class UnsupportedMedia(RemoteProtocolError):
    """The HTTP body is of a media type that carries no SOAP message; HTTP status 415."""


@dataclass(frozen=True, slots=True)
class Root:
    """The document with the envelope, complete; `charset` is the parameter of its Content-Type."""

    data: bytes
    charset: str | None


@dataclass(frozen=True, slots=True)
class AttachmentStart:
    """An attachment begins. `content_id` is normalised, and empty where the part has none."""

    content_id: str
    content_type: str


@dataclass(frozen=True, slots=True)
class AttachmentData:
    """Octets of the current attachment, decoded; use the view before the next `receive`."""

    view: memoryview


@dataclass(frozen=True, slots=True)
class AttachmentEnd:
    """The current attachment is complete."""


Event = Root | AttachmentStart | AttachmentData | AttachmentEnd | Finished


@dataclass(frozen=True, slots=True)
class Reference:
    """An xop:Include: the content is the attachment with this (normalised) Content-ID."""

    content_id: str


class _Decoder(Protocol):
    def decode(self, data: memoryview) -> bytes: ...

    def finish(self) -> bytes: ...


def _decode_base64(text: bytes) -> bytes:
    """Decode base64 without white space; also refuses the padding that strict mode lets pass (`QUJD=`)."""
    if len(text) % 4 or text.endswith(b"==="):
        raise binascii.Error("Incorrect padding")
    return binascii.a2b_base64(text, strict_mode=True)


class _Base64:
    """base64 (RFC 2045, 6.8) in pieces: white space anywhere, padding only at the end."""

    def __init__(self) -> None:
        self._rest = b""
        self._padded = False

    def decode(self, data: memoryview) -> bytes:
        text = self._rest + bytes(data).translate(None, b" \t\r\n")
        whole = len(text) - len(text) % 4
        text, self._rest = text[:whole], text[whole:]
        if self._padded and (text or self._rest):
            raise MalformedMime("base64 goes on after its padding")
        self._padded = text.endswith(b"=") or self._padded
        try:
            return _decode_base64(text)
        except binascii.Error as error:
            raise MalformedMime(f"not base64: {error}") from error

    def finish(self) -> bytes:
        if self._rest:
            raise MalformedMime("base64 ends in the middle of a group")
        return b""


class _QuotedPrintable:
    """quoted-printable (RFC 2045, 6.7) in pieces, decoded by whole lines."""

    def __init__(self) -> None:
        self._line = b""

    def decode(self, data: memoryview) -> bytes:
        text = self._line + bytes(data)
        if max(map(len, text.split(b"\n"))) > _MAX_LINE:
            raise MessageTooLarge(f"quoted-printable line over {_MAX_LINE} bytes")
        whole = text.rfind(b"\n") + 1
        self._line = text[whole:]
        return binascii.a2b_qp(text[:whole])

    def finish(self) -> bytes:
        return binascii.a2b_qp(self._line)


def _decoder(encoding: str) -> _Decoder | None:
    match encoding.strip().lower():
        case "" | "binary" | "8bit" | "7bit":
            return None
        case "base64":
            return _Base64()
        case "quoted-printable":
            return _QuotedPrintable()
        case other:
            raise MalformedMime(f"Content-Transfer-Encoding {other[:40]!r} is not known")


class Reader:
    """A SOAP message that arrives in pieces, with or without attachments.

    The root is the part that `start` names, or the first one of type XOP or SOAP (the TF's own sample has a `start`
    that names no part), or without `start` the first part. Attachments before it are handed out as they come.

    Parameters
    ----------
    content_type : str
        Value of the HTTP Content-Type field.
    max_root : int
        Longest root part.
    max_parts, max_header, max_preamble : int
        See `multipart.Reader`.

    Raises
    ------
    UnsupportedMedia
        The media type carries no SOAP message.
    MalformedMime, MessageTooLarge
        See `multipart.Reader`.
    """

    # Mutable state: _root (until it is whole), _root_seen, _in_root, _decoder of the current part,
    # _content_ids of the attachments so far.

    def __init__(
        self,
        content_type: str,
        *,
        max_root: int = MAX_ROOT,
        max_parts: int = multipart.MAX_PARTS,
        max_header: int = multipart.MAX_HEADER,
        max_preamble: int = multipart.MAX_PREAMBLE,
    ) -> None:
        try:
            announced = multipart.parse_content_type(content_type)
        except MalformedMime as error:
            raise UnsupportedMedia("the message has no Content-Type that can be read") from error
        self._max_root = max_root
        self._charset = announced.charset
        self._start: str | None = None
        self._parts: multipart.Reader | None = None
        if announced.media_type == "multipart/related":
            boundary = announced.parameters.get("boundary", "")
            if not boundary:
                raise MalformedMime("multipart/related without a boundary parameter")
            self._parts = multipart.Reader(
                boundary.encode("utf-8"), max_parts=max_parts, max_header=max_header, max_preamble=max_preamble
            )
            if announced.parameters.get("start"):
                self._start = normalise_content_id(announced.parameters["start"])
        elif announced.media_type not in _PLAIN:
            raise UnsupportedMedia(f"no SOAP 1.2 message in {announced.media_type}")
        self._root = bytearray()
        self._root_seen = self._in_root = False
        self._decoder: _Decoder | None = None
        self._content_ids: set[str] = set()

    def receive(self, data: bytes | bytearray | memoryview) -> list[Event]:
        """Take the next bytes and return what they complete."""
        events: list[Event] = []
        if self._parts is None:
            self._append_root(data)
            return events
        for event in self._parts.receive(data):
            match event:
                case multipart.PartData(view=view):
                    self._octets(view if self._decoder is None else self._decoder.decode(view), events)
                case multipart.PartStart(headers=headers):
                    self._start_part(headers, events)
                case multipart.PartEnd():
                    if self._decoder is not None:
                        self._octets(self._decoder.finish(), events)
                    events.append(self._finish_root() if self._in_root else AttachmentEnd())
                    self._in_root = False
                case multipart.Finished():
                    if not self._root_seen:
                        raise MalformedMime("no part of the package is its root")
                    events.append(event)
        return events

    def close(self) -> list[Event]:
        """Say that no more bytes come; a plain message is complete only then.

        Raises
        ------
        MalformedMime
            A package without its closing boundary.
        """
        if self._parts is None:
            return [self._finish_root(), Finished()]
        self._parts.close()
        return []

    def _start_part(self, headers: multipart.Headers, events: list[Event]) -> None:
        self._decoder = _decoder(headers.content_transfer_encoding)
        content_id = normalise_content_id(headers.content_id)
        if not self._root_seen:
            part_type = multipart.parse_content_type(headers.content_type or _NO_TYPE)
            named = self._start is None or content_id == self._start
            if named or part_type.media_type in _ONLY_ROOT:
                if part_type.media_type not in _ROOT:
                    raise MalformedMime(f"the root part is {part_type.media_type}, not XML")
                self._root_seen = self._in_root = True
                self._charset = part_type.charset
                return
        if content_id:
            if content_id in self._content_ids:
                raise MalformedMime(f"two parts have the Content-ID {content_id[:200]!r}")
            self._content_ids.add(content_id)
        events.append(AttachmentStart(content_id, headers.content_type))

    def _octets(self, data: bytes | memoryview, events: list[Event]) -> None:
        if self._in_root:
            self._append_root(data)
        elif len(data):
            events.append(AttachmentData(memoryview(data)))

    def _append_root(self, data: bytes | bytearray | memoryview) -> None:
        if len(self._root) + len(data) > self._max_root:
            raise MessageTooLarge(f"the SOAP part is over {self._max_root} bytes")
        self._root += data

    def _finish_root(self) -> Root:
        data, self._root = bytes(self._root), bytearray()
        return Root(data, self._charset)


def normalise_content_id(value: str) -> str:
    """Return a Content-ID as it is compared: without angle brackets, percent-decoded.

    Stacks differ in what they escape in the cid URL (CXF the colons, others the `@`, others nothing), and some escape
    the header too; decoding both sides makes them meet.
    """
    text = value.strip()
    if text.startswith("<") and text.endswith(">"):
        text = text[1:-1].strip()
    return unquote(text, errors="backslashreplace")


def content_id_of_href(href: str) -> str:
    """Return the normalised Content-ID that a `cid:` URL names.

    Raises
    ------
    MalformedMessage
        It is no cid URL.
    """
    scheme, _, rest = href.strip().partition(":")
    if scheme.lower() != "cid" or not rest:
        raise MalformedMessage(f"xop:Include refers to {xml.printable(href, 200)!r}, not to a part of the message")
    return normalise_content_id(rest)


def xop_include(content_id: str) -> etree._Element:
    """Return the element that stands for an attachment; it must be the only content of its parent (XOP, 2.1)."""
    include = etree.Element(_INCLUDE, nsmap={"xop": uids.NS_XOP})
    include.set("href", "cid:" + quote(content_id, safe="@!$&'()*+,;=-._~"))  # lower case: CXF finds no CID:
    return include


def inline_content(element: etree._Element) -> bytes | Reference:
    """Return the octets that an xs:base64Binary element holds, or the attachment that holds them.

    Raises
    ------
    MalformedMessage
        The element holds neither base64 nor one xop:Include.
    """
    if len(element) == 0:
        text = "".join((element.text or "").split())
        try:
            return _decode_base64(text.encode("ascii"))
        except (binascii.Error, UnicodeEncodeError) as error:
            raise MalformedMessage(f"{xml.local_name(element)} does not hold base64: {error}") from error
    around = (element.text or "") + (element[0].tail or "")
    if len(element) > 1 or element[0].tag != _INCLUDE or around.strip():
        raise MalformedMessage(f"{xml.local_name(element)} holds neither base64 nor one xop:Include")
    return Reference(content_id_of_href(element[0].get("href") or ""))


class Writer:
    """The bytes of an XOP package, around octets that go from file to socket without passing here.

    Order of calls: `preamble_line` any number of times, `root`, then for each attachment `attachment_header`, its
    octets and `attachment_end`, then `end`. The root goes first: CXF takes the first part whatever `start` says.

    Parameters
    ----------
    boundary : bytes
        From `multipart.new_boundary`.
    content_id_root : str
        Content-ID of the root, without angle brackets.
    action : str
        The wsa:Action, for the optional `action` parameter; empty leaves it out.
    """

    def __init__(self, boundary: bytes, content_id_root: str, action: str = "") -> None:
        self._parts = multipart.Writer(boundary)
        self._content_id_root = content_id_root
        parameters = [
            'type="application/xop+xml"',
            f'boundary="{boundary.decode("ascii")}"',
            f'start="{_bracketed(content_id_root)}"',
            'start-info="application/soap+xml"',
        ]
        if action:
            if not action.isascii() or not action.isprintable() or '"' in action or "\\" in action:
                raise LocalProtocolError(f"not an action: {action!r}")
            parameters.append(f'action="{action}"')
        self.content_type = "; ".join(["multipart/related", *parameters])
        """Value of the HTTP Content-Type field."""

    def preamble_line(self) -> bytes:
        """Return a line that a receiver skips: it keeps a connection alive while the root has to wait."""
        return b"please wait\r\n"

    def _root_header(self) -> bytes:
        return self._parts.part_header(
            [
                ("Content-Type", 'application/xop+xml; charset=UTF-8; type="application/soap+xml"'),
                ("Content-Transfer-Encoding", "binary"),
                ("Content-ID", _bracketed(self._content_id_root)),
            ]
        )

    def root(self, data: bytes) -> bytes:
        """Return the whole root part."""
        return self._root_header() + data + self._parts.part_end()

    def attachment_header(self, content_id: str, content_type: str) -> bytes:
        """Return what comes before the octets of an attachment."""
        return self._parts.part_header(
            [
                ("Content-Type", content_type),
                ("Content-Transfer-Encoding", "binary"),
                ("Content-ID", _bracketed(content_id)),
            ]
        )

    def attachment_end(self) -> bytes:
        """Return what comes after them."""
        return self._parts.part_end()

    def end(self) -> bytes:
        """Return the closing boundary."""
        return self._parts.end()

    def total_length(self, root_length: int, attachments: Iterable[tuple[str, str, int]]) -> int:
        """Return the length of the whole package, for Content-Length.

        Parameters
        ----------
        attachments : iterable of (content_id, content_type, size)
        """
        part_end = len(self._parts.part_end())
        length = len(self._root_header()) + root_length + part_end + len(self.end())
        for content_id, content_type, size in attachments:
            length += len(self.attachment_header(content_id, content_type)) + size + part_end
        return length


def _bracketed(content_id: str) -> str:
    if not _CONTENT_ID.match(content_id) or '"' in content_id or "\\" in content_id:
        raise LocalProtocolError(f"not a Content-ID: {content_id!r}")
    return f"<{content_id}>"
