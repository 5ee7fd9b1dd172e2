"""The interface of a hypervisor: what the agent may ask of it, and what it may rely on.

Two promises shape it. A VM outlives the agent: everything here can be found again from a ``ProcessRef`` and the paths
(``attach``), and closing a handle touches no guest. And a guest is let run only by the three ``cont_*`` functions, each
of which first looks at the runstate (P4: at most one copy runs).

Runstates are QEMU's own words (``prelaunch``, ``inmigrate``, ``running``, ``paused``, ``finish-migrate``,
``postmigrate``, ``shutdown``, ``io-error``, ...), migration statuses too (``none``, ``setup``, ``active``,
``pre-switchover``, ``device``, ``cancelling``, ``cancelled``, ``failed``, ``completed``).
``tests/contract/check_hypervisor.py`` checks every promise made here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol
from uuid import UUID

from sealift.domain.deks import Deks
from sealift.domain.move import Answer, MoveOptions, Progress
from sealift.domain.vm import Accelerator, HardwareRecord, VmConfig
from sealift.hypervisor.process import ProcessRef


@dataclass(frozen=True)
class VmPaths:
    """Where one VM's files lie on this host; all paths are absolute.

    ``directory`` holds the sockets; it is made 0700 when missing, and must be short: a UNIX socket's path has at most
    107 bytes. ``log`` takes QEMU's stderr (appended). ``serial`` takes the serial console's output (appended) unless
    the VM's configuration names a file of its own.
    """

    directory: Path
    log: Path
    serial: Path

    @property
    def qmp(self) -> Path:
        """The agent's QMP socket."""
        return self.directory / "qmp.sock"

    @property
    def rescue(self) -> Path:
        """A second QMP socket, for people; the agent never connects to it."""
        return self.directory / "rescue.sock"


@dataclass(frozen=True)
class QmpEvent:
    """One event. ``time`` is QEMU's own timestamp, seconds since the epoch on this host's clock.

    Besides QEMU's events there is ``RECONNECTED`` (time: ours): the QMP connection was lost and is there again, so
    events may have been missed; whoever sees it asks ``status`` and ``migration`` again.
    """

    name: str
    data: Mapping[str, object]
    time: float


RECONNECTED = "RECONNECTED"


@dataclass(frozen=True)
class MigrationInfo:
    """``query-migrate``. ``status`` is ``none`` when no migration was ever begun; ``error`` is QEMU's, else empty.

    ``downtime_ms`` is QEMU's own figure, known at the source once completed. A target of QEMU 7.2 reports a status
    only: its ``progress`` is all zeros.
    """

    status: str
    progress: Progress = field(default_factory=Progress)
    error: str = ""
    downtime_ms: int | None = None


class Vm(Protocol):
    """A handle on one running VM process. Every command is bounded in time.

    Any command raises QemuGone when the process has ended, QmpRefused when the hypervisor refused it, and QmpTimeout
    when no answer came, or the connection broke before one: then it is not known whether the command was carried out,
    and the caller asks ``status`` and ``migration``. A broken connection is made again by itself.
    """

    @property
    def process(self) -> ProcessRef:
        """The VM's process; to be recorded, for ``Hypervisor.attach``."""

    @property
    def uuid(self) -> UUID:
        """The VM's uuid, as confirmed by the process."""

    async def status(self) -> str:
        """The runstate."""

    async def migration(self) -> MigrationInfo:
        """The present or last migration of this process, outgoing or incoming."""

    async def configure_source(self, options: MoveOptions) -> None:
        """Set every capability and parameter of an outgoing migration anew, whatever was set before.

        Pause before switchover, return path and events are always on; a bandwidth of 0 means no limit.
        """

    async def configure_target(self, options: MoveOptions) -> None:
        """The same for an incoming one, to be called before ``listen``; disks are activated only by ``cont``."""

    async def set_bandwidth(self, bandwidth: int) -> None:
        """Change the limit of a migration under way, bytes per second; 0: none."""

    async def set_max_downtime(self, milliseconds: int) -> None:
        """Change the downtime limit of a migration under way."""

    async def listen(self, path: Path) -> None:
        """Accept the incoming migration on this UNIX socket; on return it is listening."""

    async def migrate(self, path: Path) -> None:
        """Begin migrating to whoever listens on this UNIX socket; returns at once.

        Raises HypervisorError when an earlier migration that failed has left the process unable to migrate.
        """

    async def continue_switchover(self) -> None:
        """Go on from ``pre-switchover``; raises QmpRefused in any other status."""

    async def cancel(self, timeout: float = 10) -> MigrationInfo:
        """Cancel an outgoing migration and wait until it is over; returns how it ended.

        It may have ``completed`` meanwhile: look. After ``cancelled`` or ``failed`` the guest goes on by itself if it
        ran before. Harmless when no migration runs.
        """

    async def cont_fresh(self) -> None:
        """Let a freshly started guest run; runstate must be ``prelaunch``, else ContRefused. Returns when it runs."""

    async def cont_at_target(self) -> None:
        """Let a received guest run. Returns when it runs and has announced itself to the network.

        Requires runstate exactly ``paused`` and the incoming migration ``completed``, else ContRefused. In
        ``inmigrate`` QEMU would take the command as "start by yourself when loaded": a start without a commit.
        """

    async def cont_at_source(self, *, aborted: Answer) -> None:
        """Let a guest that was handed over run here again, because the target has durably aborted.

        Requires ``Answer.ABORTED`` and runstate ``postmigrate`` or ``paused``, else ContRefused. Returns when it runs
        and has announced itself.
        """

    async def announce(self) -> None:
        """Tell the network that the guest is here, for one that goes on by itself; never raises."""

    async def pause(self) -> None:
        """Stop the guest's virtual CPUs; runstate is ``paused`` on return."""

    async def powerdown(self) -> None:
        """Ask the guest to power off; returns at once."""

    async def quit(self, timeout: float = 10) -> None:
        """End the process in order; killed if it has not ended in time. Gone on return."""

    async def kill(self) -> None:
        """End the process with SIGKILL; on return it is gone. Never raises because it was gone already."""

    async def close(self) -> None:
        """Drop the connection and leave the VM alone. The handle is of no more use."""

    def events(self, since: float | None = None) -> AsyncIterator[QmpEvent]:
        """Events from the moment of this call on; with ``since`` first those retained whose time is not before it.

        Any number of iterators may be open, each sees every event. They end when the process has ended or the handle
        was closed. About the last thousand events are retained.
        """

    def last_event(self, name: str) -> QmpEvent | None:
        """The latest retained event of that name, such as ``STOP`` or ``RESUME``."""


class Hypervisor(Protocol):
    """What starts VMs and finds them again. Facts about the installed binary are cached until it changes."""

    async def version(self) -> str:
        """Version of the installed hypervisor, e.g. ``7.2.22``; raises QemuMissing."""

    async def machines(self) -> dict[str, str]:
        """Every machine word we accept -> its versioned name: aliases, and each versioned name itself."""

    async def cpu_model(self) -> str:
        """The host's CPU in words, for capabilities."""

    async def accelerators(self) -> tuple[Accelerator, ...]:
        """The accelerators that this host's configuration allows and that really ran a virtual CPU; best first.

        Each is probed until it did so once, not again within ten minutes: 2 s for a KVM that hangs.
        """

    async def freeze(self, config: VmConfig) -> HardwareRecord:
        """The hardware record a start of ``config`` on this host would have now.

        Raises AcceleratorUnavailable, HardwareMismatch (no such machine type), InvalidInput.
        """

    async def check_record(self, record: HardwareRecord) -> None:
        """Whether this host can build that very hardware; raises HardwareMismatch or AcceleratorUnavailable."""

    async def start(self, record: HardwareRecord, paths: VmPaths, deks: Deks) -> Vm:
        """Start the VM's process; the guest does not run yet (``prelaunch``): call ``cont_fresh``.

        ``deks`` holds at least the keys of its encrypted disks (``VmConfig.deks``; ``{}`` for a VM in clear); they are
        read and not wiped. Raises KeysNotHeld, before anything is started, when one is missing; HypervisorError quoting
        the last lines of the log, or naming the disk that a key does not open, and then nothing of it is left running;
        Conflict when a process already serves these paths.
        """

    async def prepare_incoming(self, record: HardwareRecord, paths: VmPaths, deks: Deks) -> Vm:
        """Start a process that can receive the VM (``inmigrate``), not yet listening; errors as for ``start``."""

    async def end_stray(self, paths: VmPaths, uuid: UUID) -> bool:
        """End a process of this VM that its agent did not live to note; whether there was one.

        Only one whose guest has never run is ended. Raises HypervisorError for any other that serves these paths.
        """

    async def attach(self, paths: VmPaths, process: ProcessRef, uuid: UUID) -> Vm:
        """Find a VM again that an earlier agent started; raises QemuGone, or HypervisorError if it is another one."""
