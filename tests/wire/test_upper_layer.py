"""Every cell of the state table, the machine that walks it, and negotiation."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pynetdicom.fsm import ACTIONS, TRANSITION_TABLE

from xca_imaging import uids
from xca_imaging.errors import DicomProtocolError, LocalProtocolError
from xca_imaging.wire import pdu, upper_layer
from xca_imaging.wire.upper_layer import TRANSITIONS, Action, Event, Role, State, UpperLayer

CT = "1.2.840.10008.5.1.4.1.1.2"
MR = "1.2.840.10008.5.1.4.1.1.4"
STUDY_ROOT_MOVE = "1.2.840.10008.5.1.4.1.2.2.2"
JPEG_LOSSLESS = "1.2.840.10008.1.2.4.70"
JPEG_BASELINE = "1.2.840.10008.1.2.4.50"
EXPLICIT, IMPLICIT, BIG = uids.EXPLICIT_VR_LITTLE_ENDIAN, uids.IMPLICIT_VR_LITTLE_ENDIAN, uids.EXPLICIT_VR_BIG_ENDIAN


def associate_rq(*contexts: pdu.PresentationContext, **fields: object) -> pdu.AssociateRQ:
    values: dict[str, object] = {
        "called_ae_title": "XCAI",
        "calling_ae_title": "PACS",
        "application_context": uids.APPLICATION_CONTEXT,
        "presentation_contexts": contexts or (pdu.PresentationContext(1, CT, (EXPLICIT,)),),
        "user_information": pdu.UserInformation(16384, "1.2"),
    }
    return pdu.AssociateRQ(**{**values, **fields})  # type: ignore[arg-type]


RECEIVED: dict[Event, bytes] = {
    Event.EVT3: upper_layer.answer_request(associate_rq(), upper_layer.negotiate((), None)).encode(),
    Event.EVT4: pdu.AssociateRJ(1, 1, 1).encode(),
    Event.EVT6: associate_rq().encode(),
    Event.EVT10: pdu.encode_p_data(1, b"data", is_command=False),
    Event.EVT12: pdu.ReleaseRQ().encode(),
    Event.EVT13: pdu.ReleaseRP().encode(),
    Event.EVT16: pdu.Abort(0).encode(),
    Event.EVT19: b"\xff" * 6,
}
SENT = {
    Action.AR_1: 0x05,
    Action.AR_4: 0x06,
    Action.AR_9: 0x06,
    Action.AA_1: 0x07,
    Action.AA_7: 0x07,
    Action.AA_8: 0x07,
}


def machine_in(state: State, role: Role = Role.ACCEPTOR) -> UpperLayer:
    machine = UpperLayer(role)
    machine.state = state
    machine.contexts = frozenset({1})
    return machine


def receive(machine: UpperLayer, data: bytes) -> list[pdu.Pdu | pdu.Fragment]:
    return list(machine.receive(memoryview(data)))


# --- the table ------------------------------------------------------------------------------------------------------


def test_table_is_that_of_the_standard_as_pynetdicom_has_it() -> None:
    ours = {(f"Evt{e}", f"Sta{s}"): action.name.replace("_", "-") for (s, e), (_, action) in TRANSITIONS.items()}
    assert ours == TRANSITION_TABLE
    for (_, event), (state, action) in TRANSITIONS.items():
        theirs = ACTIONS[action.name.replace("_", "-")][2]
        assert f"Sta{state}" in ((theirs,) if isinstance(theirs, str) else theirs), (event, action)


CELLS = [(state, event) for state in State for event in Event]


@pytest.mark.parametrize(("state", "event"), CELLS, ids=lambda each: each.name)
def test_every_cell(state: State, event: Event) -> None:
    machine = machine_in(state)
    machine.artim_running = state in (State.STA2, State.STA13)
    local = b"\x04local" if event in (Event.EVT2, Event.EVT7, Event.EVT8, Event.EVT9) else b""
    if event in RECEIVED:
        indications = receive(machine, RECEIVED[event])
    elif (state, event) not in TRANSITIONS:
        with pytest.raises(LocalProtocolError, match=event.name):
            machine.perform(event, local)
        assert machine.state is state
        assert not machine.take_output()
        return
    else:
        machine.perform(event, local)
        indications = []

    output = machine.take_output()
    if (state, event) not in TRANSITIONS:  # received after the end: nobody cares
        assert (machine.state, indications, output) == (state, [], b"")
        return
    next_state, action = TRANSITIONS[state, event]
    assert machine.state is (State.STA10 if action is Action.AR_8 else next_state)
    assert output == local if local else output[:1] == bytes([SENT[action]] if action in SENT else [])
    assert bool(indications) == ("issue" in action.value and event in RECEIVED and action is not Action.AA_8)
    assert machine.closing == ("close transport" in action.value)
    if "start ARTIM" in action.value:
        assert machine.artim_running
    if "stop ARTIM" in action.value:
        assert not machine.artim_running
    assert bool(machine.aborted) == (event in RECEIVED and action in (Action.AA_1, Action.AA_8))


def test_release_collision_of_the_requestor() -> None:
    machine = machine_in(State.STA7, Role.REQUESTOR)
    assert receive(machine, pdu.ReleaseRQ().encode()) == [pdu.ReleaseRQ()]
    assert machine.state is State.STA9
    machine.perform(Event.EVT14)
    assert machine.take_output() == pdu.ReleaseRP().encode()
    assert receive(machine, pdu.ReleaseRP().encode()) == [pdu.ReleaseRP()]
    assert (machine.state, machine.closing) == (State.STA1, True)


def test_release_collision_of_the_acceptor() -> None:
    machine = machine_in(State.STA6)
    machine.perform(Event.EVT11)
    receive(machine, pdu.ReleaseRQ().encode())
    assert machine.state is State.STA10
    receive(machine, pdu.ReleaseRP().encode())
    assert machine.state is State.STA12
    machine.perform(Event.EVT14)
    assert machine.take_output() == pdu.ReleaseRQ().encode() + pdu.ReleaseRP().encode()
    assert (machine.state, machine.artim_running) == (State.STA13, True)


def test_requestor_and_acceptor_talk_to_each_other() -> None:
    requestor, acceptor = UpperLayer(Role.REQUESTOR), UpperLayer(Role.ACCEPTOR)
    request = associate_rq()
    requestor.perform(Event.EVT1)
    requestor.perform(Event.EVT2, request.encode())
    acceptor.perform(Event.EVT5)
    assert acceptor.artim_running
    assert receive(acceptor, requestor.take_output()) == [request]
    assert not acceptor.artim_running
    negotiation = upper_layer.negotiate(request.presentation_contexts, None)
    answer = upper_layer.answer_request(request, negotiation)
    acceptor.contexts = requestor.contexts = frozenset(negotiation.accepted)
    acceptor.perform(Event.EVT7, answer.encode())
    assert receive(requestor, acceptor.take_output()) == [answer]
    requestor.send_data(pdu.encode_p_data(1, b"abc", is_command=True))
    (fragment,) = receive(acceptor, requestor.take_output())
    assert isinstance(fragment, pdu.Fragment)
    assert bytes(fragment.data) == b"abc"
    requestor.perform(Event.EVT11)
    assert receive(acceptor, requestor.take_output()) == [pdu.ReleaseRQ()]
    acceptor.send_data(pdu.encode_p_data(1, b"late", is_command=True))  # AR-7
    acceptor.perform(Event.EVT14)
    late, released = receive(requestor, acceptor.take_output())
    assert isinstance(late, pdu.Fragment)
    assert released == pdu.ReleaseRP()
    assert requestor.closing
    acceptor.perform(Event.EVT17)
    assert (acceptor.state, requestor.state) == (State.STA1, State.STA1)


def test_sending_data_without_an_association_is_our_own_error() -> None:
    with pytest.raises(LocalProtocolError, match="EVT9"):
        machine_in(State.STA13).send_data(b"")


def test_data_in_a_context_that_is_not_accepted() -> None:
    machine = machine_in(State.STA6)
    assert receive(machine, pdu.encode_p_data(3, b"x", is_command=True)) == []
    assert machine.take_output() == pdu.Abort(2, pdu.ABORT_INVALID_PDU_PARAMETER).encode()
    assert "context 3" in machine.aborted


@pytest.mark.parametrize(
    ("state", "data", "abort"),
    [
        (State.STA6, b"\xff" * 6, pdu.Abort(2, pdu.ABORT_UNRECOGNIZED_PDU)),
        (State.STA6, RECEIVED[Event.EVT6], pdu.Abort(2, pdu.ABORT_UNEXPECTED_PDU)),
        (State.STA2, RECEIVED[Event.EVT10], pdu.Abort(0)),  # AA-1 says service-user
        (State.STA2, b"\xff" * 6, pdu.Abort(0)),
    ],
)
def test_abort_carries_its_reason(state: State, data: bytes, abort: pdu.Abort) -> None:
    machine = machine_in(state)
    receive(machine, data)
    assert machine.take_output() == abort.encode()


def test_nothing_is_read_once_the_position_in_the_stream_is_lost() -> None:
    machine = machine_in(State.STA6)
    machine.refuse(DicomProtocolError("no command set", pdu.ABORT_INVALID_PDU_PARAMETER))
    assert machine.take_output() == pdu.Abort(2, pdu.ABORT_INVALID_PDU_PARAMETER).encode()
    assert receive(machine, b"\xff" * 600) == []
    assert not machine.take_output()


@given(st.lists(st.binary(max_size=80) | st.sampled_from(sorted(RECEIVED.values())), max_size=6))
def test_noise_never_raises(chunks: list[bytes]) -> None:
    for state in (State.STA2, State.STA6, State.STA13):
        machine = machine_in(state)
        for chunk in chunks:
            receive(machine, chunk)
        assert machine.state in State


# --- negotiation ----------------------------------------------------------------------------------------------------


def context(context_id: int, abstract_syntax: str, *syntaxes: str) -> pdu.PresentationContext:
    return pdu.PresentationContext(context_id, abstract_syntax, syntaxes)


def test_one_syntax_per_context_in_our_order() -> None:
    negotiation = upper_layer.negotiate(
        (context(1, CT, IMPLICIT, JPEG_LOSSLESS, EXPLICIT), context(77, MR, IMPLICIT, EXPLICIT)),
        (JPEG_LOSSLESS, EXPLICIT),
    )
    assert negotiation.accepted == {1: JPEG_LOSSLESS, 77: EXPLICIT}
    assert [(r.context_id, r.result) for r in negotiation.results] == [(1, 0), (77, 0)]
    assert not negotiation.refused


def test_none_acceptable_is_result_4_and_told() -> None:
    negotiation = upper_layer.negotiate(
        (context(1, CT, JPEG_BASELINE), context(3, CT, BIG, JPEG_BASELINE), context(5, CT, EXPLICIT)), (EXPLICIT,)
    )
    assert [r.result for r in negotiation.results] == [4, 4, 0]
    assert negotiation.refused == {CT: (JPEG_BASELINE, BIG)}
    assert negotiation.accepted == {5: EXPLICIT}


def test_any_takes_the_house_order_then_what_is_proposed_first() -> None:
    negotiation = upper_layer.negotiate(
        (context(1, CT, BIG, IMPLICIT, EXPLICIT), context(3, CT, JPEG_BASELINE), context(5, CT, "2.25.9", "2.25.8")),
        None,
    )
    assert negotiation.accepted == {1: EXPLICIT, 3: JPEG_BASELINE, 5: "2.25.9"}


def test_context_without_syntax_is_refused() -> None:
    assert upper_layer.negotiate((context(1, CT),), None).results[0].result == 4


def test_verification_is_accepted_whatever_instances_may_come_in() -> None:
    negotiation = upper_layer.negotiate((context(1, uids.VERIFICATION_SOP_CLASS, IMPLICIT),), (JPEG_LOSSLESS,))
    assert negotiation.accepted == {1: IMPLICIT}


@pytest.mark.parametrize(
    "abstract_syntax",
    [
        STUDY_ROOT_MOVE,
        "1.2.840.10008.5.1.4.31",  # Modality Worklist FIND
        "1.2.840.10008.3.1.2.3.3",  # Modality Performed Procedure Step
        "1.2.840.10008.1.20.1",  # Storage Commitment Push Model
        "1.2.840.10008.5.1.1.9",  # Basic Grayscale Print Management Meta
        "1.2.840.10008.5.1.4.34.6.1",  # Unified Procedure Step, Push
        "1.2.840.10008.1.3.10",  # Media Storage Directory
        "",
    ],
)
def test_other_services_are_result_3(abstract_syntax: str) -> None:
    negotiation = upper_layer.negotiate((context(1, abstract_syntax, EXPLICIT),), None)
    assert negotiation.results[0].result == pdu.CONTEXT_ABSTRACT_SYNTAX_NOT_SUPPORTED
    assert not negotiation.refused


@pytest.mark.parametrize(
    "abstract_syntax",
    [
        CT,
        "1.2.840.10008.5.1.4.1.1.1.1.1",  # Digital X-Ray Image, For Processing
        "1.2.840.10008.5.1.4.1.1.9.1",  # Waveform, Trial
        "1.2.840.10008.5.1.1.29",  # Hardcopy Grayscale Image, retired
        "1.2.840.10008.5.1.4.1.1.999.1",  # of a later edition
        "1.3.12.2.1107.5.9.1",  # private: CSA Non-Image
    ],
)
def test_storage_classes_are_accepted_known_or_not(abstract_syntax: str) -> None:
    assert upper_layer.accepts_abstract_syntax(abstract_syntax)


@pytest.mark.parametrize(
    ("fields", "has_room", "rejection"),
    [
        ({}, True, None),
        ({"protocol_version": 2}, True, pdu.AssociateRJ(1, 2, 2)),
        ({"protocol_version": 3}, True, None),
        ({"application_context": "1.2.3"}, True, pdu.AssociateRJ(1, 1, 2)),
        ({"called_ae_title": "xcai"}, True, pdu.AssociateRJ(1, 1, 7)),
        ({"calling_ae_title": "EVE"}, True, pdu.AssociateRJ(1, 1, 3)),
        ({}, False, pdu.AssociateRJ(2, 3, 2)),
        ({"called_ae_title": "OTHER"}, False, pdu.AssociateRJ(1, 1, 7)),
    ],
)
def test_rejections(fields: dict[str, object], has_room: bool, rejection: pdu.AssociateRJ | None) -> None:
    checked = upper_layer.check_request(
        associate_rq(**fields), ae_title="XCAI", calling_ae_titles=frozenset({"PACS"}), has_room=has_room
    )
    assert checked == rejection


def test_answer_names_us_is_scp_only_and_offers_no_window() -> None:
    roles = (
        pdu.RoleSelection(CT, True, True),
        pdu.RoleSelection(MR, False, True),
        pdu.RoleSelection("1.2", True, True),
    )
    request = associate_rq(
        context(1, CT, EXPLICIT),
        context(3, MR, EXPLICIT),
        user_information=pdu.UserInformation(0, "1.2", "", roles, (0, 0)),
    )
    answer = upper_layer.answer_request(request, upper_layer.negotiate(request.presentation_contexts, None))
    information = answer.user_information
    assert information.implementation_version_name == uids.IMPLEMENTATION_VERSION_NAME
    assert information.implementation_class_uid == uids.IMPLEMENTATION_CLASS_UID
    assert information.maximum_length == 131072
    assert information.asynchronous_operations_window is None
    assert information.role_selections == (pdu.RoleSelection(CT, True, False), pdu.RoleSelection(MR, False, False))
