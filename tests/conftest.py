"""Settings of the whole suite."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.support import node

# No deadline for one example: a busy machine is not a defect. The number of examples is the limit, and pytest-timeout
# ends what hangs.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """Put the logs of the nodes that serve now beside a failure."""
    report = yield
    if report.failed:
        report.sections += [(f"log of {each.name} ({each.folder})", each.tail(4000)) for each in node.running]
    return report
