"""What two hosts' reports of one attempt mean for the migration. Pure.

The source's report drives. The target's durable answer settles what the source cannot know. Nothing here is decided by
a clock, and where the reports do not settle it, the verdict says so instead of guessing (promise P4).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from sealift.domain.lifecycle import Event, State
from sealift.domain.move import Answer, MoveState, MoveStatus


class Absent(Enum):
    """Why there is no report."""

    MISSING = "missing"  # the agent answered, and knows nothing of the attempt
    SILENT = "silent"  # the agent did not answer


Report = MoveStatus | Absent


class Deed(Enum):
    """What the controller is to do now."""

    GIVE_UP = "give up"  # the source never took the order: end the attempt on both hosts
    ABORT_SOURCE = "abort source"  # the target cannot take the VM any more
    ASK_COMMIT = "ask commit"  # carry the source's COMMIT to the target
    TELL_RUNNING = "tell running"  # carry the target's answer to the source
    TELL_ABORTED = "tell aborted"


@dataclass(frozen=True)
class Verdict:
    """What follows from two reports; any part may be absent."""

    reached: State | None = None  # the furthest state proven
    deed: Deed | None = None
    end: Event | None = None  # how it ended, other than done
    at_target: bool = False  # with ``end``: the target owns the VM; otherwise it must be cleared first
    stuck: str = ""  # why nothing more can be known at this moment


PATH = (State.PREPARING, State.PRECOPY, State.SWITCHOVER, State.COMMITTING, State.CLEANING, State.DONE)
STEPS = (
    Event.PRECOPY_STARTED,
    Event.GUEST_STOPPED,
    Event.LET_GO,
    Event.RUNNING_AT_TARGET,
    Event.RELEASED,
)
"""``STEPS[i]`` leads from ``PATH[i]`` to ``PATH[i + 1]``."""

TARGET_OUT = frozenset({MoveState.FAILED, MoveState.CANCELLED, MoveState.CRASHED})
"""Target states in which, without an answer, it will never run the VM."""


def walk(state: State, reached: State) -> tuple[Event, ...]:
    """The steps from ``state`` to ``reached``; a look may have missed some in between. Never backwards."""
    if state is State.OUTCOME_UNKNOWN:
        # From here the table lets only what settles it happen.
        return STEPS[3 : PATH.index(reached)] if reached in (State.CLEANING, State.DONE) else ()
    return STEPS[PATH.index(state) : PATH.index(reached)] if state in PATH else ()


def runs(report: Report) -> bool:
    """Whether the target durably said that the guest runs there, or ran there until it crashed."""
    return isinstance(report, MoveStatus) and (report.answer is Answer.RUNNING or report.state is MoveState.DONE)


def judge(certain: State, source: Report, target: Report) -> Verdict:
    """What to make of both reports; ``certain`` is the last state known before an ``outcome_unknown``."""
    committed = runs(target) or certain is State.CLEANING
    if isinstance(source, MoveStatus):
        return _source_says(certain, source, target, committed)
    if committed:
        # A source that knows nothing has nothing left to release.
        if source is Absent.MISSING:
            return Verdict(reached=State.DONE)
        return Verdict(reached=State.CLEANING, stuck="the source does not answer; the VM runs at the target")
    if source is Absent.SILENT:
        return Verdict(stuck="the source does not answer")
    if certain is State.PREPARING:
        return Verdict(deed=Deed.GIVE_UP)
    return Verdict(stuck="the source has lost its record of the move")


def _source_says(certain: State, source: MoveStatus, target: Report, committed: bool) -> Verdict:
    match source.state:
        case MoveState.DONE:
            crashed = isinstance(target, MoveStatus) and target.state is MoveState.CRASHED
            if crashed and certain is not State.CLEANING:
                return Verdict(end=Event.QEMU_LOST, at_target=True)
            return Verdict(reached=State.DONE)
        case MoveState.FAILED | MoveState.CANCELLED if committed:
            return Verdict(stuck="both hosts say that the VM runs there; look at both, and stop one")
        case MoveState.FAILED:
            return Verdict(end=Event.SOURCE_KEPT)
        case MoveState.CANCELLED:
            return Verdict(end=Event.SOURCE_KEPT_ON_REQUEST)
        case MoveState.CRASHED:
            return Verdict(reached=State.DONE) if committed else Verdict(end=Event.QEMU_LOST)
        case MoveState.COMMITTING:
            return Verdict(reached=State.CLEANING if committed else State.COMMITTING)
        case MoveState.AWAITING_ANSWER | MoveState.UNKNOWN:
            return _unanswered(source, target, committed)
    reached = {MoveState.PRECOPY: State.PRECOPY, MoveState.SWITCHOVER: State.SWITCHOVER}.get(source.state)
    if isinstance(target, MoveStatus) and target.state in TARGET_OUT and reached is not State.SWITCHOVER:
        return Verdict(reached=reached, deed=Deed.ABORT_SOURCE)
    return Verdict(reached=reached)


def _unanswered(source: MoveStatus, target: Report, committed: bool) -> Verdict:
    """The source let go, or cannot tell; only the target's durable answer settles it."""
    if committed:
        stuck = "the source has not taken in that the VM runs at the target"
        return Verdict(reached=State.CLEANING, deed=Deed.TELL_RUNNING, stuck=stuck)
    waiting = source.state is MoveState.AWAITING_ANSWER
    reached = State.COMMITTING if waiting else None
    if not isinstance(target, MoveStatus):
        why = "does not answer" if target is Absent.SILENT else "has lost its record of the move"
        return Verdict(reached=reached, stuck=f"the source let the VM go, and the target {why}")
    if target.answer is Answer.ABORTED:
        return Verdict(reached=reached, deed=Deed.TELL_ABORTED)
    if waiting:
        return Verdict(reached=reached, deed=Deed.ASK_COMMIT)
    return Verdict(stuck="the source cannot tell whether it let the VM go, and the target has given no answer")
