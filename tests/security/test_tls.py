"""Mutual TLS over real sockets, with certificates of a CA made here."""

from __future__ import annotations

import asyncio
import ssl
import warnings
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from xca_imaging import settings
from xca_imaging.errors import ConfigurationError
from xca_imaging.security import tls


class Authority:
    """A CA that issues certificates for 127.0.0.1."""

    def __init__(self, name: str) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.certificate = self._sign(self.name, self.key, authority=True)

    def issue(self, folder: Path, stem: str, common_name: str) -> None:
        """Write `stem.pem`, `stem.key` and the CA's `peers.pem`."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
        certificate = self._sign(name, key, authority=False)
        (folder / f"{stem}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        (folder / f"{stem}.key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        (folder / "peers.pem").write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))

    def _sign(self, name: x509.Name, key: ec.EllipticCurvePrivateKey, *, authority: bool) -> x509.Certificate:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(minutes=1))
            .not_valid_after(now + timedelta(days=90))
            .add_extension(x509.BasicConstraints(authority, None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
            .sign(self.key, hashes.SHA256())
        )


def configured(folder: Path) -> settings.Settings:
    file = folder / "node.toml"
    file.write_text(
        '[node]\nhome_community_id = "urn:oid:1.2.3"\n[http.tls]\ncertificate = "node.pem"\n'
        'private_key = "node.key"\nclient_ca = "peers.pem"\n'
    )
    return settings.load(file)


async def serve(context: ssl.SSLContext | None) -> asyncio.Server:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        subject = writer.get_extra_info("peercert")["subject"]
        writer.write(str(subject[0][0][1]).encode())
        writer.close()

    return await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)


async def ask(server: asyncio.Server, context: ssl.SSLContext | None) -> tuple[str, str]:
    """Return the client's name as the server saw it, and the server's as the client did."""
    port = server.sockets[0].getsockname()[1]
    async with asyncio.timeout(5):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
        name = writer.get_extra_info("peercert")["subject"][0][0][1]
        seen = (await reader.read()).decode()
        writer.close()
    return seen, name


async def test_both_sides_show_their_certificate(tmp_path: Path) -> None:
    Authority("CA").issue(tmp_path, "node", "node")
    node = configured(tmp_path)
    async with await serve(tls.server_context(node, node.http.tls, "http.tls")) as server:
        assert await ask(server, tls.client_context(node, node.http.tls, "http.tls")) == ("node", "node")


async def test_a_client_without_a_certificate_gets_nothing(tmp_path: Path) -> None:
    Authority("CA").issue(tmp_path, "node", "node")
    node = configured(tmp_path)
    anonymous = ssl.create_default_context(cafile=str(tmp_path / "peers.pem"))
    async with await serve(tls.server_context(node, node.http.tls, "http.tls")) as server:
        # TLS 1.3: the client's side of the handshake is over before the server looks at what it did not send.
        try:
            seen, _ = await ask(server, anonymous)
        except (ssl.SSLError, ConnectionError):
            seen = ""
        assert seen == ""


async def test_tls_1_1_is_refused(tmp_path: Path) -> None:
    Authority("CA").issue(tmp_path, "node", "node")
    node = configured(tmp_path)
    old = tls.client_context(node, node.http.tls, "http.tls")
    assert old is not None
    old.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of the old versions, which is the point
        old.minimum_version = ssl.TLSVersion.TLSv1
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    async with await serve(tls.server_context(node, node.http.tls, "http.tls")) as server:
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await ask(server, old)


async def test_changed_files_serve_new_connections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls, "_LOOK_EVERY", 0.0)
    Authority("first CA").issue(tmp_path, "node", "first")
    node = configured(tmp_path)
    first = tls.client_context(node, node.http.tls, "http.tls")
    async with await serve(tls.server_context(node, node.http.tls, "http.tls")) as server:
        assert await ask(server, first) == ("first", "first")
        (tmp_path / "node.key").write_text("half written")
        assert await ask(server, first) == ("first", "first")
        Authority("second CA").issue(tmp_path, "node", "second")
        second = tls.client_context(node, node.http.tls, "http.tls")
        assert await ask(server, second) == ("second", "second")
        with pytest.raises(ssl.SSLError):
            await ask(server, first)  # it does not trust the new CA, and the node not the old one


@pytest.mark.parametrize("name", ["node.pem", "node.key", "peers.pem"])
def test_files_that_cannot_be_used_are_named(tmp_path: Path, name: str) -> None:
    Authority("CA").issue(tmp_path, "node", "node")
    node = configured(tmp_path)
    (tmp_path / name).write_text("nonsense")
    with pytest.raises(ConfigurationError, match=r"http\.tls"):
        tls.server_context(node, node.http.tls, "http.tls")


def test_dates_of_certificates(tmp_path: Path) -> None:
    Authority("CA").issue(tmp_path, "node", "node")
    dates = list(tls.certificate_dates(configured(tmp_path)))
    assert [each.subject for each in dates] == ["CN=node", "CN=CA"]
    assert all(each.not_before < datetime.now(UTC) < each.not_after for each in dates)
