"""The plan of a move: ask both hosts, prove the datastores, decide. Nothing is moved and nothing is left behind."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass

import structlog

from sealift.controller.inventory import Inventory
from sealift.controller.link import AgentLink
from sealift.controller.models import HostRow, VmRow
from sealift.domain.checks import Facts, Finding, check
from sealift.domain.move import MoveOptions
from sealift.domain.policy import MigrateEncryption, Plan, Refused, decide
from sealift.domain.vm import HardwareRecord, VmState, VmStatus
from sealift.errors import NotFound, SealiftError

log = structlog.get_logger("sealift.planning")


@dataclass(frozen=True)
class Planned:
    """What was decided and everything that was found. ``hardware`` is there unless the plan is Refused."""

    plan: Plan
    findings: list[Finding]
    source_address: str  # the source's migration address, without port
    target_address: str  # host:port
    hardware: HardwareRecord | None


async def make_plan(
    inventory: Inventory,
    vm: VmRow,
    source: HostRow,
    target: HostRow,
    options: MoveOptions,
    channels: int,
    *,
    floor: MigrateEncryption,
) -> Planned:
    """Every check that can be made without moving a byte; its result never depends on an earlier answer of a host."""
    seen_source, seen_target = await asyncio.gather(inventory.look(source), inventory.look(target))
    status = await _status(inventory, vm, source) if seen_source.capabilities else None
    at_target = None
    if seen_target.capabilities and source.id != target.id:
        with suppress(SealiftError):
            at_target = await inventory.at_target(target, vm.uuid)
    shared: dict[str, bool] = {}
    if status and status.state is VmState.RUNNING and status.hardware and at_target is None and source.id != target.id:
        for disk in status.hardware.config.disks:
            shared[disk.path] = await _is_shared(inventory.link(source), inventory.link(target), disk.path)
    address = seen_target.capabilities.migration_address if seen_target.capabilities else ""
    source_address = seen_source.capabilities.migration_address if seen_source.capabilities else ""
    facts = Facts(
        vm_name=vm.name,
        source=seen_source.capabilities,
        target=seen_target.capabilities,
        status=status,
        at_target=at_target,
        target_address=address or target.migration_address,
        options=options,
        channels=channels,
        same_host=source.id == target.id,
        shared=shared,
    )
    plan = decide(
        MigrateEncryption(vm.migrate_encryption),
        encrypted=vm.encrypted,
        floor=floor,
        source=seen_source.view,
        target=seen_target.view,
    )
    findings = check(facts)
    if isinstance(plan, Refused):
        # First, as the policy's word; what the host itself said of why it did not answer comes with it.
        why = "; ".join(seen.error for seen in (seen_source, seen_target) if seen.error)
        findings.insert(0, Finding("error", f"{plan.reason}: {why}" if why else plan.reason, plan.todo))
    errors = [finding for finding in findings if finding.severity == "error"]
    if errors:
        plan = Refused("; ".join(found.text for found in errors), "; ".join(found.todo for found in errors))
    return Planned(
        plan=plan,
        findings=findings,
        source_address=(source_address or source.migration_address).rpartition(":")[0].strip("[]"),
        target_address=facts.target_address,
        hardware=status.hardware if status else None,
    )


async def _status(inventory: Inventory, vm: VmRow, source: HostRow) -> VmStatus | None:
    try:
        return await inventory.link(source).vm(vm.uuid)
    except NotFound:
        return None


async def _is_shared(source: AgentLink, target: AgentLink, disk: str) -> bool:
    """Whether the target reads what the source has just written beside the disk; equal paths prove nothing."""
    try:
        path, content = await source.write_marker(disk)
    except SealiftError as error:
        log.warning("no marker could be written", host=source.peer.name, disk=disk, error=str(error))
        return False
    try:
        return await target.read_marker(path) == content
    except SealiftError as error:
        log.info("the marker was not read back", host=target.peer.name, disk=disk, error=str(error))
        return False
    finally:
        with suppress(SealiftError):
            await source.remove_marker(path)
