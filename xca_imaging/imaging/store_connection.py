"""One transport connection of the Storage SCP and, once accepted, its association.

Bytes go from the socket into one buffer per association, and from there by memoryview to `Incoming.write`: the data
set is never parsed, joined or copied.

References
----------
* DICOM PS3.8, 9.2 (state machine), 9.1.5 (ARTIM timer)
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from xca_imaging.errors import DicomProtocolError
from xca_imaging.imaging.inbound import Inbound
from xca_imaging.imaging.receiver import Later, PeerAssociation, Receiver
from xca_imaging.wire import dimse, pdu
from xca_imaging.wire.upper_layer import Event, Role, State, UpperLayer, answer_request, negotiate

logger = logging.getLogger(__name__)

_ALIGN_FROM = 64 * 1024
"""Bytes left of a value from which on a read ends with it and the header of the next: one write each, not three."""

_NEXT_HEADER = 12  # bytes of a P-DATA-TF before its first data

_MOST_PIECES = 256
"""Pieces of a data set written at once; writev(2) takes 1024."""

_READS_AT_ONCE = 16
"""Reads of one peer before others get their turn: 2 MB in PDUs of the length that we offer."""

_SPARE = 16 * 1024
"""Bytes read at most of a peer that asks on before it is answered."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a connection keeps to; see `StoreScp`."""

    artim_timeout: float
    stall_timeout: float
    max_pdu: int
    max_associate_length: int
    max_command_length: int
    receive_buffer: int


class Scp(Protocol):
    """What a connection asks of the Storage SCP that it belongs to."""

    @property
    def limits(self) -> Limits: ...

    @property
    def receiver(self) -> Receiver: ...

    def add(self, connection: StoreConnection) -> bool:
        """Take in a new connection; false when there are too many of them."""

    def remove(self, connection: StoreConnection) -> None:
        """Forget a connection."""

    def check(self, request: pdu.AssociateRQ) -> pdu.AssociateRJ | None:
        """Return the rejection that the request deserves, or None."""

    def establish(self, connection: StoreConnection) -> int:
        """Count a connection as an association and return its id."""

    def end(self, association: PeerAssociation) -> bool:
        """Forget an association; false when that was done before."""


class StoreConnection(asyncio.BufferedProtocol):
    """A connection, served as bytes come.

    Requests are carried out one after the other, as they come: an asynchronous operations window is not offered.
    """

    # Mutable state: the machines (_layer, _messages), the peer once accepted (peer), its requests (_inbound) and
    # maximum length (_peer_max), timers (_active_at: last sign of life, _artim_at and _artim_state: since when and in
    # which state ARTIM runs, _timer), why reading is paused (_paused_by_consumer, _paused_by_output,
    # _paused_by_answer), whether we have sent something since the last read (_has_sent), what was read and must wait
    # for an answer (_unread), where it was read to (_spare), how much was asked for last (_asked), and the first reason
    # to end (_reason).

    _transport: asyncio.Transport

    def __init__(self, scp: Scp, loop: asyncio.AbstractEventLoop) -> None:
        limits = scp.limits
        self._scp, self._limits, self._receiver, self._loop = scp, limits, scp.receiver, loop
        self._layer = UpperLayer(
            Role.ACCEPTOR, max_pdu_length=limits.max_pdu, max_associate_length=limits.max_associate_length
        )
        self._messages = dimse.MessageReader(max_command_length=limits.max_command_length)
        self._buffer = memoryview(bytearray(limits.receive_buffer))
        self._spare: memoryview | None = None
        self._asked = 0
        self._socket: socket.socket | None = None
        self._is_plain = False
        self._address = ("", 0)
        self.peer: PeerAssociation | None = None
        self._peer_max = 0
        self._inbound: Inbound | None = None
        self._unread: Iterator[pdu.Pdu | pdu.Fragment] | None = None
        self._active_at = self._artim_at = loop.time()
        self._artim_state = State.STA1
        self._timer: asyncio.TimerHandle | None = None
        self._paused_by_consumer = self._paused_by_output = self._paused_by_answer = self._has_sent = False
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
        self._is_plain = transport.get_extra_info("ssl_object") is None
        self._settle()

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._unread is not None:  # its views are of the other one
            self._spare = memoryview(bytearray(_SPARE))
            return self._spare
        self._spare = None  # of a read that brought nothing
        window = self._window()
        self._asked = len(window)
        return window

    def _window(self) -> memoryview:
        left = self._layer.data_left
        return self._buffer[: left + _NEXT_HEADER] if left >= _ALIGN_FROM else self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._active_at = self._loop.time()
        self._has_sent = False
        if self._spare is not None:
            items, self._spare = self._layer.receive(self._spare[:nbytes]), None
            self._unread = items if self._unread is None else itertools.chain(self._unread, items)
            self._set_reading(by_answer=True)
            return
        is_new, is_full = self._messages.is_idle, nbytes == self._asked
        # A read that brought less than it might have has taken all; of a new object the rest is mostly there by now.
        if self._take(self._buffer[:nbytes]) and (is_full or is_new):
            self._read_on()
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
        self._unread = None
        self._end(f"connection lost: {exc}" if exc else "connection closed by the peer")
        self._scp.remove(self)
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    # --- what the server asks for ---------------------------------------------------------------------------------

    def set_paused(self, *, by_consumer: bool) -> None:
        """Stop reading, or read on. The stall time-out does not run meanwhile."""
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
        """Close without sending what is left."""
        self._transport.abort()

    # --- time and transport ---------------------------------------------------------------------------------------

    def _take(self, data: memoryview) -> bool:
        """Carry out what was read; return whether more of a data set is due."""
        fragment = self._layer.receive_value(data)
        return self._process(self._layer.receive(data) if fragment is None else iter((fragment,)))

    def _process(self, items: Iterator[pdu.Pdu | pdu.Fragment]) -> bool:
        """Carry out what was received, up to a request that must wait for its answer.

        The pieces of a data set that one read has brought are passed on together: one write for all of them. Returns
        whether it ended amid a request whose data set is still to come.
        """
        fragment, messages = pdu.Fragment, self._messages
        pieces: list[memoryview] = []
        is_amid = False
        try:
            for item in items:
                if isinstance(item, fragment):
                    inbound = self._inbound
                    assert inbound is not None  # the layer passes no data before the association is accepted
                    command = messages.receive(item)
                    if command is not None:
                        inbound.start(item.context_id, command)
                        is_amid = command.has_data_set
                    elif not item.is_command:
                        is_amid = not item.is_last
                        pieces.append(item.data)
                        if item.is_last or len(pieces) == _MOST_PIECES:
                            taken, pieces = pieces, []
                            inbound.take(item.is_last, *taken)
                    if inbound.is_waiting:
                        self._unread = items
                        return False
                else:
                    self._indicate(item)
            if pieces and self._inbound is not None:
                self._inbound.take(False, *pieces)
        except DicomProtocolError as error:
            self._layer.refuse(error)
            return False
        return is_amid

    def _read_on(self) -> None:
        """Read the rest of a data set as far as it has come, without going round the event loop for each piece.

        Senders write the command and the data set one right after the other.
        """
        if not self._is_plain or self._socket is None:
            return
        read, layer, messages, inbound = self._socket.recv_into, self._layer, self._messages, self._inbound
        assert inbound is not None
        for _ in range(_READS_AT_ONCE):
            if self._is_paused or self._transport.is_closing():
                return
            window = self._window()
            try:
                length = read(window, 0, socket.MSG_DONTWAIT)
            except OSError:  # nothing more has come yet, or the transport will tell what is wrong
                return
            if not length:  # the end of the stream will be told by the transport
                return
            data = window if length == len(window) else window[:length]
            value = layer.receive_value(data)
            if value is not None and not value.is_last and value.context_id == messages.data_set_context:
                inbound.take(False, value.data)
            elif not self._process(layer.receive(data) if value is None else iter((value,))):
                return
            if length < len(window):
                return

    def _go_on(self) -> None:
        """Carry out what came while an answer was waited for, and read on."""
        items, self._unread = self._unread, None
        if items is not None:
            self._active_at = self._loop.time()
            self._process(items)
        if self._unread is None:
            self._set_reading(by_answer=False)
        self._settle()

    def _settle(self) -> None:
        """Do what the machine wants done: send, run ARTIM, close."""
        layer = self._layer
        if output := layer.take_output():
            self._send(output)
        elif not self._has_sent and self._socket is not None:
            # A peer that leaves Nagle's algorithm on waits for our ACK before it sends the rest of an object, and the
            # kernel delays that by 40 ms unless told otherwise, each time anew (tcp(7)). An answer carries the ACK.
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
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

    def _send(self, output: bytes) -> None:
        """Send at once what the kernel takes, and leave the rest to the transport, which does so a little later."""
        self._has_sent = True
        if self._is_plain and self._socket is not None and not self._transport.get_write_buffer_size():
            try:
                sent = self._socket.send(output)
            except OSError:  # a full buffer, or a connection whose end the transport will tell
                sent = 0
            if sent == len(output):
                return
            output = output[sent:]
        self._transport.write(output)

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

    @property
    def _is_paused(self) -> bool:
        return self._paused_by_consumer or self._paused_by_output or self._paused_by_answer

    def _set_reading(
        self, *, by_consumer: bool | None = None, by_output: bool | None = None, by_answer: bool | None = None
    ) -> None:
        was_paused = self._is_paused
        if by_consumer is not None:
            self._paused_by_consumer = by_consumer
        if by_output is not None:
            self._paused_by_output = by_output
        if by_answer is not None:
            self._paused_by_answer = by_answer
        is_paused = self._is_paused
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
            self._consider(item)
        elif isinstance(item, pdu.ReleaseRQ):
            self._reason = self._reason or "released"
            self._layer.perform(Event.EVT14)
        elif isinstance(item, pdu.Abort):
            by = "peer" if item.source == 0 else f"peer's service provider, reason {item.reason}"
            self._reason = self._reason or f"aborted by the {by}"

    def _consider(self, request: pdu.AssociateRQ) -> None:
        """Reject a request for association, or negotiate."""
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
        self.peer = PeerAssociation(
            id=self._scp.establish(self),
            calling_ae_title=request.calling_ae_title,
            called_ae_title=request.called_ae_title,
            host=self._address[0],
            port=self._address[1],
            implementation_class_uid=information.implementation_class_uid,
            implementation_version_name=information.implementation_version_name,
        )
        wanted = self._receiver.accepted_syntaxes(self.peer)
        if isinstance(wanted, Later):
            wanted.then(lambda known: self._accept_later(request, known))
        else:
            self._accept(request, wanted)

    def _accept_later(self, request: pdu.AssociateRQ, wanted: Sequence[str] | None) -> None:
        if self._layer.state is State.STA3:  # the peer may have gone meanwhile
            self._accept(request, wanted)
            self._settle()

    def _accept(self, request: pdu.AssociateRQ, wanted: Sequence[str] | None) -> None:
        peer = self.peer
        assert peer is not None
        negotiation = negotiate(request.presentation_contexts, wanted)
        self._peer_max = request.user_information.maximum_length
        self._inbound = Inbound(self._receiver, peer, negotiation.accepted, self._respond, self._go_on)
        self._layer.contexts = frozenset(negotiation.accepted)
        answer = answer_request(request, negotiation, max_pdu_length=self._limits.max_pdu)
        self._layer.perform(Event.EVT7, answer.encode())
        self._watch()  # from now on it is the stall time-out that counts
        if negotiation.refused:
            self._receiver.syntaxes_refused(peer, negotiation.refused)

    def _respond(self, context_id: int, answer: bytes) -> None:
        if self._layer.state is State.STA6:  # an answer that came late may find the association gone
            self._layer.send_data(pdu.encode_p_data(context_id, answer, is_command=True, max_length=self._peer_max))
            self._send(self._layer.take_output())  # now: what is done after it, the peer does not wait for

    def _end(self, reason: str) -> None:
        """Let go of the object on its way and of the association; does nothing the second time."""
        self._reason = self._reason or reason
        if self._inbound is not None:
            self._inbound.drop(self._reason)
        if self.peer is not None and self._scp.end(self.peer):
            self._receiver.association_closed(self.peer, self._reason)
