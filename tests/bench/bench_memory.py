"""Memory of a node while it serves a study of 2 GB by RAD-69, and the rate from PACS to file.

    python -m tests.bench.bench_memory [--slices N] [--json FILE]

Orthanc holds N slices of 512 KiB in four series; `publish` and `retrieve` are the ordinary commands. The receiving
side is another process, so the figure is the node's alone: peak resident memory above that of the idle node.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.support import images, peers
from tests.support.node import Node, Peak, pacs_section

CEILING = 100  # MB above idle, whatever the size of the study
MEMORY = Path("/dev/shm")
SLICE = 512 * 1024


def measure(slices: int, workspace: Path) -> dict[str, float]:
    """Serve one study and return sizes in MB and times in seconds."""
    study = images.big_ct(workspace / "study", slices, series_count=4)
    node = Node(workspace / "node")
    with peers.Orthanc(workspace / "pacs", [node.entity]) as pacs:
        pacs.upload(study.paths)
        shutil.rmtree(workspace / "study")
        node.config["pacs"] = [pacs_section(pacs, assigning_authority=images.AUTHORITY)]
        with node:
            node.publish(study)
            idle = node.rss()
            started = time.perf_counter()
            with Peak(node) as peak:
                receipt = node.retrieve(workspace / "out", "--study", study.uid, deadline=600)
            seconds = time.perf_counter() - started
            receipt.check(study.instances)
    megabytes = slices * SLICE / 1e6
    return {
        "study_mb": megabytes,
        "idle_mb": idle / 1e6,
        "peak_mb": peak.value / 1e6,
        "growth_mb": (peak.value - idle) / 1e6,
        "seconds": seconds,
        "mb_per_s": megabytes / seconds,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slices", type=int, default=4000)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args(arguments)
    if shutil.which("Orthanc") is None:
        print("bench_memory: skipped, Orthanc is not installed")
        return 0
    room = 4 * chosen.slices * SLICE
    folder = MEMORY if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > room else None
    with tempfile.TemporaryDirectory(prefix="bench-memory-", dir=folder) as workspace:
        figures = measure(chosen.slices, Path(workspace))
    print(f"\nRAD-69 of a study of {figures['study_mb']:.0f} MB, PACS to files, node's resident memory")
    print(f"{'idle MB':>9} {'peak MB':>9} {'growth MB':>10} {'seconds':>9} {'MB/s':>7}")
    print(
        f"{figures['idle_mb']:9.0f} {figures['peak_mb']:9.0f} {figures['growth_mb']:10.0f}"
        f" {figures['seconds']:9.1f} {figures['mb_per_s']:7.0f}"
    )
    holds = figures["growth_mb"] <= CEILING
    print(f"{'ok    ' if holds else 'MISSED'} growth {figures['growth_mb']:.0f} MB, wanted <= {CEILING}")
    if chosen.json:
        chosen.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
