"""KEKs, fetched from their providers when they are needed and kept by nobody: whoever asked for one wipes it."""

from __future__ import annotations

import asyncio
import secrets
from collections import defaultdict
from uuid import UUID

import structlog

from sealift.controller.fresh_keys import Interrupted, may_be_left
from sealift.controller.left_keys import destroy_by_label
from sealift.controller.providers import Providers
from sealift.errors import KeyMissing, KeyProviderError, NotFound, ProviderRefused, SealiftError, VmLocked
from sealift.keys.provider import KeyProvider, KeyState, new_key
from sealift.secret import Secret

log = structlog.get_logger("sealift.keyring")

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

        The caller stores a conversion's record with that key id, or gives the key up; meanwhile the provider is in use.

        Raises NotFound, Conflict and ProviderNotExported where no key may be made, and KeyProviderError. Whatever was
        made until then is destroyed again; if something may have been left, the error and an event say so.
        """
        label = f"sealift-{vm}-{secrets.token_hex(4)}"
        fresh = self._providers.fresh
        fresh.begin(label, provider, vm_name)
        try:
            await self._providers.require_usable(provider)
            await fresh.write(label)
            key_id, kek = await self._make(provider, label, vm_name)
        except BaseException:
            fresh.let_go(label)  # if it is not settled, it is looked into later
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
                if failure.nothing_asked:
                    await self._providers.fresh.settled(label)
                    raise
                left = await self._clear(found, label, vm_name)
                if not left:
                    raise
                todo = f"destroy what has the label {label} there, if anything has; then try again"
                raise type(failure)(f"{failure.what}; {left}", todo=todo) from failure

    async def give_up(self, provider: str, key_id: str, error: BaseException) -> None:
        """A key that was made is in no record because of ``error``.

        After an error of ours it is certain that none was stored, and the key is destroyed. After anything else, such
        as a cancellation, it is not: with the record the key may be the VM's only one. That is seen to later.
        """
        if isinstance(error, SealiftError):
            await self.abandon(provider, key_id)
        else:
            self._providers.fresh.let_go(self._providers.fresh.label_of(provider, key_id))

    async def abandon(self, provider: str, key_id: str) -> None:
        """Destroy a KEK that was made and came to no use. An event names the key if that fails.

        One that a VM or a conversion under way names is left as it is. One that is missing was made all the same: a
        server that lags behind the others may say so.
        """
        fresh = self._providers.fresh
        label = fresh.label_of(provider, key_id)
        try:
            if why := await self._destroy(provider, key_id):
                await fresh.left_over(f"key {key_id} was left unused at key provider {provider}: {why}", label=label)
            else:
                await fresh.settled(label)
        finally:
            fresh.let_go(label)  # cut off here, it is looked into later

    async def _destroy(self, provider: str, key_id: str) -> str:
        """Destroy a key unless it is in use; why that was not done, empty when it was."""
        try:
            if key_id in await self._providers.used_keys(provider):
                return "it is in use after all, and was not destroyed"
            async with self._slots[provider], self._providers.asking(provider) as found:
                await found.destroy(key_id)
        except KeyMissing as error:
            return f"{error.what}; it was made, so see whether all of its servers say so"
        except SealiftError as error:
            return error.what
        return ""

    async def settle(self) -> None:
        """Look into every key whose making was interrupted; a provider that cannot be asked is asked the next time."""
        interrupted = await self._providers.fresh.interrupted()
        await asyncio.gather(*(self._settle(each) for each in interrupted))

    async def _settle(self, each: Interrupted) -> None:
        """Destroy such a key if it is of this life of the controller, and else tell of it.

        For all that is known here, one of an earlier life may be a VM's: the database may be one of before, put back
        from a backup that was taken while the key was being made. No key is destroyed on the word of such a one.
        """
        try:
            async with self._slots[each.provider], self._providers.asking(each.provider) as found:
                if each.ours:
                    why = await destroy_by_label(found, each.label, self._providers.used_keys)
                else:
                    why = _found_again(await found.locate(each.label))
        except NotFound:
            why = "there is no key provider of that name any more"
        except ProviderRefused as error:  # which is an answer, and will be the same the next time
            why = error.what
        except SealiftError as error:
            log.info("it is not known yet whether a key was left", label=each.label, error=str(error))
            return
        if why:
            text = f"{may_be_left(each.label, each.provider, each.vm_name)}: {why}"
            await self._providers.fresh.left_over(text, vm=each.vm_name, label=each.label)
        else:
            await self._providers.fresh.settled(each.label)

    async def _clear(self, provider: KeyProvider, label: str, vm_name: str) -> str:
        """Destroy the key of ``label``; what is, or may be, left of it in words, empty when nothing is."""
        fresh = self._providers.fresh
        try:
            why = await destroy_by_label(provider, label, self._providers.used_keys)
        except KeyProviderError as error:
            why = error.what
        if not why:
            await fresh.settled(label)
            return ""
        left = may_be_left(label, provider.name, vm_name)
        await fresh.left_over(f"{left}: {why}", vm=vm_name, label=label)
        return left


def _found_again(key_ids: list[str]) -> str:
    """What is said of keys that an earlier life of the controller asked for; empty when there are none."""
    if not key_ids:
        return ""
    several = len(key_ids) > 1
    return (
        f"the controller ended before it recorded which key that is, and {', '.join(key_ids[:4])} "
        f"{'are' if several else 'is'} there; destroy {'them' if several else 'it'} unless a VM has "
        f"{'one' if several else 'it'}, as one may if the controller's database was put back from a backup since"
    )


def _locked(error: SealiftError, provider: str, key_id: str, vm: str) -> VmLocked:
    """What a person is told of a VM whose key cannot be had: ``error`` is why."""
    cause = error.reason if isinstance(error, KeyProviderError) else error.what
    todo = error.todo or f"bring it back; see `sealift key-provider test {provider}`"
    if isinstance(error, NotFound):
        cause = "there is no key provider of that name"
        todo = f"add or import key provider {provider} again, under that name"
    return VmLocked(f"VM {vm} needs key {key_id} of key provider {provider}, which cannot be had: {cause}", todo=todo)
