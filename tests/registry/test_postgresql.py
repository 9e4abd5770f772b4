"""The registry's own tests once more, on a PostgreSQL server that is started for them on loopback."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from tests.registry import test_concurrency, test_search, test_submit
from tests.registry.conftest import NOW
from tests.registry.samples import HOME, OTHER_PATIENT, document, submission
from xca_imaging import errors
from xca_imaging.registry import Registry
from xca_imaging.registry.database import Database
from xca_imaging.registry.tables import Base

pytestmark = [pytest.mark.peer, pytest.mark.slow]

# SQLite's query plans.
_NOT_HERE = {
    "test_find_documents_starts_from_the_patient_and_scans_nothing",
    "test_find_documents_by_reference_id_uses_the_index_of_reference_ids",
}
globals().update(
    {
        name: test
        for module in (test_submit, test_search, test_concurrency)
        for name, test in vars(module).items()
        if name.startswith("test_") and name not in _NOT_HERE
    }
)


def _programs() -> Path | None:
    """Return the folder of initdb and pg_ctl: on the path, or where Debian keeps the newest version."""
    found = shutil.which("pg_ctl")
    if found:
        return Path(found).parent
    return max(Path("/usr/lib/postgresql").glob("*/bin"), default=None, key=lambda path: int(path.parent.name))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A PostgreSQL server; its URL without a database."""
    programs = _programs()
    if programs is None or not (programs / "initdb").exists():
        pytest.skip("needs PostgreSQL (initdb, pg_ctl)")
    folder = tmp_path_factory.mktemp("postgresql")
    options: dict[str, Any] = {"check": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": "/"}
    if os.getuid() == 0:  # PostgreSQL refuses to run as root
        try:
            owner = pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("needs the user postgres, when run as root")
        folder = Path(f"/var/lib/postgresql/registry-test-{uuid.uuid4().hex}")
        folder.mkdir(mode=0o700)
        os.chown(folder, owner.pw_uid, owner.pw_gid)
        options |= {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}
    port = _free_port()
    data, log = str(folder / "data"), str(folder / "log")
    settings = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories='' -c max_connections=200"
    settings += " -c fsync=off"  # the server is not killed in these tests, only its clients are
    try:
        subprocess.run([programs / "initdb", "-D", data, "-U", "registry", "-A", "trust", "-E", "UTF8"], **options)
        subprocess.run([programs / "pg_ctl", "-D", data, "-l", log, "-w", "-o", settings, "start"], **options)
        try:
            yield f"registry@127.0.0.1:{port}"
        finally:
            subprocess.run([programs / "pg_ctl", "-D", data, "-m", "immediate", "-w", "stop"], **options)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _new_database(server: str) -> str:
    name = f"registry_{uuid.uuid4().hex}"
    with psycopg.connect(f"postgresql://{server}/postgres", autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"'.encode())
    return f"postgresql+psycopg://{server}/{name}"


@pytest.fixture
def url(server: str) -> str:
    return _new_database(server)


@pytest.fixture
def registry(url: str) -> Iterator[Registry]:
    opened = Registry.open(url, home_community_id=HOME, now=lambda: NOW)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def loaded(server: str) -> Iterator[Registry]:
    opened = Registry.open(_new_database(server), home_community_id=HOME)
    test_search.load(opened)
    yield opened
    opened.close()


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
