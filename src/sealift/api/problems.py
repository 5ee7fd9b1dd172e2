"""Errors as RFC 9457 problem documents. None of them ever quotes what was sent (promise P2)."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from sealift.api.schemas import Finding, Problem
from sealift.errors import Conflict, InvalidInput, NotFound, SealiftError, to_problem

log = structlog.get_logger("sealift.api")

PROBLEM_TYPE = "application/problem+json"


def problem(error: SealiftError, *, migration: UUID | None = None, findings: Sequence[Finding] = ()) -> Response:
    """An error as the answer to a request."""
    document = Problem(**to_problem(error), migration=migration, findings=list(findings))
    content = document.model_dump_json(exclude_none=True)
    headers = {"www-authenticate": "Bearer"} if error.status == 401 else None
    return Response(content, status_code=error.status, media_type=PROBLEM_TYPE, headers=headers)


def install(app: FastAPI) -> None:
    """Make every error of ``app`` a problem document."""

    @app.exception_handler(SealiftError)
    async def ours(request: Request, error: SealiftError) -> Response:
        if error.status >= 500:
            log.warning("a request failed", path=request.url.path, slug=error.slug, error=str(error))
        return problem(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return problem(InvalidInput(_where(error), todo="see /api/openapi.json"))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        if error.status_code == 404:
            return problem(NotFound("there is no such page", todo="see /api/openapi.json"))
        if error.status_code == 405:
            return problem(Conflict("that method is not offered there", todo="see /api/openapi.json"))
        return problem(InvalidInput(f"the request was refused with status {error.status_code}"))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return problem(SealiftError("something unexpected went wrong", todo="see the controller's log"))


def _where(error: RequestValidationError) -> str:
    """Which fields are wrong and how, in our words: neither value nor message, nor a name we do not know."""
    found = []
    for item in error.errors():
        kind, place = str(item["type"]), [str(part) for part in item["loc"]]
        if kind == "json_invalid":
            place = place[:1]
        elif kind == "extra_forbidden":
            place = place[:-1]  # the last part is the sender's own word
        found.append(f"{'.'.join(place)}: {kind}")
    return "the request is not valid: " + "; ".join(found[:20])
