"""ITI-44 Patient Identity Feed HL7 V3: add, revise and merge patients.

Only what a registry needs is read: the message's id, the devices that an acknowledgement goes back to, and the patient
identifiers. Demographics are neither checked nor kept.

References
----------
* IHE ITI TF-2, 3.44.4.1 (add, revise), 3.44.4.2 (duplicates resolved); Appendix O.1 (transmission wrappers)
* HL7 V3 2008: PRPA_IN201301UV02, PRPA_IN201302UV02, PRPA_IN201304UV02, MCCI_IN000002UV01
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lxml import etree

from xca_imaging import uids
from xca_imaging.errors import MalformedMessage
from xca_imaging.transactions.identity_feed import (
    Added,
    Feed,
    FeedMessage,
    Merged,
    Revised,
    identifier_of,
    is_usable,
    patient_id_of,
)
from xca_imaging.transactions.table import ITI44_ADD, ITI44_MERGE, ITI44_REVISE, Transaction
from xca_imaging.wire import xml

TRANSACTIONS = (ITI44_ADD, ITI44_REVISE, ITI44_MERGE)

INTERACTIONS = "2.16.840.1.113883.1.6"  # HL7: OID of interaction ids
ACCEPTED, ERROR, REJECTED = "CA", "CE", "CR"  # accept acknowledgement: HL7 vocabulary AcknowledgementType

_DEFAULT_NAMESPACE: Any = {None: uids.NS_HL7V3}  # lxml's stubs know no default namespace
_PATIENT = ("controlActProcess", "subject", "registrationEvent", "subject1", "patient")
_EVENT = ("controlActProcess", "subject", "registrationEvent")
_REPLACED = ("replacementOf", "priorRegistration", "subject1", "priorRegisteredRole")
_MAX_IDS = 100  # identifiers of one patient, or patients subsumed at once: real feeds have a handful


@dataclass(frozen=True, slots=True)
class Device:
    """Sender or receiver of a message: the first id of its device, as HL7 writes an instance identifier."""

    root: str
    extension: str = ""


@dataclass(frozen=True, slots=True)
class Request:
    """A message of the feed and the devices at its two ends."""

    message: FeedMessage
    root: str
    extension: str
    sender: Device
    receiver: Device


@dataclass(frozen=True, slots=True)
class Acknowledgement:
    """An MCCI_IN000002UV01: how the message with this id was taken, and why not."""

    code: str
    message_root: str
    message_extension: str = ""
    reason: str = ""

    @property
    def accepted(self) -> bool:
        """Whether the message was taken, by either kind of acknowledgement."""
        return self.code in ("AA", ACCEPTED)


def decode_request(transaction: Transaction, body: etree._Element | None) -> Request:
    """Return the message of a feed.

    Raises
    ------
    MalformedMessage
        Without message id, or without a patient identifier that has an OID as root.
    """
    message = transaction.check_request(body)
    message_id = _find(message, "id")
    if message_id is None or not message_id.get("root"):
        raise MalformedMessage(f"{xml.local_name(message)} has no id/@root")
    root, extension = message_id.get("root", "").strip(), message_id.get("extension", "").strip()
    events = list(_walk(message, _EVENT))
    if len(events) != 1:
        raise MalformedMessage(f"{xml.local_name(message)} holds {len(events)} registration events, not one")
    patient_ids = _identifiers(_walk(message, _PATIENT), "the patient")
    feed: Feed
    if transaction is ITI44_MERGE:
        feed = Merged(patient_ids, _identifiers(_walk(events[0], _REPLACED), "replacementOf"))
    else:
        feed = Added(patient_ids) if transaction is ITI44_ADD else Revised(patient_ids)
    return Request(
        FeedMessage(f"{root}@{extension}" if extension else root, feed),
        root,
        extension,
        _device(message, "sender"),
        _device(message, "receiver"),
    )


def _identifiers(elements: Iterable[etree._Element], where: str) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for element in elements:
        for item in element.iterchildren(_name("id")):
            root, number = item.get("root", "").strip(), item.get("extension", "").strip()
            patient_id = patient_id_of(number, root)
            if is_usable(patient_id):
                found[patient_id] = None
            if len(found) > _MAX_IDS:
                raise MalformedMessage(f"more than {_MAX_IDS} identifiers")
    if not found:
        raise MalformedMessage(f"{where} has no id with an OID as root and an extension")
    return tuple(found)


def _device(message: etree._Element, end: str) -> Device:
    for element in _walk(message, (end, "device", "id")):
        return Device(element.get("root", "").strip(), element.get("extension", "").strip())
    return Device("")


def _name(local: str) -> str:
    return xml.qname(uids.NS_HL7V3, local)


def _find(element: etree._Element, local: str) -> etree._Element | None:
    return element.find(_name(local))


def _walk(element: etree._Element, path: Iterable[str]) -> Iterable[etree._Element]:
    return element.iterfind("/".join(map(_name, path)))


def encode_request(
    transaction: Transaction,
    feed: Feed,
    *,
    message_id: str,
    creation_time: str,
    sender: str,
    receiver: str,
    name: tuple[str, str] = ("", ""),
) -> etree._Element:
    """Return the message of a feed, with the least that its schema demands.

    Parameters
    ----------
    message_id, sender, receiver : str
        OIDs.
    creation_time : str
        HL7 V3 TS.
    name : (str, str)
        Family and given name; empty is said to be unknown.
    """
    message = _envelope(transaction.request_root, message_id, creation_time, sender, receiver)
    act = _add(message, "controlActProcess", classCode="CACT", moodCode="EVN")
    _add(act, "code", code=_trigger(transaction), codeSystem="2.16.840.1.113883.1.18")
    subject = _add(act, "subject", typeCode="SUBJ", contextConductionInd="false")
    event = _add(subject, "registrationEvent", classCode="REG", moodCode="EVN")
    _add(event, "id", nullFlavor="NA")
    _add(event, "statusCode", code="active")
    patient = _add(_add(event, "subject1", typeCode="SBJ"), "patient", classCode="PAT")
    for patient_id in feed.patient_ids:
        _add_identifier(patient, patient_id)
    _add(patient, "statusCode", code="active")
    _add_person(patient, name)
    provider = _add(patient, "providerOrganization", classCode="ORG", determinerCode="INSTANCE")
    _add(provider, "id", root=sender)
    _add(provider, "name").text = "Patient Identity Source"
    contact = _add(provider, "contactParty", classCode="CON")
    _add(contact, "telecom", nullFlavor="NI")
    custodian = _add(event, "custodian", typeCode="CST")
    entity = _add(custodian, "assignedEntity", classCode="ASSIGNED")
    _add(entity, "id", root=sender)
    if isinstance(feed, Merged):
        for subsumed in feed.subsumed:
            prior = _add(
                _add(event, "replacementOf", typeCode="RPLC"), "priorRegistration", classCode="REG", moodCode="EVN"
            )
            _add(prior, "statusCode", code="obsolete")
            role = _add(_add(prior, "subject1", typeCode="SBJ"), "priorRegisteredRole", classCode="PAT")
            _add_identifier(role, subsumed)
    return message


def _add_person(patient: etree._Element, name: tuple[str, str]) -> None:
    person = _add(patient, "patientPerson", classCode="PSN", determinerCode="INSTANCE")
    if not any(name):
        _add(person, "name", nullFlavor="NI")
        return
    element = _add(person, "name")
    for part, text in zip(("family", "given"), name, strict=True):
        if text:
            _add(element, part).text = text


def decode_response(transaction: Transaction, body: etree._Element | None) -> Acknowledgement:
    """Return an acknowledgement.

    Raises
    ------
    MalformedMessage
        Without acknowledgement, or one that names no message.
    """
    message = transaction.check_response(body)
    acknowledgement = _find(message, "acknowledgement")
    code = None if acknowledgement is None else _find(acknowledgement, "typeCode")
    if acknowledgement is None or code is None:
        raise MalformedMessage("MCCI_IN000002UV01 holds no acknowledgement with a typeCode")
    target = next(iter(_walk(acknowledgement, ("targetMessage", "id"))), None)
    if target is None:
        raise MalformedMessage("the acknowledgement names no message")
    texts = (xml.text_of(element) for element in _walk(acknowledgement, ("acknowledgementDetail", "text")))
    return Acknowledgement(
        code.get("code", "").strip(),
        target.get("root", ""),
        target.get("extension", ""),
        "; ".join(filter(None, texts)),
    )


def encode_response(
    request: Request | None, *, message_id: str, creation_time: str, reason: str = ""
) -> etree._Element:
    """Return the acknowledgement of a message: accepted, or an error for a reason.

    Parameters
    ----------
    request : Request, optional
        None for a message that could not be read.
    message_id : str
        Root of the acknowledgement's own id: an OID or a UUID.
    creation_time : str
        HL7 V3 TS.
    """
    # An acknowledgement goes back the way that its message came.
    ends = (request.receiver, request.sender) if request else (Device(""), Device(""))
    message = _envelope(ITI44_ADD.response_root, message_id, creation_time, *ends)
    acknowledgement = _add(message, "acknowledgement")
    _add(acknowledgement, "typeCode", code=ERROR if reason else ACCEPTED)
    target = _add(acknowledgement, "targetMessage")
    if request is None:
        _add(target, "id", nullFlavor="UNK")
    elif request.extension:
        _add(target, "id", root=request.root, extension=request.extension)
    else:
        _add(target, "id", root=request.root)
    if reason:
        detail = _add(acknowledgement, "acknowledgementDetail", typeCode="E")
        _add(detail, "text").text = xml.printable(reason)
    return message


def _envelope(
    root: str, message_id: str, creation_time: str, sender: Device | str, receiver: Device | str
) -> etree._Element:
    message = etree.Element(root, nsmap=_DEFAULT_NAMESPACE)
    message.set("ITSVersion", "XML_1.0")
    _add(message, "id", root=message_id)
    _add(message, "creationTime", value=creation_time)
    _add(message, "interactionId", root=INTERACTIONS, extension=xml.local_name(message))
    _add(message, "processingCode", code="P")
    _add(message, "processingModeCode", code="T")
    _add(message, "acceptAckCode", code="NE" if root == ITI44_ADD.response_root else "AL")
    for end, type_code, device in (("receiver", "RCV", receiver), ("sender", "SND", sender)):
        element = _add(message, end, typeCode=type_code)
        described = _add(element, "device", classCode="DEV", determinerCode="INSTANCE")
        identifier = Device(device) if isinstance(device, str) else device
        if not identifier.root:
            _add(described, "id", nullFlavor="NI")
        elif identifier.extension:
            _add(described, "id", root=identifier.root, extension=identifier.extension)
        else:
            _add(described, "id", root=identifier.root)
    return message


def _trigger(transaction: Transaction) -> str:
    return xml.local_name(etree.Element(transaction.request_root)).replace("_IN", "_TE")


def _add(parent: etree._Element, local: str, **attributes: str) -> etree._Element:
    element = etree.SubElement(parent, _name(local))
    for name, value in attributes.items():
        element.set(name, value)
    return element


def _add_identifier(parent: etree._Element, patient_id: str) -> None:
    number, authority = identifier_of(patient_id)
    _add(parent, "id", root=authority, extension=number)
