"""What may be asked of one PACS: how much at a time, how fast, when, and in which ways. Data, not decisions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from xca_imaging.imaging.decisions import Method

LevelChoice = Literal["auto", "study", "series", "image"]


@dataclass(frozen=True, slots=True)
class Budget:
    """The share of a PACS that is ours, and its quirks.

    Parameters
    ----------
    associations : int
        Moves and queries at a time.
    methods : tuple of Method
        Ways to make it send, the preferred one first; the others are fallen back to.
    uid_list_limit : int
        SOP Instance UIDs in one IMAGE level move; see `backends.cmove.UID_LIST_LIMIT`. 1 for a PACS that takes no
        lists.
    level : LevelChoice
        "study": studies that are wanted whole are moved at STUDY level. "series": series that are wanted whole are
        moved at SERIES level and never split. "image": everything by lists of SOP Instance UIDs. "auto": whichever
        keeps all associations busy with the fewest moves.
    bytes_per_second : int
        Long-term mean of what it is made to send; 0: no limit.
    hours : tuple of str
        Times of day, such as "20:00-06:00", outside of which only emergencies are served; empty: always.
    """

    associations: int
    methods: tuple[Method, ...] = ("c-move",)
    uid_list_limit: int = 128
    level: LevelChoice = "auto"
    bytes_per_second: int = 0
    hours: tuple[str, ...] = ()
