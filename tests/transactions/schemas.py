"""Schema validity of what we write: against the published schemas beside the checkout, and against our own."""

from __future__ import annotations

import base64
import copy
from functools import cache
from pathlib import Path

import pytest
from lxml import etree

from tests.support.shared import shared_path
from xca_imaging import uids
from xca_imaging.wire import xml

WSDL = Path(__file__).resolve().parents[2] / "wsdl"


@cache
def published() -> etree.XMLSchema | None:
    """Return the published schemas of all XDS transactions (the imaging one imports the others), None without them."""
    return _published("schemas/nist-v3/XDSI.b_ImagingDocumentSource.xsd")


@cache
def published_hl7v3(interaction: str) -> etree.XMLSchema | None:
    """Return the published schema of one HL7 V3 interaction; it takes a second to compile."""
    return _published(f"schemas/hl7v3/schema/HL7V3/NE2008/multicacheschemas/{interaction}.xsd")


def _published(name: str) -> etree.XMLSchema | None:
    try:
        path = shared_path(name)
    except pytest.skip.Exception:
        return None
    return etree.XMLSchema(etree.parse(path))


@cache
def ours() -> etree.XMLSchema:
    """Return the schemas that the node serves with its WSDL."""
    imports = "".join(
        f'<xs:import namespace="{namespace}" schemaLocation="{(WSDL / name).as_uri()}"/>'
        for namespace, name in (
            (uids.NS_QUERY, "query.xsd"),
            (uids.NS_XDSI, "xdsi-b.xsd"),
            (uids.NS_RMD, "rmd.xsd"),
            (uids.NS_HL7V3, "hl7v3.xsd"),
        )
    )
    return etree.XMLSchema(etree.XML(f'<xs:schema xmlns:xs="http://www.w3.org/2001/XMLSchema">{imports}</xs:schema>'))


def assert_valid(element: etree._Element) -> None:
    """Check a message body against our schemas and, where they are there, the published ones.

    An xop:Include is replaced by base64 first: the schemas describe the message as it means (XOP 3.2).
    """
    inlined = inline(element)
    ours().assertValid(inlined)
    namespace, local = xml.split_name(inlined)
    if namespace == uids.NS_RMD:
        # Published as a name for the type of ITI-43's request, within a WSDL and not as a schema of its own.
        inlined.tag = xml.qname(uids.NS_XDSB, "RetrieveDocumentSetRequest")
        inlined = etree.fromstring(etree.tostring(inlined))
    schema = published_hl7v3(local) if namespace == uids.NS_HL7V3 else published()
    if schema is not None:
        schema.assertValid(inlined)


def inline(element: etree._Element) -> etree._Element:
    """Return a copy with some base64 instead of each xop:Include, as a document of its own."""
    inlined = copy.deepcopy(element)
    for include in list(inlined.iter(f"{{{uids.NS_XOP}}}Include")):
        parent = include.getparent()
        assert parent is not None
        parent.remove(include)
        parent.text = base64.b64encode(b"attached").decode("ascii")
    return etree.fromstring(etree.tostring(inlined))
