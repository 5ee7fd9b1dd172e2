"""The key provider that speaks KMIP: one or more servers that hold the same keys, tried in turn.

The servers of one provider replicate each other, and may lag. So "item not found" from one of them is taken for the
provider's answer only when those others that can be asked now say nothing else. Any other refusal is the provider's
answer at once: a server that answers and says no is not asked around.

Of members that failed not long ago at most one is tried in a call, the one that is due first: while all are away, a
call takes as long as one of them does to fail. Each failure makes a member due later, so that calls go round.

What a server finds for a label is believed only where the key itself says that it has that name: there are servers,
and proxies before them, that leave out conditions which they do not know, and answer with every key that we may see.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final, TypeVar

from sealift.errors import (
    InvalidInput,
    KeyMissing,
    KeyNotActive,
    KeyProviderError,
    ProviderAnswerInvalid,
    ProviderImpostor,
    ProviderRefused,
    ProviderUnreachable,
)
from sealift.keys import kmip_messages as kmip
from sealift.keys.kmip_link import Link, parse_address
from sealift.keys.kmip_member import Member, MemberFailed
from sealift.keys.provider import KeyState, MemberHealth, ProviderHealth, check_key_id
from sealift.secret import Secret

CONNECT_S: Final = 3.0
ANSWER_S: Final = 5.0
MAX_MEMBERS: Final = 16
MAX_LOCATED: Final = 64
"""A label is one key's, or two's after a failure. Who finds more for it has not looked for it."""

_REMEMBERED: Final = 4096
_GONE: Final = (KeyState.DESTROYED, KeyState.DESTROYED_COMPROMISED)
_TELLING: Final = (ProviderImpostor, ProviderRefused, ProviderAnswerInvalid, ProviderUnreachable)
"""Of several members' failures, the first of these kinds is what a person must look at first."""

_T = TypeVar("_T")
_Step = Callable[[Link], Awaitable[_T]]


class KmipProvider:
    """See ``keys.provider.KeyProvider``, which this implements, and the module.

    A call takes at most ``connect_s`` and a few times ``answer_s`` for each member that it tries. ``directory`` is what
    ``kmip_trust`` keeps; it is read for each new connection.
    """

    def __init__(
        self,
        name: str,
        members: Sequence[str],
        directory: Path,
        *,
        connect_s: float = CONNECT_S,
        answer_s: float = ANSWER_S,
    ) -> None:
        """``members`` are 1 to 16 of host:port; raises InvalidInput."""
        if not 1 <= len(members) <= MAX_MEMBERS or len(set(members)) != len(members):
            raise InvalidInput(f"a KMIP key provider has 1 to {MAX_MEMBERS} servers, each once")
        self._name = name
        self._members = [
            Member(parse_address(each), directory, connect_s=connect_s, answer_s=answer_s) for each in members
        ]
        self._destroyed: dict[str, None] = {}  # by us; servers may forget what they destroyed

    @property
    def name(self) -> str:
        """The name that VMs find it by."""
        return self._name

    async def create(self, label: str) -> str:
        """Make a key. ``label`` must be one that no other key has.

        When it cannot be known whether a server made the key that it was asked for, no second one is asked for before
        that was looked up by its label; a key found so is taken. Only when the server that is asked then does not yet
        have what another one made, there will be two, and ``locate`` tells of both.
        """
        asked = False

        async def step(link: Link) -> str:
            nonlocal asked
            if asked:
                for key_id, state in await _find(link, label):
                    if state is KeyState.PRE_ACTIVE:
                        return key_id
            asked = True
            return await link.ask(kmip.create(label))

        kmip.check_label(label)
        try:
            return await self._anywhere("make a key", step)
        except KeyProviderError as error:
            error.nothing_asked = not asked
            raise

    async def activate(self, key_id: str) -> None:
        """Let a pre-active key be used."""

        async def step(link: Link) -> KeyState:
            state = await link.ask(kmip.get_state(key_id))
            if state is not KeyState.PRE_ACTIVE:
                return state
            try:
                await link.ask(kmip.activate(key_id))
            except ProviderRefused:  # somebody else may have been faster
                state = await link.ask(kmip.get_state(key_id))
                if state is KeyState.PRE_ACTIVE:
                    raise
                return state
            return KeyState.ACTIVE

        state = await self._on_key("activate", key_id, step)
        if state in _GONE:
            raise KeyMissing(f"key {key_id} of key provider {self._name} is {state.value}")
        if state is not KeyState.ACTIVE:
            raise KeyNotActive(
                f"key {key_id} of key provider {self._name} is {state.value} and cannot be activated",
                todo="make a new key",
            )

    async def get(self, key_id: str) -> Secret:
        """The key."""

        async def step(link: Link) -> Secret:
            try:
                return await link.ask(kmip.get(key_id))
            except ProviderRefused:
                state = await link.ask(kmip.get_state(key_id))
                if state in _GONE:
                    raise KeyMissing(f"it is {state.value}") from None
                raise

        return await self._on_key("get", key_id, step)

    async def state(self, key_id: str) -> KeyState:
        """Its state. Of a key that the servers have forgotten, only who destroyed it knows that it was there."""
        try:
            return await self._on_key("tell the state of", key_id, lambda link: link.ask(kmip.get_state(key_id)))
        except KeyMissing:
            if key_id in self._destroyed:
                return KeyState.DESTROYED
            raise

    async def locate(self, label: str) -> list[str]:
        """The ids of all keys of that label that are not destroyed."""
        kmip.check_label(label)
        found = await self._anywhere("look for keys", lambda link: _find(link, label))
        return [key_id for key_id, state in found if state not in _GONE]

    async def destroy(self, key_id: str) -> None:
        """Destroy a key; one that is active is revoked before (cessation of operation)."""
        asked = key_id in self._destroyed

        async def step(link: Link) -> None:
            nonlocal asked
            try:
                state = await link.ask(kmip.get_state(key_id))
                if state in _GONE:
                    return
                if state is KeyState.ACTIVE:
                    await link.ask(kmip.revoke(key_id))
                asked = True
                await link.ask(kmip.destroy(key_id))
            except KeyMissing:
                if not asked:  # else it is gone because we asked for that before
                    raise

        await self._on_key("destroy", key_id, step)
        self._destroyed[key_id] = None
        if len(self._destroyed) > _REMEMBERED:
            del self._destroyed[next(iter(self._destroyed))]

    async def probe(self) -> ProviderHealth:
        """Ask every member whether it answers, also those that are left alone for a while."""

        async def ask(member: Member) -> MemberHealth:
            try:
                await member.run(lambda link: link.agree())
            except MemberFailed as failed:
                return MemberHealth(str(member.address), False, failed.why.what)
            except (KeyMissing, ProviderRefused) as refused:
                return MemberHealth(str(member.address), False, refused.what)
            return MemberHealth(str(member.address), True)

        members = tuple(await asyncio.gather(*map(ask, self._members)))
        failed = [f"{each.address}: {each.message}" for each in members if not each.ok]
        return ProviderHealth(len(failed) < len(members), "; ".join(failed), members)

    async def close(self) -> None:
        """Close connections."""
        for member in self._members:
            await member.close()

    async def _on_key(self, what: str, key_id: str, step: _Step[_T]) -> _T:
        check_key_id(key_id)
        return await self._anywhere(f"{what} key {key_id}", step)

    async def _anywhere(self, what: str, step: _Step[_T]) -> _T:
        """The answer of the first member that has one: of those that are well, then of the one that is due first."""
        now = asyncio.get_running_loop().time()
        ready = [member for member in self._members if not member.pace.rests(now)]
        resting = sorted({*self._members}.difference(ready), key=lambda member: member.pace.until)
        missing: list[str] = []
        failures: list[KeyProviderError] = []
        said: list[str] = []
        for member in ready + resting:
            if member in resting and (missing or member is not resting[0]):
                said.append(f"{member.address}: not asked again yet; {member.message}")
                continue
            try:
                return await member.run(step)
            except MemberFailed as failed:
                failures.append(failed.why)
                said.append(f"{member.address}: {failed.why.what}")
            except KeyMissing as refused:
                missing.append(str(member.address))
                said.append(f"{member.address}: {refused.what}")
            except ProviderRefused as refused:
                reason = f"{member.address}: {refused.what}"
                raise ProviderRefused(
                    f"key provider {self._name} refused to {what}: {reason}",
                    todo="see what the key server allows this controller's client certificate",
                    reason=f"refused: {reason}",
                ) from None
        every = "; ".join(said)
        if missing:
            raise KeyMissing(
                f"key provider {self._name} cannot {what}: {every}",
                todo="see whether the key was destroyed there",
                reason=every,
            )
        worst = min(failures, key=lambda failure: _TELLING.index(type(failure)))
        raise type(worst)(
            f"key provider {self._name} cannot {what}: {every}",
            todo=worst.todo or "see that its servers run and can be reached from the controller",
            reason=every,
        )


async def _find(link: Link, label: str) -> list[tuple[str, KeyState]]:
    """The keys that have that label by their own account, and their states.

    One that goes away meanwhile is left out. Raises ProviderAnswerInvalid for more than ``MAX_LOCATED``.
    """
    found: list[tuple[str, KeyState]] = []
    try:
        located = await link.ask(kmip.locate(label))
    except KeyMissing:  # some servers say so where others answer with nothing
        return found
    if len(located) > MAX_LOCATED:
        raise ProviderAnswerInvalid(f"it finds {len(located)} keys for one label: it does not look for labels")
    for key_id in located:
        try:
            if label in await link.ask(kmip.get_names(key_id)):
                found.append((key_id, await link.ask(kmip.get_state(key_id))))
        except KeyMissing:
            continue
    return found
