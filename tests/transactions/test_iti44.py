"""ITI-44: identity feeds in HL7 V3 and their acknowledgements, against HL7's own schemas."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest
import zeep
from lxml import etree

from tests.support.shared import shared_path
from tests.transactions import schemas
from xca_imaging import uids
from xca_imaging.errors import InvalidAddressingHeader, MalformedMessage
from xca_imaging.transactions import iti44
from xca_imaging.transactions.identity_feed import Added, Feed, Merged, Revised, identifier_of, patient_id_of
from xca_imaging.transactions.table import ITI44_ADD, ITI44_MERGE, ITI44_REVISE, Transaction

AUTHORITY = "1.3.6.1.4.1.21367.2005.13.20.1000"
SURVIVOR = f"test-1^^^&{AUTHORITY}&ISO"
SUBSUMED = f"test-2^^^&{AUTHORITY}&ISO"
SENDER, RECEIVER = "1.3.6.1.4.1.21367.2017.8", "1.3.6.1.4.1.21367.2017.1"
MESSAGES: list[tuple[Transaction, Feed]] = [
    (ITI44_ADD, Added((SURVIVOR, "42^^^&1.2.3&ISO"))),
    (ITI44_REVISE, Revised((SURVIVOR,))),
    (ITI44_MERGE, Merged((SURVIVOR,), (SUBSUMED, "test-3^^^&1.2.3&ISO"))),
]


def message(transaction: Transaction, feed: Feed) -> etree._Element:
    return iti44.encode_request(
        transaction,
        feed,
        message_id="1.2.3.4.5",
        creation_time="20240301083015",
        sender=SENDER,
        receiver=RECEIVER,
        name=("Sample", "Ada"),
    )


@pytest.mark.parametrize(("transaction", "feed"), MESSAGES, ids=["add", "revise", "merge"])
def test_a_message_is_valid_and_read_again(transaction, feed):
    element = message(transaction, feed)
    schemas.assert_valid(element)
    request = iti44.decode_request(transaction, element)
    assert request.message.feed == feed
    assert request.message.message_id == "1.2.3.4.5"
    assert (request.sender.root, request.receiver.root) == (SENDER, RECEIVER)


@pytest.mark.parametrize("transaction", iti44.TRANSACTIONS, ids=lambda each: each.request_action)
def test_another_interaction_under_the_action(transaction):
    other = next(each for each in iti44.TRANSACTIONS if each is not transaction)
    with pytest.raises(InvalidAddressingHeader):
        iti44.decode_request(
            transaction, message(other, dict(zip(iti44.TRANSACTIONS, MESSAGES, strict=True))[other][1])
        )


@pytest.mark.parametrize("reason", ["", "test-2 has been merged into test-1"])
def test_acknowledgements(reason):
    element = message(*MESSAGES[0])
    element.find(f"{{{uids.NS_HL7V3}}}id").set("extension", "17")
    request = iti44.decode_request(ITI44_ADD, element)
    assert request.message.message_id == "1.2.3.4.5@17"
    answer = iti44.encode_response(
        request, message_id=str(uuid.uuid4()).upper(), creation_time="20240301083016", reason=reason
    )
    schemas.assert_valid(answer)
    acknowledgement = iti44.decode_response(ITI44_ADD, answer)
    assert acknowledgement.accepted is not bool(reason)
    assert (acknowledgement.message_root, acknowledgement.message_extension) == ("1.2.3.4.5", "17")
    assert acknowledgement.reason == reason


def test_an_acknowledgement_of_what_could_not_be_read():
    answer = iti44.encode_response(None, message_id="1.2.3", creation_time="20240301083016", reason="busy")
    schemas.assert_valid(answer)
    acknowledgement = iti44.decode_response(ITI44_ADD, answer)
    assert (acknowledgement.accepted, acknowledgement.message_root) == (False, "")


@pytest.mark.parametrize("number", ["plain", "a|b", "a^b&c~d", "back\\slash", "\\F\\", "\\E\\S\\"])
def test_delimiters_in_an_identifier_are_escaped(number):
    patient_id = patient_id_of(number, AUTHORITY)
    assert identifier_of(patient_id) == (number, AUTHORITY)
    assert patient_id.count("^") == 3
    element = message(ITI44_ADD, Added((patient_id,)))
    assert f'extension="{number}"'.replace("&", "&amp;") in etree.tostring(element).decode()
    assert iti44.decode_request(ITI44_ADD, element).message.feed == Added((patient_id,))


def _without(element: etree._Element, *path: str) -> etree._Element:
    found = element.find("/".join(f"{{{uids.NS_HL7V3}}}{step}" for step in path))
    found.getparent().remove(found)
    return element


EVENT = ("controlActProcess", "subject", "registrationEvent")


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        (("id",), "no id/@root"),
        (("controlActProcess",), "0 registration events"),
        ((*EVENT, "subject1"), "the patient has no id"),
        ((*EVENT, "subject1", "patient", "id"), "the patient has no id"),
        ((*EVENT, "replacementOf"), "replacementOf has no id"),
    ],
)
def test_what_is_missing(path, reason):
    element = _without(message(ITI44_MERGE, Merged((SURVIVOR,), (SUBSUMED,))), *path)
    with pytest.raises(MalformedMessage, match=reason):
        iti44.decode_request(ITI44_MERGE, element)


def test_an_identifier_that_is_no_oid_is_passed_over():
    element = message(ITI44_ADD, Added((SURVIVOR, SUBSUMED)))
    first = element.find("/".join(f"{{{uids.NS_HL7V3}}}{step}" for step in (*EVENT, "subject1", "patient", "id")))
    first.set("root", "DAA5CA20-4D3F-4B4C-A9E5-9A3FBCB6B4D5")
    assert iti44.decode_request(ITI44_ADD, element).message.feed == Added((SUBSUMED,))


def test_a_message_with_identifiers_without_end_is_refused():
    many = tuple(f"{number}^^^&1.2.3&ISO" for number in range(200))
    with pytest.raises(MalformedMessage, match="more than"):
        iti44.decode_request(ITI44_ADD, message(ITI44_ADD, Added(many)))


@pytest.mark.parametrize(
    "break_it",
    [
        lambda element: element.attrib.pop("ITSVersion"),
        lambda element: element.remove(element.find("{*}creationTime")),
        lambda element: element.remove(element.find("{*}controlActProcess")),
        lambda element: element.append(element.find("{*}id")),
    ],
    ids=["version", "time", "act", "order"],
)
def test_what_the_published_schema_refuses_ours_refuses(break_it):
    element = message(*MESSAGES[0])
    break_it(element)
    assert not schemas.ours().validate(element)
    published = schemas.published_hl7v3("PRPA_IN201301UV02")
    assert published is None or not published.validate(element)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_message_of_zeep_by_the_published_wsdl_is_read(tmp_path):
    published = Path(shared_path("schemas/hl7v3/iti44-xds.wsdl"))
    wsdl = tmp_path / published.name
    # zeep takes no xsd:include in a schema without a namespace of its own; what that file holds are imports.
    imports = "".join(
        f'<xsd:import namespace="{uids.NS_HL7V3}" schemaLocation="{location}"/>'
        for location in sorted((published.parent / "schema/HL7V3/NE2008/multicacheschemas").glob("*_IN*.xsd"))
    )
    wsdl.write_text(published.read_text("utf-8").replace('<xsd:include schemaLocation="iti44.xsd"/>', imports))
    client = zeep.Client(str(wsdl))
    device = {"classCode": "DEV", "determinerCode": "INSTANCE", "id": [{"root": SENDER}]}
    patient = {
        "classCode": "PAT",
        "id": [{"root": AUTHORITY, "extension": "test-1"}],
        "statusCode": {"code": "active"},
        "patientPerson": {"classCode": "PSN", "determinerCode": "INSTANCE", "name": [{}]},
    }
    sent = client.create_message(
        client.service,
        "DocumentRegistry_PRPA_IN201302UV02",
        ITSVersion="XML_1.0",
        id={"root": "1.2.3.4.5", "extension": "18"},
        creationTime={"value": "20240301083015"},
        interactionId={"root": iti44.INTERACTIONS, "extension": "PRPA_IN201302UV02"},
        processingCode={"code": "P"},
        processingModeCode={"code": "T"},
        acceptAckCode={"code": "AL"},
        receiver=[{"typeCode": "RCV", "device": device}],
        sender={"typeCode": "SND", "device": device},
        controlActProcess={
            "classCode": "CACT",
            "moodCode": "EVN",
            "subject": [
                {
                    "typeCode": "SUBJ",
                    "registrationEvent": {
                        "classCode": "REG",
                        "moodCode": "EVN",
                        "statusCode": {"code": "active"},
                        "subject1": {"typeCode": "SBJ", "patient": patient},
                        "custodian": {
                            "typeCode": "CST",
                            "assignedEntity": {"classCode": "ASSIGNED", "id": [{"root": SENDER}]},
                        },
                    },
                }
            ],
        },
    )
    (body,) = etree.fromstring(etree.tostring(sent)).find("{*}Body")
    schemas.assert_valid(body)
    assert iti44.decode_request(ITI44_REVISE, body).message.feed == Revised((SURVIVOR,))
