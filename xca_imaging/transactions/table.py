"""The transactions that this node takes part in, as data.

The route table of the gateway, the WSDL test and the integration statement read this table; nothing dispatches on
anything else than `wsa:Action`.

References
----------
* IHE ITI TF-2, 3.18, 3.38, 3.39, 3.41, 3.42, 3.43, 3.44, 3.61; Appendix V (actions, SIMPLE and MTOM packaging)
* IHE ITI XDS Metadata Update, 3.57; IHE ITI Remove Metadata and Documents, 3.62, 3.86
* IHE RAD TF-2, 4.68, 4.69; IHE RAD XCA-I, 4.75
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lxml import etree

from xca_imaging import uids
from xca_imaging.errors import InvalidAddressingHeader, MalformedMessage
from xca_imaging.wire import xml

_QUERY_REQUEST = xml.qname(uids.NS_QUERY, "AdhocQueryRequest")
_QUERY_RESPONSE = xml.qname(uids.NS_QUERY, "AdhocQueryResponse")
_SUBMIT_REQUEST = xml.qname(uids.NS_LCM, "SubmitObjectsRequest")
_PROVIDE_REQUEST = xml.qname(uids.NS_XDSB, "ProvideAndRegisterDocumentSetRequest")
_REGISTRY_RESPONSE = xml.qname(uids.NS_RS, "RegistryResponse")
_RETRIEVE_REQUEST = xml.qname(uids.NS_XDSB, "RetrieveDocumentSetRequest")
_RETRIEVE_RESPONSE = xml.qname(uids.NS_XDSB, "RetrieveDocumentSetResponse")
_REMOVE_OBJECTS_REQUEST = xml.qname(uids.NS_LCM, "RemoveObjectsRequest")
_REMOVE_DOCUMENTS_REQUEST = xml.qname(uids.NS_RMD, "RemoveDocumentsRequest")
_FEED_ACKNOWLEDGEMENT = xml.qname(uids.NS_HL7V3, "MCCI_IN000002UV01")
_IMAGING_REQUEST = xml.qname(uids.NS_XDSI, "RetrieveImagingDocumentSetRequest")


@dataclass(frozen=True, slots=True, kw_only=True)
class Transaction:
    """One IHE transaction: how it is named, announced and packaged.

    Attributes
    ----------
    name, number, title : str
        As code, documents and people say it: `rad75`, `RAD-75`, `Cross Gateway Retrieve Imaging Document Set`.
    request_root, response_root : str
        Names of the body's child, `{namespace}local`.
    mtom : bool
        Whether request and response are MTOM messages, also without any attachment (ITI TF-2 V.8).
    """

    name: str
    number: str
    title: str
    request_action: str
    response_action: str
    request_root: str
    response_root: str
    mtom: bool = False

    def check_request(self, body: etree._Element | None) -> etree._Element:
        """Return the body of a request.

        Raises
        ------
        InvalidAddressingHeader
            When the body is another transaction's: the action does not fit it.
        """
        if body is None or body.tag != self.request_root:
            found = "nothing" if body is None else xml.printable(str(body.tag), 200)
            text = f"{self.request_action} needs {self.request_root} as body, not {found}"
            raise InvalidAddressingHeader("Action", "ActionMismatch", text)
        return body

    def check_response(self, body: etree._Element | None) -> etree._Element:
        """Return the body of a response.

        Raises
        ------
        MalformedMessage
            When it is not what answers this transaction.
        """
        if body is None or body.tag != self.response_root:
            found = "nothing" if body is None else xml.printable(str(body.tag), 200)
            raise MalformedMessage(f"{self.number} is answered by {self.response_root}, not {found}")
        return body


ITI18 = Transaction(
    name="iti18",
    number="ITI-18",
    title="Registry Stored Query",
    request_action=uids.ITI18_REQUEST,
    response_action=uids.ITI18_RESPONSE,
    request_root=_QUERY_REQUEST,
    response_root=_QUERY_RESPONSE,
)
ITI38 = Transaction(
    name="iti38",
    number="ITI-38",
    title="Cross Gateway Query",
    request_action=uids.ITI38_REQUEST,
    response_action=uids.ITI38_RESPONSE,
    request_root=_QUERY_REQUEST,
    response_root=_QUERY_RESPONSE,
)
ITI39 = Transaction(
    name="iti39",
    number="ITI-39",
    title="Cross Gateway Retrieve",
    request_action=uids.ITI39_REQUEST,
    response_action=uids.ITI39_RESPONSE,
    request_root=_RETRIEVE_REQUEST,
    response_root=_RETRIEVE_RESPONSE,
    mtom=True,
)
ITI41 = Transaction(
    name="iti41",
    number="ITI-41",
    title="Provide and Register Document Set-b",
    request_action=uids.ITI41_REQUEST,
    response_action=uids.ITI41_RESPONSE,
    request_root=_PROVIDE_REQUEST,
    response_root=_REGISTRY_RESPONSE,
    mtom=True,
)
ITI42 = Transaction(
    name="iti42",
    number="ITI-42",
    title="Register Document Set-b",
    request_action=uids.ITI42_REQUEST,
    response_action=uids.ITI42_RESPONSE,
    request_root=_SUBMIT_REQUEST,
    response_root=_REGISTRY_RESPONSE,
)
ITI43 = Transaction(
    name="iti43",
    number="ITI-43",
    title="Retrieve Document Set",
    request_action=uids.ITI43_REQUEST,
    response_action=uids.ITI43_RESPONSE,
    request_root=_RETRIEVE_REQUEST,
    response_root=_RETRIEVE_RESPONSE,
    mtom=True,
)
ITI44_ADD = Transaction(
    name="iti44",
    number="ITI-44",
    title="Patient Identity Feed HL7 V3",
    request_action=uids.ITI44_ADD,
    response_action=uids.ITI44_RESPONSE,
    request_root=xml.qname(uids.NS_HL7V3, "PRPA_IN201301UV02"),
    response_root=_FEED_ACKNOWLEDGEMENT,
)
ITI44_REVISE = replace(
    ITI44_ADD, request_action=uids.ITI44_REVISE, request_root=xml.qname(uids.NS_HL7V3, "PRPA_IN201302UV02")
)
ITI44_MERGE = replace(
    ITI44_ADD, request_action=uids.ITI44_MERGE, request_root=xml.qname(uids.NS_HL7V3, "PRPA_IN201304UV02")
)
ITI51 = Transaction(
    name="iti51",
    number="ITI-51",
    title="Multi-Patient Stored Query",
    request_action=uids.ITI51_REQUEST,
    response_action=uids.ITI51_RESPONSE,
    request_root=_QUERY_REQUEST,
    response_root=_QUERY_RESPONSE,
)
ITI57 = Transaction(
    name="iti57",
    number="ITI-57",
    title="Update Document Set",
    request_action=uids.ITI57_REQUEST,
    response_action=uids.ITI57_RESPONSE,
    request_root=_SUBMIT_REQUEST,
    response_root=_REGISTRY_RESPONSE,
)
ITI61 = Transaction(
    name="iti61",
    number="ITI-61",
    title="Register On-Demand Document Entry",
    request_action=uids.ITI61_REQUEST,
    response_action=uids.ITI61_RESPONSE,
    request_root=_SUBMIT_REQUEST,
    response_root=_REGISTRY_RESPONSE,
)
ITI62 = Transaction(
    name="iti62",
    number="ITI-62",
    title="Remove Metadata",
    request_action=uids.ITI62_REQUEST,
    response_action=uids.ITI62_RESPONSE,
    request_root=_REMOVE_OBJECTS_REQUEST,
    response_root=_REGISTRY_RESPONSE,
)
ITI86 = Transaction(
    name="iti86",
    number="ITI-86",
    title="Remove Documents",
    request_action=uids.ITI86_REQUEST,
    response_action=uids.ITI86_RESPONSE,
    request_root=_REMOVE_DOCUMENTS_REQUEST,
    response_root=_REGISTRY_RESPONSE,
)
RAD68 = Transaction(
    name="rad68",
    number="RAD-68",
    title="Provide and Register Imaging Document Set - MTOM/XOP",
    request_action=uids.ITI41_REQUEST,  # the same message as ITI-41, with an imaging manifest inside
    response_action=uids.ITI41_RESPONSE,
    request_root=_PROVIDE_REQUEST,
    response_root=_REGISTRY_RESPONSE,
    mtom=True,
)
RAD69 = Transaction(
    name="rad69",
    number="RAD-69",
    title="Retrieve Imaging Document Set",
    request_action=uids.RAD69_REQUEST,
    response_action=uids.RAD69_RESPONSE,
    request_root=_IMAGING_REQUEST,
    response_root=_RETRIEVE_RESPONSE,
    mtom=True,
)
RAD75 = Transaction(
    name="rad75",
    number="RAD-75",
    title="Cross Gateway Retrieve Imaging Document Set",
    request_action=uids.RAD75_REQUEST,
    response_action=uids.RAD75_RESPONSE,
    request_root=_IMAGING_REQUEST,
    response_root=_RETRIEVE_RESPONSE,
    mtom=True,
)

TRANSACTIONS: tuple[Transaction, ...] = (
    ITI18,
    ITI38,
    ITI39,
    ITI41,
    ITI42,
    ITI43,
    ITI44_ADD,
    ITI44_REVISE,
    ITI44_MERGE,
    ITI51,
    ITI57,
    ITI61,
    ITI62,
    ITI86,
    RAD68,
    RAD69,
    RAD75,
)

BY_ACTION: Mapping[str, Transaction] = {
    transaction.request_action: transaction for transaction in TRANSACTIONS if transaction is not RAD68
}
"""Request action to transaction. RAD-68 cannot be told from ITI-41 by its action; it is one by what it carries."""
