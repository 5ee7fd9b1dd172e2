"""The agent's journal: fences, repeated orders, restarts, and a disk that fails."""

from __future__ import annotations

import sqlite3
import stat
from pathlib import Path
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from doubles.hosts import World
from sealift.agent.journal import Journal, MoveRow, VmRow, unfinished
from sealift.domain.move import MOVE_FINAL, MoveState, MoveStatus, Role
from sealift.errors import SealiftError, StaleFence
from sealift.hypervisor.process import ProcessRef


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(range(2)), st.integers(0, 5)), max_size=12))
def test_a_fence_never_goes_back_also_over_a_restart(tmp_path: Path, orders: list[tuple[int, int]]) -> None:
    path = tmp_path / f"{uuid4()}.db"
    vms, highest = [uuid4(), uuid4()], [-1, -1]
    for number, fence in orders:
        journal = Journal(path)
        try:
            if fence < highest[number]:
                with pytest.raises(StaleFence):
                    journal.check_fence(vms[number], fence)
            else:
                journal.check_fence(vms[number], fence)
                highest[number] = fence
        finally:
            journal.close()


def test_what_was_put_is_there_after_a_restart(world: World) -> None:
    path = world.a.settings.database
    order = world.order()
    status = MoveStatus(order.attempt, Role.SOURCE, MoveState.PRECOPY, stopped_at=12.5)
    row = MoveRow(order, status, Path("/run/x"), ProcessRef(17, 4, "boot"))
    vm = VmRow(world.config, world.hardware, ProcessRef(18, 5, "boot"), wanted=True)
    journal = Journal(path)
    journal.put_vm(vm)
    journal.put_move(row)
    journal.close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    journal = Journal(path)
    assert journal.vms() == {world.config.uuid: vm}
    assert journal.moves() == [row]
    assert journal.move(order.attempt) == row
    assert journal.move(uuid4()) is None
    assert not journal.attempt_refused(order.attempt)
    journal.drop_move(order.attempt)
    assert journal.moves() == []
    assert journal.attempt_refused(order.attempt)
    journal.drop_vm(world.config.uuid)
    assert journal.vms() == {}
    journal.close()


def test_everything_that_is_not_final_is_looked_at_again(world: World) -> None:
    order = world.order()
    for state in MoveState:
        row = MoveRow(order, MoveStatus(order.attempt, Role.SOURCE, state), Path("/run/x"))
        assert unfinished(row) is (state not in MOVE_FINAL)


def test_a_newer_journal_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "agent.db"
    Journal(path).close()
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version=99")
    db.close()
    with pytest.raises(SealiftError, match="version 99"):
        Journal(path)


def test_a_disk_that_fails_is_said_in_our_own_words(world: World) -> None:
    journal = Journal(world.a.settings.database)
    journal._db.execute("PRAGMA query_only=ON")  # as a full disk: reading works, writing does not
    for act in (
        lambda: journal.put_vm(VmRow(world.config)),
        lambda: journal.check_fence(world.config.uuid, 1),
        lambda: journal.refuse_attempt(uuid4()),
    ):
        with pytest.raises(SealiftError, match="journal"):
            act()
    assert journal.vms() == {}
    journal.close()
