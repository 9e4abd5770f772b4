"""What may be asked of one PACS: how much at a time, how fast, when, and in which ways."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from xca_imaging.imaging.decisions import Method

LevelChoice = Literal["auto", "study", "series", "image"]

_DAY = 86400.0


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
        SOP Instance UIDs in one IMAGE level move: 128 UIDs of 64 characters are 8 KB, and PACSs that turn the list into
        one database query end at 1000 of them or sooner. 1 for a PACS that takes no lists.
    level : LevelChoice
        "study": studies that are wanted whole are moved at STUDY level. "series": series that are wanted whole are
        moved at SERIES level and never split. "image": everything by lists of SOP Instance UIDs. "auto": whichever
        keeps all associations busy with the fewest moves.
    bytes_per_second : int
        Long-term mean of what it is made to send; 0: no limit.
    hours : tuple of str
        Local times of day, such as "20:00-06:00", outside of which only emergencies are served; empty: always.
    """

    associations: int
    methods: tuple[Method, ...] = ("c-move",)
    uid_list_limit: int = 128
    level: LevelChoice = "auto"
    bytes_per_second: int = 0
    hours: tuple[str, ...] = ()


class OpeningHours:
    """Times of day at which a PACS may be asked.

    Parameters
    ----------
    hours : tuple of str
        "HH:MM-HH:MM" each; an end that is not after its start is on the next day. Empty: always open.
    """

    # Mutable state: what to add to the scheduler's time to get the seconds since midnight; None until told, and open
    # until then.

    def __init__(self, hours: tuple[str, ...]) -> None:
        spans = (each.split("-") for each in hours)
        self._spans = [(_seconds(start), _seconds(end)) for start, end in spans]
        self._offset: float | None = None

    def set_clock(self, seconds_of_day: float, now: float) -> None:
        """Learn what the wall clock shows."""
        self._offset = seconds_of_day - now

    def opens_in(self, now: float) -> float:
        """Return the seconds until it may be asked; 0 when it may now."""
        if not self._spans or self._offset is None:
            return 0.0
        time = (now + self._offset) % _DAY
        if any((time - start) % _DAY < _length(start, end) for start, end in self._spans):
            return 0.0
        return min((start - time) % _DAY for start, _ in self._spans)

    def closes_in(self, now: float) -> float | None:
        """Return the seconds until it may no longer be asked; None when that is never, or it may not now."""
        if not self._spans or self._offset is None or self.opens_in(now):
            return None
        time = (now + self._offset) % _DAY
        return max(
            _length(start, end) - (time - start) % _DAY
            for start, end in self._spans
            if (time - start) % _DAY < _length(start, end)
        )


def _seconds(text: str) -> float:
    hours, minutes = text.split(":")
    return int(hours) * 3600.0 + int(minutes) * 60.0


def _length(start: float, end: float) -> float:
    return (end - start) % _DAY or _DAY


class TokenBucket:
    """Bytes that may come: what has come too much is waited off before more is asked for.

    A move that runs is not slowed down, so bytes are paid for after they have come.

    Parameters
    ----------
    rate : int
        Bytes a second; 0: no limit.
    burst : float
        Seconds of quiet that may be made up for.
    """

    # Mutable state: the balance, and when it was brought up to date.

    def __init__(self, rate: int, burst: float = 1.0) -> None:
        self._rate, self._most = rate, rate * burst
        self._tokens, self._at = self._most, float("-inf")

    def take(self, size: int, now: float) -> None:
        """Pay for bytes that have come."""
        if self._rate:
            if self._at > float("-inf"):
                self._tokens = min(self._most, self._tokens + (now - self._at) * self._rate)
            self._at = now
            self._tokens -= size

    def ready_at(self, now: float) -> float:
        """Return when more may be asked for: `now`, or later."""
        if not self._rate or self._tokens >= 0:
            return now
        return max(now, self._at - self._tokens / self._rate)
