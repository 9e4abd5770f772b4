"""Command sets against pynetdicom's own codec, and the order in which commands and data sets may come."""

from __future__ import annotations

import struct
from io import BytesIO
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pynetdicom.dsutils import decode, encode

from xca_imaging.errors import DicomProtocolError
from xca_imaging.wire import dimse, pdu

CT = "1.2.840.10008.5.1.4.1.1.2"
VERIFICATION = "1.2.840.10008.1.1"
STORE = dimse.CStoreRequest(7, CT, "1.2.3.4", True, 2, "XCAI", 65535)


def command_set(**elements: object) -> bytes:
    """Return a command set as pynetdicom encodes it."""
    dataset = Dataset()
    for keyword, element in elements.items():
        setattr(dataset, keyword, element)
    body = encode(dataset, True, True)
    assert body is not None
    return struct.pack("<HHLL", 0, 0, 4, len(body)) + body


def decoded_by_pydicom(data: bytes) -> Dataset:
    return decode(BytesIO(data), True, True)


def fragment(data: bytes, *, context_id: int = 1, command: bool = True, last: bool = True) -> pdu.Fragment:
    return pdu.Fragment(context_id, command, last, memoryview(data))


# --- command sets ---------------------------------------------------------------------------------------------------


def test_c_store_request_is_read_as_pynetdicom_writes_it() -> None:
    data = command_set(
        AffectedSOPClassUID=CT,
        CommandField=1,
        MessageID=7,
        Priority=2,
        CommandDataSetType=0,
        AffectedSOPInstanceUID="1.2.3.4",
        MoveOriginatorApplicationEntityTitle="XCAI",
        MoveOriginatorMessageID=65535,
    )
    assert dimse.decode_command(data) == STORE
    assert dimse.encode_c_store_request(STORE) == data


def test_move_originator_and_priority_are_optional() -> None:
    data = command_set(AffectedSOPClassUID=CT, CommandField=1, MessageID=1, CommandDataSetType=1)
    assert dimse.decode_command(data) == dimse.CStoreRequest(1, CT, "", True, 0, None, None)


def test_c_echo_request_both_ways() -> None:
    request = dimse.CEchoRequest(3, VERIFICATION)
    data = dimse.encode_c_echo_request(request)
    assert data == command_set(
        AffectedSOPClassUID=VERIFICATION, CommandField=0x30, MessageID=3, CommandDataSetType=0x101
    )
    assert dimse.decode_command(data) == request


def test_response_is_read_by_pydicom_as_it_was_written() -> None:
    data = dimse.encode_response(dimse.C_STORE_RQ, 7, dimse.STATUS_OUT_OF_RESOURCES, CT, "1.2.3.45")
    dataset = decoded_by_pydicom(data)
    assert dataset.CommandGroupLength == len(data) - 12
    assert (dataset.CommandField, dataset.MessageIDBeingRespondedTo, dataset.Status) == (0x8001, 7, 0xA700)
    assert (dataset.AffectedSOPClassUID, dataset.AffectedSOPInstanceUID) == (CT, "1.2.3.45")
    assert dataset.CommandDataSetType == 0x0101
    assert dimse.decode_command(data) == dimse.Response(0x8001, 7, 0xA700, CT, "1.2.3.45", False)


@pytest.mark.parametrize("field", [dimse.C_FIND_RQ, dimse.C_GET_RQ, dimse.C_MOVE_RQ])
def test_query_request_is_written_as_pynetdicom_writes_it(field: int) -> None:
    destination = {"MoveDestination": "XCAI"} if field == dimse.C_MOVE_RQ else {}
    data = dimse.encode_query_request(field, 7, CT, priority=1, move_destination=destination.get("MoveDestination", ""))
    assert data == command_set(
        AffectedSOPClassUID=CT, CommandField=field, MessageID=7, **destination, Priority=1, CommandDataSetType=0
    )


def test_cancel_request_both_ways() -> None:
    data = dimse.encode_c_cancel_request(7)
    assert data == command_set(CommandField=0x0FFF, MessageIDBeingRespondedTo=7, CommandDataSetType=0x0101)
    assert dimse.decode_command(data) == dimse.CCancelRequest(7)


def test_counters_and_comment_of_a_response_are_read() -> None:
    data = command_set(
        CommandField=0x8021,
        MessageIDBeingRespondedTo=7,
        CommandDataSetType=0,
        Status=0xB000,
        ErrorComment="two lost",
        NumberOfRemainingSuboperations=0,
        NumberOfCompletedSuboperations=300,
        NumberOfFailedSuboperations=2,
    )
    assert dimse.decode_command(data) == dimse.Response(0x8021, 7, 0xB000, "", "", True, "two lost", 0, 300, 2, None)


def test_requests_of_other_services() -> None:
    find = command_set(AffectedSOPClassUID="1.2.3", CommandField=0x20, MessageID=9, Priority=0, CommandDataSetType=1)
    assert dimse.decode_command(find) == dimse.OtherRequest(0x20, 9, "1.2.3", "", True)
    n_set = command_set(
        RequestedSOPClassUID="1.2.3",
        CommandField=0x120,
        MessageID=9,
        CommandDataSetType=1,
        RequestedSOPInstanceUID="1.2.3.4",
    )
    assert dimse.decode_command(n_set) == dimse.OtherRequest(0x120, 9, "1.2.3", "1.2.3.4", True)
    cancel = command_set(CommandField=0x0FFF, MessageIDBeingRespondedTo=9, CommandDataSetType=0x101)
    assert dimse.decode_command(cancel) == dimse.CCancelRequest(9)


BROKEN = {
    "empty": b"",
    "no_command_field": command_set(MessageID=1, CommandDataSetType=0),
    "no_message_id": command_set(CommandField=1, CommandDataSetType=0),
    "cut_in_a_header": command_set(CommandField=1, MessageID=1)[:-5],
    "cut_in_a_value": command_set(CommandField=1, MessageID=1)[:-1],
    "length_of_4_gb": struct.pack("<HHL", 0, 0x1000, 0xFFFFFFFF),
    "group_8": struct.pack("<HHL", 8, 0x0018, 0),
    "us_of_4": struct.pack("<HHLL", 0, 0x0100, 4, 1),
    "response_without_status": command_set(CommandField=0x8001, MessageIDBeingRespondedTo=1),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_command_set(name: str) -> None:
    with pytest.raises(DicomProtocolError, match=r"PS3\.7"):
        dimse.decode_command(BROKEN[name])


@given(st.binary(max_size=300))
def test_noise_is_never_more_than_a_protocol_error(noise: bytes) -> None:
    for data in (noise, dimse.encode_c_store_request(STORE)[: len(noise)] + noise):
        try:
            dimse.decode_command(data)
        except DicomProtocolError:
            continue


@given(st.booleans(), st.lists(st.tuples(st.integers(0, 255), st.integers(0, 255)), max_size=3))
def test_the_usual_spelling_reads_like_any_other(is_moved: bool, changes: list[tuple[int, int]]) -> None:
    usual = STORE if is_moved else STORE._replace(move_originator_ae_title=None, move_originator_message_id=None)
    data = bytearray(dimse.encode_c_store_request(usual))
    for position, byte in changes:
        data[position % len(data)] = byte

    def read() -> dimse.Command | str:
        try:
            return dimse.decode_command(bytes(data))
        except DicomProtocolError as error:
            return str(error)

    with mock.patch.object(dimse, "_decode_store", return_value=None):
        element_by_element = read()
    assert read() == element_by_element


@given(st.integers(0, 255), st.integers(0, 255))
def test_one_wrong_byte_is_never_more_than_a_protocol_error(position: int, byte: int) -> None:
    data = bytearray(dimse.encode_c_store_request(STORE))
    data[position % len(data)] = byte
    try:
        dimse.decode_command(bytes(data))
    except DicomProtocolError:
        return


@given(
    st.builds(
        dimse.CStoreRequest,
        st.integers(0, 0xFFFF),
        st.from_regex(r"\A[0-9.]{1,64}\Z"),
        st.from_regex(r"\A[0-9.]{1,64}\Z"),
        st.booleans(),
        st.integers(0, 2),
        st.none() | st.from_regex(r"\A[A-Z]{1,16}\Z"),
        st.none() | st.integers(0, 0xFFFF),
    )
)
def test_c_store_request_written_and_read_is_equal(request_: dimse.CStoreRequest) -> None:
    assert dimse.decode_command(dimse.encode_c_store_request(request_)) == request_


# --- messages -------------------------------------------------------------------------------------------------------


def test_command_in_one_byte_fragments() -> None:
    data = dimse.encode_c_store_request(STORE)
    reader = dimse.MessageReader()
    results = [reader.receive(fragment(data[n : n + 1], last=n == len(data) - 1)) for n in range(len(data))]
    assert results[:-1] == [None] * (len(data) - 1)
    assert results[-1] == STORE
    assert not reader.is_idle
    assert reader.receive(fragment(b"data", command=False, last=False)) is None
    assert not reader.is_idle
    assert reader.receive(fragment(b"", command=False)) is None
    assert reader.is_idle


def test_data_set_without_command() -> None:
    with pytest.raises(DicomProtocolError, match="without its command") as caught:
        dimse.MessageReader().receive(fragment(b"x", command=False))
    assert caught.value.abort_reason == pdu.ABORT_UNEXPECTED_PDU


def test_data_set_after_a_command_that_has_none() -> None:
    reader = dimse.MessageReader()
    reader.receive(fragment(dimse.encode_c_echo_request(dimse.CEchoRequest(1, VERIFICATION))))
    with pytest.raises(DicomProtocolError, match="without its command"):
        reader.receive(fragment(b"x", command=False))


def test_data_set_in_another_context() -> None:
    reader = dimse.MessageReader()
    reader.receive(fragment(dimse.encode_c_store_request(STORE)))
    with pytest.raises(DicomProtocolError, match="context 3"):
        reader.receive(fragment(b"x", command=False, context_id=3))


def test_command_amidst_a_data_set() -> None:
    reader = dimse.MessageReader()
    reader.receive(fragment(dimse.encode_c_store_request(STORE)))
    with pytest.raises(DicomProtocolError, match="amidst"):
        reader.receive(fragment(dimse.encode_c_store_request(STORE)))


def test_command_fragments_in_two_contexts() -> None:
    reader = dimse.MessageReader()
    reader.receive(fragment(b"abc", last=False))
    with pytest.raises(DicomProtocolError, match="amidst"):
        reader.receive(fragment(b"abc", last=False, context_id=3))


def test_endless_command_is_bounded() -> None:
    reader = dimse.MessageReader(max_command_length=1000)
    for _ in range(100):
        assert reader.receive(fragment(bytes(10), last=False)) is None
    with pytest.raises(DicomProtocolError, match="1000"):
        reader.receive(fragment(b"x", last=False))
