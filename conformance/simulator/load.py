"""What is asked of which PACS, by whom and when: made up by seed."""

from __future__ import annotations

import random
from dataclasses import dataclass

from conformance.simulator.pacs import Model
from xca_imaging import uids
from xca_imaging.imaging.decisions import Priority
from xca_imaging.imaging.ledger import Want
from xca_imaging.imaging.plan import SeriesFetch

_KB = 1024
# SOP class, mean size of an object in bytes, share of the studies, series in a study, instances in a series.
MODALITIES = (
    ("1.2.840.10008.5.1.4.1.1.2", 512 * _KB, 0.5, (1, 4), (20, 120)),  # CT
    ("1.2.840.10008.5.1.4.1.1.4", 160 * _KB, 0.3, (3, 8), (10, 40)),  # MR
    ("1.2.840.10008.5.1.4.1.1.1.1", 8192 * _KB, 0.15, (1, 2), (1, 3)),  # DX
    ("1.2.840.10008.5.1.4.1.1.6.1", 1024 * _KB, 0.05, (1, 1), (5, 30)),  # US
)


@dataclass(frozen=True, slots=True)
class Community:
    """Who asks: its weight, its share of the requests, and the transfer syntaxes that it accepts."""

    name: str
    weight: float
    share: float
    accept: tuple[str, ...]


_LOSSLESS = ("1.2.840.10008.1.2.4.70", uids.EXPLICIT_VR_LITTLE_ENDIAN)
_PLAIN = (uids.EXPLICIT_VR_LITTLE_ENDIAN,)

COMMUNITIES = (
    Community("north", 1.0, 0.40, _LOSSLESS),  # asks for far more than its share
    Community("east", 1.0, 0.15, _LOSSLESS),
    Community("south", 1.0, 0.15, _LOSSLESS),
    Community("west", 2.0, 0.15, _LOSSLESS),
    Community("isles", 1.0, 0.15, _PLAIN),  # never served beside the others
)


@dataclass(frozen=True, slots=True)
class Transfer:
    """One request: at `time`, in seconds; `leaves_after` seconds nobody waits for it any more, if not None."""

    number: int
    time: float
    community: Community
    priority: Priority
    pacs: str
    fetches: tuple[SeriesFetch, ...]
    leaves_after: float | None


def make_load(models: dict[str, Model], transfers: int, seed: int) -> list[Transfer]:
    """Return transfers, spread evenly over the PACSs and in the order of their times.

    A tenth comes at once, the rest until three quarters of the time that the PACS needs for all of it: each has more to
    do than it can, and none runs dry before the end.
    """
    randomness = random.Random(seed)
    planned: dict[str, list[Transfer]] = {name: [] for name in models}
    names = list(models)
    for number in range(1, transfers + 1):
        model = models[names[number % len(names)]]
        (community,) = randomness.choices(COMMUNITIES, [each.share for each in COMMUNITIES])
        (priority,) = randomness.choices(list(Priority), [0.02, 0.9, 0.08])
        earlier = planned[model.name]
        if earlier and randomness.random() < 0.03:  # somebody else's study: coalesced while it is wanted
            fetches = randomness.choice(earlier[-5:]).fetches
        else:
            fetches = _study(model, number, randomness)
        leaves_after = randomness.uniform(0, 60) if randomness.random() < 0.01 else None
        earlier.append(Transfer(number, 0.0, community, priority, model.name, fetches, leaves_after))
    load: list[Transfer] = []
    for name, each in planned.items():
        span = 0.75 * models[name].seconds_of(
            want.sop_instance_uid for t in each for f in t.fetches for want in f.wants
        )
        times = sorted(max(0.0, randomness.uniform(-0.1, 0.9) / 0.9 * span) for _ in each)
        load += [
            Transfer(t.number, time, t.community, t.priority, t.pacs, t.fetches, t.leaves_after)
            for t, time in zip(each, times, strict=True)
        ]
    return sorted(load, key=lambda each: (each.time, each.number))


def _study(model: Model, number: int, randomness: random.Random) -> tuple[SeriesFetch, ...]:
    ((sop_class, size, _, many, long),) = randomness.choices(MODALITIES, [each[2] for each in MODALITIES])
    study = f"1.2.{number}"
    counts = [randomness.randint(*long) for _ in range(randomness.randint(*many))]
    fetches = []
    is_part = randomness.random() < 0.1
    for index, count in enumerate(counts, 1):
        series = f"{study}.{index}"
        wanted = randomness.randint(1, count) if is_part else count
        wants = tuple(Want(study, series, f"{series}.{n}", model.name) for n in range(1, wanted + 1))
        classes = {want.sop_instance_uid: sop_class for want in wants} if is_part else {}
        fetches.append(SeriesFetch(model.name, study, series, wants, count, classes, study_count=sum(counts)))
        for want in wants:
            model.add(want.sop_instance_uid, sop_class, int(size * randomness.uniform(0.7, 1.3)))
    return tuple(fetches)
