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
import uuid
from collections.abc import Callable, Iterable, Sequence
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
from xca_imaging.gateway.peers import Endpoint, SoapClient
from xca_imaging.gateway.receipt import ManifestFacts, Receipt
from xca_imaging.gateway.retrieval import Progress, Retrieval
from xca_imaging.imaging import manifest as manifest_module
from xca_imaging.imaging.ledger import Ledger, Want
from xca_imaging.imaging.manifest import Manifest
from xca_imaging.metadata.model import Code, DocumentEntry
from xca_imaging.metadata.stored_query import FindDocuments, StoredQuery
from xca_imaging.settings import Settings
from xca_imaging.transactions.document_set import DocumentRequest, RetrieveResponse
from xca_imaging.transactions.imaging_document_set import RetrieveImagingRequest, SeriesRequest, StudyRequest

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
        wants = _wanted(manifests, self._routes)
        if not wants:
            raise ManifestError("the manifest names no instances")
        receipt = Receipt(
            f"urn:uuid:{uuid.uuid4()}", datetime.now(UTC), tuple(m.facts for m in manifests), Ledger(wants)
        )
        with Retrieval(receipt, out, accept, progress or Progress()) as retrieval:
            await self._retrieve(retrieval)
        receipt.finished_at = datetime.now(UTC)
        return receipt

    async def _retrieve(self, retrieval: Retrieval) -> None:
        message_id = retrieval.receipt.trace_id
        for home in dict.fromkeys(want.home_community_id for want in retrieval.missing()):
            for _ in range(_ATTEMPTS):
                missing = [want for want in retrieval.missing() if want.home_community_id == home]
                try:
                    await self._ask(self._routes.imaging(home), missing, retrieval, message_id)
                    break
                except OutputError as exc:
                    retrieval.blame(retrieval.missing(), str(exc))
                    return
                except (PeerProtocolError, PeerTimeout) as exc:
                    retrieval.blame(missing, str(exc))
                except (PeerError, UnknownCommunity) as exc:
                    retrieval.blame(missing, str(exc))
                    break
                finally:
                    message_id = ""

    async def _ask(self, route: Route, wants: Sequence[Want], retrieval: Retrieval, message_id: str) -> None:
        """Send one RAD-69 or RAD-75 and settle what it brings, also when it breaks off."""
        responses: list[RetrieveResponse] = []
        retrieval.begin(wants)
        try:
            await self._client.retrieve_imaging(
                route.endpoint,
                _request(wants, retrieval.accept),
                retrieval.sink,
                responses.append,
                cross_gateway=route.cross_gateway,
                message_id=message_id,
            )
        finally:
            retrieval.settle(responses, wants)


def _wanted(manifests: Iterable[FoundManifest], routes: Routes) -> list[Want]:
    """Return what the manifests name; an instance named twice is wanted once."""
    wants: dict[tuple[str, str, str], Want] = {}
    for found in manifests:
        for study in found.manifest.studies:
            for series in study.series:
                # Old sources leave out the Retrieve Location UID; the repository of the manifest is the best guess.
                location = series.retrieve_location_uid or found.facts.repository_unique_id
                home = found.facts.home_community_id or routes.home_of_repository(location)
                for instance in series.instances:
                    uid = instance.sop_instance_uid
                    wants.setdefault(
                        (home, location, uid),
                        Want(study.study_instance_uid, series.series_instance_uid, uid, location, home),
                    )
    return list(wants.values())


def _request(wants: Sequence[Want], accept: Sequence[str]) -> RetrieveImagingRequest:
    studies: dict[str, dict[str, list[DocumentRequest]]] = {}
    for want in wants:
        series = studies.setdefault(want.study_instance_uid, {}).setdefault(want.series_instance_uid, [])
        series.append(DocumentRequest(want.home_community_id or None, want.repository_unique_id, want.sop_instance_uid))
    return RetrieveImagingRequest(
        tuple(
            StudyRequest(study, tuple(SeriesRequest(uid, tuple(documents)) for uid, documents in series.items()))
            for study, series in studies.items()
        ),
        tuple(accept),
    )
