"""The source's side of a move: it drives, and it alone knows the hinge, its QEMU's ``completed``.

Up to ``completed`` the guest goes on here by itself on any failure, and COMMIT was never sent (crash cell a). From
``completed`` on the way is forward only: the guest runs here again only after the target has durably aborted (cell b).
A QEMU that is gone before LET_GO left a crashed VM here and nothing at the target (cell d).
"""

from __future__ import annotations

import asyncio

from sealift.agent.commitlog import Mark
from sealift.agent.move import Move
from sealift.agent.watch import CONTROL
from sealift.domain.move import Answer, MoveState
from sealift.errors import (
    HypervisorError,
    MigrationCancelled,
    MigrationFailed,
    OutcomeUnknown,
    PeerUnreachable,
    QemuGone,
    QmpTimeout,
    SealiftError,
    StreamTruncated,
    VmCrashed,
)

_CONNECT_S = 15.0
_RETRY_S = 1.0
_SETTLE_S = 0.1
_REASON_S = 1.0
_LINK_S = 2.0  # how long the control channel may be interrupted before somebody else may carry the answer
_HANDED_OVER_S = 0.002
_HANDED_OVER = frozenset({"finish-migrate", "postmigrate"})
_STOPPED = frozenset({*_HANDED_OVER, "paused"})


class SourceMove(Move):
    """One attempt, as the source. ``run`` goes from wherever the facts stand to a final state."""

    async def run(self) -> None:
        """How it ended is in ``status``. Raises HypervisorError when QEMU does not answer; run it again then."""
        if self.log.last is Mark.RELEASED:  # the agent was restarted between the mark and the end
            await self.finish(MoveState.DONE)
            return
        # Nothing is concluded from facts that were not seen yet.
        await self.watch.until(lambda: bool(self.watch.runstate) or self.watch.qemu_gone)
        if self.log.last is Mark.ABORTED and self.watch.info.status == "completed":
            await self._take_back()
            return
        try:
            await self._copy_and_switch()
        except SealiftError as failure:
            if await self._keep(failure):
                return
        await self._commit()

    def _completed(self) -> bool:
        """The hinge. The runstate belongs to it: a VM that came in by migration says ``completed`` too, running."""
        return self.watch.info.status == "completed" and self.watch.runstate in _HANDED_OVER

    async def _copy_and_switch(self) -> None:
        """Return when QEMU says ``completed``; raise for every other end."""
        watch = self.watch
        if not self.recovered:
            await self._begin()
        elif self.status.state is MoveState.PREPARING:
            raise MigrationFailed("the agent was restarted before the migration began")
        while not self._completed():
            status = watch.info.status
            if watch.qemu_gone:
                raise QemuGone(f"the QEMU of VM {self.order.vm_name} on {self.order.source_name} has ended")
            if status in ("none", "failed", "cancelled"):
                # A relay closes QEMU's sockets before it says why; its word is the better one.
                await watch.until(lambda: watch.broken is not None, _REASON_S)
                raise watch.broken or MigrationFailed(f"QEMU ended the migration: {watch.info.error or status}")
            if status == "completed" and watch.runstate == "running":
                raise MigrationFailed("the agent was restarted before the migration began")
            if watch.broken is not None:
                raise watch.broken
            if watch.cancel_asked or watch.abort_asked:
                raise MigrationCancelled("the migration was cancelled")
            if "ABORTED" in watch.messages:
                reason = str(watch.messages["ABORTED"].get("reason", ""))
                raise MigrationFailed(f"{self.order.target_name} gave up: {reason}")
            if status == "pre-switchover":
                await self._switch_over()
            await watch.until(lambda seen=status: self._news(seen))  # type: ignore[misc]

    def _news(self, seen: str) -> bool:
        watch = self.watch
        self.progress(watch.info.progress)
        asked = watch.cancel_asked or watch.abort_asked or "ABORTED" in watch.messages
        return watch.qemu_gone or watch.broken is not None or asked or watch.info.status != seen or self._completed()

    async def _begin(self) -> None:
        watch = self.watch
        ready = await watch.until(
            lambda: watch.connected or watch.broken is not None or watch.cancel_asked or watch.abort_asked, _CONNECT_S
        )
        if watch.broken is not None:
            raise watch.broken
        if watch.cancel_asked or watch.abort_asked:
            raise MigrationCancelled("the migration was cancelled")
        if not ready:
            raise PeerUnreachable(
                f"{self.order.source_name} cannot reach {self.order.target_name} at {self.order.target_address}",
                todo="check the migration address and the firewall between the hosts",
            )
        await self.vm.configure_source(self.order.options)
        self.note(MoveState.PRECOPY)
        await self.vm.migrate(self.directory / "migrate.sock")
        self.mark("migrate")
        await watch.look()  # what was seen before belongs to an earlier migration

    async def _switch_over(self) -> None:
        """The guest has stopped. LET_GO is durable before device state leaves, so COMMIT can never overtake it."""
        stopped = self.vm.last_event("STOP")
        await self.watch.enter("switchover")
        await asyncio.to_thread(self.log.write, Mark.LET_GO, self.now())
        await self.vm.continue_switchover()
        self.note(MoveState.SWITCHOVER, stopped_at=stopped.time if stopped else None)

    async def _keep(self, failure: SealiftError) -> bool:
        """Settle a failed attempt with the guest here; False when QEMU completed meanwhile and the way is forward."""
        try:
            if not await self._cancel_qemu():
                return False
        except QemuGone:
            await self._lost()
            return True
        cancelled = self.watch.cancel_asked or self.watch.abort_asked
        if self.log.last is Mark.LET_GO:
            await asyncio.to_thread(self.log.write, Mark.ABORTED, self.now())
        await self.watch.send("ABORT", reason=failure.what)
        if not isinstance(failure, (MigrationCancelled, MigrationFailed)):
            failure = MigrationFailed(f"{failure.what} [{failure.slug}]", todo=failure.todo)
        await self.finish(MoveState.CANCELLED if cancelled else MoveState.FAILED, failure)
        return True

    async def _cancel_qemu(self) -> bool:
        """Cancel, and wait until the guest goes on here as it was; False if QEMU completed. Raises QemuGone."""
        while True:
            try:
                await self.vm.cancel()
                runstate = await self.vm.status()
                if runstate == "postmigrate":
                    return False
                if runstate == "running" and (self.status.stopped_at is not None or self.log.last is Mark.LET_GO):
                    await self.vm.announce()
                if runstate != "finish-migrate":
                    return True  # also a guest that a disk error stopped meanwhile: it is here, as it was
            except QemuGone:
                raise
            except HypervisorError as error:
                self.note(self.status.state, error=error)
            await asyncio.sleep(_SETTLE_S)

    async def _lost(self) -> None:
        name, here = self.order.vm_name, self.order.source_name
        if self.log.last is Mark.LET_GO:
            await self.finish(
                MoveState.UNKNOWN,
                OutcomeUnknown(
                    f"VM {name}: its QEMU on {here} ended after it was let go",
                    todo=f"look whether {self.order.target_name} holds it, running or paused, before starting anything",
                ),
            )
            return
        await self.watch.send("ABORT", reason="the source's QEMU has ended")
        await self.finish(
            MoveState.CRASHED,
            VmCrashed(f"VM {name}: its QEMU on {here} ended during the migration", todo=f"start it again on {here}"),
        )

    async def _commit(self) -> None:
        """QEMU completed: hand over until the target has answered. Nobody gives up here."""
        watch = self.watch
        await watch.enter("committed")
        await self._handed_over()
        await watch.send("COMMIT", attempt=str(self.order.attempt), fence=self.order.fence)
        self.note(MoveState.COMMITTING)
        while (answer := self._answer()) is None:
            if watch.broken is not None:
                self.note(MoveState.AWAITING_ANSWER, error=watch.broken)
            elif watch.unheard and not await watch.until(
                lambda: self._answer() is not None or not watch.unheard, _LINK_S
            ):
                # The relays go on trying, for ever; a controller may be quicker in carrying the answer.
                self.note(MoveState.AWAITING_ANSWER, error=StreamTruncated(watch.link.interrupted.get(CONTROL, "")))
            await watch.until(
                lambda: (
                    self._answer() is not None or (watch.unheard and self.status.state is not MoveState.AWAITING_ANSWER)
                )
            )
        if answer is Answer.RUNNING:
            await asyncio.to_thread(self.log.write, Mark.RELEASED, self.now())
            await watch.look_at_relay()
            await self.finish(MoveState.DONE)
            return
        await self._take_back()

    def _answer(self) -> Answer | None:
        if self.watch.answer is not None:
            return self.watch.answer
        if "RUNNING" in self.watch.messages:
            return Answer.RUNNING
        return Answer.ABORTED if "ABORTED" in self.watch.messages else None

    async def _take_back(self) -> None:
        """The target has durably aborted: the guest is ours again."""
        await asyncio.to_thread(self.log.write, Mark.ABORTED, self.now())
        while True:
            try:
                if await self.vm.status() in _STOPPED:  # else it runs, or has run since and was stopped by a fault
                    await self.vm.cont_at_source(aborted=Answer.ABORTED)
                break
            except QmpTimeout as error:
                self.note(self.status.state, error=error)
                await asyncio.sleep(_RETRY_S)
            except QemuGone:
                await self._lost_after_abort()
                return
        reason = str(self.watch.messages.get("ABORTED", {}).get("reason", "the target gave up"))
        await self.finish(MoveState.FAILED, MigrationFailed(f"{self.order.target_name} did not take the VM: {reason}"))

    async def _lost_after_abort(self) -> None:
        here = self.order.source_name
        await self.finish(
            MoveState.CRASHED,
            VmCrashed(f"VM {self.order.vm_name}: its QEMU on {here} ended", todo=f"start it again on {here}"),
        )

    async def _handed_over(self) -> None:
        """Wait for ``postmigrate``, which follows ``completed`` at once and without an event."""
        try:
            while await self.vm.status() != "postmigrate":  # noqa: ASYNC110 - QEMU tells it by no event
                await asyncio.sleep(_HANDED_OVER_S)
        except QemuGone:
            return  # past it; only the target's answer matters now

    async def settle(self, state: MoveState) -> None:
        """The VM runs elsewhere: its QEMU here ends only now."""
        if state is MoveState.DONE:
            await self.vms.let_go(self.order.vm)
