"""Joining a controller: pin its authority by the token's fingerprint, hand in a key, store what comes back.

The token goes over the wire only after the authority's certificate has the fingerprint that the token itself carries,
inside a TLS 1.3 connection verified against that authority.
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import json
import os
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from uuid import UUID

import httpx2
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from sealift.agent.settings import AgentSettings
from sealift.domain.token import Token
from sealift.errors import Conflict, ControllerUnreachable, FingerprintMismatch, InvalidInput, from_problem

_TIMEOUT_S = 15


@dataclass(frozen=True)
class Identity:
    """Who this host is; the files lie in ``directory``, mode 0600."""

    host: UUID
    directory: Path
    own_address: str  # the IP address from which this host reached the controller

    @property
    def certificate(self) -> Path:
        return self.directory / "certificate.pem"

    @property
    def key(self) -> Path:
        return self.directory / "key.pem"

    @property
    def controllers(self) -> Path:
        return self.directory / "controllers.pem"

    def server_context(self) -> ssl.SSLContext:
        """TLS 1.3 for controllers only, without session tickets."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.num_tickets = 0
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(self.controllers)
        context.load_cert_chain(self.certificate, self.key)
        return context


def load_identity(directory: Path) -> Identity:
    """The stored identity; raises Conflict when this host has not joined."""
    try:
        document = json.loads((directory / "host.json").read_text())
    except FileNotFoundError:
        raise Conflict(
            "this host has not joined a controller", todo="run `sealift agent join https://CONTROLLER --token -`"
        ) from None
    return Identity(UUID(document["host"]), directory, str(document["own_address"]))


async def join(url: str, token: Token, settings: AgentSettings) -> Identity:
    """Join the controller at ``url`` and store the identity.

    The private key is made once and kept, so that asking again with the same token after a lost answer gets the same
    certificate. Raises Conflict (joined already), InvalidInput (no address that others could call),
    FingerprintMismatch, ControllerUnreachable, and what the controller refuses with: TokenInvalid, TokenUsed,
    TokenExpired, HostNameTaken.
    """
    own = await asyncio.to_thread(own_address, url)
    if ipaddress.ip_address(own).is_loopback and not (settings.address and settings.migration_address):
        raise InvalidInput(
            f"this host reaches the controller over {own}, where no other machine can call it",
            todo="set address and migration_address in the agent's configuration, or join by another name",
        )
    settings, directory = settings.at(own), settings.identity
    if (directory / "host.json").exists():
        raise Conflict(f"this host has joined a controller already ({directory})", todo="remove that directory first")
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    key = _host_key(directory / "key.pem")
    authority = await _pinned_authority(url, token)
    csr = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, settings.name)]))
        .sign(key, hashes.SHA256())
    )
    context = ssl.create_default_context(cadata=authority)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    request = {
        "token": token.text(),
        "csr": csr.public_bytes(serialization.Encoding.PEM).decode(),
        "name": settings.name,
        "address": settings.address,
        "migration_address": settings.migration_address,
    }
    answer = await _ask(url, "POST", "/api/v1/join", context, request)
    store(directory / "certificate.pem", answer["certificate"])
    store(directory / "controllers.pem", answer["controllers_authority"])
    store(directory / "hosts.pem", answer["hosts_authority"])
    store(directory / "host.json", json.dumps({"host": answer["host"], "name": answer["name"], "own_address": own}))
    return load_identity(directory)


def own_address(url: str) -> str:
    """The IP address from which this machine reaches the controller; raises ControllerUnreachable."""
    parts = urlsplit(url)
    try:
        family, _, _, _, place = socket.getaddrinfo(parts.hostname, parts.port or 443, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as route:
            route.connect(place)  # sends nothing: a datagram socket only looks the route up
            found: str = route.getsockname()[0]
    except (OSError, ValueError) as error:
        raise ControllerUnreachable(f"there is no way to the controller at {url}: {error}") from None
    return found


async def _pinned_authority(url: str, token: Token) -> str:
    """The controllers' authority as PEM, checked against the token; nothing secret has been sent yet."""
    blind = ssl.create_default_context()
    blind.check_hostname = False
    blind.verify_mode = ssl.CERT_NONE  # the fingerprint below is the check
    answer = await _ask(url, "GET", "/api/v1/authority", blind, None)
    try:
        certificate = x509.load_pem_x509_certificate(str(answer["certificate"]).encode())
    except (ValueError, KeyError):
        raise ControllerUnreachable(f"what answers at {url} is no controller", todo="check the address") from None
    if hashlib.sha256(certificate.public_bytes(serialization.Encoding.DER)).digest() != token.fingerprint:
        raise FingerprintMismatch(
            f"the controller at {url} is not the one this token is for; the token was not sent",
            todo="check the address; if it is right, somebody sits in between",
        )
    # Encoded anew: what came may hold a second certificate, of somebody who sits in between, and would be trusted too.
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


async def _ask(url: str, method: str, path: str, context: ssl.SSLContext, body: object) -> dict[str, str]:
    async with httpx2.AsyncClient(verify=context, timeout=_TIMEOUT_S, trust_env=False) as client:
        try:
            response = await client.request(method, url.rstrip("/") + path, json=body)
        except httpx2.HTTPError as error:
            raise ControllerUnreachable(
                f"the controller at {url} did not answer: {error}", todo="check the address and that it runs"
            ) from None
    if response.is_error:
        raise from_problem(response.content, response.status_code)
    try:
        document = response.json()
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise ControllerUnreachable(f"what answers at {url} is no controller", todo="check the address")
    return document


def _host_key(path: Path) -> ec.EllipticCurvePrivateKey:
    if path.exists():
        found = serialization.load_pem_private_key(path.read_bytes(), password=None)
        assert isinstance(found, ec.EllipticCurvePrivateKey)
        return found
    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    store(path, pem.decode())
    return key


def store(path: Path, text: str) -> None:
    """Write a file that only its owner may read, whole or not at all."""
    fresh = path.with_name(path.name + ".new")
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w") as file:
        os.fchmod(fd, 0o600)
        file.write(text)
        file.flush()
        os.fsync(fd)
    fresh.rename(path)
