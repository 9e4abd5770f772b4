"""The ledger of one request: every wanted instance starts missing and ends held or failed with a reason.

It is the only source for the answer, the receipt and the audit record. What a PACS counts (sub-operations, final
status) never changes it; only bytes that arrived whole do.

References
----------
* IHE RAD TF-2, 3.69 (RAD-69: one RegistryError for each document that is not returned)
* IHE ITI TF-3, 4.2.4 (Success, PartialSuccess, Failure)
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from xca_imaging import uids
from xca_imaging.errors import LocalProtocolError, RegistryError


@dataclass(frozen=True, slots=True)
class Want:
    """One instance as a request names it: StudyRequest, SeriesRequest and DocumentRequest of RAD-69.

    All of it is the key: the same SOP Instance UID under another series, or of another repository, is another want
    and may have another end.
    """

    study_instance_uid: str
    series_instance_uid: str
    sop_instance_uid: str
    repository_unique_id: str
    home_community_id: str = ""


class State(enum.Enum):
    """Where a wanted instance stands."""

    MISSING = "missing"
    ARRIVING = "arriving"
    HELD = "held"
    FAILED = "failed"


class Event(enum.Enum):
    """What can happen to a wanted instance."""

    BEGIN = "its C-STORE began"
    LOSE = "its C-STORE ended before it was whole"
    HOLD = "it is held whole"
    FAIL = "it will not come"


# Every cell that is not here is a defect. Held is final: nothing that a peer says later takes an instance away.
TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.MISSING, Event.BEGIN): State.ARRIVING,
    (State.MISSING, Event.HOLD): State.HELD,  # the spool had it already
    (State.MISSING, Event.FAIL): State.FAILED,
    (State.ARRIVING, Event.BEGIN): State.ARRIVING,  # the same instance on a second association
    (State.ARRIVING, Event.LOSE): State.MISSING,
    (State.ARRIVING, Event.HOLD): State.HELD,
    (State.ARRIVING, Event.FAIL): State.FAILED,
}


@dataclass(slots=True)
class Entry:
    """One line of the ledger.

    Attributes
    ----------
    error : RegistryError, optional
        Why it will not come.
    size : int
        Bytes as they are delivered.
    sha256 : str
        Of these bytes, lower-case hexadecimal; empty until they have passed once.
    attempts : int
        Moves that were to bring it; 0 when it was held before or refused at once.
    pacs, method : str
        Which PACS sent it, and how; empty when it was held before.
    bytes_changed : bool
        True when it was transcoded here: not the bytes that the PACS sent.
    """

    want: Want
    state: State = State.MISSING
    error: RegistryError | None = None
    size: int = 0
    transfer_syntax_uid: str = ""
    attempts: int = 0
    sha256: str = ""
    pacs: str = ""
    method: str = ""
    bytes_changed: bool = False


@dataclass(frozen=True, slots=True)
class Summary:
    """A ledger in numbers, for metrics, logs and audit.

    `wanted` is the sum of `held`, `failed` and `open`. `cached` are those held without a move, `retried` those held
    after more than one, `changed` those transcoded; `size` is of all that are held, in bytes. `methods` counts what was
    held by the way it came, `errors` what failed by error code.
    """

    wanted: int
    held: int
    failed: int
    open: int
    cached: int
    retried: int
    changed: int
    size: int
    methods: Mapping[str, int]
    errors: Mapping[str, int]

    @property
    def status(self) -> str:
        """The ResponseStatusType (ITI TF-3, 4.2.4.1): Success only when everything wanted is held."""
        if self.held == self.wanted:
            return uids.STATUS_SUCCESS
        return uids.STATUS_PARTIAL_SUCCESS if self.held else uids.STATUS_FAILURE


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a ledger says at one moment, in the order of the request."""

    held: tuple[Want, ...]
    failed: tuple[tuple[Want, RegistryError], ...]
    missing: tuple[Want, ...]

    @property
    def status(self) -> str:
        """The ResponseStatusType (ITI TF-3, 4.2.4.1): Success only when everything wanted is held."""
        if not self.failed and not self.missing:
            return uids.STATUS_SUCCESS
        return uids.STATUS_PARTIAL_SUCCESS if self.held else uids.STATUS_FAILURE


class Ledger:
    """State of every wanted instance of one request; the same want listed twice is one line."""

    # Mutable state: the entries, and `_open`, the number of them that are missing or arriving.

    def __init__(self, wants: Iterable[Want]) -> None:
        self._entries = {want: Entry(want) for want in wants}
        self._open = len(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def __getitem__(self, want: Want) -> Entry:
        try:
            return self._entries[want]
        except KeyError:
            raise LocalProtocolError(f"instance {want.sop_instance_uid} is not in this ledger") from None

    @property
    def complete(self) -> bool:
        """True when nothing is missing or arriving any more."""
        return self._open == 0

    def begin(self, want: Want) -> None:
        """Its bytes have started to arrive."""
        self._move(want, Event.BEGIN)

    def lose(self, want: Want) -> None:
        """The arrival broke off; it is missing again."""
        self._move(want, Event.LOSE)

    def hold(
        self,
        want: Want,
        *,
        size: int,
        transfer_syntax_uid: str,
        attempts: int = 0,
        pacs: str = "",
        method: str = "",
        bytes_changed: bool = False,
        sha256: str = "",
    ) -> None:
        """It is in the spool, whole."""
        entry = self._move(want, Event.HOLD)
        entry.size, entry.transfer_syntax_uid, entry.attempts = size, transfer_syntax_uid, attempts
        entry.pacs, entry.method, entry.bytes_changed, entry.sha256 = pacs, method, bytes_changed, sha256

    def digest(self, want: Want, sha256: str) -> None:
        """Its bytes have passed, and this is their SHA-256."""
        entry = self[want]
        if entry.state is not State.HELD:
            raise LocalProtocolError(f"instance {want.sop_instance_uid} is {entry.state.value}: it has no digest")
        entry.sha256 = sha256

    def fail(self, want: Want, error: RegistryError, *, attempts: int = 0) -> None:
        """It will not come, and `error` tells the requester why."""
        entry = self._move(want, Event.FAIL)
        entry.error, entry.attempts = error, attempts

    def outcome(self) -> Outcome:
        """Return what is held, what failed and why, and what is still open."""
        entries = self._entries.values()
        return Outcome(
            held=tuple(e.want for e in entries if e.state is State.HELD),
            failed=tuple((e.want, e.error) for e in entries if e.error is not None),
            missing=tuple(e.want for e in entries if e.state in (State.MISSING, State.ARRIVING)),
        )

    def summary(self) -> Summary:
        """Count."""
        held = [entry for entry in self if entry.state is State.HELD]
        errors = [entry.error.code for entry in self if entry.error is not None]
        return Summary(
            wanted=len(self),
            held=len(held),
            failed=len(errors),
            open=self._open,
            cached=sum(entry.attempts == 0 for entry in held),
            retried=sum(entry.attempts > 1 for entry in held),
            changed=sum(entry.bytes_changed for entry in held),
            size=sum(entry.size for entry in held),
            methods=Counter(entry.method for entry in held if entry.method),
            errors=Counter(errors),
        )

    def _move(self, want: Want, event: Event) -> Entry:
        entry = self[want]
        try:
            entry.state = TRANSITIONS[entry.state, event]
        except KeyError:
            raise LocalProtocolError(
                f"instance {want.sop_instance_uid} is {entry.state.value}: {event.value!r} cannot happen to it"
            ) from None
        if entry.state in (State.HELD, State.FAILED):
            self._open -= 1
        return entry
