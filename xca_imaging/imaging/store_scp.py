"""Storage SCP: the socket shell between the DICOM upper layer and whoever receives instances.

Bytes go from the socket into one buffer per association, and from there by memoryview to `Incoming.write`: the data
set is never parsed, joined or copied. What is received, and whether it is wanted, is the business of the `Receiver`;
this module negotiates, keeps time and answers.

References
----------
* DICOM PS3.4, B (Storage Service Class), A (Verification Service Class)
* DICOM PS3.7, 9.1.1 (C-STORE), 9.1.5 (C-ECHO); PS3.8, 9.1.5 (ARTIM timer)
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl as ssl_module
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from xca_imaging.errors import DicomProtocolError, SpoolFull
from xca_imaging.imaging.receiver import Incoming, PeerAssociation, Receiver, StoreRequest
from xca_imaging.uids import is_uid
from xca_imaging.wire import dimse, pdu
from xca_imaging.wire.upper_layer import Event, Role, State, UpperLayer, answer_request, check_request, negotiate

logger = logging.getLogger(__name__)

RECEIVE_BUFFER = 256 * 1024
"""Bytes read at a time, per association: two PDUs of the length that we offer; it stays in the processor's cache."""

SOCKET_BUFFER = 1024 * 1024
"""SO_RCVBUF: a sender is not stopped while one write to the disk takes its time; times the number of associations,
this is what peers can make the kernel hold."""

_GRACE = 1.0
"""Seconds that a peer gets to read an A-ABORT when the node goes down."""


@dataclass(frozen=True, slots=True)
class _Limits:
    artim_timeout: float
    stall_timeout: float
    max_pdu: int
    max_associate_length: int
    max_command_length: int
    max_associations: int
    max_connections: int
    receive_buffer: int


class StoreScp:
    """A Storage and Verification SCP on the running event loop.

    Parameters
    ----------
    receiver : Receiver
    ae_title : str
        Ours; other called AE titles are rejected.
    host, port : str, int
        Where to listen; port 0 picks a free one.
    ssl : ssl.SSLContext, optional
        DICOM over TLS (PS3.15 B).
    calling_ae_titles : frozenset of str, optional
        AE titles that may call; None lets any.
    max_associations : int
        Associations at a time; more are rejected as transient (2/3/2). Twice as many connections are kept to say so,
        beyond that they are closed unheard.
    artim_timeout : float
        Seconds for an A-ASSOCIATE-RQ to come and for a peer to close after release, rejection or abort.
    stall_timeout : float
        Seconds without a byte from, or taken by, the peer of an association before it is aborted. Does not run while
        reading is paused by `pause`.
    max_pdu : int
        Maximum length that we announce (PS3.8 D.1).
    max_associate_length, max_command_length : int
        Longest A-ASSOCIATE-RQ and command set that are collected in memory.
    receive_buffer, socket_buffer : int
        Bytes read at a time and SO_RCVBUF, both per association.
    """

    # Mutable state: the listener (_server), all connections (_connections), established associations by id
    # (_established), the last id given (_last_id), and what `close` waits for (_none_left).

    def __init__(
        self,
        receiver: Receiver,
        *,
        ae_title: str,
        host: str,
        port: int,
        ssl: ssl_module.SSLContext | None = None,
        calling_ae_titles: frozenset[str] | None = None,
        max_associations: int = 256,
        artim_timeout: float = 30.0,
        stall_timeout: float = 60.0,
        max_pdu: int = pdu.MAX_PDU_LENGTH,
        max_associate_length: int = pdu.MAX_ASSOCIATE_LENGTH,
        max_command_length: int = dimse.MAX_COMMAND_LENGTH,
        receive_buffer: int = RECEIVE_BUFFER,
        socket_buffer: int = SOCKET_BUFFER,
    ) -> None:
        self._receiver = receiver
        self._ae_title = ae_title
        self._host, self._port, self._ssl = host, port, ssl
        self._calling_ae_titles = calling_ae_titles
        self._socket_buffer = socket_buffer
        self._limits = _Limits(
            artim_timeout=artim_timeout,
            stall_timeout=stall_timeout,
            max_pdu=max_pdu,
            max_associate_length=max_associate_length,
            max_command_length=max_command_length,
            max_associations=max_associations,
            max_connections=2 * max_associations,
            receive_buffer=receive_buffer,
        )
        self._server: asyncio.Server | None = None
        self._connections: set[_Connection] = set()
        self._established: dict[int, _Connection] = {}
        self._last_id = 0
        self._none_left = asyncio.Event()

    async def start(self) -> None:
        """Listen. Raises OSError when the address cannot be had."""
        loop = asyncio.get_running_loop()
        handshake = self._limits.artim_timeout if self._ssl is not None else None
        self._server = await loop.create_server(
            lambda: _Connection(self, loop),
            self._host,
            self._port,
            ssl=self._ssl,
            ssl_handshake_timeout=handshake,
            backlog=self._limits.max_connections,
            start_serving=False,
        )
        for listener in self._server.sockets:
            # Connections inherit it; set before they come, so that the window scale fits (RFC 7323 2.2).
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._socket_buffer)
        await self._server.start_serving()

    @property
    def sockets(self) -> list[tuple[str, int]]:
        """(host, port) of each bound address."""
        return [listener.getsockname()[:2] for listener in self._server.sockets] if self._server else []

    @property
    def associations(self) -> tuple[PeerAssociation, ...]:
        """The established associations."""
        return tuple(connection.peer for connection in self._established.values() if connection.peer is not None)

    def pause(self, association: PeerAssociation) -> None:
        """Stop reading from a peer: its consumer is slow. What was read already is still delivered."""
        if connection := self._established.get(association.id):
            connection.set_paused(by_consumer=True)

    def resume(self, association: PeerAssociation) -> None:
        """Read on."""
        if connection := self._established.get(association.id):
            connection.set_paused(by_consumer=False)

    async def close(self, drain: float) -> None:
        """Stop listening, let associations end for at most `drain` seconds, abort the rest."""
        if self._server is None:
            return
        self._server.close()
        for connection in self._connections - set(self._established.values()):
            connection.abort("the node is going down")
        await self._wait_for_none(drain)
        for connection in tuple(self._connections):
            connection.abort("the node is going down")
        await self._wait_for_none(_GRACE)
        for connection in tuple(self._connections):
            connection.drop_transport()
        await self._wait_for_none(_GRACE)
        await self._server.wait_closed()
        self._server = None

    async def _wait_for_none(self, seconds: float) -> None:
        if self._connections and seconds > 0:
            self._none_left.clear()
            try:
                async with asyncio.timeout(seconds):
                    await self._none_left.wait()
            except TimeoutError:
                pass

    # --- what connections ask for ---------------------------------------------------------------------------------

    @property
    def limits(self) -> _Limits:
        return self._limits

    @property
    def receiver(self) -> Receiver:
        return self._receiver

    def add(self, connection: _Connection) -> bool:
        """Take in a new connection; false when there are too many of them."""
        self._connections.add(connection)
        return len(self._connections) <= self._limits.max_connections

    def remove(self, connection: _Connection) -> None:
        self._connections.discard(connection)
        if not self._connections:
            self._none_left.set()

    def check(self, request: pdu.AssociateRQ) -> pdu.AssociateRJ | None:
        return check_request(
            request,
            ae_title=self._ae_title,
            calling_ae_titles=self._calling_ae_titles,
            has_room=len(self._established) < self._limits.max_associations,
        )

    def establish(self, connection: _Connection) -> int:
        """Count a connection as an association and return its id."""
        self._last_id += 1
        self._established[self._last_id] = connection
        return self._last_id

    def end(self, association: PeerAssociation) -> bool:
        """Forget an association; false when that was done before."""
        return self._established.pop(association.id, None) is not None


class _Connection(asyncio.BufferedProtocol):
    """One transport connection and, once accepted, its association.

    Requests are carried out one after the other, as they come: an asynchronous operations window is not offered.
    """

    # Mutable state: the machines (_layer, _messages), the peer once accepted (peer), its contexts (_syntaxes) and
    # maximum length (_peer_max), the request whose data set is coming in (_command, _context_id) with who takes it
    # (_incoming) and the status it has so far (_status), timers (_active_at: last sign of life, _artim_at and
    # _artim_state: since when and in which state ARTIM runs, _timer), why reading is paused (_paused_by_consumer,
    # _paused_by_output), and the first reason to end (_reason).

    _transport: asyncio.Transport

    def __init__(self, scp: StoreScp, loop: asyncio.AbstractEventLoop) -> None:
        limits = scp.limits
        self._scp, self._limits, self._receiver, self._loop = scp, limits, scp.receiver, loop
        self._layer = UpperLayer(
            Role.ACCEPTOR, max_pdu_length=limits.max_pdu, max_associate_length=limits.max_associate_length
        )
        self._messages = dimse.MessageReader(max_command_length=limits.max_command_length)
        self._buffer = memoryview(bytearray(limits.receive_buffer))
        self._socket: socket.socket | None = None
        self._address = ("", 0)
        self.peer: PeerAssociation | None = None
        self._syntaxes: Mapping[int, str] = {}
        self._peer_max = 0
        self._command: dimse.Command | None = None
        self._context_id = 0
        self._incoming: Incoming | None = None
        self._status = dimse.STATUS_SUCCESS
        self._active_at = self._artim_at = loop.time()
        self._artim_state = State.STA1
        self._timer: asyncio.TimerHandle | None = None
        self._paused_by_consumer = self._paused_by_output = False
        self._reason = ""

    # --- asyncio --------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._layer.perform(Event.EVT5)
        self._address = (transport.get_extra_info("peername") or self._address)[:2]
        if not self._scp.add(self):
            logger.warning("connection of %s closed unheard: too many connections", self._who())
            self._transport.abort()
            return
        # A descriptor of our own: uvloop's stand-in for the socket makes and closes one for each option that is set.
        self._socket = socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno()))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._settle()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self._socket is not None:
            # A peer that leaves Nagle's algorithm on waits for our ACK before it sends the rest of an object, and the
            # kernel delays that by 40 ms unless told otherwise, after each read anew (tcp(7)).
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        self._active_at = self._loop.time()
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
        # The peer asks on and does not read our answers: it is not listened to until it does.
        self._set_reading(by_output=True)

    def resume_writing(self) -> None:
        self._active_at = self._loop.time()
        self._set_reading(by_output=False)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._layer.state is not State.STA1:
            self._layer.perform(Event.EVT17)
        self._end(f"connection lost: {exc}" if exc else "connection closed by the peer")
        self._scp.remove(self)
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    # --- what the server asks for ---------------------------------------------------------------------------------

    def set_paused(self, *, by_consumer: bool) -> None:
        self._active_at = self._loop.time()
        self._set_reading(by_consumer=by_consumer)

    def abort(self, reason: str) -> None:
        """End with A-ABORT, or just close where there is no association to abort."""
        if self._layer.state is State.STA6:
            self._reason = self._reason or f"aborted by us: {reason}"
            logger.warning("A-ABORT to %s: %s", self._who(), reason)
            self._layer.perform(Event.EVT15)
            self._settle()
        elif self._layer.state is not State.STA13:
            self._transport.close()

    def drop_transport(self) -> None:
        self._transport.abort()

    # --- time and transport ---------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Do what the machine wants done: send, run ARTIM, close."""
        layer = self._layer
        if output := layer.take_output():
            self._transport.write(output)
        if layer.state is State.STA6:
            return
        if layer.aborted and not self._reason:
            self._reason = f"aborted by us: {layer.aborted}"
            logger.warning("A-ABORT to %s: %s", self._who(), layer.aborted)
        if layer.state is State.STA13 or layer.closing:
            self._end("aborted by us")
        if layer.artim_running and layer.state is not self._artim_state:
            self._artim_state, self._artim_at = layer.state, self._loop.time()
            self._watch()
        if layer.closing:
            self._transport.close()

    def _watch(self) -> None:
        """Act when a time limit is over, else come again when the next one is due."""
        if self._timer is not None:
            self._timer.cancel()
        now, limits = self._loop.time(), self._limits
        if self._layer.artim_running:
            due = self._artim_at + limits.artim_timeout
        elif self._layer.closing:
            due = self._active_at + limits.artim_timeout
        elif self._paused_by_consumer:
            due = now + limits.stall_timeout
        else:
            due = self._active_at + limits.stall_timeout
        if now < due:
            self._timer = self._loop.call_at(due, self._watch)
        elif self._layer.artim_running:
            self._reason = self._reason or f"ARTIM timer expired in {self._layer.state.name}"
            logger.info("connection of %s closed: ARTIM timer expired in %s", self._who(), self._layer.state.name)
            self._layer.perform(Event.EVT18)
            self._transport.abort()  # at once: what is left to send is what the peer did not take
        elif self._layer.state is State.STA6:
            self.abort(f"nothing moved for {limits.stall_timeout:g} s")
        else:
            self._transport.abort()

    def _set_reading(self, *, by_consumer: bool | None = None, by_output: bool | None = None) -> None:
        was_paused = self._paused_by_consumer or self._paused_by_output
        if by_consumer is not None:
            self._paused_by_consumer = by_consumer
        if by_output is not None:
            self._paused_by_output = by_output
        is_paused = self._paused_by_consumer or self._paused_by_output
        if self._transport.is_closing() or is_paused == was_paused:
            return
        if is_paused:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    # --- association ----------------------------------------------------------------------------------------------

    def _who(self) -> str:
        name = self.peer.calling_ae_title if self.peer is not None else "(no association)"
        return f"{name} at {self._address[0]}:{self._address[1]}"

    def _indicate(self, item: pdu.Pdu) -> None:
        if isinstance(item, pdu.AssociateRQ):
            self._negotiate(item)
        elif isinstance(item, pdu.ReleaseRQ):
            self._reason = self._reason or "released"
            self._layer.perform(Event.EVT14)
        elif isinstance(item, pdu.Abort):
            by = "peer" if item.source == 0 else f"peer's service provider, reason {item.reason}"
            self._reason = self._reason or f"aborted by the {by}"

    def _negotiate(self, request: pdu.AssociateRQ) -> None:
        rejection = self._scp.check(request)
        if rejection is not None:
            logger.warning(
                "association of %s at %s for %s rejected: %d/%d/%d (PS3.8 Table 9-21)",
                request.calling_ae_title,
                self._address[0],
                request.called_ae_title,
                rejection.result,
                rejection.source,
                rejection.reason,
            )
            self._layer.perform(Event.EVT8, rejection.encode())
            return
        information = request.user_information
        peer = PeerAssociation(
            id=self._scp.establish(self),
            calling_ae_title=request.calling_ae_title,
            called_ae_title=request.called_ae_title,
            host=self._address[0],
            port=self._address[1],
            implementation_class_uid=information.implementation_class_uid,
            implementation_version_name=information.implementation_version_name,
        )
        self.peer = peer
        negotiation = negotiate(request.presentation_contexts, self._receiver.accepted_syntaxes(peer))
        self._syntaxes, self._peer_max = negotiation.accepted, information.maximum_length
        self._layer.contexts = frozenset(negotiation.accepted)
        answer = answer_request(request, negotiation, max_pdu_length=self._limits.max_pdu)
        self._layer.perform(Event.EVT7, answer.encode())
        self._watch()  # from now on it is the stall time-out that counts
        if negotiation.refused:
            self._receiver.syntaxes_refused(peer, negotiation.refused)

    def _end(self, reason: str) -> None:
        """Let go of the object on its way and of the association; does nothing the second time."""
        self._reason = self._reason or reason
        self._drop(self._reason)
        if self.peer is not None and self._scp.end(self.peer):
            self._receiver.association_closed(self.peer, self._reason)

    # --- requests -------------------------------------------------------------------------------------------------

    def _start(self, context_id: int, command: dimse.Command) -> None:
        """Begin with a request; what has no data set is carried out at once."""
        if isinstance(command, dimse.Response):
            raise DicomProtocolError("response to a request that was not made (PS3.7 8)", pdu.ABORT_UNEXPECTED_PDU)
        self._command, self._context_id, self._status = command, context_id, dimse.STATUS_SUCCESS
        if isinstance(command, dimse.CStoreRequest):
            self._begin_store(command)
        elif isinstance(command, dimse.OtherRequest):
            self._status = dimse.STATUS_UNRECOGNIZED_OPERATION
        if not command.has_data_set:
            self._finish()

    def _begin_store(self, command: dimse.CStoreRequest) -> None:
        if not command.has_data_set:
            self._status = dimse.STATUS_CANNOT_UNDERSTAND
        elif not is_uid(command.affected_sop_instance_uid):
            self._status = dimse.STATUS_INVALID_SOP_INSTANCE
        elif not is_uid(command.affected_sop_class_uid):
            self._status = dimse.STATUS_NO_SUCH_SOP_CLASS
        else:
            request = StoreRequest(
                cast(PeerAssociation, self.peer),
                command.affected_sop_class_uid,
                command.affected_sop_instance_uid,
                self._syntaxes[self._context_id],
                command.move_originator_ae_title,
                command.move_originator_message_id,
            )
            try:
                begun = self._receiver.begin(request)
            except Exception as exc:
                self._fail(exc)
                return
            if isinstance(begun, int):
                self._status = begun
            else:
                self._incoming = begun

    def _take(self, fragment: pdu.Fragment) -> None:
        """Pass a piece of the data set on, or drop it when nobody wants it."""
        if self._incoming is not None and fragment.data:
            try:
                self._incoming.write(fragment.data)
            except Exception as exc:
                self._fail(exc)
        if fragment.is_last:
            self._finish()

    def _finish(self) -> None:
        """The request is complete: carry it out and answer."""
        command, self._command = self._command, None
        if self._incoming is not None:
            try:
                self._status = self._incoming.commit()
                self._incoming = None
            except Exception as exc:
                self._fail(exc)
        if isinstance(command, dimse.CStoreRequest):
            answer = dimse.encode_response(
                dimse.C_STORE_RQ,
                command.message_id,
                self._status,
                command.affected_sop_class_uid,
                command.affected_sop_instance_uid,
            )
        elif isinstance(command, dimse.CEchoRequest):
            answer = dimse.encode_response(
                dimse.C_ECHO_RQ, command.message_id, self._status, command.affected_sop_class_uid
            )
        elif isinstance(command, dimse.OtherRequest):
            answer = dimse.encode_response(
                command.command_field,
                command.message_id,
                self._status,
                command.sop_class_uid,
                command.sop_instance_uid,
            )
        else:  # C-CANCEL has no response, and there is nothing to cancel
            return
        self._layer.send_data(pdu.encode_p_data(self._context_id, answer, is_command=True, max_length=self._peer_max))

    def _fail(self, exc: Exception) -> None:
        """Turn what the receiver raised into a status; the rest of the data set is dropped as it comes."""
        if isinstance(exc, SpoolFull | OSError):
            self._status = dimse.STATUS_OUT_OF_RESOURCES
            logger.error("instance from %s refused with A700H: %s", self._who(), exc)
        else:
            self._status = dimse.STATUS_PROCESSING_FAILURE
            logger.error("instance from %s refused with 0110H", self._who(), exc_info=exc)
        self._drop(str(exc))

    def _drop(self, reason: str) -> None:
        incoming, self._incoming = self._incoming, None
        if incoming is not None:
            incoming.discard(reason)
