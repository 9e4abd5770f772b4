"""Databases of each released revision are brought up, with what is in them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from alembic.script import ScriptDirectory
from sqlalchemy import text

from tests.registry.samples import HOME, PATIENT, decoded, document, submission
from xca_imaging import uids
from xca_imaging.metadata import ebrim
from xca_imaging.metadata.model import SubmissionSet
from xca_imaging.metadata.stored_query import FindDocuments, StoredQuery
from xca_imaging.registry import Registry
from xca_imaging.registry.database import MIGRATIONS, Database
from xca_imaging.wire import xml

OFFLINE = "urn:ihe:iti:2010:DocumentAvailability:Offline"
PACKAGE = SubmissionSet(
    entry_uuid="urn:uuid:00000000-0000-4000-8000-000000000001", unique_id="2.25.1", patient_id=PATIENT
)
ENTRIES = [
    document(entry_uuid=f"urn:uuid:00000000-0000-4000-8000-00000000000{number}", document_availability=availability)
    for number, availability in ((2, ""), (3, OFFLINE))
]


def write_0001(database: Database) -> None:
    """Write objects as the registry of revision 0001 did."""
    with database.writing() as connection:
        for item in [PACKAGE, *ENTRIES]:
            number = connection.scalar(
                text(
                    "INSERT INTO registry_objects (kind, entry_uuid, unique_id, patient_id, status, xml)"
                    " VALUES (:kind, :entry_uuid, :unique_id, :patient_id, 'Approved', :xml) RETURNING id"
                ),
                {
                    "kind": type(item).__name__,
                    "entry_uuid": item.entry_uuid,
                    "unique_id": item.unique_id,
                    "patient_id": item.patient_id,
                    "xml": xml.serialize(ebrim.encode_object(item)),
                },
            )
            if item in ENTRIES:
                connection.execute(
                    text("INSERT INTO document_entries (id, on_demand) VALUES (:id, :no)"), {"id": number, "no": False}
                )
        connection.execute(text("INSERT INTO patients VALUES (:id)"), {"id": PATIENT})


WRITERS = {"0001": write_0001}


def test_each_revision_but_the_last_has_data_to_be_brought_up() -> None:
    script = ScriptDirectory(str(MIGRATIONS))
    assert {each.revision for each in script.walk_revisions()} - {script.get_current_head()} == set(WRITERS)


@pytest.mark.parametrize(("revision", "write"), WRITERS.items())
def test_a_database_of_an_older_revision_is_brought_up(
    url: str, revision: str, write: Callable[[Database], None]
) -> None:
    database = Database(url)
    database.migrate(revision)
    write(database)
    database.close()

    registry = Registry.open(url, home_community_id=HOME, strict_patients=True)
    found = registry.query(StoredQuery(FindDocuments(patient_id=PATIENT, status=(uids.APPROVED,))))
    assert decoded(found.fragments) == ENTRIES
    with registry.database.reading() as connection:
        rows = connection.execute(text("SELECT entry_uuid, logical_id, version FROM registry_objects ORDER BY id"))
        assert [tuple(row) for row in rows] == [(item.entry_uuid, item.entry_uuid, 1) for item in [PACKAGE, *ENTRIES]]
        rows = connection.execute(text("SELECT availability FROM document_entries ORDER BY id"))
        assert [row.availability for row in rows] == [None, OFFLINE]
        assert connection.execute(text("SELECT * FROM patients")).one() == (PATIENT, "Active", None)
    registry.register(submission(document()))  # the patient is still known by feed
    registry.close()
