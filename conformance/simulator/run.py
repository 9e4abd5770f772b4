"""The shell of the simulator: performs the scheduler's decisions in virtual time, and keeps count."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from conformance.simulator.load import COMMUNITIES, Transfer
from conformance.simulator.pacs import Model, Sending
from xca_imaging import uids
from xca_imaging.errors import PeerBusy
from xca_imaging.imaging import decisions as d
from xca_imaging.imaging.scheduler import Scheduler

_QUERY = 0.03  # seconds of a C-FIND
_ROOM = 10**15


@dataclass(slots=True)
class Standing:
    """How a transfer stands. `promise`: seconds after which its community's share of the PACS alone has served it."""

    transfer: Transfer
    left: int
    promise: float
    held: int = 0
    failed: int = 0
    ended: float | None = None


@dataclass(slots=True)
class Tally:
    """What was seen at one PACS. Work is in seconds of the PACS's lower bound, by community."""

    first_asked: float | None = None
    last_arrived: float = 0.0
    arrived: dict[str, None] = field(default_factory=dict)
    moves: int = 0
    queries: int = 0
    rejected: int = 0
    over_budget: int = 0
    longest_move: float = 0.0
    due: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # when the share has served all asked
    queued: dict[str, int] = field(default_factory=lambda: defaultdict(int))  # routine instances that no move carries
    served: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # while others waited too
    fair: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # what the weights say of that


class Simulation:
    """Runs transfers against modelled PACSs to their end."""

    # Mutable state: virtual time and the agenda (a heap), the scheduler, what runs, and the counts.

    stall_timeout = 30.0

    def __init__(self, models: dict[str, Model], load: list[Transfer], seed: int) -> None:
        self.models = models
        self.now = 0.0
        self.standings: dict[int, Standing] = {}
        self.tallies = {name: Tally() for name in models}
        self.steps = 0
        self._load = load
        self._random = random.Random(seed)
        self._scheduler = Scheduler(
            {name: model.budget for name, model in models.items()},
            stall_timeout=self.stall_timeout,
            randomness=random.Random(seed),
            max_waiting=10_000_000,
        )
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count(1)
        self._sendings: dict[int, Sending] = {}
        self._started: dict[int, float] = {}
        self._queries: dict[int, Callable[[], None]] = {}
        self._sizes: dict[int, tuple[str, str]] = {}
        self._community_of: dict[str, str] = {}
        self._answer: d.Decision | None = None
        self._alarm = 0

    def run(self) -> None:
        """Run until nothing is left to happen."""
        for transfer in self._load:
            self._at(transfer.time, partial(self._find, transfer))
        while self._agenda:
            self.now, _, action = heapq.heappop(self._agenda)
            action()

    @property
    def waiting(self) -> int:
        """Instances that the scheduler still waits for."""
        return self._scheduler.waiting + self._scheduler.active_moves

    def allowance(self, pacs: str) -> float:
        """Return what a transfer may wait beside what its share promises.

        Moves are not broken off: one of each community may go before (the delay bound of start-time fair queueing), a
        turn of another transfer syntax list takes 20 s and the moves that it ends with, and one may stall.
        """
        longest = self.tallies[pacs].longest_move
        return longest * len(COMMUNITIES) / self.models[pacs].budget.associations + 20.0 + longest + self.stall_timeout

    def _at(self, delay: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._agenda, (self.now + delay, next(self._numbers), action))

    # --- transfers ------------------------------------------------------------------------------------------------

    def _find(self, transfer: Transfer) -> None:
        """A transfer begins with a C-FIND, which takes a slot."""
        tally = self.tallies[transfer.pacs]
        tally.first_asked = self.now if tally.first_asked is None else tally.first_asked
        query = next(self._numbers)

        def ask() -> None:
            self._step(d.QueryFinished(query, transfer.pacs))
            self._ask(transfer)

        self._queries[query] = lambda: self._at(_QUERY, ask)
        self._step(d.QueryAsked(query, transfer.pacs))

    def _ask(self, transfer: Transfer) -> None:
        model, tally, name = self.models[transfer.pacs], self.tallies[transfer.pacs], transfer.community.name
        wants = [want.sop_instance_uid for fetch in transfer.fetches for want in fetch.wants]
        for uid in wants:
            if transfer.priority is d.Priority.ROUTINE and uid not in self._community_of:
                self._community_of[uid] = name
                tally.queued[name] += 1
        share = transfer.community.weight / sum(each.weight for each in COMMUNITIES)
        work = sum(model.work(uid) for uid in wants)
        tally.due[name] = max(self.now, tally.due[name]) + work / share
        self.standings[transfer.number] = Standing(transfer, len(wants), tally.due[name] - self.now)
        self._step(
            d.Asked(
                transfer.number,
                transfer.fetches,
                transfer.community.accept,
                _ROOM,
                name,
                transfer.priority,
                transfer.community.weight,
            )
        )
        if transfer.leaves_after is not None:
            self._at(transfer.leaves_after, lambda: self._leave(transfer))

    def _leave(self, transfer: Transfer) -> None:
        standing = self.standings[transfer.number]
        if standing.left:
            standing.left = 0
            for want in (want for fetch in transfer.fetches for want in fetch.wants):
                self._forget(self.tallies[transfer.pacs], want.sop_instance_uid)
            self._step(d.Withdrawn(transfer.number))

    def _end_want(self, request: int, uid: str, *, is_held: bool) -> None:
        standing = self.standings[request]
        transfer = standing.transfer
        if standing.left == 0:
            return
        standing.left -= 1
        standing.held += is_held
        standing.failed += not is_held
        self._forget(self.tallies[transfer.pacs], uid)
        if standing.left == 0:
            standing.ended = self.now
            self._step(d.Withdrawn(request))

    # --- decisions ------------------------------------------------------------------------------------------------

    def _step(self, event: d.Event) -> None:
        self.steps += 1
        for decision in self._scheduler.step(event, self.now):
            self._perform(decision)

    def _perform(self, decision: d.Decision) -> None:
        match decision:
            case d.AcceptStore() | d.DropStore() | d.RefuseStore():
                self._answer = decision
            case d.BeginInstance():
                pass
            case d.CompleteInstance(request, want):
                self._end_want(request, want.sop_instance_uid, is_held=True)
            case d.FailInstance(request, want):
                self._end_want(request, want.sop_instance_uid, is_held=False)
            case d.WakeAt(time):
                self._alarm += 1
                self._at(max(0.0, time - self.now), partial(self._wake, self._alarm))
            case d.StartMove():
                self._start(decision)
            case d.CancelMove(move):
                self._sendings[move].cancel()
            case d.StartQuery(query):
                self._queries.pop(query)()
            case d.CheckSeries(query, pacs, _, series):
                self.tallies[pacs].queries += 1
                objects = self.models[pacs].objects
                self._at(_QUERY, lambda: self._checked(query, pacs, series, objects))

    def _checked(self, query: int, pacs: str, series: str, objects: dict[str, tuple[str, int]]) -> None:
        present: dict[str, str] = {}
        for number in itertools.count(1):
            if (found := objects.get(f"{series}.{number}")) is None:
                break
            present[f"{series}.{number}"] = found[0]
        self._step(d.QueryFinished(query, pacs, present))

    def _wake(self, alarm: int) -> None:
        if alarm == self._alarm:
            self._step(d.Woke())

    def _start(self, move: d.StartMove) -> None:
        model, tally = self.models[move.pacs], self.tallies[move.pacs]
        tally.moves += 1
        tally.over_budget += model.active >= model.budget.associations
        self._serve(model, tally, move.instances)
        self._sendings[move.move] = Sending(
            model,
            move,
            randomness=self._random,
            now=lambda: self.now,
            at=self._at,
            offer=lambda uid, sop_class: self._offer(move, uid, sop_class),
            arrive=self._arrive,
            finish=lambda event: self._finish(tally, event),
        )
        self._started[move.move] = self.now

    def _serve(self, model: Model, tally: Tally, instances: tuple[str, ...]) -> None:
        """Count a move for the community that it serves, where others waited too with what is as urgent."""
        by: dict[str, float] = defaultdict(float)
        for uid in instances:
            if name := self._community_of.get(uid):
                by[name] += model.work(uid)
        waiting = [each for each in COMMUNITIES if tally.queued[each.name] > 0]
        total = sum(each.weight for each in waiting)
        for name, work in by.items():
            if len(waiting) > 1 and tally.queued[name] > 0:
                tally.served[name] += work
                for each in waiting:
                    tally.fair[each.name] += work * each.weight / total
        for uid in instances:
            self._forget(tally, uid)

    def _forget(self, tally: Tally, uid: str) -> None:
        """It waits no longer."""
        if name := self._community_of.pop(uid, ""):
            tally.queued[name] -= 1

    def _offer(self, move: d.StartMove, uid: str, sop_class: str) -> int | None:
        store = next(self._numbers)
        self._step(d.StoreOffered(store, move.pacs, sop_class, uid, uids.EXPLICIT_VR_LITTLE_ENDIAN))
        if not isinstance(self._answer, d.AcceptStore):
            return None
        self._sizes[store] = (move.pacs, uid)
        return store

    def _arrive(self, store: int, size: int) -> None:
        pacs, uid = self._sizes.pop(store)
        tally = self.tallies[pacs]
        tally.arrived[uid] = None
        tally.last_arrived = self.now
        self._step(d.InstanceArrived(store, size))

    def _finish(self, tally: Tally, event: d.MoveFinished) -> None:
        del self._sendings[event.move]
        tally.longest_move = max(tally.longest_move, self.now - self._started.pop(event.move))
        tally.rejected += isinstance(event.error, PeerBusy)
        self._step(event)
