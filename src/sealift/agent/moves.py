"""Takes the controllers' orders to move, keeps one task per attempt, and takes up again what an earlier agent began."""

from __future__ import annotations

import asyncio
import secrets
import shutil
import socket
from pathlib import Path
from typing import Literal
from uuid import UUID

import structlog

from sealift.agent.commitlog import CommitLog, Mark, prune
from sealift.agent.journal import Journal, MoveRow, aborted_unseen, unfinished
from sealift.agent.move import Move, Parts, relay_log
from sealift.agent.recovery import ended, without_qemu
from sealift.agent.settings import AgentSettings
from sealift.agent.source import SourceMove
from sealift.agent.target import TargetMove
from sealift.agent.vms import Vms
from sealift.channel.doorman import door_path, remove_dead_doors
from sealift.channel.protocol import CHANNEL_VERSION, ChannelSpec
from sealift.channel.protocol import Plan as ChannelPlan
from sealift.channel.relay_client import RelayClient, start_relay
from sealift.channel.relay_spec import RelaySpec
from sealift.domain.move import MOVE_FINAL, Answer, MoveOrder, MoveSecret, MoveState, MoveStatus, Role, SealedSecret
from sealift.domain.vm import VmState
from sealift.errors import (
    AlreadyExists,
    ChannelError,
    Conflict,
    HypervisorError,
    InvalidInput,
    NotFound,
    PlanRefused,
    QemuGone,
    SealiftError,
)
from sealift.hypervisor.base import Hypervisor, Vm

log = structlog.get_logger()

_ANSWER_S = 45.0
_AGAIN_S = 1.0


class Moves:
    """Every attempt this host takes part in."""

    def __init__(
        self, settings: AgentSettings, host: UUID, journal: Journal, hypervisor: Hypervisor, vms: Vms, *, can_seal: bool
    ) -> None:
        self._settings, self._host, self._journal = settings, host, journal
        self._hypervisor, self._vms, self._can_seal = hypervisor, vms, can_seal
        self._moves: dict[UUID, Move] = {}
        self._ended: dict[UUID, MoveStatus] = {}
        self._tasks: dict[UUID, asyncio.Task[None]] = {}
        self._lock = asyncio.Lock()

    # orders

    async def take_source(self, order: MoveOrder, secret: MoveSecret) -> MoveStatus:
        """Begin to move a VM away; returns once the relay is there, the rest goes on by itself.

        An order that was carried out already is answered with its status. Raises StaleFence, Conflict, NotFound,
        PlanRefused, ChannelError.
        """
        async with self._lock:
            if (known := self._known(order.attempt)) is not None:
                return known
            self._check(order, order.source)
            if await self._other_move(order.vm):
                raise Conflict(f"VM {order.vm_name} is being migrated already")
            if (await self._vms.status(order.vm)).state is not VmState.RUNNING:
                raise Conflict(f"VM {order.vm_name} does not run on {order.source_name}")
            vm = self._vms.handle(order.vm)
            row = self._journaled(order, Role.SOURCE)
            try:
                commits = await asyncio.to_thread(self._log, order, Role.SOURCE)
                relay = await self._start_relay(row, secret, vm)
            except (SealiftError, OSError):
                self._journal.drop_move(order.attempt)
                raise
            return await self._begin(SourceMove(self._parts(row, vm, relay, commits, recovered=False)))

    async def take_target(self, order: MoveOrder, secret: MoveSecret) -> MoveStatus:
        """Prepare to receive a VM; returns once its QEMU listens behind the relay. Raises as ``take_source``."""
        async with self._lock:
            if (known := self._known(order.attempt)) is not None:
                return known
            self._check(order, order.target)
            if await self._other_move(order.vm):
                raise Conflict(f"VM {order.vm_name} is being migrated already")
            if any(status.uuid == order.vm for status in await self._vms.list()):
                raise AlreadyExists(f"host {self._settings.name} has VM {order.vm_name} already")
            await self._hypervisor.check_record(order.hardware)
            self._vms.check_files(order.hardware.config)
            row = self._journaled(order, Role.TARGET)
            vm: Vm | None = None
            try:
                commits = await asyncio.to_thread(self._log, order, Role.TARGET)
                vm = await self._hypervisor.prepare_incoming(order.hardware, self._vms.paths(order.vm))
                row = MoveRow(row.order, row.status, row.directory, vm.process)
                self._journal.put_move(row)
                relay = await self._start_relay(row, secret, vm)
                await vm.configure_target(order.options)
                await vm.listen(row.directory / "incoming.sock")
            except (SealiftError, OSError):
                if vm is not None:
                    await vm.kill()
                self._journal.drop_move(order.attempt)
                raise
            move = TargetMove(self._parts(row, vm, relay, commits, recovered=False))
            move.note(MoveState.WAITING)
            return await self._begin(move)

    def _known(self, attempt: UUID) -> MoveStatus | None:
        if attempt in self._moves or attempt in self._ended:
            return self.status(attempt)
        if self._journal.attempt_refused(attempt):
            raise Conflict(f"attempt {attempt} was ended before this order came")
        return None

    def _check(self, order: MoveOrder, meant: UUID) -> None:
        if meant != self._host or order.source == order.target:
            raise InvalidInput("the migration order is not for this host")
        if order.protection == "sealed" and not self._can_seal:
            raise PlanRefused(f"host {self._settings.name} cannot seal a move", todo="plan it again")
        if order.protection == "sealed" and order.channel_version != CHANNEL_VERSION:
            raise PlanRefused(f"host {self._settings.name} does not speak channel version {order.channel_version}")
        self._journal.check_fence(order.vm, order.fence)

    async def _other_move(self, vm: UUID) -> bool:
        return any(move.order.vm == vm and not move.ended for move in self._moves.values())

    def _journaled(self, order: MoveOrder, role: Role) -> MoveRow:
        directory = self._settings.run_directory / "moves" / secrets.token_hex(8)
        status = MoveStatus(order.attempt, role, MoveState.PREPARING, channels=1 + order.options.multifd_channels)
        row = MoveRow(order, status, directory)
        self._journal.put_move(row)
        directory.mkdir(parents=True, mode=0o700)
        return row

    def _log(self, order: MoveOrder, role: Role) -> CommitLog:
        return CommitLog(self._vms.commits(order.vm), role, order.attempt, order.fence)

    async def _start_relay(self, row: MoveRow, secret: MoveSecret, vm: Vm) -> RelayClient:
        order, role = row.order, row.status.role
        sealed = isinstance(secret, SealedSecret)
        channel = ChannelSpec(
            attempt=order.attempt.bytes,
            subject=order.vm.bytes,
            source=order.source.bytes,
            target=order.target.bytes,
            plan=ChannelPlan.SEALED if sealed else ChannelPlan.PLAIN,
            version=order.channel_version,
            channels=1 + order.options.multifd_channels,
            window=order.limits.window_bytes,
            rekey_records=order.limits.rekey_records,
            rekey_bytes=order.limits.rekey_bytes,
        )
        raw = _raw(secret)
        route = order.attempt.bytes if sealed else raw
        spec = RelaySpec(
            role=role.value,
            spec=channel,
            directory=str(row.directory),
            qemu_pid=vm.process.pid,
            target=order.target_address if role is Role.SOURCE else "",
            door=door_path(str(self._settings.doors), route) if role is Role.TARGET else "",
            source_address="" if sealed or role is Role.SOURCE else await _ip_address(order.source_address),
        )
        self._settings.relay_logs.mkdir(exist_ok=True, mode=0o700)
        kind: Literal["relay", "splice"] = "relay" if sealed else "splice"
        await start_relay(kind, spec, raw, str(relay_log(self._settings.relay_logs, order, role)))
        return await RelayClient.connect(str(row.directory))

    def _parts(self, row: MoveRow, vm: Vm, relay: RelayClient | None, commits: CommitLog, *, recovered: bool) -> Parts:
        return Parts(row, vm, relay, commits, self._journal, self._vms, self._settings, recovered)

    async def _begin(self, move: Move) -> MoveStatus:
        self._moves[move.order.attempt] = move
        self._vms.busy.add(move.order.vm)
        await move.watch.start()
        self._tasks[move.order.attempt] = asyncio.create_task(self._run(move))
        return move.status

    async def _run(self, move: Move) -> None:
        attempt = move.order.attempt
        try:
            while not move.ended:
                try:
                    await move.run()
                    break
                except SealiftError as error:  # QEMU or the disk did not do its part: look again, from the facts
                    move.note(move.status.state, error=error)
                    move.recovered = True
                    await asyncio.sleep(_AGAIN_S)
        except Exception as error:  # a defect: the move stays as it is, for a person to look at, and is not guessed at
            log.exception("move.defect", attempt=str(attempt))
            move.note(MoveState.UNKNOWN, error=SealiftError(f"a defect in the agent: {type(error).__name__}"))
        finally:
            if move.status.state in MOVE_FINAL:
                self._vms.busy.discard(move.order.vm)

    # questions and further orders

    def status(self, attempt: UUID) -> MoveStatus:
        """How this host stands in an attempt; raises NotFound."""
        if (move := self._moves.get(attempt)) is not None:
            return move.status
        if attempt in self._ended:
            return self._ended[attempt]
        raise NotFound(f"host {self._settings.name} knows no attempt {attempt}")

    async def cancel(self, attempt: UUID) -> MoveStatus:
        """Ask the source to keep the VM; whether it could is in the status later. Raises NotFound."""
        status = self.status(attempt)
        if (move := self._moves.get(attempt)) is not None:
            move.watch.cancel_asked = True
            move.watch.touch()
        return status

    async def abort(self, attempt: UUID) -> MoveStatus:
        """End an attempt here and wait until it has ended; one never seen is refused from now on.

        Raises Conflict at a target that has committed.
        """
        async with self._lock:
            move = self._moves.get(attempt)
            if move is None:
                if attempt not in self._ended:
                    self._journal.refuse_attempt(attempt)
                return self._ended.get(attempt, aborted_unseen(attempt, Role.TARGET))
        if isinstance(move, TargetMove):
            move.refuse_abort()
        move.watch.abort_asked = True
        move.watch.touch()
        await self._ended_or_late(move)
        if isinstance(move, TargetMove):
            move.refuse_abort()  # COMMIT was quicker
        return move.status

    async def commit(self, attempt: UUID) -> MoveStatus:
        """The source's COMMIT, carried by a controller; returns with the durable answer when there is one."""
        move = self._moves.get(attempt)
        if move is None:
            return self.status(attempt)
        if not isinstance(move, TargetMove):
            raise Conflict(f"host {self._settings.name} is not the target of attempt {attempt}")
        move.watch.commit_asked = True
        move.watch.touch()
        await self._ended_or_late(move)
        return move.status

    async def answer(self, attempt: UUID, answer: Answer) -> MoveStatus:
        """The target's durable answer, carried by a controller. Raises Conflict unless the source waits for one."""
        move = self._moves.get(attempt)
        if not isinstance(move, SourceMove) or move.status.state is not MoveState.AWAITING_ANSWER:
            if move is not None and move.ended:
                return move.status
            raise Conflict(f"attempt {attempt} does not wait for an answer on {self._settings.name}")
        move.watch.answer = answer
        move.watch.touch()
        await self._ended_or_late(move)
        return move.status

    async def forget(self, attempt: UUID) -> None:
        """Drop a settled attempt; raises Conflict while it is not settled, NotFound when it is not known."""
        if (move := self._moves.get(attempt)) is not None and move.ended:
            await self._ended_or_late(move)  # it may still be closing its relay
        status = self.status(attempt)
        if status.state not in MOVE_FINAL:
            raise Conflict(f"attempt {attempt} is {status.state.value} on {self._settings.name}")
        row = self._journal.move(attempt)
        self._journal.drop_move(attempt)
        self._moves.pop(attempt, None)
        self._ended.pop(attempt, None)
        self._tasks.pop(attempt, None)
        if row is not None:
            await asyncio.to_thread(_put_away, self._vms.commits(row.order.vm), row)

    async def _ended_or_late(self, move: Move) -> None:
        task = self._tasks[move.order.attempt]
        await asyncio.wait([task], timeout=_ANSWER_S)

    # restarts

    async def recover(self) -> None:
        """Take up every attempt that an earlier agent left; to be called after ``Vms.adopt``."""
        remove_dead_doors(str(self._settings.doors))
        for row in self._journal.moves():
            if not unfinished(row):
                self._ended[row.status.attempt] = row.status
                continue
            try:
                await self._recover(row)
            except SealiftError as error:
                log.error("move.unrecovered", attempt=str(row.status.attempt), what=str(error))
                self._ended[row.status.attempt] = ended(row.status, MoveState.UNKNOWN, error)

    async def _recover(self, row: MoveRow) -> None:
        order, role = row.order, row.status.role
        commits = self._log(order, role)
        relay: RelayClient | None = None
        try:
            relay = await RelayClient.connect(str(row.directory))
        except ChannelError:
            log.warning("relay.gone", attempt=str(order.attempt))
        vm = await self._find(row)
        if vm is not None:
            side = SourceMove if role is Role.SOURCE else TargetMove
            await self._begin(side(self._parts(row, vm, relay, commits, recovered=True)))
            return
        if relay is not None:
            await relay.close()
        status = await asyncio.to_thread(without_qemu, row, commits)
        if role is Role.TARGET and commits.last is Mark.COMMITTED:
            self._vms.take_in(order.hardware, None)
        if status.state is MoveState.DONE:
            await self._vms.let_go(order.vm)
        shutil.rmtree(row.directory, ignore_errors=True)
        self._journal.put_move(MoveRow(order, status, row.directory))
        self._ended[order.attempt] = status

    async def _find(self, row: MoveRow) -> Vm | None:
        order = row.order
        try:
            if row.status.role is Role.SOURCE:
                return self._vms.handle(order.vm)
            if row.process is not None:
                return await self._hypervisor.attach(self._vms.paths(order.vm), row.process, order.vm)
        except (QemuGone, Conflict, NotFound) as error:
            log.warning("vm.gone", vm=order.vm_name, what=str(error))
        except HypervisorError as error:
            log.error("vm.unclear", vm=order.vm_name, what=str(error))
            raise
        return None

    async def close(self) -> None:
        """Stop driving; QEMUs and relays go on, and the next agent takes them up."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        for move in self._moves.values():
            await move.watch.close()


def _put_away(directory: Path, row: MoveRow) -> None:
    """Keep of a VM's commit logs what can still decide: not that of a target which aborted."""
    log_file = CommitLog(directory, row.status.role, row.order.attempt, row.order.fence)
    if row.status.role is Role.TARGET and log_file.last in (None, Mark.ABORTED, Mark.REVOKED):
        log_file.path.unlink()
    prune(directory)
    if not any(directory.iterdir()):
        directory.rmdir()


async def _ip_address(host: str) -> str:
    """The IP address that a migration address names; raises PlanRefused when it names none."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise PlanRefused(
            f"the source's migration address {host} cannot be resolved here: {error}",
            todo="give the source an IP address as migration_address",
        ) from None
    return str(found[0][4][0])


def _raw(secret: MoveSecret) -> bytes:
    match secret:
        case SealedSecret(key, nonce):
            return key.reveal() + nonce.reveal()
        case _:
            return secret.token.reveal()
