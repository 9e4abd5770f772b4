"""The node as Responding Gateway (ITI-38, ITI-39) on the data loads 12318 and 15807."""

from __future__ import annotations

FAMILY = "responding gateway"
TESTS = ("12318", "15807", "12309", "12310", "12312", "15811", "15813")
