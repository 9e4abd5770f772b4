"""What happened to registered objects, documents and patients: one row for each, written with the change itself.

The row is written in the transaction that makes the change, so there is no change without its event and no event of a
change that was rolled back. What was refused is written in a transaction of its own.

References
----------
* IHE ITI TF-2, 3.20 and the sections "Security Audit Considerations" of the transactions: what an audit message holds
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, insert, select

from xca_imaging.registry.tables import EventRow, dtm


@dataclass(frozen=True, slots=True)
class Requester:
    """Who asked: the name under which the gateway knows the caller, and the id of the message."""

    caller: str
    message_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One event.

    Attributes
    ----------
    time : str
        DTM in UTC.
    transaction, action : str
        `ITI-57`, `update`.
    patient_id : str
        CX; empty where the event concerns no patient, or one that is not known.
    caller, message_id : str
        Of the `Requester`.
    outcome : str
        `success`, or `refused`.
    objects : tuple of str
        entryUUIDs of metadata, uniqueIds of documents, patient ids: what the transaction names.
    facts : dict
        What else the transaction has to say; text values only.
    """

    time: str
    transaction: str
    action: str
    patient_id: str = ""
    caller: str = ""
    message_id: str = ""
    outcome: str = "success"
    objects: tuple[str, ...] = ()
    facts: dict[str, str]


def record(
    connection: Connection,
    *,
    now: datetime,
    transaction: str,
    action: str,
    requester: Requester,
    patient_id: str = "",
    objects: Sequence[str] = (),
    outcome: str = "success",
    **facts: str,
) -> None:
    """Write one event; see `Event` for the parameters."""
    content: dict[str, Any] = {
        "caller": requester.caller,
        "message_id": requester.message_id,
        "outcome": outcome,
        "objects": list(objects),
        **facts,
    }
    connection.execute(
        insert(EventRow),
        {
            "time": dtm(now),
            "transaction": transaction,
            "action": action,
            "patient_id": patient_id or None,
            "facts": json.dumps(content, ensure_ascii=False),
        },
    )


def read(connection: Connection, *, after: int = 0, limit: int = 1000) -> list[tuple[int, Event]]:
    """Return events with their numbers in the order in which they happened, those after a number."""
    statement = select(EventRow.__table__).where(EventRow.id > after).order_by(EventRow.id).limit(limit)
    return [(row.id, _event(row)) for row in connection.execute(statement)]


def _event(row: Any) -> Event:
    facts = json.loads(row.facts)
    return Event(
        time=row.time,
        transaction=row.transaction,
        action=row.action,
        patient_id=row.patient_id or "",
        caller=facts.pop("caller", ""),
        message_id=facts.pop("message_id", ""),
        outcome=facts.pop("outcome", ""),
        objects=tuple(facts.pop("objects", ())),
        facts=facts,
    )
