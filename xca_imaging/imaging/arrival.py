"""Instances on their way in: from the Storage SCP into the spool, and word of it to the scheduler.

References
----------
* DICOM PS3.4, B.2.3 (C-STORE status)
"""

from __future__ import annotations

import time
from collections.abc import Callable

from xca_imaging.errors import SpoolFull
from xca_imaging.imaging.decisions import BytesArrived, InstanceArrived, StoreBroken
from xca_imaging.imaging.receiver import Incoming, StoreRequest
from xca_imaging.imaging.spool import Spool, SpooledInstance, SpoolWriter
from xca_imaging.wire.dimse import STATUS_OUT_OF_RESOURCES, STATUS_SUCCESS


class Arrival:
    """A wanted instance on its way in, whoever writes its bytes.

    Parameters
    ----------
    number : int
        Of the store, in what is told.
    tell : callable
        Takes BytesArrived, InstanceArrived and StoreBroken; called on the event loop's thread.
    tell_every : float
        Seconds between two BytesArrived: one for each fragment would cost more than its write.
    verify : callable, optional
        Called with this arrival once its file is whole, instead of telling that it arrived; who is called reads the
        header and calls `settle`.
    """

    # Mutable state: the spooled instance once it is owned, when progress was told last and the bytes since then, and
    # whether it is over (owned or broken).
    __slots__ = ("_is_over", "_tell", "_tell_every", "_told_at", "_untold", "_verify", "instance", "number")

    def __init__(
        self,
        number: int,
        tell: Callable[[BytesArrived | InstanceArrived | StoreBroken], None],
        *,
        tell_every: float,
        verify: Callable[[Arrival], None] | None = None,
    ) -> None:
        self.number = number
        self.instance: SpooledInstance | None = None
        self._tell, self._tell_every, self._verify = tell, tell_every, verify
        self._told_at = time.monotonic()
        self._untold = 0
        self._is_over = False

    @property
    def is_to_be_verified(self) -> bool:
        """True when only its header will tell where it belongs."""
        return self._verify is not None

    def progress(self, size: int) -> None:
        """Learn that bytes have come."""
        self._untold += size
        now = time.monotonic()
        if now - self._told_at >= self._tell_every:
            told, self._untold, self._told_at = self._untold, 0, now
            self._tell(BytesArrived(self.number, told))

    def adopt(self, instance: SpooledInstance) -> int:
        """Own it: spooled whole, and told to who waits for it."""
        self.instance = instance
        self._is_over = True
        if self._verify is not None:
            instance.hold()  # until `settle`
            self._verify(self)
        else:
            self._tell(InstanceArrived(self.number, instance.size))
        return STATUS_SUCCESS

    def discard(self, reason: str, no_room: bool = False) -> None:
        """Tell that it will not come; harmless once it is owned or broken."""
        if not self._is_over:
            self._is_over = True
            self._tell(StoreBroken(self.number, reason, no_room))

    def settle(self, place: tuple[str, str] | Exception) -> None:
        """Tell that it arrived, after its study and series were read, or why they could not be."""
        assert self.instance is not None
        if isinstance(place, Exception):
            self._tell(StoreBroken(self.number, f"its header cannot be read: {place}"))
        else:
            self._tell(InstanceArrived(self.number, self.instance.size, *place))
        self.instance.release()


class SpoolingArrival(Arrival):
    """An arrival whose bytes are written here."""

    # Mutable state: the writer, from `open` on; None where there was no room for its file.
    __slots__ = ("writer",)

    writer: SpoolWriter | None

    def open(self, spool: Spool, request: StoreRequest) -> Incoming | int:
        """Begin its file; return itself, or the DIMSE status when there is no room."""
        self.writer = None
        try:
            self.writer = spool.create(
                sop_class_uid=request.sop_class_uid,
                sop_instance_uid=request.sop_instance_uid,
                transfer_syntax_uid=request.transfer_syntax_uid,
                source_ae_title=request.association.calling_ae_title,
            )
        except (SpoolFull, OSError) as exc:
            self.discard(str(exc), no_room=True)
            return STATUS_OUT_OF_RESOURCES
        return self

    def write(self, *data: memoryview) -> None:
        """Append to the file."""
        assert self.writer is not None
        try:
            self.writer.write(*data)
        except (SpoolFull, OSError) as exc:
            self.discard(str(exc), no_room=True)
            raise
        self.progress(sum(map(len, data)))

    def commit(self) -> int:
        """Have it whole on the disk."""
        assert self.writer is not None
        try:
            self.writer.seal()
        except (SpoolFull, OSError) as exc:
            self.discard(str(exc), no_room=True)
            return STATUS_OUT_OF_RESOURCES
        return STATUS_SUCCESS

    def conclude(self) -> None:
        """Own it; harmless when it is broken."""
        assert self.writer is not None
        if not self._is_over:
            self.adopt(self.writer.commit())
            self.writer.spool.prepare(self.writer.size)

    def discard(self, reason: str, no_room: bool = False) -> None:
        """Leave nothing of it behind."""
        if not self._is_over and self.writer is not None:
            self.writer.discard()
        super().discard(reason, no_room)
