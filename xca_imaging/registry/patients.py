"""Patients as identity feeds tell them (ITI-8, ITI-44), and what a merge does to registered objects.

An id that has been merged is never used again: its objects are those of the survivor, submissions for it are refused,
and a later feed cannot bring it back. Merges may follow each other (A into B, B into C): every id that was given up
points straight at the one that is left, so a chain needs no walk.

References
----------
* IHE ITI TF-2, 3.8.4.1.3, 3.8.4.2.3 (expected actions of a Document Registry), 3.44.4.1.3, 3.44.4.2.3
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sqlalchemy import Connection, insert, select, update

from xca_imaging.registry import rules, submit
from xca_imaging.registry.database import chunks
from xca_imaging.registry.rules import Policy
from xca_imaging.registry.tables import Kind, ObjectRow, PatientRow, PatientStatus
from xca_imaging.transactions.identity_feed import Added, Feed, FeedRefused, Merged


@dataclass(frozen=True, slots=True)
class Change:
    """What a feed did to one patient id. `survivor` is the other id of a merge, `objects` how many were re-linked."""

    patient_id: str
    action: str
    survivor: str = ""
    objects: int = 0


def apply(connection: Connection, feed: Feed, policy: Policy) -> list[Change]:
    """Apply what a feed says; nothing has been written when it is refused.

    Raises
    ------
    FeedRefused
        No identifier is of a domain that this registry takes, an id that was given up is added again, or a merge
        cannot be.
    """
    patient_ids = _of_our_domains(feed.patient_ids, policy)
    if isinstance(feed, Merged):
        merges = _plan(connection, patient_ids, _of_our_domains(feed.subsumed, policy))
        add(connection, [survivor for _, survivor in merges])
        return [_merge(connection, subsumed, survivor) for subsumed, survivor in merges]
    known = _load(connection, patient_ids)
    if isinstance(feed, Added):
        for patient_id in patient_ids:
            if survivor := known.get(patient_id):
                raise FeedRefused(f"patient id {patient_id} has been merged into {survivor}")
    add(connection, patient_ids)
    return [Change(patient_id, "add" if isinstance(feed, Added) else "revise") for patient_id in patient_ids]


def add(connection: Connection, patient_ids: Iterable[str]) -> None:
    """Make patients known; those that are known stay as they are."""
    wanted = list(dict.fromkeys(patient_ids))
    known = _load(connection, wanted)
    new = [
        {"patient_id": each, "status": PatientStatus.ACTIVE, "merged_into": None}
        for each in wanted
        if each not in known
    ]
    if new:
        connection.execute(insert(PatientRow), new)


def current(connection: Connection, patient_id: str) -> str:
    """Return the id that stands for a patient now: the surviving one where it was merged, else itself."""
    return _load(connection, [patient_id]).get(patient_id) or patient_id


def _of_our_domains(patient_ids: Iterable[str], policy: Policy) -> list[str]:
    accepted = policy.assigning_authorities
    found = [each for each in patient_ids if not accepted or rules.assigning_authority(each) in accepted]
    if not found:
        raise FeedRefused("no patient identifier is of an assigning authority that this registry takes")
    return found


def _load(connection: Connection, patient_ids: Iterable[str]) -> dict[str, str]:
    """Return the known ids among some, each with the id that it was merged into, empty for one in use."""
    rows = connection.execute(
        select(PatientRow.patient_id, PatientRow.merged_into).where(PatientRow.patient_id.in_(list(patient_ids)))
    )
    return {row.patient_id: row.merged_into or "" for row in rows}


def _plan(connection: Connection, surviving: list[str], subsumed: list[str]) -> list[tuple[str, str]]:
    """Return which id goes into which; one that has gone there before goes again, and nothing comes of it."""
    known = _load(connection, [*surviving, *subsumed])
    by_domain = {rules.assigning_authority(each): each for each in reversed(surviving)}
    merges: list[tuple[str, str]] = []
    for each in subsumed:
        named = by_domain.get(rules.assigning_authority(each), "")
        if not named:
            raise FeedRefused(f"no surviving patient id is of the assigning authority of {each}")
        survivor = known.get(named) or named
        if each in (named, survivor):
            raise FeedRefused(f"patient id {each} cannot be merged into itself")
        gone_to = known.get(each, "")
        if gone_to and gone_to != survivor:
            raise FeedRefused(f"patient id {each} has been merged into {gone_to} already")
        merges.append((each, survivor))
    return merges


def _merge(connection: Connection, subsumed: str, survivor: str) -> Change:
    add(connection, [subsumed])
    connection.execute(
        update(PatientRow)
        # Those that were merged into the subsumed id before, so that every id points at the one that is left.
        .where((PatientRow.patient_id == subsumed) | (PatientRow.merged_into == subsumed))
        .values(status=PatientStatus.MERGED, merged_into=survivor)
    )
    # Associations have the id of their submission in the row only.
    with_id = connection.scalars(
        select(ObjectRow.id).where(ObjectRow.patient_id == subsumed, ObjectRow.kind != Kind.ASSOCIATION)
    ).all()
    for chunk in chunks(with_id):
        submit.rewrite(connection, set(chunk), {}, patient_id=survivor)
    connection.execute(update(ObjectRow).where(ObjectRow.patient_id == subsumed).values(patient_id=survivor))
    return Change(subsumed, "merge", survivor, len(with_id))
