"""xdsb:RetrieveDocumentSetRequest and -Response: documents by identifier.

ITI-43 and ITI-39 use both, RAD-69 and RAD-75 the response. Content never passes through here: it is a `Reference` to
a part of the MTOM message, or bytes when a peer sends it inline.

References
----------
* IHE ITI TF-2, 3.43.4.1.2 (request), 3.43.5 (response), 3.39.4.1.2 (HomeCommunityId); Appendix V.8.2 (MTOM)
"""

from __future__ import annotations

import base64
from dataclasses import dataclass

from lxml import etree

from xca_imaging import uids
from xca_imaging.errors import MalformedMessage
from xca_imaging.transactions import registry_response
from xca_imaging.transactions.registry_response import RegistryResponse
from xca_imaging.wire import xml
from xca_imaging.wire.mtom import Reference, inline_content, xop_include

RETRIEVE_REQUEST = xml.qname(uids.NS_XDSB, "RetrieveDocumentSetRequest")
RETRIEVE_RESPONSE = xml.qname(uids.NS_XDSB, "RetrieveDocumentSetResponse")
_DOCUMENT_REQUEST = xml.qname(uids.NS_XDSB, "DocumentRequest")
_DOCUMENT_RESPONSE = xml.qname(uids.NS_XDSB, "DocumentResponse")
_HOME_COMMUNITY_ID = xml.qname(uids.NS_XDSB, "HomeCommunityId")
_REPOSITORY_UNIQUE_ID = xml.qname(uids.NS_XDSB, "RepositoryUniqueId")
_DOCUMENT_UNIQUE_ID = xml.qname(uids.NS_XDSB, "DocumentUniqueId")
_NEW_REPOSITORY_UNIQUE_ID = xml.qname(uids.NS_XDSB, "NewRepositoryUniqueId")
_NEW_DOCUMENT_UNIQUE_ID = xml.qname(uids.NS_XDSB, "NewDocumentUniqueId")
_MIME_TYPE = xml.qname(uids.NS_XDSB, "mimeType")
_DOCUMENT = xml.qname(uids.NS_XDSB, "Document")

Content = Reference | bytes


@dataclass(frozen=True, slots=True)
class DocumentRequest:
    """One document or image asked for. The answer repeats all three; a home that is None was not in the request."""

    home_community_id: str | None
    repository_unique_id: str
    document_unique_id: str


@dataclass(frozen=True, slots=True)
class RetrieveRequest:
    """The documents that an ITI-43 or ITI-39 asks for."""

    documents: tuple[DocumentRequest, ...]


@dataclass(frozen=True, slots=True)
class DocumentResponse:
    """One document or image returned. The `new_` ids are those of an on-demand document's snapshot (3.43.5)."""

    home_community_id: str | None
    repository_unique_id: str
    document_unique_id: str
    mime_type: str
    content: Content
    new_repository_unique_id: str = ""
    new_document_unique_id: str = ""

    def answers(self, request: DocumentRequest) -> bool:
        """Whether it is what was asked for. A peer that leaves out the home, or adds its own, is understood."""
        if (self.repository_unique_id, self.document_unique_id) != (
            request.repository_unique_id,
            request.document_unique_id,
        ):
            return False
        homes = {self.home_community_id, request.home_community_id} - {None, ""}
        return len(homes) < 2


@dataclass(frozen=True, slots=True)
class RetrieveResponse:
    """The answer to a retrieval: its outcome and the documents, in any order."""

    registry: RegistryResponse
    documents: tuple[DocumentResponse, ...] = ()


def decode_retrieve_request(body: etree._Element) -> RetrieveRequest:
    """Return the documents asked for.

    Raises
    ------
    MalformedMessage
        When none is, or one without its identifiers.
    """
    documents = tuple(decode_document_request(child) for child in body.iterchildren(_DOCUMENT_REQUEST))
    if not documents:
        raise MalformedMessage("RetrieveDocumentSetRequest holds no DocumentRequest")
    return RetrieveRequest(documents)


def encode_retrieve_request(request: RetrieveRequest) -> etree._Element:
    """Return the xdsb:RetrieveDocumentSetRequest."""
    element = etree.Element(RETRIEVE_REQUEST, nsmap={"xdsb": uids.NS_XDSB})
    for document in request.documents:
        add_document_request(element, document)
    return element


def decode_document_request(element: etree._Element) -> DocumentRequest:
    """Return one DocumentRequest; its children are matched by local name (see `imaging_document_set`)."""
    children = {xml.local_name(child): xml.text_of(child) for child in element.iterchildren("*")}
    for name in ("RepositoryUniqueId", "DocumentUniqueId"):
        if name not in children:
            raise MalformedMessage(f"DocumentRequest holds no {name}")
    return DocumentRequest(
        children.get("HomeCommunityId"), children["RepositoryUniqueId"], children["DocumentUniqueId"]
    )


def add_document_request(parent: etree._Element, request: DocumentRequest) -> None:
    """Add one xdsb:DocumentRequest."""
    element = etree.SubElement(parent, _DOCUMENT_REQUEST)
    _add_ids(element, request)


def decode_retrieve_response(body: etree._Element) -> RetrieveResponse:
    """Return outcome and documents of an answer.

    Raises
    ------
    MalformedMessage
        Without RegistryResponse, or with a DocumentResponse that lacks its identifiers or its Document.
    """
    registry = body.find(registry_response.RESPONSE)
    if registry is None:
        raise MalformedMessage("RetrieveDocumentSetResponse holds no RegistryResponse")
    documents = tuple(_decode_document_response(child) for child in body.iterchildren(_DOCUMENT_RESPONSE))
    return RetrieveResponse(registry_response.decode_registry_response(registry), documents)


def _decode_document_response(element: etree._Element) -> DocumentResponse:
    document = element.find(_DOCUMENT)
    if document is None:
        raise MalformedMessage("DocumentResponse holds no Document")
    request = decode_document_request(element)
    return DocumentResponse(
        request.home_community_id,
        request.repository_unique_id,
        request.document_unique_id,
        xml.text_of(element.find(_MIME_TYPE)),
        inline_content(document),
        xml.text_of(element.find(_NEW_REPOSITORY_UNIQUE_ID)),
        xml.text_of(element.find(_NEW_DOCUMENT_UNIQUE_ID)),
    )


def encode_retrieve_response(response: RetrieveResponse) -> etree._Element:
    """Return the xdsb:RetrieveDocumentSetResponse, its children in the order of the schema."""
    element = etree.Element(RETRIEVE_RESPONSE, nsmap={"xdsb": uids.NS_XDSB, "rs": uids.NS_RS})
    element.append(registry_response.encode_registry_response(response.registry))
    for document in response.documents:
        child = etree.SubElement(element, _DOCUMENT_RESPONSE)
        _add_ids(child, document)
        if document.new_repository_unique_id:
            etree.SubElement(child, _NEW_REPOSITORY_UNIQUE_ID).text = document.new_repository_unique_id
        if document.new_document_unique_id:
            etree.SubElement(child, _NEW_DOCUMENT_UNIQUE_ID).text = document.new_document_unique_id
        etree.SubElement(child, _MIME_TYPE).text = document.mime_type
        add_content(child, document.content)
    return element


def _add_ids(element: etree._Element, item: DocumentRequest | DocumentResponse) -> None:
    if item.home_community_id is not None:
        etree.SubElement(element, _HOME_COMMUNITY_ID).text = item.home_community_id
    etree.SubElement(element, _REPOSITORY_UNIQUE_ID).text = item.repository_unique_id
    etree.SubElement(element, _DOCUMENT_UNIQUE_ID).text = item.document_unique_id


def add_content(parent: etree._Element, content: Content) -> etree._Element:
    """Add one xdsb:Document: an xop:Include for a part of the message, base64 for bytes."""
    element = etree.SubElement(parent, _DOCUMENT)
    if isinstance(content, Reference):
        element.append(xop_include(content.content_id))
    else:
        element.text = base64.b64encode(content).decode("ascii")
    return element
