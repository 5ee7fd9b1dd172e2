"""A key between its making and its record: whatever interrupts that, no key is left without a word."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sealift.controller.models import ConversionRow
from sealift.errors import Conflict, ProviderRefused
from sealift.keys.native import NativeProvider
from sealift.keys.provider import KeyState
from support.controllers import FAST
from support.encrypted_world import World, with_world


class Died(BaseException):
    """What a controller that is killed just there does: nothing more."""


def unused_keys(world: World) -> list[tuple[str, str]]:
    """Id and state of the keys at provider home that no VM has, newest last."""
    with contextlib.closing(sqlite3.connect(world.state / "providers" / "home" / "keys.db")) as book:
        keys: list[tuple[str, str]] = book.execute("SELECT key_id, state FROM keys ORDER BY rowid").fetchall()
    with contextlib.closing(sqlite3.connect(world.state / "controller.db")) as db:
        used = {key_id for (key_id,) in db.execute("SELECT key_id FROM vms")}
    return [(key_id, state) for key_id, state in keys if key_id not in used]


async def prepared(world: World, shallow: bool) -> Callable[[], Awaitable[ConversionRow]]:
    """A VM, and what makes a new key for it."""
    if shallow:
        await world.encrypted()
        return world.rekey
    await world.define()
    return world.encrypt


async def die(*_: object, **__: object) -> ConversionRow:
    """Stands for what a controller does when it is killed."""
    raise Died


async def die_before_the_record(world: World, *, shallow: bool) -> None:
    """Make a key for a VM, and die before anything but its label is written down."""
    begin = await prepared(world, shallow)
    world.services.conversions.begin = die  # type: ignore[method-assign]
    world.services.keyring.give_up = die  # type: ignore[method-assign, assignment]
    with pytest.raises(Died):
        await begin()


@pytest.mark.parametrize("shallow", [False, True], ids=["encrypt", "shallow rekey"])
def test_a_controller_that_dies_before_the_record_tells_of_the_key_when_it_is_back(
    shallow: bool, tmp_path: Path
) -> None:
    async def story(world: World) -> None:
        await die_before_the_record(world, shallow=shallow)
        [(key_id, _)] = unused_keys(world)
        await world.restart()
        event = await world.tell("key.left_over")
        assert key_id in event.text
        assert event.vm == "vm1"
        await world.restart()
        await world.services.keyring.settle()
        assert len(await world.happened("key.left_over")) == 1
        # The new life goes on as if nothing had been.
        assert (await world.finished(await (world.rekey() if shallow else world.encrypt()))).state == "done"

    with_world(tmp_path, story)


def test_a_provider_that_is_away_then_is_asked_again(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await die_before_the_record(world, shallow=False)
        await world.away()
        await world.restart()
        await world.services.keyring.settle()
        assert await world.happened("key.left_over") == []
        await world.back()
        [(key_id, _)] = unused_keys(world)
        assert key_id in (await world.tell("key.left_over")).text

    with_world(tmp_path, story, pace=replace(FAST, probe_s=0.05))


@pytest.mark.parametrize("shallow", [False, True], ids=["encrypt", "shallow rekey"])
def test_whoever_is_cancelled_before_the_record_leaves_no_key(shallow: bool, tmp_path: Path) -> None:
    async def story(world: World) -> None:
        begin = await prepared(world, shallow)
        reached = asyncio.Event()

        async def wait(*_: object, **__: object) -> ConversionRow:
            reached.set()
            await asyncio.Event().wait()
            raise AssertionError("unreachable")

        world.services.conversions.begin = wait  # type: ignore[method-assign]
        asking = asyncio.ensure_future(begin())
        await reached.wait()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await world.services.keyring.settle()
        [(_, state)] = unused_keys(world)
        assert state == KeyState.DESTROYED.value
        assert await world.happened("key.left_over") == []

    with_world(tmp_path, story)


def test_a_provider_that_refuses_to_look_for_the_key_is_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(self: NativeProvider, label: str) -> list[str]:
        raise ProviderRefused("it does not allow that")

    async def story(world: World) -> None:
        await die_before_the_record(world, shallow=False)
        monkeypatch.setattr(NativeProvider, "locate", refuse)
        await world.restart()
        assert "it does not allow that" in (await world.tell("key.left_over")).text

    with_world(tmp_path, story)


def test_a_key_whose_destruction_is_cut_off_is_destroyed_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(world: World) -> None:
        begin = await prepared(world, shallow=False)
        reached = asyncio.Event()

        async def refuse(*_: object, **__: object) -> ConversionRow:
            raise Conflict("the VM is gone")

        async def hang(self: NativeProvider, key_id: str) -> None:
            reached.set()
            await asyncio.Event().wait()

        world.services.conversions.begin = refuse  # type: ignore[method-assign]
        with monkeypatch.context() as patch:
            patch.setattr(NativeProvider, "destroy", hang)
            asking = asyncio.ensure_future(begin())
            await reached.wait()
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
        assert world.services.providers.fresh.vms_of("home") == set(), "nobody works on it"
        await world.services.keyring.settle()
        [(_, state)] = unused_keys(world)
        assert state == KeyState.DESTROYED.value

    with_world(tmp_path, story)
