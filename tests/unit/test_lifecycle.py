"""The table of a migration's life: complete, closed, and the picture in the documents drawn from it."""

from __future__ import annotations

import itertools

import pytest

from sealift.domain.lifecycle import (
    CANCELLABLE,
    FINAL,
    GUEST_RUNS_AT_SOURCE,
    GUEST_RUNS_AT_TARGET,
    GUEST_RUNS_NOWHERE,
    TRANSITIONS,
    Event,
    State,
    step,
)
from sealift.errors import IllegalTransition
from support.generated_docs import LIFECYCLE, lifecycle_page


@pytest.mark.parametrize(("state", "event"), list(itertools.product(State, Event)))
def test_every_pair_is_in_the_table_or_refused(state: State, event: Event) -> None:
    if event in TRANSITIONS.get(state, {}):
        assert step(state, event) is TRANSITIONS[state][event]
        return
    with pytest.raises(IllegalTransition) as caught:
        step(state, event)
    assert state.value in str(caught.value)
    assert event.value in str(caught.value)


def test_final_states_have_no_exit_and_all_others_have() -> None:
    assert set(TRANSITIONS) == set(State) - FINAL
    assert all(TRANSITIONS.values())


def test_the_sets_cover_every_state_once() -> None:
    sets = (GUEST_RUNS_AT_SOURCE, GUEST_RUNS_AT_TARGET, GUEST_RUNS_NOWHERE)
    assert sorted(state.value for found in sets for state in found) == sorted(state.value for state in State)
    assert not CANCELLABLE & FINAL


def test_every_state_is_reached_and_every_state_ends() -> None:
    reached, ends = {State.REQUESTED}, set(FINAL)
    for _ in State:
        reached |= {after for state in reached for after in TRANSITIONS.get(state, {}).values()}
        ends |= {state for state, edges in TRANSITIONS.items() if set(edges.values()) & ends}
    assert reached == set(State)
    assert ends == set(State)


def test_whoever_can_be_cancelled_ends_cancelled() -> None:
    for state in CANCELLABLE:
        assert step(state, Event.SOURCE_KEPT_ON_REQUEST) is State.CANCELLED


def test_once_the_guest_runs_at_the_target_it_never_goes_back() -> None:
    after = {found for state in GUEST_RUNS_AT_TARGET for found in TRANSITIONS.get(state, {}).values()}
    assert after <= GUEST_RUNS_AT_TARGET


def test_the_page_is_drawn_from_the_table() -> None:
    assert LIFECYCLE.read_text() == lifecycle_page(), "run tests/support/generated_docs.py"
