"""What each stored query selects: the rows of its objects, in the order of the answer.

References
----------
* IHE ITI TF-2, 3.18.4.1.2.3.7 (what each query returns), 3.51.4.1.2.3 (queries for multiple patients)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Row

from xca_imaging import errors, uids
from xca_imaging.metadata.stored_query import (
    FindDocuments,
    FindDocumentsForMultiplePatients,
    FindFolders,
    FindFoldersForMultiplePatients,
    FindSubmissionSets,
    GetAll,
    GetAssociations,
    GetDocuments,
    GetDocumentsAndAssociations,
    GetFolderAndContents,
    GetFolders,
    GetFoldersForDocument,
    GetRelatedDocuments,
    GetSubmissionSetAndContents,
    GetSubmissionSets,
    Query,
)
from xca_imaging.registry import conditions
from xca_imaging.registry.conditions import Statement
from xca_imaging.registry.database import chunks
from xca_imaging.registry.tables import AssociationRow, Kind, ObjectRow

Rows = list[Row[*tuple[Any, ...]]]

_APPROVED = (uids.APPROVED,)
_HAS_MEMBER = (uids.HAS_MEMBER,)


class Selection:
    """One query in one state of the registry; `limit` is the most objects it may select, 0 for any number."""

    # Mutable state: none.

    def __init__(self, connection: Connection, limit: int) -> None:
        self._connection, self._limit = connection, limit

    def select(self, query: Query) -> Rows:
        """Return a row with `id`, `entry_uuid`, `patient_id` and `kind` for each object.

        Raises
        ------
        errors.TooManyResults
            More than the limit.
        errors.StoredQueryParamNumber
            More values or conditions than `conditions` allows.
        """
        rows = self._SELECT[type(query)](self, query)
        self._check(len(rows))
        return rows

    # --- Searches by patient ------------------------------------------------------------------------------------------

    def _find_documents(self, query: FindDocuments) -> Rows:
        return self._run(conditions.find_documents(query, [query.patient_id]))

    def _find_documents_multi(self, query: FindDocumentsForMultiplePatients) -> Rows:
        return self._run(conditions.find_documents(query, query.patient_ids))

    def _find_submission_sets(self, query: FindSubmissionSets) -> Rows:
        return self._run(conditions.find_submission_sets(query))

    def _find_folders(self, query: FindFolders) -> Rows:
        return self._run(conditions.find_folders(query, [query.patient_id]))

    def _find_folders_multi(self, query: FindFoldersForMultiplePatients) -> Rows:
        return self._run(conditions.find_folders(query, query.patient_ids))

    def _get_all(self, query: GetAll) -> Rows:
        """A patient's objects, and every association that begins or ends at one of them (3.18.4.1.2.3.7.4)."""
        owner, rows = [query.patient_id], Rows()
        documents = conditions.with_contents(
            conditions.documents(query.types), query.format_codes, query.confidentiality_codes
        )
        for statement, kind, status in (
            (conditions.objects(), Kind.SUBMISSION_SET, query.submission_set_status),
            (documents, Kind.DOCUMENT_ENTRY, query.document_status),
            (conditions.objects(), Kind.FOLDER, query.folder_status),
        ):
            rows += self._run(statement.where(*conditions.owned_by(owner, kind, status)).order_by(ObjectRow.id))
            self._check(len(rows))
        return rows + self._touching(rows, query.association_status)

    # --- Queries by ids -----------------------------------------------------------------------------------------------

    def _get_documents(self, query: GetDocuments | GetDocumentsAndAssociations) -> Rows:
        return self._by_ids(Kind.DOCUMENT_ENTRY, query.entry_uuids, query.unique_ids, query.logical_ids)

    def _get_folders(self, query: GetFolders) -> Rows:
        return self._by_ids(Kind.FOLDER, query.entry_uuids, query.unique_ids, query.logical_ids)

    def _get_associations(self, query: GetAssociations) -> Rows:
        return self._touching(self._by_uuids(query.uuids), query.association_status)

    def _get_documents_and_associations(self, query: GetDocumentsAndAssociations) -> Rows:
        rows = self._get_documents(query)
        return rows + self._touching(rows, query.association_status)

    def _get_submission_sets(self, query: GetSubmissionSets) -> Rows:
        members = self._from_or_to(AssociationRow.target_id, self._by_uuids(query.uuids), _APPROVED, _HAS_MEMBER)
        sets = self._in(conditions.objects(Kind.SUBMISSION_SET), ObjectRow.id, {row.source_id for row in members})
        known = {row.id for row in sets}
        return sets + [row for row in members if row.source_id in known]

    def _get_submission_set_and_contents(self, query: GetSubmissionSetAndContents) -> Rows:
        """The set, its documents and folders, its associations among these, and their memberships in it."""
        sets = self._by_id(Kind.SUBMISSION_SET, query.entry_uuid, query.unique_id)
        members = ObjectRow.id.in_(conditions.members(_numbers(sets), query.association_status))
        contents = self._run(self._documents(query).where(members).order_by(ObjectRow.id))
        contents += self._run(conditions.objects(Kind.FOLDER).where(members).order_by(ObjectRow.id))
        self._check(len(contents))
        inside = {row.id for row in (*sets, *contents)}
        # Not limited: associations of which an end is not asked for are not part of the answer.
        linked = [
            row
            for row in self._connection.execute(conditions.associations(query.association_status).where(members))
            if row.source_id in inside and row.target_id in inside
        ]
        return sets + contents + _in_order([*linked, *self._memberships(sets, [*contents, *linked], query)])

    def _get_folder_and_contents(self, query: GetFolderAndContents) -> Rows:
        folders = self._by_id(Kind.FOLDER, query.entry_uuid, query.unique_id)
        members = ObjectRow.id.in_(conditions.members(_numbers(folders), query.association_status))
        contents = self._run(self._documents(query).where(members).order_by(ObjectRow.id))
        return contents + folders + self._memberships(folders, contents, query)

    def _get_folders_for_document(self, query: GetFoldersForDocument) -> Rows:
        documents = self._by_id(Kind.DOCUMENT_ENTRY, query.entry_uuid, query.unique_id)
        folders = ObjectRow.id.in_(conditions.packages(_numbers(documents), query.association_status))
        return self._run(conditions.objects(Kind.FOLDER).where(folders).order_by(ObjectRow.id))

    def _get_related_documents(self, query: GetRelatedDocuments) -> Rows:
        """Documents at both ends of the relationships of one, and these; both ends must be of the types asked for."""
        conditions.check_size((), query.association_types)
        documents = self._by_id(Kind.DOCUMENT_ENTRY, query.entry_uuid, query.unique_id)
        related = self._touching(documents, query.association_status, query.association_types)
        ends = {end for row in related for end in (row.source_id, row.target_id)}
        found = self._in(conditions.documents(query.types), ObjectRow.id, ends)
        known = {row.id for row in found}
        related = [row for row in related if row.source_id in known and row.target_id in known]
        linked = {end for row in related for end in (row.source_id, row.target_id)}
        return [row for row in found if row.id in linked] + related

    _SELECT: Mapping[type[Any], Callable[[Selection, Any], Rows]] = {
        FindDocuments: _find_documents,
        FindDocumentsForMultiplePatients: _find_documents_multi,
        FindSubmissionSets: _find_submission_sets,
        FindFolders: _find_folders,
        FindFoldersForMultiplePatients: _find_folders_multi,
        GetAll: _get_all,
        GetDocuments: _get_documents,
        GetFolders: _get_folders,
        GetAssociations: _get_associations,
        GetDocumentsAndAssociations: _get_documents_and_associations,
        GetSubmissionSets: _get_submission_sets,
        GetSubmissionSetAndContents: _get_submission_set_and_contents,
        GetFolderAndContents: _get_folder_and_contents,
        GetFoldersForDocument: _get_folders_for_document,
        GetRelatedDocuments: _get_related_documents,
    }

    # --- Rows ---------------------------------------------------------------------------------------------------------

    def _by_id(self, kind: Kind, entry_uuid: str, unique_id: str) -> Rows:
        return self._by_ids(kind, [entry_uuid] if entry_uuid else [], [unique_id] if unique_id else [])

    def _by_ids(
        self, kind: Kind, entry_uuids: Sequence[str], unique_ids: Sequence[str], logical_ids: Sequence[str] = ()
    ) -> Rows:
        for column, values in (
            (ObjectRow.entry_uuid, entry_uuids),
            (ObjectRow.unique_id, unique_ids),
            (ObjectRow.logical_id, logical_ids),
        ):
            if values:
                return self._in(conditions.objects(kind), column, set(values))
        return []

    def _by_uuids(self, uuids: Iterable[str]) -> Rows:
        """Return objects of any kind, also more than an answer may hold: they are not its content."""
        rows: Rows = []
        for chunk in chunks(sorted(set(uuids))):
            rows += self._connection.execute(conditions.objects().where(ObjectRow.entry_uuid.in_(chunk))).all()
        return rows

    def _documents(self, query: GetSubmissionSetAndContents | GetFolderAndContents) -> Statement:
        documents = conditions.documents(query.types)
        return conditions.with_contents(documents, query.format_codes, query.confidentiality_codes)

    def _memberships(
        self, packages: Rows, contents: Rows, query: GetSubmissionSetAndContents | GetFolderAndContents
    ) -> Rows:
        """Return the associations that make contents members of packages."""
        statement = conditions.associations(query.association_status).where(
            AssociationRow.type == uids.HAS_MEMBER, AssociationRow.source_id.in_(_numbers(packages))
        )
        return self._in(statement, AssociationRow.target_id, set(_numbers(contents)))

    def _touching(self, rows: Rows, status: Sequence[str], types: Sequence[str] = ()) -> Rows:
        """Return the associations that begin or end at objects."""
        # Two statements, because an OR over two columns lets SQLite use neither index.
        found = self._from_or_to(AssociationRow.source_id, rows, status, types)
        return _in_order([*found, *self._from_or_to(AssociationRow.target_id, rows, status, types)])

    def _from_or_to(self, end: Any, rows: Rows, status: Sequence[str], types: Sequence[str]) -> Rows:
        """Return the associations that have objects at one end."""
        statement = conditions.associations(status)
        if types:
            statement = statement.where(AssociationRow.type.in_(types))
        return self._in(statement, end, set(_numbers(rows)))

    def _in(self, statement: Statement, column: Any, values: Iterable[Any]) -> Rows:
        rows: Rows = []
        for chunk in chunks(sorted(values)):
            rows += self._run(statement.where(column.in_(chunk)))
            self._check(len(rows))
        return _in_order(rows)

    def _run(self, statement: Statement) -> Rows:
        """Run a statement; with a limit, one row more than allowed is enough to know."""
        limited = statement.limit(self._limit + 1) if self._limit else statement
        return list(self._connection.execute(limited))

    def _check(self, count: int) -> None:
        if self._limit and count > self._limit:
            raise errors.TooManyResults(f"more than {self._limit} objects; narrow the query or ask for ObjectRef")


def _numbers(rows: Rows) -> list[int]:
    return [row.id for row in rows]


def _in_order(rows: Iterable[Row[*tuple[Any, ...]]]) -> Rows:
    """Return each row once, in the order of registration."""
    by_number = {row.id: row for row in rows}
    return [by_number[number] for number in sorted(by_number)]
