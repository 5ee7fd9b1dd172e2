"""Two hosts with the real agent's parts, over QEMUs and relays that are played, so that an agent can be killed between
any two of its effects and begun anew, in milliseconds.

What is played keeps the rules that matter. A guest that runs in two places, or runs again at its source after it ran at
its target, is noticed at that very moment (``World.wrongs``).
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from sealift.agent import moves, source, target, watch
from sealift.agent.commitlog import CommitLog, Mark
from sealift.agent.conversions import Conversions
from sealift.agent.journal import ConversionRow, Journal, MoveRow, VmRow
from sealift.agent.moves import Moves
from sealift.agent.settings import AgentSettings
from sealift.agent.vault import Vault
from sealift.agent.vms import Vms
from sealift.domain.deks import Deks
from sealift.domain.move import (
    Answer,
    ChannelLimits,
    MoveOptions,
    MoveOrder,
    MoveSecret,
    Progress,
    Role,
    SealedSecret,
)
from sealift.domain.vm import Accelerator, HardwareRecord, VmConfig
from sealift.errors import Conflict, ContRefused, QemuGone, QmpRefused, QmpTimeout, RelayGone, SealiftError
from sealift.hypervisor.base import MigrationInfo, QmpEvent, VmPaths
from sealift.hypervisor.images import Images
from sealift.hypervisor.process import ProcessRef
from sealift.secret import Secret

_pids = itertools.count(1 << 23)  # above every real one


class Killed(BaseException):
    """The agent's process is gone: nothing more of it happens."""


class Fuse:
    """Kills its agent at the ``at``-th of its effects: each counts once before it happens and once after."""

    def __init__(self, at: int = 0) -> None:
        self.at, self.count, self.blown = at, 0, False
        self.trace: list[str] = []

    def point(self, what: str) -> None:
        """Raises Killed when this is the moment, and ever after."""
        if self.blown:
            raise Killed
        self.count += 1
        self.trace.append(what)
        if self.count == self.at:
            self.blown = True
            raise Killed


class Qemu:
    """One QEMU process, as far as agents see it."""

    def __init__(self, world: World, host: str, config: VmConfig, *, incoming: bool) -> None:
        self.world, self.host, self.config = world, host, config
        self.pid = next(_pids)
        self.alive = True
        self.runstate = "inmigrate" if incoming else "prelaunch"
        self.status = "none"
        self.incoming = incoming
        self.peer: Qemu | None = None
        self.stopped_before = False  # the guest was not running when it was told to migrate
        self.cont_error: SealiftError | None = None
        self.cont_then: str = "running"  # where a guest gets to at once
        self.unanswered: set[str] = set()  # commands that are carried out, and whose answer is lost, once
        self.commands: list[str] = []
        self.keys: dict[UUID, bytes] = {}  # that it was started with
        world.qemus.append(self)
        world.dress(self)

    def run(self) -> None:
        """The guest runs from here on."""
        self.world.runs(self)
        self.runstate = "running"

    def die(self) -> None:
        """The process ends, whatever it was doing."""
        self.alive = False
        if self.incoming and self.peer is not None:
            self.peer.cut()

    def cut(self) -> None:
        """The stream of a migration broke."""
        if not self.alive:
            return
        if self.incoming:
            if self.status in ("setup", "active"):
                self.alive = False
        elif self.status in ("setup", "active", "pre-switchover", "device"):
            self.status = "failed"
            self._back()

    def _back(self) -> None:
        if self.stopped_before:
            self.runstate = "postmigrate" if self.runstate == "finish-migrate" else self.runstate
        elif self.runstate == "finish-migrate":
            self.run()

    def advance(self) -> None:
        """A migration gets one step further each time that somebody looks at it."""
        peer = self.peer
        if self.incoming or peer is None:
            return
        if not peer.alive or not self.world.linked():
            self.cut()
            peer.cut()
        elif self.status == "setup":
            self.status = peer.status = "active"
        elif self.status == "active":
            self.status, self.runstate = "pre-switchover", "finish-migrate"
        elif self.status == "device":
            peer.status, peer.runstate = "completed", self.world.arrives_as
            self.status, self.runstate = "completed", "postmigrate"

    def cancel(self) -> None:
        if self.status in ("setup", "active", "pre-switchover", "device"):
            self.status = "cancelled"
            self._back()
            if self.peer is not None:
                self.peer.cut()


class PlayedProcess(ProcessRef):
    """Where a QEMU's process is found."""

    def alive(self) -> bool:
        return any(qemu.pid == self.pid and qemu.alive for qemu in World.current.qemus)


class PlayedVm:
    """``hypervisor.base.Vm`` over a played QEMU; every command that changes something can be an agent's last."""

    def __init__(self, qemu: Qemu, fuse: Fuse) -> None:
        self.qemu, self.fuse = qemu, fuse
        self.process = PlayedProcess(qemu.pid, 1)
        self.uuid = qemu.config.uuid
        self._ended = asyncio.Event()

    def _there(self) -> None:
        if self.fuse.blown:
            raise Killed
        if not self.qemu.alive:
            raise QemuGone("QEMU has ended")

    def _do(self, what: str, effect: Callable[[], None]) -> None:
        self._there()
        self.fuse.point(f"before {what}")
        self._there()
        self.qemu.commands.append(what)
        effect()
        self.fuse.point(f"after {what}")
        if what in self.qemu.unanswered:
            self.qemu.unanswered.remove(what)
            raise QmpTimeout(f"QEMU did not answer {what}")

    async def status(self) -> str:
        self._there()
        return self.qemu.runstate

    async def migration(self) -> MigrationInfo:
        self._there()
        self.qemu.advance()
        return MigrationInfo(self.qemu.status, Progress(total_bytes=1))

    async def configure_source(self, options: MoveOptions) -> None:
        self._there()

    async def configure_target(self, options: MoveOptions) -> None:
        self._do("configure", lambda: None)

    async def listen(self, path: Path) -> None:
        def effect() -> None:
            self.qemu.status = "setup"

        self._do("listen", effect)

    async def migrate(self, path: Path) -> None:
        def effect() -> None:
            self.qemu.peer = self.qemu.world.incoming(self.qemu)
            self.qemu.stopped_before = self.qemu.runstate != "running"
            self.qemu.status = "setup"

        self._do("migrate", effect)

    async def continue_switchover(self) -> None:
        def effect() -> None:
            if self.qemu.status != "pre-switchover":
                raise QmpRefused("not in pre-switchover")
            self.qemu.status = "device"

        self._do("continue", effect)

    async def cancel(self, timeout: float = 10) -> MigrationInfo:
        self._do("cancel", self.qemu.cancel)
        return MigrationInfo(self.qemu.status)

    async def cont_fresh(self) -> None:
        self._do("cont", self.qemu.run)

    async def cont_at_target(self) -> None:
        self._there()
        if self.qemu.runstate != "paused" or self.qemu.status != "completed":
            raise ContRefused(f"its runstate is {self.qemu.runstate}")
        self._do("cont", self._cont)

    async def cont_at_source(self, *, aborted: Answer) -> None:
        self._there()
        if aborted is not Answer.ABORTED or self.qemu.runstate not in ("postmigrate", "paused"):
            raise ContRefused(f"its runstate is {self.qemu.runstate}")
        self._do("cont", self._cont)

    def _cont(self) -> None:
        if self.qemu.cont_error is not None:
            raise self.qemu.cont_error
        self.qemu.run()
        self.qemu.runstate = self.qemu.cont_then

    async def announce(self) -> None:
        self._there()

    async def powerdown(self) -> None:
        self._do("powerdown", lambda: None)

    async def quit(self, timeout: float = 10) -> None:
        if self.qemu.alive:
            self._do("quit", self.qemu.die)

    async def kill(self) -> None:
        if self.qemu.alive:
            self._do("kill", self.qemu.die)

    async def close(self) -> None:
        self._ended.set()

    async def _events(self) -> AsyncIterator[QmpEvent]:
        await self._ended.wait()
        return
        yield

    def events(self, since: float | None = None) -> AsyncIterator[QmpEvent]:
        return self._events()

    def last_event(self, name: str) -> QmpEvent | None:
        return None


class PlayedHypervisor:
    """What an agent starts QEMUs with and finds them again."""

    def __init__(self, host: Host, fuse: Fuse) -> None:
        self._host, self._fuse = host, fuse

    async def check_record(self, record: HardwareRecord) -> None:
        pass

    async def freeze(self, config: VmConfig) -> HardwareRecord:
        return replace(World.current.hardware, config=config)

    async def start(self, record: HardwareRecord, paths: VmPaths, deks: Deks) -> PlayedVm:
        return self._spawn(record, deks, incoming=False)

    async def prepare_incoming(self, record: HardwareRecord, paths: VmPaths, deks: Deks) -> PlayedVm:
        return self._spawn(record, deks, incoming=True)

    def _spawn(self, record: HardwareRecord, deks: Deks, *, incoming: bool) -> PlayedVm:
        if any(qemu.alive and qemu.host == self._host.name for qemu in World.current.qemus):
            raise Conflict("a process already serves these paths")
        self._fuse.point("before spawn")
        qemu = Qemu(World.current, self._host.name, record.config, incoming=incoming)
        qemu.keys = {dek: deks[dek].reveal() for dek in record.config.deks}
        self._fuse.point("after spawn")
        return PlayedVm(qemu, self._fuse)

    async def attach(self, paths: VmPaths, process: ProcessRef, uuid: UUID) -> PlayedVm:
        for qemu in World.current.qemus:
            if qemu.pid == process.pid and qemu.alive:
                return PlayedVm(qemu, self._fuse)
        raise QemuGone("QEMU has ended")

    async def end_stray(self, paths: VmPaths, uuid: UUID) -> bool:
        found = False
        for qemu in World.current.qemus:
            if qemu.host == self._host.name and qemu.alive and qemu.runstate in ("inmigrate", "prelaunch"):
                qemu.die()
                found = True
        return found


class PlayedRelay:
    """One side's relay process: outlives the agent."""

    def __init__(self, host: str) -> None:
        self.host = host
        self.alive = True
        self.events: list[dict[str, Any]] = []
        self.peer: PlayedRelay | None = None
        self.changed = asyncio.Event()

    def add(self, kind: str, **fields: Any) -> None:
        self.events.append({"seq": len(self.events) + 1, "type": kind, **fields})
        self.changed.set()

    @property
    def broken(self) -> bool:
        return any(event["type"] == "broken" for event in self.events)

    def die(self) -> None:
        """However it ends, the other side's channels break."""
        if self.alive:
            self.alive = False
            self.changed.set()
            if self.peer is not None and self.peer.alive and not self.peer.broken:
                self.peer.add("broken", slug="peer_closed", what="the other relay has ended")


class PlayedRelayClient:
    """``channel.relay_client.RelayClient``."""

    def __init__(self, relay: PlayedRelay, fuse: Fuse) -> None:
        self.relay, self.fuse = relay, fuse

    def _there(self) -> PlayedRelay:
        if self.fuse.blown:
            raise Killed
        if not self.relay.alive:
            raise RelayGone("the relay has ended")
        return self.relay

    async def status(self) -> dict[str, Any]:
        self._there()
        return {"sealed_out": 1, "sealed_in": 1, "clock_offset_us": 0.0}

    async def send(self, message: dict[str, Any]) -> None:
        relay = self._there()
        if relay.broken:
            raise Conflict("the control channel of this move is closed")
        self.fuse.point(f"before sending {message['type']}")
        if relay.peer is not None and relay.peer.alive:
            relay.peer.add("message", message=message)
        self.fuse.point(f"after sending {message['type']}")

    async def enter(self, phase: str) -> None:
        await self.status()

    async def wait(self, after: int, timeout: float) -> list[dict[str, Any]]:
        while True:
            relay = self._there()
            if len(relay.events) > after:
                return relay.events[after:]
            relay.changed.clear()
            await relay.changed.wait()

    async def close(self) -> None:
        if self.relay.alive:
            self.fuse.point("before closing the relay")
            self.relay.die()
            self.fuse.point("after closing the relay")

    def hang_up(self) -> None:
        pass


class FusedLog(CommitLog):
    """A commit log whose writer can die before and after each mark."""

    fuse: Fuse

    def write(self, mark: Mark, at: float) -> None:
        self.fuse.point(f"before {mark.name}")
        super().write(mark, at)
        self.fuse.point(f"after {mark.name}")


class FusedJournal(Journal):
    """A journal whose writer can die before and after each row."""

    fuse: Fuse

    def put_move(self, row: MoveRow) -> None:
        self.fuse.point(f"before journaling {row.status.role.value} {row.status.state.value}")
        super().put_move(row)
        self.fuse.point(f"after journaling {row.status.role.value} {row.status.state.value}")

    def put_vm(self, row: VmRow) -> None:
        self.fuse.point("before journaling the VM")
        super().put_vm(row)
        self.fuse.point("after journaling the VM")

    def drop_vm(self, vm: UUID) -> None:
        self.fuse.point("before dropping the VM")
        super().drop_vm(vm)
        self.fuse.point("after dropping the VM")

    def note_file(self, vm: UUID, generation: int, sha256: str) -> None:
        self.fuse.point("before noting the file")
        super().note_file(vm, generation, sha256)
        self.fuse.point("after noting the file")

    def put_conversion(self, row: ConversionRow) -> None:
        self.fuse.point(f"before journaling conversion {row.status.state.value}")
        super().put_conversion(row)
        self.fuse.point(f"after journaling conversion {row.status.state.value}")

    def finish_conversion(self, row: ConversionRow, vm: VmRow) -> None:
        super().finish_conversion(row, vm)
        self.fuse.point("after journaling the end")


class PlayedMoves(Moves):
    """The agent's moves, with played relays and fused logs."""

    host: Host

    def _log(self, order: MoveOrder, role: Role) -> CommitLog:
        log = FusedLog(self._vms.commits(order.vm), role, order.attempt, order.fence)
        log.fuse = self.host.fuse
        return log

    async def _start_relay(self, row: MoveRow, secret: MoveSecret, vm: Any) -> Any:
        fuse = self.host.fuse
        fuse.point("before starting the relay")
        relay = World.current.new_relay(self.host.name, row.directory)
        fuse.point("after starting the relay")
        return PlayedRelayClient(relay, fuse)


class Host:
    """One host: its agent may come and go, its QEMUs and relays stay."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name, self.id = name, uuid4()
        self.settings = AgentSettings(name, directory / name, run_directory=directory / f"{name}-run")
        for path in (self.settings.state_directory, self.settings.doors):
            path.mkdir(parents=True, mode=0o700)
        self.fuse = Fuse()
        self.images: Callable[[Fuse], Images] = lambda fuse: Images()
        self.vault: Vault
        self.vms: Vms
        self.moves: PlayedMoves
        self.conversions: Conversions

    async def boot(self, at: int = 0) -> None:
        """A new agent, which finds what is there; it dies at its ``at``-th effect."""
        self.fuse = Fuse(at)
        journal = FusedJournal(self.settings.database)
        journal.fuse = self.fuse
        hypervisor: Any = PlayedHypervisor(self, self.fuse)
        self._journal = journal
        images = self.images(self.fuse)
        self.vault = Vault(self.name)
        self.vms = Vms(self.settings, journal, hypervisor, self.vault, images)
        self.moves = PlayedMoves(self.settings, self.id, journal, hypervisor, self.vms, can_seal=True)
        self.moves.host = self
        self.conversions = Conversions(self.settings, journal, self.vms, images)
        await self.vms.adopt()
        await self.moves.recover()
        await self.conversions.recover()

    async def crash(self) -> None:
        """The agent is gone at once; whatever it had not done is not done."""
        self.fuse.blown = True
        tasks = list(self.moves._tasks.values())
        for each in self.moves._moves.values():
            tasks += each.watch._tasks
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._journal.close()


class World:
    """Both hosts, and everything between them."""

    current: World

    def __init__(self, directory: Path) -> None:
        World.current = self
        self.qemus: list[Qemu] = []
        self.relays: dict[Path, PlayedRelay] = {}
        self.wrongs: list[str] = []
        self.arrives_as = "paused"
        self.ran_at: list[str] = []
        self.dress: Callable[[Qemu], None] = lambda qemu: None  # what is special about a QEMU, as it is made
        self.config = VmConfig("web", uuid4(), 1, 64 << 20)
        self.hardware = HardwareRecord(1, self.config, "pc-q35-7.2", "max", Accelerator.TCG, {}, "7.2.22")
        self.file, self.deks = b"", dict[UUID, Secret]()  # of an encrypted VM
        self.a, self.b = Host("a", directory), Host("b", directory)

    async def begin(self) -> None:
        """Agents at both hosts; the VM runs at a."""
        await self.a.boot()
        await self.b.boot()
        qemu = Qemu(self, "a", self.config, incoming=False)
        qemu.run()
        self.a.vms.take_in(self.order(), PlayedVm(qemu, self.a.fuse))  # type: ignore[arg-type]

    def order(self, *, fence: int = 2, **changes: Any) -> MoveOrder:
        fields: dict[str, Any] = {
            "attempt": uuid4(),
            "fence": fence,
            "vm": self.config.uuid,
            "vm_name": self.config.name,
            "source": self.a.id,
            "source_name": "a",
            "source_address": "127.0.0.1",
            "target": self.b.id,
            "target_name": "b",
            "target_address": "127.0.0.1:7421",
            "protection": "sealed",
            "channel_version": 1,
            "reason": "both can",
            "options": MoveOptions(),
            "limits": ChannelLimits(),
            "hardware": self.hardware,
            "file": self.file.decode("latin-1"),
        }
        return MoveOrder(**fields | changes)

    def runs(self, qemu: Qemu) -> None:
        """A guest begins to run, or to run again."""
        others = [other for other in self.qemus if other is not qemu and other.alive and other.runstate == "running"]
        if others:
            self.wrongs.append(f"two copies run: {qemu.host} beside {others[0].host}")
        if qemu.host in self.ran_at and self.ran_at[-1] != qemu.host:
            self.wrongs.append(f"it runs again at {qemu.host} after it ran at {self.ran_at[-1]}")
        self.ran_at.append(qemu.host)

    def running(self) -> list[str]:
        """Where the guest runs now."""
        return [qemu.host for qemu in self.qemus if qemu.alive and qemu.runstate == "running"]

    def incoming(self, source: Qemu) -> Qemu | None:
        found = [q for q in self.qemus if q.alive and q.incoming and q.host != source.host and q.status == "setup"]
        for qemu in found:
            qemu.peer = source
        return found[0] if found else None

    def new_relay(self, host: str, directory: Path) -> PlayedRelay:
        relay = self.relays[directory] = PlayedRelay(host)
        for other in self.relays.values():
            if other.host != host and other.alive and other.peer is None:
                relay.peer, other.peer = other, relay
                relay.add("connected")
                other.add("connected")
        return relay

    def linked(self) -> bool:
        """Whether a stream can flow between the hosts."""
        return any(r.alive and r.peer is not None and r.peer.alive and not r.broken for r in self.relays.values())

    def lose(self, host: str, *, qemu: bool) -> None:
        """The relays of a host die, and with ``qemu`` its QEMUs: as when its power goes."""
        for relay in self.relays.values():
            if relay.host == host:
                relay.die()
        for each in self.qemus:
            if qemu and each.host == host and each.alive:
                each.die()


def secret() -> SealedSecret:
    """Some key and nonce."""
    return SealedSecret(Secret(bytes(32), length=32), Secret(bytes(8), length=8))


@pytest.fixture
def worlds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], World]:
    """Makes worlds in which nothing waits longer than it must; one at a time is looked at."""

    class Connect:
        def __init__(self, directory: str) -> None:
            self._directory = Path(directory)

        async def close(self) -> None:
            if (relay := World.current.relays.get(self._directory)) is not None:
                relay.die()

        @staticmethod
        async def connect(directory: str) -> PlayedRelayClient:
            made = World.current
            relay = made.relays.get(Path(directory))
            if relay is None or not relay.alive:
                raise RelayGone("the relay has ended")
            return PlayedRelayClient(relay, (made.a if relay.host == "a" else made.b).fuse)

    monkeypatch.setattr(moves, "RelayClient", Connect)
    for module, names in (
        (watch, {"_POLL_S": 0.001}),
        (moves, {"_AGAIN_S": 0.001, "_ANSWER_S": 9.0}),
        (
            source,
            {"_CONNECT_S": 0.05, "_REASON_S": 0.001, "_RETRY_S": 0.001, "_SETTLE_S": 0.001, "_HANDED_OVER_S": 0.001},
        ),
        (target, {"_VERDICT_S": 0.05, "_LINGER_S": 0.2, "_RETRY_S": 0.001}),
    ):
        for name, value in names.items():
            monkeypatch.setattr(module, name, value)
    numbers = itertools.count()
    return lambda: World(tmp_path / str(next(numbers)))


@pytest.fixture
def world(worlds: Callable[[], World]) -> World:
    """One of them."""
    return worlds()
