"""ITI-62 and ITI-86: what is removed, by id; ITI-57 and ITI-61 as zeep sends them."""

from __future__ import annotations

from pathlib import Path

import pytest
import zeep
from lxml import etree

from tests.metadata import samples
from tests.support.shared import shared_path
from tests.transactions import schemas
from xca_imaging import uids
from xca_imaging.errors import MalformedMessage, MessageTooLarge, RegistryMetadataError
from xca_imaging.transactions import iti57, iti61, iti62, iti86
from xca_imaging.transactions.document_set import DocumentRequest, RetrieveRequest
from xca_imaging.transactions.registry_response import response_to
from xca_imaging.wire import xml

REMOVED = iti62.RemoveRequest((samples.ENTRY_UUID, "urn:uuid:08a15a6f-5b4a-42de-8f95-89474f83abdf"))
DOCUMENTS = RetrieveRequest((DocumentRequest(None, "1.3", "1.4"), DocumentRequest("urn:oid:1.2", "1.3", "1.5")))


@pytest.mark.parametrize(("module", "request_"), [(iti62, REMOVED), (iti86, DOCUMENTS)], ids=["iti62", "iti86"])
def test_a_request_is_valid_and_read_again(module, request_):
    element = module.encode_request(request_)
    schemas.assert_valid(element)
    assert module.decode_request(xml.parse(xml.serialize(element))) == request_


@pytest.mark.parametrize("module", [iti57, iti61], ids=["iti57", "iti61"])
def test_a_submission_is_valid_and_read_again(module):
    element = module.encode_request(samples.WITH_FOLDER)
    schemas.assert_valid(element)
    assert module.decode_request(xml.parse(xml.serialize(element))) == samples.WITH_FOLDER


@pytest.mark.parametrize("module", [iti57, iti61, iti62, iti86], ids=lambda module: module.TRANSACTION.name)
def test_answers(module):
    element = module.encode_response(response_to())
    schemas.assert_valid(element)
    assert module.decode_response(element).succeeded


def _request(inside: str, scope: str = "") -> etree._Element:
    return etree.fromstring(
        f'<RemoveObjectsRequest xmlns="{uids.NS_LCM}" xmlns:rim="{uids.NS_RIM}" {scope}>{inside}</RemoveObjectsRequest>'
    )


LISTED = '<rim:ObjectRefList><rim:ObjectRef id="urn:uuid:1"/></rim:ObjectRefList>'


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (_request(""), MalformedMessage),
        (_request("<rim:ObjectRefList/>"), MalformedMessage),
        (_request('<rim:AdhocQuery id="urn:uuid:2"/>' + LISTED), RegistryMetadataError),
        (
            _request(
                LISTED,
                'deletionScope="urn:oasis:names:tc:ebxml-regrep:DeletionScopeType:DeleteRepositoryItemOnly"',
            ),
            RegistryMetadataError,
        ),
    ],
    ids=["empty", "no reference", "by query", "scope"],
)
def test_what_is_no_removal(body, error):
    with pytest.raises(error):
        iti62.decode_request(body)


def test_an_object_that_is_named_twice_is_removed_once():
    twice = iti62.encode_request(iti62.RemoveRequest(("urn:uuid:1", "urn:uuid:1")))
    assert iti62.decode_request(twice).entry_uuids == ("urn:uuid:1",)


def test_a_removal_has_a_limit():
    with pytest.raises(MessageTooLarge):
        iti62.decode_request(iti62.encode_request(REMOVED), max_objects=1)


def test_no_document_to_remove():
    with pytest.raises(MalformedMessage):
        iti86.decode_request(etree.fromstring(f'<RemoveDocumentsRequest xmlns="{uids.NS_RMD}"/>'))


# --- zeep, by the published WSDLs ------------------------------------------------------------------------------------


def _sent(wsdl: str, operation: str, **arguments) -> etree._Element:
    client = zeep.Client(str(Path(shared_path(f"schemas/ipf-xds/{wsdl}.wsdl"))))
    message = client.create_message(client.service, operation, **arguments)
    (body,) = etree.fromstring(etree.tostring(message)).find("{*}Body")
    schemas.assert_valid(body)
    return body


def test_a_removal_of_metadata_by_zeep():
    references = [{"id": entry_uuid} for entry_uuid in REMOVED.entry_uuids]
    body = _sent(
        "iti62",
        "DocumentRegistry_DeleteDocumentSet",
        ObjectRefList={"_value_1": [{"ObjectRef": each} for each in references]},
    )
    assert iti62.decode_request(body) == REMOVED


def test_a_removal_of_documents_by_zeep():
    document = {"RepositoryUniqueId": "1.3", "DocumentUniqueId": "1.4"}
    body = _sent("iti86", "DocumentRepository_RemoveDocuments", DocumentRequest=[document])
    assert iti86.decode_request(body) == RetrieveRequest((DocumentRequest(None, "1.3", "1.4"),))
