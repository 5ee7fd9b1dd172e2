"""The controller's settings, and the floor under every move: as rows, in events, and over the wire."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from doubles.agent import two_hosts
from sealift.controller.events import EventLog
from sealift.controller.services import Services
from sealift.controller.settings import ControllerSettings
from sealift.controller.store import open_store
from sealift.domain.policy import MigrateEncryption
from sealift.domain.settings import MIGRATION_FLOOR, SETTINGS, floor_of
from sealift.errors import InvalidInput, NotFound
from support.controllers import a_controller, make_state
from support.moves import finished, happened, running_vm, set_policy, wish

FLOORS = {
    "none": MigrateEncryption.DISABLED,
    "opportunistic": MigrateEncryption.OPPORTUNISTIC,
    "required": MigrateEncryption.REQUIRED,
}


def test_each_value_of_the_floor_means_something_to_the_policy() -> None:
    assert {value: floor_of(value) for value in SETTINGS[MIGRATION_FLOOR].meanings} == FLOORS
    assert SETTINGS[MIGRATION_FLOOR].default == "none"


def test_a_setting_lasts_and_each_change_is_told_once(tmp_path: Path) -> None:
    async def main() -> None:
        store = await open_store(tmp_path / "db")
        events = EventLog(store)
        settings = ControllerSettings(events)
        assert await settings.migration_floor() is MigrateEncryption.DISABLED
        for value in ("required", "required", "opportunistic"):
            now = await settings.set(MIGRATION_FLOOR, value, asked_by="ann")
            assert (now.name, now.value, now.meaning) == (
                MIGRATION_FLOOR,
                value,
                SETTINGS[MIGRATION_FLOOR].meanings[value],
            )
        with pytest.raises(InvalidInput) as refused:
            await settings.set(MIGRATION_FLOOR, "Required", asked_by="ann")
        assert "none, opportunistic, required" in refused.value.todo
        for name in ("migration-encryption-flor", ""):
            with pytest.raises(NotFound):
                await settings.set(name, "required", asked_by="ann")
            with pytest.raises(NotFound):
                await settings.get(name)
        told = [event.text for event in await events.after(0) if event.type == "setting.changed"]
        assert [text.partition(" by ann")[0] for text in told] == [
            f"{MIGRATION_FLOOR} was changed from none to required",
            f"{MIGRATION_FLOOR} was changed from required to opportunistic",
        ]
        await store.close()
        store = await open_store(tmp_path / "db")
        settings = ControllerSettings(EventLog(store))
        assert [now.value for now in await settings.list()] == ["opportunistic"]
        assert await settings.migration_floor() is MigrateEncryption.OPPORTUNISTIC
        await store.close()

    asyncio.run(main())


def test_no_vm_undercuts_the_floor_and_the_record_says_who_decided(tmp_path: Path) -> None:
    async def main() -> None:
        async with a_controller(make_state(tmp_path)) as services, two_hosts(services, tmp_path) as (a, b):
            await running_vm(services, a)
            await set_policy(services, MigrateEncryption.DISABLED)
            await floor(services, "required")
            row = await finished(services, (await services.orchestrator.request(wish())).id)
            assert (row.state, row.protection) == ("done", "sealed")
            assert row.reason.startswith("the floor of this controller is required (the VM's setting is disabled)")
            assert row.reason in (await told(services, "migration.sealed"))[-1]
            a.sealed = False
            await services.inventory.host("a")
            await services.inventory.accept("a", asked_by="ann")
            for ask in (services.orchestrator.request, services.orchestrator.rehearse):
                row = await ask(wish(to="a"))
                assert (row.state, row.protection) == ("refused", None)
                assert "the floor of this controller is required" in row.error
            assert len(a.orders) == len(b.orders) == 1
            await floor(services, "opportunistic")
            row = await services.orchestrator.rehearse(wish(to="a"))
            assert (row.state, row.protection) == ("planned", "plain")
            assert row.reason.startswith("the floor of this controller is opportunistic")
            assert "a cannot seal" in row.reason
            await floor(services, "none")
            row = await services.orchestrator.rehearse(wish(to="a"))
            assert (row.protection, row.reason) == ("plain", "the VM's setting is disabled")

    asyncio.run(main())


async def floor(services: Services, value: str) -> None:
    await services.settings_store.set(MIGRATION_FLOOR, value, asked_by="ann")


async def told(services: Services, kind: str) -> list[str]:
    return [event.text for event in await happened(services) if event.type == kind]
