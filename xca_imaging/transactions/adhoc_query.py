"""query:AdhocQueryRequest and query:AdhocQueryResponse: the messages of ITI-18, ITI-38 and ITI-51.

References
----------
* IHE ITI TF-2, 3.18.4.1.2 (request), 3.18.4.1.2.7 (response), 3.38.4.1.2 (homeCommunityId in a gateway's answer)
* OASIS ebRS 3.0, 6.1 (AdhocQueryRequest and -Response)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from xml.sax.saxutils import quoteattr

from lxml import etree

from xca_imaging import uids
from xca_imaging.errors import LocalProtocolError, RegistryError
from xca_imaging.metadata import ebrim
from xca_imaging.metadata.model import ObjectRef, Submission
from xca_imaging.transactions.registry_response import (
    RegistryResponse,
    add_outcome,
    decode_registry_response,
)
from xca_imaging.wire import xml

RESPONSE = xml.qname(uids.NS_QUERY, "AdhocQueryResponse")
_REGISTRY_OBJECT_LIST = xml.qname(uids.NS_RIM, "RegistryObjectList")

_PREFIXES = {"query": uids.NS_QUERY, "rs": uids.NS_RS, "rim": uids.NS_RIM}
_END = b"</rim:RegistryObjectList>"
_START_TAG = re.compile(rb"<[^\s/>]+")
_ATTRIBUTE = re.compile(rb'\s([^\s="]+)="[^"]*"')  # the serialiser writes double quotes, &quot; and &gt; inside


@dataclass(frozen=True, slots=True)
class QueryResponse:
    """The answer to a query: objects (LeafClass) or references (ObjectRef), and what went wrong.

    `objects.object_refs` stays empty: references are in `refs`. `problems` says what of the objects could not be read
    from the message; the rest of them is there.
    """

    status: str
    errors: tuple[RegistryError, ...] = ()
    objects: Submission = field(default_factory=Submission)
    refs: tuple[ObjectRef, ...] = ()
    problems: tuple[RegistryError, ...] = field(default=(), compare=False)

    @property
    def succeeded(self) -> bool:
        """Whether everything that matches is here."""
        return self.status == uids.STATUS_SUCCESS


def decode_query_response(body: etree._Element) -> QueryResponse:
    """Return the answer of a registry or gateway; a failure without RegistryObjectList is read too."""
    response = decode_registry_response(body)
    registry_object_list = body.find(_REGISTRY_OBJECT_LIST)
    if registry_object_list is None:
        return QueryResponse(response.status, response.errors)
    problems: list[RegistryError] = []
    objects = ebrim.decode_registry_objects(registry_object_list, problems=problems)
    refs, objects = objects.object_refs, replace(objects, object_refs=())
    return QueryResponse(response.status, response.errors, objects, refs, tuple(problems))


def encode_query_response(response: QueryResponse) -> etree._Element:
    """Return the query:AdhocQueryResponse; its RegistryObjectList is there even when it failed, as the schema asks."""
    element = etree.Element(RESPONSE, nsmap=_PREFIXES)
    add_outcome(element, RegistryResponse(response.status, response.errors))
    element.append(ebrim.encode_registry_objects(replace(response.objects, object_refs=response.refs)))
    return element


def encode_query_fragments(
    response: RegistryResponse, fragments: Iterable[bytes], *, home_community_id: str = ""
) -> Iterator[bytes]:
    """Yield the query:AdhocQueryResponse in pieces that hold objects as they were serialised long ago.

    Nothing is kept: an answer of any length needs the memory of one fragment.

    Parameters
    ----------
    fragments : iterable of bytes
        What `wire.xml.serialize` made of `ebrim.encode_object` or `ebrim.encode_reference`.
    home_community_id : str
        A gateway's own: it becomes `@home` of every object (ITI TF-2 3.38.4.1.3).
    """
    element = etree.Element(RESPONSE, nsmap=_PREFIXES)
    add_outcome(element, response)
    etree.SubElement(element, _REGISTRY_OBJECT_LIST).text = ""  # keeps start and end tag apart
    whole = xml.serialize(element)
    end = whole.rindex(_END)
    yield whole[:end]
    for fragment in fragments:
        yield set_home(fragment, home_community_id) if home_community_id else fragment
    yield whole[end:]


def set_home(fragment: bytes, home_community_id: str) -> bytes:
    """Return a serialised object with another `@home`: only its start tag is looked at, nothing is parsed."""
    name = _START_TAG.match(fragment)
    if name is None:
        raise LocalProtocolError("not the serialised form of a registry object")
    end = fragment.index(b">")
    if fragment[end - 1 : end] == b"/":
        end -= 1
    kept = (match[0] for match in _ATTRIBUTE.finditer(fragment, name.end(), end) if match[1] != b"home")
    home = b" home=" + quoteattr(home_community_id, {'"': "&quot;"}).encode("utf-8")
    return b"".join((name[0], home, *kept, fragment[end:]))
