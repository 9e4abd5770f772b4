"""The scheduler's records: fetches, the batches and moves that carry them, and what is known of each PACS.

Values with state, changed by `imaging/scheduler.py` only; what stands here beside the data needs no other record.
"""

from __future__ import annotations

import enum
import heapq
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from xca_imaging.errors import RegistryError
from xca_imaging.imaging.decisions import Level
from xca_imaging.imaging.ledger import Want

Key = tuple[str, str, str, str, tuple[str, ...]]
"""PACS, study, series, SOP Instance UID, accepted transfer syntaxes."""


class Stage(enum.Enum):
    """Where a fetch stands."""

    QUEUED = enum.auto()  # in a batch, now or after a pause
    MOVING = enum.auto()  # a move is to bring it
    SETTLING = enum.auto()  # its move has ended, it may still come
    CHECKING = enum.auto()  # C-FIND tells whether it exists


@dataclass(slots=True, eq=False)
class Fetch:
    """One instance that one PACS is to send."""

    pacs: str
    study: str
    series: str
    uid: str
    accept: tuple[str, ...]
    verify: bool
    sop_class: str | None  # None: no C-FIND has proved that the series has it
    waiters: dict[int, list[Want]] = field(default_factory=dict)
    stage: Stage = Stage.QUEUED
    move: Move | None = None  # the last one; it may have ended
    arriving: int = 0
    is_overdue: bool = False  # the grace after its move has passed
    attempts: int = 0
    busy: int = 0
    is_checked: bool = False
    started: float = 0.0
    one_by_one: bool = False  # a list with it in was answered with zero sub-operations
    is_open: bool = True
    reason: RegistryError | None = None  # why the last attempt did not bring it
    syntax_error: RegistryError | None = None

    @property
    def key(self) -> Key:
        return self.pacs, self.study, self.series, self.uid, self.accept


@dataclass(slots=True, eq=False)
class Batch:
    """Fetches of one series that wait for a slot."""

    order: int
    accept: tuple[str, ...]
    fetches: deque[Fetch]
    count: int | None  # not None: these are the whole series, one SERIES level move brings them
    is_single: bool = False  # one by one: the PACS does not understand lists

    def has_open(self) -> bool:
        """Drop what is no longer wanted from the head; tell whether something is left."""
        while self.fetches and not self.fetches[0].is_open:
            self.fetches.popleft()
            self.count = None
        return bool(self.fetches)

    def take_whole(self) -> list[Fetch]:
        """Take all fetches when they still are the whole series, else none."""
        count, self.count = self.count, None
        whole = [fetch for fetch in self.fetches if fetch.is_open]
        if count is None or len(whole) != count:
            return []
        self.fetches.clear()
        return whole

    def take(self, limit: int) -> list[Fetch]:
        """Take at most so many fetches."""
        taken: list[Fetch] = []
        while len(taken) < limit and self.has_open():
            taken.append(self.fetches.popleft())
        return taken


@dataclass(slots=True, eq=False)
class Move:
    """A move that runs, or has ended and may still bring something."""

    id: int
    pacs: Pacs
    level: Level
    accept: tuple[str, ...]
    order: int
    fetches: dict[Fetch, None]  # those that it still is to bring
    listed: int
    last_progress: float
    arrived: int = 0
    sop_classes: set[str] = field(default_factory=set)  # of what arrived
    refused: dict[str, tuple[str, ...]] = field(default_factory=dict)  # SOP class -> syntaxes we did not accept
    is_cancelled: bool = False
    no_room: str = ""  # why an instance of it could not be spooled


@dataclass(slots=True, eq=False)
class Pacs:
    """One PACS: what runs there, what waits, and how it feels."""

    name: str
    limit: int
    window: int  # associations that it takes just now: at most `limit`, less after it said busy
    accept: tuple[str, ...] = ()  # of the moves that run, or ran last
    moves: set[Move] = field(default_factory=set)
    queries: set[int] = field(default_factory=set)
    waiting_queries: deque[int] = field(default_factory=deque)
    queue: list[tuple[int, int, Batch]] = field(default_factory=list)  # heap: order of the request, tie-breaker
    arrivals: itertools.count[int] = field(default_factory=itertools.count)  # keeps batches of one order in line
    pause_until: float = 0.0
    busy_streak: int = 0
    good_moves: int = 0  # since the window was changed
    last_progress: float = 0.0  # when a wanted byte came
    last_heard: float = 0.0  # when it said or sent anything
    lists_fail: bool = False  # UID lists brought zero sub-operations: remembered as long as we run

    @property
    def has_slot(self) -> bool:
        return len(self.moves) + len(self.queries) < self.window

    def enqueue(self, batch: Batch) -> None:
        """Put a batch into the queue at the place of its order."""
        heapq.heappush(self.queue, (batch.order, next(self.arrivals), batch))

    def next_batch(self) -> Batch | None:
        """Return the batch whose turn it is; it stays in the queue until it is empty."""
        while self.queue and not self.queue[0][2].has_open():
            heapq.heappop(self.queue)
        return self.queue[0][2] if self.queue else None

    def pause(self, now: float, pause: Callable[[int], float]) -> bool:
        """It said that it is busy: no more at a time than run now, and nothing new for a while.

        `pause` gives the length by how often that happened in a row; returns whether a pause begins.
        """
        self.window = max(1, len(self.moves) + len(self.queries))
        self.good_moves = 0
        if now < self.pause_until:
            return False  # several moves that were refused together are one refusal
        self.busy_streak += 1
        self.pause_until = now + pause(self.busy_streak)
        return True

    def widen(self) -> None:
        """A move ended well: after as many of them as fit beside each other, try one more at a time."""
        self.busy_streak = 0
        self.good_moves += 1
        if self.good_moves >= self.window:
            self.good_moves = 0
            self.window = min(self.limit, self.window + 1)


@dataclass(slots=True, eq=False)
class Store:
    """An instance on its way in, and the fetches that it is for."""

    pacs: str | None
    sop_class: str
    uid: str
    syntax: str
    fetches: list[Fetch]
    negotiated: frozenset[str]  # transfer syntaxes that the PACS could choose from
