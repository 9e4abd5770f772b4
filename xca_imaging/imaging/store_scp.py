"""Storage SCP: the socket shell between the DICOM upper layer and whoever receives instances.

What is received, and whether it is wanted, is the business of the `Receiver`; the connections negotiate, keep time and
answer (`store_connection`).

References
----------
* DICOM PS3.4, B (Storage Service Class), A (Verification Service Class)
* DICOM PS3.7, 9.1.1 (C-STORE), 9.1.5 (C-ECHO); PS3.8, 9.1.5 (ARTIM timer)
"""

from __future__ import annotations

import asyncio
import socket
import ssl as ssl_module
from collections.abc import Sequence

from xca_imaging.imaging.receiver import PeerAssociation, Receiver
from xca_imaging.imaging.store_connection import Limits, StoreConnection
from xca_imaging.wire import dimse, pdu
from xca_imaging.wire.upper_layer import check_request

RECEIVE_BUFFER = pdu.MAX_PDU_LENGTH + 512
"""Bytes read at a time, per association: a C-STORE-RQ, one PDU of the length that we offer, and the header of the next.
With less, each read of a waiting object ends a few bytes short of a PDU's end, and its rest is read and written in two
pieces. More was not faster (docs/performance.md)."""

SOCKET_BUFFER = 1024 * 1024
"""SO_RCVBUF: a sender is not stopped while one write to the disk takes its time; times the number of associations,
this is what peers can make the kernel hold."""

_GRACE = 1.0
"""Seconds that a peer gets to read an A-ABORT when the node goes down."""


class StoreScp:
    """A Storage and Verification SCP on the running event loop.

    Parameters
    ----------
    receiver : Receiver
    ae_title : str
        Ours; other called AE titles are rejected.
    host, port : str, int
        Where to listen; port 0 picks a free one.
    ssl : ssl.SSLContext, optional
        DICOM over TLS (PS3.15 B).
    calling_ae_titles : frozenset of str, optional
        AE titles that may call; None lets any.
    max_associations : int
        Associations at a time; more are rejected as transient (2/3/2). Twice as many connections are kept to say so,
        beyond that they are closed unheard.
    artim_timeout : float
        Seconds for an A-ASSOCIATE-RQ to come and for a peer to close after release, rejection or abort.
    stall_timeout : float
        Seconds without a byte from, or taken by, the peer of an association before it is aborted. Does not run while
        reading is paused by `pause`.
    max_pdu : int
        Maximum length that we announce (PS3.8 D.1).
    max_associate_length, max_command_length : int
        Longest A-ASSOCIATE-RQ and command set that are collected in memory.
    receive_buffer, socket_buffer : int
        Bytes read at a time and SO_RCVBUF, both per association.
    last_id : int
        The ids of associations follow it: they differ between receivers that share a node.
    """

    # Mutable state: the listener (_server), all connections (_connections), established associations by id
    # (_established), the last id given (_last_id), and what `close` waits for (_none_left).

    def __init__(
        self,
        receiver: Receiver,
        *,
        ae_title: str,
        host: str = "",
        port: int = 0,
        ssl: ssl_module.SSLContext | None = None,
        calling_ae_titles: frozenset[str] | None = None,
        max_associations: int = 256,
        artim_timeout: float = 30.0,
        stall_timeout: float = 60.0,
        max_pdu: int = pdu.MAX_PDU_LENGTH,
        max_associate_length: int = pdu.MAX_ASSOCIATE_LENGTH,
        max_command_length: int = dimse.MAX_COMMAND_LENGTH,
        receive_buffer: int = RECEIVE_BUFFER,
        socket_buffer: int = SOCKET_BUFFER,
        last_id: int = 0,
    ) -> None:
        self._receiver = receiver
        self._ae_title = ae_title
        self._host, self._port, self._ssl = host, port, ssl
        self._calling_ae_titles = calling_ae_titles
        self._socket_buffer = socket_buffer
        self._limits = Limits(
            artim_timeout=artim_timeout,
            stall_timeout=stall_timeout,
            max_pdu=max_pdu,
            max_associate_length=max_associate_length,
            max_command_length=max_command_length,
            receive_buffer=receive_buffer,
        )
        self._max_associations, self._max_connections = max_associations, 2 * max_associations
        self._server: asyncio.Server | None = None
        self._connections: set[StoreConnection] = set()
        self._established: dict[int, StoreConnection] = {}
        self._last_id = last_id
        self._none_left = asyncio.Event()

    async def start(self) -> None:
        """Listen. Raises OSError when the address cannot be had."""
        loop = asyncio.get_running_loop()
        handshake = self._limits.artim_timeout if self._ssl is not None else None
        self._server = await loop.create_server(
            lambda: StoreConnection(self, loop),
            self._host,
            self._port,
            ssl=self._ssl,
            ssl_handshake_timeout=handshake,
            backlog=self._max_connections,
            start_serving=False,
        )
        for listener in self._server.sockets:
            # Connections inherit it; set before they come, so that the window scale fits (RFC 7323 2.2).
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._socket_buffer)
        await self._server.start_serving()

    async def serve(self, connection: socket.socket) -> None:
        """Serve a connection that somebody else has accepted."""
        loop = asyncio.get_running_loop()
        await loop.connect_accepted_socket(
            lambda: StoreConnection(self, loop),
            connection,
            ssl=self._ssl,
            ssl_handshake_timeout=self._limits.artim_timeout if self._ssl is not None else None,
        )

    @property
    def sockets(self) -> list[tuple[str, int]]:
        """(host, port) of each bound address."""
        return [listener.getsockname()[:2] for listener in self._server.sockets] if self._server else []

    @property
    def associations(self) -> tuple[PeerAssociation, ...]:
        """The established associations."""
        return tuple(connection.peer for connection in self._established.values() if connection.peer is not None)

    def pause(self, association: PeerAssociation) -> None:
        """Stop reading from a peer: its consumer is slow. What was read already is still delivered."""
        if connection := self._established.get(association.id):
            connection.set_paused(by_consumer=True)

    def resume(self, association: PeerAssociation) -> None:
        """Read on."""
        if connection := self._established.get(association.id):
            connection.set_paused(by_consumer=False)

    def expect(self, sop_instance_uids: Sequence[str], transfer_syntax_uids: Sequence[str]) -> None:
        """Nothing to learn: the receiver is asked at once."""

    def expect_no_more(self, sop_instance_uids: Sequence[str]) -> None:
        """Nothing to forget."""

    async def close(self, drain: float) -> None:
        """Stop listening, let associations end for at most `drain` seconds, abort the rest."""
        if self._server is not None:
            self._server.close()
        for connection in self._connections - set(self._established.values()):
            connection.abort("the node is going down")
        await self._wait_for_none(drain)
        for connection in tuple(self._connections):
            connection.abort("the node is going down")
        await self._wait_for_none(_GRACE)
        for connection in tuple(self._connections):
            connection.drop_transport()
        await self._wait_for_none(_GRACE)
        if self._server is not None:
            await self._server.wait_closed()
            self._server = None

    async def _wait_for_none(self, seconds: float) -> None:
        if self._connections and seconds > 0:
            self._none_left.clear()
            try:
                async with asyncio.timeout(seconds):
                    await self._none_left.wait()
            except TimeoutError:
                pass

    # --- what connections ask for ---------------------------------------------------------------------------------

    @property
    def limits(self) -> Limits:
        return self._limits

    @property
    def receiver(self) -> Receiver:
        return self._receiver

    def add(self, connection: StoreConnection) -> bool:
        """Take in a new connection; false when there are too many of them."""
        self._connections.add(connection)
        return len(self._connections) <= self._max_connections

    def remove(self, connection: StoreConnection) -> None:
        self._connections.discard(connection)
        if not self._connections:
            self._none_left.set()

    def check(self, request: pdu.AssociateRQ) -> pdu.AssociateRJ | None:
        return check_request(
            request,
            ae_title=self._ae_title,
            calling_ae_titles=self._calling_ae_titles,
            has_room=len(self._established) < self._max_associations,
        )

    def establish(self, connection: StoreConnection) -> int:
        """Count a connection as an association and return its id."""
        self._last_id += 1
        self._established[self._last_id] = connection
        return self._last_id

    def end(self, association: PeerAssociation) -> bool:
        """Forget an association; false when that was done before."""
        return self._established.pop(association.id, None) is not None
