"""What stored queries ask for, as conditions of SQL statements that select narrow rows.

Conditions on lists are written as subqueries by DocumentEntry, so that each starts from the patient's entries (or from
a reference id, when that is rarer) and not from a table as a whole. A search without patient starts from a code.

References
----------
* IHE ITI TF-2, 3.18.4.1.2.3.3 (times), .5 (AND and OR, LIKE), .7 (the queries), 3.51 (multiple patients);
  Appendix F (string comparison)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Select, or_, select

from xca_imaging import errors, uids
from xca_imaging.metadata.model import Code
from xca_imaging.metadata.stored_query import DocumentCriteria, FindSubmissionSets, FolderCriteria
from xca_imaging.registry.tables import (
    STATUS_OF_URN,
    AssociationRow,
    ConfidentialityCodeRow,
    DocumentAuthorRow,
    DocumentEntryRow,
    EventCodeRow,
    FolderCodeRow,
    FolderRow,
    Kind,
    ObjectRow,
    ReferenceIdRow,
    SubmissionSetAuthorRow,
    SubmissionSetRow,
    code_key,
    time_key,
)

MAX_VALUES = 5000
"""Most values in one query of conditions: SQLite takes 32766 parameters in a statement; real queries have few."""

MAX_CONDITIONS = 20
"""Most slots of AND parameters in a query: each is a subquery, and PostgreSQL plans 20 in 0.2 s, but 100 in 20 s."""

MAX_PATTERNS = 100
"""Most LIKE patterns in a query: each is compared with every author of the patient's documents."""

# LIKE needs an escape character to be named, or PostgreSQL takes the backslash, which HL7 v2 escapes consist of.
# U+0001 cannot occur in XML, hence in no pattern.
_NO_ESCAPE = "\x01"

Statement = Select[*tuple[Any, ...]]
"""Selects `id`, `entry_uuid`, `patient_id` and `kind` of objects; associations with `source_id` and `target_id`."""


# --- Searches ---------------------------------------------------------------------------------------------------------


def find_documents(query: DocumentCriteria, patient_ids: Sequence[str]) -> Statement:
    """Return the statement of a search for documents, of all patients where none is named."""
    check_size(
        (*query.event_codes, *query.confidentiality_codes, *query.reference_ids),
        query.class_codes,
        query.type_codes,
        query.practice_setting_codes,
        query.healthcare_facility_type_codes,
        query.format_codes,
        query.availability,
    )
    check_size((), patient_ids)
    entry = DocumentEntryRow
    statement = documents(query.types).where(*owned_by(patient_ids, Kind.DOCUMENT_ENTRY, query.status))
    if patient_ids:
        statement = statement.order_by(ObjectRow.id)
    for column, codes in (
        (entry.class_code, query.class_codes),
        (entry.type_code, query.type_codes),
        (entry.practice_setting_code, query.practice_setting_codes),
        (entry.healthcare_facility_type_code, query.healthcare_facility_type_codes),
        (entry.format_code, query.format_codes),
    ):
        if codes:
            statement = statement.where(column.in_(_keys(codes)))
    for codes in query.event_codes:
        if patient_ids:
            statement = with_codes(statement, EventCodeRow, [codes])
        else:
            coded = select(EventCodeRow.document_id).where(EventCodeRow.code.in_(_keys(codes)))
            statement = statement.where(ObjectRow.id.in_(coded))
    statement = with_codes(statement, ConfidentialityCodeRow, query.confidentiality_codes)
    for reference_ids in query.reference_ids:
        referring = select(ReferenceIdRow.document_id).where(ReferenceIdRow.reference_id.in_(reference_ids))
        statement = statement.where(ObjectRow.id.in_(referring))
    if query.author_persons:
        _check_patterns(query.author_persons)
        author = select(DocumentAuthorRow.document_id).where(
            DocumentAuthorRow.document_id == ObjectRow.id, _like(DocumentAuthorRow.person, query.author_persons)
        )
        statement = statement.where(author.exists())
    if query.availability:
        known = entry.availability.in_(query.availability)
        online = uids.DOCUMENT_ONLINE in query.availability
        statement = statement.where(or_(known, entry.availability.is_(None)) if online else known)
    # An on-demand entry has no creationTime, so the range does not apply to it (3.18.4.1.2.3.7.1, note 6).
    for condition in _range(entry.creation_time, query.creation_time_from, query.creation_time_to):
        statement = statement.where(or_(entry.on_demand, condition))
    # An entry without service times is not left out by a range of them (3.18.4.1.2.3.3.1).
    for condition in _range(entry.service_start_time, query.service_start_time_from, query.service_start_time_to):
        statement = statement.where(or_(entry.service_start_time.is_(None), condition))
    for condition in _range(entry.service_stop_time, query.service_stop_time_from, query.service_stop_time_to):
        statement = statement.where(or_(entry.service_stop_time.is_(None), condition))
    return statement


def find_submission_sets(query: FindSubmissionSets) -> Statement:
    """Return the statement of FindSubmissionSets."""
    check_size((), query.source_ids, query.content_type_codes)
    row = SubmissionSetRow
    statement = (
        objects()
        .join(row, row.id == ObjectRow.id)
        .where(*owned_by([query.patient_id], Kind.SUBMISSION_SET, query.status))
        .where(*_range(row.submission_time, query.submission_time_from, query.submission_time_to))
        .order_by(ObjectRow.id)
    )
    if query.source_ids:
        statement = statement.where(row.source_id.in_(query.source_ids))
    if query.content_type_codes:
        statement = statement.where(row.content_type_code.in_(_keys(query.content_type_codes)))
    if query.author_person:
        author = select(SubmissionSetAuthorRow.submission_set_id).where(
            SubmissionSetAuthorRow.submission_set_id == ObjectRow.id,
            _like(SubmissionSetAuthorRow.person, [query.author_person]),
        )
        statement = statement.where(author.exists())
    return statement


def find_folders(query: FolderCriteria, patient_ids: Sequence[str]) -> Statement:
    """Return the statement of a search for folders, of all patients where none is named."""
    check_size(query.codes)
    check_size((), patient_ids)
    statement = (
        objects()
        .join(FolderRow, FolderRow.id == ObjectRow.id)
        .where(*owned_by(patient_ids, Kind.FOLDER, query.status))
        .where(*_range(FolderRow.last_update_time, query.last_update_time_from, query.last_update_time_to))
        .order_by(ObjectRow.id)
    )
    for codes in query.codes:
        coded = select(FolderCodeRow.folder_id).where(FolderCodeRow.code.in_(_keys(codes)))
        if patient_ids:
            coded = coded.where(FolderCodeRow.folder_id == ObjectRow.id)
        statement = statement.where(coded.exists() if patient_ids else ObjectRow.id.in_(coded))
    return statement


# --- Parts of statements ----------------------------------------------------------------------------------------------


def objects(*kinds: Kind) -> Statement:
    """Select objects of some kinds, of any where none is named."""
    statement: Statement = select(ObjectRow.id, ObjectRow.entry_uuid, ObjectRow.patient_id, ObjectRow.kind)
    return statement.where(ObjectRow.kind.in_(kinds)) if kinds else statement


def documents(types: Sequence[str]) -> Statement:
    """Select DocumentEntries of some object types; types that are not known select nothing."""
    known = {uids.STABLE_DOCUMENT: False, uids.ON_DEMAND_DOCUMENT: True}
    return (
        objects()
        .join(DocumentEntryRow, DocumentEntryRow.id == ObjectRow.id)
        .where(DocumentEntryRow.on_demand.in_(sorted({known[urn] for urn in types if urn in known})))
    )


def with_contents(
    statement: Statement, format_codes: Sequence[Code], confidentiality_codes: Sequence[Sequence[Code]]
) -> Statement:
    """Constrain documents by what queries for contents may ask."""
    check_size(confidentiality_codes, format_codes)
    if format_codes:
        statement = statement.where(DocumentEntryRow.format_code.in_(_keys(format_codes)))
    return with_codes(statement, ConfidentialityCodeRow, confidentiality_codes)


def with_codes(
    statement: Statement, table: type[EventCodeRow] | type[ConfidentialityCodeRow], groups: Sequence[Sequence[Code]]
) -> Statement:
    """Constrain documents by a coded list: AND over groups, OR within a group."""
    for codes in groups:
        matching = select(table.document_id).where(table.document_id == ObjectRow.id, table.code.in_(_keys(codes)))
        statement = statement.where(matching.exists())
    return statement


def associations(status: Sequence[str]) -> Statement:
    """Select associations of some states."""
    return (
        objects()
        .add_columns(AssociationRow.source_id, AssociationRow.target_id)
        .join(AssociationRow, AssociationRow.id == ObjectRow.id)
        .where(ObjectRow.status.in_(_states(status)))
    )


def members(of: Sequence[int], status: Sequence[str]) -> Select[int]:
    """Select the numbers of what some packages have as members, by associations of some states."""
    return _ends(AssociationRow.target_id, status).where(AssociationRow.source_id.in_(of))


def packages(of: Sequence[int], status: Sequence[str]) -> Select[int]:
    """Select the numbers of the packages that have some objects as members, by associations of some states."""
    return _ends(AssociationRow.source_id, status).where(AssociationRow.target_id.in_(of))


def _ends(end: Any, status: Sequence[str]) -> Select[int]:
    membership = ObjectRow.__table__.alias("membership")
    return (
        select(end)
        .join(membership, membership.c.id == AssociationRow.id)
        .where(AssociationRow.type == uids.HAS_MEMBER, membership.c.status.in_(_states(status)))
    )


def owned_by(patient_ids: Sequence[str], kind: Kind, status: Sequence[str]) -> Iterator[ColumnElement[bool]]:
    """Yield the conditions that objects are of some patients, or of any where none is named."""
    if len(patient_ids) == 1:
        yield ObjectRow.patient_id == patient_ids[0]
    elif patient_ids:
        yield ObjectRow.patient_id.in_(patient_ids)
    yield ObjectRow.kind == kind
    yield ObjectRow.status.in_(_states(status))


def _states(urns: Sequence[str]) -> list[str]:
    return sorted({STATUS_OF_URN[urn] for urn in urns if urn in STATUS_OF_URN})


def _range(column: Any, first: str, end: str) -> Iterator[ColumnElement[bool]]:
    if first:
        yield column >= time_key(first)
    if end:
        yield column < time_key(end)


def _like(column: Any, patterns: Sequence[str]) -> ColumnElement[bool]:
    return or_(*(column.like(pattern, escape=_NO_ESCAPE) for pattern in patterns))


def _keys(codes: Sequence[Code]) -> list[str]:
    return [code_key(code) for code in codes]


# --- Limits -----------------------------------------------------------------------------------------------------------


def check_size(repeatable: Sequence[Sequence[Any]], *single: Sequence[Any]) -> None:
    """Refuse more slots of AND parameters, or values in all, than a statement should have."""
    if len(repeatable) > MAX_CONDITIONS:
        raise errors.StoredQueryParamNumber(f"more than {MAX_CONDITIONS} slots of parameters that may be repeated")
    if sum(map(len, (*repeatable, *single))) > MAX_VALUES:
        raise errors.StoredQueryParamNumber(f"more than {MAX_VALUES} values in one query")


def _check_patterns(patterns: Sequence[str]) -> None:
    if len(patterns) > MAX_PATTERNS:
        raise errors.StoredQueryParamNumber(f"more than {MAX_PATTERNS} patterns in one query")
