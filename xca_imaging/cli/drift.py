"""Where this node's registry and its PACSs disagree."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from datetime import date, timedelta
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.table import Table

from xca_imaging import settings as settings_module
from xca_imaging.cli.options import add_config, day, run_loop
from xca_imaging.cli.publish import publishers
from xca_imaging.errors import ManifestError, RegistryError
from xca_imaging.gateway.drifting import Comparison, Difference, Kind, RegisteredManifest, by_study
from xca_imaging.gateway.publications import Publications
from xca_imaging.imaging import manifest as manifests
from xca_imaging.registry.document_registry import Registry
from xca_imaging.registry.inventory import approved_manifests
from xca_imaging.registry.provide import Repository
from xca_imaging.registry.remote import RemoteStore
from xca_imaging.settings import Settings

log = logging.getLogger(__name__)

_WORDS: dict[Kind, str] = {
    "registered_not_in_pacs": "registered, not in the PACS",
    "in_pacs_not_registered": "in the PACS, not registered",
    "other_content": "registered with other content",
    "not_compared": "not compared",
}


def configure(sub: argparse.ArgumentParser) -> None:
    add_config(sub)
    sub.add_argument("--json", action="store_true", help="print one JSON object")
    sub.add_argument(
        "--since",
        type=day,
        metavar="DATE",
        help="studies from this day on are to be registered: 2026-01-31; default: the last publish.days. "
        "What is registered is to be in the PACS, of whatever day",
    )
    sub.add_argument(
        "--deep", action="store_true", help="list the instances of every study, also where the numbers agree"
    )


def run(args: argparse.Namespace) -> int:
    settings = settings_module.load(args.config)
    since = args.since or date.today() - timedelta(days=settings.publish.days)
    found = run_loop(compare(settings, since, is_deep=args.deep))
    if args.json:
        listed = {
            kind: [{key: value for key, value in asdict(each).items() if key != "kind"} for each in found]
            for kind, found in _by_kind(found)
        }
        print(json.dumps({"since": since.isoformat(), **listed}, indent=1))
    elif not found:
        print("no drift")
    else:
        table = Table("", "PACS", "study", "manifest", "patient", "", box=None, pad_edge=False)
        for kind, differences in _by_kind(found):
            for each in differences:
                row = (each.pacs, each.study_instance_uid, each.document_unique_id, each.patient_id, each.reason)
                table.add_row(_WORDS[kind], *row)
        console = Console()
        if not console.is_terminal:
            console = Console(width=320)  # for a pipe: one line a study
        console.print(table, highlight=False, markup=False)
    return 1 if found else 0


def _by_kind(found: list[Difference]) -> Iterator[tuple[Kind, list[Difference]]]:
    for kind in get_args(Kind):
        yield kind, [each for each in found if each.kind == kind]


async def compare(settings: Settings, since: date, *, is_deep: bool = False) -> list[Difference]:
    """Compare every PACS with what is registered of it.

    Raises
    ------
    ConfigurationError
    """
    async with publishers(settings) as (all_publishers, memory):
        registered = list(_registered(settings, memory))
        found: list[Difference] = []
        for publisher in all_publishers:
            comparison = Comparison(
                publisher,
                by_study(registered, publisher.pacs),
                since,
                date.today() + timedelta(days=1),
                is_deep,
            )
            found += await comparison.differences()
        return found


def _registered(settings: Settings, memory: Publications) -> Iterator[RegisteredManifest]:
    """Yield the manifests of this node's repository, or those that `publish.repository` accepted."""
    if settings.publish.repository:
        for sent in memory.sent(settings.publish.repository):
            yield RegisteredManifest(sent.entry, manifests.read(sent.content))
    if not settings.repository.unique_id:
        return
    opened = Registry.open(settings.database_url, home_community_id=settings.node.home_community_id)
    with closing(opened) as registry:
        repository = Repository(
            registry,
            settings.data_dir / "documents",
            repository_unique_id=settings.repository.unique_id,
            remote=RemoteStore.open(settings.repository.store),
        )
        for entry in approved_manifests(registry):
            if entry.repository_unique_id != repository.repository_unique_id:
                continue
            try:
                document = repository.find(entry.unique_id)
                if document is None:
                    raise ManifestError(f"document {entry.unique_id} is not in the repository")
                manifest = manifests.read(Path(document.path))
            except (ManifestError, RegistryError) as exc:
                log.warning("document %s is left out: %s", entry.unique_id, exc)
                continue
            yield RegisteredManifest(entry, manifest)
