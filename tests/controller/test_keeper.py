"""The keeper: hosts that lost keys get them again, VMs lock and unlock by themselves."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sealift.controller import inventory
from sealift.controller.link import AgentLink
from sealift.domain.vm import VmStatus
from sealift.errors import HostUnreachable, VmLocked
from sealift.keys.bundle import Verdict
from sealift.keys.native import NativeProvider
from sealift.keys.provider import ProviderHealth
from sealift.secret import Secret
from support.age import cheap_export
from support.controllers import FAST
from support.encrypted_world import World, with_world

EAGER = replace(FAST, keep_s=0.02, probe_s=0.1)


def test_a_restarted_agent_has_its_keys_back_before_anybody_asks(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        running, stopped = await world.encrypted("vm1", running=True), await world.encrypted("vm2")
        clear = await world.define("vm3")
        held = dict(world.a.vault.held)
        world.a.vault.restart()
        await world.a.vault.until(lambda: world.a.vault.held == held)
        assert sorted(world.a.vault.handed_out, key=str) == sorted([running, stopped], key=str)
        assert clear not in world.a.vault.held
        assert not await world.happened("vm.locked")
        await world.away()  # nobody needs it now, and people hear of it
        assert "home" in (await world.tell("key_provider.unreachable")).text
        await world.back()
        await world.tell("key_provider.back")

    with_world(tmp_path, story, pace=EAGER)


def test_nobody_is_asked_for_a_key_while_the_hosts_have_what_they_need(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.encrypted()
        await world.away()
        await world.services.keeper.look()
        assert not await world.happened("key_provider.unreachable")
        assert (await world.sight()).state == "ok"

    with_world(tmp_path, story)


def test_vms_lock_with_their_provider_away_and_unlock_when_it_is_back(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        stopped, running = await world.encrypted("vm1"), await world.encrypted("vm2", running=True)
        key_id = (await world.row()).key_id
        keeper = world.services.keeper
        await world.away()
        world.a.vault.restart()
        for _ in range(2):
            await keeper.look()
        sight = await world.sight()
        assert sight.state == "locked"
        for word in ("vm1", "home", key_id or "?"):
            assert word in sight.message
        [event] = await world.happened("vm.locked")
        assert (event.vm, event.slug) == ("vm1", "vm_locked")
        # One that runs is not locked: it goes on, and people see what it would lack.
        sight = await world.sight("vm2")
        assert sight.state == "ok"
        assert "lost its keys" in sight.message
        # It stops, and is locked from then on.
        await world.services.inventory.stop_vm("vm2", force=True, asked_by="ann")
        await keeper.look()
        assert (await world.sight("vm2")).state == "locked"
        assert len(await world.happened("vm.locked")) == 2
        await world.back()
        await keeper.look()
        assert {(await world.sight(name)).state for name in ("vm1", "vm2")} == {"ok"}
        assert {(await world.sight(name)).message for name in ("vm1", "vm2")} == {""}
        assert sorted(event.vm or "" for event in await world.happened("vm.unlocked")) == ["vm1", "vm2"]
        assert {stopped, running} == set(world.a.vault.held)

    with_world(tmp_path, story)


def test_a_provider_that_is_added_again_unlocks_at_once(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.encrypted()
        native = await world.services.providers.open("home")
        kdk = await native.derivation_key()  # type: ignore[attr-defined]
        await world.services.providers.remove("home", force=True, asked_by="ann")
        world.a.vault.restart()
        await world.services.keeper.look()
        assert (await world.sight()).state == "locked"
        words = Secret(b"some words that open it", length=23)
        file = cheap_export("home", kdk, words)
        added = await world.services.providers.import_(file, words, default=False, asked_by="ann")
        assert added.unlocks == ("vm1",)
        assert (await world.tell("vm.unlocked")).vm == "vm1"  # long before the next round
        assert (await world.sight()).state == "ok"

    with_world(tmp_path, story)


def test_a_changed_file_is_told_once_and_its_keys_are_no_secret_to_its_host(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        vm = await world.encrypted(running=True)
        world.a.vault.files[vm] = world.a.vault.files[vm].replace(b"vcpus = 1", b"vcpus = 2")
        for _ in range(2):
            await world.services.keeper.look()
        [event] = await world.happened("vm.tampered")
        assert "+ vcpus = 2" in event.text
        assert (await world.sight()).state == "tampered"
        await world.services.encryption.restore_config("vm1", asked_by="ann")
        await world.services.keeper.look()
        assert len(await world.happened("vm.tampered")) == 1

    with_world(tmp_path, story)


def test_a_file_that_names_another_provider_is_a_changed_one(tmp_path: Path) -> None:
    """One byte is enough to have it name a key provider that never was, whose key nobody can bring back."""

    async def story(world: World) -> None:
        vm = await world.encrypted()
        world.a.vault.files[vm] = world.a.vault.files[vm].replace(b'provider = "home"', b'provider = "homd"')
        for _ in range(2):
            await world.services.keeper.look()
        [event] = await world.happened("vm.tampered")
        assert 'was changed: - provider = "home"; + provider = "homd"' in event.text
        sight = await world.sight()
        assert (sight.state, sight.lines) == ("tampered", ['- provider = "home"', '+ provider = "homd"'])
        assert "find out who did it; `sealift vm restore-config vm1`" in sight.message

    with_world(tmp_path, story)


def test_a_file_that_claims_to_be_newer_is_told_once_while_its_key_is_not_there(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        vm = await world.encrypted()
        forged = world.a.vault.files[vm].replace(b"generation = 1", b"generation = 2")
        world.a.vault.files[vm] = forged.replace(b'provider = "home"', b'provider = "homd"')
        for _ in range(2):
            await world.services.keeper.look()
        [event] = await world.happened("vm.config_unclear")
        assert "it names a key provider homd, which is not there" in event.text
        assert not await world.happened("vm.tampered")
        sight = await world.sight()
        assert sight.state == "locked"
        assert "+ generation = 2" in sight.lines
        assert "homd, which is not there" in sight.message
        with pytest.raises(VmLocked, match=r"VM vm1 is locked: .*claims to be newer"):
            await world.services.inventory.start_vm("vm1", asked_by="ann")
        assert len(await world.happened("vm.config_unclear")) == 1

    with_world(tmp_path, story)


def test_an_older_copy_is_called_one_where_that_can_be_told(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        vm = await world.encrypted()
        older, key_id = world.a.vault.files[vm], (await world.row()).key_id
        await world.provide("other")
        await world.rekey(provider="other")
        world.a.vault.files[vm] = older
        await world.away("home")
        await world.services.keeper.look()
        sight = await world.sight()
        assert sight.state == "tampered", "nothing newer is lost, whichever it is"
        told = f"was changed, or is an older copy, which cannot be told apart: key {key_id} of key provider home"
        assert told in sight.message
        assert "- generation = 2" in sight.lines
        await world.back("home")
        await world.services.keeper.look()
        assert "is an older copy" in (await world.sight()).message
        first, second = await world.happened("vm.tampered")
        assert told in first.text
        assert "is an older copy: generation 1, and the controller wrote 2 last" in second.text
        await world.away("home")
        await world.services.keeper.look()
        assert len(await world.happened("vm.tampered")) == 2, "what was told once is known"

    with_world(tmp_path, story)


def test_a_host_that_does_not_answer_is_no_reason_to_lock(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.encrypted()
        world.a.vault.restart()
        await world.away()

        class Silent(dict):  # type: ignore[type-arg]
            def __iter__(self) -> Iterator[object]:
                raise HostUnreachable("host a did not answer")

        world.a.vms = Silent()
        await world.services.keeper.look()
        assert (await world.sight()).state == "unknown"
        assert (await world.shown()).message
        assert not await world.happened("vm.locked")

    with_world(tmp_path, story)


async def rekeyed(world: World) -> None:
    """vm1 has another file."""
    await world.rekey()


async def decrypted(world: World) -> None:
    """vm1 has none."""
    await world.finished(await world.decrypt())


@pytest.mark.parametrize("order", [rekeyed, decrypted])
def test_an_order_that_comes_between_two_looks_is_nobodys_attack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: Callable[[World], Awaitable[None]]
) -> None:
    """The controller's row was read before it, and the host was asked after it."""

    async def story(world: World) -> None:
        vms = AgentLink.vms

        async def after_it(self: AgentLink) -> list[VmStatus]:
            patched.undo()
            await order(world)
            return await vms(self)

        await world.encrypted()
        with monkeypatch.context() as patched:
            patched.setattr(AgentLink, "vms", after_it)
            await world.services.keeper.look()
        assert not await world.happened("vm.tampered")
        await world.services.keeper.look()
        assert not await world.happened("vm.tampered")
        if order is decrypted:
            await world.finished(await world.encrypt())
        with monkeypatch.context() as patched:
            patched.setattr(AgentLink, "vms", after_it)
            [seen] = await world.services.inventory.vms()
        assert seen.file is None, "it is not judged"

    with_world(tmp_path, story)


def test_a_vm_that_is_being_rekeyed_is_neither_locked_nor_unlocked(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        vm = await world.encrypted()
        world.a.vault.lose = {"file"}
        with pytest.raises(HostUnreachable):
            await world.rekey()
        world.a.vault.restart()
        await world.away()
        await world.services.keeper.look()
        assert not await world.happened("vm.locked")
        world.a.vault.lose = set()
        await world.finished((await world.services.conversions.all())[0])
        await world.services.keeper.look()
        assert (await world.happened("vm.locked"))[0].vm == "vm1"
        await world.back()
        await world.services.keeper.look()
        assert await world.happened("vm.unlocked")
        assert vm in world.a.vault.held

    with_world(tmp_path, story)


class Broken(NativeProvider):
    """A key provider whose health cannot be told, by a defect; or whose keys take for ever."""

    def __init__(self, name: str, directory: Path) -> None:
        super().__init__(name, directory)
        self.probed, self.hangs = asyncio.Event(), False

    async def probe(self) -> ProviderHealth:
        self.probed.set()
        raise RuntimeError("a defect")

    async def get(self, key_id: str) -> Secret:
        if self.hangs:
            await asyncio.Event().wait()
        return await super().get(key_id)


async def broken(world: World) -> Broken:
    """The provider ``home`` from now on."""
    await world.services.providers.close()
    found = Broken("home", world.state / "providers" / "home")
    world.services.providers._opened["home"] = found
    return found


def test_a_defect_that_it_meets_at_a_provider_keeps_it_from_no_vm(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.encrypted()
        provider = await broken(world)
        held = dict(world.a.vault.held)
        for _ in range(2):
            async with asyncio.timeout(10):
                await provider.probed.wait()
            provider.probed.clear()
            world.a.vault.restart()
            await world.a.vault.until(lambda: world.a.vault.held == held)

    with_world(tmp_path, story, pace=EAGER)


def test_a_provider_that_does_not_answer_keeps_nobody_from_the_keys_of_another(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.provide("other")
        first = await world.encrypted("vm1")
        second = await world.define("vm2")
        await world.finished(await world.encrypt("vm2", provider="other"))
        provider = await broken(world)
        held = dict(world.a.vault.held)
        provider.hangs = True
        for _ in range(3):  # also in the rounds after the one in which it hangs
            world.a.vault.restart()
            await world.a.vault.until(lambda: world.a.vault.held.get(second) == held[second])
            assert first not in world.a.vault.held
        provider.hangs = False

    with_world(tmp_path, story, pace=EAGER)


def test_a_list_of_vms_does_not_wait_for_a_provider_that_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inventory, "JUDGE_S", 0.2)

    async def story(world: World) -> None:
        for name in ("vm1", "vm2", "vm3"):
            vm = await world.encrypted(name)
            world.a.vault.files[vm] = world.a.vault.files[vm].replace(b"generation = 1", b"generation = 2")
        provider = await broken(world)
        provider.hangs = True
        async with asyncio.timeout(5):
            seen = await world.services.inventory.vms()
        assert {each.file.verdict for each in seen if each.file} == {Verdict.LOCKED}
        assert "not had in time" in (await world.sight()).message
        provider.hangs = False
        await world.services.keeper.look()
        provider.hangs = True
        assert {(await world.sight(name)).state for name in ("vm1", "vm2", "vm3")} == {"tampered"}

    with_world(tmp_path, story)


def test_it_does_not_come_between_other_orders(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.encrypted()
        world.a.vault.restart()
        vms = world.services.inventory
        async with vms.turn("vm1") as (row, _):
            await world.services.keeper.look()
            assert not world.a.vault.handed_out
            async with vms.between_orders(row) as same:
                assert not same
        async with vms.between_orders(row) as same:
            assert same
            waiting = asyncio.create_task(vms.start_vm("vm1", asked_by="ann"))
            await asyncio.sleep(0.05)
            assert not waiting.done()  # it waits instead of being refused
        assert (await waiting).status is not None
        row.fence -= 1
        async with vms.between_orders(row) as same:
            assert not same

    with_world(tmp_path, story)
