"""The node as Document Repository (ITI-41, ITI-43)."""

from __future__ import annotations

FAMILY = "document repository"
TESTS = ("11966", "11979", "11981", "11983", "12021", "12029", "12360")
