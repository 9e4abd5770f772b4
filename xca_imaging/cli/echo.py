"""Say whether every PACS and community can be reached, and how long certificates are valid."""

from __future__ import annotations

import argparse
import asyncio
import ssl
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from urllib.parse import urlsplit

from rich.console import Console
from rich.table import Table

from xca_imaging import settings as settings_module
from xca_imaging.cli.options import add_config, run_loop
from xca_imaging.errors import PeerError
from xca_imaging.imaging.backends import requester, wadors
from xca_imaging.security import tls
from xca_imaging.settings import Community, Pacs, Settings

Row = tuple[str, str, bool, str]  # what, where, whether it is well, text

_CONNECT_TIMEOUT = 10.0  # s
_EXPIRES_SOON = timedelta(days=30)


def configure(sub: argparse.ArgumentParser) -> None:
    add_config(sub)


def run(args: argparse.Namespace) -> int:
    settings = settings_module.load(args.config)
    rows = [*run_loop(_peers(settings)), *_certificates(settings)]
    table = Table("what", "where", "result", box=None, pad_edge=False)
    for what, where, ok, text in rows:
        table.add_row(what, where, f"[green]{text}[/]" if ok else f"[bold red]{text}[/]")
    Console(width=None if Console().is_terminal else 200).print(table)
    return 0 if all(ok for _, _, ok, _ in rows) else 1


async def _peers(settings: Settings) -> list[Row]:
    dicom = tls.client_context(settings, settings.dicom.tls, "dicom.tls")
    https = tls.client_context(settings, settings.http.tls, "http.tls")
    checks = [_echo(settings, pacs, dicom) for pacs in settings.pacs]
    checks += [_ask(pacs, https) for pacs in settings.pacs if "wado-rs" in (pacs.retrieve, *pacs.fallback)]
    checks += [
        _reach(community, name, url, https)
        for community in settings.community
        for name, url in (
            ("query", community.query),
            ("retrieve", community.retrieve),
            ("imaging", community.imaging),
        )
        if url
    ]
    return list(await asyncio.gather(*checks))


async def _echo(settings: Settings, pacs: Pacs, context: ssl.SSLContext | None) -> Row:
    where = f"{pacs.ae_title}@{pacs.host}:{pacs.port}"
    started = time.perf_counter()
    try:
        await requester.echo(
            pacs,
            calling_ae_title=settings.dicom.ae_title,
            tls=context,
            listener=(settings.dicom.host, settings.dicom.port),
        )
    except PeerError as exc:
        return f"PACS {pacs.name}", where, False, str(exc)
    return f"PACS {pacs.name}", where, True, f"C-ECHO answered in {(time.perf_counter() - started) * 1000:.0f} ms"


async def _ask(pacs: Pacs, context: ssl.SSLContext | None) -> Row:
    """Ask the DICOMweb server of a PACS for one study."""
    what, started = f"PACS {pacs.name}: WADO-RS", time.perf_counter()
    try:
        answer = await wadors.reach(pacs, tls=context)
    except PeerError as exc:
        return what, pacs.wado_rs, False, str(exc)
    return what, pacs.wado_rs, True, f"{answer} in {(time.perf_counter() - started) * 1000:.0f} ms"


async def _reach(community: Community, name: str, url: str, context: ssl.SSLContext | None) -> Row:
    """Open a connection, with TLS where the URL says so, and close it: no request reaches the peer's audit log."""
    what = f"community {community.label}: {name}"
    parts = urlsplit(url)
    secure = parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    try:
        async with asyncio.timeout(_CONNECT_TIMEOUT):
            _, writer = await asyncio.open_connection(parts.hostname, port, ssl=(context or True) if secure else None)
    except (OSError, TimeoutError) as exc:
        return what, url, False, f"not reachable: {exc or 'no answer'}"
    writer.close()
    return what, url, True, "TLS handshake done" if secure else "reachable, without TLS"


def _certificates(settings: Settings) -> Iterator[Row]:
    now = datetime.now(UTC)
    for dates in tls.certificate_dates(settings):
        text = f"valid until {dates.not_after:%Y-%m-%d}"
        valid = dates.not_before <= now <= dates.not_after
        if not valid:
            text = f"not valid: {dates.not_before:%Y-%m-%d} to {dates.not_after:%Y-%m-%d}"
        elif dates.not_after - now < _EXPIRES_SOON:
            text += " (soon)"
        yield f"certificate {dates.subject}", str(dates.file), valid, text
