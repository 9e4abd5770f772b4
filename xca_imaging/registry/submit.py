"""One submission applied in one database transaction.

The caller opens the transaction (`Database.writing`); `apply` ends with everything written or with an exception, upon
which all is rolled back: a refused submission leaves no trace.

References
----------
* IHE ITI TF-2, 3.42.4.1.3.1 (atomicity), .3.5 (document relationships), .3.6 (Folder.lastUpdateTime), .3.7 (ids)
* IHE ITI TF-3, 4.2.3.1.5 (UUIDs and symbolic ids)
"""

from __future__ import annotations

import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, cast

from sqlalchemy import Connection, Insert, bindparam, insert, select, update

from xca_imaging import errors, uids
from xca_imaging.errors import RegistryError, SubmissionRefused
from xca_imaging.metadata import ebrim
from xca_imaging.metadata.model import (
    Association,
    Author,
    Code,
    DocumentEntry,
    Folder,
    RegistryObject,
    Submission,
    SubmissionSet,
)
from xca_imaging.registry import rules, tables
from xca_imaging.registry.database import chunks
from xca_imaging.registry.rules import Known, Policy, State
from xca_imaging.registry.tables import (
    AssociationRow,
    ConfidentialityCodeRow,
    DocumentAuthorRow,
    DocumentEntryRow,
    EventCodeRow,
    FolderCodeRow,
    FolderRow,
    Kind,
    ObjectRow,
    PatientRow,
    ReferenceIdRow,
    Status,
    SubmissionSetAuthorRow,
    SubmissionSetRow,
)
from xca_imaging.wire import xml

_KINDS: Mapping[type[RegistryObject], Kind] = {
    DocumentEntry: Kind.DOCUMENT_ENTRY,
    SubmissionSet: Kind.SUBMISSION_SET,
    Folder: Kind.FOLDER,
    Association: Kind.ASSOCIATION,
}

# Statements of every submission are made once: to make them takes longer than to run them.
_KNOWN = select(
    ObjectRow.id,
    ObjectRow.kind,
    ObjectRow.entry_uuid,
    ObjectRow.unique_id,
    ObjectRow.patient_id,
    ObjectRow.status,
    DocumentEntryRow.on_demand,
    DocumentEntryRow.hash,
    DocumentEntryRow.size,
).outerjoin(DocumentEntryRow, DocumentEntryRow.id == ObjectRow.id)
_KNOWN_BY = {
    column.key: _KNOWN.where(column.in_(bindparam("values", expanding=True)))
    for column in (ObjectRow.entry_uuid, ObjectRow.unique_id, ObjectRow.logical_id)
}
_PATIENT = select(PatientRow.merged_into).where(PatientRow.patient_id == bindparam("patient_id"))
_INSERT_OBJECTS = insert(ObjectRow).returning(ObjectRow.id, ObjectRow.entry_uuid)
_INSERTS: Mapping[type[tables.Base], Insert] = {
    table: insert(table)
    for table in (
        DocumentEntryRow,
        EventCodeRow,
        ConfidentialityCodeRow,
        DocumentAuthorRow,
        ReferenceIdRow,
        SubmissionSetRow,
        SubmissionSetAuthorRow,
        FolderRow,
        FolderCodeRow,
        AssociationRow,
    )
}


@dataclass(frozen=True, slots=True)
class Registered:
    """What became of a submission: entryUUID of each id in the message, and what the submitter should know."""

    entry_uuids: Mapping[str, str]
    warnings: tuple[RegistryError, ...] = ()


def apply(connection: Connection, submission: Submission, policy: Policy, now: datetime) -> Registered:
    """Check a submission against the registry's state, then write it with all its effects.

    Raises
    ------
    errors.SubmissionRefused
        With every rule of `rules.check` that it breaks. Nothing has been written.
    """
    state = load_state(connection, submission)
    if problems := tuple(rules.check(submission, state, policy)):
        raise SubmissionRefused(problems)
    entry_uuids = assign_uuids(submission)
    submission = complete(submission, entry_uuids, policy, now)
    replacements = [
        (state.by_uuid[association.target], association.source)
        for association in submission.associations
        if association.type in rules.REPLACING
    ]
    copies, copied_into = _copy_folder_memberships(connection, submission, replacements, policy)
    submission = replace(submission, associations=submission.associations + copies)
    deprecate(connection, {known.id for known, _ in replacements})
    filled = {
        known.id
        for association in submission.associations
        if association.type == uids.HAS_MEMBER
        and (known := state.by_uuid.get(association.source)) is not None
        and known.kind == Kind.FOLDER
    }
    touch_folders(connection, filled | set(copied_into.values()), now)
    insert_objects(
        connection, submission, {known.entry_uuid: known.id for known in state.by_uuid.values()} | copied_into
    )
    return Registered(entry_uuids)


# --- What the registry sets itself ------------------------------------------------------------------------------------


def assign_uuids(submission: Submission) -> dict[str, str]:
    """Return the UUID of each id in the message; one that is a UUID already is kept for ever."""
    return {
        item.entry_uuid: item.entry_uuid if item.entry_uuid.startswith(uids.UUID_PREFIX) else _new_uuid()
        for item in submission
    }


def _new_uuid() -> str:
    return uids.UUID_PREFIX + str(uuid.uuid4())


def complete(submission: Submission, entry_uuids: Mapping[str, str], policy: Policy, now: datetime) -> Submission:
    """Return the submission with UUIDs for symbolic ids and with the attributes that are the registry's to set."""

    def owned(item: Any) -> Any:
        entry_uuid = entry_uuids[item.entry_uuid]
        return replace(
            item,
            entry_uuid=entry_uuid,
            logical_id=entry_uuid,
            home_community_id=policy.home_community_id,
            availability_status=uids.APPROVED,
        )

    def linked(item: Association) -> Association:
        source, target = entry_uuids.get(item.source, item.source), entry_uuids.get(item.target, item.target)
        return cast(Association, replace(owned(item), source=source, target=target))

    return replace(
        submission,
        submission_sets=tuple(map(owned, submission.submission_sets)),
        documents=tuple(map(owned, submission.documents)),
        folders=tuple(replace(owned(item), last_update_time=tables.dtm(now)) for item in submission.folders),
        associations=tuple(map(linked, submission.associations)),
    )


# --- What is registered already ---------------------------------------------------------------------------------------


def load_state(connection: Connection, submission: Submission) -> State:
    named = {item.entry_uuid for item in submission}
    named |= {end for association in submission.associations for end in (association.source, association.target)}
    owners: list[SubmissionSet | DocumentEntry | Folder] = [
        *submission.submission_sets,
        *submission.documents,
        *submission.folders,
    ]
    by_unique_id: dict[str, list[Known]] = defaultdict(list)
    for known in load_known(connection, ObjectRow.unique_id, {owner.unique_id for owner in owners}):
        by_unique_id[known.unique_id].append(known)
    patient_id = submission.submission_sets[0].patient_id
    patient = connection.execute(_PATIENT, {"patient_id": patient_id}).one_or_none()
    return State(
        by_uuid={known.entry_uuid: known for known in load_known(connection, ObjectRow.entry_uuid, named)},
        by_unique_id=by_unique_id,
        patient_known=patient is not None,
        merged_into=(patient.merged_into or "") if patient else "",
    )


def load_known(connection: Connection, column: Any, values: Iterable[str]) -> Iterator[Known]:
    for chunk in chunks(sorted(values)):
        for row in connection.execute(_KNOWN_BY[column.key], {"values": chunk}):
            yield Known(
                id=row.id,
                kind=row.kind,
                entry_uuid=row.entry_uuid,
                unique_id=row.unique_id or "",
                patient_id=row.patient_id,
                status=row.status,
                on_demand=bool(row.on_demand),
                hash=row.hash or "",
                size=row.size,
            )


# --- Effects on what is registered ------------------------------------------------------------------------------------


def _copy_folder_memberships(
    connection: Connection, submission: Submission, replacements: list[tuple[Known, str]], policy: Policy
) -> tuple[tuple[Association, ...], dict[str, int]]:
    """Return the associations that put replacements into the approved folders of what they replace, and these folders.

    Each new FD-DE HasMember comes with the SS-HM HasMember that says which submission made it.
    """
    if not replacements:
        return (), {}
    folder = ObjectRow.__table__.alias("folder")
    statement = (
        select(AssociationRow.target_id, folder.c.id, folder.c.entry_uuid, folder.c.patient_id)
        .join(folder, folder.c.id == AssociationRow.source_id)
        .where(AssociationRow.type == uids.HAS_MEMBER, folder.c.kind == Kind.FOLDER, folder.c.status == Status.APPROVED)
        .order_by(AssociationRow.id)
    )
    folders_of: dict[int, dict[str, Any]] = defaultdict(dict)
    for chunk in chunks(sorted({known.id for known, _ in replacements})):
        for row in connection.execute(statement.where(AssociationRow.target_id.in_(chunk))):
            folders_of[row.target_id][row.entry_uuid] = row
    submission_set = submission.submission_sets[0]
    members = {(a.source, a.target) for a in submission.associations if a.type == uids.HAS_MEMBER}
    copies: list[Association] = []
    copied_into: dict[str, int] = {}
    for replaced, replacement in replacements:
        for entry_uuid, row in folders_of[replaced.id].items():
            if row.patient_id != submission_set.patient_id:
                raise SubmissionRefused(
                    [errors.PatientIdDoesNotMatch(f"Folder {entry_uuid} has another patient id than {replacement}")]
                )
            if (entry_uuid, replacement) in members:
                continue
            members.add((entry_uuid, replacement))
            membership = new_association(entry_uuid, replacement, policy)
            copies += [membership, new_association(submission_set.entry_uuid, membership.entry_uuid, policy)]
            copied_into[entry_uuid] = row.id
    return tuple(copies), copied_into


def new_association(source: str, target: str, policy: Policy) -> Association:
    entry_uuid = _new_uuid()
    return Association(
        entry_uuid=entry_uuid,
        logical_id=entry_uuid,
        home_community_id=policy.home_community_id,
        availability_status=uids.APPROVED,
        type=uids.HAS_MEMBER,
        source=source,
        target=target,
    )


def deprecate(connection: Connection, replaced: set[int]) -> None:
    """Deprecate DocumentEntries with their transformations and addenda (TF-2 3.42.4.1.3.5)."""
    statement = select(AssociationRow.source_id).where(AssociationRow.type.in_((uids.XFRM, uids.APND)))
    outdated = set(replaced)
    for chunk in chunks(sorted(replaced)):
        outdated.update(connection.scalars(statement.where(AssociationRow.target_id.in_(chunk))))
    rewrite(connection, outdated, {"status": Status.DEPRECATED}, availability_status=uids.DEPRECATED)


def touch_folders(connection: Connection, folders: set[int], now: datetime) -> None:
    rewrite(connection, folders, {}, last_update_time=tables.dtm(now))
    if folders:
        connection.execute(
            update(FolderRow).where(FolderRow.id == bindparam("folder")),
            [{"folder": folder, "last_update_time": tables.dtm(now)} for folder in sorted(folders)],
        )


def rewrite(connection: Connection, ids: set[int], columns: Mapping[str, Any], **attributes: Any) -> None:
    """Change attributes of registered objects, in their XML as in their columns."""
    rows = []
    for chunk in chunks(sorted(ids)):
        for row in connection.execute(select(ObjectRow.id, ObjectRow.xml).where(ObjectRow.id.in_(chunk))):
            changed = replace(ebrim.decode_object(xml.parse(row.xml)), **attributes)
            rows.append({"object": row.id, "xml": xml.serialize(ebrim.encode_object(changed)), **columns})
    if rows:
        connection.execute(update(ObjectRow).where(ObjectRow.id == bindparam("object")), rows)


# --- New objects ------------------------------------------------------------------------------------------------------


def insert_objects(
    connection: Connection, submission: Submission, ids: dict[str, int], versions: Mapping[str, int] | None = None
) -> None:
    """Insert all objects.

    Parameters
    ----------
    ids : dict of str to int
        Row numbers of registered objects that associations point to, by entryUUID.
    versions : mapping of str to int, optional
        By entryUUID, of the objects that are not a first version.
    """
    patient_id = submission.submission_sets[0].patient_id
    returned = connection.execute(
        _INSERT_OBJECTS,
        [
            {
                "kind": _KINDS[type(item)],
                "entry_uuid": item.entry_uuid,
                "unique_id": getattr(item, "unique_id", None),
                "patient_id": getattr(item, "patient_id", patient_id),
                "status": Status.APPROVED,
                "xml": xml.serialize(ebrim.encode_object(item)),
                "logical_id": item.logical_id,
                "version": (versions or {}).get(item.entry_uuid, 1),
            }
            for item in submission
        ],
    )
    ids = ids | {row.entry_uuid: row.id for row in returned}
    rows: dict[type[tables.Base], list[dict[str, Any]]] = defaultdict(list)
    for document in submission.documents:
        _document_rows(rows, ids[document.entry_uuid], document)
    for submission_set in submission.submission_sets:
        _submission_set_rows(rows, ids[submission_set.entry_uuid], submission_set)
    for folder in submission.folders:
        number = ids[folder.entry_uuid]
        rows[FolderRow].append({"id": number, "last_update_time": _time(folder.last_update_time)})
        rows[FolderCodeRow] += [{"folder_id": number, "code": key} for key in _code_keys(folder.codes)]
    for association in submission.associations:
        rows[AssociationRow].append(
            {
                "id": ids[association.entry_uuid],
                "type": association.type,
                "source_id": ids[association.source],
                "target_id": ids[association.target],
            }
        )
    for table, values in rows.items():
        if values:
            connection.execute(_INSERTS[table], values)


def _document_rows(
    rows: Mapping[type[tables.Base], list[dict[str, Any]]], number: int, document: DocumentEntry
) -> None:
    rows[DocumentEntryRow].append(
        {
            "id": number,
            "on_demand": document.object_type == uids.ON_DEMAND_DOCUMENT,
            "creation_time": _time(document.creation_time),
            "service_start_time": _time(document.service_start_time),
            "service_stop_time": _time(document.service_stop_time),
            "class_code": _code(document.class_code),
            "type_code": _code(document.type_code),
            "format_code": _code(document.format_code),
            "healthcare_facility_type_code": _code(document.healthcare_facility_type_code),
            "practice_setting_code": _code(document.practice_setting_code),
            "hash": document.hash or None,
            "size": document.size,
            "availability": document.document_availability or None,
        }
    )
    rows[EventCodeRow] += [{"document_id": number, "code": key} for key in _code_keys(document.event_codes)]
    rows[ConfidentialityCodeRow] += [
        {"document_id": number, "code": key} for key in _code_keys(document.confidentiality_codes)
    ]
    rows[DocumentAuthorRow] += [{"document_id": number, "person": person} for person in _persons(document.authors)]
    rows[ReferenceIdRow] += [
        {"document_id": number, "reference_id": reference} for reference in dict.fromkeys(document.reference_ids)
    ]


def _submission_set_rows(
    rows: Mapping[type[tables.Base], list[dict[str, Any]]], number: int, submission_set: SubmissionSet
) -> None:
    rows[SubmissionSetRow].append(
        {
            "id": number,
            "source_id": submission_set.source_id or None,
            "submission_time": _time(submission_set.submission_time),
            "content_type_code": _code(submission_set.content_type_code),
        }
    )
    rows[SubmissionSetAuthorRow] += [
        {"submission_set_id": number, "person": person} for person in _persons(submission_set.authors)
    ]


def _time(dtm: str) -> str | None:
    return tables.time_key(dtm) if dtm else None


def _code(code: Code | None) -> str | None:
    return tables.code_key(code) if code else None


def _code_keys(codes: Iterable[Code]) -> Iterable[str]:
    return dict.fromkeys(map(tables.code_key, codes))


def _persons(authors: Iterable[Author]) -> Iterable[str]:
    return dict.fromkeys(author.person for author in authors if author.person)
