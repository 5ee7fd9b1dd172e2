"""KEKs, fetched from their providers when they are needed and kept by nobody: whoever asked for one wipes it."""

from __future__ import annotations

import asyncio
import secrets
from uuid import UUID

from sealift.controller.providers import Providers
from sealift.errors import KeyMissing, KeyProviderError, NotFound, SealiftError, VmLocked
from sealift.keys.provider import KeyProvider, KeyState, new_key
from sealift.secret import Secret

AT_ONCE = 8
"""Keys that are fetched or made at the same time: a host that comes back may ask for those of many VMs."""


class Keyring:
    """The way to the keys of all providers of one controller."""

    def __init__(self, providers: Providers) -> None:
        self._providers = providers
        self._slots = asyncio.Semaphore(AT_ONCE)

    async def kek(self, provider: str, key_id: str, *, vm: str) -> tuple[Secret, KeyState]:
        """The KEK of the VM named ``vm`` and its state, fetched now; the caller wipes it.

        Raises VmLocked, which names provider and key id and says why.
        """
        try:
            async with self._slots, self._providers.asking(provider) as found:
                state = await found.state(key_id)
                return await found.get(key_id), state
        except SealiftError as error:
            raise _locked(error, provider, key_id, vm) from error

    async def new_kek(self, provider: str, vm: UUID, vm_name: str) -> tuple[str, Secret]:
        """A new KEK for the VM with uuid ``vm``: its key id and the key, which the caller wipes.

        Raises NotFound, Conflict and ProviderNotExported where no key may be made, and KeyProviderError. Whatever was
        made until then is destroyed again; if something may have been left, the error and an event say so.
        """
        await self._providers.require_usable(provider)
        label = f"sealift-{vm}-{secrets.token_hex(4)}"
        async with self._slots, self._providers.asking(provider) as found:
            try:
                key_id = await new_key(found, label)
                return key_id, await found.get(key_id)
            except asyncio.CancelledError:
                await self._clear(found, label, vm_name)
                raise
            except KeyProviderError as failure:
                left = await self._clear(found, label, vm_name)
                if not left:
                    raise
                todo = f"destroy what has the label {label} there, if anything has; then try again"
                raise type(failure)(f"{failure.what}; {left}", todo=todo) from failure

    async def abandon(self, provider: str, key_id: str) -> None:
        """Destroy a KEK that was made and came to no use. Raises nothing: an event names the key if that fails."""
        try:
            async with self._slots, self._providers.asking(provider) as found:
                await found.destroy(key_id)
        except KeyMissing:
            pass
        except SealiftError as error:
            text = f"key {key_id} was left unused at key provider {provider}: {error.what}"
            await self._providers.left_over(text)

    async def _clear(self, provider: KeyProvider, label: str, vm_name: str) -> str:
        """Destroy every key of ``label``; what is, or may be, left of it in words, empty when nothing is."""
        try:
            for key_id in await provider.locate(label):
                await provider.destroy(key_id)
        except KeyProviderError as error:
            left = f"a key for VM {vm_name}, label {label}, may have been left unused at key provider {provider.name}"
            await self._providers.left_over(f"{left}: {error.what}", vm=vm_name)
            return left
        return ""


def _locked(error: SealiftError, provider: str, key_id: str, vm: str) -> VmLocked:
    """What a person is told of a VM whose key cannot be had: ``error`` is why."""
    cause, todo = error.what, error.todo or f"see `sealift key-provider test {provider}`"
    if isinstance(error, NotFound):
        cause = "there is no key provider of that name"
        todo = f"add or import key provider {provider} again, under that name"
    todo += "; the VM unlocks by itself when its key can be had"
    return VmLocked(f"VM {vm} is locked: key {key_id} of key provider {provider} cannot be had: {cause}", todo=todo)
