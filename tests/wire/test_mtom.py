from __future__ import annotations

import base64
import os
import quopri
import tracemalloc
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lxml import etree
from requests_toolbelt import MultipartDecoder

from tests.support.feeding import feed, pieces
from tests.support.shared import shared_path
from xca_imaging import uids
from xca_imaging.errors import LocalProtocolError, MalformedMessage, MalformedMime, MessageTooLarge, VersionMismatch
from xca_imaging.wire import addressing, mtom, multipart, soap, xml
from xca_imaging.wire.mtom import AttachmentData, AttachmentEnd, AttachmentStart, Finished, Root

XOP = 'multipart/related; type="application/xop+xml"; boundary=b1; start="<root@x>"; start-info="application/soap+xml"'
ENVELOPE = soap.write_envelope(())
ROOT_HEADER = 'Content-Type: application/xop+xml; charset=UTF-8; type="application/soap+xml"\nContent-ID: <root@x>'

Attachments = list[tuple[str, str, bytes]]


def part(header: str, octets: bytes) -> bytes:
    return b"--b1\r\n" + header.replace("\n", "\r\n").encode() + b"\r\n\r\n" + octets + b"\r\n"


ROOT = part(ROOT_HEADER, ENVELOPE)
END = b"--b1--\r\n"


def attachment(content_id: str, octets: bytes, *more: str) -> bytes:
    return part("\n".join(["Content-Type: application/dicom", f"Content-ID: <{content_id}>", *more]), octets)


def keep(event: Any) -> Any:
    return bytes(event.view) if isinstance(event, AttachmentData) else event


def outcome(kept: list[Any]) -> tuple[Root, Attachments]:
    """Return root and attachments; the order of events is checked on the way."""
    assert kept.pop() == Finished()
    roots = [event for event in kept if isinstance(event, Root)]
    assert len(roots) == 1
    attachments: Attachments = []
    order: list[type] = []
    for is_octets, group in groupby((e for e in kept if e is not roots[0]), key=lambda e: isinstance(e, bytes)):
        if is_octets:
            attachments[-1] = (*attachments[-1][:2], b"".join(group))
            continue
        for event in group:
            order.append(type(event))
            if isinstance(event, AttachmentStart):
                attachments.append((event.content_id, event.content_type, b""))
    assert order == [AttachmentStart, AttachmentEnd] * len(attachments)
    return roots[0], attachments


def run(content_type: str, chunks: Iterable[bytes], **limits: int) -> tuple[Root, Attachments]:
    reader = mtom.Reader(content_type, **limits)
    kept = feed(reader, chunks, keep)
    return outcome([*kept, *reader.close()])


def read(content_type: str, data: bytes, sizes: list[int] | None = None) -> tuple[Root, Attachments]:
    """Read whole, byte by byte and in pieces; all must agree."""
    whole = run(content_type, [data])
    for some in ([1], sizes or [7, 11]):
        assert run(content_type, pieces(data, some)) == whole
    return whole


def refuse(content_type: str, data: bytes, error: type[Exception], match: str, **limits: int) -> None:
    for sizes in ([len(data)], [1]):
        with pytest.raises(error, match=match):
            run(content_type, pieces(data, sizes), **limits)


# --- Packages --------------------------------------------------------------------------------------------------------


def test_root_and_attachments() -> None:
    root, attachments = read(XOP, ROOT + attachment("1@x", b"one") + attachment("2@x", b"") + END)
    assert root == Root(ENVELOPE, "UTF-8")
    assert attachments == [("1@x", "application/dicom", b"one"), ("2@x", "application/dicom", b"")]


def test_trailing_bytes_are_ignored() -> None:
    assert run(XOP, pieces(ROOT + END + b"\r\n--b1\r\n\r\ntrailing", [9])) == (Root(ENVELOPE, "UTF-8"), [])


def test_attachments_before_the_root() -> None:
    root, attachments = read(XOP, attachment("1@x", b"one") + ROOT + attachment("2@x", b"two") + END)
    assert root.data == ENVELOPE
    assert [(content_id, octets) for content_id, _, octets in attachments] == [("1@x", b"one"), ("2@x", b"two")]


@pytest.mark.parametrize(
    ("content_type", "header"),
    [
        ("multipart/related; boundary=b1", "Content-Type: application/xop+xml"),
        ("multipart/related; boundary=b1", "Content-Type: application/soap+xml"),
        ("multipart/related; boundary=b1", "Content-Type: text/xml"),
        ("multipart/related; boundary=b1", "X-Nothing: said"),
        ("multipart/related; boundary=b1; start=root@x", ROOT_HEADER),
        ('multipart/related; boundary=b1; start="<root%40x>"', ROOT_HEADER),
        ('multipart/related; boundary=b1; start=""', ROOT_HEADER),
        ('MULTIPART/Related; BOUNDARY="b1"; Start="<root@x>"', ROOT_HEADER.upper().replace("ROOT@X", "root@x")),
        ('multipart/related; boundary=b1; start="<typo@x>"', ROOT_HEADER),  # the sample of the TF
        ('multipart/related; boundary=b1; start="<typo@x>"', "Content-Type: application/soap+xml"),
        (XOP + '; action="urn:a"', ROOT_HEADER),
        (XOP.replace('soap+xml"', r'soap+xml; action=\"urn:a\""'), ROOT_HEADER),
    ],
)
def test_which_part_is_the_root(content_type: str, header: str) -> None:
    root, attachments = read(content_type, part(header, ENVELOPE) + attachment("1@x", b"one") + END)
    assert root.data == ENVELOPE
    assert len(attachments) == 1


def test_an_untyped_attachment_before_the_named_root_is_no_root() -> None:
    root, attachments = read(
        XOP, part("Content-ID: <1@x>", b"one") + part("Content-Type: text/xml", b"<a/>") + ROOT + END
    )
    assert root.data == ENVELOPE
    assert attachments == [("1@x", "", b"one"), ("", "text/xml", b"<a/>")]


@pytest.mark.parametrize(
    ("encoding", "encoded"),
    [
        ("binary", lambda octets: octets),
        ("8BIT", lambda octets: octets),
        ("7bit", lambda octets: octets),
        ("", lambda octets: octets),
        ("base64", base64.encodebytes),
        ("BASE64", lambda octets: base64.encodebytes(octets).replace(b"\n", b"\r\n") + b"\r\n"),
        ("base64", base64.b64encode),
        ("quoted-printable", lambda octets: quopri.encodestring(octets).replace(b"\n", b"\r\n")),
    ],
)
@pytest.mark.parametrize("octets", [b"", b"text = more", bytes(range(32, 256)) * 5])
def test_transfer_encodings(encoding: str, encoded: Any, octets: bytes) -> None:
    header = f"Content-Transfer-Encoding: {encoding}"
    data = part(f"{ROOT_HEADER}\n{header}", encoded(ENVELOPE)) + attachment("1@x", encoded(octets), header) + END
    root, attachments = read(XOP, data)
    assert root.data == ENVELOPE
    assert attachments[0][2] == octets


@given(st.binary(max_size=200), st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_base64_in_any_pieces(octets: bytes, sizes: list[int]) -> None:
    data = ROOT + attachment("1@x", base64.encodebytes(octets), "Content-Transfer-Encoding: base64") + END
    assert run(XOP, pieces(data, sizes))[1][0][2] == octets


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"QQ=", "middle of a group"),
        (b"Q", "middle of a group"),
        (b"QQ==QUJD", "not base64|after its padding"),
        (b"Q?==", "not base64"),
        (b"====", "not base64"),
        (b"QUJD====", "not base64"),
        (b"QQ======", "not base64|after its padding"),
        (b"\0\0\0\0", "not base64"),
    ],
)
def test_broken_base64(text: bytes, match: str) -> None:
    data = ROOT + attachment("1@x", text, "Content-Transfer-Encoding: base64") + END
    refuse(XOP, data, MalformedMime, match)


def test_endless_quoted_printable_line() -> None:
    data = ROOT + attachment("1@x", b"x" * 9000, "Content-Transfer-Encoding: quoted-printable") + END
    refuse(XOP, data, MessageTooLarge, "quoted-printable line")


def test_unknown_transfer_encoding() -> None:
    refuse(XOP, ROOT + attachment("1@x", b"", "Content-Transfer-Encoding: x-gzip") + END, MalformedMime, "'x-gzip'")


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "never came"),
        (ENVELOPE, "never came"),
        (ROOT, "without its closing MIME boundary"),
        (ROOT + attachment("1@x", b"one"), "without its closing MIME boundary"),
        (ROOT + attachment("1@x", b"one") + b"--b1-", "without its closing MIME boundary"),
        (attachment("1@x", b"one") + END, "no part of the package is its root"),
        (attachment("root@x", b"one") + END, "the root part is application/dicom"),
        (ROOT + attachment("1@x", b"one") + attachment("1%40x", b"two") + END, "two parts have the Content-ID '1@x'"),
    ],
)
def test_broken_packages(data: bytes, match: str) -> None:
    refuse(XOP, data, MalformedMime, match)


def test_parts_without_content_id_are_no_duplicates() -> None:
    assert len(read(XOP, ROOT + part("A: b", b"one") * 2 + END)[1]) == 2


def test_limits() -> None:
    refuse(XOP, part(ROOT_HEADER, b"x" * 101), MessageTooLarge, "over 100 bytes", max_root=100)
    refuse("application/soap+xml", b"x" * 101, MessageTooLarge, "over 100 bytes", max_root=100)
    refuse(XOP, ROOT + attachment("1@x", b"") * 3, MessageTooLarge, "more than 1 MIME parts", max_parts=1)
    refuse(XOP, part(ROOT_HEADER + "\nA: " + "x" * 200, b""), MessageTooLarge, "over 200 bytes", max_header=200)
    refuse(XOP, b"x" * 101, MalformedMime, "before the first", max_preamble=100)


def test_twenty_thousand_parts() -> None:
    with pytest.raises(MessageTooLarge, match="10001 MIME parts"):
        run(XOP, [ROOT + b"".join(attachment(f"{n}@x", b"x") for n in range(20_000)) + END])


def test_gigabytes_of_attachments_need_no_memory() -> None:
    chunk = os.urandom(1 << 18)
    reader = mtom.Reader(XOP)
    reader.receive(ROOT + attachment("1@x", b"")[:-2])
    tracemalloc.start()
    received = sum(len(e.view) for _ in range(4096) for e in reader.receive(chunk) if isinstance(e, AttachmentData))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert received > (1 << 30) - 100
    assert peak < 100_000


def test_fifty_megabytes_of_envelope_stop_at_the_limit() -> None:
    for content_type, head in ((XOP, ROOT[:-2]), ("application/soap+xml", b"")):
        reader = mtom.Reader(content_type)
        reader.receive(head)
        with pytest.raises(MessageTooLarge, match="SOAP part"):
            feed(reader, (b"x" * 65_536 for _ in range(800)))
        assert len(reader._root) <= mtom.MAX_ROOT


# --- Plain messages, media types -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content_type", "charset"),
    [
        ("application/soap+xml", None),
        ('Application/SOAP+xml; charset="utf-8"; action="urn:a"', "utf-8"),
        ("application/soap+xml;charset=ISO-8859-1", "ISO-8859-1"),
        ("text/xml; charset=utf-8", "utf-8"),
    ],
)
def test_plain_messages(content_type: str, charset: str | None) -> None:
    assert read(content_type, ENVELOPE) == (Root(ENVELOPE, charset), [])


def test_a_plain_message_is_complete_only_at_the_end() -> None:
    reader = mtom.Reader("application/soap+xml")
    assert reader.receive(ENVELOPE) == []
    assert reader.close() == [Root(ENVELOPE, None), Finished()]


@pytest.mark.parametrize("content_type", ["text/xml; charset=utf-8", 'multipart/related; type="text/xml"; boundary=b1'])
def test_soap_11_is_read_up_to_its_version(content_type: str) -> None:
    old = f'<e:Envelope xmlns:e="{uids.NS_SOAP11}"><e:Body/></e:Envelope>'.encode()
    data = part("Content-Type: text/xml", old) + END if "multipart" in content_type else old
    root, _ = read(content_type, data)
    with pytest.raises(VersionMismatch):
        soap.read_envelope(xml.parse(root.data, charset=root.charset))


@pytest.mark.parametrize(
    "content_type",
    [
        "",
        "  ",
        "nonsense",
        "text/html",
        "application/xml",
        "application/xop+xml",
        "application/json",
        "multipart/mixed; boundary=b1",
        "multipart/form-data; boundary=b1",
        "x" * 10_000,
    ],
)
def test_unsupported_media(content_type: str) -> None:
    with pytest.raises(mtom.UnsupportedMedia):
        mtom.Reader(content_type)


@pytest.mark.parametrize(
    "parameters", ["", "; boundary", '; boundary=""', '; boundary="a\tb"', "; boundary=" + "x" * 300]
)
def test_boundary_parameter(parameters: str) -> None:
    with pytest.raises(MalformedMime, match="boundary"):
        mtom.Reader("multipart/related; type=x" + parameters)


# --- References ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("href", "header"),
    [
        ("cid:1@x", "<1@x>"),
        ("cid:1%40x", " <1@x> "),
        ("CID:1@x", "1@x"),
        ("cid:uuid-1@urn%3Aihe%3Aiti%3Axds-b%3A2007", "<uuid-1@urn:ihe:iti:xds-b:2007>"),  # CXF
        ("cid:a%20b", "<a%20b>"),
        ("cid:a+b%2Bc", "<a+b+c>"),
        ("cid:%C3%A4", "<ä>"),
        ("cid:%FF", "<%FF>"),
        ("cid:100%", "<100%>"),
    ],
)
def test_references_meet_their_parts(href: str, header: str) -> None:
    assert mtom.content_id_of_href(href) == mtom.normalise_content_id(header)


@pytest.mark.parametrize("href", ["", "cid:", "cid", "http://x/", "1@x", "mid:1@x"])
def test_other_references(href: str) -> None:
    with pytest.raises(MalformedMessage, match="not to a part"):
        mtom.content_id_of_href(href)


@given(
    st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters='<>"\\%'), min_size=1, max_size=40)
)
def test_include_refers_to_the_part_that_is_written(content_id: str) -> None:
    document = etree.Element("Document")
    document.append(mtom.xop_include(content_id))
    assert mtom.inline_content(xml.parse(xml.serialize(document))) == mtom.Reference(content_id)
    header = mtom.Writer(b"b1", "root@x").attachment_header(content_id, "application/dicom")
    assert run(XOP, [ROOT, header, b"x\r\n", END])[1][0][0] == content_id


def test_include_is_schema_valid() -> None:
    schema = etree.XMLSchema(etree.parse(shared_path("schemas/ws/xop-include.xsd")))
    schema.assertValid(mtom.xop_include("1@x"))
    assert mtom.xop_include("a:b@x").get("href") == "cid:a%3Ab@x"


def document(content: str) -> etree._Element:
    return xml.parse(f"<Document xmlns:xop='{uids.NS_XOP}'>{content}</Document>".encode())


def test_inline_content() -> None:
    assert mtom.inline_content(document("")) == b""
    assert mtom.inline_content(document(" \n")) == b""
    assert mtom.inline_content(document(" QUJD\r\n\tREU= ")) == b"ABCDE"
    assert mtom.inline_content(document("QU<!-- -->JD")) == b"ABC"
    assert mtom.inline_content(document(" <xop:Include href='cid:a%40x'/>\n")) == mtom.Reference("a@x")


@pytest.mark.parametrize(
    "content",
    [
        "QUJ",
        "QUJD=",
        "QUJD====",
        "Q!JD",
        "ä",
        "<a/>",
        "<xop:Include/>",
        "<xop:Include href='http://127.0.0.1/'/>",
        "<xop:Include href='cid:a'/><xop:Include href='cid:b'/>",
        "QUJD<xop:Include href='cid:a'/>",
        "<xop:Include href='cid:a'/>QUJD",
    ],
)
def test_content_that_is_none(content: str) -> None:
    with pytest.raises(MalformedMessage):
        mtom.inline_content(document(content))


# --- Writing ---------------------------------------------------------------------------------------------------------

CONTENTS = [("1.2.3@x", b""), ("urn:uuid:4@x", b"\r\n--xcai"), ("5", os.urandom(5000)), ("6@x", b"\0" * 131)]


def write(writer: mtom.Writer, contents: list[tuple[str, bytes]], preamble: int = 0) -> bytes:
    data = writer.preamble_line() * preamble + writer.root(ENVELOPE)
    for content_id, octets in contents:
        data += writer.attachment_header(content_id, "application/dicom") + octets + writer.attachment_end()
    return data + writer.end()


def new_writer(action: str = "") -> mtom.Writer:
    return mtom.Writer(multipart.new_boundary(os.urandom(16)), "root@xca-imaging", action)


@pytest.mark.parametrize("preamble", [0, 1, 20])
def test_written_is_read_and_written_again(preamble: int) -> None:
    writer = new_writer("urn:ihe:rad:2009:RetrieveImagingDocumentSet")
    data = write(writer, CONTENTS, preamble)
    root, attachments = read(writer.content_type, data)
    assert root == Root(ENVELOPE, "UTF-8")
    assert attachments == [(content_id, "application/dicom", octets) for content_id, octets in CONTENTS]
    assert write(writer, [(content_id, octets) for content_id, _, octets in attachments], preamble) == data


def test_total_length() -> None:
    writer = new_writer()
    sizes = [(content_id, "application/dicom", len(octets)) for content_id, octets in CONTENTS]
    assert writer.total_length(len(ENVELOPE), sizes) == len(write(writer, CONTENTS))
    assert writer.total_length(len(ENVELOPE), []) == len(write(writer, []))
    assert writer.total_length(len(ENVELOPE), iter(sizes)) == len(write(writer, CONTENTS))


def test_content_type() -> None:
    assert mtom.Writer(b"b1", "r@x", "urn:a").content_type == (
        'multipart/related; type="application/xop+xml"; boundary="b1"; start="<r@x>"; '
        'start-info="application/soap+xml"; action="urn:a"'
    )
    assert "action" not in mtom.Writer(b"b1", "r@x").content_type


def test_toolbelt_reads_what_is_written() -> None:
    writer = new_writer()
    parts = MultipartDecoder(write(writer, CONTENTS), writer.content_type).parts
    assert [p.content for p in parts] == [ENVELOPE, *(octets for _, octets in CONTENTS)]
    assert parts[0].headers[b"Content-Type"] == b'application/xop+xml; charset=UTF-8; type="application/soap+xml"'
    assert parts[1].headers[b"Content-ID"] == b"<1.2.3@x>"


@pytest.mark.parametrize("content_id", ["", "a b", "<a>", "a\r\nb", "ä", 'a"b', "a\\b"])
def test_content_ids_that_are_none(content_id: str) -> None:
    with pytest.raises(LocalProtocolError, match="not a Content-ID"):
        mtom.Writer(b"b1", content_id)
    with pytest.raises(LocalProtocolError, match="not a Content-ID"):
        new_writer().attachment_header(content_id, "application/dicom")


@pytest.mark.parametrize("action", ['urn:"', "urn:\\", "urn:\r\nX: y", "ä"])
def test_actions_that_are_none(action: str) -> None:
    with pytest.raises(LocalProtocolError, match="not an action"):
        new_writer(action)


# --- Recorded messages of Apache CXF ---------------------------------------------------------------------------------


def http_message(path: Path) -> tuple[dict[str, str], bytes]:
    """Return fields and body of a recorded message, out of its chunked coding where it has one."""
    head, _, rest = path.read_bytes().partition(b"\r\n\r\n")
    fields = {
        name.lower(): value.strip()
        for name, _, value in (line.partition(":") for line in head.decode().split("\r\n")[1:])
    }
    if fields.get("transfer-encoding") != "chunked":
        return fields, rest
    body = b""
    while True:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        if not length:
            return fields, body
        body, rest = body + rest[:length], rest[length + 2 :]


CXF = {
    "iti18-objectref-request": (uids.ITI18_REQUEST, 0),
    "iti18-objectref-response": (uids.ITI18_RESPONSE, 0),
    "iti38-latin1-response": (uids.ITI38_RESPONSE, 0),
    "iti38-leafclass-request": (uids.ITI38_REQUEST, 0),
    "iti38-leafclass-response": (uids.ITI38_RESPONSE, 0),
    "iti39-request": (uids.ITI39_REQUEST, 0),
    "iti39-response": (uids.ITI39_RESPONSE, 1),
    "iti41-request": (uids.ITI41_REQUEST, 1),
    "iti41-response": (uids.ITI41_RESPONSE, 0),
    "iti42-refused-request": (uids.ITI42_REQUEST, 0),
    "iti42-refused-response": (uids.ITI42_RESPONSE, 0),
    "iti43-request": (uids.ITI43_REQUEST, 0),
    "iti43-response": (uids.ITI43_RESPONSE, 1),
    "rad69-fault-request": (uids.RAD69_REQUEST, 0),
    "rad69-request": (uids.RAD69_REQUEST, 0),
    "rad69-response": (uids.RAD69_RESPONSE, 2),
    "rad75-async-1-request": (uids.RAD75_REQUEST, 0),
    "rad75-async-3-reply": (uids.RAD75_RESPONSE, 1),
    "rad75-partial-request": (uids.RAD75_REQUEST, 0),
    "rad75-partial-response": (uids.RAD75_RESPONSE, 6),
}


def read_recorded(name: str) -> tuple[soap.Envelope, Attachments]:
    fields, body = http_message(shared_path(f"examples/cxf/{name}.http"))
    root, attachments = read(fields["content-type"], body)
    return soap.read_envelope(xml.parse(root.data, charset=root.charset)), attachments


@pytest.mark.parametrize("name", CXF)
def test_messages_of_cxf(name: str) -> None:
    action, count = CXF[name]
    envelope, attachments = read_recorded(name)
    reading = addressing.read_request if name.endswith(("request", "reply")) else addressing.read_response
    properties = reading(envelope)
    assert properties.action == action
    assert properties.message_id.startswith("urn:uuid:")
    assert soap.read_fault(envelope.body) is None
    assert envelope.body is not None
    contents = [mtom.inline_content(parent) for parent in envelope.body.iter("{*}Document")]
    assert contents == [mtom.Reference(content_id) for content_id, _, _ in attachments]
    assert len(attachments) == count
    for _, content_type, octets in attachments:
        assert content_type == "application/dicom"
        assert octets[128:132] == b"DICM"
        assert len(octets) % 2 == 0


def test_cxf_in_latin_1() -> None:
    envelope, _ = read_recorded("iti38-latin1-response")
    assert envelope.body is not None
    titles = [e.get("value", "") for e in envelope.body.iter("{*}LocalizedString")]
    assert any("größer" in title for title in titles)


def test_faults_of_cxf() -> None:
    envelope, _ = read_recorded("rad69-fault-response")
    assert soap.read_fault(envelope.body) == soap.Fault("Receiver", (), "the archive is out of order")
    envelope, _ = read_recorded("rad69-addressing-fault-response")
    fault = soap.read_fault(envelope.body)
    assert fault is not None
    assert fault.subcodes == ((uids.NS_WSA, "MessageAddressingHeaderRequired"),)
    assert addressing.read_response(envelope).action.endswith(":Fault:SoapFault")


@pytest.mark.parametrize("name", ["rad75-async-2-accepted", "rad75-async-4-reply-accepted"])
def test_accepted_without_a_message(name: str) -> None:
    """A 202 has a Content-Type and no body; whoever reads it anyway gets an error, not an empty message."""
    fields, body = http_message(shared_path(f"examples/cxf/{name}.http"))
    assert body == b""
    reader = mtom.Reader(fields["content-type"])
    if "multipart" in fields["content-type"]:
        with pytest.raises(MalformedMime):
            reader.close()
    else:
        assert reader.close()[0] == Root(b"", "UTF-8")


def test_a_package_of_cxf_read_written_and_read() -> None:
    fields, body = http_message(shared_path("examples/cxf/rad75-partial-response.http"))
    root, attachments = read(fields["content-type"], body)
    writer = new_writer()
    data = writer.root(root.data)
    for content_id, content_type, octets in attachments:
        data += writer.attachment_header(content_id, content_type) + octets + writer.attachment_end()
    assert read(writer.content_type, data + writer.end()) == (root, attachments)
