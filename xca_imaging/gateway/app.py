"""A node: its HTTP application, its DICOM listener and everything behind them, started and stopped in order.

`Node` is the one place where the parts are put together. HTTP is aiohttp's; what is ours are its limits.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import TypeVar
from xml.sax.saxutils import escape

from aiohttp import web

from xca_imaging.data_files import data_folder
from xca_imaging.errors import ConfigurationError, SpoolFull, SpoolInUse
from xca_imaging.gateway import listeners
from xca_imaging.gateway.administering import AdministrativeActors
from xca_imaging.gateway.callers import Callers
from xca_imaging.gateway.documents import DocumentActors
from xca_imaging.gateway.exchange import Exchange, Operation
from xca_imaging.gateway.hl7 import IdentityFeed
from xca_imaging.gateway.imaging_source import ImagingDocumentSource
from xca_imaging.gateway.on_demand import OnDemandDocuments
from xca_imaging.gateway.publishing import publishers_of
from xca_imaging.gateway.repositories import NodeRepository, TransferredObjects, TransfersFinder
from xca_imaging.gateway.responding import RespondingGateway
from xca_imaging.gateway.watching import watching
from xca_imaging.imaging.profile import load_profile
from xca_imaging.imaging.receivers import Siblings
from xca_imaging.imaging.spool import Spool
from xca_imaging.imaging.store_scp import StoreScp
from xca_imaging.imaging.transfer import Transfers
from xca_imaging.operations.metrics import Metrics
from xca_imaging.registry.administration import Administration
from xca_imaging.registry.document_registry import Registry
from xca_imaging.registry.events import Requester
from xca_imaging.registry.provide import Repository
from xca_imaging.registry.remote import RemoteStore
from xca_imaging.security import tls
from xca_imaging.settings import Settings, is_loopback

log = logging.getLogger(__name__)

_DATABASE_THREADS = 4  # SQLite has one writer; a few readers beside it
_ON_DEMAND_THREADS = 4  # manifests made at a time: each asks a PACS, which has other work
_ANSWER_TIMEOUT = 1.0  # s for clients to take the answers that a drain has made
_WSDL_ADDRESS = "REPLACE_WITH_ACTUAL_URL"

T = TypeVar("T")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Node:
    """One node, by its settings. Use as an asynchronous context manager: it serves inside."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._resources = AsyncExitStack()
        self._server: asyncio.Server | None = None
        self._running = 0  # requests that are being answered
        self._idle = asyncio.Event()
        self.http_address = ("", 0)
        self.dicom_address = ("", 0)

    async def __aenter__(self) -> Node:
        async with AsyncExitStack() as resources:
            await self._start(resources)
            self._resources = resources.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop listening, let running transfers end within `node.drain_timeout`, close everything."""
        await self._resources.aclose()

    async def _start(self, resources: AsyncExitStack) -> None:
        settings, limits = self._settings, self._settings.limits
        https = tls.server_context(settings, settings.http.tls, "http.tls")
        dicom_server = tls.server_context(settings, settings.dicom.tls, "dicom.tls")
        dicom_client = tls.client_context(settings, settings.dicom.tls, "dicom.tls")
        https_client = tls.client_context(settings, settings.http.tls, "http.tls")
        _make_folder(settings, settings.data_dir)
        metrics = Metrics()
        callers = Callers(settings)
        spool = _open_spool(settings)
        resources.callback(spool.close)
        tidying = asyncio.create_task(spool.tidy())
        resources.callback(tidying.cancel)

        executor = ThreadPoolExecutor(_DATABASE_THREADS, thread_name_prefix="registry")
        resources.callback(executor.shutdown)
        registry = Registry.open(
            settings.database_url,
            home_community_id=settings.node.home_community_id,
            assigning_authorities=settings.registry.assigning_authorities,
            strict_patients=settings.registry.strict_patients,
            vocabulary=load_profile(settings).vocabulary,
            max_results=settings.registry.max_results,
        )
        resources.callback(registry.close)
        repository = None
        if settings.repository.unique_id:
            repository = Repository(
                registry,
                settings.data_dir / "documents",
                repository_unique_id=settings.repository.unique_id,
                remote=RemoteStore.open(settings.repository.store),
            )

        transfers = Transfers(
            pacs=settings.pacs,
            ae_title=settings.dicom.ae_title,
            spool=spool,
            stall_timeout=limits.stall_timeout,
            tls=dicom_client,
            https=https_client,
        )
        scp = _storage_scp(settings, transfers, spool, dicom_server)
        await _bind(settings, "dicom", settings.dicom.host, settings.dicom.port, scp.start())
        resources.push_async_callback(scp.close, 0.0)
        self.dicom_address = scp.sockets[0]
        transfers.listener, transfers.receiving = self.dicom_address, scp
        await transfers.start()

        administration = Administration(registry)
        own = NodeRepository(
            registry, repository, partial(administration.update, requester=Requester("publishing")), executor
        )
        on_demand = None
        if repository is not None:
            asking = ThreadPoolExecutor(_ON_DEMAND_THREADS, thread_name_prefix="on-demand")
            resources.callback(asking.shutdown, wait=False, cancel_futures=True)
            publishers = publishers_of(
                settings,
                repository=own,
                objects=TransferredObjects(transfers),
                memory=None,
                make_finder=partial(TransfersFinder, transfers),
                executor=asking,
            )
            on_demand = OnDemandDocuments(
                administration, repository, publishers, executor, keep=settings.repository.persist_on_demand
            )
        documents = DocumentActors(registry, repository, executor, on_demand)
        orphans = asyncio.create_task(documents.check_store())
        resources.callback(orphans.cancel)
        administering = AdministrativeActors(administration, repository, executor)
        source = ImagingDocumentSource(transfers, metrics)
        gateway = RespondingGateway(settings.node.home_community_id, documents, source)
        services = {
            "registry": (*documents.registry_operations(), *administering.registry_operations()),
            "repository": (*documents.repository_operations(), *administering.repository_operations()),
            "imaging-source": source.operations(),
            "responding-gateway": gateway.operations(),
            "responding-imaging-gateway": gateway.imaging_operations(),
        }
        _watch(metrics, spool, scp, transfers, documents)
        application = self._application(Exchange(spool, limits, metrics, callers), services, metrics, registry, spool)
        await self._listen(application, https, resources)
        resources.push_async_callback(self._drain, transfers)
        if settings.hl7.port:
            count = partial(metrics.request, "iti8")
            feed = IdentityFeed(administration, executor, stall_timeout=limits.stall_timeout, count=count)
            host, port = settings.http.host, settings.hl7.port
            encrypted = None if settings.http.insecure or is_loopback(host) else https
            await _bind(settings, "hl7", host, port, feed.start(host, port, encrypted))
            resources.push_async_callback(feed.close)
        await resources.enter_async_context(
            watching(settings, own=own, transfers=transfers, metrics=metrics, https=https_client)
        )
        listeners.write(settings, self.http_address, self.dicom_address)
        resources.callback(listeners.remove, settings)

    def _application(
        self,
        exchange: Exchange,
        services: Mapping[str, Sequence[Operation]],
        metrics: Metrics,
        registry: Registry,
        spool: Spool,
    ) -> web.Application:
        application = web.Application()
        wsdl = data_folder("wsdl")
        for name, operations in services.items():
            by_action = {operation.transaction.request_action: operation for operation in operations}
            application.router.add_post(f"/services/{name}", self._soap_handler(exchange, by_action))
            application.router.add_get(f"/services/{name}", self._wsdl_handler(wsdl / f"{name}.wsdl"))
        for schema in wsdl.glob("*.xsd"):
            # The WSDLs import their schemas by relative location, so they lie beside the services.
            application.router.add_get(f"/services/{schema.name}", _file_handler(schema))

        async def live(request: web.Request) -> web.Response:
            return web.json_response({"status": "live"})

        async def ready(request: web.Request) -> web.Response:
            reasons = await _unready(registry, spool)
            body = {"status": "not ready" if reasons else "ready", "reasons": reasons}
            return web.json_response(body, status=503 if reasons else 200)

        async def exposition(request: web.Request) -> web.Response:
            return web.Response(body=metrics.exposition(), headers={"Content-Type": metrics.content_type})

        application.router.add_get("/health/live", live)
        application.router.add_get("/health/ready", ready)
        application.router.add_get("/metrics", exposition)
        return application

    def _soap_handler(self, exchange: Exchange, operations: Mapping[str, Operation]) -> Handler:
        async def soap(request: web.Request) -> web.StreamResponse:
            self._running += 1
            try:
                return await exchange.handle(request, operations)
            finally:
                self._running -= 1
                if not self._running:
                    self._idle.set()

        return soap

    async def _drain(self, transfers: Transfers) -> None:
        """Let running requests end within `node.drain_timeout`; those that do not are answered with what there is."""
        assert self._server is not None
        self._server.close()
        if self._running:
            self._idle.clear()
            try:
                async with asyncio.timeout(self._settings.node.drain_timeout):
                    await self._idle.wait()
            except TimeoutError:
                log.warning("%d requests did not end in time", self._running)
        await transfers.close(0.0)

    def _wsdl_handler(self, file: Path) -> Handler:
        text = file.read_text(encoding="utf-8")

        async def wsdl(request: web.Request) -> web.Response:
            if "wsdl" not in {key.lower() for key in request.query}:
                raise web.HTTPMethodNotAllowed("GET", ["POST"], text="SOAP 1.2 over POST; the WSDL is at ?wsdl\n")
            scheme = "https" if self._settings.http.tls else "http"
            address = escape(f"{scheme}://{request.host}{request.path}", {'"': "&quot;"})
            return web.Response(text=text.replace(_WSDL_ADDRESS, address), content_type="text/xml", charset="utf-8")

        return wsdl

    async def _listen(
        self, application: web.Application, https: ssl.SSLContext | None, resources: AsyncExitStack
    ) -> None:
        settings, limits = self._settings, self._settings.limits
        # handler_cancellation: a client that goes away cancels its transfer. keepalive_timeout runs from the moment
        # of connection until the headers of a request are complete: it is the limit of a client that sends none.
        runner = web.AppRunner(
            application,
            handler_cancellation=True,
            keepalive_timeout=limits.header_timeout,
            shutdown_timeout=_ANSWER_TIMEOUT,
            access_log=None,
            auto_decompress=False,
        )
        await runner.setup()
        resources.push_async_callback(runner.cleanup)
        server = runner.server
        assert server is not None

        def connection() -> asyncio.Protocol:
            return server() if len(server.connections) < limits.http_connections else _TooManyConnections()

        loop = asyncio.get_running_loop()
        self._server = await _bind(
            settings,
            "http",
            settings.http.host,
            settings.http.port,
            loop.create_server(
                connection,
                settings.http.host,
                settings.http.port,
                ssl=https,
                ssl_handshake_timeout=limits.header_timeout if https else None,
                backlog=512,
            ),
        )
        self.http_address = self._server.sockets[0].getsockname()[:2]


class _TooManyConnections(asyncio.Protocol):
    """Tells a client beyond `limits.http_connections` to come back later."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        transport.write(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        transport.close()


async def _bind(settings: Settings, section: str, host: str, port: int, start: Awaitable[T]) -> T:
    try:
        return await start
    except OSError as exc:
        problem = f"cannot listen on {host}:{port}: {exc.strerror or exc}"
        raise ConfigurationError(str(settings.file), f"{section}.port", problem, "is another node running?") from exc


def _make_folder(settings: Settings, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        problem = f"{folder} cannot be made: {exc.strerror}"
        raise ConfigurationError(str(settings.file), "node.data_dir", problem, "choose a writable folder") from exc


def _open_spool(settings: Settings) -> Spool:
    try:
        return Spool(
            settings.data_dir / "spool", max_bytes=settings.spool.max_bytes, retention=settings.spool.retention
        )
    except SpoolInUse as exc:
        hint = "each node needs a data_dir of its own; stop the one that has it, or choose another"
        raise ConfigurationError(str(settings.file), "node.data_dir", str(exc), hint) from exc
    except OSError as exc:
        problem = f"the spool cannot be opened: {exc.strerror or exc}"
        raise ConfigurationError(str(settings.file), "node.data_dir", problem, "make room, or choose another") from exc


def _file_handler(file: Path) -> Handler:
    content = file.read_bytes()

    async def schema(request: web.Request) -> web.Response:
        return web.Response(body=content, content_type="text/xml", charset="utf-8")

    return schema


def _storage_scp(
    settings: Settings, transfers: Transfers, spool: Spool, encrypted: ssl.SSLContext | None
) -> StoreScp | Siblings:
    """Return what receives: this process, or siblings of it."""
    dicom, limits = settings.dicom, settings.limits
    calling_ae_titles = frozenset(dicom.calling_ae_titles) or None
    if dicom.receivers == 1:
        return StoreScp(
            transfers,
            ae_title=dicom.ae_title,
            host=dicom.host,
            port=dicom.port,
            ssl=encrypted,
            calling_ae_titles=calling_ae_titles,
            max_associations=limits.associations,
            artim_timeout=limits.artim_timeout,
            stall_timeout=limits.stall_timeout,
        )
    config = [str(settings.file.resolve())] if encrypted is not None else []
    return Siblings(
        transfers,
        spool,
        count=dicom.receivers,
        program=(sys.executable, "-m", "xca_imaging.gateway.receiving", *config),
        ae_title=dicom.ae_title,
        host=dicom.host,
        port=dicom.port,
        calling_ae_titles=calling_ae_titles,
        max_associations=limits.associations,
        artim_timeout=limits.artim_timeout,
        stall_timeout=limits.stall_timeout,
    )


def _watch(
    metrics: Metrics, spool: Spool, scp: StoreScp | Siblings, transfers: Transfers, documents: DocumentActors
) -> None:
    metrics.watch("documents_unnamed", "Stored contents that no document names", lambda: documents.orphans.unnamed)
    metrics.watch("documents_missing", "Documents whose content is not in the store", lambda: documents.orphans.missing)
    metrics.watch("spool_used_bytes", "Bytes in the spool", lambda: spool.used_bytes)
    metrics.watch("spool_free_bytes", "Room left in the spool", lambda: spool.free_bytes)
    metrics.watch("spool_is_high", "1 while held bytes are over the high-water mark", lambda: spool.is_high)
    metrics.watch("moves_started", "Moves asked of PACSs since the start", lambda: transfers.moves_started)
    metrics.watch("dicom_associations", "Inbound associations open", lambda: len(scp.associations))
    metrics.watch(
        "dicom_receivers",
        "Processes that receive instances",
        lambda: len(scp.alive) if isinstance(scp, Siblings) else 1,
    )
    metrics.watch(
        "dicom_associations_paused",
        "Associations that are not read because their consumer is slow",
        lambda: transfers.backpressure.paused,
    )
    counts = transfers.stock.transcoders.counts
    metrics.watch("transcoded", "Instances transcoded since the start", lambda: counts.done)
    metrics.watch("transcoding_refused", "Instances that could not be transcoded losslessly", lambda: counts.refused)
    metrics.watch("transcoding_failed", "Instances of which the transcoding failed", lambda: counts.failed)


async def _unready(registry: Registry, spool: Spool) -> list[str]:
    reasons = []
    try:
        await asyncio.get_running_loop().run_in_executor(None, registry.check)
    except Exception as exc:
        log.warning("the registry database does not answer: %s", exc)
        reasons.append("the registry database does not answer")
    try:
        if spool.free_bytes <= 0:
            raise SpoolFull("the spool has no room")
    except (SpoolFull, OSError) as exc:
        reasons.append(str(exc))
    return reasons
