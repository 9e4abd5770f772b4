"""The completeness receipt of a retrieval.

`complete` is true only when every wanted instance arrived intact. Later versions only add keys.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from xca_imaging.errors import OutputError

VERSION = 1


@dataclass(frozen=True, slots=True)
class ManifestFacts:
    """The manifest that named the wanted instances; empty strings where it came from a file."""

    document_unique_id: str
    sha256: str
    home_community_id: str
    repository_unique_id: str


@dataclass(slots=True, kw_only=True)
class InstanceRecord:
    """One wanted instance: `held` with the size in bytes and SHA-256 of the file written, or `failed` with a reason."""

    study_instance_uid: str
    series_instance_uid: str
    sop_instance_uid: str
    home_community_id: str
    repository_unique_id: str
    state: str = "failed"
    size: int = 0
    sha256: str = ""
    transfer_syntax_uid: str = ""
    bytes_changed: bool = False
    reason: str = "never arrived"
    attempts: int = 0

    def as_json(self) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "study_instance_uid": self.study_instance_uid,
            "series_instance_uid": self.series_instance_uid,
            "sop_instance_uid": self.sop_instance_uid,
            "state": self.state,
            "size": self.size,
            "sha256": self.sha256,
            "transfer_syntax_uid": self.transfer_syntax_uid,
            "source": {
                "home_community_id": self.home_community_id,
                "repository_unique_id": self.repository_unique_id,
            },
            "bytes_changed": self.bytes_changed,
            "attempts": self.attempts,
        }
        if self.state == "failed":
            entry["reason"] = self.reason
        return entry


@dataclass(slots=True)
class Receipt:
    """What was wanted and what became of it."""

    trace_id: str
    requested_at: datetime
    manifests: tuple[ManifestFacts, ...]
    instances: list[InstanceRecord]
    unexpected: list[str] = field(default_factory=list)
    finished_at: datetime | None = None

    @property
    def complete(self) -> bool:
        return bool(self.instances) and all(record.state == "held" for record in self.instances)

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
            "instances": [record.as_json() for record in self.instances],
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


def _timestamp(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
