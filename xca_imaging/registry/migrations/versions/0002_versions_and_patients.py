"""Versions of objects, merged patients, events, and indexes for queries over many patients.

Revision ID: 0002
"""

from xml.sax.saxutils import unescape

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_ROW_NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_FIRST_PACKAGES = sa.text("kind IN ('SubmissionSet', 'Folder') AND version = 1")
_AVAILABILITY = b'name="documentAvailability"'


def upgrade() -> None:
    op.add_column("registry_objects", sa.Column("logical_id", sa.Text(), nullable=False, server_default=""))
    op.add_column("registry_objects", sa.Column("version", sa.Integer(), nullable=False, server_default="1"))
    op.execute("UPDATE registry_objects SET logical_id = entry_uuid")  # what was registered so far is a first version
    op.create_index("ix_registry_objects_logical_id", "registry_objects", ["logical_id"])
    op.drop_index("uq_registry_objects_package_unique_id", "registry_objects")
    op.create_index(
        "uq_registry_objects_package_unique_id",
        "registry_objects",
        ["unique_id"],
        unique=True,
        sqlite_where=_FIRST_PACKAGES,
        postgresql_where=_FIRST_PACKAGES,
    )
    op.add_column("document_entries", sa.Column("availability", sa.Text(), nullable=True))
    _read_availability()
    op.create_index("ix_document_entries_class_code", "document_entries", ["class_code"])
    op.create_index(
        "ix_document_entries_healthcare_facility_type_code", "document_entries", ["healthcare_facility_type_code"]
    )
    op.create_index("ix_document_event_codes_code", "document_event_codes", ["code"])
    op.create_index("ix_folder_codes_code", "folder_codes", ["code"])
    op.add_column("patients", sa.Column("status", sa.Text(), nullable=False, server_default="Active"))
    op.add_column("patients", sa.Column("merged_into", sa.Text(), nullable=True))
    op.create_index("ix_patients_merged_into", "patients", ["merged_into"])
    op.create_table(
        "registry_events",
        sa.Column("id", _ROW_NUMBER, nullable=False),
        sa.Column("time", sa.Text(), nullable=False),
        sa.Column("transaction", sa.Text(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("patient_id", sa.Text(), nullable=True),
        sa.Column("facts", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_registry_events"),
    )
    op.create_index("ix_registry_events_time", "registry_events", ["time"])
    op.create_index("ix_registry_events_patient_id", "registry_events", ["patient_id"])


def _read_availability() -> None:
    """Fill the new column from the XML of the few entries that say anything of it."""
    connection = op.get_bind()
    objects = sa.table("registry_objects", sa.column("id"), sa.column("kind"), sa.column("xml", sa.LargeBinary()))
    entries = sa.table("document_entries", sa.column("id"), sa.column("availability"))
    last = 0
    while True:
        page = connection.execute(
            sa.select(objects.c.id, objects.c.xml)
            .where(objects.c.id > last, objects.c.kind == "DocumentEntry")
            .order_by(objects.c.id)
            .limit(1000)
        ).all()
        if not page:
            return
        last = page[-1].id
        for row in page:
            # The registry wrote this XML itself, always in the same form.
            _, found, rest = row.xml.partition(_AVAILABILITY)
            if found:
                value = unescape(rest.partition(b"<rim:Value>")[2].partition(b"</rim:Value>")[0].decode())
                connection.execute(entries.update().where(entries.c.id == row.id).values(availability=value))
