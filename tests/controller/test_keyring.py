"""VMs' keys: fetched, made and given up, at a real native provider that fails where a test says."""

from __future__ import annotations

import asyncio
import contextlib
import re
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path
from uuid import UUID

import pytest

from sealift.controller.keyring import AT_ONCE
from sealift.controller.models import VmRow
from sealift.controller.provider_ask import ProviderAsk
from sealift.demo.ports import free_port
from sealift.errors import (
    Conflict,
    KeyMissing,
    NotFound,
    ProviderImpostor,
    ProviderNotExported,
    ProviderUnreachable,
    VmLocked,
)
from sealift.keys.kmip_numbers import Operation
from sealift.keys.native import NativeProvider
from sealift.keys.provider import KEK_BYTES, KeyState
from sealift.secret import Secret
from support.kmip_place import failing_on, make_place, members
from support.kmip_server import Die, Store, saying, server_context
from support.registries import Registry, a_registry, with_registry


class Failing(NativeProvider):
    """A native provider that is unreachable from a step on, or waits there."""

    dies_at: tuple[str, ...] = ()
    finds: list[str] | None = None
    """What it answers whatever label is looked for, instead of the truth."""
    waits_at = ""
    made: str = ""
    inside = most = 0
    crowd = AT_ONCE  # so many must wait for it to say so

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
            if self.inside == self.crowd:
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
        return await super().locate(label) if self.finds is None else self.finds

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
            for words in ("VM vm1 needs", f"key {wanted}", f"key provider {name}", cause):
                assert words in locked.value.what
            assert locked.value.todo
        provider.dies_at = ("get",)
        with pytest.raises(VmLocked, match=f"key {key_id} of key provider home, .* does not answer"):
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
        await registry.keyring.abandon("home", key_id)  # once more, with nothing left to do
        assert await registry.happened("key.left_over") == []
        key_id, _ = await registry.keyring.new_kek("home", vm, "vm1")
        provider.dies_at = ("destroy",)
        await registry.keyring.abandon("home", key_id)
        await registry.keyring.abandon("away", key_id)
        provider.dies_at = ()  # it answers then, and does not know the key, which was made all the same
        await registry.keyring.abandon("home", foreign := "0" * 32 + "-" + "0" * 16)
        home, away, missing = await registry.happened("key.left_over")
        assert f"key {foreign} was left unused at key provider home" in missing.text
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


def test_a_provider_that_does_not_answer_keeps_nobody_from_the_keys_of_another(tmp_path: Path) -> None:
    async def story(registry: Registry, provider: Failing, vm: UUID) -> None:
        await registry.add_usable("other")
        await registry.add_vm("vm2", "other")
        key_id, _ = await registry.keyring.new_kek("home", vm, "vm1")
        other_id, _ = await registry.keyring.new_kek("other", vm, "vm2")
        provider.waits_at = "get"
        asking = [asyncio.create_task(registry.keyring.kek("home", key_id, vm="vm1")) for _ in range(AT_ONCE)]
        await provider.waiting.wait()
        async with asyncio.timeout(10):
            await registry.keyring.kek("other", other_id, vm="vm2")
        provider.go_on.set()
        await asyncio.gather(*asking)

    with_failing(tmp_path, story)


def fresh_rows(directory: Path) -> list[tuple[str, str]]:
    """Provider and VM of each key that is written down as being made."""
    with contextlib.closing(sqlite3.connect(directory / "controller.db")) as db:
        return db.execute("SELECT provider, vm_name FROM fresh_keys").fetchall()


class Died(BaseException):
    """What a controller that is killed just there does: nothing more."""


def dies(registry: Registry, provider: Failing, at: str) -> None:
    """Let the controller die when ``provider`` meets the step ``at``, or when it waits for what becomes of its key."""

    async def meet(step: str) -> None:
        if step == at:
            raise Died

    async def nothing(*_: object) -> str:
        raise Died

    provider._meet = meet  # type: ignore[method-assign]
    registry.keyring._clear = nothing  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize("at", ["create", "created", "activate", "get", "record"])
def test_a_key_whose_making_a_crash_cut_off_is_told_of_in_the_next_life(at: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with a_registry(tmp_path) as registry:
            await registry.add_usable("home")
            await registry.providers.close()
            provider = registry.providers._opened["home"] = Failing("home", registry.directory / "home")
            vm = await registry.add_vm("vm1", None)
            dies(registry, provider, at)
            if at == "record":
                await registry.keyring.new_kek("home", vm, "vm1")
            else:
                with pytest.raises(Died):
                    await registry.keyring.new_kek("home", vm, "vm1")
        assert fresh_rows(tmp_path) == [("home", "vm1")]
        async with a_registry(tmp_path) as registry:
            (registry.directory / "home").rename(tmp_path / "away")
            await registry.keyring.settle()
            assert fresh_rows(tmp_path) == [("home", "vm1")], "it is asked again when it is back"
            (tmp_path / "away").rename(registry.directory / "home")
            for _ in range(2):
                await registry.keyring.settle()
            assert fresh_rows(tmp_path) == []
            told = await registry.happened("key.left_over")
            if at == "create":
                assert told == []
                return
            [event] = told
            assert event.vm == "vm1"
            assert provider.made in event.text
            assert f"label sealift-{vm}-" in event.text
            # It may be a VM's, if the database is one of before.
            state = await (await registry.providers.open("home")).state(provider.made)
            assert state is (KeyState.PRE_ACTIVE if at in ("created", "activate") else KeyState.ACTIVE)

    asyncio.run(main())


def test_a_key_whose_recording_was_interrupted_is_destroyed_unless_it_was_recorded(tmp_path: Path) -> None:
    async def story(registry: Registry, provider: Failing, vm: UUID) -> None:
        key_id, _ = await registry.keyring.new_kek("home", vm, "vm1")
        await registry.keyring.settle()
        assert await provider.state(key_id) is KeyState.ACTIVE, "somebody works on it"
        recorded, _ = await registry.keyring.new_kek("home", vm, "vm1")
        await registry.begin_conversion(vm, key_id=recorded)
        for each in (key_id, recorded):
            await registry.keyring.give_up("home", each, asyncio.CancelledError())
        assert await provider.state(key_id) is KeyState.ACTIVE, "nobody knows yet whether it was recorded"
        await registry.keyring.settle()
        assert await provider.state(key_id) is KeyState.DESTROYED
        assert await provider.state(recorded) is KeyState.ACTIVE
        assert fresh_rows(tmp_path) == []
        assert await registry.happened("key.left_over") == []

    with_failing(tmp_path, story)


def test_a_provider_that_is_removed_takes_no_interrupted_key_with_it_without_a_word(tmp_path: Path) -> None:
    async def story(registry: Registry, provider: Failing, vm: UUID) -> None:
        key_id, _ = await registry.keyring.new_kek("home", vm, "vm1")
        await registry.keyring.give_up("home", key_id, asyncio.CancelledError())
        await registry.providers.remove("home", force=True, asked_by="ann")
        [event] = await registry.happened("key.left_over")
        assert f"label sealift-{vm}-" in event.text
        assert fresh_rows(tmp_path) == []

    with_failing(tmp_path, story)


@pytest.mark.parametrize("impostor", [False, True])
def test_a_provider_that_was_certainly_not_asked_leaves_nothing_to_speak_of(impostor: bool, tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    place, store = make_place(tmp_path / "place"), Store()

    async def story(registry: Registry) -> None:
        async with saying(server_context(place.authority, place.other_name), store.answers()) as server:
            member = server.member if impostor else f"127.0.0.1:{free_port()}"
            ask = ProviderAsk("kms", "kmip", (member,), place.authority.pem)
            await registry.providers.add(ask, asked_by="ann")
            vm = await registry.add_vm("vm1", "kms")
            with pytest.raises(ProviderImpostor if impostor else ProviderUnreachable) as failed:
                await registry.keyring.new_kek("kms", vm, "vm1")
        assert "left" not in str(failed.value)
        assert ("who answers at that address" if impostor else "reached from the controller") in failed.value.todo
        assert await registry.happened("key.left_over") == []
        assert fresh_rows(tmp_path) == []
        assert store.states == {}

    with_registry(tmp_path, story)


def test_a_key_server_that_may_have_been_asked_is_spoken_of(tmp_path: Path) -> None:
    """It dies when the request has come, as far as can be seen from here: the key may be there."""
    store, place = Store(), make_place(tmp_path)

    async def story(registry: Registry) -> None:
        async with members(place, store.answers(before=raise_die)) as (provider, _):
            ask = ProviderAsk("kms", "kmip", ("kms1.example.net:5696",), place.authority.pem)
            await registry.providers.add(ask, asked_by="ann")
            registry.providers._opened["kms"] = provider
            vm = await registry.add_vm("vm1", "kms")
            with pytest.raises(ProviderUnreachable, match="may have been left unused"):
                await registry.keyring.new_kek("kms", vm, "vm1")
        [event] = await registry.happened("key.left_over")
        assert f"label sealift-{vm}-" in event.text
        assert fresh_rows(tmp_path / "registry") == []

    def raise_die(operation: Operation) -> None:
        raise Die

    (tmp_path / "registry").mkdir()
    with_registry(tmp_path / "registry", story)


async def the_vm_has(registry: Registry, vm: UUID, key_id: str) -> None:
    async with registry.events.transaction() as session:
        (await session.get_one(VmRow, vm)).key_id = key_id


@pytest.mark.parametrize("others", [0, 1], ids=["alone", "with another one"])
def test_what_a_careless_search_finds_is_not_destroyed(tmp_path: Path, others: int) -> None:
    """Whoever looked for the label of a key that was just made answered with keys that are others'."""

    async def story(registry: Registry, provider: Failing, vm: UUID) -> None:
        used, _ = await registry.keyring.new_kek("home", vm, "vm1")
        await the_vm_has(registry, vm, used)
        unknown = [(await registry.keyring.new_kek("home", vm, "vm1"))[0] for _ in range(others)]
        provider.finds, provider.dies_at = [*unknown, used], ("get",)
        with pytest.raises(ProviderUnreachable, match="may have been left unused"):
            await registry.keyring.new_kek("home", vm, "vm1")
        provider.finds = [*unknown, provider.made]
        if others:  # two of which neither is in use, as far as we know
            with pytest.raises(ProviderUnreachable, match="may have been left unused"):
                await registry.keyring.new_kek("home", vm, "vm1")
        for key_id in (used, *unknown):
            assert await provider.state(key_id) is KeyState.ACTIVE
        told = [event.text for event in await registry.happened("key.left_over")]
        assert len(told) == 1 + others
        assert f"key {used}, which is in use" in told[0]
        assert not others or "2 keys were found for that label, and none was destroyed" in told[1]

    with_failing(tmp_path, story)


@pytest.mark.parametrize("how", ["vm", "new key", "old key"])
def test_a_key_that_is_in_use_is_not_given_up(tmp_path: Path, how: str) -> None:
    async def story(registry: Registry, provider: Failing, vm: UUID) -> None:
        key_id, _ = await registry.keyring.new_kek("home", vm, "vm1")
        if how == "vm":
            await the_vm_has(registry, vm, key_id)
        else:
            await registry.begin_conversion(
                vm, **{"new key": {"key_id": key_id}, "old key": {"old_key_id": key_id}}[how]
            )
        await registry.keyring.abandon("home", key_id)
        assert await provider.state(key_id) is KeyState.ACTIVE
        [event] = await registry.happened("key.left_over")
        assert f"key {key_id} was left unused at key provider home: it is in use after all" in event.text

    with_failing(tmp_path, story)


def test_a_provider_is_in_use_from_before_a_key_is_made_until_its_record_is_written(tmp_path: Path) -> None:
    async def story(registry: Registry, provider: Failing, vm: UUID) -> None:
        async def refuses() -> str:
            try:
                await registry.providers.remove("home", force=False, asked_by="ann")
            except Conflict as refused:
                return refused.what
            return ""

        async with registry.events.transaction() as session:
            (await session.get_one(VmRow, vm)).provider = None
        provider.waits_at, provider.crowd = "get", 1
        asking = asyncio.create_task(registry.keyring.new_kek("home", vm, "new"))
        await provider.waiting.wait()
        assert "being made there for VM new" in await refuses()
        provider.go_on.set()
        key_id, _ = await asking
        assert "being made there for VM new" in await refuses(), "its record is still to be written"
        await registry.keyring.abandon("home", key_id)
        provider.dies_at = ("create",)
        with pytest.raises(ProviderUnreachable):
            await registry.keyring.new_kek("home", vm, "new")
        provider.dies_at = ()
        key_id, _ = await registry.keyring.new_kek("home", vm, "new")
        assert "being made there for VM new" in await refuses()
        await registry.begin_conversion(vm, key_id=key_id)
        assert "it has the keys of VMs: vm1" in await refuses(), "what came of it is said by the records"

    with_failing(tmp_path, story)


def test_a_key_server_that_heeds_no_names_costs_no_key(tmp_path: Path) -> None:
    """The whole way: Create's key cannot be read, and Locate answers with every key that there is."""
    store, place = Store(finds_all=True), make_place(tmp_path)
    used = store.add("sealift-vm-of-before", 2)
    unknown = store.add("somebody else's", 1)
    answers = store.answers(before=failing_on(Operation.GET, Die()))

    async def story(registry: Registry) -> None:
        async with members(place, answers) as (provider, _):
            ask = ProviderAsk("kms", "kmip", ("kms1.example.net:5696",), place.authority.pem)
            await registry.providers.add(ask, asked_by="ann")
            await registry.providers.close()
            registry.providers._opened["kms"] = provider
            vm = await registry.add_vm("vm1", "kms", used)
            with pytest.raises(ProviderUnreachable):
                await registry.keyring.new_kek("kms", vm, "vm1")
        made = next(key_id for key_id in store.states if key_id not in (used, unknown))
        assert store.states == {used: 2, unknown: 1, made: 5}
        assert await registry.happened("key.left_over") == []

    (tmp_path / "registry").mkdir()
    with_registry(tmp_path / "registry", story)
