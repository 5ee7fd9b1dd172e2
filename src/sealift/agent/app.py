"""The agent's HTTPS interface, for controllers only: TLS lets nobody else in (``Identity.server_context``)."""

from __future__ import annotations

from typing import Any

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from sealift.agent.agent import Agent
from sealift.agent.capabilities import capabilities
from sealift.agent.routes_disks import add_conversions, add_disks
from sealift.agent.routes_moves import add_moves
from sealift.agent.routes_vms import add_keys, add_vms
from sealift.domain.host import HostCapabilities
from sealift.errors import InvalidInput, NotFound, SealiftError, to_problem

log = structlog.get_logger()


def make_app(agent: Agent) -> FastAPI:
    """The application; its errors are problem documents (RFC 9457) that never quote a request."""
    app = FastAPI(title="Sealift agent", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(SealiftError, _problem)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(HTTPException, _no_such_order)
    app.add_exception_handler(Exception, _defect)
    for add in (add_vms, add_keys, add_moves, add_conversions, add_disks):
        add(app, agent)

    @app.get("/v1/capabilities")
    async def report() -> HostCapabilities:
        return await capabilities(agent.settings, agent.identity.host, agent.cipher, agent.hypervisor)

    return app


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
