"""What came of each case, as a table for people and as JSON and JUnit for machines."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TextIO
from xml.sax.saxutils import escape, quoteattr

Outcome = Literal["passed", "failed", "not in this version"]


@dataclass(frozen=True, slots=True)
class Result:
    """One case: its family, its published identifier, and why it did not pass."""

    family: str
    case: str
    outcome: Outcome
    reason: str = ""
    seconds: float = 0.0

    @property
    def mark(self) -> str:
        return {"passed": "passed", "failed": "FAILED", "not in this version": "not in this version"}[self.outcome]


def write_table(results: Iterable[Result], stream: TextIO) -> None:
    """Write one line for each case, by family, and the counts."""
    listed = list(results)
    width = max((len(each.case) for each in listed), default=0)
    family = ""
    for each in listed:
        if each.family != family:
            family = each.family
            stream.write(f"\n{family}\n")
        first, _, rest = each.reason.partition("\n")
        stream.write(f"  {each.case:<{width}}  {each.mark:<19}  {each.seconds:5.2f} s  {first}\n".rstrip() + "\n")
        for line in rest.splitlines():
            stream.write(" " * (width + 4) + line + "\n")
    counts = {outcome: sum(r.outcome == outcome for r in listed) for outcome in ("passed", "failed")}
    absent = len(listed) - sum(counts.values())
    stream.write(f"\n{counts['passed']} passed, {counts['failed']} failed, {absent} not in this version\n")


def write_files(results: Iterable[Result], folder: Path) -> None:
    """Write `results.json` and `junit.xml`."""
    listed = list(results)
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        "written_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "results": [asdict(each) for each in listed],
    }
    (folder / "results.json").write_text(json.dumps(document, indent=1) + "\n")
    failed = sum(each.outcome == "failed" for each in listed)
    skipped = sum(each.outcome == "not in this version" for each in listed)
    lines = [
        '<?xml version="1.0" encoding="UTF-8"?>',
        f'<testsuite name="conformance" tests="{len(listed)}" failures="{failed}" skipped="{skipped}">',
    ]
    for each in listed:
        inner = {
            "passed": "",
            "failed": f"<failure>{escape(each.reason)}</failure>",
            "not in this version": f"<skipped message={quoteattr(each.reason)}/>",
        }[each.outcome]
        lines.append(
            f"<testcase classname={quoteattr(each.family)} name={quoteattr(each.case)} "
            f'time="{each.seconds:.3f}">{inner}</testcase>'
        )
    lines.append("</testsuite>")
    (folder / "junit.xml").write_text("\n".join(lines) + "\n")
