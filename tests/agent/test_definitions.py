"""A definition that hangs on a datastore: nobody forgets it, and it takes nothing away when it fails at last."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest

from doubles.hosts import Host, World
from sealift.domain.vm import Disk, VmConfig, VmState
from sealift.errors import AlreadyExists, Conflict, NotFound


class Hanging:
    """The making of the last of a new VM's images hangs until it is let go; the first one is in its place."""

    def __init__(self, host: Host, place: Path, config: VmConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host = host
        self.first, self.last = place / "first", place / "last"
        for directory in (self.first, self.last):
            directory.mkdir()
        paths = [str(directory / "disk.img") for directory in (self.first, self.last)]
        self.image = Path(paths[0])
        disks = tuple(Disk(path, "raw", None, size_bytes=1 << 20) for path in paths)
        self.config = replace(config, uuid=uuid4(), name="new", disks=disks)
        self.go_on = asyncio.Event()
        images = host.vms._images
        create = images.create

        async def create_slowly(path: str, *arguments: object) -> object:
            if path.startswith(str(self.last)):
                await self.go_on.wait()
            return await create(path, *arguments)

        monkeypatch.setattr(images, "create", create_slowly)
        self.defining = asyncio.create_task(self.define(self.config))

    async def define(self, config: VmConfig) -> None:
        await self.host.vms.define(config, file="", made_by_conversion=False)


@pytest.fixture
def hangs(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Hanging]:
    return lambda: Hanging(world.a, tmp_path, world.config, monkeypatch)


def play(world: World, scene: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await world.begin()
        try:
            async with asyncio.timeout(60):
                await scene()
        finally:
            await world.a.crash()
            await world.b.crash()

    asyncio.run(main())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - a file in a directory
        await asyncio.sleep(0.001)


def test_while_it_hangs_nobody_is_told_that_there_is_no_such_vm(world: World, hangs: Callable[[], Hanging]) -> None:
    async def scene() -> None:
        new = hangs()
        await until(new.image.exists)
        vms = world.a.vms
        for asked in (vms.delete(new.config.uuid), vms.status(new.config.uuid), new.define(new.config)):
            with pytest.raises(Conflict, match="VM new is still being defined on host a"):
                await asked
        with pytest.raises(Conflict, match=f"{new.image} is VM new's"):
            await new.define(replace(new.config, uuid=uuid4(), name="other", disks=new.config.disks[:1]))
        with pytest.raises(AlreadyExists, match="named new"):
            await new.define(replace(new.config, uuid=uuid4(), disks=()))
        new.go_on.set()
        await new.defining
        assert (await vms.status(new.config.uuid)).state is VmState.STOPPED
        await vms.delete(new.config.uuid)

    play(world, scene)


@pytest.mark.parametrize("taken", [False, True])
def test_when_it_fails_at_last_only_what_nobody_has_written_to_is_removed(
    world: World, hangs: Callable[[], Hanging], taken: bool
) -> None:
    async def scene() -> None:
        new = hangs()
        await until(new.image.exists)
        if taken:
            new.image.write_text("of another host's VM")
        (new.last / "disk.img").touch()
        new.go_on.set()
        with pytest.raises(AlreadyExists):
            await new.defining
        assert new.image.exists() is taken
        with pytest.raises(NotFound):
            await world.a.vms.delete(new.config.uuid)

    play(world, scene)
