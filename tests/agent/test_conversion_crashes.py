"""An agent killed before and after each effect of a conversion, and begun anew: the images open with the keys that the
VM's configuration names, all of them, and nothing of a conversion that did not happen is left."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from doubles.hosts import Killed, World
from doubles.images import PlayedImages, image, opened
from sealift.agent import conversions, new_images
from sealift.agent.journal import VmRow
from sealift.agent.new_images import NewImage
from sealift.agent.vm_files import VmFiles, sha256
from sealift.domain.conversion import (
    CONVERSION_FINAL,
    ConversionKind,
    ConversionOrder,
    ConversionState,
    ConversionStatus,
)
from sealift.domain.vm import Disk, VmConfig
from sealift.errors import Conflict
from support.vm_files import file_of, keys

DISKS = ("a", "b", "c")
DECIDED = "after journaling conversion swapping"
BEFORE = {ConversionKind.ENCRYPT: False, ConversionKind.DECRYPT: True, ConversionKind.REKEY: True}
AFTER = {ConversionKind.ENCRYPT: True, ConversionKind.DECRYPT: False, ConversionKind.REKEY: True}


def with_keys(config: VmConfig, *, encrypted: bool) -> VmConfig:
    disks = tuple(replace(disk, dek=uuid4() if encrypted else None) for disk in config.disks)
    return replace(config, disks=disks)


class Scene:
    """A stopped VM with two disks, or a new one with a third that is not made yet, and an order to convert them."""

    def __init__(self, world: World, directory: Path, kind: ConversionKind) -> None:
        self.world, self.directory, self.host = world, directory, world.a
        self.is_new = kind is ConversionKind.ENCRYPT
        self.names = names = DISKS if self.is_new else DISKS[:2]
        directory.mkdir()
        self.host.images = PlayedImages
        plain = replace(world.config, disks=tuple(Disk(str(directory / name), "raw", size_bytes=512) for name in names))
        self.before = with_keys(plain, encrypted=BEFORE[kind])
        self.after = with_keys(plain, encrypted=AFTER[kind])
        self.keys = keys(*self.before.deks, *self.after.deks)
        self.files = [file_of(config, n) if config.deks else b"" for n, config in ((1, self.before), (2, self.after))]
        for name, disk in zip(DISKS[:2], self.before.disks, strict=False):
            (directory / name).write_text(image(f"content of {name}", self.keys[disk.dek] if disk.dek else None))
        self.order = ConversionOrder(
            uuid4(), world.config.uuid, 2, kind, self.after, self.files[1].decode("latin-1"), "sample", self.is_new
        )

    async def begin(self) -> None:
        await self.host.boot()
        if self.files[0]:
            path = self.host.vms.files.path(self.before.uuid)
            path.parent.mkdir(parents=True)
            path.write_bytes(self.files[0])
        self.host.vms._put(VmRow(self.before))

    async def carry_out(self) -> None:
        """Until the conversion has ended, or its agent."""
        await self.host.conversions.take(self.order, self.keys)
        await asyncio.gather(*self.host.conversions._tasks.values())

    async def come_back(self) -> None:
        """Another agent, until it has settled what it found."""
        await self.host.boot()
        await asyncio.gather(*self.host.conversions._tasks.values())

    def wrong(self) -> list[str]:
        """What is not as promised, by an agent that has come back."""
        config = self.host.vms.row(self.before.uuid).config
        found = []
        if config not in (self.before, self.after):
            found.append("the configuration is neither of the two")
        made = config == self.after
        for name, disk in zip(self.names if made else DISKS[:2], config.disks, strict=False):
            content = opened(disk.path, self.keys[disk.dek] if disk.dek else None)
            if content != ("" if name == "c" else f"content of {name}"):
                found.append(f"disk {name} has {content!r}")
        if sorted(path.name for path in self.directory.iterdir()) != sorted(self.names if made else DISKS[:2]):
            found.append(f"there are {list(self.directory.iterdir())}")
        if self.host.vms.files.read(config.uuid) != self.files[made]:
            found.append("the configuration file is another one")
        if self.host.vms.converting:
            found.append("the VM is still reserved")
        status = self.status(self.order.id)
        if status is not None and status.decided is not made:
            found.append(f"it was decided otherwise: {status}")
        if status is not None and (status.state is ConversionState.DONE) is not made:
            found.append(f"it says {status}")
        if status is not None and status.state not in CONVERSION_FINAL:
            found.append(f"it has not ended: {status}")
        return found

    def status(self, conversion: UUID) -> ConversionStatus | None:
        works = self.host.conversions._works
        return works[conversion].row.status if conversion in works else None


@pytest.fixture(autouse=True)
def _fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deaths also between two renames, and around the configuration file."""
    put, write, remove = new_images._put, VmFiles.write, VmFiles.remove

    def fused_put(new: NewImage, found_again: bool) -> bool:
        World.current.a.fuse.point("before a rename")
        answer = put(new, found_again)
        World.current.a.fuse.point("after a rename")
        return answer

    def fused_write(files: VmFiles, *args: object) -> None:
        World.current.a.fuse.point("before writing the file")
        write(files, *args)  # type: ignore[arg-type]
        World.current.a.fuse.point("after writing the file")

    def fused_remove(files: VmFiles, vm: UUID) -> None:
        World.current.a.fuse.point("before removing the file")
        remove(files, vm)
        World.current.a.fuse.point("after removing the file")

    monkeypatch.setattr(new_images, "_put", fused_put)
    monkeypatch.setattr(VmFiles, "write", fused_write)
    monkeypatch.setattr(VmFiles, "remove", fused_remove)
    monkeypatch.setattr(conversions, "_AGAIN_S", 0.001)


def played(world: World, directory: Path, kind: ConversionKind, at: int) -> tuple[list[str], list[str]]:
    """A conversion whose agent dies at its ``at``-th effect (0: never): what it did, and what is wrong afterwards."""

    async def main() -> tuple[list[str], list[str]]:
        scene = Scene(world, directory, kind)
        await scene.begin()
        host, fuse = scene.host, scene.host.fuse
        fuse.trace.clear()
        fuse.at = fuse.count + at if at else 0
        try:
            await scene.carry_out()
        except Killed:
            await host.crash()
            await scene.come_back()
        found = scene.wrong()
        state = scene.status(scene.order.id)
        again = replace(scene.order, id=uuid4(), fence=3)
        if state is None or state.state is not ConversionState.DONE:  # and nothing is in the way of another one
            scene.order = again
            await scene.carry_out()
            found += [f"then: {what}" for what in scene.wrong()]
            if (ended := scene.status(again.id)) is None or ended.state is not ConversionState.DONE:
                found.append(f"another one ended as {ended}")
        await host.crash()
        return fuse.trace, found

    return asyncio.run(main())


@pytest.mark.parametrize("kind", ConversionKind)
def test_an_agent_killed_at_any_moment_of_a_conversion(
    worlds: Callable[[], World], tmp_path: Path, kind: ConversionKind
) -> None:
    did, found = played(worlds(), tmp_path / "whole", kind, 0)
    assert found == []
    assert did.count("after a rename") == (3 if kind is ConversionKind.ENCRYPT else 2)
    decided = did.index("after journaling conversion swapping")
    assert did.index("before a rename") > decided > max(n for n, what in enumerate(did) if "after making" in what)
    wrong = {}
    for number, what in enumerate(did, start=1):
        _, found = played(worlds(), tmp_path / f"killed-{number}", kind, number)
        if found:
            wrong[f"{number}: {what}"] = found
    assert not wrong, "\n".join(f"{where}: {what}" for where, what in wrong.items())


async def until(scene: Scene, moment: str) -> None:
    """Carry a conversion out until this effect, when its agent dies."""
    fuse = scene.host.fuse
    point = fuse.point

    def die_then(what: str) -> None:
        point(what)
        if what.startswith(moment):
            fuse.blown = True
            raise Killed

    fuse.point = die_then  # type: ignore[method-assign]
    with pytest.raises(Killed):
        await scene.carry_out()
    await scene.host.crash()


async def said(scene: Scene) -> ConversionStatus:
    """What an agent that has come back says first of what is in its way."""
    async with asyncio.timeout(10):
        while not (status := scene.host.conversions.status(scene.order.id)).error:  # noqa: ASYNC110 - no event of it
            await asyncio.sleep(0.001)
    return status


def test_a_datastore_that_is_away_when_the_agent_comes_back_is_waited_for(world: World, tmp_path: Path) -> None:
    """The decision stands, and an empty mount point is not taken for a swap that was done."""

    async def main() -> None:
        scene = Scene(world, tmp_path / "store", ConversionKind.REKEY)
        await scene.begin()
        await until(scene, DECIDED)
        scene.directory.rename(tmp_path / "elsewhere")
        scene.directory.mkdir()
        await scene.host.boot()
        status = await said(scene)
        assert status.decided
        assert (status.state, status.error_slug) == (ConversionState.SWAPPING, "conversion_failed")
        assert "mounted" in status.todo
        assert scene.host.vms.row(scene.before.uuid).config == scene.before
        with pytest.raises(Conflict, match=str(scene.order.id)):
            await scene.host.vms.start(scene.before.uuid, sha256(scene.files[0]))
        scene.directory.rmdir()
        (tmp_path / "elsewhere").rename(scene.directory)
        await asyncio.gather(*scene.host.conversions._tasks.values())
        assert scene.wrong() == []
        assert scene.host.conversions.status(scene.order.id).state is ConversionState.DONE
        await scene.host.crash()

    asyncio.run(main())


@pytest.mark.parametrize("away", ["empty", "not there"])
def test_a_copy_in_clear_on_a_datastore_that_is_away_is_removed_when_it_comes_back(
    world: World, tmp_path: Path, away: str
) -> None:
    """The power goes while a VM is decrypted, and the host is back before its datastore: it is not over until then."""

    async def main() -> None:
        scene = Scene(world, tmp_path / "store", ConversionKind.DECRYPT)
        await scene.begin()
        await until(scene, "after making")
        [copy] = [path.name for path in scene.directory.iterdir() if path.name not in DISKS]
        scene.directory.rename(tmp_path / "elsewhere")
        if away == "empty":
            scene.directory.mkdir()
        await scene.host.boot()
        status = await said(scene)
        assert (status.state, status.decided) == (ConversionState.COPYING, False)
        assert "mounted" in status.todo
        with pytest.raises(Conflict, match=str(scene.order.id)):
            await scene.host.vms.start(scene.before.uuid, sha256(scene.files[0]))
        with pytest.raises(Conflict):
            await scene.host.conversions.forget(scene.order.id)
        assert (tmp_path / "elsewhere" / copy).exists()
        if away == "empty":
            scene.directory.rmdir()
        (tmp_path / "elsewhere").rename(scene.directory)
        await asyncio.gather(*scene.host.conversions._tasks.values())
        assert scene.wrong() == []
        status = scene.host.conversions.status(scene.order.id)
        assert (status.state, status.decided) == (ConversionState.FAILED, False)
        await scene.host.conversions.forget(scene.order.id)
        await scene.host.crash()

    asyncio.run(main())


def test_a_failed_conversion_is_not_forgotten_while_its_datastore_is_away(world: World, tmp_path: Path) -> None:
    async def main() -> None:
        scene = Scene(world, tmp_path / "store", ConversionKind.DECRYPT)
        await scene.begin()
        await until(scene, "after making")
        [copy] = [path.name for path in scene.directory.iterdir() if path.name not in DISKS]
        content = (scene.directory / copy).read_text()
        await scene.come_back()
        await scene.host.crash()
        (scene.directory / copy).write_text(content)  # a removal that was not on the disk when the power went
        await scene.come_back()
        assert scene.wrong() == []
        scene.directory.rename(tmp_path / "elsewhere")
        with pytest.raises(Conflict, match="datastore is not there"):
            await scene.host.conversions.forget(scene.order.id)
        (tmp_path / "elsewhere").rename(scene.directory)
        await scene.host.conversions.forget(scene.order.id)
        await scene.host.crash()

    asyncio.run(main())


def test_new_images_that_somebody_removed_leave_the_old_ones(world: World, tmp_path: Path) -> None:
    async def main() -> None:
        scene = Scene(world, tmp_path / "store", ConversionKind.REKEY)
        await scene.begin()
        await until(scene, DECIDED)
        for path in scene.directory.glob("*.sealift-*"):
            path.unlink()
        await scene.come_back()
        status = scene.host.conversions.status(scene.order.id)
        assert (status.state, status.decided) == (ConversionState.FAILED, True)
        assert [what for what in scene.wrong() if not what.startswith("it was decided")] == []
        await scene.host.crash()

    asyncio.run(main())
