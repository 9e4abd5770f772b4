"""ITI-51 Multi-Patient Stored Query: a consumer asks a registry about several patients, or about all.

References
----------
* IHE ITI TF-2, 3.51
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from lxml import etree

from xca_imaging.metadata.adhoc_query import decode_adhoc_query, encode_adhoc_query
from xca_imaging.metadata.stored_query import MULTIPLE_PATIENTS, StoredQuery
from xca_imaging.transactions import adhoc_query
from xca_imaging.transactions.adhoc_query import QueryResponse
from xca_imaging.transactions.registry_response import RegistryResponse
from xca_imaging.transactions.table import ITI51

TRANSACTION = ITI51


def decode_request(body: etree._Element | None) -> StoredQuery:
    """Return the query asked; see `metadata.adhoc_query.decode_adhoc_query` for what is raised."""
    return decode_adhoc_query(TRANSACTION.check_request(body), MULTIPLE_PATIENTS)


def encode_request(query: StoredQuery) -> etree._Element:
    """Return the body of a request."""
    return encode_adhoc_query(query)


def decode_response(body: etree._Element | None) -> QueryResponse:
    """Return a registry's answer."""
    return adhoc_query.decode_query_response(TRANSACTION.check_response(body))


def encode_response(response: QueryResponse) -> etree._Element:
    """Return the body of an answer made of objects."""
    return adhoc_query.encode_query_response(response)


def encode_response_fragments(response: RegistryResponse, fragments: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the body of an answer made of serialised objects, in pieces."""
    return adhoc_query.encode_query_fragments(response, fragments)
