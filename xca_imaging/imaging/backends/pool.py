"""Associations with one PACS that are kept for the next operation.

Opening an association costs two round trips, a TLS handshake, and on some PACSs a process. What an operation leaves
behind in good order is kept for a few seconds, and used by the next operation of the same kind.

A PACS counts associations, also idle ones. So none is opened beside more of them than its budget has room for, idle
ones make place first, and all of them go when the PACS rejects one for want of room.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from xca_imaging import settings
from xca_imaging.errors import PeerBusy
from xca_imaging.imaging.backends.requester import Association, Proposal, associate
from xca_imaging.imaging.receiver import Receiver

_log = logging.getLogger(__name__)

IDLE_TIMEOUT = 3.0
"""Seconds that an idle association is kept: the next move of a busy PACS comes at once, an idle PACS is left alone."""


class Associations:
    """The associations that we have with one PACS.

    Parameters
    ----------
    calling_ae_title, tls, listener, connect_timeout
        See `associate`.
    receiver : Receiver, optional
        Takes what the PACS sends on associations whose proposals receive.
    idle_timeout : float
        Seconds that an idle association is kept.

    Attributes
    ----------
    reuses : bool
        False once `stop_reusing` was called.
    """

    # Mutable state: reuses; idle associations, longest idle first, with their proposals and the timer that ends them
    # (_idle); all that are open, idle ones included (_open), and how many more are being opened (_opening); what closes
    # in the background (_closing).

    def __init__(
        self,
        pacs: settings.Pacs,
        *,
        calling_ae_title: str,
        tls: ssl.SSLContext | None = None,
        listener: tuple[str, int] | None = None,
        receiver: Receiver | None = None,
        connect_timeout: float = 10.0,
        idle_timeout: float = IDLE_TIMEOUT,
    ) -> None:
        self.pacs, self.reuses = pacs, True
        self._calling_ae_title, self._tls, self._listener = calling_ae_title, tls, listener
        self._receiver, self._connect_timeout, self._idle_timeout = receiver, connect_timeout, idle_timeout
        self._idle: dict[Association, tuple[tuple[Proposal, ...], asyncio.TimerHandle]] = {}
        self._open: set[Association] = set()
        self._opening = 0
        self._closing: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def lease(
        self, proposals: Sequence[Proposal], *, fresh: bool = False, receiver: Receiver | None = None
    ) -> AsyncIterator[Association]:
        """Give an association for one operation; it is kept, or gone, when the context is left.

        Parameters
        ----------
        fresh : bool
            Open one for this use alone, whatever is idle.
        receiver : Receiver, optional
            Takes what the PACS sends in place of the common one; the association is for this use alone.

        Raises
        ------
        PeerError
            See `associate`.
        """
        key, fresh = tuple(proposals), fresh or receiver is not None
        association = None if fresh else self._take(key)
        if association is None:
            association = await self._connect(key, receiver or self._receiver)
        try:
            yield association
        finally:
            if self.reuses and not fresh and association.is_usable:
                self._keep(association, key)
            else:
                await self._close(association)

    def find(self, association_id: int) -> Association | None:
        """Return the open association with this id."""
        return next((each for each in self._open if each.peer.id == association_id), None)

    def stop_reusing(self) -> None:
        """From now on each operation has an association of its own."""
        self.reuses = False
        self._drop_idle()

    async def close(self) -> None:
        """End all that is idle or closing; those in use end with their operations."""
        self.stop_reusing()
        await asyncio.gather(*self._closing)

    def _take(self, key: tuple[Proposal, ...]) -> Association | None:
        """Return the idle association that was used last, of those that still are in good order."""
        for association in reversed(tuple(self._idle)):
            proposals, timer = self._idle[association]
            if not association.is_usable:
                self._drop(association)
            elif proposals == key:
                timer.cancel()
                del self._idle[association]
                return association
        return None

    async def _connect(self, key: tuple[Proposal, ...], receiver: Receiver | None) -> Association:
        self._opening += 1
        try:
            while self._idle and len(self._open) + self._opening > self.pacs.max_associations:
                association = next(iter(self._idle))
                self._idle.pop(association)[1].cancel()
                await self._close(association)
            association = await self._associate(key, receiver)
        finally:
            self._opening -= 1
        self._open.add(association)
        return association

    async def _associate(self, key: tuple[Proposal, ...], receiver: Receiver | None) -> Association:
        receives = any(each.receives for each in key)
        try:
            return await associate(
                self.pacs,
                calling_ae_title=self._calling_ae_title,
                proposals=key,
                tls=self._tls,
                listener=self._listener,
                receiver=receiver if receives else None,
                connect_timeout=self._connect_timeout,
            )
        except PeerBusy:
            self._drop_idle()
            raise

    def _keep(self, association: Association, key: tuple[Proposal, ...]) -> None:
        timer = asyncio.get_running_loop().call_later(self._idle_timeout, self._drop, association)
        self._idle[association] = key, timer

    def _drop(self, association: Association) -> None:
        """End an idle association in the background."""
        self._idle.pop(association)[1].cancel()
        task = asyncio.get_running_loop().create_task(self._close(association))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _drop_idle(self) -> None:
        for association in tuple(self._idle):
            self._drop(association)

    async def _close(self, association: Association) -> None:
        try:
            await association.close()
        finally:
            self._open.discard(association)
