"""The processes that transcode: few, started when there is work, replaced when they crash or take too long.

References
----------
* DICOM PS3.10, 7.1 (File Meta Information of what is written)
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import sys
from asyncio.subprocess import PIPE, Process
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from xca_imaging.errors import RegistryError, RepositoryBusy, RepositoryError, RepositoryOutOfResources, SpoolFull
from xca_imaging.imaging.file_meta import encode_file_meta
from xca_imaging.imaging.spool import Spool, SpooledInstance

_log = logging.getLogger(__name__)

_LINE = 64 * 1024  # bytes of a line: file names and error texts


@dataclass(slots=True)
class Counts:
    """What became of jobs, for metrics."""

    done: int = 0
    refused: int = 0
    failed: int = 0


class Transcoders:
    """Makes transcoded copies of spooled instances, each once however many wait for it.

    Parameters
    ----------
    workers : int
        Processes at a time. Half the processors: receiving and sending go on beside.
    job_memory : int
        Bytes that a job may take in its process, enough for the largest frame in `transcode` and its decoder.
    job_timeout : float
        Seconds for one job: a 4 GB multi-frame object at 20 MB/s.
    idle_timeout : float
        Seconds after which a process that has nothing to do ends.
    max_waiting : int
        Jobs that may wait; each costs 1 KB, and its source in the spool.
    """

    # Mutable state: processes that have nothing to do, with the timers that end them (`_idle`), all processes (`_all`),
    # jobs by source file and target syntax (`_jobs`), with how many wait for each, and the counts.

    def __init__(
        self,
        spool: Spool,
        *,
        workers: int = max(1, (os.cpu_count() or 1) // 2),
        job_memory: int = 1 << 30,
        job_timeout: float = 300.0,
        idle_timeout: float = 60.0,
        max_waiting: int = 20_000,
    ) -> None:
        self._spool = spool
        self._job_memory, self._job_timeout, self._idle_timeout = job_memory, job_timeout, idle_timeout
        self._max_waiting = max_waiting
        self._slots = asyncio.Semaphore(workers)
        self._idle: dict[Process, asyncio.TimerHandle] = {}
        self._all: set[Process] = set()
        self._jobs: dict[tuple[str, str], _Job] = {}
        self.counts = Counts()

    async def transcode(self, source: SpooledInstance, target_syntax: str) -> SpooledInstance:
        """Return the transcoded copy, held for the caller, who releases it.

        Raises
        ------
        RegistryError
            It cannot be done, or not now.
        """
        key = (source.name, target_syntax)
        job = self._jobs.get(key)
        if job is None:
            if len(self._jobs) >= self._max_waiting:
                raise RepositoryBusy(f"{len(self._jobs)} instances are waiting to be transcoded")
            task = asyncio.get_running_loop().create_task(self._run(source, target_syntax))
            job = _Job(task)
            self._jobs[key] = job
            task.add_done_callback(lambda _: self._forget(key, job))
        job.waiting += 1
        try:
            result = await asyncio.shield(job.task)
            result.hold()
            return result
        finally:
            job.waiting -= 1
            if not job.waiting:
                self._let_go(key, job)

    def _let_go(self, key: tuple[str, str], job: _Job) -> None:
        """Nobody waits for a job any more: its result has been taken, or is not wanted."""
        if not job.task.done():
            job.task.cancel()
            self._forget(key, job)  # who comes now begins anew
        elif not job.task.cancelled() and job.task.exception() is None:
            job.task.result().release()

    def _forget(self, key: tuple[str, str], job: _Job) -> None:
        if self._jobs.get(key) is job:
            del self._jobs[key]

    async def close(self) -> None:
        """End every job and process."""
        tasks = [job.task for job in self._jobs.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for process in tuple(self._all):
            await self._end(process)

    async def _run(self, source: SpooledInstance, target_syntax: str) -> SpooledInstance:
        """Return the copy, held for the job."""
        source.hold()
        try:
            result = self._spool.find(source.sop_instance_uid, (target_syntax,))
            if result is None or _place(result) != _place(source):
                async with self._slots:
                    result = await self._do(source, target_syntax)
            result.hold()
            return result
        except RegistryError as error:
            if isinstance(error, _Refused):
                self.counts.refused += 1
            else:
                self.counts.failed += 1
            raise
        finally:
            source.release()

    async def _do(self, source: SpooledInstance, target_syntax: str) -> SpooledInstance:
        name = self._spool.new_name("transcoded")
        target = self._spool.folder / name
        head = encode_file_meta(
            sop_class_uid=source.sop_class_uid,
            sop_instance_uid=source.sop_instance_uid,
            transfer_syntax_uid=target_syntax,
            source_ae_title="",
        )
        job = {
            "source": str(source.path),
            "target": str(target),
            "source_syntax": source.transfer_syntax_uid,
            "target_syntax": target_syntax,
            "head": base64.b64encode(head).decode("ascii"),
        }
        process = await self._take()
        reserved = 0
        is_idle = False
        try:
            async with asyncio.timeout(self._job_timeout):
                _send(process, job)
                while True:
                    word = await _receive(process)
                    if "room" not in word:
                        break
                    granted = True
                    try:
                        self._spool.reserve(word["room"])
                        reserved += word["room"]
                    except SpoolFull:
                        granted = False
                    _send(process, {"granted": granted})
            is_idle = True
            if "size" not in word:
                raise _error_of(word)
            result = self._spool.adopt(
                name,
                word["size"],
                checksum=word["checksum"],
                sop_class_uid=source.sop_class_uid,
                sop_instance_uid=source.sop_instance_uid,
                transfer_syntax_uid=target_syntax,
                reserved=reserved,
            )
            reserved = 0
            self.counts.done += 1
            return result
        except TimeoutError:
            raise RepositoryError(f"transcoding took longer than {self._job_timeout:g} s") from None
        except (ConnectionError, EOFError, ValueError) as exc:
            _log.error("a transcoding process died: %r", exc)
            raise RepositoryError("the transcoding process ended while it worked on this instance") from exc
        finally:
            if is_idle:
                self._put_back(process)
            else:
                await asyncio.shield(self._end(process))
                with suppress(OSError):
                    target.unlink(missing_ok=True)
            if reserved:
                self._spool.unreserve(reserved)

    # --- processes ------------------------------------------------------------------------------------------------

    async def _take(self) -> Process:
        """Return a process that has nothing to do, or a new one."""
        while self._idle:
            process, timer = self._idle.popitem()
            timer.cancel()
            if process.returncode is None:
                return process
            self._all.discard(process)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "xca_imaging.imaging.transcoding_worker",
            str(self._job_memory),
            stdin=PIPE,
            stdout=PIPE,
            limit=_LINE,
            # What is importable here is importable there; one thread each, because there are several processes.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,  # an interrupt from the terminal is for the node, which ends its processes
        )
        self._all.add(process)
        return process

    def _put_back(self, process: Process) -> None:
        loop = asyncio.get_running_loop()
        self._idle[process] = loop.call_later(self._idle_timeout, self._retire, process)

    def _retire(self, process: Process) -> None:
        del self._idle[process]
        assert process.stdin is not None
        process.stdin.close()  # it ends by that
        self._all.discard(process)

    async def _end(self, process: Process) -> None:
        """Kill a process, whatever it does, and reap it."""
        if timer := self._idle.pop(process, None):
            timer.cancel()
        self._all.discard(process)
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


@dataclass(slots=True, eq=False)
class _Job:
    task: asyncio.Task[SpooledInstance]
    waiting: int = 0


class _Refused(RepositoryError):
    """It cannot be transcoded without loss, or at all."""


def _place(instance: SpooledInstance) -> tuple[str, str, str]:
    return instance.source, instance.study_instance_uid, instance.series_instance_uid


def _error_of(word: dict[str, Any]) -> RegistryError:
    if "refused" in word:
        return _Refused(f"no listed transfer syntax, and it cannot be transcoded: {word['refused']}")
    if "no_room" in word:
        return RepositoryOutOfResources(word["no_room"])
    return RepositoryError(f"transcoding failed: {word.get('failed', 'it gave no reason')}")


def _send(process: Process, word: dict[str, Any]) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(word).encode() + b"\n")


async def _receive(process: Process) -> dict[str, Any]:
    assert process.stdout is not None
    line = await process.stdout.readline()
    if not line:
        raise EOFError
    word = json.loads(line)
    assert isinstance(word, dict)
    return word
