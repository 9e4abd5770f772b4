"""The journal of a spool: which of its files are whole, and what they are, for the run after this one.

A line for each fact, appended; the last word on a file counts. A line is only ever added after the file it speaks of
was written whole, so a process that dies at any moment leaves files that the journal does not know, never the other way
round. Nothing is synced to the disk: after a power failure lines and files may be gone or damaged, which the checksum
of each line and of each file shows. What the spool holds is a copy of what a PACS has; losing it costs a transfer.

A database would do too; one `write(2)` of 300 bytes for an instance costs a tenth of its insert, in the receive path.

::

    <CRC-32 of the rest, 8 hex digits> SP <JSON array> LF

    ["J", version]                       first line of a file
    ["L", number, [uid, ...]]            a list of transfer syntaxes, for the instances that name it
    ["I", name, size, checksum, sop_class_uid, sop_instance_uid, transfer_syntax_uid,
          study_instance_uid, series_instance_uid, source, list number, bytes_changed, sha256, time]
    ["U", name, time]                    it was used last then
    ["S", name, sha256]                  its SHA-256 is known now

Times are seconds since the epoch. Files are `journal-<number>`, read in the order of their numbers. To compact, the
next file is begun, and what the ones before it say is written anew, in another thread, as the last of them.
"""

from __future__ import annotations

import json
import logging
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)

_VERSION = 1
_NAME = re.compile(r"journal-([0-9a-f]{8})")
_NO_SYNTAXES: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Record:
    """One whole instance. `name` is of its file, `used_at` in seconds since the epoch, `checksum` XXH3-128 in hex."""

    name: str
    size: int
    checksum: str
    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    study_instance_uid: str
    series_instance_uid: str
    source: str
    accept: frozenset[str]
    bytes_changed: bool
    sha256: str | None
    used_at: float


class Journal:
    """The journal of one run. `append...` never raises: what is not written is only not trusted by the next run.

    Parameters
    ----------
    directory : Path
        Nobody else writes there.
    records : iterable of Record
        What still holds of the runs before: this run's journal begins with it, and theirs are removed.

    Attributes
    ----------
    number : int
        Of the current file; higher than any of an earlier run.
    lines : int
        In it.
    """

    # Mutable state: number and descriptor of the current file (number, _fd), lists that it names (_lists), lines
    # written since the last compaction (lines), and whether the last line came out short (_is_torn).

    def __init__(self, directory: Path, records: Iterable[Record]) -> None:
        self._directory = directory
        older = _files(directory)
        self.number = max(older, default=0) + 1
        self._rewrite(self.number, records)
        for file in older.values():
            file.unlink()
        self._begin_file()

    def append(self, record: Record) -> None:
        """Say that an instance is whole, and what is known of it."""
        number = self._lists.get(record.accept)
        if number is None:
            number = self._lists[record.accept] = len(self._lists)
            self._write(["L", number, sorted(record.accept)])
        self._write(_fields(record, number))

    def append_use(self, names: Iterable[str], used_at: float) -> None:
        """Say when files were used last."""
        self._write(*(["U", name, round(used_at, 3)] for name in names))

    def append_sha256(self, name: str, sha256: str) -> None:
        """Say what the SHA-256 of a file is."""
        self._write(["S", name, sha256])

    def begin_next(self) -> int:
        """Go on in the next file; return the number of the one before, for `rewrite_until`."""
        os.close(self._fd)
        number = self.number
        self._begin_file()
        return number

    def rewrite_until(self, number: int, records: Iterable[Record]) -> None:
        """Write anew what all files up to `number` say, in another thread; harmless when it does not end."""
        self._rewrite(number, records)
        for other, file in _files(self._directory).items():
            if other < number:
                file.unlink()

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def _begin_file(self) -> None:
        self.number += 1
        self._lists: dict[frozenset[str], int] = {}
        self.lines = 0
        self._is_torn = False
        path = self._directory / _file_name(self.number)
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._write(["J", _VERSION])

    def _write(self, *lines: list[Any]) -> None:
        data = b"".join(map(_line, lines))
        if self._is_torn:
            data = b"\n" + data
        try:
            self._is_torn = os.write(self._fd, data) < len(data)
        except OSError as exc:
            if not self._is_torn:
                _log.warning("the journal of the spool cannot be written: %s", exc)
            self._is_torn = True
        self.lines += len(lines)

    def _rewrite(self, number: int, records: Iterable[Record]) -> None:
        lists: dict[frozenset[str], int] = {}
        temporary = self._directory / "journal.new"
        with temporary.open("wb") as file:
            file.write(_line(["J", _VERSION]))
            for record in records:
                listed = lists.get(record.accept)
                if listed is None:
                    listed = lists[record.accept] = len(lists)
                    file.write(_line(["L", listed, sorted(record.accept)]))
                file.write(_line(_fields(record, listed)))
        temporary.replace(self._directory / _file_name(number))


def read(directory: Path) -> list[Record]:
    """Return what the journals of earlier runs say, the longest unused first; lines that are damaged say nothing."""
    records: dict[str, Record] = {}
    for _, file in sorted(_files(directory).items()):
        lists: dict[int, frozenset[str]] = {}
        lines = _lines(file)
        if next(lines, None) != ["J", _VERSION]:
            continue
        for fields in lines:
            match fields:
                case ["L", int(number), list(syntaxes)]:
                    lists[number] = frozenset(syntaxes)
                case ["I", str(name), size, checksum, sop_class, sop, syntax, study, series, source, listed, *rest]:
                    changed, sha256, used_at = rest
                    accept = lists.get(listed, _NO_SYNTAXES)
                    records[name] = Record(
                        name,
                        size,
                        checksum,
                        sop_class,
                        sop,
                        syntax,
                        study,
                        series,
                        source,
                        accept,
                        changed,
                        sha256,
                        used_at,
                    )
                case ["U", name, float(used_at)] if name in records:
                    records[name] = replace(records[name], used_at=used_at)
                case ["S", name, str(sha256)] if name in records:
                    records[name] = replace(records[name], sha256=sha256)
                case _:
                    pass
    return sorted(records.values(), key=lambda record: record.used_at)


def _fields(record: Record, number: int) -> list[Any]:
    return [
        "I",
        record.name,
        record.size,
        record.checksum,
        record.sop_class_uid,
        record.sop_instance_uid,
        record.transfer_syntax_uid,
        record.study_instance_uid,
        record.series_instance_uid,
        record.source,
        number,
        record.bytes_changed,
        record.sha256,
        round(record.used_at, 3),
    ]


def _line(fields: list[Any]) -> bytes:
    text = json.dumps(fields, separators=(",", ":")).encode("ascii")
    return b"%08x %b\n" % (zlib.crc32(text), text)


def _lines(file: Path) -> Iterator[Any]:
    with file.open("rb") as stream:
        for line in stream:
            text = line[9:].rstrip(b"\n")
            if line[:8] == b"%08x" % zlib.crc32(text):
                yield json.loads(text)


def _files(directory: Path) -> dict[int, Path]:
    found = ((_NAME.fullmatch(path.name), path) for path in directory.iterdir())
    return {int(match[1], 16): path for match, path in found if match}


def _file_name(number: int) -> str:
    return f"journal-{number:08x}"
