"""Orders to an agent: which are refused, which are answered, and what is left of those that could not begin."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any
from uuid import uuid4

import pytest

from doubles.hosts import Host, PlayedMoves, PlayedVm, Qemu, World, secret
from sealift.domain.move import Answer, MoveOrder, MoveState, MoveStatus, Role
from sealift.domain.vm import VmState
from sealift.errors import (
    AlreadyExists,
    Conflict,
    HypervisorError,
    InvalidInput,
    NotFound,
    PlanRefused,
    QmpTimeout,
    RelayGone,
    SealiftError,
    StaleFence,
    VmLetGo,
)

LIMIT_S = 10.0


def play(world: World, scene: Callable[[], Awaitable[None]]) -> None:
    """A scene between two hosts that have just begun; the VM runs at a."""

    async def main() -> None:
        await world.begin()
        try:
            async with asyncio.timeout(LIMIT_S):
                await scene()
        finally:
            await world.a.crash()
            await world.b.crash()
        assert world.wrongs == []

    asyncio.run(main())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - what is waited for is in many places
        await asyncio.sleep(0.001)


async def take(host: Host, order: MoveOrder, role: Role) -> MoveStatus:
    """Give an order to the side it is for."""
    if role is Role.SOURCE:
        return await host.moves.take_source(order, secret())
    return await host.moves.take_target(order, secret(), {})


def nothing_left(host: Host) -> None:
    assert list((host.settings.run_directory / "moves").glob("*")) == []
    assert host._journal.moves() == []
    assert host.vms.busy == set()
    assert not any(relay.alive for relay in World.current.relays.values() if relay.host == host.name)


@pytest.mark.parametrize("role", Role)
def test_an_order_repeated_is_answered_and_not_carried_out_twice(world: World, role: Role) -> None:
    async def scene() -> None:
        order = world.order()
        await world.b.moves.take_target(order, secret(), {})
        if role is Role.SOURCE:
            await world.a.moves.take_source(order, secret())
        host = world.a if role is Role.SOURCE else world.b
        relays, qemus = len(world.relays), len(world.qemus)
        assert (await take(host, order, role)).role is role
        assert (len(world.relays), len(world.qemus)) == (relays, qemus)

    play(world, scene)


def test_an_order_repeated_after_the_end_and_a_restart_is_answered_and_after_forgetting_refused(world: World) -> None:
    async def scene() -> None:
        order = world.order()
        await world.b.moves.take_target(order, secret(), {})
        await world.a.moves.take_source(order, secret())
        for host in (world.a, world.b):
            await until(lambda host=host: host.moves.status(order.attempt).state is MoveState.DONE)  # type: ignore[misc]
        await world.a.crash()
        await world.a.boot()
        assert (await world.a.moves.take_source(order, secret())).state is MoveState.DONE
        await world.a.moves.forget(order.attempt)
        with pytest.raises(Conflict):
            await world.a.moves.take_source(order, secret())
        with pytest.raises(NotFound):
            world.a.moves.status(order.attempt)
        assert world.running() == ["b"]

    play(world, scene)


def test_a_vm_that_was_let_go_is_not_started_again_by_any_order(world: World) -> None:
    async def scene() -> None:
        order = world.order()
        await world.b.moves.take_target(order, secret(), {})
        await world.a.moves.take_source(order, secret())
        await until(lambda: world.a.moves.status(order.attempt).state is MoveState.DONE)
        await world.a.moves.forget(order.attempt)
        await world.a.vms.define(world.config, file="", made_by_conversion=False)
        with pytest.raises(VmLetGo):
            await world.a.vms.start(world.config.uuid, "")

    play(world, scene)


def test_orders_from_the_past_are_refused(world: World) -> None:
    async def scene() -> None:
        world.a._journal.check_fence(world.config.uuid, 9)
        with pytest.raises(StaleFence):
            await world.a.moves.take_source(world.order(fence=8), secret())
        nothing_left(world.a)

    play(world, scene)


def test_an_attempt_that_was_aborted_before_its_order_came_is_refused(world: World) -> None:
    async def scene() -> None:
        order = world.order()
        assert (await world.b.moves.abort(order.attempt)).state is MoveState.FAILED
        with pytest.raises(Conflict):
            await world.b.moves.take_target(order, secret(), {})
        await world.b.crash()
        await world.b.boot()
        with pytest.raises(Conflict):
            await world.b.moves.take_target(order, secret(), {})
        assert [qemu.host for qemu in world.qemus] == ["a"]

    play(world, scene)


def test_orders_that_are_not_for_this_host_or_vm_are_refused(world: World) -> None:
    async def scene() -> None:
        other = replace(world.config, uuid=uuid4())
        for changes in (
            {"source": uuid4()},
            {"target": world.a.id},
            {"hardware": replace(world.hardware, config=other)},
        ):
            with pytest.raises(InvalidInput):
                await world.a.moves.take_source(world.order(**changes), secret())
        with pytest.raises(PlanRefused):
            await world.a.moves.take_source(world.order(channel_version=2), secret())
        unknown = world.order(vm=other.uuid, hardware=replace(world.hardware, config=other))
        with pytest.raises(NotFound):
            await world.a.moves.take_source(unknown, secret())
        with pytest.raises(AlreadyExists):
            await world.a.moves.take_target(world.order(source=world.b.id, target=world.a.id), secret(), {})
        nothing_left(world.a)

    play(world, scene)


def test_a_host_that_cannot_seal_takes_no_sealed_order(world: World) -> None:
    async def scene() -> None:
        world.b.moves._can_seal = False
        with pytest.raises(PlanRefused):
            await world.b.moves.take_target(world.order(), secret(), {})
        nothing_left(world.b)

    play(world, scene)


def test_one_vm_is_in_one_move(world: World) -> None:
    async def scene() -> None:
        await world.b.moves.take_target(world.order(fence=2), secret(), {})
        with pytest.raises(Conflict):
            await world.b.moves.take_target(world.order(fence=3), secret(), {})
        with pytest.raises(AlreadyExists):
            await world.b.vms.define(world.config, file="", made_by_conversion=False)

    play(world, scene)


def test_a_vm_that_is_just_being_stopped_is_not_moved(world: World) -> None:
    """The order to stop it may come from a controller that has died since."""

    async def scene() -> None:
        stopping = asyncio.create_task(world.a.vms.stop(world.config.uuid, force=False))
        await until(lambda: "powerdown" in world.qemus[0].commands)
        with pytest.raises(Conflict, match="stopped"):
            await world.a.moves.take_source(world.order(), secret())
        world.a.vms._handles[world.config.uuid]._ended.set()  # type: ignore[attr-defined]
        await stopping
        assert not world.qemus[0].alive

    play(world, scene)


@pytest.mark.parametrize("error", [RelayGone("it ended"), OSError(28, "No space left on device")])
def test_what_could_not_begin_leaves_nothing(world: World, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    async def fail(*_: Any) -> Any:
        raise error

    async def scene() -> None:
        for host, fence, role in ((world.b, 2, Role.TARGET), (world.a, 3, Role.SOURCE)):
            monkeypatch.setattr(PlayedMoves, "_start_relay", fail)
            with pytest.raises(SealiftError) as raised:
                await take(host, world.order(fence=fence), role)
            assert isinstance(error, OSError) or raised.value is error
            monkeypatch.undo()
            nothing_left(host)
        assert [qemu.host for qemu in world.qemus if qemu.alive] == ["a"]

    start = PlayedMoves._start_relay
    play(world, scene)
    assert PlayedMoves._start_relay is start


def test_a_target_whose_qemu_refuses_takes_its_relay_with_it(world: World) -> None:
    async def scene() -> None:
        async def refuse(*_: Any) -> None:
            raise HypervisorError("no such channel")

        listen, PlayedVm.listen = PlayedVm.listen, refuse  # type: ignore[method-assign]
        try:
            with pytest.raises(HypervisorError):
                await world.b.moves.take_target(world.order(), secret(), {})
        finally:
            PlayedVm.listen = listen  # type: ignore[method-assign]
        nothing_left(world.b)
        assert [qemu.host for qemu in world.qemus if qemu.alive] == ["a"]

    play(world, scene)


def test_a_full_disk_stops_no_move_on_its_way(world: World) -> None:
    """Only the commit log has its room in advance; the journal's rows may have to wait."""

    async def scene() -> None:
        order = world.order()
        await world.b.moves.take_target(order, secret(), {})
        await world.a.moves.take_source(order, secret())
        await until(lambda: world.a.moves.status(order.attempt).state is MoveState.PRECOPY)
        journals = [host._journal._db for host in (world.a, world.b)]
        for db in journals:
            db.execute("PRAGMA query_only=ON")
        await until(lambda: world.running() == ["b"])
        assert world.a.moves.status(order.attempt).state is not MoveState.FAILED
        for db in journals:
            db.execute("PRAGMA query_only=OFF")
        for host in (world.a, world.b):
            await until(lambda host=host: host.moves.status(order.attempt).state is MoveState.DONE)  # type: ignore[misc]
        assert not world.a.vms.has(order.vm)
        assert (await world.b.vms.status(order.vm)).state is VmState.RUNNING

    play(world, scene)


def test_an_answer_is_taken_only_by_a_source_that_waits_for_one(world: World) -> None:
    async def scene() -> None:
        order = world.order()
        await world.b.moves.take_target(order, secret(), {})
        with pytest.raises(Conflict):
            await world.b.moves.answer(order.attempt, Answer.RUNNING)
        with pytest.raises(NotFound):
            await world.a.moves.answer(order.attempt, Answer.RUNNING)
        with pytest.raises(NotFound):
            await world.a.moves.commit(order.attempt)
        await world.a.moves.take_source(order, secret())
        with pytest.raises(Conflict):
            await world.a.moves.commit(order.attempt)
        with pytest.raises(Conflict):
            await world.a.moves.forget(order.attempt)

    play(world, scene)


@pytest.mark.parametrize("answer", Answer)
def test_a_source_that_let_go_and_lost_its_qemu_is_settled_by_the_targets_answer(world: World, answer: Answer) -> None:
    async def scene() -> None:
        order = world.order()
        world.arrives_as = "inmigrate"  # the target never gets ready
        await world.b.moves.take_target(order, secret(), {})
        await world.a.moves.take_source(order, secret())
        await until(lambda: world.a.moves.status(order.attempt).state is MoveState.COMMITTING)
        await world.a.crash()
        world.lose("a", qemu=True)
        await world.a.boot()
        assert world.a.moves.status(order.attempt).state is MoveState.UNKNOWN
        with pytest.raises(VmLetGo):
            await world.a.vms.start(order.vm, "")
        await world.a.crash()
        await world.a.boot()
        assert world.a.moves.status(order.attempt).state is MoveState.UNKNOWN
        status = await world.a.moves.answer(order.attempt, answer)
        assert status.state is (MoveState.DONE if answer is Answer.RUNNING else MoveState.CRASHED)
        await world.a.crash()
        await world.a.boot()
        assert world.a.moves.status(order.attempt).state is status.state
        assert world.a.vms.has(order.vm) is (answer is Answer.ABORTED)
        if answer is Answer.ABORTED:
            assert (await world.a.vms.status(order.vm)).state is VmState.CRASHED

    play(world, scene)


def test_a_qemu_that_hangs_keeps_its_agent_from_nothing_else(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is neither taken for gone, nor may it be started beside itself."""

    async def scene() -> None:
        await world.a.crash()

        async def hang(*_: Any) -> Any:
            raise QmpTimeout("no greeting")

        monkeypatch.setattr("doubles.hosts.PlayedHypervisor.attach", hang)
        monkeypatch.setattr("sealift.hypervisor.process.ProcessRef.alive", lambda _: True)
        await world.a.boot()
        assert (await world.a.vms.status(world.config.uuid)).state is VmState.PAUSED
        with pytest.raises(Conflict):
            await world.a.vms.start(world.config.uuid, "")
        with pytest.raises(SealiftError):
            await world.a.vms.stop(world.config.uuid, force=True)
        with pytest.raises(Conflict):
            await world.a.moves.take_source(world.order(), secret())

    play(world, scene)


def test_a_qemu_that_was_started_and_never_noted_is_ended(world: World) -> None:
    """Its agent was killed between the two; the guest has never run."""

    async def scene() -> None:
        row = world.a.vms.row(world.config.uuid)
        world.qemus[0].die()
        world.a.vms._put(replace(row, process=None))
        stray = Qemu(world, "a", world.config, incoming=False)
        await world.a.crash()
        await world.a.boot()
        assert not stray.alive
        assert (await world.a.vms.status(world.config.uuid)).state is VmState.CRASHED

    play(world, scene)
