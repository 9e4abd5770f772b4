"""The node as Document Registry, stored queries (ITI-18) on the data load 12346."""

from __future__ import annotations

FAMILY = "document registry: stored query"
TESTS = ("12346", "11897", "11898", "11899", "11901", "11902", "11904", "11906", "11907")
