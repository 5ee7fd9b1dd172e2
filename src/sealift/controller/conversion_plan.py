"""The plan of a conversion: ask the host and the key providers, and say everything at once. Nothing is changed.

The keys of the disks as they are now are unwrapped for it, so a plan that is accepted can be carried out.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal
from uuid import UUID

from sealift.controller.inventory import Inventory
from sealift.controller.link import AgentLink
from sealift.controller.models import HostRow, VmRow
from sealift.controller.new_vm import CONFIG
from sealift.controller.providers import Providers
from sealift.controller.vm_keys import unknown_keys
from sealift.domain.checks import Finding
from sealift.domain.conversion import ConversionKind
from sealift.domain.encryption_checks import ConversionFacts, check_conversion
from sealift.domain.vm import VmState, VmStatus
from sealift.errors import NotFound, SealiftError
from sealift.secret import Secret

MACHINE_UUIDS = (Path("/sys/class/dmi/id/product_uuid"), Path("/run/sealift-controller/machine-uuid"))
"""Where this machine's SMBIOS UUID is: only root may read the first, so the systemd unit copies it to the second."""

CPUINFO = Path("/proc/cpuinfo")

UNREADABLE: Final = "unreadable"
"""Of a machine that is virtual, and whose UUID we may not read: it may be any of the VMs."""

MachineUuid = Callable[[], UUID | Literal["unreadable"] | None]


def machine_uuid() -> UUID | Literal["unreadable"] | None:
    """The SMBIOS UUID of this machine, which QEMU makes the VM's; None when there is none and it is no VM."""
    for path in MACHINE_UUIDS:
        with suppress(OSError, ValueError):
            return UUID(path.read_text().strip())
    with suppress(OSError):
        # The processor's word; a hypervisor can hide itself, and then nothing can be told.
        if re.search(r"^flags\s*:.*\bhypervisor\b", CPUINFO.read_text(), re.MULTILINE):
            return UNREADABLE
    return None


@dataclass
class ConversionPlan:
    """What was found. ``provider`` is where the new KEK comes from; empty when none is needed or none is there.

    ``deks`` are the keys of the disks as they are, which whoever has the plan wipes.
    """

    findings: list[Finding]
    provider: str = ""
    total_bytes: int = 0  # of virtual disk, to be copied
    deks: dict[UUID, Secret] = field(default_factory=dict)

    @property
    def refused(self) -> bool:
        """Whether an error was found."""
        return any(finding.severity == "error" for finding in self.findings)


@dataclass(frozen=True)
class Planner:
    """What it takes to plan a conversion. ``machine`` tells this machine's own SMBIOS UUID."""

    inventory: Inventory
    providers: Providers
    machine: MachineUuid

    async def plan(
        self, kind: ConversionKind, vm: VmRow, host: HostRow, provider: str | None, *, is_new: bool
    ) -> ConversionPlan:
        """Every check that can be made without changing anything. ``is_new``: the host does not have the VM yet.

        Raises HostUnreachable and what else a host answers: of one that does not answer nothing can be found.
        """
        link = self.inventory.link(host)
        config = CONFIG.validate_python(vm.config)
        capabilities, status, images = await asyncio.gather(
            link.capabilities(), _status(link, vm), link.look_at_disks(config.disks)
        )
        machine = self.machine()
        facts = ConversionFacts(
            vm_name=vm.name,
            host_name=host.name,
            kind=kind,
            config=config,
            encrypted=vm.encrypted,
            state=VmState.STOPPED if is_new else status.state if status else None,
            images=tuple(images),
            host=capabilities,
            runs_controller=machine == vm.uuid,
            is_new=is_new,
            guard_blind=machine == UNREADABLE,
        )
        plan = ConversionPlan([])
        plan.total_bytes = sum(
            image.virtual_bytes or disk.size_bytes for image, disk in zip(images, config.disks, strict=True)
        )
        if vm.encrypted:
            await self._open_old(plan, vm, host, status)
        elif unknown := unknown_keys(vm, host.name, status):
            plan.findings.append(as_finding(unknown))
            return plan  # whatever else was found is of a VM that is another by now
        if kind is not ConversionKind.DECRYPT:
            await self._find_new(plan, vm, provider)
        plan.findings = check_conversion(facts, plan.findings)
        return plan

    async def plan_shallow(self, vm: VmRow, host: HostRow, provider: str | None) -> ConversionPlan:
        """The same for a new KEK around the same disk keys: the VM may run, and its images are not touched."""
        plan = ConversionPlan([])
        if vm.encrypted:
            await self._open_old(plan, vm, host, await _status(self.inventory.link(host), vm))
        else:
            text = f"VM {vm.name} is not encrypted"
            plan.findings.append(Finding("error", text, f"`sealift vm encrypt {vm.name}` encrypts it"))
        await self._find_new(plan, vm, provider)
        return plan

    async def _open_old(self, plan: ConversionPlan, vm: VmRow, host: HostRow, status: VmStatus | None) -> None:
        keys = self.inventory.keys
        try:
            if status is not None:
                await keys.require_own_file(vm, host.name, status)
            plan.deks, _ = await keys.deks(vm)
        except SealiftError as error:
            plan.findings.append(as_finding(error))

    async def _find_new(self, plan: ConversionPlan, vm: VmRow, provider: str | None) -> None:
        """Where the new KEK is to come from, and whether it could be made there just now."""
        try:
            plan.provider = provider or vm.provider or await self.providers.default()
            await self.providers.require_usable(plan.provider)
        except SealiftError as error:
            plan.findings.append(as_finding(error))
            return
        health = await self.providers.probe(plan.provider)
        if not health.ok:
            text = f"key provider {plan.provider} cannot be reached: {health.message}"
            plan.findings.append(Finding("error", text, f"see `sealift key-provider test {plan.provider}`"))


def as_finding(error: SealiftError) -> Finding:
    """An error that stands against a plan."""
    return Finding("error", error.what, error.todo)


async def _status(link: AgentLink, vm: VmRow) -> VmStatus | None:
    with suppress(NotFound):
        return await link.vm(vm.uuid)
    return None
