from __future__ import annotations

import warnings
import zlib
from pathlib import Path

import pydicom
import pytest
from pydicom.data import get_testdata_file

from xca_imaging import uids
from xca_imaging.imaging import part10

# Explicit and implicit, sequences of undefined length, encapsulated pixels, private sequences, big endian, deflated.
FILES = (
    "CT_small.dcm",
    "MR_small.dcm",
    "MR_small_implicit.dcm",
    "MR_small_bigendian.dcm",
    "JPEG2000.dcm",
    "nested_priv_SQ.dcm",
    "reportsi.dcm",
    "waveform_ecg.dcm",
    "image_dfl.dcm",
    "UN_sequence.dcm",
)


def path_of(name: str) -> Path:
    found = get_testdata_file(name, download=False)
    assert isinstance(found, str)
    return Path(found)


@pytest.mark.parametrize("name", FILES)
def test_identity_and_wholeness_of_real_files(name: str) -> None:
    path = path_of(name)
    facts = part10.identify(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # test files hold values that pydicom warns of
        dataset = pydicom.dcmread(path)
        assert facts.sop_instance_uid == dataset.get("SOPInstanceUID", "")
        assert facts.series_instance_uid == dataset.get("SeriesInstanceUID", "")
    assert facts.transfer_syntax_uid == dataset.file_meta.TransferSyntaxUID
    part10.verify_whole(path, facts.transfer_syntax_uid)


@pytest.mark.parametrize("name", [name for name in FILES if name != "image_dfl.dcm"])
@pytest.mark.parametrize("cut", [1, 3, 7, 100])
def test_a_file_that_was_cut_is_truncated(name: str, cut: int, tmp_path: Path) -> None:
    whole = path_of(name)
    short = tmp_path / "short.dcm"
    short.write_bytes(whole.read_bytes()[:-cut])
    with pytest.raises(part10.Part10Error):
        part10.verify_whole(short, part10.identify(whole).transfer_syntax_uid)


def test_a_deflated_dataset_that_was_cut_is_truncated(tmp_path: Path) -> None:
    whole = path_of("image_dfl.dcm")
    short = tmp_path / "short.dcm"
    short.write_bytes(whole.read_bytes()[:-1000])
    with pytest.raises(part10.Truncated):
        part10.verify_whole(short, part10.identify(whole).transfer_syntax_uid)


def test_a_deflated_bomb_is_walked_in_bounded_memory(tmp_path: Path) -> None:
    whole = path_of("image_dfl.dcm").read_bytes()
    head = whole[: 144 + int.from_bytes(whole[140:144], "little")]
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    bomb = tmp_path / "bomb.dcm"
    bomb.write_bytes(head + squeeze.compress(bytes(64 << 20)) + squeeze.flush())
    part10.verify_whole(bomb, "1.2.840.10008.1.2.1.99")


@pytest.mark.parametrize("content", [b"", b"DICM", bytes(200), b"<html>" * 100])
def test_what_is_no_part_10_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(part10.Part10Error):
        part10.identify(path)
    with pytest.raises(part10.Part10Error):
        part10.verify_whole(path, uids.EXPLICIT_VR_LITTLE_ENDIAN)


def test_endless_nesting_ends(tmp_path: Path) -> None:
    whole = path_of("CT_small.dcm").read_bytes()
    head = whole[: 144 + int.from_bytes(whole[140:144], "little")]
    # (0008,1140) SQ and (FFFE,E000), both of undefined length, a hundred times inside each other.
    level = bytes.fromhex("08004011 5351 0000 ffffffff feff00e0 ffffffff")
    path = tmp_path / "deep.dcm"
    path.write_bytes(head + level * 100)
    with pytest.raises(part10.Part10Error, match="nested"):
        part10.verify_whole(path, uids.EXPLICIT_VR_LITTLE_ENDIAN)


def test_the_quick_look_says_what_pydicom_says() -> None:
    """Of every file that pydicom brings along; where it says nothing, pydicom is asked."""
    told = 0
    for name in sorted(path_of("CT_small.dcm").parent.glob("*.dcm")):
        head = name.read_bytes()[:16384]
        found = part10._scan(head)
        if found is None:
            continue
        told += 1
        with warnings.catch_warnings(action="ignore"):
            dataset = pydicom.dcmread(name, stop_before_pixels=True)
        assert found == part10.Part10(
            str(dataset.SOPClassUID),
            str(dataset.SOPInstanceUID),
            str(dataset.StudyInstanceUID),
            str(dataset.SeriesInstanceUID),
            str(dataset.file_meta.TransferSyntaxUID),
        )
        for size in (0, 100, 132, 300, 600, 1000):
            assert part10._scan(head[:size]) in (found, None)
    assert told > 30
