"""TLS contexts for HTTPS and DICOM: mutual authentication, TLS 1.2 or later.

References
----------
* IHE ITI TF-2, 3.19 (Authenticate Node), option "STX: TLS 1.2 Floor using BCP195"
* RFC 9325 (BCP 195), 4.2 (cipher suites)
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509

from xca_imaging.errors import ConfigurationError
from xca_imaging.settings import Settings, Tls

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

    Raises
    ------
    ConfigurationError
        A file that cannot be used; `key` names the section.
    """
    return _context(settings, tls, key, ssl.PROTOCOL_TLS_SERVER)


def client_context(settings: Settings, tls: Tls | None, key: str) -> ssl.SSLContext | None:
    """Return the context of outgoing calls, which presents our certificate and checks the server's name."""
    return _context(settings, tls, key, ssl.PROTOCOL_TLS_CLIENT)


def _context(settings: Settings, tls: Tls | None, key: str, protocol: int) -> ssl.SSLContext | None:
    if tls is None:
        return None
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
