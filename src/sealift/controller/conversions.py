"""Conversions' records: what a VM becomes is written here before its host is told, and is the VM's when it is done.

A shallow rekey has a record too, although no image is touched: between the host's new configuration file and the
database a controller can die, and the record says which of two files is whose.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal
from uuid import UUID, uuid4

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from sealift.controller.events import EventLog, Happening
from sealift.controller.fresh_keys import FreshKeys
from sealift.controller.models import ConversionRow, HostRow, KeyProviderRow, VmRow
from sealift.controller.new_vm import require_new
from sealift.domain.conversion import ConversionKind, ConversionState
from sealift.domain.policy import MigrateEncryption
from sealift.errors import Conflict, NotFound, SealiftError
from sealift.keys import bundle

PAGE = 500
PLANNED: Final = "planned"
REFUSED: Final = "refused"
"""States of a record that is not stored: of a rehearsal, or of a plan that was refused."""

_DONE_WORDS = {
    ConversionKind.ENCRYPT: ("vm.encrypted", "was encrypted"),
    ConversionKind.DECRYPT: ("vm.decrypted", "was decrypted"),
    ConversionKind.REKEY: ("vm.rekeyed", "was rekeyed"),
}


@dataclass(frozen=True)
class ConversionWish:
    """A conversion that somebody asks for; ``deep`` matters to a rekey only, the others always copy."""

    kind: ConversionKind
    deep: bool
    verify: Literal["sample", "full"]
    requested_by: str


def new_row(wish: ConversionWish, vm: VmRow, host: HostRow) -> ConversionRow:
    """The record of a wish, not stored yet."""
    return ConversionRow(
        id=uuid4(),
        vm=vm.uuid,
        vm_name=vm.name,
        host=host.id,
        host_name=host.name,
        kind=wish.kind.value,
        deep=wish.deep,
        state=ConversionState.COPYING.value,
        verify=wish.verify,
        done_bytes=0,
        total_bytes=0,
        provider="",
        key_id="",
        old_provider=vm.provider or "",
        old_key_id=vm.key_id or "",
        after_config=vm.config,
        after_file=b"",
        fence=vm.fence,
        with_vm=False,
        findings=[],
        cancel_requested=False,
        error_slug="",
        error="",
        todo="",
        requested_by=wish.requested_by,
        created_at=time.time(),
        key_unused=False,
        tidied=True,
    )


class Conversions:
    """The records of one controller's conversions."""

    def __init__(self, events: EventLog, fresh: FreshKeys) -> None:
        self._events, self._fresh = events, fresh

    async def begin(self, row: ConversionRow, *, with_vm: VmRow | None) -> ConversionRow:
        """Store a record, its VM too if that is made for it, and raise the VM's fence for the orders to come.

        Raises NotFound when the VM is gone, AlreadyExists when one to be made is there, Conflict when the provider of
        the new key was removed since that was made: nothing is stored then.
        """
        async with self._events.transaction() as session:
            if row.provider and await session.get(KeyProviderRow, row.provider) is None:
                raise Conflict(
                    f"key provider {row.provider} was removed while VM {row.vm_name} was to get a key of it",
                    todo="see `sealift key-provider list`",
                )
            if with_vm is not None:
                await require_new(session, with_vm.name, with_vm.uuid)
                session.add(with_vm)
                await session.flush()
            vm = await session.get(VmRow, row.vm)
            if vm is None:
                raise NotFound(f"there is no VM {row.vm_name}", todo="see `sealift vm list`")
            vm.fence += 1
            row.fence, row.with_vm = vm.fence, with_vm is not None
            session.add(row)
            text = f"{row.requested_by} asked to {what(row)} VM {row.vm_name} on host {row.host_name}"
            self._events.add(session, _about(row, "conversion.requested", text))
            label = await self._fresh.recorded(session, row.provider, row.key_id)
        self._fresh.forget(label)
        return row

    async def get(self, conversion: UUID) -> ConversionRow:
        """One record; raises NotFound."""
        async with self._events.reading() as session:
            return await _get(session, conversion)

    async def all(self) -> list[ConversionRow]:
        """The newest records, newest first."""
        async with self._events.reading() as session:
            found = await session.scalars(select(ConversionRow).order_by(ConversionRow.created_at.desc()).limit(PAGE))
            return list(found)

    async def open(self) -> list[ConversionRow]:
        """Records that somebody must still work on: unfinished, or with something left of them."""
        async with self._events.reading() as session:
            left = ConversionRow.tidied.is_(False) | ConversionRow.key_unused
            unfinished = select(ConversionRow).where(ConversionRow.finished_at.is_(None) | left)
            return list(await session.scalars(unfinished.order_by(ConversionRow.created_at)))

    async def hosts(self) -> list[HostRow]:
        """Every host of this controller."""
        async with self._events.reading() as session:
            return list(await session.scalars(select(HostRow)))

    async def note(
        self, conversion: UUID, fields: Mapping[str, object], happening: tuple[str, str] | None = None
    ) -> ConversionRow:
        """Set fields of a record, with an event that tells of it."""
        async with self._events.transaction() as session:
            row = await _get(session, conversion)
            _set(row, fields)
            if happening is not None:
                self._events.add(session, _about(row, *happening))
        return row

    async def promote(self, conversion: UUID, fields: Mapping[str, object]) -> ConversionRow:
        """The host has done it: what was written down before becomes the VM's, all in one transaction.

        A record that is final already stays as it is.
        """
        async with self._events.transaction() as session:
            row = await _get(session, conversion)
            if row.finished_at is not None:
                return row
            vm = await session.get_one(VmRow, row.vm)
            _set(row, fields)
            row.state, row.finished_at = ConversionState.DONE.value, time.time()
            become(vm, row)
            kind, words = _DONE_WORDS[ConversionKind(row.kind)]
            self._events.add(session, _about(row, kind, f"VM {row.vm_name} {words}: {_keys_told(row)}"))
        return row

    async def end(
        self,
        conversion: UUID,
        state: ConversionState,
        error: SealiftError,
        fields: Mapping[str, object],
        *,
        key_unused: bool,
        vm_at: UUID | None,
    ) -> ConversionRow:
        """It came to nothing: the record says why, and a VM that was made for it goes with it unless a host has it.

        ``vm_at``: that host, or the one that may have it.
        ``key_unused``: it is certain that nothing is under the new key, which whoever tidies up then destroys; else
        an event says that it was left. A record that is final already stays as it is.
        """
        async with self._events.transaction() as session:
            row = await _get(session, conversion)
            if row.finished_at is not None:
                return row
            _set(row, fields)
            row.state, row.finished_at = state.value, time.time()
            row.error_slug, row.error, row.todo = error.slug, error.what, error.todo
            row.key_unused = key_unused and bool(row.key_id)
            text = f"VM {row.vm_name} on host {row.host_name}: to {what(row)} it ended as {state.value}: {error.what}"
            vm = await session.get(VmRow, row.vm) if row.with_vm else None
            if vm is not None and vm_at is not None:
                vm.host, row.todo = vm_at, f"see `sealift vm show {row.vm_name}`"
                text += (
                    "; the VM is kept, as a host has it encrypted or started, or has had later orders for it, or could "
                    f"not be asked: {row.todo}"
                )
            elif vm is not None:
                await session.delete(vm)
                text += "; the VM, which was made for it, was removed"
            self._events.add(session, _about(row, f"conversion.{state.value}", text, slug=error.slug))
            if row.key_id and not key_unused:
                self._events.add(session, _about(row, "key.left_over", _left(row)))
        return row


def what(row: ConversionRow) -> str:
    """What is done to the VM, as a verb."""
    depth = ("deep-" if row.deep else "") if row.kind == ConversionKind.REKEY.value else ""
    return f"{depth}{row.kind}"


def being_converted(row: ConversionRow) -> Conflict:
    """The refusal of what cannot be done to a VM while this conversion is under way."""
    short = str(row.id)[:8]
    done = {"encrypt": "encrypted", "decrypt": "decrypted", "rekey": "rekeyed"}[row.kind]
    todo = f"`sealift conversion watch {short}` waits for it"
    if row.deep:
        todo += f", `sealift conversion cancel {short}` asks for it to be cancelled"
    return Conflict(f"VM {row.vm_name} is being {done} ({short})", todo=todo)


def become(vm: VmRow, row: ConversionRow) -> None:
    """Make a VM what its conversion says it is afterwards."""
    vm.config, vm.lock_reason = row.after_config, ""
    if not row.after_file:
        # The setting stays, and so does the memory of what it was: a person decides when it may move in plain again.
        vm.encrypted, vm.config_file, vm.provider, vm.key_id = False, None, None, None
        return
    vm.config_file, vm.provider, vm.key_id = row.after_file, row.provider, row.key_id
    vm.generation = bundle.read(row.after_file)[0].generation
    if not vm.encrypted:
        vm.encrypted = True
        vm.setting_before = vm.setting_before or vm.migrate_encryption
        vm.migrate_encryption = MigrateEncryption.REQUIRED.value


def _keys_told(row: ConversionRow) -> str:
    new, old = f"key {row.key_id} of key provider {row.provider}", f"key {row.old_key_id} of {row.old_provider}"
    match ConversionKind(row.kind):
        case ConversionKind.ENCRYPT:
            return f"{new}; it always moves sealed from now on"
        case ConversionKind.DECRYPT:
            return f"{old} is not needed for it any more and stays where it is"
        case ConversionKind.REKEY:
            kept = "; whoever copied the old configuration file and can get that key is not locked out"
            return f"{new}; {old} stays where it is{'' if row.deep else kept}"


def _left(row: ConversionRow) -> str:
    return (
        f"key {row.key_id} of key provider {row.provider}, made for VM {row.vm_name}, was left there: an image or a "
        f"configuration file may be under it; should host {row.host_name} have a newer configuration file of the VM, "
        f"`sealift vm restore-config {row.vm_name}` takes it over"
    )


async def _get(session: AsyncSession, conversion: UUID) -> ConversionRow:
    found = await session.get(ConversionRow, conversion)
    if found is None:
        raise NotFound(f"there is no conversion {conversion}", todo="`sealift vm show` names the one under way")
    return found


def _set(row: ConversionRow, fields: Mapping[str, object]) -> None:
    for name, value in fields.items():
        if name not in ConversionRow.__table__.columns:
            raise AttributeError(name)
        setattr(row, name, value)


def _about(row: ConversionRow, kind: str, text: str, slug: str | None = None) -> Happening:
    return Happening(kind, text, host=row.host_name, vm=row.vm_name, slug=slug)
