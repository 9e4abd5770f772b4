"""The operation that C-MOVE and C-GET share: one request, pending responses, a final one, C-CANCEL.

References
----------
* DICOM PS3.4, C.4.2 and C.4.3 (C-MOVE and C-GET operations), Tables C.4-2 and C.4-3 (status)
* DICOM PS3.7, 9.1.3 and 9.1.4 (counters), 9.3.2.3 (C-CANCEL)
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from xca_imaging.errors import PeerRefused
from xca_imaging.imaging.backends import MoveResult, identifiers
from xca_imaging.imaging.backends.requester import PENDING, Association, AssociationLost, Context
from xca_imaging.wire import dimse

_log = logging.getLogger(__name__)

CANCEL_TIMEOUT = 2.0
"""Seconds from C-CANCEL to A-ABORT: enough for a PACS to finish the object it is sending, short for who waits."""

MOVE_DESTINATION_UNKNOWN = 0xA801

# PS3.4 Tables C.4-2 and C.4-3, PS3.7 Annex C: repeating the same request does not change these.
_FINAL_REFUSALS = {
    0x0122: "SOP class not supported",
    0x0124: "not authorised",
    0x0211: "unrecognised operation",
    0x0212: "mistyped argument",
    0xA900: "identifier does not match SOP class",
}
_NAMES = {dimse.C_MOVE_RQ: "C-MOVE", dimse.C_GET_RQ: "C-GET"}


async def retrieve(
    association: Association,
    context: Context,
    command_field: int,
    identifier: bytes,
    on_response: Callable[[MoveResult], None],
    *,
    move_destination: str = "",
    cancel_timeout: float = CANCEL_TIMEOUT,
) -> MoveResult:
    """Run one retrieval to its final response, its cancellation or the end of its association.

    There is no response time-out: a PACS may send for hours between two responses. Who asks watches the arriving
    bytes and cancels; the PACS then hears a C-CANCEL, and `cancel_timeout` seconds later an A-ABORT.
    """
    last = MoveResult(None)
    try:
        association.request(context, command_field, identifier, move_destination=move_destination)
        while True:
            answer = await association.answer()
            if answer.response.command_field != command_field | dimse.RESPONSE:
                association.abort("answer to another request")
                comment = f"answered a {_NAMES[command_field]} with command field {answer.response.command_field:04X}H"
                return _without_status(last, comment)
            last = _result(association, context, answer.response, answer.data)
            if answer.response.status not in PENDING:
                return last
            on_response(last)
    except AssociationLost as lost:
        when = "before the first response" if last.status is None else "before a final response"
        return _without_status(last, f"the association ended {when}: {lost}")
    except asyncio.CancelledError:
        await _cancel(association, context, cancel_timeout)
        raise


async def _cancel(association: Association, context: Context, cancel_timeout: float) -> None:
    try:
        association.cancel(context)
        async with asyncio.timeout(cancel_timeout):
            while (await association.answer()).response.status in PENDING:
                pass
    except TimeoutError:
        association.abort(f"cancelled {cancel_timeout:g} s ago")
    except AssociationLost:
        pass
    except asyncio.CancelledError:
        association.abort("cancelled twice")
        raise


def raise_refusal(
    pacs: str, command_field: int, result: MoveResult, *, destination: tuple[str, str, int] | None = None
) -> None:
    """Raise PeerRefused for a final status that repeating the same request does not change.

    Parameters
    ----------
    destination : tuple of str, str and int, optional
        AE title, host and port that a PACS has to know for C-MOVE.
    """
    status = result.status
    if status is None:
        return
    name = _NAMES[command_field]
    comment = f": {result.error_comment}" if result.error_comment else ""
    if status == MOVE_DESTINATION_UNKNOWN and destination is not None:
        ae_title, host, port = destination
        raise PeerRefused(
            pacs,
            f"{name} status 0xA801, move destination unknown{comment}: "
            f"on the PACS, add the remote AE {ae_title!r} with host {host} and port {port}",
        )
    if status in _FINAL_REFUSALS:
        raise PeerRefused(pacs, f"{name} status 0x{status:04X}, {_FINAL_REFUSALS[status]}{comment}")


def _result(association: Association, context: Context, response: dimse.Response, data: bytes) -> MoveResult:
    return MoveResult(
        status=response.status,
        completed=response.completed,
        failed=response.failed,
        warning=response.warning,
        remaining=response.remaining,
        failed_uids=_failed_uids(association, context, data),
        error_comment=response.error_comment,
    )


def _failed_uids(association: Association, context: Context, data: bytes) -> tuple[str, ...]:
    """Read FailedSOPInstanceUIDList (0008,0058); many PACSs leave the whole identifier out."""
    if not data:
        return ()
    try:
        value = identifiers.decode(data, context.transfer_syntax).get("FailedSOPInstanceUIDList") or []
        return (str(value),) if isinstance(value, str) else tuple(str(uid) for uid in value)
    except Exception as exc:  # pydicom raises what it likes for bytes of others; the list is only a hint
        _log.info("%s: failed list of a response cannot be read: %s", association.pacs.name, exc)
        return ()


def _without_status(last: MoveResult, comment: str) -> MoveResult:
    return MoveResult(None, last.completed, last.failed, last.warning, last.remaining, (), comment)
