"""Who we are to KMIP servers, and which servers we take for ours: files of one provider's directory.

    client.key             our private key, PEM, never shown
    client.pem             our certificate, the chain behind it
    request.pem            a request for that certificate, while it is not signed yet
    server-authority.pem   the certificates that vouch for the servers: authorities, or the servers' own

Every function that writes looks at all it was given first, and raises InvalidInput before it has changed anything.
Files are written whole or not at all, mode 0600. Where the key and its certificate both change, the certificate is
removed first: after a crash in between there is none, not one that belongs to another key.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import ssl
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes, PublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from sealift.errors import InvalidInput, ProviderUnreachable
from sealift.keys.storage import sync_directory
from sealift.secret import Secret

GENERATED_LIFE: Final = datetime.timedelta(days=3653)
"""Servers know this very certificate, and with its end every VM of the provider would lock: ten years."""

CLOCK_SLACK: Final = datetime.timedelta(minutes=5)
MAX_CERTIFICATES: Final = 16
_MIN_RSA_BITS: Final = 2048
_BROKEN = (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature, x509.DuplicateExtension)

_KEY, _CERTIFICATE, _REQUEST, _AUTHORITY = "client.key", "client.pem", "request.pem", "server-authority.pem"


@dataclass(frozen=True)
class Trust:
    """TLS towards the servers. ``pinned``: DER of servers' own certificates; empty where an authority vouches."""

    context: ssl.SSLContext
    pinned: frozenset[bytes]


def generate(directory: Path, common_name: str) -> str:
    """Make a key and a certificate signed by itself, in place of what was there; answers the certificate, PEM."""
    subject = _subject(common_name)
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SLACK)
        .not_valid_after(now + GENERATED_LIFE)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    _write_pair(directory, pem, _key_pem(key))
    return pem.decode()


def request(directory: Path, common_name: str) -> str:
    """Ask for a certificate: a PKCS#10 request, PEM. A key that is there stays, and so does its certificate."""
    subject = _subject(common_name)
    path = directory / _KEY
    made = not path.exists()
    key = ec.generate_private_key(ec.SECP256R1()) if made else _private_key(path.read_bytes())
    extension = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject).add_extension(extension, critical=False)
    signed = builder.sign(key, None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256())
    pem = signed.public_bytes(serialization.Encoding.PEM)
    _make(directory)
    if made:
        _write(path, _key_pem(key))
    _write(directory / _REQUEST, pem)
    return pem.decode()


def accept_certificate(directory: Path, pem: str) -> None:
    """Take the certificate that was signed for our request, perhaps with the chain behind it."""
    path = directory / _KEY
    if not path.exists():
        raise InvalidInput("there is no key here that a certificate could be for", todo="make a request first")
    _check_pair(_certificates(pem, "the client certificate"), _private_key(path.read_bytes()))
    _write(directory / _CERTIFICATE, pem.encode())
    (directory / _REQUEST).unlink(missing_ok=True)


def upload(directory: Path, certificate_pem: str, key_pem: Secret) -> None:
    """Take a certificate, perhaps with the chain behind it, and its key, in place of what was there."""
    raw = key_pem.reveal()
    _check_pair(_certificates(certificate_pem, "the client certificate"), _private_key(raw))
    _write_pair(directory, certificate_pem.encode(), raw)


def pin(directory: Path, authority_pem: str) -> None:
    """Trust servers that these certificates vouch for: authorities, or servers' own certificates, not both."""
    certificates = _certificates(authority_pem, "the server authority")
    if len({_is_authority(each) for each in certificates}) != 1:
        raise InvalidInput(
            "the server authority mixes authorities' certificates with servers' own",
            todo="give the authority's certificate, or those of all servers",
        )
    _make(directory)
    _write(directory / _AUTHORITY, authority_pem.encode())


def client_certificate(directory: Path) -> str:
    """Our certificate, PEM; empty while there is none."""
    return _read(directory / _CERTIFICATE)


def certificate_request(directory: Path) -> str:
    """The request that is not signed yet, PEM; empty when there is none."""
    return _read(directory / _REQUEST)


def load(directory: Path) -> Trust:
    """TLS 1.2 or later with what lies in ``directory``; the server's name is checked by whoever connects with it.

    Raises ProviderUnreachable when something is missing there: nobody can be asked.
    """
    for name, what in ((_KEY, "client key"), (_CERTIFICATE, "client certificate"), (_AUTHORITY, "server authority")):
        if not (directory / name).exists():
            raise ProviderUnreachable(
                f"there is no {what} yet",
                todo="have its request signed, then run `sealift key-provider certificate NAME FILE`",
            )
    authority = _read(directory / _AUTHORITY)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.hostname_checks_common_name = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # what was pinned is the end of the chain, whoever signed it
    pinned: frozenset[bytes] = frozenset()
    try:
        context.load_verify_locations(cadata=authority)
        # An empty password, so that OpenSSL asks nobody for one.
        context.load_cert_chain(directory / _CERTIFICATE, directory / _KEY, password="")
        certificates = x509.load_pem_x509_certificates(authority.encode())
        if not any(_is_authority(each) for each in certificates):
            pinned = frozenset(each.public_bytes(serialization.Encoding.DER) for each in certificates)
    except (OSError, *_BROKEN):
        raise ProviderUnreachable(
            f"the certificates in {directory} cannot be used", todo="give them to the key provider again"
        ) from None
    return Trust(context, pinned)


def _subject(common_name: str) -> x509.Name:
    if not 1 <= len(common_name) <= 64 or not common_name.isprintable():
        raise InvalidInput("a certificate's common name is 1-64 printable characters")
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _certificates(pem: str, what: str) -> Sequence[x509.Certificate]:
    """Those in ``pem``, at least one, none of which has ended."""
    try:
        found = x509.load_pem_x509_certificates(pem.encode("ascii"))
        for each in found:
            each.public_key()
            _is_authority(each)
    except _BROKEN:
        raise InvalidInput(
            f"{what} is no certificate in PEM format", todo="give a file with -----BEGIN CERTIFICATE----- lines"
        ) from None
    if len(found) > MAX_CERTIFICATES:
        raise InvalidInput(
            f"{what} has {len(found)} certificates; at most {MAX_CERTIFICATES} are taken",
            todo="leave out those that are not needed",
        )
    now = datetime.datetime.now(datetime.UTC)
    for each in found:
        if each.not_valid_after_utc <= now:
            raise InvalidInput(f"{what} ended on {each.not_valid_after_utc:%Y-%m-%d}", todo="give a newer one")
    return found


def _is_authority(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def _private_key(pem: bytes) -> ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey:
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except _BROKEN:
        raise InvalidInput(
            "the client key is no private key in PEM format", todo="give one that no passphrase protects"
        ) from None
    if isinstance(key, rsa.RSAPrivateKey) and key.key_size < _MIN_RSA_BITS:
        raise InvalidInput(
            f"the client key has {key.key_size} bits; RSA needs {_MIN_RSA_BITS}", todo="use an EC or a longer RSA key"
        )
    if not isinstance(key, (ec.EllipticCurvePrivateKey, rsa.RSAPrivateKey, ed25519.Ed25519PrivateKey)):
        raise InvalidInput("the client key is of a kind that TLS has no use for", todo="use an EC or RSA key")
    return key


def _check_pair(certificates: Sequence[x509.Certificate], key: PrivateKeyTypes) -> None:
    ours = certificates[0]
    if _public(ours.public_key()) != _public(key.public_key()):
        raise InvalidInput(
            "the client certificate is for another key",
            todo="give the one that was signed for this provider's request, or that belongs to the key given with it",
        )
    with contextlib.suppress(x509.ExtensionNotFound):
        usage = ours.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        if ExtendedKeyUsageOID.CLIENT_AUTH not in usage:
            raise InvalidInput(
                "the client certificate is not for clients", todo="sign it for TLS client authentication"
            )


def _public(key: PublicKeyTypes) -> bytes:
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _key_pem(key: PrivateKeyTypes) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _make(directory: Path) -> None:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)


def _read(path: Path) -> str:
    try:
        return path.read_text("ascii")
    except FileNotFoundError:
        return ""


def _write_pair(directory: Path, certificate: bytes, key: bytes) -> None:
    _make(directory)
    with _written(directory / _KEY, key) as new_key, _written(directory / _CERTIFICATE, certificate) as new_certificate:
        (directory / _CERTIFICATE).unlink(missing_ok=True)
        sync_directory(directory)
        new_key.replace(directory / _KEY)
        sync_directory(directory)
        new_certificate.replace(directory / _CERTIFICATE)
        (directory / _REQUEST).unlink(missing_ok=True)
        sync_directory(directory)


def _write(path: Path, content: bytes) -> None:
    """The file with this content, or as it was; through to the disk."""
    with _written(path, content) as new:
        new.replace(path)
        sync_directory(path.parent)


@contextlib.contextmanager
def _written(path: Path, content: bytes) -> Iterator[Path]:
    """A file beside ``path`` with that content; removed when it was not made to be ``path``."""
    new = path.with_name(f".{path.name}.{os.urandom(8).hex()}")
    try:
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(fd)
        yield new
    finally:
        new.unlink(missing_ok=True)
