"""VMs as plain QEMU processes, steered over QMP: the hypervisor that needs nothing else installed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from sealift.domain.deks import Deks
from sealift.domain.vm import Accelerator, HardwareRecord, VmConfig
from sealift.errors import (
    AcceleratorUnavailable,
    Conflict,
    HardwareMismatch,
    HypervisorError,
    QemuGone,
    QemuMissing,
    QmpRefused,
    QmpTimeout,
)
from sealift.hypervisor import hardware
from sealift.hypervisor.base import VmPaths
from sealift.hypervisor.disks import check_image
from sealift.hypervisor.own_thread import in_own_thread
from sealift.hypervisor.passphrase import Passphrase
from sealift.hypervisor.probe import Probed, runs_vcpu
from sealift.hypervisor.process import ProcessRef, spawn
from sealift.hypervisor.qemu_vm import QemuVm, is_served, remove_sockets, server_of
from sealift.hypervisor.qmp import Qmp
from sealift.hypervisor.tap import open_tap
from sealift.hypervisor.unlock import check_held, unlock

__all__ = ["QemuHypervisor", "QemuVm"]

_START_S = 10.0
_AGAIN_S = 600.0
"""An accelerator that failed its probe is probed again after this long: the host may just have been too busy."""
_QUOTED_LINES, _QUOTED_BYTES = 5, 4096


@dataclass(frozen=True)
class _Facts:
    """What one installed binary says of itself."""

    version: str
    machines: dict[str, str]


def _environment() -> dict[str, str]:
    """QEMU's: nothing of ours."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LANG": "C"}


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())


class QemuHypervisor:
    """See ``base.Hypervisor``.

    ``binary`` is a name on PATH or an absolute path. ``accelerator`` is the host's configuration: KVM or TCG allow
    that one only, AUTO lets each VM have what it asks for, and KVM before TCG where it does not ask.
    """

    def __init__(self, binary: str = "qemu-system-x86_64", accelerator: Accelerator = Accelerator.AUTO) -> None:
        self._binary = binary
        self._accelerator = accelerator
        self._lock = asyncio.Lock()
        self._facts: dict[tuple[object, ...], _Facts] = {}
        self._probed: dict[tuple[object, ...], tuple[Probed, float]] = {}

    def _find(self) -> tuple[str, tuple[object, ...]]:
        """The binary's path, and what changes when another is installed."""
        path = shutil.which(self._binary)
        if path is None:
            raise QemuMissing(
                f"there is no {self._binary} on this host", todo="install QEMU (Debian: apt install qemu-system-x86)"
            )
        stat = os.stat(path)
        return path, (path, stat.st_ino, stat.st_size, stat.st_mtime_ns)

    async def _ask(self) -> _Facts:
        async with self._lock:
            path, identity = self._find()
            if identity not in self._facts:
                self._facts[identity] = await self._interrogate(path)
            return self._facts[identity]

    @staticmethod
    async def _interrogate(binary: str) -> _Facts:
        with tempfile.TemporaryDirectory(prefix="sealift-qemu-", ignore_cleanup_errors=True) as directory:
            log, sock = Path(directory, "log"), Path(directory, "qmp")
            hardware.check_socket(sock)
            process = spawn(
                [
                    binary,
                    *("-machine", "none", "-nodefaults", "-no-user-config", "-display", "none", "-S"),
                    *("-chardev", f"socket,id=qmp,path={str(sock).replace(',', ',,')},server=on,wait=off"),
                    *("-mon", "chardev=qmp,mode=control"),
                ],
                log_path=log,
                env=_environment(),
            )
            try:
                qmp = await Qmp.connect(sock, process=process, name="none (capabilities)", timeout=_START_S)
                try:
                    listed = await qmp.execute("query-machines")
                    version = qmp.version
                finally:
                    await qmp.close()
            except (QemuGone, QmpTimeout) as error:
                raise HypervisorError(f"{binary} does not start: {_tail(log, 0)}") from error
            finally:
                process.kill()
                await asyncio.shield(process.wait_exit(_START_S))
        machines: dict[str, str] = {}
        assert isinstance(listed, list)
        for each in listed:
            name = str(each["name"])
            if name.startswith(("pc-q35-", "pc-i440fx-")):
                machines[name] = name
                if "alias" in each:
                    machines[str(each["alias"])] = name
        return _Facts(version, machines)

    async def version(self) -> str:
        return (await self._ask()).version

    async def machines(self) -> dict[str, str]:
        return dict((await self._ask()).machines)

    async def cpu_model(self) -> str:
        text = await asyncio.to_thread(Path("/proc/cpuinfo").read_text, errors="replace")
        models = (line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name"))
        return next(models, "unknown")

    async def accelerators(self) -> tuple[Accelerator, ...]:
        async with self._lock:
            path, identity = self._find()
            wanted = (
                (Accelerator.KVM, Accelerator.TCG) if self._accelerator is Accelerator.AUTO else (self._accelerator,)
            )
            return tuple([each for each in wanted if await self._runs(each, path, identity)])

    async def _runs(self, accelerator: Accelerator, path: str, identity: tuple[object, ...]) -> bool:
        found, at = self._probed.get((accelerator, *identity), (Probed.FAILED, float("-inf")))
        if found is Probed.FAILED and time.monotonic() - at >= _AGAIN_S:
            found = await runs_vcpu(path, accelerator)
            self._probed[accelerator, *identity] = found, time.monotonic()
        return found is Probed.RAN

    async def freeze(self, config: VmConfig) -> HardwareRecord:
        return hardware.record(
            config,
            machines=await self.machines(),
            qemu_version=await self.version(),
            accelerator=await self._choose(config.accelerator, config.name),
        )

    async def _choose(self, wanted: Accelerator, name: str) -> Accelerator:
        working = await self.accelerators()
        if wanted is Accelerator.AUTO and working:
            return working[0]
        if wanted in working:
            return wanted
        if self._accelerator not in (Accelerator.AUTO, wanted) and wanted is not Accelerator.AUTO:
            todo = f"this host is configured for {self._accelerator.value}"
        else:
            todo = (
                "a short test guest did not run on it in time; use another accelerator, or another host; it is tested "
                f"again {_AGAIN_S / 60:.0f} min after it failed"
            )
        asked = self._accelerator if wanted is Accelerator.AUTO else wanted
        raise AcceleratorUnavailable(f"VM {name}: accelerator {asked.value} is not to be had on this host", todo=todo)

    async def check_record(self, record: HardwareRecord) -> None:
        name, facts = record.config.name, await self._ask()
        if record.machine not in facts.machines:
            raise HardwareMismatch(
                f"VM {name} has machine type {record.machine}, which QEMU {facts.version} on this host does not have",
                todo="install the same or a newer QEMU here",
            )
        if _version(facts.version) < _version(record.qemu_version):
            raise HardwareMismatch(
                f"VM {name} was started by QEMU {record.qemu_version}; this host has the older {facts.version}",
                todo="install the same or a newer QEMU here",
            )
        if record.version not in hardware.RECORD_VERSIONS:
            raise HardwareMismatch(f"VM {name} has a hardware record of format {record.version}, not known here")
        await self._choose(record.accelerator, name)

    async def start(self, record: HardwareRecord, paths: VmPaths, deks: Deks) -> QemuVm:
        return await self._launch(record, paths, deks, incoming=False)

    async def prepare_incoming(self, record: HardwareRecord, paths: VmPaths, deks: Deks) -> QemuVm:
        return await self._launch(record, paths, deks, incoming=True)

    async def attach(self, paths: VmPaths, process: ProcessRef, uuid: UUID) -> QemuVm:
        return await QemuVm.connect(paths, process, uuid)

    async def end_stray(self, paths: VmPaths, uuid: UUID) -> bool:
        pid = server_of(paths.qmp)
        if pid is None:
            return False
        try:
            vm = await QemuVm.connect(paths, ProcessRef.of(pid), uuid)
            runstate = await vm.status()
        except QemuGone:
            return False
        if runstate not in ("prelaunch", "inmigrate"):
            await vm.close()
            raise HypervisorError(
                f"an unknown QEMU (pid {pid}) has VM {uuid} in state {runstate}", todo="find out who started it"
            )
        await vm.kill()
        return True

    async def _launch(self, record: HardwareRecord, paths: VmPaths, deks: Deks, *, incoming: bool) -> QemuVm:
        config = record.config
        check_held(config, deks)
        await self.check_record(record)
        binary, _ = self._find()
        await in_own_thread(_prepare, record, paths)
        written = paths.log.stat().st_size if paths.log.exists() else 0
        with contextlib.ExitStack() as inherited:
            passed: list[int] = []
            tap = None
            if config.network.kind == "bridge":
                tap = open_tap(config.network)
                inherited.callback(os.close, tap)
                passed.append(tap)
            passphrase = inherited.enter_context(Passphrase()) if config.deks else None
            if passphrase is not None:
                passed.append(passphrase.fd)
            args = hardware.argv(record, paths, incoming=incoming, binary=binary, tap_fd=tap)
            process = spawn(args, log_path=paths.log, pass_fds=passed, env=_environment())
            vm: QemuVm | None = None
            try:
                vm = await QemuVm.connect(paths, process, config.uuid, timeout=_START_S)
                if passphrase is not None:
                    await unlock(vm.qmp, config, deks, passphrase, timeout=_START_S)
                return vm
            except BaseException as error:
                process.kill()
                await asyncio.shield(process.wait_exit(_START_S))
                if vm is not None:
                    await vm.close()
                remove_sockets(paths)
                if isinstance(error, QemuGone | QmpTimeout | QmpRefused):
                    raise HypervisorError(
                        f"QEMU of VM {config.name} did not start: {_tail(paths.log, written) or error.what}",
                        todo=f"see {paths.log}",
                    ) from error
                raise


def _prepare(record: HardwareRecord, paths: VmPaths) -> None:
    """Everything that can be found wanting before a process is started."""
    config = record.config
    for disk in config.disks:
        check_image(disk)
    files = [config.boot.kernel, config.boot.initrd] if config.boot else []
    for file in files:
        if file and not os.access(file, os.R_OK):
            raise HypervisorError(
                f"VM {config.name}: {file} cannot be read on this host", todo="put it there, on every host"
            )
    for path in (paths.qmp, paths.rescue):
        hardware.check_socket(path)
    paths.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    for file_path in (paths.log, paths.serial):
        file_path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if is_served(paths.qmp) or is_served(paths.rescue):
        raise Conflict(
            f"VM {config.name}: a process already serves {paths.qmp}", todo="the VM runs here already, it seems"
        )
    remove_sockets(paths)


def _tail(log: Path, start: int) -> str:
    """The last lines that were written to the log after offset ``start``, on one line."""
    try:
        with log.open("rb") as file:
            file.seek(max(start, log.stat().st_size - _QUOTED_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return " | ".join([line.strip() for line in text.splitlines() if line.strip()][-_QUOTED_LINES:])
