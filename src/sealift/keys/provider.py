"""The interface of a key provider: a named place that keeps key-encryption keys (KEKs), AES-256 all of them.

A key is made pre-active and is of no use before it was activated (KMIP 1.4, section 3.22). Every implementation keeps
the promises made here; ``tests/contract/check_key_provider.py`` checks them. Calls are bounded in time.

Every call may raise ProviderUnreachable (nobody answered), ProviderRefused (somebody did, and said no),
ProviderImpostor (somebody else answered; nothing was asked of them) and ProviderAnswerInvalid (what came is no answer);
all are KeyProviderErrors whose message names the provider.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import Final, Protocol

from sealift.errors import InvalidInput, KeyProviderError
from sealift.secret import Secret

KEK_BYTES: Final = 32
_KEY_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:+/=-]{0,127}")


def check_key_id(key_id: str) -> str:
    """``key_id`` itself; raises InvalidInput for what could not stand in files and logs."""
    if not _KEY_ID.fullmatch(key_id):
        raise InvalidInput("a key id is 1-128 letters, digits and . _ : + / = -")
    return key_id


class KeyState(Enum):
    """The states of a managed key (KMIP 1.4, section 9.1.3.2.17)."""

    PRE_ACTIVE = "pre-active"
    ACTIVE = "active"
    DEACTIVATED = "deactivated"
    COMPROMISED = "compromised"
    DESTROYED = "destroyed"
    DESTROYED_COMPROMISED = "destroyed, compromised"


@dataclass(frozen=True)
class MemberHealth:
    """One server of a provider. ``message`` says what is wrong with one that is not ok."""

    address: str
    ok: bool
    message: str = ""


@dataclass(frozen=True)
class ProviderHealth:
    """A provider as it was just seen; it is ``ok`` when at least one member is."""

    ok: bool
    message: str = ""
    members: tuple[MemberHealth, ...] = ()


class KeyProvider(Protocol):
    """See the module. A provider keeps no KEK in memory: who asked for one holds it."""

    @property
    def name(self) -> str:
        """The name that VMs find it by."""

    async def create(self, label: str) -> str:
        """Make a new AES-256 key, pre-active, findable by ``label``; answers its key id, which is never used twice.

        An error with ``nothing_asked`` says that there is no such key for certain.
        """

    async def activate(self, key_id: str) -> None:
        """Let a pre-active key be used; an active one stays as it is. Raises KeyMissing, KeyNotActive."""

    async def get(self, key_id: str) -> Secret:
        """The key, ``KEK_BYTES`` long, whatever its state is but for destroyed. Raises KeyMissing."""

    async def state(self, key_id: str) -> KeyState:
        """Its state; DESTROYED also where the provider has forgotten it after that. Raises KeyMissing."""

    async def locate(self, label: str) -> list[str]:
        """The ids of all keys of that label that are not destroyed, in no order."""

    async def destroy(self, key_id: str) -> None:
        """Destroy a key, active or not; one that is destroyed stays so. Raises KeyMissing for one that never was."""

    async def probe(self) -> ProviderHealth:
        """Ask every member whether it answers. Raises nothing."""

    async def close(self) -> None:
        """Close connections."""


async def new_key(provider: KeyProvider, label: str) -> str:
    """Make and activate a key; answers its id.

    When the provider fails in between, the half-made key is destroyed; where that fails too, the error says which key
    was left at the provider, so that none lies there unused without a word.
    """
    key_id = await provider.create(label)
    try:
        await provider.activate(key_id)
    except KeyProviderError as failure:
        try:
            await provider.destroy(key_id)
        except KeyProviderError:
            left = f"{failure.what}; key {key_id} was left unused at key provider {provider.name}"
            raise type(failure)(left, todo=f"destroy key {key_id} there; then try again") from None
        raise
    return key_id
