"""Migrations end to end at the controller, against agents whose moves are scripted."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest

from doubles.agent import FakeAgent, joined_agent, key_of, line, straight_source, straight_target, two_hosts
from sealift.controller.orchestrator import draw_secret
from sealift.controller.services import Services
from sealift.demo.ports import free_port
from sealift.domain.lifecycle import State
from sealift.domain.move import Answer, LinkReport, MoveSecret, MoveState, Outage, Role, SealedSecret
from sealift.domain.policy import MigrateEncryption
from sealift.errors import Conflict, HostUnreachable, NotFound, StaleFence
from sealift.secret import Secret
from support.controllers import a_controller, make_state
from support.moves import finished, happened, in_state, phases, running_vm, set_policy, until, wish

STRAIGHT = ["requested", "planned", "preparing", "precopy", "switchover", "committing", "cleaning", "done"]
S = MoveState


@contextlib.asynccontextmanager
async def world(tmp_path: Path) -> AsyncIterator[tuple[Services, FakeAgent, FakeAgent, UUID]]:
    """A controller, hosts a and b, and vm1 running at a."""
    async with a_controller(make_state(tmp_path)) as services, two_hosts(services, tmp_path) as (a, b):
        yield services, a, b, await running_vm(services, a)


def with_world(tmp_path: Path, story: Callable[[Services, FakeAgent, FakeAgent, UUID], Awaitable[None]]) -> None:
    """Run a story in a world of its own."""

    async def main() -> None:
        async with world(tmp_path) as (services, a, b, vm):
            await story(services, a, b, vm)

    asyncio.run(main())


def test_a_sealed_move_goes_all_the_way(tmp_path: Path) -> None:
    async def story(services: Services, a: FakeAgent, b: FakeAgent, vm: UUID) -> None:
        row = await services.orchestrator.request(wish(channels=4))
        row = await finished(services, row.id)
        assert phases(row) == STRAIGHT
        assert [at for _, at in row.phases] == sorted(at for _, at in row.phases)
        assert (row.protection, row.cipher, row.channels) == ("sealed", "AES-256-GCM", 4)
        assert (row.sealed_out, row.sealed_in) == (5000, 70)
        assert (row.target_sealed_out, row.target_sealed_in) == (71, 5001)
        assert row.downtime_ms == pytest.approx(50.0)
        assert (row.requested_by, row.error) == ("tester", "")
        assert "opportunistic" in row.reason
        placed, host = await services.inventory.placed("vm1")
        assert (host.name, placed.fence) == ("b", 2)
        # Both hosts got one and the same order, the target first, and have forgotten it since.
        assert [role for role, _ in a.orders + b.orders] == [Role.SOURCE, Role.TARGET]
        assert a.orders[0][1] == b.orders[0][1]
        order = a.orders[0][1]
        assert (order.fence, order.options.multifd_channels, order.protection) == (2, 4, "sealed")
        assert (order.source_address, order.target_address) == ("127.0.0.1", "127.0.0.1:7421")
        assert not a.moves
        assert not b.moves
        events = await happened(services)
        assert [event.seq for event in events] == sorted(event.seq for event in events)
        states = [event.state for event in events if event.type == "migration.state"]
        assert states == STRAIGHT[1:]

    with_world(tmp_path, story)


def test_a_host_that_falls_silent_while_the_plan_is_made_ends_it_with_that_reason(tmp_path: Path) -> None:
    async def story(services: Services, a: FakeAgent, b: FakeAgent, vm: UUID) -> None:
        whole = a.vms

        class Silent(dict):  # type: ignore[type-arg]
            def __contains__(self, vm: object) -> bool:
                raise HostUnreachable("host a did not answer")

        a.vms = Silent()
        row = await finished(services, (await services.orchestrator.request(wish())).id)
        assert (row.state, row.error_slug) == ("failed", "host_unreachable")
        assert "restarted" not in row.error
        assert a.orders == b.orders == []
        a.vms = whole
        row = await finished(services, (await services.orchestrator.request(wish())).id)
        assert row.state == "done"

    with_world(tmp_path, story)


def test_each_attempt_has_its_own_secret_and_it_is_stored_nowhere(tmp_path: Path) -> None:
    drawn: list[bytes] = []

    def draw(protection: str) -> MoveSecret:
        secret = draw_secret("sealed" if protection == "sealed" else "plain")
        drawn.append(key_of(secret))
        return secret

    async def main() -> None:
        state = make_state(tmp_path)
        async with a_controller(state, draw=draw) as services, two_hosts(services, tmp_path) as (a, b):
            await running_vm(services, a)
            for to in ("b", "a", "b"):
                row = await finished(services, (await services.orchestrator.request(wish(to=to))).id)
                assert row.state == "done"
            assert [key_of(secret) for secret in a.secrets] == drawn
            assert [key_of(secret) for secret in b.secrets] == drawn
        assert len(set(drawn)) == 3
        for path in state.iterdir():
            content = path.read_bytes()
            for key in drawn:
                assert key not in content
                assert key.hex().encode() not in content

    asyncio.run(main())


def test_a_secret_is_wiped_once_it_was_handed_out(tmp_path: Path) -> None:
    drawn: list[SealedSecret] = []

    def draw(protection: str) -> MoveSecret:
        drawn.append(SealedSecret(Secret(b"k" * 32, length=32), Secret(b"n" * 8, length=8)))
        return drawn[-1]

    async def main() -> None:
        async with a_controller(make_state(tmp_path), draw=draw) as services, two_hosts(services, tmp_path) as (a, _):
            await running_vm(services, a)
            await finished(services, (await services.orchestrator.request(wish())).id)
        for secret in (drawn[0].key, drawn[0].nonce):
            with pytest.raises(ValueError, match="wiped"):
                secret.reveal()

    asyncio.run(main())


def test_a_plain_move_is_recorded_as_plain_with_its_reason(tmp_path: Path) -> None:
    async def story(services: Services, a: FakeAgent, b: FakeAgent, vm: UUID) -> None:
        b.sealed = False
        row = await finished(services, (await services.orchestrator.request(wish())).id)
        assert (row.state, row.protection, row.cipher) == ("done", "plain", None)
        assert "b cannot seal" in row.reason
        assert len(key_of(a.secrets[0])) == 16
        assert (row.sealed_out, row.sealed_in) == (0, 0)
        [event] = [event for event in await happened(services) if event.type == "migration.plain"]
        assert "neither encrypted nor authenticated" in event.text
        assert row.reason in event.text

    with_world(tmp_path, story)


def test_required_against_an_incapable_host_is_refused_before_anything_moves(tmp_path: Path) -> None:
    async def story(services: Services, a: FakeAgent, b: FakeAgent, vm: UUID) -> None:
        b.sealed = False
        await set_policy(services, MigrateEncryption.REQUIRED)
        row = await services.orchestrator.request(wish())
        assert (row.state, row.error_slug, row.protection) == ("refused", "plan_refused", None)
        assert "b cannot seal" in row.error
        assert row.todo
        assert row.finished_at is not None
        assert not a.orders + b.orders
        assert "migration.refused" in [event.type for event in await happened(services)]

    with_world(tmp_path, story)


def test_a_host_that_does_not_answer_is_refused_and_never_plain(tmp_path: Path) -> None:
    async def main() -> None:
        async with a_controller(make_state(tmp_path)) as services:
            a = await joined_agent(services, "a", tmp_path, free_port())
            b = await joined_agent(services, "b", tmp_path, free_port())
            async with a.up():
                await running_vm(services, a)
                await set_policy(services, MigrateEncryption.DISABLED)
                row = await services.orchestrator.request(wish())
                assert row.state == "refused"
                assert "did not say" in row.error
                assert b.address in row.error
                assert not a.orders

    asyncio.run(main())


def test_a_lost_capability_is_refused_until_a_person_accepts_it(tmp_path: Path) -> None:
    async def story(services: Services, a: FakeAgent, b: FakeAgent, vm: UUID) -> None:
        assert (await services.inventory.host("b")).capability.value == "capable"
        b.sealed = False
        row = await services.orchestrator.request(wish())
        assert row.state == "refused"
        assert "could seal moves before" in row.error
        await services.orchestrator.request(wish())
        lost = [event for event in await happened(services) if event.type == "host.capability_lost"]
        assert len(lost) == 1
        await services.inventory.accept("b", asked_by="tester")
        row = await finished(services, (await services.orchestrator.request(wish())).id)
        assert row.protection == "plain"
        with pytest.raises(Conflict):
            await services.inventory.accept("b", asked_by="tester")

    with_world(tmp_path, story)


def test_the_source_fails_and_keeps_the_vm(tmp_path: Path) -> None:
    async def story(services: Services, a: FakeAgent, b: FakeAgent, vm: UUID) -> None:
        a.source_script = lambda order: [
            line(S.PRECOPY),
            line(S.FAILED, error_slug="peer_silent", error="nothing was heard"),
        ]
        b.target_script = lambda order: [line(S.WAITING)]
        row = await finished(services, (await services.orchestrator.request(wish())).id)
        assert (row.state, row.error_slug) == ("failed", "peer_silent")
        assert "nothing was heard" in row.error
        assert phases(row)[-2:] == ["precopy", "failed"]
        assert (await services.inventory.placed("vm1"))[1].name == "a"
        assert not a.moves
        assert not b.moves

    with_world(tmp_path, story)


def test_a_target_that_refuses_its_order_ends_the_attempt_on_both(tmp_path: Path) -> None:
    async def story(services: Services, a: FakeAgent, b: FakeAgent, vm: UUID) -> None:
        b.refuse_order = NotFound("host b cannot read /boot/vmlinuz", todo="put it there")
        row = await finished(services, (await services.orchestrator.request(wish())).id)
        assert (row.state, row.error_slug, row.todo) == ("failed", "not_found", "put it there")
        assert phases(row) == ["requested", "planned", "preparing", "failed"]
        assert not a.orders
        assert row.attempt in a.marked & b.marked

    with_world(tmp_path, story)


def test_a_source_that_refuses_its_order_leaves_nothing_at_the_target(tmp_path: Path) -> None:
    async def story(services: Services, a: FakeAgent, b: FakeAgent, vm: UUID) -> None:
        a.refuse_order = StaleFence("the order's fence is low")
        row = await finished(services, (await services.orchestrator.request(wish())).id)
        assert (row.state, row.error_slug) == ("failed", "stale_fence")
        assert not b.moves

    with_world(tmp_path, story)


def test_an_order_from_the_past_is_refused_by_its_fence(tmp_path: Path) -> None:
    async def story(services: Services, a: FakeAgent, b: FakeAgent, vm: UUID) -> None:
        b.fences[vm] = 99
        row = await finished(services, (await services.orchestrator.request(wish())).id)
        assert (row.state, row.error_slug) == ("failed", "stale_fence")
        b.fences.clear()
        a.vms[vm] = replace(a.vms[vm])
        row = await finished(services, (await services.orchestrator.request(wish())).id)
        assert (row.state, row.fence) == ("done", 3)

    with_world(tmp_path, story)


def test_cancel_keeps_the_vm_at_the_source(tmp_path: Path) -> None:
    async def story(services: Services, a: FakeAgent, b: FakeAgent, vm: UUID) -> None:
        a.source_script = lambda order: [line(S.PRECOPY)]
        b.target_script = lambda order: [line(S.WAITING)]
        row = await services.orchestrator.request(wish())
        await in_state(services, row.id, State.PRECOPY)
        with pytest.raises(Conflict):
            await services.orchestrator.request(wish())
        with pytest.raises(Conflict):
            await services.inventory.stop_vm("vm1", force=True, asked_by="tester")
        await services.orchestrator.cancel(row.id, asked_by="tester")
        row = await finished(services, row.id)
        assert (row.state, row.error_slug) == ("cancelled", "migration_cancelled")
        assert not b.moves
        with pytest.raises(Conflict, match="is over"):
            await services.orchestrator.cancel(row.id, asked_by="tester")
        await services.inventory.stop_vm("vm1", force=True, asked_by="tester")

    with_world(tmp_path, story)


def test_cancel_before_the_source_has_its_order(tmp_path: Path) -> None:
    async def story(services: Services, a: FakeAgent, b: FakeAgent, vm: UUID) -> None:
        b.target_script = lambda order: [line(S.PREPARING)]
        row = await services.orchestrator.request(wish())
        await in_state(services, row.id, State.PREPARING)
        await services.orchestrator.cancel(row.id, asked_by="tester")
        row = await finished(services, row.id)
        assert row.state in ("cancelled", "failed")
        assert not b.moves

    with_world(tmp_path, story)


def test_too_late_to_cancel(tmp_path: Path) -> None:
    async def story(services: Services, a: FakeAgent, b: FakeAgent, vm: UUID) -> None:
        a.source_script = lambda order: [line(S.COMMITTING)]
        b.target_script = lambda order: [line(S.READY)]
        row = await services.orchestrator.request(wish())
        await in_state(services, row.id, State.COMMITTING)
        with pytest.raises(Conflict, match="let the VM go"):
            await services.orchestrator.cancel(row.id, asked_by="tester")

    with_world(tmp_path, story)


@pytest.mark.parametrize(("answer", "state", "host"), [(Answer.RUNNING, "done", "b"), (Answer.ABORTED, "failed", "a")])
def test_the_controller_carries_the_question_when_the_link_is_gone(
    tmp_path: Path, answer: Answer, state: str, host: str
) -> None:
    async def story(services: Services, a: FakeAgent, b: FakeAgent, vm: UUID) -> None:
        a.source_script = lambda order: [line(S.PRECOPY), line(S.SWITCHOVER), line(S.AWAITING_ANSWER, stopped_at=100.0)]
        b.target_script = lambda order: [line(S.WAITING), line(S.WAITING), line(S.READY)]
        b.commit_answer = answer
        row = await finished(services, (await services.orchestrator.request(wish())).id)
        assert row.state == state
        assert (await services.inventory.placed("vm1"))[1].name == host
        assert "committing" in phases(row)

    with_world(tmp_path, story)


def test_a_source_that_crashed_before_it_let_go(tmp_path: Path) -> None:
    async def story(services: Services, a: FakeAgent, b: FakeAgent, vm: UUID) -> None:
        a.source_script = lambda order: [line(S.PRECOPY), line(S.CRASHED, error="QEMU was killed")]
        b.target_script = lambda order: [line(S.WAITING)]
        row = await finished(services, (await services.orchestrator.request(wish())).id)
        assert (row.state, row.error_slug) == ("crashed", "vm_crashed")
        assert "crashed at a" in row.error
        assert (await services.inventory.placed("vm1"))[1].name == "a"
        assert not b.moves

    with_world(tmp_path, story)


def test_a_target_that_crashed_after_it_committed_owns_the_vm(tmp_path: Path) -> None:
    async def story(services: Services, a: FakeAgent, b: FakeAgent, vm: UUID) -> None:
        a.source_script = lambda order: [line(S.PRECOPY), line(S.COMMITTING), line(S.DONE)]
        b.target_script = lambda order: [line(S.WAITING), line(S.READY), line(S.CRASHED, error="QEMU was killed")]
        row = await finished(services, (await services.orchestrator.request(wish())).id)
        assert row.state == "crashed"
        assert "crashed at b" in row.error
        assert (await services.inventory.placed("vm1"))[1].name == "b"

    with_world(tmp_path, story)


def test_a_source_that_does_not_notice_its_dead_target_is_told(tmp_path: Path) -> None:
    async def story(services: Services, a: FakeAgent, b: FakeAgent, vm: UUID) -> None:
        a.source_script = lambda order: [line(S.PRECOPY)]
        b.target_script = lambda order: [
            line(S.WAITING),
            line(S.FAILED, error_slug="qemu_gone", error="the receiving QEMU ended", answer=Answer.ABORTED),
        ]
        row = await finished(services, (await services.orchestrator.request(wish())).id)
        assert (row.state, row.error_slug) == ("failed", "qemu_gone")
        assert "b: the receiving QEMU ended" in row.error

    with_world(tmp_path, story)


def test_a_silent_source_makes_the_outcome_unknown_until_it_is_back(tmp_path: Path) -> None:
    async def main() -> None:
        async with a_controller(make_state(tmp_path)) as services:
            a = await joined_agent(services, "a", tmp_path, free_port())
            b = await joined_agent(services, "b", tmp_path, free_port())
            a.source_script = lambda order: [line(S.PRECOPY)]
            b.target_script = lambda order: [line(S.WAITING)]
            async with b.up():
                async with a.up():
                    await running_vm(services, a)
                    row = await services.orchestrator.request(wish())
                    await in_state(services, row.id, State.PRECOPY)
                row = await in_state(services, row.id, State.OUTCOME_UNKNOWN)
                assert (row.error_slug, row.finished_at) == ("outcome_unknown", None)
                assert "does not answer" in row.error
                assert row.attempt is not None
                a.moves[row.attempt].become(state=S.FAILED, error="the link was lost")
                async with a.up():
                    row = await finished(services, row.id)
                assert row.state == "failed"
                assert "the link was lost" in row.error

    asyncio.run(main())


def test_a_source_that_stays_away_after_the_commit_does_not_hold_up_the_vm(tmp_path: Path) -> None:
    async def main() -> None:
        async with a_controller(make_state(tmp_path)) as services:
            a = await joined_agent(services, "a", tmp_path, free_port())
            b = await joined_agent(services, "b", tmp_path, free_port())
            a.source_script = lambda order: [line(S.COMMITTING)]
            b.target_script = lambda order: [line(S.READY)]
            async with b.up():
                async with a.up():
                    await running_vm(services, a)
                    row = await services.orchestrator.request(wish())
                    row = await in_state(services, row.id, State.COMMITTING)
                assert row.attempt is not None
                b.moves[row.attempt].become(state=S.DONE, answer=Answer.RUNNING, resumed_at=110.0)
                row = await in_state(services, row.id, State.DONE)
                assert not row.tidied
                assert (await services.inventory.placed("vm1"))[1].name == "b"
                a.moves[row.attempt].become(state=S.AWAITING_ANSWER)
                async with a.up():
                    row = await finished(services, row.id)
                assert not a.moves

    asyncio.run(main())


def test_nobody_is_believed_when_both_claim_the_vm(tmp_path: Path) -> None:
    async def story(services: Services, a: FakeAgent, b: FakeAgent, vm: UUID) -> None:
        a.source_script = lambda order: [line(S.PRECOPY), line(S.FAILED, error="kept")]
        b.target_script = lambda order: [line(S.WAITING), line(S.DONE, answer=Answer.RUNNING)]
        row = await services.orchestrator.request(wish())
        row = await in_state(services, row.id, State.OUTCOME_UNKNOWN)
        assert "both hosts say" in row.error

    with_world(tmp_path, story)


def test_whoever_answers_at_a_hosts_address_without_being_it_gets_no_order(tmp_path: Path) -> None:
    async def main() -> None:
        async with a_controller(make_state(tmp_path)) as services:
            a = await joined_agent(services, "a", tmp_path, free_port())
            b = await joined_agent(services, "b", tmp_path, free_port())
            other = await joined_agent(services, "c", tmp_path, free_port())
            other.port, other.id = b.port, b.id  # a host of ours, with a good certificate, but not the one meant
            async with a.up(), other.up():
                await running_vm(services, a)
                row = await services.orchestrator.request(wish())
                assert row.state == "refused"
                assert "is not host b" in row.error
                assert not other.orders

    asyncio.run(main())


def test_an_impostor_that_appears_after_the_plan_gets_no_order(tmp_path: Path) -> None:
    async def main() -> None:
        async with a_controller(make_state(tmp_path)) as services:
            a = await joined_agent(services, "a", tmp_path, free_port())
            b = await joined_agent(services, "b", tmp_path, free_port())
            async with b.up():
                async with a.up():
                    await running_vm(services, a)
                    a.source_script = lambda order: [line(S.PRECOPY)]
                    b.target_script = lambda order: [line(S.WAITING)]
                    row = await services.orchestrator.request(wish())
                    row = await in_state(services, row.id, State.PRECOPY)
                other = await joined_agent(services, "c", tmp_path, free_port())
                other.port, other.id = a.port, a.id
                other.moves = a.moves
                async with other.up():
                    row = await in_state(services, row.id, State.OUTCOME_UNKNOWN)
                    assert not other.orders
                assert row.attempt is not None

    asyncio.run(main())


def test_a_disk_that_the_target_does_not_see_is_refused(tmp_path: Path) -> None:
    async def main() -> None:
        async with a_controller(make_state(tmp_path)) as services, two_hosts(services, tmp_path) as (a, b):
            await running_vm(services, a, disk="/data/vm1.raw")
            row = await finished(services, (await services.orchestrator.request(wish())).id)
            assert row.state == "done"
            assert not b.markers
            b.markers = {}  # equal paths, another datastore
            row = await services.orchestrator.request(wish(to="a"))
            assert row.state == "refused"
            assert "/data/vm1.raw" in row.error
            assert not a.markers
            assert not b.markers

    asyncio.run(main())


def test_a_dry_run_records_and_moves_nothing(tmp_path: Path) -> None:
    async def story(services: Services, a: FakeAgent, b: FakeAgent, vm: UUID) -> None:
        before = len(await happened(services))
        row = await services.orchestrator.rehearse(wish())
        assert (row.state, row.protection) == ("planned", "sealed")
        await set_policy(services, MigrateEncryption.REQUIRED)
        b.sealed = False
        row = await services.orchestrator.rehearse(wish())
        assert row.state == "refused"
        assert not await services.ledger.all()
        assert not a.orders + b.orders
        told = [event.type for event in (await happened(services))[before:]]
        assert told == ["host.capability_lost"]

    with_world(tmp_path, story)


# What befalls the link between the hosts


def test_outages_are_told_once_each_and_counted_in_the_record(tmp_path: Path) -> None:
    cut, silent = Outage("stream_truncated", "it was cut"), Outage("peer_silent", "nothing was heard", 5012)
    over = replace(cut, lasted_ms=31)
    reports = (
        LinkReport((cut,), 1),
        LinkReport((over, silent), 2, 5012, 4),
    )

    async def main() -> None:
        state = make_state(tmp_path)
        async with contextlib.AsyncExitStack() as hosts:
            async with a_controller(state) as services:
                a, b = await hosts.enter_async_context(two_hosts(services, tmp_path))
                await running_vm(services, a)
                a.source_script = lambda order: [line(S.PRECOPY), line(S.PRECOPY, link=reports[0])]
                b.target_script = lambda order: [line(S.WAITING)]
                row = await services.orchestrator.request(wish())
                await until(services, row.id, lambda row: row.outage_events == 1)
            [source], [target] = a.moves.values(), b.moves.values()
            source.script = [line(S.PRECOPY, link=reports[1]), *straight_source(source.order)[3:]]
            target.script = straight_target(target.order)[4:]
            async with a_controller(state) as services:
                row = await finished(services, row.id)
                assert (row.outages, row.longest_outage_ms, row.reconnects) == (2, 5012, 4)
                told = [e for e in await happened(services) if e.type in ("migration.interrupted", "migration.resumed")]
                assert [(e.type.partition(".")[2], e.slug) for e in told] == [
                    ("interrupted", "stream_truncated"),
                    ("resumed", "stream_truncated"),
                    ("interrupted", "peer_silent"),
                    ("resumed", "peer_silent"),
                ]
                assert all(e.migration == row.id and "from a to b" in e.text for e in told)
                assert "it was cut [stream_truncated]" in told[0].text
                assert told[3].text.endswith("resumed after 5012 ms")

    asyncio.run(main())


def test_the_steps_of_setting_up_are_in_the_record(tmp_path: Path) -> None:
    async def story(services: Services, a: FakeAgent, b: FakeAgent, vm: UUID) -> None:
        a.source_script = lambda order: [
            line(S.PRECOPY, timeline=(("ordered", 3.0), ("relay", 4.0))),
            line(S.PRECOPY, timeline=(("ordered", 3.0), ("relay", 4.0), ("connected", 5.0))),
            *straight_source(order)[3:],
        ]
        b.target_script = lambda order: [line(S.WAITING, timeline=(("ordered", 1.0),)), *straight_target(order)[1:]]
        row = await finished(services, (await services.orchestrator.request(wish())).id)
        steps = {(where, step): at for where, step, at in row.timeline}
        assert [steps.get(("source", step)) for step in ("ordered", "relay", "connected")] == [3.0, 4.0, 5.0]
        assert steps[("target", "ordered")] == 1.0
        ours = [steps[("controller", step)] for step in ("ordered", "target", "source")]
        assert ours == sorted(ours)

    with_world(tmp_path, story)


# The controller goes away in the middle and comes back


FULL_SOURCE = {
    State.PREPARING: [line(S.PREPARING)],
    State.PRECOPY: [line(S.PREPARING), line(S.PRECOPY)],
    State.SWITCHOVER: [line(S.PRECOPY), line(S.SWITCHOVER, stopped_at=100.0)],
    State.COMMITTING: [line(S.SWITCHOVER, stopped_at=100.0), line(S.COMMITTING, clock_offset_s=10.0)],
    State.CLEANING: [line(S.COMMITTING, stopped_at=100.0, clock_offset_s=10.0)],
}


ENDS = [(phase, "done") for phase in FULL_SOURCE] + [
    (phase, "failed")
    for phase in FULL_SOURCE
    if phase is not State.CLEANING  # from there is no way back
]


@pytest.mark.parametrize(("phase", "end"), ENDS, ids=[f"{phase.value}-{end}" for phase, end in ENDS])
def test_a_restart_in_any_phase_loses_nothing(tmp_path: Path, phase: State, end: str) -> None:
    async def main() -> None:
        state = make_state(tmp_path)
        async with contextlib.AsyncExitStack() as hosts:
            async with a_controller(state) as services:
                a, b = await hosts.enter_async_context(two_hosts(services, tmp_path))
                await running_vm(services, a)
                a.source_script = lambda order: list(FULL_SOURCE[phase])
                b.target_script = lambda order: [
                    line(S.DONE, answer=Answer.RUNNING, resumed_at=110.05) if phase is State.CLEANING else line(S.READY)
                ]
                row = await services.orchestrator.request(wish())
                await in_state(services, row.id, phase)
                await until(services, row.id, lambda row: bool(a.moves))
            [source], [target] = a.moves.values(), b.moves.values()
            if end == "done":
                source.script = straight_source(source.order)[1:]
                target.script = straight_target(target.order)[1:]
                if phase in (State.COMMITTING, State.CLEANING):
                    source.script = [line(S.COMMITTING), line(S.DONE)]
                    target.script = [line(S.READY), line(S.DONE, answer=Answer.RUNNING, resumed_at=110.05)]
            else:
                source.script = [line(S.FAILED, error="the link was lost")]
            async with a_controller(state) as services:
                row = await finished(services, row.id)
                assert row.state == end
                assert (await services.inventory.placed("vm1"))[1].name == ("b" if end == "done" else "a")
            assert len(a.orders) == len(b.orders) == 1, "a spec is never sent again"
            assert not a.moves
            assert not b.moves

    asyncio.run(main())


def test_a_restart_before_the_source_had_its_order_ends_the_attempt(tmp_path: Path) -> None:
    async def main() -> None:
        state = make_state(tmp_path)
        async with contextlib.AsyncExitStack() as hosts:
            async with a_controller(state) as services:
                a, b = await hosts.enter_async_context(two_hosts(services, tmp_path))
                await running_vm(services, a)
                b.target_script = lambda order: [line(S.PREPARING)]
                held = asyncio.Event()
                begin = services.ledger.begin_attempt

                async def begin_and_hold(migration: UUID, attempt: UUID) -> object:
                    row = await begin(migration, attempt)
                    held.set()
                    await asyncio.sleep(3600)
                    return row

                services.ledger.begin_attempt = begin_and_hold  # type: ignore[method-assign,assignment]
                row = await services.orchestrator.request(wish())
                await held.wait()
            async with a_controller(state) as services:
                row = await finished(services, row.id)
                assert row.state == "failed"
                assert "never got its order" in row.error
                assert row.attempt in a.marked & b.marked
                # A late order of the old life is refused.
                late = straight_order(a, row.attempt)
                with pytest.raises(Conflict):
                    a.take(row.attempt, Role.SOURCE, late)
                b.target_script = straight_target
                row = await finished(services, (await services.orchestrator.request(wish())).id)
                assert row.state == "done"

    asyncio.run(main())


def straight_order(agent: FakeAgent, attempt: UUID | None) -> bytes:
    """The body of an order for ``attempt``, as it would have been sent."""
    from uuid import uuid4

    from sealift.domain.move import ChannelLimits, MoveOptions, MoveOrder, encode_spec

    assert attempt is not None
    [status] = agent.vms.values()
    assert status.hardware is not None
    order = MoveOrder(
        attempt=attempt,
        fence=2,
        vm=status.uuid,
        vm_name=status.name,
        source=agent.id,
        source_name=agent.name,
        source_address="127.0.0.1",
        target=uuid4(),
        target_name="b",
        target_address="127.0.0.1:7421",
        protection="sealed",
        channel_version=1,
        reason="",
        options=MoveOptions(),
        limits=ChannelLimits(),
        hardware=status.hardware,
    )
    return encode_spec(order, draw_secret("sealed"), {})


def test_a_restart_before_anything_was_touched(tmp_path: Path) -> None:
    async def main() -> None:
        state = make_state(tmp_path)
        async with a_controller(state) as services, two_hosts(services, tmp_path) as (a, _):
            await running_vm(services, a)
            vm, source = await services.inventory.placed("vm1")
            target = await services.inventory.host_row("b")
            row = await services.ledger.create(wish(), vm, source, target)
        async with a_controller(state) as services:
            row = await finished(services, row.id)
            assert row.state == "failed"
            assert "restarted" in row.error

    asyncio.run(main())


def test_a_defect_does_not_end_the_watch(tmp_path: Path) -> None:
    """It is begun anew from the record, as after a restart."""

    async def story(services: Services, a: FakeAgent, b: FakeAgent, vm: UUID) -> None:
        note, broken = services.ledger.step, [True]

        async def step(*args: object, **kwargs: object) -> object:
            if broken:
                broken.clear()
                raise RuntimeError("a defect")
            return await note(*args, **kwargs)  # type: ignore[arg-type]

        services.ledger.step = step  # type: ignore[method-assign,assignment]
        row = await services.orchestrator.request(wish())
        row = await finished(services, row.id)
        assert row.state == "failed"
        assert "restarted" in row.error

    with_world(tmp_path, story)
