"""Encrypting, decrypting and rekeying VMs: the requests that begin it, one task each, and what is taken up again."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from typing import Any, Literal
from uuid import UUID

import structlog

from sealift.controller.conversion_plan import ConversionPlan, Planner
from sealift.controller.conversion_run import ConversionRun, ConversionTools, Delivery
from sealift.controller.conversions import PLANNED, REFUSED, ConversionWish, new_row, what
from sealift.controller.inventory import Inventory
from sealift.controller.models import ConversionRow, HostRow, VmRow
from sealift.controller.new_vm import CONFIG, new_vm, parse_new, require_new
from sealift.controller.rekey import AT_ONCE, RekeyedVm, Rekeying, not_locked_out
from sealift.controller.sights import SeenVm
from sealift.controller.unlocking import Restored, restore_file
from sealift.controller.vm_keys import draw_deks, write_file
from sealift.domain.conversion import ConversionKind, ConversionOrder, ConversionState, ConversionStatus
from sealift.domain.deks import Deks, wipe
from sealift.domain.vm import VmConfig
from sealift.errors import Conflict, SealiftError, Unreachable
from sealift.secret import Secret

log = structlog.get_logger("sealift.encryption")

Verify = Literal["sample", "full"]


class Encryption:
    """The encryptions of one controller. ``stop`` it before the store is closed."""

    def __init__(self, tools: ConversionTools, planner: Planner) -> None:
        self._tools, self._planner = tools, planner
        self._rekeying = Rekeying(tools, planner.providers)
        self._runs: dict[UUID, ConversionRun] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def _inventory(self) -> Inventory:
        return self._tools.inventory

    async def encrypt(
        self, name: str, provider: str | None, *, verify: Verify, dry_run: bool, asked_by: str
    ) -> ConversionRow:
        """Encrypt a stopped VM's disks under a new key of ``provider``, or of the default one.

        Answers the record: under way, or not stored and ``refused``, or for a dry run ``planned``. Raises NotFound,
        Conflict while something else is done with the VM, and what the key provider or the host says against it.
        """
        wish = ConversionWish(ConversionKind.ENCRYPT, True, verify, asked_by)
        return await self._convert(wish, name, provider, dry_run=dry_run)

    async def decrypt(self, name: str, *, verify: Verify, dry_run: bool, asked_by: str) -> ConversionRow:
        """Decrypt a stopped VM's disks; see ``encrypt``. The setting of its moves stays ``required``."""
        wish = ConversionWish(ConversionKind.DECRYPT, True, verify, asked_by)
        return await self._convert(wish, name, None, dry_run=dry_run)

    async def rekey(
        self, name: str, provider: str | None, *, deep: bool, verify: Verify, dry_run: bool, asked_by: str
    ) -> ConversionRow:
        """A new KEK for a VM, at ``provider`` or where its present one is; with ``deep`` new disk keys as well.

        A deep one copies the disks of a stopped VM, see ``encrypt``. A shallow one is done when it is answered, while
        the VM may run; raises VmLocked and VmTampered too, and HostUnreachable when the host did not say whether it
        took the new file: that is settled as soon as it answers.
        """
        wish = ConversionWish(ConversionKind.REKEY, deep, verify, asked_by)
        if deep:
            return await self._convert(wish, name, provider, dry_run=dry_run)
        async with self._inventory.turn(name) as (vm, host):
            if dry_run:
                plan = await self._planner.plan_shallow(vm, host, provider)
                wipe(plan.deks)
                plan.findings.append(not_locked_out(vm))
                return _record(wish, vm, host, plan)
            try:
                row = await self._rekeying.begin(wish, vm, host, provider)
            except SealiftError as error:
                if not isinstance(error, Unreachable):
                    await self._tell_refused(new_row(wish, vm, host), error.what)
                raise
            try:
                return await self._rekeying.settle(row, self._inventory.link(host), first=True)
            except BaseException:
                # Recorded as failed, or for this task to settle.
                self._spawn(self._rekeying.settle_by_itself(row.id), row)
                raise

    async def rekey_many(self, source: str, target: str, *, asked_by: str) -> Sequence[RekeyedVm]:
        """Shallow-rekey every VM whose key is at ``source`` to ``target``; one that fails does not stop the others.

        Raises NotFound and ProviderNotExported when nothing could be made at ``target``, and NotFound for a ``source``
        that is not there and that no VM refers to.
        """
        await self._planner.providers.require_usable(target)
        vms = await self._rekeying.vms_of(source)
        if not vms:
            await self._planner.providers.require_there(source)
        room = asyncio.Semaphore(AT_ONCE)

        async def one(vm: VmRow) -> RekeyedVm:
            old = RekeyedVm(vm.name, source, vm.key_id or "")
            async with room:
                try:
                    row = await self.rekey(
                        vm.name, target, deep=False, verify="sample", dry_run=False, asked_by=asked_by
                    )
                except SealiftError as error:
                    return replace(old, error=error.with_traceback(None))
            return replace(old, provider=row.provider, key_id=row.key_id)

        return await asyncio.gather(*(one(vm) for vm in vms))

    async def create(
        self, host: str, text: str, provider: str | None, *, verify: Verify, asked_by: str
    ) -> ConversionRow:
        """Define a VM from its TOML file and encrypt it before it can start; if that fails, it is not kept.

        Answers the record, not stored and ``refused`` when the plan was. Raises InvalidInput, NotFound, AlreadyExists.
        """
        config = parse_new(text)
        host_row = await self._inventory.host_row(host)
        async with self._inventory.events.reading() as session:
            await require_new(session, config.name, config.uuid)
        vm = new_vm(config, host_row)
        wish = ConversionWish(ConversionKind.ENCRYPT, True, verify, asked_by)
        plan = await self._planner.plan(wish.kind, vm, host_row, provider, is_new=True)
        row = _record(wish, vm, host_row, plan)
        if plan.refused:
            await self._tell_refused(row, row.error)
            return row
        delivery = await self._prepare(row, vm, plan, with_vm=True)
        try:
            await self._inventory.link(host_row).define(config, vm.fence, made_by_conversion=True)
        except BaseException as error:
            wipe(delivery.deks)
            if isinstance(error, SealiftError) and not isinstance(error, Unreachable):
                # Refused: what the host has under that uuid, if anything, is not ours to remove.
                row = await self._tools.records.end(
                    row.id, ConversionState.FAILED, error, {}, key_unused=True, vm_at=None
                )
            # Else it may have arrived: this ends as failed, and removes the VM.
            self._begin(row, None, never_sent=True)
            raise
        self._begin(row, delivery, never_sent=False)
        told = f"VM {config.name} was defined on host {host} by {asked_by}, to be encrypted"
        await self._inventory.tell(told, "vm.created", vm.name, host)
        return row

    async def restore_config(self, name: str, *, asked_by: str) -> tuple[SeenVm, Restored]:
        """Put the last authentic configuration file of a VM back on its host, or take over a newer one from there.

        Answers the VM as it is then, and which of the two it was, if the file had to be touched at all.
        Raises Conflict for a VM in clear, VmLocked for a file that claims to be newer while its key cannot be had.
        """
        async with self._inventory.turn(name) as (vm, host):
            inventory = self._inventory
            link = inventory.link(host)
            outcome = await restore_file(inventory.keys, inventory.events, link, vm, host, asked_by=asked_by)
        return await self._inventory.vm(name), outcome

    async def cancel(self, conversion: UUID, *, asked_by: str) -> ConversionRow:
        """Ask for a conversion to end with the old images in place; raises NotFound, Conflict when it is too late."""
        row = await self._tools.records.get(conversion)
        run = self._runs.get(conversion)
        live = run.report.state if run is not None and run.report is not None else ConversionState(row.state)
        if row.finished_at is not None:
            what_for = f"the {row.kind} of VM {row.vm_name} is over: {row.state}; there is nothing to cancel"
            raise Conflict(what_for, todo=f"see `sealift conversion show {str(conversion)[:8]}`")
        if live not in (ConversionState.COPYING, ConversionState.VERIFYING):
            raise Conflict(
                f"the {row.kind} of VM {row.vm_name} is in state {live.value}", todo="only a copy can be cancelled"
            )
        text = f"{asked_by} asked to cancel the {row.kind} of VM {row.vm_name}"
        row = await self._tools.records.note(
            conversion, {"cancel_requested": True}, ("conversion.cancel_requested", text)
        )
        if run is not None:
            run.cancel_requested = True
        return row

    def report(self, conversion: UUID) -> ConversionStatus | None:
        """The host's last report of a conversion under way."""
        run = self._runs.get(conversion)
        return run.report if run is not None else None

    def silence(self, conversion: UUID) -> str:
        """That the host of a conversion under way does not answer, in words; empty while it does."""
        run = self._runs.get(conversion)
        return run.silence if run is not None else ""

    def resume(self, row: ConversionRow) -> None:
        """Go on with what an earlier life of the controller began."""
        if row.kind == ConversionKind.REKEY.value and not row.deep:
            self._spawn(self._rekeying.settle_by_itself(row.id), row)
        else:
            self._begin(row, None, never_sent=False)

    async def idle(self) -> None:
        """Wait until nothing that was begun is under way any more."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def stop(self) -> None:
        """Stop watching; the hosts go on, and the next life of the controller finds them again."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _convert(self, wish: ConversionWish, name: str, provider: str | None, *, dry_run: bool) -> ConversionRow:
        async with self._inventory.turn(name) as (vm, host):
            plan = await self._planner.plan(wish.kind, vm, host, provider, is_new=False)
            row = _record(wish, vm, host, plan)
            if plan.refused or dry_run:
                wipe(plan.deks)
                if not dry_run:
                    await self._tell_refused(row, row.error)
                return row
            delivery = await self._prepare(row, vm, plan, with_vm=False)
        self._begin(row, delivery, never_sent=False)
        return row

    async def _prepare(self, row: ConversionRow, vm: VmRow, plan: ConversionPlan, *, with_vm: bool) -> Delivery:
        """Make the new keys and store the record; the order is then to be sent, and its keys to be wiped."""
        config, new = CONFIG.validate_python(vm.config), draw_deks(len(vm.config["disks"]))
        keyring = self._inventory.keys.keyring
        try:
            if row.kind == ConversionKind.DECRYPT.value:
                after = _under(config, [None] * len(config.disks))
            else:
                after = _under(config, list(new))
                row.key_id, kek = await keyring.new_kek(plan.provider, vm.uuid, vm.name)
                row.after_file = _file(row, vm, after, new, kek)
            row.state, row.after_config = ConversionState.COPYING.value, CONFIG.dump_python(after, mode="json")
            await self._tools.records.begin(row, with_vm=vm if with_vm else None)
        except BaseException as error:
            wipe({**plan.deks, **new})
            if row.key_id:
                await keyring.give_up(row.provider, row.key_id, error)
            raise
        if row.kind == ConversionKind.DECRYPT.value:
            wipe(new)
            new = {}
        return Delivery(_order(row, after), {**plan.deks, **new})

    async def _tell_refused(self, row: ConversionRow, why: str) -> None:
        text = f"{row.requested_by} asked to {what(row)} VM {row.vm_name}, which was refused: {why}"
        await self._inventory.tell(text, "conversion.refused", row.vm_name, row.host_name)

    def _begin(self, row: ConversionRow, delivery: Delivery | None, *, never_sent: bool) -> None:
        self._runs[row.id] = ConversionRun(self._tools, row, never_sent=never_sent)
        self._spawn(self._carry(row.id, delivery), row)

    def _spawn(self, work: Coroutine[Any, Any, None], row: ConversionRow) -> None:
        task = asyncio.create_task(work, name=f"conversion {row.id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _carry(self, conversion: UUID, delivery: Delivery | None) -> None:
        """Carry a run out; one that meets a defect of ours is begun anew from its record, as after a restart."""
        pause = self._tools.pace.poll_s
        try:
            while True:
                run = self._runs[conversion]
                try:
                    await run.carry_out(delivery)
                except Exception:
                    log.exception("a conversion met something unexpected", conversion=str(conversion))
                else:
                    return
                finally:
                    if delivery is not None:
                        wipe(delivery.deks)
                await asyncio.sleep(pause)
                pause, delivery = min(pause * 2, self._tools.pace.tidy_s), None
                self._runs[conversion] = ConversionRun(self._tools, run.row, never_sent=False)
        finally:
            self._runs.pop(conversion, None)


def _record(wish: ConversionWish, vm: VmRow, host: HostRow, plan: ConversionPlan) -> ConversionRow:
    """The record of a plan, as it is when nothing more comes of it."""
    row = new_row(wish, vm, host)
    row.findings = [vars(finding) for finding in plan.findings]
    row.provider, row.total_bytes = plan.provider, plan.total_bytes
    row.state = PLANNED
    if plan.refused:
        errors = [finding for finding in plan.findings if finding.severity == "error"]
        row.state, row.finished_at = REFUSED, row.created_at
        row.error, row.todo = "; ".join(found.text for found in errors), "; ".join(found.todo for found in errors)
    return row


def _order(row: ConversionRow, after: VmConfig) -> ConversionOrder:
    verify: Verify = "full" if row.verify == "full" else "sample"
    file = row.after_file.decode("latin-1")
    return ConversionOrder(row.id, row.vm, row.fence, ConversionKind(row.kind), after, file, verify, is_new=row.with_vm)


def _under(config: VmConfig, deks: Sequence[UUID | None]) -> VmConfig:
    """The same VM with its disks under other keys."""
    disks = tuple(replace(disk, dek=dek) for disk, dek in zip(config.disks, deks, strict=True))
    return replace(config, disks=disks)


def _file(row: ConversionRow, vm: VmRow, after: VmConfig, deks: Deks, kek: Secret) -> bytes:
    try:
        return write_file(after, deks, kek=kek, provider=row.provider, key_id=row.key_id, generation=vm.generation + 1)
    finally:
        kek.wipe()
