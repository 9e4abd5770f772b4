"""The published schemas, conformance data and recorded messages that lie beside the checkout."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2].parent / "shared"


def shared_path(relative: str) -> Path:
    """Return a file or folder of `../shared`, or skip the test that asks for it where it is not there."""
    path = ROOT / relative
    if not path.exists():
        pytest.skip(f"needs ../shared/{relative}")
    return path
