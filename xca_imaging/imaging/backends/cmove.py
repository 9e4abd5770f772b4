"""C-MOVE: the PACS sends to our Storage SCP.

References
----------
* DICOM PS3.4, C.4.2 (C-MOVE operation), Table C.4-2 (status)
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from pydicom.dataset import Dataset

from xca_imaging.imaging.backends import MoveJob, MoveResult, identifiers
from xca_imaging.imaging.backends.pool import Associations
from xca_imaging.imaging.backends.requester import Proposal
from xca_imaging.imaging.backends.retrieve import CANCEL_TIMEOUT, raise_refusal, retrieve
from xca_imaging.imaging.receiver import PeerAssociation
from xca_imaging.wire import dimse

_log = logging.getLogger(__name__)

STUDY_ROOT_MOVE = "1.2.840.10008.5.1.4.1.2.2.2"  # PS3.4 C.6.2: Study Root Query/Retrieve Information Model - MOVE

_PROPOSALS = (Proposal(STUDY_ROOT_MOVE),)
_OUT_OF_RESOURCES = range(0xA700, 0xA800)
_UNABLE = range(0xC000, 0xD000)  # PS3.4 Table C.4-2: unable to process
_FAILURES = (range(0x0105, 0x0213), range(0xA700, 0xB000), _UNABLE)  # PS3.7 Annex C, PS3.4 Table C.4-2


class CMove:
    """C-MOVE requester for one PACS.

    Parameters
    ----------
    associations : Associations
        With that PACS.
    ae_title : str
        Ours: the move destination.
    listener : tuple of str and int
        Host and port of our Storage SCP, for texts that say what to configure on the PACS.
    cancel_timeout : float
        From C-CANCEL to A-ABORT.
    """

    def __init__(
        self,
        associations: Associations,
        *,
        ae_title: str,
        listener: tuple[str, int],
        cancel_timeout: float = CANCEL_TIMEOUT,
    ) -> None:
        self.pacs = associations.pacs
        self._associations, self._ae_title, self._listener = associations, ae_title, listener
        self._cancel_timeout = cancel_timeout

    async def move(self, job: MoveJob, on_response: Callable[[MoveResult], None]) -> MoveResult:
        """Run one C-MOVE to its final response, its cancellation or the end of its association.

        What an association that was used before refuses is asked again on one of its own: there are PACSs that do one
        C-MOVE on each.
        """
        identifier = identifiers.of_job(job, uid_list_limit=self.pacs.uid_list_limit)
        result, is_second = await self._attempt(identifier, on_response)
        if is_second and _has_failed(result) and result.status not in _OUT_OF_RESOURCES:
            first = result
            result, _ = await self._attempt(identifier, on_response, fresh=True)
            if result.status != first.status and self._associations.reuses:
                _log.info("%s takes no second C-MOVE on an association: each has its own from now on", self.pacs.name)
                self._associations.stop_reusing()
        raise_refusal(self.pacs.name, dimse.C_MOVE_RQ, result, destination=(self._ae_title, *self._listener))
        if result.status in _UNABLE and not result.completed and not result.error_comment:
            # Orthanc answers so, without a word, where others say 0xA801.
            host, port = self._listener
            hint = f"does the PACS know the remote AE {self._ae_title!r} with host {host} and port {port}?"
            result = replace(result, error_comment=hint)
        return result

    def pause(self, association: PeerAssociation) -> None:
        """Nothing: the instances come to our Storage SCP."""

    resume = pause

    async def close(self) -> None:
        """Let go of idle associations."""
        await self._associations.close()

    async def _attempt(
        self, identifier: Dataset, on_response: Callable[[MoveResult], None], *, fresh: bool = False
    ) -> tuple[MoveResult, bool]:
        """Return how it ended, and whether its association had been used before."""
        async with self._associations.lease(_PROPOSALS, fresh=fresh) as association:
            is_second = association.operations > 0
            context = association.context_of(STUDY_ROOT_MOVE)
            result = await retrieve(
                association,
                context,
                dimse.C_MOVE_RQ,
                identifiers.encode(identifier, context.transfer_syntax),
                on_response,
                move_destination=self._ae_title,
                cancel_timeout=self._cancel_timeout,
            )
            return result, is_second


def _has_failed(result: MoveResult) -> bool:
    """True when the PACS did nothing of what was asked."""
    if result.status is None:
        return result.completed is None
    return not result.completed and any(result.status in failures for failures in _FAILURES)
