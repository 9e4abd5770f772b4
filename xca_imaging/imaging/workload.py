"""The scheduler's records: requests, fetches, the batches and moves that carry them, and what is known of each PACS.

Values with state, changed by the scheduler's parts only; what stands here beside the data needs no other record.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from xca_imaging.errors import RegistryError
from xca_imaging.imaging.breaker import Breaker
from xca_imaging.imaging.budget import Budget, OpeningHours, TokenBucket
from xca_imaging.imaging.decisions import Level, Method, Priority
from xca_imaging.imaging.ledger import Want

if TYPE_CHECKING:
    from xca_imaging.imaging.fairness import FairQueue

Accept = tuple[str, ...]
"""Accepted transfer syntaxes, best first."""

Key = tuple[str, str, str, str, Accept]
"""PACS, study, series, SOP Instance UID, accepted transfer syntaxes."""


class Stage(enum.Enum):
    """Where a fetch stands."""

    QUEUED = enum.auto()  # in a batch of each request that waits for it
    PAUSED = enum.auto()  # will be queued again
    MOVING = enum.auto()  # a move is to bring it
    SETTLING = enum.auto()  # its move has ended, it may still come
    CHECKING = enum.auto()  # C-FIND tells whether it exists
    CLOSED = enum.auto()


@dataclass(slots=True, eq=False)
class Request:
    """Who waits, and how urgently."""

    id: int
    order: int
    accept: Accept
    asker: str
    priority: Priority
    weight: float
    fetches: dict[Fetch, None] = field(default_factory=dict)
    is_open: bool = True
    is_throttled: bool = False  # its consumer is slow: nothing new is started for it


@dataclass(slots=True, eq=False)
class Fetch:
    """One instance that one PACS is to send."""

    pacs: Pacs
    study: str
    series: str
    uid: str
    accept: Accept
    verify: bool
    sop_class: str | None  # None: no C-FIND has proved that the series has it
    estimate: float  # of its size, in bytes
    promised: float = 0.0  # room that is kept for it; none where only streaming consumers wait
    waiters: dict[Request, list[Want]] = field(default_factory=dict)
    stage: Stage = Stage.PAUSED
    move: Move | None = None  # the last one; it may have ended
    arriving: int = 0
    is_overdue: bool = False  # the grace after its move has passed
    attempts: int = 0
    tries: int = 0  # attempts in the way that is used now
    way: int = 0  # the first of the PACS's methods that may still bring it
    busy: int = 0
    is_checked: bool = False
    started: float = 0.0
    one_by_one: bool = False  # a list with it in was not understood
    reason: RegistryError | None = None  # why the last attempt did not bring it
    earlier: str = ""  # why the ways before did not
    syntax_error: RegistryError | None = None

    @property
    def key(self) -> Key:
        return self.pacs.name, self.study, self.series, self.uid, self.accept

    @property
    def is_open(self) -> bool:
        return self.stage is not Stage.CLOSED

    def enter(self, stage: Stage) -> None:
        """Change the stage, and the PACS's counts with it."""
        pacs = self.pacs
        if self.stage is Stage.QUEUED:
            pacs.queued[self.accept] -= 1
            if not pacs.queued[self.accept]:
                del pacs.queued[self.accept]
        elif self.stage is Stage.MOVING:
            pacs.moving -= 1
        if stage is Stage.QUEUED:
            pacs.queued[self.accept] = pacs.queued.get(self.accept, 0) + 1
        elif stage is Stage.MOVING:
            pacs.moving += 1
        self.stage = stage


@dataclass(slots=True, eq=False)
class Batch:
    """Fetches of one series that one request waits for. Other requests' batches may have the same ones."""

    request: Request
    fetches: deque[Fetch]
    count: int | None  # not None: these were the whole series, one SERIES level move brings them
    study: list[Batch] | None = None  # not None: these batches were the whole study

    def has_open(self) -> bool:
        """Drop from the head what is over, or carried by another batch; tell whether something is left."""
        if not self.request.is_open:
            return False
        fetches = self.fetches
        while fetches and fetches[0].stage is not Stage.QUEUED:
            fetches.popleft()
            self.count = self.study = None
        return bool(fetches)

    @property
    def is_whole(self) -> bool:
        """True when the whole series still waits, to be fetched in one way."""
        if self.count is None or len(self.fetches) != self.count:
            return False
        way = self.fetches[0].way
        return all(f.stage is Stage.QUEUED and not f.one_by_one and f.way == way for f in self.fetches)

    @property
    def is_whole_study(self) -> bool:
        """True when the whole study still waits, to be fetched in one way."""
        way = self.fetches[0].way
        return self.study is not None and all(each.is_whole and each.fetches[0].way == way for each in self.study)

    def take(self, limit: int) -> list[Fetch]:
        """Take at most so many fetches, all to be fetched in the same way."""
        taken: list[Fetch] = []
        while len(taken) < limit and self.has_open():
            first, head = (taken or self.fetches)[0], self.fetches[0]
            if (head.way, head.one_by_one) != (first.way, first.one_by_one):
                break
            taken.append(self.fetches.popleft())
            head.enter(Stage.MOVING)  # also ends its place in other batches
        self.count = self.study = None
        return taken


@dataclass(slots=True, eq=False)
class Move:
    """A move that runs, or has ended and may still bring something."""

    id: int
    pacs: Pacs
    way: int  # index of its method among the PACS's
    level: Level
    study: str
    accept: Accept
    fetches: dict[Fetch, None]  # those that it still is to bring
    listed: int
    started: float
    last_progress: float
    arrived: int = 0
    sop_classes: set[str] = field(default_factory=set)  # of what arrived
    refused: dict[str, tuple[str, ...]] = field(default_factory=dict)  # SOP class -> syntaxes we did not accept
    is_cancelled: bool = False
    no_room: str = ""  # why an instance of it could not be spooled

    @property
    def method(self) -> Method:
        return self.pacs.methods[self.way]

    @property
    def breaker(self) -> Breaker:
        return self.pacs.breakers[self.way]


@dataclass(slots=True, eq=False)
class Pacs:
    """One PACS: what runs there, what waits, and how it feels."""

    name: str
    budget: Budget
    queue: FairQueue
    hours: OpeningHours
    bucket: TokenBucket
    breakers: tuple[Breaker, ...]  # one for each method
    window: int  # associations that it takes just now: at most the budget's, less after it said busy
    accept: Accept = ()  # of the C-MOVEs that run, or ran last
    moves: dict[Move, None] = field(default_factory=dict)
    queries: set[int] = field(default_factory=set)
    waiting_queries: deque[int] = field(default_factory=deque)
    queries_in_row: int = 0  # started since a move had its turn
    queued: dict[Accept, int] = field(default_factory=dict)  # fetches in batches, by what is accepted
    moving: int = 0  # fetches that moves are to bring
    paused: dict[Fetch, None] = field(default_factory=dict)  # will be queued again
    pause_until: float = 0.0
    blocked_since: float | None = None  # since when batches wait for C-MOVEs with other accepted syntaxes to end
    seconds_each: float = 0.0  # of an instance in a move, running mean; 0: not seen yet
    minds_hours: bool = False  # a timer runs to when its hours begin or end
    busy_streak: int = 0
    good_moves: int = 0  # since the window was changed
    last_progress: float = 0.0  # when a wanted byte came
    last_heard: float = 0.0  # when it said or sent anything
    lists_fail: bool = False  # UID lists were not understood: remembered as long as we run

    @property
    def methods(self) -> tuple[Method, ...]:
        return self.budget.methods

    @property
    def has_slot(self) -> bool:
        return len(self.moves) + len(self.queries) < self.window

    def way(self, first: int, now: float) -> int | None:
        """Return the first method, from `first` on, that its breaker lets through."""
        return next((n for n in range(first, len(self.methods)) if self.breakers[n].admits(now)), None)

    def why_closed(self, first: int, now: float) -> str:
        """Return why no method from `first` on is used; empty when one is, or is being probed."""
        breakers = self.breakers[first:]
        if any(each.admits(now) or each.probe is not None for each in breakers):
            return ""
        return breakers[-1].explain(now) if breakers else "no other way to make it send"

    def waiting(self) -> Iterator[Fetch]:
        """Give each fetch that no move carries."""
        seen = dict(self.paused)
        for batch in self.queue:
            seen.update((fetch, None) for fetch in batch.fetches if fetch.stage is Stage.QUEUED)
        return iter(seen)

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

    def learn_speed(self, move: Move, now: float) -> None:
        """Take into account how long a move took for what it brought; too few instances tell nothing."""
        if move.arrived >= 8:
            seen = max(1e-4, (now - move.started) / move.arrived)
            self.seconds_each = 0.8 * self.seconds_each + 0.2 * seen if self.seconds_each else seen

    def widen(self) -> None:
        """A move ended well: after as many of them as fit beside each other, try one more at a time."""
        self.busy_streak = 0
        self.good_moves += 1
        if self.good_moves >= self.window:
            self.good_moves = 0
            self.window = min(self.budget.associations, self.window + 1)


@dataclass(slots=True, eq=False)
class Store:
    """An instance on its way in, and the fetches that it is for."""

    pacs: str | None
    sop_class: str
    uid: str
    syntax: str
    fetches: list[Fetch]
    negotiated: frozenset[str]  # transfer syntaxes that the PACS could choose from
    told: int = 0  # bytes that were heard of


def size_of_move(
    batch: Batch, *, time_left: float | None = None, longest: float = 20.0, shortest: float = 0.3, slack: float = 1.25
) -> tuple[Level, int]:
    """Return the level at which a batch is moved next, and how many instances at most.

    The PACS's associations are kept busy to the end: when fewer moves are left than associations, the batch is split
    into lists, each an association's share of what is left. Otherwise it goes whole, with its study where that is
    wanted whole too, because that is one association, one query and one identifier for it.

    Parameters
    ----------
    time_left : float, optional
        Seconds after which nothing more is started, until all moves have ended: they are to end together.
    longest, shortest : float
        Seconds that a move is to take at most, because who is more urgent waits for moves that run, and at least,
        because an association and an identifier cost a PACS some milliseconds too. By what was seen of the PACS; until
        then it is taken for a fast one.
    slack : float
        A series may be that much larger than a share before it is split.
    """
    head = batch.fetches[0]
    pacs, budget = head.pacs, head.pacs.budget
    limit = 1 if head.one_by_one or pacs.lists_fail else budget.uid_list_limit
    even = -(-(pacs.queued.get(head.accept, 0) + pacs.moving) // pacs.window)
    seconds_each = pacs.seconds_each or 0.01
    even = min(even, int(min(longest, longest if time_left is None else time_left) / seconds_each))
    share = max(1, int(shortest / seconds_each), even)
    if budget.bytes_per_second:  # moves of at most some seconds, so that the rate is even
        share = max(1, min(share, int(10 * budget.bytes_per_second / head.estimate)))
    if budget.level != "image" and batch.is_whole:
        count = len(batch.fetches)
        if budget.level != "series" and batch.is_whole_study:
            in_study = sum(len(each.fetches) for each in batch.study or ())
            if budget.level == "study" or count < in_study <= even:
                return "STUDY", in_study
        if budget.level != "auto" or limit == 1 or count <= slack * share:
            return "SERIES", count
    return "IMAGE", min(limit, share)
