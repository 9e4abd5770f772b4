"""The Document Registry actor: what the gateway calls. Synchronous and thread-safe.

References
----------
* IHE ITI TF-1, 10.1.1.3 (Document Registry); TF-2, 3.18 (ITI-18), 3.42 (ITI-42)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import cast

from sqlalchemy import Connection, select

from xca_imaging import errors, uids
from xca_imaging.metadata import ebrim
from xca_imaging.metadata.model import DocumentEntry, Submission
from xca_imaging.metadata.stored_query import StoredQuery
from xca_imaging.metadata.validate import validate_submission
from xca_imaging.metadata.vocabulary import ANY, Vocabulary
from xca_imaging.registry import patients, search, submit
from xca_imaging.registry.database import Database
from xca_imaging.registry.rules import Policy
from xca_imaging.registry.search import Found
from xca_imaging.registry.submit import Registered
from xca_imaging.registry.tables import DocumentEntryRow, ObjectRow, ReferenceIdRow, Status
from xca_imaging.wire import xml

MAX_RESULTS = 5000
"""Most objects of a LeafClass answer: 5000 entries are some 30 MB of XML, what a peer's parser still takes."""


def _utc_now() -> datetime:
    return datetime.now(UTC)


class Registry:
    """A Document Registry over one database; `open` makes one."""

    # Mutable state: none of its own; the database has its lock and its pool.

    def __init__(
        self,
        database: Database,
        policy: Policy,
        *,
        max_results: int = MAX_RESULTS,
        now: Callable[[], datetime] = _utc_now,
    ) -> None:
        self.database = database
        self.policy = policy
        self.now = now
        self._max_results = max_results

    @classmethod
    def open(
        cls,
        url: str,
        *,
        home_community_id: str,
        assigning_authorities: Sequence[str] = (),
        strict_patients: bool = False,
        vocabulary: Vocabulary = ANY,
        max_results: int = MAX_RESULTS,
        now: Callable[[], datetime] = _utc_now,
    ) -> Registry:
        """Open the registry of a database URL and bring its schema up to date.

        Parameters
        ----------
        url : str
            `sqlite:///file` or `postgresql+psycopg://...`.
        home_community_id : str
            Set on every object that is registered.
        assigning_authorities : sequence of str
            Accepted patient identifier domains (OIDs); empty accepts any.
        strict_patients : bool
            Only patients known by feed (`add_patients`) may be registered.
        vocabulary : Vocabulary
            Codes and media types that are allowed.
        max_results : int
            Most objects of a LeafClass answer, 0 for no limit.
        now : callable
            The clock behind Folder.lastUpdateTime, in UTC.
        """
        policy = Policy(home_community_id, frozenset(assigning_authorities), strict_patients, vocabulary)
        database = Database(url)
        try:
            database.migrate()
        except BaseException:
            database.close()
            raise
        return cls(database, policy, max_results=max_results, now=now)

    def register(
        self,
        submission: Submission,
        *,
        on_demand: bool = False,
        beside: Callable[[Connection], None] = lambda connection: None,
    ) -> Registered:
        """Register a submission (ITI-42), durably and as a whole, or refuse it as a whole.

        Parameters
        ----------
        on_demand : bool
            The transaction registers on-demand entries (ITI-61) and no others; ITI-42 the others.
        beside : callable
            Writes what belongs to the registration in its database transaction.

        Raises
        ------
        errors.SubmissionRefused
            With all that is wrong in the message, or with all that is wrong with it in this registry.
        """
        problems = validate_submission(submission, vocabulary=self.policy.vocabulary)
        kind, other = ("stable", "ITI-42") if on_demand else ("on-demand", "ITI-61")
        problems += [
            errors.RegistryMetadataError(f"DocumentEntry {entry.entry_uuid} is {kind}: it needs {other}")
            for entry in submission.documents
            if (entry.object_type == uids.ON_DEMAND_DOCUMENT) is not on_demand
        ]
        if problems:
            raise errors.SubmissionRefused(problems)
        with self.database.writing() as connection:
            registered = submit.apply(connection, submission, self.policy, self.now())
            beside(connection)
            return registered

    def query(self, query: StoredQuery) -> Found:
        """Return what a stored query finds (ITI-18); see `search.search` for the errors."""
        return search.search(
            self.database, query, home_community_id=self.policy.home_community_id, max_results=self._max_results
        )

    def documents_of_study(self, study_instance_uid: str) -> tuple[DocumentEntry, ...]:
        """Return the approved manifests of a study: KOS entries whose reference ids name it, oldest first."""
        reference = f"{study_instance_uid}^^^^{uids.REFERENCE_STUDY_INSTANCE_UID}"
        statement = (
            select(ObjectRow.xml)
            .join(ReferenceIdRow, ReferenceIdRow.document_id == ObjectRow.id)
            .join(DocumentEntryRow, DocumentEntryRow.id == ObjectRow.id)
            .where(
                ReferenceIdRow.reference_id == reference,
                ObjectRow.status == Status.APPROVED,
                # The coding scheme of the SOP class is not always the right one in the field; the code tells.
                DocumentEntryRow.format_code.startswith(f"{uids.KOS_SOP_CLASS}^^", autoescape=True),
            )
            .order_by(ObjectRow.id)
        )
        with self.database.reading() as connection:
            leaves = connection.scalars(statement).all()
        return tuple(cast(DocumentEntry, ebrim.decode_object(xml.parse(leaf))) for leaf in leaves)

    def add_patients(self, patient_ids: Sequence[str]) -> None:
        """Make patients known, as an identity feed does (ITI-8, ITI-44)."""
        with self.database.writing() as connection:
            patients.add(connection, patient_ids)

    def current_patient_id(self, patient_id: str) -> str:
        """Return the id that stands for a patient now: the surviving one where it was merged, else itself."""
        with self.database.reading() as connection:
            return patients.current(connection, patient_id)

    def check(self) -> None:
        """Ask the database for nothing: it answers, or the error of its driver is raised."""
        with self.database.reading() as connection:
            connection.execute(select(1))

    def close(self) -> None:
        """Close the database; calls that run are not waited for."""
        self.database.close()
