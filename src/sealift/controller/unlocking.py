"""What an encrypted VM needs of the controller before it runs: its file looked at, its keys in its host's memory."""

from __future__ import annotations

from enum import Enum

import structlog

from sealift.controller.events import EventLog, Happening
from sealift.controller.link import AgentLink
from sealift.controller.models import HostRow, VmRow
from sealift.controller.new_vm import CONFIG
from sealift.controller.vm_keys import VmKeys, describe, file_hash, file_on_host, holds_all, locked, own_file
from sealift.domain.deks import wipe
from sealift.domain.policy import MigrateEncryption
from sealift.errors import BundleInvalid, Conflict, NotFound, SealiftError, VmLocked
from sealift.keys import bundle
from sealift.keys.bundle import Judgement, Verdict

log = structlog.get_logger("sealift.unlocking")


class Restored(Enum):
    """What restoring a configuration file came to."""

    UNCHANGED = "unchanged"  # the file on the host was the last one already
    RESTORED = "restored"  # the controller's copy was put back
    ADOPTED = "adopted"  # a newer one from the host was taken over


async def ready_to_start(keys: VmKeys, events: EventLog, link: AgentLink, row: VmRow) -> str:
    """See that a VM's file is the last one written and that its host holds its keys; answers the file's SHA-256 in hex.

    The provider is asked only if the host lacks the keys or the file differs. Raises VmTampered, VmLocked, NotFound.
    """
    status = await link.vm(row.uuid)
    file = file_on_host(status)
    found = await keys.judge(row, file)
    if found.verdict is not Verdict.OK:
        await tell_file(keys, events, row, link.peer.name, file, found)
        error = describe(row.name, link.peer.name, file, found)
        raise locked(row.name, error) if isinstance(error, VmLocked) else error
    if not holds_all(row, status):
        try:
            deks, _ = await keys.deks(row)
        except VmLocked as error:
            raise locked(row.name, error) from error
        try:
            await link.put_keys(row.uuid, row.fence, deks)
        finally:
            wipe(deks)
    return file_hash(own_file(row))


async def tell_file(keys: VmKeys, events: EventLog, row: VmRow, host: str, file: bytes, judgement: Judgement) -> None:
    """An event, once for each way in which the file of a VM differs."""
    error = describe(row.name, host, file, judgement)
    if keys.told.get(row.uuid) == str(error):
        return
    keys.told[row.uuid] = str(error)
    kind = "vm.config_unclear" if isinstance(error, VmLocked) else "vm.tampered"
    async with events.transaction() as session:
        events.add(session, Happening(kind, error.what, host=host, vm=row.name, slug=error.slug))


async def restore_file(
    keys: VmKeys, events: EventLog, link: AgentLink, row: VmRow, host: HostRow, *, asked_by: str
) -> Restored:
    """Put the last authentic configuration file back on the VM's host; or adopt a newer authentic one from there.

    The very bytes are put back, so this needs no key, and may be done again if the answer is lost. A newer one is never
    overwritten, as it alone may hold the wrapped keys of the images. Raises Conflict for a VM in clear, and VmLocked
    for a file that claims to be newer while the key that would prove it cannot be had.
    """
    now = file_on_host(await link.vm(row.uuid))
    last = own_file(row) if row.encrypted else b""
    if now == last and row.encrypted:
        return Restored.UNCHANGED
    if await _adopt(keys, events, row, now, host, asked_by=asked_by):
        keys.told.pop(row.uuid, None)
        return Restored.ADOPTED
    if not row.encrypted:
        raise Conflict(f"VM {row.name} is not encrypted; it has no such file", todo="there is nothing to restore")
    await link.put_file(row.uuid, row.fence, last)
    keys.told.pop(row.uuid, None)
    text = (
        f"VM {row.name}: its last authentic configuration file (generation {row.generation}) was put back on host "
        f"{host.name} by {asked_by}"
    )
    async with events.transaction() as session:
        events.add(session, Happening("vm.config_restored", text, host=host.name, vm=row.name))
    return Restored.RESTORED


async def _adopt(keys: VmKeys, events: EventLog, row: VmRow, file: bytes, host: HostRow, *, asked_by: str) -> bool:
    """Whether the file is authentic and newer than ours, and is now the VM's."""
    try:
        found, config = bundle.read(file)
    except BundleInvalid:
        return False
    if found.vm != row.uuid or config.name != row.name or found.generation <= row.generation:
        return False
    try:
        kek, _ = await keys.keyring.kek(found.provider, found.key_id, vm=row.name)
    except VmLocked as error:
        why = error.__cause__.what if isinstance(error.__cause__, SealiftError) else error.what
        raise VmLocked(
            f"the configuration file of VM {row.name} on host {host.name} claims to be newer (generation "
            f"{found.generation}, ours is {row.generation}) and under key {found.key_id} of key provider "
            f"{found.provider}, which cannot be had: {why}",
            todo="bring that key back; if the file is a forgery, move it away on the host, then restore again",
        ) from None
    try:
        if not bundle.authentic(file, kek):
            return False
    finally:
        kek.wipe()
    await _take_over(events, row, file, host, asked_by)
    return True


async def _take_over(events: EventLog, row: VmRow, file: bytes, host: HostRow, asked_by: str) -> None:
    found, config = bundle.read(file)
    async with events.transaction() as session:
        vm = await session.get(VmRow, row.uuid)
        if vm is None:
            raise NotFound(f"there is no VM {row.name}", todo="see `sealift vm list`")
        if not vm.encrypted:
            vm.encrypted, vm.setting_before = True, vm.setting_before or vm.migrate_encryption
            vm.migrate_encryption = MigrateEncryption.REQUIRED.value
        vm.config, vm.config_file = CONFIG.dump_python(config, mode="json"), file
        vm.provider, vm.key_id, vm.generation = found.provider, found.key_id, found.generation
        text = (
            f"VM {row.name}: host {host.name} has an authentic configuration file newer than the controller's "
            f"(generation {found.generation} instead of {row.generation}); {asked_by} had it taken over"
        )
        events.add(session, Happening("vm.config_adopted", text, host=host.name, vm=row.name))
