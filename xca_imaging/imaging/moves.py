"""The moves that run: a task each, from the scheduler's decision to the event that tells how it ended."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

from xca_imaging.errors import PeerError, PeerRefused
from xca_imaging.imaging import decisions as d
from xca_imaging.imaging.backends import Backend, MoveJob, MoveResult

_log = logging.getLogger(__name__)


class Moves:
    """Starts, cancels and counts moves.

    Parameters
    ----------
    tell : callable
        Takes MoveResponded and MoveFinished.
    tell_every : float
        Seconds between two MoveResponded of one move.

    Attributes
    ----------
    backends : dict
        By PACS name and method.
    started : int
        Moves so far.
    """

    # Mutable state: back ends, how many were started, the tasks of those that run, and whether none does.

    def __init__(self, tell: Callable[[d.MoveResponded | d.MoveFinished], None], tell_every: float) -> None:
        self.backends: dict[str, Mapping[d.Method, Backend]] = {}
        self.started = 0
        self._tell, self._tell_every = tell, tell_every
        self._running: dict[int, asyncio.Task[MoveResult]] = {}
        self._idle = asyncio.Event()

    def start(self, decision: d.StartMove) -> None:
        """Ask a PACS to send."""
        move, backend = decision.move, self.backends[decision.pacs][decision.method]
        job = MoveJob(
            decision.level,
            decision.study_instance_uid,
            decision.series_instance_uid,
            decision.instances if decision.level == "IMAGE" else (),
            decision.accept,
            decision.sop_classes,
        )
        count = len(decision.instances)
        _log.info("%s: %s %d, %s level, %d instances", decision.pacs, decision.method, move, job.level, count)
        loop = asyncio.get_running_loop()
        said = loop.time()

        def on_response(_: MoveResult) -> None:
            nonlocal said
            if loop.time() - said >= self._tell_every:
                said = loop.time()
                self._tell(d.MoveResponded(move))

        self.started += 1
        task = self._running[move] = loop.create_task(backend.move(job, on_response))
        task.add_done_callback(lambda task: self._finish(move, backend, task))

    def cancel(self, move: int) -> None:
        """Ask the PACS to stop; `MoveFinished` follows."""
        self._running[move].cancel()

    def cancel_all(self) -> None:
        """Ask for all of them."""
        for task in self._running.values():
            task.cancel()

    async def close(self, patience: float) -> None:
        """Wait until no move runs, for so many seconds at most, and let go of the connections."""
        if self._running:
            self._idle.clear()
            try:
                async with asyncio.timeout(patience):
                    await self._idle.wait()
            except TimeoutError:
                _log.warning("%d moves did not end within %g s", len(self._running), patience)
        for backends in self.backends.values():
            for backend in backends.values():
                await backend.close()

    def _finish(self, move: int, backend: Backend, task: asyncio.Task[MoveResult]) -> None:
        del self._running[move]
        if not self._running:
            self._idle.set()
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        match error:
            case None:
                result = task.result()
                event = d.MoveFinished(move, result.status, result.completed, result.failed_uids, result.error_comment)
            case asyncio.CancelledError():
                event = d.MoveFinished(move, comment="cancelled")
            case PeerError():
                event = d.MoveFinished(move, error=error)
            case _:
                _log.error("a move failed by a defect", exc_info=error)
                event = d.MoveFinished(
                    move, error=PeerRefused(backend.pacs.name, f"internal error: {type(error).__name__}")
                )
        self._tell(event)
