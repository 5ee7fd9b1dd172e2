"""One migration from its wish to its end: plan, prepare, watch, tidy.

After a restart of the controller the same ``carry_out`` goes on from the record; a spec is never sent a second time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal
from uuid import uuid4

from sealift.controller.inventory import Inventory
from sealift.controller.judge import TARGET_OUT
from sealift.controller.ledger import Ledger
from sealift.controller.models import MigrationRow
from sealift.controller.planning import Planned, make_plan
from sealift.controller.settings import ControllerSettings
from sealift.controller.watch import Pace, Watch, failure_of
from sealift.domain.deks import wipe
from sealift.domain.lifecycle import Event, State
from sealift.domain.move import (
    ChannelLimits,
    MoveOptions,
    MoveOrder,
    MoveSecret,
    MoveState,
    Role,
    encode_spec,
)
from sealift.domain.policy import Plain, Refused, Sealed
from sealift.errors import MigrationFailed, PlanRefused, SealiftError, Unreachable

CIPHER = "AES-256-GCM"
PLAIN_VERSION = 1
"""Channel version of a plain move: how its preface is laid out; there is nothing else to agree on."""

Draw = Callable[[Literal["sealed", "plain"]], MoveSecret]


@dataclass(frozen=True)
class Tools:
    """What every migration needs of the controller. ``draw`` makes the secret of one attempt, ``limits`` are those of
    its channel."""

    ledger: Ledger
    inventory: Inventory
    settings: ControllerSettings
    draw: Draw
    pace: Pace
    limits: ChannelLimits


class Run:
    """The work on one migration. One task calls ``carry_out``, which may be cancelled anywhere and begun anew."""

    def __init__(self, tools: Tools, row: MigrationRow) -> None:
        self._tools = tools
        self.watch = Watch(tools.ledger, tools.inventory, tools.pace, row)
        self.planned = asyncio.Event()  # the plan was made, or nothing more will come of it

    async def carry_out(self, *, fresh: bool) -> None:
        """Bring the migration to its end and tidy up; ``fresh``: it was asked for just now."""
        watch = self.watch
        await watch.meet_hosts()
        if watch.state is State.REQUESTED and fresh:
            try:
                planned = await self._plan()
            except SealiftError as error:  # a host that answered at first, and then no more
                watch.failure, planned = error, None
                await watch.end(Event.SOURCE_KEPT)
            self.planned.set()
            if planned is not None:
                try:
                    await self._prepare(planned)
                finally:
                    wipe(planned.deks)
        elif watch.state in (State.REQUESTED, State.PLANNED):
            watch.failure = MigrationFailed(
                "the controller was restarted before anything was touched", todo="ask for the migration again"
            )
            await watch.end(Event.SOURCE_KEPT)
        self.planned.set()
        await watch.until_final()
        await watch.tidy()

    async def _plan(self) -> Planned | None:
        """Decide and record; None when it was refused."""
        watch, row = self.watch, self.watch.row
        vm = await self._tools.ledger.vm(row)
        source, target = watch.host(Role.SOURCE), watch.host(Role.TARGET)
        floor = await self._tools.settings.migration_floor()
        planned = await make_plan(self._tools.inventory, vm, source, target, options_of(row), row.channels, floor=floor)
        fields = plan_fields(planned)
        route = f"VM {row.vm_name} from {row.source_name} to {row.target_name}"
        match planned.plan:
            case Refused(reason, _):
                event, told = Event.PLAN_REFUSED, ("migration.refused", f"moving {route} was refused: {reason}")
            case Plain(reason):
                text = f"{route} moves in plain text, neither encrypted nor authenticated: {reason}"
                event, told = Event.PLAN_ACCEPTED, ("migration.plain", text)
            case Sealed(_, reason):
                event, told = Event.PLAN_ACCEPTED, ("migration.sealed", f"{route} moves sealed: {reason}")
        try:
            await watch.step(event, fields=fields, happening=told)
        except BaseException:
            wipe(planned.deks)
            raise
        return None if event is Event.PLAN_REFUSED else planned

    async def _prepare(self, planned: Planned) -> None:
        """Draw the secret and hand the spec to the target, then to the source; or end the attempt on both."""
        watch = self.watch
        if watch.cancel_requested:
            await watch.end(Event.SOURCE_KEPT_ON_REQUEST)
            return
        attempt = uuid4()
        watch.row = await self._tools.ledger.begin_attempt(watch.row.id, attempt)
        order = _order(watch.row, planned, self._tools.limits)
        secret = self._tools.draw(order.protection)
        spec, spec_with_keys = encode_spec(order, secret, {}), encode_spec(order, secret, planned.deks)
        wipe(planned.deks)
        secret.wipe()
        source_may_have_it = False
        try:
            watch.mark("ordered")
            watch.target = await watch.link(Role.TARGET).order(Role.TARGET, attempt, order.fence, spec_with_keys)
            await self._until_target_waits()
            watch.mark("target")
            if not watch.cancel_requested:
                source_may_have_it = True
                watch.source = await watch.link(Role.SOURCE).order(Role.SOURCE, attempt, order.fence, spec)
                watch.mark("source")
                return
        except Unreachable as error:
            if source_may_have_it:
                return  # perhaps it arrived: the source itself will tell
            watch.failure = error.with_traceback(None)
        except SealiftError as error:
            watch.failure = error.with_traceback(None)  # the frames it came through hold the spec
        finally:
            del spec, spec_with_keys
        await watch.give_up(source_matters=source_may_have_it)

    async def _until_target_waits(self) -> None:
        """Wait until the target listens; raises its error when it cannot, MigrationFailed when it takes too long."""
        watch, pace = self.watch, self._tools.pace
        deadline = time.monotonic() + pace.ready_s
        while watch.target is not None and watch.target.state is MoveState.PREPARING and not watch.cancel_requested:
            if time.monotonic() > deadline:
                raise MigrationFailed(f"host {watch.row.target_name} was not ready within {pace.ready_s:.0f} s")
            await asyncio.sleep(pace.poll_s)
            watch.target = await watch.link(Role.TARGET).move(watch.attempt) or watch.target
        if watch.target is not None and watch.target.state in TARGET_OUT:
            raise failure_of(watch.target, watch.row.target_name)


def plan_fields(planned: Planned) -> dict[str, object]:
    """What a plan writes into the record."""
    found: dict[str, object] = {
        "findings": [vars(finding) for finding in planned.findings],
        "reason": planned.plan.reason,
    }
    match planned.plan:
        case Refused(reason, todo):
            found |= {"error_slug": PlanRefused.slug, "error": reason, "todo": todo}
        case Plain():
            found |= {"protection": "plain", "cipher": None}
        case Sealed():
            found |= {"protection": "sealed", "cipher": CIPHER}
    return found


def options_of(row: MigrationRow) -> MoveOptions:
    """The options as hosts take them: one data stream is no multifd."""
    return MoveOptions(
        row.bandwidth,
        row.max_downtime_ms,
        row.channels if row.channels > 1 else 0,
        row.give_up_ms,
        row.switchover_timeout_ms,
    )


def _order(row: MigrationRow, planned: Planned, limits: ChannelLimits) -> MoveOrder:
    plan = planned.plan
    assert row.attempt is not None
    assert row.fence is not None
    assert planned.hardware is not None
    assert not isinstance(plan, Refused)
    return MoveOrder(
        attempt=row.attempt,
        fence=row.fence,
        vm=row.vm,
        vm_name=row.vm_name,
        source=row.source,
        source_name=row.source_name,
        source_address=planned.source_address,
        target=row.target,
        target_name=row.target_name,
        target_address=planned.target_address,
        protection="sealed" if isinstance(plan, Sealed) else "plain",
        channel_version=plan.version if isinstance(plan, Sealed) else PLAIN_VERSION,
        reason=plan.reason,
        options=options_of(row),
        limits=limits,
        hardware=planned.hardware,
        file=planned.file,
    )
