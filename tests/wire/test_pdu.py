"""PDUs: layouts against pynetdicom's own codec, the reader however the bytes are cut, and wild lengths."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pynetdicom import pdu as peer
from pynetdicom.pdu_primitives import A_ASSOCIATE, A_P_ABORT

from tests.support.feeding import feed, feed_bytewise, feed_whole, pieces
from xca_imaging import uids
from xca_imaging.errors import DicomProtocolError
from xca_imaging.wire import pdu

CT = "1.2.840.10008.5.1.4.1.1.2"
PRIVATE = "2.25.7777"

REQUEST = pdu.AssociateRQ(
    called_ae_title="XCAI",
    calling_ae_title="MODALITY",
    application_context=uids.APPLICATION_CONTEXT,
    presentation_contexts=(
        pdu.PresentationContext(1, CT, (uids.EXPLICIT_VR_LITTLE_ENDIAN, uids.IMPLICIT_VR_LITTLE_ENDIAN)),
        pdu.PresentationContext(255, PRIVATE, (uids.IMPLICIT_VR_LITTLE_ENDIAN,)),
    ),
    user_information=pdu.UserInformation(
        maximum_length=16384,
        implementation_class_uid="2.25.1",
        implementation_version_name="PEER_1",
        role_selections=(pdu.RoleSelection(CT, scu_role=True, scp_role=True),),
        asynchronous_operations_window=(0, 0),
    ),
)
ACCEPT = pdu.AssociateAC(
    called_ae_title="XCAI",
    calling_ae_title="MODALITY",
    application_context=uids.APPLICATION_CONTEXT,
    presentation_contexts=(
        pdu.PresentationContextResult(1, pdu.CONTEXT_ACCEPTED, uids.EXPLICIT_VR_LITTLE_ENDIAN),
        pdu.PresentationContextResult(255, pdu.CONTEXT_TRANSFER_SYNTAXES_NOT_SUPPORTED, uids.IMPLICIT_VR_LITTLE_ENDIAN),
    ),
    user_information=pdu.UserInformation(131072, "2.25.2", "XCA"),
)
SMALL = (pdu.AssociateRJ(2, 3, 2), pdu.ReleaseRQ(), pdu.ReleaseRP(), pdu.Abort(2, pdu.ABORT_UNEXPECTED_PDU))


class Reading:
    """`pdu.Reader` as the feeding helpers want it: bytes in."""

    def __init__(self, **limits: int) -> None:
        self.reader = pdu.Reader(**limits)

    def receive(self, data: bytes) -> Iterable[pdu.Pdu | pdu.Fragment]:
        return self.reader.receive(memoryview(data))


def keep(event: Any) -> Any:
    """Copy a fragment's bytes: its view is gone with the chunk."""
    return event._replace(data=bytes(event.data)) if isinstance(event, pdu.Fragment) else event


def joined(events: Iterable[Any]) -> list[Any]:
    """Put the pieces of each command set and data set together, which is what every cut must agree upon."""
    result: list[Any] = []
    is_open = False
    for event in events:
        if isinstance(event, pdu.Fragment) and is_open:
            before = result.pop()
            assert (before.context_id, before.is_command) == (event.context_id, event.is_command)
            event = event._replace(data=before.data + event.data)
        result.append(event)
        is_open = isinstance(event, pdu.Fragment) and not event.is_last
    return result


def item(item_type: int, content: bytes) -> bytes:
    return struct.pack(">BxH", item_type, len(content)) + content


def header(pdu_type: int, content: bytes) -> bytes:
    return struct.pack(">BxL", pdu_type, len(content)) + content


def value(context_id: int, control: int, data: bytes) -> bytes:
    return struct.pack(">LBB", len(data) + 2, context_id, control) + data


# --- against pynetdicom ---------------------------------------------------------------------------------------------


def test_associate_rq_is_read_by_pynetdicom_as_it_was_written() -> None:
    theirs = peer.A_ASSOCIATE_RQ()
    theirs.decode(REQUEST.encode())
    assert theirs.called_ae_title.strip() == "XCAI"
    assert theirs.calling_ae_title.strip() == "MODALITY"
    assert theirs.application_context_name == uids.APPLICATION_CONTEXT
    contexts = [(c.context_id, c.abstract_syntax, tuple(c.transfer_syntax)) for c in theirs.presentation_context]
    assert contexts == [(c.context_id, c.abstract_syntax, c.transfer_syntaxes) for c in REQUEST.presentation_contexts]
    assert theirs.user_information.maximum_length == 16384
    assert theirs.user_information.role_selection[CT].scp_role == 1
    assert theirs.user_information.async_ops_window.maximum_number_operations_invoked == 0
    assert theirs.encode() == REQUEST.encode()


def test_associate_ac_is_read_by_pynetdicom_as_it_was_written() -> None:
    theirs = peer.A_ASSOCIATE_AC()
    theirs.decode(ACCEPT.encode())
    results = [(c.context_id, c.result, c.transfer_syntax) for c in theirs.presentation_context]
    assert results[0] == (1, 0, uids.EXPLICIT_VR_LITTLE_ENDIAN)
    assert results[1][:2] == (255, 4)
    assert theirs.user_information.implementation_version_name == "XCA"


@pytest.mark.parametrize("ours", SMALL, ids=lambda each: type(each).__name__)
def test_small_pdus_have_the_bytes_of_pynetdicom(ours: pdu.Pdu) -> None:
    class_of = {3: peer.A_ASSOCIATE_RJ, 5: peer.A_RELEASE_RQ, 6: peer.A_RELEASE_RP, 7: peer.A_ABORT_RQ}
    theirs = class_of[ours.pdu_type]()
    theirs.decode(ours.encode())
    assert theirs.encode() == ours.encode()


def test_what_pynetdicom_writes_is_read() -> None:
    primitive = A_ASSOCIATE()
    primitive.result, primitive.result_source, primitive.diagnostic = 1, 1, 7
    rejection = peer.A_ASSOCIATE_RJ()
    rejection.from_primitive(primitive)
    abort = A_P_ABORT()
    abort.provider_reason = 6
    aborting = peer.A_ABORT_RQ()
    aborting.from_primitive(abort)
    assert feed_whole(Reading(), rejection.encode() + aborting.encode()) == [pdu.AssociateRJ(1, 1, 7), pdu.Abort(2, 6)]


# --- the reader -----------------------------------------------------------------------------------------------------

STREAM = (
    REQUEST.encode()
    + ACCEPT.encode()
    # one PDU: a whole command and the first fragment of a data set; another with an empty last fragment
    + header(0x04, value(1, 3, b"command") + value(1, 0, bytes(range(200))))
    + header(0x04, value(1, 0, b"middle"))
    + header(0x04, value(1, 2, b""))
    + b"".join(each.encode() for each in SMALL)
)
EVENTS = [
    REQUEST,
    ACCEPT,
    pdu.Fragment(1, True, True, b"command"),  # type: ignore[arg-type]
    pdu.Fragment(1, False, True, bytes(range(200)) + b"middle"),  # type: ignore[arg-type]
    *SMALL,
]


def test_whole_bytewise_and_with_trailing_bytes_are_the_same() -> None:
    assert joined(feed_whole(Reading(), STREAM, keep)) == EVENTS
    assert joined(feed_bytewise(Reading(), STREAM, keep)) == EVENTS
    assert joined(feed_whole(Reading(), STREAM + pdu.ReleaseRQ().encode()[:7], keep)) == EVENTS


@given(st.lists(st.integers(1, 300), min_size=1, max_size=8))
def test_any_cut_is_the_same(sizes: list[int]) -> None:
    assert joined(feed(Reading(), pieces(STREAM, sizes), keep)) == EVENTS


class ReadingValues(Reading):
    """A reader that is asked for what continues a data set first, as the receiver does."""

    def receive(self, data: bytes) -> Iterable[pdu.Pdu | pdu.Fragment]:
        view = memoryview(data)
        value = self.reader.receive_value(view, frozenset({1, 3}))
        return self.reader.receive(view) if value is None else [value]


@given(st.lists(st.integers(1, 300), min_size=1, max_size=8))
def test_any_cut_is_the_same_for_values(sizes: list[int]) -> None:
    assert joined(feed(ReadingValues(), pieces(STREAM, sizes), keep)) == EVENTS


@given(st.lists(st.integers(1, 120), min_size=1, max_size=30), st.integers(0, 3), st.integers(0, 14))
def test_reads_that_end_with_the_next_header_are_the_same(lengths: list[int], control: int, beyond: int) -> None:
    """Each read takes the value that has begun and `beyond` bytes more, as far as there are any."""
    stream = b"".join(
        header(0x04, value(1, control if number % 7 == 6 else 0, bytes([number]) * length))
        for number, length in enumerate(lengths)
    )
    plain = [keep(each) for each in pdu.Reader().receive(memoryview(stream))]
    reading, position = ReadingValues(), 0
    events: list[Any] = []
    while position < len(stream):
        size = reading.reader.data_left + beyond or 12
        events += [keep(each) for each in reading.receive(stream[position : position + size])]
        position += size

    def content(of: list[Any]) -> tuple[bytes, list[bool]]:
        return b"".join(each.data for each in of), [each.is_command for each in of if each.is_last]

    assert content(events) == content(plain)


@pytest.mark.parametrize(
    ("following", "contexts"),
    [
        (header(0x04, value(1, 1, b"command")), {1}),
        (header(0x04, value(3, 0, b"other context")), {1, 3}),
        (header(0x07, bytes(6)), {1}),
        (header(0x04, value(1, 0, b"")), {1}),
        (header(0x04, value(1, 0, b"one") + value(1, 0, b"two")), {1}),
        (header(0x04, value(1, 0, b"data")), {3}),
    ],
)
def test_what_is_not_more_of_a_data_set_is_left_to_the_reader(following: bytes, contexts: set[int]) -> None:
    reader = pdu.Reader()
    begun = header(0x04, value(1, 0, b"abcdef"))
    list(reader.receive(memoryview(begun[:14])))
    assert reader.receive_value(memoryview(begun[14:] + following[:12]), frozenset(contexts)) is None
    (fragment, *_) = reader.receive(memoryview(begun[14:]))
    assert keep(fragment) == pdu.Fragment(1, False, False, b"cdef")  # type: ignore[arg-type]


def test_data_is_handed_on_before_its_pdu_is_whole_and_without_copy() -> None:
    data = bytearray(header(0x04, value(3, 2, bytes(1000)))[:500])
    (fragment,) = pdu.Reader().receive(memoryview(data))
    assert isinstance(fragment, pdu.Fragment)
    assert (fragment.context_id, fragment.is_last, len(fragment.data)) == (3, False, 488)
    assert fragment.data.obj is data


@pytest.mark.parametrize("padding", [b"\0", b" ", b"\0 "])
def test_ae_titles_are_stripped_of_nul_and_space(padding: bytes) -> None:
    encoded = bytearray(REQUEST.encode())
    encoded[10:26] = (b"XCAI" + padding * 16)[:16]
    encoded[26:42] = (b"  MODALITY" + padding * 16)[:16]
    assert feed_whole(Reading(), bytes(encoded)) == [REQUEST]


def test_unknown_items_and_large_user_information_are_skipped() -> None:
    identity = item(0x58, struct.pack(">BBH", 5, 1, 9000) + bytes(9000) + struct.pack(">H", 0))  # SAML, PS3.7 D.3.3.7
    extended = item(0x56, struct.pack(">H", len(CT)) + CT.encode() + b"\1\2\3")  # PS3.7 D.3.3.5
    common = item(0x57, struct.pack(">H", len(CT)) + CT.encode() + struct.pack(">H", 0))  # PS3.7 D.3.3.6
    information = REQUEST.user_information.encode()[4:] + identity + extended + common + item(0xEE, b"?")
    body = REQUEST.encode()[6 : -len(REQUEST.user_information.encode())] + item(0xDD, b"??") + item(0x50, information)
    assert feed_bytewise(Reading(), header(0x01, body)) == [REQUEST]


def test_128_contexts_of_40_syntaxes_fit() -> None:
    syntaxes = tuple(f"1.2.840.10008.1.2.4.{n}.1234567890.1234567890.1234567890" for n in range(40))
    contexts = tuple(pdu.PresentationContext(n, f"{CT}.{n}", syntaxes) for n in range(1, 256, 2))
    request = pdu.AssociateRQ("A", "B", uids.APPLICATION_CONTEXT, contexts, pdu.UserInformation(0, "1.2"))
    assert feed_whole(Reading(), request.encode()) == [request]


# --- what breaks PS3.8 ----------------------------------------------------------------------------------------------


def associate(*items: bytes, pdu_type: int = 0x01) -> bytes:
    return header(pdu_type, struct.pack(">H2x16s16s32x", 1, b"A", b"B") + b"".join(items))


BROKEN = {
    "unknown_pdu_type": (header(0x08, b"abcd"), pdu.ABORT_UNRECOGNIZED_PDU),
    "http_request": (b"GET / HTTP/1.1\r\n\r\n", pdu.ABORT_UNRECOGNIZED_PDU),
    "p_data_of_4_gb": (struct.pack(">BxL", 4, 0xFFFFFFFF), pdu.ABORT_INVALID_PDU_PARAMETER),
    "p_data_over_the_limit": (struct.pack(">BxL", 4, 131072 + 7), pdu.ABORT_INVALID_PDU_PARAMETER),
    "p_data_without_value": (header(4, b""), pdu.ABORT_INVALID_PDU_PARAMETER),
    "value_longer_than_its_pdu": (
        header(4, struct.pack(">LBB", 100, 1, 2) + b"abc"),
        pdu.ABORT_INVALID_PDU_PARAMETER,
    ),
    "value_of_4_gb": (header(4, struct.pack(">LBB", 0xFFFFFFFF, 1, 2) + b"abc"), pdu.ABORT_INVALID_PDU_PARAMETER),
    "value_of_1": (header(4, struct.pack(">LBB", 1, 1, 2)), pdu.ABORT_INVALID_PDU_PARAMETER),
    "rest_shorter_than_a_value_header": (header(4, value(1, 2, b"ab") + b"xyz"), pdu.ABORT_INVALID_PDU_PARAMETER),
    "associate_of_4_gb": (struct.pack(">BxL", 1, 0xFFFFFFFF), pdu.ABORT_INVALID_PDU_PARAMETER),
    "associate_cut_short": (header(1, bytes(60)), pdu.ABORT_INVALID_PDU_PARAMETER),
    "accept_cut_short": (header(2, bytes(60)), pdu.ABORT_INVALID_PDU_PARAMETER),
    "release_of_100": (header(5, bytes(100)), pdu.ABORT_INVALID_PDU_PARAMETER),
    "abort_of_2": (header(7, bytes(2)), pdu.ABORT_INVALID_PDU_PARAMETER),
    "item_longer_than_its_pdu": (associate(struct.pack(">BxH", 0x10, 500)), pdu.ABORT_INVALID_PDU_PARAMETER),
    "item_header_cut_short": (associate(b"\x10\0"), pdu.ABORT_INVALID_PDU_PARAMETER),
    "context_without_id": (associate(item(0x20, b"\1")), pdu.ABORT_INVALID_PDU_PARAMETER),
    "context_result_cut_short": (associate(item(0x21, b"\1"), pdu_type=2), pdu.ABORT_INVALID_PDU_PARAMETER),
    "context_id_even": (associate(item(0x20, b"\2\0\0\0")), pdu.ABORT_INVALID_PDU_PARAMETER),
    "context_id_twice": (associate(item(0x20, b"\1\0\0\0"), item(0x20, b"\1\0\0\0")), pdu.ABORT_INVALID_PDU_PARAMETER),
    "maximum_length_of_2": (associate(item(0x50, item(0x51, b"\0\1"))), pdu.ABORT_INVALID_PDU_PARAMETER),
    "role_longer_than_its_item": (
        associate(item(0x50, item(0x54, b"\1\0abcd"))),
        pdu.ABORT_INVALID_PDU_PARAMETER,
    ),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("way", [feed_whole, feed_bytewise])
def test_broken(name: str, way: Any) -> None:
    data, reason = BROKEN[name]
    with pytest.raises(DicomProtocolError) as caught:
        way(Reading(), data)
    assert caught.value.abort_reason == reason


def test_limits_are_arguments() -> None:
    with pytest.raises(DicomProtocolError, match="limit"):
        feed_whole(Reading(max_associate_length=100), REQUEST.encode())
    with pytest.raises(DicomProtocolError, match="limit"):
        feed_whole(Reading(max_pdu_length=100), header(4, value(1, 2, bytes(101))))


@given(st.binary(max_size=400), st.lists(st.integers(1, 50), min_size=1, max_size=4))
def test_noise_is_never_more_than_a_protocol_error(noise: bytes, sizes: list[int]) -> None:
    for data in (
        noise,
        header(noise[0] % 9 if noise else 1, noise),
        associate(noise),
        header(4, value(1, 3, noise)[1:]),
    ):
        try:
            whole = joined(feed_whole(Reading(), data, keep))
        except DicomProtocolError:
            with pytest.raises(DicomProtocolError):
                feed(Reading(), pieces(data, sizes), keep)
        else:
            assert joined(feed(Reading(), pieces(data, sizes), keep)) == whole


@given(st.integers(0, len(STREAM) - 1), st.integers(0, 255))
def test_one_wrong_byte_is_never_more_than_a_protocol_error(position: int, byte: int) -> None:
    damaged = bytearray(STREAM)
    damaged[position] = byte
    with contextlib.suppress(DicomProtocolError):
        feed_whole(Reading(), bytes(damaged), keep)


# --- writing P-DATA-TF ----------------------------------------------------------------------------------------------


@given(st.binary(max_size=3000), st.sampled_from([0, 1, 12, 16, 100, 4096]), st.booleans())
def test_p_data_keeps_to_the_peers_maximum_length(data: bytes, max_length: int, is_command: bool) -> None:
    encoded = pdu.encode_p_data(7, data, is_command=is_command, max_length=max_length)
    (whole,) = joined(feed_whole(Reading(), encoded, keep)) if data else [pdu.Fragment(7, is_command, True, data)]
    assert whole == (7, is_command, True, data)
    position = 0
    while position < len(encoded):
        theirs = peer.P_DATA_TF()
        length = int.from_bytes(encoded[position + 2 : position + 6], "big")
        theirs.decode(encoded[position : position + 6 + length])
        assert max_length == 0 or length <= max(max_length, 16)
        position += 6 + length
