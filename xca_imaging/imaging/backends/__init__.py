"""Ways to make a PACS send instances; one interface, one module each.

A back end is asked for one move at a time and blocks until it has ended; how many run at once, what is asked again
and when to give up is decided by `imaging/scheduler.py` alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from xca_imaging import settings
from xca_imaging.imaging.decisions import Level


@dataclass(frozen=True, slots=True)
class MoveJob:
    """One retrieval to ask of a PACS, by the unique keys of its level (DICOM PS3.4, C.4.2.1.4)."""

    level: Level
    study_instance_uid: str
    series_instance_uid: str = ""
    sop_instance_uids: tuple[str, ...] = ()


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
    """Makes one PACS send instances to our Storage SCP (or fetches them)."""

    pacs: settings.Pacs

    def move(self, job: MoveJob, on_response: Callable[[MoveResult], None], cancelled: threading.Event) -> MoveResult:
        """Run one retrieval to its end; blocks.

        `on_response` is called, in the calling thread, for each interim response. After `cancelled` is set the
        call ends within a bounded time, whatever the PACS does.

        Raises
        ------
        PeerError
            When the retrieval could not be asked for, or was refused for good.
        """
