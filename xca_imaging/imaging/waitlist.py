"""What is wanted and not yet there: open requests and fetches, what runs for them, and the decisions of a step.

Shared by the parts of the scheduler; each want leaves it once, by `complete` or `fail`.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterable

from xca_imaging.errors import RegistryError
from xca_imaging.imaging.decisions import Asked, CompleteInstance, Decision, FailInstance, WakeAt
from xca_imaging.imaging.ledger import Want
from xca_imaging.imaging.plan import SeriesFetch, not_there
from xca_imaging.imaging.workload import Batch, Fetch, Key, Move, Pacs, Request, Stage


class Sizes:
    """What instances of a PACS are like in size: running means by SOP class.

    Parameters
    ----------
    unknown : float
        Bytes expected of what nothing is known about: little, so that nothing is refused on a guess.
    inertia : float
        Weight of the past in a mean.
    """

    # Mutable state: means by PACS and SOP class; "" stands for all classes of a PACS.

    def __init__(self, *, unknown: float = 128 * 1024, inertia: float = 0.95) -> None:
        self._unknown, self._inertia = unknown, inertia
        self._means: dict[tuple[str, str], float] = {}

    def learn(self, pacs: str, sop_class: str, size: int) -> None:
        """Take the size of an instance that arrived into account."""
        for key in ((pacs, sop_class), (pacs, "")):
            mean = self._means.get(key)
            self._means[key] = size if mean is None else mean * self._inertia + size * (1 - self._inertia)

    def estimate(self, pacs: str, sop_class: str | None) -> float:
        """Return the bytes that an instance will have."""
        mean = self._means.get((pacs, sop_class or ""))
        if mean is None:
            mean = self._means.get((pacs, ""), self._unknown)
        return max(1.0, mean)


class Waitlist:
    """Open requests and fetches.

    Parameters
    ----------
    pacs : dict
        By name.
    """

    # Mutable state: all of it. `out` collects the decisions of the step that runs, `touched` the PACSs at which
    # something may start after it; `promised` is the room for what open fetches will bring, in bytes; `_timers` is a
    # heap, `_wake` the time that `WakeAt` named last.

    def __init__(self, pacs: dict[str, Pacs]) -> None:
        self.pacs = pacs
        self.requests: dict[int, Request] = {}
        self.fetches: dict[Key, Fetch] = {}
        self.by_uid: dict[str, list[Fetch]] = {}
        self.moves: dict[int, Move] = {}
        self.sizes = Sizes()
        self.promised = 0.0
        self.out: list[Decision] = []
        self.touched: dict[Pacs, None] = {}
        self.numbers = itertools.count(1)
        self._timers: list[tuple[float, int, Callable[[float], None]]] = []
        self._wake: float | None = None

    # --- time -----------------------------------------------------------------------------------------------------

    def at(self, time: float, action: Callable[[float], None]) -> None:
        """Do something at a time, or at the first step after it."""
        heapq.heappush(self._timers, (time, next(self.numbers), action))

    def run_timers(self, now: float) -> None:
        """Do what was to be done by now."""
        while self._timers and self._timers[0][0] <= now:
            heapq.heappop(self._timers)[2](now)

    def woke(self) -> None:
        """Forget the alarm: it has rung."""
        self._wake = None

    def set_alarm(self) -> None:
        """Ask to be woken for the next timer, where that was not asked yet."""
        if self._timers and (self._wake is None or self._timers[0][0] < self._wake):
            self._wake = self._timers[0][0]
            self.out.append(WakeAt(self._wake))

    def touch(self, pacs: Pacs) -> None:
        """Look, at the end of the step, whether something can start there."""
        self.touched[pacs] = None

    # --- requests and fetches -------------------------------------------------------------------------------------

    def admit(self, event: Asked) -> Request:
        """Enter a request."""
        order = next(self.numbers)
        request = Request(event.request, order, event.accept, event.asker, event.priority, event.weight)
        self.requests[event.request] = request
        return request

    def find(self, series: SeriesFetch, uid: str, accept: tuple[str, ...]) -> Fetch | None:
        """Return the open fetch of an instance."""
        key = (series.pacs, series.study_instance_uid, series.series_instance_uid, uid, accept)
        return self.fetches.get(key)

    def open(self, series: SeriesFetch, uid: str, accept: tuple[str, ...]) -> Fetch:
        """Open a fetch."""
        sop_class = series.sop_classes.get(uid)
        estimate = self.sizes.estimate(series.pacs, sop_class)
        pacs = self.pacs[series.pacs]
        study, number = series.study_instance_uid, series.series_instance_uid
        fetch = Fetch(pacs, study, number, uid, accept, series.verify, sop_class, estimate)
        self.fetches[fetch.key] = fetch
        self.by_uid.setdefault(uid, []).append(fetch)
        return fetch

    def join(self, fetch: Fetch, request: Request, want: Want) -> None:
        """Let a request wait for a fetch."""
        fetch.waiters.setdefault(request, []).append(want)
        request.fetches[fetch] = None

    def promise(self, fetch: Fetch) -> None:
        """Keep room for it until it is closed; once, however many ask."""
        if not fetch.promised:
            fetch.promised = fetch.estimate
            self.promised += fetch.promised

    def close(self, fetch: Fetch) -> None:
        """End a fetch, whatever became of it."""
        fetch.enter(Stage.CLOSED)  # its batches drop what is not queued when they come to it
        fetch.pacs.paused.pop(fetch, None)
        self.promised -= fetch.promised
        del self.fetches[fetch.key]
        same = self.by_uid[fetch.uid]
        same.remove(fetch)
        if not same:
            del self.by_uid[fetch.uid]
        if fetch.move is not None:
            fetch.move.fetches.pop(fetch, None)
        for request in fetch.waiters:
            request.fetches.pop(fetch, None)

    def complete(self, fetch: Fetch, store: int) -> None:
        """It is there."""
        move, pacs = fetch.move, fetch.pacs
        method = pacs.methods[0] if move is None else move.method
        for request, wants in fetch.waiters.items():
            self.out += [CompleteInstance(request.id, want, store, fetch.attempts, pacs.name, method) for want in wants]
        self.close(fetch)

    def fail(self, fetch: Fetch, error: RegistryError) -> None:
        """It will not come, in no way."""
        if fetch.earlier:
            error = error.at(error.location, f"{error.context}; before that, {fetch.earlier}")
        for request, wants in fetch.waiters.items():
            self.out += [
                FailInstance(request.id, want, error.at(want.sop_instance_uid), fetch.attempts) for want in wants
            ]
        self.close(fetch)

    def fail_absent(self, fetch: Fetch) -> None:
        """It is not where it was asked for; all who wait asked for it there."""
        wants = next(iter(fetch.waiters.values()), None)
        if wants is None:
            self.close(fetch)
        else:
            fetch.earlier = ""
            self.fail(fetch, not_there(wants[0]))

    def enqueue(self, fetches: Iterable[Fetch], now: float, *, is_whole: bool = False) -> None:
        """Queue paused fetches for each request that waits for them, by series.

        `is_whole`: they are whole series. What is not paused any more was queued in another way, or is over.
        """
        batches: dict[tuple[Request, str, str], deque[Fetch]] = {}
        sizes: Counter[tuple[str, str]] = Counter()
        for fetch in fetches:
            if fetch.stage is Stage.PAUSED:
                fetch.pacs.paused.pop(fetch, None)
                fetch.enter(Stage.QUEUED)
                sizes[fetch.study, fetch.series] += 1
                for request in fetch.waiters:
                    batches.setdefault((request, fetch.study, fetch.series), deque()).append(fetch)
        for (request, study, series), queued in batches.items():
            pacs, count = queued[0].pacs, sizes[study, series]
            pacs.queue.push(Batch(request, queued, count if is_whole else None), now)
            self.touch(pacs)
