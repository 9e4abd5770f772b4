"""ITI-61 Register On-Demand Document Entry: a source registers documents that are made when they are asked for.

References
----------
* IHE ITI TF-2, 3.61
"""

from __future__ import annotations

from lxml import etree

from xca_imaging.metadata.model import Submission
from xca_imaging.transactions import registry_response, submission
from xca_imaging.transactions.registry_response import RegistryResponse
from xca_imaging.transactions.table import ITI61

TRANSACTION = ITI61


def decode_request(body: etree._Element | None) -> Submission:
    """Return the submission; see `submission.decode_submit_request` for what is raised."""
    return submission.decode_submit_request(TRANSACTION.check_request(body))


def encode_request(request: Submission) -> etree._Element:
    """Return the body of a request."""
    return submission.encode_submit_request(request)


def decode_response(body: etree._Element | None) -> RegistryResponse:
    """Return the outcome."""
    return registry_response.decode_registry_response(TRANSACTION.check_response(body))


def encode_response(response: RegistryResponse) -> etree._Element:
    """Return the body of an answer."""
    return registry_response.encode_registry_response(response)
