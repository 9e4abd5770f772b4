"""zeep, a SOAP stack of other hands, with nothing but the node's WSDL."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import requests
import zeep
from zeep.wsa import WsAddressingPlugin

from tests.support import images, peers, soap_client
from tests.support.node import HOME, Node, pacs_section

pytestmark = [
    pytest.mark.timeout(120),
    # zeep's own, not ours
    pytest.mark.filterwarnings("ignore::DeprecationWarning:zeep.*"),
    pytest.mark.filterwarnings("ignore:.*defusedxml.*"),
]

ENDPOINTS = {
    "/services/registry": {
        soap_client.ITI18.action,
        soap_client.ITI42.action,
        "urn:ihe:iti:2010:UpdateDocumentSet",
        "urn:ihe:iti:2010:RegisterOnDemandDocumentEntry",
        "urn:ihe:iti:2010:DeleteDocumentSet",
        "urn:hl7-org:v3:PRPA_IN201301UV02",
        "urn:hl7-org:v3:PRPA_IN201302UV02",
        "urn:hl7-org:v3:PRPA_IN201304UV02",
    },
    "/services/repository": {
        soap_client.ITI41.action,
        soap_client.ITI43.action,
        "urn:ihe:iti:2017:RemoveDocuments",
    },
    "/services/imaging-source": {soap_client.RAD69.action},
    "/services/responding-gateway": {soap_client.ITI38.action, soap_client.ITI39.action},
    "/services/responding-imaging-gateway": {soap_client.RAD75.action},
}


class Server:
    def __init__(self, node: Node, study: images.Study) -> None:
        self.node, self.study = node, study

    def client(self, path: str) -> zeep.Client:
        """Return a client that sends addressing headers once: by itself where the WSDL gives wsaw:Action."""
        client = zeep.Client(self.node.url(path) + "?wsdl")
        if not all(operation.abstract.wsa_action for _, operation in _operations(client).values()):
            client.plugins.append(WsAddressingPlugin())
        return client


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A node with one published study (qrscp comes with pynetdicom: no outside program)."""
    folder = tmp_path_factory.mktemp("zeep")
    study = images.ct(folder / "ct", 2)
    node = Node(folder / "node")
    with peers.Qrscp(folder / "pacs", [node.entity]) as pacs:
        pacs.upload(study.paths)
        node.config["pacs"] = [pacs_section(pacs, assigning_authority=images.AUTHORITY)]
        with node:
            node.publish(study)
            yield Server(node, study)


def _operations(client: zeep.Client) -> dict[str, tuple[Any, Any]]:
    """Return (port, operation) by SOAP action."""
    return {
        str(operation.soapaction): (port, operation)
        for service in client.wsdl.services.values()
        for port in service.ports.values()
        for operation in port.binding._operations.values()
    }


def _call(client: zeep.Client, action: str, **arguments: Any) -> Any:
    port, operation = _operations(client)[action]
    (service,) = [each for each in client.wsdl.services.values() if port in each.ports.values()]
    return client.bind(service.name, port.name)[operation.name](**arguments)


def _find_documents(patient: str, home: str = "") -> dict[str, Any]:
    def slot(name: str, value: str) -> dict[str, Any]:
        return {"name": name, "ValueList": {"Value": [value]}}

    query = {
        "id": soap_client.FIND_DOCUMENTS,
        "Slot": [
            slot("$XDSDocumentEntryPatientId", f"'{patient}'"),
            slot("$XDSDocumentEntryStatus", f"('{soap_client.APPROVED}')"),
        ],
    }
    if home:
        query["home"] = home
    return {"ResponseOption": {"returnType": "LeafClass", "returnComposedObjects": True}, "AdhocQuery": query}


@pytest.mark.parametrize("path", ENDPOINTS)
def test_the_wsdl_loads_and_names_the_operations(server: Server, path: str) -> None:
    client = server.client(path)
    operations = _operations(client)
    assert set(operations) >= ENDPOINTS[path]
    for port, _ in operations.values():
        assert port.binding_options["address"] == server.node.url(path)


@pytest.mark.parametrize("path", ["/services/initiating-gateway", "/services/initiating-imaging-gateway"])
def test_the_initiating_endpoints_have_a_wsdl_too(server: Server, path: str) -> None:
    answer = requests.get(server.node.url(path) + "?wsdl", timeout=10)
    if answer.status_code in (404, 501):
        pytest.skip("the initiating gateways are not served in this version")
    assert answer.status_code == 200
    zeep.Client(server.node.url(path) + "?wsdl")


def test_iti18_with_zeep(server: Server) -> None:
    answer = _call(server.client("/services/registry"), soap_client.ITI18.action, **_find_documents(server.study.cx))
    assert answer.status == soap_client.SUCCESS
    listed = zeep.helpers.serialize_object(answer)["RegistryObjectList"]
    assert str(listed).count("application/dicom") == 1


def test_iti38_with_zeep(server: Server) -> None:
    answer = _call(
        server.client("/services/responding-gateway"),
        soap_client.ITI38.action,
        **_find_documents(server.study.cx, HOME),
    )
    assert answer.status == soap_client.SUCCESS
    listed = zeep.helpers.serialize_object(answer)["RegistryObjectList"]
    assert str(listed).count(HOME) >= 1


def test_iti18_of_another_patient_is_an_empty_success(server: Server) -> None:
    other = f"nobody^^^&{images.AUTHORITY}&ISO"
    answer = _call(server.client("/services/registry"), soap_client.ITI18.action, **_find_documents(other))
    assert answer.status == soap_client.SUCCESS


def test_a_fault_reaches_zeep_with_its_reason(server: Server) -> None:
    client = server.client("/services/registry")
    port, operation = _operations(client)[soap_client.ITI18.action]
    (service,) = [each for each in client.wsdl.services.values() if port in each.ports.values()]
    proxy = client.bind(service.name, port.name)
    message = client.create_message(proxy, operation.name, **_find_documents(server.study.cx))
    for action in message.iter(f"{{{soap_client.WSA}}}Action"):
        action.text = "urn:example:nothing"
    headers = {"Content-Type": "application/soap+xml; charset=utf-8"}
    raw = client.transport.post_xml(server.node.url("/services/registry"), message, headers)
    with pytest.raises(zeep.exceptions.Fault) as caught:
        port.binding.process_reply(client, operation, raw)
    assert caught.value.message
