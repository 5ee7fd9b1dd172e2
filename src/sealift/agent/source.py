"""The source's side of a move: it drives, and it alone knows the hinge, its QEMU's ``completed``.

Up to ``completed`` the guest goes on here by itself on any failure, and COMMIT was never sent (crash cell a). From
``completed`` on the way is forward only: the guest runs here again only after the target has durably aborted (cell b).
A QEMU that is gone before LET_GO left a crashed VM here and nothing at the target (cell d).
"""

from __future__ import annotations

import asyncio

from sealift.agent.commitlog import Mark
from sealift.agent.move import Move
from sealift.domain.move import Answer, MoveState
from sealift.errors import (
    MigrationCancelled,
    MigrationFailed,
    OutcomeUnknown,
    PeerUnreachable,
    QemuGone,
    QmpTimeout,
    SealiftError,
    VmCrashed,
)

_CONNECT_S = 15
_RETRY_S = 1.0


class SourceMove(Move):
    """One attempt, as the source. ``run`` goes from wherever the facts stand to a final state."""

    async def run(self) -> None:
        """Never raises: how it ended is in ``status``."""
        try:
            await self._copy_and_switch()
        except SealiftError as failure:
            if await self._keep(failure):
                return
        await self._commit()

    async def _copy_and_switch(self) -> None:
        """Return when QEMU says ``completed``; raise for every other end."""
        watch = self.watch
        if watch.info.status == "none":
            await self._begin()
        while True:
            status = watch.info.status
            if watch.qemu_gone:
                raise QemuGone(f"the QEMU of VM {self.order.vm_name} on {self.order.source_name} has ended")
            if status == "completed":
                return
            if status in ("failed", "cancelled"):
                raise watch.broken or MigrationFailed(f"QEMU ended the migration: {watch.info.error or status}")
            if watch.broken is not None:
                raise watch.broken
            if watch.cancel_asked or watch.abort_asked:
                raise MigrationCancelled("the migration was cancelled")
            if "ABORTED" in watch.messages:
                reason = str(watch.messages["ABORTED"].get("reason", ""))
                raise MigrationFailed(f"{self.order.target_name} gave up: {reason}")
            if status == "pre-switchover":
                await self._switch_over()
            elif self.status.state is not MoveState.SWITCHOVER and status in ("setup", "active"):
                self.note(MoveState.PRECOPY)
            await watch.until(lambda seen=status: self._news(seen))  # type: ignore[misc]

    def _news(self, seen: str) -> bool:
        watch = self.watch
        self.progress(watch.info.progress)
        asked = watch.cancel_asked or watch.abort_asked
        return watch.qemu_gone or watch.broken is not None or asked or watch.info.status != seen

    async def _begin(self) -> None:
        watch = self.watch
        if self.recovered:
            raise MigrationFailed("the agent was restarted before the migration began")
        ready = await watch.until(lambda: watch.connected or watch.broken is not None or watch.cancel_asked, _CONNECT_S)
        if watch.broken is not None:
            raise watch.broken
        if watch.cancel_asked:
            raise MigrationCancelled("the migration was cancelled")
        if not ready:
            raise PeerUnreachable(
                f"{self.order.source_name} cannot reach {self.order.target_name} at {self.order.target_address}",
                todo="check the migration address and the firewall between the hosts",
            )
        await self.vm.configure_source(self.order.options)
        await self.vm.migrate(self.directory / "migrate.sock")
        await watch.until(lambda: watch.info.status != "none")

    async def _switch_over(self) -> None:
        """The guest has stopped. LET_GO is durable before device state leaves, so COMMIT can never overtake it."""
        stopped = self.vm.last_event("STOP")
        self.note(MoveState.SWITCHOVER, stopped_at=stopped.time if stopped else None)
        await asyncio.to_thread(self.log.write, Mark.LET_GO, self.now())
        await self.vm.continue_switchover()

    async def _keep(self, failure: SealiftError) -> bool:
        """Settle a failed attempt with the guest here; False when QEMU completed meanwhile and the way is forward."""
        try:
            info = await self._cancel_qemu()
        except QemuGone:
            await self._lost()
            return True
        if info == "completed":
            return False
        cancelled = self.watch.cancel_asked or self.watch.abort_asked
        if self.log.last is Mark.LET_GO:
            await asyncio.to_thread(self.log.write, Mark.ABORTED, self.now())
        await self.watch.send("ABORT", reason=failure.what)
        if not isinstance(failure, (MigrationCancelled, MigrationFailed)):
            failure = MigrationFailed(f"{failure.what} [{failure.slug}]", todo=failure.todo)
        await self.finish(MoveState.CANCELLED if cancelled else MoveState.FAILED, failure)
        return True

    async def _cancel_qemu(self) -> str:
        """Cancel and wait until the guest runs here again; QEMU's last word. Raises QemuGone."""
        while True:
            try:
                info = await self.vm.cancel()
                if info.status == "completed":
                    return info.status
                if await self.vm.status() == "running":
                    if self.status.stopped_at is not None:
                        await self.vm.announce()
                    return info.status
            except QmpTimeout as error:
                self.note(self.status.state, error=error)
            await asyncio.sleep(_RETRY_S / 10)

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
        self.note(MoveState.COMMITTING)
        if await self.runstate_settled():
            await watch.send("COMMIT", attempt=str(self.order.attempt), fence=self.order.fence)
        while (answer := self._answer()) is None:
            if watch.broken is not None:
                self.note(MoveState.AWAITING_ANSWER, error=watch.broken)
            await watch.until(
                lambda: self._answer() is not None
                or (watch.broken is not None and self.status.state is not MoveState.AWAITING_ANSWER)
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
                if await self.vm.status() != "running":
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

    async def runstate_settled(self) -> bool:
        """Wait for ``postmigrate`` after ``completed``; False when QEMU is gone, in which case only asking remains."""
        watch = self.watch
        await watch.until(lambda: watch.runstate == "postmigrate" or watch.qemu_gone)
        return not watch.qemu_gone
