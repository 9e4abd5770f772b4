"""Simulate transfers, print the figures; the exit code is 1 when a bar is missed."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from conformance.simulator.figures import Figures, measure
from conformance.simulator.load import make_load
from conformance.simulator.pacs import make_models
from conformance.simulator.run import Simulation


def simulate(transfers: int, pacs: int, seed: int) -> Figures:
    """Run one simulation; the same arguments give the same figures."""
    models = make_models(pacs, seed)
    simulation = Simulation(models, make_load(models, transfers, seed), seed)
    simulation.run()
    return measure(simulation)


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m conformance.simulator", description=__doc__)
    parser.add_argument("--transfers", type=int, default=10_000, metavar="N")
    parser.add_argument("--pacs", type=int, default=50, metavar="N")
    parser.add_argument("--seed", type=int, default=1, metavar="S")
    parser.add_argument("--json", type=Path, metavar="F", help="write the figures to a file")
    arguments = parser.parse_args()
    started = time.monotonic()
    figures = simulate(arguments.transfers, arguments.pacs, arguments.seed)
    took = time.monotonic() - started
    for name, value in figures.as_json().items():
        sys.stdout.write(f"{name.replace('_', ' '):24}{value}\n")
    sys.stdout.write(f"{'seconds to simulate':24}{took:.1f}\n")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures.as_json(), indent=2) + "\n", encoding="utf-8")
    return 1 if figures.missed() else 0


if __name__ == "__main__":
    sys.exit(main())
