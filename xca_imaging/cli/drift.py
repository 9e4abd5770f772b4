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
from xca_imaging.imaging.document_entry import study_reference_id
from xca_imaging.imaging.manifest import Manifest
from xca_imaging.metadata.model import DocumentEntry
from xca_imaging.registry.document_registry import Registry
from xca_imaging.registry.inventory import approved_manifests
from xca_imaging.registry.provide import Repository
from xca_imaging.registry.remote import RemoteStore
from xca_imaging.settings import Settings
from xca_imaging.uids import MIME_DICOM

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
        with closing(_Registered(settings, memory)) as inventory:
            registered = by_study(inventory, settings.pacs)
            found: list[Difference] = []
            for publisher in all_publishers:
                comparison = Comparison(
                    publisher,
                    registered[publisher.pacs.name],
                    inventory,
                    since,
                    date.today() + timedelta(days=1),
                    is_deep,
                )
                found += await comparison.differences()
            return found


class _Registered:
    """The manifests of this node's repository, and those that `publish.repository` accepted."""

    def __init__(self, settings: Settings, memory: Publications) -> None:
        self._elsewhere, self._memory = settings.publish.repository, memory
        self._registry: Registry | None = None
        if settings.repository.unique_id:
            self._registry = Registry.open(settings.database_url, home_community_id=settings.node.home_community_id)
            self._repository = Repository(
                self._registry,
                settings.data_dir / "documents",
                repository_unique_id=settings.repository.unique_id,
                remote=RemoteStore.open(settings.repository.store),
            )

    def close(self) -> None:
        if self._registry is not None:
            self._registry.close()

    def all(self) -> Iterator[tuple[DocumentEntry, Manifest]]:
        if self._elsewhere:
            for entry, content in self._memory.all_sent(self._elsewhere):
                if entry.mime_type == MIME_DICOM:
                    yield entry, manifests.read(content)
        if self._registry is None:
            return
        for entry in approved_manifests(self._registry):
            if manifest := self._read(entry):
                yield entry, manifest

    def one(self, registered: RegisteredManifest) -> tuple[DocumentEntry, Manifest] | None:
        study, wanted = registered.study_instance_uid, registered.unique_id
        if self._elsewhere:
            for entry in self._memory.sent(self._elsewhere, study_reference_id(study)):
                content = self._memory.sent_content(self._elsewhere, entry.unique_id)
                if entry.unique_id == wanted and content is not None:
                    return entry, manifests.read(content)
        for entry in self._registry.documents_of_study(study) if self._registry else ():
            if entry.unique_id == wanted and (manifest := self._read(entry)):
                return entry, manifest
        return None

    def _read(self, entry: DocumentEntry) -> Manifest | None:
        if entry.repository_unique_id != self._repository.repository_unique_id:
            return None
        try:
            document = self._repository.find(entry.unique_id)
            if document is None:
                raise ManifestError("it is not in the repository")
            return manifests.read(Path(document.path))
        except (ManifestError, RegistryError) as exc:
            log.warning("document %s is left out: %s", entry.unique_id, exc)
            return None
