"""An independent SOAP 1.2 client for the tests: plain strings out, strict reading in.

It shares no code with the package, so that the package's codec is not tested against itself. It reads more strictly
than a good receiver would: what real stacks are known to stumble over (line ends, root not first, close-delimited
answers) is an assertion here.

References
----------
* SOAP 1.2 Part 1; WS-Addressing 1.0 SOAP Binding; RFC 2046, 5.1 (multipart); RFC 2387; XOP, 3
"""

from __future__ import annotations

import http.client
import re
import secrets
import socket
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from email.message import Message
from email.parser import BytesHeaderParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from xml.sax.saxutils import escape, quoteattr

from lxml import etree

SOAP = "http://www.w3.org/2003/05/soap-envelope"
SOAP11 = "http://schemas.xmlsoap.org/soap/envelope/"
WSA = "http://www.w3.org/2005/08/addressing"
XOP = "http://www.w3.org/2004/08/xop/include"
XDSB = "urn:ihe:iti:xds-b:2007"
XDSI = "urn:ihe:rad:xdsi-b:2009"
RIM = "urn:oasis:names:tc:ebxml-regrep:xsd:rim:3.0"
RS = "urn:oasis:names:tc:ebxml-regrep:xsd:rs:3.0"
LCM = "urn:oasis:names:tc:ebxml-regrep:xsd:lcm:3.0"
QUERY = "urn:oasis:names:tc:ebxml-regrep:xsd:query:3.0"
NS = {"s": SOAP, "wsa": WSA, "xop": XOP, "b": XDSB, "i": XDSI, "rim": RIM, "rs": RS, "lcm": LCM, "q": QUERY}

SUCCESS = "urn:oasis:names:tc:ebxml-regrep:ResponseStatusType:Success"
PARTIAL = "urn:ihe:iti:2007:ResponseStatusType:PartialSuccess"
FAILURE = "urn:oasis:names:tc:ebxml-regrep:ResponseStatusType:Failure"
APPROVED = "urn:oasis:names:tc:ebxml-regrep:StatusType:Approved"
DEPRECATED = "urn:oasis:names:tc:ebxml-regrep:StatusType:Deprecated"

EXPLICIT_LE = "1.2.840.10008.1.2.1"
IMPLICIT_LE = "1.2.840.10008.1.2"
FIND_DOCUMENTS = "urn:uuid:14d4debf-8f97-4251-9a74-a90016b0af0d"
GET_DOCUMENTS = "urn:uuid:5c4f972b-d56b-40ac-a5fc-c8ca9b40b9d4"
GET_ALL = "urn:uuid:10b545ea-725c-446d-9b95-8aeb444eddf3"
FIND_BY_REFERENCE_ID = "urn:uuid:12941a89-e02e-4be5-967c-ce4bfc8fe492"


@dataclass(frozen=True, slots=True)
class Transaction:
    """What the contract and the transaction table say of one transaction."""

    name: str
    path: str
    action: str
    response_action: str
    mtom: bool


def _iti(number: int, path: str, name: str, mtom: bool) -> Transaction:
    return Transaction(f"ITI-{number}", path, f"urn:ihe:iti:2007:{name}", f"urn:ihe:iti:2007:{name}Response", mtom)


ITI18 = _iti(18, "/services/registry", "RegistryStoredQuery", False)
ITI38 = _iti(38, "/services/responding-gateway", "CrossGatewayQuery", False)
ITI39 = _iti(39, "/services/responding-gateway", "CrossGatewayRetrieve", True)
ITI41 = _iti(41, "/services/repository", "ProvideAndRegisterDocumentSet-b", True)
ITI42 = _iti(42, "/services/registry", "RegisterDocumentSet-b", False)
ITI43 = _iti(43, "/services/repository", "RetrieveDocumentSet", True)
RAD69 = Transaction(
    "RAD-69",
    "/services/imaging-source",
    "urn:ihe:rad:2009:RetrieveImagingDocumentSet",
    "urn:ihe:iti:2007:RetrieveDocumentSetResponse",
    True,
)
RAD75 = Transaction(
    "RAD-75",
    "/services/responding-imaging-gateway",
    "urn:ihe:rad:2011:CrossGatewayRetrieveImagingDocumentSet",
    "urn:ihe:rad:2011:CrossGatewayRetrieveImagingDocumentSetResponse",
    True,
)
ALL = (ITI18, ITI38, ITI39, ITI41, ITI42, ITI43, RAD69, RAD75)


# --------------------------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Part:
    """One MIME part beside the root."""

    content_id: str
    content: bytes
    content_type: str = "application/octet-stream"


def new_message_id() -> str:
    return f"urn:uuid:{uuid.uuid4()}"


def headers_block(
    action: str,
    to: str,
    *,
    message_id: str = "",
    reply_to: str = f"{WSA}/anonymous",
    more: str = "",
) -> str:
    """Return the SOAP header blocks of a request; an empty `action` or `message_id=None` leaves the header out."""
    blocks = []
    if action:
        blocks.append(f'<wsa:Action s:mustUnderstand="1">{escape(action)}</wsa:Action>')
    if message_id:
        blocks.append(f"<wsa:MessageID>{escape(message_id)}</wsa:MessageID>")
    if to:
        blocks.append(f"<wsa:To>{escape(to)}</wsa:To>")
    if reply_to:
        blocks.append(f"<wsa:ReplyTo><wsa:Address>{escape(reply_to)}</wsa:Address></wsa:ReplyTo>")
    return "".join(blocks) + more


def envelope(body: str, headers: str) -> bytes:
    """Return a SOAP 1.2 envelope around a body."""
    return (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<s:Envelope xmlns:s="{SOAP}" xmlns:wsa="{WSA}">'
        f"<s:Header>{headers}</s:Header><s:Body>{body}</s:Body></s:Envelope>"
    ).encode()


def soap_content_type(action: str = "") -> str:
    return "application/soap+xml; charset=UTF-8" + (f'; action="{action}"' if action else "")


def package(root: bytes, parts: Iterable[Part] = (), *, action: str = "") -> tuple[str, bytes]:
    """Return Content-Type and body of an MTOM message."""
    boundary = f"MIMEBoundary_{secrets.token_hex(24)}"
    root_id = f"0.{uuid.uuid4()}@tests.invalid"
    chunks = [
        f"--{boundary}\r\n".encode(),
        b'Content-Type: application/xop+xml; charset=UTF-8; type="application/soap+xml"\r\n',
        f"Content-Transfer-Encoding: binary\r\nContent-ID: <{root_id}>\r\n\r\n".encode(),
        root,
    ]
    for part in parts:
        chunks += [
            f"\r\n--{boundary}\r\nContent-Type: {part.content_type}\r\n".encode(),
            f"Content-Transfer-Encoding: binary\r\nContent-ID: <{part.content_id}>\r\n\r\n".encode(),
            part.content,
        ]
    chunks.append(f"\r\n--{boundary}--\r\n".encode())
    content_type = (
        f'multipart/related; boundary="{boundary}"; type="application/xop+xml"; start="<{root_id}>"; '
        f'start-info="application/soap+xml"' + (f'; action="{action}"' if action else "")
    )
    return content_type, b"".join(chunks)


def include(content_id: str) -> str:
    """Return the xop:Include that refers to a part."""
    return f'<xop:Include xmlns:xop="{XOP}" href="cid:{content_id}"/>'


# --- bodies -----------------------------------------------------------------------------------------------------------


def retrieve_images(
    instances: Iterable[Any],
    *,
    repository: str,
    home: str = "",
    transfer_syntaxes: Iterable[str] = (EXPLICIT_LE, IMPLICIT_LE),
) -> str:
    """Return a RetrieveImagingDocumentSetRequest for objects with `study`, `series` and `uid`."""
    studies: dict[str, dict[str, list[str]]] = {}
    for each in instances:
        studies.setdefault(each.study, {}).setdefault(each.series, []).append(each.uid)
    home_element = f"<b:HomeCommunityId>{escape(home)}</b:HomeCommunityId>" if home else ""
    lines = [f'<i:RetrieveImagingDocumentSetRequest xmlns:i="{XDSI}" xmlns:b="{XDSB}">']
    for study, series in studies.items():
        lines.append(f"<i:StudyRequest studyInstanceUID={quoteattr(study)}>")
        for one, uids in series.items():
            lines.append(f"<i:SeriesRequest seriesInstanceUID={quoteattr(one)}>")
            lines += [
                f"<b:DocumentRequest>{home_element}<b:RepositoryUniqueId>{escape(repository)}</b:RepositoryUniqueId>"
                f"<b:DocumentUniqueId>{escape(uid)}</b:DocumentUniqueId></b:DocumentRequest>"
                for uid in uids
            ]
            lines.append("</i:SeriesRequest>")
        lines.append("</i:StudyRequest>")
    lines.append("<i:TransferSyntaxUIDList>")
    lines += [f"<i:TransferSyntaxUID>{escape(uid)}</i:TransferSyntaxUID>" for uid in transfer_syntaxes]
    lines.append("</i:TransferSyntaxUIDList></i:RetrieveImagingDocumentSetRequest>")
    return "".join(lines)


def retrieve_documents(documents: Iterable[tuple[str, str]], *, home: str = "") -> str:
    """Return a RetrieveDocumentSetRequest for (repository, document) pairs."""
    home_element = f"<b:HomeCommunityId>{escape(home)}</b:HomeCommunityId>" if home else ""
    requests = "".join(
        f"<b:DocumentRequest>{home_element}<b:RepositoryUniqueId>{escape(repository)}</b:RepositoryUniqueId>"
        f"<b:DocumentUniqueId>{escape(document)}</b:DocumentUniqueId></b:DocumentRequest>"
        for repository, document in documents
    )
    return f'<b:RetrieveDocumentSetRequest xmlns:b="{XDSB}">{requests}</b:RetrieveDocumentSetRequest>'


def stored_query(
    query_id: str, slots: Mapping[str, str | Iterable[str]], *, return_type: str = "LeafClass", home: str = ""
) -> str:
    """Return an AdhocQueryRequest; values are given as they stand in rim:Value, quotes and brackets included."""
    rows = ""
    for name, values in slots.items():
        listed = [values] if isinstance(values, str) else values
        inner = "".join(f"<rim:Value>{escape(value)}</rim:Value>" for value in listed)
        rows += f"<rim:Slot name={quoteattr(name)}><rim:ValueList>{inner}</rim:ValueList></rim:Slot>"
    home_attribute = f" home={quoteattr(home)}" if home else ""
    return (
        f'<q:AdhocQueryRequest xmlns:q="{QUERY}" xmlns:rim="{RIM}">'
        f'<q:ResponseOption returnComposedObjects="true" returnType="{return_type}"/>'
        f'<rim:AdhocQuery id="{query_id}"{home_attribute}>{rows}</rim:AdhocQuery></q:AdhocQueryRequest>'
    )


def find_documents(
    patient: str, *, status: Iterable[str] = (APPROVED,), return_type: str = "LeafClass", **more: Any
) -> str:
    """Return FindDocuments for a patient."""
    listed = ",".join(f"'{each}'" for each in status)
    slots = {"$XDSDocumentEntryPatientId": f"'{patient}'", "$XDSDocumentEntryStatus": f"({listed})"}
    return stored_query(FIND_DOCUMENTS, slots, return_type=return_type, **more)


# --------------------------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Document:
    """One DocumentResponse."""

    home: str
    repository: str
    unique_id: str
    mime_type: str
    content: bytes


@dataclass
class RegistryError:
    code: str
    context: str
    location: str
    severity: str


@dataclass
class Answer:
    """An HTTP answer taken apart."""

    status: int
    headers: Message
    raw: bytes
    root: etree._Element | None = None
    parts: dict[str, bytes] = field(default_factory=dict)
    part_types: dict[str, str] = field(default_factory=dict)

    @property
    def is_mtom(self) -> bool:
        return self.headers.get_content_type() == "multipart/related"

    @property
    def envelope(self) -> etree._Element:
        assert self.root is not None, f"no SOAP in HTTP {self.status}: {self.raw[:500]!r}"
        return self.root

    @property
    def body(self) -> etree._Element:
        """The one child of the SOAP body."""
        (child,) = self.envelope.find("s:Body", NS)
        return child

    def header(self, name: str) -> str:
        """Return the text of a WS-Addressing header, empty when absent."""
        return (self.envelope.findtext(f"s:Header/wsa:{name}", "", NS) or "").strip()

    # --- faults -----------------------------------------------------------------------------------------------------

    @property
    def is_fault(self) -> bool:
        return self.root is not None and etree.QName(self.body).localname == "Fault"

    @property
    def fault_codes(self) -> list[str]:
        """The local names of code and subcodes, outermost first."""
        return [value.text.strip().rpartition(":")[2] for value in self.body.iter(f"{{{SOAP}}}Value")]

    @property
    def fault_text(self) -> str:
        return " ".join("".join(self.body.itertext()).split())

    # --- ebXML ------------------------------------------------------------------------------------------------------

    @property
    def registry_status(self) -> str:
        """The status of the RegistryResponse or AdhocQueryResponse."""
        assert not self.is_fault, f"a fault: {self.fault_codes} {self.fault_text}"
        element = self.body if "status" in self.body.attrib else self.body.find("rs:RegistryResponse", NS)
        assert element is not None, etree.tostring(self.body)[:500]
        return str(element.get("status"))

    @property
    def errors(self) -> list[RegistryError]:
        return [
            RegistryError(
                each.get("errorCode", ""),
                each.get("codeContext", ""),
                each.get("location", ""),
                each.get("severity", ""),
            )
            for each in self.body.iter(f"{{{RS}}}RegistryError")
        ]

    @property
    def documents(self) -> dict[str, Document]:
        """The DocumentResponses by unique id; every attachment must be referenced, every reference resolved."""
        import base64

        found: dict[str, Document] = {}
        used = set()
        for response in self.body.findall("b:DocumentResponse", NS):
            element = response.find("b:Document", NS)
            reference = element.find("xop:Include", NS)
            if reference is not None:
                href = reference.get("href")
                assert href.startswith("cid:"), href  # CXF does not find another spelling
                content_id = unquote(href[4:])
                assert content_id in self.parts, f"cid {content_id} has no part"
                used.add(content_id)
                content = self.parts[content_id]
            else:
                content = base64.b64decode(element.text or "", validate=False)
            document = Document(
                response.findtext("b:HomeCommunityId", "", NS),
                response.findtext("b:RepositoryUniqueId", "", NS),
                response.findtext("b:DocumentUniqueId", "", NS),
                response.findtext("b:mimeType", "", NS),
                content,
            )
            assert document.unique_id not in found, f"{document.unique_id} came twice"
            found[document.unique_id] = document
        assert used == set(self.parts), f"parts that nothing refers to: {set(self.parts) - used}"
        return found

    @property
    def entries(self) -> list[etree._Element]:
        """The ExtrinsicObjects of a query answer."""
        return self.body.findall("rim:RegistryObjectList/rim:ExtrinsicObject", NS)


def parse_xml(data: bytes) -> etree._Element:
    parser = etree.XMLParser(resolve_entities=False, no_network=True, huge_tree=True)
    return etree.fromstring(data, parser)


def split_multipart(content_type: Message, body: bytes) -> list[tuple[Message, bytes]]:
    """Return headers and content of each part, strictly: CRLF everywhere, a closing boundary, nothing left open."""
    boundary = str(content_type.get_param("boundary")).encode()
    assert 1 <= len(boundary) <= 70, boundary  # RFC 2046, 5.1.1
    delimiter = b"--" + boundary
    if not body.startswith(delimiter):
        _preamble, found, rest = body.partition(b"\r\n" + delimiter)
        assert found, "the boundary is nowhere"
        body = delimiter + rest
    pieces = (b"\r\n" + body).split(b"\r\n" + delimiter)[1:]
    assert pieces, "no part"
    assert pieces[-1].startswith(b"--"), "no closing boundary"
    parts = []
    for piece in pieces[:-1]:
        head, found, content = piece.partition(b"\r\n\r\n")
        assert found, f"a part without an end of headers: {piece[:200]!r}"
        assert head.startswith(b"\r\n"), f"something behind the boundary: {head[:80]!r}"
        assert b"\n" not in head.replace(b"\r\n", b""), "a bare line feed in part headers"
        parts.append((BytesHeaderParser().parsebytes(head[2:] + b"\r\n\r\n"), content))
    return parts


def read_answer(status: int, headers: Message, raw: bytes) -> Answer:
    """Take an HTTP answer apart."""
    answer = Answer(status, headers, raw)
    media_type = headers.get_content_type()
    if media_type == "multipart/related":
        assert headers.get_param("type") == "application/xop+xml", headers["Content-Type"]
        assert "application/soap+xml" in str(headers.get_param("start-info")), headers["Content-Type"]
        (root_head, root), *rest = split_multipart(headers, raw)
        start = headers.get_param("start")
        if start:
            assert root_head["Content-ID"].strip() == start, "the root is not the first part"
        assert root_head.get_content_type() == "application/xop+xml", root_head["Content-Type"]
        answer.root = parse_xml(root)
        for head, content in rest:
            content_id = head["Content-ID"].strip()
            assert re.fullmatch("<[^<>]+>", content_id), content_id
            answer.parts[unquote(content_id[1:-1])] = content
            answer.part_types[unquote(content_id[1:-1])] = head.get_content_type()
    elif media_type in ("application/soap+xml", "text/xml"):
        answer.root = parse_xml(raw)
    return answer


# --------------------------------------------------------------------------------------------------------------------
# Talking
# --------------------------------------------------------------------------------------------------------------------


def post(
    url: str,
    content_type: str,
    body: bytes | Iterable[bytes],
    *,
    deadline: float = 60.0,
    headers: Mapping[str, str] = {},
) -> Answer:
    """POST and read the answer; an iterable goes out in chunked coding.

    An answer that comes before the request was taken whole is read too: a server may refuse in the middle.
    """
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=deadline)
    try:
        try:
            connection.request("POST", parts.path, body=body, headers={"Content-Type": content_type, **headers})
        except (BrokenPipeError, ConnectionResetError):
            if connection.sock is None:
                raise
        response = connection.getresponse()
        raw = response.read()
        _check_framing(response)
        return read_answer(response.status, response.headers, raw)
    finally:
        connection.close()


def _check_framing(response: http.client.HTTPResponse) -> None:
    """A close-delimited answer cannot be told from one that was cut (peers-cxf-ipf): never accepted."""
    assert response.headers.get("Content-Length") is not None or "chunked" in response.headers.get(
        "Transfer-Encoding", ""
    ), "an answer delimited by closing the connection"


def send(
    node: Any,
    transaction: Transaction,
    body: str,
    *,
    parts: Iterable[Part] = (),
    path: str = "",
    mtom: bool | None = None,
    check: bool = True,
    deadline: float = 60.0,
    message_id: str = "",
    more_headers: str = "",
    to: str = "",
) -> Answer:
    """Send one transaction to a node and return its answer.

    With `check`, what holds for every answer is checked: packaging, action, relation, framing.
    """
    url = node if isinstance(node, str) else node.url(path or transaction.path)
    message_id = message_id or new_message_id()
    root = envelope(body, headers_block(transaction.action, to or url, message_id=message_id, more=more_headers))
    if transaction.mtom if mtom is None else mtom:
        content_type, raw = package(root, parts, action=transaction.action)
    else:
        content_type, raw = soap_content_type(transaction.action), root
    answer = post(url, content_type, raw, deadline=deadline)
    if check:
        check_answer(answer, transaction, message_id)
    return answer


def check_answer(answer: Answer, transaction: Transaction, message_id: str) -> None:
    """Check what holds for every answer that is not a fault (section 2 of the conformance cases)."""
    assert not answer.is_fault, f"a fault: {answer.fault_codes} {answer.fault_text}"
    assert answer.status == 200, f"HTTP {answer.status}"
    assert answer.is_mtom is transaction.mtom, f"packaging: {answer.headers['Content-Type']}"
    assert etree.QName(answer.envelope) == etree.QName(SOAP, "Envelope")
    assert answer.header("Action") == transaction.response_action
    assert answer.header("RelatesTo") == message_id
    for error in answer.errors:
        assert error.code
        assert error.severity.rpartition(":")[2] in ("Error", "Warning"), error.severity
    if transaction.mtom and etree.QName(answer.body).localname == "RetrieveDocumentSetResponse":
        documents, errors = answer.documents, [e for e in answer.errors if e.severity.endswith("Error")]
        expected = PARTIAL if documents and errors else FAILURE if errors else SUCCESS
        assert answer.registry_status == expected, f"{len(documents)} documents, {len(errors)} errors"


def raw_exchange(
    address: tuple[str, int],
    data: bytes | Iterable[bytes],
    *,
    deadline: float = 30.0,
    shut: bool = False,
    pause: float = 0.0,
) -> bytes:
    """Send bytes as they are and return all that comes back until the peer closes (or falls silent: TimeoutError)."""
    import time

    with socket.create_connection(address, timeout=deadline) as connection:
        try:
            for chunk in [data] if isinstance(data, bytes) else data:
                connection.sendall(chunk)
                if pause:
                    time.sleep(pause)
            if shut:
                connection.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):
            pass
        received = bytearray()
        while True:
            try:
                chunk = connection.recv(65536)
            except ConnectionResetError:
                break
            if not chunk:
                break
            received += chunk
        return bytes(received)


def http_request(path: str, headers: Mapping[str, str], body: bytes, *, method: str = "POST") -> bytes:
    """Return the bytes of an HTTP/1.1 request that asks for the connection to be closed."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if "Transfer-Encoding" not in headers and "Content-Length" not in headers:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def status_of(raw: bytes) -> int:
    """Return the HTTP status of a raw answer, 0 when there is none."""
    match = re.match(rb"HTTP/1\.[01] (\d{3})", raw)
    return int(match[1]) if match else 0


def save(answer: Answer, folder: Path) -> None:
    """Write the documents of an answer into a folder, for a person to look at."""
    folder.mkdir(parents=True, exist_ok=True)
    for uid, document in answer.documents.items():
        (folder / uid).write_bytes(document.content)
