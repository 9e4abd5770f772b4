"""A modelled PACS: associations, latency, bandwidth, and the faults that PACSs are known for.

An association sends one object after the other. Each takes the latency of an object, while it goes over the link that
all associations share; so n objects of together B bytes take at least max(n * latency / associations, B / bandwidth).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from xca_imaging.errors import ConnectFailed, PeerBusy, PeerRefused
from xca_imaging.imaging.budget import Budget
from xca_imaging.imaging.decisions import Method, MoveFinished, StartMove


@dataclass(frozen=True, slots=True)
class Faults:
    """How often what goes wrong: shares of objects (`drops`) or moves, and what is never right."""

    drops: float = 0.0  # a sub-operation is left out
    rejects: float = 0.0  # A-ASSOCIATE-RJ 2/3/2 although there is an association left
    stalls: float = 0.0  # stops in the middle and says nothing more
    slow_starts: float = 0.0  # the first object takes seconds
    lies: bool = False  # reports every sub-operation as completed, with status Success
    refuses: tuple[str, ...] = ()  # methods answered with 0xA801
    away: tuple[float, float] | None = None  # from, until: no connection


@dataclass(slots=True)
class Model:
    """One PACS. `setup` is the time from a move's start to its first object, in seconds."""

    name: str
    budget: Budget
    latency: float
    bandwidth: float
    setup: float
    faults: Faults
    objects: dict[str, tuple[str, int]] = field(default_factory=dict)  # SOP Instance UID -> SOP class, bytes
    link_free: float = 0.0
    active: int = 0

    def add(self, uid: str, sop_class: str, size: int) -> None:
        """Store an object."""
        self.objects[uid] = (sop_class, size)

    def seconds_of(self, instances: Iterable[str]) -> float:
        """Return the lower bound for sending instances: max(n * latency / associations, bytes / bandwidth)."""
        sizes = [self.objects[uid][1] for uid in dict.fromkeys(instances)]
        return max(len(sizes) * self.latency / self.budget.associations, sum(sizes) / self.bandwidth)

    def work(self, uid: str) -> float:
        """Return one instance's part of `seconds_of`, whichever of the two is longer for it."""
        return max(self.latency / self.budget.associations, self.objects[uid][1] / self.bandwidth)


class Sending:
    """A move that runs at a modelled PACS.

    Parameters
    ----------
    at : callable
        Takes a delay in seconds and what is to be done then.
    offer, arrive : callable
        An object begins (takes SOP Instance UID and SOP class, returns the number of the store, None when it is
        refused) and is whole (takes the number and its size).
    finish : callable
        Takes the event that ends the move.
    """

    # Mutable state: what is still to be sent, what has been, and whether it is over.

    def __init__(
        self,
        model: Model,
        move: StartMove,
        *,
        randomness: random.Random,
        now: Callable[[], float],
        at: Callable[[float, Callable[[], None]], None],
        offer: Callable[[str, str], int | None],
        arrive: Callable[[int, int], None],
        finish: Callable[[MoveFinished], None],
    ) -> None:
        self._model, self._move, self._now, self._at = model, move, now, at
        self._offer, self._arrive, self._finish = offer, arrive, finish
        faults = model.faults
        self._is_over = False
        self._sent = 0
        self._dropped: list[str] = []
        self._left = list(reversed(move.instances))
        self._stalls_at = -1
        model.active += 1
        if faults.away is not None and faults.away[0] <= now() < faults.away[1]:
            at(0.1, lambda: self._end(MoveFinished(move.move, error=ConnectFailed(model.name, "refused"))))
        elif model.active > model.budget.associations or randomness.random() < faults.rejects:
            busy = PeerBusy(model.name, "association rejected (2/3/2)")
            at(model.setup, lambda: self._end(MoveFinished(move.move, error=busy)))
        elif move.method in faults.refuses:
            refused = PeerRefused(model.name, "status 0xA801, move destination unknown")
            at(model.setup, lambda: self._end(MoveFinished(move.move, error=refused)))
        else:
            if faults.drops:
                self._dropped = [uid for uid in move.instances if randomness.random() < faults.drops]
                self._left = [uid for uid in self._left if uid not in set(self._dropped)]
            if randomness.random() < faults.stalls:
                self._stalls_at = randomness.randrange(len(move.instances))
            slow = randomness.uniform(1.0, 3.0) if randomness.random() < faults.slow_starts else 0.0
            at(model.setup + slow, self._send)

    def cancel(self) -> None:
        """C-CANCEL: it ends with the object that is being sent."""
        if not self._is_over:
            self._left = []
            self._at(1.0, lambda: self._end(MoveFinished(self._move.move, 0xFE00, self._sent)))

    def _send(self) -> None:
        if self._is_over:
            return
        if self._sent == self._stalls_at:
            return
        model = self._model
        if not self._left:
            lies = model.faults.lies or not self._dropped
            completed = len(self._move.instances) if lies else self._sent
            self._end(MoveFinished(self._move.move, 0 if lies else 0xB000, completed))
            return
        uid = self._left.pop()
        sop_class, size = model.objects[uid]
        store = self._offer(uid, sop_class)
        now = self._now()
        if store is None:
            self._at(model.latency, self._send)
            return
        model.link_free = max(now, model.link_free) + size / model.bandwidth
        self._at(max(model.latency, model.link_free - now), lambda: self._arrived(store, size))

    def _arrived(self, store: int, size: int) -> None:
        self._sent += 1
        self._arrive(store, size)
        self._send()

    def _end(self, event: MoveFinished) -> None:
        if not self._is_over:
            self._is_over = True
            self._model.active -= 1
            self._finish(event)


def make_models(count: int, seed: int) -> dict[str, Model]:
    """Return PACSs of many kinds: most of them well, each fault in some."""
    randomness = random.Random(seed)
    kinds = (
        Faults(),
        Faults(),
        Faults(drops=0.01),
        Faults(),
        Faults(rejects=0.02),
        Faults(),
        Faults(slow_starts=0.05),
        Faults(),
        Faults(drops=0.005, lies=True),
        Faults(stalls=0.001),
        Faults(),
        Faults(refuses=("c-move",)),
    )
    models = {}
    for number in range(count):
        name = f"pacs-{number + 1}"
        faults = kinds[number % len(kinds)]
        if number % 25 == 24:
            faults = Faults(away=(100.0, 130.0))
        methods: tuple[Method, ...] = ("c-move", "c-get") if faults.refuses else ("c-move",)
        models[name] = Model(
            name,
            Budget(randomness.randint(1, 6), methods),
            latency=randomness.uniform(0.01, 0.08),
            bandwidth=randomness.uniform(10e6, 120e6),
            setup=randomness.uniform(0.01, 0.05),
            faults=faults,
        )
    return models
