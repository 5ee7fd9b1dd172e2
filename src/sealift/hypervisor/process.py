"""Processes that outlive whoever started them, and how to recognise them again.

A process is named by pid, start time (``/proc/PID/stat`` field 22, clock ticks since boot) and boot id, so a pid that
was given to another process meanwhile, or after a reboot, is never taken for ours. Signals go through a pidfd that
was opened before the start time was compared: there is no moment at which they could reach somebody else.

A spawned process leads its own session, has ``/dev/null`` as stdin, its log as stdout and stderr, ``/`` as working
directory and no other descriptor than those named. It stays in the control group of the agent: a service manager must
be told to stop the agent's main process only (systemd: ``KillMode=process``).
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sealift.errors import HypervisorError, QemuMissing

_children: dict[int, subprocess.Popen[bytes]] = {}
"""Children of ours that nobody has reaped yet, by pid."""


def boot_id() -> str:
    """The kernel's random id of this boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _start_time(pid: int) -> int | None:
    """When a process was started, None when there is none."""
    try:
        raw = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name, in parentheses, may hold anything; what follows its last one is fixed.
    return int(raw[raw.rindex(b")") + 2 :].split()[19])


def _ended(pidfd: int) -> bool:
    """Whether every thread of a process has ended.

    The state letter in ``/proc`` does not tell: it is the first thread's, and others, a virtual CPU's for one, may
    still run when that one is a zombie.
    """
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(0))


@dataclass(frozen=True)
class ProcessRef:
    """A process that can be recognised again, by this agent or a later one. All fields are JSON values."""

    pid: int
    start_time: int  # clock ticks since boot
    boot: str = ""  # empty: not compared

    @classmethod
    def of(cls, pid: int) -> ProcessRef:
        """The process that has this pid now; raises HypervisorError when there is none."""
        found = _start_time(pid)
        if found is None:
            raise HypervisorError(f"there is no process {pid}")
        return cls(pid, found, boot_id())

    def _open(self) -> int | None:
        """A pidfd of this very process, which the caller closes; None when it is gone."""
        try:
            pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return None
        if _start_time(self.pid) == self.start_time and self.boot in ("", boot_id()):
            return pidfd
        os.close(pidfd)
        return None

    def alive(self) -> bool:
        """Whether any of its threads still runs; a child of ours that has ended is reaped."""
        child = _children.get(self.pid)
        if child is not None and child.poll() is not None:
            _children.pop(self.pid, None)
        pidfd = self._open()
        if pidfd is None:
            return False
        try:
            return not _ended(pidfd)
        finally:
            os.close(pidfd)

    def kill(self, number: int = signal.SIGKILL) -> bool:
        """Send a signal; False when the process was gone already."""
        pidfd = self._open()
        if pidfd is None:
            return False
        try:
            if _ended(pidfd):
                return False
            signal.pidfd_send_signal(pidfd, number)
            return True
        except ProcessLookupError:
            return False
        finally:
            os.close(pidfd)

    async def wait_exit(self, timeout: float | None = None) -> bool:
        """Wait until it has ended, at most ``timeout`` seconds; whether it has. A child of ours is reaped."""
        pidfd = self._open()
        if pidfd is None:
            return True
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        loop.add_reader(pidfd, ended.set)
        try:
            async with asyncio.timeout(timeout):
                await ended.wait()
        except TimeoutError:
            pass
        finally:
            loop.remove_reader(pidfd)
            os.close(pidfd)
        return not self.alive()


def spawn(
    argv: Sequence[str],
    *,
    log_path: str | os.PathLike[str],
    pass_fds: Sequence[int] = (),
    env: Mapping[str, str] | None = None,
) -> ProcessRef:
    """Start a process that will outlive us; ``log_path`` (made 0600) takes what it prints, appended.

    ``argv[0]`` is an absolute path or found on PATH. ``env`` None: our own environment. Raises QemuMissing when there
    is no such program, HypervisorError when it cannot be started.
    """
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        child = subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=tuple(pass_fds),
            env=None if env is None else dict(env),
            start_new_session=True,
            cwd="/",
        )
    except FileNotFoundError:
        raise QemuMissing(f"there is no program {argv[0]}", todo="install it, or set its path") from None
    except OSError as error:
        raise HypervisorError(f"{argv[0]} cannot be started: {error.strerror}") from error
    finally:
        os.close(log)
    _children[child.pid] = child
    # Not yet reaped, so /proc has it even if it ended at once.
    return ProcessRef.of(child.pid)
