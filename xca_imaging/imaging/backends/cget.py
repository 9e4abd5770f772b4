"""C-GET: the PACS sends on the association that we requested, so it has to know nothing of our Storage SCP.

References
----------
* DICOM PS3.4, C.4.3 (C-GET operation), C.5.3 (contexts and roles), Table C.4-3 (status)
"""

from __future__ import annotations

from collections.abc import Callable

from xca_imaging.imaging.backends import MoveJob, MoveResult, identifiers, storage_contexts
from xca_imaging.imaging.backends.pool import Associations
from xca_imaging.imaging.backends.requester import Proposal
from xca_imaging.imaging.backends.retrieve import CANCEL_TIMEOUT, raise_refusal, retrieve
from xca_imaging.imaging.receiver import PeerAssociation
from xca_imaging.wire import dimse

STUDY_ROOT_GET = "1.2.840.10008.5.1.4.1.2.2.3"  # PS3.4 C.6.2: Study Root Query/Retrieve Information Model - GET


class CGet:
    """C-GET requester for one PACS. What it sends goes to the Receiver of its associations.

    Parameters
    ----------
    associations : Associations
        With that PACS.
    cancel_timeout : float
        From C-CANCEL to A-ABORT.
    """

    def __init__(self, associations: Associations, *, cancel_timeout: float = CANCEL_TIMEOUT) -> None:
        self.pacs = associations.pacs
        self._associations, self._cancel_timeout = associations, cancel_timeout

    async def move(self, job: MoveJob, on_response: Callable[[MoveResult], None]) -> MoveResult:
        """Run one C-GET to its final response, its cancellation or the end of its association."""
        identifier = identifiers.of_job(job, uid_list_limit=self.pacs.uid_list_limit)
        storage = storage_contexts.propose(job.accept, job.sop_classes.values())
        async with self._associations.lease((Proposal(STUDY_ROOT_GET), *storage)) as association:
            context = association.context_of(STUDY_ROOT_GET)
            result = await retrieve(
                association,
                context,
                dimse.C_GET_RQ,
                identifiers.encode(identifier, context.transfer_syntax),
                on_response,
                cancel_timeout=self._cancel_timeout,
            )
        raise_refusal(self.pacs.name, dimse.C_GET_RQ, result)
        return result

    def pause(self, association: PeerAssociation) -> None:
        """Stop reading one of its associations: who takes the instances is slow."""
        if found := self._associations.find(association.id):
            found.set_paused(True)

    def resume(self, association: PeerAssociation) -> None:
        """Read on."""
        if found := self._associations.find(association.id):
            found.set_paused(False)

    async def close(self) -> None:
        """Let go of idle associations."""
        await self._associations.close()
