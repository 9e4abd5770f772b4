"""ITI-86 Remove Documents: an administrator removes documents from a repository.

The request has the form of a retrieval (ITI-43) under a name of its own.

References
----------
* IHE ITI Remove Metadata and Documents, 3.86
"""

from __future__ import annotations

from lxml import etree

from xca_imaging import uids
from xca_imaging.errors import MalformedMessage
from xca_imaging.transactions import document_set, registry_response
from xca_imaging.transactions.document_set import RetrieveRequest
from xca_imaging.transactions.registry_response import RegistryResponse
from xca_imaging.transactions.table import ITI86

TRANSACTION = ITI86


def decode_request(body: etree._Element | None) -> RetrieveRequest:
    """Return the documents to remove.

    Raises
    ------
    MalformedMessage
        When none is named, or one without its identifiers.
    """
    request = TRANSACTION.check_request(body)
    # The children's namespace is that of ITI-43 in the published WSDL; it is matched by local name, as everywhere.
    documents = tuple(
        document_set.decode_document_request(child) for child in request.iterchildren("{*}DocumentRequest")
    )
    if not documents:
        raise MalformedMessage("RemoveDocumentsRequest holds no DocumentRequest")
    return RetrieveRequest(documents)


def encode_request(request: RetrieveRequest) -> etree._Element:
    """Return the body of a request."""
    element = etree.Element(TRANSACTION.request_root, nsmap={"rmd": uids.NS_RMD, "xdsb": uids.NS_XDSB})
    for document in request.documents:
        document_set.add_document_request(element, document)
    return element


def decode_response(body: etree._Element | None) -> RegistryResponse:
    """Return the outcome."""
    return registry_response.decode_registry_response(TRANSACTION.check_response(body))


def encode_response(response: RegistryResponse) -> etree._Element:
    """Return the body of an answer."""
    return registry_response.encode_registry_response(response)
