"""The commands as a user meets them: messages, exit codes, the ready line, signals, an installed wheel."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.scenarios.holding import rad69
from tests.support import images, peers, soap_client
from tests.support.node import HOME, READY, Node, environment, pacs_section, toml

pytestmark = pytest.mark.timeout(120)

ROOT = Path(__file__).resolve().parents[2]
PACS = {
    "name": "main",
    "ae_title": "PACS",
    "host": "127.0.0.1",
    "port": 4242,
    "retrieve_location_uid": "1.3.6.1.4.1.21367.2017.1.3",
}


def _run(*arguments: str, cwd: Path | None = None, deadline: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "xca_imaging", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=deadline,
        cwd=cwd,
        env=environment(),
        check=False,
    )


def _check(tmp_path: Path, config: dict[str, Any] | str) -> subprocess.CompletedProcess[str]:
    file = tmp_path / "node.toml"
    file.write_text(config if isinstance(config, str) else toml(config))
    return _run("check-config", "--config", str(file))


# --------------------------------------------------------------------------------------------------------------------
# check-config
# --------------------------------------------------------------------------------------------------------------------


def test_the_smallest_configuration_is_good(tmp_path: Path) -> None:
    done = _check(tmp_path, {"node": {"home_community_id": HOME}})
    assert done.returncode == 0, done.stderr


def test_the_contracts_example_is_known_key_by_key(tmp_path: Path) -> None:
    """Every key of the contract is known: what this version cannot do may be refused, but not as unknown."""
    contract = ROOT.parent / "shared" / "contract.md"
    if not contract.exists():
        pytest.skip("needs ../shared/contract.md")
    (example,) = re.findall(r"```toml\n(.*?)```", contract.read_text(), re.DOTALL)
    done = _check(tmp_path, example)
    assert "unknown" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("config", "key", "hint"),
    [
        ({}, "node", ""),
        ({"node": {}}, "node.home_community_id", ""),
        ({"node": {"home_community_id": "1.2.3"}}, "node.home_community_id", "urn:oid:"),
        ({"node": {"home_community_id": HOME, "drain_timeot": "3s"}}, "node.drain_timeot", "drain_timeout"),
        ({"node": {"home_community_id": HOME, "drain_timeout": "3 parsecs"}}, "node.drain_timeout", "30s"),
        ({"node": {"home_community_id": HOME}, "htp": {}}, "htp", "http"),
        ({"node": {"home_community_id": HOME}, "http": {"port": 70000}}, "http.port", ""),
        ({"node": {"home_community_id": HOME}, "http": {"port": "8080"}}, "http.port", ""),
        ({"node": {"home_community_id": HOME}, "http": {"host": "0.0.0.0"}}, "http", "insecure"),
        ({"node": {"home_community_id": HOME}, "dicom": {"host": "0.0.0.0"}}, "dicom", "insecure"),
        ({"node": {"home_community_id": HOME}, "dicom": {"ae_title": "A" * 17}}, "dicom.ae_title", "16"),
        ({"node": {"home_community_id": HOME}, "spool": {"max_bytes": "many"}}, "spool.max_bytes", "GB"),
        ({"node": {"home_community_id": HOME}, "pacs": [{"name": "x"}]}, "ae_title", ""),
        ({"node": {"home_community_id": HOME}, "pacs": [{**PACS, "retrieve": "c-mov"}]}, "retrieve", "c-move"),
        ({"node": {"home_community_id": HOME}, "pacs": [PACS, {**PACS}]}, "name", ""),
        ({"node": {"home_community_id": HOME}, "community": [{"home_community_id": HOME}]}, "home_community_id", ""),
        ({"node": {"home_community_id": HOME}, "database": {"url": 5}}, "database.url", ""),
        ({"node": {"home_community_id": HOME, "profile": "no-such"}}, "node.profile", "ihe"),
    ],
)
def test_what_is_wrong_is_said_with_file_key_and_hint(tmp_path: Path, config: Any, key: str, hint: str) -> None:
    done = _check(tmp_path, config)
    said = done.stdout + done.stderr
    assert done.returncode == 2, said
    assert "node.toml" in said
    assert key in said
    assert hint in said
    assert "Traceback" not in said


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    done = _check(tmp_path, {"node": {"home_community_id": "x", "colour": "red"}, "http": {"port": -1}})
    said = done.stdout + done.stderr
    assert done.returncode == 2
    for key in ("home_community_id", "colour", "port"):
        assert key in said


@pytest.mark.parametrize("content", ["[node\n", "node = 1\n", "\0", "[node]\nname = unquoted\n"])
def test_what_is_not_toml(tmp_path: Path, content: str) -> None:
    done = _check(tmp_path, content)
    assert done.returncode == 2
    assert "node.toml" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_file(tmp_path: Path) -> None:
    done = _run("check-config", "--config", str(tmp_path / "nothing.toml"))
    assert done.returncode == 2
    assert "nothing.toml" in done.stdout + done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["serve"],
        ["query", "--config", "x.toml"],
        ["publish", "--config", "x.toml"],
        ["retrieve", "--config", "x.toml", "--out", "y"],
    ],
)
def test_wrong_arguments_end_with_2_and_usage(arguments: list[str], tmp_path: Path) -> None:
    done = _run(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert "usage" in (done.stdout + done.stderr).lower()
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("verb", ["serve", "check-config", "publish", "query", "retrieve", "echo"])
def test_each_verb_explains_itself(verb: str) -> None:
    done = _run(verb, "--help")
    assert done.returncode == 0
    assert "--config" in done.stdout


# --------------------------------------------------------------------------------------------------------------------
# serve
# --------------------------------------------------------------------------------------------------------------------


def test_port_0_picks_free_ports_and_says_which(tmp_path: Path) -> None:
    with Node(tmp_path / "node", {"http": {"port": 0}, "dicom": {"port": 0}}) as node:
        assert node.http_port > 0
        assert node.dicom_port > 0
        assert peers.accepts(node.http_port)
        assert peers.accepts(node.dicom_port)
        assert requests.get(node.url("/health/live"), timeout=5).status_code == 200
        assert requests.get(node.url("/health/ready"), timeout=5).status_code in (200, 503)
        metrics = requests.get(node.url("/metrics"), timeout=5)
        assert metrics.status_code == 200
        assert metrics.headers["Content-Type"].startswith("text/plain")


def test_one_line_on_stdout_and_nothing_else(tmp_path: Path) -> None:
    with Node(tmp_path / "node") as node:
        soap_client.send(node, soap_client.ITI18, soap_client.find_documents(f"x^^^&{images.AUTHORITY}&ISO"))
        assert node.terminate() == 0
        time.sleep(0.2)
        assert len(node.stdout) == 1
        assert READY.fullmatch(node.stdout[0].strip())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_an_idle_node_soon(tmp_path: Path, number: signal.Signals) -> None:
    with Node(tmp_path / "node") as node:
        assert node.process is not None
        started = time.monotonic()
        node.process.send_signal(number)
        code = node.process.wait(20)
        assert time.monotonic() - started < 5
        assert code == 0 or number is signal.SIGINT
        assert "Traceback" not in node.tail()


def test_a_taken_port_is_said_so(tmp_path: Path) -> None:
    with Node(tmp_path / "one") as node:
        other = Node(tmp_path / "two", {"http": {"port": node.http_port}})
        other.write()
        done = other.run("serve", deadline=30)
        assert done.returncode not in (0, -9)
        assert str(node.http_port) in done.stderr
        assert done.stdout == ""
        assert "Traceback" not in done.stderr


def test_a_wrong_configuration_does_not_serve(tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_text('[node]\nhome_community_id = "x"\n')
    done = _run("serve", "--config", str(file))
    assert done.returncode == 2
    assert "home_community_id" in done.stderr
    assert done.stdout == ""


@pytest.mark.peer
@pytest.mark.slow
def test_sigterm_lets_a_running_transfer_end(tmp_path: Path) -> None:
    study = images.big_ct(tmp_path / "study", 16)
    node = Node(tmp_path / "node", {"node": {"drain_timeout": "30s"}})
    with (
        peers.Proxy(node.dicom_port, rate=3_000_000) as relay,
        peers.Orthanc(tmp_path / "pacs", [peers.Entity("XCAI", relay.port)]) as pacs,
    ):
        pacs.upload(study.paths)
        node.config["pacs"] = [pacs_section(pacs)]
        with node:
            answers: list[soap_client.Answer] = []
            worker = threading.Thread(target=lambda: answers.append(rad69(node, study.instances)))
            worker.start()
            peers.wait_until(lambda: relay.relayed > 1_000_000, 20, "the transfer began")
            assert node.process is not None
            node.process.send_signal(signal.SIGTERM)
            worker.join(40)
            assert node.process.wait(20) == 0
            (answer,) = answers
            assert answer.registry_status == soap_client.SUCCESS, answer.errors
            assert set(answer.documents) == study.uids


@pytest.mark.peer
@pytest.mark.slow
def test_sigterm_does_not_wait_longer_than_drain_timeout(tmp_path: Path) -> None:
    study = images.big_ct(tmp_path / "study", 16)
    node = Node(tmp_path / "node", {"node": {"drain_timeout": "2s"}})
    with (
        peers.Proxy(node.dicom_port, hold_after=2_000_000) as relay,
        peers.Orthanc(tmp_path / "pacs", [peers.Entity("XCAI", relay.port)]) as pacs,
    ):
        pacs.upload(study.paths)
        node.config["pacs"] = [pacs_section(pacs)]
        with node:

            def ask() -> None:
                with contextlib.suppress(OSError, AssertionError, http.client.HTTPException):
                    rad69(node, study.instances, check=False)

            worker = threading.Thread(target=ask, daemon=True)
            worker.start()
            assert relay.held.wait(20)
            started = time.monotonic()
            assert node.terminate() == 0
            assert time.monotonic() - started < 10


@pytest.mark.slow
def test_what_was_registered_survives_a_restart(tmp_path: Path) -> None:
    study = images.ct(tmp_path / "study", 2)
    node = Node(tmp_path / "node")
    with peers.Qrscp(tmp_path / "pacs", [node.entity]) as pacs:
        pacs.upload(study.paths)
        node.config["pacs"] = [pacs_section(pacs, assigning_authority=images.AUTHORITY)]
        with node:
            node.publish(study)
            before = node.query(study.cx)
            assert node.process is not None
            node.process.kill()
            node.process.wait()
        with node:
            assert node.query(study.cx) == before
            receipt = node.retrieve(tmp_path / "out", "--study", study.uid)
            receipt.check(study.instances)


# --------------------------------------------------------------------------------------------------------------------
# echo, query
# --------------------------------------------------------------------------------------------------------------------


def test_echo(tmp_path: Path) -> None:
    node = Node(tmp_path / "node")
    with peers.Qrscp(tmp_path / "pacs", [node.entity]) as pacs:
        node.config["pacs"] = [pacs_section(pacs)]
        node.write()
        done = node.run("echo")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "main" in done.stdout
    done = node.run("echo")
    assert done.returncode == 1
    assert "main" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_query_without_a_server_says_so(tmp_path: Path) -> None:
    node = Node(tmp_path / "node")
    done = node.run("query", "--patient", f"x^^^&{images.AUTHORITY}&ISO")
    assert done.returncode not in (0, 2)
    assert "Traceback" not in done.stderr
    assert str(node.http_port) in done.stderr


def test_query_of_nobody_prints_an_empty_array(tmp_path: Path) -> None:
    with Node(tmp_path / "node") as node:
        assert node.query(f"x^^^&{images.AUTHORITY}&ISO") == []


def test_a_patient_id_that_is_no_cx_is_said_so(tmp_path: Path) -> None:
    with Node(tmp_path / "node") as node:
        done = node.run("query", "--patient", "just-a-number", "--json")
        assert done.returncode != 0
        assert "just-a-number" in done.stderr or "ISO" in done.stderr
        assert "Traceback" not in done.stderr


# --------------------------------------------------------------------------------------------------------------------
# installed, demo
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_wheel_runs_outside_the_checkout(tmp_path: Path) -> None:
    """The wheel carries profiles/ and wsdl/: nothing of the checkout is on the path."""
    source = tmp_path / "source"
    kept = ("pyproject.toml", "setup.cfg", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md")
    peers.run("mkdir", str(source))
    for name in (*kept, "xca_imaging", "profiles", "wsdl"):
        if (ROOT / name).exists():
            peers.run("cp", "-r", str(ROOT / name), str(source))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    wheels = tmp_path / "wheels"
    # `make` puts what builds wheels into the environment; elsewhere pip fetches it
    ready = find_spec("wheel") is not None
    isolation = ["--no-build-isolation"] if ready else []
    peers.run(*pip, "wheel", "--no-deps", *isolation, "-q", "-w", str(wheels), str(source))
    (wheel,) = wheels.glob("*.whl")
    prefix = tmp_path / "installed"
    peers.run(sys.executable, "-m", "venv", "--without-pip", str(prefix))
    python = str(prefix / "bin" / "python")
    peers.run(*pip, "--python", python, "install", "--no-deps", "--no-compile", "-q", str(wheel))
    # what the package needs comes from this environment; the wheel's own files stand before it on the path
    (own,) = (prefix / "lib").glob("python*/site-packages")
    (own / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    site = tmp_path / "elsewhere"
    site.mkdir()
    program = [str(prefix / "bin" / "xca-imaging")]
    env = {key: item for key, item in environment().items() if key != "PYTHONPATH"}
    where = subprocess.run(
        [python, "-c", "import xca_imaging; print(xca_imaging.__file__)"],
        capture_output=True,
        text=True,
        cwd=site,
        env=env,
        check=True,
    )
    assert where.stdout.startswith(str(own)), "the checkout is imported, not the wheel"
    config = site / "node.toml"
    config.write_text(
        toml(
            {
                "node": {"home_community_id": HOME},
                "http": {"port": 0},
                "dicom": {"port": 0},
                "repository": {"unique_id": "1.3.6.1.4.1.21367.2017.1.2"},
            }
        )
    )
    checked = subprocess.run(
        [*program, "check-config", "--config", str(config)],
        capture_output=True,
        text=True,
        cwd=site,
        env=env,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    log = site / "serve.log"
    with log.open("wb") as stream:
        serving = subprocess.Popen(
            [*program, "serve", "--config", str(config)],
            stdout=subprocess.PIPE,
            stderr=stream,
            text=True,
            cwd=site,
            env=env,
        )
    try:
        assert serving.stdout is not None
        line = serving.stdout.readline()
        match = READY.fullmatch(line.strip())
        assert match, log.read_text()
        base = f"http://127.0.0.1:{match['http']}"
        for path in ("registry", "repository", "imaging-source", "responding-gateway", "responding-imaging-gateway"):
            answer = requests.get(f"{base}/services/{path}?wsdl", timeout=10)
            assert answer.status_code == 200, path
            assert b"definitions" in answer.content
        patient = f"x^^^&{images.AUTHORITY}&ISO"
        found = soap_client.send(f"{base}/services/registry", soap_client.ITI18, soap_client.find_documents(patient))
        assert found.registry_status == soap_client.SUCCESS
    finally:
        serving.terminate()
        assert serving.wait(20) == 0
        serving.stdout.close()  # type: ignore[union-attr]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_demo_once(tmp_path: Path) -> None:
    """Everything that the demo promises, from an empty folder, with nothing configured.

    What it says is for people; that it says of both communities, of sizes and times, and where the files are is the
    contract's.
    """
    started = time.monotonic()
    done = _run("demo", "--once", "--port", str(peers.free_port()), cwd=tmp_path, deadline=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    said = done.stdout
    for word in ("East", "West", "RAD-75", "kB", " ms"):
        assert word in said, word
    named = [Path(found.rstrip(",.")) for found in re.findall(r"(/\S+)", said)]
    receipts = [path / "receipt.json" for path in named if (path / "receipt.json").is_file()]
    assert receipts, "the output names no folder with a receipt"
    receipt = json.loads(receipts[0].read_text())
    assert receipt["complete"] is True
    assert len(receipt["instances"]) >= 2
    assert time.monotonic() - started < 180
