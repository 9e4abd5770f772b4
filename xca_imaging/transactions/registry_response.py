"""rs:RegistryResponse: the status and the errors with which every transaction ends.

References
----------
* IHE ITI TF-3, 4.2.4 (success and error reporting), Table 4.2.4.2-1 (when which status)
* OASIS ebRS 3.0, 2.1.3 (RegistryResponse), 2.1.6 (RegistryError)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lxml import etree

from xca_imaging import uids
from xca_imaging.errors import RegistryError
from xca_imaging.wire import xml

RESPONSE = xml.qname(uids.NS_RS, "RegistryResponse")
_ERROR_LIST = xml.qname(uids.NS_RS, "RegistryErrorList")
_ERROR = xml.qname(uids.NS_RS, "RegistryError")


@dataclass(frozen=True, slots=True)
class RegistryResponse:
    """How a request ended. A status that is none of the three known ones is kept, and is no success."""

    status: str
    errors: tuple[RegistryError, ...] = ()

    @property
    def succeeded(self) -> bool:
        """Whether all of it was done; warnings may stand beside."""
        return self.status == uids.STATUS_SUCCESS


def outcome(found: int, errors: Iterable[RegistryError]) -> str:
    """Return the status of a request that found so many results and met these errors.

    Warnings alone leave it a success. A submission is done whole or not at all: it passes 0.
    """
    if all(error.warning for error in errors):
        return uids.STATUS_SUCCESS
    return uids.STATUS_PARTIAL_SUCCESS if found else uids.STATUS_FAILURE


def response_to(errors: Sequence[RegistryError] = (), *, found: int = 0) -> RegistryResponse:
    """Return the response whose status follows from what was found and what went wrong."""
    return RegistryResponse(outcome(found, errors), tuple(errors))


def decode_registry_response(element: etree._Element) -> RegistryResponse:
    """Return status and errors of a RegistryResponse, or of an AdhocQueryResponse, which is one."""
    return RegistryResponse(
        element.get("status", "").strip(),
        tuple(_decode_error(child) for child in element.iterfind(f"{_ERROR_LIST}/{_ERROR}")),
    )


def _decode_error(element: etree._Element) -> RegistryError:
    # A severity that is not known counts as an error: better a needless alarm than a loss unseen.
    warning = element.get("severity", uids.SEVERITY_ERROR).strip().endswith(":Warning")
    return RegistryError.from_code(
        element.get("errorCode", "").strip(),
        element.get("codeContext", "").strip() or xml.text_of(element),
        element.get("location", "").strip(),
        warning=warning,
    )


def encode_registry_response(response: RegistryResponse) -> etree._Element:
    """Return the rs:RegistryResponse."""
    element = etree.Element(RESPONSE, nsmap={"rs": uids.NS_RS})
    add_outcome(element, response)
    return element


def add_outcome(element: etree._Element, response: RegistryResponse) -> None:
    """Add status and errors to an element of type rs:RegistryResponseType."""
    element.set("status", response.status)
    if not response.errors:
        return
    highest = uids.SEVERITY_WARNING if all(error.warning for error in response.errors) else uids.SEVERITY_ERROR
    error_list = etree.SubElement(element, _ERROR_LIST)
    error_list.set("highestSeverity", highest)
    for error in response.errors:
        child = etree.SubElement(error_list, _ERROR)
        child.set("errorCode", error.code)
        child.set("codeContext", xml.printable(error.context))
        child.set("severity", error.severity)
        if error.location:
            child.set("location", xml.printable(error.location))
