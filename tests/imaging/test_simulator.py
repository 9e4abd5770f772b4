"""The scheduler in the simulator: the bars of thousands of transfers, and that the same seed gives the same result."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import pytest

from conformance.simulator.__main__ import simulate
from conformance.simulator.figures import Figures, jain, measure
from conformance.simulator.load import COMMUNITIES, Community, Transfer
from conformance.simulator.pacs import Faults, Model, make_models
from conformance.simulator.run import Simulation
from xca_imaging.imaging.budget import Budget
from xca_imaging.imaging.decisions import Priority
from xca_imaging.imaging.ledger import Want
from xca_imaging.imaging.plan import SeriesFetch


def test_hundreds_of_transfers() -> None:
    figures = simulate(transfers=500, pacs=10, seed=1)
    assert figures.missed() == []
    assert figures.complete + figures.partial + figures.failed + figures.withdrawn == 500
    assert figures.complete > 480


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [1, 2])
def test_ten_thousand_transfers(seed: int) -> None:
    figures = simulate(transfers=10_000, pacs=50, seed=seed)
    assert figures.missed() == []
    assert figures.instances > 1_000_000


def test_same_seed_same_figures_another_seed_others() -> None:
    # In processes of their own, because the order of sets of strings differs from one to the next.
    def output(seed: int) -> str:
        arguments = ["--transfers", "60", "--pacs", "12", "--seed", str(seed)]
        command = [sys.executable, "-m", "conformance.simulator", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
        assert done.returncode in (0, 1), done.stderr
        return done.stdout.split("seconds to simulate")[0]

    first = output(3)
    assert "makespan ratio" in first
    assert output(3) == first
    assert output(4) != first


def test_a_missed_bar_is_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from conformance.simulator import __main__ as command

    monkeypatch.setattr(sys, "argv", ["simulator", "--transfers", "3", "--pacs", "1"])
    assert command.main() == 1  # so few leave associations idle
    assert "x lower bound, bar" in capsys.readouterr().out


def run(sizes: Sequence[Sequence[int]], communities: Sequence[Community]) -> Figures:
    """Simulate studies of so many instances in each series, at one PACS with 20 ms an object and 4 associations."""
    model = Model("main", Budget(4), latency=0.02, bandwidth=1e9, setup=0.01, faults=Faults())
    load = []
    for number, counts in enumerate(sizes, 1):
        study = f"1.2.{number}"
        fetches = []
        for index, count in enumerate(counts, 1):
            wants = tuple(Want(study, f"{study}.{index}", f"{study}.{index}.{n}", "main") for n in range(count))
            fetches.append(SeriesFetch("main", study, f"{study}.{index}", wants, count, study_count=sum(counts)))
            for want in wants:
                model.add(want.sop_instance_uid, "1.2.840.10008.5.1.4.1.1.2", 2048)
        community = communities[number % len(communities)]
        load.append(Transfer(number, 0.0, community, Priority.ROUTINE, "main", tuple(fetches), None))
    simulation = Simulation({"main": model}, load, seed=1)
    simulation.run()
    return measure(simulation)


@pytest.mark.parametrize("counts", [[400], [100] * 4, [300, 50, 50], [1] * 10 + [390], [40] * 10])
def test_one_study_keeps_four_associations_busy(counts: list[int]) -> None:
    figures = run([counts], COMMUNITIES[:1])
    assert figures.complete == 1
    assert figures.makespan_ratio <= 1.1
    assert figures.over_budget == figures.rejected == 0


def test_a_hundred_requests_of_two_communities() -> None:
    figures = run([[20 + n % 7, 5] for n in range(100)], COMMUNITIES[:2])
    assert figures.complete == 100
    assert figures.makespan_ratio <= 1.1
    assert figures.over_budget == figures.rejected == 0
    assert figures.jain >= 0.95


def test_index_and_lower_bound() -> None:
    assert jain([1, 1, 1, 1]) == 1.0
    assert jain([1, 0, 0, 0]) == 0.25
    (model,) = make_models(1, 1).values()
    for number in range(100):
        model.add(str(number), "1.2", 1000)
    by_latency = 100 * model.latency / model.budget.associations
    assert model.seconds_of(model.objects) == max(by_latency, 100_000 / model.bandwidth)
