"""The way to a host's agent: HTTPS over TLS 1.3 with certificates both ways.

A certificate of the hosts' authority is not enough to get an order: whoever answers must be named exactly as the host
we mean (``spiffe://sealift/host/<id>``) and must hold the public key that was pinned when it joined. Both are checked
at the end of the handshake, before a byte of any request is sent.
"""

from __future__ import annotations

import json
import os
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from uuid import UUID

import httpx2
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from pydantic import TypeAdapter, ValidationError

from sealift.controller.authority import Authority, host_uri
from sealift.controller.models import HostRow
from sealift.domain.conversion import ConversionOrder, ConversionStatus, DiskFacts
from sealift.domain.deks import Deks, encode_frame, encode_keys
from sealift.domain.host import HostCapabilities
from sealift.domain.move import Answer, MoveStatus, Role
from sealift.domain.vm import Disk, VmConfig, VmStatus
from sealift.errors import HostIdentityMismatch, HostUnreachable, NotFound, SealiftError, from_slug

CONNECT_S, ANSWER_S, LONG_ANSWER_S = 3.0, 10.0, 60.0
"""Connecting; an ordinary answer; an answer that waits for QEMU to start or stop."""

RENEW_S = 12 * 3600.0
"""A client certificate lives 24 hours; a new one is taken after half of that."""

FENCE = "Sealift-Fence"
SPEC_TYPE = "application/vnd.sealift.spec"
KEYS_TYPE = "application/vnd.sealift.keys"

_T = TypeVar("_T")
_CAPABILITIES = TypeAdapter(HostCapabilities)
_STATUS, _STATUSES = TypeAdapter(VmStatus), TypeAdapter(list[VmStatus])
_MOVE = TypeAdapter(MoveStatus)
_CONFIG = TypeAdapter(VmConfig)
_ORDER, _CONVERSION = TypeAdapter(ConversionOrder), TypeAdapter(ConversionStatus)
_DISKS = TypeAdapter(list[DiskFacts])


@dataclass(frozen=True)
class Peer:
    """The host we mean."""

    id: UUID
    name: str
    address: str
    public_key: bytes  # DER, as pinned

    @classmethod
    def of(cls, row: HostRow) -> Peer:
        """The host as the database has it."""
        return cls(row.id, row.name, row.address, row.public_key)


class AgentLink:
    """Requests to one host's agent.

    Each raises HostUnreachable (nobody answered, or not like an agent; whether the order arrived is then not known),
    HostIdentityMismatch (nothing was sent), or the error that the agent answered, as its own class.
    """

    def __init__(self, peer: Peer, client: httpx2.AsyncClient) -> None:
        self.peer = peer
        self._client = client

    async def capabilities(self) -> HostCapabilities:
        """What the host can do, now; raises HostIdentityMismatch also when it reports another host's id."""
        found = await self._ask("GET", "/v1/capabilities", _CAPABILITIES)
        if found.host != self.peer.id:
            raise HostIdentityMismatch(f"the agent at {self.peer.address} reports another host's id")
        return found

    async def vms(self) -> list[VmStatus]:
        """All VMs the host knows."""
        return await self._ask("GET", "/v1/vms", _STATUSES)

    async def vm(self, uuid: UUID) -> VmStatus:
        """One VM; raises NotFound."""
        return await self._ask("GET", f"/v1/vms/{uuid}", _STATUS)

    async def define(self, config: VmConfig, fence: int, *, made_by_conversion: bool) -> None:
        """Define a VM; images that are not there are made now, or by the conversion that is to follow."""
        made = b"true" if made_by_conversion else b"false"
        body = b'{"config":' + _CONFIG.dump_json(config) + b',"made_by_conversion":' + made + b"}"
        await self._order("PUT", f"/v1/vms/{config.uuid}", fence, body)

    async def start(self, uuid: UUID, fence: int, *, file_hash: str) -> None:
        """Start a VM; refused with VmLetGo by a host that let it go.

        An encrypted one only if SHA-256 of its configuration file there is ``file_hash`` (hex), else VmTampered, and
        if the host holds its keys, else KeysNotHeld.
        """
        await self._order("POST", f"/v1/vms/{uuid}/start", fence, json.dumps({"file": file_hash}).encode())

    async def stop(self, uuid: UUID, fence: int, *, force: bool) -> None:
        """Stop a VM."""
        await self._order("POST", f"/v1/vms/{uuid}/stop", fence, json.dumps({"force": force}).encode())

    async def delete(self, uuid: UUID, fence: int) -> None:
        """Forget a stopped VM."""
        await self._order("DELETE", f"/v1/vms/{uuid}", fence)

    async def put_keys(self, uuid: UUID, fence: int, deks: Deks) -> None:
        """Let the host hold a VM's keys in memory."""
        headers = {"content-type": KEYS_TYPE, FENCE: str(fence)}
        await self._send("PUT", f"/v1/vms/{uuid}/keys", encode_keys(deks), headers)

    async def forget_keys(self, uuid: UUID, fence: int) -> None:
        """Let the host drop the keys of a VM that it has, or had; a VM that runs goes on."""
        await self._order("POST", f"/v1/vms/{uuid}/keys/forget", fence)

    async def holds(self, uuid: UUID, deks: Sequence[UUID]) -> bool:
        """Whether the host holds all of these keys of a VM, which need not be there."""
        body = json.dumps({"vm": str(uuid), "deks": [str(dek) for dek in deks]}).encode()
        return (await self._ask("POST", "/v1/keys/held", TypeAdapter(dict[str, bool]), body))["held"]

    async def put_file(self, uuid: UUID, fence: int, file: bytes) -> None:
        """Write a VM's configuration file anew; raises Conflict for one older than the newest it has written."""
        body = json.dumps({"file": file.decode("latin-1")}).encode()
        await self._order("PUT", f"/v1/vms/{uuid}/file", fence, body)

    async def look_at_disks(self, disks: Sequence[Disk]) -> list[DiskFacts]:
        """What the host says of images and where they lie, in the order of ``disks``."""
        body = json.dumps({"disks": [{"path": disk.path, "format": disk.format} for disk in disks]}).encode()
        return await self._ask("POST", "/v1/disks/look", _DISKS, body, timeout=LONG_ANSWER_S)

    async def convert(self, order: ConversionOrder, deks: Deks) -> ConversionStatus:
        """Have disks encrypted, decrypted or rekeyed; ``deks`` are the keys of the images as they are and will be."""
        headers = {"content-type": KEYS_TYPE, FENCE: str(order.fence)}
        body = encode_frame(_ORDER.dump_json(order), deks)
        return await self._ask("PUT", f"/v1/conversions/{order.id}", _CONVERSION, body, headers, LONG_ANSWER_S)

    async def conversion(self, conversion: UUID) -> ConversionStatus | None:
        """How a conversion stands; None when the host knows nothing of it."""
        try:
            return await self._ask("GET", f"/v1/conversions/{conversion}", _CONVERSION)
        except NotFound:
            return None

    async def cancel_conversion(self, conversion: UUID) -> None:
        """Ask for the old images to be kept; raises NotFound for one not known, whose order is refused from then on."""
        await self._send("POST", f"/v1/conversions/{conversion}/cancel", timeout=LONG_ANSWER_S)

    async def forget_conversion(self, conversion: UUID) -> None:
        """Drop a final conversion; one that is not known is forgotten already."""
        try:
            await self._send("POST", f"/v1/conversions/{conversion}/forget", timeout=LONG_ANSWER_S)
        except NotFound:
            return

    async def order(self, role: Role, attempt: UUID, fence: int, spec: bytes) -> MoveStatus:
        """Hand the spec of an attempt, its secret included, to the host that has this role in it."""
        headers = {"content-type": SPEC_TYPE, FENCE: str(fence)}
        return await self._ask("PUT", f"/v1/moves/{attempt}/{role.value}", _MOVE, spec, headers, LONG_ANSWER_S)

    async def move(self, attempt: UUID) -> MoveStatus | None:
        """How the host stands in an attempt; None when it knows nothing of it."""
        try:
            return await self._ask("GET", f"/v1/moves/{attempt}", _MOVE)
        except NotFound:
            return None

    async def cancel(self, attempt: UUID) -> MoveStatus:
        """Ask the source to keep the VM."""
        return await self._ask("POST", f"/v1/moves/{attempt}/cancel", _MOVE)

    async def abort(self, attempt: UUID) -> MoveStatus:
        """End an attempt on this host; one it never saw is marked there, so that a late order is refused."""
        return await self._ask("POST", f"/v1/moves/{attempt}/abort", _MOVE, timeout=LONG_ANSWER_S)

    async def commit(self, attempt: UUID) -> MoveStatus:
        """Carry the source's COMMIT to the target, whose durable answer comes back."""
        return await self._ask("POST", f"/v1/moves/{attempt}/commit", _MOVE, timeout=LONG_ANSWER_S)

    async def answer(self, attempt: UUID, answer: Answer) -> MoveStatus:
        """Carry the target's durable answer to the source."""
        body = json.dumps({"answer": answer.value}).encode()
        return await self._ask("POST", f"/v1/moves/{attempt}/answer", _MOVE, body, timeout=LONG_ANSWER_S)

    async def forget(self, attempt: UUID) -> None:
        """Drop a settled attempt; one that is not known is forgotten already."""
        try:
            await self._send("POST", f"/v1/moves/{attempt}/forget", timeout=LONG_ANSWER_S)
        except NotFound:
            return

    async def write_marker(self, disk: str) -> tuple[str, str]:
        """Write a random marker beside a disk; answers its path and its content."""
        found = await self._ask("POST", "/v1/markers", TypeAdapter(dict[str, str]), _path(disk))
        return found["path"], found["content"]

    async def read_marker(self, path: str) -> str:
        """The content of a marker as this host sees it; raises NotFound or DatastoreNotShared."""
        return (await self._ask("POST", "/v1/markers/read", TypeAdapter(dict[str, str]), _path(path)))["content"]

    async def remove_marker(self, path: str) -> None:
        """Remove a marker."""
        await self._send("POST", "/v1/markers/remove", _path(path))

    async def _order(self, method: str, path: str, fence: int, body: bytes = b"") -> None:
        await self._send(method, path, body, {FENCE: str(fence)}, LONG_ANSWER_S)

    async def _ask(
        self,
        method: str,
        path: str,
        adapter: TypeAdapter[_T],
        body: bytes = b"",
        headers: dict[str, str] | None = None,
        timeout: float = ANSWER_S,
    ) -> _T:
        content = await self._send(method, path, body, headers, timeout)
        try:
            return adapter.validate_json(content)
        except (ValidationError, SealiftError):
            pass  # its text would quote the answer
        raise self._unreachable(f"answered {method} {path.rsplit('/', 1)[-1]} with something else than was asked")

    async def _send(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: dict[str, str] | None = None,
        timeout: float = ANSWER_S,
    ) -> bytes:
        failure: SealiftError
        try:
            response = await self._client.request(
                method,
                path,
                content=body or None,
                headers={"content-type": "application/json", **(headers or {})},
                timeout=httpx2.Timeout(timeout, connect=CONNECT_S),
            )
        except httpx2.HTTPError as error:
            # Raised below, outside of this block: the error holds the request, and the request may hold a secret.
            failure = self._explain(error, timeout)
        else:
            if not response.is_error:
                return response.content
            failure = self._problem(response)
        raise failure

    def _explain(self, error: httpx2.HTTPError, timeout: float) -> SealiftError:
        cause: BaseException | None = error
        why = "the connection ended"
        while cause is not None:
            if isinstance(cause, ssl.SSLCertVerificationError):
                return HostIdentityMismatch(
                    f"whoever answers at {self.peer.address} has no certificate of this controller's hosts",
                    todo=f"see what runs there; is it host {self.peer.name}?",
                )
            if isinstance(cause, ssl.SSLError):
                why = f"TLS failed ({cause.reason})" if cause.reason else why
            elif isinstance(cause, OSError) and cause.strerror:
                why = os.strerror(cause.errno).lower() if cause.errno and cause.errno > 0 else cause.strerror
            cause = cause.__cause__ or cause.__context__
        if isinstance(error, httpx2.TimeoutException):
            seconds = CONNECT_S if isinstance(error, httpx2.ConnectTimeout) else timeout
            why = f"no answer within {seconds:g} s"
        return self._unreachable(f"did not answer: {why}")

    def _problem(self, response: httpx2.Response) -> SealiftError:
        try:
            document: dict[str, Any] = response.json()
            return from_slug(str(document["slug"]), str(document["detail"]), str(document.get("todo", "")))
        except (ValueError, KeyError, TypeError):
            return self._unreachable(f"answered with status {response.status_code}")

    def _unreachable(self, how: str) -> HostUnreachable:
        return HostUnreachable(
            f"host {self.peer.name} at {self.peer.address} {how}", todo=f"see that the agent on {self.peer.name} runs"
        )


class Links:
    """Links to hosts, kept open and renewed with the client certificate."""

    def __init__(self, authority: Authority) -> None:
        self._authority = authority
        self._open: dict[UUID, tuple[AgentLink, httpx2.AsyncClient, float]] = {}
        self._old: list[httpx2.AsyncClient] = []

    def to(self, peer: Peer) -> AgentLink:
        """The link to a host; a new one when its address or key changed, or the certificate is half used up."""
        found = self._open.get(peer.id)
        if found is not None and found[0].peer == peer and time.monotonic() < found[2]:
            return found[0]
        if found is not None:
            self._old.append(found[1])  # requests may be under way on it
        client = httpx2.AsyncClient(
            base_url=f"https://{peer.address}",
            verify=self._context(peer),
            trust_env=False,
            # Shorter than the agent's own limit, so that a request never meets a connection just being closed.
            limits=httpx2.Limits(keepalive_expiry=2.0),
        )
        link = AgentLink(peer, client)
        self._open[peer.id] = (link, client, time.monotonic() + RENEW_S)
        return link

    async def close(self) -> None:
        """Close every connection."""
        for client in [*self._old, *(client for _, client, _ in self._open.values())]:
            await client.aclose()
        self._open.clear()
        self._old.clear()

    def _context(self, peer: Peer) -> ssl.SSLContext:
        context = self._authority.client_context()

        class OnlyThisHost(ssl.SSLObject):
            """A TLS connection whose handshake fails unless the peer is the host that is meant."""

            def do_handshake(self) -> None:
                super().do_handshake()
                _require(peer, self.getpeercert(binary_form=True))

        context.sslobject_class = OnlyThisHost
        return context


def _require(peer: Peer, der: bytes | None) -> None:
    """Raise HostIdentityMismatch unless the certificate names ``peer`` and carries its pinned key."""
    names: list[str] = []
    key = b""
    if der is not None:
        certificate = x509.load_der_x509_certificate(der)
        key = certificate.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        names = found.value.get_values_for_type(x509.UniformResourceIdentifier)
    if names != [host_uri(peer.id)] or key != peer.public_key:
        raise HostIdentityMismatch(
            f"whoever answers at {peer.address} is not host {peer.name}; no order was sent",
            todo=f"see what runs there; if {peer.name} was made anew, join it with a `--replaces` token",
        )


def _path(path: str) -> bytes:
    return json.dumps({"path": path}).encode()
