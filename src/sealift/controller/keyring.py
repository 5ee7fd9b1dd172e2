"""KEKs, fetched from their providers when they are needed and kept by nobody: whoever asked for one wipes it."""

from __future__ import annotations

from uuid import UUID

from sealift.controller.providers import Providers
from sealift.keys.provider import KeyState
from sealift.secret import Secret


class Keyring:
    """The way to the keys of all providers of one controller."""

    def __init__(self, providers: Providers) -> None:
        self._providers = providers

    async def kek(self, provider: str, key_id: str, *, vm: str) -> tuple[Secret, KeyState]:
        """The KEK of the VM named ``vm`` and its state, fetched now. Raises VmLocked."""
        raise NotImplementedError

    async def new_kek(self, provider: str, vm: UUID, vm_name: str) -> tuple[str, Secret]:
        """A new KEK for a VM: its key id and the key. Raises NotFound, ProviderNotExported, KeyProviderError."""
        raise NotImplementedError

    async def abandon(self, provider: str, key_id: str) -> None:
        """Destroy a KEK that was made and came to no use. Raises nothing: an event names the key if that fails."""
        raise NotImplementedError
