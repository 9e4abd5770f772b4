"""Instances that go out while they arrive: what a transfer tells, as attachments of an answer.

Whole instances go first, in the order in which they came whole; where there is none, one that still arrives is sent
along with its arrival. When it breaks off and is sent again by the PACS, what has gone out already must be how the new
one begins, and the answer goes on; else the answer breaks off, as it does when an instance fails.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import BinaryIO

from xca_imaging import uids
from xca_imaging.errors import ArrivalBroken, RegistryError
from xca_imaging.gateway.delivery import GrowingPart, Part
from xca_imaging.imaging.holdings import Arrived, Begun, Failed, Transfer
from xca_imaging.imaging.ledger import Want
from xca_imaging.imaging.spool import ArrivalReader, Digest, SpooledInstance, SpoolWriter

_PIECE = 256 * 1024  # bytes of an arriving instance that are waited for before they are sent
_PIECE_MOST = 1024 * 1024  # bytes of it in memory
_BEHIND = 32 * 1024 * 1024  # bytes of it that have come and are not taken: a consumer so far behind is slow
_LOOK_EVERY = 0.25  # s between two looks at that
_BATCH = 64  # instances handed on together; what comes meanwhile waits for the next round


class Streaming:
    """The attachments of one answer, in the order in which they come.

    Parameters
    ----------
    transfer : Transfer
        A streaming one.
    content_ids : mapping of Want to str
        What is sent; everything else of the transfer has failed already.
    on_sent : callable
        Takes each want with its SHA-256 when all its octets have gone to the connection.
    """

    # Mutable state: wants that are neither sent nor being sent (_left), whole instances until they are sent (_whole)
    # and writers of those that arrive (_arriving), both in order of arrival, wants that failed (_failed), the one that
    # is read along now (_reader), and an event for the one who waits for a change.

    def __init__(
        self, transfer: Transfer, content_ids: Mapping[Want, str], on_sent: Callable[[Want, str], None]
    ) -> None:
        self._transfer, self._tell_sent = transfer, on_sent
        self._content_ids = content_ids
        self._left = dict(content_ids)
        self._whole: dict[Want, SpooledInstance] = {}
        self._arriving: dict[Want, SpoolWriter] = {}
        self._failed: dict[Want, RegistryError] = {}
        self._reader: ArrivalReader | None = None
        self._changed = asyncio.Event()

    async def parts(self) -> AsyncGenerator[Sequence[Part] | GrowingPart, None]:
        """Yield the attachments; raises the error of an instance that fails."""
        tasks = [asyncio.ensure_future(self._listen()), asyncio.ensure_future(self._pace())]
        try:
            while self._left:
                self._changed.clear()
                for error in self._failed.values():
                    raise error
                whole = [want for want in self._whole if want in self._left]
                arriving = next((want for want, writer in self._arriving.items() if not writer.is_over), None)
                if whole:
                    yield [self._part(want, self._whole[want]) for want in whole[:_BATCH]]
                elif arriving is not None:
                    octets = self._follow(arriving, self._arriving.pop(arriving))
                    yield GrowingPart(self._left.pop(arriving), uids.MIME_DICOM, octets)
                else:
                    await self._changed.wait()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _part(self, want: Want, instance: SpooledInstance) -> Part:
        return Part(
            self._left.pop(want),
            uids.MIME_DICOM,
            instance.size,
            instance.path,
            functools.partial(self._sent, want),
            instance.sha256 or "",
        )

    def _sent(self, want: Want, sha256: str) -> None:
        self._whole.pop(want, None)
        self._tell_sent(want, sha256)

    async def _listen(self) -> None:
        """Follow what the transfer tells."""
        async for event in self._transfer.events():
            match event:
                case Begun(want, writer) if want in self._left:
                    self._arriving[want] = writer
                case Arrived(want, instance):
                    self._arriving.pop(want, None)
                    self._whole[want] = instance
                case Failed(want, error) if want in self._content_ids:
                    self._failed[want] = error
            self._changed.set()

    async def _pace(self) -> None:
        """Tell the transfer when its consumer falls behind the one that is read along; the rest it counts itself."""
        is_slow = False
        while True:
            await asyncio.sleep(_LOOK_EVERY)
            if is_slow != (self._reader is not None and self._reader.behind > _BEHIND):
                is_slow = not is_slow
                self._transfer.set_throttled(is_slow)

    async def _follow(self, want: Want, writer: SpoolWriter) -> AsyncGenerator[bytes, None]:
        """Yield an instance while it arrives."""
        digest = hashlib.sha256()
        with writer.reader() as self._reader:
            try:
                while piece := await self._reader.read(_PIECE, _PIECE_MOST, digest):
                    yield piece
            except ArrivalBroken:
                pass  # the transfer asks for it again, or says that it failed
            sent = self._reader.offset
            self._reader = None
        while want not in self._whole:
            if want in self._failed:
                raise self._failed[want]
            self._changed.clear()
            await self._changed.wait()
        instance = self._whole[want]
        if instance is not writer.instance:
            async with aclosing(_resume(instance, sent, digest)) as rest:
                async for piece in rest:
                    yield piece
        self._sent(want, digest.hexdigest())


async def _resume(instance: SpooledInstance, sent: int, digest: Digest) -> AsyncGenerator[bytes, None]:
    """Yield what is left of an instance after its first bytes have gone out, as they were in another file of it."""
    loop = asyncio.get_running_loop()
    with instance.open() as file:
        if await loop.run_in_executor(None, _digest_of, file, sent) != digest.digest():
            raise ArrivalBroken("an instance broke off, and came again with other bytes than those already sent")
        while piece := await loop.run_in_executor(None, _read, file, digest):
            yield piece


def _digest_of(file: BinaryIO, length: int) -> bytes:
    digest = hashlib.sha256()
    while length and (data := file.read(min(length, _PIECE_MOST))):
        digest.update(data)
        length -= len(data)
    return digest.digest()


def _read(file: BinaryIO, digest: Digest) -> bytes:
    data = file.read(_PIECE_MOST)
    digest.update(data)
    return data
