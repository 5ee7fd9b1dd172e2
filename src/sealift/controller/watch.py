"""Watching one migration to its end.

From ``precopy`` on the two agents drive the move. Here both are asked how it stands, the record follows, and questions
are carried when the hosts cannot reach each other. Nothing here ever hands out a spec.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from uuid import UUID

import structlog

from sealift.controller.inventory import Inventory
from sealift.controller.judge import Absent, Deed, Report, Verdict, judge, runs, walk
from sealift.controller.ledger import Ledger, last_certain
from sealift.controller.link import AgentLink
from sealift.controller.models import HostRow, MigrationRow
from sealift.domain.lifecycle import CANCELLABLE, FINAL, Event, State
from sealift.domain.move import MOVE_FINAL, OUTAGES_TOLD, Answer, LinkReport, MoveState, MoveStatus, Role
from sealift.errors import (
    HostIdentityMismatch,
    MigrationCancelled,
    MigrationFailed,
    OutcomeUnknown,
    SealiftError,
    Unreachable,
    VmCrashed,
    from_slug,
)

log = structlog.get_logger("sealift.migration")


@dataclass(frozen=True)
class Pace:
    """How often to look, and how long to bear what may pass by itself; seconds."""

    poll_s: float = 0.2
    ready_s: float = 60.0  # the target's QEMU and relay to be ready
    grace_s: float = 3.0  # a source to notice by itself that its target is out
    patience_s: float = 30.0  # a host not to answer, before the outcome is called unknown
    again_s: float = 2.0  # before a deed that a host refused is tried again
    tidy_s: float = 30.0  # longest pause between attempts to tidy up
    keep_s: float = 5.0  # between two rounds of the keeper
    probe_s: float = 60.0  # before the keeper asks key providers again whether they are there


class Watch:
    """One migration's record and the last reports of its two hosts."""

    def __init__(self, ledger: Ledger, inventory: Inventory, pace: Pace, row: MigrationRow) -> None:
        self._ledger, self._inventory, self._pace = ledger, inventory, pace
        self._hosts: dict[Role, HostRow | None] = {}
        self._cancel_sent = False
        self._stuck_since: float | None = None
        self._out_since: float | None = None
        self._not_before = 0.0
        self._said = ""
        self._marks: dict[str, float] = {}
        self.row = row
        self.failure: SealiftError | None = None  # why it will fail, when we know better than the source
        self.cancel_requested = row.cancel_requested
        self.source: MoveStatus | None = None
        self.target: MoveStatus | None = None

    @property
    def state(self) -> State:
        """The recorded state."""
        return State(self.row.state)

    @property
    def attempt(self) -> UUID:
        """The attempt that hosts know it by."""
        assert self.row.attempt is not None, "an attempt is recorded before a host hears of it"
        return self.row.attempt

    async def meet_hosts(self) -> None:
        """Read both hosts' rows again."""
        source, target = await self._ledger.hosts(self.row)
        self._hosts = {Role.SOURCE: source, Role.TARGET: target}

    def host(self, role: Role) -> HostRow:
        """The host that has a role."""
        row = self._hosts[role]
        assert row is not None, "a host is not removed while a migration needs it"
        return row

    def link(self, role: Role) -> AgentLink:
        """The way to the agent that has a role."""
        return self._inventory.link(self.host(role))

    def mark(self, step: str) -> None:
        """Keep for the record when a step of setting up was done here."""
        self._marks[step] = time.time()

    async def step(
        self,
        *events: Event,
        fields: Mapping[str, object],
        at_target: bool = False,
        happening: tuple[str, str] | None = None,
    ) -> None:
        """Record steps of the lifecycle."""
        self.row = await self._ledger.step(
            self.row.id, *events, fields=fields, at_target=at_target, happening=happening
        )

    async def until_final(self) -> None:
        """Look at both hosts until the migration is final."""
        while self.state not in FINAL:
            source, target = await asyncio.gather(self._look(Role.SOURCE), self._look(Role.TARGET))
            await self._tell_outages()
            await self._follow(judge(last_certain(self.row.phases), source, target), source, target)
            if self.state not in FINAL:
                await asyncio.sleep(self._pace.poll_s)

    async def _look(self, role: Role) -> Report:
        try:
            found = await self.link(role).move(self.attempt)
        except SealiftError as error:
            self._say("a host did not answer", error)
            return Absent.SILENT
        if found is None:
            return Absent.MISSING
        if role is Role.SOURCE:
            self.source = found
        else:
            self.target = found
        return found

    async def _tell_outages(self) -> None:
        """Events for what befell the link since the last look; the record says how many were told, each just once."""
        if self.source is None:
            return
        told = _outages_told(self.row, self.source.link)
        if new := told[self.row.outage_events :]:
            self.row = await self._ledger.tell(self.row.id, new, {"outage_events": len(told)} | self._figures())

    async def _follow(self, verdict: Verdict, source: Report, target: Report) -> None:
        if verdict.end is not None:
            nobody_asked = verdict.end is Event.SOURCE_KEPT_ON_REQUEST and not self.cancel_requested
            end = Event.SOURCE_KEPT if nobody_asked else verdict.end
            await self._settle(end, at_target=verdict.at_target)
            return
        events = walk(self.state, verdict.reached) if verdict.reached is not None else ()
        if events:
            if Event.RUNNING_AT_TARGET in events or Event.RELEASED in events:
                await self._look(Role.TARGET)  # the time of its resume belongs to the record of this very step
            await self.step(*events, fields=self._figures() | _NO_ERROR)
            if self.state in FINAL:
                return
        await self._bear(verdict)
        if self.state in CANCELLABLE and isinstance(source, MoveStatus) and source.state not in MOVE_FINAL:
            await self._carry_cancel()
        if verdict.deed is not Deed.ABORT_SOURCE:
            self._out_since = None
        if verdict.deed is not None and time.monotonic() >= self._not_before:
            await self._do(verdict.deed, target)

    async def _bear(self, verdict: Verdict) -> None:
        """Have patience with a host that does not answer; then say so, and go on watching."""
        if not verdict.stuck:
            self._stuck_since = None
            return
        if not self._impatient():
            return
        if self.state is State.CLEANING:
            # The target runs it and the source can never start it again; only leftovers remain there.
            await self.step(Event.RELEASED, fields=self._figures())
        elif self.state is not State.OUTCOME_UNKNOWN:
            error = OutcomeUnknown(
                f"VM {self.row.vm_name}: {verdict.stuck}",
                todo=f"bring back {self.row.source_name} and {self.row.target_name}; until then start it nowhere",
            )
            await self.step(Event.CONTACT_LOST, fields=_error_fields(error))

    def _impatient(self) -> bool:
        """Whether we have been stuck for too long; begins to count when called first."""
        now = time.monotonic()
        self._stuck_since = self._stuck_since or now
        return now - self._stuck_since >= self._pace.patience_s

    async def _carry_cancel(self) -> None:
        if not self.cancel_requested or self._cancel_sent:
            return
        try:
            self.source = await self.link(Role.SOURCE).cancel(self.attempt)
        except Unreachable:
            return  # again at the next look
        except SealiftError as error:
            text = f"VM {self.row.vm_name} could not be kept at the source any more: {error.what}"
            await self._ledger.note(self.row.id, happening=("migration.cancel_refused", text))
        self._cancel_sent = True

    async def _do(self, deed: Deed, target: Report) -> None:
        try:
            match deed:
                case Deed.GIVE_UP:
                    await self.give_up(source_matters=True)
                case Deed.ABORT_SOURCE:
                    await self._abort_source(target)
                case Deed.ASK_COMMIT:
                    self.target = await self.link(Role.TARGET).commit(self.attempt)
                case Deed.TELL_RUNNING:
                    self.source = await self.link(Role.SOURCE).answer(self.attempt, Answer.RUNNING)
                case Deed.TELL_ABORTED:
                    self.source = await self.link(Role.SOURCE).answer(self.attempt, Answer.ABORTED)
        except SealiftError as error:
            # A later look shows what became of it.
            self._say(f"a host refused to {deed.value}", error)
            self._not_before = time.monotonic() + self._pace.again_s

    def _say(self, what: str, error: SealiftError) -> None:
        """Log what a host answered, once for as long as it answers the same."""
        if str(error) != self._said:
            self._said = str(error)
            log.warning(what, migration=str(self.row.id), vm=self.row.vm_name, error=str(error))

    async def _abort_source(self, target: Report) -> None:
        """After a grace, tell a source that has not noticed by itself that its target is out."""
        now = time.monotonic()
        self._out_since = self._out_since or now
        if now - self._out_since < self._pace.grace_s or self._cancel_sent:
            return
        if isinstance(target, MoveStatus):
            self.failure = self.failure or failure_of(target, self.row.target_name)
        self.source = await self.link(Role.SOURCE).abort(self.attempt)
        self._out_since = now

    async def give_up(self, *, source_matters: bool) -> None:
        """End an attempt that the source has not begun. Where the source may have its order, its word is needed.

        An order that is still on its way is refused when it comes: the abort marks the attempt at the source.
        """
        try:
            source = await self.link(Role.SOURCE).abort(self.attempt)
            if source.state not in (MoveState.FAILED, MoveState.CANCELLED):
                return  # it has gone further than we knew: go on watching
        except SealiftError:
            if source_matters:
                return  # asked again at the next look
        if self.cancel_requested and self.failure is None:
            await self._settle(Event.SOURCE_KEPT_ON_REQUEST)
            return
        self.failure = self.failure or MigrationFailed(
            "the source never got its order; the attempt was ended", todo="ask for the migration again"
        )
        await self._settle(Event.SOURCE_KEPT)

    async def _settle(self, end: Event, *, at_target: bool = False) -> None:
        """Clear the target, then record the end. A target that does not answer is cleared later, by ``tidy``."""
        if not at_target:
            try:
                cleared = await self.link(Role.TARGET).abort(self.attempt)
            except SealiftError as error:
                self._say("the target was not cleared", error)
                if not isinstance(error, HostIdentityMismatch) and not self._impatient():
                    return
            else:
                if runs(cleared):
                    self.target = cleared
                    return  # it is not as the source thinks; the next look judges anew
        await self.end(end, at_target=at_target)

    async def end(self, end: Event, *, at_target: bool = False) -> None:
        """Record how it ended, other than done, with the reason."""
        row, error = self.row, self.failure
        if end is Event.SOURCE_KEPT_ON_REQUEST:
            error = MigrationCancelled(f"the migration was cancelled; VM {row.vm_name} runs on at {row.source_name}")
        elif end is Event.QEMU_LOST:
            owner, told = (row.target_name, self.target) if at_target else (row.source_name, self.source)
            why = told.error if told and told.error else "its QEMU ended during the migration"
            error = VmCrashed(f"VM {row.vm_name} crashed at {owner}: {why}", todo="start it again there")
        elif error is None:
            error = failure_of(self.source, row.source_name)
        await self.step(end, at_target=at_target, fields=_error_fields(error) | self._figures())

    def _figures(self) -> dict[str, object]:
        """What both hosts counted, for the record."""
        source, target = self.source, self.target
        found: dict[str, object] = {}
        if source is not None:
            found |= {"sealed_out": source.sealed_out, "sealed_in": source.sealed_in}
            link = source.link
            found |= {"outages": link.count, "longest_outage_ms": link.longest_ms, "reconnects": link.reconnects}
        if target is not None:
            found |= {"target_sealed_out": target.sealed_out, "target_sealed_in": target.sealed_in}
        if source and target and source.stopped_at is not None and target.resumed_at is not None:
            resumed_at = target.resumed_at - (source.clock_offset_s or 0.0)
            found["downtime_ms"] = (resumed_at - source.stopped_at) * 1000
        return found | {"timeline": self._timeline()}

    def _timeline(self) -> list[list[object]]:
        """Every step of setting up that is known, each on the clock of where it was done."""
        known = {(where, step): at for where, step, at in self.row.timeline}
        known |= {("controller", step): at for step, at in self._marks.items()}
        for status in (self.source, self.target):
            known |= {(status.role.value, step): at for step, at in status.timeline} if status is not None else {}
        return [[where, step, at] for (where, step), at in known.items()]

    async def tidy(self) -> None:
        """Let both hosts forget the attempt; asks again until they did, or are no hosts of ours any more."""
        pause = self._pace.poll_s
        while not self.row.tidied:
            await self.meet_hosts()
            try:
                for role in Role:
                    if self._hosts[role] is not None:
                        await self._tidy(role)
            except SealiftError as error:
                self._say("an attempt is not forgotten yet", error)
                await asyncio.sleep(pause)
                pause = min(pause * 2, self._pace.tidy_s)
                continue
            self.row = await self._ledger.note(self.row.id, fields={"tidied": True})

    async def _tidy(self, role: Role) -> None:
        link = self.link(role)
        found = await link.move(self.attempt)
        if role is Role.TARGET and self.state is not State.DONE and (found is None or found.state not in MOVE_FINAL):
            await link.abort(self.attempt)
        if role is Role.SOURCE and self.state is State.DONE and found is not None and found.state not in MOVE_FINAL:
            await link.answer(self.attempt, Answer.RUNNING)
        await link.forget(self.attempt)


_NO_ERROR: dict[str, object] = {"error_slug": "", "error": "", "todo": ""}


def _outages_told(row: MigrationRow, link: LinkReport) -> list[tuple[str, str, str | None]]:
    """The events of a migration's outages, in order; those of a later report begin with the same ones."""
    between = f"VM {row.vm_name}: the link from {row.source_name} to {row.target_name}"
    told: list[tuple[str, str, str | None]] = []
    for outage in link.outages:
        text = f"{between} was interrupted: {outage.what} [{outage.slug}]"
        told.append(("migration.interrupted", text, outage.slug))
        if outage.lasted_ms is not None:
            told.append(("migration.resumed", f"{between} resumed after {outage.lasted_ms} ms", outage.slug))
    if link.count > OUTAGES_TOLD:
        told.append(("migration.interrupted", f"{between} is interrupted again; from here on it is only counted", None))
    return told


def failure_of(status: MoveStatus | None, host: str) -> SealiftError:
    """Why a host says that it did not work out, as an error of the class it named."""
    if status is None or not status.error:
        return MigrationFailed(f"the move failed at {host}, which gave no reason", todo="see the agent's log there")
    return from_slug(status.error_slug or MigrationFailed.slug, f"{host}: {status.error}")


def _error_fields(error: SealiftError) -> dict[str, object]:
    return {"error_slug": error.slug, "error": error.what, "todo": error.todo}
