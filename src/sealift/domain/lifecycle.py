"""The life of a migration: states, events and the one table of transitions. The diagram in docs/ is drawn from it.

A state says what the controller has recorded; it is recorded before the effect it stands for is performed. An event
with no entry raises IllegalTransition and changes nothing.
"""

from __future__ import annotations

from enum import Enum

from sealift.errors import IllegalTransition


class State(Enum):
    """Where a migration stands."""

    REQUESTED = "requested"  # asked for and recorded; nothing was looked at yet
    PLANNED = "planned"  # every check passed; nothing was touched yet
    REFUSED = "refused"  # a check or the policy said no; nothing was touched
    PREPARING = "preparing"  # key drawn, spec handed out; relays and the target's QEMU are being started
    PRECOPY = "precopy"  # memory is copied while the guest runs at the source
    SWITCHOVER = "switchover"  # the guest is stopped at the source; device state is in flight
    COMMITTING = "committing"  # the source let go; the target takes over
    CLEANING = "cleaning"  # the guest runs at the target; leftovers at the source are removed
    DONE = "done"
    FAILED = "failed"  # the VM runs at the source as before; the target is empty
    CANCELLED = "cancelled"  # the same, because somebody asked
    CRASHED = "crashed"  # the VM's QEMU is gone; it can be started from its disk at the host that owns it
    OUTCOME_UNKNOWN = "outcome_unknown"  # it cannot be known who has the VM; it stays paused


class Event(Enum):
    """What can happen to a migration."""

    PLAN_ACCEPTED = "plan accepted"
    PLAN_REFUSED = "plan refused"
    SPEC_DRAWN = "spec drawn"
    PRECOPY_STARTED = "precopy started"
    GUEST_STOPPED = "guest stopped at source"
    LET_GO = "source let go"
    RUNNING_AT_TARGET = "running at target"
    RELEASED = "source released"
    SOURCE_KEPT = "source kept the VM"
    SOURCE_KEPT_ON_REQUEST = "source kept the VM, cancelled"
    QEMU_LOST = "QEMU lost"
    CONTACT_LOST = "contact lost"


_S, _E = State, Event

TRANSITIONS: dict[State, dict[Event, State]] = {
    _S.REQUESTED: {
        _E.PLAN_ACCEPTED: _S.PLANNED,
        _E.PLAN_REFUSED: _S.REFUSED,
        _E.SOURCE_KEPT: _S.FAILED,
        _E.SOURCE_KEPT_ON_REQUEST: _S.CANCELLED,
    },
    _S.PLANNED: {
        _E.SPEC_DRAWN: _S.PREPARING,
        _E.SOURCE_KEPT: _S.FAILED,
        _E.SOURCE_KEPT_ON_REQUEST: _S.CANCELLED,
    },
    _S.PREPARING: {
        _E.PRECOPY_STARTED: _S.PRECOPY,
        _E.SOURCE_KEPT: _S.FAILED,
        _E.SOURCE_KEPT_ON_REQUEST: _S.CANCELLED,
        _E.QEMU_LOST: _S.CRASHED,
        _E.CONTACT_LOST: _S.OUTCOME_UNKNOWN,
    },
    _S.PRECOPY: {
        _E.GUEST_STOPPED: _S.SWITCHOVER,
        _E.SOURCE_KEPT: _S.FAILED,
        _E.SOURCE_KEPT_ON_REQUEST: _S.CANCELLED,
        _E.QEMU_LOST: _S.CRASHED,
        _E.CONTACT_LOST: _S.OUTCOME_UNKNOWN,
    },
    _S.SWITCHOVER: {
        _E.LET_GO: _S.COMMITTING,
        _E.SOURCE_KEPT: _S.FAILED,
        _E.SOURCE_KEPT_ON_REQUEST: _S.CANCELLED,
        _E.QEMU_LOST: _S.CRASHED,
        _E.CONTACT_LOST: _S.OUTCOME_UNKNOWN,
    },
    _S.COMMITTING: {
        _E.RUNNING_AT_TARGET: _S.CLEANING,
        _E.SOURCE_KEPT: _S.FAILED,
        _E.SOURCE_KEPT_ON_REQUEST: _S.CANCELLED,
        _E.QEMU_LOST: _S.CRASHED,
        _E.CONTACT_LOST: _S.OUTCOME_UNKNOWN,
    },
    _S.CLEANING: {_E.RELEASED: _S.DONE},
    _S.OUTCOME_UNKNOWN: {
        _E.RUNNING_AT_TARGET: _S.CLEANING,
        _E.SOURCE_KEPT: _S.FAILED,
        _E.SOURCE_KEPT_ON_REQUEST: _S.CANCELLED,
        _E.QEMU_LOST: _S.CRASHED,
    },
}

FINAL = frozenset({_S.REFUSED, _S.DONE, _S.FAILED, _S.CANCELLED, _S.CRASHED})
"""States a migration never leaves."""

CANCELLABLE = frozenset({_S.REQUESTED, _S.PLANNED, _S.PREPARING, _S.PRECOPY, _S.SWITCHOVER})
"""States in which a cancellation can still keep the VM at the source."""

GUEST_RUNS_AT_SOURCE = frozenset(
    {_S.REQUESTED, _S.PLANNED, _S.REFUSED, _S.PREPARING, _S.PRECOPY, _S.FAILED, _S.CANCELLED}
)
GUEST_RUNS_AT_TARGET = frozenset({_S.CLEANING, _S.DONE})
GUEST_RUNS_NOWHERE = frozenset({_S.SWITCHOVER, _S.COMMITTING, _S.CRASHED, _S.OUTCOME_UNKNOWN})


def step(state: State, event: Event) -> State:
    """The state after ``event``; raises IllegalTransition when the table has no such step."""
    try:
        return TRANSITIONS[state][event]
    except KeyError:
        raise IllegalTransition(f"a migration in state {state.value} cannot meet '{event.value}'") from None


def diagram() -> str:
    """The table as a Mermaid state diagram, for docs/lifecycle.md."""
    lines = ["stateDiagram-v2", f"    [*] --> {State.REQUESTED.value}"]
    for state, edges in TRANSITIONS.items():
        lines += [f"    {state.value} --> {after.value}: {event.value}" for event, after in edges.items()]
    lines += [f"    {state.value} --> [*]" for state in State if state in FINAL]
    return "\n".join(lines) + "\n"
