"""Faults in the middle of a move, and what must be true of the guest after each: one copy, whole, and it ticks.

Used by the end-to-end tests and by `./dev bench faults`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sealift.agent.commitlog import SLOT_BYTES, Mark
from sealift.demo.cluster import Cluster, Host
from sealift.demo.ports import free_port
from sealift.hypervisor.qemu_vm import UNLIMITED
from support.running_guest import Guest, left_behind, relay_pids
from support.step_cutter import MESSAGES, WHERES, Message, StepCutter, Where

PATIENCE_S = 90.0

Kind = Literal["reset", "down", "hole", "half-open", "frozen"]
KINDS: tuple[Kind, ...] = ("reset", "down", "hole", "half-open", "frozen")
"""Every connection reset; the same and nothing new for 2 s; all swallowed until the source's relay misses the target's,
or for 8 s; the source's ends alone reset; the target's relay stopped for 3 s."""

Point = Literal["precopy", "LET_GO", "COMMITTED"] | tuple[Message, Where]
POINTS: tuple[Point, ...] = (
    "precopy",
    "LET_GO",
    "COMMITTED",
    *((message, where) for message in MESSAGES for where in WHERES),
)
"""Where a fault strikes. The marks are those of the commit logs: the source's, written with the guest stopped and
before device state leaves, and the target's, written before the guest runs there."""

DOWN_S, FROZEN_S, HOLE_S = 2.0, 3.0, 8.0


@dataclass(frozen=True)
class CutCluster:
    """Hosts a and b; what others are told of their migration ports is a cutter's."""

    cluster: Cluster
    cutters: dict[str, StepCutter]

    def calm(self) -> None:
        """No fault is left over."""
        for cutter in self.cutters.values():
            cutter.calm()


@contextmanager
def cut_cluster(*, reset_every: int = 1 << 20) -> Iterator[CutCluster]:
    """A running cluster behind cutters. Its path is short, because UNIX sockets lie below it."""
    directory = Path(tempfile.mkdtemp(prefix="sl-"))
    cluster = Cluster(directory / "c")
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        cutters = {}
        stack.callback(cluster.close)
        cluster.start()
        for name in "ab":
            doorman = free_port()
            cutters[name] = cutter = StepCutter(doorman, reset_every=reset_every)
            stack.enter_context(cutter)
            cluster.add_host(name, migration_port=cutter.port, migration_listen=f"127.0.0.1:{doorman}")
        yield CutCluster(cluster, cutters)


class RelayLine:
    """The control socket of a host's only relay, beside its agent's."""

    def __init__(self, host: Host) -> None:
        (path,) = host.run.glob("moves/*/relay.sock")
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(PATIENCE_S)
        self._sock.connect(str(path))
        self._file = self._sock.makefile("rb")
        self._heard = 0

    def __enter__(self) -> RelayLine:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()
        self._sock.close()

    def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        """Its answer; empty when it has ended."""
        try:
            self._sock.sendall(json.dumps({"op": op, **fields}).encode() + b"\n")
            answer: dict[str, Any] = json.loads(self._file.readline() or b"{}")
        except OSError:
            return {}
        return answer

    def pass_over(self) -> None:
        """Count what has happened so far as heard."""
        for event in self.ask("wait", after=self._heard, timeout=0).get("events", []):
            self._heard = event["seq"]

    def hear(self, kind: str, **fields: object) -> bool:
        """Wait for an event with these fields that came after the last one heard.

        False when the relay ended, or too much time passed, without.
        """
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            events = self.ask("wait", after=self._heard, timeout=5).get("events")
            if events is None:
                return False
            for event in events:
                self._heard = event["seq"]
                if event["type"] == kind and all(event.get(name) == value for name, value in fields.items()):
                    return True
        return False


def wait_for_mark(host: Host, uuid: str, mark: Mark, over: threading.Event) -> bool:
    """Wait until a commit log of a VM at a host that is newer than this call has a mark; False when ``over`` first."""
    place = host.state / "commits" / uuid
    known = set(place.glob("*.log"))
    while not over.wait(0.001):
        for path in set(place.glob("*.log")) - known:
            with contextlib.suppress(FileNotFoundError):
                raw = path.read_bytes()
                if mark in {raw[at + 5] for at in range(0, len(raw), SLOT_BYTES) if raw[at : at + 4] == b"SLCR"}:
                    return True
    return False


@contextmanager
def at_mark(host: Host, guest: Guest, mark: Mark, act: Callable[[], None]) -> Iterator[threading.Event]:
    """Within the block: do ``act`` as soon as the mark is durable in the next move; the event says that it was."""
    over, hit = threading.Event(), threading.Event()

    def watch() -> None:
        if wait_for_mark(host, guest.uuid, mark, over):
            act()
            hit.set()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield hit
    finally:
        over.set()
        thread.join()


HELD = "4M"
"""For ``held_before_switchover``: less than the guest dirties, and its memory alone takes tens of seconds."""


@contextmanager
def held_before_switchover(guest: Guest, source: Host) -> Iterator[Callable[[], None]]:
    """Within the block the source's agent is stopped, so the move gets to pre-switchover and no further.

    What it yields lets it get there, and returns when it is: the guest has just stopped, and QEMU waits to be told to
    send device state. Before that the move is in precopy, if it was asked for with the bandwidth ``HELD``; that limit
    is lifted here. To be entered as soon as the move was asked for.
    """
    assert source.process is not None
    with _Qmp(source.run / "vms" / guest.uuid / "rescue.sock") as qmp:
        qmp.await_migration("active", after={"setup", *_EARLIER})
        source.process.send_signal(signal.SIGSTOP)

        def stopped() -> None:
            qmp.lift_bandwidth()
            qmp.await_migration("pre-switchover", after={"active"})

        try:
            yield stopped
            qmp.lift_bandwidth()
        finally:
            source.process.send_signal(signal.SIGCONT)


_EARLIER = {"none", "completed", "failed", "cancelled"}
"""What QEMU says before a migration begins: how the one before ended, coming in included."""


class _Qmp:
    """QEMU's socket for people, which the agent never uses."""

    def __init__(self, path: Path) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(PATIENCE_S)
        self._sock.connect(str(path))
        self._answers = self._sock.makefile("rb")
        self._answers.readline()  # the greeting
        self._execute("qmp_capabilities")

    def __enter__(self) -> _Qmp:
        return self

    def __exit__(self, *exc: object) -> None:
        self._answers.close()
        self._sock.close()

    def await_migration(self, wanted: str, after: set[str]) -> None:
        end = time.monotonic() + PATIENCE_S
        while (status := self._execute("query-migrate").get("status", "none")) != wanted:
            assert status in after, f"the migration is {status}, and was to become {wanted}"
            assert time.monotonic() < end, f"the migration is {status} after {PATIENCE_S} s"
            time.sleep(0.01)

    def lift_bandwidth(self) -> None:
        self._execute("migrate-set-parameters", {"max-bandwidth": UNLIMITED})

    def runs(self) -> bool:
        return bool(self._execute("query-status")["running"])

    def _execute(self, command: str, arguments: dict[str, int] | None = None) -> dict[str, Any]:
        self._sock.sendall(json.dumps({"execute": command, "arguments": arguments or {}}).encode() + b"\n")
        while "return" not in (answer := json.loads(self._answers.readline())):
            assert "event" in answer, answer
        returned: dict[str, Any] = answer["return"]
        return returned


def running_copies(guest: Guest) -> list[str]:
    """The hosts on which a QEMU of the guest says that it runs."""
    found = []
    for name in guest.copies():
        with contextlib.suppress(OSError, ValueError):
            host = guest.cluster.hosts[name]
            with _Qmp(host.run / "vms" / guest.uuid / "rescue.sock") as qmp:
                found += [name] if qmp.runs() else []
    return found


def carried_by_controller(source: Host, since: int) -> bool:
    """Whether the source's agent has asked for its answer another way since its log had the length ``since``.

    It does when the control channel was cut off for 2 s; then a controller may carry what was to cross the link.
    """
    return b"awaiting_answer" in source.log.read_bytes()[since:]


def freeze(host: Host, seconds: float) -> None:
    """Stop a host's relays now, and let them go on after a while."""
    for pid in relay_pids(host):
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(pid)
            signal.pidfd_send_signal(pidfd, signal.SIGSTOP)
            _later(seconds, lambda fd=pidfd: _thaw(fd))  # type: ignore[misc]


def _thaw(pidfd: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGCONT)
    os.close(pidfd)


def _later(seconds: float, act: Callable[[], None]) -> None:
    timer = threading.Timer(seconds, act)
    timer.daemon = True
    timer.start()


def strike(kind: Kind, cutter: StepCutter, source: Host, target: Host, *, seconds: float | None = None) -> None:
    """Let a fault happen now; what lasts ends by itself, after ``seconds`` if they are given."""
    match kind:
        case "reset":
            cutter.reset()
        case "down":
            cutter.down()
            _later(DOWN_S if seconds is None else seconds, cutter.up)
        case "hole":
            cutter.swallow()
            _later(HOLE_S if seconds is None else seconds, cutter.up)
            if seconds is not None:
                return
            threading.Thread(target=_end_hole, args=(cutter, source), daemon=True).start()
        case "half-open":
            cutter.reset_source_only()
        case "frozen":
            freeze(target, FROZEN_S if seconds is None else seconds)


def _end_hole(cutter: StepCutter, source: Host) -> None:
    with contextlib.suppress(ValueError, OSError), RelayLine(source) as relay:
        relay.pass_over()
        relay.hear("interrupted", channel=0, slug="peer_silent")
    cutter.up()


def settled(guest: Guest, ident: str, source: Host, target: Host, *, lost_before: int) -> dict[str, Any]:
    """The record of a move that had faults, once it has ended as a move may.

    Either it is done, or it failed with an error that has a name and the guest is where it was. In both cases there is
    one copy, a fresh check of all its memory finds nothing, no tick is missing, and the other host has nothing of it.
    """
    record = guest.wait(ident, timeout=PATIENCE_S)
    assert record["state"] in ("done", "failed"), record
    here, away = (target, source) if record["state"] == "done" else (source, target)
    assert record["state"] == "done" or record["error_slug"] == "migration_failed", record
    assert guest.nothing_left(away, timeout=PATIENCE_S)
    assert guest.show()["host"] == here.name
    assert guest.copies() == [here.name]
    end = time.monotonic() + PATIENCE_S
    while left := left_behind(here):
        assert time.monotonic() < end, f"left on {here.name}: {left}"
        time.sleep(0.05)
    assert guest.unharmed()
    assert guest.console.ticks.lost() == lost_before
    return record
