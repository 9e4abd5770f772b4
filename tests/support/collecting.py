"""A Receiver that keeps what comes in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from xca_imaging.imaging.receiver import PeerAssociation, StoreRequest

REFUSED = 0x0124


@dataclass(slots=True)
class Kept:
    """One instance: the request that brought it, its data set, and how it ended."""

    request: StoreRequest
    data: bytearray = field(default_factory=bytearray)
    status: int | None = None
    discarded: str = ""

    def write(self, *data: memoryview) -> None:
        for piece in data:
            self.data += piece

    def commit(self) -> int:
        self.status = 0x0000
        return 0x0000

    def conclude(self) -> None:
        """All is here already."""

    def discard(self, reason: str) -> None:
        self.discarded = reason


@dataclass(slots=True)
class Collector:
    """Takes every instance; `decide` may refuse one with a status, `syntaxes` limits a C-MOVE."""

    syntaxes: Sequence[str] | None = None
    decide: Callable[[StoreRequest], int | None] = lambda _: None
    stores: list[Kept] = field(default_factory=list)
    closed: list[tuple[PeerAssociation, str]] = field(default_factory=list)

    @property
    def held(self) -> dict[str, Kept]:
        """Whole instances by SOP Instance UID."""
        return {each.request.sop_instance_uid: each for each in self.stores if each.status == 0x0000}

    def accepted_syntaxes(self, association: PeerAssociation) -> Sequence[str] | None:
        return self.syntaxes

    def begin(self, request: StoreRequest) -> Kept | int:
        status = self.decide(request)
        if status is not None:
            return status
        kept = Kept(request)
        self.stores.append(kept)
        return kept

    def offer(self, request: StoreRequest) -> int:
        raise NotImplementedError("no instance comes from another process here")

    def create_instance(
        self, association: PeerAssociation, sop_class: str, sop_instance: str, dataset: bytes, transfer_syntax: str
    ) -> int:
        return REFUSED

    def syntaxes_refused(self, association: PeerAssociation, refused: Mapping[str, tuple[str, ...]]) -> None:
        pass

    def association_closed(self, association: PeerAssociation, reason: str) -> None:
        self.closed.append((association, reason))
