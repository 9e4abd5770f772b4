"""How fast a study comes out of a PACS through the node, beside DCMTK, Orthanc's own WADO-RS and the lower bound.

Run `python -m tests.bench.bench_transfer [--json FILE]`. Ratios are what counts: seconds differ between machines.

Cases
-----
cold
    RAD-69 of a CT study of 400 x 512 KB in four series from Orthanc, nothing held before, from the request to the last
    byte; beside `movescu` of the same study into DCMTK's `storescp --bit-preserving`, as a whole process. Each round
    has a study of its own, and the two are interleaved.
held
    The same study again while it is held; beside Orthanc's own WADO-RS of it, by the same client.
paced
    400 objects in four series at a PACS that needs 20 ms for each and takes four associations: beside the lower bound,
    number of objects x time for each / associations.

TCP_NODELAY=1 is set for every program of DCMTK and Orthanc: without it the node's lead is the 40 ms that DCMTK's
receiver makes Nagle's algorithm wait for each object. The JSON also holds the timeline of one cold retrieval.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydicom import Dataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian
from pynetdicom.dsutils import encode
from rich.console import Console
from rich.table import Table

from tests.support import images, peers, soap_client
from tests.support.node import RETRIEVE_LOCATION, Node, pacs_section
from tests.support.scripted_pacs import Archive, Move, ScriptedPacs
from xca_imaging import uids
from xca_imaging.wire import dimse, pdu

ROOT = "1.2.826.0.1.3680043.8.498.78"  # synthetic UIDs
COUNT, SERIES, ROUNDS = 400, 4, 5
PACED_LATENCY, PACED_ASSOCIATIONS = 0.02, 4
DEADLINE = 120.0
MEMORY = Path("/dev/shm")  # tmpfs, on Linux: a disk's own work would weigh more than what is measured
WORKSPACE_BYTES = 8_000_000_000  # six studies at the PACS, in the spool, and one at the reference receiver
BARS = (("cold", 0.8), ("held", 1.0), ("paced", 1.1))
"""(case, highest ratio of the node's best time to the other's best)."""


@dataclass
class Figures:
    """Seconds of the node and of what stands beside it, one each per round."""

    node: list[float] = field(default_factory=list)
    other: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        return min(self.node) / min(self.other)


# --------------------------------------------------------------------------------------------------------------------
# Clients
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Instance:
    study: str
    series: str
    uid: str


def rad69(instances: Sequence[Any], repository: str, node: Node) -> tuple[str, dict[str, str], bytes]:
    """Return URL, headers and body of a RAD-69 request."""
    transaction = soap_client.RAD69
    url = node.url(transaction.path)
    body = soap_client.retrieve_images(instances, repository=repository)
    block = soap_client.headers_block(transaction.action, url, message_id=soap_client.new_message_id())
    content_type, raw = soap_client.package(soap_client.envelope(body, block), (), action=transaction.action)
    return url, {"Content-Type": content_type}, raw


def fetch(
    url: str, headers: dict[str, str], body: bytes | None = None, trace: list[tuple[float, int]] | None = None
) -> tuple[float, int, bytes]:
    """Send a request and read its answer to the last byte; return seconds, bytes and the first of them."""
    parts = urlsplit(url)
    buffer = bytearray(1 << 20)
    started = time.monotonic()
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=DEADLINE)
    connection.request("GET" if body is None else "POST", parts.path, body=body, headers=headers)
    response = connection.getresponse()
    assert response.status == 200, response.read()
    size, head = 0, b""
    while got := response.readinto(buffer):
        head = head or bytes(buffer[: min(got, 4096)])
        size += got
        if trace is not None:
            trace.append((time.monotonic(), size))
    seconds = time.monotonic() - started
    connection.close()
    return seconds, size, head


def retrieve(node: Node, study: images.Study, trace: list[tuple[float, int]] | None = None) -> float:
    """Retrieve a study by RAD-69; return the seconds from the request to the last byte."""
    url, headers, body = rad69(study.instances, RETRIEVE_LOCATION, node)
    seconds, size, head = fetch(url, headers, body, trace)
    assert size > COUNT * 512 * 1024, f"only {size} bytes came: {head[:2000]!r}"
    return seconds


def wado_rs(pacs: peers.Orthanc, study: images.Study) -> float:
    """Retrieve a study by Orthanc's WADO-RS."""
    url = f"{pacs.url}/dicom-web/studies/{study.uid}"
    seconds, size, _ = fetch(url, {"Accept": 'multipart/related; type="application/dicom"'})
    assert size > COUNT * 512 * 1024
    return seconds


def move(pacs: peers.Orthanc, reference: peers.StoreScp, study: images.Study) -> float:
    """Move a study into DCMTK's receiver."""
    for file in reference.received.iterdir():
        file.unlink()
    started = time.monotonic()
    peers.movescu(pacs, reference.ae_title, study.uid)
    seconds = time.monotonic() - started
    assert len(list(reference.received.iterdir())) == COUNT
    return seconds


# --------------------------------------------------------------------------------------------------------------------
# The cases with Orthanc
# --------------------------------------------------------------------------------------------------------------------


def upload(pacs: peers.Orthanc, study: images.Study) -> None:
    folder = study.paths[0].parent
    peers.run(peers.program("storescu"), "-aec", pacs.ae_title, "+sd", pacs.host, str(pacs.port), str(folder))
    shutil.rmtree(folder)


def bench_orthanc(folder: Path, rounds: int) -> tuple[Figures, Figures, dict[str, Any]]:
    """Run `cold` and `held`; return their figures and the timeline of the last cold retrieval."""
    cold, held = Figures(), Figures()
    trace_file = folder / "trace.jsonl"
    node = Node(folder / "node", {"spool": {"max_bytes": "6GB"}})
    node.command = [sys.executable, "-m", "tests.bench.traced_node", str(trace_file)]
    with (
        peers.StoreScp(folder / "reference") as reference,
        peers.Orthanc(folder / "pacs", [node.entity, reference.entity], dicomweb=True) as pacs,
    ):
        warm_up, *studies = (images.big_ct(folder / f"study{n}", COUNT, series_count=SERIES) for n in range(rounds + 1))
        for study in (warm_up, *studies):
            upload(pacs, study)
        node.config["pacs"] = [pacs_section(pacs, max_associations=4)]
        with node:
            retrieve(node, warm_up)
            move(pacs, reference, warm_up)
            wado_rs(pacs, warm_up)
            for study in studies:
                leaving: list[tuple[float, int]] = []
                asked_at = time.monotonic()
                cold.node.append(retrieve(node, study, leaving))
                cold.other.append(move(pacs, reference, study))
                held.node.append(retrieve(node, study))
                held.other.append(wado_rs(pacs, study))
    return cold, held, timeline(trace_file, asked_at, leaving)


def timeline(trace: Path, asked_at: float, leaving: Sequence[tuple[float, int]]) -> dict[str, Any]:
    """Return one retrieval as intervals and steps, in seconds from its request."""
    ended_at = leaving[-1][0]
    moves: dict[int, dict[str, Any]] = {}
    associations: dict[int, dict[str, Any]] = {}
    arrivals: list[tuple[float, int]] = []
    arrived = 0
    for line in trace.read_text().splitlines():
        event = json.loads(line)
        at = event["at"] - asked_at
        if not 0 <= at <= ended_at - asked_at:
            continue
        match event["what"]:
            case "move started":
                moves[event["move"]] = {"start": at, "end": at, "level": event["level"]}
            case "move finished" if event["move"] in moves:
                moves[event["move"]]["end"] = at
            case "instance begun":
                associations.setdefault(event["association"], {"start": at, "end": at, "instances": 0})
            case "instance arrived":
                associations[event["association"]]["instances"] += 1
                associations[event["association"]]["end"] = at
                arrived += event["size"]
                arrivals.append((at, arrived))
    return {
        "seconds": ended_at - asked_at,
        "moves": list(moves.values()),
        "associations": list(associations.values()),
        "bytes_arrived": arrivals,
        "bytes_left": [(at - asked_at, size) for at, size in leaving],
    }


# --------------------------------------------------------------------------------------------------------------------
# The case of the lower bound
# --------------------------------------------------------------------------------------------------------------------


class Sender:
    """An association to the node with no more work than its bytes: four of pynetdicom's would be busy all the time."""

    def __init__(self, destination: tuple[str, int], calling: str, called: str) -> None:
        self._socket = socket.create_connection(destination, timeout=DEADLINE)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        context = pdu.PresentationContext(1, CTImageStorage, (ExplicitVRLittleEndian,))
        request = pdu.AssociateRQ(
            called, calling, uids.APPLICATION_CONTEXT, (context,), pdu.UserInformation(131072, "1.2.3.4")
        )
        assert self._call(request.encode())[0] == pdu.AssociateAC.pdu_type

    def store(self, number: int, dataset: Dataset) -> int:
        """Send an object and return its status."""
        request = dimse.CStoreRequest(number, CTImageStorage, str(dataset.SOPInstanceUID))
        command = pdu.encode_p_data(1, dimse.encode_c_store_request(request), is_command=True)
        answer = self._call(command + pdu.encode_p_data(1, encode(dataset, False, True) or b"", is_command=False))
        response = dimse.decode_command(answer[12:])  # PDU header 6, value length 4, context 1, control header 1
        assert isinstance(response, dimse.Response)
        return response.status

    def release(self) -> None:
        self._call(pdu.ReleaseRQ().encode())
        self._socket.close()

    def _call(self, data: bytes) -> bytes:
        self._socket.sendall(data)
        answer = self._socket.recv(65536)
        while len(answer) < 6 or len(answer) < 6 + int.from_bytes(answer[2:6], "big"):
            answer += self._socket.recv(65536)
        return answer


def paced(move: Move) -> None:
    """Send what a C-MOVE matches, an object every 20 ms."""
    with move.pacs.count_store():
        sender = Sender(move.pacs.destination, move.pacs.ae_title, move.destination)
        statuses = []
        due = time.monotonic()
        for number, dataset in enumerate(move.matches, 1):
            statuses.append(sender.store(number, dataset))
            due += move.pacs.latency
            time.sleep(max(0.0, due - time.monotonic()))
        sender.release()
    move.finish(statuses)


def bench_paced(folder: Path, rounds: int) -> Figures:
    """Run `paced`: each round has a study of its own."""
    figures = Figures()
    archive = Archive()
    studies = [
        [want for _ in range(SERIES) for want in archive.add_series(COUNT // SERIES, study=f"{ROOT}.{n}")]
        for n in range(rounds + 1)
    ]
    node = Node(folder / "node")
    pacs = ScriptedPacs(archive, (peers.LOOPBACK, node.dicom_port), "paced", latency=PACED_LATENCY, limit=4)
    pacs.behaviour.paced = paced  # type: ignore[attr-defined]
    with pacs:
        node.config["pacs"] = [pacs_section(pacs.settings, max_associations=PACED_ASSOCIATIONS)]
        with node:
            for study in studies:
                asked = [Instance(w.study_instance_uid, w.series_instance_uid, w.sop_instance_uid) for w in study]
                seconds, size, head = fetch(*rad69(asked, RETRIEVE_LOCATION, node))
                assert size > COUNT * 2000, head
                figures.node.append(seconds)
                figures.other.append(COUNT * PACED_LATENCY / PACED_ASSOCIATIONS)
        assert pacs.rejected == 0
        assert pacs.most_associations <= PACED_ASSOCIATIONS
    figures.node.pop(0)  # to warm up
    figures.other.pop(0)
    return figures


# --------------------------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def workspace() -> Iterator[Path]:
    """Give a folder in memory where there is room, else on disk."""
    is_roomy = MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > WORKSPACE_BYTES
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=MEMORY if is_roomy else None))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--json", type=Path, help="write the figures and the timeline here")
    arguments.add_argument("--rounds", type=int, default=ROUNDS)
    arguments.add_argument("--only", choices=["orthanc", "paced"])
    given = arguments.parse_args()
    os.environ["TCP_NODELAY"] = "1"
    figures: dict[str, Figures] = {}
    line: dict[str, Any] = {}
    with workspace() as folder:
        if given.only != "paced":
            figures["cold"], figures["held"], line = bench_orthanc(folder / "orthanc", given.rounds)
        if given.only != "orthanc":
            figures["paced"] = bench_paced(folder / "paced", min(given.rounds, 3))
    table = Table("case", "node best", "node median", "beside it", "its best", "its median", "ratio of best", "bar")
    beside = {"cold": "movescu into storescp", "held": "Orthanc's WADO-RS", "paced": "lower bound"}
    failed = False
    for case, bar in BARS:
        if (one := figures.get(case)) is None:
            continue
        failed = failed or one.ratio > bar
        table.add_row(
            case,
            *(f"{value:.3f} s" for value in (min(one.node), statistics.median(one.node))),
            beside[case],
            *(f"{value:.3f} s" for value in (min(one.other), statistics.median(one.other))),
            f"{one.ratio:.2f}",
            f"<= {bar}",
        )
    Console(width=140).print(table)
    if given.json:
        cases = {
            case: {"node": one.node, "other": one.other, "beside": beside[case], "ratio": one.ratio}
            for case, one in figures.items()
        }
        given.json.write_text(json.dumps({"cases": cases, "bars": dict(BARS), "timeline": line}, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
