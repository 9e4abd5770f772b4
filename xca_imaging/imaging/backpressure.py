"""Which associations are not read for now: those that bring only what slow consumers wait for, while the spool is high.

A streaming consumer that takes less than its PACS sends fills the spool. At the high-water mark its own associations
stand still, until it has caught up or the spool is low again; who waits for the same instances and keeps up is served.
A spooled transfer is never slowed down: its consumer takes nothing before everything is there, so that would be a
deadlock.
"""

from __future__ import annotations

from collections.abc import Callable

from xca_imaging.imaging.holdings import Transfer
from xca_imaging.imaging.receiver import PeerAssociation
from xca_imaging.imaging.spool import Spool


class Backpressure:
    """Who is slow, and what stands still for it.

    Parameters
    ----------
    slow_backlog : int
        Bytes that a streaming consumer may leave untaken while the spool is high; more is slow.
    soon : callable
        Runs a function after what runs now: word of the spool and of transfers comes from within whatever changed them.
    throttle : callable
        Takes a transfer, and whether it is slow now.
    pause, resume : callable
        Take an association.
    """

    # Mutable state: transfers that are open, and whether each is slow; instances by move, the move by instance,
    # associations by number with the move that each brings, moves that are only for the slow, associations that are
    # paused, and whether a look at all is due.

    def __init__(
        self,
        spool: Spool,
        *,
        slow_backlog: int,
        soon: Callable[[Callable[[], None]], object],
        throttle: Callable[[Transfer, bool], None],
        pause: Callable[[PeerAssociation], None],
        resume: Callable[[PeerAssociation], None],
    ) -> None:
        self._spool, self._slow_backlog = spool, slow_backlog
        self._soon, self._throttle, self._pause, self._resume = soon, throttle, pause, resume
        self._transfers: dict[Transfer, bool] = {}
        self._instances: dict[int, tuple[str, ...]] = {}
        self._move_of: dict[str, int] = {}
        self._brings: dict[int, tuple[PeerAssociation, int]] = {}
        self._slow_moves: set[int] = set()
        self._paused: dict[int, PeerAssociation] = {}
        self._is_due = False
        spool.on_level = lambda is_high: self._look_soon()

    @property
    def paused(self) -> int:
        """Associations that are not read."""
        return len(self._paused)

    # --- transfers --------------------------------------------------------------------------------------------------

    def open(self, transfer: Transfer) -> None:
        """Learn of a transfer."""
        self._transfers[transfer] = False
        if transfer.is_streaming:
            transfer.on_pace = lambda: self._note(transfer)

    def close(self, transfer: Transfer) -> None:
        """Learn that a transfer is over."""
        del self._transfers[transfer]
        self.judge()

    def _note(self, transfer: Transfer) -> None:
        if self._spool.is_high or self._transfers.get(transfer):
            self._look_soon()

    def _look_soon(self) -> None:
        if not self._is_due:
            self._is_due = True
            self._soon(self._look)

    def _look(self) -> None:
        self._is_due = False
        for transfer, was_slow in tuple(self._transfers.items()):
            # Half way down before it goes on, so that it does not start and stop with every instance.
            limit = self._slow_backlog // 2 if was_slow else self._slow_backlog
            lags = transfer.is_streaming and (transfer.is_slow or transfer.backlog > limit)
            is_slow = lags and self._spool.is_high
            if is_slow is not was_slow:
                self._transfers[transfer] = is_slow
                self._throttle(transfer, is_slow)
        self.judge()

    # --- moves and associations -------------------------------------------------------------------------------------

    def start_move(self, move: int, instances: tuple[str, ...]) -> None:
        """Learn what a move is to bring."""
        self._instances[move] = instances
        self._move_of.update(dict.fromkeys(instances, move))
        self.judge()

    def finish_move(self, move: int) -> None:
        """Learn that a move has ended; what its associations still bring comes in."""
        for uid in self._instances.pop(move, ()):
            if self._move_of.get(uid) == move:
                del self._move_of[uid]
        self._slow_moves.discard(move)
        self._update()

    def begin_store(self, association: PeerAssociation, sop_instance_uid: str) -> None:
        """Learn that an association brings an instance."""
        move = self._move_of.get(sop_instance_uid)
        if move is not None:
            self._brings[association.id] = association, move
            if move in self._slow_moves or association.id in self._paused:
                self._update()

    def forget(self, association: PeerAssociation) -> None:
        """Learn that an association is over."""
        self._brings.pop(association.id, None)
        self._paused.pop(association.id, None)

    def judge(self) -> None:
        """Find the moves that only the slow wait for; called when one of either came or went."""
        slow = [transfer for transfer, is_slow in self._transfers.items() if is_slow]
        if slow:
            fast = [transfer for transfer, is_slow in self._transfers.items() if not is_slow]
            self._slow_moves = {
                move
                for move, instances in self._instances.items()
                if any(transfer.waits_for(instances) for transfer in slow)
                and not any(transfer.waits_for(instances) for transfer in fast)
            }
        elif self._slow_moves:
            self._slow_moves = set()
        else:
            return
        self._update()

    def _update(self) -> None:
        for number, (association, move) in self._brings.items():
            if move in self._slow_moves and number not in self._paused:
                self._paused[number] = association
                self._pause(association)
            elif move not in self._slow_moves and number in self._paused:
                del self._paused[number]
                self._resume(association)
