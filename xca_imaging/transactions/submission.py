"""lcm:SubmitObjectsRequest alone (ITI-42) and with documents (ITI-41, RAD-68).

References
----------
* IHE ITI TF-2, 3.42.4.1.2 (Register Document Set-b), 3.41.4.1.2 (Provide and Register Document Set-b)
* OASIS ebRS 3.0, 5.3.1 (SubmitObjectsRequest)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lxml import etree

from xca_imaging import uids
from xca_imaging.errors import (
    MalformedMessage,
    MessageTooLarge,
    MissingDocument,
    MissingDocumentMetadata,
    RegistryError,
    RegistryMetadataError,
    RepositoryMetadataError,
    SubmissionRefused,
)
from xca_imaging.metadata import ebrim
from xca_imaging.metadata.model import Submission
from xca_imaging.transactions.document_set import Content, add_content
from xca_imaging.wire import xml
from xca_imaging.wire.mtom import inline_content

SUBMIT_REQUEST = xml.qname(uids.NS_LCM, "SubmitObjectsRequest")
PROVIDE_REQUEST = xml.qname(uids.NS_XDSB, "ProvideAndRegisterDocumentSetRequest")
_REGISTRY_OBJECT_LIST = xml.qname(uids.NS_RIM, "RegistryObjectList")
_DOCUMENT = xml.qname(uids.NS_XDSB, "Document")


@dataclass(frozen=True, slots=True)
class ProvideRequest:
    """A submission with its documents, each under the id of its DocumentEntry."""

    submission: Submission
    documents: Mapping[str, Content]

    def unmatched(self) -> list[RegistryError]:
        """Return an error for each entry without document and each document without entry (3.41.4.1.3).

        On-demand entries have no document yet.
        """
        stable = [item for item in self.submission.documents if item.object_type != uids.ON_DEMAND_DOCUMENT]
        entries = {item.entry_uuid for item in self.submission.documents}
        return [
            *(
                MissingDocument(f"DocumentEntry {item.entry_uuid} ({item.unique_id}) comes without its document")
                for item in stable
                if item.entry_uuid not in self.documents
            ),
            *(
                MissingDocumentMetadata(f"document {document_id} comes without DocumentEntry")
                for document_id in self.documents
                if document_id not in entries
            ),
        ]


def decode_submit_request(
    body: etree._Element, *, error: type[RegistryError] = RegistryMetadataError, max_objects: int = 10_000
) -> Submission:
    """Return the submission of a SubmitObjectsRequest.

    Parameters
    ----------
    error : type of RegistryError
        Class of the errors in `SubmissionRefused`.
    max_objects : int
        Objects of one submission. Real ones have tens; a message of small ones would keep the node busy for seconds.

    Raises
    ------
    MalformedMessage
        When there is no RegistryObjectList.
    MessageTooLarge
        When it holds too many objects.
    SubmissionRefused
        When the metadata hold what the model has no room for.
    """
    registry_object_list = body.find(_REGISTRY_OBJECT_LIST)
    if registry_object_list is None:
        raise MalformedMessage("SubmitObjectsRequest holds no RegistryObjectList")
    if len(registry_object_list) > max_objects:
        raise MessageTooLarge(f"a submission of more than {max_objects} objects")
    return ebrim.decode_registry_objects(registry_object_list, error=error)


def encode_submit_request(submission: Submission) -> etree._Element:
    """Return the lcm:SubmitObjectsRequest."""
    element = etree.Element(SUBMIT_REQUEST, nsmap={"lcm": uids.NS_LCM, "rim": uids.NS_RIM})
    element.append(ebrim.encode_registry_objects(submission))
    return element


def decode_provide_request(body: etree._Element) -> ProvideRequest:
    """Return submission and documents. Whether they fit each other is `ProvideRequest.unmatched`.

    Raises
    ------
    MalformedMessage
        When there is no SubmitObjectsRequest.
    SubmissionRefused
        When the metadata hold what the model has no room for, or two documents have the same id.
    """
    submit = body.find(SUBMIT_REQUEST)
    if submit is None:
        raise MalformedMessage("ProvideAndRegisterDocumentSetRequest holds no SubmitObjectsRequest")
    submission = decode_submit_request(submit, error=RepositoryMetadataError)
    documents: dict[str, Content] = {}
    problems: list[RegistryError] = []
    for element in body.iterchildren(_DOCUMENT):
        document_id = element.get("id", "").strip()
        if document_id in documents:
            problems.append(RepositoryMetadataError(f"two documents have the id {document_id}"))
        documents[document_id] = inline_content(element)
    if problems:
        raise SubmissionRefused(problems)
    return ProvideRequest(submission, documents)


def encode_provide_request(request: ProvideRequest) -> etree._Element:
    """Return the xdsb:ProvideAndRegisterDocumentSetRequest."""
    element = etree.Element(PROVIDE_REQUEST, nsmap={"xdsb": uids.NS_XDSB, "lcm": uids.NS_LCM, "rim": uids.NS_RIM})
    element.append(encode_submit_request(request.submission))
    for document_id, content in request.documents.items():
        add_content(element, content).set("id", document_id)
    return element
