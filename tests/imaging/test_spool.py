"""The spool: Part 10 files as they came, a quota that holds, and nothing half-written left behind."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom import dcmread

from tests.support.files import blocks, need_room_ahead
from xca_imaging import uids
from xca_imaging.errors import ArrivalBroken, LocalProtocolError, SpoolFull, SpoolInUse
from xca_imaging.imaging import next_file
from xca_imaging.imaging import spool as spool_module
from xca_imaging.imaging.file_meta import encode_file_meta
from xca_imaging.imaging.spool import Spool, SpooledInstance, SpoolWriter

CT = "1.2.840.10008.5.1.4.1.1.2"
EXPLICIT = uids.EXPLICIT_VR_LITTLE_ENDIAN
JPEG = "1.2.840.10008.1.2.4.70"
DATA_SET = b"\x08\x00\x60\x00CS\x02\x00CT"  # (0008,0060) Modality, Explicit VR Little Endian
META = len(
    encode_file_meta(sop_class_uid=CT, sop_instance_uid="1.2.30", transfer_syntax_uid=EXPLICIT, source_ae_title="PACS")
)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def make_spool(directory: Path, max_bytes: int = 1_000_000, **options: object) -> Spool:
    return Spool(directory, max_bytes=max_bytes, retention=60, **options)  # type: ignore[arg-type]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def spool(tmp_path: Path, clock: Clock) -> Iterator[Spool]:
    spool = make_spool(tmp_path, clock=clock)
    yield spool
    spool.close()


def begin(spool: Spool, uid: str = "1.2.30", syntax: str = EXPLICIT) -> SpoolWriter:
    return spool.create(sop_class_uid=CT, sop_instance_uid=uid, transfer_syntax_uid=syntax, source_ae_title="PACS")


def store(spool: Spool, uid: str = "1.2.30", size: int = 1000, syntax: str = EXPLICIT) -> SpooledInstance:
    """Spool an instance that takes `size` bytes of the quota."""
    writer = begin(spool, uid, syntax)
    writer.write(memoryview(bytes(size - writer.size)))
    instance = writer.commit()
    assert instance.size == size
    return instance


def files(spool: Spool) -> list[str]:
    return sorted(path.name for path in spool.folder.iterdir())


# --- Part 10 --------------------------------------------------------------------------------------------------------


def test_file_is_part_10_and_the_data_set_is_untouched(spool: Spool) -> None:
    writer = begin(spool)
    for position in range(len(DATA_SET)):
        writer.write(memoryview(DATA_SET)[position : position + 1])
    instance = writer.commit()
    assert instance.path.read_bytes()[META:] == DATA_SET
    dataset = dcmread(instance.path)
    assert dataset.Modality == "CT"
    meta = dataset.file_meta
    assert (meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID) == (CT, "1.2.30")
    assert (meta.TransferSyntaxUID, meta.SourceApplicationEntityTitle) == (EXPLICIT, "PACS")
    assert meta.ImplementationClassUID == uids.IMPLEMENTATION_CLASS_UID
    assert meta.FileMetaInformationGroupLength == META - 144
    assert instance.size == META + len(DATA_SET) == instance.path.stat().st_size == spool.used_bytes
    with instance.open() as stream:
        assert stream.read() == instance.path.read_bytes()


@given(st.from_regex(r"\A[1-9][0-9]{0,9}(\.[1-9][0-9]{0,9}){0,4}\Z"), st.from_regex(r"\A[A-Z ]{0,16}\Z"))
def test_file_meta_is_what_pydicom_reads(uid: str, ae_title: str) -> None:
    from io import BytesIO

    encoded = encode_file_meta(
        sop_class_uid=CT, sop_instance_uid=uid, transfer_syntax_uid=EXPLICIT, source_ae_title=ae_title
    )
    meta = dcmread(BytesIO(encoded)).file_meta
    assert meta.MediaStorageSOPInstanceUID == uid
    assert meta.get("SourceApplicationEntityTitle", "") == ae_title.strip()


def test_instance_without_data_set_still_has_its_meta(spool: Spool) -> None:
    assert dcmread(begin(spool).commit().path).file_meta.TransferSyntaxUID == EXPLICIT


@pytest.mark.parametrize("uid", ["../../x", "/etc/passwd", "", "a\0b", "é" * 40])
def test_nothing_of_a_file_name_comes_from_a_peer(spool: Spool, uid: str) -> None:
    instance = store(spool, uid)
    assert instance.path.parent == spool.folder
    assert files(spool) == [instance.name]
    assert spool.find(uid) is instance


# --- finding, holding, letting go -----------------------------------------------------------------------------------


def test_find_by_syntax_in_the_callers_order(spool: Spool) -> None:
    jpeg, explicit = store(spool, syntax=JPEG), store(spool)
    assert spool.find("1.2.30") is explicit  # the newest
    assert spool.find("1.2.30", [JPEG, EXPLICIT]) is jpeg
    assert spool.find("1.2.30", [uids.IMPLICIT_VR_LITTLE_ENDIAN]) is None
    assert spool.find("1.2.31") is None


def test_an_unheld_instance_goes_after_the_retention_time(spool: Spool, clock: Clock) -> None:
    old, held = store(spool, "1.2.1"), store(spool, "1.2.2")
    held.hold()
    clock.now += 30
    young = store(spool, "1.2.3")
    clock.now += 31
    assert spool.expire() == 1
    assert spool.find("1.2.1") is None
    assert not old.path.exists()
    held.release()
    clock.now += 59
    assert spool.expire() == 1
    assert spool.find("1.2.3") is None
    assert not young.path.exists()
    clock.now += 1
    assert spool.expire() == 1
    assert (files(spool), spool.used_bytes) == ([], 0)


def test_many_hold_one_instance(spool: Spool, clock: Clock) -> None:
    instance = store(spool)
    instance.hold()
    instance.hold()
    instance.release()
    clock.now += 1000
    assert spool.expire() == 0
    instance.release()
    with pytest.raises(ValueError, match="more often"):
        instance.release()


def test_an_evicted_instance_cannot_be_held(spool: Spool, clock: Clock) -> None:
    instance = store(spool)
    clock.now += 60
    spool.expire()
    with pytest.raises(ValueError, match="evicted"):
        instance.hold()


def test_an_open_file_is_read_to_its_end_whatever_happens(spool: Spool, clock: Clock) -> None:
    with store(spool).open() as stream:
        clock.now += 60
        spool.expire()
        assert len(stream.read()) == 1000


def test_the_same_instance_again_replaces_the_unheld_one(spool: Spool) -> None:
    first, second = store(spool), store(spool)
    assert spool.find("1.2.30") is second
    assert not first.path.exists()
    assert spool.used_bytes == 1000


def test_the_same_instance_again_leaves_the_held_one_to_its_reader(spool: Spool) -> None:
    first = store(spool)
    first.hold()
    second = store(spool)
    assert spool.find("1.2.30") is second
    assert first.path.exists()
    first.hold()
    first.release()
    first.release()
    assert not first.path.exists()
    assert files(spool) == [second.name]
    assert spool.used_bytes == 1000


# --- room -----------------------------------------------------------------------------------------------------------


def test_room_is_made_longest_unused_first(tmp_path: Path) -> None:
    spool = make_spool(tmp_path, 3000)
    first, second, third = (store(spool, f"1.2.{n}") for n in range(3))
    first.hold()
    first.release()  # used last
    assert spool.free_bytes == 3000
    store(spool, "1.2.4")
    assert not second.path.exists()
    assert first.path.exists()
    assert third.path.exists()
    assert spool.used_bytes == 3000


def test_held_and_unfinished_instances_are_never_evicted(tmp_path: Path) -> None:
    spool = make_spool(tmp_path, 2500)
    held = store(spool)
    held.hold()
    writer = begin(spool, "1.2.31")
    writer.write(memoryview(bytes(1000 - META)))
    assert spool.free_bytes == 500
    with pytest.raises(SpoolFull, match="2500"):
        writer.write(memoryview(bytes(501)))
    writer.write(memoryview(bytes(500)))
    with pytest.raises(SpoolFull):
        begin(spool, "1.2.32")
    assert len(files(spool)) == 2
    writer.discard()
    writer.discard()
    assert files(spool) == [held.name]
    assert spool.used_bytes == 1000


def test_an_object_larger_than_the_spool(tmp_path: Path) -> None:
    spool = make_spool(tmp_path, 1000)
    writer = begin(spool)
    with pytest.raises(SpoolFull):
        writer.write(memoryview(bytes(1001)))
    writer.discard()
    assert (files(spool), spool.used_bytes) == ([], 0)


def test_the_reserve_of_the_disk_is_left_alone(tmp_path: Path) -> None:
    spool = make_spool(tmp_path, reserve_free=1 << 62)
    assert spool.free_bytes == 0
    with pytest.raises(SpoolFull, match="reserve"):
        begin(spool)
    assert files(spool) == []


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Let the kernel refuse writes past `size` (RLIMIT_FSIZE): a short write first, then EFBIG, like a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("first", [0, 100])
def test_a_disk_that_is_full_in_mid_write(spool: Spool, first: int) -> None:
    writer = begin(spool)
    if first:
        writer.write(memoryview(bytes(first)))
    with file_size_limit(META + 500), pytest.raises(SpoolFull, match="disk"):
        writer.write(memoryview(bytes(1000)))
    writer.discard()
    assert (files(spool), spool.used_bytes) == ([], 0)


def test_a_short_write_is_finished(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    write, writev = os.write, os.writev
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:7]))
    monkeypatch.setattr(os, "writev", lambda fd, parts: writev(fd, [parts[0][:50]]))
    content = bytes(range(256))
    writer = begin(spool)
    writer.write(memoryview(content))
    writer.write(memoryview(content))
    instance = writer.commit()
    assert instance.path.read_bytes()[META:] == content * 2


def test_other_write_errors_stay_what_they_are(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "I/O error")

    writer = begin(spool)
    monkeypatch.setattr(os, "writev", fail)
    with pytest.raises(OSError, match="I/O error"):
        writer.write(memoryview(b"x"))
    writer.discard()
    assert files(spool) == []


def test_a_disk_that_is_full_only_when_the_file_is_closed(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = begin(spool)
    writer.write(memoryview(DATA_SET))
    close = os.close

    def full(fd: int) -> None:
        close(fd)
        raise OSError(errno.EDQUOT, "quota")

    monkeypatch.setattr(os, "close", full)
    with pytest.raises(SpoolFull):
        writer.commit()
    monkeypatch.undo()
    writer.discard()
    assert spool.find("1.2.30") is None
    assert (files(spool), spool.used_bytes) == ([], 0)


# --- attachments ----------------------------------------------------------------------------------------------------


def test_attachment_has_its_length_and_hashes(spool: Spool) -> None:
    writer = spool.create_attachment()
    writer.write(b"abc")
    writer.write(memoryview(b"def"))
    attachment = writer.commit()
    assert attachment.path.read_bytes() == b"abcdef"
    assert attachment.size == spool.used_bytes == 6
    assert attachment.sha1 == hashlib.sha1(b"abcdef").hexdigest()
    assert attachment.sha256 == hashlib.sha256(b"abcdef").hexdigest()
    with attachment.open() as stream:
        assert stream.read() == b"abcdef"
    attachment.discard()
    attachment.discard()
    assert (files(spool), spool.used_bytes) == ([], 0)


def test_attachments_share_the_quota(tmp_path: Path) -> None:
    spool = make_spool(tmp_path, 1000)
    idle = store(spool)
    writer = spool.create_attachment()
    writer.write(bytes(1000))
    assert not idle.path.exists()
    with pytest.raises(SpoolFull):
        writer.write(b"x")
    writer.discard()
    assert (files(spool), spool.used_bytes) == ([], 0)


def test_attachment_on_a_full_disk(spool: Spool) -> None:
    writer = spool.create_attachment()
    with file_size_limit(10), pytest.raises(SpoolFull):
        writer.write(bytes(20))
    writer.discard()
    assert files(spool) == []


# --- marks ----------------------------------------------------------------------------------------------------------


def test_levels_count_what_cannot_be_evicted(tmp_path: Path) -> None:
    levels: list[bool] = []
    spool = make_spool(tmp_path, 10_000, high_water=0.5, low_water=0.2)
    spool.on_level = levels.append
    instances = [store(spool, f"1.2.{n}") for n in range(10)]
    assert levels == []  # the spool is full, of what may go
    for instance in instances[:4]:
        instance.hold()
    assert not spool.is_high
    instances[4].hold()
    assert (levels, spool.is_high) == ([True], True)
    instances[4].release()
    instances[3].release()
    assert spool.is_high  # between the marks it stays what it was
    instances[2].release()
    assert levels == [True, False]
    spool.close()


def test_writing_reaches_the_high_mark_in_mid_object(tmp_path: Path) -> None:
    spool = make_spool(tmp_path, 10_000, high_water=0.5, low_water=0.2)
    writer = begin(spool)
    writer.write(memoryview(bytes(4000)))
    assert not spool.is_high
    writer.write(memoryview(bytes(2000)))
    assert spool.is_high
    writer.discard()
    assert not spool.is_high
    spool.close()


# --- siblings -------------------------------------------------------------------------------------------------------


def adopt(spool: Spool, name: str, size: int, reserved: int) -> SpooledInstance:
    return spool.adopt(
        name,
        size,
        checksum="0" * 32,
        sop_class_uid=CT,
        sop_instance_uid="1.2.30",
        transfer_syntax_uid=EXPLICIT,
        reserved=reserved,
    )


def test_a_sibling_writes_within_what_it_was_lent(tmp_path: Path) -> None:
    spool = make_spool(tmp_path, 5000)
    spool.reserve(4000)
    with pytest.raises(SpoolFull):
        spool.reserve(1001)
    name = spool.new_name("r1") + "-1"
    (spool.folder / name).write_bytes(bytes(1500))
    instance = adopt(spool, name, 1500, reserved=1500)
    assert (spool.find("1.2.30"), spool.used_bytes) == (instance, 4000)
    spool.unreserve(2500)
    assert spool.used_bytes == 1500
    spool.close()


def test_what_a_sibling_has_not_written_whole_is_not_adopted(spool: Spool) -> None:
    name = spool.new_name("r1") + "-1"
    with pytest.raises(LocalProtocolError):
        adopt(spool, name, 10, reserved=0)
    (spool.folder / name).write_bytes(bytes(9))
    with pytest.raises(LocalProtocolError, match="9 bytes, not 10"):
        adopt(spool, name, 10, reserved=0)
    assert (spool.find("1.2.30"), spool.used_bytes) == (None, 0)


# --- reading along --------------------------------------------------------------------------------------------------


async def test_several_read_an_instance_while_it_arrives(spool: Spool) -> None:
    writer = begin(spool)
    content = os.urandom(100_000)

    async def follow(at_least: int, at_most: int) -> bytes:
        received = b""
        with writer.reader() as reader:
            while data := await reader.read(at_least, at_most):
                assert len(data) <= at_most
                received += data
        return received

    readers = [asyncio.create_task(follow(*bounds)) for bounds in ((1, 1 << 20), (5000, 7000), (1 << 20, 1 << 20))]
    for start in range(0, len(content), 1000):
        writer.write(memoryview(content[start : start + 1000]))
        await asyncio.sleep(0)
    late = asyncio.create_task(follow(1, 10_000))
    await asyncio.sleep(0)
    instance = writer.commit()
    expected = instance.path.read_bytes()
    assert expected[META:] == content
    for reader in [*readers, late]:
        assert await reader == expected


async def test_who_reads_along_learns_that_it_broke_off(spool: Spool) -> None:
    writer = begin(spool)
    writer.write(memoryview(DATA_SET))
    with writer.reader() as reader:
        assert await reader.read(1, 1000) == writer_file(spool)
        task = asyncio.create_task(reader.read(1, 1000))
        await asyncio.sleep(0)
        writer.discard()
        with pytest.raises(ArrivalBroken):
            await task


def writer_file(spool: Spool) -> bytes:
    (file,) = spool.folder.iterdir()
    return file.read_bytes()


# --- over restarts --------------------------------------------------------------------------------------------------


def place(instance: SpooledInstance) -> SpooledInstance:
    instance.place("1.2", "1.2.3", [EXPLICIT, JPEG], source="main")
    return instance


def killed(directory: Path, script: str) -> None:
    """Run a script with a spool `s` in a process that dies without a word."""
    before = (
        "import os, sys; from pathlib import Path\n"
        "from tests.imaging.test_spool import *\n"
        "s = make_spool(Path(sys.argv[1]))\n"
    )
    command = [sys.executable, "-c", before + script + "\nos.kill(os.getpid(), 9)", str(directory)]
    assert subprocess.run(command, timeout=30, check=False).returncode == -9


async def test_a_killed_run_leaves_what_was_whole_and_nothing_else(tmp_path: Path) -> None:
    killed(
        tmp_path,
        "place(store(s, '1.2.1')).keep_sha256('ab')\n"
        "held = place(store(s, '1.2.2')); held.hold()\n"
        "store(s, '1.2.3')\n"  # nobody said where it belongs
        "begin(s, '1.2.4').write(memoryview(bytes(100)))\n"
        "s.create_attachment().write(b'half')\n"
        "whole = s.create_attachment(); whole.write(b'whole'); whole.commit()\n",
    )
    (tmp_path / "kept.txt").write_text("not ours")
    spool = make_spool(tmp_path)
    assert spool.find("1.2.1") is None  # not before it has been read again
    assert spool.used_bytes == 2000
    assert len(files(spool)) == 2
    await spool.verify(["1.2.1", "1.2.2", "1.2.3", "1.2.4"])
    found = spool.find("1.2.1", [EXPLICIT])
    assert found is not None
    assert (found.study_instance_uid, found.series_instance_uid, found.source) == ("1.2", "1.2.3", "main")
    assert (found.accept, found.sha256, found.bytes_changed) == ({EXPLICIT, JPEG}, "ab", False)
    assert dcmread(found.path).file_meta.MediaStorageSOPInstanceUID == "1.2.1"
    assert spool.find("1.2.2") is not None
    assert spool.find("1.2.3") is spool.find("1.2.4") is None
    assert (tmp_path / "kept.txt").exists()
    spool.close()


def made_ahead(spool: Spool) -> Path:
    (path,) = [path for path in spool.folder.iterdir() if not path.stat().st_size]
    return path


async def test_a_file_made_ahead_has_room_only_for_more_of_the_same(tmp_path: Path) -> None:
    need_room_ahead(tmp_path)
    spool = make_spool(tmp_path)

    spool.prepare(store(spool, "1.2.1", 200_000).size)
    assert blocks(made_ahead(spool)) == 0  # the first of its size
    spool.prepare(store(spool, "1.2.2", 200_010).size)
    assert 200_010 <= blocks(made_ahead(spool)) < 210_000
    assert spool.used_bytes == 400_010
    longer = made_ahead(spool)
    assert store(spool, "1.2.3", 300_000).path == longer
    assert 300_000 <= blocks(longer) < 310_000
    spool.prepare(300_000)
    spool.prepare(300_000)  # there is one
    assert blocks(made_ahead(spool)) == 0
    store(spool, "1.2.4", 300_000)
    spool.prepare(300_000)
    shorter = made_ahead(spool)
    assert store(spool, "1.2.5", 100_000).path == shorter
    assert 100_000 <= blocks(shorter) < 110_000
    spool.prepare(100_000)
    spool.close()
    assert files(spool) == []


async def test_a_file_system_without_room_ahead_is_asked_for_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = make_spool(tmp_path)
    asked: list[int] = []

    def fallocate(fd: int, mode: int, offset: int, length: int) -> int:
        asked.append(length)
        return -1  # EOPNOTSUPP, ENOSPC

    monkeypatch.setattr(next_file, "_fallocate", fallocate)
    for number in range(3):
        spool.prepare(store(spool, f"1.2.{number}", 100_000 + number).size)
        assert blocks(made_ahead(spool)) == 0
    assert asked == [100_001, 100_002]
    spool.prepare(10_000_000)
    store(spool, "1.2.8", 100_000)
    spool.prepare(10_000_000)
    assert asked[2:] == [next_file.MOST_ROOM]
    spool.close()


async def test_a_closed_spool_leaves_the_same(tmp_path: Path) -> None:
    first = make_spool(tmp_path)
    place(store(first, "1.2.1"))
    store(first, "1.2.2")
    first.create_attachment().write(b"half")
    first.close()
    first.close()
    assert len(list((tmp_path / "objects").iterdir())) == 1
    second = make_spool(tmp_path)
    await second.verify(["1.2.1"])
    assert second.find("1.2.1") is not None
    fresh = store(second, "1.2.2")  # names are not used again
    assert fresh.size == 1000
    second.close()


def test_a_file_that_somebody_removed_is_no_loss_to_the_others(tmp_path: Path, clock: Clock) -> None:
    spool = make_spool(tmp_path, clock=clock)
    store(spool, "1.2.1").path.unlink()
    store(spool, "1.2.2").path.unlink()
    clock.now += 60
    assert spool.expire() == 2
    store(spool, "1.2.3").path.unlink()
    spool.close()


@pytest.mark.parametrize("uid", ['1.2"],', "a\nb", "a\0b", "\\", "é" * 40, "\ud800"])
async def test_odd_uids_outlive_a_restart(tmp_path: Path, uid: str) -> None:
    first = make_spool(tmp_path)
    store(first, uid).place(uid, uid, [uid], source=uid)
    first.close()
    second = make_spool(tmp_path)
    await second.verify([uid])
    found = second.find(uid)
    assert found is not None
    assert (found.sop_instance_uid, found.study_instance_uid, found.source, found.accept) == (uid, uid, uid, {uid})
    second.close()


@pytest.mark.parametrize("damage", ["shorter", "longer", "other", "gone", "unreadable"])
async def test_a_damaged_file_is_never_found(tmp_path: Path, damage: str) -> None:
    first = make_spool(tmp_path)
    path = place(store(first)).path
    first.close()
    content = path.read_bytes()
    match damage:
        case "shorter":
            path.write_bytes(content[:-1])
        case "longer":
            path.write_bytes(content + b"\0")
        case "other":
            path.write_bytes(content[:-1] + b"x")
        case "gone":
            path.unlink()
        case "unreadable":
            path.unlink()
            path.mkdir()
    second = make_spool(tmp_path)
    await second.verify(["1.2.30"])
    assert second.find("1.2.30") is None
    assert second.used_bytes == 0
    second.close()


async def test_a_torn_or_foreign_journal_costs_no_more_than_its_lines(tmp_path: Path) -> None:
    first = make_spool(tmp_path)
    place(store(first, "1.2.1"))
    place(store(first, "1.2.2"))
    first.close()
    journal = max(tmp_path.glob("journal-*"))
    lines = journal.read_bytes().splitlines(keepends=True)
    spoilt = [line.replace(b"1.2.2", b"1.2.9") for line in lines]
    journal.write_bytes(b"".join(spoilt) + b'\0\0\xff["I"\n' + b'00000000 ["I","torn')
    second = make_spool(tmp_path)
    await second.verify(["1.2.1", "1.2.2", "1.2.9"])
    assert second.find("1.2.1") is not None
    assert second.find("1.2.2") is second.find("1.2.9") is None
    second.close()
    for journal in tmp_path.glob("journal-*"):
        journal.write_bytes(b"from another version\n")
    third = make_spool(tmp_path)
    assert third.used_bytes == 0
    third.close()


async def test_the_journal_is_compacted_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module, "_GARBAGE", 10)
    first = make_spool(tmp_path)
    instances = [place(store(first, f"1.2.{n}")) for n in range(20)]
    for instance in instances[10:]:
        first._evict(instance)
    for _ in range(50):
        instances[0].place("1.2", "1.2.4", [], source="main")
        instances[0].place("1.2", "1.2.3", [EXPLICIT], source="main")
    tidying = asyncio.create_task(first.tidy())
    async with asyncio.timeout(5):
        while sum(path.read_bytes().count(b"\n") for path in tmp_path.glob("journal-*")) > 20:
            await asyncio.sleep(0.01)
    place(store(first, "1.2.99"))
    tidying.cancel()
    first.close()
    second = make_spool(tmp_path)
    await second.verify(["1.2.0", "1.2.9", "1.2.99"])
    found = second.find("1.2.0")
    assert found is not None
    assert (found.series_instance_uid, found.accept) == ("1.2.3", {EXPLICIT})
    assert second.find("1.2.9") is not None
    assert second.find("1.2.99") is not None
    assert second.used_bytes == 11_000
    second.close()


@pytest.mark.parametrize(("jump", "expired"), [(-1e9, 0), (-10, 0), (30, 0), (61, 1), (1e9, 1)])
def test_the_time_between_runs_counts_and_a_wrong_clock_does_no_harm(
    tmp_path: Path, clock: Clock, jump: float, expired: int
) -> None:
    first = make_spool(tmp_path, clock=clock, wall_clock=lambda: 1.7e9)
    place(store(first))
    first.close()
    second = make_spool(tmp_path, clock=clock, wall_clock=lambda: 1.7e9 + jump)
    assert second.expire() == expired
    clock.now += 61
    second.expire()
    assert second.used_bytes == 0
    second.close()


async def test_a_smaller_quota_after_a_restart_keeps_what_was_used_last(tmp_path: Path) -> None:
    times = iter(range(1_700_000_000, 1_800_000_000))
    first = make_spool(tmp_path, wall_clock=lambda: float(next(times)))
    instances = [place(store(first, f"1.2.{n}")) for n in range(4)]
    instances[0].hold()
    first._tell_journal()
    instances[0].release()
    first.close()
    second = make_spool(
        tmp_path,
        2500,
        wall_clock=lambda: float(next(times)),
    )
    second.retention = 1e9
    await second.verify(f"1.2.{n}" for n in range(4))
    assert [second.find(f"1.2.{n}") is not None for n in range(4)] == [True, False, False, True]
    second.close()


def test_a_directory_has_one_spool(tmp_path: Path) -> None:
    first = make_spool(tmp_path)
    instance = store(first)
    with pytest.raises(SpoolInUse, match=str(tmp_path)):
        make_spool(tmp_path)
    assert instance.path.exists()
    first.close()
    make_spool(tmp_path).close()


async def test_tidying_verifies_what_an_earlier_run_left(tmp_path: Path) -> None:
    first = make_spool(tmp_path)
    place(store(first))
    first.close()
    second = make_spool(tmp_path)
    tidying = asyncio.create_task(second.tidy())
    async with asyncio.timeout(5):
        while second.find("1.2.30") is None:
            await asyncio.sleep(0.01)
    tidying.cancel()
    second.close()
