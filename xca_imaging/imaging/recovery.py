"""After a move: what came of it, what is asked again, in which way, and what is given up.

* What a PACS says about its success is a hint. A fetch ends when its instance has arrived whole, or when the move that
  was to bring it has ended (and a grace has passed) and there is a reason not to ask again.
* Only what is missing is asked again, after a pause, a bounded number of times.
* A method that was refused, or has had its chances, gives way to the PACS's next one. The breaker of each method
  remembers, so that later requests do not find out anew.

References
----------
* DICOM PS3.4, C.4.2 (C-MOVE), Table C.4-2; PS3.8, Table 9-21 (A-ASSOCIATE-RJ 2/3/2)
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from xca_imaging.errors import (
    PeerBusy,
    PeerError,
    PeerTimeout,
    RegistryError,
    RepositoryBusy,
    RepositoryError,
    RepositoryOutOfResources,
    Retry,
)
from xca_imaging.imaging.decisions import CancelMove, MoveFinished, QueryFinished
from xca_imaging.imaging.waitlist import Waitlist
from xca_imaging.imaging.workload import Fetch, Move, Pacs, Stage

_OUT_OF_RESOURCES = 0xA700  # PS3.4 Table C.4-2: A7xx


class Recovery:
    """Decides about fetches that a move did not bring.

    Parameters
    ----------
    stall_timeout, max_attempts, busy_attempts, backoff, max_backoff, grace, method_memory
        See `Scheduler`.
    """

    # Mutable state: moves that have ended and whose grace runs, fetches that a C-FIND tells about by its number; the
    # waitlist is shared.

    def __init__(
        self,
        waitlist: Waitlist,
        *,
        randomness: random.Random,
        stall_timeout: float,
        max_attempts: int,
        busy_attempts: int,
        backoff: float,
        max_backoff: float,
        grace: float,
        method_memory: float,
    ) -> None:
        self._waitlist, self._random = waitlist, randomness
        self._stall_timeout, self._grace, self._method_memory = stall_timeout, grace, method_memory
        self._max_attempts, self._busy_attempts = max_attempts, busy_attempts
        self._backoff, self._max_backoff = backoff, max_backoff
        self.settling: dict[Move, None] = {}
        self.checks: dict[int, list[Fetch]] = {}

    # --- moves that run -------------------------------------------------------------------------------------------

    def watch(self, move: Move, now: float) -> None:
        """Give a move up when nothing that is wanted has come for too long."""
        if move.id not in self._waitlist.moves or move.is_cancelled:
            return
        if any(request.is_throttled for fetch in move.fetches for request in fetch.waiters):
            move.last_progress = now  # it is we who do not read
        due = move.last_progress + self._stall_timeout
        if now < due:
            self._waitlist.at(due, lambda time: self.watch(move, time))
            return
        pacs = move.pacs
        error = _as_registry_error(PeerTimeout(pacs.name, f"no wanted byte came for {self._stall_timeout:g} s"))
        is_silent = pacs.last_heard <= move.last_progress
        for fetch in tuple(move.fetches):
            if not fetch.waiters:
                self._waitlist.close(fetch)
        stalled = tuple(move.fetches)
        move.fetches.clear()
        self.cancel(move, error.context)
        if stalled and is_silent:
            move.breaker.trip(now, error)
        self._give_way(stalled, move, error, now)
        # Without this a long queue would take one time-out after the other.
        self.give_up_waiting(pacs, now)

    def cancel(self, move: Move, reason: str) -> None:
        """Stop a move that runs."""
        if move.id in self._waitlist.moves and not move.is_cancelled:
            move.is_cancelled = True
            self._waitlist.out.append(CancelMove(move.id, reason))

    # --- moves that have ended ------------------------------------------------------------------------------------

    def finish(self, event: MoveFinished, now: float) -> None:
        """Learn how a move ended."""
        move = self._waitlist.moves.pop(event.move)
        pacs = move.pacs
        del pacs.moves[move]
        pacs.learn_speed(move, now)
        self._waitlist.touch(pacs)
        for fetch in tuple(move.fetches):
            if not fetch.waiters:
                self._waitlist.close(fetch)
        if move.no_room:
            # A PACS mostly gives the rest of a move up after a C-STORE that was refused. Asking again would only fill
            # the spool again; who asked may come back later.
            for fetch in tuple(move.fetches):
                if not fetch.arriving:
                    self._waitlist.fail(fetch, RepositoryOutOfResources(move.no_room))
        fetches = list(move.fetches)
        if event.error is not None:
            self._finish_in_error(move, fetches, event.error, now)
        else:
            self._finish_in_status(move, fetches, event, now)
        move.breaker.end(move.id)

    def _finish_in_status(self, move: Move, fetches: list[Fetch], event: MoveFinished, now: float) -> None:
        pacs = move.pacs
        comment = f" ({event.comment})" if event.comment else ""
        how = "without a final response" if event.status is None else f"with status 0x{event.status:04X}"
        error = RepositoryError(f"{pacs.name}: {move.method} ended {how}{comment} and the instance did not come")
        if event.status is not None:
            pacs.last_heard = now
            is_out_of_resources = event.status & 0xFF00 == _OUT_OF_RESOURCES and move.arrived == 0
            if is_out_of_resources and not any(self._syntax_error(fetch, is_last_word=True) for fetch in fetches):
                # Nothing came and it has no room: as much a "not now" as a rejected association.
                self._finish_in_error(move, fetches, PeerBusy(pacs.name, error.context), now)
                return
            if not move.is_cancelled:
                pacs.widen()
        if not fetches:
            return
        if move.arrived == 0 and event.status != 0 and not move.is_cancelled and not _any_arriving(fetches):
            # With a status the PACS lives, and it may be the study's fault.
            move.breaker.fail(move.started, now, error, subject=move.study if event.status is not None else "")
        # A list that brought one instance or none was taken for a single UID, or not understood.
        is_empty = event.status == 0 and (event.completed or 0) <= 1 and move.level == "IMAGE" and move.listed > 1
        named = set(event.failed_uids)
        at_once = []
        for fetch in fetches:
            fetch.reason = error
            fetch.enter(Stage.SETTLING)
            if fetch.uid in named and not fetch.arriving:
                at_once.append(fetch)
        if at_once:
            self.miss(at_once, now)
        if len(at_once) < len(fetches):
            self.settling[move] = None
            self._waitlist.at(now + self._grace, lambda time: self._settle(move, is_empty, time))

    def _finish_in_error(self, move: Move, fetches: list[Fetch], error: PeerError, now: float) -> None:
        pacs = move.pacs
        reason = _as_registry_error(error)
        for fetch in fetches:
            fetch.reason = reason
        if isinstance(error, PeerBusy):
            if pacs.pause(now, lambda times: self._spread(self._backoff * 2 ** (times - 1))):
                self._waitlist.at(pacs.pause_until, lambda time: self._waitlist.touch(pacs))
            again = []
            for fetch in fetches:
                fetch.attempts -= 1
                fetch.tries -= 1
                fetch.busy += 1
                if fetch.busy > self._busy_attempts:
                    self._waitlist.fail(fetch, reason)
                else:
                    again.append(fetch)
            self._requeue(again, 0.0, now, is_whole=_is_untouched(move))
        elif error.retry is Retry.NEVER:
            self._refuse(move, fetches, reason, now)
        else:
            if move.arrived == 0 and not _any_arriving(fetches):
                move.breaker.fail(move.started, now, reason)
            self._retry(fetches, now)
            self.give_up_waiting(pacs, now)

    def _refuse(self, move: Move, fetches: list[Fetch], reason: RegistryError, now: float) -> None:
        """A move was refused for good: in another way, if there is one, unless the refusal may be about the list only.

        pynetdicom's qrscp answers a list of UIDs with 0xA801 (move destination unknown), because it matches nothing.
        """
        if move.level == "IMAGE" and move.listed > 1 and move.arrived == 0:
            for fetch in fetches:
                fetch.one_by_one = True
            self._retry(fetches, now)
            return
        # Some answer 0xA801 when our SCP accepted none of their contexts.
        refused = []
        for fetch in fetches:
            error = self._syntax_error(fetch, is_last_word=True)
            if error is not None:
                self._waitlist.fail(fetch, error)
            else:
                refused.append(fetch)
        if not refused:
            return
        has_other_way = move.way + 1 < len(move.pacs.methods)
        if move.arrived == 0 and has_other_way:
            if move.breaker.has_worked:
                move.breaker.fail(move.started, now, reason)
            else:
                move.breaker.trip(now, reason, pause=self._method_memory)
        if refused[0].one_by_one:
            # One of a list was refused as the list was: so will be the rest of it.
            series = refused[0].key[:3]
            refused += [each for each in move.pacs.waiting() if each.one_by_one and each.key[:3] == series]
        self._give_way(refused, move, reason, now)

    def _settle(self, move: Move, is_empty: bool, now: float) -> None:
        """The grace after a move is over: what has not come and is not coming in just now was missed."""
        del self.settling[move]
        late = [fetch for fetch in move.fetches if fetch.stage is Stage.SETTLING]
        missed = [fetch for fetch in late if not fetch.arriving]
        for fetch in late:
            fetch.is_overdue = True
            fetch.one_by_one = fetch.one_by_one or (is_empty and move.arrived <= 1)
        self.miss(missed, now)

    def miss(self, fetches: Iterable[Fetch], now: float) -> None:
        """Decide about fetches that a move, now ended, did not bring."""
        again: list[Fetch] = []
        unproved: dict[tuple[str, str], list[Fetch]] = {}
        for fetch in fetches:
            fetch.is_overdue = False
            if (syntax_error := self._syntax_error(fetch)) is not None:
                self._waitlist.fail(fetch, syntax_error)
            elif fetch.sop_class is None and not fetch.is_checked:
                fetch.enter(Stage.CHECKING)
                unproved.setdefault((fetch.study, fetch.series), []).append(fetch)
            else:
                again.append(fetch)
        for checked in unproved.values():
            query = -next(self._waitlist.numbers)
            self.checks[query] = checked
            checked[0].pacs.waiting_queries.append(query)
            self._waitlist.touch(checked[0].pacs)
        self._retry(again, now)

    def finish_check(self, event: QueryFinished, now: float) -> None:
        """Learn what a series has."""
        again = []
        for fetch in self.checks.pop(event.query, ()):
            if not fetch.is_open:
                continue
            fetch.is_checked = True
            if event.present is not None:
                if fetch.uid not in event.present:
                    self._waitlist.fail_absent(fetch)
                    continue
                fetch.sop_class, fetch.verify = event.present[fetch.uid], False
            if (syntax_error := self._syntax_error(fetch)) is not None:
                self._waitlist.fail(fetch, syntax_error)
            else:
                again.append(fetch)
        self._retry(again, now)

    def _syntax_error(self, fetch: Fetch, *, is_last_word: bool = False) -> RegistryError | None:
        """Return the error of an instance that was not sent because we accept none of its transfer syntaxes.

        A refused context explains a class of which nothing else came: PACSs propose several contexts for a class and
        do not need them all. Where the class is not known it explains only when it is all that we will ever know.
        """
        if fetch.syntax_error is not None:
            return fetch.syntax_error
        move = fetch.move
        if move is None or not move.refused:
            return None
        refused = move.refused
        if fetch.sop_class:
            if fetch.sop_class not in refused or fetch.sop_class in move.sop_classes:
                return None
            proposed = refused[fetch.sop_class]
        elif move.arrived == 0 and (fetch.sop_class is not None or fetch.is_checked or is_last_word):
            proposed = tuple(dict.fromkeys(uid for syntaxes in refused.values() for uid in syntaxes))
        else:
            return None
        return no_listed_syntax(proposed)

    # --- again, in another way, or not ----------------------------------------------------------------------------

    def _retry(self, fetches: list[Fetch], now: float) -> None:
        """Ask again after a pause; what has had its chances in this way is tried in the next, or fails."""
        exhausted: list[Fetch] = []
        again: list[Fetch] = []
        for fetch in fetches:
            pause = self._spread(self._backoff * 2 ** max(0, fetch.tries - 1))
            patience = max(fetch.started, fetch.pacs.last_progress) + self._stall_timeout
            if fetch.tries >= self._max_attempts or now + pause >= patience:
                exhausted.append(fetch)
            else:
                again.append(fetch)
                if fetch.one_by_one and fetch.sop_class is not None:
                    fetch.pacs.lists_fail = True  # it exists, and was not found in a list
        for fetch in exhausted:
            error = self._syntax_error(fetch, is_last_word=True)
            if error is not None:
                self._waitlist.fail(fetch, error)
                continue
            assert fetch.move is not None
            self._give_way([fetch], fetch.move, fetch.reason or RepositoryError("it did not come"), now)
        if again:
            self._requeue(again, self._spread(self._backoff * 2 ** max(0, again[0].tries - 1)), now)

    def _give_way(self, fetches: Sequence[Fetch], move: Move, error: RegistryError, now: float) -> None:
        """A method is not asked again for some fetches: the next one is, or they fail."""
        way = move.way + 1
        pacs = move.pacs
        others: list[Fetch] = []
        for fetch in fetches:
            if way >= len(pacs.methods) or pacs.why_closed(way, now):
                self._waitlist.fail(fetch, error)
            else:
                fetch.way, fetch.tries, fetch.busy, fetch.one_by_one = way, 0, 0, False
                reason = f"{move.method}: {error.context}"
                fetch.earlier = f"{fetch.earlier}; {reason}" if fetch.earlier else reason
                others.append(fetch)
        self._requeue(others, 0.0, now, is_whole=_is_untouched(move) and len(others) == move.listed)

    def _requeue(self, fetches: list[Fetch], pause: float, now: float, *, is_whole: bool = False) -> None:
        """Put fetches back into the queue, at the place of their requests, after a pause."""
        if not fetches:
            return
        for fetch in fetches:
            fetch.enter(Stage.PAUSED)
            fetch.pacs.paused[fetch] = None
        if pause:
            self._waitlist.at(now + pause, lambda time: self._waitlist.enqueue(fetches, time))
        else:
            self._waitlist.enqueue(fetches, now, is_whole=is_whole)

    def give_up_waiting(self, pacs: Pacs, now: float) -> bool:
        """Fail what waits for a PACS of which no method is used any more; return whether there was any."""
        if not any(pacs.why_closed(way, now) for way in range(len(pacs.methods))):
            return False
        given_up = False
        for fetch in tuple(pacs.waiting()):
            if why := pacs.why_closed(fetch.way, now):
                self._waitlist.fail(fetch, RepositoryBusy(f"{pacs.name}: {why}"))
                given_up = True
        return given_up

    def _spread(self, pause: float) -> float:
        return min(self._max_backoff, pause) * self._random.uniform(0.5, 1.5)


def _is_untouched(move: Move) -> bool:
    """Tell whether a move was of whole series and brought nothing, so that the next may be the same."""
    return move.level != "IMAGE" and len(move.fetches) == move.listed


def _any_arriving(fetches: Iterable[Fetch]) -> bool:
    return any(fetch.arriving for fetch in fetches)


def _as_registry_error(error: PeerError) -> RegistryError:
    return error.registry_error(str(error))


def no_listed_syntax(proposed: tuple[str, ...]) -> RegistryError:
    """Return the error of an instance that no listed transfer syntax fits."""
    return RepositoryError(
        f"no listed transfer syntax: the imaging source offers it in {', '.join(proposed)}, "
        "which TransferSyntaxUIDList does not name"
    )
