"""iherad:RetrieveImagingDocumentSetRequest: images by study, series and instance. The request of RAD-69 and RAD-75.

Written exactly as the published schema has it: DocumentRequest in the namespace of XDS.b, the list of transfer
syntaxes last. Read by local names and in any order, because a widely used schema has DocumentRequest in the namespace
of XDS-I.b and its users send it so.

References
----------
* IHE RAD TF-2, 4.69.4.1.2 (request); XCA-I 4.75.4.1.2 (the same request between gateways)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lxml import etree

from xca_imaging import uids
from xca_imaging.errors import MalformedMessage
from xca_imaging.transactions.document_set import DocumentRequest, add_document_request, decode_document_request
from xca_imaging.wire import xml

IMAGING_REQUEST = xml.qname(uids.NS_XDSI, "RetrieveImagingDocumentSetRequest")
_STUDY_REQUEST = xml.qname(uids.NS_XDSI, "StudyRequest")
_SERIES_REQUEST = xml.qname(uids.NS_XDSI, "SeriesRequest")
_TRANSFER_SYNTAX_UID_LIST = xml.qname(uids.NS_XDSI, "TransferSyntaxUIDList")
_TRANSFER_SYNTAX_UID = xml.qname(uids.NS_XDSI, "TransferSyntaxUID")


@dataclass(frozen=True, slots=True)
class SeriesRequest:
    """The instances asked for of one series."""

    series_instance_uid: str
    documents: tuple[DocumentRequest, ...]


@dataclass(frozen=True, slots=True)
class StudyRequest:
    """The series asked for of one study."""

    study_instance_uid: str
    series: tuple[SeriesRequest, ...]


@dataclass(frozen=True, slots=True)
class RetrieveImagingRequest:
    """The images that a RAD-69 or RAD-75 asks for, and the transfer syntaxes in which the requester takes them.

    A UID may be empty here: that fails its documents (XDSRepositoryError), not the message. The order of
    `transfer_syntax_uids` is taken as preference.
    """

    studies: tuple[StudyRequest, ...]
    transfer_syntax_uids: tuple[str, ...]

    def __iter__(self) -> Iterator[tuple[str, str, DocumentRequest]]:
        """Every document asked for, as (study instance UID, series instance UID, document)."""
        for study in self.studies:
            for series in study.series:
                for document in series.documents:
                    yield study.study_instance_uid, series.series_instance_uid, document

    def __len__(self) -> int:
        return sum(len(series.documents) for study in self.studies for series in study.series)

    def only(self, wanted: Iterable[DocumentRequest]) -> RetrieveImagingRequest:
        """Return the request for these documents alone: what a gateway sends to one source or community."""
        kept = frozenset(wanted)
        studies = []
        for study in self.studies:
            series = tuple(
                SeriesRequest(item.series_instance_uid, documents)
                for item in study.series
                if (documents := tuple(document for document in item.documents if document in kept))
            )
            if series:
                studies.append(StudyRequest(study.study_instance_uid, series))
        return RetrieveImagingRequest(tuple(studies), self.transfer_syntax_uids)


def decode_imaging_request(body: etree._Element) -> RetrieveImagingRequest:
    """Return the images asked for.

    Raises
    ------
    MalformedMessage
        Without any DocumentRequest (there is no way to ask for a whole series), without TransferSyntaxUIDList, or
        with a study or series that has no UID attribute.
    """
    studies = tuple(_decode_study(child) for child in _named(body, "StudyRequest"))
    lists = _named(body, "TransferSyntaxUIDList")
    if len(lists) != 1:
        raise MalformedMessage(f"RetrieveImagingDocumentSetRequest holds {len(lists)} TransferSyntaxUIDList, not one")
    syntaxes = tuple(xml.text_of(child) for child in _named(lists[0], "TransferSyntaxUID"))
    request = RetrieveImagingRequest(studies, syntaxes)
    if not len(request):
        raise MalformedMessage("RetrieveImagingDocumentSetRequest asks for no document")
    return request


def _decode_study(element: etree._Element) -> StudyRequest:
    series = tuple(
        SeriesRequest(
            _uid(child, "seriesInstanceUID"),
            tuple(decode_document_request(document) for document in _named(child, "DocumentRequest")),
        )
        for child in _named(element, "SeriesRequest")
    )
    return StudyRequest(_uid(element, "studyInstanceUID"), series)


def _named(parent: etree._Element, local: str) -> list[etree._Element]:
    return [child for child in parent.iterchildren("*") if xml.local_name(child) == local]


def _uid(element: etree._Element, attribute: str) -> str:
    value = element.get(attribute)
    if value is None:
        raise MalformedMessage(f"{xml.local_name(element)} has no {attribute}")
    return value.strip()


def encode_imaging_request(request: RetrieveImagingRequest) -> etree._Element:
    """Return the iherad:RetrieveImagingDocumentSetRequest."""
    element = etree.Element(IMAGING_REQUEST, nsmap={"iherad": uids.NS_XDSI, "xdsb": uids.NS_XDSB})
    for study in request.studies:
        study_element = etree.SubElement(element, _STUDY_REQUEST)
        study_element.set("studyInstanceUID", study.study_instance_uid)
        for series in study.series:
            series_element = etree.SubElement(study_element, _SERIES_REQUEST)
            series_element.set("seriesInstanceUID", series.series_instance_uid)
            for document in series.documents:
                add_document_request(series_element, document)
    syntaxes = etree.SubElement(element, _TRANSFER_SYNTAX_UID_LIST)
    for uid in request.transfer_syntax_uids:
        etree.SubElement(syntaxes, _TRANSFER_SYNTAX_UID).text = uid
    return element
