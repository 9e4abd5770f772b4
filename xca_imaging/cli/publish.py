"""Publish studies of the PACSs: C-FIND, KOS manifest, RAD-68; once, or for as long as it runs."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing

from rich.console import Console
from rich.table import Table

from xca_imaging import settings as settings_module
from xca_imaging.cli.options import add_config, day, patient_identifier, run_loop, uid
from xca_imaging.errors import ConfigurationError, PeerError
from xca_imaging.gateway import listeners
from xca_imaging.gateway.peers import Endpoint, SoapClient
from xca_imaging.gateway.publications import Publications
from xca_imaging.gateway.publishing import (
    Published,
    Publisher,
    Selection,
    identifier_of,
    publish,
    publishers_of,
)
from xca_imaging.gateway.publishing_peers import Repository
from xca_imaging.gateway.repositories import RepositoryElsewhere, RetrievedObjects, SoapRepository
from xca_imaging.gateway.watching import Follower, Watch
from xca_imaging.imaging.backends.cfind import Queries
from xca_imaging.imaging.backends.pool import Associations
from xca_imaging.operations.metrics import Metrics
from xca_imaging.security import tls
from xca_imaging.settings import Pacs, Settings

log = logging.getLogger(__name__)


def configure(sub: argparse.ArgumentParser) -> None:
    add_config(sub)
    what = sub.add_mutually_exclusive_group(required=True)
    what.add_argument("--study", type=uid, metavar="UID", help="publish, replace or withdraw what is registered of it")
    what.add_argument("--patient", metavar="ID", help="all studies with this Patient ID (0010,0020)")
    what.add_argument("--since", type=day, metavar="DATE", help="all studies from this day on: 2026-01-31")
    what.add_argument("--watch", action="store_true", help="follow the PACSs until SIGTERM or SIGINT")
    sub.add_argument(
        "--as",
        dest="as_patient",
        type=patient_identifier,
        metavar="'ID^^^&OID&ISO'",
        help="the registry's patient id; default: the images' own, with their issuer or the PACS's domain",
    )


def run(args: argparse.Namespace) -> int:
    settings = settings_module.load(args.config)
    if args.watch:
        return run_loop(watch(settings, args.as_patient))
    selection = Selection(study_instance_uid=args.study or "", patient_id=args.patient or "", since=args.since)
    results = run_loop(publish_all(settings, selection, args.as_patient))
    if not results:
        print("no study fits")
        return 1
    table = Table("study", "series", "instances", "result", "manifest", box=None, pad_edge=False)
    for each in results:
        table.add_row(
            each.study_instance_uid,
            str(each.series),
            str(each.instances),
            f"{each.outcome}: {each.reason}" if each.reason else each.outcome,
            each.document_unique_id,
        )
    console = Console()
    if not console.is_terminal:
        console = Console(width=240)  # for a pipe: one line a study
    console.print(table, highlight=False, markup=False)
    return 1 if any(each.outcome == "refused" for each in results) else 0


async def publish_all(settings: Settings, selection: Selection, patient_id: str | None = None) -> list[Published]:
    """Publish what fits from every PACS, and say what became of each study.

    A study that one PACS does not have is refused only when none has it; a PACS that cannot be asked does not keep
    the others back.

    Raises
    ------
    ConfigurationError, PeerError
    """
    results: list[Published] = []
    unreachable: list[PeerError] = []
    async with publishers(settings, patient_id) as (all_publishers, _):
        for publisher in all_publishers:
            try:
                results += await publish(publisher, selection)
            except PeerError as exc:
                unreachable.append(exc)
                log.warning("not asked: %s", exc)
    if not results and unreachable:
        raise unreachable[0]
    # Which PACS has the study is not the operator's question, unless none of them published it.
    published = [each for each in results if each.outcome != "refused"]
    return published if selection.study_instance_uid and published else results


async def watch(settings: Settings, patient_id: str | None = None) -> int:
    """Follow the PACSs until SIGTERM or SIGINT; one line on stdout for each study that was not left as it is."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with publishers(settings, patient_id) as (all_publishers, memory):
        followers = [
            Follower(
                publisher,
                memory,
                Metrics(),
                days=settings.publish.days,
                interval=settings.publish.interval,
                on_published=_print,
            )
            for publisher in all_publishers
        ]
        following = asyncio.create_task(Watch(followers).run(is_sweeping=True))
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait((following, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if following.done():
            await following  # it only ends by an error
        following.cancel()
        await asyncio.wait((following,))
    return 0


@asynccontextmanager
async def publishers(
    settings: Settings, patient_id: str | None = None
) -> AsyncIterator[tuple[list[Publisher], Publications]]:
    """Yield a publisher for each PACS that uses this node's endpoints, or `publish.repository`, and their memory.

    Raises
    ------
    ConfigurationError
        There is no PACS, or something else is missing.
    """
    if not settings.pacs:
        raise ConfigurationError(str(settings.file), "pacs", "there is none", "add [[pacs]]")
    base, timeout = listeners.base_url(settings), settings.limits.stall_timeout

    def own(service: str) -> Endpoint:
        return Endpoint(settings.node.name, f"{base}/services/{service}", timeout)

    dicom_tls = tls.client_context(settings, settings.dicom.tls, "dicom.tls")
    pools: list[Associations] = []

    def finder(pacs: Pacs) -> Queries:
        pools.append(Associations(pacs, calling_ae_title=settings.dicom.ae_title, tls=dicom_tls))
        return Queries(pools[-1])

    https = tls.client_context(settings, settings.http.tls, "http.tls")
    with closing(Publications(settings.data_dir)) as memory:
        async with SoapClient(tls=https) as client:
            repository: Repository = SoapRepository(client, own("registry"), own("repository"))
            url = settings.publish.repository
            if url:
                repository = RepositoryElsewhere(client, Endpoint(url, url, timeout), repository, memory)
            objects = RetrievedObjects(client, own("imaging-source"))
            found = publishers_of(
                settings,
                repository=repository,
                objects=objects,
                memory=memory,
                make_finder=finder,
                patient_id=identifier_of(patient_id) if patient_id else None,
            )
            try:
                yield found, memory
            finally:
                for pool in pools:
                    await pool.close()


def _print(published: Published) -> None:
    words = [published.outcome, published.study_instance_uid, published.document_unique_id or "-", published.reason]
    print(*filter(None, words), flush=True)
