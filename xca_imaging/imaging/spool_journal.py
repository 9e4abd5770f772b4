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
from json.encoder import encode_basestring_ascii as _quoted
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xca_imaging.imaging.spooled import SpooledInstance

_log = logging.getLogger(__name__)

_VERSION = 1
_NAME = re.compile(r"journal-([0-9a-f]{8})")
_NO_SYNTAXES: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Record:
    """One whole instance, as an earlier run left it; `used_at` in seconds since the epoch."""

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
    kept : iterable of (SpooledInstance, float)
        What still holds of the runs before, with the times of last use: this run's journal begins with it, and theirs
        are removed.

    Attributes
    ----------
    number : int
        Of the current file; higher than any of an earlier run.
    lines : int
        In it.
    """

    # Mutable state: number and descriptor of the current file (number, _fd), lists that it names (_lists), lines
    # written since the last compaction (lines), and whether the last line came out short (_is_torn).

    def __init__(self, directory: Path, kept: Iterable[tuple[SpooledInstance, float]]) -> None:
        self._directory = directory
        older = _files(directory)
        self.number = max(older, default=0) + 1
        self._rewrite(self.number, kept)
        for file in older.values():
            file.unlink()
        self._begin_file()

    def append(self, instance: SpooledInstance, used_at: float) -> None:
        """Say that an instance is whole, and what is known of it."""
        number = self._lists.get(instance.accept)
        if number is None:
            number = self._lists[instance.accept] = len(self._lists)
            self._write(_line(["L", number, sorted(instance.accept)]))
        self._write(_instance_line(instance, number, used_at))

    def append_use(self, names: Iterable[str], used_at: float) -> None:
        """Say when files were used last."""
        lines = [_line(["U", name, round(used_at, 3)]) for name in names]
        if lines:
            self._write(b"".join(lines), len(lines))

    def append_sha256(self, name: str, sha256: str) -> None:
        """Say what the SHA-256 of a file is."""
        self._write(_line(["S", name, sha256]))

    def begin_next(self) -> int:
        """Go on in the next file; return the number of the one before, for `rewrite_until`."""
        os.close(self._fd)
        number = self.number
        self._begin_file()
        return number

    def rewrite_until(self, number: int, kept: Iterable[tuple[SpooledInstance, float]]) -> None:
        """Write anew what all files up to `number` say, in another thread; harmless when it does not end."""
        self._rewrite(number, kept)
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
        self._write(_line(["J", _VERSION]))

    def _write(self, data: bytes, lines: int = 1) -> None:
        if self._is_torn:
            data = b"\n" + data
        try:
            self._is_torn = os.write(self._fd, data) < len(data)
        except OSError as exc:
            if not self._is_torn:
                _log.warning("the journal of the spool cannot be written: %s", exc)
            self._is_torn = True
        self.lines += lines

    def _rewrite(self, number: int, kept: Iterable[tuple[SpooledInstance, float]]) -> None:
        lists: dict[frozenset[str], int] = {}
        temporary = self._directory / "journal.new"
        with temporary.open("wb") as file:
            file.write(_line(["J", _VERSION]))
            for instance, used_at in kept:
                listed = lists.get(instance.accept)
                if listed is None:
                    listed = lists[instance.accept] = len(lists)
                    file.write(_line(["L", listed, sorted(instance.accept)]))
                file.write(_instance_line(instance, listed, used_at))
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


def _instance_line(instance: SpooledInstance, number: int, used_at: float) -> bytes:
    """Return the line of an instance; spelled out, as there is one for each that arrives."""
    sha256 = f'"{instance.sha256}"' if instance.sha256 else "null"
    return _checked(
        f'["I","{instance.name}",{instance.size},"{instance.checksum}",{_quoted(instance.sop_class_uid)},'
        f"{_quoted(instance.sop_instance_uid)},{_quoted(instance.transfer_syntax_uid)},"
        f"{_quoted(instance.study_instance_uid)},{_quoted(instance.series_instance_uid)},{_quoted(instance.source)},"
        f"{number},{'true' if instance.bytes_changed else 'false'},{sha256},{used_at:.3f}]"
    )


def _line(fields: list[Any]) -> bytes:
    return _checked(json.dumps(fields, separators=(",", ":")))


def _checked(text: str) -> bytes:
    data = text.encode("ascii")
    return b"%08x %b\n" % (zlib.crc32(data), data)


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
