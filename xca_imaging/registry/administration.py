"""What changes a registry beside registrations: updates, removals, on-demand entries, patients.

Synchronous and thread-safe, as `Registry`. Each call is one database transaction, and leaves an event (`events`):
what was done with the change itself, what was refused on its own.

References
----------
* IHE ITI TF-2, 3.8 (ITI-8), 3.44 (ITI-44), 3.61 (ITI-61); XDS Metadata Update, 3.57 (ITI-57); Remove Metadata and
  Documents, 3.62 (ITI-62)
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import cast

from sqlalchemy import select

from xca_imaging.errors import RegistryError, Retry, SubmissionRefused
from xca_imaging.metadata import ebrim
from xca_imaging.metadata.model import DocumentEntry, Submission
from xca_imaging.registry import events, patients, remove, update
from xca_imaging.registry.document_registry import Registry
from xca_imaging.registry.events import Requester
from xca_imaging.registry.patients import Change
from xca_imaging.registry.provide import Repository
from xca_imaging.registry.remove import Removed
from xca_imaging.registry.submit import Registered
from xca_imaging.registry.tables import DocumentEntryRow, Kind, ObjectRow, Status
from xca_imaging.transactions.identity_feed import Added, Feed, FeedMessage, FeedRefused, Merged, Revised
from xca_imaging.wire import xml

log = logging.getLogger(__name__)

_FEED_ACTIONS: Mapping[type[Feed], str] = {Added: "add", Revised: "revise", Merged: "merge"}


class Administration:
    """A registry as its administrators and identity sources see it."""

    # Mutable state: none of its own.

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def update(self, submission: Submission, requester: Requester) -> Registered:
        """Change registered metadata (ITI-57), as a whole or not at all.

        Raises
        ------
        errors.SubmissionRefused
            With all that is wrong in the message, or with all that is wrong with it in this registry.
        """
        with self._refusals("ITI-57", "update", requester, _patient_of(submission), _objects_of(submission)):
            operations = update.read_operations(submission, self._registry.policy.vocabulary)
            with self._registry.database.writing() as connection:
                now = self._registry.now()
                registered = update.apply(connection, operations, self._registry.policy, now)
                events.record(
                    connection,
                    now=now,
                    transaction="ITI-57",
                    action="update",
                    requester=requester,
                    patient_id=_patient_of(submission),
                    objects=[
                        *(f"{item.logical_id}" for item, _ in operations.versions),
                        *(registered.entry_uuids.get(each.target, each.target) for each in operations.statuses),
                        *(registered.entry_uuids[each.entry_uuid] for each, _ in operations.associations),
                    ],
                    submission_set=operations.submission_set.unique_id,
                )
                return registered

    def register_on_demand(self, submission: Submission, requester: Requester) -> Registered:
        """Register on-demand entries (ITI-61), as a whole or not at all.

        Raises
        ------
        errors.SubmissionRefused
            As a registration; also for an entry that is a stable document's.
        """
        with self._refusals("ITI-61", "register", requester, _patient_of(submission), _objects_of(submission)):
            record = partial(
                events.record,
                now=self._registry.now(),
                transaction="ITI-61",
                action="register",
                requester=requester,
                patient_id=_patient_of(submission),
                objects=[entry.unique_id for entry in submission.documents],
                submission_set=submission.submission_sets[0].unique_id if submission.submission_sets else "",
            )
            return self._registry.register(submission, on_demand=True, beside=record)

    def remove(self, entry_uuids: Sequence[str], requester: Requester) -> list[Removed]:
        """Remove objects for good (ITI-62), all of them or none.

        Raises
        ------
        errors.SubmissionRefused
            With everything that forbids it.
        """
        with (
            self._refusals("ITI-62", "remove", requester, "", entry_uuids),
            self._registry.database.writing() as connection,
        ):
            removed = remove.apply(connection, entry_uuids)
            now = self._registry.now()
            for patient_id in dict.fromkeys(each.patient_id for each in removed):
                of_patient = [each for each in removed if each.patient_id == patient_id]
                documents = [each.unique_id for each in of_patient if each.kind == Kind.DOCUMENT_ENTRY]
                events.record(
                    connection,
                    now=now,
                    transaction="ITI-62",
                    action="remove",
                    requester=requester,
                    patient_id=patient_id,
                    objects=[each.entry_uuid for each in of_patient],
                    documents=" ".join(documents),
                )
            return removed

    def remove_document(self, repository: Repository, document_unique_id: str, requester: Requester) -> None:
        """Remove a document from a repository of this node (ITI-86); see `Repository.remove` for the errors."""
        with self._refusals("ITI-86", "remove", requester, "", [document_unique_id]):
            repository.remove(document_unique_id, requester)

    def feed(self, message: FeedMessage, transaction: str, requester: Requester) -> list[Change]:
        """Apply a message of an identity feed (ITI-8, ITI-44).

        Raises
        ------
        FeedRefused
            It cannot be; nothing has changed.
        """
        action = _FEED_ACTIONS[type(message.feed)]
        ids = (*message.feed.patient_ids, *getattr(message.feed, "subsumed", ()))
        try:
            with self._registry.database.writing() as connection:
                changes = patients.apply(connection, message.feed, self._registry.policy)
                now = self._registry.now()
                for change in changes:
                    events.record(
                        connection,
                        now=now,
                        transaction=transaction,
                        action=change.action,
                        requester=requester,
                        patient_id=change.survivor or change.patient_id,
                        objects=[change.patient_id],
                        source_message_id=message.message_id,
                        **({"relinked": str(change.objects)} if change.survivor else {}),
                    )
                return changes
        except FeedRefused as problem:
            self._record_refusal(transaction, action, requester, ids[0], ids, str(problem))
            raise

    def on_demand_entry(self, repository_unique_id: str, document_unique_id: str) -> DocumentEntry | None:
        """Return the approved on-demand entry of a document, the newest where there are several."""
        statement = (
            select(ObjectRow.xml)
            .join(DocumentEntryRow, DocumentEntryRow.id == ObjectRow.id)
            .where(
                ObjectRow.unique_id == document_unique_id,
                ObjectRow.status == Status.APPROVED,
                DocumentEntryRow.on_demand,
            )
            .order_by(ObjectRow.id.desc())
        )
        with self._registry.database.reading() as connection:
            for leaf in connection.scalars(statement):
                entry = cast(DocumentEntry, ebrim.decode_object(xml.parse(leaf)))
                if entry.repository_unique_id == repository_unique_id:
                    return entry
        return None

    def record_retrieval(self, entry: DocumentEntry, new_unique_id: str, requester: Requester, *, kept: bool) -> None:
        """Leave the event of an on-demand document that was made: what was asked for, and what was given."""
        with self._registry.database.writing() as connection:
            events.record(
                connection,
                now=self._registry.now(),
                transaction="ITI-43",
                action="retrieve on demand",
                requester=requester,
                patient_id=entry.patient_id,
                objects=[entry.unique_id, new_unique_id],
                persisted="true" if kept else "false",
            )

    @contextmanager
    def _refusals(
        self, transaction: str, action: str, requester: Requester, patient_id: str, objects: Sequence[str]
    ) -> Iterator[None]:
        """Leave the event of what is refused inside; nothing has changed then."""
        try:
            yield
        except (SubmissionRefused, RegistryError) as problem:
            if problem.retry is Retry.NEVER:  # else the database is busy, full or away: it takes no event either
                codes = problem.errors if isinstance(problem, SubmissionRefused) else (problem,)
                reason = " ".join(dict.fromkeys(each.code for each in codes))
                self._record_refusal(transaction, action, requester, patient_id, objects, reason)
            raise

    def _record_refusal(
        self,
        transaction: str,
        action: str,
        requester: Requester,
        patient_id: str,
        objects: Sequence[str],
        reason: str,
    ) -> None:
        try:
            with self._registry.database.writing() as connection:
                events.record(
                    connection,
                    now=self._registry.now(),
                    transaction=transaction,
                    action=action,
                    requester=requester,
                    patient_id=patient_id,
                    objects=objects[:100],
                    outcome="refused",
                    reason=reason,
                )
        except RegistryError as exc:
            # The reason for the refusal is not to be lost over it.
            log.warning("the event of a refused %s could not be kept: %s", transaction, exc)


def _patient_of(submission: Submission) -> str:
    return submission.submission_sets[0].patient_id if submission.submission_sets else ""


def _objects_of(submission: Submission) -> list[str]:
    return [item.logical_id or item.entry_uuid for item in update.versioned_objects(submission)]
