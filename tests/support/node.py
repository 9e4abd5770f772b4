"""A node under test: its configuration by the published contract, its process, its commands.

Nothing of the package is imported: what a test knows of the node is what the contract promises.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from datetime import date
from pathlib import Path
from typing import Any, ClassVar, Self

import jsonschema
import psutil

from tests.support import peers

HOME = "urn:oid:1.3.6.1.4.1.21367.2017.1"
REPOSITORY = "1.3.6.1.4.1.21367.2017.1.2"
RETRIEVE_LOCATION = "1.3.6.1.4.1.21367.2017.1.3"
READY_DEADLINE = 60.0  # seconds from the start of the interpreter to `ready`, on a busy machine
READY = re.compile(r"ready http=(?P<http_host>\S+):(?P<http>\d+) dicom=(?P<dicom_host>\S+):(?P<dicom>\d+)")


def toml(config: Mapping[str, Any]) -> str:
    """Return a configuration as TOML: nested mappings are tables, lists of mappings are arrays of tables."""
    lines: list[str] = []

    def value(item: Any) -> str:
        match item:
            case bool():
                return "true" if item else "false"
            case int() | float():
                return repr(item)
            case date():
                return item.isoformat()
            case str() | Path():
                return json.dumps(str(item))
            case list() | tuple():
                return "[" + ", ".join(map(value, item)) + "]"
        raise TypeError(f"not a TOML value: {item!r}")

    def is_tables(item: Any) -> bool:
        return isinstance(item, list | tuple) and bool(item) and all(isinstance(each, Mapping) for each in item)

    def table(name: str, content: Mapping[str, Any], brackets: str) -> None:
        if name:
            lines.append(f"\n{brackets}{name}{']' * len(brackets)}")
        for key, item in content.items():
            if not isinstance(item, Mapping) and not is_tables(item):
                lines.append(f"{key} = {value(item)}")
        for key, item in content.items():
            path = f"{name}.{key}" if name else key
            if isinstance(item, Mapping):
                table(path, item, "[")
            elif is_tables(item):
                for each in item:
                    table(path, each, "[[")

    table("", config, "")
    return "\n".join(lines) + "\n"


def pacs_section(pacs: Any, *, name: str = "main", location: str = RETRIEVE_LOCATION, **more: Any) -> dict[str, Any]:
    """Return the `[[pacs]]` table of a running peer."""
    return {
        "name": name,
        "ae_title": pacs.ae_title,
        "host": pacs.host,
        "port": pacs.port,
        "retrieve_location_uid": location,
        **more,
    }


class Node:
    """One node: configuration file, `serve` process and the other verbs.

    Parameters
    ----------
    folder : Path
        Holds `node.toml` and the data directory.
    config : mapping
        Tables by the contract; what is left out is filled with ports that are free and a synthetic identity.

    Notes
    -----
    HTTP and DICOM ports are chosen before the start, since a PACS must know its destination and the commands must find
    the server; port 0 has its own test.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any] | None = None, *, name: str = "node") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.name = folder, name
        self.config: dict[str, Any] = dict(config or {})
        for table, defaults in {
            "node": {"name": name, "home_community_id": HOME, "data_dir": "var"},
            "http": {"host": peers.LOOPBACK, "port": peers.free_port()},
            "dicom": {"host": peers.LOOPBACK, "port": peers.free_port(), "ae_title": "XCAI"},
            "repository": {"unique_id": REPOSITORY},
        }.items():
            self.config[table] = {**defaults, **self.config.get(table, {})}
        self.file = folder / "node.toml"
        self.stderr = folder / "serve.log"
        self.process: subprocess.Popen[str] | None = None
        self.http_port, self.dicom_port = self.config["http"]["port"], self.config["dicom"]["port"]
        self.command: list[str] = [sys.executable, "-m", "xca_imaging"]

    @property
    def entity(self) -> peers.Entity:
        """What a PACS must know of the node."""
        return peers.Entity(self.config["dicom"]["ae_title"], self.dicom_port)

    @property
    def home(self) -> str:
        return str(self.config["node"]["home_community_id"])

    @property
    def data(self) -> Path:
        return self.folder / str(self.config["node"]["data_dir"])

    def url(self, path: str) -> str:
        return f"http://{self.config['http']['host']}:{self.http_port}{path}"

    def write(self) -> Path:
        """Write the configuration file and return it."""
        self.file.write_text(toml(self.config))
        return self.file

    # --- serve ------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        running.discard(self)
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def start(self) -> None:
        """Run `serve` and return once it has said that it is ready."""
        self.write()
        with self.stderr.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.command, "serve", "--config", str(self.file)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=self.folder,
                env=environment(),
            )
        lines: list[str] = []
        said = threading.Event()

        def read(stream: Any) -> None:
            with stream:
                for line in stream:
                    lines.append(line)
                    said.set()
            said.set()

        reader = threading.Thread(target=read, args=(self.process.stdout,), daemon=True)
        reader.start()
        if not said.wait(READY_DEADLINE) or not lines:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"{self.name} did not get ready:\n{self.tail()}")
        match = READY.fullmatch(lines[0].rstrip("\n"))
        assert match, f"not the ready line of the contract: {lines[0]!r}"
        self.stdout = lines
        running.add(self)
        self.http_port, self.dicom_port = int(match["http"]), int(match["dicom"])

    def terminate(self, deadline: float = 45.0) -> int:
        """Send SIGTERM and return the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(deadline)

    def tail(self, size: int = 12_000) -> str:
        """Return the end of the log."""
        return self.stderr.read_bytes()[-size:].decode(errors="replace") if self.stderr.exists() else "(no log)"

    def rss(self) -> int:
        """Return the resident memory of the node and its children in bytes."""
        assert self.process is not None
        root = psutil.Process(self.process.pid)
        total = 0
        for process in [root, *root.children(recursive=True)]:
            try:
                total += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        return total

    # --- the other verbs --------------------------------------------------------------------------------------------

    def run(self, verb: str, *arguments: str, deadline: float = 120.0) -> subprocess.CompletedProcess[str]:
        """Run a command with this node's configuration."""
        if not self.file.exists():
            self.write()
        return subprocess.run(
            [*self.command, *verb.split(), "--config", str(self.file), *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=deadline,
            cwd=self.folder,
            env=environment(),
            check=False,
        )

    def ok(self, verb: str, *arguments: str, deadline: float = 120.0) -> str:
        """Run a command that must succeed and return its standard output."""
        done = self.run(verb, *arguments, deadline=deadline)
        assert done.returncode == 0, (
            f"{verb} {' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}\n"
            f"--- log of {self.name} ---\n{self.tail()}"
        )
        return done.stdout

    def publish(self, study: Any, *more: str) -> str:
        return self.ok("publish", "--study", study.uid, *more)

    def query(self, patient: str, *more: str) -> list[dict[str, Any]]:
        """Return what `query --json` prints."""
        found = json.loads(self.ok("query", "--patient", patient, "--json", *more))
        assert isinstance(found, list)
        return found

    def retrieve(self, out: Path, *arguments: str, deadline: float = 120.0) -> Receipt:
        """Run `retrieve` and return its receipt with its exit code."""
        done = self.run("retrieve", *arguments, "--out", str(out), deadline=deadline)
        file = out / "receipt.json"
        assert file.exists(), (
            f"no receipt; retrieve ended with {done.returncode}:\n{done.stdout}\n{done.stderr}\n{self.tail()}"
        )
        return Receipt(out, json.loads(file.read_text()), done.returncode, done.stdout + done.stderr)


running: set[Node] = set()
"""Nodes that serve now: `tests/conftest.py` shows their logs beside a failure."""


class Receipt:
    """A receipt with the folder it stands in, checked against section 4 of the contract."""

    top: ClassVar = {
        "version",
        "complete",
        "trace_id",
        "requested_at",
        "finished_at",
        "manifest",
        "instances",
        "unexpected",
    }
    of_manifest: ClassVar = {"document_unique_id", "sha256", "home_community_id", "repository_unique_id"}
    of_instance: ClassVar = {
        "study_instance_uid",
        "series_instance_uid",
        "sop_instance_uid",
        "state",
        "size",
        "sha256",
        "transfer_syntax_uid",
        "source",
        "bytes_changed",
        "attempts",
    }

    def __init__(self, folder: Path, content: dict[str, Any], returncode: int, output: str) -> None:
        self.folder, self.content, self.returncode, self.output = folder, content, returncode, output

    @property
    def instances(self) -> dict[str, dict[str, Any]]:
        return {each["sop_instance_uid"]: each for each in self.content["instances"]}

    def path(self, instance: dict[str, Any]) -> Path:
        return (
            self.folder
            / instance["study_instance_uid"]
            / instance["series_instance_uid"]
            / f"{instance['sop_instance_uid']}.dcm"
        )

    def check(self, wanted: Iterable[Any] | None = None, *, complete: bool = True) -> None:
        """Check keys, the files named and their digests, and that exactly `wanted` is listed."""
        import hashlib

        content = self.content
        schema = json.loads((Path(__file__).parents[2] / "docs" / "receipt.schema.json").read_text())
        jsonschema.validate(content, schema, cls=jsonschema.Draft202012Validator)
        assert content.keys() >= self.top, f"missing: {self.top - content.keys()}"
        assert content["complete"] is complete, self.output
        assert (self.returncode == 0) is complete, f"exit code {self.returncode}: {self.output}"
        assert content["trace_id"]
        assert content["requested_at"] <= content["finished_at"]
        assert content["unexpected"] == []
        assert content["manifest"].keys() >= self.of_manifest
        listed = [each["sop_instance_uid"] for each in content["instances"]]
        assert len(listed) == len(set(listed)), "an instance is listed twice"
        for each in content["instances"]:
            assert each.keys() >= self.of_instance, f"missing: {self.of_instance - each.keys()}"
            if each["state"] == "held":
                written = self.path(each).read_bytes()
                assert each["size"] == len(written)
                assert each["sha256"] == hashlib.sha256(written).hexdigest()
                assert each["bytes_changed"] is False
                assert written[128:132] == b"DICM"
            else:
                assert each["state"] == "failed"
                assert each["reason"]
                assert not self.path(each).exists(), "a failed instance left a file"
        files = {path.stem for path in self.folder.rglob("*.dcm")}
        held = {uid for uid, each in self.instances.items() if each["state"] == "held"}
        assert files >= held
        if wanted is not None:
            expected = {each.uid: each for each in wanted}
            assert set(listed) == set(expected)
            for uid, each in self.instances.items():
                assert each["study_instance_uid"] == expected[uid].study
                assert each["series_instance_uid"] == expected[uid].series


class Peak:
    """The highest resident memory of a node while `with` lasts, sampled in a thread."""

    def __init__(self, node: Node, interval: float = 0.02) -> None:
        self.node, self.interval, self.value = node, interval, 0

    def __enter__(self) -> Self:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.is_set():
            try:
                self.value = max(self.value, self.node.rss())
            except psutil.NoSuchProcess:
                return
            time.sleep(self.interval)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def environment() -> dict[str, str]:
    """Return the environment of a node: this one, unbuffered, without a proxy that loopback must not take."""
    kept = {key: item for key, item in os.environ.items() if not key.lower().endswith("_proxy")}
    root = str(Path(__file__).resolve().parents[2])
    return {**kept, "PYTHONUNBUFFERED": "1", "PYTHONPATH": root}
