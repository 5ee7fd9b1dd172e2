"""Whole migrations of random memory between two real QEMUs, through Sealift's relays and without them.

No guest runs: QEMU is started stopped, with memory that is a private file of random bytes at the source, so every byte
has to be sent and none is sent twice. Both paths use the same machines, migration capabilities and parameters, those
that the agent sets; they differ in where QEMU connects to:

    sealift      QEMU - UNIX socket - relay - TCP, sealed, through the doorman - relay - UNIX socket - QEMU
    qemu-plain   QEMU - TCP - QEMU, in clear

The clock runs from the order to migrate until both QEMUs call it completed. CPU time is counted from the same moment
until the relays have seen every channel end in order. Starting QEMUs and relays, and their handshake, is not counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Literal
from uuid import uuid4

from parts.measure import Processes, Run, peak_rss_mib
from parts.relays import Pair, connected_pair
from sealift.channel.local_sockets import SOURCE_SOCKET, TARGET_SOCKET
from sealift.domain.move import MoveOptions
from sealift.domain.vm import Accelerator, HardwareRecord, VmConfig
from sealift.hypervisor import hardware
from sealift.hypervisor.base import MigrationInfo, VmPaths
from sealift.hypervisor.process import ProcessRef, spawn
from sealift.hypervisor.qemu import QemuHypervisor
from sealift.hypervisor.qemu_vm import QemuVm
from sealift.hypervisor.qmp import Qmp

Route = Literal["sealift", "qemu-plain"]

_BINARY = "qemu-system-x86_64"
_PATIENCE_S = 300.0
_POLL_S = 0.02
_BLOCK = 16 << 20


def fill_with_random(path: Path, size: int) -> None:
    """Make the source's memory."""
    free = os.statvfs(path.parent)
    if free.f_bavail * free.f_frsize < size:
        raise RuntimeError(f"{path.parent} has less than {size >> 20} MiB free")
    with path.open("xb") as file:
        while size > 0:
            file.write(os.urandom(min(size, _BLOCK)))
            size -= _BLOCK


async def frozen(memory_bytes: int) -> HardwareRecord:
    """The machine that is moved."""
    config = VmConfig("bench", uuid4(), vcpus=1, memory_bytes=memory_bytes, accelerator=Accelerator.TCG)
    return await QemuHypervisor(_BINARY, Accelerator.TCG).freeze(config)


class _Machine:
    """One QEMU, and a QMP connection beside the product's own, for what the product never does: TCP."""

    def __init__(self, vm: QemuVm, side_door: Qmp) -> None:
        self.vm = vm
        self._side_door = side_door

    @property
    def pid(self) -> int:
        return self.vm.process.pid

    async def order(self, command: str, uri: str) -> None:
        await self._side_door.execute(command, {"uri": uri})

    async def until(self, *statuses: str) -> MigrationInfo:
        async with asyncio.timeout(_PATIENCE_S):
            while (info := await self.vm.migration()).status not in statuses:
                if info.status in ("failed", "cancelled"):
                    raise RuntimeError(f"the migration {info.status} at {self.vm.process}: {info.error}")
                await asyncio.sleep(_POLL_S)
        return info

    async def close(self) -> None:
        await self._side_door.close()
        await self.vm.close()


@contextlib.asynccontextmanager
async def _machine(record: HardwareRecord, directory: Path, *, memory: Path | None) -> AsyncIterator[_Machine]:
    """A QEMU with the product's command line, for the source with ``memory`` in place of empty memory; killed after."""
    os.mkdir(directory, 0o700)
    paths = VmPaths(directory, directory / "log", directory / "serial")
    args = hardware.argv(record, paths, incoming=memory is None, binary=_BINARY)
    if memory is not None:
        (index,) = (n for n, arg in enumerate(args) if re.match(r"memory-backend-\w+,id=ram0,", arg))
        # Private: what the firmware writes at reset must not change the file, which every run uses.
        size = record.config.memory_bytes // 1024
        args[index] = f"memory-backend-file,id=ram0,size={size}K,mem-path={memory},share=off,dump=off"
    process = spawn(args, log_path=paths.log)
    connected: _Machine | None = None
    try:
        connected = await _connected(process, paths, record)
        yield connected
    except Exception:
        print(paths.log.read_text(errors="replace"), end="", file=sys.stderr)
        raise
    finally:
        process.kill()
        await process.wait_exit(10)
        if connected is not None:
            await connected.close()


async def _connected(process: ProcessRef, paths: VmPaths, record: HardwareRecord) -> _Machine:
    vm = await QemuVm.connect(paths, process, record.config.uuid)
    try:
        return _Machine(vm, await Qmp.connect(paths.rescue, process=process, name=record.config.name))
    except BaseException:
        await vm.close()
        raise


async def migration_run(path: Route, record: HardwareRecord, memory: Path, multifd: int, root: Path) -> Run:
    """Move the machine once, over one stream (``multifd`` 0) or one main and ``multifd`` others.

    Raises RuntimeError when the memory did not really go over the path.
    """
    options = MoveOptions(multifd_channels=multifd)
    async with contextlib.AsyncExitStack() as stack:
        source = await stack.enter_async_context(_machine(record, root / "a", memory=memory))
        target = await stack.enter_async_context(_machine(record, root / "b", memory=None))
        await source.vm.configure_source(options)
        await target.vm.configure_target(options)
        roles = {"qemu_source": source.pid, "qemu_target": target.pid}
        relays: Pair | None = None
        if path == "sealift":
            relays = await stack.enter_async_context(
                connected_pair("relay", root, 1 + multifd, source_pid=source.pid, target_pid=target.pid)
            )
            roles = relays.roles | roles
            incoming = f"unix:{relays.target.directory / TARGET_SOCKET}"
            outgoing = f"unix:{relays.source.directory / SOURCE_SOCKET}"
        else:
            incoming = outgoing = f"tcp:127.0.0.1:{_free_port()}"
        await target.order("migrate-incoming", incoming)
        processes = Processes(roles)
        began = time.monotonic()
        await source.order("migrate", outgoing)
        await source.until("pre-switchover")
        await source.vm.continue_switchover()
        info, _ = await asyncio.gather(source.until("completed"), target.until("completed"))
        seconds = time.monotonic() - began
        rss = None
        if relays is not None:
            await asyncio.gather(relays.source.until("drained"), relays.target.until("drained"))
            rss = max(peak_rss_mib(pid) for pid in relays.roles.values())
        cpu = processes.cpu()
        size = record.config.memory_bytes
        carried = [info.progress.transferred_bytes]
        if relays is not None:
            carried += [(await relays.source.client.status())["sealed_out"]]
            carried += [(await relays.target.client.status())["sealed_in"]]
        if min(carried) < size:
            raise RuntimeError(f"of {size} random bytes only {carried} went over the path")
    return Run(seconds, size / 1e9, cpu, rss, info.downtime_ms)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port
