"""Which system a query or a retrieval asks: this node, a community, or any endpoint given by hand."""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from xca_imaging.gateway import listeners
from xca_imaging.gateway.consumer import Consumer, Routes
from xca_imaging.gateway.peers import SoapClient
from xca_imaging.security import tls
from xca_imaging.settings import Settings


def add_endpoints(sub: argparse.ArgumentParser) -> None:
    """Add the options that send a query or a retrieval to another system's endpoints."""
    other = sub.add_argument_group("ask another system instead of this node")
    other.add_argument("--registry-url", metavar="URL", default="", help="ITI-18 endpoint")
    other.add_argument("--repository-url", metavar="URL", default="", help="ITI-43 endpoint")
    other.add_argument("--imaging-url", metavar="URL", default="", help="RAD-69 endpoint")


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
