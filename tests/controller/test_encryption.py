"""Encrypted VMs day by day: started, tampered with, restored, rekeyed while they run, deleted."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sealift.controller.conversion_run import ConversionTools
from sealift.controller.conversions import Conversions, ConversionWish
from sealift.controller.models import ConversionRow, VmRow
from sealift.controller.rekey import Rekeying
from sealift.controller.unlocking import Restored
from sealift.domain.conversion import ConversionKind
from sealift.domain.vm import VmState
from sealift.errors import Conflict, HostUnreachable, NotFound, SealiftError, VmLocked, VmTampered
from sealift.keys import bundle
from sealift.keys.provider import KeyState
from support.encrypted_world import World, with_world


async def start(world: World) -> VmState | None:
    """Start vm1; its state then."""
    seen = await world.services.inventory.start_vm("vm1", asked_by="ann")
    return seen.status.state if seen.status else None


async def stop(world: World) -> None:
    """Stop vm1."""
    await world.services.inventory.stop_vm("vm1", force=True, asked_by="ann")


async def restore(world: World) -> Restored:
    """Put vm1's configuration file back; what that came to."""
    return (await world.services.encryption.restore_config("vm1", asked_by="ann"))[1]


def test_it_starts_with_the_provider_away_as_long_as_its_host_has_the_keys(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        vm = await world.encrypted()
        key_id = (await world.row()).key_id
        await world.away()
        assert await start(world) is VmState.RUNNING
        assert not world.a.vault.handed_out
        await stop(world)
        world.a.vault.restart()
        with pytest.raises(VmLocked, match=f"vm1.*{key_id}.*home"):
            await start(world)
        await world.back()
        assert await start(world) is VmState.RUNNING
        assert world.a.vault.handed_out == [vm]

    with_world(tmp_path, story)


def test_a_file_that_was_changed_is_shown_refused_and_put_back(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        vm = await world.encrypted()
        good = world.a.vault.files[vm]
        world.a.vault.files[vm] = good.replace(b'memory = "64MiB"', b'memory = "65MiB"')
        for _ in range(2):
            with pytest.raises(VmTampered, match="65MiB") as refused:
                await start(world)
        assert "restore-config vm1" in refused.value.todo
        sight = await world.sight()
        assert sight.state == "tampered"
        assert any(line.startswith("-") and "64MiB" in line for line in sight.lines)
        assert any(line.startswith("+") and "65MiB" in line for line in sight.lines)
        assert len(await world.happened("vm.tampered")) == 1
        # That takes no key, and neither does putting it back.
        world.services.inventory.keys._judged.clear()
        await world.away()
        with pytest.raises(VmTampered):
            await start(world)
        assert await restore(world) is Restored.RESTORED
        assert world.a.vault.files[vm] == good
        assert (await world.sight()).state == "ok"
        assert await start(world) is VmState.RUNNING
        await world.back()
        del world.a.vault.files[vm]
        sight = await world.sight()
        assert sight.state == "tampered"
        assert "is missing" in sight.message
        with pytest.raises(VmTampered, match="is missing"):
            await start(world)
        assert await restore(world) is Restored.RESTORED
        assert await restore(world) is Restored.UNCHANGED
        assert len(await world.happened("vm.config_restored")) == 2

    with_world(tmp_path, story)


def test_an_older_copy_is_no_good_and_a_newer_one_is_taken_over(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        vm = await world.encrypted()
        older, older_row = world.a.vault.files[vm], await world.row()
        await world.provide("other")
        await world.rekey(provider="home")
        between = world.a.vault.files[vm]
        world.a.vault.files[vm] = older
        with pytest.raises(VmTampered):
            await start(world)
        assert (await world.sight()).state == "tampered"
        await restore(world)
        assert world.a.vault.files[vm] == between
        await world.rekey(provider="other")
        newer, row = world.a.vault.files[vm], await world.row()
        await put_back(world, older_row)  # the controller's database, from a backup
        assert (await world.sight()).state == "tampered"
        await world.away("other")
        with pytest.raises(VmLocked, match="claims to be newer"):
            await restore(world)
        assert world.a.vault.files[vm] == newer
        await world.back("other")
        assert await restore(world) is Restored.ADOPTED
        assert world.a.vault.files[vm] == newer
        now = await world.row()
        assert (now.config_file, now.provider, now.key_id, now.generation) == (newer, "other", row.key_id, 3)
        assert await start(world) is VmState.RUNNING
        await stop(world)
        # A forgery that claims to be newer, under a key that is there.
        world.a.vault.files[vm] = newer.replace(b"generation = 3", b"generation = 9")
        await restore(world)
        assert world.a.vault.files[vm] == newer

    with_world(tmp_path, story)


async def put_back(world: World, row: VmRow) -> None:
    """The database as it was with ``row``."""
    async with world.services.events.transaction() as session:
        now = await session.get_one(VmRow, row.uuid)
        for name in ("encrypted", "config", "config_file", "provider", "key_id", "generation"):
            setattr(now, name, getattr(row, name))


def test_a_controller_that_forgot_the_encryption_learns_it_again(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.define()
        before = await world.row()
        await world.finished(await world.encrypt())
        key_id = (await world.row()).key_id
        async with world.services.events.transaction() as session:
            now = await session.get_one(VmRow, before.uuid)
            now.migrate_encryption, now.setting_before = "opportunistic", None
        await put_back(world, before)
        assert not (await world.shown()).encrypted
        with pytest.raises(SealiftError):
            await start(world)
        await restore(world)
        shown = await world.shown()
        assert (shown.encrypted, shown.migrate_encryption.value) == (True, "required")
        assert (await world.row()).key_id == key_id
        assert await start(world) is VmState.RUNNING

    with_world(tmp_path, story)


def test_a_vm_in_clear_has_no_file_to_restore(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.define(running=True)
        with pytest.raises(Conflict, match="not encrypted"):
            await restore(world)
        with pytest.raises(Conflict, match="not encrypted"):
            await world.rekey()

    with_world(tmp_path, story)


def test_a_shallow_rekey_of_a_vm_that_runs(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        vm = await world.encrypted(running=True)
        old, held = await world.row(), dict(world.a.vault.held[vm])
        await world.provide("other")
        row = await world.rekey(provider="other")
        assert (row.state, row.deep, row.provider, row.old_provider, row.old_key_id) == (
            "done",
            False,
            "other",
            "home",
            old.key_id,
        )
        [finding] = row.findings
        assert f"old key {old.key_id}" in finding["text"]
        assert "not locked out" in finding["text"]
        now = await world.row()
        assert (now.provider, now.key_id, now.generation) == ("other", row.key_id, 2)
        assert now.config_file == world.a.vault.files[vm] != old.config_file
        deks, _ = await world.services.inventory.keys.deks(now)
        assert {dek_id: dek.reveal() for dek_id, dek in deks.items()} == held == world.a.vault.held[vm]
        assert await world.key_state(old.key_id or "") is KeyState.ACTIVE, "the old key is left to its owner"
        await world.services.providers.remove("home", force=False, asked_by="ann")
        await stop(world)
        world.a.vault.restart()
        assert await start(world) is VmState.RUNNING
        assert (
            await world.services.encryption.rekey(
                "vm1", None, deep=False, verify="sample", dry_run=True, asked_by="ann"
            )
        ).state == "planned"

    with_world(tmp_path, story)


def test_a_rekey_that_the_host_refuses_does_not_answer_or_that_a_restart_cut_off(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        vm = await world.encrypted(running=True)
        before = await world.row()
        world.a.vault.refuse = Conflict("not now")
        with pytest.raises(Conflict, match="not now"):
            await world.rekey()
        world.a.vault.refuse = None
        await world.services.encryption.idle()
        assert world.a.vault.newest[vm] == 1, "a file under a destroyed key is not sent again"
        [failed, _] = await world.services.conversions.all()
        assert (failed.state, failed.error) == ("failed", "not now")
        assert await world.key_state(failed.key_id) is KeyState.DESTROYED
        assert (await world.row()).config_file == before.config_file == world.a.vault.files[vm]
        for way in ({"lose": {"file"}}, {"drop": {"file"}}):
            vars(world.a.vault).update(way)
            with pytest.raises(HostUnreachable):
                await world.rekey()
            row = (await world.services.conversions.all())[0]
            assert row.finished_at is None
            vars(world.a.vault).update({"lose": set(), "drop": set()})
            assert (await world.finished(row)).state == "done"
            assert (await world.row()).config_file == world.a.vault.files[vm]
        row = await begun(world)
        await world.restart()
        assert (await world.finished(row)).state == "done"
        now = await world.row()
        assert (now.key_id, now.config_file) == (row.key_id, world.a.vault.files[vm])
        assert now.generation == 4

    with_world(tmp_path, story)


def test_a_rekey_that_meets_a_defect_is_settled_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(world: World) -> None:
        vm = await world.encrypted(running=True)
        promote, failures = Conversions.promote, 3

        async def broken_at_first(self: Conversions, *what: Any) -> ConversionRow:
            nonlocal failures
            failures -= 1
            if failures >= 0:
                raise RuntimeError("the disk of the database is full")
            return await promote(self, *what)

        monkeypatch.setattr(Conversions, "promote", broken_at_first)
        with pytest.raises(RuntimeError):
            await world.rekey()
        [row, _] = await world.services.conversions.all()
        assert (await world.finished(row)).state == "done"
        assert (await world.row()).config_file == world.a.vault.files[vm] == row.after_file

    with_world(tmp_path, story)


def test_a_file_whose_own_key_cannot_be_had_is_not_called_changed(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.encrypted()
        older = await world.row()
        await world.provide("other")
        newer = await world.rekey(provider="other")
        await put_back(world, older)
        await world.away("other")
        sight = await world.sight()
        assert sight.state == "locked"
        assert "+ generation = 2" in sight.lines
        for word in (newer.key_id, "key provider other", "cannot be had", "claims to be newer"):
            assert word in sight.message
        with pytest.raises(VmLocked, match=f"key {newer.key_id} of key provider other.*cannot be had"):
            await start(world)
        await world.services.keeper.look()
        assert not await world.happened("vm.tampered")
        assert len(await world.happened("vm.config_unclear")) == 1
        await world.back("other")
        sight = await world.sight()
        assert sight.state == "tampered"
        assert "newer" in sight.message
        world.services.inventory.keys._judged.clear()
        await (await world.services.providers.open("other")).destroy(newer.key_id)
        sight = await world.sight()
        assert sight.state == "locked"
        assert f"key {newer.key_id} of key provider other, which it names, is not there any more" in sight.message
        assert "move it away on the host" in sight.message
        with pytest.raises(VmLocked, match="move it away on the host"):
            await world.services.encryption.restore_config("vm1", asked_by="ann")

    with_world(tmp_path, story)


def test_a_host_that_is_ahead_of_the_record_has_no_changed_file(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        vm = await world.encrypted()
        world.a.vault.lose = {"file"}
        with pytest.raises(HostUnreachable):
            await world.rekey()
        [row, _] = await world.services.conversions.all()
        assert world.a.vault.files[vm] == row.after_file
        await world.away()
        sight = await world.sight()
        assert (sight.state, sight.message) == ("ok", "")
        await world.services.keeper.look()
        assert not await world.happened("vm.tampered")
        world.a.vault.lose = set()
        assert (await world.finished(row)).state == "done"

    with_world(tmp_path, story)


async def begun(world: World) -> ConversionRow:
    """A rekey whose controller died before the host had its file."""
    services = world.services
    wish = ConversionWish(ConversionKind.REKEY, False, "sample", "ann")
    tools = ConversionTools(services.conversions, services.inventory, world.pace)
    async with services.inventory.turn("vm1") as (vm, host):
        return await Rekeying(tools, services.providers).begin(wish, vm, host, None)


def test_a_tampered_vm_is_not_rekeyed(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        vm = await world.encrypted()
        world.a.vault.files[vm] = world.a.vault.files[vm].replace(b"vcpus = 1", b"vcpus = 2")
        with pytest.raises(VmTampered):
            await world.rekey()
        row = await world.rekey(deep=True)
        assert row.state == "refused"
        assert "vcpus = 2" in row.error
        assert ["vcpus = 2" in event.text for event in await world.happened("conversion.refused")] == [True, True]

    with_world(tmp_path, story)


def test_whatever_its_new_key_is_a_rekey_needs_the_present_one(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.encrypted(running=True)
        await world.provide("other")
        await world.services.providers.remove("home", force=True, asked_by="ann")
        for provider in (None, "other"):
            with pytest.raises(VmLocked, match=r"VM vm1 needs key .* of key provider home") as refused:
                await world.rekey(provider=provider)
            assert "add or import key provider home again" in refused.value.todo
        sight = await world.sight()
        assert sight.state == "ok", "its host has its keys, and it runs"
        assert "key provider home is not there any more" in sight.message

    with_world(tmp_path, story)


def test_moving_every_vm_off_a_provider(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        names = [f"vm{number}" for number in range(6)]
        for name in names:
            await world.define(name)
        await asyncio.gather(*[world.finished(await world.encrypt(name)) for name in names])
        await world.provide("other")
        del world.a.vms[(await world.row("vm3")).uuid]
        found = await world.services.encryption.rekey_many("home", "other", asked_by="ann")
        assert [each.vm for each in found] == names
        assert [each.vm for each in found if each.error] == ["vm3"]
        assert {each.provider for each in found if not each.error} == {"other"}
        for each in found:
            now = await world.row(each.vm)
            assert now.provider == ("home" if each.error else "other")
            assert each.error or (now.key_id == each.key_id != each.old_key_id)
        for source, target in (("home", "nowhere"), ("typo", "other")):
            with pytest.raises(NotFound):
                await world.services.encryption.rekey_many(source, target, asked_by="ann")

    with_world(tmp_path, story)


def test_deleting_it_takes_force_and_says_which_key_is_left(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        vm = await world.encrypted()
        key_id = (await world.row()).key_id
        world.b.vault.held[vm] = dict(world.a.vault.held[vm])
        with pytest.raises(Conflict, match="nobody can open them"):
            await world.services.inventory.delete_vm("vm1", force=False, asked_by="ann")
        assert vm in world.a.vms
        await world.services.inventory.delete_vm("vm1", force=True, asked_by="ann")
        assert vm not in {*world.a.vms, *world.a.vault.held, *world.b.vault.held}
        [event] = await world.happened("vm.deleted")
        assert f"key {key_id} stays at key provider home" in event.text
        assert await world.key_state(key_id or "") is KeyState.ACTIVE

    with_world(tmp_path, story)


def test_another_key_under_the_same_id_locks(tmp_path: Path) -> None:
    """A provider of the same name that is another one."""

    async def story(world: World) -> None:
        await world.encrypted()
        world.a.vault.restart()
        row = await world.row()
        other = await world.services.keyring.new_kek("home", row.uuid, row.name)
        async with world.services.events.transaction() as session:
            (await session.get_one(VmRow, row.uuid)).key_id = other[0]
        with pytest.raises(VmLocked, match="another key under the id"):
            await start(world)

    with_world(tmp_path, story)


def test_what_starts_is_what_was_authenticated(tmp_path: Path) -> None:
    """A file that is changed between the controller's look and the start is refused by the host."""

    async def story(world: World) -> None:
        vm = await world.encrypted()
        file = world.a.vault.files[vm]
        found, config = bundle.read(file)
        assert found.vm == vm
        world.a.vms[vm] = replace(world.a.vms[vm], config=replace(config, vcpus=2))
        await start(world)
        assert world.a.vms[vm].config.vcpus == 1

    with_world(tmp_path, story)
