"""A node that writes down what its transfers do: `python -m tests.bench.traced_node TRACE serve --config F`.

Each line of the trace is JSON: time (seconds of the machine's monotonic clock, which other processes read too), what
happened, and of what.
"""

from __future__ import annotations

import atexit
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xca_imaging.cli.main import main
from xca_imaging.gateway import app
from xca_imaging.imaging.backends import Backend, MoveJob, MoveResult
from xca_imaging.imaging.receiver import Incoming, PeerAssociation, StoreRequest
from xca_imaging.imaging.transfer import Transfers

_lines: list[tuple[float, str, dict[str, Any]]] = []


def _note(what: str, **of: Any) -> None:
    _lines.append((time.monotonic(), what, of))


class _TracedMove:
    """A back end whose moves are noted."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    async def move(self, job: MoveJob, on_response: Callable[[MoveResult], None]) -> MoveResult:
        number = id(job)
        _note("move started", move=number, level=job.level, instances=len(job.sop_instance_uids))
        try:
            return await self._backend.move(job, on_response)
        finally:
            _note("move finished", move=number)


class _TracedIncoming:
    """An instance whose end is noted."""

    def __init__(self, incoming: Incoming, association: int) -> None:
        self._incoming, self._association, self._size = incoming, association, 0
        self.conclude, self.discard = incoming.conclude, incoming.discard

    def write(self, *data: memoryview) -> None:
        self._size += sum(map(len, data))
        self._incoming.write(*data)

    def commit(self) -> int:
        status = self._incoming.commit()
        _note("instance arrived", association=self._association, size=self._size)
        return status


class TracedTransfers(Transfers):
    """Transfers that are noted."""

    async def start(self) -> None:
        await super().start()
        for name, backends in self._moves.backends.items():
            self._moves.backends[name] = {method: _TracedMove(each) for method, each in backends.items()}

    def begin(self, request: StoreRequest) -> Incoming | int:
        _note("instance begun", association=request.association.id)
        answer = super().begin(request)
        return answer if isinstance(answer, int) else _TracedIncoming(answer, request.association.id)

    def association_closed(self, association: PeerAssociation, reason: str) -> None:
        _note("association closed", association=association.id)
        super().association_closed(association, reason)


def _write(trace: Path) -> None:
    with trace.open("w") as stream:
        for at, what, of in _lines:
            stream.write(json.dumps({"at": at, "what": what, **of}) + "\n")


if __name__ == "__main__":
    atexit.register(_write, Path(sys.argv.pop(1)))
    app.Transfers = TracedTransfers  # type: ignore[misc]
    sys.exit(main())
