"""Plans: what is refused, what is moved whole, and what C-FIND has to prove."""

from __future__ import annotations

import pytest

from xca_imaging.imaging.ledger import Want
from xca_imaging.imaging.plan import FetchPlan, StudyIndex, build, unclear_series
from xca_imaging.uids import is_uid

ACCEPT = ("1.2.840.10008.1.2.1",)
ROUTES = {"1.2.9": "main", "1.2.8": "other"}
CT = "1.2.840.10008.5.1.4.1.1.2"


def want(n: int, *, series: str = "1.3", study: str = "1.2", repository: str = "1.2.9") -> Want:
    return Want(study, series, f"1.4.{n}", repository)


def plan(*wants: Want, accept: tuple[str, ...] = ACCEPT, facts: StudyIndex | None = None) -> FetchPlan:
    return build(wants, accept=accept, routes=ROUTES, facts={("main", "1.2"): facts} if facts else None)


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        (Want("", "1.3", "1.4", "1.2.9"), "XDSRepositoryError"),
        (Want("1.2", "", "1.4", "1.2.9"), "XDSRepositoryError"),
        (Want("1.2", "1.3", "", "1.2.9"), "XDSRepositoryError"),
        (Want("1.2", "1.3", "*", "1.2.9"), "XDSDocumentUniqueIdError"),
        (Want("1.2", "1.3", "1.4\\1.5", "1.2.9"), "XDSDocumentUniqueIdError"),
        (Want("1.2", "1.3?", "1.4", "1.2.9"), "XDSDocumentUniqueIdError"),
        (Want("1." * 32 + "12", "1.3", "1.4", "1.2.9"), "XDSDocumentUniqueIdError"),
        (Want("1.2", "1.3", "1.4\n", "1.2.9"), "XDSDocumentUniqueIdError"),
        (Want("1.2", "1.3", "1.4", "1.2.7"), "XDSUnknownRepositoryId"),
        (Want("1.2", "1.3", "1.4", ""), "XDSUnknownRepositoryId"),
    ],
)
def test_refused_without_touching_the_others(wrong: Want, code: str) -> None:
    result = plan(want(1), wrong)
    assert [(refused, error.code, error.location) for refused, error in result.refused] == [
        (wrong, code, wrong.sop_instance_uid)
    ]
    assert [fetch.wants for fetch in result.fetches] == [(want(1),)]


@pytest.mark.parametrize("accept", [(), ("",), ("1.2.840.10008.1.2.1", "JPEG"), ("1.2*",)])
def test_unusable_transfer_syntax_list_refuses_each(accept: tuple[str, ...]) -> None:
    result = plan(want(1), want(2), accept=accept)
    assert result.fetches == ()
    assert [error.code for _, error in result.refused] == ["XDSRepositoryError"] * 2
    assert all("TransferSyntaxUIDList" in error.context for _, error in result.refused)


def test_listed_twice_is_one_want() -> None:
    (fetch,) = plan(want(1), want(2), want(1)).fetches
    assert fetch.wants == (want(1), want(2))


def test_grouped_by_pacs_study_and_series() -> None:
    wants = [want(1), want(2, series="1.5"), want(3, repository="1.2.8"), want(4)]
    fetches = plan(*wants).fetches
    assert [(f.pacs, f.series_instance_uid, f.instances) for f in fetches] == [
        ("main", "1.3", ("1.4.1", "1.4.4")),
        ("main", "1.5", ("1.4.2",)),
        ("other", "1.3", ("1.4.3",)),
    ]


def test_without_facts_objects_are_looked_into() -> None:
    (fetch,) = plan(want(1)).fetches
    assert fetch.verify
    assert not fetch.whole
    assert unclear_series(plan(want(1)), {}) == []


def test_whole_series_when_the_count_fits() -> None:
    facts = StudyIndex({"1.3": 2})
    whole = plan(want(1), want(2), facts=facts)
    assert whole.fetches[0].whole
    assert not whole.fetches[0].verify
    assert unclear_series(whole, {("main", "1.2"): facts}) == []
    assert not whole.fetches[0].only([want(1)]).whole


@pytest.mark.parametrize("count", [None, 3])
def test_part_or_unknown_size_is_unclear_until_asked_by_instance(count: int | None) -> None:
    facts = StudyIndex({"1.3": count})
    part = plan(want(1), want(2), facts=facts)
    assert not part.fetches[0].whole
    assert part.fetches[0].verify
    assert unclear_series(part, {("main", "1.2"): facts}) == [("main", "1.2", "1.3")]
    facts = StudyIndex({"1.3": count}, {"1.3": {"1.4.1": CT, "1.4.5": CT, "1.4.6": CT}})
    part = plan(want(1), want(2), facts=facts)
    assert part.fetches[0].wants == (want(1),)
    assert part.fetches[0].sop_classes == {"1.4.1": CT}
    assert not part.fetches[0].verify
    assert [(w, e.code) for w, e in part.refused] == [(want(2), "XDSDocumentUniqueIdError")]


def test_series_without_a_count_is_whole_when_its_list_is_wanted() -> None:
    facts = StudyIndex({"1.3": None}, {"1.3": {"1.4.1": CT, "1.4.2": CT}})
    (fetch,) = plan(want(1), want(2), facts=facts).fetches
    assert fetch.whole


def test_size_of_the_study_where_each_series_has_one() -> None:
    facts = StudyIndex({"1.3": 2, "1.7": 40})
    assert [fetch.study_count for fetch in plan(want(1), want(2), facts=facts).fetches] == [42]
    assert [fetch.study_count for fetch in plan(want(1), facts=StudyIndex({"1.3": 2, "1.7": None})).fetches] == [None]
    assert [fetch.study_count for fetch in plan(want(1)).fetches] == [None]


def test_absent_study_series_and_instance() -> None:
    result = plan(want(1), facts=StudyIndex({"1.7": 3}))
    assert result.fetches == ()
    assert result.refused[0][1].code == "XDSDocumentUniqueIdError"
    result = plan(want(1), facts=StudyIndex({}))
    assert result.refused[0][1].code == "XDSDocumentUniqueIdError"
    result = plan(want(1), facts=StudyIndex({"1.3": 1}, {"1.3": {"1.4.9": CT}}))
    assert result.fetches == ()
    assert [error.code for _, error in result.refused] == ["XDSDocumentUniqueIdError"]


def test_list_shorter_than_the_series_proves_no_absence() -> None:
    """A PACS that repeats one match in place of others."""
    (fetch,) = plan(want(1), want(2), facts=StudyIndex({"1.3": 4}, {"1.3": {"1.4.1": CT}})).fetches
    assert fetch.wants == (want(1), want(2))
    assert fetch.verify


def test_uid_syntax() -> None:
    assert is_uid("1.2.840.10008.1.2.1")
    assert is_uid("1.02.3")  # against PS3.5 9.1, and in archives
    for wrong in ("", "1.", ".1", "1..2", "1.2 ", "1.2\0", "a", "1" * 65, "\u0661.2"):
        assert not is_uid(wrong)
