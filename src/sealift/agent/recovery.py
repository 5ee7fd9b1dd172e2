"""How an attempt ended whose QEMU was gone when the agent came back: the commit log says it, or nobody can."""

from __future__ import annotations

import time
from dataclasses import replace

from sealift.agent.commitlog import CommitLog, Mark
from sealift.agent.journal import MoveRow
from sealift.domain.move import Answer, MoveState, MoveStatus, Role
from sealift.errors import OutcomeUnknown, QemuGone, SealiftError, VmCrashed


def without_qemu(row: MoveRow, commits: CommitLog) -> MoveStatus:
    """The final status, or UNKNOWN; writes ABORTED at a target that had not committed."""
    status, name = row.status, row.order.vm_name
    crashed = VmCrashed(f"VM {name}: its QEMU ended while the agent was away", todo="start it again")
    if status.role is Role.TARGET:
        if commits.last is Mark.COMMITTED:
            return ended(status, MoveState.CRASHED, crashed, Answer.RUNNING)
        if commits.last in (None, Mark.READY):
            commits.write(Mark.ABORTED, time.time())
        return ended(status, MoveState.FAILED, QemuGone("the receiving QEMU has ended"), Answer.ABORTED)
    match commits.last:
        case Mark.RELEASED:
            return ended(status, MoveState.DONE, None)
        case Mark.LET_GO:
            unknown = OutcomeUnknown(
                f"VM {name}: its QEMU on {row.order.source_name} ended after it was let go, while the agent was away",
                todo=f"look whether {row.order.target_name} holds it, running or paused, before starting anything",
            )
            return ended(status, MoveState.UNKNOWN, unknown)
    return ended(status, MoveState.CRASHED, crashed)


def answered(status: MoveStatus, commits: CommitLog, answer: Answer) -> MoveStatus:
    """How an attempt ended whose source let go and lost its QEMU, once the target's durable answer is known."""
    if answer is Answer.RUNNING:
        commits.write(Mark.RELEASED, time.time())
        return replace(status, state=MoveState.DONE, error_slug="", error="")
    commits.write(Mark.ABORTED, time.time())
    return ended(status, MoveState.CRASHED, VmCrashed("its QEMU ended in the migration", todo="start it again"))


def ended(status: MoveStatus, state: MoveState, error: SealiftError | None, answer: Answer | None = None) -> MoveStatus:
    """``status`` with how it ended."""
    status = replace(status, state=state, answer=answer or status.answer)
    return replace(status, error_slug=error.slug, error=str(error)) if error else status
