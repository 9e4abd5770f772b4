"""The Storage SCP in several processes: the main one listens and decides, siblings receive.

Accepted sockets go to the sibling with the most room. What comes back by messages (`sibling`) is put to the `Receiver`
as if it had happened here. A sibling that dies takes with it what was on its way in, and is replaced.

References
----------
* DICOM PS3.4, B (Storage Service Class)
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any

from xca_imaging.errors import SpoolFull
from xca_imaging.imaging.receiver import Arriving, Dropped, Later, PeerAssociation, Receiver, StoreRequest
from xca_imaging.imaging.sibling import Lines
from xca_imaging.imaging.spool import Spool
from xca_imaging.imaging.store_scp import SOCKET_BUFFER
from xca_imaging.wire.dimse import STATUS_PROCESSING_FAILURE, STATUS_SUCCESS

logger = logging.getLogger(__name__)

LEASE = 64 * 1024 * 1024
"""Bytes lent to a sibling at a time: 50 ms at 1.2 GB/s, so that it is rarely without."""

_START_TIMEOUT = 30.0  # s for a process to load and say that it is ready
_STOP_TIMEOUT = 3.0  # s for a process to end after it has drained
_UIDS_AT_ONCE = 10_000  # in a message, which has a limit
_ACCEPT_AT_ONCE = 64  # connections taken before others get their turn
_ACCEPT_AGAIN = 1.0  # s until connections are taken again when there are no descriptors left
_LONG_LIFE = 60.0  # s after which the death of a process is not counted as one of a series
_LONGEST_BACKOFF = 30.0  # s between two attempts to replace a process


class Siblings:
    """A Storage and Verification SCP whose associations are served by sibling processes.

    Parameters
    ----------
    receiver : Receiver
        In this process, as for `StoreScp`; `offer` is called, not `begin`.
    spool : Spool
    count : int
        Processes.
    program : sequence of str
        Command line of a sibling, without the two descriptors that are added to it.
    backoff : float
        Seconds until a process that died is replaced; doubled each time, up to 30 s.

    The others are those of `StoreScp`; `max_associations` is of all processes together.
    """

    # Mutable state: listening sockets, one sibling for each place (None: it is being replaced) and the tasks that keep
    # them, the last number of a sibling, and whether connections are taken (_is_listening) and we are going down.

    def __init__(
        self,
        receiver: Receiver,
        spool: Spool,
        *,
        count: int,
        program: Sequence[str],
        ae_title: str,
        host: str,
        port: int,
        calling_ae_titles: frozenset[str] | None = None,
        max_associations: int = 256,
        artim_timeout: float = 30.0,
        stall_timeout: float = 60.0,
        socket_buffer: int = SOCKET_BUFFER,
        backoff: float = 0.5,
    ) -> None:
        self.receiver, self.spool = receiver, spool
        self._program = tuple(program)
        self._host, self._port, self._socket_buffer, self._backoff = host, port, socket_buffer, backoff
        count = min(count, max_associations)
        self._rooms = [max_associations // count + (place < max_associations % count) for place in range(count)]
        self._options: Mapping[str, Any] = {
            "folder": str(spool.folder.resolve()),
            "ae_title": ae_title,
            "calling_ae_titles": None if calling_ae_titles is None else sorted(calling_ae_titles),
            "artim_timeout": artim_timeout,
            "stall_timeout": stall_timeout,
        }
        self._listeners: list[socket.socket] = []
        self._places: list[_MainEnd | None] = [None] * count
        self._keepers: list[asyncio.Task[None]] = []
        self._last_number = 0
        self._is_listening = self._is_closing = False

    async def start(self) -> None:
        """Start the processes, then listen. Raises OSError when the address cannot be had or a process cannot start."""
        self._loop = asyncio.get_running_loop()
        self._listeners = await _listen(self._host, self._port, self._socket_buffer)
        started = await asyncio.gather(
            *(self._spawn(place) for place in range(len(self._places))), return_exceptions=True
        )
        for each in started:
            if isinstance(each, BaseException):
                await self.close(0)
                raise each
        self._keepers = [self._loop.create_task(self._keep(place, each)) for place, each in enumerate(self.alive)]
        self._listen()

    @property
    def sockets(self) -> list[tuple[str, int]]:
        """(host, port) of each bound address."""
        return [listener.getsockname()[:2] for listener in self._listeners]

    @property
    def associations(self) -> tuple[PeerAssociation, ...]:
        """The established associations of all processes."""
        return tuple(peer for each in self.alive for peer in each.associations.values())

    @property
    def alive(self) -> tuple[_MainEnd, ...]:
        """The processes that serve."""
        return tuple(each for each in self._places if each is not None)

    def pause(self, association: PeerAssociation) -> None:
        """Stop reading from a peer: its consumer is slow. What was read already is still delivered."""
        for sibling in self.alive:
            if association.id in sibling.associations:
                sibling.tell("pause", association.id)

    def resume(self, association: PeerAssociation) -> None:
        """Read on."""
        for sibling in self.alive:
            if association.id in sibling.associations:
                sibling.tell("resume", association.id)

    def expect(self, sop_instance_uids: Sequence[str], transfer_syntax_uids: Sequence[str]) -> None:
        """Let the processes answer for these instances by themselves, and tell of them afterwards.

        One that comes in another transfer syntax is asked for first, like any other; and so does a process that was
        replaced meanwhile.
        """
        self._tell_all("expect", sop_instance_uids, transfer_syntax_uids)

    def expect_no_more(self, sop_instance_uids: Sequence[str]) -> None:
        """Have them ask first again."""
        self._tell_all("expect-no-more", sop_instance_uids)

    def _tell_all(self, word: str, sop_instance_uids: Sequence[str], *values: object) -> None:
        for start in range(0, len(sop_instance_uids), _UIDS_AT_ONCE):
            for sibling in self.alive:
                sibling.tell(word, sop_instance_uids[start : start + _UIDS_AT_ONCE], *values)

    async def close(self, drain: float) -> None:
        """Stop listening, let associations end for at most `drain` seconds, abort the rest, end the processes."""
        self._is_closing = True
        self._listen()
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        alive = self.alive
        for sibling in alive:
            sibling.tell("close", drain)
        await asyncio.gather(*(each.end(drain + _STOP_TIMEOUT) for each in alive))
        self._places = [None] * len(self._places)

    # --- processes ------------------------------------------------------------------------------------------------

    async def _spawn(self, place: int) -> _MainEnd:
        """Start the process of a place and wait until it is ready."""
        number = self._last_number = self._last_number + 1
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        sockets, their_sockets = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sockets.setblocking(False)
        with theirs, their_sockets:
            try:
                process = await asyncio.create_subprocess_exec(
                    *self._program,
                    str(theirs.fileno()),
                    str(their_sockets.fileno()),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(), their_sockets.fileno()),
                    start_new_session=True,  # a terminal's Ctrl-C is for the node
                )
            except BaseException:
                ours.close()
                sockets.close()
                raise
        room = self._rooms[place]
        sibling = _MainEnd(self, process, sockets, self.spool.new_name(f"receiver{place}"), room)
        await self._loop.create_unix_connection(lambda: sibling, sock=ours)
        sibling.tell(
            "configure",
            {
                **self._options,
                "name": sibling.name,
                "max_associations": room,
                "last_id": number << 32,
                "log_level": logging.getLogger().getEffectiveLevel(),
            },
        )
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_START_TIMEOUT):
                    await sibling.ready.wait()
        finally:
            if not sibling.is_ready:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
        if not sibling.is_ready:
            await sibling.end(0)
            raise OSError(f"a receiver process did not start: {' '.join(self._program)}")
        self._places[place] = sibling
        return sibling

    async def _keep(self, place: int, sibling: _MainEnd) -> None:
        """Replace the process of a place whenever it dies."""
        deaths = 0
        while True:
            born = self._loop.time()
            await sibling.gone.wait()
            self._places[place] = None
            self._listen()
            await sibling.end(0)
            logger.error("receiver process %d died, exit code %s", sibling.process.pid, sibling.process.returncode)
            deaths = 0 if self._loop.time() - born > _LONG_LIFE else deaths + 1
            while True:
                await asyncio.sleep(min(_LONGEST_BACKOFF, self._backoff * 2 ** min(deaths, 16)))
                try:
                    sibling = await self._spawn(place)
                    break
                except OSError as exc:
                    deaths += 1
                    logger.error("a receiver process could not be replaced: %s", exc)
            self._listen()

    # --- connections ----------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        """Take connections as long as there is a process for them; else they wait in the kernel's queue."""
        wanted = bool(self.alive) and not self._is_closing
        if wanted != self._is_listening:
            self._is_listening = wanted
            for listener in self._listeners:
                if wanted:
                    self._loop.add_reader(listener, self._accept, listener)
                else:
                    self._loop.remove_reader(listener)

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(_ACCEPT_AT_ONCE):
            try:
                connection, address = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as exc:
                logger.error("no connection can be taken: %s", exc)
                self._loop.remove_reader(listener)
                self._is_listening = False
                self._loop.call_later(_ACCEPT_AGAIN, self._listen)
                return
            with connection:  # the sibling has a descriptor of its own
                if not self._hand_over(connection):
                    logger.warning("connection of %s closed unheard: too many connections", address[0])

    def _hand_over(self, connection: socket.socket) -> bool:
        for sibling in sorted(self.alive, key=lambda each: each.connections - each.room):
            if sibling.connections < 2 * sibling.room:
                try:
                    socket.send_fds(sibling.sockets, [b"\0"], [connection.fileno()])
                except OSError:  # it is stuck, or just died
                    continue
                sibling.connections += 1
                return True
        return False


class _MainEnd(Lines):
    """The main process's end of one sibling.

    Attributes
    ----------
    name : str
        What its files' names begin with.
    room : int
        Associations that it takes at a time.
    """

    # Mutable state: connections that it has, its associations, stores and lease (bytes lent and not in adopted files),
    # and whether it is ready and gone.

    def __init__(
        self, siblings: Siblings, process: asyncio.subprocess.Process, sockets: socket.socket, name: str, room: int
    ) -> None:
        super().__init__()
        self.process, self.sockets, self.name, self.room = process, sockets, name, room
        self._receiver, self._spool = siblings.receiver, siblings.spool
        self._fair_share = len(siblings._places)
        self.connections = 0
        self.associations: dict[int, PeerAssociation] = {}
        self._stores: dict[int, tuple[Arriving, StoreRequest]] = {}
        self._lease = 0
        self.is_ready = False
        self.ready, self.gone = asyncio.Event(), asyncio.Event()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the receiver that all of it is over, and clean up."""
        self.sockets.close()
        reason = "the process that received it is gone"
        self._remove_files()
        stores, self._stores = self._stores, {}
        for arriving, _ in stores.values():
            self._guarded(arriving.discard, reason)
        associations, self.associations = self.associations, {}
        for peer in associations.values():
            self._guarded(self._receiver.association_closed, peer, reason)
        self._spool.unreserve(self._lease)
        self._lease = 0
        self.ready.set()
        self.gone.set()

    def _remove_files(self) -> None:
        """Remove what was not adopted; of the last files we may not know."""
        try:
            names = [each.name for each in os.scandir(self._spool.folder) if each.name.startswith(self.name + "-")]
        except OSError:
            logger.exception("the files of a receiver process could not be removed")
            return
        for name in names:
            if not self._spool.has_file(name):
                with contextlib.suppress(OSError):
                    os.unlink(self._spool.folder / name)

    def _guarded(self, call: Any, *values: Any) -> None:
        try:
            call(*values)
        except Exception:
            logger.exception("the end of a receiver process could not be told")

    async def end(self, patience: float) -> None:
        """Wait for the process to end by itself, kill it after `patience` seconds."""
        try:
            async with asyncio.timeout(patience):
                await self.process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            await self.process.wait()
        self.transport.abort()
        await self.gone.wait()

    def _file_name(self, store: int) -> str:
        return f"{self.name}-{store:x}"

    # --- from the sibling -----------------------------------------------------------------------------------------

    def on_ready(self) -> None:
        """It takes connections."""
        self.is_ready = True
        self.ready.set()

    def on_left(self) -> None:
        """A connection is over."""
        self.connections -= 1

    def on_associated(self, *fields: Any) -> None:
        """A peer asks for an association: say what it may send."""
        peer = PeerAssociation(*fields)
        self.associations[peer.id] = peer
        wanted = self._receiver.accepted_syntaxes(peer)
        assert not isinstance(wanted, Later)
        self.tell("syntaxes", peer.id, wanted)

    def on_syntaxes_refused(self, association: int, refused: dict[str, list[str]]) -> None:
        """Contexts were refused for their syntaxes."""
        by_class = {sop_class: tuple(syntaxes) for sop_class, syntaxes in refused.items()}
        self._receiver.syntaxes_refused(self.associations[association], by_class)

    def on_closed(self, association: int, reason: str) -> None:
        """An association is over."""
        self._receiver.association_closed(self.associations.pop(association), reason)

    def on_offer(self, store: int, association: int, *fields: Any) -> None:
        """An instance begins; silence means that it is wanted."""
        request = StoreRequest(self.associations[association], *fields)
        answer = self._offer(request)
        if isinstance(answer, int):
            self.tell("refuse", store, answer)
        elif isinstance(answer, Dropped):
            self.tell("refuse", store, STATUS_SUCCESS)
        else:
            self._stores[store] = answer, request

    def on_progress(self, store: int, size: int) -> None:
        """Bytes came."""
        if known := self._stores.get(store):
            known[0].progress(size)

    def on_whole(self, store: int, size: int, checksum: str) -> None:
        """An instance is complete: own it and say so. One that was refused is not ours to answer for."""
        if store in self._stores:
            arriving, request = self._stores.pop(store)
            status = self._adopt(store, arriving, request, size, checksum)
            if status is None:
                self.tell("refuse", store, STATUS_PROCESSING_FAILURE)
            else:
                self.tell("status", store, status)

    def on_stored(self, *stored: Any) -> None:
        """Expected instances have come and were answered with Success: own them, as far as they are still wanted."""
        for store, association, size, checksum, *fields in stored:
            request = StoreRequest(self.associations[association], *fields)
            arriving = self._offer(request)
            if isinstance(arriving, int | Dropped) or self._adopt(store, arriving, request, size, checksum) is None:
                with contextlib.suppress(OSError):
                    os.unlink(self._spool.folder / self._file_name(store))
                self._spool.unreserve(size)
                self._lease -= size

    def _offer(self, request: StoreRequest) -> Arriving | Dropped | int:
        try:
            return self._receiver.offer(request)
        except Exception:
            logger.exception("instance from %s refused with 0110H", request.association.calling_ae_title)
            return STATUS_PROCESSING_FAILURE

    def _adopt(self, store: int, arriving: Arriving, request: StoreRequest, size: int, checksum: str) -> int | None:
        """Own a whole instance and return its status; None when the spool could not take it over."""
        try:
            instance = self._spool.adopt(
                self._file_name(store),
                size,
                checksum=checksum,
                sop_class_uid=request.sop_class_uid,
                sop_instance_uid=request.sop_instance_uid,
                transfer_syntax_uid=request.transfer_syntax_uid,
                reserved=size,
            )
        except Exception as exc:
            logger.exception("instance from %s refused with 0110H", request.association.calling_ae_title)
            arriving.discard(str(exc))
            return None
        self._lease -= size
        try:
            return arriving.adopt(instance)
        except Exception:
            logger.exception("instance from %s refused with 0110H", request.association.calling_ae_title)
            return STATUS_PROCESSING_FAILURE

    def on_broken(self, store: int, reason: str, no_room: bool) -> None:
        """An instance will not come."""
        if known := self._stores.pop(store, None):
            known[0].discard(reason, no_room)

    def on_create(self, number: int, association: int, sop_class: str, instance: str, syntax: str, data: str) -> None:
        """A notification came."""
        peer = self.associations[association]
        try:
            status = self._receiver.create_instance(peer, sop_class, instance, base64.b64decode(data), syntax)
            assert not isinstance(status, Later)
        except Exception:
            logger.exception("notification from %s refused with 0110H", peer.calling_ae_title)
            status = STATUS_PROCESSING_FAILURE
        self.tell("created", number, status)

    def on_need(self, left: int) -> None:
        """Lend bytes of the quota: a fair share of what is free, all that is already written, at most LEASE."""
        length = max(min(LEASE, self._spool.free_bytes // self._fair_share), -left)
        try:
            self._spool.reserve(length)
        except SpoolFull:
            length = 0
        self._lease += length
        self.tell("lease", length)

    def on_return(self, length: int) -> None:
        """Take back what is not used."""
        self._spool.unreserve(length)
        self._lease -= length


async def _listen(host: str, port: int, buffer: int) -> list[socket.socket]:
    """Return a listening socket for each address of `host`."""
    found = await asyncio.get_running_loop().getaddrinfo(
        host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    listeners: list[socket.socket] = []
    try:
        for family, _, _, _, address in dict.fromkeys(found):
            listener = socket.socket(family, socket.SOCK_STREAM)
            listeners.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            # Connections inherit it; set before they come, so that the window scale fits (RFC 7323 2.2).
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
            listener.bind(address)
            listener.listen(socket.SOMAXCONN)
            listener.setblocking(False)
    except OSError:
        for listener in listeners:
            listener.close()
        raise
    return listeners
