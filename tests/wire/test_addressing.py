from __future__ import annotations

import pytest
from lxml import etree

from tests.support.shared import shared_path
from xca_imaging import errors, uids
from xca_imaging.wire import addressing, soap, xml

ACTION = "<wsa:Action env:mustUnderstand='1'>urn:action</wsa:Action>"
MESSAGE_ID = "<wsa:MessageID>urn:uuid:1</wsa:MessageID>"


def envelope(headers: str) -> soap.Envelope:
    data = (
        f"<env:Envelope xmlns:env='{uids.NS_SOAP12}' xmlns:wsa='{uids.NS_WSA}'>"
        f"<env:Header>{headers}</env:Header><env:Body/></env:Envelope>"
    )
    return soap.read_envelope(xml.parse(data.encode()))


def endpoint(name: str, address: str, more: str = "") -> str:
    return f"<wsa:{name}><wsa:Address>{address}</wsa:Address>{more}</wsa:{name}>"


def test_all_properties() -> None:
    read = addressing.read_request(
        envelope(
            "<wsa:To env:mustUnderstand='true'>\n http://here/x </wsa:To>"
            + ACTION
            + MESSAGE_ID
            + endpoint(
                "ReplyTo", "http://there/r", "<wsa:ReferenceParameters><p xmlns='urn:p'>1</p></wsa:ReferenceParameters>"
            )
            + endpoint("FaultTo", "http://there/f")
            + endpoint("From", "http://there/")
            + "<wsa:RelatesTo RelationshipType='urn:other'>urn:uuid:8</wsa:RelatesTo>"
            + "<wsa:RelatesTo>urn:uuid:9</wsa:RelatesTo>"
        )
    )
    assert read.action == "urn:action"
    assert read.message_id == "urn:uuid:1"
    assert read.to == "http://here/x"
    assert read.reply_to == "http://there/r"
    assert read.fault_to == "http://there/f"
    assert read.from_ == "http://there/"
    assert read.relates_to == "urn:uuid:9"
    assert [p.tag for p in read.reply_parameters] == ["{urn:p}p"]
    assert read.fault_parameters == ()


def test_smallest_request() -> None:
    assert addressing.read_request(envelope(ACTION + MESSAGE_ID)) == addressing.Addressing("urn:action", "urn:uuid:1")
    assert addressing.Addressing().reply_to == uids.WSA_ANONYMOUS


@pytest.mark.parametrize(
    ("headers", "missing"),
    [
        ("", "Action"),
        (MESSAGE_ID, "Action"),
        ("<wsa:Action/>" + MESSAGE_ID, "Action"),
        ("<wsa:Action> </wsa:Action>" + MESSAGE_ID, "Action"),
        ("<Action>urn:action</Action>" + MESSAGE_ID, "Action"),
        ("<wsa:Action env:role='urn:someone-else'>urn:action</wsa:Action>" + MESSAGE_ID, "Action"),
        (ACTION, "MessageID"),
        (ACTION + "<wsa:MessageID/>", "MessageID"),
    ],
)
def test_required_headers(headers: str, missing: str) -> None:
    with pytest.raises(errors.AddressingHeaderRequired) as caught:
        addressing.read_request(envelope(headers))
    assert caught.value.header == missing


@pytest.mark.parametrize("value", ["1", "true"])
def test_unknown_headers_come_first(value: str) -> None:
    headers = f"<a xmlns='urn:x' env:mustUnderstand='{value}'/><wsa:Odd env:mustUnderstand='{value}'/><b/>"
    with pytest.raises(errors.MustUnderstand) as caught:
        addressing.read_request(envelope(headers))
    assert caught.value.headers == (("urn:x", "a"), (uids.NS_WSA, "Odd"))


def test_older_addressing_is_not_understood() -> None:
    old = "http://schemas.xmlsoap.org/ws/2004/08/addressing"
    with pytest.raises(errors.MustUnderstand) as caught:
        addressing.read_request(envelope(f"<Action xmlns='{old}' env:mustUnderstand='1'>urn:action</Action>"))
    assert caught.value.headers == ((old, "Action"),)


def test_understood_by_the_caller_or_for_another_role() -> None:
    headers = ACTION + MESSAGE_ID + "<a xmlns='urn:x' env:mustUnderstand='1'/>"
    addressing.read_request(envelope(headers), understood=frozenset({("urn:x", "a")}))
    addressing.read_request(envelope(headers.replace("'/>", "' env:role='urn:someone-else'/>")))


def test_all_headers_of_addressing_may_be_marked() -> None:
    marked = "".join(
        f"<wsa:{name} env:mustUnderstand='1'>urn:x</wsa:{name}>" for name in ("To", "Action", "MessageID", "RelatesTo")
    )
    marked += endpoint("ReplyTo", "urn:x").replace("<wsa:ReplyTo>", "<wsa:ReplyTo env:mustUnderstand='1'>")
    assert addressing.read_request(envelope(marked)).action == "urn:x"


def test_the_fault_does_not_grow_with_the_request() -> None:
    with pytest.raises(errors.MustUnderstand) as caught:
        addressing.read_request(envelope("<a env:mustUnderstand='1'/>" * 1000))
    assert len(caught.value.headers) == addressing.MAX_NOT_UNDERSTOOD


@pytest.mark.parametrize("name", ["To", "Action", "MessageID", "ReplyTo", "FaultTo", "From"])
def test_duplicates(name: str) -> None:
    twice = f"<wsa:{name}>urn:x</wsa:{name}>" * 2
    with pytest.raises(errors.InvalidAddressingHeader) as caught:
        addressing.read_request(envelope(twice + ACTION + MESSAGE_ID))
    assert (caught.value.header, caught.value.reason) == (name, "InvalidCardinality")


@pytest.mark.parametrize(
    ("reply_to", "reason"),
    [
        ("<wsa:ReplyTo/>", "MissingAddressInEPR"),
        ("<wsa:ReplyTo>http://x/</wsa:ReplyTo>", "MissingAddressInEPR"),
        (endpoint("ReplyTo", " "), "MissingAddressInEPR"),
        (endpoint("ReplyTo", "urn:x", "<wsa:Address>urn:y</wsa:Address>"), "InvalidEPR"),
        (endpoint("ReplyTo", "nowhere"), "InvalidAddress"),
        (endpoint("ReplyTo", "://x"), "InvalidAddress"),
        (endpoint("ReplyTo", "http:"), "InvalidAddress"),
    ],
)
def test_reply_addresses(reply_to: str, reason: str) -> None:
    for headers in (reply_to, reply_to.replace("ReplyTo", "FaultTo")):
        with pytest.raises(errors.InvalidAddressingHeader) as caught:
            addressing.read_request(envelope(ACTION + MESSAGE_ID + headers))
        assert caught.value.reason == reason


def test_responses_are_read_whatever_they_lack() -> None:
    assert addressing.read_response(envelope("")) == addressing.Addressing()
    odd = (
        "<wsa:Action>a</wsa:Action>" * 2
        + "<x env:mustUnderstand='1'/><wsa:ReplyTo/><wsa:RelatesTo> urn:uuid:1 </wsa:RelatesTo>"
    )
    read = addressing.read_response(envelope(odd))
    assert (read.action, read.relates_to, read.reply_to) == ("a", "urn:uuid:1", uids.WSA_ANONYMOUS)


def test_peek_message_id() -> None:
    assert addressing.peek_message_id(envelope("<x env:mustUnderstand='1'/>" + MESSAGE_ID * 2)) == "urn:uuid:1"
    assert addressing.peek_message_id(envelope("")) == ""


@pytest.fixture(scope="module")
def schema() -> etree.XMLSchema:
    return etree.XMLSchema(etree.parse(shared_path("schemas/ws/ws-addr.xsd")))


def reread(headers: tuple[etree._Element, ...]) -> soap.Envelope:
    return soap.read_envelope(xml.parse(soap.write_envelope(headers)))


def test_request_headers(schema: etree.XMLSchema) -> None:
    headers = addressing.request_headers("urn:a", "http://x/", "urn:uuid:1", reply_to="http://y/")
    for header in headers:
        schema.assertValid(header)
    read = reread(headers)
    assert addressing.read_request(read) == addressing.Addressing("urn:a", "urn:uuid:1", "http://x/", "http://y/")
    marked = [xml.local_name(h) for h in read.headers if soap.must_be_understood(h)]
    assert marked == ["Action"]
    assert read.headers[0].get(soap.MUST_UNDERSTAND) == "1"
    anonymous = addressing.request_headers("urn:a", "http://x/", "urn:uuid:1")
    assert addressing.read_request(reread(anonymous)).reply_to == uids.WSA_ANONYMOUS


def test_response_headers(schema: etree.XMLSchema) -> None:
    headers = addressing.response_headers("urn:a", "urn:uuid:1", "urn:uuid:2", "http://x/")
    for header in headers:
        schema.assertValid(header)
    read = addressing.read_response(reread(headers))
    assert read == addressing.Addressing("urn:a", "urn:uuid:2", "http://x/", relates_to="urn:uuid:1")
    assert [xml.local_name(h) for h in addressing.response_headers("urn:a", "")] == ["Action"]


def test_reference_parameters_go_into_the_answer() -> None:
    more = "<wsa:ReferenceParameters><p:p xmlns:p='urn:p' a='b'>1</p:p> tail</wsa:ReferenceParameters>"
    asked = addressing.read_request(envelope(ACTION + MESSAGE_ID + endpoint("ReplyTo", "http://y/", more)))
    headers = addressing.response_headers(
        "urn:a", asked.message_id, to=asked.reply_to, reference_parameters=asked.reply_parameters
    )
    block = reread(headers).headers[-1]
    assert (block.tag, block.get("a"), block.text) == ("{urn:p}p", "b", "1")
    assert block.get(xml.qname(uids.NS_WSA, "IsReferenceParameter")) == "true"
    assert not asked.reply_parameters[0].get(xml.qname(uids.NS_WSA, "IsReferenceParameter"))


def test_fault_actions() -> None:
    assert addressing.fault_action(soap.fault_of(errors.ActionNotSupported("x"))) == uids.WSA_FAULT_ACTION
    assert addressing.fault_action(soap.fault_of(errors.MustUnderstand((("", "x"),)))) == uids.SOAP_FAULT_ACTION
    assert addressing.fault_action(soap.Fault("Receiver")) == uids.SOAP_FAULT_ACTION
