"""The controller's two certificate authorities, and everything they sign.

- hosts' authority: signs the server certificate of each host, for the public key the host handed in and the names we
  chose (``spiffe://sealift/host/<id>``).
- controllers' authority: signs the API's server certificate and controllers' client certificates
  (``spiffe://sealift/controller/<id>``), which live 24 hours, so that a removed controller loses its power by itself.

Keys are PEM files of mode 0600 in the state directory and never in the database. Everything is EC P-256 and TLS 1.3.
"""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import os
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

from sealift.errors import AlreadyExists, InvalidInput, NotFound

AUTHORITY_LIFE = datetime.timedelta(days=3653)
CLIENT_LIFE = datetime.timedelta(hours=24)
CLOCK_SLACK = datetime.timedelta(minutes=5)
"""How far a host's clock may lag behind the controller's without refusing a certificate made just now."""


def host_uri(host: UUID) -> str:
    """The name in a host's certificate, by which the controller recognises it."""
    return f"spiffe://sealift/host/{host}"


def controller_uri(controller: UUID) -> str:
    """The name in a controller's client certificate."""
    return f"spiffe://sealift/controller/{controller}"


@dataclass(frozen=True)
class Issuer:
    """One authority: its certificate and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def pem(self) -> str:
        """The certificate as PEM."""
        return self.certificate.public_bytes(serialization.Encoding.PEM).decode()

    @property
    def fingerprint(self) -> bytes:
        """SHA-256 of the certificate's DER."""
        return hashlib.sha256(self.certificate.public_bytes(serialization.Encoding.DER)).digest()

    def sign(
        self,
        public_key: ec.EllipticCurvePublicKey,
        *,
        common_name: str,
        names: Sequence[x509.GeneralName],
        usage: ObjectIdentifier,
        now: datetime.datetime,
        life: datetime.timedelta | None = None,
    ) -> x509.Certificate:
        """A leaf certificate; without ``life`` it ends with the authority."""
        end = self.certificate.not_valid_after_utc
        start = max(now - CLOCK_SLACK, self.certificate.not_valid_before_utc)
        builder = _builder(
            common_name, self.certificate.subject, public_key, start, min(end, start + life if life else end)
        )
        return (
            builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(leaf=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
            .sign(self.key, hashes.SHA256())
        )


class Authority:
    """Both authorities of the controller ``controller``, kept in ``directory``."""

    def __init__(self, directory: Path, controller: UUID, hosts: Issuer, controllers: Issuer) -> None:
        self._directory = directory
        self.controller = controller
        self.hosts = hosts
        self.controllers = controllers

    def host_certificate(self, public_key: ec.EllipticCurvePublicKey, host: UUID, name: str) -> str:
        """The server certificate of a host, as PEM."""
        certificate = self.hosts.sign(
            public_key,
            common_name=name,
            names=[x509.UniformResourceIdentifier(host_uri(host))],
            usage=ExtendedKeyUsageOID.SERVER_AUTH,
            now=_now(),
        )
        return certificate.public_bytes(serialization.Encoding.PEM).decode()

    def client_certificate(self, public_key: ec.EllipticCurvePublicKey) -> x509.Certificate:
        """This controller's certificate towards hosts, good for 24 hours."""
        return self.controllers.sign(
            public_key,
            common_name=f"controller {self.controller}",
            names=[x509.UniformResourceIdentifier(controller_uri(self.controller))],
            usage=ExtendedKeyUsageOID.CLIENT_AUTH,
            now=_now(),
            life=CLIENT_LIFE,
        )

    def server_certificate(self, public_key: ec.EllipticCurvePublicKey, addresses: Sequence[str]) -> x509.Certificate:
        """The API's certificate for the names and IP addresses it is called by."""
        return self.controllers.sign(
            public_key,
            common_name="Sealift controller",
            names=[_general_name(address) for address in addresses],
            usage=ExtendedKeyUsageOID.SERVER_AUTH,
            now=_now(),
        )

    def server_context(self, addresses: Sequence[str]) -> ssl.SSLContext:
        """TLS for the API: 1.3 only, without session tickets, under a key that lives as long as this process."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.num_tickets = 0
        key = ec.generate_private_key(ec.SECP256R1())
        self._load_chain(context, self.server_certificate(key.public_key(), addresses), key)
        return context

    def client_context(self) -> ssl.SSLContext:
        """TLS towards hosts with a fresh 24-hour certificate; good for 24 hours.

        It trusts the hosts' authority and checks no name: whom it reached is for the caller to check (link.py).
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False  # hosts are named by URI; verify_mode stays CERT_REQUIRED
        context.load_verify_locations(cadata=self.hosts.pem)
        key = ec.generate_private_key(ec.SECP256R1())
        self._load_chain(context, self.client_certificate(key.public_key()), key)
        return context

    def _load_chain(
        self, context: ssl.SSLContext, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey
    ) -> None:
        """Hand a certificate and its key to ``context``, which takes them only from a file; the file is gone after."""
        path = self._directory / f"tls-{os.urandom(8).hex()}.pem"
        try:
            write_private(path, _key_pem(key) + certificate.public_bytes(serialization.Encoding.PEM))
            context.load_cert_chain(path)
        finally:
            path.unlink(missing_ok=True)


def create_authority(directory: Path, controller: UUID) -> Authority:
    """Make both authorities in ``directory``; raises AlreadyExists when one is there."""
    hosts = _create(directory, "hosts", "Sealift hosts' authority")
    controllers = _create(directory, "controllers", "Sealift controllers' authority")
    return Authority(directory, controller, hosts, controllers)


def load_authority(directory: Path, controller: UUID) -> Authority:
    """Both authorities from ``directory``; raises NotFound when a file is missing."""
    return Authority(directory, controller, _load(directory, "hosts"), _load(directory, "controllers"))


def check_names(addresses: Sequence[str]) -> None:
    """Raises InvalidInput unless every one is a host name or an IP address."""
    for address in addresses:
        _general_name(address)


def csr_public_key(pem: str) -> ec.EllipticCurvePublicKey:
    """The public key of a certificate request that proves possession of its key; raises InvalidInput.

    Nothing else of the request is looked at: names and usages are ours to give.
    """
    bad = InvalidInput("the certificate request is not valid", todo="send a PKCS#10 request for an EC P-256 key")
    try:
        request = x509.load_pem_x509_csr(pem.encode())
        public_key = request.public_key()
        valid = request.is_signature_valid
    except (ValueError, InvalidSignature, UnsupportedAlgorithm, TypeError):
        raise bad from None
    if not valid or not isinstance(public_key, ec.EllipticCurvePublicKey):
        raise bad
    if not isinstance(public_key.curve, ec.SECP256R1):
        raise bad
    return public_key


def key_der(public_key: ec.EllipticCurvePublicKey) -> bytes:
    """A public key as it is pinned: DER of its SubjectPublicKeyInfo."""
    return public_key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def write_private(path: Path, content: bytes) -> None:
    """Write a new file that only we may read, through to the disk; raises AlreadyExists."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise AlreadyExists(f"{path} is there already") from None
    with os.fdopen(fd, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(fd)


def _create(directory: Path, name: str, title: str) -> Issuer:
    key = ec.generate_private_key(ec.SECP256R1())
    start = _now() - CLOCK_SLACK
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, title)])
    certificate = (
        _builder(title, subject, key.public_key(), start, start + AUTHORITY_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(leaf=False), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    write_private(directory / f"{name}-authority.key", _key_pem(key))
    write_private(directory / f"{name}-authority.pem", certificate.public_bytes(serialization.Encoding.PEM))
    return Issuer(certificate, key)


def _load(directory: Path, name: str) -> Issuer:
    try:
        key = serialization.load_pem_private_key((directory / f"{name}-authority.key").read_bytes(), password=None)
        certificate = x509.load_pem_x509_certificate((directory / f"{name}-authority.pem").read_bytes())
    except FileNotFoundError as error:
        raise NotFound(
            f"{error.filename} is missing", todo="put it back from a backup, or begin with `sealift controller init`"
        ) from None
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return Issuer(certificate, key)


def _builder(
    common_name: str,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    start: datetime.datetime,
    end: datetime.datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)]))
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _key_usage(*, leaf: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=leaf,
        key_cert_sign=not leaf,
        crl_sign=not leaf,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(address: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(address))
    except ValueError:
        pass
    parts = address.split(".")
    if not address.isascii() or not all(part.replace("-", "").isalnum() for part in parts):
        raise InvalidInput(f"'{address}' is neither a host name nor an IP address")
    return x509.DNSName(address)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
