"""Arriving instances: which are wanted, by whom, and in which transfer syntax.

References
----------
* DICOM PS3.4, B.2.3 (C-STORE); PS3.8, 7.1.1.13 (presentation contexts)
"""

from __future__ import annotations

from xca_imaging.errors import RepositoryOutOfResources
from xca_imaging.imaging.decisions import (
    AcceptStore,
    BeginInstance,
    BytesArrived,
    DropStore,
    InstanceArrived,
    LoseInstance,
    RefuseStore,
    StoreBroken,
    StoreOffered,
)
from xca_imaging.imaging.recovery import Recovery, no_listed_syntax
from xca_imaging.imaging.waitlist import Waitlist
from xca_imaging.imaging.workload import Fetch, Store


class Stores:
    """Instances on their way in."""

    # Mutable state: stores by number; the waitlist is shared.

    def __init__(self, waitlist: Waitlist, recovery: Recovery) -> None:
        self._waitlist, self._recovery = waitlist, recovery
        self._stores: dict[int, Store] = {}

    def accepted_syntaxes(self, pacs: str | None) -> tuple[str, ...] | None:
        """Return what a PACS may send now, best first; None when nothing was asked of anybody.

        For a peer that cannot be told which PACS it is, the lists of all that were asked, one after the other: each
        instance is looked at again when it is offered.
        """
        if pacs is not None:
            return self._waitlist.pacs[pacs].accept or None
        asked = dict.fromkeys(move.pacs for move in self._waitlist.moves.values())
        syntaxes = dict.fromkeys(uid for one in asked for uid in one.accept)
        return tuple(syntaxes) or None

    def offer(self, event: StoreOffered, now: float) -> None:
        """Accept, drop or refuse an instance."""
        out = self._waitlist.out
        wanted = [fetch for fetch in self._wanted_by(event.sop_instance_uid, event.pacs) if fetch.waiters]
        if not wanted:
            out.append(DropStore(event.store) if event.is_spooled else RefuseStore(event.store, "nobody waits for it"))
            return
        # Who waits with a longer list waits for a move of their own: the PACS may have decoded this one for want of it.
        negotiated = self._negotiated(wanted, event.pacs)
        asked = [fetch for fetch in wanted if negotiated.issuperset(fetch.accept)] or wanted
        fetches = [fetch for fetch in asked if event.transfer_syntax_uid in fetch.accept]
        if not fetches:
            for fetch in asked:
                fetch.syntax_error = no_listed_syntax((event.transfer_syntax_uid,))
            out.append(RefuseStore(event.store, f"transfer syntax {event.transfer_syntax_uid} is not wanted"))
            return
        verify = any(fetch.verify for fetch in fetches) or (
            len(wanted) > 1 and len({(fetch.study, fetch.series) for fetch in wanted}) > 1
        )
        store = self._stores[event.store] = Store(
            event.pacs, event.sop_class_uid, event.sop_instance_uid, event.transfer_syntax_uid, fetches, negotiated
        )
        out.append(AcceptStore(event.store, verify))
        for fetch in fetches:
            if fetch.arriving == 0:
                for request, wants in fetch.waiters.items():
                    out += [BeginInstance(request.id, want) for want in wants]
            fetch.arriving += 1
        self._note_progress(store, 0, now)

    def _negotiated(self, wanted: list[Fetch], pacs: str | None) -> frozenset[str]:
        """Return the transfer syntaxes that the sender could choose from.

        Our Storage SCP negotiates with a PACS for all its C-MOVEs; the other methods do for each move.
        """
        for fetch in wanted:
            move = fetch.move
            if move is not None and move.id in self._waitlist.moves and move.method != "c-move":
                return frozenset(move.accept)
        return frozenset(self.accepted_syntaxes(pacs) or ())

    def _wanted_by(self, uid: str, pacs: str | None) -> list[Fetch]:
        """Return who waits for an instance from this PACS; from any, where its sender is not the one that was asked."""
        fetches = self._waitlist.by_uid.get(uid, [])
        return [fetch for fetch in fetches if fetch.pacs.name == pacs] or fetches

    def hear(self, event: BytesArrived, now: float) -> None:
        """Note that bytes came."""
        if store := self._stores.get(event.store):
            self._note_progress(store, event.size, now)

    def _note_progress(self, store: Store, size: int, now: float) -> None:
        store.told += size
        if size:
            store.fetches[0].pacs.bucket.take(size, now)
        for fetch in store.fetches:
            if fetch.is_open:
                pacs = fetch.pacs
                pacs.last_progress = pacs.last_heard = now
                if fetch.move is not None:
                    fetch.move.last_progress = now

    def finish(self, event: InstanceArrived, now: float) -> None:
        """Complete what an instance is for: also who asked for it meanwhile."""
        store = self._stores.pop(event.store)
        self._note_progress(store, max(0, event.size - store.told), now)
        self._waitlist.sizes.learn(store.fetches[0].pacs.name, store.sop_class, event.size)
        read = (event.study_instance_uid, event.series_instance_uid)
        claims = {read} if any(read) else {(fetch.study, fetch.series) for fetch in store.fetches}
        for fetch in tuple(self._wanted_by(store.uid, store.pacs)):
            if (fetch.study, fetch.series) in claims:
                is_asked = fetch in store.fetches or store.negotiated.issuperset(fetch.accept)
                if is_asked and store.syntax in fetch.accept:
                    if (move := fetch.move) is not None:
                        move.arrived += 1
                        move.sop_classes.add(store.sop_class)
                        if not move.breaker.is_closed:
                            self._waitlist.touch(move.pacs)
                        move.breaker.succeed()
                    self._waitlist.complete(fetch, event.store)
            elif any(read):
                self._waitlist.fail_absent(fetch)

    def lose(self, event: StoreBroken, now: float) -> None:
        """Go on without an instance whose arrival broke off."""
        store = self._stores.pop(event.store)
        overdue: list[Fetch] = []
        for fetch in store.fetches:
            if not fetch.is_open:
                continue
            fetch.arriving -= 1
            if event.no_room:
                if fetch.move is not None:
                    fetch.move.no_room = event.reason
                self._waitlist.fail(fetch, RepositoryOutOfResources(event.reason))
            elif fetch.arriving == 0:
                for request, wants in fetch.waiters.items():
                    self._waitlist.out += [LoseInstance(request.id, want) for want in wants]
                if fetch.is_overdue:
                    overdue.append(fetch)
        self._recovery.miss(overdue, now)
