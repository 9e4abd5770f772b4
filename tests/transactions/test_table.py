"""The table of transactions, and what is refused because it is another transaction's body."""

from __future__ import annotations

from importlib import import_module

import pytest
from lxml import etree

from xca_imaging import uids
from xca_imaging.errors import InvalidAddressingHeader, MalformedMessage
from xca_imaging.transactions import table
from xca_imaging.wire import xml

TRANSACTIONS = {
    transaction.name: transaction
    for transaction in table.TRANSACTIONS
    if transaction.number != "ITI-44"  # three messages in one module: see test_iti44.py
}


def test_every_action_leads_to_one_transaction():
    assert len(table.BY_ACTION) == len(table.TRANSACTIONS) - 1  # RAD-68 is ITI-41 on the wire
    for action, transaction in table.BY_ACTION.items():
        assert transaction.request_action == action


def test_the_answer_of_rad69_has_the_action_of_iti43():
    assert table.RAD69.response_action == table.ITI43.response_action == "urn:ihe:iti:2007:RetrieveDocumentSetResponse"


def test_packaging():
    assert {name for name, transaction in TRANSACTIONS.items() if not transaction.mtom} == {
        "iti18",
        "iti38",
        "iti42",
        "iti51",
        "iti57",
        "iti61",
        "iti62",
        "iti86",
    }


@pytest.mark.parametrize("name", TRANSACTIONS)
def test_each_has_a_module_with_both_directions(name):
    module = import_module(f"xca_imaging.transactions.{name}")
    assert module.TRANSACTION is TRANSACTIONS[name]
    for function in ("decode_request", "encode_request", "decode_response", "encode_response"):
        assert callable(getattr(module, function))


@pytest.mark.parametrize("name", TRANSACTIONS)
@pytest.mark.parametrize(
    "body",
    [
        None,
        etree.Element("RetrieveDocumentSetRequest"),
        etree.Element(xml.qname(uids.NS_XDSI, "RetrieveDocumentSetRequest")),
        etree.Element(xml.qname(uids.NS_RIM, "RegistryObjectList")),
    ],
    ids=["nothing", "no namespace", "another namespace", "another element"],
)
def test_another_body(name, body):
    module = import_module(f"xca_imaging.transactions.{name}")
    with pytest.raises(InvalidAddressingHeader) as raised:
        module.decode_request(body)
    assert (raised.value.header, raised.value.reason) == ("Action", "ActionMismatch")
    with pytest.raises(MalformedMessage, match="is answered by"):
        module.decode_response(body)


@pytest.mark.parametrize("name", TRANSACTIONS)
def test_an_answer_is_no_request(name):
    module = import_module(f"xca_imaging.transactions.{name}")
    with pytest.raises(InvalidAddressingHeader):
        module.decode_request(etree.Element(TRANSACTIONS[name].response_root))
