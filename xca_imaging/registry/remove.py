"""ITI-62: objects removed from the registry in one database transaction, as if they had never been registered.

What stays must be whole: no association that stays may name what goes, and nothing that stays may be left without any
association, where nobody would find it.

References
----------
* IHE ITI Remove Metadata and Documents, 3.62.4.1.3 (expected actions), 3.62.4.2 (error codes)
* OASIS ebRS 3.0, 5.9 (RemoveObjects)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from sqlalchemy import Connection, delete, select

from xca_imaging import errors
from xca_imaging.errors import RegistryError, SubmissionRefused
from xca_imaging.registry import tables
from xca_imaging.registry.database import chunks
from xca_imaging.registry.tables import (
    AssociationRow,
    ConfidentialityCodeRow,
    DocumentAuthorRow,
    DocumentEntryRow,
    EventCodeRow,
    FolderCodeRow,
    FolderRow,
    ObjectRow,
    ReferenceIdRow,
    SubmissionSetAuthorRow,
    SubmissionSetRow,
)

# In the order in which rows can go: what names others first.
_TABLES: Sequence[tuple[type[tables.Base], Any]] = (
    (EventCodeRow, EventCodeRow.document_id),
    (ConfidentialityCodeRow, ConfidentialityCodeRow.document_id),
    (DocumentAuthorRow, DocumentAuthorRow.document_id),
    (ReferenceIdRow, ReferenceIdRow.document_id),
    (SubmissionSetAuthorRow, SubmissionSetAuthorRow.submission_set_id),
    (FolderCodeRow, FolderCodeRow.folder_id),
    (AssociationRow, AssociationRow.id),
    (DocumentEntryRow, DocumentEntryRow.id),
    (SubmissionSetRow, SubmissionSetRow.id),
    (FolderRow, FolderRow.id),
    (ObjectRow, ObjectRow.id),
)


@dataclass(frozen=True, slots=True)
class Removed:
    """One object that is gone."""

    entry_uuid: str
    kind: str
    unique_id: str
    patient_id: str


def apply(connection: Connection, entry_uuids: Sequence[str], *, max_errors: int = 100) -> list[Removed]:
    """Remove objects for good.

    Parameters
    ----------
    max_errors : int
        More are not looked for: nobody reads them, and a small message must not make a large answer.

    Raises
    ------
    SubmissionRefused
        With everything that forbids it. Nothing has been removed.
    """
    found: dict[str, Any] = {}
    columns = (ObjectRow.id, ObjectRow.entry_uuid, ObjectRow.kind, ObjectRow.unique_id, ObjectRow.patient_id)
    for chunk in chunks(entry_uuids):
        for row in connection.execute(select(*columns).where(ObjectRow.entry_uuid.in_(chunk))):
            found[row.entry_uuid] = row
    missing = [each for each in entry_uuids if each not in found]
    if missing:
        raise SubmissionRefused(
            errors.UnresolvedReference(f"there is no object {each[:100]}") for each in missing[:max_errors]
        )
    problems = list(islice(_check(connection, {row.id: row for row in found.values()}), max_errors))
    if problems:
        raise SubmissionRefused(problems)
    for chunk in chunks([row.id for row in found.values()]):
        for table, column in _TABLES[:-1]:
            connection.execute(delete(table).where(column.in_(chunk)))
    for chunk in chunks([row.id for row in found.values()]):  # when no association names any of them
        connection.execute(delete(ObjectRow).where(ObjectRow.id.in_(chunk)))
    return [Removed(row.entry_uuid, row.kind, row.unique_id or "", row.patient_id) for row in found.values()]


def _check(connection: Connection, going: Mapping[int, Any]) -> Iterator[RegistryError]:
    lost: Counter[int] = Counter()  # associations that an object that stays loses
    for chunk in chunks(sorted(going)):
        named = select(AssociationRow.id, AssociationRow.source_id, AssociationRow.target_id)
        for end in (AssociationRow.source_id, AssociationRow.target_id):
            for row in connection.execute(named.where(end.in_(chunk)).order_by(AssociationRow.id)):
                if row.id not in going:
                    gone = going[row.source_id if end is AssociationRow.source_id else row.target_id]
                    association = connection.scalar(select(ObjectRow.entry_uuid).where(ObjectRow.id == row.id))
                    yield errors.ReferencesExist(f"{gone.kind} {gone.entry_uuid} is named by Association {association}")
        for row in connection.execute(named.where(AssociationRow.id.in_(chunk))):
            lost.update(end for end in {row.source_id, row.target_id} if end not in going)
    for number, losses in sorted(lost.items()):
        if _references(connection, number) == losses:
            left = connection.execute(select(ObjectRow.kind, ObjectRow.entry_uuid).where(ObjectRow.id == number)).one()
            yield errors.UnreferencedObject(f"{left.kind} {left.entry_uuid} would be left without any association")


def _references(connection: Connection, number: int) -> int:
    """Return how many associations name an object."""
    ends = (
        select(AssociationRow.id)
        .where(AssociationRow.source_id == number)
        .union(select(AssociationRow.id).where(AssociationRow.target_id == number))
    )
    return len(connection.execute(ends).all())
