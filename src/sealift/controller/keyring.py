"""KEKs, fetched from their providers when they are needed and kept by nobody: whoever asked for one wipes it."""

from __future__ import annotations

import asyncio
import secrets
from collections import defaultdict
from collections.abc import Sequence
from uuid import UUID

from sealift.controller.providers import Providers
from sealift.errors import KeyMissing, KeyProviderError, NotFound, SealiftError, VmLocked
from sealift.keys.provider import KeyProvider, KeyState, new_key
from sealift.secret import Secret

AT_ONCE = 8
"""Keys that are fetched or made at the same time at one provider: a host that comes back may ask for those of many VMs.

Each provider has its own, so that one that does not answer keeps nobody from the keys of another.
"""


class Keyring:
    """The way to the keys of all providers of one controller."""

    def __init__(self, providers: Providers) -> None:
        self._providers = providers
        self._slots: defaultdict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(AT_ONCE))

    async def kek(self, provider: str, key_id: str, *, vm: str) -> tuple[Secret, KeyState]:
        """The KEK of the VM named ``vm`` and its state, fetched now; the caller wipes it.

        Raises VmLocked, which names provider and key id and says why.
        """
        try:
            async with self._slots[provider], self._providers.asking(provider) as found:
                state = await found.state(key_id)
                return await found.get(key_id), state
        except SealiftError as error:
            raise _locked(error, provider, key_id, vm) from error

    async def new_kek(self, provider: str, vm: UUID, vm_name: str) -> tuple[str, Secret]:
        """A new KEK for the VM with uuid ``vm``: its key id and the key, which the caller wipes.

        The caller stores a conversion's record with that key id, or abandons it; meanwhile the provider is in use.

        Raises NotFound, Conflict and ProviderNotExported where no key may be made, and KeyProviderError. Whatever was
        made until then is destroyed again; if something may have been left, the error and an event say so.
        """
        label = f"sealift-{vm}-{secrets.token_hex(4)}"
        fresh = self._providers.fresh
        fresh.begin(label, provider, vm_name)
        try:
            await self._providers.require_usable(provider)
            key_id, kek = await self._make(provider, label, vm_name)
        except BaseException:
            fresh.drop(label)
            raise
        fresh.made(label, key_id)
        return key_id, kek

    async def _make(self, provider: str, label: str, vm_name: str) -> tuple[str, Secret]:
        async with self._slots[provider], self._providers.asking(provider) as found:
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
        """Destroy a KEK that was made and came to no use. Raises nothing: an event names the key if that fails.

        One that a VM or a conversion under way names is left as it is. One that is missing was made all the same: a
        server that lags behind the others may say so.
        """
        try:
            if key_id in await self._providers.used_keys(provider):
                why = "it is in use after all, and was not destroyed"
            else:
                async with self._slots[provider], self._providers.asking(provider) as found:
                    await found.destroy(key_id)
                why = ""
        except SealiftError as error:
            why = error.what
            if isinstance(error, KeyMissing):
                why += "; it was made, so see whether all of its servers say so"
        self._providers.fresh.abandon(provider, key_id)
        if why:
            await self._providers.left_over(f"key {key_id} was left unused at key provider {provider}: {why}")

    async def _clear(self, provider: KeyProvider, label: str, vm_name: str) -> str:
        """Destroy the key of ``label``; what is, or may be, left of it in words, empty when nothing is.

        A label is one key's. More than one are not destroyed, nor one that is in use: whoever looked for the label may
        have answered with other keys.
        """
        try:
            found = await provider.locate(label)
            why = _not_ours(found, await self._providers.used_keys(provider.name))
            if not why:
                for key_id in found:
                    await provider.destroy(key_id)
                return ""
        except KeyProviderError as error:
            why = error.what
        left = f"a key for VM {vm_name}, label {label}, may have been left unused at key provider {provider.name}"
        await self._providers.left_over(f"{left}: {why}", vm=vm_name)
        return left


def _not_ours(found: Sequence[str], used: frozenset[str]) -> str:
    """Why what was found for the label of a key that was just made must not be destroyed; empty when it may be."""
    in_use = used.intersection(found)
    if in_use:
        return f"key {min(in_use)}, which is in use, was found for that label, and nothing was destroyed"
    if len(found) > 1:
        return f"{len(found)} keys were found for that label, and none was destroyed"
    return ""


def _locked(error: SealiftError, provider: str, key_id: str, vm: str) -> VmLocked:
    """What a person is told of a VM whose key cannot be had: ``error`` is why."""
    cause, todo = error.what, error.todo or f"see `sealift key-provider test {provider}`"
    if isinstance(error, NotFound):
        cause = "there is no key provider of that name"
        todo = f"add or import key provider {provider} again, under that name"
    todo += "; the VM unlocks by itself when its key can be had"
    return VmLocked(f"VM {vm} is locked: key {key_id} of key provider {provider} cannot be had: {cause}", todo=todo)
