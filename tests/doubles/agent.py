"""An agent without QEMU: real HTTPS, real certificates, real orders; what its moves do is written by the test.

Keys, configuration files, disks and conversions are in ``doubles.vault``.

It keeps the promises of the agent's interface that the controller leans on: an attempt never seen is marked when it is
aborted, a lower fence and a late order are refused, a committed target does not abort, only what is settled is
forgotten, and a VM that was let go does not start.
"""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from uuid import UUID

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from fastapi import FastAPI, Request, Response
from pydantic import BaseModel

from doubles.vault import FakeVault, Lost
from sealift.controller.access import JoinAsk
from sealift.controller.services import Services
from sealift.domain.host import HostCapabilities
from sealift.domain.move import (
    MOVE_FINAL,
    Answer,
    MoveOrder,
    MoveSecret,
    MoveState,
    MoveStatus,
    Progress,
    Role,
    SealedSecret,
    decode_spec,
)
from sealift.domain.vm import Accelerator, HardwareRecord, VmConfig, VmState, VmStatus
from sealift.errors import (
    AlreadyExists,
    Conflict,
    DatastoreNotShared,
    NotFound,
    SealiftError,
    StaleFence,
    VmLetGo,
    to_problem,
)
from support.serving import serving

MACHINE = "pc-q35-7.2"
QEMU = "7.2.22"

Script = Callable[[MoveOrder], list[dict[str, object]]]


@dataclass
class FakeMove:
    """One attempt: each time the controller looks, the next line of the script becomes true; the last one stays."""

    order: MoveOrder
    role: Role
    status: MoveStatus
    script: list[dict[str, object]]
    commit_answer: Answer = Answer.RUNNING

    def look(self) -> MoveStatus:
        """The status after one more line."""
        if self.script and self.status.state not in MOVE_FINAL:
            line = self.script.pop(0)
            self.status = replace(self.status, **line)  # type: ignore[arg-type]
        return self.status

    def become(self, **facts: object) -> MoveStatus:
        """Leave the script."""
        self.script = []
        self.status = replace(self.status, **facts)  # type: ignore[arg-type]
        return self.status


def line(state: MoveState, **facts: object) -> dict[str, object]:
    """One line of a script."""
    return {"state": state, **facts}


def straight_source(order: MoveOrder) -> list[dict[str, object]]:
    """A source for which all goes well; the guest stopped at second 100 of its clock."""
    progress = Progress(total_bytes=1000, remaining_bytes=400, transferred_bytes=600, rate=200.0)
    sealed = order.protection == "sealed"
    bytes_ = {"sealed_out": 5000, "sealed_in": 70} if sealed else {}
    return [
        line(MoveState.PREPARING),
        line(MoveState.PRECOPY, progress=progress),
        line(MoveState.PRECOPY, progress=progress),
        line(MoveState.SWITCHOVER, stopped_at=100.0),
        line(MoveState.COMMITTING, clock_offset_s=10.0),
        line(MoveState.DONE, **bytes_),
    ]


def straight_target(order: MoveOrder) -> list[dict[str, object]]:
    """A target for which all goes well; its clock is 10 s ahead, and the guest resumed 0.05 s after its stop."""
    sealed = order.protection == "sealed"
    bytes_ = {"sealed_out": 71, "sealed_in": 5001} if sealed else {}
    return [
        *[line(MoveState.WAITING)] * 4,
        line(MoveState.READY),
        line(MoveState.DONE, resumed_at=110.05, answer=Answer.RUNNING, **bytes_),
    ]


class _Definition(BaseModel):
    config: VmConfig
    made_by_conversion: bool


class _Start(BaseModel):
    file: str


class _Stop(BaseModel):
    force: bool


class _Answer(BaseModel):
    answer: Answer


class _Path(BaseModel):
    path: str


@dataclass
class FakeAgent:
    """One host. ``up`` it to let it answer."""

    name: str
    id: UUID
    context: ssl.SSLContext
    port: int
    sealed: bool = True
    aes: bool = True
    versions: tuple[int, ...] = (1,)
    source_script: Script = straight_source
    target_script: Script = straight_target
    commit_answer: Answer = Answer.RUNNING
    shares_datastore: bool = True
    vms: dict[UUID, VmStatus] = field(default_factory=dict)
    moves: dict[UUID, FakeMove] = field(default_factory=dict)
    marked: set[UUID] = field(default_factory=set)
    fences: dict[UUID, int] = field(default_factory=dict)
    let_go: set[UUID] = field(default_factory=set)
    markers: dict[str, str] = field(default_factory=dict)
    orders: list[tuple[Role, MoveOrder]] = field(default_factory=list)
    secrets: list[MoveSecret] = field(default_factory=list)
    refuse_order: SealiftError | None = None
    requests: list[str] = field(default_factory=list)
    vault: FakeVault = field(default_factory=FakeVault)

    @property
    def address(self) -> str:
        """Where it answers."""
        return f"127.0.0.1:{self.port}"

    def up(self) -> contextlib.AbstractAsyncContextManager[int]:
        """Let it answer, for as long as the block runs."""
        return serving(self._app(), self.context, port=self.port)

    def run(self, config: VmConfig) -> None:
        """Have a VM run here."""
        record = HardwareRecord(1, config, MACHINE, "qemu64", Accelerator.TCG, {}, QEMU)
        self.vms[config.uuid] = VmStatus(config.uuid, config.name, VmState.RUNNING, config, record, Accelerator.TCG)

    def capabilities(self) -> HostCapabilities:
        """What it reports."""
        return HostCapabilities(
            host=self.id,
            name=self.name,
            agent_version="0.1.0",
            sealed_channel=self.sealed,
            sealed_channel_reason="" if self.sealed else "switched off",
            channel_versions=self.versions,
            aes_instructions=self.aes,
            aes_gcm_gb_per_s=5.0,
            qemu_version=QEMU,
            machine_types=(MACHINE,),
            accelerators=(Accelerator.TCG,),
            memory_free_bytes=8 << 30,
            migration_address="127.0.0.1:7421",
            cpu_model="Test CPU",
        )

    def take(self, attempt: UUID, role: Role, body: bytes) -> MoveStatus:
        """An order to move."""
        order, secret, deks = decode_spec(body)
        self.orders.append((role, order))
        self.secrets.append(secret)
        self.vault.came_with_orders.append({dek_id: dek.reveal() for dek_id, dek in deks.items()})
        if self.refuse_order is not None:
            raise self.refuse_order
        if attempt in self.moves:
            return self.moves[attempt].status
        if attempt in self.marked:
            raise Conflict(f"attempt {attempt} was ended before this order came")
        self.check_fence(order.vm, order.fence)
        self.vault.take_order(order, deks if role is Role.TARGET else None)
        script = (self.source_script if role is Role.SOURCE else self.target_script)(order)
        first = MoveState.PREPARING if role is Role.SOURCE else MoveState.WAITING
        status = MoveStatus(attempt, role, first, channels=1 + order.options.multifd_channels)
        self.moves[attempt] = FakeMove(order, role, status, script, self.commit_answer)
        return status

    def abort(self, attempt: UUID) -> MoveStatus:
        """End an attempt here."""
        move = self.moves.get(attempt)
        if move is None:
            self.marked.add(attempt)
            return MoveStatus(attempt, Role.TARGET, MoveState.FAILED, error="aborted before the order came")
        if move.role is Role.TARGET and (move.status.answer is Answer.RUNNING or move.status.state is MoveState.DONE):
            raise Conflict("the VM was committed here")
        if move.status.state in MOVE_FINAL or move.status.state is MoveState.UNKNOWN:
            return move.status
        if move.role is Role.TARGET:
            return move.become(state=MoveState.FAILED, answer=Answer.ABORTED, error="the controller ended the attempt")
        if move.status.state in (MoveState.COMMITTING, MoveState.AWAITING_ANSWER):
            return move.status
        return move.become(state=MoveState.CANCELLED, error="the migration was cancelled")

    def check_fence(self, vm: UUID, fence: int) -> None:
        """Refuse an order from the past."""
        if fence < self.fences.get(vm, 0):
            raise StaleFence(f"the order's fence {fence} is lower than {self.fences[vm]}")
        self.fences[vm] = fence

    def _move(self, attempt: UUID) -> FakeMove:
        if attempt not in self.moves:
            raise NotFound(f"host {self.name} knows no attempt {attempt}")
        return self.moves[attempt]

    def _vm(self, vm: UUID) -> VmStatus:
        if vm not in self.vms:
            raise NotFound(f"host {self.name} has no VM {vm}")
        return self.vault.seen(self.vms[vm])

    def _app(self) -> FastAPI:
        app = FastAPI(openapi_url=None)

        @app.exception_handler(SealiftError)
        async def problem(request: Request, error: SealiftError) -> Response:
            from fastapi.responses import JSONResponse

            return JSONResponse(to_problem(error), status_code=error.status, media_type="application/problem+json")

        @app.exception_handler(Lost)
        async def lost(request: Request, error: Lost) -> Response:
            return Response("a proxy gave up", status_code=502)

        self._add_vms(app)
        self.vault.add(app, self)
        self._add_moves(app)
        self._add_markers(app)
        return app

    def _add_vms(self, app: FastAPI) -> None:
        def fenced(vm: UUID, request: Request) -> None:
            self.check_fence(vm, int(request.headers["sealift-fence"]))

        @app.get("/v1/capabilities")
        async def report() -> HostCapabilities:
            return self.capabilities()

        @app.get("/v1/vms")
        async def every() -> list[VmStatus]:
            return [self._vm(vm) for vm in self.vms]

        @app.get("/v1/vms/{vm}")
        async def one(vm: UUID) -> VmStatus:
            return self._vm(vm)

        @app.put("/v1/vms/{vm}")
        async def define(vm: UUID, definition: _Definition, request: Request) -> VmStatus:
            fenced(vm, request)
            self.vault.about_to("define")
            config = definition.config
            if vm in self.vms:
                raise AlreadyExists(f"host {self.name} has VM {vm} already")
            self.vault.made_by_conversion[vm] = definition.made_by_conversion
            self.vms[vm] = VmStatus(vm, config.name, VmState.STOPPED, config, None)
            self.vault.answer("define")
            return self.vms[vm]

        @app.post("/v1/vms/{vm}/start")
        async def start(vm: UUID, order: _Start, request: Request) -> VmStatus:
            fenced(vm, request)
            if vm in self.let_go:
                raise VmLetGo(f"VM {vm} was let go")
            self.run(self.vault.to_start_from(self._vm(vm).config, order.file))
            return self._vm(vm)

        @app.post("/v1/vms/{vm}/stop")
        async def stop(vm: UUID, order: _Stop, request: Request) -> VmStatus:
            fenced(vm, request)
            self.vms[vm] = replace(self._vm(vm), state=VmState.STOPPED)
            return self.vms[vm]

        @app.delete("/v1/vms/{vm}", status_code=204)
        async def delete(vm: UUID, request: Request) -> None:
            fenced(vm, request)
            if self._vm(vm).state is VmState.RUNNING:
                raise Conflict("stop it first")
            self.vault.about_to("delete")
            del self.vms[vm]
            self.vault.held.pop(vm, None)
            self.vault.files.pop(vm, None)
            self.vault.answer("delete")

    def _add_moves(self, app: FastAPI) -> None:
        @app.put("/v1/moves/{attempt}/{role}")
        async def take(attempt: UUID, role: Role, request: Request) -> MoveStatus:
            return self.take(attempt, role, await request.body())

        @app.get("/v1/moves/{attempt}")
        async def status(attempt: UUID) -> MoveStatus:
            move = self._move(attempt)
            found = move.look()
            if found.state is MoveState.DONE:
                self._settle(move)
            return found

        @app.post("/v1/moves/{attempt}/cancel")
        async def cancel(attempt: UUID) -> MoveStatus:
            move = self._move(attempt)
            if move.status.state in (MoveState.PREPARING, MoveState.PRECOPY, MoveState.SWITCHOVER):
                move.become(state=MoveState.CANCELLED, error="the migration was cancelled")
            return move.status

        @app.post("/v1/moves/{attempt}/abort")
        async def abort(attempt: UUID) -> MoveStatus:
            return self.abort(attempt)

        @app.post("/v1/moves/{attempt}/commit")
        async def commit(attempt: UUID) -> MoveStatus:
            move = self._move(attempt)
            if move.status.state is MoveState.READY:
                if move.commit_answer is Answer.RUNNING:
                    move.become(state=MoveState.DONE, answer=Answer.RUNNING, resumed_at=110.05)
                    self._settle(move)
                else:
                    move.become(state=MoveState.FAILED, answer=Answer.ABORTED, error="QEMU refused cont")
            return move.status

        @app.post("/v1/moves/{attempt}/answer")
        async def answer(attempt: UUID, order: _Answer) -> MoveStatus:
            move = self._move(attempt)
            if move.status.state in MOVE_FINAL:
                return move.status
            if move.status.state is not MoveState.AWAITING_ANSWER:
                raise Conflict(f"attempt {attempt} does not wait for an answer")
            if order.answer is Answer.RUNNING:
                move.become(state=MoveState.DONE)
                self._settle(move)
            else:
                move.become(state=MoveState.FAILED, error="the target did not take the VM")
            return move.status

        @app.post("/v1/moves/{attempt}/forget", status_code=204)
        async def forget(attempt: UUID) -> None:
            if self._move(attempt).status.state not in MOVE_FINAL:
                raise Conflict(f"attempt {attempt} is not settled")
            del self.moves[attempt]

    def _settle(self, move: FakeMove) -> None:
        if move.role is Role.SOURCE:
            self.vms.pop(move.order.vm, None)
            self.let_go.add(move.order.vm)
        else:
            self.run(move.order.hardware.config)
            self.vault.take_in(move.order)
            self.let_go.discard(move.order.vm)

    def _add_markers(self, app: FastAPI) -> None:
        @app.post("/v1/markers")
        async def write(disk: _Path) -> dict[str, str]:
            path, content = f"{disk.path}.marker", self.name
            self.markers[path] = content
            return {"path": path, "content": content}

        @app.post("/v1/markers/read")
        async def read(marker: _Path) -> dict[str, str]:
            if marker.path not in self.markers:
                raise DatastoreNotShared("the marker is not there")
            return {"content": self.markers[marker.path]}

        @app.post("/v1/markers/remove", status_code=204)
        async def remove(marker: _Path) -> None:
            self.markers.pop(marker.path, None)


def key_of(secret: MoveSecret) -> bytes:
    """The bytes of a secret, to look for them where they must not be."""
    return secret.key.reveal() if isinstance(secret, SealedSecret) else secret.token.reveal()


async def joined_agent(services: Services, name: str, directory: Path, port: int) -> FakeAgent:
    """A host that has joined the controller in the ordinary way, with a key of its own."""
    key = ec.generate_private_key(ec.SECP256R1())
    csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    token, _ = await services.access.new_join_token(replaces=None, asked_by="test")
    answer = await services.access.join(
        JoinAsk(
            token.text(),
            csr.public_bytes(serialization.Encoding.PEM).decode(),
            name,
            f"127.0.0.1:{port}",
            "127.0.0.1:7421",
        )
    )
    return FakeAgent(name, answer.host, agent_context(services, answer.certificate, key, directory), port)


def agent_context(
    services: Services, certificate: str, key: ec.EllipticCurvePrivateKey, directory: Path
) -> ssl.SSLContext:
    """TLS as an agent serves it: for controllers only."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=services.authority.controllers.pem)
    path = directory / f"agent-{id(key)}.pem"
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(pem + certificate.encode())
    context.load_cert_chain(path)
    path.unlink()
    return context


@contextlib.asynccontextmanager
async def two_hosts(services: Services, directory: Path) -> AsyncIterator[tuple[FakeAgent, FakeAgent]]:
    """Two hosts, a and b, that answer."""
    from sealift.demo.ports import free_port

    a = await joined_agent(services, "a", directory, free_port())
    b = await joined_agent(services, "b", directory, free_port())
    a.markers = b.markers  # one datastore
    async with a.up(), b.up():
        yield a, b
