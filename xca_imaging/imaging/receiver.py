"""The seam between the Storage SCP, which has the sockets, and whoever wants instances.

References
----------
* DICOM PS3.4, B (Storage Service Class), R (Instance Availability Notification); PS3.7, 9.1.1 (C-STORE), 10.1.5
  (N-CREATE)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, NamedTuple, Protocol, TypeVar

from xca_imaging.wire.dimse import STATUS_SUCCESS

if TYPE_CHECKING:
    from xca_imaging.imaging.spool import SpooledInstance

MAX_NOTIFICATION = 1_000_000
"""Bytes of the data set of an N-CREATE, which is collected in memory: references to some 5000 instances."""

T = TypeVar("T")


class Later(Generic[T]):
    """An answer that another process has yet to give. The association waits for it, its neighbours do not."""

    # Mutable state: whether and what it was answered, and who is called then.
    __slots__ = ("_answers", "_then", "is_known")

    def __init__(self) -> None:
        self.is_known = False
        self._answers: list[T] = []
        self._then: Callable[[T], None] | None = None

    def tell(self, answer: T) -> None:
        """Give the answer; it counts once."""
        if not self.is_known:
            self.is_known = True
            self._answers.append(answer)
            if self._then is not None:
                self._then(answer)

    def then(self, take: Callable[[T], None]) -> None:
        """Call `take` with the answer, at once when it is there."""
        if self.is_known:
            take(self._answers[0])
        else:
            self._then = take


@dataclass(frozen=True, slots=True)
class PeerAssociation:
    """Who is at the other end of an established association.

    `pacs` is the name of the PACS where we requested the association ourselves; None where the peer did.
    """

    id: int
    calling_ae_title: str
    called_ae_title: str
    host: str
    port: int
    implementation_class_uid: str
    implementation_version_name: str
    pacs: str | None = None


class StoreRequest(NamedTuple):
    """A C-STORE-RQ. The SOP class is that of the command, the transfer syntax that of its presentation context."""

    association: PeerAssociation
    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    move_originator_ae_title: str | None
    move_originator_message_id: int | None


class Incoming(Protocol):
    """An instance on its way in. After `conclude` or `discard` it is not used any more."""

    def write(self, *data: memoryview) -> None:
        """Take the next bytes of the data set, in one piece or several; the views are valid during the call only.

        SpoolFull and OSError are answered with status A700H; the rest of the data set is read and dropped.
        """

    def commit(self) -> int | Later[int]:
        """Return the DIMSE status of the whole instance: 0000H only when all of it is written and its file closed."""

    def conclude(self) -> None:
        """Do what nobody waits for: index it and tell of it. Called once, as soon as its status was sent.

        The peer fetches its next object meanwhile. Nothing else happens in between.
        """

    def discard(self, reason: str) -> None:
        """Drop what came: the association is gone or the instance cannot be kept. Harmless when repeated."""


class Dropped:
    """An instance that we own already: received, answered with Success, forgotten."""

    def write(self, *data: memoryview) -> None:
        """Forget it."""

    def commit(self) -> int:
        """Success: it is owned, from before."""
        return STATUS_SUCCESS

    def conclude(self) -> None:
        """Nothing to tell."""

    def discard(self, reason: str) -> None:
        """Nothing to drop."""


class Arriving(Protocol):
    """An instance that another process writes to the spool's folder. After `adopt` or `discard` it is not used any
    more.
    """

    def progress(self, size: int) -> None:
        """Learn how many bytes of the data set have come since the last word of it."""

    def adopt(self, instance: SpooledInstance) -> int:
        """Own the whole instance, which the spool has adopted; return the DIMSE status that answers for it."""

    def discard(self, reason: str, no_room: bool = False) -> None:
        """Learn that it will not come, and that its file is gone. Harmless when repeated."""


class Receiving(Protocol):
    """Who reads from peers, in this process or others."""

    def pause(self, association: PeerAssociation) -> None:
        """Stop reading from a peer: its consumer is slow. What was read already is still delivered."""

    def resume(self, association: PeerAssociation) -> None:
        """Read on."""


class Listening(Receiving, Protocol):
    """Who waits for peers to connect, in this process or others."""

    def expect(self, sop_instance_uids: Sequence[str], transfer_syntax_uids: Sequence[str]) -> None:
        """Learn what was asked of a PACS: when it comes so, it may be answered before the `Receiver` is asked."""

    def expect_no_more(self, sop_instance_uids: Sequence[str]) -> None:
        """Learn that it was sent, or will not be."""


class Receiver(Protocol):
    """Who wants instances. All methods are called on the event loop and must not block it."""

    def accepted_syntaxes(self, association: PeerAssociation) -> Sequence[str] | Later[Sequence[str] | None] | None:
        """Return the transfer syntaxes that this peer may use, best first; None: any, in the house order."""

    def begin(self, request: StoreRequest) -> Incoming | int:
        """Take an instance, or return the DIMSE status that refuses it (its data set is read and dropped)."""

    def offer(self, request: StoreRequest) -> Arriving | Dropped | int:
        """Decide as `begin` does, about an instance whose bytes another process writes."""

    def create_instance(
        self,
        association: PeerAssociation,
        sop_class_uid: str,
        sop_instance_uid: str,
        dataset: bytes,
        transfer_syntax_uid: str,
    ) -> int | Later[int]:
        """Take an Instance Availability Notification (N-CREATE) and return its DIMSE status.

        Parameters
        ----------
        sop_instance_uid : str
            As the peer named it; empty where it left that to us.
        dataset : bytes
            The attribute list in the transfer syntax, at most MAX_NOTIFICATION long.
        """

    def syntaxes_refused(self, association: PeerAssociation, refused: Mapping[str, tuple[str, ...]]) -> None:
        """Learn which contexts were refused for their syntaxes: SOP class -> proposed transfer syntaxes."""

    def association_closed(self, association: PeerAssociation, reason: str) -> None:
        """Learn that an association is over: released, aborted or lost. Called once for each that was accepted."""
