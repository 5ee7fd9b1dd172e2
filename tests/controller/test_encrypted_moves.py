"""Moves of encrypted VMs: always sealed, planned with the keys in hand, the keys only to the target."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from sealift.controller import run
from sealift.controller.ledger import Ledger
from sealift.controller.models import MigrationRow, VmRow
from sealift.controller.planning import Planned, make_plan
from sealift.domain.move import Role
from sealift.domain.policy import MigrateEncryption
from sealift.errors import VmLocked
from sealift.keys.provider import KeyState
from support.encrypted_world import World, with_world
from support.moves import finished, wish


async def move(world: World, to: str) -> MigrationRow:
    """Move vm1; the record at its end."""
    row = await world.services.orchestrator.request(wish(to=to))
    return row if row.finished_at is not None else await finished(world.services, row.id)


def test_the_target_gets_the_keys_and_the_file_and_the_source_neither_key(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        vm = await world.encrypted(running=True)
        held, file = dict(world.a.vault.held[vm]), world.a.vault.files[vm]
        row = await move(world, "b")
        assert (row.state, row.protection) == ("done", "sealed")
        assert "the VM is encrypted" in row.reason
        assert [role for role, _ in world.a.orders + world.b.orders] == [Role.SOURCE, Role.TARGET]
        assert world.b.orders[0][1].file.encode("latin-1") == file
        assert world.a.vault.came_with_orders == [{}]
        assert world.b.vault.came_with_orders == [held]
        assert world.b.vault.held[vm] == held
        assert world.b.vault.files[vm] == file
        assert (await world.shown()).host == "b"
        assert (await world.sight()).state == "ok"
        dry = await world.services.orchestrator.rehearse(wish(to="a"))
        assert (dry.state, dry.protection, dry.findings) == ("planned", "sealed", [])

    with_world(tmp_path, story)


def test_it_never_moves_plain(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        vm = await world.encrypted(running=True)
        async with world.services.events.transaction() as session:  # whatever its row may say
            (await session.get_one(VmRow, vm)).migrate_encryption = MigrateEncryption.DISABLED.value
        world.b.sealed = False
        row = await move(world, "b")
        assert row.state == "refused"
        assert "the VM is encrypted" in row.error
        assert not world.a.orders + world.b.orders

    with_world(tmp_path, story)


def test_with_the_provider_away_it_moves_to_where_it_has_been_and_nowhere_else(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        vm = await world.encrypted(running=True)
        key_id = (await world.row()).key_id
        await world.away()
        row = await move(world, "b")
        assert (row.state, row.error_slug) == ("refused", "plan_refused")
        for word in (key_id or "?", "key provider home", "does not hold the keys"):
            assert word in row.error
        assert not world.a.orders + world.b.orders
        await world.back()
        assert (await move(world, "b")).state == "done"
        await world.away()
        row = await move(world, "a")
        assert row.state == "done"
        [finding] = row.findings
        assert finding["severity"] == "warning"
        for word in (key_id or "?", "key provider home", "holds the keys of its disks already"):
            assert word in finding["text"]
        assert world.a.vault.came_with_orders[-1] == {}
        assert len(world.a.vault.held[vm]) == 2

    with_world(tmp_path, story)


READABLE = (KeyState.PRE_ACTIVE, KeyState.ACTIVE, KeyState.DEACTIVATED, KeyState.COMPROMISED)
"""States in which a provider gives a key; what it encrypts may be decrypted (NIST SP 800-57 part 1)."""


@pytest.mark.parametrize("state", KeyState)
def test_a_vms_own_host_gets_its_keys_in_whatever_state_its_key_is_and_no_other_does(
    tmp_path: Path, state: KeyState
) -> None:
    readable, active = state in READABLE, state is KeyState.ACTIVE

    async def rehearsed(world: World) -> MigrationRow:
        row = await world.services.orchestrator.rehearse(wish(to="b"))
        for finding in row.findings:
            assert ("`sealift vm rekey vm1`" in finding["todo"]) is readable, finding
            assert ("until then the VM cannot be started" in finding["todo"]) is (not readable and bool(held)), finding
        return row

    async def story(world: World) -> None:
        vm = await world.encrypted(running=True)
        await world.provide("other")
        book = sqlite3.connect(world.state / "providers" / "home" / "keys.db")
        with book:
            book.execute("UPDATE keys SET state = ?", (state.value,))
        book.close()
        # Another host.
        assert (await rehearsed(world)).state == ("planned" if active else "refused")
        held.update(world.a.vault.held[vm])
        world.b.vault.held[vm] = held
        row = await rehearsed(world)
        assert (row.state, [finding["severity"] for finding in row.findings]) == (
            "planned",
            [] if active else ["warning"],
        )
        for finding in row.findings:
            assert (state.value if readable else "destroyed") in finding["text"]
        # Its own, while it runs and when it is to start.
        world.a.vault.restart()
        for _ in range(2):
            await world.services.keeper.look()
        assert (vm in world.a.vault.held) is readable
        await world.services.inventory.stop_vm("vm1", force=True, asked_by="ann")
        world.a.vault.restart()
        await world.services.keeper.look()
        assert (vm in world.a.vault.held) is readable
        message = (await world.sight()).message
        told = [event.text for event in await world.happened("vm.key_not_active")]
        if not readable:
            with pytest.raises(VmLocked):
                await world.services.inventory.start_vm("vm1", asked_by="ann")
            assert not told
            return
        await world.services.inventory.start_vm("vm1", asked_by="ann")
        assert told == ([] if active else [message])
        assert active or f"is {state.value}: no other host" in message
        # And a new key ends it.
        world.b.vault.held.clear()
        await world.rekey(provider="other")
        assert (await world.sight()).message == ""
        assert (await rehearsed(world)).findings == []

    held: dict[UUID, bytes] = {}
    with_world(tmp_path, story)


def test_a_tampered_vm_does_not_move(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        vm = await world.encrypted(running=True)
        world.a.vault.files[vm] = world.a.vault.files[vm].replace(b"vcpus = 1", b"vcpus = 2")
        row = await move(world, "b")
        assert row.state == "refused"
        assert "+ vcpus = 2" in row.error
        assert "`sealift vm restore-config vm1`" in row.todo
        assert not world.a.orders + world.b.orders

    with_world(tmp_path, story)


def test_a_plan_that_cannot_be_recorded_leaves_no_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[Planned] = []

    async def seen(*arguments: Any, **words: Any) -> Planned:
        planned.append(await make_plan(*arguments, **words))
        return planned[-1]

    step, broken = Ledger.step, True

    async def broken_at_first(self: Ledger, *arguments: Any, **words: Any) -> MigrationRow:
        nonlocal broken
        if broken:
            broken = False
            raise OSError("the disk of the database is full")
        return await step(self, *arguments, **words)

    async def story(world: World) -> None:
        await world.encrypted(running=True)
        monkeypatch.setattr(run, "make_plan", seen)
        monkeypatch.setattr(Ledger, "step", broken_at_first)
        assert (await move(world, "b")).state == "failed"

    with_world(tmp_path, story)
    [plan] = planned
    assert len(plan.deks) == 2
    for dek in plan.deks.values():
        with pytest.raises(ValueError, match="wiped"):
            dek.reveal()


def test_one_that_only_its_host_knows_to_be_encrypted_does_not_move(tmp_path: Path) -> None:
    """The controller's database is an older one, put back from a backup."""

    async def story(world: World) -> None:
        vm = await world.encrypted(running=True)
        async with world.services.events.transaction() as session:
            row = await session.get_one(VmRow, vm)
            row.encrypted, row.config_file, row.provider, row.key_id, row.generation = False, None, None, None, 0
            row.migrate_encryption = MigrateEncryption.DISABLED.value
        migration = await move(world, "b")
        assert migration.state == "refused"
        assert "the controller knows no keys of it" in migration.error
        assert not world.a.orders + world.b.orders

    with_world(tmp_path, story)
