"""Pictures (SVG and PNG) of what was measured: ratios beside the peers, and the timeline of one retrieval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

OURS, OTHER, MARK = "#1f6f8b", "#c9cdd2", "#b3392f"


def throughput(rows: Sequence[Mapping[str, Any]], target: Path) -> None:
    """Draw one bar for each comparison: our time over the other's; left of the line at 1 we are faster.

    Parameters
    ----------
    rows : sequence of mapping
        "name", "ratio" and "bar" (the highest ratio that is good enough).
    """
    figure, axes = plt.subplots(figsize=(9, 0.5 * len(rows) + 1.4), layout="constrained")
    ratios = [row["ratio"] for row in rows]
    texts = [f"{ratio:.2f}" if ratio >= 0.1 else f"1/{1 / ratio:.0f}" for ratio in ratios]
    names = [f"{row['name']}: {text}" for row, text in zip(rows, texts, strict=True)]
    axes.barh(names, ratios, color=OURS, height=0.55)
    for index, row in enumerate(rows):
        axes.plot([row["bar"]] * 2, [index - 0.38, index + 0.38], color=MARK, linewidth=2)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlim(0, max(1.3, *ratios, *(row["bar"] for row in rows)) * 1.1)
    axes.set_xlabel("our time over the other's, best of the rounds (red: the bar)")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, target)


def timeline(line: Mapping[str, Any], target: Path) -> None:
    """Draw one retrieval: its moves, the associations that brought instances, bytes that arrived and that left."""
    figure, (lanes, curves) = plt.subplots(
        2, 1, figsize=(9, 5.5), sharex=True, layout="constrained", height_ratios=(1, 2)
    )
    rows = [(f"move {n}, {each['level']}", each, OURS) for n, each in enumerate(line["moves"], 1)]
    rows += [(f"association {n}", each, OTHER) for n, each in enumerate(line["associations"], 1)]
    for index, (_, each, colour) in enumerate(rows):
        lanes.barh(index, each["end"] - each["start"], left=each["start"], color=colour, height=0.6)
    lanes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    lanes.invert_yaxis()
    for key, label, colour in (("bytes_arrived", "from the PACS", OURS), ("bytes_left", "to the requester", MARK)):
        points = line[key]
        curves.step(
            [at for at, _ in points], [size / 1e6 for _, size in points], where="post", label=label, color=colour
        )
    curves.set_xlabel("seconds from the request")
    curves.set_ylabel("MB")
    curves.set_xlim(0, line["seconds"] * 1.02)
    curves.set_ylim(bottom=0)
    curves.legend(loc="upper left", frameon=False)
    for axes in (lanes, curves):
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, target)


def _save(figure: Any, target: Path) -> None:
    for suffix in (".svg", ".png"):
        figure.savefig(target.with_suffix(suffix), dpi=120)
    plt.close(figure)
