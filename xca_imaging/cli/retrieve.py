"""Fetch manifests and retrieve every image they name, checked, with a receipt."""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from xca_imaging import settings as settings_module
from xca_imaging.cli.endpoints import add_endpoints, connect
from xca_imaging.cli.options import add_config, patient_identifier, run_loop, uid
from xca_imaging.errors import ConfigurationError, DocumentUniqueIdError, ManifestError, RegistryError
from xca_imaging.gateway.consumer import ACCEPTED_SYNTAXES, Consumer, Found, FoundManifest
from xca_imaging.gateway.receipt import ManifestFacts, Receipt, reason_of
from xca_imaging.gateway.retrieval import Progress
from xca_imaging.imaging import manifest as manifest_module
from xca_imaging.registry.document_registry import Registry
from xca_imaging.settings import Settings


def configure(sub: argparse.ArgumentParser) -> None:
    add_config(sub)
    what = sub.add_argument_group("what to retrieve (one of)")
    what.add_argument("--manifest", type=Path, metavar="FILE", help="a KOS manifest on disk")
    what.add_argument("--document", type=uid, metavar="UID", help="a manifest by its uniqueId, with --repository")
    what.add_argument("--study", type=uid, metavar="UID", help="the registered manifests of a study")
    what.add_argument("--patient", type=patient_identifier, metavar="'ID^^^&OID&ISO'", help="all of a patient")
    sub.add_argument("--repository", type=uid, metavar="UID", help="RepositoryUniqueId of --document")
    sub.add_argument("--home", default="", metavar="HOME_ID", help="community that has it; default: this node's")
    sub.add_argument(
        "--transfer-syntax",
        type=uid,
        action="append",
        metavar="UID",
        help="accept only these, in order of preference; default: all that can be stored as they are",
    )
    sub.add_argument("--out", type=Path, required=True, metavar="DIR")
    add_endpoints(sub)
    sub.set_defaults(usage_error=sub.error)


def run(args: argparse.Namespace) -> int:
    chosen = [name for name in ("manifest", "document", "study", "patient") if getattr(args, name) is not None]
    if len(chosen) != 1 and chosen != ["study", "patient"]:
        args.usage_error("give one of --manifest, --document, --study, --patient")
    if args.document and not args.repository:
        args.usage_error("--document needs --repository: the RepositoryUniqueId of its entry")
    settings = settings_module.load(args.config)
    receipt, missed = run_loop(_retrieve(settings, args))
    receipt.write(args.out / "receipt.json")
    for error in missed:
        print(f"not all manifests were found: {error}", file=sys.stderr)
    code = _report(receipt, args.out)
    return 1 if missed else code


async def _retrieve(settings: Settings, args: argparse.Namespace) -> tuple[Receipt, Sequence[RegistryError]]:
    """Return the receipt, and why there may be more manifests than it speaks of."""
    async with connect(settings, args) as consumer:
        manifests, missed = await _manifests(settings, args, consumer)
        accept = tuple(args.transfer_syntax or ACCEPTED_SYNTAXES)
        with _Display() as display:
            return await consumer.retrieve(manifests, args.out, accept=accept, progress=display), missed


async def _manifests(
    settings: Settings, args: argparse.Namespace, consumer: Consumer
) -> tuple[list[FoundManifest], Sequence[RegistryError]]:
    if args.manifest:
        return [_from_file(args.manifest, args.home)], ()
    if args.document:
        return [await consumer.fetch_manifest(args.document, args.repository, args.home)], ()
    found = await consumer.find_manifests(args.patient, args.home) if args.patient else _registered_here(settings, args)
    documents = [each for each in found.documents if args.study is None or args.study in each.study_instance_uids]
    if not documents:
        raise DocumentUniqueIdError("no manifest is registered for it", args.study or args.patient)
    manifests = [
        await consumer.fetch_manifest(document.unique_id, document.repository_unique_id, args.home)
        for document in documents
    ]
    return manifests, found.errors


def _registered_here(settings: Settings, args: argparse.Namespace) -> Found:
    """Look a study up in this node's own database: no stored query finds a study without its patient."""
    if args.home not in ("", settings.node.home_community_id) or args.registry_url:
        raise ConfigurationError(
            str(settings.file), "", "another registry finds a study only with its patient", "add --patient"
        )
    registry = Registry.open(settings.database_url, home_community_id=settings.node.home_community_id)
    try:
        return Found(registry.documents_of_study(args.study))
    finally:
        registry.close()


def _from_file(path: Path, home_community_id: str) -> FoundManifest:
    try:
        content = path.read_bytes()
    except OSError as exc:
        raise ManifestError(f"{path} cannot be read: {exc.strerror}") from exc
    manifest = manifest_module.read(content)
    facts = ManifestFacts(manifest.sop_instance_uid, hashlib.sha256(content).hexdigest(), home_community_id, "")
    return FoundManifest(manifest, facts)


def _report(receipt: Receipt, out: Path) -> int:
    summary = receipt.ledger.summary()
    print(f"{summary.held} of {summary.wanted} instances, {summary.size / 1e6:.1f} MB, in {out}")
    failed = [entry for entry in receipt.ledger if entry.error is not None]
    for entry in failed[:20]:
        print(f"missing {entry.want.sop_instance_uid}: {reason_of(entry)}", file=sys.stderr)
    if len(failed) > 20:
        print(f"... and {len(failed) - 20} more: see receipt.json", file=sys.stderr)
    for unexpected in receipt.unexpected:
        print(f"came unasked and was dropped: {unexpected}", file=sys.stderr)
    return 0 if receipt.complete else 1


class _Display(Progress):
    """A bar of instances with their bytes, on a terminal; silent elsewhere."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._bar = Bar(
            TextColumn("retrieving"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("instances, {task.fields[megabytes]:.1f} MB"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("retrieving", total=None, megabytes=0.0)
        self._bytes = 0

    def __enter__(self) -> _Display:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def expect(self, instances: int) -> None:
        self._bar.update(self._task, total=instances)

    def received(self, size: int) -> None:
        self._bytes += size
        self._bar.update(self._task, megabytes=self._bytes / 1e6)

    def arrived(self) -> None:
        self._bar.advance(self._task)
