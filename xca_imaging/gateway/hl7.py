"""Patient identity feed over MLLP (ITI-8): the socket shell.

Each connection is read message by message; one is answered before the next is read, so that a feed is applied in its
order. What breaks the framing cannot be answered and ends the connection; what breaks HL7 is answered with AR, what
cannot be done with AE.

References
----------
* IHE ITI TF-2, 3.8; C.2.1 (MLLP), C.2.2 (original acknowledgement mode)
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
import uuid
from collections.abc import Callable
from concurrent.futures import Executor
from datetime import UTC, datetime
from functools import partial
from typing import TypeVar

from xca_imaging.errors import RegistryError, RemoteProtocolError
from xca_imaging.registry.administration import Administration
from xca_imaging.registry.events import Requester
from xca_imaging.transactions import iti8
from xca_imaging.transactions.identity_feed import FeedRefused
from xca_imaging.wire import mllp

log = logging.getLogger(__name__)

_READ = 64 * 1024  # bytes read at a time
_LAST_ANSWERS = 10.0  # s that a shutdown waits for messages that are being applied: longer than any merge takes

T = TypeVar("T")


class IdentityFeed:
    """Listens for HL7 v2 messages and applies them.

    Parameters
    ----------
    executor : Executor
        For reading messages and for the database.
    max_message : int
        Bytes of one message.
    max_connections : int
        More are closed at once: a feed has one sender, or a few.
    idle_timeout : float
        Seconds between two messages of a connection. Interface engines keep theirs open through quiet hours.
    stall_timeout : float
        Seconds in which a message that has begun must go on, and an answer be taken.
    count : callable
        Is told `answered` or `refused` with each message.
    """

    # Mutable state: the server, whether it closes, the task of each connection, and those that apply a message.

    def __init__(
        self,
        administration: Administration,
        executor: Executor,
        *,
        max_message: int = 1024 * 1024,
        max_connections: int = 64,
        idle_timeout: float = 3600.0,
        stall_timeout: float = 60.0,
        count: Callable[[str], None] = lambda outcome: None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._administration, self._executor, self._now = administration, executor, now
        self._max_message, self._max_connections = max_message, max_connections
        self._idle_timeout, self._stall_timeout, self._count = idle_timeout, stall_timeout, count
        self._server: asyncio.Server | None = None
        self._closing = False
        self._connections: set[asyncio.Task[None]] = set()
        self._busy: set[asyncio.Task[None]] = set()

    async def start(self, host: str, port: int, tls: ssl.SSLContext | None) -> tuple[str, int]:
        """Listen, and return the address; raises OSError."""
        self._server = await asyncio.start_server(
            self._serve, host, port, ssl=tls, limit=_READ, ssl_handshake_timeout=self._stall_timeout if tls else None
        )
        address: tuple[str, int] = self._server.sockets[0].getsockname()[:2]
        return address

    async def close(self) -> None:
        """Stop listening. Messages that are being applied are answered: they must not be done and unanswered."""
        if self._server is None:
            return
        self._closing = True
        self._server.close()
        for task in self._connections - self._busy:
            task.cancel()
        if self._connections:
            await asyncio.wait(self._connections, timeout=_LAST_ANSWERS)
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        peer = str((writer.get_extra_info("peername") or ("unknown",))[0])
        if len(self._connections) >= self._max_connections:
            log.warning("identity feed: a connection of %s is closed, %d are open", peer, self._max_connections)
            writer.close()
            return
        self._connections.add(task)
        try:
            await self._converse(reader, writer, peer)
        except TimeoutError:
            log.info("identity feed: nothing came from %s for too long", peer)
        except RemoteProtocolError as exc:
            log.warning("identity feed: the connection of %s ends: %s", peer, exc)
        except ConnectionError as exc:
            log.info("identity feed: %s went away: %s", peer, exc)
        except asyncio.CancelledError:
            if not self._closing:  # ours otherwise; asyncio's streams log a handler that ends cancelled as a defect
                raise
        finally:
            self._connections.discard(task)
            writer.close()
            with contextlib.suppress(ConnectionError, TimeoutError, asyncio.CancelledError):
                async with asyncio.timeout(1.0):
                    await writer.wait_closed()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, peer: str) -> None:
        frames = mllp.Reader(max_message=self._max_message)
        while True:
            async with asyncio.timeout(self._stall_timeout if frames.is_inside else self._idle_timeout):
                data = await reader.read(_READ)
            if not data:
                if frames.is_inside:
                    log.warning("identity feed: %s broke off within a message", peer)
                return
            for message in frames.receive(data):
                await self._apply(message, writer, peer)
                if self._closing:
                    return

    async def _apply(self, message: bytes, writer: asyncio.StreamWriter, peer: str) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._busy.add(task)
        try:
            answer = await self._run(partial(self._answer, message, peer))
            writer.write(mllp.frame(answer))
            async with asyncio.timeout(self._stall_timeout):
                await writer.drain()
        finally:
            self._busy.discard(task)

    async def _run(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, call)

    def _answer(self, data: bytes, peer: str) -> bytes:
        """Apply one message and return its acknowledgement."""
        header = iti8.decode_header(data)
        problem: iti8.NotAccepted | None = None
        try:
            message = iti8.decode_message(header, data)
            sender = "/".join(filter(None, (header.sending_application, header.sending_facility)))
            requester = Requester(f"{sender or 'unnamed'} at {peer}", header.message_id)
            self._administration.feed(message, "ITI-8", requester)
        except iti8.NotAccepted as exc:
            problem = exc
        except FeedRefused as exc:
            problem = iti8.NotAccepted("AE", 204, str(exc))
        except RegistryError as exc:  # the database: busy, full or away
            problem = iti8.NotAccepted("AR", 207, str(exc))
        except Exception:
            log.exception("identity feed: message %r of %s failed by a defect", header.message_id, peer)
            problem = iti8.NotAccepted("AR", 207, "a defect of this system, see its log")
        if problem is not None:
            # The reason may name patient ids: it goes to the sender and into the event, not into the log.
            log.warning("identity feed: message %r of %s: %s", header.message_id, peer, problem.code)
        self._count("refused" if problem else "answered")
        control_id = uuid.uuid4().hex[:20]
        return iti8.encode_acknowledgement(
            header, control_id=control_id, time=self._now().strftime("%Y%m%d%H%M%S"), problem=problem
        )
