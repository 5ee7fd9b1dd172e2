"""Data-encryption keys of this host's VMs, in memory only (promise P6).

A controller hands them out once their provider answers; an agent that was restarted has none until then. The keys of
a VM that moved away stay, so that it can come back while its provider is away, until they are told to go.

The vault keeps copies of its own: whoever hands keys in, or takes them out, wipes what is theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from uuid import UUID

from sealift.domain.deks import DEK_BYTES, Deks, wipe
from sealift.errors import KeysNotHeld
from sealift.secret import Secret


class Vault:
    """Every key that this host holds, by VM."""

    def __init__(self, host: str) -> None:
        """``host``: its name, for messages."""
        self._host = host
        self._held: dict[UUID, dict[UUID, Secret]] = {}

    def hold(self, vm: UUID, deks: Deks) -> None:
        """From now on these are the keys of the VM, and no others; those that it had before are wiped."""
        copies = _copies(deks, deks)
        self.forget(vm)
        if copies:
            self._held[vm] = copies

    def bring(self, vm: UUID, deks: Deks) -> bool:
        """Hold keys that came with a VM that may not come after all; whether they must go again then."""
        if not deks or set(deks) <= set(self.held(vm)):
            return False
        self.hold(vm, deks)
        return True

    def held(self, vm: UUID) -> tuple[UUID, ...]:
        """The ids of the keys that are held for the VM."""
        return tuple(self._held.get(vm, ()))

    def take(self, vm: UUID, needed: Sequence[UUID]) -> dict[UUID, Secret]:
        """Copies of the keys the VM needs, to be wiped after use; raises KeysNotHeld when one is not here."""
        mine = self._held.get(vm, {})
        missing = sum(dek not in mine for dek in needed)
        if missing:
            raise KeysNotHeld(
                f"host {self._host} does not hold {missing} of the {len(needed)} keys of VM {vm}'s disks",
                todo="the controller hands them out by itself once their key provider answers; `sealift vm show` "
                "names it",
            )
        return _copies(mine, needed)

    def forget(self, vm: UUID) -> None:
        """Wipe the keys of a VM; a QEMU that runs has its own."""
        wipe(self._held.pop(vm, {}))

    def close(self) -> None:
        """Wipe them all."""
        for vm in list(self._held):
            self.forget(vm)


def _copies(deks: Deks, wanted: Iterable[UUID]) -> dict[UUID, Secret]:
    return {dek: Secret(deks[dek].reveal(), length=DEK_BYTES) for dek in wanted}
