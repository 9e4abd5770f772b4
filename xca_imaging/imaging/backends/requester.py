"""Associations that we request from a PACS: one operation after the other, on the event loop.

The socket shell between the DICOM upper layer and the back ends, as `imaging/store_scp` is for those who call us, with
the same data path: what a PACS sends by C-GET goes from the receive buffer to the Receiver by memoryview. What the
peer said to a request becomes a typed error that tells a person what to do.

References
----------
* DICOM PS3.8, 9.2 (state machine), 9.3.4 and Table 9-21 (A-ASSOCIATE-RJ), 9.3.8 (A-ABORT)
* DICOM PS3.7, D.3.3.4 (SCP/SCU role selection), 9.3 (DIMSE-C messages); PS3.4, Annex A (Verification)
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import socket
import ssl
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

from xca_imaging import settings, uids
from xca_imaging.errors import (
    ConnectFailed,
    DicomProtocolError,
    LocalProtocolError,
    PeerError,
    PeerProtocolError,
    PeerRefused,
    PeerTimeout,
)
from xca_imaging.imaging.backends.rejection import explain
from xca_imaging.imaging.inbound import Inbound
from xca_imaging.imaging.receiver import PeerAssociation, Receiver
from xca_imaging.wire import dimse, pdu
from xca_imaging.wire.upper_layer import Event, Role, State, UpperLayer

_log = logging.getLogger(__name__)

DEFAULT_SYNTAXES = (uids.EXPLICIT_VR_LITTLE_ENDIAN, uids.IMPLICIT_VR_LITTLE_ENDIAN)
"""Proposed for identifiers, which are small, so explicit comes first."""

PENDING = (0xFF00, 0xFF01)
"""Status of responses that others follow (PS3.4 Tables C.4-1 to C.4-3)."""

MAX_CONTEXTS = 128
"""Presentation contexts of one association: their ids are the odd numbers up to 255 (PS3.8 9.3.2.2)."""

MAX_IDENTIFIER = 4 * 1024 * 1024
"""Bytes of a response's data set, which is collected in memory: a failed list of 60 000 UIDs."""

_RECEIVE_BUFFER = 16 * 1024  # bytes read at a time where only responses come
_STORE_BUFFER = 256 * 1024  # and where instances do, as in the Storage SCP
_SOCKET_BUFFER = 1024 * 1024  # SO_RCVBUF there
_WAITING_ANSWERS = 1000  # responses that are kept for who asked; reading pauses at more
_END_TIMEOUT = 3.0  # seconds that a peer gets to answer a release
_CLOSE_TIMEOUT = 1.0  # seconds that it gets to close after an abort, or after its own release

_ids = itertools.count(-1, -1)


def new_association_id() -> int:
    """Return the id of an association of ours: negative, since those of the Storage SCP, beside which the Receiver sees
    them, count upwards.
    """
    return next(_ids)


class AssociationLost(PeerProtocolError):
    """The association ended before the operation did."""


class ContextsRefused(PeerRefused):
    """The association was accepted without a presentation context that is needed."""

    def __init__(self, peer: str, abstract_syntaxes: Iterable[str]) -> None:
        names = ", ".join(abstract_syntaxes)
        super().__init__(peer, f"association accepted without any of the presentation contexts asked: {names}")


@dataclass(frozen=True, slots=True)
class Proposal:
    """A presentation context to propose.

    `receives` asks for the SCP role in it: the peer sends us instances of that class (PS3.7 D.3.3.4).
    """

    abstract_syntax: str
    transfer_syntaxes: tuple[str, ...] = DEFAULT_SYNTAXES
    receives: bool = False


class Context(NamedTuple):
    """An accepted presentation context."""

    id: int
    abstract_syntax: str
    transfer_syntax: str


class Answer(NamedTuple):
    """A response, with its data set where it has one."""

    response: dimse.Response
    data: bytes


async def associate(
    pacs: settings.Pacs,
    *,
    calling_ae_title: str,
    proposals: Sequence[Proposal],
    tls: ssl.SSLContext | None = None,
    listener: tuple[str, int] | None = None,
    receiver: Receiver | None = None,
    connect_timeout: float = 10.0,
) -> Association:
    """Open an association.

    Parameters
    ----------
    proposals : sequence of Proposal
        1 to 128; at least one is accepted when this returns.
    listener : tuple, optional
        Host and port of our Storage SCP, only for texts that tell a person what to configure on the PACS.
    receiver : Receiver, optional
        Takes what the peer sends by C-STORE; needed where a proposal `receives`.
    connect_timeout : float
        For TCP, TLS and the answer to A-ASSOCIATE-RQ, each: ten seconds are long for a PACS that is there.

    Raises
    ------
    ConnectFailed, PeerBusy, PeerRefused, PeerTimeout
    """
    if not 1 <= len(proposals) <= MAX_CONTEXTS:
        raise LocalProtocolError(f"an association has 1 to {MAX_CONTEXTS} contexts, not {len(proposals)} (PS3.8 9.3.2)")
    loop = asyncio.get_running_loop()
    association = Association(pacs, loop, calling_ae_title, proposals, listener, receiver)
    at = f"{pacs.host}:{pacs.port}"
    try:
        async with asyncio.timeout(2 * connect_timeout if tls else connect_timeout):
            await loop.create_connection(
                lambda: association,
                pacs.host,
                pacs.port,
                ssl=tls,
                server_hostname=pacs.host if tls else None,
                ssl_handshake_timeout=connect_timeout if tls else None,
            )
    except TimeoutError as exc:
        raise ConnectFailed(pacs.name, f"no connection to {at}: not within {connect_timeout:g} s") from exc
    except OSError as exc:
        raise ConnectFailed(pacs.name, f"no connection to {at}: {_cause(exc)}") from exc
    try:
        async with asyncio.timeout(connect_timeout):
            await association.answered
        if not association.contexts:
            raise ContextsRefused(pacs.name, [each.abstract_syntax for each in proposals if not each.receives])
    except TimeoutError as exc:
        await association.drop("no answer in time")
        text = f"no answer to the association request within {connect_timeout:g} s"
        raise PeerTimeout(pacs.name, text) from exc
    except BaseException:
        await association.drop("of no use")
        raise
    return association


async def echo(
    pacs: settings.Pacs,
    *,
    calling_ae_title: str,
    tls: ssl.SSLContext | None = None,
    listener: tuple[str, int] | None = None,
    connect_timeout: float = 10.0,
    response_timeout: float = 10.0,
) -> None:
    """Verify a PACS with C-ECHO; return when it answered Success.

    Raises
    ------
    PeerError
        Whatever `associate` raises; PeerTimeout without an answer; PeerRefused with another status.
    """
    association = await associate(
        pacs,
        calling_ae_title=calling_ae_title,
        proposals=[Proposal(uids.VERIFICATION_SOP_CLASS)],
        tls=tls,
        listener=listener,
        connect_timeout=connect_timeout,
    )
    try:
        association.request(association.context_of(uids.VERIFICATION_SOP_CLASS), dimse.C_ECHO_RQ)
        answer = await association.answer(response_timeout)
        if answer.response.status != dimse.STATUS_SUCCESS:
            raise PeerRefused(pacs.name, f"C-ECHO answered with status 0x{answer.response.status:04X}")
    finally:
        await association.close()


def _cause(exc: OSError) -> str:
    """Return what is wrong with a connection; asyncio's own text repeats the address in its words."""
    if exc.errno is not None and exc.errno > 0 and not isinstance(exc, ssl.SSLError):
        return os.strerror(exc.errno)
    return str(exc) or type(exc).__name__


class Association(asyncio.BufferedProtocol):
    """An association that we requested, made by `associate`.

    One operation at a time: `request`, then `answer` until the final response.

    Attributes
    ----------
    contexts : dict
        Accepted presentation contexts by id.
    operations : int
        How many were begun on it.
    peer : PeerAssociation
        Who is at the other end; as `calling_ae_title` the PACS's, which is the one that sends.
    """

    # Mutable state: contexts, operations, peer; the machines (_layer, _messages); the future of the answer to our
    # request (answered) and of the end of the connection (_closed); the message id of the operation under way
    # (_message_id, 0 = none), responses not yet taken (_answers) with who waits for one (_waiter), the response whose
    # data set is coming in (_response, _data); requests of the peer (_inbound); why reading is paused (_paused_by); the
    # timer of the end (_timer) and the first reason for it (ended).

    _transport: asyncio.Transport | None

    def __init__(
        self,
        pacs: settings.Pacs,
        loop: asyncio.AbstractEventLoop,
        calling_ae_title: str,
        proposals: Sequence[Proposal],
        listener: tuple[str, int] | None,
        receiver: Receiver | None,
    ) -> None:
        self.pacs, self._loop, self._receiver = pacs, loop, receiver
        self._calling_ae_title, self._listener = calling_ae_title, listener
        self._proposals = {2 * index + 1: proposal for index, proposal in enumerate(proposals)}
        self.contexts: dict[int, Context] = {}
        self.operations = 0
        self.ended = ""
        self.answered: asyncio.Future[None] = loop.create_future()
        self._closed: asyncio.Future[None] = loop.create_future()
        self._layer = UpperLayer(Role.REQUESTOR)
        self._layer.perform(Event.EVT1)
        self._messages = dimse.MessageReader()
        self._buffer = memoryview(bytearray(_STORE_BUFFER if receiver is not None else _RECEIVE_BUFFER))
        self._transport = None
        self._socket: socket.socket | None = None
        self._peer_max = 0
        self._message_id = 0
        self._answers: deque[Answer] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._response: dimse.Response | None = None
        self._data = bytearray()
        self._inbound: Inbound | None = None
        self._paused_by: set[str] = set()
        self._timer: asyncio.TimerHandle | None = None
        self.peer = PeerAssociation(
            new_association_id(), pacs.ae_title, calling_ae_title, pacs.host, pacs.port, "", "", pacs.name
        )

    # --- what back ends do ----------------------------------------------------------------------------------------

    @property
    def is_usable(self) -> bool:
        """True while another operation can be begun: it stands, and nothing is under way."""
        return self._layer.state is State.STA6 and not self.ended and not self._message_id and self._messages.is_idle

    def context_of(self, *abstract_syntaxes: str) -> Context:
        """Return the first accepted context of the first of these abstract syntaxes that has one.

        Raises
        ------
        ContextsRefused
            None was accepted.
        """
        for uid in abstract_syntaxes:
            for context in self.contexts.values():
                if context.abstract_syntax == uid:
                    return context
        raise ContextsRefused(self.pacs.name, abstract_syntaxes)

    def request(
        self, context: Context, command_field: int, identifier: bytes | None = None, *, move_destination: str = ""
    ) -> None:
        """Begin an operation: C-ECHO, C-FIND, C-GET or C-MOVE.

        Raises
        ------
        AssociationLost
            It ended meanwhile.
        """
        if self.ended or self._layer.state is not State.STA6:
            raise AssociationLost(self.pacs.name, self.ended or "the association is being released")
        if self._message_id:
            raise LocalProtocolError("one operation at a time on an association (PS3.7 D.3.3.3)")
        self._answers.clear()
        self.operations += 1
        self._message_id = self.operations % 0xFFFF or 0xFFFF
        if command_field == dimse.C_ECHO_RQ:
            command = dimse.encode_c_echo_request(dimse.CEchoRequest(self._message_id, context.abstract_syntax))
        else:
            command = dimse.encode_query_request(
                command_field, self._message_id, context.abstract_syntax, move_destination=move_destination
            )
        self._send(context.id, command, is_command=True)
        if identifier is not None:
            self._send(context.id, identifier, is_command=False)
        self._settle()

    def cancel(self, context: Context) -> None:
        """Ask the peer to end the operation under way (C-CANCEL); its final response is still to come."""
        if self._message_id and self._layer.state is State.STA6:
            self._send(context.id, dimse.encode_c_cancel_request(self._message_id), is_command=True)
            self._settle()

    async def answer(self, seconds: float | None = None) -> Answer:
        """Return the next response of the operation under way; after one that is not pending it is over.

        Raises
        ------
        AssociationLost
            The association ended before.
        PeerTimeout
            No response for so many seconds.
        """
        try:
            async with asyncio.timeout(seconds):
                while not self._answers:
                    if self.ended:
                        raise AssociationLost(self.pacs.name, self.ended)
                    self._waiter = self._loop.create_future()
                    await self._waiter
        except TimeoutError as exc:
            raise PeerTimeout(self.pacs.name, f"no response for {seconds:g} s") from exc
        finally:
            self._waiter = None
        answer = self._answers.popleft()
        if not self._answers:
            self._set_paused("answers", False)
        return answer

    async def close(self) -> None:
        """Release the association, or abort it when an operation is under way; return when its connection is gone."""
        if self._layer.state is State.STA6:
            if self.is_usable:
                self._end("released by us")
                self._layer.perform(Event.EVT11)
                self._start_timer()
                self._settle()
            else:
                self.abort("the operation was broken off")
        await asyncio.shield(self._closed)

    def abort(self, reason: str) -> None:
        """End it with A-ABORT; does nothing when it is over."""
        if self._transport is None or self._layer.state in (State.STA1, State.STA13):
            return
        self._end(f"aborted by us: {reason}")
        self._layer.perform(Event.EVT15)
        self._settle()

    async def drop(self, reason: str) -> None:
        """End it with A-ABORT and close the connection without waiting for the peer."""
        self.abort(reason)
        if self._transport is not None:
            self._transport.abort()
            await asyncio.shield(self._closed)

    def set_paused(self, is_paused: bool) -> None:
        """Stop reading: who takes the instances is slow. What was read already is still delivered."""
        self._set_paused("consumer", is_paused)

    # --- asyncio --------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        # A descriptor of our own: uvloop's stand-in for the socket makes and closes one for each option that is set.
        self._socket = socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno()))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._receiver is not None:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BUFFER)
        self._layer.perform(Event.EVT2, self._encode_request())
        self._settle()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self._socket is not None:
            # A peer that leaves Nagle's algorithm on waits for our ACK (see `imaging/store_scp`).
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        try:
            for item in self._layer.receive(self._buffer[:nbytes]):
                if isinstance(item, pdu.Fragment):
                    command = self._messages.receive(item)
                    if command is not None:
                        self._start(item.context_id, command)
                    elif not item.is_command:
                        self._take(item)
                else:
                    self._indicate(item)
        except DicomProtocolError as error:
            self._layer.refuse(error)
        self._settle()

    def pause_writing(self) -> None:
        # The peer sends on and does not read our answers: it is not listened to until it does.
        self._set_paused("output", True)

    def resume_writing(self) -> None:
        self._set_paused("output", False)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._layer.state is not State.STA1:
            self._layer.perform(Event.EVT17)
        answered = self.answered.done()
        lost = (
            "the PACS ended the association" if answered else "closed the connection without an answer to the request"
        )
        self._end(f"{lost}: {exc}" if exc else lost)
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if not self._closed.done():
            self._closed.set_result(None)

    # --- association ----------------------------------------------------------------------------------------------

    def _encode_request(self) -> bytes:
        contexts = tuple(
            pdu.PresentationContext(number, each.abstract_syntax, each.transfer_syntaxes)
            for number, each in self._proposals.items()
        )
        received = dict.fromkeys(each.abstract_syntax for each in self._proposals.values() if each.receives)
        return pdu.AssociateRQ(
            called_ae_title=self.pacs.ae_title,
            calling_ae_title=self._calling_ae_title,
            application_context=uids.APPLICATION_CONTEXT,
            presentation_contexts=contexts,
            user_information=pdu.UserInformation(
                maximum_length=pdu.MAX_PDU_LENGTH,
                implementation_class_uid=uids.IMPLEMENTATION_CLASS_UID,
                implementation_version_name=uids.IMPLEMENTATION_VERSION_NAME,
                role_selections=tuple(pdu.RoleSelection(uid, scu_role=False, scp_role=True) for uid in received),
            ),
        ).encode()

    def _indicate(self, item: pdu.Pdu) -> None:
        match item:
            case pdu.AssociateAC():
                self._accept(item)
            case pdu.AssociateRJ():
                self._end("rejected", explain(item, self.pacs, self._calling_ae_title, self._listener))
            case pdu.ReleaseRQ():
                self._end("released by the PACS")
                self._layer.perform(Event.EVT14)
            case pdu.Abort(source, reason):
                text = f"A-ABORT ({source}/{reason})"
                if not self.answered.done():
                    text += " in answer to the association request"
                self._end(text)

    def _accept(self, answer: pdu.AssociateAC) -> None:
        """Take the contexts that were accepted as they were proposed."""
        for result in answer.presentation_contexts:
            proposal = self._proposals.get(result.context_id)
            if (
                proposal is not None
                and result.result == pdu.CONTEXT_ACCEPTED
                and result.transfer_syntax in proposal.transfer_syntaxes
            ):
                self.contexts[result.context_id] = Context(
                    result.context_id, proposal.abstract_syntax, result.transfer_syntax
                )
        self._layer.contexts = frozenset(self.contexts)
        self._peer_max = answer.user_information.maximum_length
        if self._receiver is not None:
            host, port = self._transport.get_extra_info("peername")[:2] if self._transport else ("", 0)
            self.peer = PeerAssociation(
                self.peer.id,
                self.pacs.ae_title,
                self._calling_ae_title,
                host,
                port,
                answer.user_information.implementation_class_uid,
                answer.user_information.implementation_version_name,
                self.pacs.name,
            )
            syntaxes = {each.id: each.transfer_syntax for each in self.contexts.values()}
            self._inbound = Inbound(self._receiver, self.peer, syntaxes, self._respond)
        if not self.answered.done():
            self.answered.set_result(None)

    def _end(self, reason: str, error: PeerError | None = None) -> None:
        """Let go of whoever waits for something of this association; does nothing the second time."""
        if self.ended:
            return
        self.ended = reason
        if not self.answered.done():
            self.answered.set_exception(error or ConnectFailed(self.pacs.name, reason))
            self.answered.exception()  # who asked may have gone: then nobody else looks at it
        if self._inbound is not None:
            inbound, self._inbound = self._inbound, None
            inbound.drop(self.ended)
            assert self._receiver is not None
            self._receiver.association_closed(self.peer, self.ended)
        self._wake()

    # --- messages -------------------------------------------------------------------------------------------------

    def _start(self, context_id: int, command: dimse.Command) -> None:
        if isinstance(command, dimse.Response):
            self._response = command
            if not command.has_data_set:
                self._finish_response()
        elif self._inbound is not None:
            self._inbound.start(context_id, command)
        else:
            raise DicomProtocolError("request on an association for ours (PS3.7 8)", pdu.ABORT_UNEXPECTED_PDU)

    def _take(self, fragment: pdu.Fragment) -> None:
        if self._response is None:
            if self._inbound is not None:
                self._inbound.take(fragment.is_last, fragment.data)
            return
        if len(self._data) + len(fragment.data) > MAX_IDENTIFIER:
            text = f"data set of a response over {MAX_IDENTIFIER} bytes"
            raise DicomProtocolError(text, pdu.ABORT_INVALID_PDU_PARAMETER)
        self._data += fragment.data
        if fragment.is_last:
            self._finish_response()

    def _finish_response(self) -> None:
        response, self._response = cast(dimse.Response, self._response), None
        data = bytes(self._data)
        self._data.clear()
        if not self._message_id or response.message_id_being_responded_to != self._message_id:
            _log.info(
                "%s: response to message %d, which is over", self.pacs.name, response.message_id_being_responded_to
            )
            return
        if response.status not in PENDING:
            self._message_id = 0
        self._answers.append(Answer(response, data))
        if len(self._answers) >= _WAITING_ANSWERS:
            self._set_paused("answers", True)
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _respond(self, context_id: int, command: bytes) -> None:
        if self._layer.state is State.STA6:
            self._send(context_id, command, is_command=True)

    def _send(self, context_id: int, data: bytes, *, is_command: bool) -> None:
        self._layer.send_data(pdu.encode_p_data(context_id, data, is_command=is_command, max_length=self._peer_max))

    # --- transport ------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Do what the machine wants done: send, run ARTIM, close."""
        layer, transport = self._layer, self._transport
        assert transport is not None
        if output := layer.take_output():
            transport.write(output)
        if layer.state is State.STA6 or layer.state is State.STA5:
            return
        if layer.aborted:
            self._end(f"aborted by us: {layer.aborted}")
        if layer.artim_running or layer.closing:
            self._start_timer()
        if layer.closing:
            transport.close()

    def _start_timer(self) -> None:
        if self._timer is None:
            seconds = _CLOSE_TIMEOUT if self._layer.state is State.STA13 else _END_TIMEOUT
            self._timer = self._loop.call_later(seconds, self._expire)

    def _expire(self) -> None:
        """The peer neither answers nor closes: the connection is taken away."""
        if self._layer.state is State.STA13:
            self._layer.perform(Event.EVT18)
        if self._transport is not None:
            self._transport.abort()

    def _set_paused(self, by: str, is_paused: bool) -> None:
        before = bool(self._paused_by)
        if is_paused:
            self._paused_by.add(by)
        else:
            self._paused_by.discard(by)
        transport = self._transport
        if transport is None or transport.is_closing() or before == bool(self._paused_by):
            return
        if self._paused_by:
            transport.pause_reading()
        else:
            transport.resume_reading()
