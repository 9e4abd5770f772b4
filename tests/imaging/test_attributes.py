"""Texts of datasets: every character set, and what is wrong with them in the field."""

from __future__ import annotations

import io

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset

from xca_imaging.imaging.attributes import Attributes
from xca_imaging.uids import is_uid


def element(group: int, number: int, vr: str, value: bytes, pad: bytes = b" ") -> bytes:
    """PS3.5 7.1.2, explicit VR little endian, short form: tag 4, VR 2, length 2, value."""
    value += pad * (len(value) % 2)
    return (
        group.to_bytes(2, "little")
        + number.to_bytes(2, "little")
        + vr.encode()
        + len(value).to_bytes(2, "little")
        + value
    )


def read(*elements: bytes) -> Attributes:
    meta = element(0x0002, 0x0010, "UI", b"1.2.840.10008.1.2.1", b"\0")
    group_length = element(0x0002, 0x0000, "UL", len(meta).to_bytes(4, "little"))
    return Attributes(dcmread(io.BytesIO(bytes(128) + b"DICM" + group_length + meta + b"".join(elements))))


def charset(*terms: str) -> bytes:
    return element(0x0008, 0x0005, "CS", "\\".join(terms).encode())


def name(value: bytes) -> bytes:
    return element(0x0010, 0x0010, "PN", value)


@pytest.mark.parametrize(
    ("terms", "encoded", "text"),
    [
        (["ISO_IR 100"], "Buc^Jérôme".encode("latin-1"), "Buc^Jérôme"),
        (["ISO_IR 192"], "Wang^小东".encode(), "Wang^小东"),
        (["GB18030"], "Wang^小东".encode("gb18030"), "Wang^小东"),
        (["ISO_IR 144"], "Люкceмбypг".encode("iso8859_5"), "Люкceмбypг"),
        (["ISO_IR 13"], "ﾔﾏﾀﾞ^ﾀﾛｳ".encode("shift_jis"), "ﾔﾏﾀﾞ^ﾀﾛｳ"),
        # PS3.5 H.3.1: three representations, the escapes of ISO 2022
        (
            ["", "ISO 2022 IR 87"],
            b"Yamada^Tarou=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B=\x1b$B$d$^$@\x1b(B^\x1b$B$?$m$&\x1b(B",
            "Yamada^Tarou=山田^太郎=やまだ^たろう",
        ),
        # PS3.5 I.2
        (
            ["", "ISO 2022 IR 149"],
            b"Hong^Gildong=\x1b$)C\xfb\xf3^\x1b$)C\xd1\xce\xd4\xd7",
            "Hong^Gildong=洪^吉洞",
        ),
        # what breaks the rules and is read all the same
        ([], "Müller".encode(), "Müller"),
        ([], "Müller".encode("latin-1"), "Müller"),
        (["ISO_IR 192"], "Müller".encode("latin-1"), "M\ufffdller"),
        pytest.param(
            ["NO_SUCH_SET"],
            "Müller".encode("latin-1"),
            "Müller",
            marks=pytest.mark.filterwarnings("ignore:Unknown encoding"),  # pydicom's, while it reads the file
        ),
    ],
)
def test_text_is_decoded_as_declared(terms: list[str], encoded: bytes, text: str) -> None:
    declared = [charset(*terms)] if terms else []
    assert read(*declared, name(encoded)).text("PatientName") == text


def test_items_have_the_character_set_of_their_dataset_or_their_own() -> None:
    inner = element(0x0010, 0x0021, "LO", "Zürich".encode("latin-1"))
    own = charset("ISO_IR 192") + element(0x0010, 0x0021, "LO", "Zürich".encode())
    items = b"".join(b"\xfe\xff\x00\xe0" + len(each).to_bytes(4, "little") + each for each in (inner, own))
    sequence = b"\x10\x00\x02\x10SQ\0\0" + len(items).to_bytes(4, "little") + items
    ds = read(charset("ISO_IR 100"), sequence)
    assert [item.text("IssuerOfPatientID") for item in ds.items("OtherPatientIDsSequence")] == ["Zürich", "Zürich"]


def test_values_are_unpadded_and_told_apart() -> None:
    ds = read(
        element(0x0008, 0x0018, "UI", b"1.2.3", b"\0"),
        element(0x0008, 0x0061, "CS", b"CT \\ MR"),
        element(0x0010, 0x0020, "LO", b" ID 1  "),
    )
    assert ds.text("SOPInstanceUID") == "1.2.3"
    assert ds.values("ModalitiesInStudy") == ("CT", "MR")
    assert ds.text("PatientID") == "ID 1"
    assert ds.values("StudyDescription") == ()
    assert ds.text("StudyDescription") == ""


@pytest.mark.parametrize(("value", "number"), [(b"12 ", 12), (b"", None), (b"many", None), (b"1\\2", 1)])
def test_number(value: bytes, number: int | None) -> None:
    assert read(element(0x0020, 0x1208, "IS", value)).number("NumberOfStudyRelatedInstances") == number


def test_built_datasets_are_read_like_raw_ones() -> None:
    ds = Dataset()
    ds.PatientName, ds.ModalitiesInStudy, ds.NumberOfStudyRelatedSeries = "A^B", ["CT", "MR"], 3
    ds.OtherPatientIDsSequence = [Dataset()]
    read_back = Attributes(ds)
    assert read_back.text("PatientName") == "A^B"
    assert read_back.values("ModalitiesInStudy") == ("CT", "MR")
    assert read_back.number("NumberOfStudyRelatedSeries") == 3
    assert len(list(read_back.items("OtherPatientIDsSequence"))) == 1
    assert list(read_back.items("ProcedureCodeSequence")) == []
    assert read_back.first("ProcedureCodeSequence").text("CodeValue") == ""


@pytest.mark.parametrize("value", ["1.2", "2.25.0", "1.2.840.10008.01", "1." + "2" * 62])
def test_uids(value: str) -> None:
    assert is_uid(value)


@pytest.mark.parametrize("value", ["", "1", "..", "1..2", ".1.2", "1.2.", "1.2/3", "1.2\n", "١.٢", "1." + "2" * 63])
def test_no_uids(value: str) -> None:
    assert not is_uid(value)
