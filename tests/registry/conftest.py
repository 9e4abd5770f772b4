"""A registry on a file of its own for each test, with a clock that the test sets."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.registry.samples import HOME
from xca_imaging.registry import Registry

NOW = datetime(2024, 3, 1, 8, 30, 15, tzinfo=UTC)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'registry.db'}"


@pytest.fixture
def registry(url: str) -> Iterator[Registry]:
    opened = Registry.open(url, home_community_id=HOME, now=lambda: NOW)
    yield opened
    opened.close()
