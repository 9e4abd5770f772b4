"""What the scheduler is told and what it decides: plain values, one for each line of the conversation.

Events are past tense, decisions imperative. Requests, stores and queries have the shell's numbers, moves the
scheduler's; queries that the scheduler itself wants (`CheckSeries`) are negative, so that the two never meet.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from xca_imaging.errors import PeerError, RegistryError
from xca_imaging.imaging.ledger import Want
from xca_imaging.imaging.plan import SeriesFetch

Level = Literal["STUDY", "SERIES", "IMAGE"]
"""Query/Retrieve Level of a move (PS3.4 C.6.2.1)."""

Method = Literal["c-move", "c-get", "wado-rs"]
"""How a PACS is made to send."""

# --------------------------------------------------------------------------------------------------------------------
# Events
# --------------------------------------------------------------------------------------------------------------------


class Priority(enum.IntEnum):
    """How urgent a request is."""

    EMERGENCY = 0
    ROUTINE = 1
    PREFETCH = 2


@dataclass(frozen=True, slots=True)
class Asked:
    """A request wants what its plan names.

    `room` is what the spool can take, in bytes. PACSs are shared between askers (communities) by their weights.
    `is_streaming`: its consumer takes instances as they come, so they need not all have room at once.
    """

    request: int
    fetches: tuple[SeriesFetch, ...]
    accept: tuple[str, ...]
    room: int
    asker: str = "local"
    priority: Priority = Priority.ROUTINE
    weight: float = 1.0
    is_streaming: bool = False


@dataclass(frozen=True, slots=True)
class Throttled:
    """The consumer of a request is slow and the spool high, or no longer so.

    Meanwhile nothing new is started for it, and a move that stands still for it is not given up.
    """

    request: int
    is_throttled: bool


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """A request ended, or nobody waits for it any more."""

    request: int


@dataclass(frozen=True, slots=True)
class QueryAsked:
    """The shell wants to ask a PACS by C-FIND; it may when `StartQuery` comes."""

    query: int
    pacs: str


@dataclass(frozen=True, slots=True)
class QueryFinished:
    """A query ended or was withdrawn; for `CheckSeries`: SOP Instance UID -> SOP Class UID, None = cannot be told."""

    query: int
    pacs: str
    present: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class MoveResponded:
    """A PACS sent an interim response: it lives, which is no progress of the move."""

    move: int


@dataclass(frozen=True, slots=True)
class MoveFinished:
    """A move's association is gone: with a final status, without one (None), or with an error."""

    move: int
    status: int | None = None
    completed: int | None = None
    failed_uids: tuple[str, ...] = ()
    comment: str = ""
    error: PeerError | None = None


@dataclass(frozen=True, slots=True)
class StoreOffered:
    """A C-STORE request came in. `pacs` is None where the peer cannot be told; `is_spooled`: we have this already."""

    store: int
    pacs: str | None
    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    is_spooled: bool = False


@dataclass(frozen=True, slots=True)
class BytesArrived:
    """Bytes of an accepted store came: `size` since the last word of it. Enough to be told once in a while."""

    store: int
    size: int


@dataclass(frozen=True, slots=True)
class InstanceArrived:
    """A store is whole and spooled, `size` bytes in all. Study and series stand here when read from the object."""

    store: int
    size: int
    study_instance_uid: str = ""
    series_instance_uid: str = ""


@dataclass(frozen=True, slots=True)
class StoreBroken:
    """A store ended before it was whole; `no_room`: because the spool is full."""

    store: int
    reason: str
    no_room: bool = False


@dataclass(frozen=True, slots=True)
class SyntaxesRefused:
    """Contexts were refused because none of their transfer syntaxes is accepted: SOP class -> proposed syntaxes."""

    pacs: str | None
    refused: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class ClockRead:
    """The wall clock shows this local time, in seconds since midnight; for PACSs with `hours`, at least once a day."""

    seconds_of_day: float


@dataclass(frozen=True, slots=True)
class Woke:
    """The time of a `WakeAt` has come."""


Event = (
    Asked
    | Throttled
    | Withdrawn
    | QueryAsked
    | QueryFinished
    | MoveResponded
    | MoveFinished
    | StoreOffered
    | BytesArrived
    | InstanceArrived
    | StoreBroken
    | SyntaxesRefused
    | ClockRead
    | Woke
)

# --------------------------------------------------------------------------------------------------------------------
# Decisions
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StartMove:
    """Make a PACS send.

    `series_instance_uid` is empty at STUDY level. `instances` are those that are wanted, at every level;
    `sop_classes` names the SOP class of those for which C-FIND told it.
    """

    move: int
    pacs: str
    method: Method
    level: Level
    study_instance_uid: str
    series_instance_uid: str
    instances: tuple[str, ...]
    accept: tuple[str, ...]
    sop_classes: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class CancelMove:
    """Stop a move; `MoveFinished` must still follow, it frees the slot."""

    move: int
    reason: str


@dataclass(frozen=True, slots=True)
class StartQuery:
    """A query that was asked for may run now."""

    query: int


@dataclass(frozen=True, slots=True)
class CheckSeries:
    """Find at IMAGE level what a series has: a move ended and left instances out."""

    query: int
    pacs: str
    study_instance_uid: str
    series_instance_uid: str


@dataclass(frozen=True, slots=True)
class AcceptStore:
    """Spool it. `verify`: read study and series from the object before it is reported as arrived."""

    store: int
    verify: bool


@dataclass(frozen=True, slots=True)
class DropStore:
    """Answer Success and forget the bytes: we own this instance already."""

    store: int


@dataclass(frozen=True, slots=True)
class RefuseStore:
    """Refuse it: nobody wants it, or not in this transfer syntax."""

    store: int
    reason: str


@dataclass(frozen=True, slots=True)
class BeginInstance:
    """A wanted instance has started to arrive."""

    request: int
    want: Want


@dataclass(frozen=True, slots=True)
class LoseInstance:
    """Its arrival broke off."""

    request: int
    want: Want


@dataclass(frozen=True, slots=True)
class CompleteInstance:
    """It is held; `store` brought it, from `pacs` by `method` (of the last move that was to bring it)."""

    request: int
    want: Want
    store: int
    attempts: int
    pacs: str
    method: Method


@dataclass(frozen=True, slots=True)
class FailInstance:
    """It will not come."""

    request: int
    want: Want
    error: RegistryError
    attempts: int


@dataclass(frozen=True, slots=True)
class WakeAt:
    """Send `Woke` at this time; replaces the last one."""

    time: float


Decision = (
    StartMove
    | CancelMove
    | StartQuery
    | CheckSeries
    | AcceptStore
    | DropStore
    | RefuseStore
    | BeginInstance
    | LoseInstance
    | CompleteInstance
    | FailInstance
    | WakeAt
)
