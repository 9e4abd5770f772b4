"""TLS contexts for HTTPS and DICOM: mutual authentication, TLS 1.2 or later.

References
----------
* IHE ITI TF-2, 3.19 (Authenticate Node), option "STX: TLS 1.2 Floor using BCP195"
* RFC 9325 (BCP 195), 4.2 (cipher suites)
"""

from __future__ import annotations

import logging
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509

from xca_imaging.errors import ConfigurationError
from xca_imaging.settings import Settings, Tls

log = logging.getLogger(__name__)

_LOOK_EVERY = 2.0  # s between looks at the files

# ITI-19 3.19: the four suites that must be supported, and the ECDSA ones beside them. TLS 1.3 suites are always on.
_TLS12_SUITES = ":".join(
    (
        "ECDHE-ECDSA-AES256-GCM-SHA384",
        "ECDHE-RSA-AES256-GCM-SHA384",
        "ECDHE-ECDSA-AES128-GCM-SHA256",
        "ECDHE-RSA-AES128-GCM-SHA256",
        "DHE-RSA-AES256-GCM-SHA384",
        "DHE-RSA-AES128-GCM-SHA256",
    )
)


def server_context(settings: Settings, tls: Tls | None, key: str) -> ssl.SSLContext | None:
    """Return the context of a listener, which asks every client for its certificate; None without TLS settings.

    Files that change on disk serve the next handshakes, at the latest `_LOOK_EVERY` seconds later. Files that cannot be
    used then (half of a pair is written) leave the ones before in place.

    Raises
    ------
    ConfigurationError
        A file that cannot be used; `key` names the section.
    """
    if tls is None:
        return None
    current = _Current(settings, tls, key)
    listening = _context(settings, tls, key, ssl.PROTOCOL_TLS_SERVER)

    def switch(connection: ssl.SSLObject, server_name: str | None, context: ssl.SSLContext) -> None:
        connection.context = current.context()

    # Called in every handshake, with or without a server name (RFC 6066, 3): the one place to change what it uses.
    listening.sni_callback = switch
    return listening


def client_context(settings: Settings, tls: Tls | None, key: str) -> ssl.SSLContext | None:
    """Return the context of outgoing calls, which presents our certificate and checks the server's name."""
    return None if tls is None else _context(settings, tls, key, ssl.PROTOCOL_TLS_CLIENT)


class _Current:
    """The context of the files as they are now."""

    # Mutable state: the context, the files' times that it was made of, and when they were looked at last.

    def __init__(self, settings: Settings, tls: Tls, key: str) -> None:
        self._settings, self._tls, self._key = settings, tls, key
        self._files = [settings.path(name) for name in (tls.certificate, tls.private_key, tls.client_ca)]
        self._times = self._modified()
        self._context = _context(settings, tls, key, ssl.PROTOCOL_TLS_SERVER)
        self._looked = time.monotonic()

    def context(self) -> ssl.SSLContext:
        now = time.monotonic()
        if now - self._looked >= _LOOK_EVERY:
            self._looked = now
            times = self._modified()
            if times != self._times:
                self._reload(times)
        return self._context

    def _reload(self, times: list[int]) -> None:
        try:
            self._context = _context(self._settings, self._tls, self._key, ssl.PROTOCOL_TLS_SERVER)
        except ConfigurationError as exc:
            log.warning("changed certificates are not used: %s", exc)
            return
        self._times = times
        log.info("[%s]: certificates loaded again", self._key)

    def _modified(self) -> list[int]:
        return [file.stat().st_mtime_ns if file.exists() else 0 for file in self._files]


def _context(settings: Settings, tls: Tls, key: str, protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(_TLS12_SUITES)
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_cert_chain(settings.path(tls.certificate), settings.path(tls.private_key))
    except (OSError, ssl.SSLError) as exc:
        raise ConfigurationError(
            str(settings.file), f"{key}.certificate", f"cannot be used with its private key: {exc}", "both are PEM"
        ) from exc
    try:
        context.load_verify_locations(settings.path(tls.client_ca))
    except (OSError, ssl.SSLError) as exc:
        raise ConfigurationError(
            str(settings.file),
            f"{key}.client_ca",
            f"cannot be read: {exc}",
            "a PEM file with the peers' CA or certificates",
        ) from exc
    return context


@dataclass(frozen=True, slots=True)
class CertificateDates:
    """When a configured certificate is valid; `subject` is its RFC 4514 name."""

    file: Path
    subject: str
    not_before: datetime
    not_after: datetime


def certificate_dates(settings: Settings) -> Iterator[CertificateDates]:
    """Yield the validity of every certificate in the configured PEM files."""
    for tls in (settings.http.tls, settings.dicom.tls):
        if tls is None:
            continue
        for name in (tls.certificate, tls.client_ca):
            file = settings.path(name)
            for certificate in x509.load_pem_x509_certificates(file.read_bytes()):
                yield CertificateDates(
                    file,
                    certificate.subject.rfc4514_string(),
                    certificate.not_valid_before_utc,
                    certificate.not_valid_after_utc,
                )
