"""Outside DICOM peers as child processes: Orthanc, DCMTK and pynetdicom's applications.

Each peer is a context manager: it starts on free loopback ports with a folder of its own, is ready when `with` hands it
out (probed, never slept for), and is ended by its process id. A peer whose program is not installed skips the test by
name. `Proxy` stands between a PACS and the node under test, so that a test decides how fast and how far bytes go.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pytest
import requests

LOOPBACK = "127.0.0.1"
START_DEADLINE = 30.0  # seconds; Orthanc needs 1 to 3, the rest is for a busy machine
COMMAND_DEADLINE = 120.0

# Below the range from which Linux takes ports of outgoing connections (32768 to 60999), so that nothing but another
# test run can take a port between its choice here and its use by the peer.
_PORTS = range(20_000, 32_000)
_taken: set[int] = set()


def free_port() -> int:
    """Return a TCP port of the loopback interface that was free and has not been handed out before."""
    for port in random.sample(_PORTS, len(_PORTS)):
        if port in _taken:
            continue
        with socket.socket() as probe:
            try:
                probe.bind((LOOPBACK, port))
            except OSError as exc:
                if exc.errno != errno.EADDRINUSE:
                    raise
                continue
        _taken.add(port)
        return port
    raise RuntimeError(f"no free port in {_PORTS}")


def wait_until(condition: Callable[[], Any], deadline: float, what: str, pause: float = 0.02) -> Any:
    """Return the first true value of `condition`, asked again and again until `deadline` seconds have passed."""
    end = time.monotonic() + deadline
    while True:
        if value := condition():
            return value
        if time.monotonic() > end:
            raise AssertionError(f"not within {deadline} s: {what}")
        time.sleep(pause)


def accepts(port: int, host: str = LOOPBACK) -> bool:
    """Tell whether something accepts connections there."""
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1):
        return True
    return False


def installed(name: str) -> str | None:
    """Return the path of an installed program; Debian keeps Orthanc in a folder that is not on every PATH."""
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


def program(*names: str) -> str:
    """Return the path of the first installed program of these names, or skip the test by that name."""
    for name in names:
        if found := installed(name):
            return found
    pytest.skip(f"{names[0]} is not installed (make peers)")


@dataclass(frozen=True, slots=True)
class Entity:
    """A DICOM application entity: title and address."""

    ae_title: str
    port: int
    host: str = LOOPBACK


class Daemon:
    """A child process with its output in a file."""

    def __init__(self, name: str, arguments: list[str], folder: Path, env: dict[str, str] | None = None) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        with self.log.open("wb") as stream:
            self.process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env={**os.environ, **(env or {})},
            )

    def wait_ready(self, ready: Callable[[], Any], deadline: float = START_DEADLINE) -> None:
        """Return once `ready` is true; fail with the log when the process ends or the deadline passes first."""
        try:
            wait_until(lambda: ready() or self._failed(), deadline, f"{self.name} ready")
        except AssertionError:
            self.kill()
            raise AssertionError(f"{self.name} did not become ready:\n{self.tail()}") from None

    def _failed(self) -> bool:
        if self.process.poll() is not None:
            raise AssertionError(f"{self.name} ended with {self.process.returncode}")
        return False

    def tail(self, size: int = 4000) -> str:
        """Return the end of what the process wrote."""
        return self.log.read_bytes()[-size:].decode(errors="replace")

    def stop(self, deadline: float = 15.0) -> int:
        """Ask the process to end, insist after the deadline, return its exit code."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(deadline)
            except subprocess.TimeoutExpired:
                self.kill()
        return self.process.wait()

    def kill(self) -> None:
        """End the process at once, as a crash or a power cut does."""
        if self.process.poll() is None:
            # a stopped process takes SIGKILL too, but its sockets go only once it is scheduled again
            self.process.kill()
            self.process.send_signal(signal.SIGCONT)
        self.process.wait()


def run(*arguments: str, check: bool = True, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; its output is shown when it fails."""
    done = subprocess.run(
        arguments,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=COMMAND_DEADLINE,
        cwd=cwd,
        check=False,
    )
    if check and done.returncode:
        raise AssertionError(f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done


# --------------------------------------------------------------------------------------------------------------------
# PACSs
# --------------------------------------------------------------------------------------------------------------------


class _Peer:
    """What every peer process has: a folder, a daemon, and `with`."""

    daemon: Daemon

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.daemon.stop()

    def start(self) -> None:
        raise NotImplementedError

    def kill(self) -> None:
        """End the peer as a crash does."""
        self.daemon.kill()


class Orthanc(_Peer):
    """Orthanc with its REST interface.

    Parameters
    ----------
    folder : Path
        Where configuration and storage go.
    destinations : Iterable[Entity]
        The move destinations it knows: the node's store SCP, a reference `storescp`.
    dicomweb : bool
        Load the DICOMweb plugin (skips where it is not installed).
    options : dict
        More of Orthanc's own configuration, such as `{"TranscodeDicomProtocol": False}`.
    """

    plugins = Path("/usr/share/orthanc/plugins")

    def __init__(
        self,
        folder: Path,
        destinations: Iterable[Entity] = (),
        *,
        ae_title: str = "ORTHANC",
        dicomweb: bool = False,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.program = program("Orthanc", "orthanc")
        self.folder = folder
        self.ae_title, self.host, self.port, self.http_port = ae_title, LOOPBACK, free_port(), free_port()
        self.url = f"http://{LOOPBACK}:{self.http_port}"
        folder.mkdir(parents=True, exist_ok=True)
        config: dict[str, Any] = {
            "Name": "test",
            "StorageDirectory": str(folder / "storage"),
            "IndexDirectory": str(folder / "storage"),
            "DicomAet": ae_title,
            "DicomPort": self.port,
            "DicomCheckCalledAet": False,
            "DicomCheckModalityHost": False,
            "DicomAlwaysAllowEcho": True,
            "DicomAlwaysAllowStore": True,
            "DicomAlwaysAllowFind": True,
            "DicomAlwaysAllowGet": True,
            "DicomAlwaysAllowMove": True,
            "UnknownSopClassAccepted": True,
            "HttpPort": self.http_port,
            "RemoteAccessAllowed": False,
            "AuthenticationEnabled": False,
            "DicomModalities": {each.ae_title: [each.ae_title, each.host, each.port] for each in destinations},
            "Plugins": [],
        }
        if dicomweb:
            plugin = self.plugins / "libOrthancDicomWeb.so"
            if not plugin.exists():
                pytest.skip("orthanc-dicomweb is not installed (make peers)")
            config["Plugins"] = [str(plugin)]
            config["DicomWeb"] = {"Enable": True, "Root": "/dicom-web/"}
        config.update(options or {})
        (folder / "orthanc.json").write_text(json.dumps(config, indent=1))

    def start(self) -> None:
        self.daemon = Daemon("orthanc", [self.program, "orthanc.json"], self.folder)
        self.daemon.wait_ready(lambda: self._answers() and accepts(self.port))

    def _answers(self) -> bool:
        with contextlib.suppress(requests.ConnectionError, requests.Timeout):
            return requests.get(f"{self.url}/system", timeout=5).ok
        return False

    def _call(self, method: str, path: str, **arguments: Any) -> Any:
        answer = requests.request(method, self.url + path, timeout=60, **arguments)
        assert answer.ok, f"{method} {path}: {answer.status_code} {answer.text}"
        return answer.json() if answer.content else None

    def upload(self, files: Iterable[Path]) -> None:
        """Store files by REST; Orthanc keeps each as it is."""
        with requests.Session() as session:
            for file in files:
                answer = session.post(f"{self.url}/instances", data=file.read_bytes(), timeout=60)
                assert answer.ok, f"upload of {file}: {answer.status_code} {answer.text}"

    def lookup(self, uid: str) -> str:
        """Return Orthanc's own id of a study, series or instance by its UID."""
        found = self._call("POST", "/tools/lookup", data=uid)
        assert len(found) == 1, f"{uid} is there {len(found)} times"
        return str(found[0]["Path"])

    def delete(self, uid: str) -> None:
        """Delete a study, series or instance by its UID."""
        self._call("DELETE", self.lookup(uid))

    def send(self, uid: str, destination: str) -> None:
        """Send a study, series or instance by C-STORE to a known destination."""
        path = self.lookup(uid)
        self._call(
            "POST",
            f"/modalities/{destination}/store",
            json={"Resources": [path.rsplit("/", 1)[1]], "Synchronous": True},
        )


class Dcmqrscp(_Peer):
    """DCMTK's image server, filled through `storescu`."""

    def __init__(self, folder: Path, destinations: Iterable[Entity] = (), *, ae_title: str = "DCMQRSCP") -> None:
        self.program = program("dcmqrscp")
        program("storescu")
        self.folder = folder
        self.ae_title, self.host, self.port = ae_title, LOOPBACK, free_port()
        storage = folder / "storage"
        storage.mkdir(parents=True, exist_ok=True)
        hosts = [f"dest{n} = ({each.ae_title}, {each.host}, {each.port})" for n, each in enumerate(destinations)]
        names = ", ".join(f"dest{n}" for n in range(len(hosts)))
        if hosts:
            hosts.append(f"destinations = {names}")
        table = "\n".join(hosts)
        # 5000 studies, 1 TB: limits that no test meets
        (folder / "dcmqrscp.cfg").write_text(
            f"NetworkTCPPort = {self.port}\nMaxPDUSize = 131072\nMaxAssociations = 16\n"
            f"HostTable BEGIN\n{table}\nHostTable END\n"
            "VendorTable BEGIN\nVendorTable END\n"
            f"AETable BEGIN\n{ae_title} {storage} RW (5000, 1024gb) ANY\nAETable END\n"
        )

    def start(self) -> None:
        # a well-behaved sender: without TCP_NODELAY DCMTK waits 40 ms for each object's acknowledgement
        self.daemon = Daemon(
            "dcmqrscp",
            [self.program, "-c", "dcmqrscp.cfg", "-v"],
            self.folder,
            env={"TCP_NODELAY": "1"},
        )
        self.daemon.wait_ready(lambda: accepts(self.port))

    def upload(self, files: Iterable[Path]) -> None:
        """Store files by C-STORE, each with the transfer syntax it has."""
        store(self, files)


class Qrscp(_Peer):
    """pynetdicom's `qrscp` application."""

    def __init__(self, folder: Path, destinations: Iterable[Entity] = (), *, ae_title: str = "QRSCP") -> None:
        if importlib.util.find_spec("sqlalchemy") is None:
            pytest.skip("pynetdicom's qrscp needs sqlalchemy")
        self.folder = folder
        self.ae_title, self.host, self.port = ae_title, LOOPBACK, free_port()
        folder.mkdir(parents=True, exist_ok=True)
        known = "".join(f"\n[{each.ae_title}]\naddress: {each.host}\nport: {each.port}\n" for each in destinations)
        (folder / "qrscp.ini").write_text(
            f"[DEFAULT]\nae_title: {ae_title}\nport: {self.port}\nmax_pdu: 131072\nacse_timeout: 30\n"
            f"dimse_timeout: 30\nnetwork_timeout: 30\nbind_address: {LOOPBACK}\n"
            f"instance_location: {folder / 'instances'}\n"
            f"database_location: {folder / 'instances.sqlite'}\nlog_identifier: False\n{known}"
        )

    def start(self) -> None:
        self.daemon = Daemon(
            "qrscp",
            [sys.executable, "-W", "ignore", "-m", "pynetdicom", "qrscp", "-c", "qrscp.ini", "-ll", "error"],
            self.folder,
            env={"PYTHONUNBUFFERED": "1"},
        )
        self.daemon.wait_ready(lambda: accepts(self.port))

    def upload(self, files: Iterable[Path]) -> None:
        """Store files by C-STORE."""
        store(self, files)


PacsPeer = Orthanc | Dcmqrscp | Qrscp


# --------------------------------------------------------------------------------------------------------------------
# Senders and receivers
# --------------------------------------------------------------------------------------------------------------------


def store(target: Any, files: Iterable[Path], *, calling: str = "STORESCU", check: bool = True) -> int:
    """Send files with pynetdicom, one context for each class and transfer syntax; return the number of failures.

    Not DCMTK's `storescu`: it proposes one context for a class, so what lies in two syntaxes is not sent as it lies.
    """
    from pydicom import dcmread
    from pynetdicom import AE

    datasets = [dcmread(file) for file in files]
    wanted = {(ds.SOPClassUID, ds.file_meta.TransferSyntaxUID) for ds in datasets}
    entity = AE(ae_title=calling)
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = 30
    for sop_class, syntax in sorted(wanted):
        entity.add_requested_context(sop_class, syntax)
    association = entity.associate(target.host, target.port, ae_title=target.ae_title)
    if not association.is_established:
        assert not check, f"no association with {target.ae_title}"
        return len(datasets)
    failures = 0
    try:
        for dataset in datasets:
            try:
                status = association.send_c_store(dataset)
            except ValueError:  # the peer accepted no context for this class and syntax
                failures += 1
                continue
            failures += status.get("Status", 0xFFFF) != 0x0000
    finally:
        association.release()
    if check:
        assert not failures, f"{failures} of {len(datasets)} objects refused by {target.ae_title}"
    return failures


def storescu(target: Any, files: Iterable[Path], *options: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Send files with DCMTK's `storescu`."""
    return run(
        program("storescu"),
        *options,
        "-aec",
        target.ae_title,
        target.host,
        str(target.port),
        *map(str, files),
        check=check,
    )


def echoscu(target: Entity, *, called: str | None = None) -> subprocess.CompletedProcess[str]:
    """Ask for C-ECHO with DCMTK's `echoscu`."""
    return run(
        program("echoscu"),
        "-v",
        "-to",
        "10",
        "-aec",
        called or target.ae_title,
        target.host,
        str(target.port),
        check=False,
    )


def movescu(pacs: Any, destination: str, study: str, *, calling: str = "MOVESCU") -> None:
    """Let a PACS move a study to one of its destinations, with DCMTK's `movescu`."""
    run(
        program("movescu"),
        "-S",
        "-aet",
        calling,
        "-aec",
        pacs.ae_title,
        "-aem",
        destination,
        pacs.host,
        str(pacs.port),
        "-k",
        "QueryRetrieveLevel=STUDY",
        "-k",
        f"StudyInstanceUID={study}",
    )


class StoreScp(_Peer):
    """DCMTK's `storescp --bit-preserving`: what a PACS puts on the wire, untouched."""

    def __init__(self, folder: Path, *, ae_title: str = "BITS", options: Iterable[str] = ("--accept-all",)) -> None:
        self.program = program("storescp")
        self.folder, self.received = folder, folder / "received"
        self.received.mkdir(parents=True, exist_ok=True)
        self.entity = Entity(ae_title, free_port())
        self.ae_title, self.host, self.port = ae_title, LOOPBACK, self.entity.port
        self.options = tuple(options)

    def start(self) -> None:
        self.daemon = Daemon(
            "storescp",
            [
                self.program,
                "--bit-preserving",
                "--promiscuous",
                *self.options,
                "--max-pdu",
                "131072",
                "-aet",
                self.ae_title,
                "-od",
                str(self.received),
                str(self.port),
            ],
            self.folder,
            env={"TCP_NODELAY": "1"},
        )
        self.daemon.wait_ready(lambda: accepts(self.port))

    def files(self) -> dict[str, Path]:
        """Return the received files by SOP Instance UID."""
        from pydicom import dcmread

        return {str(dcmread(file, stop_before_pixels=True).SOPInstanceUID): file for file in self.received.iterdir()}


# --------------------------------------------------------------------------------------------------------------------
# Between two peers
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Proxy:
    """A TCP relay on loopback that can go slowly, stop after some bytes, or cut.

    Only the direction from the caller (the PACS that stores) to the target (the node) is counted and governed.
    `target` may be set after the start: a node that must know its PACS, and the PACS its node, can be started in turn.

    Parameters
    ----------
    target : int
        Port on loopback.
    hold_after : int
        Stop relaying after so many bytes in all until `release`; 0 = never.
    rate : int
        Bytes a second; 0 = as fast as they come.
    """

    target: int = 0
    hold_after: int = 0
    rate: int = 0
    port: int = field(default_factory=free_port)
    # mutable state, each written by relay threads under `_lock`: relayed, open
    relayed: int = 0
    open: int = 0

    def __enter__(self) -> Self:
        self._lock = threading.Lock()
        self._released, self._closing, self.held = threading.Event(), threading.Event(), threading.Event()
        self._sockets: set[socket.socket] = set()
        self._listener = socket.create_server((LOOPBACK, self.port))
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._released.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        self._thread.join(5)

    def release(self) -> None:
        """Let a held relay go on."""
        self._released.set()

    def cut(self) -> None:
        """Close every connection that is open now."""
        with self._lock:
            sockets = list(self._sockets)
        for each in sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                caller, _ = self._listener.accept()
            except OSError:
                return
            try:
                target = socket.create_connection((LOOPBACK, self.target), timeout=10)
            except OSError:
                caller.close()
                continue
            for each in (caller, target):
                each.settimeout(None)
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._sockets |= {caller, target}
                self.open += 1
            done = threading.Barrier(2, action=lambda c=caller, t=target: self._finish(c, t))  # type: ignore[misc]
            for source, sink, governed in ((caller, target, True), (target, caller, False)):
                threading.Thread(target=self._relay, args=(source, sink, governed, done), daemon=True).start()

    def _finish(self, *sockets: socket.socket) -> None:
        with self._lock:
            self._sockets -= set(sockets)
            self.open -= 1
        for each in sockets:
            each.close()

    def _relay(self, source: socket.socket, sink: socket.socket, governed: bool, done: threading.Barrier) -> None:
        try:
            while data := source.recv(min(65536, self.rate // 20) if governed and self.rate else 65536):
                if governed:
                    self._govern(len(data))
                sink.sendall(data)
        except OSError:
            pass
        # one side is gone: so is the other, as with a process that died
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        done.wait()

    def _govern(self, size: int) -> None:
        if self.rate:
            time.sleep(size / self.rate)
        with self._lock:
            self.relayed += size
            hold = self.hold_after and self.relayed > self.hold_after
        if hold and not self._released.is_set():
            self.held.set()
            self._released.wait()


@contextlib.contextmanager
def paused(daemon: Daemon) -> Iterator[None]:
    """Stop a process (SIGSTOP) for a while: its sockets stay open and nothing moves."""
    daemon.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        if daemon.process.poll() is None:
            daemon.process.send_signal(signal.SIGCONT)
