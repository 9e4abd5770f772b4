"""Every back end over mutual TLS, against real PACSs."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from tests.security.test_tls import Authority
from tests.support import images, peers
from tests.support.collecting import Collector
from xca_imaging import settings as settings_module
from xca_imaging.errors import ConnectFailed, PeerError
from xca_imaging.imaging.backends import MoveJob, make_backends, requester
from xca_imaging.imaging.backends.pool import Associations
from xca_imaging.imaging.decisions import Method
from xca_imaging.imaging.store_scp import StoreScp
from xca_imaging.security import tls
from xca_imaging.settings import Pacs, Settings
from xca_imaging.uids import EXPLICIT_VR_LITTLE_ENDIAN

pytestmark = [pytest.mark.peer, pytest.mark.timeout(120)]

OURS = "XCAI"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates of the node and of the PACS, and of a node that nobody trusts."""
    folder = tmp_path_factory.mktemp("tls")
    (folder / "strange").mkdir()
    Authority("another CA").issue(folder / "strange", "node", "stranger")
    authority = Authority("CA")
    for name in ("node", "pacs"):
        authority.issue(folder, name, name)
    return folder


@pytest.fixture(scope="module")
def study(folder: Path) -> images.Study:
    return images.ct(folder / "ct")


def configured(folder: Path) -> Settings:
    file = folder / "node.toml"
    files = 'certificate = "node.pem"\nprivate_key = "node.key"\nclient_ca = "peers.pem"\n'
    file.write_text(f'[node]\nhome_community_id = "urn:oid:1.2.3"\n[http.tls]\n{files}[dicom.tls]\n{files}')
    return settings_module.load(file)


def client_context(folder: Path) -> ssl.SSLContext | None:
    configuration = configured(folder)
    return tls.client_context(configuration, configuration.dicom.tls, "dicom.tls")


@pytest.fixture(scope="module")
def ours() -> peers.Entity:
    return peers.Entity(OURS, peers.free_port())


@pytest.fixture(scope="module")
def orthanc(folder: Path, study: images.Study, ours: peers.Entity) -> Iterator[peers.Orthanc]:
    options = {
        "DicomTlsEnabled": True,
        "DicomTlsCertificate": str(folder / "pacs.pem"),
        "DicomTlsPrivateKey": str(folder / "pacs.key"),
        "DicomTlsTrustedCertificates": str(folder / "peers.pem"),
        "DicomTlsRemoteCertificateRequired": True,
        "DicomModalities": {OURS: {"AET": OURS, "Host": ours.host, "Port": ours.port, "UseDicomTls": True}},
    }
    with peers.Orthanc(folder / "orthanc", dicomweb=True, options=options) as pacs:
        pacs.upload(study.paths)
        yield pacs


@pytest.fixture(scope="module")
def storescp(folder: Path) -> Iterator[peers.StoreScp]:
    """DCMTK's Storage SCP, since its image server knows no TLS: it answers C-ECHO."""
    files = [str(folder / name) for name in ("pacs.key", "pacs.pem")]
    options = ["--accept-all", "--enable-tls", *files, "--add-cert-file", str(folder / "peers.pem")]
    with peers.StoreScp(folder / "storescp", options=options) as scp:
        yield scp


def pacs_of(peer: Any, method: Method = "c-move", wado_rs: str = "") -> Pacs:
    return Pacs(
        name="peer",
        ae_title=peer.ae_title,
        host=peer.host,
        port=peer.port,
        retrieve_location_uid="1.2.3",
        retrieve=method,
        wado_rs=wado_rs,
    )


async def retrieve(folder: Path, pacs: Pacs, ours: peers.Entity, study: images.Study) -> Collector:
    collector = Collector()
    configuration = configured(folder)
    context = client_context(folder)
    listening = tls.server_context(configuration, configuration.dicom.tls, "dicom.tls")
    scp = StoreScp(collector, ae_title=OURS, host=ours.host, port=ours.port, ssl=listening)
    await scp.start()
    (made,) = make_backends(
        Associations(pacs, calling_ae_title=OURS, tls=context, receiver=collector),
        ae_title=OURS,
        listener=(ours.host, ours.port),
        https=context,
        receiver=collector,
        connect_timeout=5.0,
        stall_timeout=20.0,
    ).values()
    try:
        job = MoveJob("STUDY", study.uid, accept=(EXPLICIT_VR_LITTLE_ENDIAN,))
        for _ in range(2):  # the second time on a kept connection
            collector.stores.clear()
            result = await made.move(job, lambda _: None)
            assert result.status == 0x0000
    finally:
        await made.close()
        await scp.close(5.0)
    return collector


@pytest.mark.parametrize("method", ["c-move", "c-get"])
async def test_dicom(
    folder: Path, orthanc: peers.Orthanc, ours: peers.Entity, study: images.Study, method: Method
) -> None:
    collector = await retrieve(folder, pacs_of(orthanc, method), ours, study)
    assert set(collector.held) == study.uids


@pytest.mark.parametrize("peer", ["orthanc", "storescp"])
async def test_echo(request: pytest.FixtureRequest, folder: Path, peer: str) -> None:
    pacs = pacs_of(request.getfixturevalue(peer))
    await requester.echo(pacs, calling_ae_title=OURS, tls=client_context(folder))
    with pytest.raises(ConnectFailed, match="certificate verify failed"):  # we do not trust it
        await requester.echo(pacs, calling_ae_title=OURS, tls=client_context(folder / "strange"))
    untrusted = client_context(folder / "strange")
    assert untrusted is not None
    untrusted.load_verify_locations(folder / "peers.pem")
    with pytest.raises(PeerError):  # it does not trust us
        await requester.echo(pacs, calling_ae_title=OURS, tls=untrusted, connect_timeout=5.0)
    with pytest.raises(PeerError):  # no TLS at all
        await requester.echo(pacs, calling_ae_title=OURS, connect_timeout=1.0)


@asynccontextmanager
async def in_front(url: str, folder: Path) -> AsyncIterator[str]:
    """Give the address of a TLS server that asks clients for a certificate and passes on to a plain one."""
    async with aiohttp.ClientSession(auto_decompress=False) as session:

        async def relay(request: web.Request) -> web.StreamResponse:
            headers = {"Accept": request.headers["Accept"]}
            async with session.get(url + str(request.rel_url), headers=headers) as answer:
                response = web.StreamResponse(
                    status=answer.status, headers={"Content-Type": answer.headers.get("Content-Type", "")}
                )
                await response.prepare(request)
                async for chunk in answer.content.iter_any():
                    await response.write(chunk)
                return response

        application = web.Application()
        application.router.add_get("/{path:.*}", relay)
        runner = web.AppRunner(application, shutdown_timeout=0.1)
        await runner.setup()
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(folder / "peers.pem"))
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(folder / "pacs.pem", folder / "pacs.key")
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
        try:
            yield f"https://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()


async def test_wado_rs(folder: Path, orthanc: peers.Orthanc, ours: peers.Entity, study: images.Study) -> None:
    async with in_front(orthanc.url, folder) as url:
        pacs = pacs_of(orthanc, "wado-rs", f"{url}/dicom-web")
        collector = await retrieve(folder, pacs, ours, study)
        assert {uid: bytes(each.data) for uid, each in collector.held.items()} == {
            each.uid: each.dataset_bytes for each in study.instances
        }
        (made,) = make_backends(
            Associations(pacs, calling_ae_title=OURS),
            ae_title=OURS,
            listener=(ours.host, ours.port),
            https=client_context(folder / "strange"),
            receiver=collector,
            connect_timeout=5.0,
            stall_timeout=20.0,
        ).values()
        with pytest.raises(ConnectFailed, match="certificate"):
            await made.move(MoveJob("STUDY", study.uid), lambda _: None)
        await made.close()
