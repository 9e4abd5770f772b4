"""Following the PACSs: what they have, by C-FIND sweeps and by what they notify, becomes and stays published.

A sweep asks at study level, day by day, and compares what it is told with what it was told before. A study that is new
or has changed is published once it is the same in two sweeps in a row; one that was published and is in no sweep is
asked for by its UID in the second, and withdrawn where the PACS does not have it. What has not changed costs neither
image-level queries nor a word to the registry; only now and then its series are compared, some in each sweep.

A notified study is looked at at once, by the same C-FIND: a notification says where to look, and nothing else.

References
----------
* DICOM PS3.4, C.4.1 (C-FIND), C.2.2.2.5 (ranges of dates); R.3 (Instance Availability Notification)
"""

from __future__ import annotations

import asyncio
import logging
import random
import ssl
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from datetime import date, timedelta
from functools import partial
from typing import Any, TypeVar, TypeVarTuple

from xca_imaging.errors import (
    ConnectFailed,
    ManifestError,
    NotificationError,
    PeerError,
    PeerProtocolError,
    PeerRefused,
    PeerTimeout,
)
from xca_imaging.gateway.peers import Endpoint, SoapClient
from xca_imaging.gateway.publications import Publications, StudyRecord
from xca_imaging.gateway.publishing import Outcome, Published, Publisher, Selection, publishers_of
from xca_imaging.gateway.publishing_peers import Repository
from xca_imaging.gateway.repositories import RepositoryElsewhere, TransferredObjects, TransfersFinder
from xca_imaging.imaging.availability import Availability, Notification, read_notification
from xca_imaging.imaging.study import NO_NUMBERS, StudyFacts, series_signature, study_signature
from xca_imaging.imaging.transfer import Transfers
from xca_imaging.operations.metrics import Metrics
from xca_imaging.settings import Settings

log = logging.getLogger(__name__)

_MOST_QUERIES = 31  # of a sweep: a day each, more days in each of a longer window
_SERIES_A_SWEEP = 20  # unchanged studies whose series are compared, those longest not looked at first
_READ_AGAIN = 3600.0  # s after which a study is read again whose PACS tells no numbers of instances
_MOST_BACKOFF = 900.0  # s between attempts at a PACS that is away, or at a study that is refused
_NOTIFIED_QUIET = 5.0  # s without another notification of a study before it is looked at
_NOTIFIED_LATEST = 60.0  # s after the first one when it is looked at all the same
_MOST_NOTIFIED = 10_000  # studies that wait; a modality that stores a day's work notifies some hundred
_NOTIFIED_ATTEMPTS = 8
_READ_AT_ONCE = 32_000  # bytes of a notification: some 350 instances, read in 15 ms
_MOST_READING = 16  # longer ones that are read in threads at a time

_SUCCESS, _RESOURCE_LIMITATION = 0x0000, 0x0213  # PS3.7 C.5: status of N-CREATE

Arguments = TypeVarTuple("Arguments")
T = TypeVar("T")


@dataclass(slots=True)
class _Due:
    """When something is tried, after how many attempts in vain, and the signature that it was tried with."""

    at: float
    first: float = 0.0
    attempts: int = 0
    signature: str = ""


class Follower:
    """One PACS: never two sweeps, and never a sweep and a notified study, at once.

    Parameters
    ----------
    days : int
        How many days back from today a sweep looks, by Study Date.
    on_published : callable
        Told of each study that was registered, replaced, withdrawn or refused.
    clock, today : callable
        Seconds of a clock that only goes forward; the date here. A study of tomorrow is looked for too: the PACS may
        be in another zone.
    """

    # Mutable state: `_refused`, when a study that could not be published is tried again; `_notified`, studies that are
    # to be looked at; `_wake`, set when there is a new one.

    def __init__(
        self,
        publisher: Publisher,
        memory: Publications,
        metrics: Metrics,
        *,
        days: int,
        interval: float,
        on_published: Callable[[Published], None] = lambda published: None,
        clock: Callable[[], float] = time.monotonic,
        today: Callable[[], date] = date.today,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.name = publisher.pacs.name
        self.publisher = publisher
        self._memory, self._metrics = memory, metrics
        self._days, self._interval = days, interval
        self._on_published = on_published
        self._clock, self._today, self._wall_clock = clock, today, wall_clock
        self._refused: dict[str, _Due] = {}
        self._notified: OrderedDict[str, _Due] = OrderedDict()
        self._wake = asyncio.Event()

    # --- life ---------------------------------------------------------------------------------------------------------

    async def run(self, *, is_sweeping: bool) -> None:
        """Follow until cancelled."""
        failures = 0
        # Nodes that start together do not ask at the same moment.
        delay = random.uniform(0, min(self._interval, 5.0))  # noqa: S311 - spreads sweeps
        next_sweep = self._clock() + delay if is_sweeping else float("inf")
        while True:
            if self._clock() >= next_sweep:
                failures = 0 if await self._try_sweep() else failures + 1
                pause = _backoff(self._interval, failures)
                if failures:
                    log.warning("%s: next sweep in about %.0f s", self.name, pause)
                next_sweep = self._clock() + pause * random.uniform(0.9, 1.1)  # noqa: S311 - spreads sweeps
            await self.look_at_notified()
            await self._sleep(next_sweep)

    async def _sleep(self, until: float) -> None:
        due = min((each.at for each in self._notified.values()), default=until)
        wait = min(due, until) - self._clock()
        if wait <= 0:
            return
        self._wake.clear()
        try:
            async with asyncio.timeout(None if wait == float("inf") else wait):
                await self._wake.wait()
        except TimeoutError:
            pass

    async def _try_sweep(self) -> bool:
        """Sweep; return False where the next attempt should wait longer."""
        try:
            if not self._memory.may_sweep():
                log.info("%s: not swept: another process of this data directory does", self.name)
                return True
            await self.sweep()
        except (PeerError, ManifestError) as exc:
            log.warning("%s: sweep given up: %s", self.name, exc)
        except Exception:
            log.exception("%s: sweep given up because of a defect", self.name)
        else:
            self._metrics.sweep(self.name, is_done=True)
            return True
        self._metrics.sweep(self.name, is_done=False)
        return False

    # --- sweeps -------------------------------------------------------------------------------------------------------

    async def sweep(self) -> None:
        """Ask what there is in the window, and publish or withdraw what has changed and been quiet since.

        Raises
        ------
        PeerError
            The PACS or the repository is away, or does not answer to the end. What was done by then stays done.
        ManifestError
            The PACS has more studies in one query than are taken.
        """
        first, last = self._today() - timedelta(days=self._days), self._today() + timedelta(days=1)
        found: dict[str, StudyFacts] = {}
        for since, until in windows(first, last):
            for study in await self.publisher.find_studies(Selection(since=since, until=until)):
                found[study.study_instance_uid] = study
        known = await self._run(self._memory.studies, self.name, f"{first:%Y%m%d}", f"{last:%Y%m%d}")
        unchanged: list[tuple[StudyRecord, StudyFacts]] = []
        for uid, study in found.items():
            await asyncio.sleep(0)  # thousands of studies take a second in all, which others need not wait for
            await self.look_at_notified()
            record = known.get(uid)
            if record is None:
                record = await self._run(self._memory.study, self.name, uid)
            if await self._follow(study, record):
                unchanged.append((record, study))
        for uid, record in known.items():
            if uid not in found:
                await self._miss(record)
        await self._compare_series(unchanged)
        for uid in [uid for uid in self._refused if uid not in found and uid not in known]:
            del self._refused[uid]

    async def _follow(self, study: StudyFacts, record: StudyRecord) -> bool:
        """Publish a study where it is due; return whether it is as it was published."""
        signature = study_signature(study)
        if record.seen != signature or record.missing or record.day != study.day:
            # New, or changed since the last sweep: more may be on its way.
            await self._note(study.study_instance_uid, seen=signature, day=study.day, missing=0)
            return False
        if record.published == signature and not self._is_worn(study, record):
            return True
        await self._publish(study.study_instance_uid, signature)
        return False

    def _is_worn(self, study: StudyFacts, record: StudyRecord) -> bool:
        """Tell whether a study must be read again because no number would show that it has changed."""
        tells_numbers = study.number_of_instances is not None or not record.series.startswith(NO_NUMBERS)
        return not tells_numbers and self._wall_clock() - record.looked_at > _READ_AGAIN

    async def _publish(self, uid: str, signature: str) -> None:
        refused = self._refused.get(uid)
        if refused is not None and refused.signature == signature and self._clock() < refused.at:
            return
        try:
            outcome: Outcome = (await self._attempt(uid)).outcome
        except (ConnectFailed, PeerTimeout):
            raise
        except Exception:
            # What goes wrong with one study must not keep those after it back, sweep for sweep.
            log.exception("study %s of %s: a defect", uid, self.name)
            outcome = "refused"
        if outcome == "refused":
            attempts = refused.attempts + 1 if refused is not None and refused.signature == signature else 1
            again_at = self._clock() + _backoff(self._interval, attempts)
            self._refused[uid] = _Due(again_at, attempts=attempts, signature=signature)
            return
        self._refused.pop(uid, None)
        if outcome != "withdrawn":
            await self._note(uid, seen=signature, published=signature, looked_at=self._wall_clock(), missing=0)

    async def _miss(self, record: StudyRecord) -> None:
        """Count a study that is in no answer; ask for it by its UID in the second sweep, and withdraw it then."""
        uid = record.study_instance_uid
        if not record.patient_id:
            await self._run(self._memory.forget, self.name, uid)
        elif not record.missing:
            await self._note(uid, missing=1, seen="")
        else:
            await self._publish(uid, "missing")

    async def _compare_series(self, unchanged: list[tuple[StudyRecord, StudyFacts]]) -> None:
        """Compare the series of some studies that look unchanged: a series may have come in the place of another.

        Where the PACS tells no numbers at study level, of all.
        """
        silent = [each for each in unchanged if each[1].number_of_instances is None]
        others = sorted(
            (each for each in unchanged if each[1].number_of_instances is not None), key=lambda each: each[0].looked_at
        )
        for record, study in (*silent, *others[:_SERIES_A_SWEEP]):
            await self.look_at_notified()
            uid, patient_id = study.study_instance_uid, study.patient.id
            try:
                series = await self.publisher.finder.find_series(uid, patient_id=patient_id)
            except (PeerRefused, PeerProtocolError, ManifestError) as exc:
                log.warning("series of study %s are not compared: %s", uid, exc)
                continue
            if series_signature(series) != record.series:
                # Published by the next sweep, when it has been quiet for one.
                await self._note(uid, published="", looked_at=self._wall_clock())
            elif study.number_of_instances is not None:
                await self._note(uid, looked_at=self._wall_clock())

    async def _attempt(self, uid: str) -> Published:
        result = await self.publisher.attempt(uid)
        self._metrics.published(self.name, result.outcome)
        if result.outcome != "unchanged":
            self._on_published(result)
        return result

    async def _note(self, uid: str, **changes: Any) -> None:
        """Change what is remembered of a study, as it stands now: it may have been published since it was read."""
        record = await self._run(self._memory.study, self.name, uid)
        await self._run(self._memory.remember, replace(record, **changes))

    # --- notifications ------------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Notified studies that are not looked at yet."""
        return len(self._notified)

    def notify(self, study_instance_uid: str) -> bool:
        """Look at a study once no more is said of it for some seconds; False where too many wait."""
        now = self._clock()
        due = self._notified.get(study_instance_uid)
        if due is None:
            if len(self._notified) >= _MOST_NOTIFIED:
                return False
            due = self._notified[study_instance_uid] = _Due(0.0, first=now)
        due.at = min(now + _NOTIFIED_QUIET, due.first + _NOTIFIED_LATEST)
        due.attempts = 0
        self._wake.set()
        return True

    async def look_at_notified(self) -> None:
        """Publish the notified studies that are due, as C-FIND says they are."""
        for uid in [uid for uid, due in self._notified.items() if due.at <= self._clock()]:
            due = self._notified.pop(uid)
            try:
                result = await self._attempt(uid)
            except (ConnectFailed, PeerTimeout) as exc:
                reason = str(exc)
            except Exception:
                log.exception("study %s of %s: a defect", uid, self.name)
                continue
            else:
                if result.outcome != "refused":
                    continue
                reason = result.reason
            self._retry_notified(uid, due, reason)

    def _retry_notified(self, uid: str, due: _Due, reason: str) -> None:
        if uid in self._notified:  # notified again meanwhile
            return
        attempts = due.attempts + 1
        if attempts >= _NOTIFIED_ATTEMPTS:
            log.warning("notified study %s of %s is left to the sweeps: %s", uid, self.name, reason)
            return
        pause = min(_NOTIFIED_QUIET * 2**attempts, _MOST_BACKOFF)
        self._notified[uid] = _Due(self._clock() + pause, first=due.first, attempts=attempts)

    async def _run(self, work: Callable[[*Arguments], T], *arguments: *Arguments) -> T:
        return await self.publisher.run(work, *arguments)


class Watch:
    """The followers of all PACSs of a node, and who tells them what was notified."""

    # Mutable state: `_reading`, long notifications that are being read.

    def __init__(self, followers: Iterable[Follower]) -> None:
        self.followers: Mapping[str, Follower] = {follower.name: follower for follower in followers}
        self._reading: set[asyncio.Task[None]] = set()

    async def run(self, *, is_sweeping: bool) -> None:
        """Follow until cancelled."""
        async with asyncio.TaskGroup() as group:
            for follower in self.followers.values():
                group.create_task(follower.run(is_sweeping=is_sweeping))

    def notify(self, pacs: str | None, dataset: bytes, transfer_syntax_uid: str) -> int:
        """Take an Instance Availability Notification and return its DIMSE status.

        The PACSs that it names as those to retrieve from are asked about the study; else the one that sent it; else
        all. A long one is answered before it is read, because that would hold everything else up.

        Parameters
        ----------
        pacs : str or None
            Name of the PACS that sent it, where that can be told.
        """
        if len(dataset) <= _READ_AT_ONCE:
            try:
                return self._take(pacs, read_notification(dataset, transfer_syntax_uid))
            except NotificationError as exc:
                log.warning("availability notification of %s refused (%04XH): %s", pacs or "a peer", exc.status, exc)
                return exc.status
        if len(self._reading) >= _MOST_READING:
            return _RESOURCE_LIMITATION

        task = asyncio.get_running_loop().create_task(self._read(pacs, dataset, transfer_syntax_uid))
        self._reading.add(task)
        task.add_done_callback(self._reading.discard)
        return _SUCCESS

    async def _read(self, pacs: str | None, dataset: bytes, transfer_syntax_uid: str) -> None:
        try:
            self._take(pacs, await asyncio.to_thread(read_notification, dataset, transfer_syntax_uid))
        except NotificationError as exc:
            log.warning("availability notification of %s is of no use: %s", pacs or "a peer", exc)

    def _take(self, pacs: str | None, notification: Notification) -> int:
        titles = notification.retrieve_ae_titles
        asked = [each for each in self.followers.values() if each.publisher.pacs.ae_title in titles]
        asked = asked or [each for name, each in self.followers.items() if pacs in (None, name)]
        uid = notification.study_instance_uid
        taken = [follower.notify(uid) for follower in asked]
        if not all(taken):
            log.warning("availability notification of study %s refused: too many wait", uid)
            return _RESOURCE_LIMITATION
        gone = sum(each.availability is Availability.UNAVAILABLE for each in notification.instances)
        log.info(
            "study %s notified by %s: %d instances, %d of them unavailable",
            uid,
            pacs or "a peer",
            len(notification.instances),
            gone,
        )
        return _SUCCESS


@asynccontextmanager
async def watching(
    settings: Settings,
    *,
    own: Repository,
    transfers: Transfers,
    metrics: Metrics,
    https: ssl.SSLContext | None,
) -> AsyncIterator[None]:
    """Follow the PACSs of a node while it serves: by notifications, and with `publish.watch` by sweeps.

    Parameters
    ----------
    own : Repository
        The registry and repository of the node.
    https : ssl.SSLContext, optional
        For `publish.repository`.
    """
    async with AsyncExitStack() as resources:
        memory = Publications(settings.data_dir)
        resources.callback(memory.close)
        repository, url = own, settings.publish.repository
        if url:
            client = await resources.enter_async_context(SoapClient(tls=https))
            repository = RepositoryElsewhere(client, Endpoint(url, url, settings.limits.stall_timeout), own, memory)
        executor = ThreadPoolExecutor(2, thread_name_prefix="publishing")
        resources.callback(executor.shutdown, wait=False, cancel_futures=True)
        publishers = publishers_of(
            settings,
            repository=repository,
            objects=TransferredObjects(transfers),
            memory=memory,
            make_finder=partial(TransfersFinder, transfers),
            executor=executor,
        )
        watch = Watch(
            Follower(publisher, memory, metrics, days=settings.publish.days, interval=settings.publish.interval)
            for publisher in publishers
        )
        metrics.watch(
            "notified_studies",
            "Notified studies that are not looked at yet",
            lambda: sum(follower.waiting for follower in watch.followers.values()),
        )
        transfers.on_availability = watch.notify
        following = asyncio.create_task(watch.run(is_sweeping=settings.publish.watch))
        try:
            yield
        finally:
            transfers.on_availability = None
            following.cancel()
            await asyncio.wait((following,))


def _backoff(interval: float, attempts: int) -> float:
    """Return the pause after so many attempts in vain, in seconds; the interval itself after none."""
    return min(interval * 2.0 ** min(attempts, 16), max(_MOST_BACKOFF, interval))


def windows(first: date, last: date) -> Iterator[tuple[date, date]]:
    """Divide a range of days, inclusive, into at most 31 closed ranges: many PACSs cut a long answer off."""
    total = (last - first).days + 1
    length = -(-total // _MOST_QUERIES)
    for start in range(0, total, length):
        yield first + timedelta(days=start), min(first + timedelta(days=start + length - 1), last)
