"""RAD-75 Cross Gateway Retrieve Imaging Document Set: one imaging gateway fetches images from another.

References
----------
* IHE RAD XCA-I, 4.75
"""

from __future__ import annotations

from lxml import etree

from xca_imaging.transactions import document_set, imaging_document_set
from xca_imaging.transactions.document_set import RetrieveResponse
from xca_imaging.transactions.imaging_document_set import RetrieveImagingRequest
from xca_imaging.transactions.table import RAD75

TRANSACTION = RAD75


def decode_request(body: etree._Element | None) -> RetrieveImagingRequest:
    """Return the images asked for."""
    return imaging_document_set.decode_imaging_request(TRANSACTION.check_request(body))


def encode_request(request: RetrieveImagingRequest) -> etree._Element:
    """Return the body of a request."""
    return imaging_document_set.encode_imaging_request(request)


def decode_response(body: etree._Element | None) -> RetrieveResponse:
    """Return the images of an answer."""
    return document_set.decode_retrieve_response(TRANSACTION.check_response(body))


def encode_response(response: RetrieveResponse) -> etree._Element:
    """Return the body of an answer."""
    return document_set.encode_retrieve_response(response)
