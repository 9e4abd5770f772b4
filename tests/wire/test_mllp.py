"""MLLP blocks: the same bytes whole, byte by byte, and several in one read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xca_imaging.errors import MessageTooLarge, RemoteProtocolError
from xca_imaging.wire.mllp import Reader, frame

MESSAGES = st.lists(st.binary(max_size=40).map(lambda data: data.translate(None, b"\x0b\x1c")), max_size=5)


def received(data: bytes, size: int, **options: int) -> list[bytes]:
    reader = Reader(**options)
    found: list[bytes] = []
    for start in range(0, len(data), size):
        found += reader.receive(data[start : start + size])
    return found


@given(messages=MESSAGES, size=st.integers(1, 60))
def test_messages_are_read_however_they_are_cut(messages, size):
    assert received(b"".join(map(frame, messages)), size) == messages


@pytest.mark.parametrize("size", [1, 100])
@pytest.mark.parametrize(
    "stream",
    [
        b"\x0bMSH|1\x1c\r\x0bMSH|2\x1c\r",
        b"\r\n\x0bMSH|1\x1c\r\n\n\x0bMSH|2\x1c\r",  # line ends between blocks
        b"\x0bMSH|1\x1c\x0bMSH|2\x1c",  # CR left out
    ],
)
def test_what_stands_between(stream, size):
    assert received(stream, size) == [b"MSH|1", b"MSH|2"]


@pytest.mark.parametrize("size", [1, 100])
@pytest.mark.parametrize("stream", [b"MSH|1\x1c\r", b"\x0bMSH|1\x1c\rMSH|2", b"\x1c\r", b"GET / HTTP/1.1\r\n"])
def test_bytes_outside_of_a_block(stream, size):
    with pytest.raises(RemoteProtocolError, match="outside"):
        received(stream, size)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_message_without_end(size):
    assert received(frame(b"a" * 64), size, max_message=64) == [b"a" * 64]
    with pytest.raises(MessageTooLarge):
        received(b"\x0b" + b"a" * 65, size, max_message=64)


def test_a_message_that_has_begun():
    reader = Reader()
    assert not reader.is_inside
    reader.receive(b"\x0bMSH")
    assert reader.is_inside
    reader.receive(b"|\x1c")
    assert not reader.is_inside
