"""What the two authorities sign, read back with another library's eyes: names, usages, lifetimes, files."""

from __future__ import annotations

import datetime
import ssl
import stat
from pathlib import Path
from uuid import UUID

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from sealift.controller.authority import (
    AUTHORITY_LIFE,
    CLIENT_LIFE,
    Authority,
    create_authority,
    csr_public_key,
    load_authority,
)
from sealift.errors import AlreadyExists, InvalidInput, NotFound

HOST, CONTROLLER = UUID(int=5), UUID(int=9)
KEY = ec.generate_private_key(ec.SECP256R1())


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return create_authority(tmp_path, CONTROLLER)


def csr(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, name: str = "anything") -> str:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(subject)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier("spiffe://sealift/host/another")]),
            critical=False,
        )
        .sign(key, hashes.SHA256())
    )
    return request.public_bytes(serialization.Encoding.PEM).decode()


def names(certificate: x509.Certificate) -> list[str]:
    found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(name.value) for name in found]


def usages(certificate: x509.Certificate) -> list[x509.ObjectIdentifier]:
    return list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)


def test_authorities_live_ten_years_and_sign_only_leaves(authority: Authority) -> None:
    for issuer in (authority.hosts, authority.controllers):
        certificate = issuer.certificate
        assert certificate.not_valid_after_utc - certificate.not_valid_before_utc == AUTHORITY_LIFE
        assert datetime.timedelta(days=3650) < AUTHORITY_LIFE
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
        assert constraints.critical
        assert (constraints.value.ca, constraints.value.path_length) == (True, 0)
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
        assert usage.key_cert_sign
        assert not usage.digital_signature
    assert authority.hosts.fingerprint != authority.controllers.fingerprint


def test_a_hosts_certificate_says_what_we_say_not_what_it_asked_for(authority: Authority) -> None:
    public_key = csr_public_key(csr(KEY, "root"))
    pem = authority.host_certificate(public_key, HOST, "host-a")
    certificate = x509.load_pem_x509_certificate(pem.encode())
    assert names(certificate) == [f"spiffe://sealift/host/{HOST}"]
    assert usages(certificate) == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert [attribute.value for attribute in certificate.subject] == ["host-a"]
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert certificate.public_key() == KEY.public_key()
    assert certificate.not_valid_after_utc <= authority.hosts.certificate.not_valid_after_utc
    certificate.verify_directly_issued_by(authority.hosts.certificate)


def test_a_controllers_certificate_is_for_clients_and_for_a_day(authority: Authority) -> None:
    certificate = authority.client_certificate(KEY.public_key())
    assert names(certificate) == [f"spiffe://sealift/controller/{CONTROLLER}"]
    assert usages(certificate) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert certificate.not_valid_after_utc - certificate.not_valid_before_utc == CLIENT_LIFE
    store = Store([authority.controllers.certificate])
    PolicyBuilder().store(store).build_client_verifier().verify(certificate, [])
    verifier = PolicyBuilder().store(Store([authority.hosts.certificate])).build_client_verifier()
    with pytest.raises(VerificationError):
        verifier.verify(certificate, [])


def test_the_apis_certificate_names_its_addresses_and_is_for_servers(authority: Authority) -> None:
    certificate = authority.server_certificate(KEY.public_key(), ["sealift.example", "10.0.0.1", "fd00::1"])
    assert names(certificate) == ["sealift.example", "10.0.0.1", "fd00::1"]
    assert usages(certificate) == [ExtendedKeyUsageOID.SERVER_AUTH]
    store = Store([authority.controllers.certificate])
    PolicyBuilder().store(store).build_server_verifier(x509.DNSName("sealift.example")).verify(certificate, [])


@pytest.mark.parametrize("address", ["", "no spaces", "a..b", "https://x", "*", "x/y", "\u00e9.example"])
def test_an_address_that_is_none_is_refused(authority: Authority, address: str) -> None:
    with pytest.raises(InvalidInput):
        authority.server_certificate(KEY.public_key(), [address])


def test_contexts_are_tls_1_3_and_leave_no_key_behind(authority: Authority, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    server, client = authority.server_context(["localhost"]), authority.client_context()
    assert server.minimum_version is client.minimum_version is ssl.TLSVersion.TLSv1_3
    assert server.num_tickets == 0
    assert client.verify_mode is ssl.CERT_REQUIRED
    assert sorted(tmp_path.iterdir()) == before


def test_keys_are_private_files_and_are_found_again(authority: Authority, tmp_path: Path) -> None:
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again = load_authority(tmp_path, CONTROLLER)
    assert again.hosts.fingerprint == authority.hosts.fingerprint
    assert again.controllers.pem == authority.controllers.pem
    with pytest.raises(AlreadyExists):
        create_authority(tmp_path, CONTROLLER)
    (tmp_path / "hosts-authority.key").unlink()
    with pytest.raises(NotFound, match=r"hosts-authority\.key"):
        load_authority(tmp_path, CONTROLLER)


def test_a_request_without_proof_of_possession_is_refused() -> None:
    good, other = csr(KEY), csr(ec.generate_private_key(ec.SECP256R1()))
    der = x509.load_pem_x509_csr(good.encode()).public_bytes(serialization.Encoding.DER)
    tail = x509.load_pem_x509_csr(other.encode()).public_bytes(serialization.Encoding.DER)[-32:]
    request = x509.load_der_x509_csr(der[:-32] + tail)
    with pytest.raises(InvalidInput):
        csr_public_key(request.public_bytes(serialization.Encoding.PEM).decode())


@pytest.mark.parametrize(
    "pem",
    [
        "",
        "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n",
        csr(rsa.generate_private_key(65537, 2048)),
        csr(ec.generate_private_key(ec.SECP384R1())),
    ],
    ids=["empty", "garbage", "rsa", "p384"],
)
def test_a_request_that_is_none_of_ours_is_refused_and_not_quoted(pem: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        csr_public_key(pem)
    assert pem == "" or pem not in str(caught.value)
