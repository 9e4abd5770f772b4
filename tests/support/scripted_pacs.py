"""A PACS that does what a script says: pynetdicom's associations, and one named oddity for each move.

    with ScriptedPacs(archive, destination, "success_with_missing", "good") as pacs: ...

The first C-MOVE follows the first script, the next the next, all further ones the last. Scripts are the methods of
`Scripts`; each stands for something that a product does.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partialmethod
from io import BytesIO
from typing import Any, Self

from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, generate_uid
from pynetdicom import AE, evt
from pynetdicom.dimse_messages import C_STORE_RQ
from pynetdicom.dimse_primitives import C_MOVE, C_STORE
from pynetdicom.dsutils import encode
from pynetdicom.presentation import build_context
from pynetdicom.transport import AssociationSocket, ThreadedAssociationServer

from xca_imaging import settings, uids
from xca_imaging.imaging.ledger import Want

FIND, MOVE = "1.2.840.10008.5.1.4.1.2.2.1", "1.2.840.10008.5.1.4.1.2.2.2"
LOCATION = "1.3.6.1.4.1.21367.2017.1.3"
SUCCESS, PENDING, WARNING, CANCEL = 0x0000, 0xFF00, 0xB000, 0xFE00
DEADLINE = 10.0
"""Longest time that a script waits for anything: tests are over before."""


def _shutdown_socket(self: AssociationSocket) -> None:
    """pynetdicom 3.0 leaves a socket open that the peer closed first; warnings are errors here."""
    opened = self.socket
    with suppress(OSError):
        opened.shutdown(2)
    opened.close()


AssociationSocket._shutdown_socket = _shutdown_socket
# How often a server looks whether it is to stop: socketserver's half a second would be most of the time of a test.
ThreadedAssociationServer.serve_forever = partialmethod(ThreadedAssociationServer.serve_forever, poll_interval=0.02)


@dataclass(slots=True)
class Archive:
    """What a PACS holds: (study, series) -> SOP Instance UID -> dataset."""

    series: dict[tuple[str, str], dict[str, Dataset]] = field(default_factory=dict)

    def add_series(
        self, count: int, *, study: str = "", size: int = 2000, sop_class: str = CTImageStorage
    ) -> list[Want]:
        """Add a new series of small images and return it as a request names it."""
        study, series = study or generate_uid(None), generate_uid(None)
        wants = []
        for number in range(1, count + 1):
            dataset = Dataset()
            dataset.SOPClassUID, dataset.SOPInstanceUID = UID(sop_class), generate_uid(None)
            dataset.StudyInstanceUID, dataset.SeriesInstanceUID = study, series
            dataset.PatientID, dataset.InstanceNumber = "TEST-1", number
            dataset.PixelData = bytes(size)
            dataset["PixelData"].VR = "OW"
            dataset.file_meta = FileMetaDataset()
            dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
            self.series.setdefault((study, series), {})[dataset.SOPInstanceUID] = dataset
            wants.append(Want(study, series, dataset.SOPInstanceUID, LOCATION))
        return wants

    def matches(self, keys: Dataset) -> list[Dataset]:
        """Return the instances of a C-MOVE identifier, hierarchy honoured."""
        listed = keys.get("SOPInstanceUID")
        wanted = {listed} if isinstance(listed, str) else set(listed or ())
        return [
            dataset
            for (study, series), instances in self.series.items()
            if study == keys.StudyInstanceUID and keys.get("SeriesInstanceUID") in (None, "", series)
            for uid, dataset in instances.items()
            if keys.QueryRetrieveLevel != "IMAGE" or uid in wanted
        ]


class Move:
    """One C-MOVE in the hands of a script."""

    def __init__(self, pacs: ScriptedPacs, event: Any) -> None:
        self.pacs, self._event, self._association = pacs, event, event.assoc
        self.keys: Dataset = event.identifier
        self.destination: str = event.move_destination
        self.matches = pacs.archive.matches(self.keys)
        self.statuses: list[int] = []
        # How many moves there were on this association, this one included.
        self.number: int = getattr(event.assoc, "moves", 0) + 1
        event.assoc.moves = self.number

    @property
    def is_list(self) -> bool:
        return self.keys.QueryRetrieveLevel == "IMAGE" and not isinstance(self.keys.SOPInstanceUID, str)

    @property
    def is_cancelled(self) -> bool:
        return bool(self._event.is_cancelled)

    @property
    def is_open(self) -> bool:
        return bool(self._association.is_established) and self._association.dul.peek_next_pdu() is None

    def respond(
        self,
        status: int,
        *,
        remaining: int | None = None,
        completed: int | None = None,
        failed: int | None = None,
        failed_uids: Sequence[str] = (),
    ) -> None:
        """Send a C-MOVE-RSP; after a final one pynetdicom's own is suppressed."""
        response = C_MOVE()
        response.MessageIDBeingRespondedTo = self._event.message_id
        response.AffectedSOPClassUID = UID(MOVE)
        response.Status = status
        response.NumberOfRemainingSuboperations = remaining
        response.NumberOfCompletedSuboperations = completed
        response.NumberOfFailedSuboperations = failed
        if failed_uids:
            identifier = Dataset()
            identifier.FailedSOPInstanceUIDList = list(failed_uids)
            syntax = self._event.context.transfer_syntax
            response.Identifier = BytesIO(encode(identifier, UID(syntax).is_implicit_VR, True))
        self._association.dimse.send_msg(response, self._event.context.context_id)
        if status != PENDING:
            self._association.dimse.send_msg = lambda *_: None

    def abort(self) -> None:
        """End the association of the move with A-ABORT."""
        self._association.dimse.send_msg = lambda *_: None
        self._association.abort(block=False)

    @contextmanager
    def storing(self, calling: str = "", syntaxes: Sequence[str] = ()) -> Iterator[Any]:
        """Open an association to the move destination."""
        ae = AE(calling or self.pacs.ae_title)
        ae.connection_timeout = ae.acse_timeout = ae.dimse_timeout = DEADLINE
        syntaxes = syntaxes or self.pacs.syntaxes
        proposed: dict[tuple[str, tuple[str, ...]], None] = {}
        for each in self.matches:
            stored = str(each.file_meta.TransferSyntaxUID)
            proposed[str(each.SOPClassUID), tuple(syntaxes or (stored,))] = None
        if not proposed:
            proposed[CTImageStorage, (ExplicitVRLittleEndian,)] = None
        contexts = [build_context(sop_class, list(listed)) for sop_class, listed in proposed]
        host, port = self.pacs.destination
        with self.pacs.count_store():
            association = ae.associate(host, port, contexts=contexts, ae_title=self.destination)
            try:
                yield association
            finally:
                if association.is_established:
                    association.release()
                association.dul.join(DEADLINE)

    def storing_each(self, datasets: Iterable[Dataset], **options: Any) -> Iterator[Dataset]:
        """Send instances over one association; give each that was answered."""
        self.statuses = []
        with self.storing(**options) as association:
            for dataset in datasets:
                if not association.is_established:
                    return
                due = time.monotonic() + self.pacs.latency
                answer = association.send_c_store(dataset, originator_aet=self.pacs.ae_title, originator_id=1)
                self.statuses.append(answer.get("Status"))
                self.pacs.sent.append((str(dataset.SOPInstanceUID), self.statuses[-1]))
                time.sleep(max(0.0, due - time.monotonic()))
                yield dataset

    def store(self, datasets: Iterable[Dataset], **options: Any) -> list[int]:
        """Send instances and return the statuses that came back; none when nothing was negotiated."""
        for _ in self.storing_each(datasets, **options):
            pass
        return self.statuses

    def store_half(self, dataset: Dataset) -> None:
        """Send the first fragments of an instance, then A-ABORT."""
        with self.storing() as association:
            context = association.accepted_contexts[0]
            request = C_STORE()
            request.MessageID, request.Priority = 1, 0
            request.AffectedSOPClassUID, request.AffectedSOPInstanceUID = dataset.SOPClassUID, dataset.SOPInstanceUID
            request.DataSet = BytesIO(encode(dataset, False, True))
            message = C_STORE_RQ()
            message.primitive_to_message(request)
            fragments = list(message.encode_msg(context.context_id, 1024))
            for fragment in fragments[: max(2, len(fragments) // 2)]:
                association.dul.send_pdu(fragment)
            time.sleep(0.1)
            association.abort()

    def finish(self, statuses: Sequence[int], total: int | None = None) -> None:
        """Send the final response that fits what came back."""
        total = len(self.matches) if total is None else total
        completed = sum(status == SUCCESS for status in statuses)
        self.respond(
            SUCCESS if completed == total else WARNING, remaining=0, completed=completed, failed=total - completed
        )


class Scripts:
    """What a PACS may do with a C-MOVE; each is a behaviour that was seen, or that the Standard allows."""

    def good(self, move: Move) -> None:
        total = len(move.matches)
        for sent, _ in enumerate(move.storing_each(move.matches), 1):
            move.respond(PENDING, remaining=total - sent, completed=sent, failed=0)
            if move.is_cancelled or not move.is_open:
                move.respond(CANCEL, remaining=total - sent, completed=sent, failed=0)
                return
        move.finish(move.statuses)

    def no_pending(self, move: Move) -> None:
        move.finish(move.store(move.matches))

    def endless_pending(self, move: Move) -> None:
        end = time.monotonic() + DEADLINE
        while move.is_open and not move.is_cancelled and time.monotonic() < end:
            move.respond(PENDING, remaining=1, completed=0, failed=0)
            time.sleep(0.02)
        move.respond(CANCEL, remaining=1)

    def deaf(self, move: Move) -> None:
        """Neither answers nor hears a C-CANCEL."""
        end = time.monotonic() + DEADLINE
        while move.is_open and time.monotonic() < end:
            time.sleep(0.02)

    def success_with_missing(self, move: Move) -> None:
        move.store(move.matches[:-1])
        move.respond(SUCCESS, remaining=0, completed=len(move.matches), failed=0)

    def zero_suboperations(self, move: Move) -> None:
        """UID lists are not understood; single UIDs are."""
        if move.is_list:
            move.respond(SUCCESS, remaining=0, completed=0, failed=0)
        else:
            self.no_pending(move)

    def nothing_found(self, move: Move) -> None:
        move.respond(SUCCESS, remaining=0, completed=0, failed=0)

    def a801(self, move: Move) -> None:
        move.respond(0xA801)

    def one_per_association(self, move: Move) -> None:
        """A second C-MOVE on the same association is not understood."""
        if move.number > 1:
            move.respond(0xC000)
        else:
            self.no_pending(move)

    def aborts_the_second(self, move: Move) -> None:
        """A second C-MOVE on the same association is answered with A-ABORT."""
        if move.number > 1:
            move.abort()
        else:
            self.no_pending(move)

    def unable(self, move: Move) -> None:
        move.respond(0xC000, completed=0, failed=0)

    def a702(self, move: Move) -> None:
        move.respond(0xA702)

    def abort_mid_object(self, move: Move) -> None:
        """The first object breaks off, the move goes on with the others and says so."""
        move.store_half(move.matches[0])
        statuses = move.store(move.matches[1:])
        move.finish(statuses)

    def abort_move(self, move: Move) -> None:
        """A file is lost: A-ABORT instead of a status."""
        move.store(move.matches[:1])
        move.abort()

    def abort_at_once(self, move: Move) -> None:
        move.abort()

    def close_between_objects(self, move: Move) -> None:
        """Its sender goes away after two objects, without A-RELEASE; the move is over with the failures counted."""
        with self.storing_some(move, 2) as association:
            association.dul.socket.close()
        move.respond(WARNING, remaining=0, completed=2, failed=len(move.matches) - 2)

    def drops_every_7th(self, move: Move) -> None:
        kept = [each for number, each in enumerate(move.matches, 1) if number % 7]
        lost = [str(each.SOPInstanceUID) for number, each in enumerate(move.matches, 1) if number % 7 == 0]
        move.store(kept)
        move.respond(WARNING, remaining=0, completed=len(kept), failed=len(lost), failed_uids=lost)

    def b000_without_list(self, move: Move) -> None:
        move.store(move.matches[1:])
        move.respond(WARNING, remaining=0, completed=len(move.matches) - 1, failed=1)

    def store_before_first_response(self, move: Move) -> None:
        statuses = move.store(move.matches)
        time.sleep(0.2)
        move.respond(PENDING, remaining=0, completed=len(statuses), failed=0)
        move.finish(statuses)

    def store_after_final(self, move: Move) -> None:
        move.respond(SUCCESS, remaining=0, completed=len(move.matches), failed=0)
        self.pacs_thread(lambda: (time.sleep(0.15), move.store(move.matches)))

    def unwanted_uid(self, move: Move) -> None:
        stray = Archive()
        stray.add_series(1)
        move.finish(move.store([*next(iter(stray.series.values())).values(), *move.matches])[1:])

    def same_uid_twice(self, move: Move) -> None:
        move.finish(move.store([each for each in move.matches for _ in range(2)])[::2])

    def wrong_ae(self, move: Move) -> None:
        """Sends under another AE title than the one that it is called by."""
        move.finish(move.store(move.matches, calling="ARCHIVE2"))

    def wrong_series(self, move: Move) -> None:
        """Looks at the SOP Instance UID only, whatever the series of the request."""
        wanted = move.keys.SOPInstanceUID
        wanted = {wanted} if isinstance(wanted, str) else set(wanted)
        everything = [d for series in move.pacs.archive.series.values() for d in series.values()]
        found = [each for each in everything if each.SOPInstanceUID in wanted]
        move.finish(move.store(found), total=len(found))

    @contextmanager
    def storing_some(self, move: Move, count: int) -> Iterator[Any]:
        """Send the first instances and give the association, still open."""
        with move.storing() as association:
            for dataset in move.matches[:count]:
                status = association.send_c_store(dataset).get("Status")
                move.pacs.sent.append((str(dataset.SOPInstanceUID), status))
            yield association

    def __init__(self) -> None:
        self.threads: list[threading.Thread] = []

    def pacs_thread(self, work: Callable[[], object]) -> None:
        thread = threading.Thread(target=work)
        self.threads.append(thread)
        thread.start()


class ScriptedPacs:
    """A Query/Retrieve SCP on a free port of the loopback interface.

    Parameters
    ----------
    destination : tuple
        Host and port where the move destination listens.
    scripts : str
        Names of methods of `Scripts`, one for each move; the last goes on for ever.
    busy : int
        So many associations for C-MOVE are rejected with 2/3/2 first.
    finds : bool
        Whether C-FIND is supported.
    counts : bool
        Whether NumberOfSeriesRelatedInstances is given.
    latency : float
        Seconds that each object takes to send, the work included.
    syntaxes : sequence of str
        Transfer syntaxes that every context proposes; none: one context for each syntax in which something is stored.
    limit : int
        Associations of all kinds at a time; those beyond are rejected with 2/3/2. 0: no limit.
    one_move_each : bool
        Whether the second C-MOVE on an association is aborted.
    """

    def __init__(
        self,
        archive: Archive,
        destination: tuple[str, int],
        *scripts: str,
        busy: int = 0,
        finds: bool = True,
        counts: bool = True,
        latency: float = 0.0,
        syntaxes: Sequence[str] = (),
        limit: int = 0,
        one_move_each: bool = False,
        ae_title: str = "SCRIPTED",
    ) -> None:
        self.archive, self.destination, self.ae_title = archive, destination, ae_title
        self.latency, self.syntaxes = latency, syntaxes
        self._limit, self._one_move_each = limit, one_move_each
        self._used: set[Any] = set()
        self._associations = 0
        self.most_associations = 0
        self._scripts, self._busy, self._counts = list(scripts or ["good"]), busy, counts
        self._lock = threading.Lock()
        self.behaviour = Scripts()
        self.moves: list[tuple[str, tuple[str, ...]]] = []
        self.finds: list[str] = []
        self.sent: list[tuple[str, int]] = []
        self.rejected = self.associations = 0  # of those that were requested for C-MOVE
        self.active = self.most_active = 0
        self._storing = self.most_storing = 0
        self._ae = AE(ae_title)
        self._ae.maximum_associations = 100
        self._ae.add_supported_context(MOVE)
        self._ae.add_supported_context(uids.VERIFICATION_SOP_CLASS)
        if finds:
            self._ae.add_supported_context(FIND)
        self._server: Any = None

    def __enter__(self) -> Self:
        handlers = [
            (evt.EVT_C_MOVE, self._move),
            (evt.EVT_C_FIND, self._find),
            (evt.EVT_REQUESTED, self._requested),
            (evt.EVT_CONN_CLOSE, self._closed),
        ]
        self._server = self._ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=handlers)
        return self

    def __exit__(self, *_: object) -> None:
        for thread in self.behaviour.threads:
            thread.join(DEADLINE)
        self._ae.shutdown()

    def reject_next(self) -> None:
        """Reject the next association for C-MOVE with 2/3/2."""
        self._busy = self.rejected + 1

    @property
    def open_associations(self) -> int:
        """How many associations are open now."""
        return len(self._ae.active_associations)

    def kill(self) -> None:
        """Stop answering anything from now on."""
        self._ae.shutdown()

    @property
    def settings(self) -> settings.Pacs:
        return settings.Pacs(
            name="scripted",
            ae_title=self.ae_title,
            host="127.0.0.1",
            port=self._server.server_address[1],
            retrieve_location_uid=LOCATION,
        )

    @contextmanager
    def count_store(self) -> Iterator[None]:
        with self._lock:
            self._storing += 1
            self.most_storing = max(self.most_storing, self._storing)
        try:
            yield
        finally:
            with self._lock:
                self._storing -= 1

    def _requested(self, event: Any) -> None:
        contexts = event.assoc.requestor.primitive.presentation_context_definition_list
        is_for_moves = any(context.abstract_syntax == MOVE for context in contexts)
        with self._lock:
            is_over = bool(self._limit) and self._associations >= self._limit
            is_busy = is_for_moves and self.rejected < self._busy
            self.rejected += is_busy or is_over
            if not (is_busy or is_over):
                self._associations += 1
                self.associations += is_for_moves
                event.assoc.is_counted = True
                self.most_associations = max(self.most_associations, self._associations)
        if is_busy or is_over:
            event.assoc.acse.send_reject(0x02, 0x03, 0x02)  # PS3.8 Table 9-21: transient, local limit exceeded
            event.assoc.is_rejected = True
            event.assoc.kill()

    def _closed(self, event: Any) -> None:
        with self._lock:
            if getattr(event.assoc, "is_counted", False):
                event.assoc.is_counted = False
                self._associations -= 1

    def _move(self, event: Any) -> Iterator[Any]:
        event.assoc.dimse.__dict__.pop("send_msg", None)  # taken away by the move before on the same association
        if self._one_move_each:
            if event.assoc in self._used:
                event.assoc.dimse.send_msg = lambda *_: None
                event.assoc.abort(block=False)
                yield "127.0.0.1", 1
                yield 0
                return
            self._used.add(event.assoc)
        move = Move(self, event)
        listed = move.keys.get("SOPInstanceUID") or ()
        with self._lock:
            name = self._scripts.pop(0) if len(self._scripts) > 1 else self._scripts[0]
            self.moves.append(
                (move.keys.QueryRetrieveLevel, (listed,) if isinstance(listed, str) else tuple(map(str, listed)))
            )
            self.active += 1
            self.most_active = max(self.most_active, self.active)
        try:
            getattr(self.behaviour, name)(move)
        finally:
            with self._lock:
                self.active -= 1
        event.assoc.dimse.send_msg = lambda *_: None
        yield "127.0.0.1", 1  # never used: what was to be said has been said
        yield 0

    def _find(self, event: Any) -> Iterator[tuple[int, Dataset | None]]:
        keys = event.identifier
        self.finds.append(keys.QueryRetrieveLevel)
        for (study, series), instances in self.archive.series.items():
            if study != keys.StudyInstanceUID or keys.get("SeriesInstanceUID") not in (None, "", series):
                continue
            match = Dataset()
            match.QueryRetrieveLevel = keys.QueryRetrieveLevel
            match.StudyInstanceUID, match.SeriesInstanceUID = study, series
            if keys.QueryRetrieveLevel == "SERIES":
                match.Modality = "CT"
                if self._counts:
                    match.NumberOfSeriesRelatedInstances = len(instances)
                yield 0xFF00, match
                continue
            for uid, dataset in instances.items():
                found = Dataset()
                found.update(match)
                found.SOPInstanceUID, found.SOPClassUID = uid, dataset.SOPClassUID
                yield 0xFF00, found
        yield 0x0000, None
