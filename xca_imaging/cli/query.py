"""List a patient's imaging documents, of this node's registry or of another community."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from xca_imaging import settings as settings_module
from xca_imaging.cli.endpoints import add_endpoints, connect
from xca_imaging.cli.options import add_config, patient_identifier, run_loop
from xca_imaging.gateway.consumer import Found
from xca_imaging.metadata.model import DocumentEntry


def configure(sub: argparse.ArgumentParser) -> None:
    add_config(sub)
    sub.add_argument("--patient", required=True, type=patient_identifier, metavar="'ID^^^&OID&ISO'")
    sub.add_argument("--community", default="", metavar="HOME_ID", help="ask this community by ITI-38")
    sub.add_argument("--json", action="store_true", help="one JSON array instead of a table")
    add_endpoints(sub)


def run(args: argparse.Namespace) -> int:
    settings = settings_module.load(args.config)

    async def ask() -> Found:
        async with connect(settings, args) as consumer:
            return await consumer.find_manifests(args.patient, args.community)

    found = run_loop(ask())
    home = args.community or settings.node.home_community_id
    rows = [as_json(document, home) for document in found.documents]
    for error in found.errors:
        print(f"not all was found: {error}", file=sys.stderr)
    _print(rows, as_array=args.json)
    return 1 if found.errors else 0


def _print(rows: list[dict[str, Any]], *, as_array: bool) -> None:
    if as_array:
        json.dump(rows, sys.stdout, indent=2)
        print()
        return
    console = Console(width=None if sys.stdout.isatty() else 200)
    if not rows:
        console.print("no imaging documents")
        return
    table = Table("created", "title", "study", "document", "repository", "home", box=None, pad_edge=False)
    for row in rows:
        table.add_row(
            row["creation_time"],
            row["title"],
            row["study_instance_uid"],
            row["unique_id"],
            row["repository_unique_id"],
            row["home_community_id"],
        )
    console.print(table)


def as_json(document: DocumentEntry, home_community_id: str) -> dict[str, Any]:
    """Return one document as `query --json` prints it (contract, section 4)."""
    studies = document.study_instance_uids
    return {
        "unique_id": document.unique_id,
        "entry_uuid": document.entry_uuid,
        "repository_unique_id": document.repository_unique_id,
        "home_community_id": document.home_community_id or home_community_id,
        "patient_id": document.patient_id,
        "title": document.title,
        "creation_time": document.creation_time,
        "service_start_time": document.service_start_time,
        "mime_type": document.mime_type,
        "format_code": document.format_code.code if document.format_code else "",
        "type_code": document.type_code.code if document.type_code else "",
        "event_codes": [code.code for code in document.event_codes],
        "status": document.availability_status.rpartition(":")[2],
        "size": document.size,
        "hash": document.hash,
        "study_instance_uid": studies[0] if studies else "",
        "reference_ids": list(document.reference_ids),
    }
