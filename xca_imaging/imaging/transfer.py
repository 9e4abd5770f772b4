"""Transfers: the I/O shell around the scheduler, and what requests hold of it.

Everything here runs on the event loop, but for back ends and C-FIND, which block and run in threads; they come back by
`call_soon_threadsafe`. An event goes to `Scheduler.step`, each decision that comes out is performed at once. Arriving
objects go from the Storage SCP to the spool through `begin`.

References
----------
* DICOM PS3.4, B.2.3 (C-STORE status); PS3.7, 9.1.1.1.9 and Annex C (0124H, not authorised)
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from xca_imaging import settings
from xca_imaging.errors import (
    LocalProtocolError,
    PeerError,
    PeerRefused,
    RegistryError,
    RepositoryBusy,
    RepositoryError,
)
from xca_imaging.imaging import decisions as d
from xca_imaging.imaging.arrival import Arrival, Dropped, SpoolingArrival
from xca_imaging.imaging.backends import Backend, MoveJob, MoveResult, make_backends
from xca_imaging.imaging.backends.cfind import Finder
from xca_imaging.imaging.budget import Budget
from xca_imaging.imaging.facts import Facts, SeriesFinder
from xca_imaging.imaging.ledger import Ledger, State, Want
from xca_imaging.imaging.part10 import Part10Error, identify
from xca_imaging.imaging.plan import FetchPlan, build
from xca_imaging.imaging.receiver import Incoming, PeerAssociation, StoreRequest
from xca_imaging.imaging.scheduler import Scheduler
from xca_imaging.imaging.spool import Spool, SpooledInstance, SpoolWriter

_log = logging.getLogger(__name__)

T = TypeVar("T")
A = TypeVar("A", bound=Arrival)

_SOP_CLASS_NOT_SUPPORTED = 0x0122  # PS3.7 Annex C.5.6
_NOT_AUTHORISED = 0x0124  # PS3.7 Annex C.5.13: what nobody asked for is not taken


@dataclass(frozen=True, slots=True)
class Arrived:
    """A wanted instance is held."""

    want: Want
    instance: SpooledInstance


@dataclass(frozen=True, slots=True)
class Begun:
    """A wanted instance has begun to arrive, and can be read along: in streaming transfers only.

    It may break off, and begin another time; what is transcoded before it is held is not told of.
    """

    want: Want
    arriving: SpoolWriter


@dataclass(frozen=True, slots=True)
class Failed:
    """A wanted instance will not come."""

    want: Want
    error: RegistryError


class Transfer:
    """What one request has of its instances, for as long as its context is open."""

    # Mutable state: the ledger, held instances, the log of what happened, whether the plan is proved, and an event for
    # each who waits for more.

    def __init__(self, wants: Iterable[Want], accept: tuple[str, ...]) -> None:
        self.ledger = Ledger(wants)
        self.accept = accept
        self._held: dict[Want, SpooledInstance] = {}
        self._log: list[Arrived | Failed] = []
        self._changed = asyncio.Event()
        self._planned: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    async def planned(self) -> bool:
        """Return when it is known what is fetched: True when C-FIND or the spool has proved that all of it exists.

        What cannot be fetched has failed in the ledger by then.
        """
        return await asyncio.shield(self._planned)

    async def wait(self) -> None:
        """Return when every wanted instance is held or has failed."""
        async for _ in self.events():
            pass

    async def events(self) -> AsyncIterator[Arrived | Failed]:
        """Give what has happened and what happens, one event for each want, until the ledger is complete."""
        given = 0
        while True:
            while given < len(self._log):
                yield self._log[given]
                given += 1
            if self.ledger.complete:
                return
            self._changed.clear()
            await self._changed.wait()

    def held(self, want: Want) -> SpooledInstance:
        """Return an instance that is held; its file stays until the context of the transfer is left."""
        try:
            return self._held[want]
        except KeyError:
            raise LocalProtocolError(f"instance {want.sop_instance_uid} is not held") from None

    def _hold(self, want: Want, instance: SpooledInstance, attempts: int) -> None:
        instance.hold()
        self._held[want] = instance
        self.ledger.hold(want, size=instance.size, transfer_syntax_uid=instance.transfer_syntax_uid, attempts=attempts)
        self._log.append(Arrived(want, instance))
        self._changed.set()

    def _fail(self, want: Want, error: RegistryError, attempts: int = 0) -> None:
        self.ledger.fail(want, error, attempts=attempts)
        self._log.append(Failed(want, error))
        self._changed.set()

    def _plan(self, *, is_proved: bool) -> None:
        if not self._planned.done():
            self._planned.set_result(is_proved)

    def _fail_open(self, error: RegistryError) -> None:
        self._plan(is_proved=False)
        for entry in self.ledger:
            if entry.state in (State.MISSING, State.ARRIVING):
                self._fail(entry.want, error.at(entry.want.sop_instance_uid))

    def _release(self) -> None:
        for instance in self._held.values():
            instance.release()
        self._held.clear()


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
    tls : ssl.SSLContext, optional
        For the associations that we request.
    make_backends, make_finder : callable
        What moves and what asks, by PACS.
    grace, backoff : float
        See `Scheduler`.
    close_timeout : float
        Longest wait for moves to end after `close` has cancelled them: C-CANCEL, then A-ABORT two seconds later.
    memory_of_series : int
        Instances of which study and series are remembered, so that held ones serve without asking the PACS again.
        200 bytes each.

    Attributes
    ----------
    listener : tuple of str and int
        Host and port of our Storage SCP, set before `start`; for texts that say what to configure on a PACS.
    on_availability : callable, optional
        Takes an Instance Availability Notification: name of the PACS that sent it (None: cannot be told), data set and
        its transfer syntax; returns the DIMSE status.
    """

    # Mutable state: the scheduler; transfers, stores, moves (their cancellation) and queries (their slot) by number;
    # `_series_of`: where held instances belong and which transfer syntaxes were accepted when they came, by SOP
    # Instance UID, oldest first; `_peers`: which PACS an association comes from; `_tasks`: what runs in the background.

    def __init__(
        self,
        *,
        pacs: Sequence[settings.Pacs],
        ae_title: str,
        spool: Spool,
        stall_timeout: float = 60.0,
        tls: ssl.SSLContext | None = None,
        make_backends: Callable[[settings.Pacs], Mapping[d.Method, Backend]] | None = None,
        make_finder: Callable[[settings.Pacs], SeriesFinder | None] | None = None,
        grace: float = 1.0,
        backoff: float = 0.5,
        close_timeout: float = 5.0,
        memory_of_series: int = 100_000,
        seed: int | None = None,
    ) -> None:
        self.listener: tuple[str, int] = ("127.0.0.1", 11112)
        self.on_availability: Callable[[str | None, bytes, str], int] | None = None
        self._settings = {each.name: each for each in pacs}
        self._routes = {each.retrieve_location_uid: each.name for each in pacs}
        self._ae_title, self._spool, self._tls = ae_title, spool, tls
        self._stall_timeout, self._close_timeout = stall_timeout, close_timeout
        self._memory_of_series = memory_of_series
        # Three attempts to connect fit into one stall_timeout, so that a PACS that is gone is told within it.
        self._connect_timeout = min(10.0, stall_timeout / 4)
        # Progress is told to the scheduler at most so often: a step for each fragment would cost more than the write.
        self._note_every = min(1.0, stall_timeout / 8)
        self._make_backends, self._make_finder = make_backends or self._all_backends, make_finder or self._cfind
        self._scheduler = Scheduler(
            {each.name: Budget(each.max_associations) for each in pacs},
            stall_timeout=stall_timeout,
            randomness=random.Random(seed),  # noqa: S311 - spreads retries
            grace=grace,
            backoff=backoff,
        )
        # Each PACS's associations, and a few for looking into arrived objects.
        self._executor = ThreadPoolExecutor(sum(each.max_associations for each in pacs) + 2, "transfer")
        self._backends: dict[str, Mapping[d.Method, Backend]] = {}
        self._facts = Facts(self._routes, self._executor, self._slot)
        self._hosts: dict[str, set[str]] = {}
        self._numbers = itertools.count(1)
        self._transfers: dict[int, Transfer] = {}
        self._stores: dict[int, Arrival] = {}
        self._moves: dict[int, asyncio.Task[MoveResult]] = {}
        self._queries: dict[int, asyncio.Future[None]] = {}
        self._series_of: dict[str, tuple[tuple[str, str, str], frozenset[str]]] = {}
        self._peers: dict[int, str | None] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._answer: d.AcceptStore | d.DropStore | d.RefuseStore | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._idle = asyncio.Event()
        self._closing = False

    def _all_backends(self, pacs: settings.Pacs) -> Mapping[d.Method, Backend]:
        return make_backends(
            pacs,
            ae_title=self._ae_title,
            listener=self.listener,
            tls=self._tls,
            receiver=self,
            connect_timeout=self._connect_timeout,
            stall_timeout=self._stall_timeout,
        )

    def _cfind(self, pacs: settings.Pacs) -> SeriesFinder:
        return Finder(
            pacs,
            self._ae_title,
            self._tls,
            connect_timeout=self._connect_timeout,
            response_timeout=min(60.0, self._stall_timeout),
        )

    # --- life -----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Get ready to fetch: back ends, and the addresses by which PACSs are told apart when they call."""
        self._loop = asyncio.get_running_loop()
        for name, pacs in self._settings.items():
            self._backends[name] = self._make_backends(pacs)
            self._facts.finders[name] = self._make_finder(pacs)
            self._hosts[name] = {pacs.host}
            self._spawn(self._resolve(name, pacs))

    async def close(self, drain: float) -> None:
        """Let running transfers end for at most `drain` seconds, fail the rest, end every move."""
        self._closing = True
        # Taken now: a request that goes away while it is waited for takes its transfer with it, unfinished.
        transfers = tuple(self._transfers.items())
        running = [asyncio.ensure_future(each.wait()) for _, each in transfers]
        if running:
            _, late = await asyncio.wait(running, timeout=drain)
            for number, transfer in transfers:
                transfer._fail_open(RepositoryBusy("this imaging source is going down"))
                self._step(d.Withdrawn(number))
            await asyncio.gather(*late)
        for move in self._moves.values():
            move.cancel()
        await self._facts.close()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._moves:
            self._idle.clear()
            try:
                async with asyncio.timeout(self._close_timeout):
                    await self._idle.wait()
            except TimeoutError:
                _log.warning("%d moves did not end within %g s", len(self._moves), self._close_timeout)
        for backends in self._backends.values():
            for backend in backends.values():
                await backend.close()
        if self._timer is not None:
            self._timer.cancel()
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _resolve(self, name: str, pacs: settings.Pacs) -> None:
        try:
            found = await self._loop.getaddrinfo(pacs.host, pacs.port, type=socket.SOCK_STREAM)
        except OSError as exc:
            _log.info("%s: host %s cannot be resolved now: %s", name, pacs.host, exc)
            return
        self._hosts[name].update(str(address[0]) for *_, address in found)

    # --- requests -------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def fetch(
        self,
        wants: Iterable[Want],
        *,
        accept: Sequence[str],
        asker: str = "local",
        priority: d.Priority = d.Priority.ROUTINE,
    ) -> AsyncIterator[Transfer]:
        """Fetch instances, each in one of the accepted transfer syntaxes.

        What arrives is held until the context is left. Leaving it early gives up what nobody else waits for.
        """
        transfer = Transfer(wants, tuple(dict.fromkeys(accept)))
        number = next(self._numbers)
        self._transfers[number] = transfer
        task = self._spawn(self._prepare(number, transfer, transfer.accept, asker, priority))
        try:
            yield transfer
        finally:
            task.cancel()
            del self._transfers[number]
            self._step(d.Withdrawn(number))
            transfer._release()

    async def _prepare(
        self, number: int, transfer: Transfer, accept: tuple[str, ...], asker: str, priority: d.Priority
    ) -> None:
        try:
            if self._closing:
                raise RepositoryBusy("this imaging source is going down")
            wants = [entry.want for entry in transfer.ledger]
            plan = self._settle_known(transfer, build(wants, accept=accept, routes=self._routes), accept)
            if plan.fetches:
                wants = [want for fetch in plan.fetches for want in fetch.wants]
                facts = await self._facts.learn(wants, accept)
                plan = build(wants, accept=accept, routes=self._routes, facts=facts)
                plan = self._settle_known(transfer, plan, accept)
            transfer._plan(is_proved=not any(fetch.verify for fetch in plan.fetches))
            if plan.fetches:
                room = self._spool.free_bytes
                self._step(d.Asked(number, plan.fetches, accept, room, asker, priority))
        except RegistryError as error:
            transfer._fail_open(error)
        except Exception as exc:
            # Whoever waits for this transfer must not wait for ever because of a defect here.
            _log.exception("a transfer could not be prepared")
            transfer._fail_open(RepositoryError(f"internal error: {type(exc).__name__}"))

    def _settle_known(self, transfer: Transfer, plan: FetchPlan, accept: tuple[str, ...]) -> FetchPlan:
        """Enter what is refused, and what the spool holds already, into the ledger; return what is left."""
        for want, error in plan.refused:
            transfer._fail(want, error)
        left = []
        for fetch in plan.fetches:
            missing = []
            place = (fetch.pacs, fetch.study_instance_uid, fetch.series_instance_uid)
            for want in fetch.wants:
                instance = None
                known, negotiated = self._series_of.get(want.sop_instance_uid, (None, frozenset()))
                # A PACS may have decoded it because a shorter list left it no choice; with this list it would send it
                # as it is stored. Only a list that names nothing more can have nothing better.
                if known == place and negotiated.issuperset(accept):
                    instance = self._spool.find(want.sop_instance_uid, accept)
                if instance is not None:
                    transfer._hold(want, instance, attempts=0)
                else:
                    missing.append(want)
            if missing:
                left.append(fetch.only(missing))
        return FetchPlan(tuple(left), ())

    # --- C-FIND ---------------------------------------------------------------------------------------------------

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
            case d.BeginInstance(request, want):
                if transfer := self._transfers.get(request):
                    transfer.ledger.begin(want)
            case d.LoseInstance(request, want):
                if transfer := self._transfers.get(request):
                    transfer.ledger.lose(want)
            case d.CompleteInstance(request, want, store, attempts):
                if transfer := self._transfers.get(request):
                    instance = self._stores[store].instance
                    assert instance is not None
                    transfer._hold(want, instance, attempts)
                    self._remember(want, transfer.accept)
            case d.FailInstance(request, want, error, attempts):
                if transfer := self._transfers.get(request):
                    transfer._fail(want, error, attempts)
            case d.AcceptStore() | d.DropStore() | d.RefuseStore():
                self._answer = decision
            case d.StartMove():
                self._start_move(decision)
            case d.CancelMove(move, reason):
                _log.info("move %d is cancelled: %s", move, reason)
                self._moves[move].cancel()
            case d.StartQuery(query):
                if not self._queries[query].done():
                    self._queries[query].set_result(None)
            case d.CheckSeries():
                self._spawn(self._check_series(decision))
            case d.WakeAt(time):
                if self._timer is not None:
                    self._timer.cancel()
                self._timer = self._loop.call_at(time, self._step, d.Woke())

    def _remember(self, want: Want, accept: tuple[str, ...]) -> None:
        self._series_of.pop(want.sop_instance_uid, None)
        place = (self._routes[want.repository_unique_id], want.study_instance_uid, want.series_instance_uid)
        self._series_of[want.sop_instance_uid] = place, frozenset(accept)
        if len(self._series_of) > self._memory_of_series:
            del self._series_of[next(iter(self._series_of))]

    def _start_move(self, decision: d.StartMove) -> None:
        (backend,) = self._backends[decision.pacs].values()
        is_list = decision.level == "IMAGE"
        job = MoveJob(
            decision.level,
            decision.study_instance_uid,
            decision.series_instance_uid,
            decision.instances if is_list else (),
        )
        _log.info(
            "%s: move %d, %s level, %d instances", decision.pacs, decision.move, job.level, len(decision.instances)
        )
        move, said = decision.move, self._loop.time()

        def on_response(_: MoveResult) -> None:
            nonlocal said
            if self._loop.time() - said >= self._note_every:
                said = self._loop.time()
                self._step(d.MoveResponded(move))

        task = self._moves[move] = self._loop.create_task(backend.move(job, on_response))
        task.add_done_callback(lambda task: self._finish_move(move, backend, task))

    def _finish_move(self, move: int, backend: Backend, task: asyncio.Task[MoveResult]) -> None:
        del self._moves[move]
        if not self._moves:
            self._idle.set()
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        match error:
            case None:
                result = task.result()
                event = d.MoveFinished(move, result.status, result.completed, result.failed_uids, result.error_comment)
            case asyncio.CancelledError():
                event = d.MoveFinished(move, comment="cancelled")
            case PeerError():
                event = d.MoveFinished(move, error=error)
            case _:
                _log.error("a move failed by a defect", exc_info=error)
                event = d.MoveFinished(
                    move, error=PeerRefused(backend.pacs.name, f"internal error: {type(error).__name__}")
                )
        self._step(event)

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # --- the Storage SCP's receiver -------------------------------------------------------------------------------

    def accepted_syntaxes(self, association: PeerAssociation) -> Sequence[str] | None:
        """Return what was asked of this PACS, in the order of the request."""
        return self._scheduler.accepted_syntaxes(self._identify(association))

    def syntaxes_refused(self, association: PeerAssociation, refused: Mapping[str, tuple[str, ...]]) -> None:
        """Remember what could not be negotiated: it explains instances that will not come."""
        self._step(d.SyntaxesRefused(self._identify(association), refused))

    def association_closed(self, association: PeerAssociation, reason: str) -> None:
        """Forget the peer; what it was sending was discarded before."""
        self._peers.pop(association.id, None)

    def begin(self, request: StoreRequest) -> Incoming | int:
        """Take an instance that somebody waits for; refuse it (0124H) when nobody does."""
        arrival = self._accept(request, SpoolingArrival)
        return arrival.open(self._spool, request) if isinstance(arrival, SpoolingArrival) else arrival

    def offer(self, request: StoreRequest) -> Arrival | Dropped | int:
        """Decide as `begin` does, about an instance whose bytes another process writes."""
        return self._accept(request, Arrival)

    def _accept(self, request: StoreRequest, kind: type[A]) -> A | Dropped | int:
        store = next(self._numbers)
        uid, syntax = request.sop_instance_uid, request.transfer_syntax_uid
        is_spooled = self._spool.find(uid, (syntax,)) is not None
        pacs = self._identify(request.association)
        answer = self._offer(d.StoreOffered(store, pacs, request.sop_class_uid, uid, syntax, is_spooled))
        match answer:
            case d.AcceptStore(verify=verify):
                arrival = kind(
                    store, self._take_store, tell_every=self._note_every, verify=self._verify if verify else None
                )
                self._stores[store] = arrival
                return arrival
            case d.DropStore():
                return Dropped()
            case d.RefuseStore(reason=reason):
                _log.info("%s sends %s, refused: %s", request.association.calling_ae_title, uid, reason)
        return _NOT_AUTHORISED

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
        return self.on_availability(self._identify(association), dataset, transfer_syntax_uid)

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

    def _offer(self, event: d.StoreOffered) -> d.AcceptStore | d.DropStore | d.RefuseStore | None:
        self._step(event)
        answer, self._answer = self._answer, None
        return answer

    def _identify(self, association: PeerAssociation) -> str | None:
        """Return which PACS calls: by its AE title, its address where that is not enough, None when neither tells.

        A PACS may send under another AE title than the one that it is called by.
        """
        if association.pacs is not None:
            return association.pacs  # we requested it
        if association.id in self._peers:
            return self._peers[association.id]
        titled = [n for n, pacs in self._settings.items() if pacs.ae_title == association.calling_ae_title]
        if len(titled) != 1:
            titled = [n for n in titled or self._settings if association.host in self._hosts[n]]
        name = self._peers[association.id] = titled[0] if len(titled) == 1 else None
        return name
