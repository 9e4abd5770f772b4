"""File Meta Information off a stream: the same however it is cut, bounded, and never more than a typed error."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xca_imaging.imaging.file_meta import encode_file_meta
from xca_imaging.imaging.part10 import Part10Error
from xca_imaging.imaging.part10_head import MAX_FILE_META, FileMeta, HeadReader

META = FileMeta("1.2.840.10008.5.1.4.1.1.2", "1.2.3", "1.2.840.10008.1.2.1")
HEAD = encode_file_meta(
    sop_class_uid=META.sop_class_uid,
    sop_instance_uid=META.sop_instance_uid,
    transfer_syntax_uid=META.transfer_syntax_uid,
    source_ae_title="PACS",
)


def test_whole_with_what_follows() -> None:
    reader = HeadReader()
    assert reader.receive(memoryview(HEAD + b"data")) == len(HEAD)
    assert reader.meta == META


@given(st.integers(1, len(HEAD) - 1))
def test_cut_anywhere(cut: int) -> None:
    reader = HeadReader()
    assert reader.receive(memoryview(HEAD[:cut])) is None
    assert reader.receive(memoryview(HEAD[cut:])) == len(HEAD) - cut
    assert reader.meta == META


def test_byte_by_byte() -> None:
    reader = HeadReader()
    assert [reader.receive(memoryview(HEAD)[n : n + 1]) for n in range(len(HEAD))] == [None] * (len(HEAD) - 1) + [1]


def test_private_information_is_passed_over() -> None:
    private = struct.pack("<HH2s2xL", 0x0002, 0x0102, b"OB", 6) + b"secret"
    length = len(HEAD) - 144 + len(private)
    head = HEAD[:140] + struct.pack("<L", length) + HEAD[144:] + private
    reader = HeadReader()
    assert reader.receive(memoryview(head)) == len(head)
    assert reader.meta == META


@pytest.mark.parametrize(
    "data",
    [
        bytes(200),
        HEAD[:140] + struct.pack("<L", 0) + HEAD[144:],
        HEAD[:140] + struct.pack("<L", MAX_FILE_META + 1) + bytes(MAX_FILE_META),
        HEAD[:144].replace(HEAD[140:144], struct.pack("<L", 10)) + HEAD[144:],
    ],
)
def test_what_is_no_head(data: bytes) -> None:
    with pytest.raises(Part10Error):
        HeadReader().receive(memoryview(data))


@given(st.binary(max_size=100), st.integers(0, len(HEAD)))
def test_noise_is_never_more_than_a_typed_error(noise: bytes, at: int) -> None:
    data = HEAD[:at] + noise + HEAD[at + len(noise) :]
    with contextlib.suppress(Part10Error):
        HeadReader().receive(memoryview(data))
