"""Who is asking, over real mutual TLS."""

from __future__ import annotations

import os
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from tests.security.test_tls import Authority
from xca_imaging import settings as settings_module
from xca_imaging.errors import ConfigurationError
from xca_imaging.gateway import callers as callers_module
from xca_imaging.gateway.callers import Caller, Callers
from xca_imaging.settings import Settings

EAST, WEST = "urn:oid:1.2.840.2", "urn:oid:1.2.840.3"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    authority = Authority("ca")
    for name in ("node", "east", "east2", "west", "stranger"):
        authority.issue(tmp_path, name, f"{name} gateway")
    (tmp_path / "both.pem").write_bytes((tmp_path / "east.pem").read_bytes() + (tmp_path / "east2.pem").read_bytes())
    return tmp_path


def configured(folder: Path, east: str = "both.pem", west: str = "west.pem") -> Settings:
    file = folder / "node.toml"
    file.write_text(
        '[node]\nhome_community_id = "urn:oid:1.2.840.1"\n'
        '[http]\ndelivery = "streaming"\n'
        '[http.tls]\ncertificate = "node.pem"\nprivate_key = "node.key"\nclient_ca = "peers.pem"\n'
        f'[[community]]\nhome_community_id = "{EAST}"\nname = "East"\ncertificate = "{east}"\nweight = 3.0\n'
        f'[[community]]\nhome_community_id = "{WEST}"\ncertificate = "{west}"\ndelivery = "streaming"\n'
    )
    return settings_module.load(file)


@asynccontextmanager
async def telling(folder: Path, callers: Callers, tls: bool = True) -> AsyncIterator[tuple[str, list[Caller]]]:
    told: list[Caller] = []

    async def tell(request: web.Request) -> web.Response:
        told.append(callers.identify(request))
        return web.Response()

    application = web.Application()
    application.router.add_get("/", tell)
    runner = web.AppRunner(application)
    await runner.setup()
    context = None
    if tls:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(folder / "peers.pem"))
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(folder / "node.pem", folder / "node.key")
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    try:
        yield f"http{'s' if tls else ''}://127.0.0.1:{runner.addresses[0][1]}/", told
    finally:
        await runner.cleanup()


async def call(folder: Path, url: str, name: str, version: aiohttp.HttpVersion = aiohttp.HttpVersion11) -> None:
    context = ssl.create_default_context(cafile=str(folder / "peers.pem"))
    context.load_cert_chain(folder / f"{name}.pem", folder / f"{name}.key")
    async with aiohttp.ClientSession(version=version) as session, session.get(url, ssl=context) as response:
        await response.read()


async def test_a_certificate_names_the_community(folder: Path) -> None:
    east, west = Caller("East", EAST, 3.0, "spooled"), Caller(WEST, WEST, 1.0, "streaming")
    async with telling(folder, Callers(configured(folder))) as (url, told):
        for name in ("east", "east2", "west", "stranger"):
            await call(folder, url, name)
    assert told[:3] == [east, east, west]
    assert told[3] == Caller("stranger gateway", "", 1.0, "streaming")


async def test_http_1_0_is_never_streamed_to(folder: Path) -> None:
    async with telling(folder, Callers(configured(folder))) as (url, told):
        await call(folder, url, "west", aiohttp.HttpVersion10)
    assert told == [Caller(WEST, WEST, 1.0, "spooled")]


async def test_without_tls_the_caller_is_local(folder: Path) -> None:
    async with (
        telling(folder, Callers(configured(folder)), tls=False) as (url, told),
        aiohttp.ClientSession() as session,
        session.get(url),
    ):
        pass
    assert told == [Caller("local", delivery="streaming")]


def test_a_changed_file_is_read_again_and_a_broken_one_is_not(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callers_module, "_LOOK_EVERY", 0.0)
    file = folder / "west.pem"
    new = x509.load_pem_x509_certificate((folder / "stranger.pem").read_bytes()).public_bytes(Encoding.DER)
    callers = Callers(configured(folder))
    assert callers.community_of(new) is None
    file.write_bytes((folder / "stranger.pem").read_bytes())
    os.utime(file, ns=(1, 1))
    found = callers.community_of(new)
    assert found is not None
    assert found.home_community_id == WEST
    file.write_text("-----BEGIN CERTIFICATE-----\nhalf")
    os.utime(file, ns=(2, 2))
    assert callers.community_of(new) == found


@pytest.mark.parametrize("east", ["node.key", "absent.pem", "west.pem"])
def test_a_certificate_that_tells_nothing_is_refused(folder: Path, east: str) -> None:
    with pytest.raises(ConfigurationError, match=r"community\[[01]\]\.certificate"):
        Callers(configured(folder, east))
