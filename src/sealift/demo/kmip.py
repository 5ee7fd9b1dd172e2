"""Key servers for the demonstration and the tests: PyKMIP's real server, each a process of its own on loopback.

The servers of one ``KmipServers`` keep their keys in one SQLite database, so that they are members of one cluster: what
one made, the others have at once. PyKMIP is no dependency of Sealift; whoever wants this needs it installed.

As ``python -m sealift.demo.kmip CONFIGURATION LOG DATABASE`` this module is such a process.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import importlib
import importlib.util
import ipaddress
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

from sealift.demo.ports import free_port
from sealift.errors import SealiftError, ToolMissing

ADDRESS: Final = "127.0.0.1"
_START_S: Final = 30.0
_LIFE: Final = datetime.timedelta(days=30)
_FIRST_ID: Final = """
    INSERT INTO sqlite_sequence (name, seq) SELECT 'managed_objects', 700000
    WHERE NOT EXISTS (SELECT 1 FROM sqlite_sequence WHERE name = 'managed_objects')
"""
"""PyKMIP counts its key ids from 1, and a "1" is found in any message that should name a key."""

_SLACK: Final = datetime.timedelta(minutes=5)


class ServerAuthority:
    """Signs the key servers' certificates and those of their clients."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name("key servers' authority")
        self._certificate = (
            self._builder(self._name, self._key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(self._key, hashes.SHA256())
        )

    @property
    def pem(self) -> str:
        """Its certificate."""
        return _pem(self._certificate)

    def server(self, path: Path, *names: str) -> str:
        """Write a new key and a certificate for these names or IP addresses to ``path``; answers the certificate."""
        key = _new_key(path)
        pem = _pem(self._leaf(_name(names[0]), key.public_key(), ExtendedKeyUsageOID.SERVER_AUTH, names))
        with path.open("a") as file:
            file.write(pem)
        return pem

    def client(self, request: str) -> str:
        """Sign a client's certificate request, PEM."""
        signed = x509.load_pem_x509_csr(request.encode())
        public_key = signed.public_key()
        assert isinstance(public_key, ec.EllipticCurvePublicKey)
        common_name = signed.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value
        return self.sign(public_key, str(common_name))

    def sign(self, public_key: ec.EllipticCurvePublicKey, common_name: str) -> str:
        """A client's certificate; PyKMIP knows clients by their common name."""
        return _pem(self._leaf(_name(common_name), public_key, ExtendedKeyUsageOID.CLIENT_AUTH, ()))

    def _leaf(
        self, subject: x509.Name, key: ec.EllipticCurvePublicKey, usage: ObjectIdentifier, names: Sequence[str]
    ) -> x509.Certificate:
        builder = (
            self._builder(subject, key)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName([_general(each) for each in names]), False)
        return builder.sign(self._key, hashes.SHA256())

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _SLACK)
            .not_valid_after(now + _LIFE)
        )


class KmipServers:
    """``members`` servers of one cluster in ``directory``, and a client that they know."""

    def __init__(self, directory: Path, members: int = 2) -> None:
        """Makes certificates, starts nothing; raises ToolMissing where there is no PyKMIP."""
        if importlib.util.find_spec("kmip") is None:
            raise ToolMissing("there is no PyKMIP on this machine", todo="install the Python package pykmip")
        self.directory = directory
        self.authority = ServerAuthority()
        self.ports = [free_port() for _ in range(members)]
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        (directory / "policy").mkdir(parents=True)
        (directory / "authority.pem").write_text(self.authority.pem)
        self.authority.server(directory / "server.pem", ADDRESS, "localhost")
        key = _new_key(directory / "client.key")
        (directory / "client.pem").write_text(self.authority.sign(key.public_key(), "sealift"))

    @property
    def members(self) -> list[str]:
        """Where they listen, as a key provider takes it."""
        return [f"{ADDRESS}:{port}" for port in self.ports]

    @property
    def options(self) -> list[str]:
        """What ``sealift key-provider add NAME`` is told to use them as the client that they know."""
        files = {"authority": "authority.pem", "client-certificate": "client.pem", "client-key": "client.key"}
        options = ["--kind", "kmip", "--client", "uploaded"]
        options += [word for member in self.members for word in ("--server", member)]
        return options + [word for name, file in files.items() for word in (f"--{name}", str(self.directory / file))]

    def start(self) -> None:
        """Start those that do not run, together; returns when all listen."""
        started = [which for which in range(len(self.ports)) if which not in self._processes]
        for which in started:
            self._processes[which] = self._spawn(which)
        for which in started:
            self._until_listening(which)

    def kill(self, which: int) -> None:
        """End one of them at once; what it was asked and had not answered is lost."""
        process = self._processes.pop(which)
        # PyKMIP starts a second process, which does not end with the first.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def move(self) -> None:
        """End all of them; when they are started again it is at other addresses, with the same keys."""
        self.close()
        self.ports = [free_port() for _ in self.ports]

    def pause(self, which: int) -> None:
        """Let one of them hang: it keeps its connections, takes new ones, and answers nothing."""
        os.killpg(self._processes[which].pid, signal.SIGSTOP)

    def resume(self, which: int) -> None:
        """Let one go on that was paused."""
        os.killpg(self._processes[which].pid, signal.SIGCONT)

    def close(self) -> None:
        """End all of them."""
        for which in list(self._processes):
            self.kill(which)

    def _log(self, which: int) -> Path:
        return self.directory / f"server-{which}.log"

    def _spawn(self, which: int) -> subprocess.Popen[bytes]:
        settings = {
            "hostname": ADDRESS,
            "port": self.ports[which],
            "certificate_path": self.directory / "server.pem",
            "key_path": self.directory / "server.pem",
            "ca_path": self.directory / "authority.pem",
            "auth_suite": "TLS1.2",
            "policy_path": self.directory / "policy",
            "enable_tls_client_auth": True,
            "tls_cipher_suites": "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384",
            "logging_level": "INFO",  # with DEBUG it logs every key
            "database_path": self.directory / "keys.db",
        }
        configuration = self.directory / f"server-{which}.conf"
        configuration.write_text("[server]\n" + "".join(f"{key}={value}\n" for key, value in settings.items()))
        argv = [sys.executable, "-m", "sealift.demo.kmip", configuration, self._log(which), settings["database_path"]]
        with self._log(which).open("ab") as log:
            return subprocess.Popen(
                list(map(str, argv)), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _until_listening(self, which: int) -> None:
        end = time.monotonic() + _START_S
        while time.monotonic() < end:
            if self._processes[which].poll() is not None:
                raise SealiftError(f"a key server ended: {self._log(which).read_text()[-2000:]}")
            with contextlib.suppress(OSError), socket.create_connection((ADDRESS, self.ports[which]), timeout=1):
                return
            time.sleep(0.05)
        raise SealiftError(f"a key server does not listen after {_START_S:g} s")


def serve(configuration: str, log: str, database: str) -> None:
    """Be one server, until this process is ended."""
    server: Any = importlib.import_module("kmip.services.server.server")
    tables: Any = importlib.import_module("kmip.pie.sqltypes")
    sqlalchemy: Any = importlib.import_module("sqlalchemy")
    with Path(f"{database}.lock").open("w") as lock:
        # Two servers that find an empty database must not both make its tables.
        fcntl.flock(lock, fcntl.LOCK_EX)
        engine = sqlalchemy.create_engine(f"sqlite:///{database}")
        tables.Base.metadata.create_all(engine)
        with engine.begin() as connection:
            connection.exec_driver_sql(_FIRST_ID)
        engine.dispose()
    with server.KmipServer(config_path=configuration, log_path=log, live_policies=False) as running:
        running.serve()


def _new_key(path: Path) -> ec.EllipticCurvePrivateKey:
    key = ec.generate_private_key(ec.SECP256R1())
    path.touch(0o600)
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return key


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


if __name__ == "__main__":
    serve(*sys.argv[1:])
