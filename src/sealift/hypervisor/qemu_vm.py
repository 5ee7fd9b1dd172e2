"""A handle on one QEMU process, over its QMP socket.

Orders and traps of live migration with QEMU 7.2 that this file keeps:

- ``max-bandwidth`` is always set: QEMU's default is 128 MiB/s.
- Capabilities and parameters outlive a failed migration, so all of them are set anew each time.
- ``multifd`` and its number of channels must be equal at both ends.
- The runstate says whether ``cont`` is safe; QEMU itself takes it in nearly every state (``inmigrate`` included, where
  it means "start when loaded", and ``postmigrate``, where it makes a second copy run).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from uuid import UUID

from sealift.domain.move import Answer, MoveOptions, Progress
from sealift.errors import ContRefused, HypervisorError, SealiftError
from sealift.hypervisor.base import MigrationInfo, QmpEvent, VmPaths
from sealift.hypervisor.hardware import check_socket
from sealift.hypervisor.process import ProcessRef
from sealift.hypervisor.qmp import Qmp

UNLIMITED = 1 << 40
"""Bytes per second that stand for no limit; for QEMU 0 is a limit of zero."""

_CAPABILITIES = ("events", "return-path", "pause-before-switchover", "multifd", "late-block-activate", "postcopy-ram")
"""What we decide on for each migration; all others keep QEMU's default."""

_OVER = frozenset({"none", "completed", "failed", "cancelled"})
_POLL_S = 0.02

_ANNOUNCE = {"initial": 50, "max": 550, "rounds": 5, "step": 50}
"""Milliseconds and rounds of gratuitous packets that tell switches where the guest is now; QEMU's own defaults."""


def is_served(path: Path) -> bool:
    """Whether a process listens on this UNIX socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
        link.setblocking(False)
        try:
            link.connect(str(path))
        except BlockingIOError:
            return True  # the backlog is full: somebody listens
        except OSError:
            return False
        return True


def server_of(path: Path) -> int | None:
    """The process that listens on this UNIX socket; None when nobody does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
        link.setblocking(False)
        try:
            link.connect(str(path))
            pid: int = struct.unpack("3i", link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        except OSError:
            return None
        return pid


def remove_sockets(paths: VmPaths) -> None:
    """Remove the QMP sockets that a process has left behind; one that is served is kept."""
    for path in (paths.qmp, paths.rescue):
        if not is_served(path):
            path.unlink(missing_ok=True)


def _number(values: Mapping[str, object], key: str) -> float:
    value = values.get(key, 0)
    return value if isinstance(value, int | float) else 0


def parse_migration(answer: Mapping[str, object]) -> MigrationInfo:
    """``query-migrate``'s answer in our units."""
    ram = answer.get("ram")
    ram = ram if isinstance(ram, dict) else {}
    downtime = answer.get("downtime")
    return MigrationInfo(
        status=str(answer.get("status", "none")),
        progress=Progress(
            total_bytes=int(_number(ram, "total")),
            remaining_bytes=int(_number(ram, "remaining")),
            transferred_bytes=int(_number(ram, "transferred")),
            rate=_number(ram, "mbps") * 1e6 / 8,
            dirty_rate=_number(ram, "dirty-pages-rate") * (_number(ram, "page-size") or 4096),
            passes=int(_number(ram, "dirty-sync-count")),
            expected_downtime_ms=int(_number(answer, "expected-downtime")),
        ),
        error=str(answer.get("error-desc", "")),
        downtime_ms=downtime if isinstance(downtime, int) else None,
    )


class QemuVm:
    """See ``base.Vm``."""

    def __init__(self, qmp: Qmp, paths: VmPaths, process: ProcessRef, uuid: UUID, name: str) -> None:
        self._qmp = qmp
        self._paths = paths
        self._process = process
        self._uuid = uuid
        self._name = name

    @classmethod
    async def connect(cls, paths: VmPaths, process: ProcessRef, uuid: UUID, *, timeout: float = 10) -> QemuVm:
        """Connect to a QEMU and make sure that it is this VM's; raises as ``Qmp.connect``, or HypervisorError."""
        qmp = await Qmp.connect(paths.qmp, process=process, name=str(uuid), timeout=timeout)
        try:
            found = (await qmp.query("query-uuid", timeout)).get("UUID")
            name = (await qmp.query("query-name", timeout)).get("name", uuid)
            if found != str(uuid):
                raise HypervisorError(f"the QEMU at {paths.qmp} runs VM {found}, not {uuid}")
        except BaseException:
            await qmp.close()
            raise
        qmp.name = str(name)
        return cls(qmp, paths, process, uuid, str(name))

    @property
    def process(self) -> ProcessRef:
        return self._process

    @property
    def uuid(self) -> UUID:
        return self._uuid

    @property
    def qmp(self) -> Qmp:
        """The connection to it."""
        return self._qmp

    @property
    def qemu_version(self) -> str:
        """Version of the running QEMU; the installed one may be another by now."""
        return self._qmp.version

    async def status(self) -> str:
        return str((await self._qmp.query("query-status")).get("status"))

    async def migration(self) -> MigrationInfo:
        return parse_migration(await self._qmp.query("query-migrate"))

    async def configure_source(self, options: MoveOptions) -> None:
        await self._set_capabilities("events", "return-path", "pause-before-switchover", multifd=options)
        parameters = {
            "max-bandwidth": options.bandwidth or UNLIMITED,
            "downtime-limit": options.max_downtime_ms,
        }
        await self._set_parameters(parameters, options)

    async def configure_target(self, options: MoveOptions) -> None:
        await self._set_capabilities("events", "return-path", "late-block-activate", multifd=options)
        await self._set_parameters({}, options)

    async def _set_capabilities(self, *on: str, multifd: MoveOptions) -> None:
        wanted = {*on, "multifd"} if multifd.multifd_channels else {*on}
        await self._qmp.execute(
            "migrate-set-capabilities",
            {"capabilities": [{"capability": name, "state": name in wanted} for name in _CAPABILITIES]},
        )

    async def _set_parameters(self, parameters: dict[str, int], options: MoveOptions) -> None:
        if options.multifd_channels:
            parameters = parameters | {"multifd-channels": options.multifd_channels}
        if parameters:
            await self._qmp.execute("migrate-set-parameters", parameters)

    async def set_bandwidth(self, bandwidth: int) -> None:
        await self._qmp.execute("migrate-set-parameters", {"max-bandwidth": bandwidth or UNLIMITED})

    async def set_max_downtime(self, milliseconds: int) -> None:
        await self._qmp.execute("migrate-set-parameters", {"downtime-limit": milliseconds})

    async def listen(self, path: Path) -> None:
        check_socket(path)
        await self._qmp.execute("migrate-incoming", {"uri": f"unix:{path}"})

    async def migrate(self, path: Path) -> None:
        check_socket(path)
        await self._settled()
        await self._qmp.execute("migrate", {"uri": f"unix:{path}"})

    async def _settled(self) -> None:
        """Wait until an earlier migration that failed is cleaned up: QEMU says so before it is, and refuses the next.

        Its yank instance is what goes last. QEMU 7.2 may never clean up when a migration over several channels breaks
        while they are being set up (its migration thread then waits for a channel's thread that has ended); the guest
        is not concerned, but nothing short of a new process makes it migratable again.
        """
        for _ in range(100):
            instances = await self._qmp.execute("query-yank")
            assert isinstance(instances, list)
            if {"type": "migration"} not in instances or (await self.migration()).status not in _OVER:
                return
            await asyncio.sleep(_POLL_S)
        raise HypervisorError(
            f"VM {self._name} cannot be migrated: QEMU has not cleaned up after an earlier migration that failed",
            todo="the guest runs on undisturbed; stop it and start it again to migrate it (a defect of older QEMUs)",
        )

    async def continue_switchover(self) -> None:
        await self._qmp.execute("migrate-continue", {"state": "pre-switchover"})

    async def cancel(self, timeout: float = 10) -> MigrationInfo:
        await self._qmp.execute("migrate_cancel", timeout=timeout)
        try:
            async with asyncio.timeout(timeout):
                while True:
                    info = await self.migration()
                    # Once it is over without success QEMU lets the guest go on by itself, a moment later.
                    if info.status in _OVER and (info.status == "completed" or await self.status() != "finish-migrate"):
                        return info
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise HypervisorError(
                f"the migration of VM {self._name} was cancelled but is not over after {timeout:g} s"
            ) from None

    async def cont_fresh(self) -> None:
        await self._require("prelaunch", reason="only a guest that has never run is started like this")
        await self._cont()

    async def cont_at_target(self) -> None:
        await self._require("paused", reason="a received guest is started once it is loaded, and once only")
        incoming = (await self.migration()).status
        if incoming != "completed":
            raise ContRefused(f"VM {self._name} was not let run: its incoming migration is {incoming}, not completed")
        await self._cont()
        await self.announce()

    async def cont_at_source(self, *, aborted: Answer) -> None:
        if aborted is not Answer.ABORTED:
            raise ContRefused(f"VM {self._name} was not let run at its source: the target has not aborted")
        await self._require("postmigrate", "paused", reason="it is not a guest that was handed over")
        await self._cont()
        await self.announce()

    async def _require(self, *runstates: str, reason: str) -> None:
        now = await self.status()
        if now not in runstates:
            raise ContRefused(f"VM {self._name} was not let run: its runstate is {now} ({reason})")

    async def _cont(self) -> None:
        """The only place that sends ``cont``. Returns when the guest runs, or has run."""
        before = time.time()
        await self._qmp.execute("cont")
        now = ""
        # A guest may stop again at once (a disk error, a reset that is a shutdown). It has run all the same, and
        # whoever asks must not conclude that it has not.
        for _ in range(100):
            now = await self.status()
            resumed = self._qmp.last_event("RESUME")
            if now == "running" or (resumed is not None and resumed.time >= before):
                return
            await asyncio.sleep(_POLL_S)
        raise HypervisorError(f"VM {self._name} took `cont` but its runstate is {now}")

    async def announce(self) -> None:
        # The guest runs: that this failed must not look as if it did not.
        with contextlib.suppress(SealiftError):
            await self._qmp.execute("announce-self", _ANNOUNCE)

    async def pause(self) -> None:
        await self._qmp.execute("stop")

    async def powerdown(self) -> None:
        await self._qmp.execute("system_powerdown")

    async def quit(self, timeout: float = 10) -> None:
        with contextlib.suppress(SealiftError):
            await self._qmp.execute("quit", timeout=timeout)
        if not await self._process.wait_exit(timeout):
            self._process.kill()
        await self._ended()

    async def kill(self) -> None:
        self._process.kill()
        await self._ended()

    async def _ended(self) -> None:
        if not await self._process.wait_exit(10):
            raise HypervisorError(
                f"QEMU of VM {self._name} (pid {self._process.pid}) does not end, not even by SIGKILL",
                todo="it hangs in the kernel: look at its disks and at the kernel log",
            )
        await self._qmp.close()
        await asyncio.to_thread(remove_sockets, self._paths)

    async def close(self) -> None:
        await self._qmp.close()

    def events(self, since: float | None = None) -> AsyncIterator[QmpEvent]:
        return self._qmp.events(since)

    def last_event(self, name: str) -> QmpEvent | None:
        return self._qmp.last_event(name)
