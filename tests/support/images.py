"""Real DICOM objects with synthetic identities: what the peers of the scenario tests hold.

The pixels come from the test files that are installed with pydicom (nothing is downloaded) and from the conformance
data beside the checkout; UIDs and patients are new in every run.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    UID,
    CTImageStorage,
    ExplicitVRLittleEndian,
    JPEGLosslessSV1,
    generate_uid,
)

from tests.support import peers

AUTHORITY = "1.3.6.1.4.1.21367.2005.13.20.1000"
"""Assigning authority of the patient ids of the tests."""

PRIVATE_SOP_CLASS = UID("2.25.141421356237309504880168872420969807")
"""A SOP class that no dictionary knows."""


@dataclass(frozen=True, slots=True)
class Instance:
    """One object in a file."""

    path: Path
    patient_id: str
    study: str
    series: str
    uid: str
    sop_class: str
    transfer_syntax: str

    @property
    def dataset_bytes(self) -> bytes:
        return dataset_bytes(self.path.read_bytes())


@dataclass(slots=True)
class Study:
    """The objects of one study."""

    uid: str
    patient_id: str
    instances: list[Instance] = field(default_factory=list)

    @property
    def paths(self) -> list[Path]:
        return [instance.path for instance in self.instances]

    @property
    def uids(self) -> set[str]:
        return {instance.uid for instance in self.instances}

    @property
    def cx(self) -> str:
        """The patient id as CX."""
        return f"{self.patient_id}^^^&{AUTHORITY}&ISO"

    @property
    def series(self) -> dict[str, list[Instance]]:
        found: dict[str, list[Instance]] = {}
        for instance in self.instances:
            found.setdefault(instance.series, []).append(instance)
        return found


def new_uid() -> str:
    """Return a UID nobody has used (PS3.5 B.2)."""
    return str(generate_uid(prefix=None))


def pydicom_file(name: str) -> Path:
    """Return one of the test files installed with pydicom, or skip the test where it is not installed."""
    file = Path(pydicom.__file__).parent / "data" / "test_files" / name
    if not file.exists():
        pytest.skip(f"pydicom's test file {name} is not installed")
    return file


def dataset_bytes(part10: bytes) -> bytes:
    """Return what follows the file meta information of a Part 10 file (PS3.10 7.1)."""
    assert part10[128:132] == b"DICM", "no DICM prefix"
    # (0002,0000) UL, length 4: PS3.10 Table 7.1-1 has it first, explicit VR little endian always
    assert part10[132:140] == b"\x02\x00\x00\x00UL\x04\x00", "no group length in front of the file meta"
    (length,) = struct.unpack("<L", part10[140:144])
    return part10[144 + length :]


def transfer_syntax(part10: bytes) -> str:
    """Return the Transfer Syntax UID of a Part 10 file."""
    from io import BytesIO

    return str(pydicom.dcmread(BytesIO(part10), stop_before_pixels=True).file_meta.TransferSyntaxUID)


def new_patient(prefix: str = "TEST") -> str:
    """Return a patient id nobody has used, short enough for LO."""
    return f"{prefix}-{generate_uid(prefix=None)[-12:]}"


def write(
    folder: Path,
    dataset: Dataset,
    *,
    patient_id: str,
    study: str,
    series: str,
    uid: str = "",
    number: int = 1,
    accession: str = "",
    issuer: str = AUTHORITY,
) -> Instance:
    """Write a copy of a dataset with another identity; pixel data stay as they are encoded."""
    uid = uid or new_uid()
    dataset.PatientID, dataset.PatientName = patient_id, "Test^Synthetic"
    dataset.PatientBirthDate, dataset.PatientSex = "19700101", "O"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.SOPInstanceUID = study, series, uid
    dataset.AccessionNumber = accession
    dataset.InstanceNumber = str(number)
    if "StudyDate" not in dataset or not dataset.StudyDate:
        dataset.StudyDate, dataset.StudyTime = "20260102", "030405"
    if issuer:
        qualifiers = Dataset()
        qualifiers.UniversalEntityID, qualifiers.UniversalEntityIDType = issuer, "ISO"
        dataset.IssuerOfPatientIDQualifiersSequence = Sequence([qualifiers])
    else:
        for keyword in ("IssuerOfPatientID", "IssuerOfPatientIDQualifiersSequence"):
            if keyword in dataset:
                delattr(dataset, keyword)
    dataset.file_meta.MediaStorageSOPInstanceUID = uid
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{uid}.dcm"
    dataset.save_as(path, enforce_file_format=True)
    return Instance(
        path, patient_id, study, series, uid, str(dataset.SOPClassUID), str(dataset.file_meta.TransferSyntaxUID)
    )


def study_of(
    folder: Path, sources: Iterable[Path], *, patient_id: str = "", one_series: bool = True, accession: str = ""
) -> Study:
    """Return a new study with a copy of each file, in one series or in one series each."""
    study = Study(new_uid(), patient_id or new_patient())
    series = new_uid()
    for number, source in enumerate(sources, 1):
        study.instances.append(
            write(
                folder,
                pydicom.dcmread(source),
                patient_id=study.patient_id,
                study=study.uid,
                series=series if one_series else new_uid(),
                number=number,
                accession=accession,
            )
        )
    return study


def ct(folder: Path, count: int = 4, *, patient_id: str = "", accession: str = "") -> Study:
    """Return a CT series (explicit VR little endian, 39 KB each)."""
    return study_of(folder, [pydicom_file("CT_small.dcm")] * count, patient_id=patient_id, accession=accession)


def mr(folder: Path, *, patient_id: str = "") -> Study:
    """Return MR images in explicit and implicit VR little endian, one series each."""
    names = ["MR_small.dcm", "MR_small_implicit.dcm", "MR_small.dcm"]
    return study_of(folder, map(pydicom_file, names), patient_id=patient_id, one_series=False)


def compressed(folder: Path, *, patient_id: str = "") -> Study:
    """Return images in JPEG baseline, JPEG 2000 (both), JPEG-LS (both) and RLE, one series each."""
    names = [
        "SC_rgb_jpeg_dcmtk.dcm",
        "JPEG2000.dcm",
        "MR_small_jp2klossless.dcm",
        "MR_small_jpeg_ls_lossless.dcm",
        "MR_small_RLE.dcm",
    ]
    return study_of(folder, map(pydicom_file, names), patient_id=patient_id, one_series=False)


def jpeg_lossless(folder: Path, count: int = 2, *, patient_id: str = "") -> Study:
    """Return CT images in JPEG lossless SV1, encoded by DCMTK's `dcmcjpeg`."""
    encoder = peers.program("dcmcjpeg")
    plain = ct(folder / "plain", count, patient_id=patient_id)
    study = Study(plain.uid, plain.patient_id)
    for instance in plain.instances:
        path = folder / f"{instance.uid}.dcm"
        # +un: keep the SOP Instance UID
        peers.run(encoder, "+un", str(instance.path), str(path))
        dataset = pydicom.dcmread(path, stop_before_pixels=True)
        assert dataset.SOPInstanceUID == instance.uid
        assert dataset.file_meta.TransferSyntaxUID == JPEGLosslessSV1
        study.instances.append(
            Instance(
                path,
                study.patient_id,
                study.uid,
                instance.series,
                instance.uid,
                instance.sop_class,
                str(JPEGLosslessSV1),
            )
        )
    return study


def multi_frame(folder: Path, *, patient_id: str = "") -> Study:
    """Return an RT Dose of 15 frames and a two-frame RLE image, one series each."""
    return study_of(
        folder,
        map(pydicom_file, ["rtdose.dcm", "SC_rgb_rle_2frame.dcm"]),
        patient_id=patient_id,
        one_series=False,
    )


def structured_report(folder: Path, *, patient_id: str = "") -> Study:
    """Return structured reports."""
    names = ["test-SR.dcm", "reportsi.dcm"]
    return study_of(folder, map(pydicom_file, names), patient_id=patient_id, one_series=False)


def private_class(folder: Path, *, patient_id: str = "") -> Study:
    """Return an object of a private SOP class with private elements."""
    study = Study(new_uid(), patient_id or new_patient())
    dataset = Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = PRIVATE_SOP_CLASS
    dataset.Modality = "OT"
    block = dataset.private_block(0x0099, "SYNTHETIC TEST", create=True)
    block.add_new(0x01, "LO", "private text")
    block.add_new(0x02, "OB", bytes(range(256)) * 40)
    study.instances.append(
        write(folder, dataset, patient_id=study.patient_id, study=study.uid, series=new_uid(), number=1)
    )
    return study


def dicomdir_series(folder: Path, *, patient_id: str = "") -> Study:
    """Return the CT and MR series of pydicom's DICOMDIR tests as one study: many small objects in several series."""
    root = pydicom_file("dicomdirtests/98892001/CT2N/6293").parents[2]
    study = Study(new_uid(), patient_id or new_patient())
    for directory in ("98892001/CT5N", "98892001/CT2N", "98892003/MR1", "98892003/MR2", "98892003/MR700"):
        series = new_uid()
        for number, file in enumerate(sorted((root / directory).iterdir()), 1):
            study.instances.append(
                write(
                    folder,
                    pydicom.dcmread(file),
                    patient_id=study.patient_id,
                    study=study.uid,
                    series=series,
                    number=number,
                )
            )
    return study


@cache
def _slice_pixels(side: int) -> bytes:
    """A ramp: cheap, and different in every row."""
    row = struct.pack(f"<{side}H", *(n % 4096 for n in range(side)))
    return b"".join(row[n * 2 % len(row) :] + row[: n * 2 % len(row)] for n in range(side))


def big_ct(folder: Path, count: int, *, side: int = 512, series_count: int = 1, patient_id: str = "") -> Study:
    """Return a synthetic CT of `count` slices of side x side x 2 bytes (512 x 512: 512 KiB each).

    The file is encoded once; each slice is a copy with its own SOP Instance UID and Instance Number, patched at equal
    length: a thousand slices cost what writing them costs.
    """
    study = Study(new_uid(), patient_id or new_patient())
    per_series = -(-count // series_count)
    for start in range(0, count, per_series):
        series = new_uid()
        dataset = pydicom.dcmread(pydicom_file("CT_small.dcm"))
        dataset.Rows = dataset.Columns = side
        dataset.BitsAllocated = dataset.BitsStored = 16
        dataset.HighBit, dataset.PixelRepresentation, dataset.SamplesPerPixel = 15, 0, 1
        dataset.PixelData = _slice_pixels(side)
        if "DataSetTrailingPadding" in dataset:
            del dataset.DataSetTrailingPadding
        assert dataset.SOPClassUID == CTImageStorage
        base = f"2.25.{generate_uid(prefix=None)[-20:].lstrip('0').rjust(20, '1')}"
        first = write(
            folder, dataset, patient_id=study.patient_id, study=study.uid, series=series, uid=f"{base}.100000", number=1
        )
        template = first.path.read_bytes()
        first.path.unlink()
        for index in range(min(per_series, count - start)):
            uid = f"{base}.{100000 + index}"
            path = folder / f"{uid}.dcm"
            path.write_bytes(template.replace(first.uid.encode(), uid.encode()))
            study.instances.append(
                Instance(
                    path, study.patient_id, study.uid, series, uid, str(CTImageStorage), str(ExplicitVRLittleEndian)
                )
            )
    return study
