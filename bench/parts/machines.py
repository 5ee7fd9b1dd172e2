"""The machine that is moved: a QEMU as the agent would start it, full of random memory, with a guest that runs.

The guest (guest.S) is a few instructions that halt, and in the ``dirtying`` variant wake up 100 times a second to write
to memory. Its memory is filled from outside, since a guest under emulation would need minutes: the source's is a file
of random bytes in a tmpfs that QEMU maps, and every run uses it as the last one left it.

Both have touched all of their memory before the clock starts (``prealloc``). For the source that is what a running
guest's is like. The target of the product begins with untouched memory, and ``cold`` leaves it so; but on a virtual
machine whose hypervisor takes free memory back the first touch of a page costs up to thirty times what it does
elsewhere, at random, and hides everything else.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from parts.ends import End
from sealift.domain.vm import Accelerator, Boot, HardwareRecord, VmConfig
from sealift.hypervisor import hardware
from sealift.hypervisor.base import MigrationInfo, VmPaths
from sealift.hypervisor.process import ProcessRef, spawn
from sealift.hypervisor.qemu import QemuHypervisor
from sealift.hypervisor.qemu_vm import QemuVm
from sealift.hypervisor.qmp import Qmp

Guest = Literal["quiesced", "dirtying"]
GUESTS: tuple[Guest, ...] = ("quiesced", "dirtying")

DIRTY_PAGES_PER_SECOND = 12_800
"""Pages of 4 KiB that the dirtying guest writes to: 52 MB/s. Every path is fast enough for that to converge."""

PATIENCE_S = 300.0

_ODD = 8 << 10  # under TCG, QEMU 7.2 loses writes of guests whose memory is a multiple of 256 KiB
_TICKS = 100
_SET_SHARE = 12  # the dirtying guest goes round in this fraction of its memory: 256 MiB of 3 GiB
_BINARY = "qemu-system-x86_64"
_MEMORY_FILES = Path("/dev/shm")
_BLOCK = 16 << 20
_POLL_S = 0.02


@dataclass(frozen=True)
class Scene:
    """What all runs share: the file with the source's memory and each guest's machine."""

    memory: Path
    records: dict[Guest, HardwareRecord]
    cold: bool  # the target's memory is not touched beforehand

    @property
    def memory_bytes(self) -> int:
        return self.memory.stat().st_size


@contextlib.contextmanager
def scene(mebibytes: int, *, cold: bool) -> Iterator[Scene]:
    """Prepare machines of this much memory, less 8 KiB; needs twice as much of this machine's while they run."""
    size = (mebibytes << 20) - _ODD
    with tempfile.TemporaryDirectory(prefix="slb-", dir=_MEMORY_FILES) as directory:
        memory = Path(directory, "memory")
        _fill_with_random(memory, size)
        records = {guest: _frozen(guest, size, Path(directory)) for guest in GUESTS}
        yield Scene(memory, records, cold)


def _fill_with_random(path: Path, size: int) -> None:
    free = os.statvfs(path.parent)
    if free.f_bavail * free.f_frsize < size:
        raise RuntimeError(f"{path.parent} has less than {size >> 20} MiB free")
    with path.open("xb") as file:
        while size > 0:
            file.write(os.urandom(min(size, _BLOCK)))
            size -= _BLOCK


def _frozen(guest: Guest, memory_bytes: int, directory: Path) -> HardwareRecord:
    kernel = directory / guest
    pages = DIRTY_PAGES_PER_SECOND // _TICKS if guest == "dirtying" else 0
    words = [f"-DTICK_PAGES={pages}", f"-DSET_PAGES={memory_bytes // _SET_SHARE // 4096}"]
    linker = "-Wl,-n,-Ttext=0x100000,--build-id=none,--no-warn-rwx-segments"
    source = Path(__file__).with_name("guest.S")
    subprocess.run(["gcc", "-m32", "-nostdlib", "-static", linker, *words, "-o", kernel, source], check=True)
    boot = Boot(str(kernel))
    config = VmConfig("bench", uuid4(), 1, memory_bytes, accelerator=Accelerator.TCG, boot=boot)
    return asyncio.run(QemuHypervisor(_BINARY, Accelerator.TCG).freeze(config))


class Machine:
    """One QEMU, and a QMP connection beside the product's own, for what the product never does: TCP, TLS."""

    def __init__(self, vm: QemuVm, side_door: Qmp, end: End, directory: Path) -> None:
        self.vm = vm
        self.end = end
        self.directory = directory
        self._side_door = side_door

    @property
    def pid(self) -> int:
        return self.vm.process.pid

    async def order(self, command: str, arguments: dict[str, Any]) -> None:
        await self._side_door.execute(command, arguments)

    async def until(self, *statuses: str) -> MigrationInfo:
        """Wait for a MIGRATION event with one of these; raises RuntimeError when the migration fails."""
        async with asyncio.timeout(PATIENCE_S):
            async for event in self.vm.events(0):
                status = event.data.get("status")
                if event.name == "MIGRATION" and status in (*statuses, "failed", "cancelled"):
                    info = await self.vm.migration()
                    if status in statuses:
                        return info
                    raise RuntimeError(f"the migration {status} at {self.vm.process}: {info.error}")
        raise RuntimeError(f"{self.vm.process} is gone")

    async def time_of(self, name: str) -> float:
        """When this event was, by QEMU's own clock; waits for it."""
        async with asyncio.timeout(PATIENCE_S):
            async for event in self.vm.events(0):
                if event.name == name:
                    return event.time
        raise RuntimeError(f"{self.vm.process} is gone")

    async def close(self) -> None:
        await self._side_door.close()
        await self.vm.close()


@contextlib.asynccontextmanager
async def machine(
    scene: Scene, guest: Guest, role: Literal["source", "target"], directory: Path, end: End
) -> AsyncIterator[Machine]:
    """A QEMU with the product's command line but for its memory; at the source the guest runs. Killed afterwards."""
    os.mkdir(directory, 0o700)
    record, incoming = scene.records[guest], role == "target"
    paths = VmPaths(directory, directory / "log", directory / "serial")
    args = hardware.argv(record, paths, incoming=incoming, binary=_BINARY)
    (index,) = (n for n, arg in enumerate(args) if re.match(r"memory-backend-\w+,id=ram0,", arg))
    if incoming:
        args[index] += "" if scene.cold else ",prealloc=on"
    else:
        size = record.config.memory_bytes // 1024
        args[index] = f"memory-backend-file,id=ram0,size={size}K,mem-path={scene.memory},share=on,prealloc=on,dump=off"
    with end.inside():
        process = spawn(args, log_path=paths.log)
    connected: Machine | None = None
    try:
        connected = await _connected(process, paths, record, end)
        if not incoming:
            await connected.vm.cont_fresh()
            await until(lambda: "R" in paths.serial.read_text(), lambda: "the guest did not come up")
        yield connected
    except Exception:
        print(paths.log.read_text(errors="replace"), end="", file=sys.stderr)
        raise
    finally:
        process.kill()
        await process.wait_exit(30)
        if connected is not None:
            await connected.close()


async def _connected(process: ProcessRef, paths: VmPaths, record: HardwareRecord, end: End) -> Machine:
    vm = await QemuVm.connect(paths, process, record.config.uuid, timeout=PATIENCE_S)
    try:
        side_door = await Qmp.connect(paths.rescue, process=process, name=record.config.name, timeout=PATIENCE_S)
        return Machine(vm, side_door, end, paths.qmp.parent)
    except BaseException:
        await vm.close()
        raise


async def until(true: Callable[[], bool], what: Callable[[], str], patience_s: float = PATIENCE_S) -> None:
    """Wait for something that no event announces; raises RuntimeError, saying ``what``."""
    deadline = time.monotonic() + patience_s
    while not true():
        if time.monotonic() > deadline:
            raise RuntimeError(what())
        await asyncio.sleep(_POLL_S)
