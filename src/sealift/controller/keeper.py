"""Keeping encrypted VMs ready: hosts that lost the keys of their VMs get them again, VMs lock and unlock by themselves.

A host has keys in memory only, so after a restart of its agent it has none. Every few seconds, and at once when a key
provider came or went, each encrypted VM is looked at. A KEK is asked for only where a host lacks keys; every now and
then the providers are asked whether they are there, and nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from uuid import UUID

import structlog
from sqlalchemy import select

from sealift.controller.events import EventLog, Happening
from sealift.controller.inventory import Inventory
from sealift.controller.models import HostRow, VmRow
from sealift.controller.providers import Providers
from sealift.controller.unlocking import tell_file
from sealift.controller.vm_keys import VmKeys, file_on_host, holds_all, locked
from sealift.domain.deks import wipe
from sealift.domain.vm import VmState, VmStatus
from sealift.errors import EncryptionError, KeyNotActive, NotFound, SealiftError, VmLocked
from sealift.keys.bundle import Verdict

log = structlog.get_logger("sealift.keeper")

AT_ONCE = 8
"""How many VMs of one key provider are looked at at the same time."""

RUNS = frozenset({VmState.RUNNING, VmState.PAUSED, VmState.INCOMING, VmState.MIGRATED})
"""States in which a QEMU may have the keys, whatever the agent has: the VM is not locked."""


@dataclass(frozen=True)
class _Placed:
    vm: VmRow
    host: HostRow
    status: VmStatus


class Keeper:
    """The keeper of one controller: ``start`` and ``stop`` it. ``look`` is one round."""

    def __init__(
        self, events: EventLog, inventory: Inventory, providers: Providers, *, every_s: float, probe_s: float
    ) -> None:
        self._events, self._inventory, self._providers = events, inventory, providers
        self._every_s, self._probe_s = every_s, probe_s
        self._weak: dict[UUID, str] = {}  # what was said of keys that are not active
        self._tasks: list[asyncio.Task[None]] = []
        self._looks: dict[str, asyncio.Task[None]] = {}  # under way, by key provider

    @property
    def _keys(self) -> VmKeys:
        return self._inventory.keys

    def start(self) -> None:
        """Look again and again from now on."""
        # Several, as a key provider that does not answer may take long to say so.
        self._tasks = [
            asyncio.create_task(self._run(), name="keeper"),
            asyncio.create_task(self._probe_again(), name="keeper of key providers"),
            asyncio.create_task(self._settle_keys(), name="keeper of fresh keys"),
        ]

    async def stop(self) -> None:
        """Look no more."""
        await _end(self._tasks)
        await _end([*self._looks.values()])  # which the others began

    async def _run(self) -> None:
        while True:
            changed = self._providers.changed  # taken before the look, so that nothing slips in between
            try:
                await self._begin_looks()
            except Exception:
                log.exception("the keeper met something unexpected when it asked for VMs")
            with suppress(TimeoutError):
                async with asyncio.timeout(self._every_s):
                    await changed.wait()

    async def _probe_again(self) -> None:
        while True:
            await asyncio.sleep(self._probe_s)
            try:
                await self.probe()
            except Exception:
                log.exception("the keeper met something unexpected when it asked key providers")

    async def _settle_keys(self) -> None:
        """See what became of keys whose making was interrupted: at first, and again when a provider may be back."""
        while True:
            changed = self._providers.changed
            try:
                await self._keys.keyring.settle()
            except Exception:
                log.exception("the keeper met something unexpected when it looked for keys that were left")
            with suppress(TimeoutError):
                async with asyncio.timeout(self._probe_s):
                    await changed.wait()

    async def probe(self) -> None:
        """Ask every key provider that a VM needs whether it answers, so that people hear of it before they need it."""
        async with self._events.reading() as session:
            found = await session.scalars(select(VmRow.provider).where(VmRow.encrypted).distinct())
            names = [name for name in found if name is not None]
        for answer in await asyncio.gather(*(self._providers.probe(name) for name in names), return_exceptions=True):
            if isinstance(answer, BaseException) and not isinstance(answer, NotFound):  # removed: its VMs lock
                raise answer

    async def look(self) -> None:
        """Look at every encrypted VM once, but for those that are being looked at."""
        await asyncio.gather(*await self._begin_looks())

    async def _begin_looks(self) -> list[asyncio.Task[None]]:
        """Begin to look at the VMs of each provider, unless the last look at them is still under way.

        Each has its own: a look at many VMs of one that does not answer takes minutes, in which others need keys.
        """
        by_provider: dict[str, list[_Placed]] = {}
        for placed in await self._placed():
            by_provider.setdefault(placed.vm.provider or "", []).append(placed)
        begun = {
            provider: asyncio.create_task(self._look_at(provider, vms), name=f"keeper of {provider}")
            for provider, vms in by_provider.items()
            if provider not in self._looks
        }
        self._looks.update(begun)
        return list(begun.values())

    async def _look_at(self, provider: str, vms: Sequence[_Placed]) -> None:
        room = asyncio.Semaphore(AT_ONCE)

        async def one(placed: _Placed) -> None:
            async with room:
                await self._keep(placed)

        try:
            await asyncio.gather(*map(one, vms))
        except Exception:
            log.exception("the keeper met something unexpected when it looked at VMs", provider=provider)
        finally:
            del self._looks[provider]

    async def _placed(self) -> Sequence[_Placed]:
        """Every encrypted VM whose host answers and knows it."""
        async with self._events.reading() as session:
            rows = list(await session.scalars(select(VmRow).where(VmRow.encrypted).order_by(VmRow.name)))
            hosts = {row.id: row for row in await session.scalars(select(HostRow))} if rows else {}
        wanted = list({row.host for row in rows})
        answers = await asyncio.gather(*(self._vms_of(hosts[host]) for host in wanted))
        known = dict(zip(wanted, answers, strict=True))
        return [_Placed(row, hosts[row.host], known[row.host][row.uuid]) for row in rows if row.uuid in known[row.host]]

    async def _vms_of(self, host: HostRow) -> dict[UUID, VmStatus]:
        try:
            return {status.uuid: status for status in await self._inventory.link(host).vms()}
        except SealiftError:
            return {}  # nothing is known of its VMs, so nothing is said of them

    async def _keep(self, placed: _Placed) -> None:
        """See that a VM's host has its keys, and what is to be said of it.

        Its row and its host's answer may be of two times, before and after an order of ours. So nothing is said of a VM
        that has changed since or is being changed; the next round sees what that left.
        """
        vm, status = placed.vm, placed.status
        runs = status.state in RUNS
        try:
            file = file_on_host(status)
            found = await self._keys.judge(vm, file)
            if found.verdict is Verdict.OK:
                self._keys.told.pop(vm.uuid, None)
            else:
                async with self._inventory.between_orders(vm) as same:
                    if not same:
                        return
                    await tell_file(self._keys, self._events, vm, placed.host.name, file, found)
            if not holds_all(vm, status) and not await self._hand_out(placed):
                return  # an order came in between
        except EncryptionError as error:
            async with self._inventory.between_orders(vm) as same:
                if same and runs:
                    # It goes on with the keys that its QEMU has; only moving it back here would need more.
                    self._keys.lost[vm.uuid] = f"host {placed.host.name} has lost its keys: {error.what}"
                elif same:
                    await self._lock(vm, locked(vm.name, error) if isinstance(error, VmLocked) else error)
            return
        except SealiftError as error:
            log.info("keys could not be handed out", vm=vm.name, host=placed.host.name, error=str(error))
            return
        self._keys.lost.pop(vm.uuid, None)
        weak = self._keys.not_active(vm)
        if vm.lock_reason or weak != self._weak.get(vm.uuid, ""):
            async with self._inventory.between_orders(vm) as same:
                if same:
                    await self._unlock(placed)
                    await self._tell_weak(placed, weak)

    async def _tell_weak(self, placed: _Placed, weak: str) -> None:
        """An event about a key that is not active, once; it opens the VM's disks at its host all the same."""
        if weak == self._weak.get(placed.vm.uuid, ""):
            return
        self._weak[placed.vm.uuid] = weak
        if weak:
            async with self._events.transaction() as session:
                self._events.add(
                    session,
                    Happening(
                        "vm.key_not_active", weak, host=placed.host.name, vm=placed.vm.name, slug=KeyNotActive.slug
                    ),
                )

    async def _hand_out(self, placed: _Placed) -> bool:
        vm = placed.vm
        deks, _ = await self._keys.deks(vm)
        try:
            async with self._inventory.between_orders(vm) as same:
                if same:
                    await self._inventory.link(placed.host).put_keys(vm.uuid, vm.fence, deks)
                    log.info("keys were handed out", vm=vm.name, host=placed.host.name)
                return same
        finally:
            wipe(deks)

    async def _lock(self, vm: VmRow, error: SealiftError) -> None:
        if vm.lock_reason == error.what:
            return
        async with self._events.transaction() as session:
            row = await session.get(VmRow, vm.uuid)
            if row is None or not row.encrypted:
                return
            if not row.lock_reason:
                host = await session.get_one(HostRow, row.host)
                happening = Happening("vm.locked", error.what, host=host.name, vm=row.name, slug=error.slug)
                self._events.add(session, happening)
            row.lock_reason = error.what

    async def _unlock(self, placed: _Placed) -> None:
        async with self._events.transaction() as session:
            row = await session.get(VmRow, placed.vm.uuid)
            if row is None or not row.lock_reason:
                return
            row.lock_reason = ""
            text = f"VM {row.name} is unlocked: host {placed.host.name} holds its keys"
            self._events.add(session, Happening("vm.unlocked", text, host=placed.host.name, vm=row.name))


async def _end(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
