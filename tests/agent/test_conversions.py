"""Encrypting, decrypting and rekeying with real images: what is in them afterwards, what is refused, and a cancel."""

from __future__ import annotations

import asyncio
import os
import subprocess
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from uuid import UUID, uuid4

import pytest

from doubles.hosts import Fuse, Host, Killed, World
from doubles.images import PlayedImages, image, opened
from sealift.agent import conversions, new_images
from sealift.agent.conversion_plan import Step, check_room, plan
from sealift.agent.journal import VmRow
from sealift.agent.new_images import Place
from sealift.agent.vm_files import sha256
from sealift.domain.conversion import (
    CONVERSION_FINAL,
    ConversionKind,
    ConversionOrder,
    ConversionState,
    ConversionStatus,
    DiskFacts,
)
from sealift.domain.encryption_checks import needed_bytes
from sealift.domain.vm import Disk, VmConfig, VmState
from sealift.errors import (
    Conflict,
    ConversionFailed,
    DatastoreFull,
    InvalidInput,
    KeysNotHeld,
    NotFound,
    SealiftError,
    StaleFence,
)
from sealift.hypervisor.images import FileId, ImageRef, OnBytes
from support.converting import content_of, files_in, image_with
from support.vm_files import file_of, keys

LIMIT_S = 60.0
CONTENT = os.urandom(1 << 20) + bytes(3 << 20) + os.urandom(512)
FORMATS: tuple[Literal["qcow2", "raw"], ...] = ("qcow2", "raw")
ENCRYPT, DECRYPT = ConversionKind.ENCRYPT, ConversionKind.DECRYPT


class Gated(PlayedImages):
    """Played ones, whose copies wait until they may begin."""

    def __init__(self) -> None:
        super().__init__(Fuse())
        self._gate, self.waiting = asyncio.Event(), asyncio.Event()

    def open(self) -> None:
        self._gate.set()

    async def convert(self, source: ImageRef, target: ImageRef, on_bytes: OnBytes) -> FileId:
        self.waiting.set()
        await self._gate.wait()
        return await super().convert(source, target, on_bytes)


def play(world: World, scene: Callable[[Host], Awaitable[None]]) -> None:
    """A scene with host a's agent."""

    async def main() -> None:
        await world.a.boot()
        try:
            async with asyncio.timeout(LIMIT_S):
                await scene(world.a)
        finally:
            await world.a.conversions.close()
            await world.a.crash()

    asyncio.run(main())


def with_keys(config: VmConfig, *, encrypted: bool) -> VmConfig:
    """The same with new keys, or in clear."""
    return replace(config, disks=tuple(replace(disk, dek=uuid4() if encrypted else None) for disk in config.disks))


def order_for(after: VmConfig, kind: ConversionKind, *, generation: int, **changes: Any) -> ConversionOrder:
    file = file_of(after, generation).decode("latin-1") if after.deks else ""
    return replace(ConversionOrder(uuid4(), after.uuid, 2, kind, after, file, "full"), **changes)


async def ended(host: Host, order: ConversionOrder) -> ConversionStatus:
    """How a conversion that was taken ends."""
    await asyncio.wait([host.conversions._tasks[order.id]])
    status = host.conversions.status(order.id)
    assert status.state in CONVERSION_FINAL
    return status


async def seen(config: VmConfig) -> list[bytes]:
    """What a guest would see, with the keys that the configuration names."""
    return [
        await content_of(disk.path, disk.format, keys(disk.dek)[disk.dek] if disk.dek else None)
        for disk in config.disks
    ]


async def vm_in_clear(world: World, host: Host, directory: Path, form: Literal["qcow2", "raw"]) -> VmConfig:
    """A stopped VM with one image."""
    path = directory / f"disk.{form}"
    await image_with(path, form, CONTENT, None)
    config = replace(world.config, disks=(Disk(str(path), form),))
    await host.vms.define(config, file="", made_by_conversion=False)
    return config


async def gated_vm(world: World, host: Host, directory: Path) -> tuple[VmConfig, Gated]:
    """A stopped VM with one played image in clear, at a host whose copies wait."""
    images = Gated()
    host.images = lambda _: images
    await host.crash()
    await host.boot()
    path = directory / "disk"
    path.write_text(image("content", None))
    config = replace(world.config, disks=(Disk(str(path), "raw"),))
    await host.vms.define(config, file="", made_by_conversion=False)
    return config, images


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Where the images lie."""
    (tmp_path / "store").mkdir()
    return tmp_path / "store"


def test_a_vm_is_encrypted_and_decrypted(world: World, store: Path) -> None:
    async def scene(host: Host) -> None:
        plain = await vm_in_clear(world, host, store, "qcow2")
        vm, mode, owner = plain.uuid, 0o664, (4242, 4243) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
        for disk in plain.disks:
            os.chown(disk.path, *owner)
            os.chmod(disk.path, mode)
        now = plain
        for generation, kind in enumerate((ENCRYPT, DECRYPT), start=1):
            after = with_keys(plain, encrypted=kind is not DECRYPT)
            order = order_for(after, kind, generation=generation)
            before = [os.stat(disk.path).st_ino for disk in plain.disks]
            began = await host.conversions.take(order, keys(*now.deks, *after.deks))
            assert began.state is ConversionState.COPYING
            assert (await host.conversions.take(order, {})).id == order.id  # repeated: answered, not begun again
            status = await ended(host, order)
            assert (status.state, status.error) == (ConversionState.DONE, "")
            assert status.done_bytes == status.total_bytes == len(CONTENT)
            assert await seen(after) == [CONTENT]
            assert files_in(store) == ["disk.qcow2"]
            for disk, inode in zip(after.disks, before, strict=True):
                found = os.stat(disk.path)
                assert found.st_ino != inode
                # Who could read the encrypted image does not get one in clear.
                wanted = 0o660 if kind is DECRYPT else mode
                assert (found.st_mode & 0o7777, found.st_uid, found.st_gid) == (wanted, *owner)
                if kind is not DECRYPT:  # not with the keys of before, and nothing of the content is on the disk
                    assert CONTENT[:64] not in (store / "disk.qcow2").read_bytes()
                    with pytest.raises(SealiftError):
                        await content_of(disk.path, disk.format, next(iter(keys(uuid4()).values())))
            shown = await host.vms.status(vm)
            assert (shown.config, shown.state, shown.held) == (after, VmState.STOPPED, after.deks)
            assert shown.file == order.file
            path = host.vms.files.path(vm)
            assert path.exists() is bool(order.file)
            assert not order.file or path.stat().st_mode & 0o777 == 0o600
            now = after
        await host.crash()  # nothing of this was only in memory
        await host.boot()
        assert host.vms.row(vm).config == now

    play(world, scene)


def test_a_new_vm_is_encrypted_from_the_beginning_and_decrypted(world: World, store: Path) -> None:
    """No image in clear is ever there before somebody asks for one."""

    async def scene(host: Host) -> None:
        plain = replace(world.config, disks=(Disk(str(store / "disk"), "raw", size_bytes=4 << 20),))
        await host.vms.define(plain, file="", made_by_conversion=True)
        assert files_in(store) == []
        with pytest.raises(NotFound):
            await host.vms.start(plain.uuid, "")
        after = with_keys(plain, encrypted=True)
        order = order_for(after, ENCRYPT, generation=1)
        with pytest.raises(NotFound, match="mounted"):  # another VM's may lie on a datastore that is away
            await host.conversions.take(replace(order, id=uuid4()), keys(*after.deks))
        order = replace(order, is_new=True)
        await host.conversions.take(order, keys(*after.deks))
        assert (await ended(host, order)).state is ConversionState.DONE
        [before] = await seen(after)
        assert len(before) == 4 << 20
        started = await host.vms.start(plain.uuid, sha256(order.file.encode("latin-1")))
        assert started.state is VmState.RUNNING
        [qemu] = world.qemus
        assert qemu.keys == {dek: key.reveal() for dek, key in keys(*after.deks).items()}
        await host.vms.stop(plain.uuid, force=True)
        order = order_for(plain, DECRYPT, generation=1)
        await host.conversions.take(order, keys(*after.deks))
        assert (await ended(host, order)).state is ConversionState.DONE
        assert await seen(plain) == [before]
        assert (await host.vms.start(plain.uuid, "")).held == ()

    play(world, scene)


def test_images_of_a_vm_in_clear_are_made_when_it_is_defined(world: World, store: Path) -> None:
    async def scene(host: Host) -> None:
        disks = tuple(Disk(str(store / f"disk.{f}"), f, size_bytes=4 << 20) for f in FORMATS)
        (store / "disk.raw").write_bytes(b"somebody's" * 1024)
        config = replace(world.config, disks=disks)
        missing = replace(config, disks=(*disks[:1], Disk(str(store / "not there" / "disk"), "raw", size_bytes=512)))
        with pytest.raises(SealiftError):
            await host.vms.define(missing, file="", made_by_conversion=False)
        assert files_in(store) == ["disk.raw"]  # all or none
        await host.vms.define(config, file="", made_by_conversion=False)
        assert (store / "disk.raw").read_bytes() == b"somebody's" * 1024
        assert await content_of(disks[0].path, "qcow2", None) == bytes(4 << 20)

    play(world, scene)


def test_nothing_else_touches_the_vm_while_its_disks_are_converted(world: World, store: Path) -> None:
    async def scene(host: Host) -> None:
        plain, images = await gated_vm(world, host, store)
        after = with_keys(plain, encrypted=True)
        order = order_for(after, ENCRYPT, generation=1)
        await host.conversions.take(order, keys(*after.deks))
        await images.waiting.wait()
        vms, vm = host.vms, plain.uuid
        other = order_for(with_keys(plain, encrypted=True), ENCRYPT, generation=1)
        for refused in (
            lambda: vms.start(vm, ""),
            lambda: vms.delete(vm),
            lambda: vms.put_file(vm, order.file),
            lambda: host.conversions.take(other, keys(*other.config.deks)),
            lambda: host.moves.take_source(world.order(), None),  # type: ignore[arg-type]
        ):
            with pytest.raises(Conflict, match=str(order.id)):
                await refused()
        with pytest.raises(Conflict):
            await host.conversions.forget(order.id)
        images.open()
        assert (await ended(host, order)).state is ConversionState.DONE
        await host.conversions.forget(order.id)
        with pytest.raises(NotFound):
            host.conversions.status(order.id)
        with pytest.raises(Conflict, match="ended"):
            await host.conversions.take(order, keys(*after.deks))

    play(world, scene)


def test_a_cancelled_conversion_leaves_the_old_image_and_nothing_else(world: World, store: Path) -> None:
    async def scene(host: Host) -> None:
        plain, images = await gated_vm(world, host, store)
        inode = (store / "disk").stat().st_ino
        after = with_keys(plain, encrypted=True)
        for begun in (False, True):
            order = order_for(after, ENCRYPT, generation=1)
            await host.conversions.take(order, keys(*after.deks))
            if begun:
                await images.waiting.wait()
            status = await host.conversions.cancel(order.id)
            assert (status.state, status.error_slug) == (ConversionState.CANCELLED, "conversion_cancelled")
            assert (status.error, plain.name in status.todo) == ("it was cancelled; the old images are in place", False)
            assert files_in(store) == ["disk"]
            assert (store / "disk").stat().st_ino == inode
            assert (await host.vms.status(plain.uuid)).held == ()
        images.open()
        order = order_for(after, ENCRYPT, generation=1)
        await host.conversions.take(order, keys(*after.deks))
        assert (await ended(host, order)).state is ConversionState.DONE
        assert (await host.conversions.cancel(order.id)).state is ConversionState.DONE
        assert opened(store / "disk", next(iter(keys(*after.deks).values()))) == "content"
        late = order_for(after, ENCRYPT, generation=1)
        with pytest.raises(NotFound):
            await host.conversions.cancel(late.id)
        with pytest.raises(Conflict, match="ended"):
            await host.conversions.take(late, {})

    play(world, scene)


def test_an_image_that_was_changed_while_it_was_copied_is_not_replaced(world: World, store: Path) -> None:
    """Another host may have a VM with the same image, which no lock of this one tells of."""

    async def scene(host: Host) -> None:
        plain, images = await gated_vm(world, host, store)
        images.open()
        order = order_for(with_keys(plain, encrypted=True), ENCRYPT, generation=1)
        verify = images.verify

        async def verify_and_write(*refs: ImageRef, **words: Any) -> None:
            await verify(*refs, **words)
            (store / "disk").write_text(image("changed", None))

        images.verify = verify_and_write  # type: ignore[method-assign, assignment]
        await host.conversions.take(order, keys(*order.config.deks))
        status = await ended(host, order)
        assert (status.state, status.error_slug) == (ConversionState.FAILED, "conversion_failed")
        assert "was changed while it was copied" in status.error
        assert opened(store / "disk", None) == "changed"
        assert files_in(store) == ["disk"]

    play(world, scene)


def test_a_disk_is_one_vms_only(world: World, store: Path, tmp_path: Path) -> None:
    async def scene(host: Host) -> None:
        plain = await vm_in_clear(world, host, store, "raw")
        link = tmp_path / "link"
        link.symlink_to(plain.disks[0].path)
        for path in (plain.disks[0].path, str(link)):
            other = replace(plain, uuid=uuid4(), name="other", disks=(Disk(path, "raw"),))
            with pytest.raises(Conflict, match=r"disk .* is VM web's"):
                await host.vms.define(other, file="", made_by_conversion=False)
        await host.vms.delete(plain.uuid)
        await host.vms.define(other, file="", made_by_conversion=False)
        with pytest.raises(Conflict, match="other's"):
            await host.vms.define(plain, file="", made_by_conversion=False)

    play(world, scene)


class Hung:
    """A datastore that hangs in every removal until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        remove, self.free, self.reached = new_images.remove, threading.Event(), threading.Event()

        def hang(places: Sequence[Place]) -> None:
            self.reached.set()
            assert self.free.wait(LIMIT_S)
            remove(places)

        monkeypatch.setattr(new_images, "remove", hang)


def test_a_cancel_that_waits_keeps_nobody_waiting(world: World, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(host: Host) -> None:
        plain, images = await gated_vm(world, host, store)
        order = order_for(with_keys(plain, encrypted=True), ENCRYPT, generation=1)
        await host.conversions.take(order, keys(*order.config.deks))
        await images.waiting.wait()
        hung = Hung(monkeypatch)
        cancelling = asyncio.create_task(host.conversions.cancel(order.id))
        await asyncio.to_thread(hung.reached.wait)
        (store / "other").write_text(image("other", None))
        other = replace(plain, uuid=uuid4(), name="other", disks=(Disk(str(store / "other"), "raw"),))
        await host.vms.define(other, file="", made_by_conversion=False)
        images.open()
        second = order_for(with_keys(other, encrypted=True), ENCRYPT, generation=1)
        await host.conversions.take(second, keys(*second.config.deks))
        assert (await ended(host, second)).state is ConversionState.DONE
        assert not cancelling.done()
        hung.free.set()
        assert (await cancelling).state is ConversionState.CANCELLED

    play(world, scene)


def test_an_agent_comes_back_while_a_datastore_hangs(
    world: World, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene(host: Host) -> None:
        plain, images = await gated_vm(world, host, store)
        order = order_for(with_keys(plain, encrypted=True), ENCRYPT, generation=1)
        await host.conversions.take(order, keys(*order.config.deks))
        await images.waiting.wait()
        host.fuse.blown = True
        for task in host.conversions._tasks.values():
            task.cancel()  # as a death: with its fuse blown it journals nothing more
        await asyncio.gather(*host.conversions._tasks.values(), return_exceptions=True)
        await host.crash()
        hung = Hung(monkeypatch)
        await host.boot()
        assert host.conversions.status(order.id).state is ConversionState.COPYING
        with pytest.raises(Conflict, match=str(order.id)):
            await host.vms.start(plain.uuid, "")
        hung.free.set()
        assert (await ended(host, order)).state is ConversionState.FAILED

    play(world, scene)


def test_an_agent_ends_while_a_datastore_hangs(world: World, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(host: Host) -> None:
        plain, images = await gated_vm(world, host, store)
        order = order_for(with_keys(plain, encrypted=True), ENCRYPT, generation=1)
        await host.conversions.take(order, keys(*order.config.deks))
        await images.waiting.wait()
        hung = Hung(monkeypatch)
        monkeypatch.setattr(conversions, "_CLOSE_S", 0.01)
        await host.conversions.close()
        assert host.conversions.status(order.id).state is ConversionState.COPYING
        hung.free.set()  # what the next agent finds is settled by it
        await host.crash()
        await host.boot()
        assert (await ended(host, order)).state is ConversionState.FAILED

    play(world, scene)


def test_an_agent_that_ends_as_it_makes_an_image_leaves_none_that_looks_whole(world: World, store: Path) -> None:
    async def scene(host: Host) -> None:
        host.images = PlayedImages
        config = replace(world.config, disks=(Disk(str(store / "disk"), "raw", size_bytes=512),))
        for moment in ("before", "while", "after"):
            await host.crash()
            await host.boot()
            point = host.fuse.point

            def die_then(what: str, moment: str = moment, host: Host = host, point: Any = point) -> None:
                point(what)
                if what.startswith(f"{moment} making"):
                    host.fuse.blown = True
                    raise Killed

            host.fuse.point = die_then  # type: ignore[method-assign]
            with pytest.raises(Killed):
                await host.vms.define(config, file="", made_by_conversion=False)
            assert "disk" not in files_in(store)
            (store / f".sealift-{config.uuid.hex}").write_text("as one leaves it that really died")
        await host.crash()
        await host.boot()
        await host.vms.define(config, file="", made_by_conversion=False)
        assert opened(store / "disk", None) == ""
        assert files_in(store) == ["disk"]

    play(world, scene)


def test_an_agent_that_stops_in_the_middle_leaves_the_old_image(world: World, store: Path) -> None:
    async def scene(host: Host) -> None:
        plain, images = await gated_vm(world, host, store)
        order = order_for(with_keys(plain, encrypted=True), ENCRYPT, generation=1)
        await host.conversions.take(order, keys(*order.config.deks))
        await images.waiting.wait()
        await host.conversions.close()
        await host.crash()
        await host.boot()
        status = await ended(host, order)
        assert status.state is ConversionState.FAILED
        assert status.error.count("agent") == 1
        assert status.error.endswith("; the old images are in place")
        assert status.todo == "run `sealift vm encrypt web` again"
        assert files_in(store) == ["disk"]
        assert opened(store / "disk", None) == "content"

    play(world, scene)


def test_orders_that_do_not_fit_are_refused_and_change_nothing(world: World, store: Path) -> None:
    async def scene(host: Host) -> None:
        plain = await vm_in_clear(world, host, store, "raw")
        after = with_keys(plain, encrypted=True)
        good = order_for(after, ENCRYPT, generation=1)
        have = keys(*after.deks)
        moved = replace(after, disks=(replace(after.disks[0], path=str(store / "other")),))
        other = with_keys(plain, encrypted=True)
        cases: list[tuple[ConversionOrder, type[SealiftError]]] = [
            (replace(good, vm=uuid4()), NotFound),
            (replace(good, config=plain), InvalidInput),
            (replace(good, file=""), InvalidInput),
            (replace(good, kind=DECRYPT), InvalidInput),
            (order_for(moved, ENCRYPT, generation=1), InvalidInput),
            (replace(good, file=file_of(other, 1).decode("latin-1")), InvalidInput),
            (replace(good, file="quoted \u20ac"), InvalidInput),
            (replace(good, file=good.file[:-1]), SealiftError),
            (order_for(replace(after, uuid=uuid4()), ENCRYPT, generation=1, vm=plain.uuid), InvalidInput),
        ]
        for order, error in cases:
            with pytest.raises(error):
                await host.conversions.take(replace(order, id=uuid4()), have)
        with pytest.raises(KeysNotHeld, match="web"):
            await host.conversions.take(good, {})
        host._journal.check_fence(plain.uuid, 9)
        with pytest.raises(StaleFence):
            await host.conversions.take(good, have)
        assert host._journal.conversions() == []
        assert host.vms.converting == {}
        assert files_in(store) == ["disk.raw"]

    play(world, scene)


def test_a_running_vm_is_not_converted(world: World, store: Path) -> None:
    async def scene(host: Host) -> None:
        plain = await vm_in_clear(world, host, store, "raw")
        await host.vms.start(plain.uuid, "")
        order = order_for(with_keys(plain, encrypted=True), ENCRYPT, generation=1)
        with pytest.raises(Conflict, match="running"):
            await host.conversions.take(order, keys(*order.config.deks))

    play(world, scene)


@pytest.mark.parametrize("how", ["snapshot", "backing file"])
def test_real_images_that_a_copy_would_change_are_refused(world: World, store: Path, how: str) -> None:
    async def scene(host: Host) -> None:
        plain = await vm_in_clear(world, host, store, "qcow2")
        path = plain.disks[0].path
        if how == "snapshot":
            run("qemu-img", "snapshot", "-c", "before", path)
        else:
            os.rename(path, f"{path}.base")
            run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", f"{path}.base", path)
        order = order_for(with_keys(plain, encrypted=True), ENCRYPT, generation=1)
        with pytest.raises(Conflict, match=how.split()[0] if how == "snapshot" else "another file"):
            await host.conversions.take(order, keys(*order.config.deks))

    play(world, scene)


def run(*argv: str) -> None:
    """A program to its end, which must be good."""
    subprocess.run(argv, check=True, timeout=30, stdin=subprocess.DEVNULL, capture_output=True)


def facts(**changes: Any) -> DiskFacts:
    return replace(DiskFacts("/x", True, 1 << 30, 1 << 20, 1 << 40, "ext4"), **changes)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"block_device": True}, Conflict),
        ({"snapshots": 1}, Conflict),
        ({"backing": True}, Conflict),
        ({"exists": False}, NotFound),
        ({"error": "Permission denied"}, ConversionFailed),
    ],
)
def test_what_is_wrong_with_an_image_is_said(changes: dict[str, Any], error: type[SealiftError]) -> None:
    now = VmConfig("web", UUID(int=1), 1, 64 << 20, disks=(Disk("/x", "qcow2"),))
    order = order_for(with_keys(now, encrypted=True), ENCRYPT, generation=1)
    with pytest.raises(error, match=r"web.*/x"):
        plan(order, now, [facts(**changes)], ["/x"])


def test_images_are_made_for_a_new_vm_only() -> None:
    now = VmConfig("web", UUID(int=1), 1, 64 << 20, disks=(Disk("/x", "qcow2", size_bytes=1 << 30),))
    order = order_for(with_keys(now, encrypted=True), ENCRYPT, generation=1, is_new=True)
    gone = [facts(exists=False)]
    [step] = plan(order, now, gone, ["/x"])
    assert step.make
    had = with_keys(now, encrypted=True)
    decrypt = order_for(now, DECRYPT, generation=1, is_new=True)
    for other, before in ((replace(order, is_new=False), now), (order, had), (decrypt, had)):
        with pytest.raises(NotFound, match="mounted"):
            plan(other, before, gone, ["/x"])


@pytest.mark.parametrize(
    ("form", "fact", "needed"),
    [
        ("raw", facts(), 1 << 30),
        ("qcow2", facts(), 1 << 20),
        ("qcow2", facts(content_bytes=None), 1 << 30),
    ],
)
def test_room_for_all_new_images_at_once_is_asked_for(
    form: Literal["qcow2", "raw"], fact: DiskFacts, needed: int
) -> None:
    now = VmConfig("web", UUID(int=1), 1, 64 << 20, disks=(Disk("/x", form), Disk("/y", form)))
    order = order_for(with_keys(now, encrypted=True), ENCRYPT, generation=1)
    steps = plan(order, now, [fact, fact], ["/x", "/y"])
    assert all(needed <= step.needed_bytes <= needed * 1.01 + (4 << 20) for step in steps)

    def room(first: int, second: int, free: int) -> list[tuple[Step, int, int]]:
        return [(steps[0], first, free), (steps[1], second, free)]

    one = steps[0].needed_bytes
    check_room("web", room(7, 8, one))
    check_room("web", room(7, 7, 2 * one))
    for bad in (room(7, 7, 2 * one - 1), room(7, 8, one - 1)):
        with pytest.raises(DatastoreFull, match="web"):
            check_room("web", bad)


@pytest.fixture
def small_store(tmp_path: Path) -> Any:
    """A file system of 24 MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system to fill")
    directory = tmp_path / "small"
    directory.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=24m", "none", str(directory))
    try:
        yield directory
    finally:
        run("umount", str(directory))


async def compressed_vm(world: World, host: Host, small_store: Path, size: int) -> tuple[VmConfig, Path]:
    """A stopped VM whose image holds so much and occupies hardly anything."""
    content = b"compressible, " * (size // 14)
    content += bytes(-len(content) % 512)
    plain_file = host.settings.state_directory / "plain"
    plain_file.write_bytes(content)
    path = small_store / "disk.qcow2"
    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", str(plain_file), str(path))
    config = replace(world.config, disks=(Disk(str(path), "qcow2"),))
    await host.vms.define(config, file="", made_by_conversion=False)
    return config, path


def test_a_compressed_image_that_would_not_fit_is_refused_before_anything_is_made(
    world: World, small_store: Path
) -> None:
    async def scene(host: Host) -> None:
        config, path = await compressed_vm(world, host, small_store, 30 << 20)
        order = order_for(with_keys(config, encrypted=True), ENCRYPT, generation=1)
        with pytest.raises(DatastoreFull, match="web"):
            await host.conversions.take(order, keys(*order.config.deks))
        assert files_in(small_store) == ["disk.qcow2"]
        assert host._journal.conversions() == []
        looked = await host.conversions._images.look(str(path), "qcow2")
        assert looked.free_bytes < needed_bytes(ENCRYPT, config.disks[0], looked) < 40 << 20

    play(world, scene)


def test_a_disk_that_fills_in_the_middle_leaves_the_old_image(world: World, small_store: Path) -> None:
    """Somebody else may write there."""

    async def scene(host: Host) -> None:
        config, path = await compressed_vm(world, host, small_store, 12 << 20)
        before = path.read_bytes()
        images, other = host.conversions._images, small_store / "other"
        convert = images.convert

        async def fill_and_convert(*words: Any) -> FileId:
            other.write_bytes(bytes(16 << 20))
            return await convert(*words)

        images.convert = fill_and_convert  # type: ignore[method-assign, assignment]
        order = order_for(with_keys(config, encrypted=True), ENCRYPT, generation=1)
        await host.conversions.take(order, keys(*order.config.deks))
        status = await ended(host, order)
        assert (status.state, status.error_slug) == (ConversionState.FAILED, "datastore_full")
        assert "no room" in status.error
        assert status.error.endswith("; the old images are in place")
        other.unlink()
        assert files_in(small_store) == ["disk.qcow2"]
        assert path.read_bytes() == before
        assert host.vms.row(config.uuid) == VmRow(config)
        await host.vms.start(config.uuid, "")

    play(world, scene)


def test_a_symbolic_link_stays_one(world: World, store: Path, tmp_path: Path) -> None:
    async def scene(host: Host) -> None:
        plain, images = await gated_vm(world, host, store)
        images.open()
        link = tmp_path / "link"
        link.symlink_to(plain.disks[0].path)
        await host.vms.delete(plain.uuid)
        config = replace(plain, uuid=uuid4(), name="linked", disks=(replace(plain.disks[0], path=str(link)),))
        await host.vms.define(config, file="", made_by_conversion=False)
        after = with_keys(config, encrypted=True)
        order = order_for(after, ENCRYPT, generation=1)
        await host.conversions.take(order, keys(*after.deks))
        assert (await ended(host, order)).state is ConversionState.DONE
        assert link.is_symlink()
        assert opened(store / "disk", next(iter(keys(*after.deks).values()))) == "content"
        assert files_in(store) == ["disk"]

    play(world, scene)
