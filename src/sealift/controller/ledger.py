"""Migrations' records. A new state is written here before the effect it stands for is performed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID, uuid4

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from sealift.controller.events import EventLog, Happening
from sealift.controller.models import HostRow, MigrationRow, VmRow
from sealift.domain.lifecycle import FINAL, Event, State, step
from sealift.domain.move import MoveOptions
from sealift.errors import Conflict, NotFound

PAGE = 500


@dataclass(frozen=True)
class Wish:
    """A move that somebody asks for. ``channels`` counts data streams; more than one is multifd."""

    vm: str
    to: str
    options: MoveOptions
    channels: int
    requested_by: str


def new_row(wish: Wish, vm: VmRow, source: HostRow, target: HostRow) -> MigrationRow:
    """The record of a wish, not stored yet."""
    now = time.time()
    return MigrationRow(
        id=uuid4(),
        vm=vm.uuid,
        vm_name=vm.name,
        source=source.id,
        source_name=source.name,
        target=target.id,
        target_name=target.name,
        state=State.REQUESTED.value,
        asked_policy=vm.migrate_encryption,
        reason="",
        channels=wish.channels,
        bandwidth=wish.options.bandwidth,
        max_downtime_ms=wish.options.max_downtime_ms,
        give_up_ms=wish.options.give_up_ms,
        switchover_timeout_ms=wish.options.switchover_timeout_ms,
        sealed_out=0,
        sealed_in=0,
        target_sealed_out=0,
        target_sealed_in=0,
        outages=0,
        longest_outage_ms=0,
        reconnects=0,
        outage_events=0,
        timeline=[],
        phases=[[State.REQUESTED.value, now]],
        findings=[],
        requested_by=wish.requested_by,
        cancel_requested=False,
        error_slug="",
        error="",
        todo="",
        created_at=now,
        tidied=True,
    )


class Ledger:
    """The records of one controller's migrations."""

    def __init__(self, events: EventLog) -> None:
        self._events = events

    async def create(self, wish: Wish, vm: VmRow, source: HostRow, target: HostRow) -> MigrationRow:
        """Record a wish; raises Conflict while another migration of the VM is unfinished."""
        row = new_row(wish, vm, source, target)
        async with self._events.transaction() as session:
            other = await session.scalar(
                select(MigrationRow.id).where(MigrationRow.vm == vm.uuid, MigrationRow.finished_at.is_(None))
            )
            if other is not None:
                raise Conflict(f"VM {vm.name} is migrating already ({other})", todo="wait for it, or cancel it")
            session.add(row)
            text = f"{wish.requested_by} asked to move VM {vm.name} from {source.name} to {target.name}"
            self._events.add(session, _about(row, "migration.requested", text))
        return row

    async def get(self, migration: UUID) -> MigrationRow:
        """One record; raises NotFound."""
        async with self._events.reading() as session:
            return await _get(session, migration)

    async def all(self) -> list[MigrationRow]:
        """The newest records, newest first."""
        async with self._events.reading() as session:
            found = await session.scalars(select(MigrationRow).order_by(MigrationRow.created_at.desc()).limit(PAGE))
            return list(found)

    async def open(self) -> list[MigrationRow]:
        """Records that somebody must still work on: unfinished, or with leftovers at a host."""
        async with self._events.reading() as session:
            found = await session.scalars(
                select(MigrationRow)
                .where(MigrationRow.finished_at.is_(None) | MigrationRow.tidied.is_(False))
                .order_by(MigrationRow.created_at)
            )
            return list(found)

    async def step(
        self,
        migration: UUID,
        *events: Event,
        fields: Mapping[str, object],
        at_target: bool = False,
        happening: tuple[str, str] | None = None,
    ) -> MigrationRow:
        """Take steps of the lifecycle, in one transaction with ``fields`` and the events that tell of them.

        When the guest runs at the target (or crashed there: ``at_target``), the VM is placed there in the same
        transaction. Raises IllegalTransition and changes nothing when the table has no such step.
        """
        async with self._events.transaction() as session:
            row = await _get(session, migration)
            _set(row, fields)
            if happening is not None:
                self._events.add(session, _about(row, *happening))
            for event in events:
                state = step(State(row.state), event)
                row.state = state.value
                row.phases = [*row.phases, [state.value, time.time()]]
                if state in FINAL:
                    row.finished_at = time.time()
                if state is State.CLEANING or at_target:
                    vm = await session.get(VmRow, row.vm)
                    if vm is not None:
                        vm.host = row.target
                self._events.add(session, _about(row, "migration.state", _tell(row, state), state.value))
        return row

    async def begin_attempt(self, migration: UUID, attempt: UUID) -> MigrationRow:
        """Record that a spec with a fresh secret was drawn, and raise the VM's fence for it."""
        async with self._events.transaction() as session:
            row = await _get(session, migration)
            vm = await session.get_one(VmRow, row.vm)
            vm.fence += 1
            row.fence, row.attempt, row.tidied = vm.fence, attempt, False
            state = step(State(row.state), Event.SPEC_DRAWN)
            row.state = state.value
            row.phases = [*row.phases, [state.value, time.time()]]
            self._events.add(session, _about(row, "migration.state", _tell(row, state), state.value))
        return row

    async def note(
        self,
        migration: UUID,
        *,
        fields: Mapping[str, object] | None = None,
        happening: tuple[str, str] | None = None,
    ) -> MigrationRow:
        """Set fields of a record without a step."""
        async with self._events.transaction() as session:
            row = await _get(session, migration)
            _set(row, fields or {})
            if happening is not None:
                self._events.add(session, _about(row, *happening))
        return row

    async def tell(
        self, migration: UUID, happenings: Sequence[tuple[str, str, str | None]], fields: Mapping[str, object]
    ) -> MigrationRow:
        """Add events (type, text, slug of the error they tell of) and set ``fields``, all or nothing."""
        async with self._events.transaction() as session:
            row = await _get(session, migration)
            _set(row, fields)
            for kind, text, slug in happenings:
                self._events.add(session, _about(row, kind, text, slug=slug))
        return row

    async def hosts(self, row: MigrationRow) -> tuple[HostRow | None, HostRow | None]:
        """Source and target as they are now; None for one that was removed."""
        async with self._events.reading() as session:
            return await session.get(HostRow, row.source), await session.get(HostRow, row.target)

    async def vm(self, row: MigrationRow) -> VmRow:
        """The VM of an unfinished migration, which nobody can have removed."""
        async with self._events.reading() as session:
            return await session.get_one(VmRow, row.vm)


def last_certain(phases: Sequence[Sequence[object]]) -> State:
    """The last state that was more than ``outcome_unknown``."""
    return [State(str(state)) for state, _ in phases if state != State.OUTCOME_UNKNOWN.value][-1]


async def _get(session: AsyncSession, migration: UUID) -> MigrationRow:
    found = await session.get(MigrationRow, migration)
    if found is None:
        raise NotFound(f"there is no migration {migration}", todo="see `sealift migration list`")
    return found


def _set(row: MigrationRow, fields: Mapping[str, object]) -> None:
    for name, value in fields.items():
        if name not in MigrationRow.__table__.columns:
            raise AttributeError(name)
        setattr(row, name, value)


def _about(row: MigrationRow, what: str, text: str, state: str | None = None, slug: str | None = None) -> Happening:
    return Happening(what, text, vm=row.vm_name, migration=row.id, state=state, slug=slug)


def _tell(row: MigrationRow, state: State) -> str:
    where = f"VM {row.vm_name}, {row.source_name} to {row.target_name}: {state.value}"
    return f"{where}: {row.error}" if row.error and (state in FINAL or state is State.OUTCOME_UNKNOWN) else where
