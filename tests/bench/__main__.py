"""`make bench`: every benchmark of the tree, side by side with its peers.

Each benchmark prints its own table and says which bars hold. At the end all ratios stand in one table; figures and
pictures are in `bench-results/`: `<benchmark>.json`, `throughput.svg`, `timeline.svg` (and `.png`).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.bench import picture
from tests.bench.bench_receive import BARS as RECEIVE_BARS

RESULTS = Path("bench-results")
BENCHMARKS = ("bench_receive", "bench_transfer", "bench_memory", "bench_registry")


def ratios() -> list[dict[str, Any]]:
    """Return name, ratio and bar of each comparison of times with a peer."""
    rows = []
    receive = _load("bench_receive")
    for case, figure, above, below, comparison, bar in RECEIVE_BARS:
        if case not in receive:
            continue
        ratio = min(receive[case][above][figure]) / min(receive[case][below][figure])
        what = "receive" if figure == "seconds" else "processor time of receiving"
        if comparison == "<=":
            rows.append({"name": f"{what}, {case} / {below}", "ratio": ratio, "bar": bar})
        else:
            rows.append({"name": f"{what}, {case} / {above}", "ratio": 1 / ratio, "bar": 1 / bar})
    transfer = _load("bench_transfer")
    for case, figures in transfer.get("cases", {}).items():
        rows.append(
            {"name": f"RAD-69, {case} / {figures['beside']}", "ratio": figures["ratio"], "bar": transfer["bars"][case]}
        )
    return rows


def _load(name: str) -> dict[str, Any]:
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else {}


def main() -> int:
    RESULTS.mkdir(exist_ok=True)
    codes = {}
    for name in BENCHMARKS:
        file = RESULTS / f"{name}.json"
        file.unlink(missing_ok=True)  # what is told at the end was measured now
        command = [sys.executable, "-m", f"tests.bench.{name}", "--json", str(file)]
        codes[name] = subprocess.run(command, check=False).returncode
    if rows := ratios():
        table = Table("comparison", "ratio of best times", "bar", "", title="Our time over the other's")
        for row in rows:
            missed = "" if row["ratio"] <= row["bar"] else "MISSED"
            table.add_row(row["name"], f"{row['ratio']:.2f}", f"<= {row['bar']:.2f}", missed)
        Console(width=120).print(table)
        picture.throughput(rows, RESULTS / "throughput")
    if line := _load("bench_transfer").get("timeline"):
        picture.timeline(line, RESULTS / "timeline")
    for name in (name for name, code in codes.items() if code):
        print(f"{name}: a bar is missed or it failed")
    return max(codes.values())


sys.exit(main())
