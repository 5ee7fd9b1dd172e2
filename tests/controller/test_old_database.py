"""The controller's database put back from a backup that was taken during a conversion: nothing is lost by that."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from doubles.vault import straight, stuck
from sealift.controller.conversion_run import ConversionTools
from sealift.controller.conversions import ConversionWish
from sealift.controller.models import ConversionRow
from sealift.controller.rekey import Rekeying
from sealift.domain.conversion import ConversionKind, ConversionState
from sealift.domain.vm import VmState
from sealift.errors import Conflict, HostUnreachable, NotFound
from sealift.keys.provider import KeyState
from support.encrypted_world import TOML, World, with_world
from support.moves import finished, wish


def back_up(world: World) -> Path:
    """A copy of the database as it is now."""
    copy = world.state.parent / "backup.db"
    with (
        contextlib.closing(sqlite3.connect(world.state / "controller.db")) as source,
        contextlib.closing(sqlite3.connect(copy)) as target,
    ):
        source.backup(target)
    return copy


async def put_back(world: World, copy: Path) -> None:
    """Another life of the controller, with the database from the backup."""
    await world.services.close()
    for path in world.state.glob("controller.db*"):
        path.unlink()
    shutil.copy(copy, world.state / "controller.db")
    await world.begin()


async def move(world: World) -> None:
    """Move vm1 from a to b."""
    row = await world.services.orchestrator.request(wish(to="b"))
    assert (await finished(world.services, row.id)).state == "done"


async def copying(world: World, begin: Callable[[], Awaitable[ConversionRow]]) -> ConversionRow:
    """A conversion that is copying, of which a backup was taken then, and that is done since."""
    world.a.vault.script = stuck()
    row = await begin()
    await world.until(row, lambda now: now.id in world.a.vault.conversions)
    back_up(world)
    conversion = world.a.vault.conversions[row.id]
    conversion.script, world.a.vault.script = straight(conversion.order), straight
    row = await world.finished(row)
    assert row.state == "done"
    return row


async def created(world: World) -> ConversionRow:
    """The same of vm1, made with `vm create --encrypt`."""

    async def begin() -> ConversionRow:
        return await world.services.encryption.create(
            "a", TOML.format(name="vm1"), None, verify="sample", asked_by="ann"
        )

    return await copying(world, begin)


async def start(world: World) -> VmState | None:
    """Start vm1; its state then."""
    seen = await world.services.inventory.start_vm("vm1", asked_by="ann")
    return seen.status.state if seen.status else None


@pytest.mark.parametrize("answers", [True, False])
def test_one_that_was_created_encrypted_and_has_moved_since_is_kept_with_its_key(tmp_path: Path, answers: bool) -> None:
    async def story(world: World) -> None:
        row = await created(world)
        await start(world)
        await move(world)
        if not answers:
            with contextlib.closing(sqlite3.connect(tmp_path / "backup.db")) as database, database:
                database.execute("update hosts set address = '127.0.0.1:1' where name = 'b'")
        await put_back(world, tmp_path / "backup.db")
        row = await world.finished(row)
        assert row.state == "failed"
        assert await world.key_state(row.key_id) is KeyState.ACTIVE
        [event] = await world.happened("key.left_over")
        assert row.key_id in event.text
        assert row.vm in world.b.vms
        if not answers:
            assert (await world.row()).host == world.a.id, "nobody can say where it is"
            return
        assert (await world.row()).host == world.b.id, "it was found where it is"
        await world.services.encryption.restore_config("vm1", asked_by="ann")
        assert (await world.sight()).state == "ok"
        assert (await world.row()).key_id == row.key_id

    with_world(tmp_path, story)


@pytest.mark.parametrize("runs", [True, False])
def test_one_that_was_created_encrypted_and_is_where_it_was_is_known_again(tmp_path: Path, runs: bool) -> None:
    async def story(world: World) -> None:
        row = await created(world)
        if runs:
            await start(world)
        await put_back(world, tmp_path / "backup.db")
        row = await world.finished(row)
        assert row.state == "done"
        assert world.a.vms[row.vm].state is (VmState.RUNNING if runs else VmState.STOPPED)
        sight = await world.sight()
        assert (sight.state, sight.key_id) == ("ok", row.key_id)
        assert await world.key_state(row.key_id) is KeyState.ACTIVE
        assert await start(world) is VmState.RUNNING

    with_world(tmp_path, story)


def test_one_that_has_other_keys_since_is_kept_and_taken_over(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        row = await created(world)
        newer = await world.finished(await world.rekey(deep=True))
        await put_back(world, tmp_path / "backup.db")
        row = await world.finished(row)
        assert row.state == "failed"
        assert row.vm in world.a.vms
        assert await world.key_state(row.key_id) is KeyState.ACTIVE
        [event] = await world.happened("conversion.failed")
        assert "the VM is kept" in event.text
        await world.services.encryption.restore_config("vm1", asked_by="ann")
        assert (await world.row()).key_id == newer.key_id
        assert (await world.sight()).state == "ok"

    with_world(tmp_path, story)


def test_one_that_runs_in_clear_since_is_kept(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        row = await created(world)
        await world.finished(await world.decrypt())
        await start(world)
        await put_back(world, tmp_path / "backup.db")
        row = await world.finished(row)
        assert row.state == "failed"
        assert world.a.vms[row.vm].state is VmState.RUNNING
        assert not (await world.row()).encrypted
        world.a.vms[row.vm] = replace(world.a.vms[row.vm], state=VmState.STOPPED)
        await world.services.encryption.idle()
        assert row.vm in world.a.vms

    with_world(tmp_path, story)


def test_one_whose_host_has_seen_later_orders_is_kept(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        row = await created(world)
        await world.finished(await world.decrypt())
        await put_back(world, tmp_path / "backup.db")
        row = await world.finished(row)
        assert row.state == "failed"
        assert row.vm in world.a.vms
        assert (await world.row()).name == "vm1"

    with_world(tmp_path, story)


def test_one_that_was_never_more_than_defined_is_still_removed(tmp_path: Path) -> None:
    """No backup, but a controller that ended before it sent the order: to the host both look the same."""

    async def story(world: World) -> None:
        world.a.vault.drop = {"convert"}
        row = await world.services.encryption.create(
            "a", TOML.format(name="vm1"), None, verify="sample", asked_by="ann"
        )
        await world.restart()
        row = await world.finished(row)
        assert row.state == "failed"
        assert not world.a.vms
        assert await world.key_state(row.key_id) is KeyState.ACTIVE, "whether it was sent, the record does not say"
        with pytest.raises(NotFound):
            await world.row()

    with_world(tmp_path, story)


def test_an_encryption_that_is_done_since_is_known_again(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.define()
        row = await copying(world, world.encrypt)
        await put_back(world, tmp_path / "backup.db")
        assert (await world.finished(row)).state == "done"
        now = await world.row()
        assert (now.encrypted, now.key_id, now.config_file) == (True, row.key_id, row.after_file)
        assert await start(world) is VmState.RUNNING

    with_world(tmp_path, story)


async def begun(world: World) -> ConversionRow:
    """A shallow rekey that is recorded, and whose file was not sent yet; a backup was taken then."""
    services = world.services
    asked = ConversionWish(ConversionKind.REKEY, False, "sample", "ann")
    tools = ConversionTools(services.conversions, services.inventory, world.pace)
    async with services.inventory.turn("vm1") as (vm, host):
        row = await Rekeying(tools, services.providers).begin(asked, vm, host, None)
    back_up(world)
    return row


def test_a_shallow_rekey_of_one_that_has_moved_since_keeps_its_key(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.encrypted(running=True)
        row = await begun(world)
        await world.restart()
        assert (await world.finished(row)).state == "done"
        await move(world)
        assert world.b.vault.files[row.vm] == row.after_file
        await put_back(world, tmp_path / "backup.db")
        assert (await world.finished(row)).state == "failed"
        assert await world.key_state(row.key_id) is KeyState.ACTIVE
        [event] = await world.happened("key.left_over")
        assert row.key_id in event.text

    with_world(tmp_path, story)


@pytest.mark.parametrize("file", [b"", b"something else"])
def test_a_rekey_that_is_refused_while_the_file_is_not_that_from_before_keeps_its_key(
    tmp_path: Path, file: bytes
) -> None:
    async def story(world: World) -> None:
        vm = await world.encrypted(running=True)
        row = await begun(world)
        world.a.vault.files[vm], world.a.vault.refuse = file, Conflict("not now")
        services = world.services
        tools = ConversionTools(services.conversions, services.inventory, world.pace)
        host = await services.inventory.host_row("a")
        with pytest.raises(Conflict):
            await Rekeying(tools, services.providers).settle(row, services.inventory.link(host), first=True)
        assert (await services.conversions.get(row.id)).state == ConversionState.FAILED.value
        assert await world.key_state(row.key_id) is KeyState.ACTIVE
        assert await world.happened("key.left_over")

    with_world(tmp_path, story)


def test_a_rekey_that_is_refused_after_one_that_got_no_answer_keeps_its_key(tmp_path: Path) -> None:
    """The first order may still be on its way."""

    async def story(world: World) -> None:
        await world.encrypted(running=True)
        world.a.vault.drop = {"file"}
        with pytest.raises(HostUnreachable):
            await world.rekey()
        world.a.vault.refuse, world.a.vault.drop = Conflict("not now"), set()
        row = await world.finished((await world.services.conversions.all())[0])
        assert row.state == "failed"
        assert await world.key_state(row.key_id) is KeyState.ACTIVE

    with_world(tmp_path, story)


def test_a_host_that_lost_its_journal_and_has_the_new_images_is_believed(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        vm = await world.define()
        world.a.vault.script = stuck(ConversionState.SWAPPING)
        row = await world.encrypt()
        await world.until(row, lambda now: now.state == "swapping")
        [conversion] = world.a.vault.conversions.values()
        world.a.vms[vm] = replace(world.a.vms[vm], config=conversion.order.config)
        world.a.vault.conversions.clear()
        assert (await world.finished(row)).state == "done"
        assert await world.key_state(row.key_id) is KeyState.ACTIVE
        await world.services.encryption.restore_config("vm1", asked_by="ann")
        assert world.a.vault.files[vm] == row.after_file

    with_world(tmp_path, story)


def test_a_vm_that_only_its_host_knows_to_be_encrypted_keeps_its_keys(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        vm = await world.define()
        back_up(world)
        done = await world.finished(await world.encrypt())
        await put_back(world, tmp_path / "backup.db")
        said = "host a has VM vm1 encrypted, and the controller knows no keys of it"
        with pytest.raises(Conflict, match=said):
            await world.services.inventory.delete_vm("vm1", force=False, asked_by="ann")
        refused = await world.services.encryption.encrypt("vm1", None, verify="sample", dry_run=False, asked_by="ann")
        assert refused.state == "refused"
        assert said in refused.error
        for refused in (await world.decrypt(), await world.rekey(deep=True)):
            assert refused.error.startswith(said), "and not that it is in clear"
        with pytest.raises(Conflict, match=said):
            await world.rekey()
        assert vm in world.a.vms
        await world.services.encryption.restore_config("vm1", asked_by="ann")
        assert (await world.sight()).state == "ok"
        assert (await world.row()).key_id == done.key_id

    with_world(tmp_path, story)
