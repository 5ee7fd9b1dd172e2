"""Encrypting, decrypting and deep-rekeying at the controller, against hosts whose conversions are scripted."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from doubles.vault import ConversionScript, failing, forms_of, straight, stuck
from sealift.controller import conversion_plan
from sealift.controller.conversion_plan import UNREADABLE, machine_uuid
from sealift.controller.inventory import Inventory
from sealift.controller.keyring import Keyring
from sealift.controller.link import AgentLink
from sealift.controller.models import ConversionRow
from sealift.controller.provider_ask import ProviderAsk
from sealift.domain.conversion import ConversionState, DiskFacts
from sealift.domain.policy import MigrateEncryption
from sealift.domain.vm import VmState
from sealift.errors import AlreadyExists, Conflict, DatastoreFull, HostUnreachable, NotFound
from sealift.keys import bundle
from sealift.keys.provider import KeyState
from sealift.secret import Secret
from support.encrypted_world import TOML, World, with_world

C = ConversionState


async def keys_of(world: World, name: str = "vm1") -> tuple[bytes, dict[UUID, bytes]]:
    """The KEK and the DEKs of a VM, in clear."""
    row = await world.row(name)
    kek, _ = await world.services.inventory.keys.kek(row)
    deks, _ = await world.services.inventory.keys.deks(row)
    return kek.reveal(), {dek_id: dek.reveal() for dek_id, dek in deks.items()}


def test_an_encryption_goes_all_the_way(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        vm = await world.define()
        fence = (await world.row()).fence
        row = await world.encrypt()
        assert (await world.shown()).conversion == row.id
        with pytest.raises(Conflict, match=rf"VM vm1 is being encrypted \({str(row.id)[:8]}\)") as refused:
            await world.services.inventory.start_vm("vm1", asked_by="ann")
        assert f"sealift conversion cancel {str(row.id)[:8]}" in refused.value.todo
        row = await world.finished(row)
        assert (row.state, row.kind, row.provider, row.done_bytes, row.total_bytes) == (
            "done",
            "encrypt",
            "home",
            1000,
            1000,
        )
        kek, deks = await keys_of(world)
        [(order, keys)] = world.a.vault.orders
        now = await world.row()
        assert (order.fence, now.fence, order.verify) == (fence + 1, fence + 1, "sample")
        assert keys == deks
        assert len(set(deks.values())) == 2
        assert order.config.deks == tuple(deks)
        file = order.file.encode("latin-1")
        found, config = bundle.read(file)
        assert (found.generation, found.provider, found.key_id, found.vm) == (1, "home", row.key_id, vm)
        assert config == order.config
        assert bundle.authentic(file, Secret(kek, length=32))
        assert now.config_file == world.a.vault.files[vm] == file
        assert await world.key_state(row.key_id) is KeyState.ACTIVE
        shown = await world.shown()
        assert (shown.encrypted, shown.conversion, shown.migrate_encryption) == (True, None, MigrateEncryption.REQUIRED)
        assert shown.migrate_encryption_before is MigrateEncryption.OPPORTUNISTIC
        sight = await world.sight()
        assert (sight.state, sight.provider, sight.key_id, sight.generation) == ("ok", "home", row.key_id, 1)
        assert not world.a.vault.conversions
        [event] = await world.happened("vm.encrypted")
        assert row.key_id in event.text

    with_world(tmp_path, story)


def test_decrypted_it_still_has_to_move_sealed_until_somebody_says_otherwise(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        vm = await world.encrypted()
        key_id = (await world.row()).key_id
        for setting in (MigrateEncryption.DISABLED, MigrateEncryption.OPPORTUNISTIC):
            with pytest.raises(Conflict, match="always moves sealed"):
                await world.services.inventory.set_policy("vm1", setting, asked_by="ann")
        await world.services.inventory.set_policy("vm1", MigrateEncryption.REQUIRED, asked_by="ann")
        world.b.vault.held[vm] = dict(world.a.vault.held[vm])  # it has been there once
        old = world.a.vault.held[vm]
        row = await world.finished(await world.decrypt())
        assert (row.state, row.old_key_id, row.key_id) == ("done", key_id, "")
        order, keys = world.a.vault.orders[-1]
        assert (order.file, order.config.deks, order.verify) == ("", (), "full")
        assert keys == old
        now = await world.row()
        assert (now.encrypted, now.config_file, now.provider, now.key_id) == (False, None, None, None)
        assert now.generation == 1
        assert vm not in world.b.vault.held
        shown = await world.shown()
        assert (shown.migrate_encryption.value, shown.encryption) == ("required", None)
        assert shown.migrate_encryption_before is MigrateEncryption.OPPORTUNISTIC
        await world.finished(await world.encrypt())
        assert (await world.row()).setting_before == "opportunistic"
        assert (await world.row()).generation == 2
        await world.finished(await world.decrypt())
        await world.services.inventory.set_policy("vm1", MigrateEncryption.DISABLED, asked_by="ann")
        assert (await world.shown()).migrate_encryption_before is None

    with_world(tmp_path, story)


def test_a_deep_rekey_has_new_keys_throughout(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        vm = await world.encrypted()
        kek, deks = await keys_of(world)
        key_id = (await world.row()).key_id
        await world.provide("other")
        world.b.vault.held[vm] = dict(deks)
        row = await world.finished(await world.rekey(provider="other", deep=True))
        assert (row.state, row.old_provider, row.old_key_id, row.provider) == ("done", "home", key_id, "other")
        new_kek, new_deks = await keys_of(world)
        assert new_kek != kek
        assert not set(deks) & set(new_deks)
        assert not set(deks.values()) & set(new_deks.values())
        assert world.a.vault.orders[-1][1] == {**deks, **new_deks}
        assert world.a.vault.held[vm] == new_deks
        assert vm not in world.b.vault.held
        assert (await world.row()).generation == 2
        assert "not locked out" not in (await world.happened("vm.rekeyed"))[0].text

    with_world(tmp_path, story)


def test_what_failed_when_it_was_decided_already_keeps_its_key(tmp_path: Path) -> None:
    """Somebody may have put the new image in place by hand."""

    async def story(world: World) -> None:
        await world.define()
        world.a.vault.script = failing(decided=True)
        row = await world.finished(await world.encrypt())
        assert row.state == "failed"
        assert await world.key_state(row.key_id) is KeyState.ACTIVE
        [event] = await world.happened("key.left_over")
        assert row.key_id in event.text

    with_world(tmp_path, story)


def test_what_fails_at_the_host_changes_nothing(tmp_path: Path) -> None:
    async def fails(world: World, begin: Callable[[], Awaitable[ConversionRow]]) -> None:
        before = vars(await world.row()).copy()
        row = await world.finished(await begin())
        assert (row.state, row.error_slug, row.todo) == ("failed", "datastore_full", "make room")
        assert row.error == "there is no room"
        now = vars(await world.row()).copy()
        assert {**before, "fence": 0, "_sa_instance_state": 0} == {**now, "fence": 0, "_sa_instance_state": 0}
        if row.key_id:
            assert await world.key_state(row.key_id) is KeyState.DESTROYED
        assert not world.a.vault.conversions
        assert (await world.happened("conversion.failed"))[-1].slug == "datastore_full"

    async def story(world: World) -> None:
        await world.define()
        world.a.vault.script = failing()
        await fails(world, world.encrypt)
        world.a.vault.script = straight
        await world.finished(await world.encrypt())
        world.a.vault.script = failing()
        await fails(world, world.decrypt)
        await fails(world, lambda: world.rekey(deep=True))
        assert await world.key_state((await world.row()).key_id or "") is KeyState.ACTIVE

    with_world(tmp_path, story)


def test_cancelled_by_a_person(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.define()
        world.a.vault.script = stuck()
        row = await world.encrypt()
        await world.services.encryption.cancel(row.id, asked_by="ann")
        row = await world.finished(row)
        assert (row.state, row.error_slug) == ("cancelled", "conversion_cancelled")
        assert await world.key_state(row.key_id) is KeyState.DESTROYED
        assert row.todo == "run `sealift vm encrypt vm1` again"
        with pytest.raises(Conflict, match="is over: cancelled; there is nothing to cancel"):
            await world.services.encryption.cancel(row.id, asked_by="ann")
        with pytest.raises(NotFound):
            await world.services.encryption.cancel(uuid4(), asked_by="ann")
        world.a.vault.script = stuck(C.SWAPPING)
        row = await world.encrypt()
        await world.until(row, lambda now: now.state == "swapping")
        with pytest.raises(Conflict, match="swapping"):
            await world.services.encryption.cancel(row.id, asked_by="ann")

    with_world(tmp_path, story)


def test_a_host_that_does_not_answer_is_told_of_until_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(world: World) -> None:
        await world.define()
        world.a.vault.script = stuck()
        encryption, asked = world.services.encryption, AgentLink.conversion
        row = await world.encrypt()
        await world.until(row, lambda now: encryption.report(row.id) is not None)
        assert encryption.silence(row.id) == ""
        looks = 0

        async def unanswered(link: AgentLink, conversion: UUID) -> None:
            nonlocal looks
            looks += 1
            raise HostUnreachable(f"host a did not answer, for the {looks}. time")

        monkeypatch.setattr(AgentLink, "conversion", unanswered)
        await world.until(row, lambda now: looks > 0)
        said = encryption.silence(row.id)
        assert re.match(r"host a does not answer since [-0-9]+ [:0-9]+ UTC; the controller asks again", said)
        await world.until(row, lambda now: looks > 2)
        assert encryption.silence(row.id) == said, "the same while it is the same silence"
        monkeypatch.setattr(AgentLink, "conversion", asked)
        await world.until(row, lambda now: not encryption.silence(row.id))

    with_world(tmp_path, story)


def test_an_answer_that_got_lost_and_an_order_that_did(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.define()
        world.a.vault.drop = {"convert"}
        row = await world.finished(await world.encrypt())
        assert (row.state, row.error_slug) == ("failed", "conversion_failed")
        assert "got lost" in row.error
        assert row.id in world.a.vault.ended_before, "it is refused should it still come"
        # That a host knows of no order is no proof that nothing is under its keys.
        assert await world.key_state(row.key_id) is KeyState.ACTIVE
        [event] = await world.happened("key.left_over")
        assert row.key_id in event.text
        world.a.vault.drop, world.a.vault.lose = set(), {"convert"}
        assert (await world.finished(await world.encrypt())).state == "done"

    with_world(tmp_path, story)


def test_an_order_that_the_host_refuses(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.define()
        world.a.vault.refuse = DatastoreFull("full since then", todo="make room")
        row = await world.finished(await world.encrypt())
        assert (row.state, row.error_slug, row.error, row.todo) == (
            "failed",
            "datastore_full",
            "full since then",
            "make room",
        )
        assert await world.key_state(row.key_id) is KeyState.DESTROYED
        assert not (await world.row()).encrypted

    with_world(tmp_path, story)


RESTARTS: dict[str, tuple[ConversionState, ConversionScript, str]] = {
    # VM: where its conversion stands when the controller ends, what its host goes on with, and how it must end.
    "copied-on": (C.COPYING, straight, "done"),
    "verified-on": (C.VERIFYING, lambda order: straight(order)[1:], "done"),
    "swapped-on": (C.SWAPPING, lambda order: straight(order)[2:], "done"),
    "done-meanwhile": (C.COPYING, lambda order: [{"state": C.DONE}], "done"),
    "failed-meanwhile": (C.COPYING, failing(), "failed"),
    "cancelled-by-nobody": (C.COPYING, failing(C.CANCELLED), "failed"),
}


def test_a_restart_of_the_controller_in_any_state_loses_nothing(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.a.vault.script = lambda order: stuck(RESTARTS[order.config.name][0])(order)
        rows = {}
        for name, (state, _, _) in RESTARTS.items():
            await world.define(name)
            row = rows[name] = await world.encrypt(name)
            await world.until(
                row, lambda now, state=state: now.state == state.value and now.id in world.a.vault.conversions
            )
        await world.services.close()
        for conversion in world.a.vault.conversions.values():
            conversion.script = RESTARTS[conversion.order.config.name][1](conversion.order)
        await world.begin()
        for name, (_, _, end) in RESTARTS.items():
            row = await world.finished(rows[name])
            assert row.state == end, name
            now = await world.row(name)
            assert now.encrypted == (end == "done")
            if end == "done":
                assert now.config_file == world.a.vault.files[now.uuid]
                assert (await world.services.inventory.start_vm(name, asked_by="ann")).status is not None
            else:
                assert await world.key_state(row.key_id) is KeyState.DESTROYED
        assert len(world.a.vault.orders) == len(RESTARTS), "an order is never sent again"

    with_world(tmp_path, story)


def test_a_restart_before_the_order_was_sent(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.define()
        world.a.vault.drop = {"convert"}
        row = await world.encrypt()
        await world.services.close()
        world.a.vault.drop = set()
        await world.begin()
        row = await world.finished(row)
        assert row.state == "failed"
        assert "restarted" in row.error
        assert not world.a.vault.orders
        assert (await world.finished(await world.encrypt())).state == "done"

    with_world(tmp_path, story)


def test_everything_against_it_at_once_and_nothing_was_made(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.define(running=True)
        await world.services.providers.add(ProviderAsk("raw", "native"), asked_by="ann")
        world.a.aes = False
        world.a.vault.images["/store/vm1-0"] = DiskFacts("", True, 1 << 30, 1 << 30, 1 << 29, "zfs", True)
        world.a.vault.images["/store/vm1-1"] = DiskFacts("", True, 1 << 30, 1 << 30, 1 << 29, "zfs", True, snapshots=2)
        for dry_run in (True, False):
            row = await world.services.encryption.encrypt(
                "vm1", "raw", verify="sample", dry_run=dry_run, asked_by="ann"
            )
            assert row.state == "refused"
            errors = [found["text"] for found in row.findings if found["severity"] == "error"]
            warnings = [found["text"] for found in row.findings if found["severity"] == "warning"]
            for words in ("vm1 is running", "2 internal snapshots", "512 MiB free", "never exported"):
                assert sum(words in text for text in errors) == 1, words
                assert words in row.error
            for words in ("does not shrink", "no AES instructions"):
                assert any(words in text for text in warnings), words
            assert not any("was in clear" in text for text in warnings), "nothing was made, so nothing remains"
        assert await world.services.conversions.all() == []
        assert (await world.row()).fence == 1
        assert not world.a.vault.orders
        await world.services.inventory.stop_vm("vm1", force=True, asked_by="ann")
        world.a.vault.images.clear()
        row = await world.services.encryption.encrypt("vm1", None, verify="sample", dry_run=True, asked_by="ann")
        assert (row.state, row.finished_at) == ("planned", None)
        await world.away()
        row = await world.services.encryption.encrypt("vm1", None, verify="sample", dry_run=True, asked_by="ann")
        assert row.state == "refused"
        assert "home" in row.error
        assert await world.services.conversions.all() == []

    with_world(tmp_path, story)


def test_the_vm_that_runs_the_controller_is_not_encrypted(tmp_path: Path) -> None:
    machine = uuid4()

    async def story(world: World) -> None:
        for name, line in (("c1", 'role = "controller"'), ("c2", f'uuid = "{machine}"')):
            text = TOML.format(name=name).replace("vcpus", f"{line}\nvcpus")
            await world.services.inventory.create_vm("a", text, asked_by="ann")
            row = await world.services.encryption.encrypt(name, None, verify="sample", dry_run=False, asked_by="ann")
            assert row.state == "refused"
            assert "could not unlock itself" in row.error

    with_world(tmp_path, story, machine=machine)


def test_this_machines_own_uuid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = tmp_path / "for-root-only", tmp_path / "copied"
    monkeypatch.setattr(conversion_plan, "MACHINE_UUIDS", places)
    monkeypatch.setattr(conversion_plan, "CPUINFO", tmp_path / "cpuinfo")
    assert machine_uuid() is None
    (tmp_path / "cpuinfo").write_text("model name\t: no hypervisor\nflags\t\t: fpu hypervisor_x aes\n")
    assert machine_uuid() is None, "it is no VM"
    (tmp_path / "cpuinfo").write_text("model name\t: a CPU\nflags\t\t: fpu hypervisor aes\n")
    assert machine_uuid() == UNREADABLE
    places[0].write_text("To be filled by O.E.M.\n")
    assert machine_uuid() == UNREADABLE
    places[1].write_text("5A1D0C0E-0000-4000-8000-0123456789AB\n")
    assert machine_uuid() == UUID("5a1d0c0e-0000-4000-8000-0123456789ab")


def test_a_plan_says_when_it_cannot_tell_whether_the_vm_runs_the_controller(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.define()
        row = await world.services.encryption.encrypt("vm1", None, verify="sample", dry_run=True, asked_by="ann")
        assert row.state == "planned"
        assert any("could not be checked whether VM vm1 runs this very controller" in f["text"] for f in row.findings)

    with_world(tmp_path, story, machine=UNREADABLE)


async def create(world: World, text: str) -> str:
    """Create a VM that is to be encrypted; the state of its record."""
    row = await world.services.encryption.create("a", text, None, verify="sample", asked_by="ann")
    return row.state if row.finished_at is not None else (await world.finished(row)).state


def test_created_encrypted_or_not_at_all(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        text = TOML.format(name="vm1").replace('format = "raw"', 'format = "raw"\nsize = "1GiB"')
        world.a.vault.images["/store/vm1-0"] = DiskFacts("", free_bytes=8 << 30, filesystem="ext4")
        world.a.vault.script = failing()
        assert await create(world, text) == "failed"
        assert not world.a.vms
        with pytest.raises(NotFound):
            await world.row()
        assert "was removed" in (await world.happened("conversion.failed"))[0].text
        world.a.vault.script = straight
        assert await create(world, text) == "done"
        vm = (await world.row()).uuid
        assert world.a.vault.made_by_conversion == {vm: True} | dict.fromkeys(world.a.vault.made_by_conversion, True)
        assert (await world.sight()).state == "ok"
        assert (await world.services.inventory.start_vm("vm1", asked_by="ann")).status is not None
        with pytest.raises(AlreadyExists):
            await create(world, text)
        world.a.vault.images["/store/vm2-0"] = DiskFacts("", block_device=True, exists=True)
        assert await create(world, TOML.format(name="vm2")) == "refused"
        assert len(world.a.vms) == 1

    with_world(tmp_path, story)


def test_a_definition_that_the_host_refuses_or_does_not_answer(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        other = uuid4()
        world.a.run(replace(world.a.vms[await world.define("x")].config, uuid=other, name="theirs"))
        text = TOML.format(name="vm1").replace("vcpus", f'uuid = "{other}"\nvcpus')
        with pytest.raises(AlreadyExists):
            await create(world, text)
        assert world.a.vms[other].state is VmState.RUNNING
        await world.services.encryption.idle()
        [row] = await world.services.conversions.all()
        assert (row.state, row.error_slug) == ("failed", "already_exists")
        assert await world.key_state(row.key_id) is KeyState.DESTROYED
        world.a.vault.lose = {"define"}
        with pytest.raises(HostUnreachable):
            await create(world, TOML.format(name="vm1"))
        world.a.vault.lose = set()
        row = await world.finished((await world.services.conversions.all())[0])
        assert await world.key_state(row.key_id) is KeyState.DESTROYED, "its order was never sent"
        assert "vm1" not in {status.name for status in world.a.vms.values()}
        with pytest.raises(NotFound):
            await world.row()

    with_world(tmp_path, story)


def test_a_creation_goes_on_when_its_event_cannot_be_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(world: World) -> None:
        async def broken(self: Inventory, *told: str) -> None:
            raise RuntimeError("the disk of the database is full")

        monkeypatch.setattr(Inventory, "tell", broken)
        with pytest.raises(RuntimeError):
            await create(world, TOML.format(name="vm1"))
        [row] = await world.services.conversions.all()
        assert (await world.finished(row)).state == "done"
        assert (await world.sight()).state == "ok"

    with_world(tmp_path, story)


def test_what_a_restart_cut_off_after_the_end_is_taken_up_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(world: World) -> None:
        reached = asyncio.Event()

        async def hangs(self: Keyring, provider: str, key_id: str) -> None:
            reached.set()
            await asyncio.Event().wait()

        await world.define()
        world.a.vault.script = failing()
        with monkeypatch.context() as patched:
            patched.setattr(Keyring, "abandon", hangs)
            row = await world.encrypt()
            async with asyncio.timeout(10):
                await reached.wait()
            row = await world.services.conversions.get(row.id)
            assert row.state == "failed", "final before its key is destroyed"
            assert await world.key_state(row.key_id) is KeyState.ACTIVE
            await world.services.close()
        await world.begin()
        await world.services.encryption.idle()
        assert await world.key_state(row.key_id) is KeyState.DESTROYED
        assert not world.a.vault.conversions
        assert await world.services.conversions.open() == []
        assert not await world.happened("key.left_over")

    with_world(tmp_path, story)


def test_a_host_is_asked_to_forget_until_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(world: World) -> None:
        forget, asked = AgentLink.forget_conversion, 0

        async def silent_at_first(self: AgentLink, conversion: UUID) -> None:
            nonlocal asked
            asked += 1
            if asked < 3:
                raise HostUnreachable("host a did not answer")
            await forget(self, conversion)

        monkeypatch.setattr(AgentLink, "forget_conversion", silent_at_first)
        await world.encrypted()
        assert not world.a.vault.conversions
        assert await world.services.conversions.open() == []

    with_world(tmp_path, story)


def test_a_provider_that_is_removed_while_its_new_key_is_on_its_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(world: World) -> None:
        new_kek = Keyring.new_kek

        async def then_removed(self: Keyring, provider: str, vm: UUID, name: str) -> tuple[str, Secret]:
            made = await new_kek(self, provider, vm, name)
            await world.services.providers.remove(provider, force=True, asked_by="bob")
            return made

        await world.encrypted("vm2")
        await world.define()
        before = await world.row()
        monkeypatch.setattr(Keyring, "new_kek", then_removed)
        for name, begin in (("vm1", world.encrypt), ("vm2", world.rekey)):
            await world.provide("other")
            with pytest.raises(Conflict, match="key provider other was removed"):
                await begin(name, provider="other")
            assert (await world.services.conversions.open()) == []
        assert len(await world.services.conversions.all()) == 1
        assert (await world.row()).fence == before.fence

    with_world(tmp_path, story)


def test_no_key_is_left_anywhere(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """In no file of the controller but the provider's own, in no log, no event, no answer."""
    keys: list[bytes] = []
    texts: list[str] = []

    async def story(world: World) -> None:
        await world.encrypted(running=True)
        keys.extend([(await keys_of(world))[0], *(await keys_of(world))[1].values()])
        await world.rekey()
        await world.services.inventory.stop_vm("vm1", force=True, asked_by="ann")
        await world.finished(await world.rekey(deep=True))
        keys.extend([(await keys_of(world))[0], *(await keys_of(world))[1].values()])
        world.a.vault.restart()
        await world.services.keeper.look()
        world.a.vault.script = failing()
        await world.finished(await world.decrypt())
        world.a.vault.drop = {"convert"}
        row = await world.finished(await world.decrypt())
        texts.append(repr(row) + repr(vars(await world.row())) + (await world.shown()).model_dump_json())
        texts.extend(event.text for event in await world.services.events.after(0))

    with caplog.at_level(logging.DEBUG):
        with_world(tmp_path, story)
    out = capfd.readouterr()
    spoken = "\n".join([*texts, caplog.text, out.out, out.err]).encode()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "controller.db" for path in files)
    assert len(set(keys)) == 6
    for key in keys:
        for form in forms_of(key):
            assert form not in spoken
            for path in files:
                assert form not in path.read_bytes(), path


def test_the_keys_of_an_order_are_wiped_when_it_was_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Secret] = []

    async def story(world: World) -> None:
        convert = AgentLink.convert

        async def seen(self: AgentLink, order: object, deks: dict[UUID, Secret]) -> object:
            sent.extend(deks.values())
            return await convert(self, order, deks)  # type: ignore[arg-type]

        monkeypatch.setattr(AgentLink, "convert", seen)
        await world.encrypted()
        await world.finished(await world.rekey(deep=True))

    with_world(tmp_path, story)
    assert len(sent) == 6
    for dek in sent:
        with pytest.raises(ValueError, match="wiped"):
            dek.reveal()


def test_many_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        names = [f"vm{number}" for number in range(4)]
        for name in names:
            await world.define(name)
        rows = await asyncio.gather(*(world.encrypt(name) for name in names))
        assert {(await world.finished(row)).state for row in rows} == {"done"}
        assert len({(await world.row(name)).key_id for name in names}) == 4

    with_world(tmp_path, story)
