"""Bad input, dying peers and full disks: the right fault or error, bounded work, and the node lives.

Every test ends with the same question: does the node still answer a good request?
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.scenarios.holding import Holding, check_images, files_below, rad69, rad75
from tests.support import images, peers, soap_client
from tests.support.node import HOME, RETRIEVE_LOCATION, Node, Peak, pacs_section
from tests.support.soap_client import SOAP, WSA, Part, envelope, headers_block, package, post, soap_content_type

pytestmark = pytest.mark.timeout(120)

STALL = 2.0  # seconds; the node's limits.stall_timeout in these tests
HEADER = 1.0  # limits.header_timeout
ARTIM = 0.5  # limits.artim_timeout
PATIENT = f"NOBODY^^^&{images.AUTHORITY}&ISO"
ADDRESSING_FAULT, SOAP_FAULT = f"{WSA}/fault", f"{WSA}/soap/fault"


@pytest.fixture(scope="module")
def holding(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Holding]:
    """A node with short limits before a qrscp (part of pynetdicom: no outside program is needed)."""
    folder = tmp_path_factory.mktemp("hostile")
    study = images.ct(folder / "ct", 2)
    node = Node(
        folder / "node",
        {
            "limits": {
                "stall_timeout": f"{STALL}s",
                "header_timeout": f"{HEADER}s",
                "artim_timeout": f"{ARTIM}s",
            }
        },
    )
    with peers.Qrscp(folder / "pacs", [node.entity]) as pacs:
        pacs.upload(study.paths)
        node.config["pacs"] = [pacs_section(pacs, assigning_authority=images.AUTHORITY)]
        with node:
            yield Holding(pacs, node, None, {"ct": study})  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def node_lives(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test the module's node serves, in good time, a query and a retrieval."""
    yield
    if "holding" not in request.fixturenames:
        return
    holding: Holding = request.getfixturevalue("holding")
    node = holding.node
    assert node.process is not None
    assert node.process.poll() is None, node.tail()
    started = time.monotonic()
    answer = soap_client.send(node, soap_client.ITI18, soap_client.find_documents(PATIENT), deadline=15)
    assert answer.registry_status == soap_client.SUCCESS
    assert time.monotonic() - started < 10
    got = rad69(node, holding.studies["ct"].instances, deadline=20)
    assert got.registry_status == soap_client.SUCCESS, got.errors
    assert requests.get(node.url("/health/live"), timeout=5).status_code == 200


def _later(call: Callable[[], Any]) -> Future[Any]:
    """Run a call in a thread; its value or its error is the future's."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(call)
    pool.shutdown(wait=False)
    return future


def _query(action: str = soap_client.ITI18.action, **more: Any) -> bytes:
    more.setdefault("message_id", soap_client.new_message_id())
    return envelope(soap_client.find_documents(PATIENT), headers_block(action, "urn:example:registry", **more))


def _post(holding: Holding, data: bytes, *, path: str = "/services/registry", content_type: str = "") -> Any:
    return post(holding.node.url(path), content_type or soap_content_type(), data, deadline=60)


def _check_fault(answer: soap_client.Answer, *codes: str, action: str = SOAP_FAULT, related: str = "") -> None:
    assert answer.is_fault, answer.raw[:500]
    assert answer.status == 500  # peers-cxf-ipf: of an HTTP 400 CXF's clients keep nothing but the number
    assert answer.fault_codes[: len(codes)] == list(codes)
    assert answer.header("Action") == action
    if related:
        assert answer.header("RelatesTo") == related


# --------------------------------------------------------------------------------------------------------------------
# SOAP and WS-Addressing
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content_type", ["application/soap+xml; charset=UTF-8", "text/xml; charset=UTF-8"])
def test_soap_1_1(holding: Holding, content_type: str) -> None:
    data = _query().replace(SOAP.encode(), soap_client.SOAP11.encode())
    answer = _post(holding, data, content_type=content_type)
    assert answer.status == 500
    assert answer.is_fault or b"VersionMismatch" in answer.raw
    assert b"VersionMismatch" in answer.raw
    upgrade = answer.envelope.find(f"s:Header/{{{SOAP}}}Upgrade", soap_client.NS)
    assert upgrade is not None
    (supported,) = upgrade.findall(f"{{{SOAP}}}SupportedEnvelope")
    prefix, _, name = supported.get("qname").partition(":")
    assert (supported.nsmap[prefix], name) == (SOAP, "Envelope")


def test_an_envelope_of_an_unknown_namespace(holding: Holding) -> None:
    answer = _post(holding, _query().replace(SOAP.encode(), b"urn:example:soap"))
    assert answer.fault_codes[0] == "VersionMismatch"


def test_not_an_envelope(holding: Holding) -> None:
    answer = _post(holding, b"<hello/>")
    assert answer.status == 500
    assert answer.fault_codes[0] in ("Sender", "VersionMismatch")


@pytest.mark.parametrize("path", sorted({each.path for each in soap_client.ALL}))
def test_an_unknown_action(holding: Holding, path: str) -> None:
    message_id = soap_client.new_message_id()
    answer = _post(holding, _query("urn:example:DoSomethingElse", message_id=message_id), path=path)
    _check_fault(answer, "Sender", "ActionNotSupported", action=ADDRESSING_FAULT, related=message_id)
    problem = answer.body.findtext("s:Detail/wsa:ProblemAction/wsa:Action", "", soap_client.NS)
    assert problem == "urn:example:DoSomethingElse"


def test_an_action_of_another_endpoint(holding: Holding) -> None:
    answer = _post(holding, _query(), path="/services/imaging-source")
    _check_fault(answer, "Sender", "ActionNotSupported", action=ADDRESSING_FAULT)


def test_an_unknown_header_that_must_be_understood(holding: Holding) -> None:
    header = '<x:Secret xmlns:x="urn:example:x" s:mustUnderstand="true">1</x:Secret>'
    message_id = soap_client.new_message_id()
    answer = _post(holding, _query(more=header, message_id=message_id))
    _check_fault(answer, "MustUnderstand", related=message_id)
    (not_understood,) = answer.envelope.findall(f"s:Header/{{{SOAP}}}NotUnderstood", soap_client.NS)
    prefix, _, name = not_understood.get("qname").partition(":")
    assert (not_understood.nsmap[prefix], name) == ("urn:example:x", "Secret")


@pytest.mark.parametrize(
    "header",
    [
        '<x:Note xmlns:x="urn:example:x">1</x:Note>',
        '<x:Note xmlns:x="urn:example:x" s:mustUnderstand="0">1</x:Note>',
        '<x:Note xmlns:x="urn:example:x" s:mustUnderstand="1" s:role="urn:example:somebody-else">1</x:Note>',
    ],
)
def test_other_headers_do_no_harm(holding: Holding, header: str) -> None:
    answer = _post(holding, _query(more=header))
    assert answer.registry_status == soap_client.SUCCESS


def test_addressing_headers_marked_must_understand_are_understood(holding: Holding) -> None:
    """dcm4chee marks To and MessageID (transactions.md section 1)."""
    data = _query()
    for name in (b"MessageID", b"To", b"ReplyTo"):
        data = data.replace(b"<wsa:" + name + b">", b"<wsa:" + name + b' s:mustUnderstand="true">')
    assert _post(holding, data).registry_status == soap_client.SUCCESS


@pytest.mark.parametrize(("kept", "missing"), [({"action": ""}, "Action"), ({"message_id": ""}, "MessageID")])
def test_a_missing_addressing_header(holding: Holding, kept: dict[str, str], missing: str) -> None:
    headers = {"action": soap_client.ITI18.action, "message_id": soap_client.new_message_id(), **kept}
    data = envelope(soap_client.find_documents(PATIENT), headers_block(to="urn:example:registry", **headers))
    answer = _post(holding, data)
    _check_fault(answer, "Sender", "MessageAddressingHeaderRequired", action=ADDRESSING_FAULT)
    named = answer.body.findtext("s:Detail/wsa:ProblemHeaderQName", "", soap_client.NS)
    assert named.rpartition(":")[2] == missing


@pytest.mark.parametrize("name", ["Action", "MessageID", "To", "ReplyTo"])
def test_a_repeated_addressing_header(holding: Holding, name: str) -> None:
    value = {
        "Action": soap_client.ITI18.action,
        "MessageID": "urn:uuid:6c3d5e0e-5a9c-4f0c-8f3f-0c2e5f1f0b11",
        "To": "urn:example:registry",
        "ReplyTo": f"<wsa:Address>{WSA}/anonymous</wsa:Address>",
    }[name]
    answer = _post(holding, _query(more=f"<wsa:{name}>{value}</wsa:{name}>"))
    _check_fault(answer, "Sender", "InvalidAddressingHeader", "InvalidCardinality", action=ADDRESSING_FAULT)


def test_an_action_that_does_not_fit_the_body(holding: Holding) -> None:
    answer = _post(holding, _query(soap_client.ITI42.action))
    _check_fault(answer, "Sender", "InvalidAddressingHeader", "ActionMismatch", action=ADDRESSING_FAULT)


def test_a_reply_address_elsewhere_is_not_served(holding: Holding) -> None:
    """Contract section 3: only towards hosts of configured communities, and there is none."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(1.5)
        elsewhere = f"http://127.0.0.1:{listener.getsockname()[1]}/reply"
        answer = _post(holding, _query(reply_to=elsewhere))
        assert answer.is_fault
        assert answer.fault_codes[0] == "Sender"
        with pytest.raises(TimeoutError):
            listener.accept()


@pytest.mark.parametrize(
    "body",
    ["", "<x/>", f'<b:RetrieveDocumentSetRequest xmlns:b="{soap_client.XDSB}"/>', "text", "<a/><b/>"],
    ids=["empty", "unknown", "other", "text", "two"],
)
def test_a_body_that_is_not_the_transaction(holding: Holding, body: str) -> None:
    headers = headers_block(soap_client.ITI18.action, "urn:example:r", message_id=soap_client.new_message_id())
    answer = _post(holding, envelope(body, headers))
    assert answer.status == 500
    assert answer.fault_codes[0] == "Sender"


@pytest.mark.parametrize(
    "data",
    [b"", b"\0" * 100, b"<", b"<s:Envelope", _query()[:-10], b"\xff\xfe\x00\x00", b"{}"],
    ids=["empty", "nul", "less", "cut-start", "cut-end", "bom", "json"],
)
def test_not_xml(holding: Holding, data: bytes) -> None:
    answer = _post(holding, data)
    assert answer.status == 500
    assert answer.fault_codes[0] == "Sender"


# --------------------------------------------------------------------------------------------------------------------
# XML bombs and sizes
# --------------------------------------------------------------------------------------------------------------------

DTDS = {
    "dtd": "<!DOCTYPE s:Envelope>",
    "internal": '<!DOCTYPE s [<!ENTITY a "b">]>',
    "external": '<!DOCTYPE s SYSTEM "http://127.0.0.1:1/x.dtd">',
    "file": '<!DOCTYPE s [<!ENTITY a SYSTEM "file:///etc/hostname">]>',
    "laughs": "<!DOCTYPE s ["
    + '<!ENTITY l0 "lol">'
    + "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 12))
    + "]>",
    "quadratic": f'<!DOCTYPE s [<!ENTITY a "{"x" * 100_000}">]>',
    "parameter": '<!DOCTYPE s [<!ENTITY % p SYSTEM "http://127.0.0.1:1/p.dtd"> %p;]>',
}


@pytest.mark.parametrize("kind", DTDS)
def test_a_document_type_or_entity(holding: Holding, kind: str) -> None:
    reference = {"laughs": "&l11;", "quadratic": "&a;" * 30_000, "internal": "&a;", "file": "&a;"}.get(kind, "")
    data = _query().decode().replace("?>\n", "?>\n" + DTDS[kind], 1).replace("NOBODY", f"NOBODY{reference}")
    before, started = holding.node.rss(), time.monotonic()
    with Peak(holding.node) as peak:
        answer = _post(holding, data.encode())
    _check_fault(answer, "Sender")
    assert time.monotonic() - started < 5
    assert peak.value - before < 50 * 2**20
    assert Path("/etc/hostname").read_bytes().strip() not in answer.raw


@pytest.mark.parametrize("encoding", ["UTF-16", "UTF-7", "EBCDIC-CP-US", "x-unknown"])
def test_an_entity_in_another_encoding_is_no_way_around(holding: Holding, encoding: str) -> None:
    text = _query().decode().replace("?>\n", "?>\n" + DTDS["internal"], 1).replace("UTF-8", encoding)
    try:
        data = text.encode(encoding)
    except LookupError:
        data = text.encode()
    answer = _post(holding, data, content_type="application/soap+xml")
    assert answer.status == 500
    assert answer.fault_codes[0] == "Sender"


@pytest.mark.parametrize("shape", ["wide", "text", "deep", "attributes"])
@pytest.mark.parametrize("chunked", [False, True])
def test_fifty_megabytes_of_xml(holding: Holding, shape: str, chunked: bool) -> None:
    size = 50_000_000
    filling = {
        "wide": "<a/>" * (size // 4),
        "text": "x" * size,
        "deep": "<a>" * (size // 7) + "</a>" * (size // 7),
        "attributes": "<a " + " ".join(f'a{n}="{n}"' for n in range(size // 16)) + "/>",
    }[shape]
    headers = headers_block(soap_client.ITI18.action, "urn:example:r", message_id=soap_client.new_message_id())
    data = envelope(filling, headers)
    before, started = holding.node.rss(), time.monotonic()
    body: Any = (data[start : start + 2**16] for start in range(0, len(data), 2**16)) if chunked else data
    with Peak(holding.node) as peak:
        answer = _post(holding, body)
    _check_fault(answer, "Sender")
    assert time.monotonic() - started < 20
    assert peak.value - before < 200 * 2**20, f"{(peak.value - before) / 2**20:.0f} MiB"


def test_deep_nesting_below_the_size_limit(holding: Holding) -> None:
    headers = headers_block(soap_client.ITI18.action, "urn:example:r", message_id=soap_client.new_message_id())
    answer = _post(holding, envelope("<a>" * 100_000 + "</a>" * 100_000, headers))
    assert answer.status == 500
    assert answer.fault_codes[0] == "Sender"


def test_a_large_query_below_the_size_limit_is_answered_while_others_are_served(holding: Holding) -> None:
    values = [f"('{'9' * 60}.{n}')" for n in range(100_000)]
    body = soap_client.stored_query(
        soap_client.GET_DOCUMENTS, {"$XDSDocumentEntryUniqueId": values}, return_type="ObjectRef"
    )
    assert 5_000_000 < len(body) < 30_000_000
    asked = _later(lambda: soap_client.send(holding.node, soap_client.ITI18, body, check=False))
    time.sleep(0.3)  # it is under way
    started = time.monotonic()
    assert requests.get(holding.node.url("/health/live"), timeout=10).ok
    waited = time.monotonic() - started
    assert asked.result(60).status in (200, 500)
    assert waited < 5


# --------------------------------------------------------------------------------------------------------------------
# MIME
# --------------------------------------------------------------------------------------------------------------------


def _rad69(holding: Holding) -> bytes:
    body = soap_client.retrieve_images(holding.studies["ct"].instances, repository=RETRIEVE_LOCATION)
    return envelope(
        body, headers_block(soap_client.RAD69.action, "urn:example:s", message_id=soap_client.new_message_id())
    )


def test_multipart_without_a_boundary_parameter(holding: Holding) -> None:
    _, data = package(_rad69(holding))
    answer = _post(
        holding,
        data,
        path="/services/imaging-source",
        content_type='multipart/related; type="application/xop+xml"; start-info="application/soap+xml"',
    )
    _check_fault(answer, "Sender")


def _broken(holding: Holding, kind: str) -> tuple[str, bytes]:
    content_type, data = package(_rad69(holding), [Part("a@x", b"1234")])
    boundary = content_type.split('boundary="')[1].split('"')[0].encode()
    match kind:
        case "other boundary":
            return content_type, data.replace(boundary, b"something-else")
        case "never closed":
            return content_type, data.removesuffix(b"--\r\n")
        case "cut in the root":
            return content_type, data[:600]
        case "cut in part headers":
            return content_type, data[: data.rindex(b"Content-ID")]
        case "no part at all":
            return content_type, b"--" + boundary + b"--\r\n"
        case "empty body":
            return content_type, b""
        case "endless header":
            return content_type, data.replace(b"Content-ID: <a@x>", b"X-Long: " + b"y" * 2_000_000, 1)
        case "many headers":
            return content_type, data.replace(
                b"Content-ID: <a@x>", b"".join(b"X-%d: y\r\n" % n for n in range(100_000)) + b"X: y", 1
            )
        case "root is no xml":
            return package(b"\x89PNG\r\n")
        case "boundary too long":
            long = b"b" * 3000
            return content_type.replace(boundary.decode(), long.decode()), data.replace(boundary, long)
    raise AssertionError(kind)


@pytest.mark.parametrize(
    "kind",
    [
        "other boundary",
        "cut in the root",
        "cut in part headers",
        "never closed",
        "no part at all",
        "empty body",
        "endless header",
        "many headers",
        "root is no xml",
        "boundary too long",
    ],
)
def test_broken_multipart(holding: Holding, kind: str) -> None:
    content_type, data = _broken(holding, kind)
    answer = _post(holding, data, path="/services/imaging-source", content_type=content_type)
    assert answer.is_fault, answer.raw[:300]
    assert answer.status == 500
    assert answer.fault_codes[0] == "Sender"


def _submission(patient: str, content_id: str) -> tuple[str, str]:
    """Return the body of a minimal ITI-41 with one document by reference, and its unique id."""
    unique_id = images.new_uid()
    classification = "urn:oasis:names:tc:ebxml-regrep:ObjectType:RegistryObject"

    def code(scheme: str, value: str, system: str, parent: str) -> str:
        return (
            f'<rim:Classification classificationScheme="{scheme}" classifiedObject="{parent}" id="c-{scheme[-6:]}" '
            f'nodeRepresentation="{value}"><rim:Slot name="codingScheme"><rim:ValueList><rim:Value>{system}'
            f'</rim:Value></rim:ValueList></rim:Slot><rim:Name><rim:LocalizedString value="{value}"/></rim:Name>'
            "</rim:Classification>"
        )

    def external(scheme: str, name: str, value: str, parent: str) -> str:
        return (
            f'<rim:ExternalIdentifier identificationScheme="{scheme}" registryObject="{parent}" id="e-{scheme[-6:]}" '
            f'value="{value.replace("&", "&amp;")}"><rim:Name><rim:LocalizedString value="{name}"/></rim:Name>'
            "</rim:ExternalIdentifier>"
        )

    def slot(name: str, value: str) -> str:
        return (
            f'<rim:Slot name="{name}"><rim:ValueList><rim:Value>{value.replace("&", "&amp;")}</rim:Value>'
            "</rim:ValueList></rim:Slot>"
        )

    entry = (
        '<rim:ExtrinsicObject id="doc" mimeType="text/plain" '
        'objectType="urn:uuid:7edca82f-054d-47f2-a032-9b2a5b5186c1">'
        + slot("creationTime", "20260102")
        + slot("languageCode", "en-us")
        + slot("sourcePatientId", patient)
        + code("urn:uuid:41a5887f-8865-4c09-adf7-e362475b143a", "REPORTS", "1.3.6.1.4.1.19376.1.2.6.1", "doc")
        + code("urn:uuid:f4f85eac-e6cb-4883-b524-f2705394840f", "N", "2.16.840.1.113883.5.25", "doc")
        + code("urn:uuid:a09d5840-386c-46f2-b5ad-9c3699a4309d", "urn:ihe:rad:TEXT", "1.3.6.1.4.1.19376.1.2.3", "doc")
        + code("urn:uuid:f33fb8ac-18af-42cc-ae0e-ed0b0bdb91e1", "264372000", "2.16.840.1.113883.6.96", "doc")
        + code("urn:uuid:cccf5598-8b07-4b77-a05e-ae952c785ead", "Practice-C", "1.3.6.1.4.1.21367.2017.3", "doc")
        + code("urn:uuid:f0306f51-975f-434e-a61c-c59651d33983", "11369-6", "2.16.840.1.113883.6.1", "doc")
        + external("urn:uuid:58a6f841-87b3-4a3e-92fd-a8ffeff98427", "XDSDocumentEntry.patientId", patient, "doc")
        + external("urn:uuid:2e82c1f6-a085-4c72-9da3-8640a32e42ab", "XDSDocumentEntry.uniqueId", unique_id, "doc")
        + "</rim:ExtrinsicObject>"
    )
    submission_set = (
        f'<rim:RegistryPackage id="set" objectType="{classification}:RegistryPackage">'
        + slot("submissionTime", "20260102030405")
        + code("urn:uuid:aa543740-bdda-424e-8c96-df4873be8500", "225728007", "2.16.840.1.113883.6.96", "set")
        + external(
            "urn:uuid:96fdda7c-d067-4183-912e-bf5ee74998a8", "XDSSubmissionSet.uniqueId", images.new_uid(), "set"
        )
        + external("urn:uuid:554ac39e-e3fe-47fe-b233-965d2a147832", "XDSSubmissionSet.sourceId", "1.2.3.4", "set")
        + external("urn:uuid:6b5aea1a-874d-4603-a4bc-96a0a7b38446", "XDSSubmissionSet.patientId", patient, "set")
        + "</rim:RegistryPackage>"
        '<rim:Classification classifiedObject="set" id="cl" '
        'classificationNode="urn:uuid:a54d6aa5-d40d-43f9-88c5-b4633d873bdd"/>'
        '<rim:Association id="as" associationType="urn:oasis:names:tc:ebxml-regrep:AssociationType:HasMember" '
        f'sourceObject="set" targetObject="doc">{slot("SubmissionSetStatus", "Original")}</rim:Association>'
    )
    return (
        f'<b:ProvideAndRegisterDocumentSetRequest xmlns:b="{soap_client.XDSB}" xmlns:lcm="{soap_client.LCM}" '
        f'xmlns:rim="{soap_client.RIM}"><lcm:SubmitObjectsRequest><rim:RegistryObjectList>{entry}{submission_set}'
        "</rim:RegistryObjectList></lcm:SubmitObjectsRequest>"
        f'<b:Document id="doc">{soap_client.include(content_id)}</b:Document></b:ProvideAndRegisterDocumentSetRequest>'
    ), unique_id


def test_the_submission_of_these_tests_is_good(holding: Holding) -> None:
    patient = f"{images.new_patient()}^^^&{images.AUTHORITY}&ISO"
    body, unique_id = _submission(patient, "d@x")
    answer = soap_client.send(holding.node, soap_client.ITI41, body, parts=[Part("d@x", b"hello", "text/plain")])
    assert answer.registry_status == soap_client.SUCCESS, answer.errors
    found = soap_client.send(holding.node, soap_client.ITI18, soap_client.find_documents(patient))
    assert len(found.entries) == 1
    assert unique_id.encode() in found.raw


def test_a_reference_to_a_missing_part(holding: Holding) -> None:
    """No part, no document: a fault or a failure, and nothing registered."""
    patient = f"{images.new_patient()}^^^&{images.AUTHORITY}&ISO"
    body, _ = _submission(patient, "missing@x")
    answer = soap_client.send(holding.node, soap_client.ITI41, body, parts=[Part("other@x", b"hello")], check=False)
    if answer.is_fault:
        assert answer.fault_codes[0] == "Sender"
    else:
        assert answer.registry_status == soap_client.FAILURE
    found = soap_client.send(holding.node, soap_client.ITI18, soap_client.find_documents(patient))
    assert found.entries == []


def test_twenty_thousand_parts(holding: Holding) -> None:
    patient = f"{images.new_patient()}^^^&{images.AUTHORITY}&ISO"
    body, _ = _submission(patient, "19999@x")
    before, files = holding.node.rss(), files_below(holding.node.data)
    started = time.monotonic()
    with Peak(holding.node) as peak:
        answer = soap_client.send(
            holding.node,
            soap_client.ITI41,
            body,
            parts=[Part(f"{n}@x", b"x" * 10) for n in range(20_000)],
            check=False,
        )
    _check_fault(answer, "Sender")
    assert time.monotonic() - started < 20
    assert peak.value - before < 50 * 2**20

    def clean() -> bool:
        return all(name.endswith(("-wal", "-shm")) for name in files_below(holding.node.data).keys() - files)

    peers.wait_until(clean, 10, "no part of a refused message stays on disk")
    found = soap_client.send(holding.node, soap_client.ITI18, soap_client.find_documents(patient))
    assert found.entries == []


@pytest.mark.parametrize("lf", [False, True], ids=["quoted-upper", "bare-lf"])
def test_odd_but_readable_multipart(holding: Holding, lf: bool) -> None:
    """LF line ends, unquoted boundary, preamble and epilogue are read."""
    content_type, data = package(_rad69(holding))
    data = b"preamble\r\n" + data + b"epilogue"
    if lf:
        head, _, rest = data.partition(b"\r\n\r\n")
        data = (head + b"\r\n\r\n" + rest).replace(b"\r\n", b"\n")
        content_type = content_type.replace('boundary="', "boundary=", 1).replace('";', ";", 1)
    answer = _post(holding, data, path="/services/imaging-source", content_type=content_type)
    assert not answer.is_fault, answer.fault_text
    assert answer.registry_status == soap_client.SUCCESS


# --------------------------------------------------------------------------------------------------------------------
# HTTP
# --------------------------------------------------------------------------------------------------------------------


def _address(holding: Holding) -> tuple[str, int]:
    return "127.0.0.1", holding.node.http_port


@pytest.mark.parametrize(
    ("method", "path", "statuses"),
    [
        ("GET", "/services/registry", {400, 404, 405}),
        ("PUT", "/services/registry", {405}),
        ("DELETE", "/services/registry", {405}),
        ("POST", "/services/nothing", {404}),
        ("GET", "/nothing", {404}),
        ("GET", "/services/../../etc/passwd", {400, 404}),
    ],
)
def test_what_is_not_soap_gets_a_plain_status(holding: Holding, method: str, path: str, statuses: set[int]) -> None:
    raw = soap_client.raw_exchange(_address(holding), soap_client.http_request(path, {}, b"", method=method))
    assert soap_client.status_of(raw) in statuses


@pytest.mark.parametrize("content_type", ["application/json", "image/png", "application/x-www-form-urlencoded"])
def test_another_media_type(holding: Holding, content_type: str) -> None:
    answer = _post(holding, b"{}", content_type=content_type)
    assert answer.status == 415


@pytest.mark.parametrize(
    "data",
    [
        b"\0" * 2000,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET\r\n\r\n",
        b"POST /services/registry HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /services/registry HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
        b"POST /services/registry HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /health/live HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
    ],
    ids=["nul", "tls", "short", "negative", "two-lengths", "bad-chunk", "long-line", "long-header"],
)
def test_broken_http(holding: Holding, data: bytes) -> None:
    raw = soap_client.raw_exchange(_address(holding), data, shut=True)
    assert soap_client.status_of(raw) in (0, 400, 413, 414, 431, 500)


def test_a_slow_header_is_cut_off(holding: Holding) -> None:
    """limits.header_timeout: a byte now and then does not keep a connection for ever."""
    started = time.monotonic()
    with socket.create_connection(_address(holding), timeout=HEADER * 6) as connection:
        connection.sendall(b"POST /services/registry HTTP/1.1\r\nHost: x\r\n")
        closed = False
        while not closed and time.monotonic() - started < HEADER * 6:
            try:
                connection.sendall(b"X-Slow: 1\r\n")
                connection.settimeout(0.3)
                while connection.recv(4096):
                    pass
                closed = True
            except TimeoutError:
                continue
            except OSError:
                closed = True
        assert closed, f"still open after {time.monotonic() - started:.1f} s"
    assert time.monotonic() - started < HEADER * 4


@pytest.mark.slow
def test_a_body_that_never_comes_is_cut_off(holding: Holding) -> None:
    """limits.stall_timeout: a peer that sends nothing gets its answer, or the end of the connection, in time.

    The connection itself may stay a little longer, for a peer that is still sending to read the answer.
    """
    started = time.monotonic()
    request = soap_client.http_request(
        "/services/registry", {"Content-Type": soap_content_type(), "Content-Length": "100000"}, b"<s:"
    )
    with socket.create_connection(_address(holding), timeout=STALL * 8) as connection:
        connection.sendall(request)
        first = connection.recv(65536)
        assert time.monotonic() - started < STALL * 3
        assert soap_client.status_of(first) in (0, 400, 408, 500)
        while connection.recv(65536):
            continue
    assert time.monotonic() - started < STALL * 3 + 15


def test_an_offer_of_http_2_is_ignored_and_the_body_read(holding: Holding) -> None:
    """CXF offers h2c with every plain request (peers-cxf-ipf)."""
    answer = post(
        holding.node.url("/services/registry"),
        soap_content_type(),
        _query(),
        headers={
            "Connection": "Upgrade, HTTP2-Settings",
            "Upgrade": "h2c",
            "HTTP2-Settings": "AAEAAEAAAAIAAAABAAMAAABk",
        },
    )
    assert answer.registry_status == soap_client.SUCCESS


def test_http_1_0_gets_a_length(holding: Holding) -> None:
    body = _rad69(holding)
    content_type, data = package(body)
    head = (
        f"POST /services/imaging-source HTTP/1.0\r\nContent-Type: {content_type}\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    raw = soap_client.raw_exchange(_address(holding), head.encode() + data)
    assert soap_client.status_of(raw) == 200
    head, _, rest = raw.partition(b"\r\n\r\n")
    lengths = [line.split(b":")[1] for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")]
    assert [int(each) for each in lengths] == [len(rest)]
    assert b"chunked" not in head.lower()


def test_many_connections_that_say_nothing(holding: Holding) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(socket.create_connection(_address(holding), timeout=5))
        assert requests.get(holding.node.url("/health/live"), timeout=5).ok


# --------------------------------------------------------------------------------------------------------------------
# DICOM
# --------------------------------------------------------------------------------------------------------------------


def _associate_rq(
    called: str = "XCAI", calling: str = "HOSTILE", *, contexts: bytes | None = None, length: int | None = None
) -> bytes:
    """Return an A-ASSOCIATE-RQ (PS3.8 9.3.2) that proposes Verification."""

    def item(kind: int, content: bytes) -> bytes:
        return struct.pack(">BxH", kind, len(content)) + content

    if contexts is None:
        contexts = item(
            0x20,
            struct.pack(">Bxxx", 1) + item(0x30, b"1.2.840.10008.1.1") + item(0x40, b"1.2.840.10008.1.2"),
        )
    user = item(0x50, item(0x51, struct.pack(">L", 16384)) + item(0x52, b"1.2.3.4"))
    variable = item(0x10, b"1.2.840.10008.3.1.1.1") + contexts + user
    fixed = struct.pack(">Hxx16s16s32x", 1, called.ljust(16).encode(), calling.ljust(16).encode())
    content = fixed + variable
    return struct.pack(">BxL", 1, len(content) if length is None else length) + content


def _dicom(holding: Holding) -> tuple[str, int]:
    return "127.0.0.1", holding.node.dicom_port


def _pdu_types(raw: bytes) -> list[int]:
    types, offset = [], 0
    while offset + 6 <= len(raw):
        kind, length = struct.unpack_from(">BxL", raw, offset)
        types.append(kind)
        offset += 6 + length
    return types


RQ, AC, RJ, DATA, RELEASE_RQ, RELEASE_RP, ABORT = range(1, 8)


def test_the_association_of_these_tests_is_good(holding: Holding) -> None:
    raw = soap_client.raw_exchange(_dicom(holding), [_associate_rq(), struct.pack(">BxL4x", RELEASE_RQ, 4)])
    assert _pdu_types(raw) == [AC, RELEASE_RP]


def test_an_unknown_called_ae_is_rejected(holding: Holding) -> None:
    """PS3.8 9.3.4: rejected-permanent, service-user, called-AE-title-not-recognized."""
    raw = soap_client.raw_exchange(_dicom(holding), _associate_rq(called="SOMEBODY"))
    assert _pdu_types(raw) == [RJ]
    assert raw[7:10] == bytes([1, 1, 7])


def test_ae_titles_padded_with_nul_are_read(holding: Holding) -> None:
    """peers-dicom.md section 1: seen from pynetdicom2 and tiny_pacs."""
    request = _associate_rq().replace(b"XCAI            ", b"XCAI".ljust(16, b"\0"))
    raw = soap_client.raw_exchange(_dicom(holding), [request, struct.pack(">BxL4x", RELEASE_RQ, 4)])
    assert _pdu_types(raw) == [AC, RELEASE_RP]


WILD = {
    "associate of 4 GB": struct.pack(">BxL", RQ, 0xFFFFFFFF) + b"\0" * 1000,
    "associate longer than said": _associate_rq(length=20),
    "associate shorter than said": _associate_rq(length=100_000),
    "unknown type": struct.pack(">BxL", 0xEE, 4) + b"1234",
    "zero type": bytes(64),
    "data before association": struct.pack(">BxLLBB", DATA, 6, 2, 1, 3),
    "release before association": struct.pack(">BxL4x", RELEASE_RQ, 4),
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "item lengths beyond the end": _associate_rq(contexts=struct.pack(">BxH", 0x20, 0xFFFF)),
    "empty context": _associate_rq(contexts=struct.pack(">BxH", 0x20, 0)),
    "even context id": _associate_rq(
        contexts=struct.pack(">BxHBxxx", 0x20, 4 + 4 + 17 + 4 + 17, 2)
        + struct.pack(">BxH", 0x30, 17)
        + b"1.2.840.10008.1.1"
        + struct.pack(">BxH", 0x40, 17)
        + b"1.2.840.10008.1.2"
    ),
    "accept from the requester": struct.pack(">BxL", AC, 68) + bytes(68),
}


@pytest.mark.parametrize("kind", WILD)
def test_wild_pdus(holding: Holding, kind: str) -> None:
    """PS3.8 Table 9-10: A-ABORT, or the connection closed; nothing else, and soon."""
    before, started = holding.node.rss(), time.monotonic()
    raw = soap_client.raw_exchange(_dicom(holding), WILD[kind], deadline=ARTIM * 6)
    assert time.monotonic() - started < ARTIM * 4
    assert set(_pdu_types(raw)) <= {ABORT, RJ}
    assert holding.node.rss() - before < 50 * 2**20


WILD_DATA = {
    "pdu of 4 GB": struct.pack(">BxL", DATA, 0xFFFFFFFF) + b"\0" * 100,
    "pdv longer than the pdu": struct.pack(">BxLLBB", DATA, 6, 0xFFFF, 1, 3),
    "pdv of length 0": struct.pack(">BxLL", DATA, 4, 0),
    "pdv of length 1": struct.pack(">BxLLB", DATA, 5, 1, 1),
    "unknown context": struct.pack(">BxLLBB", DATA, 6, 2, 99, 3),
    "empty command": struct.pack(">BxLLBB", DATA, 6, 2, 1, 3),
    "dataset without command": struct.pack(">BxLLBB", DATA, 6, 2, 1, 2),
    "noise as command": struct.pack(">BxLLBB", DATA, 106, 102, 1, 3) + b"\xff" * 100,
    "second associate": _associate_rq(),
    "unknown type": struct.pack(">BxL", 0x42, 0),
}


@pytest.mark.parametrize("kind", WILD_DATA)
def test_wild_pdus_in_an_association(holding: Holding, kind: str) -> None:
    before, started = holding.node.rss(), time.monotonic()
    raw = soap_client.raw_exchange(_dicom(holding), [_associate_rq(), WILD_DATA[kind]], deadline=STALL * 5, pause=0.2)
    assert time.monotonic() - started < STALL * 4
    assert _pdu_types(raw) == [AC, ABORT]
    assert holding.node.rss() - before < 50 * 2**20


def test_endless_command_fragments(holding: Holding) -> None:
    """A command set that never ends is not collected for ever."""
    fragment = struct.pack(">BxLLBB", DATA, 16006, 16002, 1, 1) + b"\0" * 16000
    before = holding.node.rss()
    raw = soap_client.raw_exchange(_dicom(holding), [_associate_rq(), *[fragment] * 2000], deadline=20)
    assert ABORT in _pdu_types(raw) or raw
    assert holding.node.rss() - before < 50 * 2**20


def test_silence_before_the_association_is_ended_by_artim(holding: Holding) -> None:
    started = time.monotonic()
    assert _pdu_types(soap_client.raw_exchange(_dicom(holding), b"", deadline=ARTIM * 6)) in ([], [ABORT])
    assert time.monotonic() - started < ARTIM * 4


def test_silence_in_an_association_is_ended(holding: Holding) -> None:
    """limits.stall_timeout on the DICOM side."""
    started = time.monotonic()
    raw = soap_client.raw_exchange(_dicom(holding), _associate_rq(), deadline=STALL * 6)
    assert _pdu_types(raw)[:1] == [AC]
    assert time.monotonic() - started < STALL * 4


# --------------------------------------------------------------------------------------------------------------------
# Peers that die or dawdle, room that ends
# --------------------------------------------------------------------------------------------------------------------


class Transfer:
    """A node whose PACS stores through a governed relay."""

    def __init__(self, pacs: Any, node: Node, relay: peers.Proxy, study: images.Study) -> None:
        self.pacs, self.node, self.relay, self.study = pacs, node, relay, study


@contextlib.contextmanager
def _transfer(
    folder: Path, *, count: int = 24, config: dict[str, Any] | None = None, **relay: Any
) -> Iterator[Transfer]:
    study = images.big_ct(folder / "study", count, series_count=2)
    node = Node(folder / "node", {"limits": {"stall_timeout": f"{STALL}s"}, **(config or {})})
    with (
        peers.Proxy(node.dicom_port, **relay) as proxy,
        peers.Orthanc(folder / "pacs", [peers.Entity("XCAI", proxy.port)]) as pacs,
    ):
        pacs.upload(study.paths)
        node.config["pacs"] = [pacs_section(pacs)]
        with node:
            yield Transfer(pacs, node, proxy, study)


@pytest.mark.peer
@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "frozen", "cut"])
def test_the_pacs_goes_in_mid_transfer(tmp_path: Path, how: str) -> None:
    """Each missing instance is named, within the no-progress time-out; never a short answer that says Success."""
    with _transfer(tmp_path, hold_after=6_000_000) as scene:
        asked = _later(lambda: rad69(scene.node, scene.study.instances))
        assert scene.relay.held.wait(30), "the transfer did not begin"
        started = time.monotonic()
        if how == "killed":
            scene.pacs.kill()
        elif how == "cut":
            scene.pacs.kill()
            scene.relay.cut()
        answer = asked.result(STALL * 8 + 20)
        took = time.monotonic() - started
        held, missing = set(answer.documents), {each.location for each in answer.errors}
        assert held | missing == scene.study.uids
        assert not held & missing
        assert missing
        assert len(answer.errors) == len(missing)
        assert answer.registry_status == (soap_client.PARTIAL if held else soap_client.FAILURE)
        originals = {each.uid: each.path.stat().st_size for each in scene.study.instances}
        for uid in held:
            assert abs(len(answer.documents[uid].content) - originals[uid]) < 2000, "a short instance"
        assert took < STALL * 6 + 10, f"{took:.0f} s"
        if how == "frozen":
            scene.relay.release()
            scene.relay.cut()
            deadline = time.monotonic() + 60
            while (again := rad69(scene.node, scene.study.instances)).registry_status != soap_client.SUCCESS:
                # It is left alone for a while after it did not answer, and that is told.
                assert {error.code for error in again.errors} == {"XDSRepositoryBusy"}
                assert time.monotonic() < deadline
                time.sleep(0.5)


@pytest.mark.peer
@pytest.mark.slow
def test_retrieve_tells_the_truth_when_the_pacs_dies(tmp_path: Path) -> None:
    with _transfer(tmp_path, hold_after=6_000_000) as scene:
        scene.node.publish(scene.study)
        asked = _later(lambda: scene.node.retrieve(tmp_path / "out", "--study", scene.study.uid))
        assert scene.relay.held.wait(30), "the transfer did not begin"
        scene.pacs.kill()
        receipt = asked.result(90)
        receipt.check(scene.study.instances, complete=False)


@pytest.mark.peer
@pytest.mark.slow
def test_a_pacs_that_is_not_there(tmp_path: Path) -> None:
    study = images.ct(tmp_path / "study", 2)
    nobody = peers.Entity("NOBODY", peers.free_port())
    with Node(tmp_path / "node", {"pacs": [pacs_section(nobody)]}) as node:
        answer = rad69(node, study.instances)
        assert answer.registry_status == soap_client.FAILURE
        assert {error.location for error in answer.errors} == study.uids
        assert {error.code for error in answer.errors} <= {"XDSRepositoryError", "XDSRepositoryBusy"}
        over_gateway = rad75(node, study.instances)
        assert over_gateway.registry_status == soap_client.FAILURE
        assert {error.location for error in over_gateway.errors} == {HOME}
        done = node.run("publish", "--study", study.uid)
        assert done.returncode != 0
        assert "Traceback" not in done.stderr
        assert node.run("echo").returncode != 0


@pytest.mark.peer
@pytest.mark.slow
def test_a_client_that_goes_away_cancels_its_transfer(tmp_path: Path) -> None:
    """25 MB at 2 MB a second: twelve seconds, unless somebody stops it."""
    with _transfer(tmp_path, count=48, rate=2_000_000) as scene:
        body = soap_client.retrieve_images(scene.study.instances, repository=RETRIEVE_LOCATION)
        content_type, data = package(
            envelope(body, headers_block(soap_client.RAD69.action, "urn:x", message_id=soap_client.new_message_id()))
        )
        with socket.create_connection(("127.0.0.1", scene.node.http_port)) as connection:
            connection.sendall(
                soap_client.http_request("/services/imaging-source", {"Content-Type": content_type}, data)
            )
            peers.wait_until(lambda: scene.relay.relayed > 1_500_000, 30, "the transfer began")
        peers.wait_until(lambda: scene.relay.open == 0, 6, "the PACS was told to stop")
        relayed = scene.relay.relayed
        assert relayed < 20_000_000, relayed
        time.sleep(1.0)
        assert scene.relay.relayed - relayed < 1_000_000, "it goes on all the same"
        scene.relay.rate = 0
        answer = rad69(scene.node, scene.study.instances)
        assert answer.registry_status == soap_client.SUCCESS


@pytest.mark.peer
@pytest.mark.slow
def test_a_client_that_goes_away_does_not_harm_another_that_waits_for_the_same(tmp_path: Path) -> None:
    """The last waiter's cancel cancels."""
    with _transfer(tmp_path, count=16, rate=3_000_000) as scene:
        asked = _later(lambda: rad69(scene.node, scene.study.instances))
        body = soap_client.retrieve_images(scene.study.instances, repository=RETRIEVE_LOCATION)
        content_type, data = package(
            envelope(body, headers_block(soap_client.RAD69.action, "urn:x", message_id=soap_client.new_message_id()))
        )
        with socket.create_connection(("127.0.0.1", scene.node.http_port)) as connection:
            connection.sendall(
                soap_client.http_request("/services/imaging-source", {"Content-Type": content_type}, data)
            )
            peers.wait_until(lambda: scene.relay.relayed > 1_000_000, 30, "the transfer began")
        answer = asked.result(60)
        assert answer.registry_status == soap_client.SUCCESS, answer.errors


@pytest.mark.peer
@pytest.mark.slow
def test_a_spool_without_room_refuses_early(tmp_path: Path) -> None:
    """12 MB do not fit into 3 MB: a RegistryError for each, nothing half-written stays, and what fits is served."""
    with _transfer(tmp_path, config={"spool": {"max_bytes": "3MB", "retention": "1s"}}) as scene:
        before = files_below(scene.node.data)
        started = time.monotonic()
        answer = rad69(scene.node, scene.study.instances)
        took = time.monotonic() - started
        assert answer.registry_status in (soap_client.FAILURE, soap_client.PARTIAL)
        held, missing = set(answer.documents), {each.location for each in answer.errors}
        assert held | missing == scene.study.uids
        assert not held & missing
        assert {e.code for e in answer.errors} <= {"XDSRepositoryOutOfResources", "XDSRepositoryBusy"}
        assert took < 15, f"refused after {took:.0f} s"

        def clean() -> bool:
            now = files_below(scene.node.data)
            grown = sum(size for name, size in now.items() if name not in before and size > 50_000)
            return grown <= 3_000_000

        peers.wait_until(clean, 10, "nothing half-written stays")
        time.sleep(1.5)  # retention: what was held makes room
        small = rad69(scene.node, scene.study.instances[:2])
        assert small.registry_status == soap_client.SUCCESS, small.errors


def test_the_good_answer_is_good_in_every_byte(holding: Holding) -> None:
    """The good answer of this module's node is good in every byte, not only in its status."""
    study = holding.studies["ct"]
    originals = {each.uid: each.path.read_bytes() for each in study.instances}
    check_images(rad69(holding.node, study.instances), study.instances, originals, home="")
