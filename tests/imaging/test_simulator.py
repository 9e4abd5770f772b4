"""The scheduler in the simulator: the bars of thousands of transfers, and that the same seed gives the same result."""

from __future__ import annotations

import subprocess
import sys

import pytest

from conformance.simulator.__main__ import simulate
from conformance.simulator.figures import jain
from conformance.simulator.pacs import make_models


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
    def run(seed: int) -> str:
        arguments = ["--transfers", "60", "--pacs", "12", "--seed", str(seed)]
        command = [sys.executable, "-m", "conformance.simulator", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
        assert done.returncode in (0, 1), done.stderr
        return done.stdout.split("seconds to simulate")[0]

    first = run(3)
    assert "makespan ratio" in first
    assert run(3) == first
    assert run(4) != first


def test_a_missed_bar_is_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from conformance.simulator import __main__ as command

    monkeypatch.setattr(sys, "argv", ["simulator", "--transfers", "3", "--pacs", "1"])
    assert command.main() == 1  # so few leave associations idle
    assert "x lower bound, bar" in capsys.readouterr().out


def test_index_and_lower_bound() -> None:
    assert jain([1, 1, 1, 1]) == 1.0
    assert jain([1, 0, 0, 0]) == 0.25
    (model,) = make_models(1, 1).values()
    for number in range(100):
        model.add(str(number), "1.2", 1000)
    by_latency = 100 * model.latency / model.budget.associations
    assert model.seconds_of(model.objects) == max(by_latency, 100_000 / model.bandwidth)
