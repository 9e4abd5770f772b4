"""What one request has of its instances: its ledger, what is held for it, and what happened, as events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass

from xca_imaging.errors import LocalProtocolError, RegistryError
from xca_imaging.imaging.ledger import Ledger, State, Want
from xca_imaging.imaging.spool import SpooledInstance, SpoolWriter

_OPEN = (State.MISSING, State.ARRIVING)


@dataclass(frozen=True, slots=True)
class Begun:
    """A wanted instance has started to arrive in an accepted transfer syntax; `arriving.reader()` reads along.

    Only in streaming transfers, and not for every instance: `Arrived` or `Failed` follows for each. An arrival that
    breaks off ends its readers with ArrivalBroken; the instance may begin again.
    """

    want: Want
    arriving: SpoolWriter


@dataclass(frozen=True, slots=True)
class Arrived:
    """A wanted instance is held."""

    want: Want
    instance: SpooledInstance


@dataclass(frozen=True, slots=True)
class Failed:
    """A wanted instance will not come."""

    want: Want
    error: RegistryError


@dataclass(frozen=True, slots=True)
class Brought:
    """How an instance came: moves that were to bring it, PACS and method (empty when it was held before)."""

    attempts: int = 0
    pacs: str = ""
    method: str = ""


class Transfer:
    """What one request has of its instances, for as long as its context is open.

    Attributes
    ----------
    ledger : Ledger
    accept : tuple of str
        TransferSyntaxUIDList of the request.
    is_streaming : bool
        Its consumer takes each instance as it comes, and lets go of it with `release`.
    backlog : int
        Bytes that are held.
    is_slow : bool
        What `set_throttled` said last.
    on_pace : callable
        Called when backlog or `is_slow` has changed.
    """

    # Mutable state: the ledger, what is wanted by SOP Instance UID, held instances and their bytes, the consumer's own
    # word of its pace, whether the plan is proved, the log of what happened, and what wakes those who wait for more.

    def __init__(
        self,
        wants: Iterable[Want],
        accept: tuple[str, ...],
        *,
        is_streaming: bool = False,
    ) -> None:
        self.ledger = Ledger(wants)
        self.accept, self.is_streaming = accept, is_streaming
        self.backlog = 0
        self.is_slow = False
        self.on_pace: Callable[[], None] = lambda: None
        self._wants: dict[str, list[Want]] = {}
        for entry in self.ledger:
            self._wants.setdefault(entry.want.sop_instance_uid, []).append(entry.want)
        self._held: dict[Want, SpooledInstance] = {}
        self._log: list[Begun | Arrived | Failed] = []
        self._changed = asyncio.Event()
        self._planned: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    async def planned(self) -> bool:
        """Return when it is known what is fetched: True when C-FIND or the spool has proved that all of it exists.

        What cannot be fetched has failed in the ledger by then.
        """
        return await asyncio.shield(self._planned)

    async def wait(self) -> None:
        """Return when every wanted instance is held or has failed."""
        async for _ in self.events():
            pass

    async def events(self) -> AsyncIterator[Begun | Arrived | Failed]:
        """Give what has happened and what happens until the ledger is complete: one end for each want."""
        given = 0
        while True:
            while given < len(self._log):
                yield self._log[given]
                given += 1
            if self.ledger.complete:
                return
            self._changed.clear()
            await self._changed.wait()

    def held(self, want: Want) -> SpooledInstance:
        """Return an instance that is held; its file stays until `release`, or until the transfer's context is left."""
        try:
            return self._held[want]
        except KeyError:
            raise LocalProtocolError(f"instance {want.sop_instance_uid} is not held") from None

    def release(self, want: Want) -> None:
        """Let one held instance go: it has been sent."""
        instance = self.held(want)
        del self._held[want]
        self.backlog -= instance.size
        instance.release()
        self.on_pace()

    def set_throttled(self, is_throttled: bool) -> None:
        """Say that the consumer takes less than comes, or keeps up again; counts while the spool is high."""
        self.is_slow = is_throttled
        self.on_pace()

    def waits_for(self, sop_instance_uids: Iterable[str]) -> bool:
        """Tell whether one of these instances is wanted and neither held nor failed."""
        wants = (want for uid in sop_instance_uids for want in self._wants.get(uid, ()))
        return any(self.ledger[want].state in _OPEN for want in wants)

    # --- for Transfers ----------------------------------------------------------------------------------------------

    def begin(self, want: Want, arriving: SpoolWriter) -> None:
        """Tell who reads along."""
        if self.is_streaming:
            self._tell(Begun(want, arriving))

    def hold(self, want: Want, instance: SpooledInstance, brought: Brought) -> None:
        """Hold a whole instance."""
        instance.hold()
        self._held[want] = instance
        self.backlog += instance.size
        self.ledger.hold(
            want,
            size=instance.size,
            transfer_syntax_uid=instance.transfer_syntax_uid,
            attempts=brought.attempts,
            pacs=brought.pacs,
            method=brought.method,
            bytes_changed=instance.bytes_changed,
            sha256=instance.sha256 or "",
        )
        self._tell(Arrived(want, instance))
        self.on_pace()

    def fail(self, want: Want, error: RegistryError, attempts: int = 0) -> None:
        """Enter that an instance will not come."""
        self.ledger.fail(want, error, attempts=attempts)
        self._tell(Failed(want, error))

    def plan(self, *, is_proved: bool) -> None:
        """Tell who waits for the plan."""
        if not self._planned.done():
            self._planned.set_result(is_proved)

    def fail_open(self, error: RegistryError) -> None:
        """Enter that nothing more will come."""
        self.plan(is_proved=False)
        for entry in self.ledger:
            if entry.state in _OPEN:
                self.fail(entry.want, error.at(entry.want.sop_instance_uid))

    def release_all(self) -> None:
        """Let go of everything that is held."""
        for instance in self._held.values():
            instance.release()
        self._held.clear()

    def _tell(self, event: Begun | Arrived | Failed) -> None:
        self._log.append(event)
        self._changed.set()
