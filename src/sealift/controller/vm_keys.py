"""The keys of encrypted VMs' disks, and their configuration files: unwrapped and judged when somebody needs them.

A KEK is fetched, used and wiped in one go. Whoever asks for DEKs wipes them.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from uuid import UUID

from sealift.controller.keyring import Keyring
from sealift.controller.models import VmRow
from sealift.controller.new_vm import CONFIG
from sealift.domain.deks import DEK_BYTES, Deks, wipe
from sealift.domain.vm import VmConfig, VmStatus
from sealift.errors import Conflict, KeyMissing, NotFound, SealiftError, UnwrapFailed, VmLocked, VmTampered
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


def what_it_is(file: bytes, judgement: Judgement) -> str:
    """What is wrong with the configuration file that a host has, after "the configuration file"."""
    match judgement.verdict:
        case Verdict.OLDER:
            return "is an older copy"
        case Verdict.NEWER:
            return "is newer than the controller's copy"
        case Verdict.LOCKED:
            return f"claims to be newer than the controller's copy, which cannot be proved: {judgement.unproved}"
    if not file:
        return "is missing or empty"
    if judgement.unproved:
        return f"was changed, or is an older copy, which cannot be told apart: {judgement.unproved}"
    return "was changed"


def what_to_do(name: str, judgement: Judgement) -> str:
    """What a person does about a configuration file that is not the last one written."""
    match judgement.verdict:
        case Verdict.NEWER:
            return f"`sealift vm restore-config {name}` takes it over; it may hold the only keys of the VM's disks"
        case Verdict.LOCKED:
            return (
                "bring that key back, `sealift key-provider list` shows all providers; or, if nobody can have written "
                f"a newer file, move it away on the host, then `sealift vm restore-config {name}`"
            )
    return f"find out who did it; `sealift vm restore-config {name}` puts the last authentic copy back"


def describe(name: str, host: str, file: bytes, judgement: Judgement) -> VmTampered | VmLocked:
    """What is wrong with the configuration file on a host, as an error."""
    what = f"the configuration file of VM {name} on host {host} {what_it_is(file, judgement)}"
    if file and judgement.lines:
        what += f": {'; '.join(judgement.lines)}"
    kind = VmLocked if judgement.verdict is Verdict.LOCKED else VmTampered
    return kind(what, todo=what_to_do(name, judgement))


def locked(name: str, error: SealiftError) -> VmLocked:
    """That a VM cannot be started, since ``error`` keeps its keys away."""
    why = error.what.replace(f"VM {name} needs", "it needs", 1)
    return VmLocked(f"VM {name} is locked: {why}", todo=f"{error.todo}; then it unlocks by itself")


@dataclass
class VmKeys:
    """The way to the keys of VMs.

    ``lost`` says of a VM that runs why its host could not be given its keys again, ``told`` what was last said of a
    configuration file that is not the last one written.
    """

    keyring: Keyring
    lost: dict[UUID, str] = field(default_factory=dict)
    told: dict[UUID, str] = field(default_factory=dict)
    _not_active: dict[UUID, tuple[str | None, str | None, KeyState]] = field(default_factory=dict)
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
                f"key provider {row.provider} has another key under the id {row.key_id} than the one that encrypts VM "
                f"{row.name}",
                todo=f"put the right key provider in place under the name {row.provider}",
            )
        if state is KeyState.ACTIVE:
            self._not_active.pop(row.uuid, None)
        else:
            self._not_active[row.uuid] = (row.provider, row.key_id, state)
        return kek, state

    def not_active(self, row: VmRow) -> str:
        """That the VM's KEK was not active when it was last fetched, and what to do; empty when it was."""
        provider, key_id, state = self._not_active.get(row.uuid, (None, None, KeyState.ACTIVE))
        if state is KeyState.ACTIVE or (provider, key_id) != (row.provider, row.key_id):
            return ""
        return (
            f"key {key_id} of key provider {provider} is {state.value}: no other host is given the keys of VM "
            f"{row.name} under it; `sealift vm rekey {row.name}` gives it a new key"
        )

    def notes(self, row: VmRow, providers: Collection[str]) -> str:
        """What people are to know of the keys of an encrypted VM that can be used; ``providers`` are all there are."""
        found = [self.lost.get(row.uuid, ""), self.not_active(row)]
        if row.provider not in providers and not found[0]:
            found.append(
                f"key provider {row.provider} is not there any more: VM {row.name} locks when the agent of its host is "
                "restarted; add or import it again under that name"
            )
        return "; ".join(filter(None, found))

    async def deks(self, row: VmRow) -> tuple[dict[UUID, Secret], KeyState]:
        """The keys of the VM's disks, which the caller wipes, and the state of their KEK. Raises VmLocked."""
        kek, state = await self.kek(row)
        try:
            return unwrap_all(own_file(row), kek), state
        finally:
            kek.wipe()

    def judged(self, row: VmRow, file: bytes) -> Judgement | None:
        """What is known of a configuration file that a host has without asking for a key; None when one would help."""
        last = own_file(row)
        if file == last:
            return bundle.judge(file, last, None)
        known = self._judged.get(_pair(file, last))
        if known is None:
            found = bundle.judge(file, last, None)
            known = None if found.unproved else self._keep(file, last, found)
        return known

    def unproved(self, row: VmRow, file: bytes, why: str) -> Judgement:
        """What is to be said of such a file while the key that it names is not there; ``why`` it is not."""
        found = bundle.judge(file, own_file(row), None)
        return replace(found, unproved=why) if found.unproved else found

    async def judge(self, row: VmRow, file: bytes) -> Judgement:
        """What to think of a configuration file that a host has.

        A new key goes with every new file, so an older or newer copy is authentic under another key than the VM's now:
        the one that it names. That one is asked for only if the file differs in its generation too. While it cannot be
        had the generation tells what can be told, and the key is asked for again the next time.
        """
        known = self.judged(row, file)
        if known is not None:
            return known
        last, names = own_file(row), bundle.named(file)
        assert names is not None, "one that cannot be read is judged without a key"
        its_key = f"key {names.key_id} of key provider {names.provider}, which it names,"
        try:
            kek, _ = await self.keyring.kek(names.provider, names.key_id, vm=row.name)
        except VmLocked as error:
            match error.__cause__:
                case KeyMissing():
                    why = f"{its_key} is not there any more"
                case NotFound():
                    why = f"it names a key provider {names.provider}, which is not there"
                case _:
                    why = f"{its_key} cannot be had now"
            return self.unproved(row, file, why)
        try:
            return self._keep(file, last, bundle.judge(file, last, kek))
        finally:
            kek.wipe()

    def _keep(self, file: bytes, last: bytes, found: Judgement) -> Judgement:
        """A judgement that no key will change."""
        if len(self._judged) >= _JUDGEMENTS_KEPT:
            self._judged.clear()
        self._judged[_pair(file, last)] = found
        return found

    async def require_own_file(self, row: VmRow, host: str, status: VmStatus) -> None:
        """Raise VmTampered unless the file on the host is the last one we wrote; VmLocked if it may be a newer one."""
        file = file_on_host(status)
        found = await self.judge(row, file)
        if found.verdict is not Verdict.OK:
            raise describe(row.name, host, file, found)


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
