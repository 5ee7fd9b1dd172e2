"""The VMs of this host: defined, started, stopped, found again after a restart of the agent, taken in and let go.

A VM is encrypted here when its configuration names keys of disks (``VmConfig.deks``). It starts only from the
configuration file that the order names, and only with keys that the vault holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import structlog

from sealift.agent.commitlog import let_go_by
from sealift.agent.definitions import Definitions
from sealift.agent.journal import Journal, VmRow
from sealift.agent.needed_files import check_files, make_images, refuse_taken, to_be_made
from sealift.agent.settings import AgentSettings
from sealift.agent.vault import Vault
from sealift.agent.vm_files import VmFiles, from_order
from sealift.domain.deks import wipe
from sealift.domain.move import MoveOrder
from sealift.domain.vm import VmConfig, VmState, VmStatus
from sealift.errors import (
    AlreadyExists,
    Conflict,
    HypervisorError,
    InvalidInput,
    NotFound,
    QemuGone,
    QmpTimeout,
    SealiftError,
    VmLetGo,
)
from sealift.hypervisor.base import Hypervisor, Vm, VmPaths
from sealift.hypervisor.images import Images
from sealift.hypervisor.own_thread import in_own_thread

log = structlog.get_logger()

_POWERDOWN_S = 45
_STATES = {
    "running": VmState.RUNNING,
    "inmigrate": VmState.INCOMING,
    "postmigrate": VmState.MIGRATED,
    "shutdown": VmState.STOPPED,
    "guest-panicked": VmState.CRASHED,
    "internal-error": VmState.CRASHED,
}


class Vms:
    """Every VM this host holds. A VM in a move is ``busy``, one whose disks are converted is ``converting``: nothing
    but the move or the conversion touches it."""

    def __init__(
        self, settings: AgentSettings, journal: Journal, hypervisor: Hypervisor, vault: Vault, images: Images
    ) -> None:
        self._settings, self._journal, self._hypervisor = settings, journal, hypervisor
        self.vault, self.files, self._images = vault, VmFiles(settings, journal), images
        self._rows = journal.vms()
        self._handles: dict[UUID, Vm] = {}
        self._locks: dict[UUID, asyncio.Lock] = {}
        self._definitions = Definitions(settings.name)
        self.busy: set[UUID] = set()
        self.converting: dict[UUID, UUID] = {}  # VM -> conversion

    def paths(self, vm: UUID) -> VmPaths:
        """Where a VM's sockets and logs lie on this host."""
        kept = self._settings.state_directory / "vms" / str(vm)
        kept.mkdir(parents=True, exist_ok=True, mode=0o700)
        return VmPaths(self._settings.run_directory / "vms" / str(vm), kept / "qemu.log", kept / "serial.log")

    def commits(self, vm: UUID) -> Path:
        """The directory of a VM's commit logs."""
        return self._settings.commits / str(vm)

    async def adopt(self) -> None:
        """Find again every VM that an earlier agent started."""
        for vm, row in self._rows.items():
            if row.process is None:
                if row.wanted:
                    await self._end_stray(vm, row.config.name)
                continue
            try:
                self._handles[vm] = await self._hypervisor.attach(self.paths(vm), row.process, vm)
                log.info("vm.found", vm=row.config.name, pid=row.process.pid)
            except QemuGone:
                log.warning("vm.gone", vm=row.config.name, wanted=row.wanted)
            except HypervisorError as error:  # one that hangs keeps nobody from the others
                log.error("vm.unclear", vm=row.config.name, pid=row.process.pid, what=str(error))

    async def _end_stray(self, vm: UUID, name: str) -> None:
        """End a QEMU that an earlier agent started, but did not live to note and to let run."""
        try:
            if await self._hypervisor.end_stray(self.paths(vm), vm):
                log.warning("vm.stray", vm=name)
        except HypervisorError as error:
            log.error("vm.unclear", vm=name, what=str(error))

    async def close(self) -> None:
        """Drop the connections; the VMs run on."""
        for handle in self._handles.values():
            await handle.close()

    def has(self, vm: UUID) -> bool:
        """Whether this VM is one of this host's."""
        return vm in self._rows

    def row(self, vm: UUID) -> VmRow:
        """A VM of this host; raises NotFound, Conflict for one that is only just being defined."""
        if vm not in self._rows:
            self._definitions.refuse(vm)
            raise NotFound(f"host {self._settings.name} has no VM {vm}")
        return self._rows[vm]

    def handle(self, vm: UUID) -> Vm:
        """The running process of a VM; raises Conflict when it does not run here, QmpTimeout when it hangs."""
        row = self.row(vm)
        handle = self._handles.get(vm)
        if handle is None and row.process is not None and row.process.alive():
            raise _hangs(row)
        if handle is None or not handle.process.alive():
            raise Conflict(f"VM {row.config.name} does not run on {self._settings.name}", todo="start it first")
        return handle

    async def list(self) -> list[VmStatus]:
        """The status of every VM here."""
        return [await self.status(vm) for vm in self._rows]

    async def status(self, vm: UUID) -> VmStatus:
        """What is true of one VM now; raises NotFound."""
        row = self.row(vm)
        state, message = await self._state(vm, row)
        accelerator = row.hardware.accelerator if row.hardware else None
        file = b""
        if row.config.deks:
            try:
                file = self.files.read(vm)
            except SealiftError as error:  # one VM's file keeps nobody from the others
                message = message or str(error)
        return VmStatus(
            vm,
            row.config.name,
            state,
            row.config,
            row.hardware,
            accelerator,
            message,
            file=file.decode("latin-1"),
            held=self.vault.held(vm),
        )

    async def _state(self, vm: UUID, row: VmRow) -> tuple[VmState, str]:
        handle = self._handles.get(vm)
        if handle is not None:
            try:
                runstate = await handle.status()
                return _STATES.get(runstate, VmState.PAUSED), "" if runstate in _STATES else f"QEMU says {runstate}"
            except QemuGone:
                # Nothing else asks for the handle of a process that has ended.
                self._handles.pop(vm, None)
                await handle.close()
            except QmpTimeout as error:
                return VmState.PAUSED, str(error)
        elif row.process is not None and row.process.alive():
            return VmState.PAUSED, str(_hangs(row))
        if let_go_by(self.commits(vm)):
            return VmState.MIGRATED, "let go in a migration"
        if row.wanted and vm not in self.busy:
            return VmState.CRASHED, f"its QEMU ended by itself; see {self.paths(vm).log}"
        return VmState.STOPPED, ""

    async def define(self, config: VmConfig, *, file: str, made_by_conversion: bool) -> VmStatus:
        """Take a VM's configuration in; ``file``: an encrypted one's configuration file (latin-1), else "".

        Images in clear that have a size and are not there are made, unless a conversion is to make them, encrypted
        from the beginning. Raises AlreadyExists, NotFound for a file it names that is not there, Conflict
        for a disk that another VM here has, InvalidInput.
        """
        if config.uuid in self._rows or config.uuid in self.busy:
            raise AlreadyExists(f"host {self._settings.name} has VM {config.uuid} already")
        with self._definitions.claim(config, [row.config for row in self._rows.values()]) as others:
            await in_own_thread(refuse_taken, config, others, self._settings.name)
            found = from_order(file, config.uuid) if file else None
            if (found.config if found else ()) != (config if config.deks else ()):
                raise InvalidInput(f"VM {config.name}: its configuration and its configuration file do not agree")
            if found is not None:
                self.files.refuse_older(config.uuid, found)
            if not made_by_conversion:
                await make_images(config, self._images)
            but = to_be_made(config) if made_by_conversion else ()
            await in_own_thread(check_files, config, self._settings.name, but=but)
            if found is not None:
                self.files.write(config.uuid, found)
            self._put(VmRow(config))
            return await self.status(config.uuid)

    async def start(self, vm: UUID, file: str) -> VmStatus:
        """Start a VM with the hardware its configuration gives now.

        ``file``: of an encrypted VM the SHA-256 of its configuration file, in hex digits, else "". Raises VmLetGo,
        Conflict, HypervisorError; VmTampered when the file here is another one, KeysNotHeld, InvalidInput.
        """
        async with self._lock(vm):
            if attempt := let_go_by(self.commits(vm)):
                raise VmLetGo(
                    f"VM {vm} was let go by {self._settings.name} in migration attempt {attempt}",
                    todo="start it at the host that `sealift vm show` names",
                )
            row = self.row(vm)
            self._refuse_busy(vm, row)
            state, _ = await self._state(vm, row)
            if state not in (VmState.STOPPED, VmState.CRASHED):
                raise Conflict(f"VM {row.config.name} is {state.value} on {self._settings.name}")
            config = self.files.to_start_from(row.config, file)
            deks = self.vault.take(vm, config.deks)
            try:
                await self._end(vm)  # a guest that powered off leaves its QEMU behind
                await in_own_thread(check_files, config, self._settings.name)
                record = await self._hypervisor.freeze(config)
                self._put(replace(row, config=config, hardware=record, process=None, wanted=True))
                handle = await self._hypervisor.start(record, self.paths(vm), deks)
            finally:
                wipe(deks)
            self._handles[vm] = handle
            self._put(replace(self._rows[vm], process=handle.process))
            await handle.cont_fresh()
            return await self.status(vm)

    async def put_file(self, vm: UUID, file: str) -> VmStatus:
        """Write an encrypted VM's configuration file anew (latin-1), running or not; its disks' keys stay the same.

        Raises Conflict for one older than the newest written here, or while the VM is moved or converted;
        InvalidInput, BundleInvalid.
        """
        async with self._lock(vm):
            row = self.row(vm)
            self._refuse_busy(vm, row)
            found = from_order(file, vm)
            if found.config.deks != row.config.deks:
                raise InvalidInput(f"the configuration file for VM {row.config.name} is of other disks or keys")
            self.files.refuse_older(vm, found)
            self.files.write(vm, found)
            self._put(replace(row, config=found.config))
            return await self.status(vm)

    async def stop(self, vm: UUID, *, force: bool) -> VmStatus:
        """Ask the guest to power off and wait for it, or with ``force`` end its QEMU; raises Conflict."""
        async with self._lock(vm):
            row = self.row(vm)
            self._refuse_busy(vm, row)
            handle = self.handle(vm)
            if not force:
                await _power_down(handle, row.config.name)
            self._put(replace(row, wanted=False))
            await self._end(vm)
            return await self.status(vm)

    async def delete(self, vm: UUID) -> None:
        """Forget a stopped VM, its keys, configuration file and logs; its disks stay.

        Raises Conflict while it runs, moves or is converted.
        """
        async with self._lock(vm):
            row = self.row(vm)
            self._refuse_busy(vm, row)
            state, _ = await self._state(vm, row)
            if state in (VmState.RUNNING, VmState.PAUSED, VmState.INCOMING):
                raise Conflict(f"VM {row.config.name} is {state.value}", todo="stop it first")
            await self._end(vm)
            self._journal.drop_vm(vm)
            del self._rows[vm]
            self.vault.forget(vm)
            await asyncio.to_thread(shutil.rmtree, self.paths(vm).log.parent)

    def reserve(self, vm: UUID, name: str) -> None:
        """From now on only a move touches this VM (``busy``); raises Conflict while a move or an order has it."""
        if vm in self.busy:
            raise Conflict(f"VM {name} is being migrated already")
        if vm in self.converting:
            raise self._being_converted(vm, name)
        if self._lock(vm).locked():
            raise Conflict(f"VM {name} is being started, stopped or deleted", todo="try again when that is done")
        self.busy.add(vm)

    async def reserve_for_conversion(self, vm: UUID, conversion: UUID) -> VmRow:
        """From now on only this conversion touches the VM's disks; ``finish_conversion`` or ``unreserve`` ends that.

        Raises NotFound, Conflict unless the VM is stopped or crashed and nothing else has it.
        """
        async with self._lock(vm):
            row = self.row(vm)
            self._refuse_busy(vm, row)
            state, _ = await self._state(vm, row)
            if state not in (VmState.STOPPED, VmState.CRASHED):
                raise Conflict(f"VM {row.config.name} is {state.value} on {self._settings.name}", todo="stop it first")
            await self._end(vm)  # a guest that powered off leaves its QEMU behind, which has the images open
            self.converting[vm] = conversion
            return self._rows[vm]

    def unreserve(self, vm: UUID) -> None:
        """The conversion has ended."""
        self.converting.pop(vm, None)

    def converted(self, row: VmRow) -> None:
        """The VM is this from now on; the journal has it already."""
        self._rows[row.config.uuid] = row
        self.unreserve(row.config.uuid)

    def gone(self, vm: UUID) -> bool:
        """Whether no process of this VM is left here."""
        row, handle = self._rows.get(vm), self._handles.get(vm)
        if handle is not None and handle.process.alive():
            return False
        return row is None or row.process is None or not row.process.alive()

    def take_in(self, order: MoveOrder, handle: Vm | None) -> None:
        """The VM of a committed move is this host's from now on; without a handle its QEMU is gone already.

        Its configuration file, if it is encrypted, is on the disk before the journal says so. Raises SealiftError.
        """
        config = order.hardware.config
        if order.file:
            file = from_order(order.file, order.vm)
            self.files.write(order.vm, file)
            config = file.config
        if handle is not None:
            self._handles[order.vm] = handle
        self._put(VmRow(config, order.hardware, handle.process if handle else None, wanted=True))

    async def let_go(self, vm: UUID) -> None:
        """The VM runs elsewhere: end its QEMU here and forget it. The commit log stays and refuses a start.

        Its keys stay in memory, so that it can come back while its key provider is away.
        """
        await self._end(vm)
        self._journal.drop_vm(vm)
        self._rows.pop(vm, None)
        self.files.remove(vm)
        self.paths(vm).log.unlink(missing_ok=True)

    async def _end(self, vm: UUID) -> None:
        handle = self._handles.pop(vm, None)
        if handle is not None:
            await handle.quit()
            await handle.close()
        with contextlib.suppress(OSError):  # not there, or somebody's rescue connection is
            self.paths(vm).directory.rmdir()
        if vm in self._rows and self._rows[vm].process is not None:
            self._put(replace(self._rows[vm], process=None))

    def _put(self, row: VmRow) -> None:
        self._journal.put_vm(row)
        self._rows[row.config.uuid] = row

    def _lock(self, vm: UUID) -> asyncio.Lock:
        return self._locks.setdefault(vm, asyncio.Lock())

    def _refuse_busy(self, vm: UUID, row: VmRow) -> None:
        if vm in self.busy:
            raise Conflict(f"VM {row.config.name} is being migrated", todo="wait, or cancel the migration")
        if vm in self.converting:
            raise self._being_converted(vm, row.config.name)

    def _being_converted(self, vm: UUID, name: str) -> Conflict:
        return Conflict(
            f"the disks of VM {name} are being converted on {self._settings.name} (conversion {self.converting[vm]})",
            todo="wait until that is done, or cancel it",
        )


def _hangs(row: VmRow) -> QmpTimeout:
    assert row.process is not None
    return QmpTimeout(
        f"the QEMU of VM {row.config.name} (pid {row.process.pid}) gave no answer when the agent was started",
        todo="look why it hangs, then restart the agent",
    )


async def _power_down(handle: Vm, name: str) -> None:
    """Wait until the guest has powered off; raises Conflict when it has not in time."""
    events = handle.events()
    await handle.powerdown()
    try:
        async with asyncio.timeout(_POWERDOWN_S):
            async for event in events:  # ends by itself with the process
                if event.name == "SHUTDOWN":
                    return
    except TimeoutError:
        raise Conflict(
            f"VM {name} did not power off within {_POWERDOWN_S} s",
            todo="shut it down from inside, or stop it with --force",
        ) from None
