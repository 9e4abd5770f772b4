"""Ways to make a PACS send instances; one interface, one module each.

A back end is asked for one move at a time and runs on the event loop until it has ended; how many run at once, what is
asked again and when to give up is decided by `imaging/scheduler.py` alone.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from xca_imaging import settings
from xca_imaging.imaging.decisions import Level, Method
from xca_imaging.imaging.receiver import PeerAssociation, Receiver

if TYPE_CHECKING:
    from xca_imaging.imaging.backends.pool import Associations


@dataclass(frozen=True, slots=True)
class MoveJob:
    """One retrieval to ask of a PACS, by the unique keys of its level (DICOM PS3.4, C.4.2.1.4).

    Parameters
    ----------
    accept : tuple of str
        Transfer syntaxes that instances may come in, best first; empty: any. A C-MOVE negotiates them at our Storage
        SCP, the other ways ask for them.
    sop_classes : mapping
        SOP Instance UID -> SOP class, of the instances for which it is known.
    """

    level: Level
    study_instance_uid: str
    series_instance_uid: str = ""
    sop_instance_uids: tuple[str, ...] = ()
    accept: tuple[str, ...] = ()
    sop_classes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class MoveResult:
    """How a retrieval ended, in the PACS's words, of which no counter can be trusted.

    `status` is the final DIMSE status, None when the association ended without one. Counters are None where the PACS
    gave none.
    """

    status: int | None
    completed: int | None = None
    failed: int | None = None
    warning: int | None = None
    remaining: int | None = None
    failed_uids: tuple[str, ...] = ()
    error_comment: str = ""


class Backend(Protocol):
    """Makes one PACS send instances to our Storage SCP, or fetches them and hands them to our Receiver."""

    pacs: settings.Pacs

    async def move(self, job: MoveJob, on_response: Callable[[MoveResult], None]) -> MoveResult:
        """Run one retrieval to its end.

        `on_response` is called for each interim response. A cancelled call asks the PACS to stop, breaks off what does
        not end within two seconds, and raises CancelledError after that.

        Raises
        ------
        PeerError
            When the retrieval could not be asked for, or was refused for good.
        """

    def pause(self, association: PeerAssociation) -> None:
        """Stop reading one of its own associations: who takes the instances is slow."""

    def resume(self, association: PeerAssociation) -> None:
        """Read on."""

    async def close(self) -> None:
        """Let go of connections that are kept for the next retrieval."""


def make_backends(
    associations: Associations,
    *,
    ae_title: str,
    listener: tuple[str, int],
    receiver: Receiver,
    connect_timeout: float,
    stall_timeout: float,
    https: ssl.SSLContext | None = None,
) -> dict[Method, Backend]:
    """Return the back ends that the settings of a PACS name.

    Parameters
    ----------
    associations : Associations
        With that PACS; what it sends on them goes to the same receiver.
    ae_title : str
        Ours: the move destination.
    listener : tuple of str and int
        Host and port of our Storage SCP, for texts that say what to configure on the PACS.
    receiver : Receiver
        Takes what comes by HTTP.
    connect_timeout, stall_timeout : float
        Seconds for an HTTP connection to stand, and for one that does not move.
    https : ssl.SSLContext, optional
        For the requests that we make by HTTP.
    """
    from xca_imaging.imaging.backends.cget import CGet
    from xca_imaging.imaging.backends.cmove import CMove
    from xca_imaging.imaging.backends.wadors import WadoRs

    pacs = associations.pacs
    made: dict[Method, Backend] = {}
    for method in dict.fromkeys((pacs.retrieve, *pacs.fallback)):
        match method:
            case "c-move":
                made[method] = CMove(associations, ae_title=ae_title, listener=listener)
            case "c-get":
                made[method] = CGet(associations)
            case "wado-rs":
                made[method] = WadoRs(
                    pacs,
                    ae_title=ae_title,
                    receiver=receiver,
                    tls=https,
                    connect_timeout=connect_timeout,
                    stall_timeout=stall_timeout,
                )
    return made
