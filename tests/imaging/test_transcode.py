"""Transcoding against the test files of pydicom, and against what DCMTK encodes and decodes."""

from __future__ import annotations

import contextlib
import copy
import io
import random
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, encapsulate_extended
from pydicom.pixels import pixel_array
from pydicom.sequence import Sequence
from pydicom.uid import UID, generate_uid

from tests.support import images, peers
from xca_imaging import uids
from xca_imaging.imaging import transcode
from xca_imaging.imaging.file_meta import encode_file_meta
from xca_imaging.imaging.part10 import verify_whole

EXPLICIT, IMPLICIT = transcode.TARGETS
BIG_ENDIAN = uids.EXPLICIT_VR_BIG_ENDIAN
DEFLATED = "1.2.840.10008.1.2.1.99"
JPEG_LOSSLESS, JPEG_LOSSLESS_SV1 = "1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70"
JPEG_LS, JPEG_LS_NEAR = "1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81"
JPEG_2000_LOSSLESS, JPEG_2000 = "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91"
RLE = "1.2.840.10008.1.2.5"


def run(source: Path, target: str = EXPLICIT) -> Dataset:
    """Transcode a file, check that the result is whole, and read it."""
    meta = pydicom.filereader.read_file_meta_info(source)
    output = source.with_suffix(f".{target[-1]}.out")
    with output.open("wb") as sink:
        sink.write(
            encode_file_meta(
                sop_class_uid=meta.MediaStorageSOPClassUID,
                sop_instance_uid=meta.MediaStorageSOPInstanceUID,
                transfer_syntax_uid=target,
                source_ae_title="TEST",
            )
        )
        transcode.transcode(source, sink, source_syntax=meta.TransferSyntaxUID, target_syntax=target)
    verify_whole(output, target)
    return pydicom.dcmread(output)


def own_copy(folder: Path, name: str) -> Path:
    """Return a copy of a test file of pydicom with a file meta group as the spool writes it."""
    dataset = pydicom.dcmread(images.pydicom_file(name))
    path = folder / name
    dataset.save_as(path, enforce_file_format=True)
    return path


def check_elements(source: Dataset, result: Dataset, *, may_change: tuple[str, ...] = ()) -> None:
    """Every element but pixel data and group lengths is there with the same value, and nothing else."""
    ignored = {"PixelData", "ExtendedOffsetTable", "ExtendedOffsetTableLengths", *may_change}
    for one, other in ((source, result), (result, source)):
        for element in one:
            if element.keyword in ignored or element.tag.element == 0:
                continue
            assert element.tag in other, element
            assert other[element.tag].value == element.value, element


def image(
    *,
    bits: tuple[int, int] = (16, 16),
    signed: bool = False,
    samples: int = 1,
    photometric: str = "MONOCHROME2",
    planar: int = 0,
    frames: int = 1,
    size: tuple[int, int] = (33, 47),
    seed: int = 1,
) -> Dataset:
    """Return an uncompressed synthetic image: noise over a ramp, every stored bit in use."""
    allocated, stored = bits
    low, high = (-(1 << stored - 1), (1 << stored - 1) - 1) if signed else (0, (1 << stored) - 1)
    shape = (frames, *size, *([samples] if samples > 1 else []))
    generator = np.random.default_rng(seed)
    ramp = np.linspace(low, high, int(np.prod(shape))).reshape(shape)
    noise = generator.integers(-4, 5, shape)
    array = np.clip(ramp + noise, low, high).astype(f"<{'i' if signed else 'u'}{allocated // 8}")
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = UID(EXPLICIT)
    dataset.SOPClassUID = UID("1.2.840.10008.5.1.4.1.1.7.2" if frames > 1 else "1.2.840.10008.5.1.4.1.1.7")
    dataset.SOPInstanceUID = generate_uid(None)
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = generate_uid(None), generate_uid(None)
    dataset.PatientID, dataset.Modality = "TEST-1", "OT"
    block = dataset.private_block(0x0009, "SYNTHETIC TEST", create=True)
    block.add_new(0x01, "OB", bytes(range(1, 9)))
    block.add_new(0x02, "SQ", Sequence([_item()]))
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = samples, photometric
    if samples > 1:
        dataset.PlanarConfiguration = planar
    if frames > 1:
        dataset.NumberOfFrames = frames
    dataset.Rows, dataset.Columns = size
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = allocated, stored, stored - 1
    dataset.PixelRepresentation = int(signed)
    if samples == 1:
        dataset.RescaleIntercept, dataset.RescaleSlope = "0", "1"
    if planar and samples > 1:
        array = np.moveaxis(array, -1, 1)
    raw = array.tobytes()
    dataset.PixelData = raw + b"\0" * (len(raw) % 2)
    dataset["PixelData"].VR = "OW" if allocated > 8 else "OB"
    return dataset


def _item() -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = "1", "99TEST", "one"
    return item


def save(folder: Path, dataset: Dataset, name: str = "source.dcm") -> Path:
    path = folder / name
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.save_as(path, enforce_file_format=True)
    return path


# --------------------------------------------------------------------------------------------------------------------
# pydicom's test files
# --------------------------------------------------------------------------------------------------------------------


def lossless_files() -> Iterator[str]:
    """Name the test files of pydicom in a transfer syntax that is read."""
    root = Path(pydicom.__file__).parent / "data" / "test_files"
    for path in sorted(root.glob("*.dcm")):
        try:
            meta = pydicom.filereader.read_file_meta_info(path)
        except Exception:  # several are broken on purpose
            continue
        if "TransferSyntaxUID" in meta and meta.TransferSyntaxUID in transcode.SOURCES:
            yield path.name


REFUSED = {
    "GDCMJ2K_TextGBR.dcm": "irreversible",  # says lossless and is not
    "JPEG2000.dcm": "irreversible",
    "JPEG2000-embedded-sequence-delimiter.dcm": "irreversible",
    "rtdose_expb.dcm": "big endian pixel data of more than 16 bits",
    "rtdose_expb_1frame.dcm": "big endian pixel data of more than 16 bits",
    "rtplan_truncated.dcm": "ends inside an element",
    "MR_truncated.dcm": "ends inside an element",
    "no_meta_group_length.dcm": "file meta group length",
}


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")  # several of the files have odd values
@pytest.mark.parametrize("name", tuple(lossless_files()))
def test_pydicoms_files(tmp_path: Path, name: str) -> None:
    original = images.pydicom_file(name)
    source = pydicom.dcmread(original)
    source_syntax = str(source.file_meta.TransferSyntaxUID)
    for target in transcode.TARGETS:
        if target == source_syntax:
            continue
        out = io.BytesIO()
        if name in REFUSED:
            with pytest.raises(transcode.CannotTranscode, match=REFUSED[name]):
                transcode.transcode(original, out, source_syntax=source_syntax, target_syntax=target)
            continue
        transcode.transcode(original, out, source_syntax=source_syntax, target_syntax=target)
        path = tmp_path / target
        sop_class, instance = source.get("SOPClassUID", "1.2.3"), source.get("SOPInstanceUID", "1.2.3")
        path.write_bytes(
            encode_file_meta(
                sop_class_uid=sop_class, sop_instance_uid=instance, transfer_syntax_uid=target, source_ae_title=""
            )
            + out.getvalue()
        )
        verify_whole(path, target)
        result = pydicom.dcmread(path)
        changed = source.get("PhotometricInterpretation") == "YBR_RCT"
        may_change = ("PhotometricInterpretation",) if changed else ()
        if target == EXPLICIT or source_syntax == IMPLICIT:
            check_elements(source, result, may_change=may_change)
        if changed:
            assert result.PhotometricInterpretation == "RGB"
        if "PixelData" in source and "BitsAllocated" in source and name != "badVR.dcm":
            assert np.array_equal(pixel_array(source, raw=True), pixel_array(result, raw=True))


# --------------------------------------------------------------------------------------------------------------------
# DCMTK's encoders and decoders
# --------------------------------------------------------------------------------------------------------------------

KINDS = {
    "unsigned 16": {},
    "signed 16": {"signed": True},
    "unsigned 12 in 16": {"bits": (16, 12)},
    "signed 12 in 16": {"bits": (16, 12), "signed": True},
    "unsigned 8": {"bits": (8, 8)},
    "signed 8": {"bits": (8, 8), "signed": True},
    "rgb": {"bits": (8, 8), "samples": 3, "photometric": "RGB"},
    "rgb by plane": {"bits": (8, 8), "samples": 3, "photometric": "RGB", "planar": 1},
    "ybr_full": {"bits": (8, 8), "samples": 3, "photometric": "YBR_FULL"},
    "frames": {"bits": (16, 12), "frames": 5},
    "rgb frames": {"bits": (8, 8), "samples": 3, "photometric": "RGB", "frames": 4},
    "odd": {"bits": (8, 8), "size": (3, 5)},
}
ENCODERS = {
    "jpeg sv1": (["dcmcjpeg", "+e1"], JPEG_LOSSLESS_SV1, ["dcmdjpeg", "+cn", "+px"]),
    **{
        f"jpeg predictor {n}": (["dcmcjpeg", "+el", "+sv", str(n)], JPEG_LOSSLESS, ["dcmdjpeg", "+cn", "+px"])
        for n in (2, 4, 6, 7)
    },
    "jpeg-ls by line": (["dcmcjpls", "+el", "+il"], JPEG_LS, ["dcmdjpls", "+px"]),
    "jpeg-ls by sample": (["dcmcjpls", "+el", "+is"], JPEG_LS, ["dcmdjpls", "+px"]),
    "jpeg-ls by plane": (["dcmcjpls", "+el", "+in"], JPEG_LS, ["dcmdjpls", "+px"]),
    "rle": (["dcmcrle"], RLE, ["dcmdrle"]),
}


@pytest.mark.peer
@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_dcmtk_compresses(tmp_path: Path, kind: str, encoder: str) -> None:
    encode, syntax, decode = ENCODERS[encoder]
    if kind == "signed 8" and "jpeg-ls" in encoder:
        pytest.skip("DCMTK does not compress it")
    original = image(**KINDS[kind])
    plain, packed, reference = save(tmp_path, original), tmp_path / "packed.dcm", tmp_path / "reference.dcm"
    peers.run(peers.program(encode[0]), *encode[1:], "+un", str(plain), str(packed)) if encode[0] != "dcmcrle" else (
        peers.run(peers.program("dcmcrle"), str(plain), str(packed))
    )
    source = pydicom.dcmread(packed)
    assert source.file_meta.TransferSyntaxUID == syntax
    peers.run(peers.program(decode[0]), *decode[1:], str(packed), str(reference))
    expected = pydicom.dcmread(reference)
    for target in transcode.TARGETS:
        result = run(packed, target)
        if target == EXPLICIT:
            check_elements(source, result)
        assert np.array_equal(pixel_array(result, raw=True), pixel_array(expected, raw=True))
        assert np.array_equal(pixel_array(result, raw=True), pixel_array(original, raw=True))
        assert result.PlanarConfiguration == source.PlanarConfiguration if source.SamplesPerPixel > 1 else True
        assert result.SOPInstanceUID == original.SOPInstanceUID
        assert result[0x0009, 0x1001].value == bytes(range(1, 9))
        if original.PixelRepresentation == 0:
            assert result.PixelData == expected.PixelData or source.get("PlanarConfiguration")


@pytest.mark.peer
@pytest.mark.parametrize("option", [["dcmcjpeg", "+el", "+pt", "2"], ["dcmcjpeg", "+eb"], ["dcmcjpls", "+en"]])
def test_what_was_compressed_with_loss_is_left_alone(tmp_path: Path, option: list[str]) -> None:
    plain, packed = save(tmp_path, image(bits=(8, 8))), tmp_path / "packed.dcm"
    peers.run(peers.program(option[0]), *option[1:], str(plain), str(packed))
    syntax = str(pydicom.dcmread(packed).file_meta.TransferSyntaxUID)
    for labelled in (syntax, JPEG_LS if "jpls" in option[0] else JPEG_LOSSLESS):
        with pytest.raises(transcode.CannotTranscode):
            transcode.transcode(packed, io.BytesIO(), source_syntax=labelled, target_syntax=EXPLICIT)


@pytest.mark.peer
@pytest.mark.parametrize("program", ["dcmcjpeg", "dcmcjpls"])
@pytest.mark.parametrize("frames", [1, 3])
def test_frames_in_several_fragments(tmp_path: Path, program: str, frames: int) -> None:
    original = image(size=(64, 64), frames=frames)
    plain, packed = save(tmp_path, original), tmp_path / "packed.dcm"
    for table in ("+ot", "-ot"):
        peers.run(peers.program(program), "+fs", "1", table, "+un", str(plain), str(packed))
        assert packed.read_bytes().count(b"\xfe\xff\x00\xe0") > frames + 1
        assert np.array_equal(pixel_array(run(packed)), pixel_array(original))


# --------------------------------------------------------------------------------------------------------------------
# JPEG 2000
# --------------------------------------------------------------------------------------------------------------------


def jpeg_2000(original: Dataset, **options: Any) -> bytes:
    """Return the code stream of a single frame image, by openjpeg."""
    from openjpeg.utils import encode_array

    return bytes(encode_array(np.ascontiguousarray(pixel_array(original, raw=True)), **options))


def packed(original: Dataset, streams: list[bytes], syntax: str) -> Dataset:
    """Return a copy with encapsulated pixel data."""
    result = copy.deepcopy(original)
    result.file_meta.TransferSyntaxUID = UID(syntax)
    result.PixelData = encapsulate(streams)
    result["PixelData"].VR = "OB"
    result["PixelData"].is_undefined_length = True
    return result


@pytest.mark.parametrize(
    ("photometric", "transformed"), [("RGB", False), ("YBR_RCT", True), ("RGB", True), ("YBR_FULL", False)]
)
@pytest.mark.parametrize("planar", [0, 1])
def test_colour_spaces_of_jpeg_2000(tmp_path: Path, photometric: str, transformed: bool, planar: int) -> None:
    original = image(bits=(8, 8), samples=3, photometric="RGB", planar=planar)
    stream = jpeg_2000(original, photometric_interpretation=1, use_mct=transformed)
    source = packed(original, [stream], JPEG_2000_LOSSLESS)
    source.PhotometricInterpretation = photometric
    result = run(save(tmp_path, source))
    assert result.PhotometricInterpretation == ("RGB" if photometric == "YBR_RCT" else photometric)
    assert result.PlanarConfiguration == planar
    assert result.PixelData == original.PixelData
    check_elements(source, result, may_change=("PhotometricInterpretation",))


@pytest.mark.parametrize("kind", ["unsigned 16", "signed 16", "unsigned 12 in 16", "signed 12 in 16", "unsigned 8"])
@pytest.mark.parametrize("syntax", [JPEG_2000_LOSSLESS, JPEG_2000])
def test_reversible_jpeg_2000(tmp_path: Path, kind: str, syntax: str) -> None:
    original = image(**KINDS[kind])
    stream = jpeg_2000(original, photometric_interpretation=2, bits_stored=original.BitsStored)
    result = run(save(tmp_path, packed(original, [stream], syntax)))
    assert result.PixelData == original.PixelData


def test_irreversible_jpeg_2000_is_found_by_its_stream(tmp_path: Path) -> None:
    original = image(size=(64, 64))
    stream = jpeg_2000(original, photometric_interpretation=2, compression_ratios=[4])
    path = save(tmp_path, packed(original, [stream], JPEG_2000_LOSSLESS))
    with pytest.raises(transcode.CannotTranscode, match="frame 1 is compressed by the irreversible"):
        run(path)


# --------------------------------------------------------------------------------------------------------------------
# Around the pixels
# --------------------------------------------------------------------------------------------------------------------


def test_offset_tables_are_left_out_and_loss_stays_told(tmp_path: Path) -> None:
    original = image(bits=(8, 8), frames=3, size=(32, 32))
    frames = [pixel_array(original, index=n) for n in range(3)]
    from openjpeg.utils import encode_array

    streams = [bytes(encode_array(each, photometric_interpretation=2)) for each in frames]
    source = packed(original, streams, JPEG_2000_LOSSLESS)
    source.PixelData, source.ExtendedOffsetTable, source.ExtendedOffsetTableLengths = encapsulate_extended(streams)
    source.LossyImageCompression, source.LossyImageCompressionRatio = "01", "12.5"
    result = run(save(tmp_path, source))
    assert "ExtendedOffsetTable" not in result
    assert "ExtendedOffsetTableLengths" not in result
    assert result.PixelData == original.PixelData
    assert (result.LossyImageCompression, result.LossyImageCompressionRatio) == ("01", 12.5)


@pytest.mark.parametrize("target", transcode.TARGETS)
@pytest.mark.parametrize("is_packed", [True, False])
def test_icon_image(tmp_path: Path, target: str, is_packed: bool) -> None:
    original = image(bits=(8, 8))
    icon = image(bits=(8, 8), size=(32, 35), seed=2)
    item = Dataset()
    for keyword in ("SamplesPerPixel", "PhotometricInterpretation", "Rows", "Columns", "BitsAllocated", "BitsStored"):
        setattr(item, keyword, icon[keyword].value)
    item.HighBit, item.PixelRepresentation = 7, 0
    item.PixelData = encapsulate([jpeg_2000(icon, photometric_interpretation=2)]) if is_packed else icon.PixelData
    item["PixelData"].VR, item["PixelData"].is_undefined_length = "OB", is_packed
    source = packed(original, [jpeg_2000(original, photometric_interpretation=2)], JPEG_2000_LOSSLESS)
    source.IconImageSequence = Sequence([item])
    result = run(save(tmp_path, source), target)
    assert result.IconImageSequence[0].PixelData == icon.PixelData
    assert result.PixelData == original.PixelData


def test_private_elements_and_sequences_are_kept_byte_for_byte(tmp_path: Path) -> None:
    """From compressed to explicit VR nothing but pixel data, colour space and group lengths differs."""
    original = image(bits=(8, 8))
    source = save(tmp_path, packed(original, [jpeg_2000(original, photometric_interpretation=2)], JPEG_2000_LOSSLESS))
    run(source)
    before = images.dataset_bytes(source.read_bytes())
    after = images.dataset_bytes(source.with_suffix(f".{EXPLICIT[-1]}.out").read_bytes())
    pixel_data = struct.pack("<HH", 0x7FE0, 0x0010)
    assert before[: before.index(pixel_data)] == after[: after.index(pixel_data)]


def test_group_lengths_are_left_out(tmp_path: Path) -> None:
    original = image(bits=(8, 8))
    path = save(tmp_path, packed(original, [jpeg_2000(original, photometric_interpretation=2)], JPEG_2000_LOSSLESS))
    whole = path.read_bytes()
    at = whole.index(struct.pack("<HH2s", 0x0028, 0x0002, b"US"))
    path.write_bytes(whole[:at] + struct.pack("<HH2sHL", 0x0028, 0, b"UL", 4, 1234) + whole[at:])
    assert pydicom.dcmread(path)[0x0028, 0].value == 1234
    assert (0x0028, 0) not in run(path)


@pytest.mark.parametrize("target", transcode.TARGETS)
@pytest.mark.parametrize("syntax", [BIG_ENDIAN, DEFLATED, EXPLICIT, IMPLICIT])
def test_uncompressed(tmp_path: Path, syntax: str, target: str) -> None:
    original = image(signed=True)
    original.add_new(0x00280106, "SS", -5)  # US or SS: Pixel Representation tells
    original.add_new(0x00720069, "OF", struct.pack("<f", 1.5))
    original.file_meta.TransferSyntaxUID = UID(syntax)
    nested = _item()
    nested.ReferencedSOPSequence = Sequence([_item(), Dataset()])
    original.ProcedureCodeSequence = Sequence([nested])
    if syntax == BIG_ENDIAN:
        array = pixel_array(image(signed=True), raw=True)
        original.PixelData = array.astype(">i2").tobytes() + b"\0" * (array.nbytes % 2)
        original.add_new(0x00720069, "OF", struct.pack(">f", 1.5))
    path = tmp_path / "source.dcm"
    original.file_meta.MediaStorageSOPClassUID = original.SOPClassUID
    original.file_meta.MediaStorageSOPInstanceUID = original.SOPInstanceUID
    original.save_as(path, enforce_file_format=True)
    result = run(path, target)
    assert np.array_equal(pixel_array(result, raw=True), pixel_array(image(signed=True), raw=True))
    assert result.SmallestImagePixelValue == -5
    assert result[0x00720069].value == struct.pack("<f", 1.5)
    assert result.ProcedureCodeSequence[0].ReferencedSOPSequence[0].CodeMeaning == "one"
    assert len(result.ProcedureCodeSequence[0].ReferencedSOPSequence) == 2
    assert result[0x0009, 0x1001].value == bytes(range(1, 9))


# --------------------------------------------------------------------------------------------------------------------
# Damage and limits
# --------------------------------------------------------------------------------------------------------------------


def test_other_numbers_of_frames_are_refused(tmp_path: Path) -> None:
    original = image(bits=(8, 8), size=(32, 32))
    stream = jpeg_2000(original, photometric_interpretation=2)
    source = packed(original, [stream, stream], JPEG_2000_LOSSLESS)
    for told in (1, 3):
        source.NumberOfFrames = told
        with pytest.raises(transcode.CannotTranscode):
            run(save(tmp_path, source))


def test_a_frame_of_another_size_is_refused(tmp_path: Path) -> None:
    original = image(bits=(8, 8), size=(32, 32))
    source = packed(original, [jpeg_2000(original, photometric_interpretation=2)], JPEG_2000_LOSSLESS)
    source.Rows = 9
    with pytest.raises(transcode.CannotTranscode):
        run(save(tmp_path, source))


@pytest.mark.parametrize(
    ("keyword", "value", "told"),
    [("Rows", 65535, "a frame of 65535 x 65535 pixels"), ("NumberOfFrames", 2**31, "more than an element can hold")],
)
def test_what_is_too_large_is_refused_before_a_byte_is_decoded(
    tmp_path: Path, keyword: str, value: int, told: str
) -> None:
    source = packed(image(bits=(8, 8)), [b"\xff\x4f"], JPEG_2000_LOSSLESS)
    setattr(source, keyword, value)
    source.Columns = 65535 if keyword == "Rows" else source.Columns
    sink = io.BytesIO()
    with pytest.raises(transcode.CannotTranscode, match=told):
        transcode.transcode(save(tmp_path, source), sink, source_syntax=JPEG_2000_LOSSLESS, target_syntax=EXPLICIT)
    assert len(sink.getvalue()) < 2000


def test_damaged_files_end_in_one_kind_of_error(tmp_path: Path) -> None:
    original = image(bits=(8, 8), size=(32, 32))
    sources = [
        packed(original, [jpeg_2000(original, photometric_interpretation=2)], JPEG_2000_LOSSLESS),
        original,
    ]
    chance = random.Random(7)
    for source in sources:
        syntax = str(source.file_meta.TransferSyntaxUID)
        path = save(tmp_path, source)
        whole = path.read_bytes()
        for _ in range(300):
            damaged = bytearray(whole)
            for _ in range(chance.randrange(1, 4)):
                damaged[chance.randrange(144, len(damaged))] = chance.randrange(256)
            path.write_bytes(damaged[: chance.choice((len(damaged), chance.randrange(140, len(damaged))))])
            with contextlib.suppress(transcode.CannotTranscode):
                transcode.transcode(path, io.BytesIO(), source_syntax=syntax, target_syntax=IMPLICIT)


def test_a_deflated_bomb_costs_no_memory(tmp_path: Path) -> None:
    original = image(bits=(8, 8), size=(32, 32))
    original.file_meta.TransferSyntaxUID = UID(EXPLICIT)
    path = save(tmp_path, original)
    whole = path.read_bytes()
    head = len(whole) - len(images.dataset_bytes(whole))
    bomb = struct.pack("<HH2sHL", 0x0009, 0x1003, b"OB", 0, 1 << 28) + bytes(1 << 28)
    deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    path.write_bytes(whole[:head] + deflate.compress(bomb) + deflate.flush())

    class Counting:
        size = 0

        def write(self, data: bytes) -> None:
            assert len(data) <= 1 << 20
            self.size += len(data)

    sink = Counting()
    transcode.transcode(path, sink, source_syntax=DEFLATED, target_syntax=EXPLICIT)
    assert sink.size == len(bomb)


def test_what_is_asked_of_a_pacs() -> None:
    assert transcode.with_sources([EXPLICIT])[0] == EXPLICIT
    assert set(transcode.with_sources([EXPLICIT])) == set(transcode.SOURCES)
    assert transcode.with_sources([JPEG_LS, IMPLICIT])[:2] == (JPEG_LS, IMPLICIT)
    assert transcode.with_sources([JPEG_LS]) == (JPEG_LS,)
    assert not {"1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51", JPEG_LS_NEAR} & set(transcode.SOURCES)
    assert not any(uid.startswith("1.2.840.10008.1.2.4.10") for uid in transcode.SOURCES)  # MPEG: video
    assert transcode.target_of([IMPLICIT, EXPLICIT]) == EXPLICIT
    assert transcode.target_of([JPEG_LS]) is None
