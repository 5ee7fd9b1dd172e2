"""One whole migration between two real QEMUs, measured.

Both have the machine, the capabilities and the parameters that the agent gives them, on every route; they differ in
where QEMU connects to. The clock runs from the order to migrate until both QEMUs call it completed. CPU time is counted
from the same moment until the target's guest runs and everything on the way has arrived. Starting machines and routes
(logins and handshakes of relays, ssh, stunnel) is not counted; TLS within QEMU and stunnel begins with the migration.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from parts.ends import LOOPBACK, Ends
from parts.machines import Guest, Machine, Scene, machine
from parts.measure import Processes, Run, peak_rss_mib_of_family
from parts.peers import Peers
from parts.routes import ROUTES, Trip
from sealift.domain.move import MoveOptions
from sealift.hypervisor.base import MigrationInfo

_STILL_S = 20.0
_FIRMWARE_BYTES = 1 << 20
"""Below 1 MiB the firmware has left pages of zeros, which are not sent."""


async def migration_run(
    path: str, channels: int, guest: Guest, scene: Scene, root: Path, peers: Peers, ends: Ends = LOOPBACK
) -> Run:
    """Move ``guest`` once over one stream (``channels`` 1) or over one main stream and ``channels`` of multifd.

    Raises RuntimeError when its memory did not really take that way.
    """
    multifd = channels if channels > 1 else 0
    options = MoveOptions(multifd_channels=multifd)
    async with contextlib.AsyncExitStack() as stack:
        source = await stack.enter_async_context(machine(scene, guest, "source", root / "a", ends.source))
        target = await stack.enter_async_context(machine(scene, guest, "target", root / "b", ends.target))
        await source.vm.configure_source(options)
        await target.vm.configure_target(options)
        trip = Trip(source, target, ends, root, 1 + multifd, peers)
        way = await stack.enter_async_context(ROUTES[path](trip))
        roles = way.roles | {"qemu_source": source.pid, "qemu_target": target.pid}
        processes = Processes(roles)
        began = time.monotonic()
        info = await _unless_it_is_lost(source, target, _migrate(source, target, way.uri))
        seconds = time.monotonic() - began
        await target.vm.cont_at_target()
        stopped, resumed = await source.time_of("STOP"), await target.time_of("RESUME")
        carried = [info.progress.transferred_bytes, *await way.carried()]
        cpu, others = processes.cpu(), processes.others_cores()
        if min(carried) < scene.memory_bytes - _FIRMWARE_BYTES:
            raise RuntimeError(f"of {scene.memory_bytes} random bytes only {carried} went over {path}")
        peaks = {role: peak_rss_mib_of_family(pid) for role, pid in roles.items()}
    between = [peaks[role] for role in way.roles]
    return Run(
        seconds=seconds,
        gigabytes=info.progress.transferred_bytes / 1e9,
        cpu=cpu,
        peak_rss_mib=max(between, default=None),
        downtime_ms=info.downtime_ms,
        stop_to_resume_ms=(resumed - stopped) * 1e3,
        peak_rss_mib_by=peaks,
        others_cores=others,
    )


async def _migrate(source: Machine, target: Machine, uri: str) -> MigrationInfo:
    await source.order("migrate", {"uri": uri})
    await source.until("pre-switchover")
    await source.vm.continue_switchover()
    info, _ = await asyncio.gather(source.until("completed"), target.until("completed"))
    return info


async def _unless_it_is_lost(
    source: Machine, target: Machine, migration: Coroutine[None, None, MigrationInfo]
) -> MigrationInfo:
    """Give up when the target has ended, or nothing moves: QEMU 7.2 may not notice when channels get mixed up."""
    moving = asyncio.create_task(migration)
    ended = asyncio.create_task(target.vm.process.wait_exit())
    tasks: list[asyncio.Task[Any]] = [moving, ended, asyncio.create_task(_stand_still(source))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if moving.done():
            return moving.result()
        raise RuntimeError("the target's QEMU has ended" if ended.done() else "the migration stands still")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _stand_still(source: Machine) -> None:
    """Return when the source has sent nothing for a while."""
    before = -1
    while (sent := (await source.vm.migration()).progress.transferred_bytes) != before:
        before = sent
        await asyncio.sleep(_STILL_S)
