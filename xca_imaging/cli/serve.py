"""Run a node until SIGTERM or SIGINT."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal

from xca_imaging import settings as settings_module
from xca_imaging.cli.options import add_config, run_loop
from xca_imaging.gateway.app import Node
from xca_imaging.gateway.listeners import address
from xca_imaging.operations.heap import freeze_heap
from xca_imaging.settings import Settings

log = logging.getLogger(__name__)


def configure(sub: argparse.ArgumentParser) -> None:
    add_config(sub)


def run(args: argparse.Namespace) -> int:
    return run_loop(serve(settings_module.load(args.config)))


async def serve(settings: Settings) -> int:
    """Serve; the `ready` line is for programs, so it is the only line on stdout."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with Node(settings) as node:
        freeze_heap()
        print(f"ready http={_bound(node.http_address)} dicom={_bound(node.dicom_address)}", flush=True)
        await stop.wait()
        log.info("draining for at most %g s", settings.node.drain_timeout)
    return 0


def _bound(bound: tuple[str, int]) -> str:
    return address(*bound)
