"""How fast the store SCP receives, beside DCMTK's `storescp` and a pynetdicom SCP.

Run `python -m tests.bench.bench_receive`. The sender is DCMTK's `storescu` throughout, timed as a whole process; each
receiver is a process of its own that writes Part 10 files to the same file system. Rounds are interleaved: a noisy
machine is noisy for all. Ratios are what counts: seconds differ from machine to machine.

Cases
-----
large
    400 CT images of 512 KB, Nagle's algorithm off at the sender (DCMTK: environment variable TCP_NODELAY=1).
small
    2000 objects of 2 KB, likewise.
nagle
    400 CT images of 512 KB with Nagle's algorithm on, which is DCMTK's default and that of many a PACS. `dcmtk` has its
    defaults at both ends; `dcmtk-nodelay` is a `storescp` with TCP_NODELAY=1, which most of the waiting goes away with:
    it is the receiver's two small writes per answer that stall, too.

Files are in memory where there is a memory file system with room: on a disk the file system's own work, its write-back
and what earlier rounds deleted weigh more than the receivers.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, SecondaryCaptureImageStorage

from xca_imaging.imaging.receiver import Incoming, PeerAssociation, StoreRequest
from xca_imaging.imaging.spool import Spool, SpoolWriter
from xca_imaging.imaging.store_scp import StoreScp

ROOT = "1.2.826.0.1.3680043.8.498.77"  # synthetic UIDs
AE_TITLE = "BENCH"
SENDER_TIMEOUT = 120.0  # seconds for one run of the sender: the slowest receiver takes 20
START_TIMEOUT = 20.0
MEMORY = Path("/dev/shm")  # tmpfs, on Linux
WORKSPACE_BYTES = 1_000_000_000  # twice the largest case, twice: sent and received


@dataclass(frozen=True)
class Case:
    """What is sent, and how."""

    name: str
    count: int
    pixel_bytes: int
    is_nagle_on: bool
    receivers: tuple[str, ...]
    sender: str = "storescu"


@dataclass
class Figures:
    """Seconds of the sender and processor seconds of the receiver, one each per round."""

    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


CASES = (
    Case("large", 400, 512 * 1024, False, ("ours", "dcmtk", "pynetdicom")),
    Case("small", 2000, 1500, False, ("ours", "dcmtk", "pynetdicom")),
    Case("nagle", 400, 512 * 1024, True, ("ours", "dcmtk", "dcmtk-nodelay")),
)

BARS = (
    ("large", "ours", "dcmtk", "<=", 1.2),
    ("large", "pynetdicom", "ours", ">=", 4.0),
    ("small", "ours", "dcmtk", "<=", 1.3),
    ("nagle", "dcmtk", "ours", ">=", 10.0),
)
"""(case, numerator, denominator, comparison, bar) of best times."""


# --------------------------------------------------------------------------------------------------------------------
# Objects
# --------------------------------------------------------------------------------------------------------------------


def write_objects(directory: Path, case: Case) -> None:
    """Write the case's objects as Part 10 files."""
    directory.mkdir(parents=True)
    rows = columns = 512 if case.pixel_bytes > 100_000 else 27
    for number in range(1, case.count + 1):
        dataset = Dataset()
        dataset.SOPClassUID = CTImageStorage if rows == 512 else SecondaryCaptureImageStorage
        dataset.SOPInstanceUID = f"{ROOT}.{case.pixel_bytes}.{number}"
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = f"{ROOT}.1", f"{ROOT}.1.1"
        dataset.PatientID, dataset.PatientName, dataset.Modality = "BENCH", "Bench^Mark", "CT"
        dataset.InstanceNumber = number
        dataset.Rows, dataset.Columns = rows, columns
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
        dataset.SamplesPerPixel, dataset.PixelRepresentation = 1, 0
        dataset.PhotometricInterpretation = "MONOCHROME2"
        dataset.PixelData = number.to_bytes(2, "little") * (rows * columns)
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.save_as(directory / f"{number:05d}.dcm", enforce_file_format=True)


# --------------------------------------------------------------------------------------------------------------------
# Receivers
# --------------------------------------------------------------------------------------------------------------------


class SpoolEverything:
    """A Receiver that keeps whatever comes."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool

    def accepted_syntaxes(self, association: PeerAssociation) -> Sequence[str] | None:
        return None

    def begin(self, request: StoreRequest) -> Incoming | int:
        return _Kept(
            self._spool.create(
                sop_class_uid=request.sop_class_uid,
                sop_instance_uid=request.sop_instance_uid,
                transfer_syntax_uid=request.transfer_syntax_uid,
                source_ae_title=request.association.calling_ae_title,
            )
        )

    def syntaxes_refused(self, association: PeerAssociation, refused: Mapping[str, tuple[str, ...]]) -> None:
        pass

    def association_closed(self, association: PeerAssociation, reason: str) -> None:
        pass


class _Kept:
    def __init__(self, writer: SpoolWriter) -> None:
        self._writer = writer
        self.write = writer.write

    def commit(self) -> int:
        self._writer.commit().hold()
        return 0x0000

    def discard(self, reason: str) -> None:
        self._writer.discard()


async def serve_ours(directory: Path) -> None:
    spool = Spool(directory, max_bytes=20_000_000_000, retention=900)
    scp = StoreScp(SpoolEverything(spool), ae_title=AE_TITLE, host="127.0.0.1", port=0)
    await scp.start()
    print(scp.sockets[0][1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)  # until the parent closes the pipe
    await scp.close(0)
    spool.close()


def serve_pynetdicom(directory: Path) -> None:
    from pynetdicom import AE, AllStoragePresentationContexts, _config, evt

    _config.UNRESTRICTED_STORAGE_SERVICE = True

    def handle_store(event: evt.Event) -> int:
        path = directory / event.request.AffectedSOPInstanceUID
        path.write_bytes(event.encoded_dataset())
        return 0x0000

    ae = AE(AE_TITLE)
    ae.maximum_pdu_size = 131072
    ae.supported_contexts = AllStoragePresentationContexts
    server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_STORE, handle_store)])
    print(server.socket.getsockname()[1], flush=True)
    sys.stdin.read()
    server.shutdown()


@contextlib.contextmanager
def running(receiver: str, directory: Path, environment: Mapping[str, str]) -> Iterator[tuple[psutil.Process, int]]:
    """Run a receiver that writes to `directory`, until it accepts and then as long as the block lasts."""
    if receiver.startswith("dcmtk"):
        if receiver == "dcmtk-nodelay":
            environment = {**environment, "TCP_NODELAY": "1"}
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        command = ["storescp", "--bit-preserving", "-pdu", "131072", "-aet", AE_TITLE, "-od", str(directory), str(port)]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + START_TIMEOUT
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except ConnectionRefusedError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
    else:
        command = [
            sys.executable,
            "-m",
            "tests.bench.bench_receive",
            "--serve",
            receiver,
            "--directory",
            str(directory),
        ]
        process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdout is not None
        port = int(process.stdout.readline())
    try:
        yield psutil.Process(process.pid), port
    finally:
        if process.stdin is not None:
            process.stdin.close()
        else:
            process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


# --------------------------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------------------------


def dcmtk_environment(case: Case) -> dict[str, str]:
    """Return the environment of DCMTK's programs: `storescp` answers in two small writes and wants it as well."""
    environment = {key: value for key, value in os.environ.items() if key != "TCP_NODELAY"}
    return environment if case.is_nagle_on else {**environment, "TCP_NODELAY": "1"}


def send(case: Case, objects: Path, port: int) -> float:
    """Send all objects on one association and return how long the sender took."""
    if case.sender.endswith("dicom-storescu"):
        command = [case.sender, "--called-ae-title", AE_TITLE, f"127.0.0.1:{port}", str(objects)]
    else:
        command = [case.sender, "-aec", AE_TITLE, "--scan-directories", "127.0.0.1", str(port), str(objects)]
    started = time.perf_counter()
    # With a pipe, since without one a wait with time-out looks only every 50 ms.
    subprocess.run(
        command,
        check=True,
        timeout=SENDER_TIMEOUT,
        env=dcmtk_environment(case),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return time.perf_counter() - started


def run_once(case: Case, receiver: str, objects: Path, workspace: Path) -> tuple[float, float]:
    """Return the sender's seconds and the receiver's processor seconds for one round."""
    directory = workspace / "received"
    directory.mkdir()
    try:
        with running(receiver, directory, dcmtk_environment(case)) as (process, port):
            before = process.cpu_times()
            seconds = send(case, objects, port)
            after = process.cpu_times()
            received = [path for path in directory.rglob("*") if path.is_file()]
            if len(received) != case.count:
                raise RuntimeError(f"{receiver} has {len(received)} of {case.count} objects")
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return seconds, after.user + after.system - before.user - before.system


def run_case(case: Case, workspace: Path, rounds: int) -> dict[str, Figures]:
    """Run all receivers of a case, interleaved."""
    objects = workspace / case.name
    if not objects.exists():
        write_objects(objects, case)
    figures = {receiver: Figures() for receiver in case.receivers}
    for _ in range(rounds):
        for receiver in case.receivers:
            seconds, cpu = run_once(case, receiver, objects, workspace)
            figures[receiver].seconds.append(seconds)
            figures[receiver].cpu.append(cpu)
    return figures


def print_table(case: Case, figures: Mapping[str, Figures]) -> None:
    gigabytes = case.count * case.pixel_bytes / 1e9
    print(
        f"\n{case.name}: {case.count} x {-(-case.pixel_bytes // 1024)} KB, Nagle {'on' if case.is_nagle_on else 'off'}"
    )
    print(f"{'receiver':12} {'best s':>8} {'median s':>9} {'x DCMTK best':>13} {'x median':>9} {'CPU s/GB':>9}")
    reference = figures["dcmtk"]
    for receiver, measured in figures.items():
        best, median = min(measured.seconds), statistics.median(measured.seconds)
        print(
            f"{receiver:12} {best:8.3f} {median:9.3f} {best / min(reference.seconds):13.2f}"
            f" {median / statistics.median(reference.seconds):9.2f} {min(measured.cpu) / gigabytes:9.2f}"
        )


def check_bars(results: Mapping[str, Mapping[str, Figures]]) -> list[str]:
    """Return what does not hold."""
    missed = []
    for case, numerator, denominator, comparison, bar in BARS:
        if case not in results:
            continue
        ratio = min(results[case][numerator].seconds) / min(results[case][denominator].seconds)
        holds = ratio <= bar if comparison == "<=" else ratio >= bar
        text = f"{case}: {numerator} / {denominator} = {ratio:.2f}, wanted {comparison} {bar}"
        print(f"{'ok    ' if holds else 'MISSED'} {text}")
        if not holds:
            missed.append(text)
    return missed


def default_workspace() -> Path | None:
    """Return the memory file system, None (the system's folder for temporary files) where there is none with room."""
    if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > WORKSPACE_BYTES:
        return MEMORY
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--case", action="append", choices=[case.name for case in CASES])
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--workspace", type=Path, help="where objects and received files go (default: in memory)")
    parser.add_argument("--sender", default="storescu", help="storescu, or the path of dicom-rs's dicom-storescu")
    parser.add_argument("--serve", choices=("ours", "pynetdicom"), help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve == "ours":
        import uvloop

        uvloop.run(serve_ours(arguments.directory))
        return 0
    if arguments.serve == "pynetdicom":
        serve_pynetdicom(arguments.directory)
        return 0
    for tool in (arguments.sender, "storescp"):
        if shutil.which(tool) is None:
            print(f"bench_receive: skipped, {tool} is not installed")
            return 0
    results: dict[str, dict[str, Figures]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-receive-", dir=arguments.workspace or default_workspace()) as folder:
        workspace = Path(folder)
        for case in CASES:
            if arguments.case is None or case.name in arguments.case:
                rounds = min(arguments.rounds, 3) if case.is_nagle_on else arguments.rounds  # DCMTK takes 18 s a round
                chosen = Case(
                    case.name, case.count, case.pixel_bytes, case.is_nagle_on, case.receivers, arguments.sender
                )
                results[case.name] = run_case(chosen, workspace, rounds)
                print_table(case, results[case.name])
    print()
    missed = check_bars(results)
    if arguments.json:
        document = {
            case: {name: {"seconds": f.seconds, "cpu": f.cpu} for name, f in figures.items()}
            for case, figures in results.items()
        }
        arguments.json.write_text(json.dumps(document, indent=1))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
