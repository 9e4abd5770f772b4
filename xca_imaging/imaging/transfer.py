"""Transfers: the I/O shell around the scheduler.

Everything here runs on the event loop, but for C-FIND and a look into arrived objects, which block and run in threads.
An event goes to `Scheduler.step`, each decision that comes out is performed at once. Arriving objects go from the
Storage SCP, or from a back end that fetches itself, to the spool through `begin` and `offer`.

References
----------
* DICOM PS3.4, B.2.3 (C-STORE status); PS3.7, 9.1.1.1.9 and Annex C (0124H, not authorised)
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import ssl
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from xca_imaging import settings
from xca_imaging.errors import RegistryError, RepositoryBusy, RepositoryError
from xca_imaging.imaging import decisions as d
from xca_imaging.imaging.arrival import Arrival, SpoolingArrival
from xca_imaging.imaging.backends import make_backends
from xca_imaging.imaging.backends.cfind import Queries
from xca_imaging.imaging.backends.pool import Associations
from xca_imaging.imaging.backpressure import Backpressure
from xca_imaging.imaging.budget import Budget
from xca_imaging.imaging.facts import Facts
from xca_imaging.imaging.holdings import Arrived, Begun, Brought, Failed, Transfer
from xca_imaging.imaging.identity import Identities
from xca_imaging.imaging.ledger import Want
from xca_imaging.imaging.moves import Moves
from xca_imaging.imaging.part10 import Part10Error, identify
from xca_imaging.imaging.plan import FetchPlan, SeriesFetch, build
from xca_imaging.imaging.receiver import Dropped, Incoming, Listening, PeerAssociation, Receiving, StoreRequest
from xca_imaging.imaging.scheduler import Scheduler
from xca_imaging.imaging.spool import Spool, SpooledInstance
from xca_imaging.imaging.stock import Stock
from xca_imaging.imaging.transcode import target_of, with_sources

__all__ = ["Arrived", "Begun", "Failed", "Transfer", "Transfers"]

_log = logging.getLogger(__name__)

T = TypeVar("T")
A = TypeVar("A", bound=Arrival)

_SOP_CLASS_NOT_SUPPORTED = 0x0122  # PS3.7 Annex C.5.6
_NOT_AUTHORISED = 0x0124  # PS3.7 Annex C.5.13: what nobody asked for is not taken
_READERS = 2  # threads that look into arrived objects: reads of a few hundred bytes
_CLOCK_EVERY = 3600.0  # s between two looks at the wall clock, which jumps when summer time begins and ends


@dataclass(slots=True, eq=False)
class _Request:
    """A transfer, and how the scheduler knows it: one number for each list of transfer syntaxes that PACSs get."""

    transfer: Transfer
    asker: str
    priority: d.Priority
    weight: float
    numbers: list[int] = field(default_factory=list)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)


class Transfers:
    """Fetches instances from the PACSs of a node; the Receiver of its Storage SCP.

    Parameters
    ----------
    pacs : sequence of settings.Pacs
    ae_title : str
        Ours: calling AE title and move destination.
    spool : Spool
    stall_timeout : float
        Seconds without a wanted byte after which a move is given up.
    tls, https : ssl.SSLContext, optional
        For the associations that we request; for requests by HTTP (WADO-RS).
    grace, backoff : float
        See `Scheduler`.
    close_timeout : float
        Longest wait for moves to end after `close` has cancelled them: C-CANCEL, then A-ABORT two seconds later.
    slow_backlog : int
        Bytes that a streaming consumer may leave untaken while the spool is high; more is slow. A few images: who
        takes them as they come has one or two.

    Attributes
    ----------
    listener : tuple of str and int
        Host and port of our Storage SCP, set before `start`; for texts that say what to configure on a PACS.
    receiving : Listening, optional
        Our Storage SCP, set before `start`: where associations are paused.
    on_availability : callable, optional
        Takes an Instance Availability Notification: name of the PACS that sent it (None: cannot be told), data set and
        its transfer syntax; returns the DIMSE status.
    stock : Stock
        What the spool has, and what transcodes it.
    backpressure : Backpressure
        What stands still for slow consumers; from `start` on.
    """

    # Mutable state: the scheduler; requests that are open, and by number; stores, moves and queries (their slot) by
    # number; `_answer` and `_begun`: what the scheduler said of the store that is being offered; `_tasks`: what runs in
    # the background; the timer that `WakeAt` asked for.

    def __init__(
        self,
        *,
        pacs: Sequence[settings.Pacs],
        ae_title: str,
        spool: Spool,
        stall_timeout: float = 60.0,
        tls: ssl.SSLContext | None = None,
        https: ssl.SSLContext | None = None,
        grace: float = 1.0,
        backoff: float = 0.5,
        close_timeout: float = 5.0,
        slow_backlog: int = 8 << 20,
        seed: int | None = None,
    ) -> None:
        self.listener: tuple[str, int] = ("127.0.0.1", 11112)
        self.receiving: Listening | None = None
        self.on_availability: Callable[[str | None, bytes, str], int] | None = None
        self._settings = {each.name: each for each in pacs}
        self._routes = {each.retrieve_location_uid: each.name for each in pacs}
        self._ae_title, self._spool, self._tls, self._https = ae_title, spool, tls, https
        self._stall_timeout, self._close_timeout = stall_timeout, close_timeout
        self._slow_backlog = slow_backlog
        # Three attempts to connect fit into one stall_timeout, so that a PACS that is gone is told within it.
        self._connect_timeout = min(10.0, stall_timeout / 4)
        # Progress is told to the scheduler at most so often: a step for each fragment would cost more than the write.
        self._note_every = min(1.0, stall_timeout / 8)
        self._scheduler = Scheduler(
            {each.name: _budget_of(each) for each in pacs},
            stall_timeout=stall_timeout,
            randomness=random.Random(seed),  # noqa: S311 - spreads retries
            grace=grace,
            backoff=backoff,
        )
        self._executor = ThreadPoolExecutor(_READERS, "transfer")
        self._moves = Moves(self._take_word_of_move, self._note_every)
        self._associations: dict[str, Associations] = {}
        self._finders: dict[str, Queries] = {}
        self._facts = Facts(self._routes, self._slot)
        self._identities = Identities(pacs)
        self.stock = Stock(spool)
        self._numbers = itertools.count(1)
        self._open: dict[Transfer, _Request] = {}
        self._requests: dict[int, _Request] = {}
        self._stores: dict[int, Arrival] = {}
        self._queries: dict[int, asyncio.Future[None]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._answer: d.AcceptStore | d.DropStore | d.RefuseStore | None = None
        self._begun: list[tuple[Transfer, Want]] = []
        self._expected: dict[int, tuple[str, ...]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._closing = False

    @property
    def moves_started(self) -> int:
        """Moves asked of PACSs so far, by whatever method."""
        return self._moves.started

    # --- life -----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Get ready to fetch: back ends, and the addresses by which PACSs are told apart when they call."""
        self._loop = asyncio.get_running_loop()
        for name, pacs in self._settings.items():
            associations = self._associations[name] = Associations(
                pacs,
                calling_ae_title=self._ae_title,
                tls=self._tls,
                listener=self.listener,
                receiver=self,
                connect_timeout=self._connect_timeout,
            )
            self._moves.backends[name] = make_backends(
                associations,
                ae_title=self._ae_title,
                listener=self.listener,
                receiver=self,
                connect_timeout=self._connect_timeout,
                stall_timeout=self._stall_timeout,
                https=self._https,
            )
            queries = Queries(associations, response_timeout=min(60.0, self._stall_timeout))
            self._facts.finders[name] = self._finders[name] = queries
        self.backpressure = Backpressure(
            self._spool,
            slow_backlog=self._slow_backlog,
            soon=self._loop.call_soon,
            throttle=self._throttle,
            pause=self._pause,
            resume=self._resume,
        )
        self._spawn(self._identities.resolve())
        if any(pacs.hours for pacs in self._settings.values()):
            self._spawn(self._read_clock())

    async def close(self, drain: float) -> None:
        """Let running transfers end for at most `drain` seconds, fail the rest, end every move."""
        self._closing = True
        # Taken now: a request that goes away while it is waited for takes its transfer with it, unfinished.
        requests = tuple(self._open.values())
        running = [asyncio.ensure_future(each.transfer.wait()) for each in requests]
        if running:
            _, late = await asyncio.wait(running, timeout=drain)
            for request in requests:
                self._withdraw(request)
                request.transfer.fail_open(RepositoryBusy("this imaging source is going down"))
            await asyncio.gather(*late)
        self._moves.cancel_all()
        await self._facts.close()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.stock.transcoders.close()
        await self._moves.close(self._close_timeout)
        for associations in self._associations.values():
            await associations.close()
        if self._timer is not None:
            self._timer.cancel()
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _read_clock(self) -> None:
        """Tell the scheduler the time of day, for PACSs that are asked at some hours only."""
        while True:
            now = time.localtime()
            self._step(d.ClockRead(now.tm_hour * 3600.0 + now.tm_min * 60.0 + now.tm_sec))
            await asyncio.sleep(_CLOCK_EVERY)

    # --- requests -------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def fetch(
        self,
        wants: Iterable[Want],
        *,
        accept: Sequence[str],
        asker: str = "local",
        weight: float = 1.0,
        priority: d.Priority = d.Priority.ROUTINE,
        is_streaming: bool = False,
    ) -> AsyncIterator[Transfer]:
        """Fetch instances, each in one of the accepted transfer syntaxes.

        What arrives is held until the context is left. Leaving it early gives up what nobody else waits for.

        Parameters
        ----------
        accept : sequence of str
            TransferSyntaxUIDList.
        asker : str
            The community that asks: PACSs are shared between these, by `weight`.
        is_streaming : bool
            The consumer takes instances as they come: it gets `Begun` too, lets go of each by `Transfer.release`, and
            its associations stand still while it is slow and the spool is high.
        """
        transfer = Transfer(wants, tuple(dict.fromkeys(accept)), is_streaming=is_streaming)
        request = _Request(transfer, asker, priority, weight)
        self._open[transfer] = request
        self.backpressure.open(transfer)
        self._add_task(request, self._prepare(request))
        try:
            yield transfer
        finally:
            self._withdraw(request)
            self.backpressure.close(transfer)
            del self._open[transfer]
            transfer.release_all()

    def _withdraw(self, request: _Request) -> None:
        for task in tuple(request.tasks):
            task.cancel()
        for number in request.numbers:
            del self._requests[number]
            self._step(d.Withdrawn(number))
        request.numbers.clear()

    def _add_task(self, request: _Request, work: Coroutine[Any, Any, None]) -> None:
        task = self._spawn(work)
        request.tasks.add(task)
        task.add_done_callback(request.tasks.discard)

    async def _prepare(self, request: _Request) -> None:
        transfer = request.transfer
        accept = transfer.accept
        try:
            if self._closing:
                raise RepositoryBusy("this imaging source is going down")
            wants = [entry.want for entry in transfer.ledger]
            await self._spool.verify(want.sop_instance_uid for want in wants)
            plan = self._settle_known(request, build(wants, accept=accept, routes=self._routes))
            if plan.fetches:
                wants = [want for fetch in plan.fetches for want in fetch.wants]
                # A PACS that is left alone is not asked by C-FIND either: the request is to fail at once.
                now = self._loop.time()
                used = {each.pacs for each in plan.fetches if self._scheduler.why_closed(each.pacs, now) is None}
                asked = [want for each in plan.fetches if each.pacs in used for want in each.wants]
                facts = await self._facts.learn(asked, accept)
                plan = build(wants, accept=accept, routes=self._routes, facts=facts)
                plan = self._settle_known(request, plan)
            transfer.plan(is_proved=not any(fetch.verify for fetch in plan.fetches))
            self._ask(request, plan.fetches)
        except RegistryError as error:
            transfer.fail_open(error)
        except Exception as exc:
            # Whoever waits for this transfer must not wait for ever because of a defect here.
            _log.exception("a transfer could not be prepared")
            transfer.fail_open(RepositoryError(f"internal error: {type(exc).__name__}"))

    def _ask(self, request: _Request, fetches: Iterable[SeriesFetch]) -> None:
        """Hand what is to be fetched to the scheduler, by the transfer syntaxes that its PACS is asked for."""
        by_syntaxes: dict[tuple[str, ...], list[SeriesFetch]] = {}
        for fetch in fetches:
            by_syntaxes.setdefault(self._asked_syntaxes(fetch.pacs, request.transfer.accept), []).append(fetch)
        for syntaxes, group in by_syntaxes.items():
            number = next(self._numbers)
            self._requests[number] = request
            request.numbers.append(number)
            self._step(
                d.Asked(
                    number,
                    tuple(group),
                    syntaxes,
                    self._spool.free_bytes,
                    asker=request.asker,
                    priority=request.priority,
                    weight=request.weight,
                    is_streaming=request.transfer.is_streaming,
                )
            )
        self.backpressure.judge()

    def _asked_syntaxes(self, pacs: str, accept: tuple[str, ...]) -> tuple[str, ...]:
        return with_sources(accept) if self._settings[pacs].transcode else accept

    # --- what is there already ------------------------------------------------------------------------------------

    def _settle_known(self, request: _Request, plan: FetchPlan) -> FetchPlan:
        """Enter what is refused, and what the spool holds already, into the ledger; return what is left."""
        transfer = request.transfer
        for want, error in plan.refused:
            transfer.fail(want, error)
        left = []
        for fetch in plan.fetches:
            missing = []
            asked = self._asked_syntaxes(fetch.pacs, transfer.accept)
            for want in fetch.wants:
                instance = self.stock.find(want, fetch.pacs, transfer.accept)
                if instance is None and asked != transfer.accept:
                    instance = self.stock.find(want, fetch.pacs, asked)
                if instance is None:
                    missing.append(want)
                else:
                    self._take(request, want, instance, Brought())
            if missing:
                left.append(fetch.only(missing))
        return FetchPlan(tuple(left), ())

    def _take(self, request: _Request, want: Want, instance: SpooledInstance, brought: Brought) -> None:
        """Hold what is in an accepted transfer syntax, have the rest transcoded."""
        transfer = request.transfer
        target = target_of(transfer.accept)
        if target is None or instance.transfer_syntax_uid in transfer.accept:
            transfer.hold(want, instance, brought)
        else:
            instance.hold()  # until it has been transcoded
            self._add_task(request, self._transcode(transfer, want, instance, target, brought))

    async def _transcode(
        self, transfer: Transfer, want: Want, instance: SpooledInstance, target: str, brought: Brought
    ) -> None:
        failure: RegistryError | None = None
        try:
            copy = await self.stock.transcode(instance, target)
            try:
                transfer.hold(want, copy, brought)
            finally:
                copy.release()
        except RegistryError as error:
            failure = error
        except Exception as exc:
            _log.exception("an instance could not be transcoded")
            failure = RepositoryError(f"internal error: {type(exc).__name__}")
        finally:
            instance.release()
        if failure is not None:
            transfer.fail(want, failure.at(want.sop_instance_uid), brought.attempts)

    def _complete(self, decision: d.CompleteInstance) -> None:
        request = self._requests.get(decision.request)
        if request is None:
            return
        want, instance = decision.want, self._stores[decision.store].instance
        assert instance is not None
        asked = self._asked_syntaxes(decision.pacs, request.transfer.accept)
        self.stock.enter(instance, want, decision.pacs, asked)
        self._take(request, want, instance, Brought(decision.attempts, decision.pacs, decision.method))

    # --- backpressure ---------------------------------------------------------------------------------------------

    def _throttle(self, transfer: Transfer, is_slow: bool) -> None:
        for number in self._open[transfer].numbers:
            self._step(d.Throttled(number, is_slow))

    def _pause(self, association: PeerAssociation) -> None:
        for each in self._readers(association):
            each.pause(association)

    def _resume(self, association: PeerAssociation) -> None:
        for each in self._readers(association):
            each.resume(association)

    def _readers(self, association: PeerAssociation) -> Iterable[Receiving]:
        if association.pacs is not None:
            return self._moves.backends[association.pacs].values()
        return () if self.receiving is None else (self.receiving,)

    # --- C-FIND ---------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def queries(self, pacs: str) -> AsyncIterator[Queries]:
        """Wait for a slot of a PACS, and give what asks it by C-FIND; it has the slot until the context is left."""
        async with self._slot(pacs):
            yield self._finders[pacs]

    @asynccontextmanager
    async def _slot(self, pacs: str) -> AsyncIterator[None]:
        """Wait for a slot of a PACS, and take it for one query."""
        number = next(self._numbers)
        slot = self._queries[number] = self._loop.create_future()
        try:
            self._step(d.QueryAsked(number, pacs))
            await slot
            yield
        finally:
            del self._queries[number]
            self._step(d.QueryFinished(number, pacs))

    async def _check_series(self, decision: d.CheckSeries) -> None:
        pacs = decision.pacs
        present = await self._facts.instances_now(pacs, decision.study_instance_uid, decision.series_instance_uid)
        self._step(d.QueryFinished(decision.query, pacs, present))

    # --- events and decisions -------------------------------------------------------------------------------------

    def _step(self, event: d.Event) -> None:
        for decision in self._scheduler.step(event, self._loop.time()):
            self._perform(decision)

    def _perform(self, decision: d.Decision) -> None:
        match decision:
            case d.BeginInstance(number, want):
                if request := self._requests.get(number):
                    request.transfer.ledger.begin(want)
                    self._begun.append((request.transfer, want))
            case d.LoseInstance(number, want):
                if request := self._requests.get(number):
                    request.transfer.ledger.lose(want)
            case d.CompleteInstance():
                self._complete(decision)
            case d.FailInstance(number, want, error, attempts):
                if request := self._requests.get(number):
                    request.transfer.fail(want, error, attempts)
            case d.AcceptStore() | d.DropStore() | d.RefuseStore():
                self._answer = decision
            case d.StartMove():
                self.backpressure.start_move(decision.move, decision.instances)
                if self.receiving is not None and decision.method == "c-move":
                    self._expected[decision.move] = decision.instances
                    self.receiving.expect(decision.instances, decision.accept)
                self._moves.start(decision)
            case d.CancelMove(move, reason):
                _log.info("move %d is cancelled: %s", move, reason)
                self._moves.cancel(move)
            case d.StartQuery(query):
                if not self._queries[query].done():
                    self._queries[query].set_result(None)
            case d.CheckSeries():
                self._spawn(self._check_series(decision))
            case d.WakeAt(time):
                if self._timer is not None:
                    self._timer.cancel()
                self._timer = self._loop.call_at(time, self._step, d.Woke())

    def _take_word_of_move(self, event: d.MoveResponded | d.MoveFinished) -> None:
        if isinstance(event, d.MoveFinished):
            self.backpressure.finish_move(event.move)
            if self.receiving is not None and (expected := self._expected.pop(event.move, None)):
                self.receiving.expect_no_more(expected)
        self._step(event)

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # --- the Storage SCP's receiver -------------------------------------------------------------------------------

    def accepted_syntaxes(self, association: PeerAssociation) -> Sequence[str] | None:
        """Return what was asked of this PACS, in the order of the request."""
        return self._scheduler.accepted_syntaxes(self._identities.of(association))

    def syntaxes_refused(self, association: PeerAssociation, refused: Mapping[str, tuple[str, ...]]) -> None:
        """Remember what could not be negotiated: it explains instances that will not come."""
        self._step(d.SyntaxesRefused(self._identities.of(association), refused))

    def association_closed(self, association: PeerAssociation, reason: str) -> None:
        """Forget the peer; what it was sending was discarded before."""
        self._identities.forget(association)
        self.backpressure.forget(association)

    def begin(self, request: StoreRequest) -> Incoming | int:
        """Take an instance that somebody waits for; refuse it (0124H) when nobody does."""
        arrival, begun = self._accept(request, SpoolingArrival)
        if not isinstance(arrival, SpoolingArrival):
            return arrival
        answer = arrival.open(self._spool, request)
        if arrival.writer is not None and not arrival.is_to_be_verified:
            for transfer, want in begun:
                if request.transfer_syntax_uid in transfer.accept:
                    transfer.begin(want, arrival.writer)
        return answer

    def offer(self, request: StoreRequest) -> Arrival | Dropped | int:
        """Decide as `begin` does, about an instance whose bytes another process writes."""
        return self._accept(request, Arrival)[0]

    def _accept(
        self, request: StoreRequest, kind: type[A]
    ) -> tuple[A | Dropped | int, Sequence[tuple[Transfer, Want]]]:
        """Return the arrival, or what is answered instead, and for whom it begins."""
        store = next(self._numbers)
        uid, syntax = request.sop_instance_uid, request.transfer_syntax_uid
        is_spooled = self._spool.find(uid, (syntax,)) is not None
        pacs = self._identities.of(request.association, request.move_originator_ae_title)
        self._begun = []
        match self._offer(d.StoreOffered(store, pacs, request.sop_class_uid, uid, syntax, is_spooled)):
            case d.AcceptStore(verify=verify):
                self.backpressure.begin_store(request.association, uid)
                arrival = kind(
                    store, self._take_store, tell_every=self._note_every, verify=self._verify if verify else None
                )
                self._stores[store] = arrival
                return arrival, self._begun
            case d.DropStore():
                return Dropped(), ()
            case d.RefuseStore(reason=reason):
                _log.info("%s sends %s, refused: %s", request.association.calling_ae_title, uid, reason)
        return _NOT_AUTHORISED, ()

    def _offer(self, event: d.StoreOffered) -> d.AcceptStore | d.DropStore | d.RefuseStore | None:
        self._step(event)
        answer, self._answer = self._answer, None
        return answer

    def create_instance(
        self,
        association: PeerAssociation,
        sop_class_uid: str,
        sop_instance_uid: str,
        dataset: bytes,
        transfer_syntax_uid: str,
    ) -> int:
        """Hand an Instance Availability Notification on to who listens for them."""
        if self.on_availability is None:
            return _SOP_CLASS_NOT_SUPPORTED
        return self.on_availability(self._identities.of(association), dataset, transfer_syntax_uid)

    def _take_store(self, event: d.BytesArrived | d.InstanceArrived | d.StoreBroken) -> None:
        self._step(event)
        if not isinstance(event, d.BytesArrived):
            del self._stores[event.store]

    def _verify(self, arrival: Arrival) -> None:
        """Read study and series from an object that nothing else proves to belong where it is wanted."""

        async def read() -> None:
            assert arrival.instance is not None
            try:
                found = await self._loop.run_in_executor(self._executor, identify, arrival.instance.path)
            except (Part10Error, OSError) as exc:
                arrival.settle(exc)
            else:
                arrival.settle((found.study_instance_uid, found.series_instance_uid))

        self._spawn(read())


def _budget_of(pacs: settings.Pacs) -> Budget:
    return Budget(
        pacs.max_associations,
        tuple(dict.fromkeys((pacs.retrieve, *pacs.fallback))),
        pacs.uid_list_limit,
        pacs.level,
        pacs.bytes_per_second,
        pacs.hours,
    )
