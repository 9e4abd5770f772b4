"""Files of the spool's folder while a sibling process writes them: `sibling` says what is told of them and when."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from xxhash import xxh3_128

from xca_imaging.errors import SpoolFull
from xca_imaging.imaging.file_meta import encode_file_meta
from xca_imaging.imaging.next_file import give_back_room
from xca_imaging.imaging.receiver import Later, StoreRequest
from xca_imaging.imaging.spool_writing import raise_mapped, write_pieces
from xca_imaging.wire.dimse import STATUS_SUCCESS

if TYPE_CHECKING:
    from xca_imaging.imaging.sibling import Sibling

_PROGRESS_EVERY = 0.25  # s between two words of one instance's progress


class SiblingFile:
    """An instance that is written to the spool's folder."""

    # Mutable state: what is still to be written before the data (_head), its checksum and size, the status once it is
    # refused (_refused: the file is gone then), whether the main process knows of it (_is_offered) or will when it was
    # answered (_is_kept), whether it is over (_is_done), bytes of which nothing was told yet (_untold) and since when
    # (_told_at).
    __slots__ = (
        "_checksum",
        "_fd",
        "_head",
        "_is_done",
        "_is_kept",
        "_is_offered",
        "_refused",
        "_room",
        "_sibling",
        "_store",
        "_told_at",
        "_untold",
        "request",
        "size",
    )

    def __init__(
        self, sibling: Sibling, store: int, fd: int, room: int, request: StoreRequest, *, is_offered: bool
    ) -> None:
        self._sibling, self._store, self._fd, self._room, self.request = sibling, store, fd, room, request
        self._is_offered, self._is_kept = is_offered, False
        self._head = encode_file_meta(
            sop_class_uid=request.sop_class_uid,
            sop_instance_uid=request.sop_instance_uid,
            transfer_syntax_uid=request.transfer_syntax_uid,
            source_ae_title=request.association.calling_ae_title,
        )
        self._checksum = xxh3_128(self._head)
        self._refused: int | None = None
        self._is_done = False
        self._untold = 0
        self._told_at = sibling.loop.time()
        self.size = len(self._head)
        try:
            sibling.charge(self.size)
        except SpoolFull:
            os.close(fd)
            sibling.remove(store, 0)
            raise

    def write(self, *data: memoryview) -> None:
        """Append to the file, unless it is refused."""
        if self._is_done:
            return
        length = len(data[0]) if len(data) == 1 else sum(map(len, data))
        try:
            self._sibling.charge(length)
            self.size += length
            update = self._checksum.update
            for piece in data:
                update(piece)
            self._append(*data)
        except (SpoolFull, OSError) as exc:
            self.discard(str(exc), no_room=True)
            raise
        self._untold += length
        now = self._sibling.loop.time()
        if now - self._told_at >= _PROGRESS_EVERY:
            self._offer()
            self._sibling.tell("progress", self._store, self._untold)
            self._untold, self._told_at = 0, now

    def _append(self, *data: memoryview) -> None:
        try:
            if self._head:
                write_pieces(self._fd, self._head, *data)
                self._head = b""
            else:
                write_pieces(self._fd, *data)
        except OSError as exc:
            raise_mapped(exc)

    @property
    def checksum(self) -> str:
        """XXH3-128 of all that was written, in hexadecimal."""
        return self._checksum.hexdigest()

    def commit(self) -> int | Later[int]:
        """Close the file, and let the main process own it and say so."""
        if self._refused is not None:
            self._sibling.forget(self._store)
            return self._refused
        if self._head:
            self._append()
        give_back_room(self._fd, self._room, self.size)
        os.close(self._fd)
        self._is_done = True
        if not self._is_offered and self._sibling.can_keep:
            self._is_kept = True
            self._sibling.forget(self._store)
            return STATUS_SUCCESS
        self._offer()
        try:
            return self._sibling.hand_over(self._store, self)
        except SpoolFull as exc:
            self._sibling.remove(self._store, self.size)
            self._sibling.forget(self._store)
            self._sibling.tell("broken", self._store, str(exc), True)
            raise

    def conclude(self) -> None:
        """Tell the main process of it, unless it knows."""
        if self._is_kept:
            self._sibling.keep(self._store, self)
        self._sibling.prepare(self.size)

    def _offer(self) -> None:
        if not self._is_offered:
            self._is_offered = True
            self._sibling.offer_file(self._store, self.request)

    def discard(self, reason: str, no_room: bool = False) -> None:
        """Leave nothing of it behind, and tell."""
        if self._refused is not None:
            self._refused = None
            self._sibling.forget(self._store)
        elif not self._is_done:
            self._remove()
            self._sibling.forget(self._store)
            self._offer()
            self._sibling.tell("broken", self._store, reason, no_room)

    def refuse(self, status: int) -> None:
        """Drop what came and what comes."""
        if not self._is_done:
            self._refused = status
            self._remove()

    def _remove(self) -> None:
        self._is_done = True
        os.close(self._fd)
        self._sibling.remove(self._store, self.size)
