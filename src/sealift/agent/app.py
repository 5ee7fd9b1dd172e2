"""The agent's HTTPS interface, for controllers only: TLS lets nobody else in (``Identity.server_context``)."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from sealift.agent.capabilities import CipherFacts, capabilities
from sealift.agent.join import Identity
from sealift.agent.journal import Journal
from sealift.agent.moves import Moves
from sealift.agent.settings import AgentSettings
from sealift.agent.vms import Vms
from sealift.domain.host import HostCapabilities
from sealift.domain.move import MAX_ORDER_BYTES, Answer, MoveStatus, Role, decode_spec
from sealift.domain.vm import VmConfig, VmStatus
from sealift.errors import InvalidInput, NotFound, SealiftError, to_problem
from sealift.hypervisor import disks
from sealift.hypervisor.base import Hypervisor

log = structlog.get_logger()

FENCE = "Sealift-Fence"


@dataclass
class Agent:
    """Everything the interface stands on."""

    settings: AgentSettings
    identity: Identity
    cipher: CipherFacts
    hypervisor: Hypervisor
    journal: Journal
    vms: Vms
    moves: Moves


class Definition(BaseModel):
    """A VM to define."""

    config: VmConfig


class StopOrder(BaseModel):
    """How to stop a VM."""

    force: bool = False


class AnswerOrder(BaseModel):
    """The target's durable answer."""

    answer: Answer


class MarkerPath(BaseModel):
    """A disk's or a marker's path."""

    path: str


def make_app(agent: Agent) -> FastAPI:
    """The application; its errors are problem documents (RFC 9457) that never quote a request."""
    app = FastAPI(title="Sealift agent", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(SealiftError, _problem)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(HTTPException, _no_such_order)
    app.add_exception_handler(Exception, _defect)
    _add_vms(app, agent)
    _add_moves(app, agent)
    _add_markers(app)

    @app.get("/v1/capabilities")
    async def report() -> HostCapabilities:
        return await capabilities(agent.settings, agent.identity.host, agent.cipher, agent.hypervisor)

    return app


def _add_vms(app: FastAPI, agent: Agent) -> None:
    vms = agent.vms

    def fenced(vm: UUID, request: Request) -> None:
        text = request.headers.get(FENCE, "")
        if not re.fullmatch("[0-9]{1,18}", text):
            raise InvalidInput(f"the order has no valid {FENCE} header")
        agent.journal.check_fence(vm, int(text))

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
        return await vms.define(definition.config)

    @app.post("/v1/vms/{vm}/start")
    async def start(vm: UUID, request: Request) -> VmStatus:
        fenced(vm, request)
        return await vms.start(vm)

    @app.post("/v1/vms/{vm}/stop")
    async def stop(vm: UUID, order: StopOrder, request: Request) -> VmStatus:
        fenced(vm, request)
        return await vms.stop(vm, force=order.force)

    @app.delete("/v1/vms/{vm}", status_code=204)
    async def delete(vm: UUID, request: Request) -> None:
        fenced(vm, request)
        await vms.delete(vm)


def _add_moves(app: FastAPI, agent: Agent) -> None:
    moves = agent.moves

    @app.put("/v1/moves/{attempt}/{role}")
    async def take(attempt: UUID, role: Role, request: Request) -> MoveStatus:
        order, secret, _ = decode_spec(await _body(request))
        if order.attempt != attempt:
            raise InvalidInput("the order's path and specification name different attempts")
        try:
            if role is Role.SOURCE:
                return await moves.take_source(order, secret)
            return await moves.take_target(order, secret)
        finally:
            secret.wipe()  # the relay has it now, or nobody

    @app.get("/v1/moves/{attempt}")
    async def status(attempt: UUID) -> MoveStatus:
        return moves.status(attempt)

    @app.post("/v1/moves/{attempt}/cancel")
    async def cancel(attempt: UUID) -> MoveStatus:
        return await moves.cancel(attempt)

    @app.post("/v1/moves/{attempt}/abort")
    async def abort(attempt: UUID) -> MoveStatus:
        return await moves.abort(attempt)

    @app.post("/v1/moves/{attempt}/commit")
    async def commit(attempt: UUID) -> MoveStatus:
        return await moves.commit(attempt)

    @app.post("/v1/moves/{attempt}/answer")
    async def answer(attempt: UUID, order: AnswerOrder) -> MoveStatus:
        return await moves.answer(attempt, order.answer)

    @app.post("/v1/moves/{attempt}/forget", status_code=204)
    async def forget(attempt: UUID) -> None:
        await moves.forget(attempt)


def _add_markers(app: FastAPI) -> None:
    @app.post("/v1/markers")
    async def write(disk: MarkerPath) -> dict[str, str]:
        path, content = await asyncio.to_thread(disks.write_marker, disk.path)
        return {"path": path, "content": content}

    @app.post("/v1/markers/read")
    async def read(marker: MarkerPath) -> dict[str, str]:
        return {"content": await asyncio.to_thread(disks.read_marker, marker.path)}

    @app.post("/v1/markers/remove", status_code=204)
    async def remove(marker: MarkerPath) -> None:
        await asyncio.to_thread(disks.remove_marker, marker.path)


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_ORDER_BYTES:
            raise InvalidInput("the migration order is too long")
    return bytes(body)


async def _problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, SealiftError)
    return _answer(error)


async def _malformed(request: Request, error: Exception) -> Response:
    return _answer(InvalidInput("the request is malformed"))


async def _no_such_order(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 400:
        return _answer(InvalidInput("the request is malformed"))
    return _answer(NotFound("the agent knows no such order", todo="controller and agent must be of matching versions"))


async def _defect(request: Request, error: Exception) -> Response:
    log.error("request.defect", path=request.url.path, error=type(error).__name__)
    return _answer(SealiftError("the agent met a defect; its log has the details"))


def _answer(error: SealiftError) -> JSONResponse:
    content: dict[str, Any] = to_problem(error)
    return JSONResponse(content, status_code=error.status, media_type="application/problem+json")
