"""The two sides of a switchover when QEMU or its guest does what it should not: who may let the guest run, and when."""

from __future__ import annotations

import pytest

from doubles.carrier import move
from doubles.hosts import Qemu, World
from sealift.domain.move import Answer, MoveState, MoveStatus
from sealift.errors import QmpRefused


def states(world: World, *, at: tuple[int, int] = (0, 0)) -> tuple[MoveStatus, MoveStatus]:
    """One attempt; how both sides ended."""
    carrier, _ = move(world, at=at)
    source, target = carrier.outcome
    assert isinstance(source, MoveStatus)
    assert isinstance(target, MoveStatus)
    assert world.wrongs == []
    return source, target


def at_target(world: World, **special: object) -> None:
    def dress(qemu: Qemu) -> None:
        if qemu.incoming:
            for name, value in special.items():
                setattr(qemu, name, value)

    world.dress = dress


def at_source(world: World, **special: object) -> None:
    def dress(qemu: Qemu) -> None:
        if not qemu.incoming:
            for name, value in special.items():
                setattr(qemu, name, value)

    world.dress = dress


def test_a_cont_that_is_refused_gives_the_guest_back(world: World) -> None:
    at_target(world, cont_error=QmpRefused("a disk is locked"))
    source, target = states(world)
    assert (source.state, target.state, target.answer) == (MoveState.FAILED, MoveState.FAILED, Answer.ABORTED)
    assert "a disk is locked" in target.error
    assert world.running() == ["a"]


def test_a_cont_whose_answer_was_lost_is_looked_at_and_not_given_up(world: World) -> None:
    at_target(world, unanswered={"cont"})
    source, target = states(world)
    assert (source.state, target.state) == (MoveState.DONE, MoveState.DONE)
    assert world.running() == ["b"]


@pytest.mark.parametrize("then", ["io-error", "internal-error", "shutdown"])
def test_a_guest_that_ran_is_never_given_back(world: World, then: str) -> None:
    """It was let run, the answer was lost, and it has stopped again by a fault of its own: the source's copy is old."""
    at_target(world, unanswered={"cont"}, cont_then=then)
    source, target = states(world)
    assert (source.state, target.state, target.answer) == (MoveState.DONE, MoveState.DONE, Answer.RUNNING)
    assert world.ran_at == ["a", "b"]


def test_nor_is_one_whose_agent_was_killed_as_it_let_it_run(world: World) -> None:
    _, (_, did) = move(World(world.a.settings.state_directory / "rehearsal"))
    World.current = world
    at_target(world, cont_then="io-error")
    source, target = states(world, at=(0, did.index("after cont") + 1))
    assert (source.state, target.state) == (MoveState.DONE, MoveState.DONE)
    assert world.ran_at == ["a", "b"]


@pytest.mark.parametrize("runstate", ["io-error", "internal-error", "suspended"])
def test_a_guest_that_was_stopped_on_its_way_is_not_taken(world: World, runstate: str) -> None:
    """QEMU hands the runstate over; such a guest would wait at the target for ever."""
    world.arrives_as = runstate
    source, target = states(world)
    assert (source.state, target.state) == (MoveState.FAILED, MoveState.FAILED)
    assert runstate in target.error
    assert world.running() == ["a"]


@pytest.mark.parametrize("command", ["migrate", "continue", "cancel"])
def test_a_lost_answer_at_the_source_ends_the_move_with_one_copy(world: World, command: str) -> None:
    at_source(world, unanswered={command})
    states(world)
    assert len(world.running()) == 1


def test_a_target_that_dies_while_it_receives_leaves_the_guest_where_it_was(world: World) -> None:
    def dress(qemu: Qemu) -> None:
        if qemu.incoming:
            advance = qemu.die

            def late() -> None:
                if qemu.status == "active":
                    advance()

            qemu.advance = late  # type: ignore[method-assign]

    world.dress = dress
    source, _ = states(world)
    assert source.state is MoveState.FAILED
    assert world.running() == ["a"]


def test_a_guest_that_a_fault_stopped_is_left_so_by_a_move_that_fails(world: World) -> None:
    """The move waits for no guest to run that cannot."""

    def dress(qemu: Qemu) -> None:
        if not qemu.incoming:

            def advance() -> None:
                if qemu.status == "setup":
                    qemu.status, qemu.runstate = "active", "io-error"
                elif qemu.status == "active":
                    qemu.status = "failed"

            qemu.advance = advance  # type: ignore[method-assign]

    world.dress = dress
    source, target = states(world)
    assert (source.state, target.state) == (MoveState.FAILED, MoveState.FAILED)
    assert [(qemu.host, qemu.runstate) for qemu in world.qemus if qemu.alive] == [("a", "io-error")]


def test_a_vm_that_came_by_migration_can_leave_again(world: World) -> None:
    """Its QEMU still says ``completed``, of the migration by which it came."""

    def dress(qemu: Qemu) -> None:
        if not qemu.incoming:
            qemu.status = "completed"

    world.dress = dress
    source, target = states(world)
    assert (source.state, target.state) == (MoveState.DONE, MoveState.DONE)


def test_and_is_not_taken_for_one_that_left_when_its_agent_is_killed_before_it_began(world: World) -> None:
    _, (did, _) = move(World(world.a.settings.state_directory / "rehearsal"))
    World.current = world

    def dress(qemu: Qemu) -> None:
        if not qemu.incoming:
            qemu.status = "completed"

    world.dress = dress
    source, target = states(world, at=(did.index("before migrate") + 1, 0))
    assert (source.state, target.state) == (MoveState.FAILED, MoveState.FAILED)
    assert world.running() == ["a"]
