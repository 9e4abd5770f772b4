"""The node as Document Registry, registration (ITI-42)."""

from __future__ import annotations

FAMILY = "document registry: register"
TESTS = ("11990", "11991", "11992", "11996", "11998a", "11999", "12000", "12001", "12326", "12379")
