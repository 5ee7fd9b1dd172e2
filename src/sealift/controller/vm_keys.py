"""The keys of encrypted VMs' disks, and their configuration files: unwrapped and judged when somebody needs them.

A KEK is fetched, used and wiped in one go. Whoever asks for DEKs wipes them.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass, field
from uuid import UUID

from sealift.controller.keyring import Keyring
from sealift.controller.models import VmRow
from sealift.controller.new_vm import CONFIG
from sealift.domain.deks import DEK_BYTES, Deks, wipe
from sealift.domain.vm import VmConfig, VmStatus
from sealift.errors import BundleInvalid, Conflict, KeyMissing, UnwrapFailed, VmLocked, VmTampered
from sealift.keys import bundle, envelope
from sealift.keys.bundle import Bundle, Judgement, Verdict, WrappedDek
from sealift.keys.provider import KeyState
from sealift.secret import Secret

_IV_BYTES = 12
_JUDGEMENTS_KEPT = 1000


def draw_deks(count: int) -> dict[UUID, Secret]:
    """Fresh keys from the operating system's generator, each under a random id (a version 4 UUID)."""
    return {
        UUID(bytes=secrets.token_bytes(16), version=4): Secret(secrets.token_bytes(DEK_BYTES), length=DEK_BYTES)
        for _ in range(count)
    }


def write_file(config: VmConfig, deks: Deks, *, kek: Secret, provider: str, key_id: str, generation: int) -> bytes:
    """The configuration file of a VM whose disks' keys, ``deks``, are wrapped under ``kek``."""
    wrapped = tuple(
        WrappedDek(
            dek_id,
            envelope.wrap(
                deks[dek_id],
                kek=kek,
                vm=config.uuid,
                dek_id=dek_id,
                provider=provider,
                key_id=key_id,
                iv=secrets.token_bytes(_IV_BYTES),
            ),
        )
        for dek_id in config.deks
    )
    return bundle.write(Bundle(config.uuid, generation, provider, key_id, wrapped), config, kek)


def file_on_host(status: VmStatus) -> bytes:
    """The configuration file as the host has it now; empty when it has none."""
    return status.file.encode("latin-1")


def file_hash(file: bytes) -> str:
    """By which an order names a configuration file."""
    return hashlib.sha256(file).hexdigest()


def own_file(row: VmRow) -> bytes:
    """The last authentic configuration file of an encrypted VM."""
    if not row.config_file or row.provider is None or row.key_id is None:
        raise VmTampered(
            f"the controller has no configuration file of VM {row.name}, although it is encrypted",
            todo="put the controller's database back from a backup",
        )
    return row.config_file


def unknown_keys(row: VmRow, host: str, status: VmStatus | None) -> Conflict | None:
    """What stands against all that would lose the keys of a VM which only its host knows to be encrypted.

    Our records are then from before that, as after the database was put back from a backup.
    """
    if row.encrypted or status is None or not status.config.deks:
        return None
    return Conflict(
        f"host {host} has VM {row.name} encrypted, and the controller knows no keys of it",
        todo=f"`sealift vm restore-config {row.name}` takes its configuration file over from there",
    )


def deks_needed(row: VmRow) -> tuple[UUID, ...]:
    """The ids of the keys that the VM's disks need."""
    return CONFIG.validate_python(row.config).deks


def holds_all(row: VmRow, status: VmStatus) -> bool:
    """Whether the VM's host holds every key of its disks."""
    return set(deks_needed(row)) <= set(status.held)


def describe(name: str, host: str, judgement: Judgement) -> VmTampered:
    """What is wrong with the configuration file on a host, as an error."""
    match judgement.verdict:
        case Verdict.OLDER:
            what = f"the configuration file of VM {name} on host {host} is an older copy"
        case Verdict.NEWER:
            what = f"the configuration file of VM {name} on host {host} is newer than the controller's copy"
        case _:
            lines = "; ".join(judgement.lines) or "it is missing or empty"
            what = f"the configuration file of VM {name} on host {host} was changed: {lines}"
    todo = f"find out who did it; `sealift vm restore-config {name}` puts the last authentic copy back"
    if judgement.verdict is Verdict.NEWER:
        todo = f"`sealift vm restore-config {name}` takes it over; it may hold the only keys of the VM's disks"
    return VmTampered(what, todo=todo)


@dataclass
class VmKeys:
    """The way to the keys of VMs.

    ``notes`` says of a VM that runs why its host could not be given its keys again, ``told`` what was last said of a
    configuration file that is not the last one written.
    """

    keyring: Keyring
    notes: dict[UUID, str] = field(default_factory=dict)
    told: dict[UUID, str] = field(default_factory=dict)
    _judged: dict[tuple[bytes, bytes], Judgement] = field(default_factory=dict)

    async def kek(self, row: VmRow) -> tuple[Secret, KeyState]:
        """The VM's KEK, which the caller wipes, and its state; it opens the VM's file. Raises VmLocked."""
        file = own_file(row)
        assert row.provider is not None
        assert row.key_id is not None
        kek, state = await self.keyring.kek(row.provider, row.key_id, vm=row.name)
        if not bundle.authentic(file, kek):
            kek.wipe()
            raise VmLocked(
                f"VM {row.name} is locked: key provider {row.provider} has another key under the id {row.key_id} than "
                "the one that encrypts it",
                todo=f"put the right key provider in place under the name {row.provider}",
            )
        return kek, state

    async def deks(self, row: VmRow) -> tuple[dict[UUID, Secret], KeyState]:
        """The keys of the VM's disks, which the caller wipes, and the state of their KEK. Raises VmLocked."""
        kek, state = await self.kek(row)
        try:
            return unwrap_all(own_file(row), kek), state
        finally:
            kek.wipe()

    def judged(self, row: VmRow, file: bytes) -> Judgement | None:
        """What is known of a configuration file that a host has without asking for a key; None when nothing is."""
        last = own_file(row)
        if file == last or not file:
            return bundle.judge(file, last, None)
        return self._judged.get(_pair(file, last))

    async def judge(self, row: VmRow, file: bytes) -> Judgement:
        """What to think of a configuration file that a host has; the KEK is asked for only if its bytes differ.

        Where the verdict is LOCKED, its one line says which key cannot be had; the next time that one is asked for
        again.
        """
        known = self.judged(row, file)
        if known is not None:
            return known
        last = own_file(row)
        try:
            kek, _ = await self.kek(row)
        except VmLocked:
            return cannot_tell(row, "cannot be had")
        try:
            found = bundle.judge(file, last, kek)
        finally:
            kek.wipe()
        if found.verdict is Verdict.TAMPERED:
            found = await self._under_its_own_kek(row, file, last) or found
        if found.verdict is not Verdict.LOCKED:
            if len(self._judged) >= _JUDGEMENTS_KEPT:
                self._judged.clear()
            self._judged[_pair(file, last)] = found
        return found

    async def _under_its_own_kek(self, row: VmRow, file: bytes, last: bytes) -> Judgement | None:
        """What a file is by the KEK that it names itself, which is not the VM's now; None where it names no such key.

        A new key goes with most new files, so that older and newer copies are authentic under other keys than ours.
        While that key cannot be had nobody can tell; one that its provider says it does not have never will.
        """
        try:
            named, _ = bundle.read(file)
        except BundleInvalid:
            return None
        if named.vm != row.uuid or (named.provider, named.key_id) == (row.provider, row.key_id):
            return None
        try:
            kek, _ = await self.keyring.kek(named.provider, named.key_id, vm=row.name)
        except VmLocked as error:
            if isinstance(error.__cause__, KeyMissing):
                return None
            why = f"key {named.key_id} of key provider {named.provider}, which it names, cannot be had"
            return Judgement(Verdict.LOCKED, (why,))
        try:
            return bundle.judge(file, last, kek)
        finally:
            kek.wipe()

    async def require_own_file(self, row: VmRow, host: str, status: VmStatus) -> None:
        """Raise VmTampered unless the file on the host is the last one we wrote; VmLocked if that cannot be told."""
        found = await self.judge(row, file_on_host(status))
        if found.verdict is Verdict.OK:
            return
        if found.verdict is Verdict.LOCKED:
            raise VmLocked(
                f"VM {row.name} is locked: its configuration file on host {host} is not the last one that was written, "
                f"and {'; '.join(found.lines)} now",
                todo="bring that key provider back; `sealift key-provider list` shows how each of them is",
            )
        raise describe(row.name, host, found)


def cannot_tell(row: VmRow, why: str) -> Judgement:
    """That a file is not the last one written; the VM's KEK, of which ``why`` is said, would tell more."""
    return Judgement(Verdict.LOCKED, (f"key {row.key_id} of key provider {row.provider}, which would tell why, {why}",))


def _pair(file: bytes, last: bytes) -> tuple[bytes, bytes]:
    return hashlib.sha256(file).digest(), hashlib.sha256(last).digest()


def unwrap_all(file: bytes, kek: Secret) -> dict[UUID, Secret]:
    """Every key wrapped in an authentic configuration file; raises UnwrapFailed."""
    found, _ = bundle.read(file)
    deks: dict[UUID, Secret] = {}
    try:
        for each in found.deks:
            deks[each.dek] = envelope.unwrap(
                each.wrapped,
                kek=kek,
                vm=found.vm,
                dek_id=each.dek,
                provider=found.provider,
                key_id=found.key_id,
            )
    except UnwrapFailed:
        wipe(deks)
        raise
    return deks
