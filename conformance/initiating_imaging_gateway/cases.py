"""iig_2018: the node as Initiating Imaging Gateway (RAD-69 in, RAD-75 out)."""

from __future__ import annotations

FAMILY = "initiating imaging gateway"
CASES = dict.fromkeys(["iig_2018-5401a", "iig_2018-5401c", "iig_2018-5402a", "iig_2018-5404b"])
