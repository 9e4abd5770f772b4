"""ITI-41 Provide and Register Document Set-b: a source hands documents to a repository.

References
----------
* IHE ITI TF-2, 3.41
"""

from __future__ import annotations

from lxml import etree

from xca_imaging.transactions import registry_response, submission
from xca_imaging.transactions.registry_response import RegistryResponse
from xca_imaging.transactions.submission import ProvideRequest
from xca_imaging.transactions.table import ITI41

TRANSACTION = ITI41


def decode_request(body: etree._Element | None) -> ProvideRequest:
    """Return submission and documents; see `submission.decode_provide_request` for what is raised."""
    return submission.decode_provide_request(TRANSACTION.check_request(body))


def encode_request(request: ProvideRequest) -> etree._Element:
    """Return the body of a request."""
    return submission.encode_provide_request(request)


def decode_response(body: etree._Element | None) -> RegistryResponse:
    """Return the outcome."""
    return registry_response.decode_registry_response(TRANSACTION.check_response(body))


def encode_response(response: RegistryResponse) -> etree._Element:
    """Return the body of an answer."""
    return registry_response.encode_registry_response(response)
