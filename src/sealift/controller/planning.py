"""The plan of a move: ask both hosts, prove the datastores, decide. Nothing is moved and nothing is left behind."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field, replace
from uuid import UUID

import structlog

from sealift.controller.inventory import Inventory
from sealift.controller.link import AgentLink
from sealift.controller.models import HostRow, VmRow
from sealift.controller.vm_keys import deks_needed
from sealift.domain.checks import Facts, Finding, KeyFacts, check
from sealift.domain.deks import wipe
from sealift.domain.move import MoveOptions
from sealift.domain.policy import MigrateEncryption, Plan, Refused, decide
from sealift.domain.vm import HardwareRecord, VmState, VmStatus
from sealift.errors import NotFound, SealiftError
from sealift.keys.provider import KeyState
from sealift.secret import Secret

log = structlog.get_logger("sealift.planning")


@dataclass(frozen=True)
class Planned:
    """What was decided and everything that was found. ``hardware`` is there unless the plan is Refused."""

    plan: Plan
    findings: list[Finding]
    source_address: str  # the source's migration address, without port
    target_address: str  # host:port
    hardware: HardwareRecord | None
    file: str = ""  # of an encrypted VM, as its order carries it
    deks: dict[UUID, Secret] = field(default_factory=dict)  # for the target; whoever has the plan wipes them


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
    keys, deks = await _unwrap(inventory, vm, source, target, status)
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
        keys=keys,
    )
    plan = decide(
        MigrateEncryption(vm.migrate_encryption),
        # The host's word counts too: a controller's database may be an older one, put back from a backup.
        encrypted=vm.encrypted or bool(status and status.config.deks),
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
    if isinstance(plan, Refused):
        wipe(deks)
        deks = {}
    return Planned(
        plan=plan,
        findings=findings,
        source_address=(source_address or source.migration_address).rpartition(":")[0].strip("[]"),
        target_address=facts.target_address,
        hardware=status.hardware if status else None,
        file=(vm.config_file or b"").decode("latin-1"),
        deks=deks,
    )


async def _unwrap(
    inventory: Inventory, vm: VmRow, source: HostRow, target: HostRow, status: VmStatus | None
) -> tuple[KeyFacts | None, dict[UUID, Secret]]:
    """Unwrap an encrypted VM's keys for the target, now; without an active key none, and whether it holds them."""
    if not vm.encrypted:
        if status is None or not status.config.deks:
            return None, {}
        what = f"host {source.name} has VM {vm.name} encrypted, and the controller knows no keys of it"
        todo = f"`sealift vm restore-config {vm.name}` takes its configuration file over"
        return KeyFacts(file=what, file_todo=todo), {}
    facts = KeyFacts()
    if status is not None:
        try:
            await inventory.keys.require_own_file(vm, source.name, status)
        except SealiftError as error:
            facts = replace(facts, file=error.what, file_todo=error.todo)
    deks: dict[UUID, Secret] = {}
    try:
        deks, state = await inventory.keys.deks(vm)
        if state is KeyState.ACTIVE:
            return facts, deks
        trouble = f"key {vm.key_id} of key provider {vm.provider} is {state.value}"
        facts = replace(facts, trouble=trouble, todo=f"`sealift vm rekey {vm.name}` gives it a new key")
    except SealiftError as error:
        facts = replace(facts, trouble=error.what, todo=error.todo, away=True)
    wipe(deks)
    held = False
    with suppress(SealiftError):  # one that does not answer is refused for that
        held = await inventory.link(target).holds(vm.uuid, deks_needed(vm))
    return replace(facts, held=held), {}


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
