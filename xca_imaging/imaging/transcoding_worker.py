"""A process that transcodes, one job at a time: what decoders do with memory and crashes stays in it.

It is started by `imaging/transcoders.py` and ends with its standard input, whatever it is doing then. A line of JSON
comes in for each job and goes out for each word about it:

    in    {"source", "target", "source_syntax", "target_syntax", "head"}   head: File Meta Information, base64
    out   {"room": n}                       before it writes past what it may; the answer is {"granted": true | false}
    out   {"size": n, "checksum": "..."}    done
    out   {"refused": "..."} | {"no_room": "..."} | {"failed": "..."}
"""

from __future__ import annotations

import base64
import json
import logging
import os
import queue
import resource
import sys
import threading
import warnings
from pathlib import Path
from typing import Any, BinaryIO

from xxhash import xxh3_128

from xca_imaging.imaging.transcode import CannotTranscode, transcode

_ROOM = 16 << 20  # bytes that are asked for at a time


class NoRoom(Exception):
    """The spool has no room for the result."""


class _Output:
    """The result's file: counted, checked, and never longer than what the spool has granted."""

    def __init__(self, file: BinaryIO, worker: _Worker) -> None:
        self._file, self._worker = file, worker
        self._checksum = xxh3_128()
        self.size = self._granted = 0

    def write(self, data: bytes | memoryview) -> None:
        if self.size + len(data) > self._granted:
            length = max(_ROOM, len(data))
            self._worker.ask_room(length)
            self._granted += length
        self._file.write(data)
        self._checksum.update(data)
        self.size += len(data)

    @property
    def checksum(self) -> str:
        return self._checksum.hexdigest()


class _Worker:
    def __init__(self, answers: int) -> None:
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._answers = answers
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in sys.stdin.buffer:
            self._lines.put(line)
        os._exit(0)  # the parent is gone or wants no more: a decoder would not listen

    def _say(self, **word: Any) -> None:
        os.write(self._answers, json.dumps(word).encode() + b"\n")

    def ask_room(self, length: int) -> None:
        self._say(room=length)
        if not json.loads(self._lines.get())["granted"]:
            raise NoRoom

    def run(self) -> None:
        while True:
            job = json.loads(self._lines.get())
            target = Path(job["target"])
            try:
                self._say(**self._do(job, target))
            except CannotTranscode as exc:
                self._fail(target, refused=str(exc))
            except MemoryError:
                self._fail(target, refused="it needs more memory than a job may take")
            except NoRoom:
                self._fail(target, no_room="the spool has no room for the transcoded instance")
            except Exception as exc:
                logging.getLogger(__name__).exception("transcoding failed")
                self._fail(target, failed=f"{type(exc).__name__}: {exc}")

    def _do(self, job: dict[str, str], target: Path) -> dict[str, Any]:
        with target.open("xb") as file:
            output = _Output(file, self)
            output.write(base64.b64decode(job["head"]))
            transcode(
                Path(job["source"]), output, source_syntax=job["source_syntax"], target_syntax=job["target_syntax"]
            )
        return {"size": output.size, "checksum": output.checksum}

    def _fail(self, target: Path, **word: str) -> None:
        target.unlink(missing_ok=True)
        self._say(**word)


def _data_in_use() -> int:
    """Return the bytes of this process that RLIMIT_DATA counts (proc(5), VmData)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmData in /proc/self/status")


def main() -> None:
    """Serve until standard input ends; the argument is how many bytes of memory the data of jobs may take."""
    answers = os.dup(1)
    os.dup2(2, 1)  # libraries may print
    warnings.simplefilter("ignore")
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    import numpy  # noqa: F401 - both count into what is there before the first job
    import pydicom.pixels  # noqa: F401

    limit = int(sys.argv[1]) + _data_in_use()
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    _Worker(answers).run()


if __name__ == "__main__":
    main()
