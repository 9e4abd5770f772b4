"""The environment of the cases: two PACSs with the published images and a node in front of them.

PACS `ids` is what the node's own Imaging Document Source serves; PACS `e` plays the source E of the responding imaging
gateway, as a second PACS of the node.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import pydicom

from tests.support import images, peers, soap_client
from tests.support.node import Node, pacs_section

DATA = Path(__file__).resolve().parents[2] / "shared" / "conformance" / "data"

HOME = "urn:oid:1.3.6.1.4.1.21367.13.70.201"
REPOSITORY = "1.3.6.1.4.1.21367.13.70.201.10"
SOURCE = "1.3.6.1.4.1.21367.13.80.110"
SOURCE_E = "1.3.6.1.4.1.21367.13.71.201.1"
AUTHORITY = "1.3.6.1.4.1.21367.2005.13.20.1000"
DEPARTMENT = "1.3.6.1.4.1.21367.2005.13.20.9000"
"""Assigning authority of the departments' own patient ids: not the affinity domain's."""
ACCESSION_AUTHORITY = "1.3.6.1.4.1.21367.13.202.2000"


@dataclass
class Study:
    """A study of `dataset.json`."""

    name: str
    facts: dict[str, Any]

    @property
    def uid(self) -> str:
        return str(self.facts["study"])

    @property
    def instances(self) -> list[images.Instance]:
        return [
            images.Instance(
                DATA / next(iter(sop["files"].values())),
                self.facts["patient_id"],
                self.uid,
                series["uid"],
                sop["sop"],
                sop["sop_class"],
                next(iter(sop["files"])),
            )
            for series in self.facts["series"]
            for sop in series["instances"]
        ]


@dataclass
class Environment:
    """What a case may use."""

    node: Node
    folder: Path
    short: bool
    published: set[str] = field(default_factory=set)

    @cached_property
    def studies(self) -> dict[str, Study]:
        document = json.loads((DATA / "dataset.json").read_text())
        return {name: Study(name, facts) for name, facts in document["studies"].items()}

    @cached_property
    def originals(self) -> dict[str, Path]:
        """The published images by SOP Instance UID (explicit VR little endian)."""
        return {each.uid: each.path for study in self.studies.values() for each in study.instances}

    def body(self, name: str) -> str:
        """Return a published request body."""
        return (DATA / "requests" / name).read_text()

    def publish(self, name: str) -> Study:
        """Publish a study once, as the patient of the affinity domain."""
        study = self.studies[name]
        if name not in self.published:
            self.node.publish(study, "--as", study.facts["xds_patient_id"])
            self.published.add(name)
        return study


@contextlib.contextmanager
def start(folder: Path, *, short: bool) -> Iterator[Environment]:
    """Start the PACSs and the node, and end them.

    The PACSs are Orthanc: the published ultrasound image is of a retired class that few archives take.
    """
    (folder / "node").mkdir(parents=True, exist_ok=True)
    profile = folder / "node" / "affinity-domain.toml"
    profile.write_text(f'extends = "ihe"\naccession_assigning_authority = "{ACCESSION_AUTHORITY}"\n')
    node = Node(
        folder / "node",
        {
            "node": {"home_community_id": HOME, "profile": profile.name},
            "repository": {"unique_id": REPOSITORY},
            "registry": {"assigning_authorities": [AUTHORITY]},
        },
    )
    environment = Environment(node, folder, short)
    with (
        peers.Orthanc(folder / "ids", [node.entity], ae_title="IDS") as ids,
        peers.Orthanc(folder / "e", [node.entity], ae_title="SOURCE_E") as e,
    ):
        for pacs, roles in ((ids, ("ids",)), (e, ("e",))):
            pacs.upload(
                instance.path
                for study in environment.studies.values()
                if study.facts["role"] in roles
                for instance in study.instances
            )
        node.config["pacs"] = [
            pacs_section(ids, name="ids", location=SOURCE, assigning_authority=DEPARTMENT),
            pacs_section(e, name="e", location=SOURCE_E, assigning_authority=DEPARTMENT),
        ]
        with node:
            yield environment


def check_same_image(content: bytes, original: Path, transfer_syntaxes: list[str]) -> None:
    """Check what cases.md section 2 calls the same image."""
    got, expected = pydicom.dcmread(BytesIO(content)), pydicom.dcmread(original)
    for keyword in (
        "SOPClassUID",
        "SOPInstanceUID",
        "PatientID",
        "PatientBirthDate",
        "PatientSex",
        "StudyInstanceUID",
        "SeriesInstanceUID",
    ):
        assert got[keyword].value == expected[keyword].value, keyword
    assert got.file_meta.TransferSyntaxUID in transfer_syntaxes, got.file_meta.TransferSyntaxUID


def check_documents(
    answer: soap_client.Answer, environment: Environment, body: str, *, repository: str, home: str
) -> None:
    """Check that exactly what a published request names came back, each the same image."""
    request = soap_client.parse_xml(body.encode())
    wanted = {each.text for each in request.iter(f"{{{soap_client.XDSB}}}DocumentUniqueId")}
    syntaxes = [each.text for each in request.iter(f"{{{soap_client.XDSI}}}TransferSyntaxUID")]
    assert answer.registry_status == soap_client.SUCCESS, answer.errors
    documents = answer.documents
    assert set(documents) == wanted, f"{len(documents)} documents of {len(wanted)}"
    for uid, document in documents.items():
        assert document.repository == repository
        assert document.home == home
        assert document.mime_type == "application/dicom"
        check_same_image(document.content, environment.originals[uid], syntaxes)


def check_failure(answer: soap_client.Answer, code: str) -> None:
    """Check a failure: at least one error with a code, and no document."""
    assert answer.registry_status == soap_client.FAILURE, answer.registry_status
    assert answer.errors, "no RegistryError"
    assert {error.code for error in answer.errors} == {code}, answer.errors
    assert not answer.documents


@dataclass
class Seen:
    """One request that passed the recorder."""

    path: str
    content_type: str
    body: bytes

    @property
    def answer_form(self) -> soap_client.Answer:
        """The request taken apart by the reader of answers: the packaging is the same."""
        from email.message import Message

        headers = Message()
        headers["Content-Type"] = self.content_type
        return soap_client.read_answer(200, headers, self.body)  # type: ignore[arg-type]


@contextlib.contextmanager
def recorder(target: Node) -> Iterator[tuple[str, list[Seen]]]:
    """Run a relay before a node that keeps what a client sends; yields its base URL and what it saw."""
    seen: list[Seen] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = _read_body(self)
            seen.append(Seen(self.path, self.headers["Content-Type"], body))
            connection = HTTPConnection("127.0.0.1", target.http_port, timeout=60)
            try:
                connection.request("POST", self.path, body, {"Content-Type": self.headers["Content-Type"]})
                response = connection.getresponse()
                content = response.read()
            finally:
                connection.close()
            self.send_response(response.status)
            self.send_header("Content-Type", response.headers["Content-Type"])
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *arguments: Any) -> None:
            """Say nothing: the case tells what matters."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def _read_body(handler: BaseHTTPRequestHandler) -> bytes:
    """Return the body of a request in either framing (RFC 9112, 6)."""
    if "chunked" not in handler.headers.get("Transfer-Encoding", ""):
        return handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
    chunks = []
    while size := int(handler.rfile.readline().split(b";")[0], 16):
        chunks.append(handler.rfile.read(size))
        handler.rfile.readline()
    while handler.rfile.readline().strip():
        continue
    return b"".join(chunks)
