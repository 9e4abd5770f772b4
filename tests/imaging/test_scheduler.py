"""The scheduler without time: lists of events, and simulated PACSs under random load."""

from __future__ import annotations

import heapq
import itertools
import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from xca_imaging.errors import (
    ConnectFailed,
    DocumentUniqueIdError,
    PeerBusy,
    PeerRefused,
    RepositoryBusy,
    RepositoryError,
    RepositoryOutOfResources,
    Retry,
)
from xca_imaging.imaging import decisions as d
from xca_imaging.imaging.budget import Budget, LevelChoice
from xca_imaging.imaging.ledger import Ledger, Want
from xca_imaging.imaging.plan import SeriesFetch
from xca_imaging.imaging.scheduler import Scheduler

EXPLICIT, JPEG = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.4.70"
CT = "1.2.840.10008.5.1.4.1.1.2"
ROOM = 10**12
T = TypeVar("T")


def series(
    number: int,
    count: int,
    *,
    pacs: str = "main",
    whole: bool = True,
    proved: bool = False,
    in_study: int | None = None,
) -> SeriesFetch:
    wants = tuple(
        Want("1.2", f"1.3.{number}", f"1.4.{number}.{n}", f"1.9.{pacs == 'main':d}") for n in range(1, count + 1)
    )
    classes = {want.sop_instance_uid: CT for want in wants} if proved else {}
    return SeriesFetch(
        pacs, "1.2", f"1.3.{number}", wants, count if whole else count + 1, classes, study_count=in_study
    )


class Bench:
    """A scheduler and a clock; each call is one step."""

    def __init__(
        self,
        limit: int = 4,
        *,
        methods: tuple[d.Method, ...] = ("c-move",),
        uid_list_limit: int = 128,
        level: LevelChoice = "auto",
        bytes_per_second: int = 0,
        hours: tuple[str, ...] = (),
        **options: Any,
    ) -> None:
        budget = Budget(limit, methods, uid_list_limit, level, bytes_per_second, hours)
        self.scheduler = Scheduler(
            {"main": budget, "other": budget}, stall_timeout=60.0, randomness=random.Random(1), **options
        )
        self.now = 100.0
        self.stores = itertools.count(1)

    def step(self, event: d.Event, after: float = 0.0) -> list[d.Decision]:
        self.now += after
        return self.scheduler.step(event, self.now)

    def ask(
        self,
        request: int,
        *fetches: SeriesFetch,
        accept: tuple[str, ...] = (EXPLICIT,),
        room: int = ROOM,
        asker: str = "local",
        priority: d.Priority = d.Priority.ROUTINE,
        weight: float = 1.0,
    ) -> list[d.Decision]:
        return self.step(d.Asked(request, fetches, accept, room, asker, priority, weight))

    def arrive(
        self, uid: str, *, syntax: str = EXPLICIT, pacs: str | None = "main", sop_class: str = CT, size: int = 1000
    ) -> list[d.Decision]:
        store = next(self.stores)
        out = self.step(d.StoreOffered(store, pacs, sop_class, uid, syntax))
        if any(isinstance(each, d.AcceptStore) for each in out):
            out += self.step(d.InstanceArrived(store, size))
        return out

    def deliver(self, move: d.StartMove) -> list[d.Decision]:
        """Let a move bring everything and end."""
        out = [each for uid in move.instances for each in self.arrive(uid)]
        return out + self.step(d.MoveFinished(move.move, 0, len(move.instances)))

    def sleep(self, seconds: float) -> list[d.Decision]:
        return self.step(d.Woke(), seconds)


def count_lines(work: Callable[[], object]) -> int:
    """Return how many lines of Python some work runs through."""
    count = 0

    def trace(frame: object, event: str, argument: object) -> object:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def of(kind: type[T], decisions: Sequence[d.Decision]) -> list[T]:
    return [each for each in decisions if isinstance(each, kind)]


def test_series_run_in_parallel_up_to_the_limit() -> None:
    b = Bench(limit=2)
    moves = of(d.StartMove, b.ask(1, *(series(n, 3) for n in range(1, 5))))
    assert [(m.level, m.series_instance_uid) for m in moves] == [("SERIES", "1.3.1"), ("SERIES", "1.3.2")]
    for uid in moves[0].instances:
        assert len(of(d.CompleteInstance, b.arrive(uid))) == 1
    (third,) = of(d.StartMove, b.step(d.MoveFinished(moves[0].move, 0, 3)))
    assert third.series_instance_uid == "1.3.3"


def test_queries_take_slots_before_moves() -> None:
    b = Bench(limit=1)
    assert of(d.StartQuery, b.step(d.QueryAsked(1, "main"))) == [d.StartQuery(1)]
    assert of(d.StartMove, b.ask(1, series(1, 1))) == []
    assert of(d.StartQuery, b.step(d.QueryAsked(2, "main"))) == []
    out = b.step(d.QueryFinished(1, "main"))
    assert of(d.StartQuery, out) == [d.StartQuery(2)]
    assert of(d.StartMove, out) == []
    assert len(of(d.StartMove, b.step(d.QueryFinished(2, "main")))) == 1


def test_a_flood_of_queries_does_not_keep_moves_out() -> None:
    b = Bench(limit=1)
    b.step(d.QueryAsked(1, "main"))
    assert of(d.StartMove, b.ask(1, series(1, 1))) == []
    queries = 1
    while True:
        b.step(d.QueryAsked(queries + 1, "main"))
        out = b.step(d.QueryFinished(queries, "main"))
        if of(d.StartMove, out):
            break
        assert of(d.StartQuery, out) == [d.StartQuery(queries + 1)]
        queries += 1
    assert queries == 16
    assert of(d.StartQuery, b.deliver(of(d.StartMove, out)[0])) == [d.StartQuery(17)]


def test_a_withdrawn_query_never_starts() -> None:
    b = Bench(limit=1)
    b.step(d.QueryAsked(1, "main"))
    b.step(d.QueryAsked(2, "main"))
    b.step(d.QueryFinished(2, "main"))
    assert of(d.StartQuery, b.step(d.QueryFinished(1, "main"))) == []


def test_one_fetch_however_many_ask() -> None:
    b = Bench()
    (move,) = of(d.StartMove, b.ask(1, series(1, 2)))
    assert of(d.StartMove, b.ask(2, series(1, 2))) == []
    done = of(d.CompleteInstance, b.arrive("1.4.1.1"))
    assert [each.request for each in done] == [1, 2]
    # The last waiter's leaving cancels, the one before it does not.
    assert of(d.CancelMove, b.step(d.Withdrawn(1))) == []
    assert [each.move for each in of(d.CancelMove, b.step(d.Withdrawn(2)))] == [move.move]
    assert b.scheduler.waiting == 0
    assert of(d.RefuseStore, b.arrive("1.4.1.2")) != []


def test_withdrawn_while_queued_is_never_moved() -> None:
    b = Bench(limit=1)
    (first,) = of(d.StartMove, b.ask(1, series(1, 1)))
    b.ask(2, series(2, 1))
    b.ask(3, series(3, 1))
    b.step(d.Withdrawn(2))
    (move,) = of(d.StartMove, b.step(d.MoveFinished(first.move, 0, 1)))
    assert move.series_instance_uid == "1.3.3"


def test_part_of_a_series_goes_by_lists() -> None:
    b = Bench(uid_list_limit=2)
    moves = of(d.StartMove, b.ask(1, series(1, 5, whole=False)))
    assert [(m.level, len(m.instances)) for m in moves] == [("IMAGE", 2), ("IMAGE", 2), ("IMAGE", 1)]


def test_series_of_which_another_request_fetches_a_part_goes_by_list() -> None:
    b = Bench()
    whole = series(1, 3)
    b.ask(1, SeriesFetch("main", "1.2", "1.3.1", whole.wants[:1], 3, {whole.wants[0].sop_instance_uid: CT}))
    (move,) = of(d.StartMove, b.ask(2, whole))
    assert (move.level, move.instances) == ("IMAGE", ("1.4.1.2", "1.4.1.3"))


def test_missing_instances_are_checked_then_asked_again_by_list() -> None:
    b = Bench()
    (move,) = of(d.StartMove, b.ask(1, series(1, 3)))
    b.arrive("1.4.1.1")
    assert of(d.StartMove, b.step(d.MoveFinished(move.move, 0, 3))) == []
    (check,) = of(d.CheckSeries, b.sleep(1.0))
    assert (check.pacs, check.study_instance_uid, check.series_instance_uid) == ("main", "1.2", "1.3.1")
    (gone,) = of(d.FailInstance, b.step(d.QueryFinished(check.query, "main", {"1.4.1.1": CT, "1.4.1.2": CT})))
    assert isinstance(gone.error, DocumentUniqueIdError)
    (again,) = of(d.StartMove, b.sleep(2.0))
    assert (again.level, again.instances) == ("IMAGE", ("1.4.1.2",))
    (done,) = of(d.CompleteInstance, b.arrive("1.4.1.2"))
    assert done.attempts == 2


def test_named_as_failed_needs_no_grace() -> None:
    b = Bench()
    (move,) = of(d.StartMove, b.ask(1, series(1, 2, proved=True)))
    b.arrive("1.4.1.1")
    b.step(d.MoveFinished(move.move, 0xB000, 1, ("1.4.1.2",)))
    assert [m.instances for m in of(d.StartMove, b.sleep(0.75))] == [("1.4.1.2",)]


def test_attempts_are_bounded_and_the_last_reason_is_told() -> None:
    b = Bench()
    (move,) = of(d.StartMove, b.ask(1, series(1, 1, proved=True)))
    for _ in range(2):
        b.step(d.MoveFinished(move.move, None, comment="the PACS ended the association"))
        b.sleep(1.0)
        (move,) = of(d.StartMove, b.sleep(5.0))
    b.step(d.MoveFinished(move.move, None, comment="the PACS ended the association"))
    (failed,) = of(d.FailInstance, b.sleep(1.0))
    assert isinstance(failed.error, RepositoryError)
    assert failed.error.location == "1.4.1.1"
    assert "the PACS ended the association" in failed.error.context
    assert failed.attempts == 3


def test_what_comes_within_the_grace_counts() -> None:
    b = Bench(limit=1)
    (move,) = of(d.StartMove, b.ask(1, series(1, 2, proved=True)))
    b.step(d.MoveFinished(move.move, 0, 2))
    assert len(of(d.CompleteInstance, b.arrive("1.4.1.1"))) == 1
    store = 77
    b.step(d.StoreOffered(store, "main", CT, "1.4.1.2", EXPLICIT))
    assert of(d.FailInstance, b.sleep(1.0)) == []  # it is arriving: the grace does not end it
    assert len(of(d.CompleteInstance, b.step(d.InstanceArrived(store, 1000)))) == 1
    assert b.scheduler.waiting == 0


def test_arrival_that_breaks_after_the_grace_is_asked_again() -> None:
    b = Bench()
    (move,) = of(d.StartMove, b.ask(1, series(1, 1, proved=True)))
    b.step(d.StoreOffered(1, "main", CT, "1.4.1.1", EXPLICIT))
    b.step(d.MoveFinished(move.move, 0, 1))
    b.sleep(1.0)
    out = b.step(d.StoreBroken(1, "aborted"))
    assert len(of(d.LoseInstance, out)) == 1
    assert len(of(d.StartMove, b.sleep(1.0))) == 1


def test_empty_list_answers_are_remembered_for_instances_that_exist() -> None:
    b = Bench()
    (move,) = of(d.StartMove, b.ask(1, series(1, 3, whole=False, proved=True)))
    b.step(d.MoveFinished(move.move, 0, 0))
    b.sleep(1.0)
    singles = of(d.StartMove, b.sleep(1.0))
    assert [m.instances for m in singles] == [("1.4.1.1",), ("1.4.1.2",), ("1.4.1.3",)]
    for single in singles:
        b.arrive(single.instances[0])
        b.step(d.MoveFinished(single.move, 0, 1))
    assert [len(m.instances) for m in of(d.StartMove, b.ask(2, series(2, 2, whole=False, proved=True)))] == [1, 1]


def test_a_refusal_for_good_is_not_repeated() -> None:
    b = Bench()
    (move,) = of(d.StartMove, b.ask(1, series(1, 2)))
    failed = of(d.FailInstance, b.step(d.MoveFinished(move.move, error=PeerRefused("main", "C-MOVE status 0xA801"))))
    assert len(failed) == 2
    assert "0xA801" in failed[0].error.context
    assert of(d.StartMove, b.sleep(60.0)) == []


def test_a_refused_list_is_tried_one_by_one_but_not_to_its_end() -> None:
    b = Bench(limit=1)
    refused = PeerRefused("main", "C-MOVE status 0xA801")
    (move,) = of(d.StartMove, b.ask(1, series(1, 50, whole=False, proved=True)))
    assert of(d.FailInstance, b.step(d.MoveFinished(move.move, error=refused))) == []
    (single,) = of(d.StartMove, b.sleep(1.0))
    assert len(single.instances) == 1
    failed = of(d.FailInstance, b.step(d.MoveFinished(single.move, error=refused)))
    assert len(failed) == 50
    assert b.scheduler.waiting == 0


def test_busy_narrows_the_window_and_grows_it_again() -> None:
    b = Bench(limit=4)
    moves = of(d.StartMove, b.ask(1, *(series(n, 1) for n in range(1, 9))))
    assert len(moves) == 4
    busy = PeerBusy("main", "association rejected (2/3/2)")
    for move in moves[2:]:
        assert of(d.StartMove, b.step(d.MoveFinished(move.move, error=busy))) == []
    done: set[str] = set()
    most, running = 0, {move.move: move for move in moves[:2]}
    for _ in range(40):
        started = of(d.StartMove, b.sleep(1.0))
        for move in list(running.values())[:1]:
            del running[move.move]
            done |= {each.want.sop_instance_uid for each in of(d.CompleteInstance, b.arrive(move.instances[0]))}
            started += of(d.StartMove, b.step(d.MoveFinished(move.move, 0, 1)))
        running |= {move.move: move for move in started}
        most = max(most, len(running))
    assert len(done) == 8
    assert 2 <= most <= 4


def test_out_of_resources_without_an_instance_is_busy() -> None:
    b = Bench()
    (move,) = of(d.StartMove, b.ask(1, series(1, 1, proved=True)))
    assert of(d.FailInstance, b.step(d.MoveFinished(move.move, 0xA702))) == []
    (move,) = of(d.StartMove, b.sleep(1.0))
    b.step(d.SyntaxesRefused("main", {CT: (JPEG,)}))
    b.step(d.MoveFinished(move.move, 0xA702))
    (failed,) = of(d.FailInstance, b.sleep(1.0))
    assert JPEG in failed.error.context


def test_always_busy_ends_as_busy() -> None:
    b = Bench()
    (move,) = of(d.StartMove, b.ask(1, series(1, 1)))
    for _ in range(100):
        out = b.step(d.MoveFinished(move.move, error=PeerBusy("main", "2/3/2")))
        if failed := of(d.FailInstance, out):
            break
        while not (started := of(d.StartMove, b.sleep(1.0))):
            pass
        (move,) = started
    assert isinstance(failed[0].error, RepositoryBusy)
    assert b.now < 160


def test_dead_pacs_fails_the_whole_queue_once_its_chances_are_gone() -> None:
    b = Bench(limit=1)
    running = of(d.StartMove, b.ask(1, *(series(n, 1) for n in range(1, 20))))
    failed = 0
    while b.scheduler.waiting:
        out = b.sleep(0.1)
        for move in running:
            out += b.step(d.MoveFinished(move.move, error=ConnectFailed("main", "refused")))
        running = of(d.StartMove, out)
        failed += len(of(d.FailInstance, out))
        assert b.now < 110
    assert failed == 19


def test_no_progress_cancels_and_fails_also_what_waits_behind_a_silent_pacs() -> None:
    b = Bench(limit=1)
    (move,) = of(d.StartMove, b.ask(1, series(1, 2), series(2, 2)))
    b.arrive("1.4.1.1")
    b.sleep(30)
    out = b.sleep(30)
    assert [each.move for each in of(d.CancelMove, out)] == [move.move]
    assert len(of(d.FailInstance, out)) == 3
    assert "60 s" in of(d.FailInstance, out)[0].error.context
    assert b.step(d.MoveFinished(move.move, 0xFE00)) == []


def test_pending_responses_are_no_progress_but_spare_the_queue() -> None:
    b = Bench(limit=1)
    (move,) = of(d.StartMove, b.ask(1, series(1, 1), series(2, 1)))
    for _ in range(59):
        b.step(d.MoveResponded(move.move), 1.0)
    out = b.sleep(1.0)
    assert len(of(d.CancelMove, out)) == 1
    assert [each.want.series_instance_uid for each in of(d.FailInstance, out)] == ["1.3.1"]
    assert len(of(d.StartMove, b.step(d.MoveFinished(move.move, 0xFE00)))) == 1


def test_bytes_are_progress() -> None:
    b = Bench()
    b.ask(1, series(1, 1))
    b.step(d.StoreOffered(1, "main", CT, "1.4.1.1", EXPLICIT))
    for _ in range(10):
        assert of(d.CancelMove, b.step(d.BytesArrived(1, 1000), 50.0)) == []


def test_different_lists_wait_for_each_other_and_nothing_overtakes() -> None:
    b = Bench(limit=4, patience=0.0)
    (first,) = of(d.StartMove, b.ask(1, series(1, 1)))
    assert b.scheduler.accepted_syntaxes("main") == (EXPLICIT,)
    assert of(d.StartMove, b.ask(2, series(2, 1), accept=(JPEG, EXPLICIT))) == []
    assert of(d.StartMove, b.ask(3, series(3, 1))) == []
    b.arrive("1.4.1.1")
    (second,) = of(d.StartMove, b.step(d.MoveFinished(first.move, 0, 1)))
    assert second.accept == b.scheduler.accepted_syntaxes("main") == (JPEG, EXPLICIT)
    assert b.scheduler.accepted_syntaxes(None) == (JPEG, EXPLICIT)


def test_an_arrival_serves_shorter_lists_that_name_its_syntax() -> None:
    b = Bench()
    b.ask(1, series(1, 1), accept=(JPEG, EXPLICIT))
    b.ask(2, series(1, 1), accept=(EXPLICIT,))
    b.ask(3, series(1, 1), accept=(JPEG,))
    assert [each.request for each in of(d.CompleteInstance, b.arrive("1.4.1.1"))] == [1, 2]


def test_an_arrival_does_not_serve_a_longer_list() -> None:
    # It may have been decoded for want of the syntax that only the longer list names.
    b = Bench()
    b.ask(1, series(1, 1), accept=(EXPLICIT,))
    b.ask(2, series(1, 1), accept=(JPEG, EXPLICIT))
    assert [each.request for each in of(d.CompleteInstance, b.arrive("1.4.1.1"))] == [1]


def test_what_a_full_spool_kept_out_is_not_asked_again() -> None:
    b = Bench()
    (move,) = of(d.StartMove, b.ask(1, series(1, 2)))
    b.step(d.StoreOffered(1, "main", CT, "1.4.1.1", EXPLICIT))
    (refused,) = of(d.FailInstance, b.step(d.StoreBroken(1, "the spool has no room", no_room=True)))
    (other,) = of(d.FailInstance, b.step(d.MoveFinished(move.move, 0xC000, 0)))
    assert refused.error.code == other.error.code == "XDSRepositoryOutOfResources"


def test_syntax_that_is_not_listed_is_refused_and_told_without_another_attempt() -> None:
    b = Bench()
    (move,) = of(d.StartMove, b.ask(1, series(1, 1)))
    assert of(d.RefuseStore, b.arrive("1.4.1.1", syntax=JPEG)) != []
    b.step(d.MoveFinished(move.move, 0xB000, 0))
    (failed,) = of(d.FailInstance, b.sleep(1.0))
    assert JPEG in failed.error.context


def test_refused_contexts_explain_what_does_not_come() -> None:
    b = Bench()
    (move,) = of(d.StartMove, b.ask(1, series(1, 1, proved=True)))
    b.step(d.SyntaxesRefused("main", {CT: (JPEG,)}))
    b.step(d.MoveFinished(move.move, 0xB000, 0))
    (failed,) = of(d.FailInstance, b.sleep(1.0))
    assert JPEG in failed.error.context


def test_refused_context_of_a_class_that_came_otherwise_explains_nothing_at_first() -> None:
    b = Bench()
    (move,) = of(d.StartMove, b.ask(1, series(1, 2, proved=True)))
    b.step(d.SyntaxesRefused("main", {CT: (JPEG,)}))
    b.arrive("1.4.1.1")
    b.step(d.MoveFinished(move.move, 0xB000, 1))
    b.sleep(1.0)
    assert len(of(d.StartMove, b.sleep(1.0))) == 1


def test_no_room_fails_at_once() -> None:
    b = Bench()
    b.ask(1, series(1, 1))
    b.step(d.StoreOffered(1, "main", CT, "1.4.1.1", EXPLICIT))
    (failed,) = of(d.FailInstance, b.step(d.StoreBroken(1, "the spool has no room", no_room=True)))
    assert isinstance(failed.error, RepositoryOutOfResources)


def test_admission() -> None:
    b = Bench(max_waiting=3)
    (failed,) = of(d.FailInstance, b.ask(1, series(1, 1), room=10))
    assert isinstance(failed.error, RepositoryOutOfResources)
    b.ask(2, series(2, 3))
    (failed,) = of(d.FailInstance, b.ask(3, series(3, 1)))
    assert isinstance(failed.error, RepositoryBusy)
    assert failed.error.location == "1.4.3.1"


def test_two_claims_to_one_instance_are_verified() -> None:
    b = Bench()
    mine, yours = Want("1.2", "1.3.1", "1.4.1", "1.9"), Want("1.2", "1.3.2", "1.4.1", "1.9")
    b.ask(1, SeriesFetch("main", "1.2", "1.3.1", (mine,), 1), SeriesFetch("main", "1.2", "1.3.2", (yours,), 1))
    (accept,) = of(d.AcceptStore, b.step(d.StoreOffered(1, "main", CT, "1.4.1", EXPLICIT)))
    assert accept.verify
    out = b.step(d.InstanceArrived(1, 1000, "1.2", "1.3.2"))
    assert [each.want for each in of(d.CompleteInstance, out)] == [yours]
    assert [each.want for each in of(d.FailInstance, out)] == [mine]


def test_spooled_and_unwanted_is_dropped_unknown_is_refused() -> None:
    b = Bench()
    assert b.step(d.StoreOffered(1, "main", CT, "1.4.9", EXPLICIT, is_spooled=True)) == [d.DropStore(1)]
    assert len(of(d.RefuseStore, b.step(d.StoreOffered(2, "main", CT, "1.4.9", EXPLICIT)))) == 1


def test_sender_with_the_identity_of_another_pacs_still_counts() -> None:
    b = Bench()
    b.ask(1, series(1, 2))
    assert len(of(d.CompleteInstance, b.arrive("1.4.1.1", pacs="other"))) == 1
    assert len(of(d.CompleteInstance, b.arrive("1.4.1.2", pacs=None))) == 1


# --------------------------------------------------------------------------------------------------------------------
# How large a move is
# --------------------------------------------------------------------------------------------------------------------


def sizes(decisions: Sequence[d.Decision]) -> list[tuple[str, int]]:
    return [(move.level, len(move.instances)) for move in of(d.StartMove, decisions)]


def test_one_large_series_is_split_over_free_associations() -> None:
    b = Bench(limit=4)
    moves = of(d.StartMove, b.ask(1, series(1, 400)))
    assert sizes(moves) == [("IMAGE", 100)] * 4
    assert {move.series_instance_uid for move in moves} == {"1.3.1"}
    assert len({uid for move in moves for uid in move.instances}) == 400


def test_what_a_list_brings_is_looked_at_unless_its_series_is_proved() -> None:
    b = Bench(limit=4)
    b.ask(1, series(1, 400), series(2, 400, proved=True))
    for uid, verify in (("1.4.1.1", True), ("1.4.2.1", False)):
        (accepted,) = of(d.AcceptStore, b.step(d.StoreOffered(next(b.stores), "main", CT, uid, EXPLICIT)))
        assert accepted.verify is verify


def test_enough_series_go_whole() -> None:
    b = Bench(limit=4)
    assert sizes(b.ask(1, *(series(n, 100) for n in range(1, 9)))) == [("SERIES", 100)] * 4


def test_the_last_series_is_shared_by_who_gets_free() -> None:
    b = Bench(limit=2)
    first, second = of(d.StartMove, b.ask(1, *(series(n, 100) for n in (1, 2, 3))))
    b.now += 5.0
    (third,) = of(d.StartMove, b.deliver(first))
    assert (third.level, len(third.instances)) == ("SERIES", 100)  # a hundred are on their way in the other
    b = Bench(limit=2)
    first, second = of(d.StartMove, b.ask(1, *(series(n, 100) for n in (1, 2, 3))))
    b.now += 5.0
    for uid in second.instances[:80]:
        b.arrive(uid)
    assert sizes(b.deliver(first)) == [("IMAGE", 60)]  # half of a hundred and twenty
    assert sizes(b.deliver(second)) == [("IMAGE", 40)]


def test_a_fast_pacs_is_not_asked_for_crumbs_nor_a_slow_one_for_long() -> None:
    b = Bench(limit=4)
    (move,) = of(d.StartMove, b.ask(1, series(1, 10)))
    b.now += 0.01  # a millisecond each
    b.deliver(move)
    (move,) = of(d.StartMove, b.ask(2, series(2, 200)))
    assert (move.level, len(move.instances)) == ("SERIES", 200)
    b = Bench(limit=1)
    (move,) = of(d.StartMove, b.ask(1, series(1, 10)))
    b.now += 10.0  # a second each
    b.deliver(move)
    assert sizes(b.ask(2, series(2, 200))) == [("IMAGE", 20)]


def test_whole_studies_go_at_study_level_where_splitting_does_not_help() -> None:
    fetches = [series(n, 20, in_study=60) for n in (1, 2, 3)]
    (move,) = of(d.StartMove, Bench(limit=1).ask(1, *fetches))
    assert (move.level, move.series_instance_uid, len(move.instances)) == ("STUDY", "", 60)
    assert sizes(Bench(limit=3).ask(1, *fetches)) == [("SERIES", 20)] * 3
    assert sizes(Bench(limit=1).ask(1, *fetches[:2])) == [("SERIES", 20)]  # not the whole study


def test_a_study_of_which_a_part_is_under_way_goes_by_series() -> None:
    b = Bench(limit=1)
    fetches = [series(n, 20, in_study=60) for n in (1, 2, 3)]
    (move,) = of(d.StartMove, b.ask(1, fetches[0]))
    b.ask(2, *fetches)
    assert sizes(b.deliver(move)) == [("SERIES", 20)]


@pytest.mark.parametrize(
    ("level", "expected"),
    [("study", [("STUDY", 300)]), ("series", [("SERIES", 150)] * 2), ("image", [("IMAGE", 75)] * 4)],
)
def test_levels_by_setting(level: LevelChoice, expected: list[tuple[str, int]]) -> None:
    assert sizes(Bench(limit=4, level=level).ask(1, *(series(n, 150, in_study=300) for n in (1, 2)))) == expected


def test_a_list_that_brings_one_instance_was_not_understood() -> None:
    b = Bench(limit=2)
    first, second = of(d.StartMove, b.ask(1, series(1, 200, proved=True)))
    b.arrive(first.instances[0])
    b.step(d.MoveFinished(first.move, 0, 1))
    b.deliver(second)
    b.sleep(1.0)
    (single,) = {len(move.instances) for move in of(d.StartMove, b.sleep(1.0))}
    assert single == 1
    assert ("SERIES", 200) in sizes(b.ask(2, series(2, 200))) or b.scheduler.active_moves == 2


# --------------------------------------------------------------------------------------------------------------------
# Whose turn it is
# --------------------------------------------------------------------------------------------------------------------


def test_an_emergency_is_next() -> None:
    b = Bench(limit=1)
    (running,) = of(d.StartMove, b.ask(1, *(series(n, 1) for n in range(1, 20)), priority=d.Priority.PREFETCH))
    b.ask(2, series(20, 1))
    b.ask(3, series(21, 1), priority=d.Priority.EMERGENCY)
    order = []
    for _ in range(3):
        (running,) = of(d.StartMove, b.deliver(running))
        order.append(running.series_instance_uid)
    assert order == ["1.3.21", "1.3.20", "1.3.2"]


def test_an_emergency_lifts_what_others_wait_for() -> None:
    b = Bench(limit=1)
    (running,) = of(d.StartMove, b.ask(1, *(series(n, 2) for n in range(1, 20)), priority=d.Priority.PREFETCH))
    b.ask(2, series(19, 2), priority=d.Priority.EMERGENCY)
    (move,) = of(d.StartMove, b.deliver(running))
    assert (move.level, move.series_instance_uid) == ("SERIES", "1.3.19")
    assert {each.request for each in of(d.CompleteInstance, b.arrive("1.4.19.1"))} == {1, 2}


def test_communities_share_a_pacs_by_weight() -> None:
    b = Bench(limit=4)
    out: list[d.Decision] = []
    for request in range(1, 100):
        asker = "small" if request % 10 == 0 else "large"
        out += b.ask(request, series(request, 10), asker=asker, weight=3.0 if asker == "small" else 1.0)
    served: Counter[bool] = Counter()
    running = of(d.StartMove, out)
    while served[True] < 60:
        move = running.pop(0)
        served[int(move.series_instance_uid.rsplit(".", 1)[1]) % 10 == 0] += 10
        running += of(d.StartMove, b.deliver(move))
    assert served[False] <= 60 / 3 + 50  # five of the large were under way before the small one had asked


def test_lists_take_turns() -> None:
    b = Bench(limit=2, patience=10.0)
    first = of(d.StartMove, b.ask(1, *(series(n, 10) for n in range(1, 40))))
    assert of(d.StartMove, b.ask(2, series(50, 10), accept=(JPEG, EXPLICIT), asker="other")) == []
    running, waited = list(first), 0
    while True:
        b.now += 1.0
        started = of(d.StartMove, b.deliver(running.pop(0)))
        running += started
        waited += 1
        if any(move.accept == (JPEG, EXPLICIT) for move in started):
            break
    assert 10 <= waited <= 13
    assert {move.accept for move in running} == {(JPEG, EXPLICIT)}  # alone at this PACS
    after = [move for other in running for move in of(d.StartMove, b.deliver(other))]
    assert {move.accept for move in after} == {(EXPLICIT,)}


def test_nothing_new_is_started_for_a_throttled_request_nor_is_its_silence_a_stall() -> None:
    b = Bench(limit=1)
    (move,) = of(d.StartMove, b.ask(1, series(1, 2), series(2, 2)))
    b.ask(2, series(3, 1))
    b.step(d.Throttled(1, True))
    b.arrive("1.4.1.1")
    for _ in range(10):
        assert of(d.CancelMove, b.sleep(30.0)) == []
    (other,) = of(d.StartMove, b.deliver(move))
    assert other.series_instance_uid == "1.3.3"
    assert of(d.StartMove, b.deliver(other)) == []
    assert [m.series_instance_uid for m in of(d.StartMove, b.step(d.Throttled(1, False)))] == ["1.3.2"]
    assert len(of(d.CancelMove, b.sleep(60.0))) == 1


def test_who_is_not_throttled_fetches_what_a_throttled_request_waits_for_too() -> None:
    b = Bench(limit=1)
    (running,) = of(d.StartMove, b.ask(1, series(1, 1)))
    b.ask(2, series(2, 3))
    b.step(d.Throttled(2, True))
    assert of(d.StartMove, b.deliver(running)) == []
    (move,) = of(d.StartMove, b.ask(3, series(2, 3)))
    assert len(move.instances) == 3
    b.step(d.Withdrawn(3))
    assert b.scheduler.waiting == 3
    b.step(d.Withdrawn(2))
    assert b.scheduler.waiting == 0


# --------------------------------------------------------------------------------------------------------------------
# Other ways to make a PACS send
# --------------------------------------------------------------------------------------------------------------------

WAYS: tuple[d.Method, ...] = ("c-move", "c-get", "wado-rs")
REFUSED = PeerRefused("main", "C-MOVE status 0xA801, move destination unknown: add the remote AE")


def test_a_refused_method_gives_way_and_is_remembered() -> None:
    b = Bench(methods=WAYS, method_memory=300.0)
    (move,) = of(d.StartMove, b.ask(1, series(1, 2)))
    assert move.method == "c-move"
    (move,) = of(d.StartMove, b.step(d.MoveFinished(move.move, error=REFUSED)))
    assert (move.method, move.level) == ("c-get", "SERIES")
    done = of(d.CompleteInstance, b.deliver(move))
    assert {(each.pacs, each.method, each.attempts) for each in done} == {("main", "c-get", 2)}
    (move,) = of(d.StartMove, b.ask(2, series(2, 2)))
    assert move.method == "c-get"
    b.deliver(move)
    b.sleep(300.0)
    moves = of(d.StartMove, b.ask(3, series(3, 2), series(4, 2)))
    assert [each.method for each in moves] == ["c-move", "c-get"]  # one tries whether it works again
    b.deliver(moves[0])
    assert [each.method for each in of(d.StartMove, b.ask(4, series(5, 2)))] == ["c-move"]


def test_every_way_is_tried_and_each_reason_told() -> None:
    b = Bench(methods=WAYS)
    (move,) = of(d.StartMove, b.ask(1, series(1, 1, proved=True)))
    methods = []
    for _ in WAYS:
        methods.append(move.method)
        out = b.step(d.MoveFinished(move.move, error=PeerRefused("main", f"{move.method} is not for you")))
        (move,) = of(d.StartMove, out) or [move]
    (failed,) = of(d.FailInstance, out)
    assert methods == list(WAYS)
    assert all(f"{method} is not for you" in failed.error.context for method in WAYS)
    assert failed.attempts == 3


def test_what_one_method_keeps_leaving_out_is_fetched_by_the_next() -> None:
    b = Bench(methods=WAYS[:2])
    (move,) = of(d.StartMove, b.ask(1, series(1, 2, proved=True)))
    b.arrive("1.4.1.1")
    for _ in range(3):
        assert move.method == "c-move"
        out = b.step(d.MoveFinished(move.move, 0xB000, 1, ("1.4.1.2",)))
        (move,) = of(d.StartMove, out + b.sleep(3.0))
    assert (move.method, move.instances) == ("c-get", ("1.4.1.2",))
    assert [each.method for each in of(d.StartMove, b.ask(2, series(2, 2)))] == ["c-move"]  # it works for others


def test_a_pacs_that_is_away_for_one_method_is_asked_by_the_next() -> None:
    b = Bench(limit=1, methods=WAYS[:2])
    running = of(d.StartMove, b.ask(1, *(series(n, 1) for n in range(1, 6))))
    methods = []
    while b.scheduler.waiting and b.now < 200:
        methods += [move.method for move in running]
        out = b.sleep(0.1)
        for move in running:
            if move.method == "c-move":
                out += b.step(d.MoveFinished(move.move, error=ConnectFailed("main", "refused")))
            else:
                out += b.deliver(move)
        running = of(d.StartMove, out)
    assert methods == ["c-move"] * 3 + ["c-get"] * 5


def test_a_stalled_move_gives_way() -> None:
    b = Bench(limit=2, methods=WAYS[:2])
    (move,) = of(d.StartMove, b.ask(1, series(1, 2)))
    out = b.sleep(60.0)
    assert [each.move for each in of(d.CancelMove, out)] == [move.move]
    (other,) = of(d.StartMove, out)
    assert (other.method, len(other.instances)) == ("c-get", 2)
    b.step(d.MoveFinished(move.move, 0xFE00))
    assert len(of(d.CompleteInstance, b.deliver(other))) == 2


def test_methods_that_negotiate_for_themselves_run_beside_each_other() -> None:
    b = Bench(limit=4, methods=("c-get",))
    assert len(of(d.StartMove, b.ask(1, series(1, 1)))) == 1
    other = replace(series(2, 1), study_instance_uid="1.2.2")
    assert len(of(d.StartMove, b.ask(2, other, accept=(JPEG,)))) == 1
    # The same instance in two syntaxes could not be told apart.
    assert of(d.StartMove, b.ask(3, series(1, 1), accept=(JPEG,))) == []
    assert of(d.AcceptStore, b.step(d.StoreOffered(1, "main", CT, "1.4.1.1", EXPLICIT)))


def test_who_wants_a_part_does_not_have_the_next_method_bring_the_whole() -> None:
    b = Bench(limit=2, methods=WAYS[:2])
    (move,) = of(d.StartMove, b.ask(1, series(1, 3)))
    b.ask(2, series(1, 1), priority=d.Priority.EMERGENCY)
    out = b.step(d.MoveFinished(move.move, error=REFUSED))
    assert [(m.method, m.level, len(m.instances)) for m in of(d.StartMove, out)] == [
        ("c-get", "IMAGE", 1),
        ("c-get", "IMAGE", 2),
    ]


def test_no_instance_is_asked_for_in_two_syntaxes_at_once_whatever_the_methods() -> None:
    b = Bench(limit=4, methods=WAYS[:2])
    (move,) = of(d.StartMove, b.ask(1, series(1, 1)))
    (other,) = of(d.StartMove, b.step(d.MoveFinished(move.move, error=REFUSED)))
    assert other.method == "c-get"
    assert of(d.StartMove, b.ask(2, series(1, 1), accept=(JPEG, EXPLICIT))) == []
    assert len(of(d.StartMove, b.deliver(other))) == 1


def test_what_was_withdrawn_from_a_stalled_move_is_not_asked_of_the_next_method() -> None:
    b = Bench(limit=2, methods=WAYS[:2])
    (move,) = of(d.StartMove, b.ask(1, series(1, 2)))
    b.ask(2, series(1, 1))
    b.step(d.Withdrawn(1))
    (other,) = of(d.StartMove, b.sleep(60.0))
    assert other.instances == ("1.4.1.1",)
    b.step(d.MoveFinished(move.move, 0xFE00))
    b.deliver(other)
    assert b.scheduler.waiting == 0


def test_a_retry_that_waits_is_not_started_twice_when_its_method_is_given_up_meanwhile() -> None:
    b = Bench(limit=10, methods=WAYS[:2], backoff=5.0)
    (listed,) = of(d.StartMove, b.ask(1, series(1, 4, whole=False, proved=True)))
    b.step(d.MoveFinished(listed.move, error=REFUSED))  # one by one, after a pause
    first, second, *_ = of(d.StartMove, b.sleep(10.0))
    b.step(d.MoveFinished(first.move, None))  # waits for another chance
    b.sleep(1.0)
    moves = of(d.StartMove, b.step(d.MoveFinished(second.move, error=REFUSED)))
    moved = [uid for move in moves for uid in move.instances]
    for _ in range(10):
        moved += [uid for move in of(d.StartMove, b.sleep(2.0)) for uid in move.instances]
    assert sorted(moved) == ["1.4.1.1", "1.4.1.2"]
    assert {move.method for move in moves} == {"c-get"}


# --------------------------------------------------------------------------------------------------------------------
# What a PACS, a spool and a clock allow
# --------------------------------------------------------------------------------------------------------------------


def test_a_dead_pacs_is_left_alone_and_told_at_once_until_a_probe_comes_back() -> None:
    b = Bench(limit=4)
    refused = ConnectFailed("main", "connection refused")
    running = of(d.StartMove, b.ask(1, *(series(n, 1) for n in range(1, 9))))
    while b.scheduler.waiting:
        out = b.sleep(0.1)
        for move in running:
            out += b.step(d.MoveFinished(move.move, error=refused))
        running = of(d.StartMove, out)
        assert b.now < 110
    b.sleep(1.0)
    out = b.ask(2, series(1, 2), series(1, 1, pacs="other"))
    assert [each.pacs for each in of(d.StartMove, out)] == ["other"]
    failed = of(d.FailInstance, out)
    assert len(failed) == 2
    assert isinstance(failed[0].error, RepositoryBusy)
    assert "connection refused" in failed[0].error.context
    assert "not asked since" in failed[0].error.context
    told = b.scheduler.why_closed("main", b.now)
    assert told is not None
    assert told.context == failed[0].error.context
    assert b.scheduler.why_closed("other", b.now) is None
    b.sleep(30.0)
    (probe,) = of(d.StartMove, b.ask(3, *(series(n, 2) for n in range(1, 5))))
    b.step(d.StoreOffered(900, "main", CT, probe.instances[0], EXPLICIT))
    assert len(of(d.StartMove, b.step(d.InstanceArrived(900, 10)))) == 3  # it sends: all associations again
    assert b.scheduler.why_closed("main", b.now) is None


def test_a_probe_that_fails_fails_who_waited_for_it() -> None:
    b = Bench(limit=1)
    (move,) = of(d.StartMove, b.ask(1, series(1, 1)))
    b.sleep(60.0)
    b.step(d.MoveFinished(move.move, 0xFE00))
    b.sleep(20.0)
    (probe,) = of(d.StartMove, b.ask(2, series(2, 1), series(3, 1)))
    failed = of(d.FailInstance, b.step(d.MoveFinished(probe.move, error=ConnectFailed("main", "refused"))))
    assert len(failed) == 2
    assert b.scheduler.waiting == 0


def test_admission_by_bytes_that_are_learned_and_promised() -> None:
    b = Bench()
    (move,) = of(d.StartMove, b.ask(1, series(1, 2, proved=True)))
    for uid in move.instances:
        b.arrive(uid, size=10_000_000)
    b.step(d.MoveFinished(move.move, 0, 2))
    assert len(of(d.StartMove, b.ask(2, series(2, 5, proved=True), room=100_000_000))) == 1
    (failed, *_) = of(d.FailInstance, b.ask(3, series(3, 6, proved=True), room=100_000_000))  # 50 MB are promised
    assert isinstance(failed.error, RepositoryOutOfResources)
    assert failed.error.retry is Retry.LATER
    assert of(d.FailInstance, b.ask(4, series(2, 5, proved=True), room=2_000_000)) == []  # asks for nothing new
    b.step(d.Withdrawn(2))
    b.step(d.Withdrawn(4))
    assert len(of(d.StartMove, b.ask(5, series(3, 6, proved=True), room=100_000_000))) == 1


def test_bytes_a_second() -> None:
    b = Bench(limit=2, bytes_per_second=1000)
    first, second = of(d.StartMove, b.ask(1, *(series(n, 1) for n in range(1, 4))))
    b.step(d.StoreOffered(1, "main", CT, "1.4.1.1", EXPLICIT))
    b.step(d.BytesArrived(1, 6000))
    b.step(d.InstanceArrived(1, 11_000))  # 11 kB in all, a second's worth of them free
    assert of(d.StartMove, b.step(d.MoveFinished(first.move, 0, 1))) == []
    assert of(d.StartMove, b.sleep(9.0)) == []
    assert len(of(d.StartMove, b.sleep(1.1))) == 1
    assert second.instances == ("1.4.2.1",)


def test_hours_bind_all_but_emergencies() -> None:
    b = Bench(hours=("20:00-06:00",))
    b.step(d.ClockRead(19 * 3600.0))
    (failed,) = of(d.FailInstance, b.ask(1, series(1, 1)))
    assert isinstance(failed.error, RepositoryBusy)
    assert "20:00-06:00" in failed.error.context
    (move,) = of(d.StartMove, b.ask(2, series(2, 1), priority=d.Priority.EMERGENCY))
    b.deliver(move)
    assert of(d.StartMove, b.ask(3, series(3, 1), priority=d.Priority.PREFETCH)) == []
    assert [m.series_instance_uid for m in of(d.StartMove, b.sleep(3601.0))] == ["1.3.3"]


def test_when_the_hours_end_prefetch_waits_for_the_next_and_others_are_told() -> None:
    b = Bench(limit=1, hours=("20:00-06:00",))
    b.step(d.ClockRead(5.9 * 3600))
    (move,) = of(d.StartMove, b.ask(1, series(1, 1), series(2, 1)))
    b.ask(2, series(3, 1), priority=d.Priority.PREFETCH)
    b.arrive("1.4.1.1")
    (failed,) = of(d.FailInstance, b.sleep(361.0))
    assert failed.want.series_instance_uid == "1.3.2"
    assert of(d.StartMove, b.step(d.MoveFinished(move.move, 0, 1))) == []
    assert [m.series_instance_uid for m in of(d.StartMove, b.sleep(14 * 3600.0 + 1))] == ["1.3.3"]


def test_b000_without_a_failed_list_is_waited_off_then_asked_again() -> None:
    b = Bench()
    (move,) = of(d.StartMove, b.ask(1, series(1, 3, proved=True)))
    b.arrive("1.4.1.1")
    assert of(d.StartMove, b.step(d.MoveFinished(move.move, 0xB000, 1))) == []
    assert len(of(d.CompleteInstance, b.arrive("1.4.1.3"))) == 1  # after the last response
    b.sleep(1.0)
    assert [m.instances for m in of(d.StartMove, b.sleep(2.0))] == [("1.4.1.2",)]


def test_the_same_instance_twice_is_held_once() -> None:
    b = Bench()
    b.ask(1, series(1, 1))
    for store in (1, 2):
        b.step(d.StoreOffered(store, "main", CT, "1.4.1.1", EXPLICIT))
    assert len(of(d.CompleteInstance, b.step(d.InstanceArrived(2, 10)))) == 1
    assert b.step(d.InstanceArrived(1, 10)) == []
    assert b.step(d.StoreOffered(3, "main", CT, "1.4.1.1", EXPLICIT, is_spooled=True)) == [d.DropStore(3)]


def test_an_abort_inside_an_object_costs_that_object_only() -> None:
    b = Bench()
    (move,) = of(d.StartMove, b.ask(1, series(1, 2, proved=True)))
    b.step(d.StoreOffered(1, "main", CT, "1.4.1.1", EXPLICIT))
    assert len(of(d.LoseInstance, b.step(d.StoreBroken(1, "A-ABORT")))) == 1
    b.arrive("1.4.1.2")
    b.step(d.MoveFinished(move.move, None, comment="the PACS ended the association"))
    b.sleep(1.0)
    assert [m.instances for m in of(d.StartMove, b.sleep(2.0))] == [("1.4.1.1",)]


def test_a_step_looks_only_at_the_pacs_that_it_touches() -> None:
    def lines(pacs: int) -> int:
        budgets = {f"p{n}": Budget(2) for n in range(pacs)}
        scheduler = Scheduler(budgets, stall_timeout=60.0, randomness=random.Random(1))
        for n in range(pacs):
            scheduler.step(d.Asked(n, (series(n, 5, pacs=f"p{n}"),), (EXPLICIT,), ROOM), 0.0)
        return count_lines(lambda: scheduler.step(d.MoveResponded(1), 1.0))

    assert lines(5) == lines(500)


# --------------------------------------------------------------------------------------------------------------------
# Under random load
# --------------------------------------------------------------------------------------------------------------------

BEHAVIOURS = ("good", "good", "drops", "empty", "aborts", "busy", "away", "silent", "refuses", "late", "foreign_syntax")


@dataclass
class Running:
    decision: d.StartMove
    is_over: bool = False
    is_cancelled: bool = False


class Simulation:
    """PACSs in virtual time that behave at random; checks every decision as it comes."""

    def __init__(self, seed: int, limits: dict[str, int]) -> None:
        self.random = random.Random(seed)
        self.limits = limits
        # One PACS with other ways to make it send, and each level by setting in some of the runs.
        levels: tuple[LevelChoice, ...] = ("auto", "study", "series", "image")
        budgets = {
            name: Budget(limit, WAYS[: 1 + (name == "other")], uid_list_limit=3, level=levels[seed % 4])
            for name, limit in limits.items()
        }
        self.scheduler = Scheduler(budgets, stall_timeout=30.0, randomness=random.Random(seed))
        self.now = 0.0
        self.agenda: list[tuple[float, int, Callable[[], None]]] = []
        self.numbers = itertools.count(1)
        self.ledgers: dict[int, Ledger] = {}
        self.wanted: dict[int, set[str]] = {}  # of requests that were not withdrawn: what has no end yet
        self.running: dict[int, Running] = {}
        self.queries: Counter[str] = Counter()
        self.asked_queries: dict[int, str] = {}
        self.ended: set[str] = set()
        self.wake = 0

    def at(self, delay: float, action: Callable[[], None]) -> None:
        heapq.heappush(self.agenda, (self.now + delay, next(self.numbers), action))

    def step(self, event: d.Event) -> list[d.Decision]:
        out = self.scheduler.step(event, self.now)
        for decision in out:
            self.perform(decision)
        return out

    def perform(self, decision: d.Decision) -> None:
        match decision:
            case d.StartMove(pacs=pacs):
                assert decision.instances
                active = [r.decision for r in self.running.values() if r.decision.pacs == pacs]
                assert len(active) + self.queries[pacs] < self.limits[pacs]
                if decision.method == "c-move":
                    assert {each.accept for each in active if each.method == "c-move"} <= {decision.accept}
                assert decision.method in WAYS[: 1 + (pacs == "other")]
                for uid in decision.instances:  # somebody waits for each
                    assert any(uid in wanted for wanted in self.wanted.values())
                for other in self.running.values():  # one fetch per instance, as long as somebody waits for it
                    if other.decision.pacs == pacs and not other.is_cancelled:
                        assert not set(other.decision.instances) & set(decision.instances) - self.ended
                self.running[decision.move] = Running(decision)
                self.behave(self.running[decision.move])
            case d.CancelMove(move=move):
                self.running[move].is_cancelled = True
                self.at(0.5, lambda: self.finish(move, d.MoveFinished(move, 0xFE00)))
            case d.StartQuery(query=query):
                self.start_query(query, self.asked_queries[query], None)
            case d.CheckSeries(query=query, pacs=pacs, series_instance_uid=uid):
                number = uid.rsplit(".", 1)[1]
                present = {f"1.4.{number}.{n}": CT for n in range(1, 7)}
                self.start_query(query, pacs, self.random.choice([None, present]))
            case d.BeginInstance(request=request, want=want):
                self.ledgers[request].begin(want)
            case d.LoseInstance(request=request, want=want):
                self.ledgers[request].lose(want)
            case d.CompleteInstance(request=request, want=want):
                self.ended.add(want.sop_instance_uid)
                self.end(request, want)
                self.ledgers[request].hold(want, size=1, transfer_syntax_uid=EXPLICIT)
            case d.FailInstance(request=request, want=want, error=error):
                self.ended.add(want.sop_instance_uid)
                self.end(request, want)
                self.ledgers[request].fail(want, error)
            case d.WakeAt(time=time):
                assert time >= self.now
                self.wake += 1
                wake = self.wake
                self.at(time - self.now, lambda: self.step(d.Woke()) and None if wake == self.wake else None)

    def start_query(self, query: int, pacs: str, present: dict[str, str] | None) -> None:
        active = sum(r.decision.pacs == pacs for r in self.running.values())
        assert active + self.queries[pacs] < self.limits[pacs]
        self.queries[pacs] += 1

        def end() -> None:
            self.queries[pacs] -= 1
            self.step(d.QueryFinished(query, pacs, present))

        self.at(self.random.uniform(0.01, 2), end)

    def finish(self, move: int, event: d.MoveFinished) -> None:
        running = self.running.pop(move, None)
        if running is not None:
            running.is_over = True
            self.step(event)

    def behave(self, running: Running) -> None:
        move = running.decision.move
        how = self.random.choice(BEHAVIOURS)
        pacs = running.decision.pacs
        match how:
            case "busy":
                self.at(0.1, lambda: self.finish(move, d.MoveFinished(move, error=PeerBusy(pacs, "2/3/2"))))
                return
            case "away":
                self.at(0.2, lambda: self.finish(move, d.MoveFinished(move, error=ConnectFailed(pacs, "refused"))))
                return
            case "refuses":
                self.at(0.1, lambda: self.finish(move, d.MoveFinished(move, error=PeerRefused(pacs, "0xA801"))))
                return
            case "silent":
                return
            case "empty":
                self.at(0.1, lambda: self.finish(move, d.MoveFinished(move, 0, 0)))
                return
        when = 0.0
        sent = list(running.decision.instances)
        if how in ("drops", "aborts"):
            sent = [uid for uid in sent if self.random.random() < 0.6]
        if how == "late":
            self.at(0.05, lambda: self.finish(move, d.MoveFinished(move, 0, len(sent))))
        for uid in sent:
            when += self.random.uniform(0.0, 0.3)
            syntax = JPEG if how == "foreign_syntax" else EXPLICIT
            self.at(when, lambda uid=uid, syntax=syntax: self.send(running, uid, syntax, is_late=how == "late"))
        status = None if how == "aborts" else 0
        self.at(when + 0.5, lambda: self.finish(move, d.MoveFinished(move, status, len(sent))))

    def send(self, running: Running, uid: str, syntax: str, *, is_late: bool) -> None:
        if running.is_over and not is_late:
            return
        store = next(self.numbers)
        pacs = self.random.choice([running.decision.pacs, running.decision.pacs, None])
        out = self.step(d.StoreOffered(store, pacs, CT, uid, syntax))
        if not of(d.AcceptStore, out):
            return
        broken = self.random.random() < 0.1
        end: d.Event = d.StoreBroken(store, "aborted") if broken else d.InstanceArrived(store, 1000)

        def finish() -> None:
            if not broken:
                self.ended.add(uid)  # whoever asks later asks for another
            self.step(end)

        self.at(self.random.uniform(0.0, 0.4), finish)

    def ask(self, request: int, fetches: tuple[SeriesFetch, ...], accept: tuple[str, ...]) -> None:
        self.ledgers[request] = Ledger(want for fetch in fetches for want in fetch.wants)
        self.wanted[request] = {want.sop_instance_uid for fetch in fetches for want in fetch.wants}
        asker, priority = self.random.choice("ab"), self.random.choice(list(d.Priority))
        self.step(d.Asked(request, fetches, accept, ROOM, asker, priority, self.random.choice([1.0, 3.0])))
        if self.random.random() < 0.3:
            self.at(self.random.uniform(0, 5), lambda: self.throttle(request, True))

    def throttle(self, request: int, is_throttled: bool) -> None:
        self.step(d.Throttled(request, is_throttled))
        if is_throttled:
            self.at(self.random.uniform(0, 5), lambda: self.throttle(request, False))

    def withdraw(self, request: int) -> None:
        self.wanted.pop(request, None)
        self.step(d.Withdrawn(request))

    def end(self, request: int, want: Want) -> None:
        others = [e for e in self.ledgers[request] if e.want.sop_instance_uid == want.sop_instance_uid]
        if request in self.wanted and len(others) == 1:
            self.wanted[request].discard(want.sop_instance_uid)

    def ask_query(self, query: int, pacs: str) -> None:
        self.asked_queries[query] = pacs
        self.step(d.QueryAsked(query, pacs))

    def run(self, until: float) -> None:
        while self.agenda:
            time, _, action = heapq.heappop(self.agenda)
            assert time <= until, "something starves"
            self.now = max(self.now, time)
            action()


@given(
    seed=st.integers(0, 2**32),
    limits=st.fixed_dictionaries({"main": st.integers(1, 4), "other": st.integers(1, 3)}),
    requests=st.lists(
        st.tuples(
            st.floats(0, 20),
            st.lists(
                st.tuples(st.integers(1, 6), st.integers(1, 6), st.booleans(), st.sampled_from(["main", "other"])),
                min_size=1,
                max_size=4,
                unique_by=lambda each: (each[0], each[3]),
            ),
            st.sampled_from([(EXPLICIT,), (JPEG, EXPLICIT), (EXPLICIT,)]),
            st.none() | st.floats(0, 20),
            st.booleans(),
        ),
        max_size=8,
    ),
)
@example(  # an instance that is withdrawn from a move that goes on, and asked for again
    seed=4851,
    limits={"main": 1, "other": 2},
    requests=[
        (0.0, [(1, 1, False, "main"), (1, 4, False, "other"), (4, 2, False, "other")], (EXPLICIT,), 1.0, False),
        (0.0, [(4, 1, False, "other")], (EXPLICIT,), None, False),
        (1.0, [(4, 2, False, "other")], (EXPLICIT,), None, False),
    ],
)
@hypothesis_settings(max_examples=150, deadline=None)
def test_every_want_ends_and_no_limit_is_passed(
    seed: int, limits: dict[str, int], requests: list[tuple[float, list[Any], tuple[str, ...], float | None, bool]]
) -> None:
    run_load(seed, limits, requests)


def run_load(
    seed: int, limits: dict[str, int], requests: list[tuple[float, list[Any], tuple[str, ...], float | None, bool]]
) -> None:
    simulation = Simulation(seed, limits)
    withdrawn = set()
    for request, (start, items, accept, leaves, queries) in enumerate(requests, 1):
        in_study = Counter(pacs for _, count, whole, pacs in items for _ in range(count) if whole and count == 6)
        fetches = tuple(
            series(number, count, pacs=pacs, whole=whole and count == 6, in_study=in_study[pacs])
            for number, count, whole, pacs in items
        )
        if queries:
            simulation.at(start, lambda q=request, pacs=items[0][3]: simulation.ask_query(q, pacs))
        simulation.at(start, lambda r=request, f=fetches, a=accept: simulation.ask(r, f, a))
        if leaves is not None:
            withdrawn.add(request)
            simulation.at(start + leaves, lambda r=request: simulation.withdraw(r))
    simulation.run(until=3600.0)
    assert simulation.scheduler.waiting == 0
    assert simulation.scheduler.active_moves == 0
    assert not simulation.running
    for request, ledger in simulation.ledgers.items():
        assert ledger.complete or request in withdrawn


def test_random_loads() -> None:
    """More of the same as above, larger and by seed: what broke once is among them."""
    for seed in range(500, 700):
        chance = random.Random(seed)
        limits = {"main": chance.randint(1, 4), "other": chance.randint(1, 3)}
        requests = []
        for _ in range(chance.randint(3, 10)):
            items: dict[tuple[int, str], Any] = {}
            for _ in range(chance.randint(1, 4)):
                number, pacs = chance.randint(1, 6), chance.choice(["main", "other"])
                items[number, pacs] = (number, chance.randint(1, 6), chance.random() < 0.5, pacs)
            accept = chance.choice([(EXPLICIT,), (JPEG, EXPLICIT)])
            start, leaves = chance.choice([0.0, chance.uniform(0, 20)]), chance.choice([None, chance.uniform(0, 20)])
            requests.append((start, list(items.values()), accept, leaves, chance.random() < 0.5))
        run_load(seed, limits, requests)


def test_no_step_looks_at_everything_that_waits() -> None:
    """The lines that an arrival runs through are as many whether a thousand instances wait or ten thousand."""

    def lines_of_an_arrival(waiting_series: int) -> int:
        b = Bench(limit=4)
        b.ask(1, *(series(n, 100) for n in range(1, waiting_series + 1)))
        return count_lines(lambda: b.arrive("1.4.1.1"))

    assert lines_of_an_arrival(100) == lines_of_an_arrival(10)


def test_who_asks_again_joins_the_move_that_goes_on() -> None:
    b = Bench()
    (move,) = of(d.StartMove, b.ask(1, series(1, 2)))
    b.ask(2, series(1, 1))
    assert b.step(d.Withdrawn(1)) == []  # request 2 still waits for one of the two
    assert of(d.StartMove, b.ask(3, series(1, 2))) == []
    assert [each.request for each in of(d.CompleteInstance, b.arrive("1.4.1.2"))] == [3]
    assert {each.request for each in of(d.CompleteInstance, b.arrive("1.4.1.1"))} == {2, 3}
    b.step(d.MoveFinished(move.move, 0, 2))
    assert b.scheduler.waiting == 0


def test_what_was_withdrawn_and_comes_all_the_same_is_refused() -> None:
    b = Bench()
    (move,) = of(d.StartMove, b.ask(1, series(1, 2)))
    b.ask(2, series(1, 1))
    b.step(d.Withdrawn(1))
    assert of(d.RefuseStore, b.arrive("1.4.1.2"))
    b.arrive("1.4.1.1")
    b.step(d.MoveFinished(move.move, 0xB000, 1))
    assert b.scheduler.waiting == 0


@pytest.mark.parametrize("event", [d.InstanceArrived(1, 1000), d.StoreBroken(1, "")])
def test_unknown_numbers_are_defects(event: d.Event) -> None:
    with pytest.raises(KeyError):
        Bench().step(event)
