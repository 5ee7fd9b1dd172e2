"""What the product is compared with, ready to be started: other people's programs, certificates and keys for one run.

sshd and stunnel are daemons, and a package that is installed would put them into the system's start-up. Their packages
are downloaded and unpacked into the cache instead, and run from there.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import ipaddress
import os
import re
import secrets
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_PACKAGES = ("openssh-server", "stunnel4")


@dataclass(frozen=True)
class Peers:
    """Where the programs are."""

    root: Path

    @property
    def ssh(self) -> str:
        found = shutil.which("ssh")
        if found is None:
            raise RuntimeError("there is no ssh; `./dev bench migrate` installs openssh-client")
        return found

    @property
    def sshd(self) -> Path:
        return self.root / "usr/sbin/sshd"

    @property
    def stunnel(self) -> Path:
        return self.root / "usr/bin/stunnel4"

    def sshd_helpers(self) -> list[str]:
        """Configuration lines that tell a newer sshd (9.8, 10.0) where its helpers are."""
        helpers = {"SshdSessionPath": "sshd-session", "SshdAuthPath": "sshd-auth"}
        paths = {option: self.root / "usr/lib/openssh" / name for option, name in helpers.items()}
        return [f"{option} {path}" for option, path in paths.items() if path.exists()]

    def versions(self) -> dict[str, str]:
        ssh = subprocess.run([self.ssh, "-V"], capture_output=True, text=True, check=True).stderr.strip()
        stunnel = subprocess.run([self.stunnel, "-version"], capture_output=True, text=True, check=False).stderr
        found = re.search(r"stunnel (\S+) .*?with (OpenSSL \S+)", stunnel, re.DOTALL)
        return {"ssh": ssh, "stunnel": f"{found[1]}, {found[2]}" if found else "unknown", "gnutls": _gnutls_version()}


def _gnutls_version() -> str:
    """That of the library that QEMU is linked with."""
    with contextlib.suppress(OSError):
        library = ctypes.CDLL("libgnutls.so.30")
        library.gnutls_check_version.restype = ctypes.c_char_p
        return str(library.gnutls_check_version(None).decode())
    return "unknown"


def peers(cache: Path) -> Peers:
    """The programs, downloaded with apt when they are not in ``cache`` yet (under 1 MB)."""
    root = cache / "peers"
    if not root.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            sandbox = ["-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else []
            subprocess.run(["apt-get", *sandbox, "-qq", "download", *_PACKAGES], cwd=scratch, check=True)
            new = Path(scratch, "peers")
            for archive in Path(scratch).glob("*.deb"):
                subprocess.run(["dpkg-deb", "-x", archive, new], check=True)
            new.chmod(0o755)
            new.rename(root)
    return Peers(root)


def write_psk(directory: Path) -> None:
    """A key of 32 bytes for the user ``qemu``, as QEMU's tls-creds-psk reads it."""
    (directory / "keys.psk").write_text(f"qemu:{secrets.token_hex(32)}\n")


def write_certificates(directory: Path, addresses: set[str]) -> None:
    """A CA, a server and a client, ECDSA on P-256, in files named as QEMU's tls-creds-x509 wants them."""
    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca = _certificate("CA", ca_key, "CA", ca_key, set(), is_ca=True)
    (directory / "ca-cert.pem").write_bytes(ca.public_bytes(serialization.Encoding.PEM))
    for name in ("server", "client"):
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = _certificate(name, key, "CA", ca_key, addresses, is_ca=False)
        (directory / f"{name}-cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        (directory / f"{name}-key.pem").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )


def _certificate(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: str,
    issuer_key: ec.EllipticCurvePrivateKey,
    addresses: set[str],
    *,
    is_ca: bool,
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=7))
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=not is_ca,
                key_cert_sign=is_ca,
                crl_sign=is_ca,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
    )
    if not is_ca:
        names = [x509.IPAddress(ipaddress.ip_address(address)) for address in sorted(addresses)]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    return builder.sign(issuer_key, hashes.SHA256())
