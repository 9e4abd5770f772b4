"""Two communities and a PACS with real images on this machine: published, found, retrieved and compared."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pydicom
import pydicom.data
from pydicom.dataset import Dataset
from pynetdicom import AE, build_context
from rich.console import Console
from rich.table import Table

from xca_imaging import settings as settings_module
from xca_imaging.cli import publish
from xca_imaging.cli.options import run_loop
from xca_imaging.errors import ConfigurationError, PeerRefused
from xca_imaging.gateway.app import Node
from xca_imaging.gateway.consumer import Consumer, Routes
from xca_imaging.gateway.listeners import address
from xca_imaging.gateway.peers import SoapClient
from xca_imaging.gateway.publishing import Selection
from xca_imaging.gateway.receipt import Receipt, reason_of
from xca_imaging.settings import Settings

# Real CT and MR series among pydicom's test files, of one patient; and single images of two others.
_IMAGES = (
    "dicomdirtests/98892001/**/*",
    "dicomdirtests/98892003/**/*",
    "CT_small.dcm",
    "MR_small.dcm",
)
_PATIENT = "98890234"
_AUTHORITY = "1.3.6.1.4.1.21367.2005.13.20.1000"
_EAST, _WEST = "urn:oid:1.3.6.1.4.1.21367.2017.2", "urn:oid:1.3.6.1.4.1.21367.2017.1"
_START_TIMEOUT = 30.0  # s for the PACS to answer its first C-ECHO

console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)


def configure(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--port", type=int, default=0, metavar="N", help="HTTP port of West; East takes the next one")
    sub.add_argument("--once", action="store_true", help="stop when done: exit code 0 if every instance was the same")


def run(args: argparse.Namespace) -> int:
    logging.getLogger("xca_imaging").setLevel(logging.WARNING)
    folder = Path(tempfile.mkdtemp(prefix="xca-imaging-demo-"))
    try:
        return run_loop(_demo(folder, args.port, args.once))
    except asyncio.CancelledError:
        return 0


@dataclass(frozen=True, slots=True)
class _Ports:
    west: int
    east: int
    west_dicom: int
    east_dicom: int
    pacs: int


async def _demo(folder: Path, port: int, once: bool) -> int:
    demo = asyncio.current_task()
    assert demo is not None
    # As Ctrl-C does: unwinds, so that the PACS's process ends too.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, demo.cancel)
    ports = _Ports(port or _free_port(), port + 1 if port else _free_port(), *(_free_port() for _ in range(3)))
    east, west = _configure(folder, ports)
    console.print("[bold]Community East[/] has a PACS, a registry, a repository and the responding gateways.")
    console.print("[bold]Community West[/] is an imaging document consumer.\n")
    originals = _originals()
    async with _pacs(folder, ports, east):
        sent = await asyncio.to_thread(_store, east, originals)
        console.print(f"1. {sent} images of pydicom's test files stored in East's PACS (pynetdicom qrscp)")
        async with Node(east), Node(west):
            await _publish(east)
            receipt = await _retrieve(west, folder / "images")
            same = _compare(receipt, originals, folder / "images")
            receipt.write(folder / "images" / "receipt.json")
            console.print(f"\nImages and receipt.json: {folder / 'images'}")
            console.print(f"Configurations:          {folder}/east.toml, {folder}/west.toml")
            if once:
                return 0 if same and receipt.complete else 1
            _invite(folder, ports)
            await asyncio.Event().wait()
    return 0


def _configure(folder: Path, ports: _Ports) -> tuple[Settings, Settings]:
    east = folder / "east.toml"
    east.write_text(
        f"""[node]
name = "East HIE"
home_community_id = "{_EAST}"
data_dir = "east"

[http]
port = {ports.east}

[dicom]
ae_title = "EAST"
port = {ports.east_dicom}

[repository]
unique_id = "1.3.6.1.4.1.21367.2017.2.2"

[[pacs]]
name = "main"
ae_title = "QRSCP"
host = "127.0.0.1"
port = {ports.pacs}
retrieve_location_uid = "1.3.6.1.4.1.21367.2017.2.3"
assigning_authority = "{_AUTHORITY}"
""",
        encoding="utf-8",
    )
    services = f"http://127.0.0.1:{ports.east}/services"
    west = folder / "west.toml"
    west.write_text(
        f"""[node]
name = "West HIE"
home_community_id = "{_WEST}"
data_dir = "west"

[http]
port = {ports.west}

[dicom]
ae_title = "WEST"
port = {ports.west_dicom}

[[community]]
home_community_id = "{_EAST}"
name = "East HIE"
query = "{services}/responding-gateway"
retrieve = "{services}/responding-gateway"
imaging = "{services}/responding-imaging-gateway"
""",
        encoding="utf-8",
    )
    return settings_module.load(east), settings_module.load(west)


# --- East's PACS ------------------------------------------------------------------------------------------------------


def _originals() -> dict[str, Path]:
    """Return the images by SOP Instance UID."""
    folder = Path(pydicom.data.__file__).parent / "test_files"
    files = [file for pattern in _IMAGES for file in sorted(folder.glob(pattern)) if file.is_file()]
    found = {}
    for file in files:
        dataset = pydicom.dcmread(file, specific_tags=["SOPInstanceUID"])
        found[str(dataset.SOPInstanceUID)] = file
    if not found:
        raise ConfigurationError(str(folder), "", "holds no test images", "install pydicom with its data files")
    return found


@asynccontextmanager
async def _pacs(folder: Path, ports: _Ports, east: Settings) -> AsyncIterator[None]:
    """Run pynetdicom's Q/R SCP with East as a move destination."""
    home = folder / "pacs"
    home.mkdir()
    configuration = home / "qrscp.ini"
    configuration.write_text(
        f"""[DEFAULT]
port: {ports.pacs}
ae_title: QRSCP
max_pdu: 16382
acse_timeout: 5
dimse_timeout: 5
network_timeout: 5
bind_address: 127.0.0.1
instance_location: {home / "instances"}
database_location: {home / "instances.sqlite"}

[{east.dicom.ae_title}]
    ae_title: {east.dicom.ae_title}
    address: 127.0.0.1
    port: {ports.east_dicom}
""",
        encoding="utf-8",
    )
    with (home / "qrscp.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "pynetdicom", "qrscp", "-c", str(configuration), stdout=log, stderr=log, cwd=home
        )
        try:
            await _listening(process, ports.pacs, home / "qrscp.log")
            yield
        finally:
            if process.returncode is None:
                process.terminate()
            await process.wait()


async def _listening(process: asyncio.subprocess.Process, port: int, log: Path) -> None:
    give_up = time.monotonic() + _START_TIMEOUT
    while time.monotonic() < give_up and process.returncode is None:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.1)
            continue
        writer.close()
        return
    raise PeerRefused("demo PACS", f"pynetdicom's qrscp did not start: see {log}")


def _store(east: Settings, originals: dict[str, Path]) -> int:
    pacs = east.pacs[0]
    contexts: dict[str, set[str]] = {}
    for file in originals.values():
        meta = pydicom.filereader.read_file_meta_info(file)
        contexts.setdefault(meta.MediaStorageSOPClassUID, set()).add(meta.TransferSyntaxUID)
    sender = AE(ae_title=east.dicom.ae_title)
    sender.requested_contexts = [build_context(uid, sorted(syntaxes)) for uid, syntaxes in contexts.items()]
    association = sender.associate(pacs.host, pacs.port, ae_title=pacs.ae_title)
    if not association.is_established:
        raise PeerRefused(pacs.name, "no association for C-STORE")
    stored = 0
    try:
        for file in originals.values():
            status = association.send_c_store(file)
            if status.get("Status") != 0x0000:
                raise PeerRefused(pacs.name, f"C-STORE of {file.name}: status {status.get('Status')}")
            stored += 1
    finally:
        association.release()
    return stored


# --- what the communities do -----------------------------------------------------------------------------------------


async def _publish(east: Settings) -> None:
    started = time.perf_counter()
    published = await publish.publish_all(east, Selection(patient_id=_PATIENT))
    table = Table("study", "instances", "result", box=None, pad_edge=False)
    for each in published:
        table.add_row(each.study_instance_uid, str(each.instances), each.outcome)
    console.print(f"2. East published its studies (C-FIND, KOS manifest, RAD-68) in {_since(started)}:")
    console.print(table)


async def _retrieve(west: Settings, out: Path) -> Receipt:
    patient = f"{_PATIENT}^^^&{_AUTHORITY}&ISO"
    async with SoapClient() as client:
        consumer = Consumer(client, Routes(west, lambda: f"http://127.0.0.1:{west.http.port}"))
        started = time.perf_counter()
        documents = (await consumer.find_manifests(patient, _EAST)).documents
        console.print(
            f"3. West asked East for the patient's imaging (ITI-38): {len(documents)} manifests in {_since(started)}"
        )
        started = time.perf_counter()
        manifests = [
            await consumer.fetch_manifest(document.unique_id, document.repository_unique_id, _EAST)
            for document in documents
        ]
        console.print(f"4. West retrieved the manifests (ITI-39) in {_since(started)}")
        started = time.perf_counter()
        receipt = await consumer.retrieve(manifests, out)
        summary = receipt.ledger.summary()
        console.print(
            f"5. West retrieved the images (RAD-75; C-MOVE from the PACS in East): "
            f"{summary.held} of {summary.wanted} instances, {summary.size / 1000:.1f} kB in {_since(started)}"
        )
    return receipt


def _compare(receipt: Receipt, originals: dict[str, Path], out: Path) -> bool:
    """Compare every element of every instance with its original; print a line per series."""
    rows: dict[tuple[str, str], list[int]] = {}
    differences: list[str] = []
    for entry in receipt.ledger:
        want = entry.want
        row = rows.setdefault((want.study_instance_uid, want.series_instance_uid), [0, 0, 0])
        row[0] += 1
        row[1] += entry.size
        if entry.error is not None:
            differences.append(f"{want.sop_instance_uid} did not come: {reason_of(entry)}")
            continue
        file = out / want.study_instance_uid / want.series_instance_uid / f"{want.sop_instance_uid}.dcm"
        found = _differences(originals[want.sop_instance_uid], file)
        row[2] += not found
        differences += [f"{want.sop_instance_uid}: {text}" for text in found]
    table = Table("study", "series", "instances", "bytes", "equal to the original", box=None, pad_edge=False)
    for (study, series), (count, size, equal) in rows.items():
        table.add_row(
            study, series, str(count), str(size), f"[green]all {count}[/]" if equal == count else f"[red]{equal}[/]"
        )
    console.print("6. Every element and every pixel byte compared with the original:")
    console.print(table)
    for text in differences:
        console.print(f"[red]{text}[/]")
    return not differences and bool(rows)


def _differences(original: Path, retrieved: Path) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # test files hold values that pydicom warns of
        return list(_different_elements(pydicom.dcmread(original), pydicom.dcmread(retrieved)))


def _different_elements(left: Dataset, right: Dataset) -> list[str]:
    # Group lengths (gggg,0000) are retired and a sender may drop or recompute them (PS3.5 7.2).
    tags = sorted(tag for tag in {*left.keys(), *right.keys()} if tag.element != 0)
    return [f"{tag} differs" for tag in tags if tag not in left or tag not in right or left[tag] != right[tag]]


def _invite(folder: Path, ports: _Ports) -> None:
    west, east = address("127.0.0.1", ports.west), address("127.0.0.1", ports.east)
    patient = f"{_PATIENT}^^^&{_AUTHORITY}&ISO"
    console.print(f"\nBoth nodes keep serving (West http://{west}, East http://{east}); stop with Ctrl-C. Try:")
    console.print(
        f"  {sys.argv[0]} query --config {folder}/west.toml --community {_EAST} --patient '{patient}'", soft_wrap=True
    )


def _since(started: float) -> str:
    return f"{(time.perf_counter() - started) * 1000:.0f} ms"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
