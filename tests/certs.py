"""Certificates made for a test: an authority, what it signs, and a broker that asks for them."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tests.brokers import MOSQUITTO, Broker, free_port

DEPLOY = Path(__file__).parents[1] / "deploy" / "mosquitto"
NOW = datetime.now(UTC).replace(microsecond=0)


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, in PEM files."""

    cert: Path
    key: Path


class Authority:
    """Signs certificates. `ca` is its own."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = (
            self._builder(self._name, self._key, NOW + timedelta(days=365), timedelta(days=400))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False)
            .add_extension(_usage(signs=True), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.ca = folder / f"{name}.pem"
        self.ca.write_bytes(certificate.public_bytes(Encoding.PEM))

    def sign(
        self,
        name: str,
        *,
        days: float = 30.0,
        hosts: tuple[str, ...] = ("localhost", "127.0.0.1"),
        client: bool = False,
    ) -> Pair:
        """A certificate that ends in `days`; negative: it has ended already. `name` is its common name."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        role = ExtendedKeyUsageOID.CLIENT_AUTH if client else ExtendedKeyUsageOID.SERVER_AUTH
        certificate = (
            self._builder(subject, key, NOW + timedelta(days=days), timedelta(days=60))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False)
            .add_extension(x509.ExtendedKeyUsage([role]), critical=False)
            .add_extension(_usage(signs=False), critical=True)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        pair = Pair(self._folder / f"{name}.crt", self._folder / f"{name}.key")
        pair.cert.write_bytes(certificate.public_bytes(Encoding.PEM))
        pair.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return pair

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, end: datetime, span: timedelta
    ) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(end - span)
            .not_valid_after(end)
        )


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def as_shipped(folder: Path, authority: Authority, server: Pair, daemon_port: int | None = None) -> Broker:
    """A broker with the files of `deploy/mosquitto`, of which only places are changed, and that logs refused topics."""
    port = free_port()
    acl = folder / "edge-agent.acl"
    shutil.copy(DEPLOY / "edge-agent.acl", acl)
    text = (DEPLOY / "edge-agent-tls.conf").read_text()
    changes = {
        "listener 8883": f"listener {port} 127.0.0.1",
        "listener 8884 127.0.0.1": f"listener {daemon_port or free_port()} 127.0.0.1",
        "/etc/mosquitto/certs/ca.crt": str(authority.ca),
        "/etc/mosquitto/certs/broker.crt": str(server.cert),
        "/etc/mosquitto/certs/broker.key": str(server.key),
        "/etc/mosquitto/edge-agent.acl": str(acl),
        "persistence true": "persistence false\nuser root",
    }
    for old, new in changes.items():
        assert re.search(rf"^[^#]*{re.escape(old)}$", text, re.MULTILINE), old
        text = text.replace(old, new)
    assert "\n#   log_type debug\n" in text
    text = text.replace("#   log_type debug", "log_type debug")
    config = folder / "mosquitto.conf"
    config.write_text(f"log_dest stderr\n{text}")
    return Broker([str(MOSQUITTO), "-c", str(config)], port, "mosquitto", folder / "mosquitto.log")
