"""Migrations, durability settings, one writer at a time, and what the database's errors mean."""

from __future__ import annotations

import sqlite3
import stat
import threading
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, inspect, text

from tests.registry.samples import HOME, document, submission
from xca_imaging import errors
from xca_imaging.registry import Registry
from xca_imaging.registry.database import Database, chunks
from xca_imaging.registry.tables import Base


@pytest.fixture
def url(tmp_path: Path) -> str:
    """SQLite's: what is PostgreSQL's own has a file of its own."""
    return f"sqlite:///{tmp_path / 'registry.db'}"


def schema(path: Path) -> dict[str, str]:
    """Return the definition of every table and index, with white space levelled and constraints in order."""
    with sqlite3.connect(path) as connection:
        rows = connection.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    connection.close()
    return {name: "".join(sorted(" ".join(sql.split()).replace(",", " "))) for name, sql in rows}


def test_the_migrations_make_the_schema_that_the_tables_describe(registry: Registry, tmp_path: Path) -> None:
    with registry.database.reading() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
    # Alembic does not compare everything (WITHOUT ROWID, partial indexes): SQLite's own text does.
    engine = create_engine(f"sqlite:///{tmp_path / 'described.db'}")
    Base.metadata.create_all(engine)
    engine.dispose()
    migrated = schema(tmp_path / "registry.db")
    del migrated["alembic_version"]
    assert migrated == schema(tmp_path / "described.db")


def test_opening_again_changes_nothing(registry: Registry, url: str) -> None:
    registry.register(submission(document()))
    again = Registry.open(url, home_community_id=HOME)
    again.register(submission(document()))
    again.close()


def test_two_nodes_may_start_together_on_a_new_database(url: str) -> None:
    failures: list[BaseException] = []

    def start() -> None:
        try:
            Registry.open(url, home_community_id=HOME).close()
        except BaseException as problem:
            failures.append(problem)

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_database_of_a_newer_version_is_refused(url: str, registry: Registry) -> None:
    with registry.database.writing() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(errors.ConfigurationError, match="newer version"):
        Registry.open(url, home_community_id=HOME)


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:"])
def test_a_registry_in_memory_is_refused(url: str) -> None:
    with pytest.raises(errors.ConfigurationError, match="forgets"):
        Registry.open(url, home_community_id=HOME)


def test_commits_are_synced_and_files_are_private(registry: Registry, tmp_path: Path) -> None:
    with registry.database.reading() as connection:
        pragmas = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 20000}
    for path in tmp_path.glob("registry.db*"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_reader_sees_one_state_while_others_write(registry: Registry) -> None:
    count = text("SELECT count(*) FROM registry_objects")
    registry.register(submission(document()))
    with registry.database.reading() as connection:
        before = connection.scalar(count)
        registry.register(submission(document()))  # not blocked by the reader
        assert connection.scalar(count) == before
    with registry.database.reading() as connection:
        assert connection.scalar(count) == 2 * (before or 0)


def test_a_writer_that_gets_no_turn_is_told_to_come_later(url: str) -> None:
    database, other = Database(url, busy_timeout=0.05), Database(url, busy_timeout=0.05)
    with database.writing():
        waiting: list[BaseException] = []

        def write(to: Database) -> None:
            try:
                with to.writing():
                    pass
            except errors.RegistryError as problem:
                waiting.append(problem)

        for each in (database, other):  # this process's lock; another process's lock
            thread = threading.Thread(target=write, args=(each,))
            thread.start()
            thread.join()
        assert [type(problem) for problem in waiting] == [errors.RegistryBusy, errors.RegistryBusy]
    with other.writing():
        pass
    database.close()
    other.close()


def test_more_readers_than_connections_is_busy(url: str) -> None:
    database = Database(url, busy_timeout=0.05, pool_size=1)
    with database.reading(), pytest.raises(errors.RegistryBusy), database.reading():
        pass
    database.close()


def test_a_full_disk_is_out_of_resources_and_loses_nothing(registry: Registry) -> None:
    registry.register(submission(document()))
    with registry.database.reading() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()

    def fill() -> None:
        with registry.database.writing() as connection:
            connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
            connection.execute(text("CREATE TABLE filler (content)"))
            connection.execute(text("INSERT INTO filler VALUES (zeroblob(1000000))"))

    with pytest.raises(errors.RegistryOutOfResources):
        fill()
    with registry.database.writing() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count = 1000000")
        assert not inspect(connection).has_table("filler")


def test_exceptions_do_not_carry_patient_ids(registry: Registry) -> None:
    with pytest.raises(Exception, match="no such table") as caught, registry.database.reading() as connection:
        connection.execute(text("SELECT * FROM absent WHERE patient = :patient"), {"patient": "secret-patient"})
    assert "secret-patient" not in str(caught.value)


def test_the_password_of_the_url_is_not_shown(tmp_path: Path) -> None:
    database = Database("postgresql+psycopg://registry:secret@127.0.0.1:1/registry")
    assert "secret" not in database.name
    with pytest.raises(errors.RegistryNotAvailable), database.reading():
        pass
    database.close()


def test_parameters_are_split_without_loss() -> None:
    assert [list(chunk) for chunk in chunks([1, 2, 3, 4, 5], 2)] == [[1, 2], [3, 4], [5]]
    assert list(chunks([])) == []
