"""A sibling process of the node: receives instances beside the main process, which alone decides what is wanted.

It has the connections that the main process hands to it, and writes what comes to the spool's folder itself. Messages
go both ways on a Unix stream socket, one JSON array a line: a word, then what belongs to it. Bytes of the spool's quota
are lent.

An instance that a running move is to bring, in a transfer syntax that it is wanted in, is expected: it is answered as
soon as it is whole, and told of afterwards, together with others. Should nobody want it any more by then, it is
dropped. Of one that takes long the main process hears earlier, like of one that is not expected: that is written on its
offer, and dropped when the answer is no; its sender waits until the main process owns it.

::

    to the main process                          from the main process
    ready                                        configure {...}
    associated id, titles, address, versions     syntaxes id, [uid, ...] or null
    syntaxes-refused id, {class: [uid, ...]}     pause id / resume id
    offer store, id, class, instance, syntax,    refuse store, status
      move originator, its message id
    progress store, bytes
    whole store, file size, XXH3-128             status store, status
    stored [store, id, file size, XXH3-128,      expect [uid, ...], [syntax, ...]
      class, instance, syntax, move originator,  expect-no-more [uid, ...]
      its message id], ...
    broken store, reason, no room
    create number, id, class, instance, syntax,  created number, status
      data set in base64
    need bytes left / return bytes               lease bytes
    closed id, reason / left                     close seconds

The end of that socket is the end of the process: none outlives the node, however that ends.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import json
import logging
import os
import signal
import socket
import ssl as ssl_module
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from typing import Any, cast

from xca_imaging.errors import SpoolFull
from xca_imaging.imaging.next_file import NextFile
from xca_imaging.imaging.receiver import Incoming, Later, PeerAssociation, StoreRequest
from xca_imaging.imaging.sibling_writing import SiblingFile
from xca_imaging.imaging.spool_writing import raise_mapped
from xca_imaging.imaging.store_connection import StoreConnection
from xca_imaging.imaging.store_scp import StoreScp
from xca_imaging.wire.dimse import STATUS_OUT_OF_RESOURCES

logger = logging.getLogger(__name__)

LEASE_LOW = 32 * 1024 * 1024
"""Bytes left of the lease at which more are asked for: the answer comes before they are used up."""

OVERDRAFT = 64 * 1024 * 1024
"""Bytes that are written while the main process has not answered: it may be busy for a moment. A quarter of what the
spool leaves free on its disk."""

MAX_MESSAGE = 4 * 1024 * 1024
"""Bytes of a message: a notification of 1 MB in base64, with room."""

_TELL_AFTER = 0.002  # s that an instance may wait for others to be told of together; a message costs as much as a write


class Lines(asyncio.Protocol):
    """Messages on a stream, one JSON array a line."""

    # Mutable state: the transport once connected, and the line that is coming in.

    transport: asyncio.Transport

    def __init__(self) -> None:
        self._pending = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        *lines, rest = data.split(b"\n")
        for line in lines:
            if self._pending:
                line = bytes(self._pending) + line
                self._pending.clear()
            try:
                self.take(*json.loads(line))
            except Exception:
                logger.exception("a message between the processes of the node could not be carried out")
                self.transport.abort()
                return
        self._pending += rest
        if len(self._pending) > MAX_MESSAGE:
            logger.error("a message between the processes of the node is longer than %d bytes", MAX_MESSAGE)
            self.transport.abort()

    def tell(self, *message: object) -> None:
        """Send a message; the other side may be gone."""
        self.transport.write(json.dumps(message, separators=(",", ":")).encode() + b"\n")

    def take(self, word: str, *values: Any) -> None:
        """Carry out a message."""
        getattr(self, "on_" + word.replace("-", "_"))(*values)


class Sibling(Lines):
    """The process's end of the messages, and the Receiver of its connections.

    Parameters
    ----------
    sockets : socket.socket
        SOCK_SEQPACKET, on which connections come as file descriptors.
    ssl : ssl.SSLContext, optional
        DICOM over TLS.

    Attributes
    ----------
    loop : asyncio.AbstractEventLoop
    over : asyncio.Event
        The process may end.
    """

    # Mutable state: the SCP and the spool's folder once configured, associations by id, what waits for an answer by
    # number of store or creation (_waiting), instances on their way in (_files), whole ones whose bytes are not lent
    # yet (_overdrawn) and sizes of those whose status is not told yet (_whole), what is expected (_expected), what came
    # of it and was not told yet (_stored), the last number given, the file made ahead (_next), the lease (_left,
    # _is_asked, _is_refused), and running tasks.

    def __init__(self, sockets: socket.socket, *, ssl: ssl_module.SSLContext | None) -> None:
        super().__init__()
        self.over = asyncio.Event()
        self._sockets, self._ssl = sockets, ssl
        self.loop = asyncio.get_running_loop()
        self._scp: StoreScp | None = None
        self._folder_fd = -1
        self._name = ""
        self._associations: dict[int, tuple[PeerAssociation, Later[Sequence[str] | None]]] = {}
        self._next = NextFile(self._make_file, lambda store: self.remove(store, 0))
        self._files: dict[int, SiblingFile] = {}
        self._overdrawn: dict[int, SiblingFile] = {}
        self._whole: dict[int, int] = {}
        self._waiting: dict[int, Later[int]] = {}
        self._expected: dict[str, frozenset[str]] = {}
        self._stored: list[tuple[object, ...]] = []
        self._last_number = 0
        self._left = 0
        self._is_asked = self._is_refused = False
        self._tasks: set[asyncio.Task[None]] = set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.over.set()

    def tell(self, *message: object) -> None:
        """Send a message, after what was to be told before."""
        if self._stored:
            self._tell_stored()
        super().tell(*message)

    # --- from the main process ------------------------------------------------------------------------------------

    def on_configure(self, options: dict[str, Any]) -> None:
        """Get ready to take connections."""
        logging.getLogger().setLevel(options.pop("log_level"))
        self._folder_fd = os.open(options.pop("folder"), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._name = options.pop("name")
        titles = options.pop("calling_ae_titles")
        calling = None if titles is None else frozenset(titles)
        self._scp = _CountingScp(self, ssl=self._ssl, calling_ae_titles=calling, **options)
        self.loop.add_reader(self._sockets, self._take_connection)
        self.tell("ready")

    def on_syntaxes(self, association: int, wanted: list[str] | None) -> None:
        """Learn what an association may be sent in."""
        if known := self._associations.get(association):
            known[1].tell(wanted)

    def on_expect(self, sop_instance_uids: list[str], transfer_syntax_uids: list[str]) -> None:
        """Learn what a move is to bring, and how."""
        self._expected.update(dict.fromkeys(sop_instance_uids, frozenset(transfer_syntax_uids)))

    def on_expect_no_more(self, sop_instance_uids: list[str]) -> None:
        """Learn that it has ended."""
        for uid in sop_instance_uids:
            self._expected.pop(uid, None)

    def on_pause(self, association: int) -> None:
        """Stop reading from a peer."""
        if known := self._associations.get(association):
            self._serving.pause(known[0])

    def on_resume(self, association: int) -> None:
        """Read on."""
        if known := self._associations.get(association):
            self._serving.resume(known[0])

    def on_refuse(self, store: int, status: int) -> None:
        """Drop an instance: nobody wants it, or it is owned already (status 0000H)."""
        if file := self._files.get(store):
            file.refuse(status)
        elif store in self._overdrawn or store in self._whole:  # it was whole before that came
            late = self._overdrawn.pop(store, None)
            self.remove(store, late.size if late else self._whole.pop(store))
            self._answer(store, status)

    def on_status(self, store: int, status: int) -> None:
        """Learn the status of a whole instance, which the main process has now."""
        del self._whole[store]
        self._answer(store, status)

    def on_created(self, number: int, status: int) -> None:
        """Learn the status of a notification."""
        self._answer(number, status)

    def on_lease(self, length: int) -> None:
        """Have more bytes to write, or none."""
        self._left += length
        self._is_asked, self._is_refused = False, length == 0
        if self._overdrawn:
            self._tell_whole()

    def on_close(self, drain: float) -> None:
        """Let associations end, then end."""
        self.loop.remove_reader(self._sockets)

        async def close() -> None:
            await self._serving.close(drain)
            self.transport.close()  # after what is still to be told

        self._spawn(close())

    @property
    def _serving(self) -> StoreScp:
        assert self._scp is not None
        return self._scp

    def _take_connection(self) -> None:
        try:
            message, descriptors, _, _ = socket.recv_fds(self._sockets, 1, 1)
        except (BlockingIOError, InterruptedError):
            return
        if not message:  # the main process is gone; the end of the stream says so too
            self.loop.remove_reader(self._sockets)
            return
        for descriptor in descriptors:
            connection = socket.socket(fileno=descriptor)
            connection.setblocking(False)
            self._spawn(self._serve(connection))

    async def _serve(self, connection: socket.socket) -> None:
        try:
            await self._serving.serve(connection)
        except (OSError, ssl_module.SSLError, TimeoutError) as exc:
            logger.info("connection closed before an association: %s", exc)
            connection.close()
            self.tell("left")

    def _spawn(self, work: Any) -> None:
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- the lease ------------------------------------------------------------------------------------------------

    def charge(self, length: int) -> None:
        """Use bytes of the lease. Raises SpoolFull when the main process has no more to lend."""
        left = self._left - length
        self._ask_for_more(left)
        if left < 0 and (self._is_refused or left < -OVERDRAFT):
            raise SpoolFull("the spool has no room")
        self._left = left

    def _ask_for_more(self, left: int) -> None:
        if left < LEASE_LOW and not self._is_asked:
            self._is_asked = True
            self.tell("need", left)

    def give_back(self, length: int) -> None:
        """Have bytes again that were used."""
        self._left += length

    # --- what files and connections tell --------------------------------------------------------------------------

    def _new_number(self) -> int:
        self._last_number += 1
        return self._last_number

    def _file_name(self, store: int) -> str:
        """Return the name of a store's file; the main process knows the rule too."""
        return f"{self._name}-{store:x}"

    def _make_file(self) -> tuple[int, int]:
        store = self._new_number()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            return store, os.open(self._file_name(store), flags, 0o600, dir_fd=self._folder_fd)
        except OSError as exc:
            raise_mapped(exc)

    def prepare(self, size: int) -> None:
        """Make the next file ahead, after an instance of `size` bytes."""
        self._next.prepare(size)

    def forget(self, store: int) -> None:
        """Learn that a file is gone."""
        del self._files[store]

    def remove(self, store: int, size: int) -> None:
        """Remove a file."""
        os.unlink(self._file_name(store), dir_fd=self._folder_fd)
        self.give_back(size)

    @property
    def can_keep(self) -> bool:
        """True when all that was written is covered by the lease."""
        return self._left >= 0

    def keep(self, store: int, file: SiblingFile) -> None:
        """Tell the main process of an expected instance that was answered, a moment later."""
        if not self._stored:
            self.loop.call_later(_TELL_AFTER, self._tell_stored)
        request = file.request
        self._stored.append((store, request.association.id, file.size, file.checksum, *request[1:]))

    def _tell_stored(self) -> None:
        stored, self._stored = self._stored, []
        if stored:
            super().tell("stored", *stored)

    def hand_over(self, store: int, file: SiblingFile) -> Later[int]:
        """Offer a whole file to the main process, once its bytes are lent, and return the status that it will tell."""
        if self._left < 0 and not self._is_asked:
            raise SpoolFull("the spool has no room")
        del self._files[store]
        self._overdrawn[store] = file
        if self._left >= 0:
            self._tell_whole()
        return self._wait_for(store)

    def _tell_whole(self) -> None:
        """Offer the files that wait for a lease, as far as it reaches; give up the others."""
        files, self._overdrawn = self._overdrawn, {}
        for store, file in files.items():
            if self._left < 0:
                self.remove(store, file.size)
                self.tell("broken", store, "the spool has no room", True)
                self._answer(store, STATUS_OUT_OF_RESOURCES)
            else:
                self._whole[store] = file.size
                self.tell("whole", store, file.size, file.checksum)

    def _wait_for(self, number: int) -> Later[int]:
        answer = self._waiting[number] = Later[int]()
        return answer

    def _answer(self, number: int, status: int) -> None:
        if answer := self._waiting.pop(number, None):
            answer.tell(status)

    def left(self) -> None:
        """Learn that a connection is over."""
        self.tell("left")
        if not self._associations:
            self._next.drop()
        if not self._associations and not self._files and not self._waiting and self._left and not self._is_asked:
            self.tell("return", self._left)
            self._left = 0

    # --- Receiver -------------------------------------------------------------------------------------------------

    def accepted_syntaxes(self, association: PeerAssociation) -> Later[Sequence[str] | None]:
        """Ask the main process, and for bytes to write before they are needed."""
        self._ask_for_more(self._left)
        answer = Later[Sequence[str] | None]()
        self._associations[association.id] = association, answer
        self.tell("associated", *astuple(association))
        return answer

    def begin(self, request: StoreRequest) -> Incoming | int:
        """Begin to write, and offer what is not expected."""
        self._is_refused = False
        # Once: whether it is wanted again is not ours to say.
        is_expected = request.transfer_syntax_uid in self._expected.pop(request.sop_instance_uid, ())
        store = 0
        try:
            store, fd, room = self._next.take()
            file = self._files[store] = SiblingFile(self, store, fd, room, request, is_offered=not is_expected)
        except (SpoolFull, OSError) as exc:
            store = store or self._new_number()
            self.offer_file(store, request)
            self.tell("broken", store, str(exc), True)
            raise
        if not is_expected:
            self.offer_file(store, request)
        return file

    def offer_file(self, store: int, request: StoreRequest) -> None:
        """Ask whether it is wanted; silence means that it is."""
        self.tell("offer", store, request.association.id, *request[1:])

    def offer(self, request: StoreRequest) -> int:
        """Never asked here: who writes elsewhere has a main process of its own."""
        raise NotImplementedError

    def create_instance(
        self,
        association: PeerAssociation,
        sop_class_uid: str,
        sop_instance_uid: str,
        dataset: bytes,
        transfer_syntax_uid: str,
    ) -> Later[int]:
        """Hand a notification to the main process."""
        number = self._new_number()
        data = base64.b64encode(dataset).decode()
        names = (association.id, sop_class_uid, sop_instance_uid, transfer_syntax_uid)
        self.tell("create", number, *names, data)
        return self._wait_for(number)

    def syntaxes_refused(self, association: PeerAssociation, refused: Mapping[str, tuple[str, ...]]) -> None:
        """Tell the main process."""
        self.tell("syntaxes-refused", association.id, refused)

    def association_closed(self, association: PeerAssociation, reason: str) -> None:
        """Tell the main process."""
        del self._associations[association.id]
        self.tell("closed", association.id, reason)


class _CountingScp(StoreScp):
    """Tells its sibling when a connection is over."""

    def __init__(self, sibling: Sibling, **options: Any) -> None:
        super().__init__(sibling, **options)
        self._sibling = sibling

    def remove(self, connection: StoreConnection) -> None:
        super().remove(connection)
        self._sibling.left()


async def serve(messages_fd: int, sockets_fd: int, *, ssl: ssl_module.SSLContext | None = None) -> None:
    """Be a sibling until the main process says so or is gone; the descriptors are inherited from it."""
    for number in (signal.SIGTERM, signal.SIGINT):  # meant for the node, which then ends its siblings in order
        signal.signal(number, signal.SIG_IGN)
    loop = asyncio.get_running_loop()
    with socket.socket(fileno=sockets_fd) as sockets:
        sockets.setblocking(False)
        make = functools.partial(Sibling, sockets, ssl=ssl)
        _, sibling = await loop.create_unix_connection(make, sock=socket.socket(fileno=messages_fd))
        await sibling.over.wait()
        loop.remove_reader(sockets)
