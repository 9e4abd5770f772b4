"""ITI-62 Remove Metadata: an administrator removes objects from a registry.

References
----------
* IHE ITI Remove Metadata and Documents, 3.62; OASIS ebRS 3.0, 5.9 (RemoveObjects)
"""

from __future__ import annotations

from dataclasses import dataclass

from lxml import etree

from xca_imaging import uids
from xca_imaging.errors import MalformedMessage, MessageTooLarge, RegistryMetadataError
from xca_imaging.transactions import registry_response
from xca_imaging.transactions.registry_response import RegistryResponse
from xca_imaging.transactions.table import ITI62
from xca_imaging.wire import xml

TRANSACTION = ITI62

_OBJECT_REF_LIST = xml.qname(uids.NS_RIM, "ObjectRefList")
_OBJECT_REF = xml.qname(uids.NS_RIM, "ObjectRef")
_ADHOC_QUERY = xml.qname(uids.NS_RIM, "AdhocQuery")
_DELETE_ALL = "urn:oasis:names:tc:ebxml-regrep:DeletionScopeType:DeleteAll"


@dataclass(frozen=True, slots=True)
class RemoveRequest:
    """The entryUUIDs of the objects to remove, in the order of the message."""

    entry_uuids: tuple[str, ...]


def decode_request(body: etree._Element | None, *, max_objects: int = 10_000) -> RemoveRequest:
    """Return what is to be removed.

    Raises
    ------
    MalformedMessage
        When nothing is named.
    MessageTooLarge
        When more objects are named than one transaction removes.
    RegistryMetadataError
        For what ebRS would allow and IHE does not (3.62.4.1.2): a query for the objects, another deletion scope.
    """
    request = TRANSACTION.check_request(body)
    listed = request.find(_OBJECT_REF_LIST)
    if request.find(_ADHOC_QUERY) is not None:
        raise RegistryMetadataError("objects are removed by ObjectRefList, not by AdhocQuery")
    if request.get("deletionScope", _DELETE_ALL).strip() != _DELETE_ALL:
        raise RegistryMetadataError("deletionScope other than DeleteAll: objects are removed for good")
    references = [] if listed is None else listed.findall(_OBJECT_REF)
    if not references:
        raise MalformedMessage("RemoveObjectsRequest holds no ObjectRef")
    if len(references) > max_objects:
        raise MessageTooLarge(f"a removal of more than {max_objects} objects")
    return RemoveRequest(tuple(dict.fromkeys(reference.get("id", "").strip() for reference in references)))


def encode_request(request: RemoveRequest) -> etree._Element:
    """Return the body of a request."""
    element = etree.Element(TRANSACTION.request_root, nsmap={"lcm": uids.NS_LCM, "rim": uids.NS_RIM})
    listed = etree.SubElement(element, _OBJECT_REF_LIST)
    for entry_uuid in request.entry_uuids:
        etree.SubElement(listed, _OBJECT_REF).set("id", entry_uuid)
    return element


def decode_response(body: etree._Element | None) -> RegistryResponse:
    """Return the outcome."""
    return registry_response.decode_registry_response(TRANSACTION.check_response(body))


def encode_response(response: RegistryResponse) -> etree._Element:
    """Return the body of an answer."""
    return registry_response.encode_registry_response(response)
