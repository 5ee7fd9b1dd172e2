"""Shallow rekey: a new KEK around the same disk keys. Only the configuration file changes, so the VM may run.

The record is written before the host gets the new file, and the host's file tells afterwards which of the two holds.
A host that does not answer gets the very same file again until it does: that is safe as often as one likes, and leaves
no order behind that could come late.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import structlog
from sqlalchemy import select

from sealift.controller.conversion_run import ConversionTools
from sealift.controller.conversions import ConversionWish, new_row
from sealift.controller.link import AgentLink
from sealift.controller.models import ConversionRow, HostRow, VmRow
from sealift.controller.new_vm import CONFIG
from sealift.controller.providers import Providers
from sealift.controller.vm_keys import own_file, unwrap_all, write_file
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
        if not vm.encrypted:
            raise Conflict(f"VM {vm.name} is not encrypted", todo=f"`sealift vm encrypt {vm.name}` encrypts it")
        link = self._tools.inventory.link(host)
        await self._tools.inventory.keys.require_own_file(vm, host.name, await link.vm(vm.uuid))
        new_provider = provider or vm.provider or ""
        await self._providers.require_usable(new_provider)
        row = new_row(wish, vm, host)
        row.state, row.provider = ConversionState.SWAPPING.value, new_provider
        row.findings = [vars(not_locked_out(vm))]
        old_kek, _ = await self._tools.inventory.keys.kek(vm)
        keyring = self._tools.inventory.keys.keyring
        try:
            row.key_id, kek = await keyring.new_kek(new_provider, vm.uuid, vm.name)
            try:
                row.after_file = _write(vm, row, old_kek, kek)
                row = await self._tools.records.begin(row, with_vm=None)
            except SealiftError:
                # Only where it is certain that nothing was stored: with the record the key may be the VM's only one.
                await keyring.abandon(row.provider, row.key_id)
                raise
            finally:
                kek.wipe()
        finally:
            old_kek.wipe()
        return row

    async def settle(self, row: ConversionRow, link: AgentLink) -> ConversionRow:
        """Give the host the new file, and make it the VM's; or drop it if the host refuses it for good.

        Raises HostUnreachable, and the host's refusal after it was recorded.
        """
        try:
            await link.put_file(row.vm, row.fence, row.after_file)
        except Unreachable:
            raise
        except SealiftError as error:
            refusal = error.with_traceback(None)
            if not await self._has_new_file(row, link):
                await self._tools.records.end(row.id, ConversionState.FAILED, refusal, {})
                await self._tools.inventory.keys.keyring.abandon(row.provider, row.key_id)
                raise refusal from None
        return await self._tools.records.promote(row.id, {})

    async def _has_new_file(self, row: ConversionRow, link: AgentLink) -> bool:
        try:
            return (await link.vm(row.vm)).file.encode("latin-1") == row.after_file
        except NotFound:
            return False

    async def settle_by_itself(self, row: ConversionRow) -> None:
        """Go on from the record of a rekey whose host did not answer, or that an earlier life of ours left open."""
        host = next(host for host in await self._tools.records.hosts() if host.id == row.host)
        pause = self._tools.pace.poll_s
        # Its record says whether it is over: a file that was dropped must not be sent again, as its key is destroyed.
        while (row := await self._tools.records.get(row.id)).finished_at is None:
            try:
                await self.settle(row, self._tools.inventory.link(host))
            except SealiftError as error:
                log.info("a rekey is not settled", vm=row.vm_name, conversion=str(row.id), error=str(error))
                await asyncio.sleep(pause)
                pause = min(pause * 2, self._tools.pace.tidy_s)

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
