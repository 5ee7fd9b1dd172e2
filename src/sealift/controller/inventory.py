"""Hosts and VMs: who is there, what they say of themselves, and orders to them."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from uuid import UUID, uuid4

from pydantic import TypeAdapter
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from sealift.controller.events import EventLog, Happening
from sealift.controller.link import AgentLink, Links, Peer
from sealift.controller.models import HostRow, MigrationRow, VmRow
from sealift.domain.host import HostCapabilities
from sealift.domain.policy import Capability, HostView, MigrateEncryption
from sealift.domain.vm import VmConfig, VmState, VmStatus, check_name
from sealift.domain.vm_file import parse_vm_toml
from sealift.errors import AlreadyExists, Conflict, NotFound, SealiftError, Unreachable

CONFIG = TypeAdapter(VmConfig)


@dataclass(frozen=True)
class SeenHost:
    """A host as it was just seen; ``error`` says why it has no ``capabilities``."""

    row: HostRow
    capability: Capability
    capabilities: HostCapabilities | None
    error: str = ""

    @property
    def view(self) -> HostView:
        """What the policy decides from."""
        versions = self.capabilities.channel_versions if self.capabilities else ()
        return HostView(self.row.name, self.capability, versions)


@dataclass(frozen=True)
class SeenVm:
    """A VM as it was just seen; ``error`` says why it has no ``status``."""

    row: VmRow
    host: str
    config: VmConfig
    status: VmStatus | None
    error: str = ""


class Inventory:
    """The hosts and VMs of one controller."""

    def __init__(self, events: EventLog, links: Links) -> None:
        self._events = events
        self._links = links
        self._busy: set[UUID] = set()

    # Hosts

    async def hosts(self) -> list[SeenHost]:
        """Every host, asked just now."""
        async with self._events.reading() as session:
            rows = list(await session.scalars(select(HostRow).order_by(HostRow.name)))
        return list(await asyncio.gather(*(self.look(row) for row in rows)))

    async def host(self, name: str) -> SeenHost:
        """One host, asked just now; raises NotFound."""
        return await self.look(await self.host_row(name))

    async def host_row(self, name: str) -> HostRow:
        """A host's row; raises NotFound."""
        async with self._events.reading() as session:
            return await _host(session, name)

    def link(self, row: HostRow) -> AgentLink:
        """The way to a host's agent."""
        return self._links.to(Peer.of(row))

    async def look(self, row: HostRow) -> SeenHost:
        """Ask a host what it can do, over mutual TLS, and keep track of a capability that was lost (promise P1)."""
        try:
            capabilities = await self.link(row).capabilities()
        except SealiftError as error:
            return SeenHost(row, Capability.UNKNOWN, None, str(error))
        says = capabilities.sealed_channel
        if says != row.was_capable or row.lost_at is not None:
            row = await self._track(row.id, says, capabilities.sealed_channel_reason) or row
        if says:
            return SeenHost(row, Capability.CAPABLE, capabilities)
        lost = Capability.LOST if row.lost_at is not None else Capability.INCAPABLE
        return SeenHost(row, lost, capabilities)

    async def _track(self, host: UUID, says: bool, why: str) -> HostRow | None:
        async with self._events.transaction() as session:
            row = await session.get(HostRow, host)
            if row is None:
                return None
            if says:
                row.was_capable, row.lost_at = True, None
            elif row.was_capable and row.lost_at is None:
                row.lost_at = time.time()
                text = f"host {row.name} could seal moves before and now says it cannot: {why or 'no reason given'}"
                self._events.add(session, Happening("host.capability_lost", text, host=row.name))
            return row

    async def accept(self, name: str, *, asked_by: str) -> SeenHost:
        """Take a host that lost its capability as it is: from now on it counts as one that cannot."""
        async with self._events.transaction() as session:
            row = await _host(session, name)
            if row.lost_at is None:
                raise Conflict(f"host {name} has not lost a capability", todo="there is nothing to accept")
            row.was_capable, row.lost_at = False, None
            text = f"host {name} was accepted by {asked_by} as one that cannot seal moves"
            self._events.add(session, Happening("host.accepted", text, host=name))
        return await self.look(row)

    async def remove_host(self, name: str, *, asked_by: str) -> None:
        """Remove a host, and with it the key that was pinned for it; raises Conflict while a VM is placed there."""
        async with self._events.transaction() as session:
            row = await _host(session, name)
            placed = list(await session.scalars(select(VmRow.name).where(VmRow.host == row.id).order_by(VmRow.name)))
            if placed:
                raise Conflict(f"host {name} has VMs: {', '.join(placed)}", todo="migrate or delete them first")
            moving = await session.scalar(
                select(MigrationRow.vm_name).where(
                    MigrationRow.finished_at.is_(None),
                    (MigrationRow.source == row.id) | (MigrationRow.target == row.id),
                )
            )
            if moving is not None:
                raise Conflict(f"VM {moving} is migrating from or to host {name}", todo="wait for it, or cancel it")
            await session.delete(row)
            self._events.add(session, Happening("host.removed", f"host {name} was removed by {asked_by}", host=name))

    # VMs

    async def vms(self) -> list[SeenVm]:
        """Every VM, its host asked just now."""
        async with self._events.reading() as session:
            rows = list(await session.scalars(select(VmRow).order_by(VmRow.name)))
            hosts = {row.id: row for row in await session.scalars(select(HostRow))}
        return await self._seen(rows, hosts)

    async def vm(self, name: str) -> SeenVm:
        """One VM, its host asked just now; raises NotFound."""
        row, host = await self.placed(name)
        return (await self._seen([row], {host.id: host}))[0]

    async def placed(self, name: str) -> tuple[VmRow, HostRow]:
        """A VM's row and its host's; raises NotFound."""
        async with self._events.reading() as session:
            row = await _vm(session, name)
            host = await session.get_one(HostRow, row.host)
            return row, host

    async def _seen(self, rows: Sequence[VmRow], hosts: dict[UUID, HostRow]) -> list[SeenVm]:
        wanted = list({row.host for row in rows})
        answers = await asyncio.gather(*(self.link(hosts[host]).vms() for host in wanted), return_exceptions=True)
        reports: dict[UUID, list[VmStatus] | SealiftError] = {}
        for host, answer in zip(wanted, answers, strict=True):
            if isinstance(answer, BaseException) and not isinstance(answer, SealiftError):
                raise answer
            reports[host] = answer
        seen = []
        for row in rows:
            report, status, error = reports[row.host], None, ""
            name = hosts[row.host].name
            if isinstance(report, SealiftError):
                error = str(report)
            else:
                status = next((status for status in report if status.uuid == row.uuid), None)
                error = "" if status else f"host {name} does not know this VM"
            config = status.config if status else CONFIG.validate_python(row.config)
            seen.append(SeenVm(row, name, config, status, error))
        return seen

    async def create_vm(self, host: str, text: str, *, asked_by: str) -> SeenVm:
        """Define a VM on a host from its TOML file; raises InvalidInput, NotFound, AlreadyExists."""
        config = parse_vm_toml(text, new_uuid=uuid4(), mac=_draw_mac())
        async with self._events.transaction() as session:
            host_row = await _host(session, host)
            taken = await session.scalar(
                select(VmRow.name).where((VmRow.name == config.name) | (VmRow.uuid == config.uuid))
            )
            if taken is not None:
                raise AlreadyExists(f"VM {taken} is there already, with that name or uuid", todo="choose another")
            row = VmRow(
                uuid=config.uuid,
                name=config.name,
                host=host_row.id,
                migrate_encryption=MigrateEncryption.OPPORTUNISTIC.value,
                fence=1,
                config=CONFIG.dump_python(config, mode="json"),
                created_at=time.time(),
            )
            session.add(row)
        try:
            await self.link(host_row).define(config, row.fence)
        except Unreachable:
            raise  # the order may have arrived: the row stays, and `vm delete` clears both
        except SealiftError:
            async with self._events.transaction() as session:
                await session.delete(row)
            raise
        await self._tell(f"VM {config.name} was defined on host {host} by {asked_by}", "vm.created", row, host)
        return await self.vm(config.name)

    async def set_policy(self, name: str, setting: MigrateEncryption, *, asked_by: str) -> SeenVm:
        """Change a VM's setting; a migration under way keeps the plan it was given."""
        async with self._events.transaction() as session:
            row = await _vm(session, name)
            row.migrate_encryption = setting.value
            text = f"VM {name}: migrate encryption was set to {setting.value} by {asked_by}"
            self._events.add(session, Happening("vm.policy", text, vm=name))
        return await self.vm(name)

    async def start_vm(self, name: str, *, asked_by: str) -> SeenVm:
        """Start a VM where it is placed; raises what its agent refuses with."""
        async with self.turn(name) as (row, host):
            await self.link(host).start(row.uuid, row.fence)
            await self._tell(f"VM {name} was started on host {host.name} by {asked_by}", "vm.started", row, host.name)
        return await self.vm(name)

    async def stop_vm(self, name: str, *, force: bool, asked_by: str) -> SeenVm:
        """Stop a VM: ask the guest to power down, or kill it."""
        async with self.turn(name) as (row, host):
            await self.link(host).stop(row.uuid, row.fence, force=force)
            how = "killed" if force else "told to power down"
            await self._tell(f"VM {name} was {how} on host {host.name} by {asked_by}", "vm.stopped", row, host.name)
        return await self.vm(name)

    async def delete_vm(self, name: str, *, asked_by: str) -> None:
        """Forget a stopped VM, here and at its host; its disks stay."""
        async with self.turn(name) as (row, host):
            with suppress(NotFound):  # its host may have forgotten it already
                await self.link(host).delete(row.uuid, row.fence)
            async with self._events.transaction() as session:
                await session.delete(await session.get_one(VmRow, row.uuid))
                text = f"VM {name} was deleted from host {host.name} by {asked_by}"
                self._events.add(session, Happening("vm.deleted", text, host=host.name, vm=name))

    async def _tell(self, text: str, what: str, row: VmRow, host: str) -> None:
        async with self._events.transaction() as session:
            self._events.add(session, Happening(what, text, host=host, vm=row.name))

    @asynccontextmanager
    async def turn(self, name: str) -> AsyncIterator[tuple[VmRow, HostRow]]:
        """The VM's and its host's row, while no other order touches the VM and no migration of it is unfinished.

        Raises NotFound, and Conflict when it is somebody else's turn.
        """
        row, _ = await self.placed(name)
        if row.uuid in self._busy:
            raise Conflict(f"VM {name} is busy with another order", todo="try again when that is done")
        self._busy.add(row.uuid)
        try:
            async with self._events.reading() as session:
                moving = await session.scalar(
                    select(MigrationRow.id).where(MigrationRow.vm == row.uuid, MigrationRow.finished_at.is_(None))
                )
            if moving is not None:
                raise Conflict(f"VM {name} is migrating ({moving})", todo="wait for it, or cancel it")
            yield await self.placed(name)  # again: it may have moved before it was ours
        finally:
            self._busy.discard(row.uuid)

    async def at_target(self, host: HostRow, vm: UUID) -> VmState | None:
        """What a host says of a VM that is to come to it; None when it does not know it."""
        try:
            return (await self.link(host).vm(vm)).state
        except NotFound:
            return None


async def _host(session: AsyncSession, name: str) -> HostRow:
    found: HostRow | None = await session.scalar(select(HostRow).where(HostRow.name == check_name("host", name)))
    if found is None:
        raise NotFound(f"there is no host {name}", todo="see `sealift host list`")
    return found


async def _vm(session: AsyncSession, name: str) -> VmRow:
    found: VmRow | None = await session.scalar(select(VmRow).where(VmRow.name == check_name("VM", name)))
    if found is None:
        raise NotFound(f"there is no VM {name}", todo="see `sealift vm list`")
    return found


def _draw_mac() -> str:
    """A random address in the range that QEMU uses for its cards."""
    return "52:54:00:" + ":".join(f"{byte:02x}" for byte in secrets.token_bytes(3))
