"""A circuit breaker: a PACS that does not answer is left alone for a while, and told about at once.

References
----------
* M. Nygard, Release It!, "Circuit Breaker": closed, open, half-open with one probe
"""

from __future__ import annotations

from xca_imaging.errors import RegistryError


class Breaker:
    """Whether one way to make one PACS send is used.

    Closed: moves are started. Open: none is, until a pause is over. Then half-open: one is, and what becomes of it
    closes the breaker or opens it again, for twice as long.

    Parameters
    ----------
    threshold : int
        Failures in a row that open it. Moves that failed together count once: one outage, however many felt it.
    pause, max_pause : float
        Seconds that it stays open at first, and at most.
    """

    # Mutable state: failures in a row (their subjects, the last one's time), how often it opened in a row, since when
    # and until when it is open and why, and the number of the move that probes.

    def __init__(self, threshold: int = 3, pause: float = 5.0, max_pause: float = 240.0) -> None:
        self._threshold, self._pause, self._max_pause = threshold, pause, max_pause
        self._failures, self._subjects, self._failed_at = 0, set[str](), float("-inf")
        self._trips = 0
        self._since: float | None = None
        self._until = 0.0
        self._reason: RegistryError | None = None
        self.has_worked = False
        self.probe: int | None = None

    @property
    def is_closed(self) -> bool:
        return self._since is None

    def admits(self, now: float) -> bool:
        """Tell whether a move may start."""
        return self._since is None or (now >= self._until and self.probe is None)

    def start(self, move: int) -> None:
        """Learn that a move starts; while half-open it is the probe."""
        if self._since is not None:
            self.probe = move

    def end(self, move: int) -> None:
        """Learn that a move ended; a probe that neither failed nor worked leaves the place to another."""
        if self.probe == move:
            self.probe = None

    def succeed(self) -> None:
        """Something came: closed."""
        self._failures, self._trips, self._since, self.probe = 0, 0, None, None
        self._subjects.clear()
        self.has_worked = True

    def fail(self, started: float, now: float, reason: RegistryError, *, subject: str = "") -> bool:
        """A move that began at `started` brought nothing; return whether that opens the breaker.

        With a `subject` (a study) the PACS answered, and it may be that study's fault: it counts once.
        """
        if self._since is not None:
            return self.trip(now, reason)
        if started < self._failed_at or (subject and subject in self._subjects):
            return False
        self._failed_at = now
        self._failures += 1
        self._subjects.add(subject)
        return self._failures >= self._threshold and self.trip(now, reason)

    def trip(self, now: float, reason: RegistryError, *, pause: float | None = None) -> bool:
        """Open it, for a given time or one that doubles; True."""
        if self._since is None:
            self._since = now
        elif now < self._until:
            return True  # more of the same outage
        self._until = now + (pause or min(self._max_pause, self._pause * 2**self._trips))
        self._trips += 1
        self._reason, self.probe = reason, None
        return True

    def explain(self, now: float) -> str:
        """Return since when it is open and why."""
        if self._since is None or self._reason is None:
            return ""
        wait = max(0.0, self._until - now)
        return f"not asked since {now - self._since:.0f} s ago, next try in {wait:.0f} s: {self._reason.context}"
