"""Document Consumer and Imaging Document Consumer: from a patient to verified image files.

The receipt counts what arrived against what the manifest names: a gateway may drop a source's failure and still say
Success (RAD-75), so the status of an answer is never taken for completeness.

References
----------
* IHE RAD TF-2, 4.69, 4.75; IHE ITI TF-2, 3.18, 3.38, 3.39, 3.43
* IHE RAD TF-3, 4.68.4.1.2 (what a manifest says of its instances and where they are)
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from xca_imaging import uids
from xca_imaging.errors import (
    ConfigurationError,
    DocumentUniqueIdError,
    ManifestError,
    OutputError,
    PeerError,
    PeerProtocolError,
    PeerTimeout,
    RegistryError,
    SubmissionRefused,
    UnknownCommunity,
)
from xca_imaging.gateway.peers import Endpoint, PartSink, SoapClient
from xca_imaging.gateway.receipt import InstanceRecord, ManifestFacts, Receipt
from xca_imaging.imaging import manifest as manifest_module
from xca_imaging.imaging import part10
from xca_imaging.imaging.manifest import Manifest
from xca_imaging.metadata.model import Code, DocumentEntry
from xca_imaging.metadata.stored_query import FindDocuments, StoredQuery
from xca_imaging.settings import Settings
from xca_imaging.transactions.document_set import DocumentRequest, DocumentResponse, RetrieveResponse
from xca_imaging.transactions.imaging_document_set import RetrieveImagingRequest, SeriesRequest, StudyRequest
from xca_imaging.wire import mtom

log = logging.getLogger(__name__)

KOS_FORMAT = Code(uids.KOS_SOP_CLASS, uids.DICOM_UID_REGISTRY)

# PS3.6 Table A-1: what can be stored as it is. Uncompressed first: a sender that offers both can send it unchanged.
ACCEPTED_SYNTAXES = (
    uids.EXPLICIT_VR_LITTLE_ENDIAN,
    uids.IMPLICIT_VR_LITTLE_ENDIAN,
    "1.2.840.10008.1.2.4.70",  # JPEG Lossless, first-order prediction
    "1.2.840.10008.1.2.4.57",  # JPEG Lossless
    "1.2.840.10008.1.2.4.80",  # JPEG-LS Lossless
    "1.2.840.10008.1.2.4.90",  # JPEG 2000 Lossless Only
    "1.2.840.10008.1.2.4.201",  # High-Throughput JPEG 2000 Lossless Only
    "1.2.840.10008.1.2.4.202",  # High-Throughput JPEG 2000 with RPCL, Lossless Only
    "1.2.840.10008.1.2.5",  # RLE Lossless
    "1.2.840.10008.1.2.1.99",  # Deflated Explicit VR Little Endian
    "1.2.840.10008.1.2.4.50",  # JPEG Baseline
    "1.2.840.10008.1.2.4.51",  # JPEG Extended
    "1.2.840.10008.1.2.4.81",  # JPEG-LS Near-Lossless
    "1.2.840.10008.1.2.4.91",  # JPEG 2000
    "1.2.840.10008.1.2.4.203",  # High-Throughput JPEG 2000
    "1.2.840.10008.1.2.4.100",  # MPEG2 Main Profile / Main Level
    "1.2.840.10008.1.2.4.101",  # MPEG2 Main Profile / High Level
    "1.2.840.10008.1.2.4.102",  # MPEG-4 AVC/H.264 High Profile / Level 4.1
    "1.2.840.10008.1.2.4.103",  # MPEG-4 AVC/H.264 BD-compatible
    "1.2.840.10008.1.2.4.104",  # MPEG-4 AVC/H.264 High Profile / Level 4.2, 2D
    "1.2.840.10008.1.2.4.105",  # MPEG-4 AVC/H.264 High Profile / Level 4.2, 3D
    "1.2.840.10008.1.2.4.106",  # MPEG-4 AVC/H.264 Stereo
    "1.2.840.10008.1.2.4.107",  # HEVC/H.265 Main Profile
    "1.2.840.10008.1.2.4.108",  # HEVC/H.265 Main 10 Profile
    uids.EXPLICIT_VR_BIG_ENDIAN,
)
_ATTEMPTS = 2  # a connection that broke in mid-answer is worth one more try for what is missing, no more
_UID = re.compile(r"[0-9]+(\.[0-9]+)*")


@dataclass(frozen=True, slots=True)
class Route:
    """Where a community's documents or images are asked for."""

    endpoint: Endpoint
    cross_gateway: bool


class Routes:
    """Endpoint of each transaction, per community; a URL given by hand stands before the configured ones."""

    def __init__(
        self,
        settings: Settings,
        base_url: Callable[[], str],
        *,
        registry_url: str = "",
        repository_url: str = "",
        imaging_url: str = "",
    ) -> None:
        self._settings, self._base_url = settings, base_url
        self._given = {"query": registry_url, "retrieve": repository_url, "imaging": imaging_url}

    def query(self, home_community_id: str) -> Route:
        return self._route("query", "registry", home_community_id)

    def retrieve(self, home_community_id: str) -> Route:
        return self._route("retrieve", "repository", home_community_id)

    def imaging(self, home_community_id: str) -> Route:
        return self._route("imaging", "imaging-source", home_community_id)

    def home_of_repository(self, repository_unique_id: str) -> str:
        """Return the community that a repository or imaging source is configured to belong to; empty for this one.

        Raises
        ------
        UnknownCommunity
            It is neither ours nor any configured community's.
        """
        settings = self._settings
        if self._given["imaging"] or settings.pacs_of_repository(repository_unique_id):
            return ""
        for community in settings.community:
            if repository_unique_id in community.repositories:
                return community.home_community_id
        raise UnknownCommunity(
            f"nothing says which community has {repository_unique_id}: "
            "give --home, or list it in [[community]] repositories"
        )

    def _route(self, kind: str, service: str, home_community_id: str) -> Route:
        settings = self._settings
        stall = settings.limits.stall_timeout
        if self._given[kind]:
            return Route(Endpoint(self._given[kind], self._given[kind], stall), cross_gateway=False)
        if home_community_id in ("", settings.node.home_community_id):
            # The answer waits for the PACS: its own no-progress limit speaks first.
            url = f"{self._base_url()}/services/{service}"
            return Route(Endpoint(settings.node.name, url, 2 * stall), cross_gateway=False)
        community = settings.community_of(home_community_id)
        if community is None:
            raise UnknownCommunity(f"{home_community_id} is no configured community", home_community_id)
        url = getattr(community, kind)
        if not url:
            raise ConfigurationError(
                str(settings.file), f"community.{kind}", f"is not set for {community.label}", "add its endpoint"
            )
        return Route(Endpoint(community.label, url, community.timeout), cross_gateway=True)


@dataclass(frozen=True, slots=True)
class Found:
    """The entries that a query found, and why there may be more than these; empty when it found all."""

    documents: tuple[DocumentEntry, ...]
    errors: tuple[RegistryError, ...] = ()


@dataclass(frozen=True, slots=True)
class FoundManifest:
    """A manifest in hand: its content and where it came from."""

    manifest: Manifest
    facts: ManifestFacts


class Progress:
    """What a retrieval tells while it runs; the default says nothing."""

    def expect(self, instances: int) -> None:
        """So many instances are wanted."""

    def received(self, size: int) -> None:
        """So many more bytes have come."""

    def arrived(self) -> None:
        """One more instance is whole."""


class _FileSink:
    """Writes one attachment to a file of its own, hashing what passes. Every method raises OutputError."""

    def __init__(self, folder: Path, progress: Progress) -> None:
        self.path = folder / f"{uuid.uuid4().hex}.part"
        self.size = 0
        self.whole = False
        self._hash = hashlib.sha256()
        self._progress = progress
        with _writing(self.path):
            # Unbuffered: what cannot be written is known at once, and the pieces are large.
            self._file = self.path.open("wb", buffering=0)

    def write(self, data: memoryview) -> None:
        rest = data
        with _writing(self.path):
            while rest:
                rest = rest[self._file.write(rest) :]
        self._hash.update(data)
        self.size += len(data)
        self._progress.received(len(data))

    def finish(self) -> None:
        with _writing(self.path):
            self._file.close()
        self.whole = True
        self._progress.arrived()

    def abandon(self) -> None:
        with _writing(self.path):
            self._file.close()
            self.path.unlink(missing_ok=True)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


class Consumer:
    """Finds documents, fetches manifests and retrieves the images that they name."""

    def __init__(self, client: SoapClient, routes: Routes) -> None:
        self._client, self._routes = client, routes

    async def find_manifests(self, patient_id: str, home_community_id: str = "") -> Found:
        """Return the approved imaging manifests of a patient, here or in another community (ITI-18, ITI-38).

        Raises
        ------
        SubmissionRefused
            The query failed.
        PeerError
        """
        find = FindDocuments(patient_id=patient_id, status=(uids.APPROVED,), format_codes=(KOS_FORMAT,))
        route = self._routes.query(home_community_id)
        response = await self._client.stored_query(
            route.endpoint, StoredQuery(find, "LeafClass", home_community_id), cross_gateway=route.cross_gateway
        )
        errors = (*(error for error in response.errors if not error.warning), *response.problems)
        if not response.succeeded and not errors:
            errors = (RegistryError(f"{route.endpoint.peer} answered {response.status!r} and gave no error"),)
        if errors and not response.objects.documents:
            raise SubmissionRefused(errors)
        return Found(response.objects.documents, errors)

    async def fetch_manifest(
        self, document_unique_id: str, repository_unique_id: str, home_community_id: str = ""
    ) -> FoundManifest:
        """Retrieve one manifest (ITI-43, ITI-39) and read it.

        Raises
        ------
        RegistryError, PeerError, ManifestError
        """
        route = self._routes.retrieve(home_community_id)
        wanted = DocumentRequest(home_community_id or None, repository_unique_id, document_unique_id)
        response, contents = await self._client.retrieve_documents(
            route.endpoint, [wanted], cross_gateway=route.cross_gateway
        )
        if document_unique_id not in contents:
            errors = response.registry.errors
            raise errors[0] if errors else DocumentUniqueIdError("the answer does not hold it", document_unique_id)
        content = contents[document_unique_id]
        facts = ManifestFacts(
            document_unique_id, hashlib.sha256(content).hexdigest(), home_community_id, repository_unique_id
        )
        # A hostile manifest costs seconds to read: not on the event loop.
        return FoundManifest(await asyncio.to_thread(manifest_module.read, content), facts)

    async def retrieve(
        self,
        manifests: Sequence[FoundManifest],
        out: Path,
        *,
        accept: Sequence[str] = ACCEPTED_SYNTAXES,
        progress: Progress | None = None,
    ) -> Receipt:
        """Retrieve every instance that the manifests name into `out/<study>/<series>/<instance>.dcm`.

        Problems of single instances and of whole communities end in the receipt; they are not raised.
        """
        progress = progress or Progress()
        records = _wanted(manifests, self._routes)
        if not records:
            raise ManifestError("the manifest names no instances")
        receipt = Receipt(f"urn:uuid:{uuid.uuid4()}", datetime.now(UTC), tuple(m.facts for m in manifests), records)
        progress.expect(len(records))
        with _incoming(out) as incoming:
            await self._retrieve(receipt, incoming, accept, progress)
        receipt.finished_at = datetime.now(UTC)
        return receipt

    async def _retrieve(self, receipt: Receipt, incoming: Path, accept: Sequence[str], progress: Progress) -> None:
        records = receipt.instances
        message_id = receipt.trace_id
        for home in dict.fromkeys(record.home_community_id for record in records):
            mine = [record for record in records if record.home_community_id == home]
            for _ in range(_ATTEMPTS):
                missing = [record for record in mine if record.state != "held"]
                try:
                    route = self._routes.imaging(home)
                    await self._ask(route, missing, accept, incoming, receipt, progress, message_id)
                    break
                except OutputError as exc:
                    _fail(records, str(exc))
                    return
                except (PeerProtocolError, PeerTimeout) as exc:
                    _fail(missing, str(exc))
                except (PeerError, UnknownCommunity) as exc:
                    _fail(missing, str(exc))
                    break
                finally:
                    message_id = ""

    async def _ask(
        self,
        route: Route,
        records: Sequence[InstanceRecord],
        accept: Sequence[str],
        incoming: Path,
        receipt: Receipt,
        progress: Progress,
        message_id: str,
    ) -> None:
        """Send one RAD-69 or RAD-75 and settle what it brings, also when it breaks off."""
        responses: list[RetrieveResponse] = []
        sinks: dict[str, _FileSink] = {}

        def sink(content_id: str, content_type: str) -> PartSink:
            made = sinks[content_id] = _FileSink(incoming, progress)
            return made

        for record in records:
            record.attempts += 1
            record.reason = "never arrived"
        try:
            await self._client.retrieve_imaging(
                route.endpoint,
                _request(records, accept),
                sink,
                responses.append,
                cross_gateway=route.cross_gateway,
                message_id=message_id,
            )
        finally:
            for response in responses:
                _settle(response, records, sinks, accept, incoming, receipt)
            for content_id, left in sinks.items():
                if left.whole and left.path.exists():
                    receipt.unexpected.append(f"attachment {content_id}")
                    left.path.unlink()


def _wanted(manifests: Iterable[FoundManifest], routes: Routes) -> list[InstanceRecord]:
    """Return one record per instance that the manifests name; an instance named twice is wanted once."""
    records: dict[tuple[str, str, str], InstanceRecord] = {}
    for found in manifests:
        for study in found.manifest.studies:
            for series in study.series:
                # Old sources leave out the Retrieve Location UID; the repository of the manifest is the best guess.
                location = series.retrieve_location_uid or found.facts.repository_unique_id
                home = found.facts.home_community_id or routes.home_of_repository(location)
                for instance in series.instances:
                    records.setdefault(
                        (home, location, instance.sop_instance_uid),
                        InstanceRecord(
                            study_instance_uid=study.study_instance_uid,
                            series_instance_uid=series.series_instance_uid,
                            sop_instance_uid=instance.sop_instance_uid,
                            home_community_id=home,
                            repository_unique_id=location,
                        ),
                    )
    return list(records.values())


def _request(records: Sequence[InstanceRecord], accept: Sequence[str]) -> RetrieveImagingRequest:
    studies: dict[str, dict[str, list[DocumentRequest]]] = {}
    for record in records:
        series = studies.setdefault(record.study_instance_uid, {}).setdefault(record.series_instance_uid, [])
        series.append(
            DocumentRequest(record.home_community_id or None, record.repository_unique_id, record.sop_instance_uid)
        )
    return RetrieveImagingRequest(
        tuple(
            StudyRequest(study, tuple(SeriesRequest(uid, tuple(documents)) for uid, documents in series.items()))
            for study, series in studies.items()
        ),
        tuple(accept),
    )


def _settle(
    response: RetrieveResponse,
    records: Sequence[InstanceRecord],
    sinks: Mapping[str, _FileSink],
    accept: Sequence[str],
    incoming: Path,
    receipt: Receipt,
) -> None:
    by_id = {(record.repository_unique_id, record.sop_instance_uid): record for record in records}
    for document in response.documents:
        record = by_id.get((document.repository_unique_id, document.document_unique_id))
        if record is None:
            receipt.unexpected.append(document.document_unique_id)
            continue
        try:
            _keep(document, record, sinks, accept, incoming)
        except part10.Part10Error as exc:
            record.reason = str(exc)
    for error in response.registry.errors:
        for record in records:
            # RAD-69 wants the document in `location`, RAD-75 the gateway: then it stands in `codeContext`.
            if record.state != "held" and record.sop_instance_uid in _uids_in(f"{error.location} {error.context}"):
                record.reason = f"{error.code}: {error.context}"
    general = [error for error in response.registry.errors if not error.warning]
    for record in records:
        if record.state != "held" and record.reason == "never arrived" and len(general) == 1:
            record.reason = f"{general[0].code}: {general[0].context}"


def _uids_in(text: str) -> set[str]:
    return set(_UID.findall(text))


def _keep(
    document: DocumentResponse,
    record: InstanceRecord,
    sinks: Mapping[str, _FileSink],
    accept: Sequence[str],
    incoming: Path,
) -> None:
    """Check one instance and move it to its place.

    Raises
    ------
    part10.Part10Error
        It is not what was asked for, or not whole.
    OutputError
    """
    content = document.content
    if isinstance(content, mtom.Reference):
        sink = sinks.get(content.content_id)
        if sink is None or not sink.whole:
            raise part10.Part10Error("the answer names an attachment that did not come whole")
    else:
        sink = _FileSink(incoming, Progress())
        sink.write(memoryview(content))
        sink.finish()
    facts = part10.identify(sink.path)
    asked = (record.study_instance_uid, record.series_instance_uid, record.sop_instance_uid)
    if (facts.study_instance_uid, facts.series_instance_uid, facts.sop_instance_uid) != asked:
        raise part10.Part10Error(
            f"another instance came: {facts.sop_instance_uid} of series {facts.series_instance_uid}"
        )
    if facts.transfer_syntax_uid not in accept:
        raise part10.Part10Error(f"it came in transfer syntax {facts.transfer_syntax_uid}, which was not asked for")
    try:
        part10.verify_whole(sink.path, facts.transfer_syntax_uid)
    except part10.Truncated:
        raise
    except part10.Part10Error as exc:
        log.warning("%s is kept as it came: %s", record.sop_instance_uid, exc)
    target = incoming.parent / record.study_instance_uid / record.series_instance_uid / f"{record.sop_instance_uid}.dcm"
    with _writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(sink.path, target)
    record.state, record.size, record.sha256 = "held", sink.size, sink.sha256
    record.transfer_syntax_uid = facts.transfer_syntax_uid
    record.reason = ""


def _fail(records: Iterable[InstanceRecord], reason: str) -> None:
    for record in records:
        if record.state != "held":
            record.reason = reason


@contextmanager
def _incoming(out: Path) -> Iterator[Path]:
    """Give a folder below `out` for what is not checked yet; nothing of it stays."""
    folder = out / ".incoming"
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise OutputError(f"{path} cannot be written: {exc.strerror or exc}") from exc
