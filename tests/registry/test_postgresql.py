"""What is PostgreSQL's own: its schema, its lock, its connections."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from tests.registry import postgresql
from tests.registry.samples import OTHER_PATIENT, document, submission
from xca_imaging import errors
from xca_imaging.registry import Registry
from xca_imaging.registry.database import Database
from xca_imaging.registry.tables import Base

pytestmark = [pytest.mark.peer, pytest.mark.slow]


@pytest.fixture
def url(postgresql_server: str) -> Iterator[str]:
    with postgresql.database(postgresql_server) as address:
        yield address


def test_the_migrations_make_the_schema_that_the_tables_describe(registry: Registry) -> None:
    with registry.database.reading() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []


def test_a_writer_that_gets_no_turn_is_told_to_come_later(url: str) -> None:
    database, other = Database(url), Database(url, busy_timeout=0.05)
    with database.writing(), pytest.raises(errors.RegistryBusy), other.writing():
        pass
    with other.writing():
        pass
    database.close()
    other.close()


def test_a_server_that_is_gone_is_not_available_and_found_again(registry: Registry, url: str) -> None:
    registry.register(submission(document()))
    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    registry.register(submission(document(patient_id=OTHER_PATIENT), patient_id=OTHER_PATIENT))
