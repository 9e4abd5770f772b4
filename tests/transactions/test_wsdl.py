"""WSDL and XSD that the node serves: they say what the table says, and an independent client can use them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import zeep
from lxml import etree

from tests.metadata.samples import ENTRY_UUID, PATIENT
from tests.support.shared import shared_path
from tests.transactions import schemas
from xca_imaging import uids
from xca_imaging.metadata.stored_query import FindDocuments, GetDocuments, StoredQuery
from xca_imaging.transactions import iti18, iti38, iti43, rad69, table
from xca_imaging.transactions.document_set import DocumentRequest, RetrieveRequest
from xca_imaging.wire import soap

FILES = {
    "registry": (
        table.ITI18,
        table.ITI42,
        table.ITI44_ADD,
        table.ITI44_REVISE,
        table.ITI44_MERGE,
        table.ITI51,
        table.ITI57,
        table.ITI61,
        table.ITI62,
    ),
    "repository": (table.ITI41, table.ITI43, table.ITI86),
    "imaging-source": (table.RAD69,),
    "responding-gateway": (table.ITI38, table.ITI39),
    "responding-imaging-gateway": (table.RAD75,),
}
"""One file per endpoint: what stands after /services/ in its path."""

NS = {
    "wsdl": "http://schemas.xmlsoap.org/wsdl/",
    "soap12": "http://schemas.xmlsoap.org/wsdl/soap12/",
    "wsam": "http://www.w3.org/2007/05/addressing/metadata",
    "wsaw": "http://www.w3.org/2006/05/addressing/wsdl",
}


def _definitions(name: str) -> etree._Element:
    return etree.parse(schemas.WSDL / f"{name}.wsdl").getroot()


def test_nothing_else_is_served():
    assert {path.stem for path in schemas.WSDL.glob("*.wsdl")} == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_actions_and_messages_are_those_of_the_table(name):
    root = _definitions(name)
    elements = {}
    for message in root.findall("wsdl:message", NS):
        prefix, local = message.find("wsdl:part", NS).get("element").split(":")
        elements[message.get("name")] = f"{{{message.nsmap[prefix]}}}{local}"
    found = []
    for operation in root.findall("wsdl:portType/wsdl:operation", NS):
        sides = [operation.find("wsdl:input", NS), operation.find("wsdl:output", NS)]
        actions = [side.get(f"{{{NS['wsam']}}}Action") for side in sides]
        assert actions == [side.get(f"{{{NS['wsaw']}}}Action") for side in sides]
        found.append((*actions, *(elements[side.get("message").split(":")[1]] for side in sides)))
    assert found == [
        (item.request_action, item.response_action, item.request_root, item.response_root) for item in FILES[name]
    ]


@pytest.mark.parametrize("name", FILES)
def test_binding_and_address(name):
    root = _definitions(name)
    operations = root.findall("wsdl:binding/wsdl:operation/soap12:operation", NS)
    assert {operation.get("soapActionRequired") for operation in operations} == {"false"}
    (address,) = root.findall("wsdl:service/wsdl:port/soap12:address", NS)
    assert address.get("location") == "REPLACE_WITH_ACTUAL_URL"


def test_every_schema_location_is_a_file_beside():
    """The server turns them into ?xsd=NAME by text, so they have to be plain file names."""
    for path in schemas.WSDL.iterdir():
        for location in re.findall(r'schemaLocation="([^"]*)"', path.read_text("utf-8")):
            assert re.fullmatch(r"[a-z0-9-]+\.xsd", location)
            assert (schemas.WSDL / location).is_file()


def test_samples_of_others_are_valid_in_ours_too():
    """Anything in the conformance data that the published schema accepts."""
    seen = 0
    published = schemas.published()
    for path in sorted(shared_path("conformance/data").rglob("*.xml")):
        body = etree.parse(path).getroot()
        assert published is not None
        assert published.validate(body), path
        schemas.ours().assertValid(body)
        seen += 1
    assert seen > 100


@pytest.mark.parametrize(
    "break_it",
    [
        lambda text: text.replace("TransferSyntaxUIDList", "SyntaxList"),
        lambda text: text.replace("xdsb:DocumentRequest", "iherad:DocumentRequest"),
        lambda text: text.replace("studyInstanceUID", "StudyInstanceUID"),
        lambda text: re.sub("<xdsb:DocumentUniqueId>.*?</xdsb:DocumentUniqueId>", "", text),
    ],
)
def test_what_the_published_schema_refuses_ours_refuses(break_it):
    text = (
        f'<iherad:RetrieveImagingDocumentSetRequest xmlns:iherad="{uids.NS_XDSI}" xmlns:xdsb="{uids.NS_XDSB}">'
        '<iherad:StudyRequest studyInstanceUID="1.2"><iherad:SeriesRequest seriesInstanceUID="1.3">'
        "<xdsb:DocumentRequest><xdsb:RepositoryUniqueId>1.4</xdsb:RepositoryUniqueId><xdsb:DocumentUniqueId>1.5</xdsb:DocumentUniqueId>"
        "</xdsb:DocumentRequest></iherad:SeriesRequest></iherad:StudyRequest><iherad:TransferSyntaxUIDList>"
        "<iherad:TransferSyntaxUID>1.2.840.10008.1.2</iherad:TransferSyntaxUID></iherad:TransferSyntaxUIDList>"
        "</iherad:RetrieveImagingDocumentSetRequest>"
    )
    schemas.assert_valid(etree.fromstring(text))
    broken = etree.fromstring(break_it(text))
    assert not schemas.ours().validate(broken)
    published = schemas.published()
    assert published is None or not published.validate(broken)


# --- zeep, a client that knows nothing but the WSDL -------------------------------------------------------------------


@pytest.fixture(scope="module")
def client_of():
    clients: dict[str, zeep.Client] = {}

    def load(name: str) -> zeep.Client:
        if name not in clients:
            clients[name] = zeep.Client(str(Path(schemas.WSDL / f"{name}.wsdl")))
        return clients[name]

    return load


def _body(client: zeep.Client, operation: str, *positional, **arguments) -> etree._Element:
    message = client.create_message(client.service, operation, *positional, **arguments)
    body = soap.read_envelope(etree.fromstring(etree.tostring(message))).body
    assert body is not None
    schemas.assert_valid(body)
    return body


@pytest.mark.parametrize("name", FILES)
def test_zeep_loads_it(name, client_of):
    (service,) = client_of(name).wsdl.services.values()
    (port,) = service.ports.values()
    assert len(port.binding.all()) == len(FILES[name])


@pytest.mark.parametrize(
    ("name", "operation", "module"),
    [
        ("registry", "DocumentRegistry_RegistryStoredQuery", iti18),
        ("responding-gateway", "RespondingGateway_CrossGatewayQuery", iti38),
    ],
)
def test_a_query_of_zeep_is_read(name, operation, module, client_of):
    slots = [
        {"name": "$XDSDocumentEntryPatientId", "ValueList": {"Value": [f"'{PATIENT}'"]}},
        {"name": "$XDSDocumentEntryStatus", "ValueList": {"Value": [f"('{uids.APPROVED}')"]}},
    ]
    body = _body(
        client_of(name),
        operation,
        ResponseOption={"returnType": "LeafClass", "returnComposedObjects": True},
        AdhocQuery={"id": "urn:uuid:14d4debf-8f97-4251-9a74-a90016b0af0d", "home": "urn:oid:1.2.3", "Slot": slots},
    )
    query = FindDocuments(patient_id=PATIENT, status=(uids.APPROVED,))
    assert module.decode_request(body) == StoredQuery(query, "LeafClass", "urn:oid:1.2.3")


def test_a_query_by_id_of_zeep_is_read(client_of):
    slot = {"name": "$XDSDocumentEntryEntryUUID", "ValueList": {"Value": [f"('{ENTRY_UUID}')"]}}
    body = _body(
        client_of("registry"),
        "DocumentRegistry_RegistryStoredQuery",
        ResponseOption={"returnType": "ObjectRef"},
        AdhocQuery={"id": "urn:uuid:5c4f972b-d56b-40ac-a5fc-c8ca9b40b9d4", "Slot": [slot]},
    )
    assert iti18.decode_request(body) == StoredQuery(GetDocuments(entry_uuids=(ENTRY_UUID,)), "ObjectRef")


def test_a_retrieval_of_zeep_is_read(client_of):
    document = {"RepositoryUniqueId": "1.3", "DocumentUniqueId": "1.4"}
    body = _body(client_of("repository"), "DocumentRepository_RetrieveDocumentSet", DocumentRequest=[document])
    assert iti43.decode_request(body) == RetrieveRequest((DocumentRequest(None, "1.3", "1.4"),))


def test_an_imaging_retrieval_of_zeep_is_read(client_of):
    document = {"HomeCommunityId": "urn:oid:1.2", "RepositoryUniqueId": "1.3", "DocumentUniqueId": "1.4"}
    series = {"seriesInstanceUID": "1.5.1", "DocumentRequest": [document]}
    body = _body(
        client_of("imaging-source"),
        "ImagingDocumentSource_RetrieveImagingDocumentSet",
        StudyRequest=[{"studyInstanceUID": "1.5", "SeriesRequest": [series]}],
        TransferSyntaxUIDList={"TransferSyntaxUID": [uids.EXPLICIT_VR_LITTLE_ENDIAN]},
    )
    request = rad69.decode_request(body)
    assert list(request) == [("1.5", "1.5.1", DocumentRequest("urn:oid:1.2", "1.3", "1.4"))]
    assert request.transfer_syntax_uids == (uids.EXPLICIT_VR_LITTLE_ENDIAN,)


def test_zeep_reads_an_answer_of_ours(client_of):
    """What zeep makes of a LeafClass answer: objects with their slots."""
    from tests.metadata.samples import WITH_FOLDER
    from xca_imaging.transactions.adhoc_query import QueryResponse

    element = iti18.encode_response(QueryResponse(uids.STATUS_SUCCESS, (), WITH_FOLDER))
    client = client_of("registry")
    declared = client.get_element(f"{{{uids.NS_QUERY}}}AdhocQueryResponse")
    parsed = declared.parse(etree.fromstring(etree.tostring(element)), client.wsdl.types)
    assert parsed.status == uids.STATUS_SUCCESS
    kinds = [key for item in parsed.RegistryObjectList["_value_1"] for key in item]
    assert kinds == ["RegistryPackage", "ExtrinsicObject", "RegistryPackage", *["Association"] * 4]
    entry = parsed.RegistryObjectList["_value_1"][1]["ExtrinsicObject"]
    assert entry.id == ENTRY_UUID
    assert {slot.name for slot in entry.Slot} >= {"creationTime", "hash", "size"}
