"""The spool: Part 10 files as they came, a quota that holds, and nothing half-written left behind."""

from __future__ import annotations

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

from xca_imaging import uids
from xca_imaging.errors import SpoolFull
from xca_imaging.imaging.spool import Spool, SpooledInstance, SpoolWriter, encode_file_meta

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


# --- folders --------------------------------------------------------------------------------------------------------


def test_leftovers_of_a_crashed_run_are_removed_and_nothing_else(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from xca_imaging.imaging.spool import Spool\n"
        "s = Spool(Path(sys.argv[1]), max_bytes=10**6, retention=1)\n"
        "s.create_attachment().write(b'half'); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)], timeout=30, check=False).returncode == 9
    (tmp_path / "kept.txt").write_text("not ours")
    assert len(list(tmp_path.glob("run-*/*"))) == 1
    spool = make_spool(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.txt", spool.folder.name]
    spool.close()
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_two_spools_in_one_directory_leave_each_other_alone(tmp_path: Path) -> None:
    first = make_spool(tmp_path)
    instance = store(first)
    second = make_spool(tmp_path)
    assert instance.path.exists()
    assert second.find("1.2.30") is None
    second.close()
    second.close()
    assert instance.path.exists()
    first.close()
