"""Typed stored queries to SQL, and rows to answers.

A query selects narrow rows first; the XML of LeafClass answers is read in the same statement, whole, and never
parsed. Conditions on lists are written as subqueries by DocumentEntry, so that each starts from the patient's entries
(or from a reference id, when that is rarer) and not from a table as a whole.

References
----------
* IHE ITI TF-2, 3.18.4.1.2.3.3 (times), .5 (AND and OR, LIKE), .7 (the queries); Appendix F (string comparison)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Connection, Row, Select, or_, select

from xca_imaging import errors, uids
from xca_imaging.metadata.model import Code, ObjectRef
from xca_imaging.metadata.stored_query import FindDocuments, GetAll, GetDocuments, StoredQuery
from xca_imaging.registry.database import chunks
from xca_imaging.registry.tables import (
    STATUS_OF_URN,
    AssociationRow,
    ConfidentialityCodeRow,
    DocumentAuthorRow,
    DocumentEntryRow,
    EventCodeRow,
    Kind,
    ObjectRow,
    ReferenceIdRow,
    code_key,
    time_key,
)

MAX_VALUES = 5000
"""Most values in one FindDocuments or GetAll: SQLite takes 32766 parameters in a statement; real queries have few."""

MAX_CONDITIONS = 20
"""Most slots of AND parameters in a query: each is a subquery, and PostgreSQL plans 20 in 0.2 s, but 100 in 20 s."""

MAX_PATTERNS = 100
"""Most LIKE patterns in a query: each is compared with every author of the patient's documents."""

# LIKE needs an escape character to be named, or PostgreSQL takes the backslash, which HL7 v2 escapes consist of.
# U+0001 cannot occur in XML, hence in no pattern.
_NO_ESCAPE = "\x01"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Found:
    """The objects that a query selects, as it asked for them: their XML (LeafClass) or references (ObjectRef)."""

    fragments: tuple[bytes, ...] = ()
    """ebRIM elements in UTF-8, each with its own namespace declarations."""
    refs: tuple[ObjectRef, ...] = ()


def search(connection: Connection, request: StoredQuery, *, home_community_id: str, max_results: int) -> Found:
    """Return what a stored query finds.

    Parameters
    ----------
    max_results : int
        Most objects of a LeafClass answer, 0 for no limit. References are not limited.

    Raises
    ------
    errors.TooManyResults
        More LeafClass objects than that: none is returned, the caller narrows the query or asks for references.
    errors.ResultNotSinglePatient
        A LeafClass answer by ids would mix patients.
    errors.StoredQueryParamNumber
        More of something than the limits of this module.
    """
    leaves = request.return_type == "LeafClass"
    limit = max_results if leaves else 0
    match request.query:
        case FindDocuments() as find:
            rows = _limited(connection, find_documents(find, leaves=leaves), limit)
        case GetDocuments() as get:
            rows = _get_documents(connection, get, leaves=leaves, limit=limit)
        case GetAll() as get_all:
            rows = _get_all(connection, get_all, leaves=leaves, limit=limit)
    if leaves:
        return Found(fragments=tuple(row.xml for row in rows))
    return Found(refs=tuple(ObjectRef(row.entry_uuid, home_community_id) for row in rows))


def find_documents(query: FindDocuments, *, leaves: bool) -> Select[*tuple[Any, ...]]:
    """Return the statement of FindDocuments and FindDocumentsByReferenceId."""
    _check_size(
        repeatable=(*query.event_codes, *query.confidentiality_codes, *query.reference_ids),
        single=(
            query.class_codes,
            query.type_codes,
            query.practice_setting_codes,
            query.healthcare_facility_type_codes,
            query.format_codes,
        ),
    )
    entry = DocumentEntryRow
    statement = _documents(query.patient_id, query.status, query.types, leaves=leaves)
    for column, codes in (
        (entry.class_code, query.class_codes),
        (entry.type_code, query.type_codes),
        (entry.practice_setting_code, query.practice_setting_codes),
        (entry.healthcare_facility_type_code, query.healthcare_facility_type_codes),
        (entry.format_code, query.format_codes),
    ):
        if codes:
            statement = statement.where(column.in_(_keys(codes)))
    statement = _with_codes(statement, EventCodeRow, query.event_codes)
    statement = _with_codes(statement, ConfidentialityCodeRow, query.confidentiality_codes)
    for reference_ids in query.reference_ids:
        referring = select(ReferenceIdRow.document_id).where(ReferenceIdRow.reference_id.in_(reference_ids))
        statement = statement.where(ObjectRow.id.in_(referring))
    if query.author_persons:
        _check_patterns(query.author_persons)
        patterns = (DocumentAuthorRow.person.like(pattern, escape=_NO_ESCAPE) for pattern in query.author_persons)
        author = select(DocumentAuthorRow.document_id).where(
            DocumentAuthorRow.document_id == ObjectRow.id, or_(*patterns)
        )
        statement = statement.where(author.exists())
    # An on-demand entry has no creationTime, so the range does not apply to it (3.18.4.1.2.3.7.1, note 6).
    for condition in _range(entry.creation_time, query.creation_time_from, query.creation_time_to):
        statement = statement.where(or_(entry.on_demand, condition))
    # An entry without service times is not left out by a range of them (3.18.4.1.2.3.3.1).
    for condition in _range(entry.service_start_time, query.service_start_time_from, query.service_start_time_to):
        statement = statement.where(or_(entry.service_start_time.is_(None), condition))
    for condition in _range(entry.service_stop_time, query.service_stop_time_from, query.service_stop_time_to):
        statement = statement.where(or_(entry.service_stop_time.is_(None), condition))
    return statement


def _get_documents(
    connection: Connection, query: GetDocuments, *, leaves: bool, limit: int
) -> list[Row[*tuple[Any, ...]]]:
    column, values = (
        (ObjectRow.entry_uuid, query.entry_uuids) if query.entry_uuids else (ObjectRow.unique_id, query.unique_ids)
    )
    rows: list[Row[*tuple[Any, ...]]] = []
    for chunk in chunks(sorted(set(values))):
        statement = _objects(leaves=leaves).where(column.in_(chunk), ObjectRow.kind == Kind.DOCUMENT_ENTRY)
        rows += _limited(connection, statement, limit)
        _check_limit(len(rows), limit)
        if leaves and len({row.patient_id for row in rows}) > 1:
            raise errors.ResultNotSinglePatient("the documents asked for belong to more than one patient")
    return sorted(rows, key=lambda row: int(row.id))


def _get_all(connection: Connection, query: GetAll, *, leaves: bool, limit: int) -> list[Row[*tuple[Any, ...]]]:
    """Return a patient's objects, and every association that begins or ends at one of them (3.18.4.1.2.3.7.4)."""
    _check_size(repeatable=query.confidentiality_codes, single=(query.format_codes,))
    documents = _documents(query.patient_id, query.document_status, query.types, leaves=leaves)
    if query.format_codes:
        documents = documents.where(DocumentEntryRow.format_code.in_(_keys(query.format_codes)))
    documents = _with_codes(documents, ConfidentialityCodeRow, query.confidentiality_codes)
    rows: list[Row[*tuple[Any, ...]]] = []
    for statement in (
        _of_patient(query.patient_id, Kind.SUBMISSION_SET, query.submission_set_status, leaves=leaves),
        documents,
        _of_patient(query.patient_id, Kind.FOLDER, query.folder_status, leaves=leaves),
    ):
        rows += _limited(connection, statement, limit)
        _check_limit(len(rows), limit)
    associations: dict[int, Row[*tuple[Any, ...]]] = {}
    for chunk in chunks([row.id for row in rows]):
        # Two statements, because an OR over two columns lets SQLite use neither index.
        for end in (AssociationRow.source_id, AssociationRow.target_id):
            statement = _objects(leaves=leaves).join(AssociationRow, AssociationRow.id == ObjectRow.id)
            for row in _limited(connection, statement.where(end.in_(chunk)), limit):
                associations[row.id] = row
            _check_limit(len(rows) + len(associations), limit)
    return rows + [associations[number] for number in sorted(associations)]


# --- Parts of statements ----------------------------------------------------------------------------------------------


def _objects(*, leaves: bool) -> Select[*tuple[Any, ...]]:
    columns = (ObjectRow.id, ObjectRow.entry_uuid, ObjectRow.patient_id)
    statement: Select[*tuple[Any, ...]] = select(*columns, ObjectRow.xml) if leaves else select(*columns)
    return statement.order_by(ObjectRow.id)  # the order of registration


def _of_patient(patient_id: str, kind: Kind, status: Sequence[str], *, leaves: bool) -> Select[*tuple[Any, ...]]:
    return _objects(leaves=leaves).where(
        ObjectRow.patient_id == patient_id,
        ObjectRow.kind == kind,
        ObjectRow.status.in_(sorted({STATUS_OF_URN[urn] for urn in status if urn in STATUS_OF_URN})),
    )


def _documents(
    patient_id: str, status: Sequence[str], types: Sequence[str], *, leaves: bool
) -> Select[*tuple[Any, ...]]:
    known = {uids.STABLE_DOCUMENT: False, uids.ON_DEMAND_DOCUMENT: True}
    return (
        _of_patient(patient_id, Kind.DOCUMENT_ENTRY, status, leaves=leaves)
        .join(DocumentEntryRow, DocumentEntryRow.id == ObjectRow.id)
        .where(DocumentEntryRow.on_demand.in_(sorted({known[urn] for urn in types if urn in known})))
    )


def _with_codes(
    statement: Select[*tuple[Any, ...]],
    table: type[EventCodeRow] | type[ConfidentialityCodeRow],
    groups: Sequence[Sequence[Code]],
) -> Select[*tuple[Any, ...]]:
    """AND over groups, OR within a group."""
    for codes in groups:
        matching = select(table.document_id).where(table.document_id == ObjectRow.id, table.code.in_(_keys(codes)))
        statement = statement.where(matching.exists())
    return statement


def _range(column: Any, first: str, end: str) -> Iterator[ColumnElement[bool]]:
    if first:
        yield column >= time_key(first)
    if end:
        yield column < time_key(end)


def _keys(codes: Sequence[Code]) -> list[str]:
    return [code_key(code) for code in codes]


# --- Limits -----------------------------------------------------------------------------------------------------------


def _limited(
    connection: Connection, statement: Select[*tuple[Any, ...]], limit: int
) -> Sequence[Row[*tuple[Any, ...]]]:
    """Run a statement; with a limit, one row more than allowed is enough to know."""
    rows = connection.execute(statement.limit(limit + 1) if limit else statement).all()
    _check_limit(len(rows), limit)
    return rows


def _check_limit(count: int, limit: int) -> None:
    if limit and count > limit:
        raise errors.TooManyResults(f"more than {limit} objects; narrow the query or ask for ObjectRef")


def _check_size(repeatable: Sequence[Sequence[Any]], single: Sequence[Sequence[Any]]) -> None:
    if len(repeatable) > MAX_CONDITIONS:
        raise errors.StoredQueryParamNumber(f"more than {MAX_CONDITIONS} slots of parameters that may be repeated")
    if sum(map(len, (*repeatable, *single))) > MAX_VALUES:
        raise errors.StoredQueryParamNumber(f"more than {MAX_VALUES} values in one query")


def _check_patterns(patterns: Sequence[str]) -> None:
    if len(patterns) > MAX_PATTERNS:
        raise errors.StoredQueryParamNumber(f"more than {MAX_PATTERNS} patterns in one query")
