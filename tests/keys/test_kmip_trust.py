"""The files by which KMIP servers know us, and we know them."""

from __future__ import annotations

import datetime
import ssl
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

from sealift.demo.kmip import ServerAuthority
from sealift.errors import InvalidInput, ProviderUnreachable
from sealift.keys import kmip_trust as trust
from sealift.secret import Secret

NOW = datetime.datetime.now(datetime.UTC)
CLIENT, SERVER = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH


def pem(key: CertificateIssuerPrivateKeyTypes, *, passphrase: bytes = b"") -> Secret:
    how = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    raw = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how)
    return Secret(raw, length=len(raw))


def certificate(
    key: CertificateIssuerPrivateKeyTypes,
    *,
    days: int = 1,
    ca: bool | None = False,
    usage: ObjectIdentifier | None = CLIENT,
) -> str:
    """One that ``key`` signed for itself; it ends in ``days``."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "somebody")])
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - datetime.timedelta(days=10))
        .not_valid_after(NOW + datetime.timedelta(days=days))
    )
    if ca is not None:
        builder = builder.add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    if usage is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    signed = builder.sign(key, None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256())
    return signed.public_bytes(serialization.Encoding.PEM).decode()


def ec_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


KEY = ec_key()
AUTHORITY = certificate(KEY, ca=True, usage=None)


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()} if directory.exists() else {}


def test_a_generated_certificate_is_for_clients_and_lives_long(tmp_path: Path) -> None:
    directory = tmp_path / "kms"
    shown = trust.generate(directory, "sealift kms")
    assert shown == trust.client_certificate(directory)
    made = x509.load_pem_x509_certificate(shown.encode())
    assert made.subject.rfc4514_string() == "CN=sealift kms"
    assert list(made.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [CLIENT]
    assert made.not_valid_after_utc - NOW > datetime.timedelta(days=3652)
    made.verify_directly_issued_by(made)
    assert content(directory).keys() == {"client.key", "client.pem"}
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()} == {0o600}
    trust.pin(directory, AUTHORITY)
    trust.load(directory)


def test_a_request_proves_its_key_and_its_certificate_is_taken(tmp_path: Path) -> None:
    authority = ServerAuthority()
    shown = trust.request(tmp_path, "sealift kms")
    assert shown == trust.certificate_request(tmp_path)
    asked = x509.load_pem_x509_csr(shown.encode())
    assert asked.is_signature_valid
    assert asked.subject.rfc4514_string() == "CN=sealift kms"
    assert trust.client_certificate(tmp_path) == ""
    signed = authority.client(shown) + authority.pem
    trust.accept_certificate(tmp_path, signed)
    assert trust.client_certificate(tmp_path) == signed
    assert trust.certificate_request(tmp_path) == ""
    trust.pin(tmp_path, authority.pem)
    trust.load(tmp_path)


def test_a_request_leaves_what_is_in_use(tmp_path: Path) -> None:
    trust.generate(tmp_path, "old")
    before = content(tmp_path)
    again = x509.load_pem_x509_csr(trust.request(tmp_path, "new").encode())
    assert content(tmp_path) == before | {"request.pem": trust.certificate_request(tmp_path).encode()}
    old = x509.load_pem_x509_certificate(before["client.pem"])
    assert again.public_key() == old.public_key()


@pytest.mark.parametrize(
    "make", [ec_key, lambda: rsa.generate_private_key(65537, 2048), ed25519.Ed25519PrivateKey.generate]
)
def test_an_uploaded_pair_is_taken(tmp_path: Path, make: Callable[[], CertificateIssuerPrivateKeyTypes]) -> None:
    trust.request(tmp_path, "to be replaced")
    key = make()
    trust.upload(tmp_path, certificate(key), pem(key))
    assert content(tmp_path) == {
        "client.key": pem(key).reveal(),
        "client.pem": trust.client_certificate(tmp_path).encode(),
    }
    trust.pin(tmp_path, AUTHORITY)
    trust.load(tmp_path)


@pytest.mark.parametrize(
    ("given", "key", "why"),
    [
        (lambda: certificate(KEY), ec_key, "for another key"),
        (lambda: AUTHORITY + certificate(KEY), ec_key, "for another key"),
        (lambda: certificate(KEY, days=-1), lambda: KEY, "ended on"),
        (lambda: certificate(KEY, usage=SERVER), lambda: KEY, "not for clients"),
        (lambda: "", lambda: KEY, "no certificate in PEM"),
        (lambda: certificate(KEY)[:200], lambda: KEY, "no certificate in PEM"),
        (lambda: "§", lambda: KEY, "no certificate in PEM"),
        (lambda: certificate(KEY) * 17, lambda: KEY, "at most 16"),
    ],
)
def test_a_certificate_that_is_of_no_use_changes_nothing(
    tmp_path: Path, given: Callable[[], str], key: Callable[[], ec.EllipticCurvePrivateKey], why: str
) -> None:
    fresh = tmp_path / "fresh"
    with pytest.raises(InvalidInput, match=why):
        trust.upload(fresh, given(), pem(key()))
    assert content(fresh) == {}

    ours = tmp_path / "ours"
    trust.upload(ours, certificate(mine := key()), pem(mine))
    before = content(ours)
    for change in (lambda: trust.accept_certificate(ours, given()), lambda: trust.upload(ours, given(), pem(key()))):
        with pytest.raises(InvalidInput, match=why):
            change()
    assert content(ours) == before


@pytest.mark.parametrize(
    ("key", "why"),
    [
        (Secret(b"no key", length=6), "no private key in PEM"),
        (pem(KEY, passphrase=b"secret"), "no private key in PEM"),
        (pem(rsa.generate_private_key(65537, 1024)), "1024 bits"),
    ],
)
def test_a_key_that_is_of_no_use_is_refused_and_not_quoted(tmp_path: Path, key: Secret, why: str) -> None:
    with pytest.raises(InvalidInput, match=why) as refused:
        trust.upload(tmp_path, certificate(KEY), key)
    assert "BEGIN" not in str(refused.value)
    assert "no key" not in str(refused.value)
    assert content(tmp_path) == {}


def test_a_certificate_without_a_request_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="make a request first"):
        trust.accept_certificate(tmp_path, certificate(KEY))
    assert content(tmp_path) == {}


@pytest.mark.parametrize("name", ["", "x" * 65, "a\nb"])
def test_a_name_that_no_certificate_has_is_refused(tmp_path: Path, name: str) -> None:
    for make in (trust.generate, trust.request):
        with pytest.raises(InvalidInput, match="common name"):
            make(tmp_path, name)
    assert content(tmp_path) == {}


def test_authorities_or_servers_own_certificates_are_pinned(tmp_path: Path) -> None:
    trust.generate(tmp_path, "sealift kms")
    server, other = certificate(ec_key(), usage=SERVER), certificate(ec_key(), ca=None, usage=None)
    for given, pinned in ((AUTHORITY, 0), (AUTHORITY * 2, 0), (server, 1), (server + other, 2)):
        trust.pin(tmp_path, given)
        assert (tmp_path / "server-authority.pem").read_text() == given
        found = trust.load(tmp_path)
        assert len(found.pinned) == pinned
        assert found.context.check_hostname
        assert found.context.verify_mode is ssl.CERT_REQUIRED
        assert found.context.minimum_version is ssl.TLSVersion.TLSv1_2
        assert not found.context.hostname_checks_common_name
    before = content(tmp_path)
    for bad, why in (
        (AUTHORITY + server, "mixes"),
        (certificate(KEY, ca=True, days=-1), "ended on"),
        ("", "no certificate"),
        (server * 17, "at most 16"),
    ):
        with pytest.raises(InvalidInput, match=why):
            trust.pin(tmp_path, bad)
    assert content(tmp_path) == before


@pytest.mark.parametrize("name", ["client.key", "client.pem", "server-authority.pem"])
def test_without_one_of_the_files_nobody_is_asked(tmp_path: Path, name: str) -> None:
    trust.generate(tmp_path, "sealift kms")
    trust.pin(tmp_path, AUTHORITY)
    kept = (tmp_path / name).read_bytes()
    (tmp_path / name).unlink()
    with pytest.raises(ProviderUnreachable, match="there is no"):
        trust.load(tmp_path)
    (tmp_path / name).write_bytes(kept[:100])
    with pytest.raises(ProviderUnreachable, match="cannot be used"):
        trust.load(tmp_path)


def test_a_pair_is_never_of_two_halves(tmp_path: Path) -> None:
    """Where writing a new pair over an old one stops in between, there is no certificate, and no rest of it either."""
    trust.upload(tmp_path, certificate(KEY), pem(KEY))
    trust.pin(tmp_path, AUTHORITY)
    (tmp_path / "client.key").unlink()
    (tmp_path / "client.key").mkdir()  # which no file can replace
    with pytest.raises(IsADirectoryError):
        trust.upload(tmp_path, certificate(new := ec_key()), pem(new))
    assert {path.name for path in tmp_path.iterdir()} == {"client.key", "server-authority.pem"}
    with pytest.raises(ProviderUnreachable, match="no client certificate"):
        trust.load(tmp_path)
