"""The node as Initiating Gateway (ITI-18 and ITI-43 in, ITI-38 and ITI-39 out)."""

from __future__ import annotations

FAMILY = "initiating gateway"
TESTS = ("15808", "15809")
