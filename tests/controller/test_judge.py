"""Every pair of reports, in every state: nothing crashes the judge, and nothing unsafe ever follows."""

from __future__ import annotations

import itertools
from uuid import UUID

import pytest

from sealift.controller.judge import PATH, Absent, Deed, Report, judge, runs, walk
from sealift.domain.lifecycle import FINAL, TRANSITIONS, Event, State, step
from sealift.domain.move import Answer, MoveState, MoveStatus, Role

ATTEMPT = UUID(int=1)
SOURCES: list[Report] = [*Absent, *(MoveStatus(ATTEMPT, Role.SOURCE, state) for state in MoveState)]
TARGETS: list[Report] = [
    *Absent,
    *(MoveStatus(ATTEMPT, Role.TARGET, state, answer=answer) for state in MoveState for answer in (None, *Answer)),
]
WATCHED = PATH[:-1]


def state_of(report: Report) -> MoveState | None:
    return report.state if isinstance(report, MoveStatus) else None


@pytest.mark.parametrize("certain", WATCHED, ids=lambda state: state.value)
def test_whatever_the_two_say(certain: State) -> None:
    for source, target in itertools.product(SOURCES, TARGETS):
        verdict = judge(certain, source, target)
        told = (certain, source, target)
        committed = runs(target) or certain is State.CLEANING
        said = state_of(source)
        # Whatever follows is a way of the table, also from outcome_unknown.
        for state in (certain, State.OUTCOME_UNKNOWN):
            now = state
            for event in walk(state, verdict.reached) if verdict.reached else ():
                now = step(now, event)
            if verdict.end is not None:
                assert step(now, verdict.end) in FINAL, told
        # The VM is at the target only if the target durably said so, or the source released it.
        if verdict.reached in (State.CLEANING, State.DONE):
            assert committed or said is MoveState.DONE, told
        # The target is aborted only if it has not committed, and the source keeps the VM or its QEMU is gone.
        if verdict.end is not None and not verdict.at_target:
            assert not committed, told
            assert said in (MoveState.FAILED, MoveState.CANCELLED, MoveState.CRASHED), told
        # COMMIT is carried only for a source that waits for the answer.
        if verdict.deed is Deed.ASK_COMMIT:
            assert said is MoveState.AWAITING_ANSWER, told
            assert not committed, told
        # The source hears "aborted" only from the target's durable answer.
        if verdict.deed is Deed.TELL_ABORTED:
            assert isinstance(target, MoveStatus), told
            assert target.answer is Answer.ABORTED, told
            assert not committed, told
        if verdict.deed is Deed.TELL_RUNNING:
            assert committed, told
        # An attempt is given up only while the source never had it.
        if verdict.deed is Deed.GIVE_UP:
            assert (certain, source) == (State.PREPARING, Absent.MISSING), told
        if source is Absent.SILENT:
            assert verdict.end is None, told
            assert verdict.deed is None, told


@pytest.mark.parametrize(("state", "reached"), list(itertools.combinations(PATH, 2)))
def test_a_look_that_missed_states_walks_through_them(state: State, reached: State) -> None:
    now = state
    for event in walk(state, reached):
        now = step(now, event)
    assert now is reached
    assert walk(reached, state) == ()
    assert walk(state, state) == ()


def test_from_outcome_unknown_only_what_settles_it_leads_on() -> None:
    unknown = State.OUTCOME_UNKNOWN
    assert [walk(unknown, reached) for reached in PATH] == [
        (),
        (),
        (),
        (),
        (Event.RUNNING_AT_TARGET,),
        (Event.RUNNING_AT_TARGET, Event.RELEASED),
    ]
    assert Event.RUNNING_AT_TARGET in TRANSITIONS[unknown]
