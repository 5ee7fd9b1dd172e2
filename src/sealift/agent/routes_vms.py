"""The agent's interface: VMs, their configuration files and keys."""

from __future__ import annotations

from uuid import UUID

from fastapi import FastAPI, Request
from pydantic import BaseModel, Field

from sealift.agent.agent import Agent
from sealift.agent.requests import check_fence, raw_body
from sealift.domain.deks import MAX_FRAME_BYTES, MAX_KEYS, decode_keys, wipe
from sealift.domain.vm import VmConfig, VmStatus
from sealift.errors import InvalidInput


class Definition(BaseModel):
    """A VM to define; ``file`` is an encrypted one's configuration file (latin-1).

    ``made_by_conversion``: images that are not there are left to the conversion that follows, and not made in clear.
    """

    config: VmConfig
    file: str = ""
    made_by_conversion: bool = False


class StartOrder(BaseModel):
    """Which configuration file to start from: SHA-256 in hex digits; empty for a VM in clear, and for no other."""

    file: str = ""


class StopOrder(BaseModel):
    """How to stop a VM."""

    force: bool = False


class FileOrder(BaseModel):
    """A configuration file, as latin-1."""

    file: str


class HeldQuestion(BaseModel):
    """Keys that a host may hold."""

    vm: UUID
    deks: list[UUID] = Field(max_length=MAX_KEYS)


class HeldAnswer(BaseModel):
    """Whether it holds them all."""

    held: bool


def add_vms(app: FastAPI, agent: Agent) -> None:
    """Everything about one VM but its moves and conversions."""
    vms = agent.vms

    def fenced(vm: UUID, request: Request) -> None:
        check_fence(agent.journal, vm, request)

    @app.get("/v1/vms")
    async def every() -> list[VmStatus]:
        return await vms.list()

    @app.get("/v1/vms/{vm}")
    async def one(vm: UUID) -> VmStatus:
        return await vms.status(vm)

    @app.put("/v1/vms/{vm}")
    async def define(vm: UUID, definition: Definition, request: Request) -> VmStatus:
        if definition.config.uuid != vm:
            raise InvalidInput("the order's path and configuration name different VMs")
        fenced(vm, request)
        return await vms.define(
            definition.config, file=definition.file, made_by_conversion=definition.made_by_conversion
        )

    @app.post("/v1/vms/{vm}/start")
    async def start(vm: UUID, request: Request, order: StartOrder | None = None) -> VmStatus:
        fenced(vm, request)
        return await vms.start(vm, order.file if order else "")

    @app.post("/v1/vms/{vm}/stop")
    async def stop(vm: UUID, order: StopOrder, request: Request) -> VmStatus:
        fenced(vm, request)
        return await vms.stop(vm, force=order.force)

    @app.put("/v1/vms/{vm}/file")
    async def put_file(vm: UUID, order: FileOrder, request: Request) -> VmStatus:
        fenced(vm, request)
        return await vms.put_file(vm, order.file)

    @app.delete("/v1/vms/{vm}", status_code=204)
    async def delete(vm: UUID, request: Request) -> None:
        fenced(vm, request)
        await vms.delete(vm)


def add_keys(app: FastAPI, agent: Agent) -> None:
    """Keys handed out and told to go. A VM need not be here: it may be on its way, or have moved away."""
    vault = agent.vms.vault

    @app.put("/v1/vms/{vm}/keys", status_code=204)
    async def hold(vm: UUID, request: Request) -> None:
        check_fence(agent.journal, vm, request)
        deks = decode_keys(await raw_body(request, MAX_FRAME_BYTES))
        try:
            vault.hold(vm, deks)
        finally:
            wipe(deks)

    @app.post("/v1/vms/{vm}/keys/forget", status_code=204)
    async def forget(vm: UUID, request: Request) -> None:
        check_fence(agent.journal, vm, request)
        vault.forget(vm)

    @app.post("/v1/keys/held")
    async def held(question: HeldQuestion) -> HeldAnswer:
        return HeldAnswer(held=set(question.deks) <= set(vault.held(question.vm)))
