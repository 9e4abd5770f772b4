"""The queue of one PACS: by urgency, fair between askers, and so that nothing starves.

* A more urgent request goes first. Still, a less urgent level that was passed over for `ageing` seconds gets one turn.
* Within a level askers share by weight (start-time fair queueing): each has a virtual time that goes on by
  cost / weight with what it is served; who is furthest behind is next. Who comes anew, or was idle, starts where the
  others are: no credit for the past.
* Within an asker requests go in the order in which they came.

References
----------
* P. Goyal, H. M. Vin, H. Cheng, Start-Time Fair Queueing, IEEE/ACM Transactions on Networking 5(5), 1997
"""

from __future__ import annotations

import enum
import heapq
import itertools
from collections.abc import Callable, Iterator

from xca_imaging.imaging.decisions import Priority
from xca_imaging.imaging.workload import Accept, Batch


class Fit(enum.Enum):
    """Whether a batch can be served now."""

    YES = enum.auto()
    SKIP = enum.auto()  # not now; others may go first
    WAIT = enum.auto()  # not now, and nothing may overtake it


class _Flow:
    """What one asker has in one level; `tag` is its virtual time."""

    __slots__ = ("lines", "tag", "weight")

    def __init__(self, tag: float, weight: float) -> None:
        self.tag, self.weight = tag, weight
        # By accepted transfer syntaxes: a line whose list cannot be served now does not hold up the others.
        self.lines: dict[Accept, list[tuple[int, int, Batch]]] = {}


class _Level:
    __slots__ = ("flows", "idle", "virtual", "waits_since")

    def __init__(self) -> None:
        self.flows: dict[str, _Flow] = {}
        self.idle: dict[str, float] = {}  # virtual times of those who have nothing here now
        self.virtual = 0.0
        self.waits_since: float | None = None


class FairQueue:
    """Batches that wait for one PACS.

    Parameters
    ----------
    ageing : float
        Seconds after which a level that was passed over gets a turn.
    max_idle : int
        Askers without a batch whose virtual time is kept. Forgetting one gives it at most one batch's advantage.
    """

    # Mutable state: the levels, a number that keeps batches of one request in line, and the batches of throttled
    # requests, which are set aside when their turn comes.

    def __init__(self, *, ageing: float = 60.0, max_idle: int = 1000) -> None:
        self._ageing, self._max_idle = ageing, max_idle
        self._levels = {priority: _Level() for priority in Priority}
        self._numbers = itertools.count()
        self._parked: dict[int, list[Batch]] = {}

    def __iter__(self) -> Iterator[Batch]:
        """Give all batches, in no order; also dead ones that were not met yet."""
        for level in self._levels.values():
            for flow in level.flows.values():
                for line in flow.lines.values():
                    yield from (batch for _, _, batch in line)
        for batches in self._parked.values():
            yield from batches

    def push(self, batch: Batch, now: float) -> None:
        """Put a batch at the place of its request."""
        request = batch.request
        level = self._levels[request.priority]
        flow = level.flows.get(request.asker)
        if flow is None:
            tag = max(level.virtual, level.idle.pop(request.asker, 0.0))
            flow = level.flows[request.asker] = _Flow(tag, request.weight)
            if level.waits_since is None:
                level.waits_since = now
        flow.weight = request.weight
        line = flow.lines.setdefault(request.accept, [])
        heapq.heappush(line, (request.order, next(self._numbers), batch))

    def unpark(self, request: int, now: float) -> None:
        """Take the batches of a request that is no longer throttled, or over, back into the queue."""
        for batch in self._parked.pop(request, ()):
            if batch.has_open():
                self.push(batch, now)

    def next(self, now: float, fits: Callable[[Batch], Fit]) -> Batch | None:
        """Return the batch whose turn it is; it stays in the queue until it is empty."""
        for level in self._in_turn(now):
            for asker in sorted(level.flows, key=lambda each: level.flows[each].tag):
                for batch in self._heads(level, asker):
                    match fits(batch):
                        case Fit.YES:
                            return batch
                        case Fit.WAIT:
                            return None
        return None

    def has_other(self, accept: Accept) -> bool:
        """Tell whether somebody waits for what is accepted otherwise."""
        return any(
            batch.request.accept != accept
            for level in self._levels.values()
            for asker in tuple(level.flows)
            for batch in self._heads(level, asker)
        )

    def charge(self, batch: Batch, cost: float, now: float) -> None:
        """Note that a move of a batch was started: it was its level's and its asker's turn."""
        level = self._levels[batch.request.priority]
        level.waits_since = now
        if flow := level.flows.get(batch.request.asker):
            level.virtual = max(level.virtual, flow.tag)
            flow.tag += cost / flow.weight

    def _in_turn(self, now: float) -> list[_Level]:
        levels = [level for level in self._levels.values() if level.flows]
        aged = [each for each in levels[1:] if each.waits_since is not None and now - each.waits_since >= self._ageing]
        return [*aged, *(each for each in levels if each not in aged)]

    def _heads(self, level: _Level, asker: str) -> list[Batch]:
        """Return the first batch of each line of an asker, the oldest first, and forget what is over."""
        flow = level.flows[asker]
        heads: list[tuple[int, int, Batch]] = []
        for accept, line in tuple(flow.lines.items()):
            while line:
                batch = line[0][2]
                if not batch.has_open():
                    heapq.heappop(line)
                elif batch.request.is_throttled:
                    heapq.heappop(line)
                    self._parked.setdefault(batch.request.id, []).append(batch)
                else:
                    heads.append(line[0])
                    break
            if not line:
                del flow.lines[accept]
        if not flow.lines:
            del level.flows[asker]
            if flow.tag > level.virtual:
                level.idle[asker] = flow.tag
            if len(level.idle) > self._max_idle:
                del level.idle[min(level.idle, key=level.idle.__getitem__)]
            if not level.flows:
                level.waits_since = None
        return [batch for _, _, batch in sorted(heads)]
