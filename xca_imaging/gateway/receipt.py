"""The completeness receipt of a retrieval: its ledger, written down.

`complete` is true only when every wanted instance arrived intact. Later versions only add keys. The schema is
`docs/receipt.schema.json`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from xca_imaging.errors import OutputError, RegistryError
from xca_imaging.imaging.ledger import Entry, Ledger, State

VERSION = 1

TRANSCODED = "transcoded losslessly"
"""Stands in the warning by which an imaging source tells of an instance that its bytes are not those that are stored.

RAD-69 has no other place for a remark on a document that is returned.
"""


class NotReceived(RegistryError):
    """What a consumer found itself: no peer gave a code for it."""

    code = ""


@dataclass(frozen=True, slots=True)
class ManifestFacts:
    """The manifest that named the wanted instances; empty strings where it came from a file."""

    document_unique_id: str
    sha256: str
    home_community_id: str
    repository_unique_id: str


@dataclass(slots=True)
class Receipt:
    """What was wanted and what became of it.

    `ledger` has an entry for each wanted instance, which ends held, with the size in bytes and the SHA-256 of the file
    written, or failed with a reason.
    """

    trace_id: str
    requested_at: datetime
    manifests: tuple[ManifestFacts, ...]
    ledger: Ledger
    unexpected: list[str] = field(default_factory=list)
    finished_at: datetime | None = None

    @property
    def complete(self) -> bool:
        return len(self.ledger) > 0 and all(entry.state is State.HELD for entry in self.ledger)

    def as_json(self) -> dict[str, Any]:
        manifests = [
            {
                "document_unique_id": facts.document_unique_id,
                "sha256": facts.sha256,
                "home_community_id": facts.home_community_id,
                "repository_unique_id": facts.repository_unique_id,
            }
            for facts in self.manifests
        ]
        return {
            "version": VERSION,
            "complete": self.complete,
            "trace_id": self.trace_id,
            "requested_at": _timestamp(self.requested_at),
            "finished_at": _timestamp(self.finished_at or self.requested_at),
            "manifest": manifests[0] if manifests else None,
            "manifests": manifests,
            "instances": [_instance(entry) for entry in self.ledger],
            "unexpected": self.unexpected,
        }

    def write(self, path: Path) -> None:
        """Write it whole or not at all; raises OutputError."""
        temporary = path.with_suffix(".part")
        try:
            temporary.write_text(json.dumps(self.as_json(), indent=2) + "\n", encoding="utf-8")
            temporary.replace(path)
        except OSError as exc:
            raise OutputError(f"{path} cannot be written: {exc.strerror or exc}") from exc


def reason_of(entry: Entry) -> str:
    """Return why an instance is not held, with the code of who said so; empty when it is held."""
    error = entry.error
    if error is None:
        return ""
    return f"{error.code}: {error.context}" if error.code else error.context


def _instance(entry: Entry) -> dict[str, Any]:
    want = entry.want
    instance: dict[str, Any] = {
        "study_instance_uid": want.study_instance_uid,
        "series_instance_uid": want.series_instance_uid,
        "sop_instance_uid": want.sop_instance_uid,
        "state": entry.state.value,
        "size": entry.size,
        "sha256": entry.sha256,
        "transfer_syntax_uid": entry.transfer_syntax_uid,
        "source": {
            "home_community_id": want.home_community_id,
            "repository_unique_id": want.repository_unique_id,
        },
        "bytes_changed": entry.bytes_changed,
        "attempts": entry.attempts,
    }
    if entry.state is State.FAILED:
        instance["reason"] = reason_of(entry)
    return instance


def _timestamp(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
