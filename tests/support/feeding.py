"""The same bytes, fed in different pieces: what a reader returns may not depend on how they were cut.

A reader is anything with `receive(chunk)` that returns (or yields) events. `keep` turns an event into a value that
outlives the chunk: events may hold views of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol


class Reader(Protocol):
    def receive(self, data: bytes, /) -> Iterable[Any]: ...


def _same(event: Any) -> Any:
    return event


def feed(reader: Reader, chunks: Iterable[bytes], keep: Callable[[Any], Any] = _same) -> list[Any]:
    """Feed chunks and return what the reader made of them; the chunk is gone before the next one comes."""
    kept = []
    for chunk in chunks:
        kept += [keep(event) for event in reader.receive(chunk)]
    return kept


def feed_whole(reader: Reader, data: bytes, keep: Callable[[Any], Any] = _same) -> list[Any]:
    """Feed everything at once."""
    return feed(reader, [data], keep)


def feed_bytewise(reader: Reader, data: bytes, keep: Callable[[Any], Any] = _same) -> list[Any]:
    """Feed one byte at a time."""
    return feed(reader, pieces(data, [1]), keep)


def pieces(data: bytes, sizes: Sequence[int]) -> Iterator[bytes]:
    """Cut data into pieces of the given sizes, repeating them to its end (sizes below 1 count as 1)."""
    at = turn = 0
    while at < len(data):
        size = max(1, sizes[turn % len(sizes)] if sizes else len(data))
        yield data[at : at + size]
        at += size
        turn += 1
