"""SOAP 1.2 envelopes and faults.

Reading turns a parsed tree into an `Envelope`, writing goes to bytes directly: a body may be given as bytes that were
serialised long ago (a registry keeps each entry's ebRIM), which makes a large answer a concatenation.

References
----------
* SOAP 1.2 Part 1 (Second Edition), 2.2 and 5.2.2 (roles), 5.1-5.3 (envelope), 5.4 (fault), 5.4.7, 5.4.8 (fault headers)
* WS-Addressing 1.0 SOAP Binding, 6.4 (detail of the predefined faults)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lxml import etree

from xca_imaging import uids
from xca_imaging.errors import (
    ActionNotSupported,
    AddressingHeaderRequired,
    InvalidAddressingHeader,
    MalformedMessage,
    MustUnderstand,
    RemoteProtocolError,
    Retry,
    VersionMismatch,
    XcaImagingError,
)
from xca_imaging.wire import xml

ENVELOPE = xml.qname(uids.NS_SOAP12, "Envelope")
HEADER = xml.qname(uids.NS_SOAP12, "Header")
BODY = xml.qname(uids.NS_SOAP12, "Body")
FAULT = xml.qname(uids.NS_SOAP12, "Fault")
MUST_UNDERSTAND = xml.qname(uids.NS_SOAP12, "mustUnderstand")
ROLE = xml.qname(uids.NS_SOAP12, "role")

ROLE_NEXT = "http://www.w3.org/2003/05/soap-envelope/role/next"  # Part 1, 2.2
ROLE_ULTIMATE_RECEIVER = "http://www.w3.org/2003/05/soap-envelope/role/ultimateReceiver"

FAULT_CODES = frozenset({"VersionMismatch", "MustUnderstand", "DataEncodingUnknown", "Sender", "Receiver"})  # 5.4.6

_PREFIXES = {uids.NS_SOAP12: "env", uids.NS_WSA: "wsa"}


@dataclass(frozen=True, slots=True)
class Envelope:
    """A message: header blocks in their order, and the one child of the body (None when it is empty)."""

    headers: tuple[etree._Element, ...]
    body: etree._Element | None


@dataclass(frozen=True, slots=True)
class Fault:
    """A SOAP fault.

    Attributes
    ----------
    code : str
        Local name of the code: `Sender`, `Receiver`, `VersionMismatch`, `MustUnderstand`, `DataEncodingUnknown`.
    subcodes : tuple of (str, str)
        From the outermost to the most specific, as (namespace, local name).
    reason : str
        English text for a person.
    detail : tuple of elements
        Children of Detail.
    not_understood : tuple of (str, str)
        The header blocks that a MustUnderstand fault is about; they travel as header blocks of their own.
    """

    code: str
    subcodes: tuple[tuple[str, str], ...] = ()
    reason: str = ""
    detail: tuple[etree._Element, ...] = ()
    not_understood: tuple[tuple[str, str], ...] = ()


def read_envelope(root: etree._Element) -> Envelope:
    """Return the message of a parsed document.

    Raises
    ------
    VersionMismatch
        The root is anything but a SOAP 1.2 Envelope.
    MalformedMessage
        Header, Body and the body's child are not where they belong.

    References
    ----------
    * SOAP 1.2 Part 1, 5.1 and 5.4.6
    """
    if root.tag != ENVELOPE:
        namespace, local = xml.split_name(root)
        if (namespace, local) == (uids.NS_SOAP11, "Envelope"):
            raise VersionMismatch("SOAP 1.1 is not spoken here, only SOAP 1.2")
        raise VersionMismatch(f"not a SOAP 1.2 envelope: {xml.printable(xml.qname(namespace, local), 200)}")
    _refuse_text(root)
    children = list(root)
    headers: tuple[etree._Element, ...] = ()
    if children and children[0].tag == HEADER:
        _refuse_text(children[0])
        headers = tuple(children.pop(0))
    if len(children) != 1 or children[0].tag != BODY:
        raise MalformedMessage("a SOAP envelope holds at most one Header, then exactly one Body")
    body = children[0]
    _refuse_text(body)
    if len(body) > 1:
        raise MalformedMessage("the SOAP Body holds more than one element")
    return Envelope(headers, body[0] if len(body) else None)


def _refuse_text(parent: etree._Element) -> None:
    texts = [parent.text, *(child.tail for child in parent)]
    if any(text and text.strip(" \t\r\n") for text in texts):
        raise MalformedMessage(f"text in SOAP {xml.local_name(parent)}")


def is_for_us(header: etree._Element) -> bool:
    """Say whether a header block is targeted at this node: no role, next, or ultimate receiver."""
    return (header.get(ROLE) or "").strip() in ("", ROLE_NEXT, ROLE_ULTIMATE_RECEIVER)


def must_be_understood(header: etree._Element) -> bool:
    """Say whether a header block is ours to understand or to refuse (`1` and `true` are both in use)."""
    return is_for_us(header) and (header.get(MUST_UNDERSTAND) or "").strip() in ("1", "true")


def write_envelope(
    headers: Sequence[etree._Element], body: etree._Element | bytes | Sequence[bytes] | None = None
) -> bytes:
    """Return a message as UTF-8 bytes.

    Parameters
    ----------
    headers : sequence of elements
        Header blocks in their order.
    body : element, bytes or sequence of bytes, optional
        The one child of Body. Bytes are one element already serialised, in one piece or in several, that declares
        every namespace prefix it uses; they are taken as they are, without parsing.
    """
    if body is None:
        fragments: Sequence[bytes] = ()
    elif isinstance(body, bytes):
        fragments = (body,)
    elif isinstance(body, etree._Element):
        fragments = (xml.serialize(body),)
    else:
        fragments = body
    start, end = envelope_around(headers)
    return b"".join((start, *fragments, end))


def envelope_around(headers: Sequence[etree._Element]) -> tuple[bytes, bytes]:
    """Return what stands before and after the child of Body in a message."""
    namespace = uids.NS_SOAP12.encode("ascii")
    pieces = [b'<env:Envelope xmlns:env="', namespace, b'">']
    if headers:
        pieces += [b"<env:Header>", *(xml.serialize(header) for header in headers), b"</env:Header>"]
    return b"".join((*pieces, b"<env:Body>")), b"</env:Body></env:Envelope>"


def _prefixes(names: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Return prefix declarations for the namespaces of some names: usual prefixes, else ns1, ns2, ..."""
    declared: dict[str, str] = {}
    for namespace, _ in names:
        if namespace and namespace not in declared.values():
            declared[_PREFIXES.get(namespace) or f"ns{len(declared) + 1}"] = namespace
    return declared


def _value(parent: etree._Element, namespace: str, local: str) -> None:
    prefixes = _prefixes([(namespace, local)])
    value = etree.SubElement(parent, xml.qname(uids.NS_SOAP12, "Value"), nsmap=prefixes)
    value.text = ":".join(filter(None, (*prefixes, local)))


def write_fault(fault: Fault) -> etree._Element:
    """Return the Fault element, the only child of the body of a fault message (SOAP 1.2 Part 1, 5.4)."""
    element = etree.Element(FAULT, nsmap={"env": uids.NS_SOAP12})
    code = etree.SubElement(element, xml.qname(uids.NS_SOAP12, "Code"))
    _value(code, uids.NS_SOAP12, fault.code)
    for namespace, local in fault.subcodes:
        code = etree.SubElement(code, xml.qname(uids.NS_SOAP12, "Subcode"))
        _value(code, namespace, local)
    reason = etree.SubElement(element, xml.qname(uids.NS_SOAP12, "Reason"))
    text = etree.SubElement(reason, xml.qname(uids.NS_SOAP12, "Text"))
    text.set(xml.qname(uids.NS_XML, "lang"), "en")
    text.text = xml.printable(fault.reason)
    if fault.detail:
        etree.SubElement(element, xml.qname(uids.NS_SOAP12, "Detail")).extend(fault.detail)
    return element


def fault_headers(fault: Fault) -> tuple[etree._Element, ...]:
    """Return the header blocks that go with a fault: Upgrade, or one NotUnderstood for each header.

    References
    ----------
    * SOAP 1.2 Part 1, 5.4.7 (Upgrade) and 5.4.8 (NotUnderstood)
    """
    if fault.code == "VersionMismatch":
        upgrade = etree.Element(xml.qname(uids.NS_SOAP12, "Upgrade"), nsmap={"env": uids.NS_SOAP12})
        etree.SubElement(upgrade, xml.qname(uids.NS_SOAP12, "SupportedEnvelope")).set("qname", "env:Envelope")
        return (upgrade,)
    headers = []
    for namespace, local in fault.not_understood:
        prefixes = _prefixes([(namespace, local)])
        header = etree.Element(xml.qname(uids.NS_SOAP12, "NotUnderstood"), nsmap={"env": uids.NS_SOAP12, **prefixes})
        header.set("qname", ":".join(filter(None, (*prefixes, local))))
        headers.append(header)
    return tuple(headers)


def read_fault(body: etree._Element | None) -> Fault | None:
    """Return the fault that a body element is, or None when it is something else.

    Lenient: a fault that breaks its own schema is still the reason why a request failed.
    """
    if body is None or body.tag != FAULT:
        return None
    code_element = body.find(xml.qname(uids.NS_SOAP12, "Code"))
    chain: list[tuple[str, str]] = []
    while code_element is not None:
        value = code_element.find(xml.qname(uids.NS_SOAP12, "Value"))
        if value is not None:
            chain.append(_resolve(value))
        code_element = code_element.find(xml.qname(uids.NS_SOAP12, "Subcode"))
    code = chain[0][1] if chain and chain[0][1] in FAULT_CODES else "Receiver"
    texts = body.findall(f"{xml.qname(uids.NS_SOAP12, 'Reason')}/{xml.qname(uids.NS_SOAP12, 'Text')}")
    english = [t for t in texts if (t.get(xml.qname(uids.NS_XML, "lang")) or "").lower().startswith("en")]
    reason = next(iter(english or texts), None)
    detail = body.find(xml.qname(uids.NS_SOAP12, "Detail"))
    return Fault(code, tuple(chain[1:]), xml.text_of(reason), () if detail is None else tuple(detail))


def _resolve(value: etree._Element) -> tuple[str, str]:
    """Return the name that a QName in content stands for; an undeclared prefix gives no namespace."""
    prefix, _, local = xml.text_of(value).rpartition(":")
    return value.nsmap.get(prefix or None, ""), local


def fault_of(error: XcaImagingError) -> Fault:
    """Return the fault that answers an error.

    A class that knows its fault code (every `RemoteProtocolError`) is answered with it and with its text, which is
    about what the peer sent. Any other error is ours: Receiver, with a text that says nothing of our insides.
    """
    if not isinstance(error, RemoteProtocolError) and not hasattr(error, "fault_code"):
        busy = error.retry is Retry.LATER
        return Fault("Receiver", (), "the request cannot be served now; try again later" if busy else "internal error")
    detail: tuple[etree._Element, ...] = ()
    not_understood: tuple[tuple[str, str], ...] = ()
    if isinstance(error, ActionNotSupported):
        problem = etree.Element(xml.qname(uids.NS_WSA, "ProblemAction"), nsmap={"wsa": uids.NS_WSA})
        etree.SubElement(problem, xml.qname(uids.NS_WSA, "Action")).text = xml.printable(error.action)
        detail = (problem,)
    elif isinstance(error, AddressingHeaderRequired | InvalidAddressingHeader):
        problem = etree.Element(xml.qname(uids.NS_WSA, "ProblemHeaderQName"), nsmap={"wsa": uids.NS_WSA})
        problem.text = f"wsa:{error.header}"
        detail = (problem,)
    elif isinstance(error, MustUnderstand):
        not_understood = error.headers
    subcodes: tuple[tuple[str, str], ...] = getattr(error, "fault_subcodes", ())
    return Fault(getattr(error, "fault_code", "Sender"), subcodes, str(error), detail, not_understood)
