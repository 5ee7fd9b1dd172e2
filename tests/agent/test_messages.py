"""Messages between the hosts' agents that are not meant for who hears them, or are heard twice, change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from doubles.carrier import move
from doubles.hosts import PlayedRelay, World
from sealift.domain.move import MoveState, MoveStatus

Message = dict[str, Any]


def hears(world: World, host: str, *messages: Message) -> None:
    """Let the agent of a host hear these before anything else."""
    made = world.new_relay

    def new_relay(where: str, directory: Path) -> PlayedRelay:
        relay = made(where, directory)
        if where == host:
            for message in messages:
                relay.add("message", message=message)
        return relay

    world.new_relay = new_relay  # type: ignore[method-assign]


def assert_handed_over_once(world: World) -> None:
    carrier, (_, did) = move(world)
    source, target = carrier.outcome
    assert isinstance(source, MoveStatus)
    assert isinstance(target, MoveStatus)
    assert (source.state, target.state) == (MoveState.DONE, MoveState.DONE)
    assert world.wrongs == []
    assert world.ran_at == ["a", "b"]
    assert did.count("after COMMITTED") == 1


@pytest.mark.parametrize(
    "message",
    [
        {"type": "COMMIT"},
        {"type": "COMMIT", "attempt": str(uuid4()), "fence": 2},
        {"type": "READY"},
        {"type": "RUNNING"},
        {"type": "ABORTED", "reason": "reflected"},
        {"type": "LET_GO"},
    ],
    ids=["bare commit", "another attempt's commit", "ready", "running", "aborted", "unknown"],
)
def test_a_target_hears_what_it_should_not(world: World, message: Message) -> None:
    hears(world, "b", message)
    assert_handed_over_once(world)


def test_a_target_hears_a_commit_of_its_attempt_with_an_older_fence(world: World) -> None:
    order = world.order()
    world.order = lambda: order  # type: ignore[method-assign, assignment, misc]
    hears(world, "b", {"type": "COMMIT", "attempt": str(order.attempt), "fence": order.fence - 1})
    assert_handed_over_once(world)


@pytest.mark.parametrize(
    "message",
    [{"type": "COMMIT"}, {"type": "READY"}, {"type": "ABORT", "reason": "reflected"}, {"type": "LET_GO"}],
    ids=["commit", "ready", "abort", "unknown"],
)
def test_a_source_hears_what_it_should_not(world: World, message: Message) -> None:
    hears(world, "a", message)
    assert_handed_over_once(world)


def test_every_message_is_heard_twice(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    once = PlayedRelay.add

    def twice(relay: PlayedRelay, kind: str, **fields: Any) -> None:
        once(relay, kind, **fields)
        if kind == "message":
            once(relay, kind, **fields)

    monkeypatch.setattr(PlayedRelay, "add", twice)
    assert_handed_over_once(world)


def test_an_abort_on_the_heels_of_the_commit_leaves_one_copy(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of the two was quicker is for the target to say; no source of ours sends both."""
    once = PlayedRelay.add

    def followed(relay: PlayedRelay, kind: str, **fields: Any) -> None:
        once(relay, kind, **fields)
        if kind == "message" and fields["message"]["type"] == "COMMIT":
            once(relay, kind, message={"type": "ABORT", "reason": "too late"})

    monkeypatch.setattr(PlayedRelay, "add", followed)
    carrier, _ = move(world)
    source, target = carrier.outcome
    assert isinstance(source, MoveStatus)
    assert isinstance(target, MoveStatus)
    assert source.state is target.state
    assert world.running() == (["b"] if target.state is MoveState.DONE else ["a"])
    assert world.wrongs == []
