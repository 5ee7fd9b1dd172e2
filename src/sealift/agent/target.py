"""The target's side of a move: receives, holds the guest paused, and runs it only on COMMIT.

It may abort at any time before COMMITTED is durable, and never after. ABORTED is written only when its QEMU was killed
and reaped, so whoever reads the answer knows that no copy is left here.
"""

from __future__ import annotations

import asyncio
import contextlib

from sealift.agent.commitlog import Mark
from sealift.agent.move import Move
from sealift.domain.move import Answer, MoveState
from sealift.errors import (
    Conflict,
    HypervisorError,
    MigrationFailed,
    QemuGone,
    QmpRefused,
    QmpTimeout,
    SealiftError,
    VmCrashed,
)

_VERDICT_S = 10.0  # how long QEMU may take to notice that its stream was closed
_LINGER_S = 5.0  # how long the relay stays for the source to read RUNNING
_RETRY_S = 1.0
_ARRIVING = frozenset({"", "inmigrate", "paused"})


class TargetMove(Move):
    """One attempt, as the target. ``run`` goes from wherever the facts stand to a final state."""

    _unanswered = True  # a `cont` may have been sent whose answer nobody had

    async def run(self) -> None:
        """How it ended is in ``status``. Raises HypervisorError when QEMU does not answer; run it again then."""
        if self.log.last in (None, Mark.READY):
            try:
                await self._receive()
                await self._await_commit()
            except SealiftError as failure:
                await self._abort(failure)
                return
        if self.log.last in (Mark.ABORTED, Mark.REVOKED):  # the agent was restarted between the mark and the end
            await self._abort(MigrationFailed("the migration was aborted"))
            return
        await self._take_over()

    async def _receive(self) -> None:
        """Return when a complete paused copy is here."""
        watch = self.watch
        while not (watch.info.status == "completed" and watch.runstate == "paused"):
            self._check(receiving=True)
            if watch.broken is not None:
                # The relay closed QEMU's socket before it told us: QEMU completes or fails, and we take its word.
                begun = watch.info.status not in ("none", "setup")
                verdict = begun and await watch.until(self._verdict, _VERDICT_S)
                if not verdict or not self._complete():
                    raise watch.broken
            await watch.until(lambda: self._complete() or self._misfit() or self._stopped())
        if self.log.last is None:
            await asyncio.to_thread(self.log.write, Mark.READY, self.now())
        await watch.send("READY")
        self.note(MoveState.READY)

    def _complete(self) -> bool:
        return self.watch.info.status == "completed" and self.watch.runstate == "paused"

    def _misfit(self) -> bool:
        """Whether what arrived is no guest that ran: QEMU hands the runstate over too."""
        return self.watch.info.status == "completed" and self.watch.runstate not in _ARRIVING

    def _verdict(self) -> bool:
        return self._complete() or self._misfit() or self.watch.qemu_gone or self.watch.info.status == "failed"

    def _stopped(self) -> bool:
        watch = self.watch
        asked = watch.abort_asked or "ABORT" in watch.messages
        return asked or watch.qemu_gone or watch.info.status == "failed" or watch.broken is not None

    def _check(self, *, receiving: bool) -> None:
        watch = self.watch
        if watch.abort_asked:
            raise MigrationFailed("the controller ended the attempt")
        if "ABORT" in watch.messages:
            raise MigrationFailed(f"{self.order.source_name} gave up: {watch.messages['ABORT'].get('reason', '')}")
        if receiving and self._misfit():
            raise MigrationFailed(f"VM {self.order.vm_name} did not run any more: it arrived {watch.runstate}")
        if watch.qemu_gone or (receiving and watch.info.status == "failed"):
            raise watch.broken or QemuGone(f"the receiving QEMU on {self.order.target_name} has ended")

    async def _await_commit(self) -> None:
        """A complete copy is here; it stays paused until somebody who may says so. No timer decides."""
        watch = self.watch
        while not (watch.commit_asked or self._commit_received()):
            self._check(receiving=False)
            await watch.until(
                lambda: (
                    watch.commit_asked
                    or self._commit_received()
                    or watch.abort_asked
                    or "ABORT" in watch.messages
                    or watch.qemu_gone
                )
            )

    def _commit_received(self) -> bool:
        message = self.watch.messages.get("COMMIT", {})
        return (message.get("attempt"), message.get("fence")) == (str(self.order.attempt), self.order.fence)

    async def _take_over(self) -> None:
        """COMMITTED is written first; from then on the VM is this host's whatever happens."""
        if self.log.last is not Mark.COMMITTED:
            await asyncio.to_thread(self.log.write, Mark.COMMITTED, self.now())
            self._unanswered = False
        lost: VmCrashed | None = None
        try:
            await self._let_run()
        except QemuGone:
            # Ours, and gone: the source must release all the same, or the VM would belong to nobody.
            where = self.order.target_name
            lost = VmCrashed(f"VM {self.order.vm_name}: its QEMU on {where} ended", todo=f"start it again on {where}")
        except QmpRefused as failure:
            await self._revoke(failure)
            return
        await self.watch.enter("committed")  # the answer must get through: our relay gives up no more
        self.vms.take_in(self.order, self.vm)
        # Not final before the source was told and the relay has ended: an agent that dies in between does it again.
        resumed_at = self.status.resumed_at
        if resumed_at is None and lost is None:
            resumed = self.vm.last_event("RESUME")
            resumed_at = resumed.time if resumed else self.now()
        self.note(MoveState.COMMITTING, answer=Answer.RUNNING, resumed_at=resumed_at)
        await self._tell(Answer.RUNNING)
        await self.finish(MoveState.CRASHED if lost else MoveState.DONE, lost)

    async def _let_run(self) -> None:
        """Return when the guest runs, or has run: only ``cont`` leads out of ``paused``.

        Raises QmpRefused when ``cont`` itself was refused and none before can have let the guest run; QemuGone.
        """
        while True:
            try:
                if await self.vm.status() != "paused":
                    return
            except QmpTimeout as error:
                self.note(self.status.state, error=error)
                await asyncio.sleep(_RETRY_S)
                continue
            try:
                await self.vm.cont_at_target()
                return
            except HypervisorError as error:
                if isinstance(error, QemuGone) or (isinstance(error, QmpRefused) and not self._unanswered):
                    raise
                self._unanswered = True  # it may have been carried out: look again
                self.note(self.status.state, error=error)
                await asyncio.sleep(_RETRY_S)

    async def _revoke(self, failure: SealiftError) -> None:
        """``cont`` itself was refused and the guest never ran: with its QEMU dead the source may have it back."""
        await self.vm.kill()
        await asyncio.to_thread(self.log.write, Mark.REVOKED, self.now())
        await self._tell(Answer.ABORTED, reason=failure.what)
        await self.finish(MoveState.FAILED, failure)

    async def _abort(self, failure: SealiftError) -> None:
        """Leave nothing here, then say so."""
        await self.vm.kill()
        if self.log.last not in (Mark.ABORTED, Mark.REVOKED):
            await asyncio.to_thread(self.log.write, Mark.ABORTED, self.now())
        await self._tell(Answer.ABORTED, reason=failure.what)
        if not isinstance(failure, MigrationFailed):
            failure = MigrationFailed(f"{failure.what} [{failure.slug}]", todo=failure.todo)
        await self.finish(MoveState.FAILED, failure)

    async def settle(self, state: MoveState) -> None:
        """Nothing of a VM that is not this host's stays here, but for the console of an earlier stay."""
        if state is not MoveState.FAILED:
            return
        if self.brought_keys:
            self.vms.vault.forget(self.order.vm)
        paths = self.vms.paths(self.order.vm)
        self.fold(paths.log)
        if paths.serial.exists() and not paths.serial.stat().st_size:
            paths.serial.unlink()
        for directory in (paths.directory, paths.log.parent):
            with contextlib.suppress(OSError):  # an earlier stay left something in it
                directory.rmdir()

    async def _tell(self, answer: Answer, *, reason: str = "") -> None:
        self.note(self.status.state, answer=answer)
        if await self.watch.send(answer.name, reason=reason):
            # The source closes its relay once it has read this; ours must not close before.
            await self.watch.until(lambda: self.watch.broken is not None, _LINGER_S)

    def refuse_abort(self) -> None:
        """Raises Conflict when the VM is this host's already."""
        if self.log.last is Mark.COMMITTED:
            raise Conflict(
                f"VM {self.order.vm_name} was committed to {self.order.target_name}",
                todo="it runs there; nothing to abort",
            )
