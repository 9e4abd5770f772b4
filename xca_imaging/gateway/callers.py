"""Who is asking: from the client certificate to the community that it belongs to.

References
----------
* IHE ITI TF-2, 3.19 (Authenticate Node: mutual TLS tells who is at the other end)
"""

from __future__ import annotations

import hashlib
import logging
import time
from dataclasses import dataclass, replace
from typing import Literal

from aiohttp import HttpVersion11, web
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import NameOID

from xca_imaging.errors import ConfigurationError
from xca_imaging.settings import Community, Settings

log = logging.getLogger(__name__)

_LOOK_EVERY = 2.0  # s between two looks at the files: a changed one is in use within 5 s

LOCAL = "local"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks.

    `name` is the label of the community, the subject of a certificate that belongs to none, or `local`; it is for
    fairness and logs. `weight` is the caller's share of the scheduler, `delivery` how it gets instances.
    """

    name: str = LOCAL
    home_community_id: str = ""
    weight: float = 1.0
    delivery: Literal["spooled", "streaming"] = "spooled"


class Callers:
    """Knows communities by their client certificates.

    Raises
    ------
    ConfigurationError
        A file cannot be read as PEM certificates, or two communities have the same one.
    """

    # Mutable state: communities by the SHA-256 of a certificate (DER), the times of the files that it was read from,
    # and when they were looked at last.

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._times = self._modified()
        self._communities = self._load()
        self._looked = time.monotonic()

    def identify(self, request: web.Request) -> Caller:
        """Return who sends a request; an HTTP/1.0 client is never streamed to: it knows no chunked coding."""
        caller = self._identify(request)
        return caller if request.version >= HttpVersion11 else replace(caller, delivery="spooled")

    def _identify(self, request: web.Request) -> Caller:
        delivery = self._settings.http.delivery
        ssl_object = request.get_extra_info("ssl_object")
        certificate = ssl_object.getpeercert(binary_form=True) if ssl_object is not None else None
        if not certificate:
            return Caller(delivery=delivery)
        community = self.community_of(certificate)
        if community is None:
            return Caller(_common_name(certificate), delivery=delivery)
        return Caller(community.label, community.home_community_id, community.weight, community.delivery)

    def community_of(self, certificate: bytes) -> Community | None:
        """Return the community that a certificate (DER) is configured for."""
        now = time.monotonic()
        if now - self._looked >= _LOOK_EVERY:
            self._looked = now
            times = self._modified()
            if times != self._times:
                self._reload(times)
        return self._communities.get(hashlib.sha256(certificate).digest())

    def _reload(self, times: list[int]) -> None:
        self._times = times
        try:
            self._communities = self._load()
        except ConfigurationError as exc:
            log.warning("changed certificates are not used: %s", exc)
        else:
            log.info("[[community]] certificates loaded again")

    def _load(self) -> dict[bytes, Community]:
        found: dict[bytes, Community] = {}
        for index, community in enumerate(self._settings.community):
            if not community.certificate:
                continue
            key = f"community[{index}].certificate"
            try:
                pem = self._settings.path(community.certificate).read_bytes()
                certificates = x509.load_pem_x509_certificates(pem)
            except (OSError, ValueError) as exc:
                raise ConfigurationError(
                    str(self._settings.file), key, f"cannot be read: {exc}", "a PEM file with its client certificates"
                ) from exc
            for certificate in certificates:
                other = found.setdefault(certificate.fingerprint(hashes.SHA256()), community)
                if other is not community:
                    raise ConfigurationError(
                        str(self._settings.file), key, f"is also that of {other.label}", "each needs one of its own"
                    )
        return found

    def _modified(self) -> list[int]:
        files = (self._settings.path(each.certificate) for each in self._settings.community if each.certificate)
        return [file.stat().st_mtime_ns if file.exists() else 0 for file in files]


def _common_name(certificate: bytes) -> str:
    names = x509.load_der_x509_certificate(certificate).subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if names else "unnamed certificate"
