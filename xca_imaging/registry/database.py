"""The registry's database: connections, transactions, migrations, and errors with a meaning.

One writer at a time, on every database: SQLite by a lock in this process and BEGIN IMMEDIATE between processes,
PostgreSQL by a transaction-level advisory lock. A submission is checked against what is registered and then written,
and no other submission can come in between; at the size of a submission (milliseconds) finer locks gain nothing.
Readers are never blocked (WAL, MVCC) and see one state of the registry for as long as their transaction lasts.

References
----------
* IHE ITI TF-2, 3.42.4.1.3.1 (atomicity of submissions)
* SQLite: "Write-Ahead Logging", "PRAGMA synchronous", "Result and Error Codes"
* PostgreSQL: "Advisory Locks", "Appendix A. Error Codes"
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import alembic.command
import sqlalchemy
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Connection, event, exc
from sqlalchemy.engine import URL, make_url
from sqlalchemy.pool import ConnectionPoolEntry

from xca_imaging import errors

MIGRATIONS = Path(__file__).parent / "migrations"

T = TypeVar("T")

# A number of our own choosing: all processes that write to one registry must take the same advisory lock.
_ADVISORY_LOCK = 0x58434149  # "XCAI"


class Database:
    """An engine with the two kinds of transaction that the registry knows.

    Parameters
    ----------
    url : str
        SQLAlchemy URL: `sqlite:///...` or `postgresql+psycopg://...`.
    busy_timeout : float
        Seconds that a writer waits for another one before the registry says that it is busy. Longer than any
        submission takes, shorter than the patience of an HTTP client.
    pool_size : int
        Connections kept. At least the number of threads that call the registry, or they wait for each other.
    """

    # Mutable state: `_writer` is held while this process writes; the engine's pool has its own lock.

    def __init__(self, url: str, *, busy_timeout: float = 20.0, pool_size: int = 16) -> None:
        self.url: URL = make_url(url)
        self._busy_timeout = busy_timeout
        self._writer = threading.Lock()
        self._sqlite = self.url.get_backend_name() == "sqlite"
        if self._sqlite:
            self._prepare_file()
        self._engine = sqlalchemy.create_engine(
            self.url,
            pool_size=pool_size,
            max_overflow=0,
            pool_timeout=busy_timeout,
            # Statements carry patient ids: they must not reach a log through an exception.
            hide_parameters=True,
            # Not asked of SQLite: a file does not hang up.
            pool_pre_ping=not self._sqlite,
        )
        if self._sqlite:
            event.listen(self._engine, "connect", self._set_pragmas)
            event.listen(self._engine, "begin", self._begin_sqlite)

    @property
    def name(self) -> str:
        """The URL without its password, for messages."""
        return self.url.render_as_string(hide_password=True)

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Run a read-only transaction over one state of the registry."""
        with self._mapped(), self._engine.connect() as connection, connection.begin():
            if not self._sqlite:
                connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """Run the only writing transaction; it is committed, durably, when the block ends without exception."""
        if not self._writer.acquire(timeout=self._busy_timeout):
            raise errors.RegistryBusy(f"no turn to write within {self._busy_timeout:g} s")
        try:
            with self._mapped(), self._engine.connect() as connection:
                connection = connection.execution_options(xca_imaging_writes=True)
                with connection.begin():
                    if not self._sqlite:
                        connection.exec_driver_sql(f"SET LOCAL lock_timeout = {int(self._busy_timeout * 1000)}")
                        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_ADVISORY_LOCK})")
                    yield connection
        finally:
            self._writer.release()

    def migrate(self, revision: str = "head") -> None:
        """Bring the schema to what this version of the software needs, or up to an older revision.

        Raises
        ------
        errors.ConfigurationError
            The database was written by a newer version.
        """
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
        try:
            with self.writing() as connection:
                config.attributes["connection"] = connection
                alembic.command.upgrade(config, revision)
        except CommandError as problem:
            raise errors.ConfigurationError(
                self.name, "", f"the registry's schema cannot be used: {problem}", "was it written by a newer version?"
            ) from problem

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    # --- SQLite -------------------------------------------------------------------------------------------------------

    def _prepare_file(self) -> None:
        if self.url.database in (None, "", ":memory:"):
            raise errors.ConfigurationError(
                self.name, "database.url", "a registry in memory forgets what it acknowledged", "name a file"
            )
        path = Path(str(self.url.database))
        path.parent.mkdir(parents=True, exist_ok=True)
        # Patient data: readable by this user only. SQLite gives its -wal and -shm files the same mode.
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))

    def _set_pragmas(self, connection: Any, _entry: ConnectionPoolEntry) -> None:
        # Transactions are begun by `_begin_sqlite`; sqlite3's own mode would begin them late and without IMMEDIATE.
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {int(self._busy_timeout * 1000)}")
        cursor.execute("PRAGMA journal_mode = WAL")
        # A submission is acknowledged when it would survive a power cut, so the log is synced at each commit.
        cursor.execute("PRAGMA synchronous = FULL")
        cursor.execute("PRAGMA foreign_keys = ON")
        # String comparison is octet by octet (TF-2 Appendix F), LIKE included.
        cursor.execute("PRAGMA case_sensitive_like = ON")
        cursor.close()

    @staticmethod
    def _begin_sqlite(connection: Connection) -> None:
        # A writer that began by reading could not upgrade when another process has written meanwhile: SQLITE_BUSY at
        # once, whatever the timeout. IMMEDIATE waits its turn first.
        writes = connection.get_execution_options().get("xca_imaging_writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    # --- Errors -------------------------------------------------------------------------------------------------------

    @contextmanager
    def _mapped(self) -> Iterator[None]:
        try:
            yield
        except exc.TimeoutError as problem:
            raise errors.RegistryBusy("all database connections are in use") from problem
        except exc.DBAPIError as problem:
            known = _meaning(problem.orig)
            if known is None:
                raise
            raise known from problem


def chunks(values: Sequence[T], size: int = 500) -> Iterator[Sequence[T]]:
    """Split a list of parameters: SQLite takes at most 32766 in a statement, and plans short lists faster."""
    for start in range(0, len(values), size):
        yield values[start : start + size]


def _meaning(cause: BaseException | None) -> errors.RegistryError | None:
    """Return the registry error that a driver's exception means, or None for a defect of ours."""
    code = getattr(cause, "sqlite_errorcode", None)
    if isinstance(code, int):
        match code & 0xFF:  # the primary result code is the low byte of the extended one
            case 5 | 6:  # SQLITE_BUSY, SQLITE_LOCKED
                return errors.RegistryBusy("the registry's database is locked")
            case 13:  # SQLITE_FULL
                return errors.RegistryOutOfResources("no room left for the registry's database")
        return None
    state = getattr(cause, "sqlstate", None)
    if state is None:
        # psycopg: no SQLSTATE means that the server was not reached or hung up.
        name = type(cause).__name__
        return (
            errors.RegistryNotAvailable("the registry's database is not reachable")
            if name == "OperationalError"
            else None
        )
    if state == "55P03" or state[:2] == "40":  # lock_not_available, transaction rollback
        return errors.RegistryBusy("the registry's database is locked")
    if state[:2] == "53":  # insufficient resources: disk, memory, connections
        return errors.RegistryOutOfResources("the registry's database is out of resources")
    if state[:2] in ("08", "57"):  # connection exception, operator intervention
        return errors.RegistryNotAvailable("the registry's database is not reachable")
    return None
