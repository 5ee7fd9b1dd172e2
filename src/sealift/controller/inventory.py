"""Hosts and VMs: who is there, what they say of themselves, and orders to them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from sealift.controller.conversions import being_converted
from sealift.controller.events import EventLog, Happening
from sealift.controller.link import AgentLink, Links, Peer
from sealift.controller.models import ConversionRow, HostRow, KeyProviderRow, MigrationRow, VmRow
from sealift.controller.new_vm import CONFIG, new_vm, parse_new, require_new
from sealift.controller.sights import SeenHost, SeenVm
from sealift.controller.unlocking import ready_to_start
from sealift.controller.vm_keys import VmKeys, file_on_host, unknown_keys
from sealift.domain.policy import Capability, MigrateEncryption
from sealift.domain.vm import VmState, VmStatus, check_name
from sealift.errors import Conflict, NotFound, SealiftError, Unreachable
from sealift.keys.bundle import Judgement, Verdict

JUDGE_S = 2.0
"""How long whoever looks at VMs waits for the keys that would tell what became of their configuration files."""


class Inventory:
    """The hosts and VMs of one controller."""

    def __init__(self, events: EventLog, links: Links, keys: VmKeys) -> None:
        self.keys = keys
        self.events = self._events = events
        self._links = links
        self._busy: set[UUID] = set()
        self._turns: dict[UUID, asyncio.Lock] = {}

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
        async with self._events.reading() as session:
            unfinished = select(ConversionRow).where(ConversionRow.finished_at.is_(None))
            conversions = {row.vm: row for row in await session.scalars(unfinished)}
            providers = frozenset(await session.scalars(select(KeyProviderRow.name)))
            # Those that an order changed while their hosts were asked: of them two things of two times are known.
            again = select(VmRow).where(VmRow.uuid.in_([row.uuid for row in rows]))
            now = {row.uuid: _orders_key(row) for row in await session.scalars(again)}
        changed = {row.uuid for row in rows if now.get(row.uuid) != _orders_key(row)}
        reports: dict[UUID, list[VmStatus] | SealiftError] = {}
        for host, answer in zip(wanted, answers, strict=True):
            if isinstance(answer, BaseException) and not isinstance(answer, SealiftError):
                raise answer
            reports[host] = answer
        found: list[tuple[VmRow, VmStatus | None, str]] = []
        for row in rows:
            report, name = reports[row.host], hosts[row.host].name
            if isinstance(report, SealiftError):
                found.append((row, None, str(report)))
                continue
            status = next((status for status in report if status.uuid == row.uuid), None)
            found.append((row, status, "" if status else f"host {name} does not know this VM"))
        files = await self._judge(
            [(row, file_on_host(status)) for row, status, _ in found if status and row.uuid not in changed], conversions
        )
        return [
            SeenVm(
                row,
                hosts[row.host].name,
                status.config if status else CONFIG.validate_python(row.config),
                status,
                error,
                files.get(row.uuid),
                self.keys.notes(row, providers) if row.encrypted else "",
                conversions[row.uuid].id if row.uuid in conversions else None,
            )
            for row, status, error in found
        ]

    async def _judge(
        self, found: Sequence[tuple[VmRow, bytes]], conversions: Mapping[UUID, ConversionRow]
    ) -> dict[UUID, Judgement]:
        """What to think of the configuration files of encrypted VMs, without waiting long for anybody's keys.

        The keeper asks too, and waits; so what is not known in time is known later.
        """
        judged: dict[UUID, Judgement] = {}
        asked: dict[asyncio.Task[Judgement], tuple[VmRow, bytes]] = {}
        for row, file in found:
            if not row.encrypted:
                continue
            conversion = conversions.get(row.uuid)
            if conversion is not None and file == conversion.after_file:
                judged[row.uuid] = Judgement(Verdict.OK, ())  # its host is ahead of the record
            elif (known := self.keys.judged(row, file)) is not None:
                judged[row.uuid] = known
            else:
                asked[asyncio.create_task(self.keys.judge(row, file))] = row, file
        if asked:
            await _within(asked, JUDGE_S)
        for task, (row, file) in asked.items():
            late = "the key that it names was not had in time"
            judged[row.uuid] = self.keys.unproved(row, file, late) if task.cancelled() else task.result()
        return judged

    async def create_vm(self, host: str, text: str, *, asked_by: str) -> SeenVm:
        """Define a VM on a host from its TOML file; raises InvalidInput, NotFound, AlreadyExists."""
        config = parse_new(text)
        async with self._events.transaction() as session:
            host_row = await _host(session, host)
            await require_new(session, config.name, config.uuid)
            row = new_vm(config, host_row)
            session.add(row)
        try:
            await self.link(host_row).define(config, row.fence, made_by_conversion=False)
        except Unreachable:
            raise  # the order may have arrived: the row stays, and `vm delete` clears both
        except SealiftError:
            async with self._events.transaction() as session:
                await session.delete(row)
            raise
        await self.tell(f"VM {config.name} was defined on host {host} by {asked_by}", "vm.created", row.name, host)
        return await self.vm(config.name)

    async def set_policy(self, name: str, setting: MigrateEncryption, *, asked_by: str) -> SeenVm:
        """Change a VM's setting; a migration under way keeps the plan it was given.

        Raises Conflict for anything but ``required`` while the VM is encrypted: it always moves sealed.
        """
        async with self._events.transaction() as session:
            row = await _vm(session, name)
            if row.encrypted and setting is not MigrateEncryption.REQUIRED:
                raise Conflict(
                    f"VM {name} is encrypted, and an encrypted VM always moves sealed; its setting stays required",
                    todo=f"`sealift vm decrypt {name}` first, if it may move in plain text",
                )
            row.migrate_encryption = setting.value
            if not row.encrypted:
                row.setting_before = None  # from now on it is what a person chose
            text = f"VM {name}: migrate encryption was set to {setting.value} by {asked_by}"
            self._events.add(session, Happening("vm.policy", text, vm=name))
        return await self.vm(name)

    async def start_vm(self, name: str, *, asked_by: str) -> SeenVm:
        """Start a VM where it is placed; raises what its agent refuses with, and VmLocked and VmTampered."""
        async with self.turn(name) as (row, host):
            link = self.link(host)
            file_hash = await ready_to_start(self.keys, self._events, link, row) if row.encrypted else ""
            await link.start(row.uuid, row.fence, file_hash=file_hash)
            await self.tell(f"VM {name} was started on host {host.name} by {asked_by}", "vm.started", name, host.name)
        return await self.vm(name)

    async def stop_vm(self, name: str, *, force: bool, asked_by: str) -> SeenVm:
        """Stop a VM: ask the guest to power down, or kill it."""
        async with self.turn(name) as (row, host):
            await self.link(host).stop(row.uuid, row.fence, force=force)
            how = "killed" if force else "told to power down"
            await self.tell(f"VM {name} was {how} on host {host.name} by {asked_by}", "vm.stopped", name, host.name)
        return await self.vm(name)

    async def delete_vm(self, name: str, *, force: bool, asked_by: str) -> None:
        """Forget a stopped VM, here and at its host; its disks stay.

        Those of an encrypted one can be opened by nobody afterwards, since its configuration file goes: raises
        Conflict unless ``force``. So it does for one that only its host knows to be encrypted.
        """
        async with self.turn(name) as (row, host):
            if not force and (unknown := unknown_keys(row, host.name, await self._at_host(row, host))):
                raise unknown
            if row.encrypted and not force:
                raise Conflict(
                    f"VM {name} is encrypted: its disks stay, and without its configuration file nobody can open them",
                    todo=f"`sealift vm decrypt {name}` first to keep what is on them, or delete it with --force",
                )
            with suppress(NotFound):  # its host may have forgotten it already
                await self.link(host).delete(row.uuid, row.fence)
            text = f"VM {name} was deleted from host {host.name} by {asked_by}"
            if row.encrypted:
                with suppress(NotFound):
                    await self.link(host).forget_keys(row.uuid, row.fence)
                text += (
                    f"; its disks stay, and nobody can open them; its key {row.key_id} stays at key provider "
                    f"{row.provider}"
                )
            async with self._events.transaction() as session:
                await session.delete(await session.get_one(VmRow, row.uuid))
                others = list(await session.scalars(select(HostRow).where(HostRow.id != host.id)))
                self._events.add(session, Happening("vm.deleted", text, host=host.name, vm=name))
            if row.encrypted:
                await self.forget_keys(others, row.uuid, row.fence)

    async def _at_host(self, row: VmRow, host: HostRow) -> VmStatus | None:
        with suppress(NotFound):
            return await self.link(host).vm(row.uuid)
        return None

    async def forget_keys(self, hosts: Sequence[HostRow], vm: UUID, fence: int) -> None:
        """Let hosts drop the keys of a VM that has been there; one that does not answer drops them with its agent."""
        asked = (self.link(host).forget_keys(vm, fence) for host in hosts)
        for answer in await asyncio.gather(*asked, return_exceptions=True):
            if isinstance(answer, BaseException) and not isinstance(answer, SealiftError):
                raise answer

    async def tell(self, text: str, what: str, vm: str, host: str) -> None:
        """Add an event about a VM."""
        async with self._events.transaction() as session:
            self._events.add(session, Happening(what, text, host=host, vm=vm))

    @asynccontextmanager
    async def turn(self, name: str) -> AsyncIterator[tuple[VmRow, HostRow]]:
        """The VM's and its host's row, while no other order touches the VM and nothing of it is unfinished.

        Raises NotFound, and Conflict when it is somebody else's turn, or a migration's or a conversion's.
        """
        row, _ = await self.placed(name)
        if row.uuid in self._busy:
            raise Conflict(f"VM {name} is busy with another order", todo="try again when that is done")
        self._busy.add(row.uuid)
        try:
            async with self._aside(row.uuid):
                async with self._events.reading() as session:
                    await _require_idle(session, row)
                yield await self.placed(name)  # again: it may have moved before it was ours
        finally:
            self._busy.discard(row.uuid)

    @asynccontextmanager
    async def between_orders(self, seen: VmRow) -> AsyncIterator[bool]:
        """Hold orders to a VM up for a moment; yields whether it still is as it was ``seen``, and idle."""
        if seen.uuid in self._busy:
            yield False
            return
        async with self._aside(seen.uuid):
            async with self._events.reading() as session:
                now = await session.get(VmRow, seen.uuid)
                same = now is not None and _orders_key(now) == _orders_key(seen)
                if same:
                    try:
                        await _require_idle(session, seen)
                    except Conflict:
                        same = False
            yield same

    @asynccontextmanager
    async def _aside(self, vm: UUID) -> AsyncIterator[None]:
        async with self._turns.setdefault(vm, asyncio.Lock()):
            yield

    async def at_target(self, host: HostRow, vm: UUID) -> VmState | None:
        """What a host says of a VM that is to come to it; None when it does not know it."""
        try:
            return (await self.link(host).vm(vm)).state
        except NotFound:
            return None


async def _within(tasks: Collection[asyncio.Task[Judgement]], seconds: float) -> None:
    """Wait for tasks until they are done, or cancelled after so long."""
    try:
        await asyncio.wait(tasks, timeout=seconds)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _require_idle(session: AsyncSession, row: VmRow) -> None:
    moving = await session.scalar(
        select(MigrationRow.id).where(MigrationRow.vm == row.uuid, MigrationRow.finished_at.is_(None))
    )
    if moving is not None:
        raise Conflict(f"VM {row.name} is migrating ({moving})", todo="wait for it, or cancel it")
    converting = await session.scalar(
        select(ConversionRow).where(ConversionRow.vm == row.uuid, ConversionRow.finished_at.is_(None))
    )
    if converting is not None:
        raise being_converted(converting)


def _orders_key(row: VmRow) -> tuple[object, ...]:
    return row.host, row.fence, row.encrypted, row.config_file


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
