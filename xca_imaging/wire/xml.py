"""The XML parser settings of this node, and the few element helpers that every codec needs.

Nothing else in the package makes a parser. What comes in is text of a peer, so: no DTD (and with it no entities), no
network, bounded bytes, bounded nodes, bounded depth. Comments and processing instructions are dropped while reading,
so that the text of an element is always one string: `ad<!-- -->min` cannot be signed as one thing and read as another.

References
----------
* XML 1.0 (Fifth Edition), 2.8 (prolog), 4.3.3 and F.1 (character encoding)
* RFC 7303, 3 (byte order mark, charset parameter, XML declaration: in this order)
"""

from __future__ import annotations

import codecs
import re

from lxml import etree

from xca_imaging.errors import MalformedXml, MessageTooLarge

MAX_BYTES = 32 * 1024 * 1024
"""Longest document: 5000 DocumentEntries, or a manifest inline as base64, with room to spare."""

MAX_MARKUP = 2_000_000
"""Most `<` and `=` in a document: an upper bound of its nodes that costs no parsing.

A DocumentEntry of a usual peer has 280, so 5000 of them are 1.4 million. A node takes 130 to 250 bytes once parsed
(measured: at most 500 MB at this limit): this, and not the number of bytes, keeps 32 MB of `<a/>` from becoming
gigabytes.
"""

MAX_PROLOG = 64 * 1024
"""Most bytes before the root element; they are held back until it is clear that they contain no DOCTYPE."""

MAX_DEPTH = 256
"""Most levels of elements: what libxml2 allows without huge_tree; a SOAP message with metadata has a dozen.

Checked here because in huge_tree mode libxml2 has a limit of its own (2048) only from 2.14 on.
"""

_SPACE = b" \t\r\n"
_DECLARED = re.compile(rb"""<\?xml\s[^>]*?encoding\s*=\s*["']([A-Za-z][A-Za-z0-9._\-]*)["']""")
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

_ENCODINGS = frozenset(
    {"utf-8", "utf-16", "utf-16-le", "utf-16-be", "ascii", *(f"iso8859-{n}" for n in (*range(1, 12), 13, 14, 15, 16))}
    | {f"cp125{n}" for n in range(9)}
)
"""Codecs that are read: what SOAP stacks emit. A long list of exotic ones would only widen the surface."""


class Feed:
    """An XML document that arrives in pieces.

    Parameters
    ----------
    charset : str, optional
        The `charset` parameter of the Content-Type; it outranks the XML declaration, a byte order mark outranks both.
    max_bytes, max_markup, max_prolog, max_depth : int
        Limits, with their reasons at the defaults. Over one of them is `MessageTooLarge`.

    Raises
    ------
    MalformedXml
        Not well-formed, in an encoding that is not read, too deep, or with a document type declaration.
    """

    # Mutable state: the parser, the decoder once the encoding is known, bytes of the prolog, counters.

    def __init__(
        self,
        *,
        charset: str | None = None,
        max_bytes: int = MAX_BYTES,
        max_markup: int = MAX_MARKUP,
        max_prolog: int = MAX_PROLOG,
        max_depth: int = MAX_DEPTH,
    ) -> None:
        self._charset = charset
        self._max_bytes, self._max_markup, self._max_prolog = max_bytes, max_markup, max_prolog
        self._max_depth = max_depth
        self._bytes = self._markup = 0
        self._raw = bytearray()  # before the encoding is known
        self._encoding_known = False
        self._decoder: codecs.IncrementalDecoder | None = None  # None: the bytes are UTF-8 as they are
        self._prolog: bytearray | None = bytearray()  # UTF-8, until the root element starts
        self._prolog_read = 0
        # encoding="utf-8" outranks the XML declaration: what we looked at is what libxml2 reads.
        self._parser = etree.XMLParser(
            encoding="utf-8",
            resolve_entities=False,
            load_dtd=False,
            no_network=True,
            huge_tree=True,  # text nodes over 10 MB (inline base64); size and count limits are ours
            remove_comments=True,
            remove_pis=True,
            collect_ids=False,
        )

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Take the next bytes."""
        self._bytes += len(data)
        if self._bytes > self._max_bytes:
            raise MessageTooLarge(f"XML document over {self._max_bytes} bytes")
        if self._encoding_known:
            self._text(self._decode(bytes(data), final=False))
            return
        self._raw += data
        if self._find_encoding(final=False):
            raw, self._raw = bytes(self._raw), bytearray()
            self._text(self._decode(raw, final=False))
        elif len(self._raw) > self._max_prolog:
            raise MessageTooLarge(f"XML declaration over {self._max_prolog} bytes")

    def close(self) -> etree._Element:
        """Return the root element; the document must be complete."""
        if not self._encoding_known:
            self._find_encoding(final=True)
        raw, self._raw = bytes(self._raw), bytearray()
        self._text(self._decode(raw, final=True))
        if self._prolog is not None:
            raise MalformedXml("not well-formed XML: no root element")
        try:
            root = self._parser.close()
        except etree.XMLSyntaxError as error:
            raise MalformedXml(f"not well-formed XML: {error.msg}") from error
        # The scan of the prolog has refused it already; this holds whatever libxml2 comes to accept.
        if root.getroottree().docinfo.internalDTD is not None:
            raise MalformedXml("a document type declaration is not read")
        if self._markup > self._max_depth and _is_deeper(root, self._max_depth):
            raise MalformedXml(f"elements nested to a depth of more than {self._max_depth}")
        return root

    def _find_encoding(self, *, final: bool) -> bool:
        """Choose the decoder from the first bytes; False while there are too few of them."""
        raw = self._raw
        if len(raw) < len(b"<?xml") and not final:
            return False
        name = ""
        if raw.startswith(codecs.BOM_UTF8):
            del raw[:3]
            name = "utf-8"
        elif raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            name = "utf-16"
        elif raw.startswith((b"<\0", b"\0<")):  # XML F.1: UTF-16 without a byte order mark
            name = "utf-16-le" if raw[0] else "utf-16-be"
        elif self._charset:
            name = self._charset
        elif raw.startswith(b"<?xml"):
            if b"?>" not in raw and not final:
                return False
            declared = _DECLARED.match(raw)
            # .NET's StringWriter declares utf-16 over what is then sent as UTF-8: the bytes are right.
            if declared and not declared[1].lower().startswith(b"utf-16"):
                name = declared[1].decode("ascii")
        try:
            codec = codecs.lookup(name.strip() or "utf-8")
        except (LookupError, ValueError) as error:
            raise MalformedXml(f"character encoding {name[:40]!r} is not read") from error
        if codec.name not in _ENCODINGS:
            raise MalformedXml(f"character encoding {name[:40]!r} is not read")
        if codec.name not in ("utf-8", "ascii"):  # ASCII is read as the UTF-8 that it is
            self._decoder = codec.incrementaldecoder()
        self._encoding_known = True
        return True

    def _decode(self, data: bytes, *, final: bool) -> bytes:
        if self._decoder is None:
            return data
        try:
            return self._decoder.decode(data, final).encode("utf-8")
        except UnicodeError as error:
            raise MalformedXml(f"bytes are not in the announced character encoding: {error}") from error

    def _text(self, data: bytes) -> None:
        """Pass UTF-8 on to libxml2, once the prolog is known to be clean."""
        self._markup += data.count(b"<") + data.count(b"=")
        if self._markup > self._max_markup:
            raise MessageTooLarge(f"XML document with more than {self._max_markup} tags and attributes")
        if self._prolog is not None:
            self._prolog += data
            if not self._leave_prolog(self._prolog):
                if len(self._prolog) > self._max_prolog:
                    raise MessageTooLarge(f"more than {self._max_prolog} bytes before the root element")
                return
            data, self._prolog = bytes(self._prolog), None
        try:
            self._parser.feed(data)
        except etree.XMLSyntaxError as error:
            raise MalformedXml(f"not well-formed XML: {error.msg}") from error

    def _leave_prolog(self, head: bytearray) -> bool:
        """Walk over declaration, comments and instructions; True at the root element (or at what is no prolog)."""
        at = self._prolog_read
        while True:
            while at < len(head) and head[at] in _SPACE:
                at += 1
            self._prolog_read = at
            start = bytes(head[at : at + 4])
            if start.startswith(b"<?"):
                end = head.find(b"?>", at + 2)
            elif start == b"<!--":
                end = head.find(b"-->", at + 4)
            elif start in (b"", b"<", b"<!", b"<!-"):
                return False
            elif start.startswith(b"<!"):
                raise MalformedXml("a document type declaration is not read")
            else:
                return True  # the root element, or something that libxml2 will name as the error it is
            if end < 0:
                return False
            at = end + (2 if start.startswith(b"<?") else 3)


def _is_deeper(root: etree._Element, depth: int) -> bool:
    """Say whether there is an element below so many levels, going level by level inside libxml2."""
    return bool(root.xpath(f"boolean({'/*' * (depth + 1)})"))


def parse(
    data: bytes | bytearray | memoryview,
    *,
    charset: str | None = None,
    max_bytes: int = MAX_BYTES,
    max_markup: int = MAX_MARKUP,
) -> etree._Element:
    """Return the root element of a document; see `Feed` for limits and errors."""
    feed = Feed(charset=charset, max_bytes=max_bytes, max_markup=max_markup)
    feed.feed(data)
    return feed.close()


def serialize(element: etree._Element) -> bytes:
    """Return an element as UTF-8 without declaration or tail, with every namespace declaration it needs."""
    return etree.tostring(element, encoding="utf-8", with_tail=False)


def qname(namespace: str, local: str) -> str:
    """Return a name as lxml writes it: `{namespace}local`."""
    return f"{{{namespace}}}{local}" if namespace else local


def split_name(element: etree._Element) -> tuple[str, str]:
    """Return (namespace, local name) of an element; namespace is empty where there is none."""
    tag = str(element.tag)
    if tag[:1] != "{":
        return "", tag
    namespace, _, local = tag[1:].rpartition("}")
    return namespace, local


def local_name(element: etree._Element) -> str:
    """Return the name of an element without its namespace."""
    return split_name(element)[1]


def text_of(element: etree._Element | None) -> str:
    """Return the text before the first child, without white space around it; empty for no element."""
    return "" if element is None else (element.text or "").strip(" \t\r\n")


def printable(text: str, max_length: int = 1000) -> str:
    """Return text that may stand in an XML document: other characters become `?`, and it is cut.

    For reasons and contexts that quote a peer's bytes; 1000 characters are more than a person reads.
    """
    return _NOT_XML.sub("?", text[:max_length])
