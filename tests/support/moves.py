"""A VM on host a that is asked to go to host b, and waiting for what becomes of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from uuid import UUID, uuid4

from doubles.agent import FakeAgent
from sealift.controller.ledger import Wish
from sealift.controller.models import EventRow, MigrationRow, VmRow
from sealift.controller.new_vm import CONFIG
from sealift.controller.services import Services
from sealift.domain.lifecycle import State
from sealift.domain.move import MoveOptions
from sealift.domain.policy import MigrateEncryption
from sealift.domain.vm import Disk, VmConfig

LIMIT_S = 20.0


async def running_vm(services: Services, host: FakeAgent, *, name: str = "vm1", disk: str = "") -> UUID:
    """A VM that runs on ``host``, known to the controller."""
    disks = (Disk(disk, "raw"),) if disk else ()
    config = VmConfig(name=name, uuid=uuid4(), vcpus=1, memory_bytes=64 << 20, disks=disks)
    host.run(config)
    async with services.events.transaction() as session:
        session.add(
            VmRow(
                uuid=config.uuid,
                name=name,
                host=host.id,
                config=CONFIG.dump_python(config, mode="json"),
                created_at=0.0,
            )
        )
    return config.uuid


async def set_policy(services: Services, setting: MigrateEncryption) -> None:
    """Set vm1's setting, without asking its host."""
    async with services.events.transaction() as session:
        from sqlalchemy import select

        row = (await session.scalars(select(VmRow))).one()
        row.migrate_encryption = setting.value


def wish(*, vm: str = "vm1", to: str = "b", channels: int = 1) -> Wish:
    """vm1 is to go to b."""
    return Wish(vm, to, MoveOptions(0, 300, channels if channels > 1 else 0), channels, "tester")


async def until(services: Services, migration: UUID, done: Callable[[MigrationRow], bool]) -> MigrationRow:
    """The record once ``done`` holds of it."""
    async with asyncio.timeout(LIMIT_S):
        async for _ in services.events.follow(0, idle_s=0.02):
            row = await services.ledger.get(migration)
            if done(row):
                return row
    raise AssertionError("unreachable")


async def finished(services: Services, migration: UUID) -> MigrationRow:
    """The record once the migration is over and both hosts have forgotten it."""
    return await until(services, migration, lambda row: row.finished_at is not None and row.tidied)


async def in_state(services: Services, migration: UUID, state: State) -> MigrationRow:
    """The record once it is in ``state``."""
    return await until(services, migration, lambda row: row.state == state.value)


def phases(row: MigrationRow) -> list[str]:
    """The states it went through."""
    return [name for name, _ in row.phases]


async def happened(services: Services) -> list[EventRow]:
    """Every event."""
    return await services.events.after(0)
