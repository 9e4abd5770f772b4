from __future__ import annotations

from xca_imaging.errors import RepositoryError
from xca_imaging.imaging.breaker import Breaker

AWAY = RepositoryError("connection refused")


def opened(now: float = 10.0) -> Breaker:
    breaker = Breaker(threshold=3, pause=15.0, max_pause=60.0)
    for n in range(3):
        breaker.fail(now - 3 + n, now - 2 + n, AWAY)
    assert not breaker.is_closed
    return breaker


def test_failures_in_a_row_open_it() -> None:
    breaker = Breaker(threshold=3)
    assert not breaker.fail(0.0, 1.0, AWAY)
    breaker.succeed()
    assert [breaker.fail(n, n + 1.0, AWAY) for n in (1.0, 2.0, 3.0)] == [False, False, True]
    assert not breaker.admits(4.0)


def test_what_failed_together_counts_once() -> None:
    breaker = Breaker(threshold=2)
    assert not any(breaker.fail(0.0, 1.0, AWAY) for _ in range(20))
    assert breaker.fail(1.0, 2.0, AWAY)


def test_a_study_that_the_pacs_cannot_send_is_not_its_outage() -> None:
    breaker = Breaker(threshold=3)
    assert not any(breaker.fail(n, n + 1.0, AWAY, subject="1.2.3") for n in range(20))
    assert not breaker.fail(30.0, 31.0, AWAY, subject="1.2.4")
    assert breaker.fail(32.0, 33.0, AWAY, subject="1.2.5")


def test_one_probe_closes_it_or_opens_it_for_longer() -> None:
    breaker = opened(10.0)
    assert not breaker.admits(24.9)
    assert breaker.admits(25.1)
    breaker.start(7)
    assert not breaker.admits(25.2)  # one at a time
    assert breaker.fail(25.1, 26.0, AWAY)
    assert not breaker.admits(26.0 + 29.0)
    assert breaker.admits(26.0 + 31.0)
    breaker.start(8)
    breaker.end(8)  # withdrawn: no verdict
    assert breaker.admits(58.0)
    breaker.start(9)
    breaker.succeed()
    assert breaker.is_closed
    assert breaker.admits(58.0)


def test_pauses_are_bounded() -> None:
    breaker, now = opened(10.0), 10.0
    for n in range(10):
        now += 1000.0
        breaker.start(n)
        breaker.fail(now, now, AWAY)
    assert breaker.admits(now + 60.1)


def test_it_says_since_when_and_why() -> None:
    text = opened(10.0).explain(14.0)
    assert text == "not asked since 4 s ago, next try in 11 s: connection refused"
    assert Breaker().explain(0.0) == ""
