"""What a simulation has shown, and the bars that it is held against."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from conformance.simulator.load import COMMUNITIES
from conformance.simulator.run import Simulation
from xca_imaging.imaging.decisions import Priority

MAKESPAN = 1.1
JAIN = 0.95
WAIT = 1.25


@dataclass(frozen=True, slots=True)
class Figures:
    """All of a simulation in numbers.

    Attributes
    ----------
    makespan, lower_bound : float
        Seconds, summed over the PACSs: from the first request to the last instance, and max(n * latency /
        associations, bytes / bandwidth) of the instances that came.
    jain : float
        Jain's index of what communities got, while others waited at the same PACS, over what their weights say: 1 is
        fair, 1/n is all for one.
    longest_wait : float
        Of a transfer that is no prefetch, over the time in which its community's share of the PACS alone would have
        served it (and what moves that are not broken off may add): above 1 others took of its share.
    rejected, over_budget : int
        Associations that PACSs rejected, and moves that were started although none was left.
    """

    transfers: int
    complete: int
    partial: int
    failed: int
    withdrawn: int
    unfinished: int
    instances: int
    steps: int
    virtual_seconds: float
    makespan: float
    lower_bound: float
    makespan_ratio: float
    jain: float
    jain_lowest: float
    longest_wait: float
    longest_wait_seconds: dict[str, float]
    rejected: int
    over_budget: int
    moves: int
    moves_per_instance: float
    longest_move: float

    def missed(self) -> list[str]:
        """Return the bars that are missed, in words."""
        bars = (
            (self.unfinished == 0, f"{self.unfinished} transfers or moves never ended"),
            (self.makespan_ratio <= MAKESPAN, f"makespan {self.makespan_ratio:.3f} x lower bound, bar {MAKESPAN}"),
            (self.jain >= JAIN, f"Jain index {self.jain:.3f}, bar {JAIN}"),
            (self.longest_wait <= WAIT, f"longest wait {self.longest_wait:.2f} x guaranteed, bar {WAIT}"),
            (self.over_budget == 0, f"{self.over_budget} moves over the budget of their PACS"),
        )
        return [text for holds, text in bars if not holds]

    def as_json(self) -> dict[str, object]:
        """Return what stands here and which bars are missed."""
        return {**asdict(self), "missed": self.missed()}


def measure(simulation: Simulation) -> Figures:
    """Read the figures off a simulation that has ended."""
    standings = list(simulation.standings.values())
    ended = [each for each in standings if each.ended is not None]
    tallies = simulation.tallies
    makespan = sum(max(0.0, t.last_arrived - (t.first_asked or 0.0)) for t in tallies.values())
    bound = sum(simulation.models[name].seconds_of(t.arrived) for name, t in tallies.items())
    instances = sum(len(t.arrived) for t in tallies.values())
    moves = sum(t.moves for t in tallies.values())
    shares = {
        name: [t.served[c.name] / t.fair[c.name] for c in COMMUNITIES if t.fair[c.name] > 0]
        for name, t in tallies.items()
    }
    pooled = [
        sum(t.served[c.name] for t in tallies.values()) / fair
        for c in COMMUNITIES
        if (fair := sum(t.fair[c.name] for t in tallies.values())) > 0
    ]
    waits: dict[str, float] = dict.fromkeys((each.name.lower() for each in Priority), 0.0)
    longest = 0.0
    for each in ended:
        wait = (each.ended or 0.0) - each.transfer.time
        level = each.transfer.priority.name.lower()
        waits[level] = max(waits[level], wait)
        if each.transfer.priority is not Priority.PREFETCH:
            longest = max(longest, wait / (each.promise + simulation.allowance(each.transfer.pacs)))
    return Figures(
        transfers=len(standings),
        complete=sum(each.failed == 0 for each in ended),
        partial=sum(each.failed > 0 and each.held > 0 for each in ended),
        failed=sum(each.held == 0 for each in ended),
        withdrawn=sum(each.ended is None and each.left == 0 for each in standings),
        unfinished=sum(each.left > 0 for each in standings) + simulation.waiting,
        instances=instances,
        steps=simulation.steps,
        virtual_seconds=round(simulation.now, 3),
        makespan=round(makespan, 3),
        lower_bound=round(bound, 3),
        makespan_ratio=round(makespan / bound, 4) if bound else 0.0,
        jain=round(jain(pooled), 4),
        jain_lowest=round(min(map(jain, shares.values()), default=1.0), 4),
        longest_wait=round(longest, 3),
        longest_wait_seconds={level: round(wait, 3) for level, wait in waits.items()},
        rejected=sum(t.rejected for t in tallies.values()),
        over_budget=sum(t.over_budget for t in tallies.values()),
        moves=moves,
        moves_per_instance=round(moves / instances, 4) if instances else 0.0,
        longest_move=round(max(t.longest_move for t in tallies.values()), 3),
    )


def jain(values: Iterable[float]) -> float:
    """Return Jain's fairness index: (sum x)^2 / (n sum x^2)."""
    listed = list(values)
    squares = sum(each * each for each in listed)
    return sum(listed) ** 2 / (len(listed) * squares) if squares else 1.0
