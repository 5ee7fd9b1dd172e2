"""A controller of one attempt, between two played hosts: asks both agents, judges as the real one, carries."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from contextlib import suppress
from typing import TypeVar

from doubles.hosts import Host, Killed, World, secret
from sealift.controller.judge import Absent, Deed, Report, judge
from sealift.domain.lifecycle import State
from sealift.domain.move import MOVE_FINAL, Answer, MoveOrder, MoveState, MoveStatus
from sealift.errors import NotFound, SealiftError

PATIENCE = 20.0
"""Seconds that a move has to come to rest: a machine that stands still for a moment is no defect of an agent's."""
UNCHANGED = 50
"""So many looks in a row show that an attempt has stuck where it may."""
_T = TypeVar("_T")


async def bounded(call: Awaitable[_T]) -> _T:
    async with asyncio.timeout(PATIENCE):
        return await call


class Carrier:
    """A controller of one attempt: asks both agents, judges, carries. Starts an agent that was killed again."""

    def __init__(self, world: World, order: MoveOrder, *, lose: str = "") -> None:
        self.world, self.order, self.lose = world, order, lose
        self.certain = State.PREPARING
        self.outcome: tuple[Report, Report] = (Absent.MISSING, Absent.MISSING)

    async def carry_out(self) -> None:
        world, order = self.world, self.order
        with suppress(Killed, SealiftError):
            await world.b.moves.take_target(order, secret(), world.deks)
            await self.revive()
            with suppress(Killed, SealiftError):
                await world.a.moves.take_source(order, secret())
        ends, stuck = time.monotonic() + PATIENCE, 0
        while time.monotonic() < ends and stuck < UNCHANGED:
            await self.revive()
            reports = self.look(world.a), self.look(world.b)
            await self.settle(*reports)
            self.outcome = reports
            if self.over():
                return
            stuck = stuck + 1 if self.waits_for_somebody() else 0
            await asyncio.sleep(0.001)

    def over(self) -> bool:
        quiet = not world_busy(self.world)
        return quiet and all(
            r is Absent.MISSING or (isinstance(r, MoveStatus) and r.state in MOVE_FINAL) for r in self.outcome
        )

    def waits_for_somebody(self) -> bool:
        """Everything at the source was lost when its copy might already have been complete: no controller ends that."""
        states = [report.state for report in self.outcome if isinstance(report, MoveStatus)]
        return self.lose == "everything" and states == [MoveState.UNKNOWN, MoveState.READY]

    async def revive(self) -> None:
        for host in (self.world.a, self.world.b):
            if host.fuse.blown:
                await host.crash()
                if self.lose:
                    self.world.lose(host.name, qemu=self.lose == "everything")
                await host.boot()

    def look(self, host: Host) -> Report:
        try:
            return host.moves.status(self.order.attempt)
        except NotFound:
            return Absent.MISSING

    async def settle(self, source: Report, target: Report) -> None:
        verdict = judge(self.certain, source, target)
        if verdict.reached is not None and verdict.reached is not State.DONE:
            self.certain = verdict.reached
        a, b, attempt = self.world.a.moves, self.world.b.moves, self.order.attempt
        with suppress(Killed, SealiftError):
            if verdict.end is not None and not verdict.at_target:
                await bounded(b.abort(attempt))
            match verdict.deed:
                case Deed.GIVE_UP:
                    await bounded(a.abort(attempt))
                    await bounded(b.abort(attempt))
                case Deed.ABORT_SOURCE:
                    await bounded(a.abort(attempt))
                case Deed.ASK_COMMIT:
                    await bounded(b.commit(attempt))
                case Deed.TELL_RUNNING:
                    await bounded(a.answer(attempt, Answer.RUNNING))
                case Deed.TELL_ABORTED:
                    await bounded(a.answer(attempt, Answer.ABORTED))


def world_busy(world: World) -> bool:
    tasks = [*world.a.moves._tasks.values(), *world.b.moves._tasks.values()]
    return any(not task.done() for task in tasks)


def move(world: World, *, at: tuple[int, int] = (0, 0), lose: str = "") -> tuple[Carrier, tuple[list[str], list[str]]]:
    """One attempt; agent a is killed at its ``at[0]``-th effect, b at its ``at[1]``-th. Answers what they did."""

    async def main() -> tuple[Carrier, tuple[list[str], list[str]]]:
        await world.begin()
        first = world.a.fuse, world.b.fuse
        for fuse, number in zip(first, at, strict=True):
            fuse.at = fuse.count + number if number else 0
            fuse.trace.clear()
        carrier = Carrier(world, world.order(), lose=lose)
        try:
            await carrier.carry_out()
        finally:
            await world.a.crash()
            await world.b.crash()
        return carrier, (first[0].trace, first[1].trace)

    return asyncio.run(main())
