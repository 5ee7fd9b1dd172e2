"""What is said of a key provider: its state, what an administrator must know of it, and which VMs it has keys of."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import structlog
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from sealift.controller.models import ConversionRow, KeyProviderRow, VmRow
from sealift.domain.vm import check_name
from sealift.errors import Conflict, NotFound, SealiftError
from sealift.keys.kinds import Kind
from sealift.keys.native import NativeProvider
from sealift.keys.provider import MemberHealth, ProviderHealth

log = structlog.get_logger("sealift.providers")

ProviderState = Literal["ok", "degraded", "unreachable", "not_exported", "no_certificate"]


@dataclass(frozen=True)
class SeenProvider:
    """A key provider as it was just seen; fields as in ``api.encryption.KeyProvider``."""

    row: KeyProviderRow
    state: ProviderState
    message: str
    members: tuple[MemberHealth, ...]
    vms: tuple[str, ...]
    notes: tuple[str, ...]
    client_certificate: str = ""
    certificate_request: str = ""


@dataclass(frozen=True)
class Added:
    """A new provider, and the VMs that are locked for want of it."""

    provider: SeenProvider
    unlocks: tuple[str, ...]


@dataclass(frozen=True)
class Removed:
    """A provider that is gone, the VMs that lock once their hosts lost their keys, and what went with it."""

    name: str
    locks: tuple[str, ...]
    lost: str
    was_default: bool


async def provider_row(session: AsyncSession, name: str) -> KeyProviderRow:
    """A provider's row; raises NotFound."""
    found = await session.get(KeyProviderRow, check_name("key provider", name))
    if found is None:
        raise NotFound(f"there is no key provider {name}", todo="see `sealift key-provider list`")
    return found


async def users_of(session: AsyncSession, name: str) -> tuple[str, ...]:
    """The names of the VMs that have their key at a provider, or are being given or taken one there."""
    vms = await session.scalars(select(VmRow.name).where(VmRow.provider == name))
    converting = await session.scalars(
        select(ConversionRow.vm_name).where(
            ConversionRow.finished_at.is_(None),
            (ConversionRow.provider == name) | (ConversionRow.old_provider == name),
        )
    )
    return tuple(sorted({*vms, *converting}))


async def locked_of(session: AsyncSession, name: str) -> tuple[str, ...]:
    """The names of the locked VMs that have their key at a provider."""
    locked = select(VmRow.name).where(VmRow.provider == name, VmRow.lock_reason != "").order_by(VmRow.name)
    return tuple(await session.scalars(locked))


async def keys_in_use(session: AsyncSession, name: str) -> frozenset[str]:
    """The ids of a provider's keys that VMs have, or are being given or taken."""
    vms = await session.scalars(select(VmRow.key_id).where(VmRow.provider == name))
    converting = await session.scalars(
        select(ConversionRow).where(
            ConversionRow.finished_at.is_(None),
            (ConversionRow.provider == name) | (ConversionRow.old_provider == name),
        )
    )
    found = {key_id for key_id in vms if key_id}
    for row in converting:
        pairs = (row.provider, row.key_id), (row.old_provider, row.old_key_id)
        found.update(key_id for provider, key_id in pairs if provider == name and key_id)
    return frozenset(found)


def new_row(name: str, kind: Kind, *, members: Sequence[str], exported_at: float | None) -> KeyProviderRow:
    """The row of a new provider, not stored yet."""
    return KeyProviderRow(
        name=name,
        kind=kind,
        members=[*members],
        is_default=False,
        created_at=time.time(),
        exported_at=exported_at,
    )


def told(name: str, error: Exception) -> str:
    """What is said of a provider that could not be looked at. A defect of ours is named, and logged."""
    if isinstance(error, SealiftError):
        return str(error)
    log.error("a key provider met something unexpected", provider=name, exc_info=error)
    return f"something unexpected happened: {type(error).__name__}; see the controller's log"


def judge(row: KeyProviderRow, health: ProviderHealth) -> tuple[ProviderState, str]:
    """The state of a provider that was asked, and its reason; nothing to say when all is well."""
    if not health.ok:
        return "unreachable", health.message or "none of its servers answers"
    if row.kind == "native" and row.exported_at is None:
        return "not_exported", "no VM may use it before it was exported and the export was read back"
    away = [member.address for member in health.members if not member.ok]
    if away:
        return "degraded", f"{', '.join(away)}: no answer"
    return "ok", ""


def no_certificate(name: str) -> Conflict:
    """A kmip provider whose request for a certificate is not signed yet cannot be asked anything."""
    return Conflict(
        f"key provider {name} has no client certificate yet",
        todo=f"have its request signed, then run `sealift key-provider certificate {name} FILE`",
    )


def lost_with(row: KeyProviderRow) -> str:
    """What is gone for good when a provider was removed here, and what brings it back."""
    if row.kind == "kmip":
        return "Its keys stay at its servers; our key and certificate towards them were only here"
    if row.exported_at is None:
        return "It was never exported: the key that its keys are derived from was only here"
    return "The key that its keys are derived from is now only in its export; import that to have it back"


def refuse_removal(row: KeyProviderRow, users: Collection[str], making: Collection[str]) -> None:
    """Raise Conflict while VMs use a provider, or a key is being made there for one."""
    if users:
        lost = "the key that its keys are derived from would then be only in its export"
        if row.kind == "kmip":
            lost = "its keys would stay at its servers; our key and certificate towards them are only here"
        elif row.exported_at is None:
            lost = "it was never exported: the key that its keys are derived from is only here, and would be gone"
        raise Conflict(
            f"key provider {row.name} was not removed: it has the keys of VMs: {', '.join(sorted(users))}",
            todo=f"move them off it with `sealift vm rekey --from {row.name} --to NAME`; with `--force` it is removed "
            f"all the same, and they lock. {lost[0].upper()}{lost[1:]}",
        )
    if making:
        raise Conflict(
            f"key provider {row.name} was not removed: a key is just being made there for VM {min(making)}",
            todo="try again in a moment",
        )


def told_of_locks(users: Sequence[str]) -> str:
    """What becomes of VMs whose provider is removed: until its agent is restarted, a host has their keys in memory."""
    if not users:
        return ""
    return f"; these VMs lock when the agent of their host is restarted, those that run go on: {', '.join(users)}"


def notes_on(row: KeyProviderRow, directory: Path) -> tuple[str, ...]:
    """What an administrator must know of a provider, plainly."""
    if row.kind == "kmip":
        return ("the keys are at its servers and nowhere else: back those up",)
    native = NativeProvider(row.name, directory)
    return f"its key derivation key is {native.key_storage}", native.notes
