"""Migrations, and everything that happened."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import StreamingResponse

from sealift.api import render
from sealift.api.caller import Caller, Controller
from sealift.api.problems import problem
from sealift.api.schemas import Event, Migration, MigrationCreate
from sealift.controller.ledger import Wish
from sealift.controller.models import MigrationRow
from sealift.controller.services import Services
from sealift.domain.lifecycle import State
from sealift.domain.move import MoveOptions
from sealift.errors import PlanRefused

router = APIRouter(prefix="/api/v1")

KEEPALIVE_S = 15.0
"""How often a quiet event stream says that it is alive."""


def _document(controller: Services, row: MigrationRow) -> Migration:
    source, target = controller.orchestrator.reports(row.id)
    return render.migration(row, source, target, now=time.time())


@router.post(
    "/migrations",
    tags=["migrations"],
    status_code=201,
    response_model=Migration,
    responses={200: {"model": Migration, "description": "Dry run"}, 409: {"description": "Refused, or busy"}},
)
async def create(controller: Controller, name: Caller, body: MigrationCreate, response: Response) -> object:
    """Move a VM to another host: planned now, then carried out by itself."""
    options = MoveOptions(
        body.bandwidth,
        body.max_downtime_ms,
        body.channels if body.channels > 1 else 0,
        body.give_up_ms,
        body.switchover_timeout_ms,
    )
    wish = Wish(body.vm, body.to, options, body.channels, name)
    if body.dry_run:
        response.status_code = 200
        row = await controller.orchestrator.rehearse(wish)
        return render.migration(row, None, None, now=time.time(), dry_run=True)
    row = await controller.orchestrator.request(wish)
    if row.state == State.REFUSED.value:
        error = PlanRefused(f"moving VM {row.vm_name} to {row.target_name} was refused: {row.error}", todo=row.todo)
        return problem(error, migration=row.id, findings=render.findings(row))
    return _document(controller, row)


@router.get("/migrations", tags=["migrations"])
async def migrations(controller: Controller, name: Caller) -> list[Migration]:
    """The newest migrations, newest first."""
    return [_document(controller, row) for row in await controller.ledger.all()]


@router.get("/migrations/{migration}", tags=["migrations"])
async def show(controller: Controller, name: Caller, migration: UUID) -> Migration:
    """One migration; while it runs, with its progress."""
    return _document(controller, await controller.ledger.get(migration))


@router.post("/migrations/{migration}/cancel", tags=["migrations"], status_code=202)
async def cancel(controller: Controller, name: Caller, migration: UUID) -> Migration:
    """Ask for a migration to end at its source; watch it to see whether it still could."""
    return _document(controller, await controller.orchestrator.cancel(migration, asked_by=name))


@router.get("/events", tags=["events"], response_model=list[Event])
async def events(
    controller: Controller,
    request: Request,
    name: Caller,
    after: Annotated[int | None, Query(ge=0)] = None,
    last_event_id: Annotated[int | None, Header(ge=0)] = None,
) -> object:
    """Events after a number, oldest first, at most 500.

    With ``Accept: text/event-stream`` they keep coming as server-sent events; without ``after`` or ``Last-Event-ID``
    the stream begins with the next one. The list begins with the first one then.
    """
    since = after if after is not None else last_event_id
    if "text/event-stream" not in request.headers.get("accept", ""):
        return [render.event(row) for row in await controller.events.after(since or 0)]
    start = since if since is not None else await controller.events.last()
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(_stream(controller, start), media_type="text/event-stream", headers=headers)


async def _stream(controller: Services, since: int) -> AsyncIterator[str]:
    yield ": sealift events\n\n"  # so that the client sees an answer at once
    async for rows in controller.events.follow(since, idle_s=KEEPALIVE_S):
        for row in rows:
            yield f"id: {row.seq}\nevent: {row.type}\ndata: {render.event(row).model_dump_json()}\n\n"
        if not rows:
            yield ": alive\n\n"
