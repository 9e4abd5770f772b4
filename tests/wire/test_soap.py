from __future__ import annotations

import pytest
from lxml import etree

from tests.support.shared import shared_path
from xca_imaging import errors, uids
from xca_imaging.wire import addressing, soap, xml

ENV = f'xmlns:env="{uids.NS_SOAP12}"'
WSSE = "urn:example:security"


def envelope(inside: str, attributes: str = "") -> soap.Envelope:
    return soap.read_envelope(xml.parse(f"<env:Envelope {ENV} {attributes}>{inside}</env:Envelope>".encode()))


@pytest.fixture(scope="module")
def envelope_schema() -> etree.XMLSchema:
    return etree.XMLSchema(etree.parse(shared_path("schemas/ws/soap-1.2-envelope.xsd")))


@pytest.fixture(scope="module")
def addressing_schema() -> etree.XMLSchema:
    return etree.XMLSchema(etree.parse(shared_path("schemas/ws/ws-addr.xsd")))


# --- Envelope --------------------------------------------------------------------------------------------------------


def test_read() -> None:
    read = envelope("\n<env:Header> <a xmlns='urn:x'/><b/> </env:Header>\n<env:Body> <c/>\n</env:Body>\n")
    assert [h.tag for h in read.headers] == ["{urn:x}a", "b"]
    assert read.body is not None
    assert read.body.tag == "c"


def test_no_header_no_body_content() -> None:
    assert envelope("<env:Body/>") == soap.Envelope((), None)
    assert envelope("<env:Header/><env:Body></env:Body>") == soap.Envelope((), None)


@pytest.mark.parametrize(
    "inside",
    [
        "",
        "<env:Header/>",
        "<env:Body/><env:Body/>",
        "<env:Body/><env:Header/>",
        "<env:Header/><env:Header/><env:Body/>",
        "<env:Body/><after/>",
        "<before/><env:Body/>",
        "<Body/>",
        "<env:Body><a/><b/></env:Body>",
        "<env:Body>text</env:Body>",
        "<env:Body><a/>text</env:Body>",
        "<env:Body>&#160;</env:Body>",
        "<env:Header>text</env:Header><env:Body/>",
        "<env:Header><a/>text</env:Header><env:Body/>",
        "text<env:Body/>",
        "<env:Body/>text",
    ],
)
def test_structure_is_checked(inside: str) -> None:
    with pytest.raises(errors.MalformedMessage):
        envelope(inside)


@pytest.mark.parametrize(
    "document",
    [
        f'<e:Envelope xmlns:e="{uids.NS_SOAP11}"><e:Body/></e:Envelope>',
        '<e:Envelope xmlns:e="http://www.w3.org/2001/12/soap-envelope"><e:Body/></e:Envelope>',
        "<Envelope/>",
        f'<e:Body xmlns:e="{uids.NS_SOAP12}"/>',
        "<html/>",
    ],
)
def test_other_versions(document: str) -> None:
    with pytest.raises(errors.VersionMismatch) as caught:
        soap.read_envelope(xml.parse(document.encode()))
    assert soap.fault_of(caught.value).code == "VersionMismatch"


@pytest.mark.parametrize(
    ("attributes", "ours", "must"),
    [
        ("", True, False),
        ('env:mustUnderstand="1"', True, True),
        ('env:mustUnderstand=" true "', True, True),
        ('env:mustUnderstand="0"', True, False),
        ('env:mustUnderstand="false"', True, False),
        ('mustUnderstand="1"', True, False),
        ('env:mustUnderstand="1" env:role=""', True, True),
        (f'env:mustUnderstand="1" env:role="{soap.ROLE_NEXT}"', True, True),
        (f'env:mustUnderstand="1" env:role="{soap.ROLE_ULTIMATE_RECEIVER}"', True, True),
        ('env:mustUnderstand="1" env:role="urn:someone-else"', False, False),
        ('env:mustUnderstand="1" env:role="http://www.w3.org/2003/05/soap-envelope/role/none"', False, False),
        ('env:mustUnderstand="1" env:relay="true"', True, True),
    ],
)
def test_roles(attributes: str, ours: bool, must: bool) -> None:
    (header,) = envelope(f"<env:Header><a {attributes}/></env:Header><env:Body/>").headers
    assert soap.is_for_us(header) is ours
    assert soap.must_be_understood(header) is must


def test_written_is_read_and_written_again(envelope_schema: etree.XMLSchema) -> None:
    body = xml.parse(b'<a xmlns="urn:a" xmlns:b="urn:b"><b:c>&lt;\xc3\xa4</b:c></a>')
    headers = addressing.request_headers("urn:action", "http://example.org/x", "urn:uuid:1")
    data = soap.write_envelope(headers, body)
    root = xml.parse(data)
    envelope_schema.assertValid(root)
    read = soap.read_envelope(root)
    assert read.body is not None
    assert xml.serialize(read.body).count(b"xmlns:b") == 1
    assert [h.tag for h in read.headers] == [h.tag for h in headers]
    again = soap.write_envelope(read.headers, read.body)
    canonical = [etree.tostring(xml.parse(d), method="c14n", exclusive=True) for d in (data, again)]
    assert canonical[0] == canonical[1]


def test_bodies_in_bytes_are_taken_as_they_are() -> None:
    fragment = b'<x:a xmlns:x="urn:a"><x:b/></x:a>'
    whole = soap.write_envelope((), fragment)
    assert fragment in whole
    assert soap.write_envelope((), [fragment[:10], fragment[10:]]) == whole
    assert soap.write_envelope((), xml.parse(fragment)) == whole
    assert soap.read_envelope(xml.parse(soap.write_envelope(()))) == soap.Envelope((), None)


def test_a_body_taken_out_of_a_tree_keeps_its_namespaces() -> None:
    root = xml.parse(b'<r xmlns:x="urn:x"><x:a b="x:c"/> tail</r>')
    read = soap.read_envelope(xml.parse(soap.write_envelope((), root[0])))
    assert read.body is not None
    assert read.body.nsmap["x"] == "urn:x"


# --- Fault -----------------------------------------------------------------------------------------------------------

ERRORS: list[tuple[errors.XcaImagingError, str, list[str]]] = [
    (errors.MalformedXml("x"), "Sender", []),
    (errors.MalformedMime("x"), "Sender", []),
    (errors.MessageTooLarge("x"), "Sender", []),
    (errors.MalformedMessage("x"), "Sender", []),
    (errors.VersionMismatch("x"), "VersionMismatch", []),
    (errors.MustUnderstand(((WSSE, "Security"), ("", "plain"))), "MustUnderstand", []),
    (errors.ActionNotSupported("urn:a\0&b"), "Sender", ["ActionNotSupported"]),
    (errors.AddressingHeaderRequired("MessageID"), "Sender", ["MessageAddressingHeaderRequired"]),
    (
        errors.InvalidAddressingHeader("ReplyTo", "OnlyAnonymousAddressSupported", "x"),
        "Sender",
        ["InvalidAddressingHeader", "OnlyAnonymousAddressSupported"],
    ),
    (errors.XcaImagingError("SELECT secret"), "Receiver", []),
    (errors.ConnectFailed("pacs", "10.0.0.1 refused"), "Receiver", []),
]


@pytest.mark.parametrize(("error", "code", "subcodes"), ERRORS, ids=[type(e).__name__ for e, _, _ in ERRORS])
def test_faults_of_errors(
    error: errors.XcaImagingError, code: str, subcodes: list[str], envelope_schema: etree.XMLSchema
) -> None:
    fault = soap.fault_of(error)
    assert (fault.code, [local for _, local in fault.subcodes]) == (code, subcodes)
    headers = [*addressing.response_headers(addressing.fault_action(fault), "urn:uuid:1"), *soap.fault_headers(fault)]
    root = xml.parse(soap.write_envelope(headers, soap.write_fault(fault)))
    envelope_schema.assertValid(root)
    read = soap.read_fault(soap.read_envelope(root).body)
    assert read is not None
    assert (read.code, read.subcodes, read.reason) == (fault.code, fault.subcodes, xml.printable(fault.reason))
    assert [xml.split_name(d) for d in read.detail] == [xml.split_name(d) for d in fault.detail]


def test_errors_of_ours_say_nothing_of_our_insides() -> None:
    for error in (errors.XcaImagingError("SELECT secret"), errors.ConnectFailed("pacs", "10.0.0.1 refused")):
        fault = soap.fault_of(error)
        assert not {"secret", "10.0.0.1", "pacs"} & set(fault.reason.split())
    assert "try again later" in soap.fault_of(errors.ConnectFailed("pacs", "x")).reason


def test_a_class_with_a_fault_code_is_answered_with_it() -> None:
    class Refused(errors.AccessError):
        fault_code = "Sender"
        fault_subcodes = ((WSSE, "FailedAuthentication"),)

    element = soap.write_fault(soap.fault_of(Refused("no")))
    value = element.find(f".//{{{uids.NS_SOAP12}}}Subcode/{{{uids.NS_SOAP12}}}Value")
    assert value is not None
    assert (value.text, value.nsmap["ns1"]) == ("ns1:FailedAuthentication", WSSE)


def test_detail_of_addressing_faults(addressing_schema: etree.XMLSchema) -> None:
    (action,) = soap.fault_of(errors.ActionNotSupported("urn:a")).detail
    addressing_schema.assertValid(action)
    assert xml.serialize(action) == (
        f'<wsa:ProblemAction xmlns:wsa="{uids.NS_WSA}"><wsa:Action>urn:a</wsa:Action></wsa:ProblemAction>'.encode()
    )
    for error in (
        errors.AddressingHeaderRequired("Action"),
        errors.InvalidAddressingHeader("Action", "InvalidCardinality", "x"),
    ):
        (header,) = soap.fault_of(error).detail
        addressing_schema.assertValid(header)
        assert header.tag == xml.qname(uids.NS_WSA, "ProblemHeaderQName")
        assert header.text == "wsa:Action"
        assert header.nsmap["wsa"] == uids.NS_WSA


def test_headers_of_faults() -> None:
    (upgrade,) = soap.fault_headers(soap.Fault("VersionMismatch"))
    assert xml.serialize(upgrade) == (
        f'<env:Upgrade {ENV}><env:SupportedEnvelope qname="env:Envelope"/></env:Upgrade>'.encode()
    )
    names = ((WSSE, "Security"), ("", "plain"), (uids.NS_WSA, "Other"))
    headers = soap.fault_headers(soap.Fault("MustUnderstand", not_understood=names))
    written = [xml.parse(xml.serialize(h)) for h in headers]
    assert {h.tag for h in written} == {xml.qname(uids.NS_SOAP12, "NotUnderstood")}
    assert [h.get("qname") for h in written] == ["ns1:Security", "plain", "wsa:Other"]
    assert written[0].nsmap["ns1"] == WSSE
    assert soap.fault_headers(soap.Fault("Sender")) == ()


def test_reason_is_legal_and_bounded() -> None:
    fault = soap.Fault("Sender", reason="\0\x1b<&\ud800" + "x" * 5000)
    read = soap.read_fault(xml.parse(xml.serialize(soap.write_fault(fault))))
    assert read is not None
    assert read.reason.startswith("??<&?xxx")
    assert len(read.reason) == 1000


def test_read_fault_of_others() -> None:
    def read(inside: str) -> soap.Fault | None:
        return soap.read_fault(xml.parse(f"<env:Fault {ENV}>{inside}</env:Fault>".encode()))

    assert soap.read_fault(None) is None
    assert soap.read_fault(xml.parse(b"<Fault/>")) is None
    assert read("") == soap.Fault("Receiver")
    assert read("<env:Code><env:Value>env:Odd</env:Value></env:Code>") == soap.Fault("Receiver")
    fault = read(
        "<env:Code><env:Value>\n env:Sender </env:Value><env:Subcode><env:Value xmlns='urn:d'>Default</env:Value>"
        "<env:Subcode><env:Value>un:declared</env:Value></env:Subcode></env:Subcode></env:Code>"
        "<env:Reason><env:Text xml:lang='de'>nein</env:Text><env:Text xml:lang='EN-us'>no</env:Text></env:Reason>"
        "<env:Detail>text<a/></env:Detail>"
    )
    assert fault is not None
    assert (fault.code, fault.reason, [d.tag for d in fault.detail]) == ("Sender", "no", ["a"])
    assert fault.subcodes == (("urn:d", "Default"), ("", "declared"))
    only_german = read("<env:Reason><env:Text xml:lang='de'>nein</env:Text></env:Reason>")
    assert only_german is not None
    assert only_german.reason == "nein"
