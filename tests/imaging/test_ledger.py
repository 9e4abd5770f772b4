"""The ledger: every cell of its table, and what it says in the end."""

from __future__ import annotations

import itertools

import pytest

from xca_imaging import uids
from xca_imaging.errors import DocumentUniqueIdError, LocalProtocolError
from xca_imaging.imaging.ledger import TRANSITIONS, Event, Ledger, State, Want


def want(n: int, series: str = "1.2.3") -> Want:
    return Want("1.2", series, f"1.2.3.{n}", "1.2.9")


ERROR = DocumentUniqueIdError("not there")


def apply(ledger: Ledger, event: Event, one: Want) -> None:
    match event:
        case Event.BEGIN:
            ledger.begin(one)
        case Event.LOSE:
            ledger.lose(one)
        case Event.HOLD:
            ledger.hold(one, size=10, transfer_syntax_uid=uids.EXPLICIT_VR_LITTLE_ENDIAN, attempts=1)
        case Event.FAIL:
            ledger.fail(one, ERROR, attempts=3)


PATH_TO = {State.MISSING: (), State.ARRIVING: (Event.BEGIN,), State.HELD: (Event.HOLD,), State.FAILED: (Event.FAIL,)}


@pytest.mark.parametrize(("state", "event"), list(itertools.product(State, Event)))
def test_every_cell(state: State, event: Event) -> None:
    ledger = Ledger([want(1)])
    for step in PATH_TO[state]:
        apply(ledger, step, want(1))
    assert ledger[want(1)].state is state
    if (state, event) in TRANSITIONS:
        apply(ledger, event, want(1))
        assert ledger[want(1)].state is TRANSITIONS[state, event]
        assert ledger.complete == (ledger[want(1)].state in (State.HELD, State.FAILED))
    else:
        with pytest.raises(LocalProtocolError, match=r"1\.2\.3\.1 is"):
            apply(ledger, event, want(1))
        assert ledger[want(1)].state is state


def test_unknown_want_is_a_defect() -> None:
    with pytest.raises(LocalProtocolError, match="not in this ledger"):
        Ledger([want(1)]).begin(want(2))


def test_listed_twice_is_one_line_but_another_series_is_another() -> None:
    ledger = Ledger([want(1), want(1), want(1, series="1.2.4")])
    assert len(ledger) == 2


def test_outcome_in_the_order_of_the_request() -> None:
    ledger = Ledger([want(3), want(1), want(2)])
    assert ledger.outcome().missing == (want(3), want(1), want(2))
    assert ledger.outcome().status == uids.STATUS_FAILURE
    apply(ledger, Event.HOLD, want(2))
    assert ledger.outcome().status == uids.STATUS_PARTIAL_SUCCESS
    apply(ledger, Event.BEGIN, want(1))
    assert not ledger.complete
    apply(ledger, Event.HOLD, want(1))
    apply(ledger, Event.FAIL, want(3))
    outcome = ledger.outcome()
    assert ledger.complete
    assert outcome.held == (want(1), want(2))
    assert outcome.failed == ((want(3), ERROR),)
    assert outcome.missing == ()
    assert outcome.status == uids.STATUS_PARTIAL_SUCCESS
    assert [entry.attempts for entry in ledger] == [3, 1, 1]


def test_success_only_when_everything_is_held() -> None:
    ledger = Ledger([want(1)])
    apply(ledger, Event.HOLD, want(1))
    assert ledger.outcome().status == uids.STATUS_SUCCESS
    ledger = Ledger([want(1)])
    apply(ledger, Event.FAIL, want(1))
    assert ledger.outcome().status == uids.STATUS_FAILURE


def test_summary_counts_what_the_entries_say() -> None:
    ledger = Ledger([want(n) for n in range(1, 7)])
    ledger.hold(want(1), size=10, transfer_syntax_uid=uids.EXPLICIT_VR_LITTLE_ENDIAN, sha256="ab")
    ledger.hold(want(2), size=20, transfer_syntax_uid="1.2", attempts=1, pacs="main", method="c-move")
    ledger.hold(want(3), size=30, transfer_syntax_uid="1.2", attempts=2, method="c-get", bytes_changed=True)
    ledger.fail(want(4), ERROR)
    ledger.begin(want(5))
    summary = ledger.summary()
    assert (summary.wanted, summary.held, summary.failed, summary.open) == (6, 3, 1, 2)
    assert (summary.cached, summary.retried, summary.changed, summary.size) == (1, 1, 1, 60)
    assert summary.methods == {"c-move": 1, "c-get": 1}
    assert summary.errors == {"XDSDocumentUniqueIdError": 1}
    assert summary.status == ledger.outcome().status == uids.STATUS_PARTIAL_SUCCESS


def test_a_digest_belongs_to_what_is_held() -> None:
    ledger = Ledger([want(1)])
    with pytest.raises(LocalProtocolError, match="missing"):
        ledger.digest(want(1), "ab")
    apply(ledger, Event.HOLD, want(1))
    ledger.digest(want(1), "ab")
    assert ledger[want(1)].sha256 == "ab"
