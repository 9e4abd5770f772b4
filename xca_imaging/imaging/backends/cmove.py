"""C-MOVE: the PACS sends to our Storage SCP.

References
----------
* DICOM PS3.4, C.4.2 (C-MOVE operation), Table C.4-2 (status), C.4.2.1.4 (identifier)
* DICOM PS3.7, 9.1.4 (counters), 9.3.2.3 (C-CANCEL)
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import BytesIO
from typing import TYPE_CHECKING, Any

from pydicom import Dataset
from pynetdicom.dimse_primitives import C_MOVE
from pynetdicom.dsutils import decode

from xca_imaging import settings
from xca_imaging.errors import LocalProtocolError, PeerProtocolError, PeerRefused
from xca_imaging.imaging.backends import MoveJob, MoveResult
from xca_imaging.imaging.backends.association import associate

if TYPE_CHECKING:
    from pynetdicom.association import Association

_log = logging.getLogger(__name__)

STUDY_ROOT_MOVE = "1.2.840.10008.5.1.4.1.2.2.2"  # PS3.4 C.6.2: Study Root Query/Retrieve Information Model - MOVE

UID_LIST_LIMIT = 128
"""SOP Instance UIDs in one identifier: 128 UIDs of 64 characters are 8 KB. The 16-bit length of an explicit UI element
ends at 1008 of them, and PACSs that turn the list into one database query end sooner (often at 1000 or 256)."""

_MESSAGE_ID = 1  # one operation on each association
_PENDING = (0xFF00, 0xFF01)
_MOVE_DESTINATION_UNKNOWN = 0xA801
# PS3.4 Table C.4-2 and PS3.7 Annex C: repeating the same request does not change these.
_FINAL_REFUSALS = {
    0x0122: "SOP class not supported",
    0x0124: "not authorised",
    0x0211: "unrecognised operation",
    0x0212: "mistyped argument",
    0xA900: "identifier does not match SOP class",
}


class CMove:
    """C-MOVE requester for one PACS.

    Parameters
    ----------
    ae_title : str
        Ours: calling AE title and move destination.
    listener : tuple of str and int
        Host and port of our Storage SCP, for texts that say what to configure on the PACS.
    connect_timeout : float
        See `associate`.
    cancel_timeout : float
        From C-CANCEL to A-ABORT: enough for a PACS to finish the object it is sending, short for who waits.
    poll : float
        How often a waiting move looks for its cancellation.
    """

    def __init__(
        self,
        pacs: settings.Pacs,
        *,
        ae_title: str,
        listener: tuple[str, int],
        tls: ssl.SSLContext | None = None,
        connect_timeout: float = 10.0,
        cancel_timeout: float = 2.0,
        poll: float = 0.1,
        uid_list_limit: int = UID_LIST_LIMIT,
    ) -> None:
        self.pacs = pacs
        self._ae_title, self._listener, self._tls = ae_title, listener, tls
        self._connect_timeout, self._cancel_timeout, self._poll = connect_timeout, cancel_timeout, poll
        self._uid_list_limit = uid_list_limit
        self._executor = ThreadPoolExecutor(pacs.max_associations, f"c-move {pacs.name}")

    async def move(self, job: MoveJob, on_response: Callable[[MoveResult], None]) -> MoveResult:
        """Run one C-MOVE to its final response, its cancellation or the end of its association."""
        loop = asyncio.get_running_loop()
        cancelled = threading.Event()

        def respond(result: MoveResult) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody is left to hear it
                loop.call_soon_threadsafe(on_response, result)

        ended = loop.run_in_executor(self._executor, self._move, job, respond, cancelled)
        try:
            return await asyncio.shield(ended)
        except asyncio.CancelledError:
            cancelled.set()
            await asyncio.wait([ended])
            ended.exception()  # what it raises now is of no interest
            raise

    async def close(self) -> None:
        """Nothing is kept but idle threads."""
        self._executor.shutdown(wait=False)

    def _move(self, job: MoveJob, on_response: Callable[[MoveResult], None], cancelled: threading.Event) -> MoveResult:
        """Run one C-MOVE; blocks.

        There is no response time-out: a PACS may send for hours between two responses. Who asks watches the arriving
        bytes and sets `cancelled`.
        """
        identifier = self._identifier(job)
        with associate(
            self.pacs,
            calling_ae_title=self._ae_title,
            contexts=[STUDY_ROOT_MOVE],
            tls=self._tls,
            listener=self._listener,
            connect_timeout=self._connect_timeout,
            response_timeout=self._poll,
        ) as association:
            # send_c_move sends at once; its generator would abort after one response time-out, so the responses are
            # read from the message queue here.
            association.send_c_move(identifier, self._ae_title, STUDY_ROOT_MOVE, msg_id=_MESSAGE_ID)
            result = self._read_responses(association, on_response, cancelled)
        self._raise_refusal(result)
        return result

    def _identifier(self, job: MoveJob) -> Dataset:
        keys = [job.study_instance_uid]
        if job.level != "STUDY":
            keys.append(job.series_instance_uid)
        if job.level == "IMAGE":
            keys += job.sop_instance_uids or ("",)
        if not all(keys):
            raise LocalProtocolError(f"C-MOVE at {job.level} level needs its unique keys (PS3.4 C.4.2.1.4)")
        if len(job.sop_instance_uids) > self._uid_list_limit:
            raise LocalProtocolError(f"more than {self._uid_list_limit} SOP Instance UIDs in one C-MOVE")
        identifier = Dataset()
        identifier.QueryRetrieveLevel = job.level
        identifier.StudyInstanceUID = job.study_instance_uid
        if job.level != "STUDY":
            identifier.SeriesInstanceUID = job.series_instance_uid
        if job.level == "IMAGE":
            identifier.SOPInstanceUID = list(job.sop_instance_uids)
        return identifier

    def _read_responses(
        self, association: Association, on_response: Callable[[MoveResult], None], cancelled: threading.Event
    ) -> MoveResult:
        last = MoveResult(None, error_comment="the association ended before the first response")
        deadline: float | None = None
        while True:
            _, message = association.dimse.get_msg(block=True)
            if isinstance(message, C_MOVE) and message.is_valid_response:
                result = self._result(message, association)
                if result.status not in _PENDING:
                    return result
                last = result
                on_response(result)
            elif message is not None:
                association.abort(block=False)
                raise PeerProtocolError(self.pacs.name, f"answered a C-MOVE with {type(message).__name__}")
            elif not association.dul.is_alive() or association.dul.peek_next_pdu() is not None:  # abort, release, close
                return _without_status(last, "the PACS ended the association before a final response")
            if deadline is None and cancelled.is_set():
                association.send_c_cancel(_MESSAGE_ID, query_model=STUDY_ROOT_MOVE)
                deadline = time.monotonic() + self._cancel_timeout
            elif deadline is not None and time.monotonic() >= deadline:
                association.abort(block=False)
                return _without_status(last, f"cancelled, and aborted {self._cancel_timeout:g} s later")

    def _result(self, message: Any, association: Association) -> MoveResult:
        return MoveResult(
            status=message.Status,
            completed=message.NumberOfCompletedSuboperations,
            failed=message.NumberOfFailedSuboperations,
            warning=message.NumberOfWarningSuboperations,
            remaining=message.NumberOfRemainingSuboperations,
            failed_uids=self._failed_uids(message.Identifier, association),
            error_comment=str(message.ErrorComment or ""),
        )

    def _failed_uids(self, identifier: BytesIO | None, association: Association) -> tuple[str, ...]:
        """Read FailedSOPInstanceUIDList (0008,0058); many PACSs leave the whole identifier out."""
        if identifier is None or not identifier.getvalue():
            return ()
        syntax = association.accepted_contexts[0].transfer_syntax[0]
        try:
            dataset = decode(identifier, syntax.is_implicit_VR, syntax.is_little_endian, syntax.is_deflated)
            value = dataset.get("FailedSOPInstanceUIDList") or []
        except Exception as exc:  # pydicom raises what it likes for bytes of others; the list is only a hint
            _log.info("%s: failed list of a C-MOVE response cannot be read: %s", self.pacs.name, exc)
            return ()
        return (str(value),) if isinstance(value, str) else tuple(str(uid) for uid in value)

    def _raise_refusal(self, result: MoveResult) -> None:
        status = result.status
        if status is None:
            return
        comment = f": {result.error_comment}" if result.error_comment else ""
        if status == _MOVE_DESTINATION_UNKNOWN:
            host, port = self._listener
            raise PeerRefused(
                self.pacs.name,
                f"C-MOVE status 0xA801, move destination unknown{comment}: "
                f"on the PACS, add the remote AE {self._ae_title!r} with host {host} and port {port}",
            )
        if status in _FINAL_REFUSALS:
            raise PeerRefused(self.pacs.name, f"C-MOVE status 0x{status:04X}, {_FINAL_REFUSALS[status]}{comment}")


def _without_status(last: MoveResult, comment: str) -> MoveResult:
    return MoveResult(None, last.completed, last.failed, last.warning, last.remaining, (), comment)
