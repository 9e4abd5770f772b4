"""Which PACS is asked for what, when, how, how often, and when to give up: events in, decisions out.

Pure: time comes in with each event, randomness from a generator that is handed in, nothing is awaited or sent. The
shell (`imaging/transfer.py`) performs each decision and feeds back what came of it.

How it thinks:

* A *fetch* is one instance that one PACS is to send, in one of the accepted transfer syntaxes. However many requests
  wait for it, it is fetched once; a waiter holds no slot.
* Each request queues its fetches by series in *batches* (`fairness`: whose turn it is); a batch becomes one or more
  *moves* when its PACS has free slots (`workload.size_of_move`: how large). C-FIND queries take slots too, before
  moves, because they are short and others wait for their answer.
* What arrives is matched in `stores`, what does not is dealt with in `recovery`. No PACS's word is taken for either.
* The Storage SCP negotiates by peer, so C-MOVEs with different transfer syntax lists never run at one PACS together.
* A step costs what it changes: it looks at the PACSs that it touches, and never at all that waits.

References
----------
* DICOM PS3.4, C.4.2 (C-MOVE); PS3.8, Table 9-21 (A-ASSOCIATE-RJ 2/3/2)
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping

from xca_imaging.errors import RegistryError, RepositoryBusy, RepositoryOutOfResources
from xca_imaging.imaging.breaker import Breaker
from xca_imaging.imaging.budget import Budget, OpeningHours, TokenBucket
from xca_imaging.imaging.decisions import (
    Asked,
    BeginInstance,
    BytesArrived,
    CheckSeries,
    ClockRead,
    Decision,
    Event,
    FailInstance,
    InstanceArrived,
    MoveFinished,
    MoveResponded,
    Priority,
    QueryAsked,
    QueryFinished,
    StartMove,
    StartQuery,
    StoreBroken,
    StoreOffered,
    SyntaxesRefused,
    Throttled,
    Withdrawn,
    Woke,
)
from xca_imaging.imaging.fairness import FairQueue, Fit
from xca_imaging.imaging.plan import SeriesFetch
from xca_imaging.imaging.recovery import Recovery
from xca_imaging.imaging.stores import Stores
from xca_imaging.imaging.waitlist import Waitlist
from xca_imaging.imaging.workload import Accept, Batch, Fetch, Move, Pacs, Stage, size_of_move

_UNIT = 512 * 1024
"""Bytes for which an instance counts once in an asker's share: a CT slice. Larger ones count by their size."""


_QUERIES_IN_ROW = 16
"""Queries that go before a move that waits: many, as they are short and requests begin with them, but not for ever."""


class Scheduler:
    """The decisions of one node about all its PACSs.

    Parameters
    ----------
    budgets : mapping
        PACS name -> what may be asked of it.
    stall_timeout : float
        Seconds without a wanted byte after which a move is given up.
    randomness : random.Random
        Spreads retries, so that many requests that failed together do not come back together.
    max_attempts : int
        Moves for one instance in one way, the first included. Three: series, list, one by one covers every known way
        in which a PACS fails to understand the one before.
    busy_attempts : int
        Times that a PACS may say it is busy before an instance fails with XDSRepositoryBusy: with doubling pauses from
        half a second these are about 15 s.
    backoff, max_backoff : float
        First pause before asking again (doubled each time, varied by half) and longest.
    grace : float
        Seconds for instances that a PACS sends after the final C-MOVE response: seen in products that answer from
        one thread and send from another; a network is not slower than that.
    max_waiting : int
        Instances that may wait at all. Each costs about 1 KB; a hundred CT studies of 2000 images fit.
    min_room : int
        Bytes that the spool must have left for a request to be admitted: one ordinary image.
    ageing : float
        Seconds after which less urgent requests get a turn although more urgent ones wait.
    patience : float
        Seconds for which moves with the transfer syntax list that is being served go before others whose turn it is:
        each change of the list lets the PACS run dry. Emergencies do not wait for it.
    method_memory : float
        Seconds for which a method that was refused is passed over, where the PACS has another one.
    """

    # Mutable state: in the waitlist, which all parts share, and in the parts.

    def __init__(
        self,
        budgets: Mapping[str, Budget],
        *,
        stall_timeout: float,
        randomness: random.Random,
        max_attempts: int = 3,
        busy_attempts: int = 5,
        backoff: float = 0.5,
        max_backoff: float = 15.0,
        grace: float = 1.0,
        max_waiting: int = 200_000,
        min_room: int = 2**20,
        ageing: float = 60.0,
        patience: float = 20.0,
        method_memory: float = 300.0,
    ) -> None:
        self._stall_timeout, self._patience = stall_timeout, patience
        self._max_waiting, self._min_room = max_waiting, min_room
        self._waitlist = Waitlist({name: _new_pacs(name, each, ageing, max_attempts) for name, each in budgets.items()})
        self._recovery = Recovery(
            self._waitlist,
            randomness=randomness,
            stall_timeout=stall_timeout,
            max_attempts=max_attempts,
            busy_attempts=busy_attempts,
            backoff=backoff,
            max_backoff=max_backoff,
            grace=grace,
            method_memory=method_memory,
        )
        self._stores = Stores(self._waitlist, self._recovery)

    # --- what the shell may look at -------------------------------------------------------------------------------

    def accepted_syntaxes(self, pacs: str | None) -> tuple[str, ...] | None:
        """Return what a PACS may send now, best first; None when nothing was asked of anybody."""
        return self._stores.accepted_syntaxes(pacs)

    def why_closed(self, pacs: str, now: float) -> RegistryError | None:
        """Return why a PACS is not asked for anything now; None when it is."""
        one = self._waitlist.pacs[pacs]
        why = one.why_closed(0, now)
        return RepositoryBusy(f"{pacs}: {why}") if why else None

    @property
    def waiting(self) -> int:
        """Instances that are wanted and not yet there."""
        return len(self._waitlist.fetches)

    @property
    def active_moves(self) -> int:
        return len(self._waitlist.moves)

    # --- the step -------------------------------------------------------------------------------------------------

    def step(self, event: Event, now: float) -> list[Decision]:
        """Take one event in, give the decisions out, in the order in which they are to be performed."""
        waitlist = self._waitlist
        waitlist.out = []
        match event:
            case StoreOffered():
                self._stores.offer(event, now)
            case BytesArrived():
                self._stores.hear(event, now)
            case InstanceArrived():
                self._stores.finish(event, now)
            case StoreBroken():
                self._stores.lose(event, now)
            case MoveResponded():
                if move := waitlist.moves.get(event.move):
                    move.pacs.last_heard = now
            case MoveFinished():
                self._recovery.finish(event, now)
            case Asked():
                self._admit(event, now)
            case Throttled():
                self._throttle(event, now)
            case Withdrawn():
                self._withdraw(event.request, now)
            case QueryAsked():
                pacs = waitlist.pacs[event.pacs]
                pacs.waiting_queries.append(event.query)
                waitlist.touch(pacs)
            case QueryFinished():
                self._finish_query(event, now)
            case SyntaxesRefused():
                for move in (*waitlist.moves.values(), *self._recovery.settling):
                    if event.pacs in (move.pacs.name, None):
                        move.refused.update(event.refused)
            case ClockRead():
                self._set_clocks(event, now)
            case Woke():
                waitlist.woke()
        waitlist.run_timers(now)
        while waitlist.touched:
            pacs, _ = waitlist.touched.popitem()
            self._dispatch(pacs, now)
        waitlist.set_alarm()
        out, waitlist.out = waitlist.out, []
        return out

    # --- requests -------------------------------------------------------------------------------------------------

    def _admit(self, event: Asked, now: float) -> None:
        waitlist = self._waitlist
        refusal = self._refusal(event)
        if refusal is not None:
            self._refuse(event, event.fetches, refusal)
            return
        request = waitlist.admit(event)
        studies: dict[tuple[str, str], list[Batch]] = {}
        for series in event.fetches:
            refusal = self._refusal_of(waitlist.pacs[series.pacs], event.priority, now)
            queued: list[Fetch] = []
            refused: list[SeriesFetch] = []
            for want in series.wants:
                fetch = waitlist.find(series, want.sop_instance_uid, event.accept)
                if fetch is None:
                    if refusal is not None:
                        refused.append(series.only([want]))
                        continue
                    fetch = waitlist.open(series, want.sop_instance_uid, event.accept)
                    fetch.enter(Stage.QUEUED)
                fetch.verify = fetch.verify and series.verify
                if request not in fetch.waiters and fetch.stage is Stage.QUEUED:
                    queued.append(fetch)
                waitlist.join(fetch, request, want)
                if not event.is_streaming:
                    waitlist.promise(fetch)
                if fetch.arriving:
                    waitlist.out.append(BeginInstance(event.request, want))
            if refusal is not None:
                self._refuse(event, refused, refusal)
            if queued:
                batch = Batch(request, deque(queued), series.count if series.whole else None)
                if series.whole and series.study_count is not None:
                    studies.setdefault((series.pacs, series.study_instance_uid), []).append(batch)
                self._queue(batch, now)
        sizes = {(each.pacs, each.study_instance_uid): each.study_count for each in event.fetches}
        for key, batches in studies.items():
            if sum(len(each.fetches) for each in batches) == sizes[key]:
                for batch in batches:
                    batch.study = batches

    def _queue(self, batch: Batch, now: float) -> None:
        pacs = batch.fetches[0].pacs
        pacs.queue.push(batch, now)
        self._waitlist.touch(pacs)
        self._mind_hours(pacs, now)

    def _refusal(self, event: Asked) -> RegistryError | None:
        """Return why a request cannot be taken in; None when it can."""
        waitlist = self._waitlist
        new = [
            (series, want.sop_instance_uid)
            for series in event.fetches
            for want in series.wants
            if waitlist.find(series, want.sop_instance_uid, event.accept) is None
        ]
        waiting = len(waitlist.fetches)
        if waiting + len(new) > self._max_waiting:
            return RepositoryBusy(f"{waiting} instances are waiting already, {self._max_waiting} may")
        if not new:
            return None
        needed = sum(waitlist.sizes.estimate(series.pacs, series.sop_classes.get(uid)) for series, uid in new)
        left = event.room - waitlist.promised
        if event.room < self._min_room or (left < needed and not event.is_streaming):
            return RepositoryOutOfResources(
                f"the spool has {event.room} bytes left, {waitlist.promised:.0f} of them are promised, "
                f"this request would take about {needed:.0f}"
            )
        return None

    def _refusal_of(self, pacs: Pacs, priority: Priority, now: float) -> RegistryError | None:
        """Return why nothing new is asked of a PACS; None when it is."""
        if why := pacs.why_closed(0, now):
            return RepositoryBusy(f"{pacs.name}: {why}")
        opens_in = pacs.hours.opens_in(now)
        if opens_in and priority is Priority.ROUTINE:
            return _outside_hours(pacs, opens_in)
        return None

    def _refuse(self, event: Asked, fetches: tuple[SeriesFetch, ...] | list[SeriesFetch], error: RegistryError) -> None:
        for want in (want for series in fetches for want in series.wants):
            self._waitlist.out.append(FailInstance(event.request, want, error.at(want.sop_instance_uid), 0))

    def _throttle(self, event: Throttled, now: float) -> None:
        request = self._waitlist.requests.get(event.request)
        if request is None or request.is_throttled is event.is_throttled:
            return
        request.is_throttled = event.is_throttled
        for fetch in request.fetches:
            if fetch.move is not None:
                fetch.move.last_progress = now
        if not event.is_throttled:
            for pacs in dict.fromkeys(fetch.pacs for fetch in request.fetches):
                pacs.queue.unpark(request.id, now)
                self._waitlist.touch(pacs)

    def _withdraw(self, number: int, now: float) -> None:
        request = self._waitlist.requests.pop(number, None)
        if request is None:
            return
        request.is_open = False
        left: dict[Move, None] = {}
        for pacs in dict.fromkeys(fetch.pacs for fetch in request.fetches):
            pacs.queue.unpark(request.id, now)
            self._waitlist.touch(pacs)
        for fetch in tuple(request.fetches):
            fetch.waiters.pop(request, None)
            if not fetch.waiters:
                if fetch.move is not None and fetch.stage is Stage.MOVING:
                    left[fetch.move] = None
                else:
                    self._waitlist.close(fetch)
        request.fetches.clear()
        for move in left:
            # A move that others wait for brings this instance too: who asks for it again joins, and no second move is
            # made for it meanwhile.
            if not any(fetch.waiters for fetch in move.fetches):
                for fetch in tuple(move.fetches):
                    self._waitlist.close(fetch)
                self._recovery.cancel(move, "nobody waits for it any more")

    # --- hours ----------------------------------------------------------------------------------------------------

    def _set_clocks(self, event: ClockRead, now: float) -> None:
        for pacs in self._waitlist.pacs.values():
            pacs.hours.set_clock(event.seconds_of_day, now)
            self._mind_hours(pacs, now)
            self._waitlist.touch(pacs)

    def _mind_hours(self, pacs: Pacs, now: float) -> None:
        """Look again when the hours of a PACS begin or end next, as long as something waits for it."""
        left = pacs.hours.opens_in(now) or pacs.hours.closes_in(now)
        if left and not pacs.minds_hours and next(pacs.waiting(), None):
            pacs.minds_hours = True
            self._waitlist.at(now + left + 0.001, lambda time: self._change_hours(pacs, time))  # surely after it

    def _change_hours(self, pacs: Pacs, now: float) -> None:
        """Let what can wait for the next hours wait for them, and tell what cannot."""
        pacs.minds_hours = False
        if opens_in := pacs.hours.opens_in(now):
            for fetch in tuple(pacs.waiting()):
                if all(request.priority is Priority.ROUTINE for request in fetch.waiters):
                    self._waitlist.fail(fetch, _outside_hours(pacs, opens_in))
        self._mind_hours(pacs, now)
        self._waitlist.touch(pacs)

    # --- moves and queries ----------------------------------------------------------------------------------------

    def _dispatch(self, pacs: Pacs, now: float) -> None:
        while pacs.has_slot and now >= pacs.pause_until:
            if pacs.waiting_queries and pacs.queries_in_row < _QUERIES_IN_ROW:
                pacs.queries_in_row += 1
                self._start_query(pacs, pacs.waiting_queries.popleft())
                continue
            pacs.queries_in_row = 0
            batch = None
            ready_at = pacs.bucket.ready_at(now)
            if ready_at > now:
                self._waitlist.at(ready_at, lambda time: self._waitlist.touch(pacs))
            else:
                batch = pacs.queue.next(now, lambda batch: self._fits(pacs, batch, now))
            if batch is None and pacs.waiting_queries:
                continue
            if batch is None:
                if self._recovery.give_up_waiting(pacs, now):
                    continue  # it may have stood before others
                return
            self._start_move(pacs, batch, now)

    def _start_query(self, pacs: Pacs, query: int) -> None:
        checked = self._recovery.checks.get(query)
        if checked is None:
            self._waitlist.out.append(StartQuery(query))
        elif any(fetch.is_open for fetch in checked):
            self._waitlist.out.append(CheckSeries(query, pacs.name, checked[0].study, checked[0].series))
        else:
            del self._recovery.checks[query]  # withdrawn meanwhile
            return
        pacs.queries.add(query)

    def _finish_query(self, event: QueryFinished, now: float) -> None:
        pacs = self._waitlist.pacs[event.pacs]
        if event.query in pacs.queries:
            pacs.queries.discard(event.query)
        elif event.query in pacs.waiting_queries:
            pacs.waiting_queries.remove(event.query)
        self._waitlist.touch(pacs)
        self._recovery.finish_check(event, now)

    def _fits(self, pacs: Pacs, batch: Batch, now: float) -> Fit:
        """Tell whether a batch can become a move beside those that run."""
        request = batch.request
        if pacs.hours.opens_in(now) and request.priority is not Priority.EMERGENCY:
            return Fit.SKIP
        head = batch.fetches[0]
        way = pacs.way(head.way, now)
        if way is None:
            return Fit.SKIP
        others = [move for move in pacs.moves if move.accept != request.accept]
        if pacs.methods[way] != "c-move" or not any(move.method == "c-move" for move in others):
            # The same instance in two transfer syntaxes could not be told apart when it arrives.
            return Fit.SKIP if any(move.study == head.study for move in others) else Fit.YES
        if pacs.blocked_since is None:
            pacs.blocked_since = now
        is_due = request.priority is Priority.EMERGENCY or now - pacs.blocked_since >= self._patience
        return Fit.WAIT if is_due else Fit.SKIP

    def _take_turn(self, pacs: Pacs, accept: Accept, now: float) -> float | None:
        """Let C-MOVEs bring what is accepted; return for how long, None while nothing else waits."""
        if accept != pacs.accept:
            pacs.accept, pacs.blocked_since = accept, None
        if not pacs.queue.has_other(accept):
            pacs.blocked_since = None
            return None
        if pacs.blocked_since is None:
            pacs.blocked_since = now
        # Not less than a little: it may be long until the turn of who waits, when they had more than their share.
        return max(self._patience / 10, pacs.blocked_since + self._patience - now)

    def _start_move(self, pacs: Pacs, batch: Batch, now: float) -> None:
        request, head = batch.request, batch.fetches[0]
        way = pacs.way(head.way, now)
        assert way is not None
        time_left = self._take_turn(pacs, request.accept, now) if pacs.methods[way] == "c-move" else None
        level, count = size_of_move(batch, time_left=time_left)
        if level == "STUDY":
            fetches = [fetch for each in batch.study or () for fetch in each.take(count)]
        else:
            fetches = batch.take(count)
        number = next(self._waitlist.numbers)
        accept = request.accept
        move = Move(number, pacs, way, level, head.study, accept, dict.fromkeys(fetches), len(fetches), now, now)
        pacs.moves[move] = None
        self._waitlist.moves[number] = move
        move.breaker.start(number)
        for fetch in fetches:
            fetch.move = move
            fetch.started = fetch.started if fetch.tries else now
            fetch.attempts += 1
            fetch.tries += 1
            # Some PACSs look at the SOP Instance UID only: a list may bring an instance of another series.
            fetch.verify = fetch.verify or (level == "IMAGE" and fetch.sop_class is None)
        pacs.queue.charge(batch, sum(max(1.0, fetch.estimate / _UNIT) for fetch in fetches), now)
        self._waitlist.out.append(
            StartMove(
                number,
                pacs.name,
                move.method,
                level,
                head.study,
                "" if level == "STUDY" else head.series,
                tuple(fetch.uid for fetch in fetches),
                accept,
                {fetch.uid: fetch.sop_class for fetch in fetches if fetch.sop_class},
            )
        )
        self._waitlist.at(now + self._stall_timeout, lambda time: self._recovery.watch(move, time))


def _new_pacs(name: str, budget: Budget, ageing: float, threshold: int) -> Pacs:
    return Pacs(
        name,
        budget,
        FairQueue(ageing=ageing),
        OpeningHours(budget.hours),
        TokenBucket(budget.bytes_per_second),
        tuple(Breaker(threshold) for _ in budget.methods),
        budget.associations,
    )


def _outside_hours(pacs: Pacs, opens_in: float) -> RegistryError:
    hours = ", ".join(pacs.budget.hours)
    return RepositoryBusy(f"{pacs.name} is asked at {hours} only: again in {opens_in / 60:.0f} min")
