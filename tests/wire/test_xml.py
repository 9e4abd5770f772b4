from __future__ import annotations

import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lxml import etree

from tests.support.feeding import pieces
from xca_imaging.errors import MalformedXml, MessageTooLarge
from xca_imaging.wire import xml


def parse_in(data: bytes, sizes: list[int], charset: str | None = None) -> etree._Element:
    feed = xml.Feed(charset=charset)
    for piece in pieces(data, sizes):
        feed.feed(piece)
    return feed.close()


def refuse(data: bytes, error: type[Exception], match: str, **limits: int) -> None:
    """The same refusal whole and byte by byte."""
    for sizes in ([], [1]):
        feed = xml.Feed(**limits)
        with pytest.raises(error, match=match):  # noqa: PT012 - refused at once or at the end, both are right
            for piece in pieces(data, sizes):
                feed.feed(piece)
            feed.close()


DOCUMENT = (
    '<?xml version="1.0"?>\n<!-- a > b --><?style x?>\n'
    '<a xmlns="urn:x" b="1">ä€𝄞<c>&lt;&#65;<![CDATA[<d>]]></c>tail<e/></a>\n<!-- after -->\n'
).encode()


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_pieces_do_not_matter(sizes: list[int]) -> None:
    assert xml.serialize(parse_in(DOCUMENT, sizes)) == xml.serialize(xml.parse(DOCUMENT))


def test_whole_bytewise_and_reread() -> None:
    root = xml.parse(DOCUMENT)
    assert xml.serialize(root) == '<a xmlns="urn:x" b="1">ä€𝄞<c>&lt;A&lt;d&gt;</c>tail<e/></a>'.encode()
    assert xml.serialize(parse_in(DOCUMENT, [1])) == xml.serialize(root)
    assert xml.serialize(xml.parse(xml.serialize(root))) == xml.serialize(root)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer(kind: type) -> None:
    assert xml.parse(kind(b"<a>x</a>")).text == "x"


def test_trailing_bytes_are_refused() -> None:
    for after in (b"<b/>", b"x", b"\0", b"<!DOCTYPE a>"):
        refuse(b"<a/>" + after, MalformedXml, "Extra content")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b" ",
        b"<",
        b"<!-- only -->",
        b"<a",
        b"<a>",
        b"<a></b>",
        b"<a b=1/>",
        b"<a>&b;</a>",
        b"<a>\0</a>",
        b"\0\0\0\0",
        b"<a>\xff</a>",
        b"<a b='1' b='2'/>",
        b"<x:a/>",
        b"text",
        b"\xef\xbb\xbf",
        b"<?xml",
        b"<a><!DOCTYPE a></a>",
        b" <?xml version='1.0'?><a/>",
        b"<a>\xed\xa0\x80</a>",
        b"<a>&#0;</a>",
        b"<?xml version='1.0'?>",
        b"<!-",
    ],
)
def test_not_well_formed(data: bytes) -> None:
    refuse(data, MalformedXml, "not well-formed")


@pytest.mark.parametrize(
    "document",
    [
        "<!DOCTYPE a><a/>",
        '<?xml version="1.0"?> <!-- x -->\n<!DOCTYPE a SYSTEM "file:///etc/passwd"><a/>',
        '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><a>&x;</a>',
        '<!DOCTYPE a [<!ENTITY % x SYSTEM "http://127.0.0.1:9/x"> %x;]><a/>',
        '<!DOCTYPE a [<!ENTITY x "y">]><a b="&x;"/>',
        "<!DOCTYPE a ["
        + '<!ENTITY a0 "lol">'
        + "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 10))
        + "]><a>&a9;</a>",
    ],
    ids=["bare", "external subset", "external entity", "parameter entity", "internal entity", "billion laughs"],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_document_type_is_refused_in_every_encoding(document: str, encoding: str) -> None:
    refuse(document.encode(encoding), MalformedXml, "document type declaration")


def test_doctype_as_text_is_text() -> None:
    assert xml.parse(b"<!-- <!DOCTYPE a> --><a><![CDATA[<!DOCTYPE b>]]></a>").text == "<!DOCTYPE b>"


def test_comments_cannot_cut_text() -> None:
    root = xml.parse(b"<a>ad<!-- x -->m<?y z?>in</a>")
    assert root.text == "admin"
    assert len(root) == 0


UMLAUT = "<a>Gräßlich €</a>"


@pytest.mark.parametrize(
    ("data", "charset"),
    [
        (UMLAUT.encode(), None),
        (UMLAUT.encode(), "UTF-8"),
        (UMLAUT.encode("utf-8-sig"), None),
        (UMLAUT.encode("utf-8-sig"), "iso-8859-15"),  # a byte order mark outranks the parameter
        (UMLAUT.encode("iso-8859-15"), "ISO-8859-15"),
        (UMLAUT.encode("cp1252"), "windows-1252"),
        (b'<?xml version="1.0" encoding="UTF-8"?>' + UMLAUT.encode("iso-8859-15"), "iso-8859-15"),
        (b"<?xml version='1.0'  encoding = 'windows-1252'  ?>" + UMLAUT.encode("cp1252"), None),
        (b'<?xml version="1.0" encoding="ISO-8859-15"?>' + UMLAUT.encode(), "utf-8"),
        (b'<?xml version="1.0" encoding="utf-16"?>' + UMLAUT.encode(), None),  # .NET StringWriter
        (('<?xml version="1.0" encoding="utf-16"?>' + UMLAUT).encode("utf-16"), None),
        (UMLAUT.encode("utf-16"), "utf-16"),
        (UMLAUT.encode("utf-16-le"), "utf-16"),
        (UMLAUT.encode("utf-16-be"), "UTF-16BE"),
        (UMLAUT.encode("utf-16-be"), None),
    ],
)
def test_character_encodings(data: bytes, charset: str | None) -> None:
    assert xml.parse(data, charset=charset).text == "Gräßlich €"
    assert parse_in(data, [1], charset).text == "Gräßlich €"


@pytest.mark.parametrize("charset", ["utf-7", "ebcdic-cp-us", "cp037", "rot13", "zlib", "no such", "x\0y", "ä" * 99])
def test_other_encodings_are_refused(charset: str) -> None:
    with pytest.raises(MalformedXml, match="is not read"):
        xml.parse(b"<a/>", charset=charset)


def test_declared_exotic_encoding_is_refused() -> None:
    refuse(b'<?xml version="1.0" encoding="UTF-7"?><a/>', MalformedXml, "'UTF-7' is not read")


def test_bytes_outside_the_encoding() -> None:
    with pytest.raises(MalformedXml, match="announced character encoding"):
        xml.parse(b"<a>\x81</a>", charset="windows-1252")
    with pytest.raises(MalformedXml, match="announced character encoding"):
        xml.parse("<a/>".encode("utf-16")[:-1])


def test_long_text_is_read() -> None:
    text = b"QUJD" * 5_000_000  # over libxml2's own 10 MB
    feed = xml.Feed()
    for piece in pieces(b"<a>" + text + b"</a>", [65_536]):
        feed.feed(piece)
    assert len(feed.close().text or "") == len(text)


def test_depth_is_limited() -> None:
    for depth in (1, 200, xml.MAX_DEPTH):
        assert xml.parse(b"<a>" * depth + b"</a>" * depth) is not None
        assert xml.parse(b"<r>" + b"<a/>" * 1000 + b"<a>" * (depth - 1) + b"</a>" * (depth - 1) + b"</r>") is not None
    for depth in (xml.MAX_DEPTH + 1, 2000, 2500, 100_000):
        refuse(b"<a>" * depth + b"</a>" * depth, MalformedXml, "depth")
    refuse(b"<a><b><c/></b></a>", MalformedXml, "depth of more than 2", max_depth=2)


def test_limits() -> None:
    refuse(b"<a>" + b"x" * 100 + b"</a>", MessageTooLarge, "over 100 bytes", max_bytes=100)
    refuse(b"<a>" + b"<b/>" * 20 + b"</a>", MessageTooLarge, "more than 20 tags", max_markup=20)
    refuse(b"<a " + b" ".join(b"b%d=''" % n for n in range(21)) + b"/>", MessageTooLarge, "more than 20", max_markup=20)
    feed = xml.Feed(max_prolog=50)
    feed.feed(b"<!--" + b"x" * 40)
    with pytest.raises(MessageTooLarge, match="before the root"):
        feed.feed(b"x" * 40)
    feed = xml.Feed(max_prolog=50)
    with pytest.raises(MessageTooLarge, match="XML declaration"):
        feed.feed(b"<?xml " + b"x" * 50)


def test_utf16_cannot_hide_markup_from_the_limit() -> None:
    with pytest.raises(MessageTooLarge, match="tags"):
        xml.parse(("<a>" + "<b/>" * 30 + "</a>").encode("utf-16"), max_markup=20)


def test_fifty_megabytes_stop_at_the_limit() -> None:
    feed, fed = xml.Feed(), 0
    feed.feed(b"<a>")
    with pytest.raises(MessageTooLarge):  # noqa: PT012 - where it stops is what is looked at
        for _ in range(800):
            feed.feed(b"x" * 65_536)
            fed += 65_536
    assert fed < xml.MAX_BYTES


_MEASURE = """
import resource
from xca_imaging.errors import MessageTooLarge
from xca_imaging.wire import xml
xml.parse(b"<a/>")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
feed = xml.Feed()
try:
    feed.feed(b"<r>")
    for _ in range(500):
        feed.feed(b"<a/>" * 16384)
except MessageTooLarge:
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_memory_of_32_mb_of_empty_elements() -> None:
    done = subprocess.run([sys.executable, "-c", _MEASURE], capture_output=True, text=True, check=True, timeout=50)
    assert int(done.stdout) < 400  # MB; without the limit on markup it is over 1000


def test_many_small_pieces_are_linear() -> None:
    started = time.perf_counter()
    parse_in(b"<a b='" + b"x" * 200_000 + b"'>" + b"y" * 200_000 + b"<!--" + b"z" * 100_000 + b"--></a>", [7])
    assert time.perf_counter() - started < 5


def test_names_and_text() -> None:
    root = xml.parse(b"<x:a xmlns:x='urn:x'>\n one <b/> two</x:a>")
    assert root.tag == xml.qname("urn:x", "a") == "{urn:x}a"
    assert xml.qname("", "b") == root[0].tag == "b"
    assert xml.split_name(root) == ("urn:x", "a")
    assert xml.split_name(root[0]) == ("", "b")
    assert xml.local_name(root) == "a"
    assert xml.text_of(root) == "one"
    assert xml.text_of(root[0]) == xml.text_of(None) == ""
    assert xml.serialize(root[0]) == b'<b xmlns:x="urn:x"/>'


@given(st.text(max_size=50))
def test_printable_text_fits_in_xml(text: str) -> None:
    element = etree.Element("a")
    element.text = xml.printable(text)
    assert len(xml.printable(text, 10)) <= 10
    xml.parse(xml.serialize(element))
