"""The association: state table, the machine that walks it, and negotiation as pure functions.

States, events and actions carry the names of PS3.8 9.2, so that table and Standard can be read side by side. The
machine does no I/O: bytes come in by `UpperLayer.receive`, bytes to send come out by `UpperLayer.take_output`, and two
flags tell the shell what the Standard asks of it beyond that: run the ARTIM timer, close the transport connection.

References
----------
* DICOM PS3.8, 9.2 (state machine: Tables 9-1 to 9-10), 9.3.2 to 9.3.4 (negotiation), 9.1.5 (ARTIM timer)
* DICOM PS3.7, D.3.3 (user information), PS3.4 B.5 (Storage SOP Classes)
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pydicom.uid import UID_dictionary  # type: ignore[attr-defined]  # re-exported without saying so

from xca_imaging import uids
from xca_imaging.errors import DicomProtocolError, LocalProtocolError
from xca_imaging.wire import pdu


class State(enum.IntEnum):
    """States of the upper layer protocol machine (PS3.8 Tables 9-1 to 9-5)."""

    STA1 = 1
    """Idle."""
    STA2 = 2
    """Transport connection open, awaiting A-ASSOCIATE-RQ."""
    STA3 = 3
    """Awaiting the local A-ASSOCIATE response."""
    STA4 = 4
    """Awaiting the transport connection that the local user asked for."""
    STA5 = 5
    """Awaiting A-ASSOCIATE-AC or A-ASSOCIATE-RJ."""
    STA6 = 6
    """Association established, ready for data transfer."""
    STA7 = 7
    """Awaiting A-RELEASE-RP."""
    STA8 = 8
    """Awaiting the local A-RELEASE response."""
    STA9 = 9
    """Release collision, requestor: awaiting the local A-RELEASE response."""
    STA10 = 10
    """Release collision, acceptor: awaiting A-RELEASE-RP."""
    STA11 = 11
    """Release collision, requestor: awaiting A-RELEASE-RP."""
    STA12 = 12
    """Release collision, acceptor: awaiting the local A-RELEASE response."""
    STA13 = 13
    """Awaiting the close of the transport connection, association no longer exists."""


class Event(enum.IntEnum):
    """Events of the upper layer protocol machine (PS3.8 Table 9-10, left column)."""

    EVT1 = 1
    """A-ASSOCIATE request (local user)."""
    EVT2 = 2
    """Transport connect confirmation."""
    EVT3 = 3
    """A-ASSOCIATE-AC received."""
    EVT4 = 4
    """A-ASSOCIATE-RJ received."""
    EVT5 = 5
    """Transport connection indication."""
    EVT6 = 6
    """A-ASSOCIATE-RQ received."""
    EVT7 = 7
    """A-ASSOCIATE response, accept (local user)."""
    EVT8 = 8
    """A-ASSOCIATE response, reject (local user)."""
    EVT9 = 9
    """P-DATA request (local user)."""
    EVT10 = 10
    """P-DATA-TF received."""
    EVT11 = 11
    """A-RELEASE request (local user)."""
    EVT12 = 12
    """A-RELEASE-RQ received."""
    EVT13 = 13
    """A-RELEASE-RP received."""
    EVT14 = 14
    """A-RELEASE response (local user)."""
    EVT15 = 15
    """A-ABORT request (local user)."""
    EVT16 = 16
    """A-ABORT received."""
    EVT17 = 17
    """Transport connection closed."""
    EVT18 = 18
    """ARTIM timer expired."""
    EVT19 = 19
    """Unrecognized or invalid PDU received."""


class Action(enum.Enum):
    """Actions of the upper layer protocol machine (PS3.8 Tables 9-6 to 9-9)."""

    AE_1 = "issue transport connect request"
    AE_2 = "send A-ASSOCIATE-RQ"
    AE_3 = "issue A-ASSOCIATE confirmation, accepted"
    AE_4 = "issue A-ASSOCIATE confirmation, rejected; close transport connection"
    AE_5 = "issue transport connection response; start ARTIM"
    AE_6 = "stop ARTIM; issue A-ASSOCIATE indication"
    AE_7 = "send A-ASSOCIATE-AC"
    AE_8 = "send A-ASSOCIATE-RJ; start ARTIM"
    DT_1 = "send P-DATA-TF"
    DT_2 = "issue P-DATA indication"
    AR_1 = "send A-RELEASE-RQ"
    AR_2 = "issue A-RELEASE indication"
    AR_3 = "issue A-RELEASE confirmation; close transport connection"
    AR_4 = "send A-RELEASE-RP; start ARTIM"
    AR_5 = "stop ARTIM"
    AR_6 = "issue P-DATA indication while a release is under way"
    AR_7 = "send P-DATA-TF while a release is under way"
    AR_8 = "issue A-RELEASE indication, release collision"
    AR_9 = "send A-RELEASE-RP, release collision"
    AR_10 = "issue A-RELEASE confirmation, release collision"
    AA_1 = "send A-ABORT (service-user); start ARTIM"
    AA_2 = "stop ARTIM; close transport connection"
    AA_3 = "issue A-ABORT or A-P-ABORT indication; close transport connection"
    AA_4 = "issue A-P-ABORT indication"
    AA_5 = "stop ARTIM when the transport connection closed"
    AA_6 = "ignore the PDU"
    AA_7 = "send A-ABORT"
    AA_8 = "send A-ABORT (service-provider); issue A-P-ABORT indication; start ARTIM"


def _transitions() -> Mapping[tuple[State, Event], tuple[State, Action]]:
    """Return PS3.8 Table 9-10; a blank cell of the Standard has no key.

    Two cells leave the next state open. AE-6: a request that the service provider cannot accept is rejected from STA3
    like any other, which is the same on the wire. AR-8: STA9 stands for the requestor, `UpperLayer` makes it STA10 for
    the acceptor.
    """
    s, e, a = State, Event, Action
    table: dict[tuple[State, Event], tuple[State, Action]] = {
        # Association establishment (Table 9-6)
        (s.STA1, e.EVT1): (s.STA4, a.AE_1),
        (s.STA4, e.EVT2): (s.STA5, a.AE_2),
        (s.STA5, e.EVT3): (s.STA6, a.AE_3),
        (s.STA5, e.EVT4): (s.STA1, a.AE_4),
        (s.STA1, e.EVT5): (s.STA2, a.AE_5),
        (s.STA2, e.EVT6): (s.STA3, a.AE_6),
        (s.STA3, e.EVT7): (s.STA6, a.AE_7),
        (s.STA3, e.EVT8): (s.STA13, a.AE_8),
        # Data transfer (Table 9-7)
        (s.STA6, e.EVT9): (s.STA6, a.DT_1),
        (s.STA6, e.EVT10): (s.STA6, a.DT_2),
        # Association release (Table 9-8)
        (s.STA6, e.EVT11): (s.STA7, a.AR_1),
        (s.STA6, e.EVT12): (s.STA8, a.AR_2),
        (s.STA7, e.EVT13): (s.STA1, a.AR_3),
        (s.STA11, e.EVT13): (s.STA1, a.AR_3),
        (s.STA8, e.EVT14): (s.STA13, a.AR_4),
        (s.STA12, e.EVT14): (s.STA13, a.AR_4),
        (s.STA13, e.EVT17): (s.STA1, a.AR_5),
        (s.STA7, e.EVT10): (s.STA7, a.AR_6),
        (s.STA8, e.EVT9): (s.STA8, a.AR_7),
        (s.STA7, e.EVT12): (s.STA9, a.AR_8),
        (s.STA9, e.EVT14): (s.STA11, a.AR_9),
        (s.STA10, e.EVT13): (s.STA12, a.AR_10),
        # Association abort (Table 9-9)
        (s.STA4, e.EVT15): (s.STA1, a.AA_2),
        (s.STA2, e.EVT16): (s.STA1, a.AA_2),
        (s.STA13, e.EVT16): (s.STA1, a.AA_2),
        (s.STA2, e.EVT18): (s.STA1, a.AA_2),
        (s.STA13, e.EVT18): (s.STA1, a.AA_2),
        (s.STA2, e.EVT17): (s.STA1, a.AA_5),
        (s.STA4, e.EVT17): (s.STA1, a.AA_4),
        (s.STA13, e.EVT6): (s.STA13, a.AA_7),
        (s.STA13, e.EVT19): (s.STA13, a.AA_7),
    }
    received = (e.EVT3, e.EVT4, e.EVT6, e.EVT10, e.EVT12, e.EVT13, e.EVT19)
    for event in received:
        table.setdefault((s.STA2, event), (s.STA13, a.AA_1))
        table.setdefault((s.STA13, event), (s.STA13, a.AA_6))
    for state in (s.STA3, s.STA5, s.STA6, s.STA7, s.STA8, s.STA9, s.STA10, s.STA11, s.STA12):
        for event in received:
            table.setdefault((state, event), (s.STA13, a.AA_8))
        table[state, e.EVT15] = (s.STA13, a.AA_1)
        table[state, e.EVT16] = (s.STA1, a.AA_3)
        table[state, e.EVT17] = (s.STA1, a.AA_4)
    return table


TRANSITIONS = _transitions()

_EVENT_OF: Mapping[type[pdu.Pdu], Event] = {
    pdu.AssociateAC: Event.EVT3,
    pdu.AssociateRJ: Event.EVT4,
    pdu.AssociateRQ: Event.EVT6,
    pdu.ReleaseRQ: Event.EVT12,
    pdu.ReleaseRP: Event.EVT13,
    pdu.Abort: Event.EVT16,
}

_STARTS_ARTIM = frozenset({Action.AE_5, Action.AE_8, Action.AR_4, Action.AA_1, Action.AA_8})
_STOPS_ARTIM = frozenset({Action.AE_6, Action.AR_5, Action.AA_2, Action.AA_5})
_CLOSES = frozenset({Action.AE_4, Action.AR_3, Action.AA_2, Action.AA_3})
_INDICATES = frozenset(
    {Action.AE_3, Action.AE_4, Action.AE_6, Action.AR_2, Action.AR_3, Action.AR_8, Action.AR_10, Action.AA_3}
)
_SENDS = frozenset({Action.AE_2, Action.AE_7, Action.AE_8, Action.DT_1, Action.AR_7})


class Role(enum.Enum):
    """Which end of the association this is."""

    REQUESTOR = "requestor"
    ACCEPTOR = "acceptor"


class UpperLayer:
    """One end of one association.

    Parameters
    ----------
    role : Role
    max_pdu_length : int
        What we announce as maximum length received; longer P-DATA-TF are answered with A-ABORT.
    max_associate_length : int
        Longest A-ASSOCIATE PDU that is collected.

    Attributes
    ----------
    artim_running : bool
        The Standard wants the ARTIM timer to run. The shell reports its expiry as `Event.EVT18`.
    closing : bool
        The Standard wants the transport connection closed, after what `take_output` returns is sent.
    contexts : frozenset of int
        Presentation contexts that the negotiation accepted. Data of any other is an invalid PDU parameter.
    aborted : str
        Why we sent A-ABORT; empty when we did not.
    """

    # Mutable state: state, artim_running, closing, contexts, aborted, the bytes not yet taken (_output) and whether
    # the position in the stream is lost (_lost).
    __slots__ = ("_lost", "_output", "_reader", "aborted", "artim_running", "closing", "contexts", "role", "state")

    def __init__(
        self,
        role: Role,
        *,
        max_pdu_length: int = pdu.MAX_PDU_LENGTH,
        max_associate_length: int = pdu.MAX_ASSOCIATE_LENGTH,
    ) -> None:
        self.role = role
        self.state = State.STA1
        self.artim_running = False
        self.closing = False
        self.contexts: frozenset[int] = frozenset()
        self.aborted = ""
        self._reader = pdu.Reader(max_pdu_length=max_pdu_length, max_associate_length=max_associate_length)
        self._output: list[bytes] = []
        self._lost = False

    @property
    def data_left(self) -> int:
        """Bytes that are still to come of the presentation data value that has begun."""
        return self._reader.data_left

    def take_output(self) -> bytes:
        """Return what is to be sent now, and forget it."""
        if not self._output:
            return b""
        output = b"".join(self._output)
        self._output.clear()
        return output

    def perform(self, event: Event, output: bytes = b"") -> Action:
        """Walk one cell of the table for a local primitive, a timer or the transport connection.

        Parameters
        ----------
        output : bytes
            The encoded PDU of EVT2 (A-ASSOCIATE-RQ), EVT7, EVT8 and EVT9; the others encode their own.

        Raises
        ------
        LocalProtocolError
            The cell is blank: the local user asks for what the state does not allow.
        """
        transition = TRANSITIONS.get((self.state, event))
        if transition is None:
            raise LocalProtocolError(f"{event.name} cannot happen in {self.state.name} (PS3.8 Table 9-10)")
        return self._enter(*transition, output, pdu.Abort(source=0))

    def send_data(self, output: bytes) -> None:
        """Walk the cell of EVT9: `perform` for the primitive that is by far the most frequent."""
        if self.state is not State.STA6:
            self.perform(Event.EVT9, output)
        else:
            self._output.append(output)

    def receive(self, data: memoryview) -> Iterator[pdu.Pdu | pdu.Fragment]:
        """Yield the indications that the next received bytes give rise to.

        What breaks the protocol is never raised: the machine queues the A-ABORT, remembers why in `aborted` and is in
        STA13. Views of fragments are valid until the next bytes are read into the same buffer.
        """
        if self._lost:
            return
        fragment = pdu.Fragment
        try:
            for item in self._reader.receive(data):
                if isinstance(item, fragment):
                    # Event 10. The two cells that pass data on are by far the busiest of the table.
                    if self.state is State.STA6 or self.state is State.STA7:
                        if item.context_id not in self.contexts:
                            raise DicomProtocolError(
                                f"data in presentation context {item.context_id}, which is not accepted (PS3.8 9.3.5)",
                                pdu.ABORT_INVALID_PDU_PARAMETER,
                            )
                        yield item
                    else:
                        self._receive_event(Event.EVT10, "P-DATA-TF", pdu.ABORT_UNEXPECTED_PDU)
                elif self._receive_event(_EVENT_OF[type(item)], type(item).__name__, pdu.ABORT_UNEXPECTED_PDU):
                    yield item
        except DicomProtocolError as error:
            self._lost = True
            self._receive_event(Event.EVT19, str(error), error.abort_reason)

    def receive_value(self, data: memoryview) -> pdu.Fragment | None:
        """Return what `receive` would yield, where that is one fragment of a data set and nothing else; else None.

        Nothing has happened then, and `receive` is to be called. Nothing that `receive` returned before may be left.
        """
        if self._lost or self.state is not State.STA6:
            return None
        return self._reader.receive_value(data, self.contexts)

    def refuse(self, error: DicomProtocolError) -> None:
        """Answer with A-ABORT what the layer above found wrong with a PDU that was passed on."""
        self._lost = True
        self._receive_event(Event.EVT19, str(error), error.abort_reason)

    def _receive_event(self, event: Event, what: str, abort_reason: int) -> bool:
        """Walk the cell of a received PDU; true when the local user is to see it."""
        before = self.state
        transition = TRANSITIONS.get((before, event))
        if transition is None:  # STA1: the transport connection is being closed, what still comes in is of no interest
            return False
        action = self._enter(*transition, b"", pdu.Abort(source=2, reason=abort_reason))
        if action in (Action.AA_1, Action.AA_8):
            self.aborted = what if event is Event.EVT19 else f"unexpected {what} in {before.name} (PS3.8 Table 9-10)"
        return action in _INDICATES

    def _enter(self, state: State, action: Action, output: bytes, abort: pdu.Abort) -> Action:
        if action is Action.AR_8 and self.role is Role.ACCEPTOR:
            state = State.STA10
        if action in _SENDS:
            self._output.append(output)
        elif action is Action.AR_1:
            self._output.append(pdu.ReleaseRQ().encode())
        elif action in (Action.AR_4, Action.AR_9):
            self._output.append(pdu.ReleaseRP().encode())
        elif action is Action.AA_1:
            self._output.append(pdu.Abort(source=0).encode())
        elif action in (Action.AA_7, Action.AA_8):
            self._output.append(abort.encode())
        if action in _STARTS_ARTIM:
            self.artim_running = True
        elif action in _STOPS_ARTIM:
            self.artim_running = False
        if action in _CLOSES:
            self.closing = True
        self.state = state
        return action


# --------------------------------------------------------------------------------------------------------------------
# Negotiation
# --------------------------------------------------------------------------------------------------------------------

HOUSE_ORDER: tuple[str, ...] = (
    # What every reader can read; explicit first, since it keeps the VR of private elements.
    uids.EXPLICIT_VR_LITTLE_ENDIAN,
    uids.IMPLICIT_VR_LITTLE_ENDIAN,
    # Lossless
    "1.2.840.10008.1.2.4.70",  # JPEG Lossless, first-order prediction
    "1.2.840.10008.1.2.4.57",  # JPEG Lossless
    "1.2.840.10008.1.2.4.80",  # JPEG-LS Lossless
    "1.2.840.10008.1.2.4.90",  # JPEG 2000 Lossless
    "1.2.840.10008.1.2.4.201",  # HTJ2K Lossless
    "1.2.840.10008.1.2.4.202",  # HTJ2K Lossless, RPCL
    "1.2.840.10008.1.2.5",  # RLE Lossless
    "1.2.840.10008.1.2.1.99",  # Deflated Explicit VR Little Endian
    uids.EXPLICIT_VR_BIG_ENDIAN,
)
"""Our preference where the one who asked has none. What is not listed here follows in the order of the proposal: a
sender proposes a lossy syntax alone when that is how the instance is stored, and then it is the one to take."""


def _is_other_service(name: str, kind: str) -> bool:
    """True for a SOP class of PS3.6 Table A-1 that instances are not stored by."""
    is_storage = (
        name.endswith(("Storage", "Storage SOP Class", "Storage - Trial")) or "Storage - For " in name or name == ""
    )
    return kind in ("SOP Class", "Meta SOP Class", "Service Class") and not is_storage


_OTHER_SERVICES = frozenset(str(uid) for uid, entry in UID_dictionary.items() if _is_other_service(entry[0], entry[1]))
INSTANCE_AVAILABILITY_NOTIFICATION = "1.2.840.10008.5.1.4.33"  # PS3.4 R.3
_MEDIA_STORAGE_DIRECTORY = "1.2.840.10008.1.3.10"  # a DICOMDIR is written to media, never sent (PS3.10 8.6)


def accepts_abstract_syntax(abstract_syntax: str) -> bool:
    """True for Verification, Instance Availability Notification and whatever may be a Storage SOP Class.

    A class that the dictionary does not know is private, or newer than it, and is accepted: what matters of an object
    in transit is that its bytes arrive.
    """
    if abstract_syntax in (uids.VERIFICATION_SOP_CLASS, INSTANCE_AVAILABILITY_NOTIFICATION):
        return True
    return (
        bool(abstract_syntax) and abstract_syntax not in _OTHER_SERVICES and abstract_syntax != _MEDIA_STORAGE_DIRECTORY
    )


@dataclass(frozen=True, slots=True)
class Negotiation:
    """What the negotiation of presentation contexts led to.

    Parameters
    ----------
    results : tuple of pdu.PresentationContextResult
        The answer to each proposed context.
    accepted : Mapping
        Context id -> transfer syntax.
    refused : Mapping
        SOP class -> proposed syntaxes, of the contexts refused because none of their syntaxes is wanted. Another
        context of the same class may have been accepted.
    """

    results: tuple[pdu.PresentationContextResult, ...]
    accepted: Mapping[int, str]
    refused: Mapping[str, tuple[str, ...]]


def negotiate(contexts: Sequence[pdu.PresentationContext], wanted: Sequence[str] | None) -> Negotiation:
    """Answer the proposed presentation contexts, one transfer syntax each.

    Parameters
    ----------
    wanted : sequence of str, optional
        Transfer syntaxes that instances may come in, best first; None takes any, in the house order. Verification has
        no data set and is accepted in any syntax, notifications in the two that every reader can read.

    References
    ----------
    * DICOM PS3.8, 9.3.3.2 (presentation context item), Table 9-18
    * DICOM PS3.7, 8.4 (the acceptor chooses one transfer syntax per context)
    """
    results: list[pdu.PresentationContextResult] = []
    accepted: dict[int, str] = {}
    refused: dict[str, tuple[str, ...]] = {}
    for context in contexts:
        proposed = context.transfer_syntaxes
        chosen = proposed[0] if proposed else uids.IMPLICIT_VR_LITTLE_ENDIAN
        if not accepts_abstract_syntax(context.abstract_syntax):
            result = pdu.CONTEXT_ABSTRACT_SYNTAX_NOT_SUPPORTED
        else:
            if context.abstract_syntax == INSTANCE_AVAILABILITY_NOTIFICATION:
                best = _choose(proposed, HOUSE_ORDER[:2], is_any=False)
            else:
                is_any = wanted is None or context.abstract_syntax == uids.VERIFICATION_SOP_CLASS
                best = _choose(proposed, HOUSE_ORDER if is_any or wanted is None else wanted, is_any=is_any)
            if best is None:
                result = pdu.CONTEXT_TRANSFER_SYNTAXES_NOT_SUPPORTED
                known = refused.get(context.abstract_syntax, ())
                refused[context.abstract_syntax] = known + tuple(uid for uid in proposed if uid not in known)
            else:
                result, chosen = pdu.CONTEXT_ACCEPTED, best
                accepted[context.context_id] = best
        results.append(pdu.PresentationContextResult(context.context_id, result, chosen))
    return Negotiation(tuple(results), accepted, refused)


def _choose(proposed: Sequence[str], order: Sequence[str], *, is_any: bool) -> str | None:
    for uid in order:
        if uid in proposed:
            return uid
    return proposed[0] if is_any and proposed else None


def check_request(
    request: pdu.AssociateRQ, *, ae_title: str, calling_ae_titles: frozenset[str] | None, has_room: bool
) -> pdu.AssociateRJ | None:
    """Return the rejection that the request deserves, or None.

    Parameters
    ----------
    ae_title : str
        Ours; a request that calls another is rejected.
    calling_ae_titles : frozenset of str, optional
        AE titles that may call; None lets any.
    has_room : bool
        False when the limit of associations is reached. It is the only transient rejection, checked last: repeating
        a request that is wrong anyway is of no use to the peer.

    References
    ----------
    * DICOM PS3.8, Table 9-21 (A-ASSOCIATE-RJ result, source, reason/diagnostic)
    """
    if not request.protocol_version & 1:
        return pdu.AssociateRJ(result=1, source=2, reason=2)  # protocol-version-not-supported
    if request.application_context != uids.APPLICATION_CONTEXT:
        return pdu.AssociateRJ(result=1, source=1, reason=2)  # application-context-name-not-supported
    if request.called_ae_title != ae_title:
        return pdu.AssociateRJ(result=1, source=1, reason=7)  # called-AE-title-not-recognized
    if calling_ae_titles is not None and request.calling_ae_title not in calling_ae_titles:
        return pdu.AssociateRJ(result=1, source=1, reason=3)  # calling-AE-title-not-recognized
    if not has_room:
        return pdu.AssociateRJ(result=2, source=3, reason=2)  # local-limit-exceeded
    return None


def answer_request(
    request: pdu.AssociateRQ, negotiation: Negotiation, *, max_pdu_length: int = pdu.MAX_PDU_LENGTH
) -> pdu.AssociateAC:
    """Return the A-ASSOCIATE-AC of a Storage and Verification SCP.

    Roles are answered as SCP only: the requestor may be SCU where it asked to be, never SCP. The asynchronous
    operations window is left out, which means 1/1 (PS3.7 D.3.3.3). The implementation version name is always there:
    GDCM 3.0 aborts on an assertion without it.
    """
    classes = {c.abstract_syntax for c in request.presentation_contexts if c.context_id in negotiation.accepted}
    roles = tuple(
        pdu.RoleSelection(role.sop_class_uid, scu_role=role.scu_role, scp_role=False)
        for role in request.user_information.role_selections
        if role.sop_class_uid in classes
    )
    return pdu.AssociateAC(
        called_ae_title=request.called_ae_title,
        calling_ae_title=request.calling_ae_title,
        application_context=uids.APPLICATION_CONTEXT,
        presentation_contexts=negotiation.results,
        user_information=pdu.UserInformation(
            maximum_length=max_pdu_length,
            implementation_class_uid=uids.IMPLEMENTATION_CLASS_UID,
            implementation_version_name=uids.IMPLEMENTATION_VERSION_NAME,
            role_selections=roles,
        ),
    )
