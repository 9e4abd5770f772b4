"""WS-Addressing 1.0 headers: what a message asks for, what it answers, and where its answer goes.

Requests are held to the standard (a request that cannot be answered must be refused at once), responses are read
leniently: peers leave out Action or RelatesTo, or use an Action of their own.

References
----------
* WS-Addressing 1.0 Core, 3 (message addressing properties), 3.4 (formulating a reply)
* WS-Addressing 1.0 SOAP Binding, 3 (headers), 6 (faults)
* IHE ITI TF-2, Appendix V (WSA101: mustUnderstand on Action; WSA102: ReplyTo in every initiating message)
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

from lxml import etree

from xca_imaging import uids
from xca_imaging.errors import AddressingHeaderRequired, InvalidAddressingHeader, MustUnderstand
from xca_imaging.wire import soap, xml

UNDERSTOOD: frozenset[tuple[str, str]] = frozenset(
    (uids.NS_WSA, name) for name in ("Action", "MessageID", "To", "ReplyTo", "FaultTo", "RelatesTo", "From")
)
"""Header blocks that this module understands, whether they are marked mustUnderstand or not."""

MAX_NOT_UNDERSTOOD = 32
"""Most header blocks that one MustUnderstand fault names: the answer does not grow with a hostile request."""

REPLY_RELATION = "http://www.w3.org/2005/08/addressing/reply"  # Core, 3.1: the default RelationshipType

_REFERENCE_PARAMETERS = xml.qname(uids.NS_WSA, "ReferenceParameters")
_IS_REFERENCE_PARAMETER = xml.qname(uids.NS_WSA, "IsReferenceParameter")


@dataclass(frozen=True, slots=True)
class Addressing:
    """The addressing properties of a message; a property that is absent is empty.

    Attributes
    ----------
    action, message_id, to : str
    reply_to, fault_to : str
        Addresses. `reply_to` is the anonymous address when the header is absent; faults go to `fault_to`, and where
        that is empty to `reply_to`.
    relates_to : str
        MessageID of the request that a response answers.
    from_ : str
    reply_parameters, fault_parameters : tuple of elements
        Reference parameters of the two endpoints; they have to be header blocks of the answer that goes there.
    """

    action: str = ""
    message_id: str = ""
    to: str = ""
    reply_to: str = uids.WSA_ANONYMOUS
    fault_to: str = ""
    relates_to: str = ""
    from_: str = ""
    reply_parameters: tuple[etree._Element, ...] = ()
    fault_parameters: tuple[etree._Element, ...] = ()


def read_request(
    envelope: soap.Envelope,
    *,
    understood: frozenset[tuple[str, str]] = UNDERSTOOD,
    max_not_understood: int = MAX_NOT_UNDERSTOOD,
) -> Addressing:
    """Return the addressing properties of a request.

    Parameters
    ----------
    understood : frozenset of (str, str)
        Header blocks that the caller deals with beside those of WS-Addressing, for example wsse:Security.
    max_not_understood : int
        See `MAX_NOT_UNDERSTOOD`.

    Raises
    ------
    MustUnderstand
        Header blocks marked mustUnderstand that nobody here knows; found first, as SOAP demands.
    InvalidAddressingHeader
        A header twice, or an endpoint without a usable address.
    AddressingHeaderRequired
        No Action, or no MessageID: then no answer could be related to it.

    References
    ----------
    * SOAP 1.2 Part 1, 2.6 (order of processing); WS-Addressing 1.0 SOAP Binding, 6.4
    """
    known = understood | UNDERSTOOD
    unknown = tuple(
        name
        for name in (xml.split_name(h) for h in envelope.headers if soap.must_be_understood(h))
        if name not in known
    )
    if unknown:
        raise MustUnderstand(unknown[:max_not_understood])
    headers = _by_name(envelope)
    for name, blocks in headers.items():
        if len(blocks) > 1 and name != "RelatesTo":
            raise InvalidAddressingHeader(name, "InvalidCardinality", "more than once in the message")
    for name in ("Action", "MessageID"):
        if not _text(headers, name):
            raise AddressingHeaderRequired(name)
    for name in ("ReplyTo", "FaultTo"):
        for endpoint in headers.get(name, ()):
            _check_endpoint(name, endpoint)
    return _addressing(headers)


def read_response(envelope: soap.Envelope) -> Addressing:
    """Return the addressing properties of a response, whatever is missing, doubled or different.

    Also mustUnderstand is not enforced: what a response says in headers that we do not know (a WS-Security
    time stamp, mostly) cannot change what its body answers.
    """
    return _addressing(_by_name(envelope))


def peek_message_id(envelope: soap.Envelope) -> str:
    """Return the MessageID of a request that is about to be refused, or nothing: the fault relates to it."""
    return _text(_by_name(envelope), "MessageID")


def _by_name(envelope: soap.Envelope) -> dict[str, list[etree._Element]]:
    headers: dict[str, list[etree._Element]] = {}
    for header in envelope.headers:
        namespace, local = xml.split_name(header)
        if (namespace, local) in UNDERSTOOD and soap.is_for_us(header):
            headers.setdefault(local, []).append(header)
    return headers


def _text(headers: dict[str, list[etree._Element]], name: str) -> str:
    return xml.text_of(headers[name][0]) if name in headers else ""


def _addresses(endpoint: etree._Element) -> list[etree._Element]:
    return endpoint.findall(xml.qname(uids.NS_WSA, "Address"))


def _check_endpoint(name: str, endpoint: etree._Element) -> None:
    addresses = _addresses(endpoint)
    if not addresses or not xml.text_of(addresses[0]):
        raise InvalidAddressingHeader(name, "MissingAddressInEPR", "an endpoint reference without an Address")
    if len(addresses) > 1:
        raise InvalidAddressingHeader(name, "InvalidEPR", "an endpoint reference with more than one Address")
    scheme, colon, rest = xml.text_of(addresses[0]).partition(":")
    if not (scheme.isascii() and scheme[:1].isalpha() and colon and rest):
        raise InvalidAddressingHeader(name, "InvalidAddress", "the Address is not an absolute IRI")


def _address(headers: dict[str, list[etree._Element]], name: str) -> str:
    addresses = _addresses(headers[name][0]) if name in headers else []
    return xml.text_of(addresses[0]) if addresses else ""


def _parameters(headers: dict[str, list[etree._Element]], name: str) -> tuple[etree._Element, ...]:
    parameters = headers[name][0].find(_REFERENCE_PARAMETERS) if name in headers else None
    return () if parameters is None else tuple(parameters)


def _addressing(headers: dict[str, list[etree._Element]]) -> Addressing:
    replies = [
        r for r in headers.get("RelatesTo", ()) if (r.get("RelationshipType") or REPLY_RELATION) == REPLY_RELATION
    ]
    return Addressing(
        action=_text(headers, "Action"),
        message_id=_text(headers, "MessageID"),
        to=_text(headers, "To"),
        reply_to=_address(headers, "ReplyTo") or uids.WSA_ANONYMOUS,
        fault_to=_address(headers, "FaultTo"),
        relates_to=xml.text_of(replies[0]) if replies else "",
        from_=_address(headers, "From"),
        reply_parameters=_parameters(headers, "ReplyTo"),
        fault_parameters=_parameters(headers, "FaultTo"),
    )


def _header(name: str, text: str) -> etree._Element:
    header = etree.Element(xml.qname(uids.NS_WSA, name), nsmap={"wsa": uids.NS_WSA})
    header.text = text
    return header


def _action(action: str) -> etree._Element:
    header = etree.Element(xml.qname(uids.NS_WSA, "Action"), nsmap={"wsa": uids.NS_WSA, "env": uids.NS_SOAP12})
    header.set(soap.MUST_UNDERSTAND, "1")  # ITI TF-2, Appendix V, WSA101
    header.text = action
    return header


def request_headers(
    action: str, to: str, message_id: str, reply_to: str = uids.WSA_ANONYMOUS
) -> tuple[etree._Element, ...]:
    """Return the header blocks of a request: Action, MessageID, ReplyTo, To."""
    reply = etree.Element(xml.qname(uids.NS_WSA, "ReplyTo"), nsmap={"wsa": uids.NS_WSA})
    etree.SubElement(reply, xml.qname(uids.NS_WSA, "Address")).text = reply_to
    return _action(action), _header("MessageID", message_id), reply, _header("To", to)


def response_headers(
    action: str,
    relates_to: str,
    message_id: str | None = None,
    to: str | None = None,
    *,
    reference_parameters: Sequence[etree._Element] = (),
) -> tuple[etree._Element, ...]:
    """Return the header blocks of a response or fault.

    Parameters
    ----------
    relates_to : str
        MessageID of the request; empty when it had none, then there is no RelatesTo.
    to : str, optional
        Where the answer goes when that is not the HTTP response: needed in an asynchronous reply.
    reference_parameters : sequence of elements
        Those of the endpoint that the answer goes to (`Addressing.reply_parameters`).

    References
    ----------
    * WS-Addressing 1.0 Core, 3.4; SOAP Binding, 3.3 (IsReferenceParameter)
    """
    headers = [_action(action)]
    if message_id:
        headers.append(_header("MessageID", message_id))
    if relates_to:
        headers.append(_header("RelatesTo", relates_to))
    if to:
        headers.append(_header("To", to))
    for parameter in reference_parameters:
        block = copy.deepcopy(parameter)
        block.tail = None
        block.set(_IS_REFERENCE_PARAMETER, "true")
        headers.append(block)
    return tuple(headers)


def fault_action(fault: soap.Fault) -> str:
    """Return the Action of a fault message: one for the faults of WS-Addressing, one for all others.

    References
    ----------
    * WS-Addressing 1.0 SOAP Binding, 6
    """
    addressing_fault = any(namespace == uids.NS_WSA for namespace, _ in fault.subcodes)
    return uids.WSA_FAULT_ACTION if addressing_fault else uids.SOAP_FAULT_ACTION
