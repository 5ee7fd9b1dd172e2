"""Takes the controllers' orders to move, keeps one task per attempt, and takes up again what an earlier agent began."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shutil
from dataclasses import replace
from uuid import UUID

import structlog

from sealift.agent.commitlog import CommitLog, Mark
from sealift.agent.handover import put_away
from sealift.agent.journal import Journal, MoveRow, aborted_unseen, unfinished
from sealift.agent.move import Move, Parts, marked
from sealift.agent.needed_files import check_files
from sealift.agent.order_checks import check_order, check_own, file_in
from sealift.agent.recovery import answered, ended, without_qemu
from sealift.agent.relays import Relays, relay_log
from sealift.agent.settings import AgentSettings
from sealift.agent.source import SourceMove
from sealift.agent.target import TargetMove
from sealift.agent.vms import Vms
from sealift.channel.doorman import remove_dead_doors
from sealift.channel.relay_client import RelayClient
from sealift.domain.deks import Deks, wipe
from sealift.domain.move import MOVE_FINAL, Answer, MoveOrder, MoveSecret, MoveState, MoveStatus, Role
from sealift.domain.vm import VmState
from sealift.errors import (
    AlreadyExists,
    ChannelError,
    Conflict,
    HypervisorError,
    NotFound,
    QemuGone,
    SealiftError,
)
from sealift.hypervisor.base import Hypervisor, Vm
from sealift.hypervisor.own_thread import in_own_thread

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
        self.relays = Relays(settings)
        self._moves: dict[UUID, Move] = {}
        self._ended: dict[UUID, MoveStatus] = {}
        self._tasks: dict[UUID, asyncio.Task[None]] = {}
        self._lock = asyncio.Lock()

    # orders

    async def take_source(self, order: MoveOrder, secret: MoveSecret) -> MoveStatus:
        """Begin to move a VM away; returns once the relay is there, the rest goes on by itself.

        An order that was carried out already is answered with its status. Raises StaleFence, Conflict, NotFound,
        PlanRefused, InvalidInput, ChannelError.
        """
        async with self._lock:
            if (known := self._known(order.attempt)) is not None:
                return known
            self._check(order, order.source)
            self._vms.reserve(order.vm, order.vm_name)
            try:
                return await self._set_out(order, secret)
            except BaseException:
                self._vms.busy.discard(order.vm)
                raise

    async def _set_out(self, order: MoveOrder, secret: MoveSecret) -> MoveStatus:
        if (await self._vms.status(order.vm)).state is not VmState.RUNNING:
            raise Conflict(f"VM {order.vm_name} does not run on {order.source_name}")
        own = self._vms.row(order.vm)
        check_own(order, own.config, own.hardware)
        vm = self._vms.handle(order.vm)
        row = self._row(order, Role.SOURCE)
        try:
            self._put(row)
            commits = await asyncio.to_thread(self._log, order, Role.SOURCE)
            relay = await self._start_relay(row, secret, vm)
            row = marked(row, "relay")
            return await self._begin(SourceMove(self._parts(row, vm, relay, commits, recovered=False)))
        except Exception as error:
            raise await self._undone(row, None, error) from None

    async def take_target(self, order: MoveOrder, secret: MoveSecret, deks: Deks) -> MoveStatus:
        """Prepare to receive a VM; returns once its QEMU listens behind the relay. Raises as ``take_source``.

        ``deks``: keys of an encrypted VM's disks, held from now on; without them the host must hold them already, else
        KeysNotHeld.
        """
        async with self._lock:
            if (known := self._known(order.attempt)) is not None:
                return known
            self._check(order, order.target)
            self._vms.reserve(order.vm, order.vm_name)
            try:
                return await self._await_arrival(order, secret, deks)
            except BaseException:
                self._vms.busy.discard(order.vm)
                raise

    async def _await_arrival(self, order: MoveOrder, secret: MoveSecret, deks: Deks) -> MoveStatus:
        if self._vms.has(order.vm):
            raise AlreadyExists(f"host {self._settings.name} has VM {order.vm_name} already")
        await self._hypervisor.check_record(order.hardware)
        await in_own_thread(check_files, order.hardware.config, self._settings.name)
        if (file := file_in(order)) is not None:
            self._vms.files.refuse_older(order.vm, file)
        row = self._row(order, Role.TARGET)
        vm: Vm | None = None
        brought = self._vms.vault.bring(order.vm, deks)
        try:
            self._put(row)
            commits = await asyncio.to_thread(self._log, order, Role.TARGET)
            vm = await self._receiver(order)
            row = replace(marked(row, "qemu"), process=vm.process)
            self._journal.put_move(row)
            relay = await self._start_relay(row, secret, vm)
            row = marked(row, "relay")
            await vm.configure_target(order.options)
            await vm.listen(row.directory / "incoming.sock")
            row = marked(row, "listening")
            move = TargetMove(replace(self._parts(row, vm, relay, commits, recovered=False), brought_keys=brought))
            move.note(MoveState.WAITING)
            return await self._begin(move)
        except Exception as error:
            if brought:
                self._vms.vault.forget(order.vm)
            raise await self._undone(row, vm, error) from None

    async def _receiver(self, order: MoveOrder) -> Vm:
        deks = self._vms.vault.take(order.vm, order.hardware.config.deks)
        try:
            return await self._hypervisor.prepare_incoming(order.hardware, self._vms.paths(order.vm), deks)
        finally:
            wipe(deks)

    def _known(self, attempt: UUID) -> MoveStatus | None:
        if attempt in self._moves or attempt in self._ended:
            return self.status(attempt)
        if self._journal.attempt_refused(attempt):
            raise Conflict(f"attempt {attempt} was ended before this order came")
        return None

    def _check(self, order: MoveOrder, meant: UUID) -> None:
        check_order(order, meant, host=self._host, name=self._settings.name, can_seal=self._can_seal)
        self._journal.check_fence(order.vm, order.fence)

    def _row(self, order: MoveOrder, role: Role) -> MoveRow:
        directory = self._settings.run_directory / "moves" / secrets.token_hex(8)
        status = MoveStatus(order.attempt, role, MoveState.PREPARING, channels=1 + order.options.multifd_channels)
        return marked(MoveRow(order, status, directory), "ordered")

    def _put(self, row: MoveRow) -> None:
        self._journal.put_move(row)
        row.directory.mkdir(parents=True, mode=0o700)

    async def _undone(self, row: MoveRow, vm: Vm | None, error: Exception) -> Exception:
        """Leave nothing of an attempt that could not begin; answers what to say."""
        self.relays.prepare()
        if vm is not None:
            await vm.kill()
        await RelayClient(str(row.directory)).close()
        shutil.rmtree(row.directory, ignore_errors=True)
        relay_log(self._settings.relay_logs, row.order, row.status.role).unlink(missing_ok=True)
        self._journal.drop_move(row.order.attempt)
        with contextlib.suppress(OSError, SealiftError):
            await asyncio.to_thread(put_away, self._vms.commits(row.order.vm), row)
        if isinstance(error, OSError):
            what = f"host {self._settings.name} cannot begin the move: {error.strerror}"
            return SealiftError(what, todo="look at its disks and at the agent's log")
        return error

    def _log(self, order: MoveOrder, role: Role) -> CommitLog:
        return CommitLog(self._vms.commits(order.vm), role, order.attempt, order.fence)

    async def _start_relay(self, row: MoveRow, secret: MoveSecret, vm: Vm) -> RelayClient:
        return await self.relays.start(row, secret, vm.process.pid)

    def _parts(self, row: MoveRow, vm: Vm, relay: RelayClient | None, commits: CommitLog, *, recovered: bool) -> Parts:
        return Parts(row, vm, relay, commits, self._journal, self._vms, self._settings, recovered)

    async def _begin(self, move: Move) -> MoveStatus:
        self._vms.busy.add(move.order.vm)
        await move.watch.start()
        self._moves[move.order.attempt] = move
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
            self.relays.prepare()

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
        if self.status(attempt).state is MoveState.UNKNOWN:
            async with self._lock:
                return await self._settle_by(attempt, answer)
        move = self._moves.get(attempt)
        if not isinstance(move, SourceMove) or move.status.state is not MoveState.AWAITING_ANSWER:
            if move is not None and move.ended:
                return move.status
            raise Conflict(f"attempt {attempt} does not wait for an answer on {self._settings.name}")
        move.watch.answer = answer
        move.watch.touch()
        await self._ended_or_late(move)
        return move.status

    async def _settle_by(self, attempt: UUID, answer: Answer) -> MoveStatus:
        """The source let go and its QEMU is gone: only the target's answer says what became of the VM."""
        row, status = self._journal.move(attempt), self.status(attempt)
        if row is None or status.state is not MoveState.UNKNOWN:
            return status
        if status.role is not Role.SOURCE or not self._vms.gone(row.order.vm):
            raise Conflict(f"attempt {attempt} cannot be settled by an answer on {self._settings.name}")
        commits = await asyncio.to_thread(self._log, row.order, Role.SOURCE)
        status = await asyncio.to_thread(answered, status, commits, answer)
        if status.state is MoveState.DONE:
            await self._vms.let_go(row.order.vm)
        self._journal.put_move(replace(row, status=status))
        self._moves.pop(attempt, None)
        self._ended[attempt] = status
        self._vms.busy.discard(row.order.vm)
        return status

    async def forget(self, attempt: UUID) -> None:
        """Drop a settled attempt; raises Conflict while it is not settled, NotFound when it is not known."""
        if (move := self._moves.get(attempt)) is not None and (move.ended or move.status.answer is not None):
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
            await asyncio.to_thread(put_away, self._vms.commits(row.order.vm), row)

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
            except (SealiftError, OSError, ValueError) as error:
                log.error("move.unrecovered", attempt=str(row.status.attempt), what=str(error))
                failure = error if isinstance(error, SealiftError) else SealiftError(str(error))
                self._ended[row.status.attempt] = ended(row.status, MoveState.UNKNOWN, failure)
                self._vms.busy.add(row.order.vm)

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
            self._vms.take_in(order, None)
        if status.state is MoveState.DONE:
            await self._vms.let_go(order.vm)
        shutil.rmtree(row.directory, ignore_errors=True)
        remove_dead_doors(str(self._settings.doors))
        self._journal.put_move(MoveRow(order, status, row.directory))
        self._ended[order.attempt] = status
        if status.state not in MOVE_FINAL:
            self._vms.busy.add(order.vm)

    async def _find(self, row: MoveRow) -> Vm | None:
        order = row.order
        try:
            if row.status.role is Role.SOURCE:
                return self._vms.handle(order.vm)
            if row.process is not None:
                return await self._hypervisor.attach(self._vms.paths(order.vm), row.process, order.vm)
            await self._hypervisor.end_stray(self._vms.paths(order.vm), order.vm)
        except (QemuGone, Conflict, NotFound) as error:
            log.warning("vm.gone", vm=order.vm_name, what=str(error))
        except HypervisorError as error:
            log.error("vm.unclear", vm=order.vm_name, what=str(error))
            raise
        return None

    async def close(self) -> None:
        """Stop driving; QEMUs and relays go on, and the next agent takes them up."""
        self.relays.close()
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        for move in self._moves.values():
            await move.watch.close()
