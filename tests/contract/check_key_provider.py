"""Every promise of ``sealift.keys.provider``, checked on an implementation as it really works.

``CHECKS`` lists them; each takes a ``Bench`` and may be run alone, on a provider that has other keys already: labels
are drawn.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from uuid import uuid4

import pytest

from sealift.errors import KeyMissing, ProviderUnreachable
from sealift.keys.provider import KEK_BYTES, KeyProvider, KeyState, check_key_id, new_key


class Bench:
    """The provider, and a way to open it anew, as a controller does when it is started again."""

    def __init__(self, open_it: Callable[[], KeyProvider]) -> None:
        self._open = open_it
        self._opened: list[KeyProvider] = []
        self.provider = self.again()

    def again(self) -> KeyProvider:
        self._opened.append(self._open())
        return self._opened[-1]

    def label(self) -> str:
        return f"sealift check {uuid4()}"

    async def active(self) -> str:
        return await new_key(self.provider, self.label())

    async def end(self) -> None:
        for provider in self._opened:
            await provider.close()


@asynccontextmanager
async def bench_of(open_it: Callable[[], KeyProvider]) -> AsyncIterator[Bench]:
    bench = Bench(open_it)
    try:
        yield bench
    finally:
        await bench.end()


async def a_key_is_of_256_bits_and_no_other_is_equal(bench: Bench) -> None:
    keys = [(await bench.provider.get(await bench.active())).reveal() for _ in range(5)]
    assert {len(key) for key in keys} == {KEK_BYTES}
    assert len(set(keys)) == len(keys)
    assert all(len(set(key)) > 8 for key in keys), "not random"


async def a_key_stays_the_same(bench: Bench) -> None:
    key_id = await bench.active()
    first = (await bench.provider.get(key_id)).reveal()
    assert (await bench.provider.get(key_id)).reveal() == first
    later = bench.again()
    assert (await later.get(key_id)).reveal() == first
    assert await later.state(key_id) is KeyState.ACTIVE


async def a_key_given_out_is_the_callers_own(bench: Bench) -> None:
    key_id = await bench.active()
    key = await bench.provider.get(key_id)
    key.wipe()
    assert len((await bench.provider.get(key_id)).reveal()) == KEK_BYTES


async def a_key_is_pre_active_until_it_is_activated(bench: Bench) -> None:
    provider = bench.provider
    key_id = await provider.create(bench.label())
    assert check_key_id(key_id) == key_id
    assert await provider.state(key_id) is KeyState.PRE_ACTIVE
    before = (await provider.get(key_id)).reveal()
    await provider.activate(key_id)
    assert await provider.state(key_id) is KeyState.ACTIVE
    await provider.activate(key_id)
    assert await provider.state(key_id) is KeyState.ACTIVE, "activating it again does nothing"
    assert (await provider.get(key_id)).reveal() == before


async def a_destroyed_key_is_gone(bench: Bench) -> None:
    provider = bench.provider
    for activated in (True, False):
        label = bench.label()
        key_id = await provider.create(label)
        if activated:
            await provider.activate(key_id)
        await provider.destroy(key_id)
        for each in (provider, bench.again()):
            with pytest.raises(KeyMissing, match=key_id):
                await each.get(key_id)
            with pytest.raises(KeyMissing, match=key_id):
                await each.activate(key_id)
            assert await each.locate(label) == []
        assert await provider.state(key_id) is KeyState.DESTROYED
        await provider.destroy(key_id)
        assert await provider.state(key_id) is KeyState.DESTROYED, "destroying it again does nothing"


async def destroying_one_key_leaves_the_others(bench: Bench) -> None:
    kept, gone = await bench.active(), await bench.active()
    before = (await bench.provider.get(kept)).reveal()
    await bench.provider.destroy(gone)
    assert (await bench.provider.get(kept)).reveal() == before
    assert await bench.provider.state(kept) is KeyState.ACTIVE


async def an_unknown_key_is_missing(bench: Bench) -> None:
    provider = bench.provider
    known = await bench.active()
    other = ("0" if known[0] != "0" else "1") + known[1:]
    for key_id in (str(uuid4()), other, "no-such-key", f"{known}0"):
        calls: tuple[Callable[[str], Awaitable[object]], ...] = (
            provider.get,
            provider.state,
            provider.activate,
            provider.destroy,
        )
        for call in calls:
            with pytest.raises(KeyMissing, match=key_id) as missing:
                await call(key_id)
            assert provider.name in missing.value.what
    assert await provider.state(known) is KeyState.ACTIVE


async def no_id_is_used_twice(bench: Bench) -> None:
    ids: list[str] = []
    for _ in range(4):
        ids.append(await bench.provider.create(bench.label()))
        ids.append(await bench.again().create(bench.label()))
        await bench.provider.destroy(ids[-2])
    assert len(set(ids)) == len(ids)


async def keys_are_found_by_label(bench: Bench) -> None:
    provider, one, other = bench.provider, bench.label(), bench.label()
    waiting, active = await provider.create(one), await new_key(provider, other)
    assert await provider.locate(one) == [waiting]
    assert await provider.locate(other) == [active]
    assert await provider.locate(bench.label()) == []
    assert await bench.again().locate(one) == [waiting]


async def many_are_asked_for_at_once(bench: Bench) -> None:
    labels = [bench.label() for _ in range(8)]
    ids = await asyncio.gather(*(new_key(bench.provider, label) for label in labels))
    keys = [key.reveal() for key in await asyncio.gather(*map(bench.provider.get, ids))]
    assert len(set(keys)) == len(keys)
    assert [await bench.provider.locate(label) for label in labels] == [[key_id] for key_id in ids]
    assert [(await bench.provider.get(key_id)).reveal() for key_id in ids] == keys


class _FailsToActivate:
    """The provider, which goes away in the moment between create and activate."""

    def __init__(self, provider: KeyProvider) -> None:
        self._provider = provider
        self.made: list[str] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._provider, name)

    async def create(self, label: str) -> str:
        self.made.append(await self._provider.create(label))
        return self.made[-1]

    async def activate(self, key_id: str) -> None:
        raise ProviderUnreachable(f"gone when {key_id} was to be activated")


async def a_key_is_never_left_half_made(bench: Bench) -> None:
    label, failing = bench.label(), _FailsToActivate(bench.provider)
    with pytest.raises(ProviderUnreachable):
        await new_key(failing, label)  # type: ignore[arg-type]
    (half,) = failing.made
    assert await bench.provider.state(half) is KeyState.DESTROYED
    assert await bench.provider.locate(label) == []


async def a_provider_that_works_is_well(bench: Bench) -> None:
    health = await bench.provider.probe()
    assert health.ok
    assert health.members
    assert all(member.ok and not member.message and member.address for member in health.members)


async def a_closed_provider_can_be_closed_again(bench: Bench) -> None:
    provider = bench.again()
    key_id = await bench.active()
    await provider.get(key_id)
    await provider.close()
    await provider.close()
    assert await bench.provider.state(key_id) is KeyState.ACTIVE, "the other handle goes on"


CHECKS: tuple[Callable[[Bench], Awaitable[None]], ...] = (
    a_key_is_of_256_bits_and_no_other_is_equal,
    a_key_stays_the_same,
    a_key_given_out_is_the_callers_own,
    a_key_is_pre_active_until_it_is_activated,
    a_destroyed_key_is_gone,
    destroying_one_key_leaves_the_others,
    an_unknown_key_is_missing,
    no_id_is_used_twice,
    keys_are_found_by_label,
    many_are_asked_for_at_once,
    a_key_is_never_left_half_made,
    a_provider_that_works_is_well,
    a_closed_provider_can_be_closed_again,
)


async def check_key_provider(
    open_it: Callable[[], KeyProvider], checks: tuple[Callable[[Bench], Awaitable[None]], ...] = CHECKS
) -> None:
    """Run the checks on one provider, which ``open_it`` opens each time anew."""
    for check in checks:
        async with bench_of(open_it) as bench:
            await check(bench)
