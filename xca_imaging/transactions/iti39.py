"""ITI-39 Cross Gateway Retrieve: one gateway fetches documents from another.

References
----------
* IHE ITI TF-2, 3.39
"""

from __future__ import annotations

from lxml import etree

from xca_imaging.transactions import document_set
from xca_imaging.transactions.document_set import RetrieveRequest, RetrieveResponse
from xca_imaging.transactions.table import ITI39

TRANSACTION = ITI39


def decode_request(body: etree._Element | None) -> RetrieveRequest:
    """Return the documents asked for."""
    return document_set.decode_retrieve_request(TRANSACTION.check_request(body))


def encode_request(request: RetrieveRequest) -> etree._Element:
    """Return the body of a request."""
    return document_set.encode_retrieve_request(request)


def decode_response(body: etree._Element | None) -> RetrieveResponse:
    """Return the documents of an answer."""
    return document_set.decode_retrieve_response(TRANSACTION.check_response(body))


def encode_response(response: RetrieveResponse) -> etree._Element:
    """Return the body of an answer."""
    return document_set.encode_retrieve_response(response)
