"""The queue of a PACS without a PACS: whose turn it is."""

from __future__ import annotations

from collections import Counter, deque
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from xca_imaging.imaging.budget import Budget, OpeningHours, TokenBucket
from xca_imaging.imaging.decisions import Priority
from xca_imaging.imaging.fairness import FairQueue, Fit
from xca_imaging.imaging.workload import Batch, Fetch, Pacs, Request, Stage

EXPLICIT, JPEG = ("1.2.840.10008.1.2.1",), ("1.2.840.10008.1.2.4.70",)
PACS = Pacs("main", Budget(1), FairQueue(), OpeningHours(()), TokenBucket(0), (), 1)


class Queue:
    """A queue, its batches by name, and what is served."""

    def __init__(self, **options: Any) -> None:
        self.queue = FairQueue(**options)
        self.order = 0
        self.served: Counter[str] = Counter()

    def push(
        self,
        asker: str,
        count: int = 1,
        *,
        now: float = 0.0,
        weight: float = 1.0,
        priority: Priority = Priority.ROUTINE,
        accept: tuple[str, ...] = EXPLICIT,
    ) -> Batch:
        self.order += 1
        request = Request(self.order, self.order, accept, asker, priority, weight)
        fetches = deque(
            Fetch(PACS, "1", "2", f"{self.order}.{n}", accept, False, None, 1.0, stage=Stage.PAUSED)
            for n in range(count)
        )
        for fetch in fetches:
            fetch.enter(Stage.QUEUED)
        batch = Batch(request, fetches, None)
        self.queue.push(batch, now)
        return batch

    def serve(self, now: float = 0.0, most: int = 10) -> Batch | None:
        batch = self.queue.next(now, lambda batch: Fit.YES)
        if batch is not None:
            taken = batch.take(most)
            self.queue.charge(batch, len(taken), now)
            self.served[batch.request.asker] += len(taken)
        return batch


def test_one_asker_is_served_in_order() -> None:
    q = Queue()
    batches = [q.push("a") for _ in range(3)]
    assert [q.serve() for _ in range(4)] == [*batches, None]


def test_askers_share_by_weight_whatever_each_asks() -> None:
    q = Queue()
    for _ in range(100):
        q.push("a", 10)
    q.push("b", 1000, weight=2.0)
    q.push("c", 1000)
    for _ in range(40):
        q.serve(most=10)
    assert q.served == {"a": 100, "b": 200, "c": 100}


def test_who_comes_anew_gets_no_credit_for_the_past() -> None:
    q = Queue()
    q.push("a", 10_000)
    for _ in range(500):
        q.serve()
    q.push("b", 1000)
    q.served.clear()
    for _ in range(20):
        q.serve()
    assert q.served == {"a": 100, "b": 100}


def test_leaving_and_coming_back_is_no_advantage() -> None:
    q = Queue()
    q.push("a", 10_000)
    for _ in range(50):
        q.push("b", 10)  # always gone when it is served
        q.serve()
        q.serve()
    assert q.served == {"a": 500, "b": 500}


def test_more_urgent_first_but_the_passed_over_gets_a_turn() -> None:
    q = Queue(ageing=60.0)
    q.push("a", 10, priority=Priority.PREFETCH, now=0.0)
    routine = q.push("a", 10, now=1.0)
    for _ in range(10):
        q.push("b", 10, priority=Priority.EMERGENCY, now=2.0)
    assert q.serve(now=3.0) is not routine
    assert [q.serve(now=59.0).request.priority for _ in range(2)] == [Priority.EMERGENCY] * 2  # type: ignore[union-attr]
    assert [q.serve(now=62.0, most=1).request.priority.name for _ in range(3)] == [  # type: ignore[union-attr]
        "ROUTINE",
        "PREFETCH",
        "EMERGENCY",
    ]


def test_throttled_requests_are_set_aside_and_come_back_to_their_place() -> None:
    q = Queue()
    first, second = q.push("a"), q.push("a")
    first.request.is_throttled = True
    assert q.queue.next(0.0, lambda batch: Fit.YES) is second
    assert set(q.queue) == {first, second}
    first.request.is_throttled = False
    q.queue.unpark(first.request.id, 0.0)
    assert [q.serve(), q.serve(), q.serve()] == [first, second, None]


def test_what_cannot_be_served_holds_up_others_only_when_it_says_so() -> None:
    q = Queue()
    q.push("a", accept=JPEG)
    other = q.push("a")
    fits = {JPEG: Fit.SKIP, EXPLICIT: Fit.YES}
    assert q.queue.next(0.0, lambda batch: fits[batch.request.accept]) is other
    assert q.queue.has_other(EXPLICIT)
    fits[JPEG] = Fit.WAIT
    assert q.queue.next(0.0, lambda batch: fits[batch.request.accept]) is None


def test_the_withdrawn_are_passed_over() -> None:
    q = Queue()
    gone, here = q.push("a"), q.push("b")
    gone.request.is_open = False
    assert [q.serve(), q.serve()] == [here, None]


@given(
    asked=st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(1, 30), st.sampled_from([0.5, 1.0, 4.0])), min_size=3, max_size=60
    ),
    most=st.integers(1, 20),
)
@hypothesis_settings(max_examples=200, deadline=None)
def test_service_differs_from_the_shares_by_one_batch_at_most(asked: list[tuple[str, int, float]], most: int) -> None:
    """While two askers both wait, served / weight of one is never ahead by more than a batch of each."""
    weights = {asker: weight for asker, _, weight in asked}
    q = Queue()
    for asker, count, _ in asked:
        q.push(asker, count, weight=weights[asker])
    left = Counter[str]()
    for asker, count, _ in asked:
        left[asker] += count
    while True:
        waiting = [asker for asker in weights if left[asker] > 0]
        before = q.served.copy()
        if q.serve(most=most) is None:
            break
        for asker in waiting:
            left[asker] -= q.served[asker] - before[asker]
        for one in waiting:
            for other in waiting:
                lead = q.served[one] / weights[one] - q.served[other] / weights[other]
                assert lead <= most / weights[one] + most / weights[other]
    assert not any(left.values())  # nothing starves


@pytest.mark.parametrize(
    ("hours", "clock", "opens", "closes"),
    [
        ((), 0.0, 0.0, None),
        (("20:00-06:00",), 20 * 3600.0, 0.0, 10 * 3600.0),
        (("20:00-06:00",), 3 * 3600.0, 0.0, 3 * 3600.0),
        (("20:00-06:00",), 6 * 3600.0, 14 * 3600.0, None),
        (("08:00-12:00", "14:00-18:00"), 13 * 3600.0, 3600.0, None),
        (("00:00-24:00",), 13 * 3600.0, 0.0, 11 * 3600.0),
    ],
)
def test_hours(hours: tuple[str, ...], clock: float, opens: float, closes: float | None) -> None:
    each = OpeningHours(hours)
    assert each.opens_in(5.0) == 0.0  # nobody has looked at the clock yet
    each.set_clock(clock, 5.0)
    assert each.opens_in(5.0) == opens
    assert each.closes_in(5.0) == closes


def test_bytes_are_paid_for_after_they_came() -> None:
    bucket = TokenBucket(100)
    assert bucket.ready_at(0.0) == 0.0
    bucket.take(1100, 0.0)  # a second's burst and ten seconds more
    assert bucket.ready_at(0.0) == pytest.approx(10.0)
    assert bucket.ready_at(12.0) == 12.0
    bucket.take(0, 100.0)
    bucket.take(200, 100.0)  # quiet makes up for a second, not for ninety
    assert bucket.ready_at(100.0) == pytest.approx(101.0)
    free = TokenBucket(0)
    free.take(10**12, 0.0)
    assert free.ready_at(0.0) == 0.0
