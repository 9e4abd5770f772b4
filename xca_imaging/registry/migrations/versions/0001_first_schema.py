"""The first schema: registry objects, their index tables, stored documents.

Revision ID: 0001
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_ROW_NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_PACKAGES = sa.text("kind IN ('SubmissionSet', 'Folder')")


def upgrade() -> None:
    op.create_table(
        "patients",
        sa.Column("patient_id", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("patient_id", name="pk_patients"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "registry_objects",
        sa.Column("id", _ROW_NUMBER, nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("entry_uuid", sa.Text(), nullable=False),
        sa.Column("unique_id", sa.Text(), nullable=True),
        sa.Column("patient_id", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("xml", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_registry_objects"),
    )
    op.create_index("ix_registry_objects_patient_id_kind_status", "registry_objects", ["patient_id", "kind", "status"])
    op.create_index("ix_registry_objects_unique_id", "registry_objects", ["unique_id"])
    op.create_index("uq_registry_objects_entry_uuid", "registry_objects", ["entry_uuid"], unique=True)
    op.create_index(
        "uq_registry_objects_package_unique_id",
        "registry_objects",
        ["unique_id"],
        unique=True,
        sqlite_where=_PACKAGES,
        postgresql_where=_PACKAGES,
    )
    op.create_table(
        "stored_documents",
        sa.Column("repository_unique_id", sa.Text(), nullable=False),
        sa.Column("document_unique_id", sa.Text(), nullable=False),
        sa.Column("mime_type", sa.Text(), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("sha1", sa.Text(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("repository_unique_id", "document_unique_id", name="pk_stored_documents"),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_stored_documents_sha256", "stored_documents", ["sha256"])
    op.create_table(
        "associations",
        sa.Column("id", _ROW_NUMBER, nullable=False),
        sa.Column("type", sa.Text(), nullable=False),
        sa.Column("source_id", _ROW_NUMBER, nullable=False),
        sa.Column("target_id", _ROW_NUMBER, nullable=False),
        sa.ForeignKeyConstraint(["id"], ["registry_objects.id"], name="fk_associations_id"),
        sa.ForeignKeyConstraint(["source_id"], ["registry_objects.id"], name="fk_associations_source_id"),
        sa.ForeignKeyConstraint(["target_id"], ["registry_objects.id"], name="fk_associations_target_id"),
        sa.PrimaryKeyConstraint("id", name="pk_associations"),
    )
    op.create_index("ix_associations_source_id_type", "associations", ["source_id", "type"])
    op.create_index("ix_associations_target_id_type", "associations", ["target_id", "type"])
    op.create_table(
        "document_entries",
        sa.Column("id", _ROW_NUMBER, nullable=False),
        sa.Column("on_demand", sa.Boolean(), nullable=False),
        sa.Column("creation_time", sa.Text(), nullable=True),
        sa.Column("service_start_time", sa.Text(), nullable=True),
        sa.Column("service_stop_time", sa.Text(), nullable=True),
        sa.Column("class_code", sa.Text(), nullable=True),
        sa.Column("type_code", sa.Text(), nullable=True),
        sa.Column("format_code", sa.Text(), nullable=True),
        sa.Column("healthcare_facility_type_code", sa.Text(), nullable=True),
        sa.Column("practice_setting_code", sa.Text(), nullable=True),
        sa.Column("hash", sa.Text(), nullable=True),
        sa.Column("size", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(["id"], ["registry_objects.id"], name="fk_document_entries_id"),
        sa.PrimaryKeyConstraint("id", name="pk_document_entries"),
    )
    op.create_table(
        "folders",
        sa.Column("id", _ROW_NUMBER, nullable=False),
        sa.Column("last_update_time", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(["id"], ["registry_objects.id"], name="fk_folders_id"),
        sa.PrimaryKeyConstraint("id", name="pk_folders"),
    )
    op.create_table(
        "submission_sets",
        sa.Column("id", _ROW_NUMBER, nullable=False),
        sa.Column("source_id", sa.Text(), nullable=True),
        sa.Column("submission_time", sa.Text(), nullable=True),
        sa.Column("content_type_code", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(["id"], ["registry_objects.id"], name="fk_submission_sets_id"),
        sa.PrimaryKeyConstraint("id", name="pk_submission_sets"),
    )
    op.create_table(
        "document_authors",
        sa.Column("document_id", _ROW_NUMBER, nullable=False),
        sa.Column("person", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["document_id"], ["document_entries.id"], name="fk_document_authors_document_id"),
        sa.PrimaryKeyConstraint("document_id", "person", name="pk_document_authors"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "document_confidentiality_codes",
        sa.Column("document_id", _ROW_NUMBER, nullable=False),
        sa.Column("code", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["document_id"], ["document_entries.id"], name="fk_document_confidentiality_codes_document_id"
        ),
        sa.PrimaryKeyConstraint("document_id", "code", name="pk_document_confidentiality_codes"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "document_event_codes",
        sa.Column("document_id", _ROW_NUMBER, nullable=False),
        sa.Column("code", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["document_id"], ["document_entries.id"], name="fk_document_event_codes_document_id"),
        sa.PrimaryKeyConstraint("document_id", "code", name="pk_document_event_codes"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "document_reference_ids",
        sa.Column("reference_id", sa.Text(), nullable=False),
        sa.Column("document_id", _ROW_NUMBER, nullable=False),
        sa.ForeignKeyConstraint(["document_id"], ["document_entries.id"], name="fk_document_reference_ids_document_id"),
        sa.PrimaryKeyConstraint("reference_id", "document_id", name="pk_document_reference_ids"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "folder_codes",
        sa.Column("folder_id", _ROW_NUMBER, nullable=False),
        sa.Column("code", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["folder_id"], ["folders.id"], name="fk_folder_codes_folder_id"),
        sa.PrimaryKeyConstraint("folder_id", "code", name="pk_folder_codes"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "submission_set_authors",
        sa.Column("submission_set_id", _ROW_NUMBER, nullable=False),
        sa.Column("person", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["submission_set_id"], ["submission_sets.id"], name="fk_submission_set_authors_submission_set_id"
        ),
        sa.PrimaryKeyConstraint("submission_set_id", "person", name="pk_submission_set_authors"),
        sqlite_with_rowid=False,
    )
