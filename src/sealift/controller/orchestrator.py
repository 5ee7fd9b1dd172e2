"""Migrations under way: one task each, and the requests that begin, cancel and resume them."""

from __future__ import annotations

import asyncio
import secrets
from typing import Literal
from uuid import UUID

import structlog

from sealift.controller.inventory import Inventory
from sealift.controller.ledger import Ledger, Wish, new_row
from sealift.controller.models import MigrationRow
from sealift.controller.planning import make_plan
from sealift.controller.run import Draw, Run, Tools, options_of, plan_fields
from sealift.controller.settings import ControllerSettings
from sealift.controller.watch import Pace
from sealift.domain.deks import wipe
from sealift.domain.lifecycle import CANCELLABLE, FINAL, State
from sealift.domain.move import (
    KEY_BYTES,
    NONCE_BYTES,
    TOKEN_BYTES,
    ChannelLimits,
    MoveSecret,
    MoveStatus,
    PlainToken,
    SealedSecret,
)
from sealift.domain.policy import Refused
from sealift.errors import Conflict, InvalidInput
from sealift.secret import Secret

log = structlog.get_logger("sealift.orchestrator")


def draw_secret(protection: Literal["sealed", "plain"]) -> MoveSecret:
    """A fresh secret for one attempt from the operating system's generator."""
    if protection == "plain":
        return PlainToken(Secret(secrets.token_bytes(TOKEN_BYTES), length=TOKEN_BYTES))
    return SealedSecret(
        Secret(secrets.token_bytes(KEY_BYTES), length=KEY_BYTES),
        Secret(secrets.token_bytes(NONCE_BYTES), length=NONCE_BYTES),
    )


class Orchestrator:
    """The migrations of one controller. ``stop`` it before the store is closed."""

    def __init__(
        self,
        ledger: Ledger,
        inventory: Inventory,
        settings: ControllerSettings,
        *,
        draw: Draw = draw_secret,
        pace: Pace | None = None,
        limits: ChannelLimits | None = None,
    ) -> None:
        self._ledger, self._inventory, self._settings = ledger, inventory, settings
        self._tools = Tools(ledger, inventory, settings, draw, pace or Pace(), limits or ChannelLimits())
        self._runs: dict[UUID, Run] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def request(self, wish: Wish) -> MigrationRow:
        """Record a wish and plan it; what was accepted then goes on by itself.

        Answers the record, in state ``refused`` when it was refused. Raises NotFound, InvalidInput, and Conflict
        while something else is done with the VM.
        """
        async with self._inventory.turn(wish.vm) as (vm, source):
            target = await self._inventory.host_row(wish.to)
            row = await self._ledger.create(wish, vm, source, target)
        run = self._begin(row, fresh=True)
        await run.planned.wait()
        return await self._ledger.get(row.id)

    async def rehearse(self, wish: Wish) -> MigrationRow:
        """Plan a wish and record nothing; answers the record as it would be."""
        vm, source = await self._inventory.placed(wish.vm)
        target = await self._inventory.host_row(wish.to)
        row = new_row(wish, vm, source, target)
        floor = await self._settings.migration_floor()
        planned = await make_plan(self._inventory, vm, source, target, options_of(row), row.channels, floor=floor)
        wipe(planned.deks)
        state = State.REFUSED if isinstance(planned.plan, Refused) else State.PLANNED
        for name, value in plan_fields(planned).items():
            setattr(row, name, value)
        row.state = state.value
        row.phases = [*row.phases, [state.value, row.created_at]]
        row.finished_at = row.created_at
        return row

    async def cancel(self, migration: UUID, *, asked_by: str) -> MigrationRow:
        """Ask for a migration to end at its source; raises NotFound, and Conflict when it is too late for that."""
        row = await self._ledger.get(migration)
        state = State(row.state)
        if state not in CANCELLABLE:
            over = "is over" if state in FINAL else f"is in state {state.value}: the source has let the VM go"
            raise Conflict(f"the migration of VM {row.vm_name} {over}", todo=f"see `sealift migration show {row.id}`")
        run = self._runs.get(migration)
        text = f"{asked_by} asked to cancel the migration of VM {row.vm_name}"
        row = await self._ledger.note(
            migration, fields={"cancel_requested": True}, happening=("migration.cancel_requested", text)
        )
        if run is not None:
            run.watch.cancel_requested = True
        return row

    def resume(self, row: MigrationRow) -> None:
        """Go on with a migration that an earlier life of the controller began."""
        self._begin(row, fresh=False)

    def reports(self, migration: UUID) -> tuple[MoveStatus | None, MoveStatus | None]:
        """The last reports of source and target about a migration under way."""
        run = self._runs.get(migration)
        return (run.watch.source, run.watch.target) if run is not None else (None, None)

    async def stop(self) -> None:
        """Stop watching; the moves themselves go on, and the next life of the controller finds them again."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _begin(self, row: MigrationRow, *, fresh: bool) -> Run:
        if row.id in self._runs:
            raise InvalidInput(f"migration {row.id} is being worked on already")
        run = self._runs[row.id] = Run(self._tools, row)
        task = asyncio.create_task(self._carry(row.id, run, fresh), name=f"migration {row.id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return run

    async def _carry(self, migration: UUID, run: Run, fresh: bool) -> None:
        """Carry a run out; one that meets a defect of ours is begun anew from its record, as after a restart."""
        pause = self._tools.pace.poll_s
        try:
            while True:
                try:
                    await run.carry_out(fresh=fresh)
                except Exception:
                    log.exception("a migration met something unexpected", migration=str(migration))
                else:
                    return
                finally:
                    run.planned.set()
                await asyncio.sleep(pause)
                pause, fresh = min(pause * 2, self._tools.pace.tidy_s), False
                run = self._runs[migration] = Run(self._tools, await self._ledger.get(migration))
        finally:
            self._runs.pop(migration, None)
