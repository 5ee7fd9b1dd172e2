"""VMs' keys: fetched, made and given up, at a real native provider that fails where a test says."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from uuid import UUID

import pytest

from sealift.controller.keyring import AT_ONCE
from sealift.errors import KeyMissing, NotFound, ProviderNotExported, ProviderUnreachable, VmLocked
from sealift.keys.native import NativeProvider
from sealift.keys.provider import KEK_BYTES, KeyState
from sealift.secret import Secret
from support.registries import Registry, a_registry


class Failing(NativeProvider):
    """A native provider that is unreachable from a step on, or waits there."""

    dies_at: tuple[str, ...] = ()
    waits_at = ""
    made: str = ""
    inside = most = 0

    def __init__(self, name: str, directory: Path) -> None:
        super().__init__(name, directory)
        self.asked: list[str] = []
        self.waiting, self.go_on = asyncio.Event(), asyncio.Event()

    async def _meet(self, step: str) -> None:
        self.asked.append(step)
        if step in self.dies_at:
            raise ProviderUnreachable(f"key provider {self.name} does not answer")
        if step == self.waits_at:
            self.inside += 1
            self.most = max(self.most, self.inside)
            if self.inside == AT_ONCE:
                self.waiting.set()
            try:
                await self.go_on.wait()
            finally:
                self.inside -= 1

    async def create(self, label: str) -> str:
        await self._meet("create")
        self.made = await super().create(label)
        await self._meet("created")
        return self.made

    async def activate(self, key_id: str) -> None:
        await self._meet("activate")
        await super().activate(key_id)

    async def get(self, key_id: str) -> Secret:
        await self._meet("get")
        return await super().get(key_id)

    async def locate(self, label: str) -> list[str]:
        await self._meet("locate")
        return await super().locate(label)

    async def destroy(self, key_id: str) -> None:
        await self._meet("destroy")
        await super().destroy(key_id)


def with_failing(tmp_path: Path, story: Callable[[Registry, Failing, UUID], Awaitable[None]]) -> None:
    """Run a story with key provider "home", and a VM vm1 that refers to it."""

    async def main() -> None:
        async with a_registry(tmp_path) as registry:
            await registry.add_usable("home")
            await registry.providers.close()
            failing = registry.providers._opened["home"] = Failing("home", registry.directory / "home")
            await story(registry, failing, await registry.add_vm("vm1", "home"))

    asyncio.run(main())


def test_a_new_key_is_active_and_the_same_whenever_it_is_fetched(tmp_path: Path) -> None:
    async def story(registry: Registry, provider: Failing, vm: UUID) -> None:
        key_id, kek = await registry.keyring.new_kek("home", vm, "vm1")
        assert len(kek.reveal()) == KEK_BYTES
        again, state = await registry.keyring.kek("home", key_id, vm="vm1")
        assert (again.reveal(), state) == (kek.reveal(), KeyState.ACTIVE)
        again.wipe()  # the caller's own copy
        assert (await registry.keyring.kek("home", key_id, vm="vm1"))[0].reveal() == kek.reveal()
        other_id, other = await registry.keyring.new_kek("home", vm, "vm1")
        assert other_id != key_id
        assert other.reveal() != kek.reveal()

    with_failing(tmp_path, story)


def test_no_key_is_made_where_none_may_be(tmp_path: Path) -> None:
    async def story(registry: Registry, provider: Failing, vm: UUID) -> None:
        await registry.add("fresh")
        with pytest.raises(ProviderNotExported, match="fresh"):
            await registry.keyring.new_kek("fresh", vm, "vm1")
        with pytest.raises(NotFound, match="away"):
            await registry.keyring.new_kek("away", vm, "vm1")
        assert provider.asked == []

    with_failing(tmp_path, story)


def test_a_locked_vm_names_provider_key_and_cause(tmp_path: Path) -> None:
    async def story(registry: Registry, provider: Failing, vm: UUID) -> None:
        key_id, _ = await registry.keyring.new_kek("home", vm, "vm1")
        foreign = "0" * 32 + "-" + "0" * 16
        await registry.keyring.abandon("home", (gone := await registry.keyring.new_kek("home", vm, "vm1"))[0])
        for name, wanted, cause in (
            ("away", key_id, "no key provider of that name"),
            ("home", foreign, "not one of its own"),
            ("home", gone[0], "destroyed"),
        ):
            with pytest.raises(VmLocked) as locked:
                await registry.keyring.kek(name, wanted, vm="vm1")
            for words in ("VM vm1 is locked", f"key {wanted}", f"key provider {name}", cause):
                assert words in locked.value.what
            assert "unlocks by itself" in locked.value.todo
        provider.dies_at = ("get",)
        with pytest.raises(VmLocked, match=f"key {key_id} of key provider home .* does not answer"):
            await registry.keyring.kek("home", key_id, vm="vm1")

    with_failing(tmp_path, story)


@pytest.mark.parametrize(
    ("dies_at", "left"),
    [
        (("create",), False),
        (("created",), False),  # it made the key, and its answer was lost
        (("activate",), False),
        (("get",), False),
        (("created", "locate"), True),
        (("activate", "destroy"), True),
        (("get", "locate"), True),
        (("get", "destroy"), True),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_a_provider_that_dies_on_the_way_leaves_no_key_without_a_word(
    dies_at: tuple[str, ...], left: bool, tmp_path: Path
) -> None:
    async def story(registry: Registry, provider: Failing, vm: UUID) -> None:
        provider.dies_at = dies_at
        with pytest.raises(ProviderUnreachable) as failed:
            await registry.keyring.new_kek("home", vm, "vm1")
        told = await registry.happened("key.left_over")
        provider.dies_at = ()
        if left:
            [event] = told
            assert event.vm == "vm1"
            [label] = re.findall(rf"sealift-{vm}-[0-9a-f]{{8}}", event.text)
            assert label in failed.value.what
            assert label in failed.value.todo
            assert await provider.locate(label) == [provider.made]
        else:
            assert told == []
            assert not provider.made or await provider.state(provider.made) is KeyState.DESTROYED

    with_failing(tmp_path, story)


def test_a_key_that_came_to_no_use_is_destroyed_or_told_of(tmp_path: Path) -> None:
    async def story(registry: Registry, provider: Failing, vm: UUID) -> None:
        key_id, _ = await registry.keyring.new_kek("home", vm, "vm1")
        await registry.keyring.abandon("home", key_id)
        with pytest.raises(KeyMissing):
            await provider.get(key_id)
        await registry.keyring.abandon("home", "no-such-key")  # as it is to be
        assert await registry.happened("key.left_over") == []
        key_id, _ = await registry.keyring.new_kek("home", vm, "vm1")
        provider.dies_at = ("destroy",)
        await registry.keyring.abandon("home", key_id)
        await registry.keyring.abandon("away", key_id)
        home, away = await registry.happened("key.left_over")
        assert f"key {key_id} was left unused at key provider home" in home.text
        assert f"key {key_id} was left unused at key provider away" in away.text

    with_failing(tmp_path, story)


def test_whoever_is_cancelled_while_a_key_is_made_leaves_none(tmp_path: Path) -> None:
    async def story(registry: Registry, provider: Failing, vm: UUID) -> None:
        provider.waits_at = "get"
        asking = [asyncio.create_task(registry.keyring.new_kek("home", vm, "vm1")) for _ in range(AT_ONCE)]
        await provider.waiting.wait()
        for task in asking:
            task.cancel()
        assert await asyncio.gather(*asking, return_exceptions=True) != []
        assert all(task.cancelled() for task in asking)
        assert provider.asked.count("create") == provider.asked.count("destroy") == AT_ONCE
        assert await registry.happened("key.left_over") == []

    with_failing(tmp_path, story)


def test_no_more_than_a_few_are_asked_for_at_once(tmp_path: Path) -> None:
    async def story(registry: Registry, provider: Failing, vm: UUID) -> None:
        key_id, kek = await registry.keyring.new_kek("home", vm, "vm1")
        provider.waits_at = "get"
        asking = [asyncio.create_task(registry.keyring.kek("home", key_id, vm="vm1")) for _ in range(3 * AT_ONCE)]
        await provider.waiting.wait()
        provider.go_on.set()
        got = await asyncio.gather(*asking)
        assert {key.reveal() for key, _ in got} == {kek.reveal()}
        assert provider.most == AT_ONCE

    with_failing(tmp_path, story)
