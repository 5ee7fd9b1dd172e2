"""Encrypted VMs at an agent: their configuration file, their keys in memory, and their moves."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from doubles.hosts import Host, PlayedMoves, PlayedVm, World, secret
from sealift.agent.order_checks import file_in
from sealift.agent.vault import Vault
from sealift.agent.vm_files import sha256
from sealift.domain.deks import wipe
from sealift.domain.move import MoveOrder, MoveState
from sealift.domain.vm import Disk, VmConfig, VmState
from sealift.errors import (
    BundleInvalid,
    Conflict,
    HypervisorError,
    InvalidInput,
    KeysNotHeld,
    NotFound,
    QmpRefused,
    RelayGone,
    SealiftError,
    VmTampered,
)
from support.vm_files import file_of, keys

LIMIT_S = 10.0


class Scene:
    """An encrypted VM with two disks, and its file as it was written last."""

    def __init__(self, world: World, directory: Path) -> None:
        self.world = world
        disks = tuple(Disk(str(directory / name), "qcow2", uuid4()) for name in ("one", "two"))
        for disk in disks:
            Path(disk.path).touch()
        self.config = replace(world.config, disks=disks)
        self.keys = keys(*self.config.deks)
        self.file = file_of(self.config, 7)
        world.config, world.hardware = self.config, replace(world.hardware, config=self.config)
        world.file = self.file

    @property
    def vm(self) -> UUID:
        return self.config.uuid

    def order(self, **changes: Any) -> MoveOrder:
        return self.world.order(**changes)

    async def define(self, host: Host) -> None:
        await host.vms.define(self.config, file=self.file.decode("latin-1"), made_by_conversion=False)

    async def start(self, host: Host, file: bytes | None = None) -> None:
        await host.vms.start(self.vm, sha256(self.file if file is None else file))

    async def run_at_a(self) -> None:
        a = self.world.a
        await self.define(a)
        a.vault.hold(self.vm, self.keys)
        await self.start(a)

    def qemu_keys(self, host: str) -> list[dict[UUID, bytes]]:
        return [qemu.keys for qemu in self.world.qemus if qemu.host == host]

    @property
    def raw_keys(self) -> dict[UUID, bytes]:
        return {dek: key.reveal() for dek, key in self.keys.items()}


@pytest.fixture
def scene(world: World, tmp_path: Path) -> Scene:
    return Scene(world, tmp_path)


def play(scene: Scene, act: Callable[[], Awaitable[None]]) -> None:
    """Two hosts' agents; nothing runs yet."""

    async def main() -> None:
        await scene.world.a.boot()
        await scene.world.b.boot()
        try:
            async with asyncio.timeout(LIMIT_S):
                await act()
        finally:
            await scene.world.a.crash()
            await scene.world.b.crash()
        assert scene.world.wrongs == []

    asyncio.run(main())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - what is waited for is in many places
        await asyncio.sleep(0.001)


# the vault


@given(st.lists(st.tuples(st.sampled_from([UUID(int=1), UUID(int=2)]), st.sets(st.integers(1, 4), max_size=3))))
def test_a_vault_holds_what_was_handed_in_last(deeds: Sequence[tuple[UUID, set[int]]]) -> None:
    vault, model = Vault("a"), dict[UUID, set[UUID]]()
    for vm, numbers in deeds:
        handed = keys(*(UUID(int=number) for number in numbers))
        vault.hold(vm, handed)
        wipe(handed)  # the vault has its own
        model[vm] = {UUID(int=number) for number in numbers}
        for each, wanted in model.items():
            assert set(vault.held(each)) == wanted
            taken = vault.take(each, tuple(wanted))
            assert {dek: key.reveal() for dek, key in taken.items()} == {
                dek: key.reveal() for dek, key in keys(*wanted).items()
            }
            wipe(taken)  # copies too


def test_replaced_and_forgotten_keys_are_wiped() -> None:
    vault, vm = Vault("a"), uuid4()
    vault.hold(vm, keys(UUID(int=1)))
    [first] = vault._held[vm].values()
    vault.hold(vm, keys(UUID(int=2)))
    [second] = vault._held[vm].values()
    vault.close()
    for key in (first, second):
        with pytest.raises(ValueError, match="wiped"):
            key.reveal()
    assert vault.held(vm) == ()
    vault.hold(vm, keys(UUID(int=1)))
    with pytest.raises(KeysNotHeld, match=f"host a does not hold 1 of the 2 keys of VM {vm}"):
        vault.take(vm, (UUID(int=1), UUID(int=2)))


# starting


def test_a_vm_starts_from_the_file_that_the_order_names_with_the_keys_it_needs(scene: Scene) -> None:
    async def act() -> None:
        a = scene.world.a
        await scene.define(a)
        path = a.vms.files.path(scene.vm)
        assert (path.read_bytes(), path.stat().st_mode & 0o777) == (scene.file, 0o600)
        with pytest.raises(KeysNotHeld):
            await scene.start(a)
        assert scene.world.qemus == []
        a.vault.hold(scene.vm, scene.keys)
        shown = await a.vms.status(scene.vm)
        assert (shown.file.encode("latin-1"), set(shown.held)) == (scene.file, set(scene.keys))
        await scene.start(a)
        assert scene.qemu_keys("a") == [scene.raw_keys]
        await a.vms.stop(scene.vm, force=True)
        await a.crash()
        await a.boot()  # it has its file, and no keys
        assert (await a.vms.status(scene.vm)).held == ()
        with pytest.raises(KeysNotHeld):
            await scene.start(a)
        await a.vms.delete(scene.vm)
        assert not path.parent.exists()

    play(scene, act)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.write_bytes(path.read_bytes() + b"\n"), "was changed"),
        (lambda path: path.write_bytes(b""), "is missing"),
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(bytes(1 << 20)), "was changed"),
        (lambda path: (path.unlink(), path.mkdir()), "cannot read"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "cannot read"),
        (lambda path: (path.rename(path.with_name("x")), path.symlink_to("x")), "cannot read"),
    ],
    ids=["changed", "empty", "missing", "long", "a directory", "a pipe", "a link"],
)
def test_a_file_that_is_not_the_one_in_the_order_starts_nothing(
    scene: Scene, spoil: Callable[[Path], object], said: str
) -> None:
    async def act() -> None:
        a = scene.world.a
        await scene.define(a)
        a.vault.hold(scene.vm, scene.keys)
        spoil(a.vms.files.path(scene.vm))
        with pytest.raises(SealiftError, match=said) as raised:
            await scene.start(a)
        assert raised.value.todo
        assert [status.state for status in await a.vms.list()] == [VmState.STOPPED]  # it is shown all the same
        assert scene.world.qemus == []
        if said != "cannot read":
            assert isinstance(raised.value, VmTampered)
            await a.vms.put_file(scene.vm, scene.file.decode("latin-1"))  # restore-config
            await scene.start(a)

    play(scene, act)


def test_an_encrypted_vm_is_started_by_no_order_without_its_file_and_one_in_clear_by_none_with(scene: Scene) -> None:
    async def act() -> None:
        a = scene.world.a
        await scene.define(a)
        a.vault.hold(scene.vm, scene.keys)
        for file in ("", sha256(b""), sha256(file_of(scene.config, 7))):
            with pytest.raises(VmTampered, match="web"):
                await a.vms.start(scene.vm, file)
        plain = replace(scene.config, uuid=uuid4(), name="plain", disks=())
        await a.vms.define(plain, file="", made_by_conversion=False)
        with pytest.raises(InvalidInput, match="plain"):
            await a.vms.start(plain.uuid, sha256(scene.file))
        assert scene.world.qemus == []

    play(scene, act)


def test_a_vm_is_built_from_its_file_and_not_from_the_journal(scene: Scene) -> None:
    """Whoever changes the journal changes nothing: the file is what the controller vouches for."""

    async def act() -> None:
        a = scene.world.a
        await scene.define(a)
        a.vault.hold(scene.vm, scene.keys)
        a.vms._put(replace(a.vms.row(scene.vm), config=replace(scene.config, vcpus=99)))
        await scene.start(a)
        assert [qemu.config for qemu in scene.world.qemus] == [scene.config]

    play(scene, act)


# the file


def test_a_file_is_written_anew_while_the_vm_runs_and_never_an_older_one(scene: Scene) -> None:
    async def act() -> None:
        a = scene.world.a
        await scene.run_at_a()
        newer = file_of(replace(scene.config, vcpus=2), 8)
        shown = await a.vms.put_file(scene.vm, newer.decode("latin-1"))
        assert (shown.state, shown.config.vcpus, shown.file.encode("latin-1")) == (VmState.RUNNING, 2, newer)
        with pytest.raises(Conflict, match="generation 7"):
            await a.vms.put_file(scene.vm, scene.file.decode("latin-1"))
        await a.vms.put_file(scene.vm, newer.decode("latin-1"))  # again: an order that was repeated
        await a.crash()
        await a.boot()
        with pytest.raises(Conflict):
            await a.vms.put_file(scene.vm, scene.file.decode("latin-1"))
        await a.vms.stop(scene.vm, force=True)
        await a.vms.delete(scene.vm)
        with pytest.raises(Conflict):  # also when it is registered anew
            await scene.define(a)

    play(scene, act)


def test_files_that_do_not_fit_are_refused(scene: Scene) -> None:
    async def act() -> None:
        a = scene.world.a
        await scene.define(a)
        other = replace(scene.config, disks=(replace(scene.config.disks[0], dek=uuid4()),))
        bad: list[tuple[str, type[SealiftError]]] = [
            ("", BundleInvalid),
            ("\u20ac", InvalidInput),
            (scene.file[:-9].decode("latin-1"), BundleInvalid),
            (file_of(other, 9).decode("latin-1"), InvalidInput),
            (file_of(replace(scene.config, uuid=uuid4()), 9).decode("latin-1"), InvalidInput),
        ]
        for file, error in bad:
            with pytest.raises(error):
                await a.vms.put_file(scene.vm, file)
        assert a.vms.files.read(scene.vm) == scene.file
        for config, file in ((scene.config, ""), (replace(scene.config, vcpus=3), scene.file.decode("latin-1"))):
            with pytest.raises(InvalidInput):
                await scene.world.b.vms.define(config, file=file, made_by_conversion=False)
        with pytest.raises(NotFound):
            scene.world.b.vms.row(scene.vm)

    play(scene, act)


def test_a_disk_that_is_full_leaves_the_file_as_it_was(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    async def act() -> None:
        a = scene.world.a
        await scene.define(a)

        def fail(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("sealift.agent.vm_files.os.fsync", fail)
        with pytest.raises(SealiftError, match="No space left"):
            await a.vms.put_file(scene.vm, file_of(scene.config, 8).decode("latin-1"))
        monkeypatch.undo()
        assert sorted(path.name for path in a.vms.files.path(scene.vm).parent.iterdir()) == ["vm.toml"]
        assert a.vms.files.read(scene.vm) == scene.file
        await a.vms.put_file(scene.vm, scene.file.decode("latin-1"))

    play(scene, act)


# moves


def test_an_encrypted_vm_moves_with_its_file_and_keys_and_comes_back_without(scene: Scene) -> None:
    async def act() -> None:
        world, order = scene.world, scene.order()
        a, b = world.a, world.b
        await scene.run_at_a()
        await b.moves.take_target(order, secret(), scene.keys)
        assert not b.vms.files.path(scene.vm).exists()  # it is not this host's yet
        await a.moves.take_source(order, secret())
        for host in (a, b):
            await until(lambda host=host: host.moves.status(order.attempt).state is MoveState.DONE)  # type: ignore[misc]
        assert world.running() == ["b"]
        assert scene.qemu_keys("b") == [scene.raw_keys]
        assert b.vms.files.read(scene.vm) == scene.file
        assert (await b.vms.status(scene.vm)).held == scene.config.deks
        assert not a.vms.files.path(scene.vm).exists()
        assert set(a.vault.held(scene.vm)) == set(scene.keys)  # so that it can come back
        newer = file_of(scene.config, 8)
        await b.vms.put_file(scene.vm, newer.decode("latin-1"))
        ids = {"source": b.id, "source_name": "b", "target": a.id, "target_name": "a"}
        back = scene.order(fence=3, file=newer.decode("latin-1"), **ids)
        await a.moves.take_target(back, secret(), {})
        assert scene.qemu_keys("a")[-1] == scene.raw_keys
        await a.moves.abort(back.attempt)
        assert set(a.vault.held(scene.vm)) == set(scene.keys)

    play(scene, act)


def test_a_target_without_the_keys_refuses_before_anything_begins(scene: Scene) -> None:
    async def act() -> None:
        b = scene.world.b
        with pytest.raises(KeysNotHeld, match="host b"):
            await b.moves.take_target(scene.order(), secret(), {})
        assert scene.world.qemus == []
        assert b._journal.moves() == []
        assert b.vms.busy == set()

    play(scene, act)


@pytest.mark.parametrize("had", [False, True], ids=["had no keys", "had the keys"])
@pytest.mark.parametrize("when", ["relay", "listen", "aborted", "revoked"])
def test_a_move_that_fails_leaves_no_file_and_no_key_that_came_with_it(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, when: str, had: bool
) -> None:
    async def act() -> None:
        a, b = scene.world.a, scene.world.b
        if had:
            b.vault.hold(scene.vm, scene.keys)
        await scene.run_at_a()
        order = scene.order()

        async def fail(*_: Any) -> Any:
            raise RelayGone("it ended") if when == "relay" else HypervisorError("no such channel")

        if when in ("relay", "listen"):
            owner, name = (PlayedMoves, "_start_relay") if when == "relay" else (PlayedVm, "listen")
            monkeypatch.setattr(owner, name, fail)
            with pytest.raises(SealiftError):
                await b.moves.take_target(order, secret(), scene.keys)
            monkeypatch.undo()
        else:
            await b.moves.take_target(order, secret(), scene.keys)
            if when == "revoked":
                scene.world.qemus[-1].cont_error = QmpRefused("no")
                await a.moves.take_source(order, secret())
            else:
                await b.moves.abort(order.attempt)
            await until(lambda: b.moves.status(order.attempt).state is MoveState.FAILED)
        assert not b.vms.files.path(scene.vm).exists()
        assert (set(b.vault.held(scene.vm)) == set(scene.keys)) is had
        assert b.vault.held(scene.vm) == () or had
        if when == "revoked":
            await until(lambda: scene.world.running() == ["a"])
        assert a.vms.files.read(scene.vm) == scene.file

    play(scene, act)


def test_an_agent_restarted_in_a_move_takes_the_vm_in_without_keys(scene: Scene) -> None:
    """Its QEMU has them already, and the file is in the journal's order."""

    async def act() -> None:
        world, order = scene.world, scene.order()
        await scene.run_at_a()
        await world.b.moves.take_target(order, secret(), scene.keys)
        await world.b.crash()
        await world.b.boot()
        assert world.b.vault.held(scene.vm) == ()
        await world.a.moves.take_source(order, secret())
        for host in (world.a, world.b):
            await until(lambda host=host: host.moves.status(order.attempt).state is MoveState.DONE)  # type: ignore[misc]
        assert world.running() == ["b"]
        assert world.b.vms.files.read(scene.vm) == scene.file
        assert world.b.vms.row(scene.vm).config == scene.config

    play(scene, act)


def test_orders_that_contradict_themselves_are_refused(scene: Scene) -> None:
    async def act() -> None:
        a, b = scene.world.a, scene.world.b
        await scene.run_at_a()
        other_keys = replace(scene.config, disks=tuple(replace(disk, dek=uuid4()) for disk in scene.config.disks))
        for order in (
            scene.order(file=""),
            scene.order(file="[encryption]"),
            scene.order(file=file_of(other_keys, 9).decode("latin-1")),
            scene.order(file=file_of(replace(scene.config, uuid=uuid4()), 9).decode("latin-1")),
            scene.order(protection="plain"),
        ):
            with pytest.raises((InvalidInput, BundleInvalid)):
                await b.moves.take_target(order, secret(), scene.keys)
        with pytest.raises(InvalidInput, match="plain text"):  # P5, at the source too
            await a.moves.take_source(scene.order(protection="plain"), secret())
        clear = replace(scene.world.hardware, config=replace(scene.config, disks=()))
        with pytest.raises(InvalidInput, match="encrypted here"):  # whatever the order says of its disks
            await a.moves.take_source(scene.order(protection="plain", hardware=clear, file=""), secret())
        for other in (clear, replace(scene.world.hardware, machine="pc-q35-7.1")):
            with pytest.raises(InvalidInput, match="hardware is not that"):
                await a.moves.take_source(scene.order(hardware=other), secret())
        assert (a._journal.moves(), a.vms.busy) == ([], set())
        b._journal.note_file(scene.vm, 8, "")
        with pytest.raises(Conflict, match="generation 7"):
            await b.moves.take_target(scene.order(), secret(), scene.keys)
        assert b.vault.held(scene.vm) == ()
        assert b._journal.moves() == []

    play(scene, act)


def test_an_order_for_a_vm_in_clear_has_no_file(scene: Scene) -> None:
    plain = VmConfig("plain", scene.vm, 1, 64 << 20)
    hardware = replace(scene.world.hardware, config=plain)
    assert file_in(scene.order(hardware=hardware, file="")) is None
    with pytest.raises(InvalidInput):
        file_in(scene.order(hardware=hardware))
