"""A registry of its own for each test, with a clock that the test sets: on SQLite, and on PostgreSQL where it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime

import pytest

from tests.registry import postgresql
from tests.registry.samples import HOME
from xca_imaging.registry import Registry

NOW = datetime(2024, 3, 1, 8, 30, 15, tzinfo=UTC)

NewUrl = Callable[[], str]


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[str]:
    """A PostgreSQL server; its address without a database."""
    with postgresql.serve() as address:
        yield address


@pytest.fixture(
    scope="module", params=["sqlite", pytest.param("postgresql", marks=[pytest.mark.peer, pytest.mark.slow])]
)
def new_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NewUrl]:
    """Makes empty databases: of each kind that the registry runs on, one after the other."""
    if request.param == "sqlite":
        yield lambda: f"sqlite:///{tmp_path_factory.mktemp('registry') / 'registry.db'}"
        return
    server = request.getfixturevalue("postgresql_server")
    with ExitStack() as databases:
        yield lambda: databases.enter_context(postgresql.database(server))


@pytest.fixture
def url(request: pytest.FixtureRequest, new_url: NewUrl) -> Iterator[str]:
    if request.node.callspec.params["new_url"] == "sqlite":
        yield new_url()
        return
    with postgresql.database(request.getfixturevalue("postgresql_server")) as address:
        yield address


@pytest.fixture
def registry(url: str) -> Iterator[Registry]:
    opened = Registry.open(url, home_community_id=HOME, now=lambda: NOW)
    yield opened
    opened.close()
