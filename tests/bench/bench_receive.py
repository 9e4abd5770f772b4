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
four
    Four senders at once, each with 200 CT images of 512 KB of its own, Nagle's algorithm off. Ours has two sibling
    processes (`dicom.receivers = 2`), which are told what to expect as a node tells them when it asks a PACS to send;
    DCMTK has a process for each association (`--fork`).
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
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, SecondaryCaptureImageStorage

from xca_imaging.imaging.receiver import Arriving, Incoming, PeerAssociation, StoreRequest
from xca_imaging.imaging.receivers import Siblings
from xca_imaging.imaging.spool import Spool, SpooledInstance, SpoolWriter
from xca_imaging.imaging.store_scp import StoreScp
from xca_imaging.operations.heap import freeze_heap

ROOT = "1.2.826.0.1.3680043.8.498.77"  # synthetic UIDs
AE_TITLE = "BENCH"
SENDER_TIMEOUT = 120.0  # seconds for one run of the sender: the slowest receiver takes 20
START_TIMEOUT = 20.0
MEMORY = Path("/dev/shm")  # tmpfs, on Linux
_CPUCLOCK_SCHED = 2  # of clock_getcpuclockid(3), which the standard library has for threads only
WORKSPACE_BYTES = 2_000_000_000  # twice the largest case, twice: sent and received


@dataclass(frozen=True)
class Case:
    """What is sent, and how: `count` objects on each association."""

    name: str
    count: int
    pixel_bytes: int
    is_nagle_on: bool
    receivers: tuple[str, ...]
    sender: str = "storescu"
    associations: int = 1


@dataclass
class Figures:
    """Seconds of the sender and processor seconds of the receiver, one each per round."""

    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


CASES = (
    Case("large", 400, 512 * 1024, False, ("ours", "dcmtk", "pynetdicom")),
    Case("small", 2000, 1500, False, ("ours", "dcmtk", "pynetdicom")),
    Case("four", 200, 512 * 1024, False, ("ours-siblings", "dcmtk-fork"), associations=4),
    Case("nagle", 400, 512 * 1024, True, ("ours", "dcmtk", "dcmtk-nodelay")),
)

BARS = (
    ("large", "seconds", "ours", "dcmtk", "<=", 1.0),
    ("large", "seconds", "pynetdicom", "ours", ">=", 5.0),
    ("large", "cpu", "ours", "dcmtk", "<=", 1.2),
    ("small", "seconds", "ours", "dcmtk", "<=", 1.0),
    ("small", "seconds", "pynetdicom", "ours", ">=", 10.0),
    ("four", "seconds", "ours-siblings", "dcmtk-fork", "<=", 1.0),
    ("nagle", "seconds", "dcmtk", "ours", ">=", 20.0),
)
"""(case, figure, numerator, denominator, comparison, bar) of the best of each."""

SIBLINGS = 2

REPEATS = 3
"""Turns in a round: a run takes a quarter of a second, and what else the machine does meanwhile shows as much as the
receiver does. Receivers that take seconds have one."""


# --------------------------------------------------------------------------------------------------------------------
# Objects
# --------------------------------------------------------------------------------------------------------------------


def instance_uid(case: Case, association: int, number: int) -> str:
    """Return the SOP Instance UID of an object."""
    return f"{ROOT}.{case.pixel_bytes}.{association}.{number}"


def write_objects(directory: Path, case: Case, association: int) -> None:
    """Write the objects of one of the case's associations as Part 10 files."""
    directory.mkdir(parents=True)
    rows = columns = 512 if case.pixel_bytes > 100_000 else 27
    for number in range(1, case.count + 1):
        dataset = Dataset()
        dataset.SOPClassUID = CTImageStorage if rows == 512 else SecondaryCaptureImageStorage
        dataset.SOPInstanceUID = instance_uid(case, association, number)
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

    def offer(self, request: StoreRequest) -> Arriving | int:
        return _Adopted()

    def create_instance(self, association: PeerAssociation, *created: object) -> int:
        return 0x0110

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
        self._writer.seal()
        return 0x0000

    def conclude(self) -> None:
        self._writer.commit().hold()
        self._writer.spool.prepare(self._writer.size)

    def discard(self, reason: str) -> None:
        self._writer.discard()


class _Adopted:
    def progress(self, size: int) -> None:
        pass

    def adopt(self, instance: SpooledInstance) -> int:
        instance.hold()
        return 0x0000

    def discard(self, reason: str, no_room: bool = False) -> None:
        pass


async def serve_ours(directory: Path, siblings: int) -> None:
    spool = Spool(directory, max_bytes=20_000_000_000, retention=900)
    receiver, program = SpoolEverything(spool), (sys.executable, "-m", "xca_imaging.gateway.receiving")
    scp: StoreScp | Siblings
    if siblings:
        scp = Siblings(receiver, spool, count=siblings, program=program, ae_title=AE_TITLE, host="127.0.0.1", port=0)
    else:
        scp = StoreScp(receiver, ae_title=AE_TITLE, host="127.0.0.1", port=0)
    await scp.start()
    large = next(case for case in CASES if case.name == "four")
    numbers = range(1, large.count + 1)
    expected = [instance_uid(large, each, number) for each in range(large.associations) for number in numbers]
    scp.expect(expected, [ExplicitVRLittleEndian])
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
        if receiver == "dcmtk-fork":
            command.insert(1, "--fork")
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
    """Send all objects on each association at once and return how long that took."""
    if case.sender.endswith("dicom-storescu"):
        command = [case.sender, "--called-ae-title", AE_TITLE, f"127.0.0.1:{port}"]
    else:
        command = [case.sender, "-aec", AE_TITLE, "--scan-directories", "127.0.0.1", str(port)]
    started = time.perf_counter()
    # With a pipe, since without one a wait with time-out looks only every 50 ms.
    senders = [
        subprocess.Popen(
            [*command, str(objects / str(association))],
            env=dcmtk_environment(case),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for association in range(case.associations)
    ]
    try:
        for sender in senders:
            output, _ = sender.communicate(timeout=SENDER_TIMEOUT)
            if sender.returncode:
                raise RuntimeError(f"the sender failed: {output.decode(errors='replace')[-500:]}")
    finally:
        for sender in senders:
            sender.kill()
            sender.wait()
    return time.perf_counter() - started


def warm_memory(directory: Path, size: int) -> None:
    """Touch as much memory as the round needs, and free it again.

    The host of a virtual machine takes back what the guest leaves free for some seconds; the first one to write to such
    a page pays four times a write for it, and who that is was chance.
    """
    path = directory / "warm"
    with path.open("wb", buffering=0) as file:
        block = bytes(1024 * 1024)
        for _ in range(-(-size // len(block))):
            file.write(block)
    path.unlink()


def processor_seconds(process: psutil.Process) -> float:
    """Return what the receiver has used, its children included; of those that have ended, to the clock's tick."""
    seconds = 0.0
    for each in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess, OSError):  # a child that has ended: the parent has its time
            times = each.cpu_times()
            seconds += (
                time.clock_gettime(~each.pid << 3 | _CPUCLOCK_SCHED) + times.children_user + times.children_system
            )
    return seconds


def run_once(case: Case, receiver: str, objects: Path, workspace: Path) -> tuple[float, float]:
    """Return the sender's seconds and the receiver's processor seconds for one round."""
    directory = workspace / "received"
    directory.mkdir()
    try:
        with running(receiver, directory, dcmtk_environment(case)) as (process, port):
            warm_memory(directory, 2 * case.count * case.associations * case.pixel_bytes)
            before = processor_seconds(process)
            seconds = send(case, objects, port)
            after = processor_seconds(process)
            received = [
                path for path in directory.rglob("*") if path.is_file() and path.stat().st_size > case.pixel_bytes
            ]
            wanted = case.count * case.associations
            if len(received) != wanted:
                raise RuntimeError(f"{receiver} has {len(received)} of {wanted} objects")
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return seconds, after - before


def run_case(case: Case, workspace: Path, rounds: int) -> dict[str, Figures]:
    """Run all receivers of a case, interleaved; those that are done soon several times in a round."""
    objects = workspace / case.name
    if not objects.exists():
        for association in range(case.associations):
            write_objects(objects / str(association), case, association)
    figures = {receiver: Figures() for receiver in case.receivers}
    for turn in range(rounds * REPEATS):
        for receiver in case.receivers:
            if (receiver != "pynetdicom" and not case.is_nagle_on) or turn % REPEATS == 0:
                seconds, cpu = run_once(case, receiver, objects, workspace)
                figures[receiver].seconds.append(seconds)
                figures[receiver].cpu.append(cpu)
    return figures


def print_table(case: Case, figures: Mapping[str, Figures]) -> None:
    gigabytes = case.count * case.associations * case.pixel_bytes / 1e9
    print(
        f"\n{case.name}: {case.associations} x {case.count} x {-(-case.pixel_bytes // 1024)} KB, "
        f"Nagle {'on' if case.is_nagle_on else 'off'}"
    )
    print(f"{'receiver':13} {'best s':>8} {'median s':>9} {'x DCMTK best':>13} {'x median':>9} {'CPU s/GB':>9}")
    reference = next(measured for receiver, measured in figures.items() if receiver.startswith("dcmtk"))
    for receiver, measured in figures.items():
        best, median = min(measured.seconds), statistics.median(measured.seconds)
        print(
            f"{receiver:13} {best:8.3f} {median:9.3f} {best / min(reference.seconds):13.2f}"
            f" {median / statistics.median(reference.seconds):9.2f} {min(measured.cpu) / gigabytes:9.2f}"
        )


def check_bars(results: Mapping[str, Mapping[str, Figures]]) -> list[str]:
    """Return what does not hold."""
    missed = []
    for case, figure, numerator, denominator, comparison, bar in BARS:
        if case not in results:
            continue
        above, below = (min(getattr(results[case][name], figure)) for name in (numerator, denominator))
        ratio = above / below
        holds = ratio <= bar if comparison == "<=" else ratio >= bar
        text = f"{case}, {figure}: {numerator} / {denominator} = {ratio:.2f}, wanted {comparison} {bar}"
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
    parser.add_argument("--serve", choices=("ours", "ours-siblings", "pynetdicom"), help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve in ("ours", "ours-siblings"):
        import uvloop

        freeze_heap()
        uvloop.run(serve_ours(arguments.directory, SIBLINGS if arguments.serve == "ours-siblings" else 0))
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
                chosen = replace(case, sender=arguments.sender)
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
