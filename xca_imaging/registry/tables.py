"""The registry's tables: what stored queries filter on, and each object's own ebRIM XML beside it.

`registry_objects` has one row per DocumentEntry, SubmissionSet, Folder and Association: identity, patient, status and
the XML that a LeafClass answer repeats. The other tables hold what queries compare, keyed by the same number. So a
query walks narrow rows and reads the XML only of what it returns.

Sized for ten million documents: short statuses instead of URNs, associations as pairs of numbers, codes as the one
string in which a stored query spells them, times padded to a fixed length so that text order is time order. All that
is registered is indexed from the first day, also what only later queries ask for: a new query must not need the XML
of old entries to be read again.

References
----------
* IHE ITI TF-3, 4.2.3 (attributes); IHE ITI TF-2, 3.18.4.1.2.3.7 (what queries filter on)
"""

from __future__ import annotations

import enum
from datetime import datetime

from sqlalchemy import BigInteger, ForeignKey, Index, Integer, LargeBinary, MetaData, Text, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from xca_imaging import uids
from xca_imaging.metadata.model import Code

# SQLite makes only a column of type INTEGER the row's own number; PostgreSQL's INTEGER ends at two thousand million.
RowNumber = BigInteger().with_variant(Integer, "sqlite")


class Kind(enum.StrEnum):
    """What a registry object is; `registry_objects.kind`."""

    DOCUMENT_ENTRY = "DocumentEntry"
    SUBMISSION_SET = "SubmissionSet"
    FOLDER = "Folder"
    ASSOCIATION = "Association"


class Status(enum.StrEnum):
    """availabilityStatus without its URN prefix; `registry_objects.status`."""

    APPROVED = "Approved"
    DEPRECATED = "Deprecated"


STATUS_OF_URN = {uids.APPROVED: Status.APPROVED, uids.DEPRECATED: Status.DEPRECATED}


class PatientStatus(enum.StrEnum):
    """Whether a patient id is in use; `patients.status`."""

    ACTIVE = "Active"
    MERGED = "Merged"


class Base(DeclarativeBase):
    """Declarative base; constraint names are fixed, so that migrations can name them on every database."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


_FIRST_PACKAGES = text("kind IN ('SubmissionSet', 'Folder') AND version = 1")


class ObjectRow(Base):
    """One registry object of any kind; each version of it is a row of its own."""

    __tablename__ = "registry_objects"

    id: Mapped[int] = mapped_column(RowNumber, primary_key=True)
    kind: Mapped[str] = mapped_column(Text)
    entry_uuid: Mapped[str] = mapped_column(Text)
    unique_id: Mapped[str | None] = mapped_column(Text)
    """uniqueId; an association has none."""
    patient_id: Mapped[str] = mapped_column(Text)
    """CX; an association's is that of its submission set."""
    status: Mapped[str] = mapped_column(Text)
    xml: Mapped[bytes] = mapped_column(LargeBinary)
    """ebRIM element as UTF-8 with its own namespace declarations. After the columns that queries read: long values
    leave the row's page, and what stands behind them is slow to reach."""
    logical_id: Mapped[str] = mapped_column(Text, server_default="")
    """entryUUID of the object's first version, the same for all its versions (ITI-57)."""
    version: Mapped[int] = mapped_column(Integer, server_default="1")
    """VersionInfo/@versionName: 1 for what was registered, one more with each update."""

    __table_args__ = (
        Index("uq_registry_objects_entry_uuid", "entry_uuid", unique=True),
        Index("ix_registry_objects_patient_id_kind_status", "patient_id", "kind", "status"),
        Index("ix_registry_objects_unique_id", "unique_id"),
        Index("ix_registry_objects_logical_id", "logical_id"),
        # Several DocumentEntries may share a uniqueId (TF-2 3.42.4.1.3.3.1); submission sets and folders may not,
        # but for the versions of one folder.
        Index(
            "uq_registry_objects_package_unique_id",
            "unique_id",
            unique=True,
            sqlite_where=_FIRST_PACKAGES,
            postgresql_where=_FIRST_PACKAGES,
        ),
    )


class DocumentEntryRow(Base):
    """What queries compare of a DocumentEntry: single values."""

    __tablename__ = "document_entries"

    id: Mapped[int] = mapped_column(RowNumber, ForeignKey("registry_objects.id"), primary_key=True)
    on_demand: Mapped[bool]
    creation_time: Mapped[str | None] = mapped_column(Text)
    service_start_time: Mapped[str | None] = mapped_column(Text)
    service_stop_time: Mapped[str | None] = mapped_column(Text)
    class_code: Mapped[str | None] = mapped_column(Text)
    type_code: Mapped[str | None] = mapped_column(Text)
    format_code: Mapped[str | None] = mapped_column(Text)
    healthcare_facility_type_code: Mapped[str | None] = mapped_column(Text)
    practice_setting_code: Mapped[str | None] = mapped_column(Text)
    hash: Mapped[str | None] = mapped_column(Text)
    size: Mapped[int | None] = mapped_column(BigInteger)
    availability: Mapped[str | None] = mapped_column(Text)
    """documentAvailability, as the URN that it is; None counts as online."""

    __table_args__ = (
        # Queries for many patients may start from one of these (TF-2 3.51.4.1.2.3).
        Index("ix_document_entries_class_code", "class_code"),
        Index("ix_document_entries_healthcare_facility_type_code", "healthcare_facility_type_code"),
    )


class EventCodeRow(Base):
    """A DocumentEntry's eventCodeList."""

    __tablename__ = "document_event_codes"
    __table_args__ = (
        Index("ix_document_event_codes_code", "code"),
        {"sqlite_with_rowid": False},
    )

    document_id: Mapped[int] = mapped_column(RowNumber, ForeignKey("document_entries.id"), primary_key=True)
    code: Mapped[str] = mapped_column(Text, primary_key=True)


class ConfidentialityCodeRow(Base):
    """A DocumentEntry's confidentialityCodes."""

    __tablename__ = "document_confidentiality_codes"
    __table_args__ = ({"sqlite_with_rowid": False},)

    document_id: Mapped[int] = mapped_column(RowNumber, ForeignKey("document_entries.id"), primary_key=True)
    code: Mapped[str] = mapped_column(Text, primary_key=True)


class DocumentAuthorRow(Base):
    """A DocumentEntry's authorPersons."""

    __tablename__ = "document_authors"
    __table_args__ = ({"sqlite_with_rowid": False},)

    document_id: Mapped[int] = mapped_column(RowNumber, ForeignKey("document_entries.id"), primary_key=True)
    person: Mapped[str] = mapped_column(Text, primary_key=True)


class ReferenceIdRow(Base):
    """A DocumentEntry's referenceIdList; keyed by the value first, because it is also where a search starts."""

    __tablename__ = "document_reference_ids"
    __table_args__ = ({"sqlite_with_rowid": False},)

    reference_id: Mapped[str] = mapped_column(Text, primary_key=True)
    document_id: Mapped[int] = mapped_column(RowNumber, ForeignKey("document_entries.id"), primary_key=True)


class SubmissionSetRow(Base):
    """What queries compare of a SubmissionSet: single values."""

    __tablename__ = "submission_sets"

    id: Mapped[int] = mapped_column(RowNumber, ForeignKey("registry_objects.id"), primary_key=True)
    source_id: Mapped[str | None] = mapped_column(Text)
    submission_time: Mapped[str | None] = mapped_column(Text)
    content_type_code: Mapped[str | None] = mapped_column(Text)


class SubmissionSetAuthorRow(Base):
    """A SubmissionSet's authorPersons."""

    __tablename__ = "submission_set_authors"
    __table_args__ = ({"sqlite_with_rowid": False},)

    submission_set_id: Mapped[int] = mapped_column(RowNumber, ForeignKey("submission_sets.id"), primary_key=True)
    person: Mapped[str] = mapped_column(Text, primary_key=True)


class FolderRow(Base):
    """What queries compare of a Folder: single values."""

    __tablename__ = "folders"

    id: Mapped[int] = mapped_column(RowNumber, ForeignKey("registry_objects.id"), primary_key=True)
    last_update_time: Mapped[str | None] = mapped_column(Text)


class FolderCodeRow(Base):
    """A Folder's codeList."""

    __tablename__ = "folder_codes"
    __table_args__ = (
        Index("ix_folder_codes_code", "code"),
        {"sqlite_with_rowid": False},
    )

    folder_id: Mapped[int] = mapped_column(RowNumber, ForeignKey("folders.id"), primary_key=True)
    code: Mapped[str] = mapped_column(Text, primary_key=True)


class AssociationRow(Base):
    """An Association: both ends are always registered objects."""

    __tablename__ = "associations"
    __table_args__ = (
        Index("ix_associations_source_id_type", "source_id", "type"),
        Index("ix_associations_target_id_type", "target_id", "type"),
    )

    id: Mapped[int] = mapped_column(RowNumber, ForeignKey("registry_objects.id"), primary_key=True)
    type: Mapped[str] = mapped_column(Text)
    source_id: Mapped[int] = mapped_column(RowNumber, ForeignKey("registry_objects.id"))
    target_id: Mapped[int] = mapped_column(RowNumber, ForeignKey("registry_objects.id"))


class PatientRow(Base):
    """A patient id known by an identity feed (ITI-8, ITI-44).

    Who is not here may be registered all the same, unless `registry.strict_patients` is set; who has been merged into
    another may not. The objects of a merged patient have been re-linked to the survivor: queries need not look here.
    """

    __tablename__ = "patients"
    __table_args__ = (
        Index("ix_patients_merged_into", "merged_into"),
        {"sqlite_with_rowid": False},
    )

    patient_id: Mapped[str] = mapped_column(Text, primary_key=True)
    status: Mapped[str] = mapped_column(Text, server_default=PatientStatus.ACTIVE)
    merged_into: Mapped[str | None] = mapped_column(Text)
    """The surviving patient id, when `status` is Merged. It may have been merged into another later."""


class EventRow(Base):
    """What happened to registered objects and patients, with the facts that an audit message needs."""

    __tablename__ = "registry_events"
    __table_args__ = (
        Index("ix_registry_events_time", "time"),
        Index("ix_registry_events_patient_id", "patient_id"),
    )

    id: Mapped[int] = mapped_column(RowNumber, primary_key=True)
    time: Mapped[str] = mapped_column(Text)
    """DTM in UTC."""
    transaction: Mapped[str] = mapped_column(Text)
    """`ITI-57`, `ITI-62`, `ITI-44`, ..."""
    action: Mapped[str] = mapped_column(Text)
    """What was done, in one word of that transaction: `update`, `remove`, `merge`, ..."""
    patient_id: Mapped[str | None] = mapped_column(Text)
    facts: Mapped[str] = mapped_column(Text)
    """JSON object: ids before and after, as the transaction defines them."""


class StoredDocumentRow(Base):
    """A document in a repository of this node. Its content lies on disk under its SHA-256."""

    __tablename__ = "stored_documents"
    __table_args__ = (
        Index("ix_stored_documents_sha256", "sha256"),
        {"sqlite_with_rowid": False},
    )

    repository_unique_id: Mapped[str] = mapped_column(Text, primary_key=True)
    document_unique_id: Mapped[str] = mapped_column(Text, primary_key=True)
    mime_type: Mapped[str] = mapped_column(Text)
    size: Mapped[int] = mapped_column(BigInteger)
    sha1: Mapped[str] = mapped_column(Text)
    sha256: Mapped[str] = mapped_column(Text)


def code_key(code: Code) -> str:
    """Return a coded value as stored queries spell it: `code^^scheme` (TF-2 3.18.4.1.2.3.4)."""
    return f"{code.code}^^{code.scheme}"


def time_key(dtm: str) -> str:
    """Return a DTM padded to `YYYYMMDDhhmmss`, so that times of different precision compare as text.

    What a DTM leaves out counts as its first instant (2024 is 20240101000000): the From bound of a range includes it,
    the To bound excludes it (TF-2 3.18.4.1.2.3.3).
    """
    return dtm[:14] + "00000101000000"[len(dtm) :]


def dtm(moment: datetime) -> str:
    """Return a moment in UTC as DTM."""
    return moment.strftime("%Y%m%d%H%M%S")
