"""A controller with two hosts, the native key provider ``home`` and a stopped VM that can be encrypted."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from uuid import UUID

from doubles.agent import FakeAgent, two_hosts
from sealift.api import render
from sealift.api.encryption import VmEncryption
from sealift.api.schemas import Vm
from sealift.controller.models import ConversionRow, EventRow, KeyProviderRow, VmRow
from sealift.controller.provider_ask import ProviderAsk
from sealift.controller.services import Services, open_services
from sealift.controller.watch import Pace
from sealift.keys.provider import KeyState
from support.controllers import FAST, make_state
from support.moves import LIMIT_S

TOML = """
name = "{name}"
vcpus = 1
memory = "64MiB"
[[disks]]
path = "/store/{name}-0"
format = "raw"
[[disks]]
path = "/store/{name}-1"
format = "qcow2"
"""


@dataclass
class World:
    """The parts. ``services`` is replaced by ``restart``; the hosts go on."""

    state: Path
    services: Services
    a: FakeAgent
    b: FakeAgent
    pace: Pace = FAST
    machine: UUID | Literal["unreadable"] | None = None

    async def restart(self) -> None:
        """Another life of the controller."""
        await self.services.close()
        await self.begin()

    async def begin(self) -> None:
        """A life of the controller, begun as after a start."""
        self.services = await open_services(self.state, pace=self.pace, machine=lambda: self.machine)
        await self.services.start()

    async def provide(self, name: str) -> None:
        """A native provider that counts as exported, without the second that a passphrase's stretching takes."""
        await self.services.providers.add(ProviderAsk(name, "native"), asked_by="ann")
        async with self.services.events.transaction() as session:
            (await session.get_one(KeyProviderRow, name)).exported_at = 1.0

    async def away(self, name: str = "home") -> None:
        """A provider can be asked no more."""
        await self.services.providers.close()
        (self.state / "providers" / name).rename(self.state.parent / name)

    async def back(self, name: str = "home") -> None:
        """It can again."""
        await self.services.providers.close()
        (self.state.parent / name).rename(self.state / "providers" / name)

    async def key_state(self, key_id: str, provider: str = "home") -> KeyState:
        """A key's state at its provider."""
        return await (await self.services.providers.open(provider)).state(key_id)

    async def define(self, name: str = "vm1", *, running: bool = False) -> UUID:
        """A VM with two disks at host a."""
        seen = await self.services.inventory.create_vm("a", TOML.format(name=name), asked_by="ann")
        if running:
            await self.services.inventory.start_vm(name, asked_by="ann")
        return seen.row.uuid

    async def encrypt(self, name: str = "vm1", *, provider: str | None = None) -> ConversionRow:
        """Encrypt a VM; the record as it was answered."""
        row = await self.services.encryption.encrypt(name, provider, verify="sample", dry_run=False, asked_by="ann")
        assert row.state == "copying", row.error
        return row

    async def encrypted(self, name: str = "vm1", *, running: bool = False) -> UUID:
        """An encrypted VM with two disks at host a."""
        vm = await self.define(name)
        assert (await self.finished(await self.encrypt(name))).state == "done"
        if running:
            await self.services.inventory.start_vm(name, asked_by="ann")
        return vm

    async def rekey(self, name: str = "vm1", *, provider: str | None = None, deep: bool = False) -> ConversionRow:
        """Rekey a VM; the record as it was answered."""
        return await self.services.encryption.rekey(
            name, provider, deep=deep, verify="sample", dry_run=False, asked_by="ann"
        )

    async def decrypt(self, name: str = "vm1") -> ConversionRow:
        """Decrypt a VM; the record as it was answered."""
        return await self.services.encryption.decrypt(name, verify="full", dry_run=False, asked_by="ann")

    async def finished(self, row: ConversionRow) -> ConversionRow:
        """The record once the conversion is over and nobody works on it any more."""
        await self.until(row, lambda now: now.finished_at is not None)
        await self.services.encryption.idle()
        return await self.services.conversions.get(row.id)

    async def until(self, row: ConversionRow, done: Callable[[ConversionRow], bool]) -> ConversionRow:
        """The record once ``done`` holds of it."""
        async with asyncio.timeout(LIMIT_S):
            async for _ in self.services.events.follow(0, idle_s=0.02):
                now = await self.services.conversions.get(row.id)
                if done(now):
                    return now
        raise AssertionError("unreachable")

    async def row(self, name: str = "vm1") -> VmRow:
        """A VM's row."""
        return (await self.services.inventory.placed(name))[0]

    async def shown(self, name: str = "vm1") -> Vm:
        """A VM as people are shown it."""
        return render.vm(await self.services.inventory.vm(name))

    async def sight(self, name: str = "vm1") -> VmEncryption:
        """What people are shown of a VM's encryption."""
        found = (await self.shown(name)).encryption
        assert found is not None
        return found

    async def happened(self, kind: str) -> list[EventRow]:
        """The events of one type."""
        return [event for event in await self.services.events.after(0) if event.type == kind]

    async def tell(self, kind: str) -> EventRow:
        """The first event of a type, once it happens."""
        async with asyncio.timeout(LIMIT_S):
            async for rows in self.services.events.follow(0, idle_s=LIMIT_S):
                for event in rows:
                    if event.type == kind:
                        return event
        raise AssertionError("unreachable")


@contextlib.asynccontextmanager
async def a_world(
    tmp_path: Path, *, pace: Pace = FAST, machine: UUID | Literal["unreadable"] | None = None
) -> AsyncIterator[World]:
    """A controller, hosts a and b, and the provider ``home``."""
    state = make_state(tmp_path)
    services = await open_services(state, pace=pace, machine=lambda: machine)
    async with contextlib.AsyncExitStack() as stack:
        world = World(state, services, *await _hosts(stack, services, tmp_path), pace, machine)
        stack.push_async_callback(lambda: world.services.close())
        await services.start()
        await world.provide("home")
        yield world


async def _hosts(stack: contextlib.AsyncExitStack, services: Services, directory: Path) -> tuple[FakeAgent, FakeAgent]:
    try:
        return await stack.enter_async_context(two_hosts(services, directory))
    except BaseException:
        await services.close()
        raise


def with_world(
    tmp_path: Path,
    story: Callable[[World], Awaitable[None]],
    *,
    pace: Pace = FAST,
    machine: UUID | Literal["unreadable"] | None = None,
) -> None:
    """Run a story in a world of its own."""

    async def main() -> None:
        async with a_world(tmp_path, pace=pace, machine=machine) as world:
            await story(world)

    asyncio.run(main())
