"""The agent's journal: fences, repeated orders, restarts, and a disk that fails."""

from __future__ import annotations

import sqlite3
import stat
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from doubles.hosts import World
from sealift.agent.journal import ConversionRow, Journal, MoveRow, VmRow, unfinished
from sealift.agent.new_images import NewImage, Place, Seen
from sealift.domain.conversion import ConversionKind, ConversionOrder, ConversionState, ConversionStatus
from sealift.domain.move import MOVE_FINAL, MoveState, MoveStatus, Role
from sealift.errors import SealiftError, StaleFence
from sealift.hypervisor.process import ProcessRef


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=50)
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


OLD_SCHEMA = """
CREATE TABLE vm (
    uuid TEXT PRIMARY KEY, name TEXT NOT NULL, config TEXT NOT NULL, hardware TEXT, process TEXT,
    wanted INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE move (
    attempt TEXT NOT NULL, role TEXT NOT NULL, vm TEXT NOT NULL, state TEXT NOT NULL, "order" TEXT NOT NULL,
    status TEXT NOT NULL, directory TEXT NOT NULL, process TEXT, PRIMARY KEY (attempt, role)
);
CREATE TABLE fence (vm TEXT PRIMARY KEY, fence INTEGER NOT NULL);
CREATE TABLE refused_attempt (attempt TEXT PRIMARY KEY);
PRAGMA user_version=1;
"""
OLD_CONFIG = (
    '{"name":"web","uuid":"6f1d0c52-5a87-4b52-9d5e-1f6b8a3f0a01","vcpus":1,"memory_bytes":67108864,"machine":"q35",'
    '"cpu":"","accelerator":"auto","disks":[{"path":"/x","format":"raw"}],'
    '"network":{"kind":"none","bridge":"","mac":""},"boot":null,"serial":""}'
)
OLD_HARDWARE = (
    f'{{"version":1,"config":{OLD_CONFIG},"machine":"pc-q35-7.2","cpu":"max","accelerator":"tcg","pci":{{}},'
    '"qemu_version":"7.2.22"}'
)
OLD_ORDER = (
    '{"attempt":"0b7e0d4c-5b58-4a35-8a52-3a3d2f0b9a11","fence":2,"vm":"6f1d0c52-5a87-4b52-9d5e-1f6b8a3f0a01",'
    '"vm_name":"web","source":"0b7e0d4c-5b58-4a35-8a52-3a3d2f0b9a12","source_name":"a","source_address":"127.0.0.1",'
    '"target":"0b7e0d4c-5b58-4a35-8a52-3a3d2f0b9a13","target_name":"b","target_address":"127.0.0.1:7421",'
    '"protection":"sealed","channel_version":1,"reason":"both can","options":{"bandwidth":0,"max_downtime_ms":300,'
    '"multifd_channels":0,"give_up_ms":60000,"switchover_timeout_ms":5000},"limits":{"window_bytes":67108864,'
    f'"rekey_records":16777216,"rekey_bytes":68719476736}},"hardware":{OLD_HARDWARE}}}'
)
OLD_STATUS = '{"attempt":"0b7e0d4c-5b58-4a35-8a52-3a3d2f0b9a11","role":"source","state":"precopy"}'


def test_a_journal_of_before_encryption_is_taken_up(tmp_path: Path, world: World) -> None:
    """Rows as the first version wrote them, word for word; its VMs run, and a move of one is under way."""
    path = tmp_path / "agent.db"
    db = sqlite3.connect(path)
    db.executescript(OLD_SCHEMA)
    vm, attempt = "6f1d0c52-5a87-4b52-9d5e-1f6b8a3f0a01", "0b7e0d4c-5b58-4a35-8a52-3a3d2f0b9a11"
    db.execute("INSERT INTO vm VALUES (?, 'web', ?, ?, NULL, 1)", (vm, OLD_CONFIG, OLD_HARDWARE))
    db.execute(
        "INSERT INTO move VALUES (?, 'source', ?, 'precopy', ?, ?, '/run/x', NULL)",
        (attempt, vm, OLD_ORDER, OLD_STATUS),
    )
    db.execute("INSERT INTO fence VALUES (?, 5)", (vm,))
    db.commit()
    db.close()
    for _ in range(2):  # opening it twice upgrades it once
        journal = Journal(path)
        row = journal.vms()[UUID(vm)]
        assert (row.config.name, row.config.deks, row.config.disks[0].size_bytes) == ("web", (), 0)
        assert row.hardware is not None
        assert row.hardware.config == row.config
        [move] = journal.moves()
        assert (move.order.hardware.config, move.order.file, move.status.state) == (row.config, "", MoveState.PRECOPY)
        with pytest.raises(StaleFence):
            journal.check_fence(UUID(vm), 4)
        assert journal.conversions() == []
        assert (journal.file_generation(UUID(vm)), journal.file_sha256(UUID(vm))) == (0, "")
        journal.close()


def test_a_conversion_and_a_file_are_there_after_a_restart(world: World) -> None:
    path, vm = world.a.settings.database, world.config.uuid
    order = ConversionOrder(uuid4(), vm, 2, ConversionKind.ENCRYPT, world.config, "\xff", "full")
    row = ConversionRow(
        order,
        ConversionStatus(order.id, vm, ConversionState.SWAPPING),
        (NewImage("/x", "/y", 1, 2, 3),),
        (Place("/x", "/y", Seen(1, 2, 3, 4), None), Place("/z", "/w", Seen(1, 2, 3, 4), Seen(5, 6, 7, 8))),
    )
    journal = Journal(path)
    journal.put_conversion(row)
    journal.note_file(vm, 1 << 40, "aa")
    journal.close()
    journal = Journal(path)
    assert journal.conversions() == [row]
    assert (journal.file_generation(vm), journal.file_sha256(vm)) == (1 << 40, "aa")
    done = ConversionRow(order, ConversionStatus(order.id, vm, ConversionState.DONE))
    journal.finish_conversion(done, VmRow(world.config, wanted=True))
    assert (journal.conversions(), journal.vms()) == ([done], {vm: VmRow(world.config, wanted=True)})
    journal.drop_conversion(order.id)
    assert journal.conversions() == []
    assert journal.attempt_refused(order.id)
    journal.close()


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
    order = ConversionOrder(uuid4(), world.config.uuid, 2, ConversionKind.DECRYPT, world.config, "", "full")
    ended = ConversionRow(order, ConversionStatus(order.id, order.vm, ConversionState.DONE))
    journal._db.execute("PRAGMA query_only=ON")  # as a full disk: reading works, writing does not
    for act in (
        lambda: journal.put_vm(VmRow(world.config)),
        lambda: journal.check_fence(world.config.uuid, 1),
        lambda: journal.refuse_attempt(uuid4()),
        lambda: journal.note_file(world.config.uuid, 1, ""),
        lambda: journal.finish_conversion(ended, VmRow(world.config)),
    ):
        with pytest.raises(SealiftError, match="journal"):
            act()
    assert journal.vms() == {}
    journal.close()
