"""Requests that a peer makes on an association: C-STORE, N-CREATE and C-ECHO carried out, the rest answered.

The same at both ends of an association: a Storage SCP is asked on those that peers request, a C-GET requester on its
own (DICOM PS3.4, C.4.3). Data sets go to the `Receiver` as they come, by memoryview; only that of an Instance
Availability Notification is collected.

References
----------
* DICOM PS3.4, B.2.3 (status of C-STORE), R.3 (Instance Availability Notification); PS3.7, 9.1.1 (C-STORE), 9.1.5
  (C-ECHO), 10.1.5 (N-CREATE), Annex C (status)
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Mapping

from xca_imaging.errors import DicomProtocolError, SpoolFull
from xca_imaging.imaging.receiver import MAX_NOTIFICATION, Incoming, Later, PeerAssociation, Receiver, StoreRequest
from xca_imaging.uids import is_uid
from xca_imaging.wire import dimse, pdu
from xca_imaging.wire.upper_layer import INSTANCE_AVAILABILITY_NOTIFICATION

logger = logging.getLogger(__name__)


class Inbound:
    """The requests of one association, one after the other: an asynchronous operations window is not offered.

    Parameters
    ----------
    syntaxes : mapping
        Transfer syntaxes of the accepted presentation contexts, by context id.
    respond : callable
        Sends a command set in a context.
    go_on : callable, optional
        Called after an answer that had to be waited for was sent.

    Attributes
    ----------
    is_waiting : bool
        A request is complete and its answer is not there yet: nothing more may be passed in until `go_on`.
    """

    # Mutable state: the request whose data set is coming in (_command, _context_id), who takes it (_incoming) and the
    # status it has so far (_status), the SOP class that was last found to be one (_known_class), and is_waiting.
    __slots__ = (
        "_command",
        "_context_id",
        "_go_on",
        "_incoming",
        "_known_class",
        "_peer",
        "_receiver",
        "_respond",
        "_status",
        "_syntaxes",
        "is_waiting",
    )

    def __init__(
        self,
        receiver: Receiver,
        peer: PeerAssociation,
        syntaxes: Mapping[int, str],
        respond: Callable[[int, bytes], None],
        go_on: Callable[[], None] | None = None,
    ) -> None:
        self._receiver, self._peer, self._syntaxes, self._respond = receiver, peer, syntaxes, respond
        self._go_on = go_on
        self._command: dimse.Command | None = None
        self._context_id = 0
        self._incoming: Incoming | None = None
        self._status = dimse.STATUS_SUCCESS
        self._known_class = ""
        self.is_waiting = False

    def start(self, context_id: int, command: dimse.Command) -> None:
        """Begin with a request; what has no data set is carried out at once.

        Raises
        ------
        DicomProtocolError
            It is a response.
        """
        if isinstance(command, dimse.Response):
            raise DicomProtocolError("response to a request that was not made (PS3.7 8)", pdu.ABORT_UNEXPECTED_PDU)
        self._command, self._context_id, self._status = command, context_id, dimse.STATUS_SUCCESS
        if isinstance(command, dimse.CStoreRequest):
            self._begin_store(command)
        elif isinstance(command, dimse.OtherRequest):
            self._begin_other(command)
        if not command.has_data_set:
            self._finish()

    def take(self, is_last: bool, *data: memoryview) -> None:
        """Pass pieces of the data set on, or drop them when nobody wants it; `is_last` when it ends with them."""
        if self._incoming is not None:
            try:
                self._incoming.write(*data)
            except Exception as exc:
                self._fail(exc)
        if is_last:
            self._finish()

    def drop(self, reason: str) -> None:
        """Let go of the object on its way: the association is over. Does nothing the second time."""
        incoming, self._incoming = self._incoming, None
        if incoming is not None:
            incoming.discard(reason)

    def _begin_store(self, command: dimse.CStoreRequest) -> None:
        sop_class_uid = command.affected_sop_class_uid
        if not command.has_data_set:
            self._status = dimse.STATUS_CANNOT_UNDERSTAND
        elif not is_uid(command.affected_sop_instance_uid):
            self._status = dimse.STATUS_INVALID_SOP_INSTANCE
        elif sop_class_uid != self._known_class and not is_uid(sop_class_uid):
            self._status = dimse.STATUS_NO_SUCH_SOP_CLASS
        else:
            self._known_class = sop_class_uid
            request = StoreRequest(
                self._peer,
                sop_class_uid,
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

    def _begin_other(self, command: dimse.OtherRequest) -> None:
        is_notification = (
            command.command_field == dimse.N_CREATE_RQ and command.sop_class_uid == INSTANCE_AVAILABILITY_NOTIFICATION
        )
        if not is_notification:
            self._status = dimse.STATUS_UNRECOGNIZED_OPERATION
        elif not command.has_data_set:
            self._status = dimse.STATUS_MISSING_ATTRIBUTE
        elif command.sop_instance_uid and not is_uid(command.sop_instance_uid):
            self._status = dimse.STATUS_INVALID_SOP_INSTANCE
        else:
            if not command.sop_instance_uid:  # ours to choose, and named in the response (PS3.7 10.1.5.1.4)
                command = self._command = command._replace(sop_instance_uid=f"2.25.{uuid.uuid4().int}")
            self._incoming = _Notification(self._receiver, self._peer, command, self._syntaxes[self._context_id])

    def _finish(self) -> None:
        """The request is complete: carry it out, answer, and only then tell of it here."""
        incoming = self._incoming
        if incoming is None:
            self._answer(self._status)
            return
        try:
            status = incoming.commit()
        except Exception as exc:
            self._fail(exc)
            self._answer(self._status)
            return
        self._incoming = None
        if isinstance(status, Later):
            self.is_waiting = not status.is_known
            status.then(self._answer_later if self.is_waiting else self._answer)
        else:
            self._answer(status)
        try:
            incoming.conclude()
        except Exception as exc:
            logger.error("an instance that was answered could not be kept", exc_info=exc)
            incoming.discard(str(exc))

    def _answer_later(self, status: int) -> None:
        self.is_waiting = False
        self._answer(status)
        if self._go_on is not None:
            self._go_on()

    def _answer(self, status: int) -> None:
        command, self._command = self._command, None
        if isinstance(command, dimse.CStoreRequest):
            answer = dimse.encode_response(
                dimse.C_STORE_RQ,
                command.message_id,
                status,
                command.affected_sop_class_uid,
                command.affected_sop_instance_uid,
            )
        elif isinstance(command, dimse.CEchoRequest):
            answer = dimse.encode_response(dimse.C_ECHO_RQ, command.message_id, status, command.affected_sop_class_uid)
        elif isinstance(command, dimse.OtherRequest):
            answer = dimse.encode_response(
                command.command_field, command.message_id, status, command.sop_class_uid, command.sop_instance_uid
            )
        else:  # C-CANCEL has no response, and there is nothing to cancel
            return
        self._respond(self._context_id, answer)

    def _fail(self, exc: Exception) -> None:
        """Turn what the receiver raised into a status; the rest of the data set is dropped as it comes."""
        who = f"{self._peer.called_ae_title if self._peer.pacs else self._peer.calling_ae_title} at {self._peer.host}"
        if isinstance(exc, SpoolFull | OSError):
            self._status = dimse.STATUS_OUT_OF_RESOURCES
            logger.error("instance from %s refused with A700H: %s", who, exc)
        else:
            self._status = dimse.STATUS_PROCESSING_FAILURE
            logger.error("instance from %s refused with 0110H", who, exc_info=exc)
        self.drop(str(exc))


class _Notification:
    """The data set of an Instance Availability Notification, as far as it is not too long."""

    # Mutable state: the bytes so far (_data), and whether they have become too many (_is_too_long).

    def __init__(
        self, receiver: Receiver, peer: PeerAssociation, command: dimse.OtherRequest, transfer_syntax_uid: str
    ) -> None:
        self._receiver, self._peer, self._command = receiver, peer, command
        self._transfer_syntax_uid = transfer_syntax_uid
        self._data = bytearray()
        self._is_too_long = False

    def write(self, *data: memoryview) -> None:
        for piece in data:
            if len(self._data) + len(piece) > MAX_NOTIFICATION:
                self._is_too_long = True
                self._data.clear()
            if not self._is_too_long:
                self._data += piece

    def commit(self) -> int | Later[int]:
        if self._is_too_long:
            return dimse.STATUS_RESOURCE_LIMITATION
        return self._receiver.create_instance(
            self._peer,
            self._command.sop_class_uid,
            self._command.sop_instance_uid,
            bytes(self._data),
            self._transfer_syntax_uid,
        )

    def conclude(self) -> None:
        self._data.clear()

    def discard(self, reason: str) -> None:
        self._data.clear()
