"""Which PACS is asked for what, when, how often, and when to give up: events in, decisions out.

Pure: time comes in with each event, randomness from a generator that is handed in, nothing is awaited or sent. The
shell (`imaging/transfer.py`) performs each decision and feeds back what came of it.

How it thinks:

* A *fetch* is one instance that one PACS is to send, in one of the accepted transfer syntaxes. However many requests
  wait for it, it is fetched once; a waiter holds no slot.
* Fetches are queued by series in *batches*; a batch becomes one or more *moves* when its PACS has free slots. C-FIND
  queries take slots too, before moves, because they are short and others wait for their answer.
* What a PACS says about its success is a hint. A fetch ends when its instance has arrived whole, or when the move that
  was to bring it has ended (and a grace has passed) and there is a reason not to ask again.
* A move is given up when no wanted byte came for `stall_timeout`. Pending responses are not progress.
* The Storage SCP negotiates by peer, so moves with different transfer syntax lists never run at one PACS together.

References
----------
* DICOM PS3.4, C.4.2 (C-MOVE); PS3.8, Table 9-21 (A-ASSOCIATE-RJ 2/3/2)
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Iterable, Mapping

from xca_imaging.errors import (
    PeerBusy,
    PeerError,
    PeerTimeout,
    RegistryError,
    RepositoryBusy,
    RepositoryError,
    RepositoryOutOfResources,
    Retry,
)
from xca_imaging.imaging.budget import Budget
from xca_imaging.imaging.decisions import (
    AcceptStore,
    Asked,
    BeginInstance,
    BytesArrived,
    CancelMove,
    CheckSeries,
    CompleteInstance,
    Decision,
    DropStore,
    Event,
    FailInstance,
    InstanceArrived,
    Level,
    LoseInstance,
    MoveFinished,
    MoveResponded,
    QueryAsked,
    QueryFinished,
    RefuseStore,
    StartMove,
    StartQuery,
    StoreBroken,
    StoreOffered,
    SyntaxesRefused,
    WakeAt,
    Withdrawn,
    Woke,
)
from xca_imaging.imaging.plan import SeriesFetch, not_there
from xca_imaging.imaging.workload import Batch, Fetch, Key, Move, Pacs, Stage, Store

_OUT_OF_RESOURCES = 0xA700  # PS3.4 Table C.4-2: A7xx


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
        Moves for one instance, the first included. Three: series, list, one by one covers every known way in which
        a PACS fails to understand the one before.
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
    """

    # Mutable state: PACSs; fetches by key, by SOP Instance UID and by request; moves, stores and checks by number;
    # timers (a heap) and the time that `WakeAt` named last; `_out` collects the decisions of the step that runs.

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
    ) -> None:
        self._stall_timeout, self._random = stall_timeout, randomness
        self._max_attempts, self._busy_attempts = max_attempts, busy_attempts
        self._backoff, self._max_backoff, self._grace = backoff, max_backoff, grace
        self._max_waiting, self._min_room = max_waiting, min_room
        self._budgets = budgets
        self._pacs = {name: Pacs(name, each.associations, each.associations) for name, each in budgets.items()}
        self._fetches: dict[Key, Fetch] = {}
        self._by_uid: dict[str, list[Fetch]] = {}
        self._by_request: dict[int, dict[Fetch, None]] = {}
        self._moves: dict[int, Move] = {}
        self._settling: dict[Move, None] = {}
        self._stores: dict[int, Store] = {}
        self._checks: dict[int, list[Fetch]] = {}
        self._timers: list[tuple[float, int, Callable[[float], None]]] = []
        self._numbers = itertools.count(1)
        self._wake: float | None = None
        self._out: list[Decision] = []

    # --- what the shell may look at -------------------------------------------------------------------------------

    def accepted_syntaxes(self, pacs: str | None) -> tuple[str, ...] | None:
        """Return what a PACS may send now, best first; None when nothing was asked of anybody.

        For a peer that cannot be told which PACS it is, the lists of all that were asked, one after the other: each
        instance is looked at again when it is offered.
        """
        asked = [self._pacs[pacs]] if pacs is not None else [p for p in self._pacs.values() if p.moves]
        syntaxes = dict.fromkeys(uid for one in asked for uid in one.accept)
        return tuple(syntaxes) or None

    @property
    def waiting(self) -> int:
        """Instances that are wanted and not yet there."""
        return len(self._fetches)

    @property
    def active_moves(self) -> int:
        return len(self._moves)

    # --- the step -------------------------------------------------------------------------------------------------

    def step(self, event: Event, now: float) -> list[Decision]:
        """Take one event in, give the decisions out, in the order in which they are to be performed."""
        self._out = []
        match event:
            case StoreOffered():
                self._offer_store(event, now)
            case BytesArrived():
                if store := self._stores.get(event.store):
                    self._note_progress(store, now)
            case InstanceArrived():
                self._finish_store(event, now)
            case StoreBroken():
                self._break_store(event, now)
            case MoveResponded():
                if move := self._moves.get(event.move):
                    move.pacs.last_heard = now
            case MoveFinished():
                self._finish_move(event, now)
            case Asked():
                self._admit(event)
            case Withdrawn():
                self._withdraw(event.request)
            case QueryAsked():
                self._pacs[event.pacs].waiting_queries.append(event.query)
            case QueryFinished():
                self._finish_query(event, now)
            case SyntaxesRefused():
                for move in (*self._moves.values(), *self._settling):
                    if event.pacs in (move.pacs.name, None):
                        move.refused.update(event.refused)
            case Woke():
                self._wake = None
        while self._timers and self._timers[0][0] <= now:
            heapq.heappop(self._timers)[2](now)
        for pacs in self._pacs.values():
            if pacs.queue or pacs.waiting_queries:
                self._dispatch(pacs, now)
        if self._timers and (self._wake is None or self._timers[0][0] < self._wake):
            self._wake = self._timers[0][0]
            self._out.append(WakeAt(self._wake))
        out, self._out = self._out, []
        return out

    def _at(self, time: float, action: Callable[[float], None]) -> None:
        heapq.heappush(self._timers, (time, next(self._numbers), action))

    # --- requests -------------------------------------------------------------------------------------------------

    def _admit(self, event: Asked) -> None:
        wanted = sum(len(series.wants) for series in event.fetches)
        refusal: RegistryError | None = None
        if len(self._fetches) + wanted > self._max_waiting:
            refusal = RepositoryBusy(f"{len(self._fetches)} instances are waiting already, {self._max_waiting} may")
        elif event.room < self._min_room:
            refusal = RepositoryOutOfResources(f"the spool has {event.room} bytes left")
        if refusal is not None:
            for want in (want for series in event.fetches for want in series.wants):
                self._out.append(FailInstance(event.request, want, refusal.at(want.sop_instance_uid), 0))
            return
        mine = self._by_request.setdefault(event.request, {})
        for series in event.fetches:
            new: deque[Fetch] = deque()
            for want in series.wants:
                fetch = self._fetches.get((*_series_key(series), want.sop_instance_uid, event.accept))
                if fetch is None:
                    fetch = self._open(series, want.sop_instance_uid, event.accept)
                    new.append(fetch)
                fetch.verify = fetch.verify and series.verify
                fetch.waiters.setdefault(event.request, []).append(want)
                mine[fetch] = None
                if fetch.arriving:
                    self._out.append(BeginInstance(event.request, want))
            if new:
                count = series.count if series.whole else None
                self._pacs[series.pacs].enqueue(Batch(next(self._numbers), event.accept, new, count))

    def _open(self, series: SeriesFetch, uid: str, accept: tuple[str, ...]) -> Fetch:
        fetch = Fetch(*_series_key(series), uid, accept, series.verify, series.sop_classes.get(uid))
        self._fetches[fetch.key] = fetch
        self._by_uid.setdefault(uid, []).append(fetch)
        return fetch

    def _close(self, fetch: Fetch) -> None:
        fetch.is_open = False
        del self._fetches[fetch.key]
        same = self._by_uid[fetch.uid]
        same.remove(fetch)
        if not same:
            del self._by_uid[fetch.uid]
        if fetch.move is not None:
            fetch.move.fetches.pop(fetch, None)

    def _complete(self, fetch: Fetch, store: int) -> None:
        for request, wants in fetch.waiters.items():
            self._out += [
                CompleteInstance(request, want, store, fetch.attempts, fetch.pacs, self._budgets[fetch.pacs].methods[0])
                for want in wants
            ]
        self._close(fetch)

    def _fail(self, fetch: Fetch, error: RegistryError) -> None:
        for request, wants in fetch.waiters.items():
            self._out += [FailInstance(request, w, error.at(w.sop_instance_uid), fetch.attempts) for w in wants]
        self._close(fetch)

    def _fail_absent(self, fetch: Fetch) -> None:
        """It is not where it was asked for; all who wait asked for it there."""
        wants = next(iter(fetch.waiters.values()), None)
        if wants is None:
            self._close(fetch)
        else:
            self._fail(fetch, not_there(wants[0]))

    def _withdraw(self, request: int) -> None:
        left: dict[Move, None] = {}
        for fetch in self._by_request.pop(request, {}):
            fetch.waiters.pop(request, None)
            if fetch.is_open and not fetch.waiters:
                if fetch.move is not None and fetch.stage is Stage.MOVING:
                    left[fetch.move] = None
                else:
                    self._close(fetch)
        for move in left:
            # A move that others wait for brings this instance too: who asks for it again joins, and no second move is
            # made for it meanwhile.
            if not any(fetch.waiters for fetch in move.fetches):
                for fetch in tuple(move.fetches):
                    self._close(fetch)
                self._cancel(move, "nobody waits for it any more")

    # --- moves ----------------------------------------------------------------------------------------------------

    def _dispatch(self, pacs: Pacs, now: float) -> None:
        while pacs.has_slot and now >= pacs.pause_until:
            if pacs.waiting_queries:
                self._start_query(pacs, pacs.waiting_queries.popleft())
                continue
            batch = pacs.next_batch()
            if batch is None:
                return
            if pacs.moves and batch.accept != pacs.accept:
                return  # its turn comes when these have ended; nothing behind it overtakes it
            self._start_move(pacs, batch, now)

    def _start_query(self, pacs: Pacs, query: int) -> None:
        checked = self._checks.get(query)
        if checked is None:
            self._out.append(StartQuery(query))
        elif any(fetch.is_open for fetch in checked):
            self._out.append(CheckSeries(query, pacs.name, checked[0].study, checked[0].series))
        else:
            del self._checks[query]  # withdrawn meanwhile
            return
        pacs.queries.add(query)

    def _start_move(self, pacs: Pacs, batch: Batch, now: float) -> None:
        level: Level = "SERIES"
        fetches = batch.take_whole()
        if not fetches:
            level = "IMAGE"
            limit = self._budgets[pacs.name].uid_list_limit
            fetches = batch.take(1 if batch.is_single or pacs.lists_fail else limit)
        pacs.accept = batch.accept
        move = Move(
            next(self._numbers), pacs, level, batch.accept, batch.order, dict.fromkeys(fetches), len(fetches), now
        )
        pacs.moves.add(move)
        self._moves[move.id] = move
        for fetch in fetches:
            fetch.stage, fetch.move = Stage.MOVING, move
            fetch.started = fetch.started if fetch.attempts else now
            fetch.attempts += 1
        self._out.append(
            StartMove(
                move.id,
                pacs.name,
                self._budgets[pacs.name].methods[0],
                level,
                fetches[0].study,
                fetches[0].series,
                tuple(fetch.uid for fetch in fetches),
                batch.accept,
                {fetch.uid: fetch.sop_class for fetch in fetches if fetch.sop_class},
            )
        )
        self._at(now + self._stall_timeout, lambda time: self._watch(move, time))

    def _cancel(self, move: Move, reason: str) -> None:
        if move.id in self._moves and not move.is_cancelled:
            move.is_cancelled = True
            self._out.append(CancelMove(move.id, reason))

    def _watch(self, move: Move, now: float) -> None:
        """Give a move up when nothing that is wanted has come for too long."""
        if move.id not in self._moves or move.is_cancelled:
            return
        due = move.last_progress + self._stall_timeout
        if now < due:
            self._at(due, lambda time: self._watch(move, time))
            return
        pacs = move.pacs
        error = _as_registry_error(PeerTimeout(pacs.name, f"no wanted byte came for {self._stall_timeout:g} s"))
        stalled = tuple(move.fetches)
        for fetch in stalled:
            self._fail(fetch, error)
        self._cancel(move, error.context)
        if stalled and pacs.last_heard <= move.last_progress:
            self._give_up(pacs, error)

    def _give_up(self, pacs: Pacs, error: RegistryError) -> None:
        """Fail what waits for a PACS that was not heard of while one of its moves used up its patience.

        Without this a long queue would take one time-out after the other.
        """
        for fetch in tuple(self._fetches.values()):
            if fetch.pacs == pacs.name and fetch.stage is Stage.QUEUED:
                self._fail(fetch, error)

    def _finish_move(self, event: MoveFinished, now: float) -> None:
        move = self._moves.pop(event.move)
        pacs = move.pacs
        pacs.moves.discard(move)
        for fetch in tuple(move.fetches):
            if not fetch.waiters:
                self._close(fetch)
        if move.no_room:
            # A PACS mostly gives the rest of a move up after a C-STORE that was refused. Asking again would only fill
            # the spool again; who asked may come back later.
            for fetch in tuple(move.fetches):
                if not fetch.arriving:
                    self._fail(fetch, RepositoryOutOfResources(move.no_room))
        fetches = list(move.fetches)
        if event.error is not None:
            self._finish_in_error(move, fetches, event.error, now)
            return
        comment = f" ({event.comment})" if event.comment else ""
        how = "without a final response" if event.status is None else f"with status 0x{event.status:04X}"
        error = RepositoryError(f"{pacs.name}: C-MOVE ended {how}{comment} and the instance did not come")
        if event.status is not None:
            pacs.last_heard = now
            is_out_of_resources = event.status & 0xFF00 == _OUT_OF_RESOURCES and move.arrived == 0
            if is_out_of_resources and not any(self._syntax_error(fetch, is_last_word=True) for fetch in fetches):
                # Nothing came and it has no room: as much a "not now" as a rejected association.
                self._finish_in_error(move, fetches, PeerBusy(pacs.name, error.context), now)
                return
            if not move.is_cancelled:
                pacs.widen()
        if not fetches:
            return
        is_empty = event.status == 0 and not event.completed and move.level == "IMAGE" and move.listed > 1
        named = set(event.failed_uids)
        at_once = []
        for fetch in fetches:
            fetch.reason = error
            fetch.stage = Stage.SETTLING
            if fetch.uid in named and not fetch.arriving:
                at_once.append(fetch)
        if at_once:
            self._miss(at_once, now)
        if len(at_once) < len(fetches):
            self._settling[move] = None
            self._at(now + self._grace, lambda time: self._settle(move, is_empty, time))

    def _finish_in_error(self, move: Move, fetches: list[Fetch], error: PeerError, now: float) -> None:
        pacs = move.pacs
        reason = _as_registry_error(error)
        for fetch in fetches:
            fetch.reason = reason
        if isinstance(error, PeerBusy):
            if pacs.pause(now, lambda times: self._spread(self._backoff * 2 ** (times - 1))):
                self._at(pacs.pause_until, lambda time: None)  # dispatch follows every step
            again = []
            for fetch in fetches:
                fetch.attempts -= 1
                fetch.busy += 1
                if fetch.busy > self._busy_attempts:
                    self._fail(fetch, reason)
                else:
                    again.append(fetch)
            self._requeue(again, move.order, move.accept, 0.0, now)
        elif error.retry is Retry.NEVER:
            self._refuse(move, fetches, reason, now)
        else:
            exhausted = self._retry(fetches, now)
            if exhausted and pacs.last_heard <= min(fetch.started for fetch in exhausted):
                self._give_up(pacs, reason)

    def _refuse(self, move: Move, fetches: list[Fetch], reason: RegistryError, now: float) -> None:
        """A move was refused for good: what it was to bring fails, unless the refusal may be about the list only.

        pynetdicom's qrscp answers a list of UIDs with 0xA801 (move destination unknown), because it matches nothing.
        """
        if move.level == "IMAGE" and move.listed > 1 and move.arrived == 0:
            for fetch in fetches:
                fetch.one_by_one = True
            self._retry(fetches, now)
            return
        # Some answer 0xA801 when our SCP accepted none of their contexts.
        errors = [(fetch, self._syntax_error(fetch, is_last_word=True) or reason) for fetch in fetches]
        for fetch, error in errors:
            self._fail(fetch, error)
        if fetches and fetches[0].one_by_one:
            # One of a list was refused as the list was: so will be the rest of it.
            series = (fetches[0].pacs, fetches[0].study, fetches[0].series)
            for fetch in tuple(self._fetches.values()):
                if fetch.stage is Stage.QUEUED and fetch.one_by_one and fetch.key[:3] == series:
                    self._fail(fetch, reason)

    def _settle(self, move: Move, is_empty: bool, now: float) -> None:
        """The grace after a move is over: what has not come and is not coming in just now was missed."""
        del self._settling[move]
        late = [fetch for fetch in move.fetches if fetch.stage is Stage.SETTLING]
        missed = [fetch for fetch in late if not fetch.arriving]
        for fetch in late:
            fetch.is_overdue = True
            fetch.one_by_one = fetch.one_by_one or (is_empty and move.arrived == 0)
        if missed:
            self._miss(missed, now)

    def _miss(self, fetches: Iterable[Fetch], now: float) -> None:
        """Decide about fetches of one series that a move, now ended, did not bring."""
        again: list[Fetch] = []
        unproved: list[Fetch] = []
        for fetch in fetches:
            fetch.is_overdue = False
            if (syntax_error := self._syntax_error(fetch)) is not None:
                self._fail(fetch, syntax_error)
            elif fetch.sop_class is None and not fetch.is_checked:
                fetch.stage = Stage.CHECKING
                unproved.append(fetch)
            else:
                again.append(fetch)
        if unproved:
            query = -next(self._numbers)
            self._checks[query] = unproved
            self._pacs[unproved[0].pacs].waiting_queries.append(query)
        self._retry(again, now)

    def _syntax_error(self, fetch: Fetch, *, is_last_word: bool = False) -> RegistryError | None:
        """Return the error of an instance that was not sent because we accept none of its transfer syntaxes.

        A refused context explains a class of which nothing else came: PACSs propose several contexts for a class and
        do not need them all. Where the class is not known it explains only when it is all that we will ever know.
        """
        if fetch.syntax_error is not None:
            return fetch.syntax_error
        move = fetch.move
        if move is None or not move.refused:
            return None
        refused = move.refused
        if fetch.sop_class:
            if fetch.sop_class not in refused or fetch.sop_class in move.sop_classes:
                return None
            proposed = refused[fetch.sop_class]
        elif move.arrived == 0 and (fetch.sop_class is not None or fetch.is_checked or is_last_word):
            proposed = tuple(dict.fromkeys(uid for syntaxes in refused.values() for uid in syntaxes))
        else:
            return None
        return _no_listed_syntax(proposed)

    def _finish_query(self, event: QueryFinished, now: float) -> None:
        pacs = self._pacs[event.pacs]
        if event.query in pacs.queries:
            pacs.queries.discard(event.query)
        elif event.query in pacs.waiting_queries:
            pacs.waiting_queries.remove(event.query)
        again = []
        for fetch in self._checks.pop(event.query, ()):
            if not fetch.is_open:
                continue
            fetch.is_checked = True
            if event.present is not None:
                if fetch.uid not in event.present:
                    self._fail_absent(fetch)
                    continue
                fetch.sop_class, fetch.verify = event.present[fetch.uid], False
            if (syntax_error := self._syntax_error(fetch)) is not None:
                self._fail(fetch, syntax_error)
            else:
                again.append(fetch)
        self._retry(again, now)

    def _retry(self, fetches: list[Fetch], now: float) -> list[Fetch]:
        """Ask again for fetches of one move, after a pause; fail and return those that have had their chances."""
        exhausted: list[Fetch] = []
        again: list[Fetch] = []
        for fetch in fetches:
            pacs = self._pacs[fetch.pacs]
            pause = self._spread(self._backoff * 2 ** (fetch.attempts - 1))
            patience = max(fetch.started, pacs.last_progress) + self._stall_timeout
            if fetch.attempts >= self._max_attempts or now + pause >= patience:
                exhausted.append(fetch)
            else:
                again.append(fetch)
                if fetch.one_by_one and fetch.sop_class is not None:
                    pacs.lists_fail = True  # it exists, and was not found in a list
        for fetch in exhausted:
            error = self._syntax_error(fetch, is_last_word=True) or fetch.reason
            self._fail(fetch, error or RepositoryError("it did not come"))
        if again:
            move = again[0].move
            assert move is not None
            pause = self._spread(self._backoff * 2 ** (again[0].attempts - 1))
            self._requeue(again, move.order, move.accept, pause, now)
        return exhausted

    def _requeue(self, fetches: list[Fetch], order: int, accept: tuple[str, ...], pause: float, now: float) -> None:
        """Put fetches back into the queue, at their old place, after a pause."""
        if not fetches:
            return
        for fetch in fetches:
            fetch.stage = Stage.QUEUED
        is_single = any(fetch.one_by_one for fetch in fetches)
        batch = Batch(order, accept, deque(fetches), None, is_single)
        pacs = self._pacs[fetches[0].pacs]
        self._at(now + pause, lambda time: pacs.enqueue(batch))

    def _spread(self, pause: float) -> float:
        return min(self._max_backoff, pause) * self._random.uniform(0.5, 1.5)

    # --- stores ---------------------------------------------------------------------------------------------------

    def _wanted_by(self, uid: str, pacs: str | None) -> list[Fetch]:
        """Return who waits for an instance from this PACS; from any, where its sender is not the one that was asked."""
        fetches = self._by_uid.get(uid, [])
        return [fetch for fetch in fetches if fetch.pacs == pacs] or fetches

    def _offer_store(self, event: StoreOffered, now: float) -> None:
        wanted = [fetch for fetch in self._wanted_by(event.sop_instance_uid, event.pacs) if fetch.waiters]
        if not wanted:
            self._out.append(
                DropStore(event.store) if event.is_spooled else RefuseStore(event.store, "nobody waits for it")
            )
            return
        # Who waits with a longer list waits for a move of their own: the PACS may have decoded this one for want of it.
        negotiated = frozenset(self.accepted_syntaxes(event.pacs) or ())
        asked = [fetch for fetch in wanted if negotiated.issuperset(fetch.accept)] or wanted
        fetches = [fetch for fetch in asked if event.transfer_syntax_uid in fetch.accept]
        if not fetches:
            for fetch in asked:
                fetch.syntax_error = _no_listed_syntax((event.transfer_syntax_uid,))
            self._out.append(RefuseStore(event.store, f"transfer syntax {event.transfer_syntax_uid} is not wanted"))
            return
        claims = {(fetch.study, fetch.series) for fetch in wanted}
        verify = len(claims) > 1 or any(fetch.verify for fetch in fetches)
        store = Store(
            event.pacs, event.sop_class_uid, event.sop_instance_uid, event.transfer_syntax_uid, fetches, negotiated
        )
        self._stores[event.store] = store
        self._out.append(AcceptStore(event.store, verify))
        for fetch in fetches:
            if fetch.arriving == 0:
                for request, wants in fetch.waiters.items():
                    self._out += [BeginInstance(request, want) for want in wants]
            fetch.arriving += 1
        self._note_progress(store, now)

    def _note_progress(self, store: Store, now: float) -> None:
        for fetch in store.fetches:
            if fetch.is_open:
                pacs = self._pacs[fetch.pacs]
                pacs.last_progress = pacs.last_heard = now
                if fetch.move is not None:
                    fetch.move.last_progress = now

    def _finish_store(self, event: InstanceArrived, now: float) -> None:
        store = self._stores.pop(event.store)
        self._note_progress(store, now)
        read = (event.study_instance_uid, event.series_instance_uid)
        claims = {read} if any(read) else {(fetch.study, fetch.series) for fetch in store.fetches}
        for fetch in tuple(self._wanted_by(store.uid, store.pacs)):
            if (fetch.study, fetch.series) in claims:
                # Also for those who asked meanwhile.
                is_asked = fetch in store.fetches or store.negotiated.issuperset(fetch.accept)
                if is_asked and store.syntax in fetch.accept:
                    if fetch.move is not None:
                        fetch.move.arrived += 1
                        fetch.move.sop_classes.add(store.sop_class)
                    self._complete(fetch, event.store)
            elif any(read):
                self._fail_absent(fetch)

    def _break_store(self, event: StoreBroken, now: float) -> None:
        store = self._stores.pop(event.store)
        overdue: list[Fetch] = []
        for fetch in store.fetches:
            if not fetch.is_open:
                continue
            fetch.arriving -= 1
            if event.no_room:
                if fetch.move is not None:
                    fetch.move.no_room = event.reason
                self._fail(fetch, RepositoryOutOfResources(event.reason))
            elif fetch.arriving == 0:
                for request, wants in fetch.waiters.items():
                    self._out += [LoseInstance(request, want) for want in wants]
                if fetch.is_overdue:
                    overdue.append(fetch)
        for fetch in overdue:
            self._miss([fetch], now)


def _series_key(series: SeriesFetch) -> tuple[str, str, str]:
    return series.pacs, series.study_instance_uid, series.series_instance_uid


def _as_registry_error(error: PeerError) -> RegistryError:
    return error.registry_error(str(error))


def _no_listed_syntax(proposed: tuple[str, ...]) -> RegistryError:
    return RepositoryError(
        f"no listed transfer syntax: the imaging source offers it in {', '.join(proposed)}, "
        "which TransferSyntaxUIDList does not name"
    )
