"""A PostgreSQL server of the suite's own, on loopback, from the programs that are installed."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest


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


@contextmanager
def serve(*, settings: str = "-c fsync=off") -> Iterator[str]:
    """Run a server; its address without a database. Skips the test where PostgreSQL is not installed.

    Without fsync by default: the server is not killed in tests, only its clients are.
    """
    programs = _programs()
    if programs is None or not (programs / "initdb").exists():
        pytest.skip("needs PostgreSQL (initdb, pg_ctl)")
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
    else:
        folder = Path(tempfile.mkdtemp(prefix="registry-test-"))
    port = _free_port()
    data, log = str(folder / "data"), str(folder / "log")
    settings += f" -c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories='' -c max_connections=200"
    try:
        subprocess.run([programs / "initdb", "-D", data, "-U", "registry", "-A", "trust", "-E", "UTF8"], **options)
        subprocess.run([programs / "pg_ctl", "-D", data, "-l", log, "-w", "-o", settings, "start"], **options)
        try:
            yield f"registry@127.0.0.1:{port}"
        finally:
            subprocess.run([programs / "pg_ctl", "-D", data, "-m", "immediate", "-w", "stop"], **options)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


_empty: dict[str, list[str]] = {}  # by server: to make a database and to drop it takes seconds, to empty one does not


@contextmanager
def database(server: str) -> Iterator[str]:
    """Lend an empty database; its SQLAlchemy URL."""
    free = _empty.setdefault(server, [])
    if free:
        name = free.pop()
    else:
        name = f"registry_{uuid.uuid4().hex}"
        with psycopg.connect(f"postgresql://{server}/postgres", autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"'.encode())
    yield f"postgresql+psycopg://{server}/{name}"
    with psycopg.connect(f"postgresql://{server}/{name}", autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
    free.append(name)
