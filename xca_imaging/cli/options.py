"""Options that several verbs share."""

from __future__ import annotations

import argparse
import re
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import uvloop

from xca_imaging.gateway import listeners
from xca_imaging.gateway.consumer import Consumer, Routes
from xca_imaging.gateway.peers import SoapClient
from xca_imaging.imaging.attributes import is_uid
from xca_imaging.security import tls
from xca_imaging.settings import Settings

T = TypeVar("T")


def add_config(sub: argparse.ArgumentParser) -> None:
    """Add the `--config` that nearly every verb takes."""
    sub.add_argument("--config", type=Path, required=True, metavar="FILE", help="the node's configuration (TOML)")


def add_endpoints(sub: argparse.ArgumentParser) -> None:
    """Add the options that send a query or a retrieval to another system's endpoints."""
    other = sub.add_argument_group("ask another system instead of this node")
    other.add_argument("--registry-url", metavar="URL", default="", help="ITI-18 endpoint")
    other.add_argument("--repository-url", metavar="URL", default="", help="ITI-43 endpoint")
    other.add_argument("--imaging-url", metavar="URL", default="", help="RAD-69 endpoint")


def run_loop(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on uvloop: the store SCP is measured with it."""
    return uvloop.run(main)


@asynccontextmanager
async def connect(settings: Settings, args: argparse.Namespace) -> AsyncIterator[Consumer]:
    """Yield a consumer of this node's endpoints, or of those given by `add_endpoints`."""
    routes = Routes(
        settings,
        partial(listeners.base_url, settings),
        registry_url=args.registry_url,
        repository_url=args.repository_url,
        imaging_url=args.imaging_url,
    )
    async with SoapClient(tls=tls.client_context(settings, settings.http.tls, "http.tls")) as client:
        yield Consumer(client, routes)


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
