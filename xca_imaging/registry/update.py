"""ITI-57: registered metadata changed in one database transaction.

A submission of an update is read as operations, one for each association from its SubmissionSet:

    HasMember with PreviousVersion     a new version of a DocumentEntry or Folder
    UpdateAvailabilityStatus           another status for a DocumentEntry, Folder or Association
    SubmitAssociation                  a new association between registered objects

The SubmissionSet and these associations are registered too: they say who changed what, and when. Versions of an object
share `lid`; the newest has the highest number, the ones before it are deprecated. XDSMetadataIdentifierError,
XDSMetadataAnnotationError and XDSObjectTypeError are the codes of the restricted update (ITI-92) and not used here.

References
----------
* IHE ITI XDS Metadata Update, 3.57.4.1.3.1 (rules of the request), .3.2 (operations and how they are recognised),
  .3.3.1 to .3.3.6 (the operations, association propagation)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import islice
from typing import Any, cast

from sqlalchemy import Connection, or_, select

from xca_imaging import errors, uids
from xca_imaging.errors import RegistryError, SubmissionRefused
from xca_imaging.metadata import ebrim
from xca_imaging.metadata.model import (
    Association,
    DocumentEntry,
    Folder,
    RegistryObject,
    Submission,
    SubmissionSet,
)
from xca_imaging.metadata.validate import RELATIONSHIPS, validate_submission
from xca_imaging.metadata.vocabulary import ANY, Vocabulary
from xca_imaging.registry import rules, submit
from xca_imaging.registry.database import chunks
from xca_imaging.registry.rules import Policy, describe
from xca_imaging.registry.submit import Registered
from xca_imaging.registry.tables import STATUS_OF_URN, AssociationRow, Kind, ObjectRow, Status
from xca_imaging.wire import xml

_URN_OF_STATUS = {status: urn for urn, status in STATUS_OF_URN.items()}
_MAX_ERRORS = 100  # more are not told: nobody reads them, and a small message must not make a large answer
_EMPTY_HASH = "da39a3ee5e6b4b0d3255bfef95601890afd80709"  # SHA-1 of nothing: a document still to be assembled (3.43)


@dataclass(frozen=True, slots=True)
class Operations:
    """An update as its operations; every association of the submission is in one of them."""

    submission_set: SubmissionSet
    versions: Sequence[tuple[DocumentEntry | Folder, Association]] = ()
    """New versions, each with its membership in the SubmissionSet."""
    statuses: Sequence[Association] = ()
    associations: Sequence[tuple[Association, Association]] = ()
    """New associations, each with the SubmitAssociation that submits it."""


@dataclass(frozen=True, slots=True)
class _Registered:
    """A registered object that an update names, with what it says."""

    id: int
    kind: str
    entry_uuid: str
    logical_id: str
    version: int
    patient_id: str
    status: str
    item: RegistryObject


@dataclass(slots=True)
class _State:
    """What the registry holds about an update."""

    by_uuid: dict[str, _Registered] = field(default_factory=dict)
    newest: dict[str, _Registered] = field(default_factory=dict)
    """The newest version by logical id."""


# --- What is asked for ------------------------------------------------------------------------------------------------


def read_operations(submission: Submission, vocabulary: Vocabulary = ANY) -> Operations:
    """Return the operations of an update.

    Raises
    ------
    SubmissionRefused
        With all that is wrong with the message in itself: what is no operation, and what each operation lacks.
    """
    problems = _message_problems(submission, vocabulary)
    if len(submission.submission_sets) != 1:
        raise SubmissionRefused(problems[:_MAX_ERRORS])
    submission_set = submission.submission_sets[0]
    objects = {item.entry_uuid: item for item in versioned_objects(submission)}
    submitted = {each.entry_uuid: each for each in submission.associations}
    versions: dict[str, tuple[DocumentEntry | Folder, Association]] = {}
    statuses: list[Association] = []
    associations: dict[str, tuple[Association, Association]] = {}
    others: list[Association] = []
    for association in submission.associations:
        ours = association.source == submission_set.entry_uuid
        if association.type == uids.HAS_MEMBER and ours and association.target in objects:
            versions[association.target] = (objects[association.target], association)
        elif association.type == uids.UPDATE_AVAILABILITY_STATUS:
            statuses.append(association)
        elif association.type == uids.SUBMIT_ASSOCIATION and association.target in submitted:
            associations[association.target] = (submitted[association.target], association)
        else:
            others.append(association)
    problems += [
        errors.MetadataUpdateOperationError(f"{describe(each)} of type {each.type[:80]} is part of no operation")
        for each in others
        if each.entry_uuid not in associations
    ]
    problems += [
        errors.MetadataUpdateError(f"{describe(each)}: no HasMember association from the SubmissionSet")
        for entry_uuid, each in objects.items()
        if entry_uuid not in versions
    ]
    problems += [
        errors.MetadataUpdateError(f"{describe(each)} does not begin at the SubmissionSet")
        for each in (*statuses, *(trigger for _, trigger in associations.values()))
        if each.source != submission_set.entry_uuid
    ]
    if not (objects or submission.associations):
        problems.append(errors.MetadataUpdateOperationError("the submission holds no operation"))
    for item, membership in versions.values():
        problems += _version_problems(item, membership)
    for status in statuses:
        problems += _status_problems(status)
    if problems:
        raise SubmissionRefused(problems[:_MAX_ERRORS])
    return Operations(submission_set, tuple(versions.values()), tuple(statuses), tuple(associations.values()))


def versioned_objects(submission: Submission) -> list[DocumentEntry | Folder]:
    """Return what has versions."""
    return [*submission.documents, *submission.folders]


def _message_problems(submission: Submission, vocabulary: Vocabulary) -> list[RegistryError]:
    """Return what is wrong with the objects: they must be as those of a registration (ITI-42)."""
    packages = {item.entry_uuid for item in submission.submission_sets}
    objects = {item.entry_uuid for item in versioned_objects(submission)}
    members = {
        each.target for each in submission.associations if each.type == uids.HAS_MEMBER and each.source in packages
    }
    # What begins or ends outside of the submission, or is no part of a registration, is judged here and not there.
    return validate_submission(
        replace(
            submission,
            documents=tuple(each for each in submission.documents if each.entry_uuid in members),
            folders=tuple(each for each in submission.folders if each.entry_uuid in members),
            associations=tuple(
                each
                for each in submission.associations
                if each.type == uids.HAS_MEMBER and each.source in packages and each.target in objects
            ),
        ),
        vocabulary=vocabulary,
    )


def _version_problems(item: DocumentEntry | Folder, membership: Association) -> Iterator[RegistryError]:
    if not item.logical_id.startswith(uids.UUID_PREFIX):
        yield errors.MetadataUpdateError(f"{describe(item)}: lid is not the UUID of a registered object")
    elif item.logical_id == item.entry_uuid:
        yield errors.MetadataUpdateError(f"{describe(item)}: lid is the object's own id: a first version is no update")
    if not membership.previous_version:
        yield errors.MetadataUpdateError(f"{describe(membership)}: PreviousVersion is missing")
    if membership.association_propagation.lower() not in ("", "yes", "no"):
        yield errors.MetadataUpdateError(f"{describe(membership)}: AssociationPropagation is neither yes nor no")


def _status_problems(association: Association) -> Iterator[RegistryError]:
    for name, value in (("OriginalStatus", association.original_status), ("NewStatus", association.new_status)):
        if value not in STATUS_OF_URN:
            text = f"{name} {value[:80]!r} is neither Approved nor Deprecated" if value else f"{name} is missing"
            yield errors.MetadataUpdateError(f"{describe(association)}: {text}")


# --- Applying it ------------------------------------------------------------------------------------------------------


def apply(connection: Connection, operations: Operations, policy: Policy, now: datetime) -> Registered:
    """Check an update against the registry's state, then make it with all its effects.

    Raises
    ------
    SubmissionRefused
        With every rule that it breaks. Nothing has been written.
    """
    submission = _as_submission(operations)
    state = _load_state(connection, operations)
    problems = [
        *rules.check(
            Submission(submission_sets=submission.submission_sets), _rules_state(connection, submission), policy
        ),
        *islice(_check(operations, state), _MAX_ERRORS),
    ]
    if problems:
        raise SubmissionRefused(problems)
    entry_uuids = submit.assign_uuids(submission)
    numbers = {
        entry_uuids[item.entry_uuid]: state.newest[item.logical_id].version + 1 for item, _ in operations.versions
    }
    submission = _complete(submission, operations, entry_uuids, numbers, policy, now)
    replaced = {state.newest[item.logical_id].id for item, _ in operations.versions}
    copied_for = {
        entry_uuids[item.entry_uuid]: state.newest[item.logical_id]
        for item, membership in operations.versions
        if membership.association_propagation.lower() != "no"
    }
    copies, ends, filled = _propagate(connection, copied_for, submission.submission_sets[0], policy)
    submission = replace(submission, associations=submission.associations + copies)
    _set_status(connection, replaced, uids.DEPRECATED)
    ids = ends | {each.entry_uuid: each.id for each in state.by_uuid.values()}
    submit.insert_objects(connection, submission, ids, numbers)
    submit.touch_folders(connection, filled, now)
    _apply_statuses(connection, operations, state, submission)
    _apply_associations(connection, operations, state, entry_uuids, now)
    return Registered(entry_uuids)


def _as_submission(operations: Operations) -> Submission:
    """Return everything that is registered by an update."""
    items = [item for item, _ in operations.versions]
    return Submission(
        submission_sets=(operations.submission_set,),
        documents=tuple(item for item in items if isinstance(item, DocumentEntry)),
        folders=tuple(item for item in items if isinstance(item, Folder)),
        associations=(
            *(membership for _, membership in operations.versions),
            *operations.statuses,
            *(each for pair in operations.associations for each in pair),
        ),
    )


def _rules_state(connection: Connection, submission: Submission) -> rules.State:
    """Return what the rules of a registration need: whether id, uniqueId and patient can be the SubmissionSet's."""
    return submit.load_state(connection, Submission(submission_sets=submission.submission_sets))


def _load_state(connection: Connection, operations: Operations) -> _State:
    submission = _as_submission(operations)
    wanted = {item.entry_uuid for item in submission}
    wanted |= {end for each in submission.associations for end in (each.source, each.target)}
    state = _State()
    for each in _load(connection, ObjectRow.entry_uuid, wanted):
        state.by_uuid[each.entry_uuid] = each
    logical = {item.logical_id for item, _ in operations.versions}
    logical |= {each.logical_id for each in state.by_uuid.values()}
    for each in _load(connection, ObjectRow.logical_id, logical):
        known = state.newest.get(each.logical_id)
        if known is None or each.version > known.version:
            state.newest[each.logical_id] = each
    return state


def _load(connection: Connection, column: Any, values: Iterable[str]) -> Iterator[_Registered]:
    statement = select(ObjectRow.__table__)
    for chunk in chunks(sorted(value for value in set(values) if value.startswith(uids.UUID_PREFIX))):
        for row in connection.execute(statement.where(column.in_(chunk))):
            yield _Registered(
                row.id,
                row.kind,
                row.entry_uuid,
                row.logical_id,
                row.version,
                row.patient_id,
                row.status,
                ebrim.decode_object(xml.parse(row.xml)),
            )


# --- Rules that need the registry's state -----------------------------------------------------------------------------


def _check(operations: Operations, state: _State) -> Iterator[RegistryError]:
    for item in _as_submission(operations):
        # That of the SubmissionSet is checked with the rules of a registration.
        if item.entry_uuid in state.by_uuid and not isinstance(item, SubmissionSet):
            yield errors.RegistryMetadataError(f"the id of {describe(item)} belongs to an object in the registry")
    patient_id = operations.submission_set.patient_id
    seen: set[str] = set()
    for item, membership in operations.versions:
        if item.logical_id in seen:
            yield errors.MetadataUpdateError(f"{describe(item)}: {item.logical_id} is updated twice")
        seen.add(item.logical_id)
        yield from _check_version(item, membership, state.newest.get(item.logical_id))
    new = {item.entry_uuid: item for item, _ in operations.versions}
    targets: set[str] = set()
    for status in operations.statuses:
        if status.target in targets:
            yield errors.MetadataUpdateError(f"{describe(status)}: the status of {status.target} is changed twice")
        targets.add(status.target)
        yield from _check_status(status, patient_id, new, state)
    for association, _ in operations.associations:
        yield from _check_association(association, new, state)


def _check_version(
    item: DocumentEntry | Folder, membership: Association, newest: _Registered | None
) -> Iterator[RegistryError]:
    kind = Kind.DOCUMENT_ENTRY if isinstance(item, DocumentEntry) else Kind.FOLDER
    if newest is None or newest.kind != kind:
        yield errors.MetadataUpdateError(f"{describe(item)}: no {kind} {item.logical_id} is registered")
        return
    before = cast("DocumentEntry | Folder", newest.item)
    if membership.previous_version != str(newest.version):
        yield errors.MetadataVersionError(
            f"{describe(membership)}: PreviousVersion is {membership.previous_version[:20]}, "
            f"the newest version of {item.logical_id} is {newest.version}"
        )
    if newest.status != Status.APPROVED:
        yield errors.MetadataUpdateError(f"{describe(item)}: version {newest.version} is deprecated")
    if item.patient_id != newest.patient_id:
        yield errors.PatientIdReconciliationError(f"{describe(item)}: {item.logical_id} is another patient's")
    if item.unique_id != before.unique_id:
        yield errors.MetadataUpdateError(f"{describe(item)}: uniqueId of {item.logical_id} is {before.unique_id}")
    if isinstance(item, DocumentEntry) and isinstance(before, DocumentEntry):
        # Hash and size are those of the document, not of its description; one that is still to be assembled has none.
        unassembled = before.size == 0 and before.hash.lower() == _EMPTY_HASH
        if item.object_type != before.object_type:
            yield errors.MetadataUpdateError(f"{describe(item)}: objectType of {item.logical_id} cannot change")
        elif not unassembled and (item.hash.lower(), item.size) != (before.hash.lower(), before.size):
            yield errors.MetadataUpdateError(f"{describe(item)}: hash and size of {item.logical_id} cannot change")


def _check_status(
    association: Association, patient_id: str, new: Mapping[str, DocumentEntry | Folder], state: _State
) -> Iterator[RegistryError]:
    if association.target in new:
        current, owner = uids.APPROVED, new[association.target].patient_id
    else:
        target = state.by_uuid.get(association.target)
        if target is None:
            yield errors.UnresolvedReference(f"{describe(association)}: there is no object {association.target}")
            return
        if target.kind == Kind.SUBMISSION_SET:
            yield errors.MetadataUpdateError(f"{describe(association)}: the status of a SubmissionSet is not changed")
            return
        newest = state.newest[target.logical_id]
        if newest.entry_uuid != target.entry_uuid:
            yield errors.MetadataUpdateError(
                f"{describe(association)}: version {target.version} of {target.logical_id} is not the newest"
            )
            return
        current, owner = _URN_OF_STATUS[Status(target.status)], target.patient_id
    if association.original_status != current:
        yield errors.MetadataUpdateError(f"{describe(association)}: the status of {association.target} is {current}")
    if owner != patient_id:
        yield errors.PatientIdReconciliationError(
            f"{describe(association)}: {association.target} is of another patient than the SubmissionSet"
        )


def _check_association(
    association: Association, new: Mapping[str, DocumentEntry | Folder], state: _State
) -> Iterator[RegistryError]:
    ends: list[tuple[str, str]] = []  # kind and patient id
    for end in (association.source, association.target):
        registered = state.by_uuid.get(end)
        if end in new:
            ends.append(
                (Kind.DOCUMENT_ENTRY if isinstance(new[end], DocumentEntry) else Kind.FOLDER, new[end].patient_id)
            )
        elif registered is None:
            yield errors.UnresolvedReference(f"{describe(association)}: there is no object {end}")
        else:
            ends.append((registered.kind, registered.patient_id))
            if registered.status != Status.APPROVED:
                yield errors.DeprecatedDocumentError(f"{describe(association)}: {end} is deprecated")
    if len(ends) < 2:
        return
    kinds = (ends[0][0], ends[1][0])
    fits = (
        kinds == (Kind.FOLDER, Kind.DOCUMENT_ENTRY)
        if association.type == uids.HAS_MEMBER
        else association.type in RELATIONSHIPS and kinds == (Kind.DOCUMENT_ENTRY, Kind.DOCUMENT_ENTRY)
    )
    if not fits:
        yield errors.MetadataUpdateError(
            f"{describe(association)}: {association.type[:80]} does not go from a {kinds[0]} to a {kinds[1]}"
        )
    if ends[0][1] != ends[1][1]:
        yield errors.PatientIdDoesNotMatch(f"{describe(association)}: its ends have different patient ids")


# --- Effects ----------------------------------------------------------------------------------------------------------


def _complete(
    submission: Submission,
    operations: Operations,
    entry_uuids: Mapping[str, str],
    numbers: Mapping[str, int],
    policy: Policy,
    now: datetime,
) -> Submission:
    """Return what is registered, with UUIDs, version numbers and what else is the registry's to set."""
    logical_ids = {entry_uuids[item.entry_uuid]: item.logical_id for item, _ in operations.versions}

    def versioned(item: Any) -> Any:
        number = str(numbers[item.entry_uuid])
        return replace(item, logical_id=logical_ids[item.entry_uuid], version=number)

    submission = submit.complete(submission, entry_uuids, policy, now)
    return replace(
        submission,
        documents=tuple(map(versioned, submission.documents)),
        folders=tuple(map(versioned, submission.folders)),
    )


def _propagate(
    connection: Connection, replaced: Mapping[str, _Registered], submission_set: SubmissionSet, policy: Policy
) -> tuple[tuple[Association, ...], dict[str, int], set[int]]:
    """Return a copy of each approved association of a replaced version, for the new one; the rows that the copies end
    at; and the folders that have a new member thereby.

    Memberships in SubmissionSets are not copied: a version is of the submission that made it; nor are those in folders
    that are deprecated. A copy of a folder's
    membership comes with the HasMember that says which submission made it (4.2.2.1.4).
    """
    by_row = {each.id: entry_uuid for entry_uuid, each in replaced.items()}
    if not by_row:
        return (), {}, set()
    source, target = ObjectRow.__table__.alias("source"), ObjectRow.__table__.alias("target")
    statement = (
        select(
            AssociationRow.source_id,
            AssociationRow.target_id,
            source.c.entry_uuid.label("source"),
            source.c.kind.label("source_kind"),
            target.c.entry_uuid.label("target"),
            ObjectRow.id,
            ObjectRow.xml,
        )
        .join(ObjectRow, ObjectRow.id == AssociationRow.id)
        .join(source, source.c.id == AssociationRow.source_id)
        .join(target, target.c.id == AssociationRow.target_id)
        .where(
            ObjectRow.status == Status.APPROVED,
            source.c.kind != Kind.SUBMISSION_SET,
            or_(source.c.kind != Kind.FOLDER, source.c.status == Status.APPROVED),
        )
    )
    rows: dict[int, Any] = {}
    for chunk in chunks(sorted(by_row)):
        for end in (AssociationRow.source_id, AssociationRow.target_id):
            rows |= {row.id: row for row in connection.execute(statement.where(end.in_(chunk)))}
    copies: list[Association] = []
    ends: dict[str, int] = {}
    filled: set[int] = set()
    for number in sorted(rows):
        row = rows[number]
        copy = submit.new_association(
            by_row.get(row.source_id, row.source), by_row.get(row.target_id, row.target), policy
        )
        before = cast(Association, ebrim.decode_object(xml.parse(row.xml)))
        copy = replace(copy, type=before.type, documentation=before.documentation, extra_slots=before.extra_slots)
        copies.append(copy)
        if row.source_kind == Kind.FOLDER:
            copies.append(submit.new_association(submission_set.entry_uuid, copy.entry_uuid, policy))
            filled |= {row.source_id} - by_row.keys()
        ends |= {row.source: row.source_id, row.target: row.target_id}
    return tuple(copies), ends, filled


def _apply_statuses(connection: Connection, operations: Operations, state: _State, submission: Submission) -> None:
    updated = {item.logical_id: item for item in versioned_objects(submission)}
    symbolic = {before.entry_uuid: before.logical_id for before, _ in operations.versions}
    for association in operations.statuses:
        logical_id = symbolic.get(association.target)
        if logical_id is None:
            logical_id = state.by_uuid[association.target].logical_id
        # Of an object that this submission updates too, the new version gets the status (3.57.4.1.3.1).
        if logical_id in updated:
            row = select(ObjectRow.id).where(ObjectRow.entry_uuid == updated[logical_id].entry_uuid)
            number = connection.scalars(row).one()
        else:
            number = state.by_uuid[association.target].id
        _set_status(connection, {number}, association.new_status)


def _set_status(connection: Connection, numbers: set[int], urn: str) -> None:
    submit.rewrite(connection, numbers, {"status": STATUS_OF_URN[urn]}, availability_status=urn)


def _apply_associations(
    connection: Connection,
    operations: Operations,
    state: _State,
    entry_uuids: Mapping[str, str],
    now: datetime,
) -> None:
    """Have new associations the effects that they have in a registration (TF-2 3.42.4.1.3.5, .6)."""
    deprecated, filled = set(), set()
    for association, _ in operations.associations:
        source, target = state.by_uuid.get(association.source), state.by_uuid.get(association.target)
        if association.type in rules.REPLACING and target is not None:
            deprecated.add(target.id)
        if association.type == uids.HAS_MEMBER and source is not None:
            filled.add(source.id)
    if deprecated:
        submit.deprecate(connection, deprecated)
    submit.touch_folders(connection, filled, now)
