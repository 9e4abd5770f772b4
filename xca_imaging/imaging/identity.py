"""Which PACS is at the other end of an association.

References
----------
* DICOM PS3.7, 9.3.1.1 (C-STORE-RQ: Move Originator Application Entity Title)
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Sequence

from xca_imaging import settings
from xca_imaging.imaging.receiver import PeerAssociation

_log = logging.getLogger(__name__)


class Identities:
    """Tells PACSs apart when they call: by AE title, by address where that is not enough.

    A PACS may send under another AE title than the one that it is called by, and several may share one.
    """

    # Mutable state: addresses by PACS, and which PACS an association comes from.

    def __init__(self, pacs: Sequence[settings.Pacs]) -> None:
        self._pacs = {each.name: each for each in pacs}
        self._hosts = {each.name: {each.host} for each in pacs}
        self._known: dict[int, str | None] = {}

    async def resolve(self) -> None:
        """Find the addresses of the PACSs."""
        loop = asyncio.get_running_loop()
        for name, pacs in self._pacs.items():
            try:
                found = await loop.getaddrinfo(pacs.host, pacs.port, type=socket.SOCK_STREAM)
            except OSError as exc:
                _log.info("%s: host %s cannot be resolved now: %s", name, pacs.host, exc)
                continue
            self._hosts[name].update(str(address[0]) for *_, address in found)

    def of(self, association: PeerAssociation, move_originator: str | None = None) -> str | None:
        """Return the PACS; None when it cannot be told.

        Parameters
        ----------
        move_originator : str, optional
            AE title that a C-STORE names as the originator of its C-MOVE. By the Standard that is ours; there are
            senders behind a PACS that put the PACS's own there, and where nothing else tells, it does.
        """
        if association.pacs is not None:
            return association.pacs  # we requested it
        if association.id not in self._known:
            titled = self._titled(association.calling_ae_title)
            if len(titled) != 1:
                titled = [name for name in titled or self._pacs if association.host in self._hosts[name]]
            self._known[association.id] = titled[0] if len(titled) == 1 else None
        name = self._known[association.id]
        if name is None and move_originator:
            titled = self._titled(move_originator)
            name = titled[0] if len(titled) == 1 else None
        return name

    def forget(self, association: PeerAssociation) -> None:
        """Learn that an association is over."""
        self._known.pop(association.id, None)

    def _titled(self, ae_title: str) -> list[str]:
        return [name for name, pacs in self._pacs.items() if pacs.ae_title == ae_title]
