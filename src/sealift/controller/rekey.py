"""Shallow rekey: a new KEK around the same disk keys. Only the configuration file changes, so the VM may run.

The record is written before the host gets the new file, and the host's file tells afterwards which of the two holds.
A host that does not answer gets the very same file again until it does: that is safe as often as one likes, and leaves
no order behind that could come late.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

import structlog
from sqlalchemy import select

from sealift.controller.conversion_run import ConversionTools, destroy_unused_key
from sealift.controller.conversions import ConversionWish, new_row
from sealift.controller.link import AgentLink
from sealift.controller.models import ConversionRow, HostRow, VmRow
from sealift.controller.new_vm import CONFIG
from sealift.controller.providers import Providers
from sealift.controller.vm_keys import file_on_host, own_file, unknown_keys, unwrap_all, write_file
from sealift.domain.checks import Finding
from sealift.domain.conversion import ConversionState
from sealift.domain.deks import wipe
from sealift.errors import Conflict, NotFound, SealiftError, Unreachable
from sealift.secret import Secret

log = structlog.get_logger("sealift.rekey")

AT_ONCE = 8
"""How many VMs of many are rekeyed at the same time."""


@dataclass(frozen=True)
class RekeyedVm:
    """What became of one VM of many; ``error`` is None when it went well."""

    vm: str
    old_provider: str
    old_key_id: str
    provider: str = ""
    key_id: str = ""
    error: SealiftError | None = None


class Rekeying:
    """Shallow rekeys of one controller."""

    def __init__(self, tools: ConversionTools, providers: Providers) -> None:
        self._tools, self._providers = tools, providers

    async def begin(self, wish: ConversionWish, vm: VmRow, host: HostRow, provider: str | None) -> ConversionRow:
        """Make a new KEK, at ``provider`` or where the VM's is, and record the file under it. Call it in the VM's turn.

        ``settle`` then gives it to the host. Raises Conflict for a VM in clear, VmLocked, VmTampered, what the key
        provider raises, and HostUnreachable.
        """
        status = await self._tools.inventory.link(host).vm(vm.uuid)
        if unknown := unknown_keys(vm, host.name, status):
            raise unknown
        if not vm.encrypted:
            raise Conflict(f"VM {vm.name} is not encrypted", todo=f"`sealift vm encrypt {vm.name}` encrypts it")
        await self._tools.inventory.keys.require_own_file(vm, host.name, status)
        row = new_row(wish, vm, host)
        row.state, row.provider = ConversionState.SWAPPING.value, provider or vm.provider or ""
        row.findings = [vars(not_locked_out(vm))]
        # First: who removed the provider is to hear that the VM's present key is needed, whatever the new one's is.
        old_kek, _ = await self._tools.inventory.keys.kek(vm)
        keyring = self._tools.inventory.keys.keyring
        try:
            await self._providers.require_usable(row.provider)
            row.key_id, kek = await keyring.new_kek(row.provider, vm.uuid, vm.name)
            try:
                row.after_file = _write(vm, row, old_kek, kek)
                row = await self._tools.records.begin(row, with_vm=None)
            except BaseException as error:
                await keyring.give_up(row.provider, row.key_id, error)
                raise
            finally:
                kek.wipe()
        finally:
            old_kek.wipe()
        return row

    async def settle(self, row: ConversionRow, link: AgentLink, *, first: bool) -> ConversionRow:
        """Give the host the new file, and make it the VM's; or drop it if the host refuses it for good.

        ``first``: it was never sent before, so that no such order can be on its way still. Only then, and if the host
        has the file from before, is it certain that the new key is for nothing, and it is destroyed: the record may be
        of an older database, put back from a backup, and the VM may have the new file, here or where it is since.
        Raises HostUnreachable, and the host's refusal after it was recorded.
        """
        try:
            await link.put_file(row.vm, row.fence, row.after_file)
        except Unreachable:
            raise
        except SealiftError as error:
            refusal = error.with_traceback(None)
            there = await self._file_there(row, link)
            if there != row.after_file:
                await self._drop(row, refusal, key_unused=first and there == await self._file_before(row))
                raise refusal from None
        return await self._tools.records.promote(row.id, {})

    async def _drop(self, row: ConversionRow, refusal: SealiftError, *, key_unused: bool) -> None:
        row = await self._tools.records.end(
            row.id, ConversionState.FAILED, refusal, {}, key_unused=key_unused, vm_at=None
        )
        await destroy_unused_key(self._tools, row)

    async def _file_there(self, row: ConversionRow, link: AgentLink) -> bytes | None:
        """The file that the host has; None where it has no such VM, or no file of it that can be read."""
        try:
            return file_on_host(await link.vm(row.vm)) or None
        except NotFound:
            return None

    async def _file_before(self, row: ConversionRow) -> bytes:
        async with self._tools.inventory.events.reading() as session:
            return own_file(await session.get_one(VmRow, row.vm))

    async def settle_by_itself(self, conversion: UUID) -> None:
        """Go on from the record of a rekey whose host did not answer, or that an earlier life of ours left open."""
        pause = self._tools.pace.poll_s
        while True:
            try:
                await self._settle_recorded(conversion)
            except SealiftError as error:
                log.info("a rekey is not settled", conversion=str(conversion), error=str(error))
            except Exception:
                log.exception("a rekey met something unexpected", conversion=str(conversion))
            else:
                return
            await asyncio.sleep(pause)
            pause = min(pause * 2, self._tools.pace.tidy_s)

    async def _settle_recorded(self, conversion: UUID) -> None:
        # Its record says whether it is over: a file that was dropped must not be sent again, as its key is destroyed.
        row = await self._tools.records.get(conversion)
        if row.finished_at is None:
            host = next(host for host in await self._tools.records.hosts() if host.id == row.host)
            row = await self.settle(row, self._tools.inventory.link(host), first=False)
        await destroy_unused_key(self._tools, row)

    async def vms_of(self, provider: str) -> Sequence[VmRow]:
        """The VMs whose KEK is at a provider, by name."""
        async with self._tools.inventory.events.reading() as session:
            return list(await session.scalars(select(VmRow).where(VmRow.provider == provider).order_by(VmRow.name)))


def not_locked_out(vm: VmRow) -> Finding:
    """What a shallow rekey does not do."""
    return Finding(
        "warning",
        f"the disks' own keys stay as they are: whoever copied the old configuration file of VM {vm.name} and can "
        f"still get its old key {vm.key_id} from key provider {vm.provider} is not locked out",
        f"`sealift vm rekey --deep {vm.name}` while it is stopped locks them out; then destroy the old key there",
    )


def _write(vm: VmRow, row: ConversionRow, old_kek: Secret, kek: Secret) -> bytes:
    deks = unwrap_all(own_file(vm), old_kek)
    try:
        return write_file(
            CONFIG.validate_python(vm.config),
            deks,
            kek=kek,
            provider=row.provider,
            key_id=row.key_id,
            generation=vm.generation + 1,
        )
    finally:
        wipe(deks)
