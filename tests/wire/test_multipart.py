from __future__ import annotations

import email
import email.policy
import os
import time
import tracemalloc
from email.mime.application import MIMEApplication
from email.mime.multipart import MIMEMultipart
from itertools import groupby
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from requests_toolbelt import MultipartDecoder, MultipartEncoder

from tests.support.feeding import feed, feed_bytewise, feed_whole, pieces
from xca_imaging.errors import LocalProtocolError, MalformedMime, MessageTooLarge
from xca_imaging.wire import multipart
from xca_imaging.wire.multipart import Finished, PartData, PartEnd, PartStart

SIMPLE = (
    b"--b1\r\nContent-Type: text/plain\r\nContent-ID: <one>\r\n\r\nfirst\r\n--b1\r\n\r\n\r\nsecond\r\n\r\n--b1--\r\n"
)


def keep(event: Any) -> Any:
    """Views become bytes; adjacent ones are joined by `parts_of`."""
    return bytes(event.view) if isinstance(event, PartData) else event


def parts_of(kept: list[Any]) -> list[tuple[dict[str, str], bytes]]:
    """Return header and octets of each part; the order of events is checked on the way."""
    parts: list[tuple[dict[str, str], bytes]] = []
    assert kept.pop() == Finished()
    for is_octets, group in groupby(kept, key=lambda event: isinstance(event, bytes)):
        events = list(group)
        if is_octets:
            assert all(events)
            parts[-1] = (parts[-1][0], b"".join(events))
            continue
        for event in events:
            if isinstance(event, PartStart):
                parts.append((dict(event.headers), b""))
            else:
                assert isinstance(event, PartEnd)
    assert [type(e) for e in kept if not isinstance(e, bytes)] == [PartStart, PartEnd] * len(parts)
    return parts


def read(data: bytes, boundary: bytes = b"b1", sizes: list[int] | None = None) -> list[tuple[dict[str, str], bytes]]:
    """Read whole, byte by byte, in the given pieces and with trailing bytes; all must agree."""
    reader = multipart.Reader(boundary)
    parts = parts_of(feed_whole(reader, data, keep))
    reader.close()
    for chunks in (pieces(data, [1]), pieces(data, sizes or [3, 5]), pieces(data + b"--b1\r\n\r\ntrailing", [7])):
        reader = multipart.Reader(boundary)
        assert parts_of(feed(reader, chunks, keep)) == parts
        reader.close()
    return parts


def octets(data: bytes, boundary: bytes = b"b1") -> list[bytes]:
    return [content for _, content in read(data, boundary)]


def refuse(data: bytes, error: type[Exception], match: str, **limits: int) -> None:
    """The same refusal whole and byte by byte."""
    for feeding in (feed_whole, feed_bytewise):
        reader = multipart.Reader(b"b1", **limits)
        with pytest.raises(error, match=match):  # noqa: PT012 - at once or at the end, both are right
            feeding(reader, data)
            reader.close()


def test_two_parts() -> None:
    assert read(SIMPLE) == [
        ({"content-type": "text/plain", "content-id": "<one>"}, b"first"),
        ({}, b"\r\nsecond\r\n"),
    ]


@pytest.mark.parametrize(
    ("data", "contents"),
    [
        (b"\r\n--b1\r\n\r\nx\r\n--b1--", [b"x"]),  # CXF: blank line first, nothing after the last boundary
        (b"preamble\r\nof --b1 two lines\r\n--b1\r\n\r\nx\r\n--b1--\r\nepilogue", [b"x"]),
        (b"--b1x\r\n--b1\r\n\r\nx\r\n--b1--", [b"x"]),
        (b"--b1 \t \r\n\r\nx\r\n--b1\t\r\n\r\ny\r\n--b1--  \r\n", [b"x", b"y"]),  # transport padding
        (b"--b1\n\nx\n--b1\n\ny\r\n--b1--\n", [b"x", b"y\r"]),  # bare LF: a CR before it is an octet
        (b"--b1\nA: b\n\nx\n--b1--", [b"x"]),
        (b"--b1\nA: b\r\n\nx\r\n--b1--", [b"x"]),  # mixed line ends: CRLF before the boundary is its own
        (b"--b1\r\n\r\n--b1\r\nA: b\r\n\r\n--b1--", [b"", b""]),  # no octets: the blank line is the line end
        (b"--b1\r\n\r\n\r\n--b1--", [b""]),
        (b"--b1\r\n\r\n\r\n\r\n--b1--", [b"\r\n"]),
        (b"--b1\r\n\r\n\r\n--b10\r\n--b1-x\r\n--b1 x\r\n--b\r\n--b1", None),
        (b"--b1\r\n\r\n--b10\r\n--b1-x\r\n --b1--\r\n--b1 x\r\n--b1--", [b"--b10\r\n--b1-x\r\n --b1--\r\n--b1 x"]),
        (b"--b1\r\n\r\n\r\r\n\r\r\n--b1--", [b"\r\r\n\r"]),
        (b"--b1\r\n\r\n\0\0\r\n\0--b1--\0\r\n--b1--", [b"\0\0\r\n\0--b1--\0"]),
        (b"--b1\r\n\r\n\n--b\n--b1\t\r\r\n--b1--", [b"\n--b\n--b1\t\r"]),
        (b"--b1\r\n\r\nx\r\n--b1" + b" " * 65 + b"\r\n--b1--", [b"x\r\n--b1" + b" " * 65]),  # over the padding limit
    ],
)
def test_delimiters(data: bytes, contents: list[bytes] | None) -> None:
    if contents is None:
        refuse(data, MalformedMime, "without its closing MIME boundary")
    else:
        assert octets(data) == contents


def test_header_forms() -> None:
    data = (
        b"--b1\r\ncontent-TYPE : application/xop+xml;\r\n\ttype=x;\r\n  y=z\r\nX-\xc3\xa4: 1\r\n".replace(
            b"X-\xc3\xa4", b"X-A"
        )
        + b"X-A: second\r\nEmpty:\r\nLatin: \xe4\r\n\r\nx\r\n--b1--"
    )
    reader = multipart.Reader(b"b1")
    start = feed_whole(reader, data)[0]
    assert start.headers["CONTENT-Type"] == start.headers.content_type == "application/xop+xml; type=x; y=z"
    assert start.headers["x-a"] == "1"
    assert start.headers["empty"] == ""
    assert start.headers["latin"] == "ä"
    assert start.headers.content_id == start.headers.content_transfer_encoding == ""
    assert "nothing" not in start.headers
    read(data)


def test_utf8_header() -> None:
    assert read(b"--b1\r\nContent-ID: <\xc3\xa4>\r\n\r\n\r\n--b1--")[0][0] == {"content-id": "<ä>"}


# --- Chunking --------------------------------------------------------------------------------------------------------

CONTENT = st.lists(
    st.sampled_from([b"\r", b"\n", b"-", b"--", b"b1", b"\r\n--b1", b"\n--b1", b"\r\n--b", b" ", b"\0", b"x" * 50]),
    max_size=12,
).map(b"".join)


def harmless(content: bytes) -> bool:
    """Whether a content may stand in a part: it has no delimiter, also not together with what surrounds it."""
    framed = b"\n" + content + b"\r\n"
    at = framed.find(b"\n--b1")
    while at >= 0:
        after = framed[at + 5 :]
        if after.startswith(b"--") or after.lstrip(b" \t").startswith((b"\n", b"\r\n")):
            return False
        at = framed.find(b"\n--b1", at + 1)
    return True


@given(st.lists(CONTENT.filter(harmless), min_size=1, max_size=4), st.lists(st.integers(1, 30), min_size=1, max_size=6))
@example([b"\r"], [1])
@example([b"\r\n--b1 \r"], [5])
def test_any_content_in_any_pieces(contents: list[bytes], sizes: list[int]) -> None:
    writer = multipart.Writer(b"b1")
    data = b"".join(writer.part_header([("A", "b")]) + content + writer.part_end() for content in contents)
    assert [content for _, content in read(data + writer.end(), sizes=sizes)] == contents


@given(st.binary(max_size=300), st.integers(1, 40))
def test_arbitrary_bytes_end_in_events_or_in_an_error(data: bytes, size: int) -> None:
    reader = multipart.Reader(b"b1")
    try:
        feed(reader, pieces(b"--b1\r\n" + data, [size]))
        reader.close()
    except (MalformedMime, MessageTooLarge):
        pass


def test_every_cut_of_a_message() -> None:
    whole = parts_of(feed_whole(multipart.Reader(b"b1"), SIMPLE, keep))
    for cut in range(len(SIMPLE)):
        assert parts_of(feed(multipart.Reader(b"b1"), [SIMPLE[:cut], b"", SIMPLE[cut:]], keep)) == whole


def test_octets_are_views_of_the_chunk() -> None:
    reader = multipart.Reader(b"b1")
    reader.receive(b"--b1\r\n\r\n")
    chunk = os.urandom(1000).replace(b"\n", b" ") + b"."
    (event,) = reader.receive(chunk)
    assert isinstance(event, PartData)
    assert event.view.obj is chunk
    assert len(event.view) == len(chunk)


def test_finished_at_the_closing_boundary() -> None:
    reader = multipart.Reader(b"b1")
    assert reader.receive(b"--b1\r\n\r\nx\r\n--b1-")[-1] != Finished()
    assert reader.receive(b"-")[-1] == Finished()
    assert reader.receive(b"anything\r\n--b1\r\n\r\n") == []


def test_other_buffers_are_copied() -> None:
    buffer = bytearray(SIMPLE)
    events = multipart.Reader(b"b1").receive(memoryview(buffer))
    buffer[:] = bytes(len(buffer))
    assert b"first" in [keep(event) for event in events]


# --- What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "never came"),
        (b"no boundary at all", "never came"),
        (b"--b2\r\n\r\nx\r\n--b2--", "never came"),
        (b"--b1", "never came"),
        (b"--b1--\r\n", "without a part"),
        (b"--b1\r\n", "ends in part 1"),
        (b"--b1\r\nA: b\r\n", "ends in part 1"),
        (b"--b1\r\n\r\nx", "ends in part 1"),
        (b"--b1\r\n\r\nx\r\n--b1\r\n\r\ny\r\n--b1-", "ends in part 2"),
        (b"--b1\r\n\r\nx\r\n--b1\r\n", "ends in part 2"),
        (b"--b1\r\nno field\r\n\r\nx\r\n--b1--", "is no field"),
        (b"--b1\r\nA: \0\r\n\r\nx\r\n--b1--", "is no field"),
        (b"--b1\r\nA\0: b\r\n\r\nx\r\n--b1--", "is no field"),
        (b"--b1\r\n: b\r\n\r\nx\r\n--b1--", "is no field"),
        (b"--b1\r\nA: b\rC: d\r\n\r\nx\r\n--b1--", "is no field"),
        (b"--b1\r\n folded: from nowhere\r\n\r\nx\r\n--b1--", "is no field"),
        (b"--b1\r\nContent-ID: <a>\r\ncontent-id: <b>\r\n\r\nx\r\n--b1--", "a Content field twice"),
    ],
)
def test_broken_messages(data: bytes, match: str) -> None:
    refuse(data, MalformedMime, match)


def test_limits() -> None:
    one = b"--b1\r\n\r\nx\r\n"
    refuse(one * 4 + b"--b1--", MessageTooLarge, "more than 3 MIME parts", max_parts=3)
    refuse(b"--b1\r\nA: " + b"x" * 100, MessageTooLarge, "over 100 bytes", max_header=100)
    refuse(b"--b1\r\nA: " + b"x" * 100 + b"\r\n\r\n", MessageTooLarge, "over 100 bytes", max_header=100)
    refuse(b"--b1\r\n" + b"A: b\r\n" * 5 + b"\r\n", MessageTooLarge, "over 4 fields", max_header_fields=4)
    refuse(b"x" * 101 + one, MalformedMime, "more than 100 bytes before", max_preamble=100)
    refuse(one + b"--b1--" + b"x" * 101, MalformedMime, "more than 100 bytes after", max_epilogue=100)


def test_twenty_thousand_parts() -> None:
    data = b"--b1\r\n\r\nx\r\n" * 20_000 + b"--b1--"
    refuse(data, MessageTooLarge, "more than 10001 MIME parts")
    assert len(feed_whole(multipart.Reader(b"b1", max_parts=20_000), data)) == 60_001


def test_ten_thousand_instances_and_a_root_pass() -> None:
    assert len(parts_of(feed_whole(multipart.Reader(b"b1"), b"--b1\r\n\r\nx\r\n" * 10_001 + b"--b1--", keep))) == 10_001


def test_endless_header_preamble_and_lookalikes_cost_no_memory() -> None:
    reader = multipart.Reader(b"b1")
    with pytest.raises(MessageTooLarge, match="header of MIME part 1"):
        feed(reader, [b"--b1\r\nA: ", *[b"x" * 1000] * 1000])
    tracemalloc.start()
    reader = multipart.Reader(b"b1", max_preamble=1 << 30)
    for piece in (b"\r\n--b1x" * 10_000, b"\n" * 100_000, b"\r" * 100_000, b"\n--b1-" * 10_000):
        for _ in range(20):
            reader.receive(piece)
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("boundary", [b"", b"a\nb", b"a\0b", b"x" * 300, b"ends with blank "])
def test_boundaries_that_are_none(boundary: bytes) -> None:
    with pytest.raises(MalformedMime, match="not a MIME boundary"):
        multipart.Reader(boundary)
    with pytest.raises(LocalProtocolError, match="not a MIME boundary"):
        multipart.Writer(boundary)


def test_boundaries_of_sloppy_stacks_are_read() -> None:
    for boundary in (b"x" * 100, b"{uuid}*1", b"MIMEBoundary#<1>"):
        assert octets(b"--%b\r\n\r\nx\r\n--%b--" % (boundary, boundary), boundary) == [b"x"]


@pytest.mark.parametrize(
    "chunk",
    [os.urandom(1 << 18), bytes(1 << 18), b"\n" * (1 << 18), b"\r\n--xcai-" * (1 << 15)],
    ids=["random", "zeros", "line feeds", "lookalikes"],
)
def test_speed(chunk: bytes) -> None:
    """Ten times slower than measured still passes: this is about an accident, not about a benchmark."""
    reader = multipart.Reader(multipart.new_boundary(bytes(16)))
    reader.receive(multipart.Writer(multipart.new_boundary(bytes(16))).part_header([]))
    started = time.perf_counter()
    for _ in range(400):
        reader.receive(chunk)
    assert 400 * len(chunk) / (time.perf_counter() - started) > 0.5e9


# --- Writing, and other implementations ------------------------------------------------------------------------------


def written(contents: list[bytes], boundary: bytes) -> bytes:
    writer = multipart.Writer(boundary)
    pieces = [
        writer.part_header([("Content-Type", "application/dicom"), ("Content-ID", f"<{n}@x>")])
        + content
        + writer.part_end()
        for n, content in enumerate(contents)
    ]
    return b"".join([*pieces, writer.end()])


CONTENTS = [b"", b"\r\n", b"\0\1\2\r", os.urandom(2000), b"--", b"x\n"]


def test_written_is_read_again_and_written_again() -> None:
    boundary = multipart.new_boundary(bytes(range(16)))
    data = written(CONTENTS, boundary)
    parts = read(data, boundary)
    assert [content for _, content in parts] == CONTENTS
    assert written([content for _, content in parts], boundary) == data


def test_toolbelt_reads_what_is_written() -> None:
    boundary = multipart.new_boundary(os.urandom(16))
    content_type = f'multipart/related; boundary="{boundary.decode()}"'
    decoded = MultipartDecoder(written(CONTENTS, boundary), content_type)
    assert [part.content for part in decoded.parts] == CONTENTS
    assert decoded.parts[3].headers[b"Content-ID"] == b"<3@x>"


def test_email_reads_what_is_written() -> None:
    boundary = multipart.new_boundary(os.urandom(16))
    contents = [b"one", b"two\r\nlines"]  # the email package normalises line ends: text only
    head = f'Content-Type: multipart/related; boundary="{boundary.decode()}"\r\n\r\n'.encode()
    message = email.message_from_bytes(head + written(contents, boundary), policy=email.policy.SMTP)
    assert not message.defects
    assert [part.get_payload(decode=True) for part in message.iter_parts()] == contents


@pytest.mark.parametrize("linesep", ["\n", "\r\n"])
def test_what_email_writes_is_read(linesep: str) -> None:
    message = MIMEMultipart("related", boundary="b1")
    message.preamble, message.epilogue = "This is a MIME message.", "end"
    for content in (b"one", os.urandom(500)):
        message.attach(MIMEApplication(content))
    body = message.as_bytes(policy=email.policy.SMTP.clone(linesep=linesep)).partition(linesep.encode() * 2)[2]
    parts = read(body)
    assert [header["content-transfer-encoding"] for header, _ in parts] == ["base64"] * 2


def test_what_toolbelt_writes_is_read() -> None:
    content = os.urandom(3000)
    encoder = MultipartEncoder({"a": ("name", content, "application/dicom")}, boundary="b1")
    assert octets(encoder.to_string()) == [content]


def test_header_injection_is_a_local_error() -> None:
    writer = multipart.Writer(b"b1")
    for name, value in (("A", "b\r\nC: d"), ("A\n", "b"), ("A:", "b"), ("A", "\0"), ("", "b")):
        with pytest.raises(LocalProtocolError, match="not a MIME header field"):
            writer.part_header([(name, value)])


def test_boundaries_are_made_of_enough_randomness() -> None:
    assert multipart.new_boundary(bytes(16)) == b"xcai-" + b"0" * 32
    assert len(multipart.new_boundary(bytes(100))) <= 70
    with pytest.raises(LocalProtocolError, match="16 random bytes"):
        multipart.new_boundary(bytes(15))


# --- Content-Type ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "media_type", "parameters"),
    [
        ("Text/XML", "text/xml", {}),
        ("application/soap+xml;charset=ISO-8859-1", "application/soap+xml", {"charset": "ISO-8859-1"}),
        (
            'multipart/related; type="application/xop+xml"; boundary="uuid:1"; START="<r@x>"; '
            'start-info="application/soap+xml"',
            "multipart/related",
            {
                "type": "application/xop+xml",
                "boundary": "uuid:1",
                "start": "<r@x>",
                "start-info": "application/soap+xml",
            },
        ),
        (
            r'multipart/related;start-info="application/soap+xml; action=\"urn:a;b\"";boundary=b',
            "multipart/related",
            {"start-info": 'application/soap+xml; action="urn:a;b"', "boundary": "b"},
        ),
        (
            'multipart/related; start-info="application/soap+xml; action="urn:a""; boundary=b',
            "multipart/related",
            {"start-info": "application/soap+xml; action=", "boundary": "b"},
        ),
        (
            "multipart/related; boundary=uuid:1/2=3 ; start=<r@x>;",
            "multipart/related",
            {"boundary": "uuid:1/2=3", "start": "<r@x>"},
        ),
        (' a/b ;; ; c = d ;junk; e="', "a/b", {"c": "d", "e": '"'}),
        ('a/b; c="1"; C="2"; d=""', "a/b", {"c": "1", "d": ""}),
        ('a/b; c="one\\', "a/b", {"c": '"one\\'}),
    ],
)
def test_content_types(value: str, media_type: str, parameters: dict[str, str]) -> None:
    assert multipart.parse_content_type(value) == multipart.ContentType(media_type, parameters)


@pytest.mark.parametrize("value", ["", "text", "/", "a/b/c", "a b/c", ";a=b", "\0/\0", "ä/ö"])
def test_no_content_type(value: str) -> None:
    with pytest.raises(MalformedMime, match="without a media type"):
        multipart.parse_content_type(value)


def test_long_content_type() -> None:
    with pytest.raises(MalformedMime, match="over 8192 characters"):
        multipart.parse_content_type("a/b;" + "c" * 8200)


@given(st.text(max_size=200))
def test_any_content_type_ends(value: str) -> None:
    multipart.parse_content_type("a/b;" + value)


@pytest.mark.parametrize("unit", ['a=";', 'a="\\', "a=", ";", " ", "a ", '"'])
def test_hostile_content_types_are_quick(unit: str) -> None:
    started = time.perf_counter()
    multipart.parse_content_type("a/b;" + unit * (8000 // len(unit)))
    assert time.perf_counter() - started < 1
