"""The processes that transcode: one job for all who wait, and what happens when a process does not do its job."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pydicom
import pytest
from pydicom.uid import ExplicitVRLittleEndian, RLELossless

from tests.imaging.test_transcode import EXPLICIT, IMPLICIT, RLE, image
from tests.support import node
from xca_imaging.errors import RepositoryBusy, RepositoryError, RepositoryOutOfResources
from xca_imaging.imaging.spool import Spool, SpooledInstance
from xca_imaging.imaging.transcoders import Transcoders

DEADLINE = 20.0


@pytest.fixture
async def spool(tmp_path: Path) -> AsyncIterator[Spool]:
    spool = Spool(tmp_path / "spool", max_bytes=10**9, retention=600, reserve_free=0)
    yield spool
    spool.close()


def spooled(
    spool: Spool, *, damaged: bool = False, frames: int = 1, size: tuple[int, int] = (33, 47)
) -> SpooledInstance:
    """Spool an RLE image; return it held, as a transfer holds it."""
    dataset = image(frames=frames, size=size)
    dataset.compress(RLELossless, generate_instance_uid=False)
    path = spool.folder.parent / "source.dcm"
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.save_as(path, enforce_file_format=True)
    whole = path.read_bytes()
    writer = spool.create(
        sop_class_uid=dataset.SOPClassUID,
        sop_instance_uid=dataset.SOPInstanceUID,
        transfer_syntax_uid=RLE,
        source_ae_title="TEST",
    )
    body = whole[144 + int.from_bytes(whole[140:144], "little") :]
    writer.write(memoryview(body[: -200 if damaged else None]))
    instance = writer.commit()
    instance.hold()
    instance.place(dataset.StudyInstanceUID, dataset.SeriesInstanceUID, (RLE, EXPLICIT), source="main")
    return instance


async def finish(transcoders: Transcoders, *instances: SpooledInstance) -> None:
    await transcoders.close()
    for instance in instances:
        instance.release()


async def test_one_job_for_all_who_wait(spool: Spool) -> None:
    source = spooled(spool)
    transcoders = Transcoders(spool, workers=1)
    results = await asyncio.wait_for(
        asyncio.gather(*(transcoders.transcode(source, EXPLICIT) for _ in range(10))), DEADLINE
    )
    assert len(set(results)) == 1
    assert transcoders.counts.done == 1
    assert results[0]._holders == 10
    read = pydicom.dcmread(results[0].path)
    assert read.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
    assert read.SOPInstanceUID == source.sop_instance_uid
    assert results[0].size == results[0].path.stat().st_size
    assert spool.used_bytes == results[0].size + source.size
    results[0].place(source.study_instance_uid, source.series_instance_uid, (), source="main", bytes_changed=True)
    again = await transcoders.transcode(source, EXPLICIT)
    assert again is results[0]
    assert transcoders.counts.done == 1
    other = await transcoders.transcode(source, IMPLICIT)
    assert transcoders.counts.done == 2
    await finish(transcoders, source, *results, again, other)
    assert {spool.find(source.sop_instance_uid, (each,)) for each in (EXPLICIT, IMPLICIT)} == {again, other}


async def test_a_refused_job_leaves_nothing_and_the_next_is_done(spool: Spool) -> None:
    damaged, good = spooled(spool, damaged=True), spooled(spool)
    transcoders = Transcoders(spool, workers=1)
    with pytest.raises(RepositoryError, match="cannot be transcoded"):
        await asyncio.wait_for(transcoders.transcode(damaged, EXPLICIT), DEADLINE)
    assert len(list(spool.folder.iterdir())) == 2
    result = await asyncio.wait_for(transcoders.transcode(good, EXPLICIT), DEADLINE)
    assert (transcoders.counts.done, transcoders.counts.refused) == (1, 1)
    await finish(transcoders, damaged, good, result)


async def test_a_process_that_dies_is_replaced(spool: Spool) -> None:
    source, other = spooled(spool, frames=200, size=(256, 256)), spooled(spool)
    transcoders = Transcoders(spool, workers=1)
    job = asyncio.create_task(transcoders.transcode(source, EXPLICIT))
    async with asyncio.timeout(DEADLINE):
        while len(list(spool.folder.iterdir())) < 3:
            await asyncio.sleep(0.005)
    (process,) = transcoders._all
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(RepositoryError, match="ended while"):
        await asyncio.wait_for(job, DEADLINE)
    assert len(list(spool.folder.iterdir())) == 2
    assert spool.used_bytes == source.size + other.size
    result = await asyncio.wait_for(transcoders.transcode(other, EXPLICIT), DEADLINE)
    await finish(transcoders, source, other, result)


async def test_a_job_that_takes_too_long_is_ended(spool: Spool) -> None:
    source = spooled(spool)
    transcoders = Transcoders(spool, workers=1, job_timeout=0.01)
    with pytest.raises(RepositoryError, match="longer than"):
        await asyncio.wait_for(transcoders.transcode(source, EXPLICIT), DEADLINE)
    assert not transcoders._all
    await finish(transcoders, source)


async def test_no_room_is_told(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "small", max_bytes=2_000_000, retention=600, reserve_free=0)
    source = spooled(spool, size=(256, 256))
    transcoders = Transcoders(spool, workers=1)
    with pytest.raises(RepositoryOutOfResources):
        await asyncio.wait_for(transcoders.transcode(source, EXPLICIT), DEADLINE)
    assert spool.used_bytes == source.size
    assert len(list(spool.folder.iterdir())) == 1
    await finish(transcoders, source)
    spool.close()


async def test_the_queue_is_bounded_and_cancelling_frees_it(spool: Spool) -> None:
    first, second = spooled(spool), spooled(spool)
    transcoders = Transcoders(spool, workers=1, max_waiting=1)
    job = asyncio.create_task(transcoders.transcode(first, EXPLICIT))
    await asyncio.sleep(0)
    with pytest.raises(RepositoryBusy):
        await transcoders.transcode(second, EXPLICIT)
    job.cancel()
    await asyncio.gather(job, return_exceptions=True)
    result = await asyncio.wait_for(transcoders.transcode(second, EXPLICIT), DEADLINE)
    await finish(transcoders, first, second, result)
    assert spool.used_bytes == first.size + second.size + result.size


async def test_one_who_leaves_does_not_take_it_from_the_others(spool: Spool) -> None:
    source = spooled(spool)
    transcoders = Transcoders(spool, workers=1)
    jobs = [asyncio.create_task(transcoders.transcode(source, EXPLICIT)) for _ in range(2)]
    await asyncio.sleep(0)
    jobs[0].cancel()
    result = await asyncio.wait_for(jobs[1], DEADLINE)
    await finish(transcoders, source, result)
    assert result._holders == 0


async def test_an_idle_process_ends(spool: Spool) -> None:
    source = spooled(spool)
    transcoders = Transcoders(spool, workers=1, idle_timeout=0.05)
    result = await asyncio.wait_for(transcoders.transcode(source, EXPLICIT), DEADLINE)
    (process,) = transcoders._all
    await asyncio.wait_for(process.wait(), DEADLINE)
    assert not transcoders._all
    await finish(transcoders, source, result)


def test_a_process_ends_with_who_started_it() -> None:
    """Its standard input ends; whatever it is doing then, so does it."""
    worker = subprocess.Popen(
        [sys.executable, "-m", "xca_imaging.imaging.transcoding_worker", str(1 << 30)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=node.environment(),
    )
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.close()
    assert worker.wait(DEADLINE) == 0
    worker.stdout.close()


@pytest.mark.slow
async def test_memory_is_that_of_a_frame(spool: Spool) -> None:
    """A multi-frame object of 200 MB costs a process what one of 20 MB costs."""
    peaks = []
    for frames in (40, 400):
        source = spooled(spool, frames=frames, size=(512, 512))
        transcoders = Transcoders(spool, workers=1)
        job = asyncio.create_task(transcoders.transcode(source, EXPLICIT))
        peak = 0
        while not job.done():
            for process in transcoders._all:
                peak = max(peak, psutil.Process(process.pid).memory_info().rss)
            await asyncio.sleep(0.005)
        result = job.result()
        assert result.size > frames * 512 * 512 * 2
        peaks.append(peak)
        await finish(transcoders, source, result)
    assert abs(peaks[1] - peaks[0]) < 16 << 20, peaks
