"""Requests that a peer makes on an association: C-STORE and C-ECHO carried out, the rest answered.

The same at both ends of an association: a Storage SCP is asked on those that peers request, a C-GET requester on its
own (DICOM PS3.4, C.4.3). Data sets go to the `Receiver` as they come, by memoryview.

References
----------
* DICOM PS3.4, B.2.3 (status of C-STORE); PS3.7, 9.1.1 (C-STORE), 9.1.5 (C-ECHO), Annex C (status)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from xca_imaging.errors import DicomProtocolError, SpoolFull
from xca_imaging.imaging.receiver import Incoming, PeerAssociation, Receiver, StoreRequest
from xca_imaging.uids import is_uid
from xca_imaging.wire import dimse, pdu

logger = logging.getLogger(__name__)


class Inbound:
    """The requests of one association, one after the other: an asynchronous operations window is not offered.

    Parameters
    ----------
    syntaxes : mapping
        Transfer syntaxes of the accepted presentation contexts, by context id.
    respond : callable
        Sends a command set in a context.
    """

    # Mutable state: the request whose data set is coming in (_command, _context_id), who takes it (_incoming) and the
    # status it has so far (_status).
    __slots__ = ("_command", "_context_id", "_incoming", "_peer", "_receiver", "_respond", "_status", "_syntaxes")

    def __init__(
        self,
        receiver: Receiver,
        peer: PeerAssociation,
        syntaxes: Mapping[int, str],
        respond: Callable[[int, bytes], None],
    ) -> None:
        self._receiver, self._peer, self._syntaxes, self._respond = receiver, peer, syntaxes, respond
        self._command: dimse.Command | None = None
        self._context_id = 0
        self._incoming: Incoming | None = None
        self._status = dimse.STATUS_SUCCESS

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
            self._status = dimse.STATUS_UNRECOGNIZED_OPERATION
        if not command.has_data_set:
            self._finish()

    def take(self, fragment: pdu.Fragment) -> None:
        """Pass a piece of the data set on, or drop it when nobody wants it."""
        if self._incoming is not None and fragment.data:
            try:
                self._incoming.write(fragment.data)
            except Exception as exc:
                self._fail(exc)
        if fragment.is_last:
            self._finish()

    def drop(self, reason: str) -> None:
        """Let go of the object on its way: the association is over. Does nothing the second time."""
        incoming, self._incoming = self._incoming, None
        if incoming is not None:
            incoming.discard(reason)

    def _begin_store(self, command: dimse.CStoreRequest) -> None:
        if not command.has_data_set:
            self._status = dimse.STATUS_CANNOT_UNDERSTAND
        elif not is_uid(command.affected_sop_instance_uid):
            self._status = dimse.STATUS_INVALID_SOP_INSTANCE
        elif not is_uid(command.affected_sop_class_uid):
            self._status = dimse.STATUS_NO_SUCH_SOP_CLASS
        else:
            request = StoreRequest(
                self._peer,
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
            field, uid = dimse.C_STORE_RQ, command.affected_sop_instance_uid
            answer = dimse.encode_response(field, command.message_id, self._status, command.affected_sop_class_uid, uid)
        elif isinstance(command, dimse.CEchoRequest):
            answer = dimse.encode_response(
                dimse.C_ECHO_RQ, command.message_id, self._status, command.affected_sop_class_uid
            )
        elif isinstance(command, dimse.OtherRequest):
            answer = dimse.encode_response(
                command.command_field, command.message_id, self._status, command.sop_class_uid, command.sop_instance_uid
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
