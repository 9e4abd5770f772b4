"""Options that several verbs share."""

from __future__ import annotations

import argparse
import re
from collections.abc import Coroutine
from datetime import date, datetime
from pathlib import Path
from typing import Any, TypeVar

from xca_imaging.uids import is_uid

T = TypeVar("T")


def add_config(sub: argparse.ArgumentParser) -> None:
    """Add the `--config` that nearly every verb takes."""
    sub.add_argument("--config", type=Path, required=True, metavar="FILE", help="the node's configuration (TOML)")


def run_loop(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on uvloop: the store SCP is measured with it."""
    import uvloop  # not for check-config

    return uvloop.run(main)


def patient_identifier(text: str) -> str:
    """Check a patient identifier: CX as XDS restricts it (ITI TF-3, 4.2.3.1.7)."""
    if not re.fullmatch(r"[^^&|~]+\^\^\^&[0-9]+(\.[0-9]+)*&ISO", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 'ID^^^&OID&ISO'")
    return text


def uid(text: str) -> str:
    """Check a UID."""
    if not is_uid(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a UID")
    return text


def day(text: str) -> date:
    """Check a date."""
    try:
        return datetime.strptime(text.replace("-", ""), "%Y%m%d").date()
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a date: write 2026-01-31") from None
