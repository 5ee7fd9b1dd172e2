"""Key providers and keyring of a controller, over a database of a test's own; and VMs that refer to providers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID, uuid4

from sqlalchemy import select

from sealift.controller.conversions import Conversions
from sealift.controller.events import EventLog
from sealift.controller.keyring import Keyring
from sealift.controller.models import ConversionRow, EventRow, HostRow, KeyProviderRow, VmRow
from sealift.controller.provider_ask import ProviderAsk
from sealift.controller.providers import Providers
from sealift.controller.store import open_store


@dataclass
class Registry:
    """The parts, wired as in ``controller.services``."""

    events: EventLog
    providers: Providers
    keyring: Keyring
    directory: Path  # of all providers

    async def add(self, name: str, *, default: bool = False) -> None:
        """A native provider, not exported."""
        await self.providers.add(ProviderAsk(name, "native", default=default), asked_by="ann")

    async def add_usable(self, name: str) -> None:
        """A native provider that counts as exported, without the second that a passphrase's stretching takes."""
        await self.add(name)
        async with self.events.transaction() as session:
            (await session.get_one(KeyProviderRow, name)).exported_at = 1.0

    async def add_vm(self, name: str, provider: str | None, key_id: str | None = "k") -> UUID:
        """A VM's row that refers to a provider."""
        host, vm = uuid4(), uuid4()
        async with self.events.transaction() as session:
            session.add(
                HostRow(id=host, name=f"h-{name}", address="", migration_address="", public_key=b"", joined_at=0.0)
            )
            await session.flush()
            session.add(
                VmRow(uuid=vm, name=name, host=host, config={}, created_at=0.0, provider=provider, key_id=key_id)
            )
        return vm

    async def lock(self, *names: str) -> None:
        """Say of these VMs that they are locked."""
        async with self.events.transaction() as session:
            for row in await session.scalars(select(VmRow).where(VmRow.name.in_(names))):
                row.lock_reason = "its key cannot be had"

    async def begin_conversion(self, vm: UUID, **keys: str) -> None:
        """Record a rekey of a VM at provider ``home``, with ``key_id`` or ``old_key_id``, as the controller does."""
        await Conversions(self.events, self.providers.fresh).begin(self.conversion(vm, **keys), with_vm=None)

    def conversion(self, vm: UUID, **keys: str) -> ConversionRow:
        """The record of a rekey, not stored yet."""
        return ConversionRow(
            id=uuid4(),
            vm=vm,
            vm_name="vm1",
            host=uuid4(),
            host_name="h-vm1",
            kind="rekey",
            deep=True,
            state="copying",
            verify="sample",
            provider="home",
            old_provider="home",
            after_config={},
            after_file=b"",
            fence=1,
            findings=[],
            requested_by="ann",
            created_at=0.0,
            **keys,
        )

    async def happened(self, kind: str = "") -> list[EventRow]:
        """Every event so far, or those of one type."""
        return [event for event in await self.events.after(0) if kind in ("", event.type)]

    def files(self) -> set[str]:
        """What lies in the providers' directory."""
        return {path.name for path in self.directory.iterdir()} if self.directory.exists() else set()


@contextlib.asynccontextmanager
async def a_registry(directory: Path) -> AsyncIterator[Registry]:
    """The registry whose database and providers are in ``directory``; the same one again when opened again."""
    store = await open_store(directory / "controller.db")
    events = EventLog(store)
    providers = Providers(events, directory / "providers")
    try:
        yield Registry(events, providers, Keyring(providers), directory / "providers")
    finally:
        await providers.close()
        await store.close()


def with_registry(directory: Path, story: Callable[[Registry], Awaitable[None]]) -> None:
    """Run a story with a registry of its own."""

    async def main() -> None:
        async with a_registry(directory) as registry:
            await story(registry)

    asyncio.run(main())
