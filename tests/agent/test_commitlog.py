"""The durable record: what survives a torn write, what may follow what, and who may start a VM by it."""

from __future__ import annotations

import os
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealift.agent.commitlog import SLOT_BYTES, SLOTS, CommitLog, Entry, Mark, decode, encode_slot, let_go_by, prune
from sealift.domain.move import Role
from sealift.errors import IllegalTransition, SealiftError

ATTEMPT = UUID("6f1d0c52-5a87-4b52-9d5e-1f6b8a3f0a01")
OTHER = UUID("6f1d0c52-5a87-4b52-9d5e-1f6b8a3f0a02")

PATHS = {
    Role.SOURCE: [[], [Mark.LET_GO], [Mark.ABORTED], [Mark.LET_GO, Mark.RELEASED], [Mark.LET_GO, Mark.ABORTED]],
    Role.TARGET: [
        [],
        [Mark.READY],
        [Mark.ABORTED],
        [Mark.READY, Mark.ABORTED],
        [Mark.READY, Mark.COMMITTED],
        [Mark.READY, Mark.COMMITTED, Mark.REVOKED],
    ],
}
"""Every way that a log can be written."""


def written(directory: Path, role: Role, fence: int, *marks: Mark, attempt: UUID = ATTEMPT) -> CommitLog:
    log = CommitLog(directory, role, attempt, fence)
    for mark in marks:
        log.write(mark, 1000.5)
    return log


def raw(*marks: Mark) -> bytes:
    slots = b"".join(encode_slot(n, mark, ATTEMPT, 7, 1000.5) for n, mark in enumerate(marks))
    return slots.ljust(SLOT_BYTES * SLOTS, b"\0")


@pytest.mark.parametrize("role", Role)
def test_only_the_ways_of_the_table_can_be_written_and_each_is_read_back(tmp_path: Path, role: Role) -> None:
    for number, marks in enumerate(PATHS[role]):
        log = written(tmp_path, role, number, *marks)
        assert log.last is (marks[-1] if marks else None)
        again = CommitLog(tmp_path, role, ATTEMPT, number)
        assert again.entries == [Entry(mark, 1000.5) for mark in marks]
        for mark in Mark:
            if mark is not again.last and [*marks, mark] not in PATHS[role]:
                before = again.path.read_bytes()
                with pytest.raises(IllegalTransition):
                    again.write(mark, 1.0)
                assert again.path.read_bytes() == before


def test_the_newest_mark_written_again_changes_nothing(tmp_path: Path) -> None:
    log = written(tmp_path, Role.SOURCE, 1, Mark.LET_GO)
    before = log.path.read_bytes()
    log.write(Mark.LET_GO, 2000.0)
    assert log.path.read_bytes() == before


def test_a_log_has_all_its_room_before_anything_is_written(tmp_path: Path) -> None:
    log = CommitLog(tmp_path / "new", Role.TARGET, ATTEMPT, 3)
    stat = log.path.stat()
    assert (stat.st_size, stat.st_mode & 0o777) == (SLOT_BYTES * SLOTS, 0o600)
    assert stat.st_blocks * 512 >= SLOT_BYTES * SLOTS
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    for mark in (Mark.READY, Mark.COMMITTED, Mark.REVOKED):
        log.write(mark, 1.0)
    assert log.path.stat().st_size == SLOT_BYTES * SLOTS


def test_a_mark_that_the_disk_did_not_take_does_not_count(tmp_path: Path) -> None:
    log = CommitLog(tmp_path, Role.SOURCE, ATTEMPT, 1)
    kept = log.path.rename(tmp_path / "kept")
    with pytest.raises(SealiftError, match="could not be written"):
        log.write(Mark.LET_GO, 1.0)
    assert log.last is None
    kept.rename(log.path)
    log.write(Mark.LET_GO, 2.0)
    assert CommitLog(tmp_path, Role.SOURCE, ATTEMPT, 1).entries == [Entry(Mark.LET_GO, 2.0)]


@given(st.integers(0, SLOT_BYTES - 1), st.binary(min_size=SLOT_BYTES, max_size=SLOT_BYTES), st.sampled_from([0, 1]))
def test_a_torn_write_is_no_mark_and_takes_none_away(cut: int, stale: bytes, before: int) -> None:
    """Any prefix of the new slot, over zeros, or with anything behind it that the disk may leave."""
    marks = [Mark.READY, Mark.COMMITTED]
    whole, kept = raw(*marks[: before + 1]), raw(*marks[:before])
    slot = slice(before * SLOT_BYTES, (before + 1) * SLOT_BYTES)
    for rest in (bytes(SLOT_BYTES), stale):
        torn = whole[slot][:cut] + rest[cut:]
        if torn == whole[slot]:
            continue
        found = decode(kept[: slot.start] + torn + kept[slot.stop :], ATTEMPT, 7)
        assert [entry.mark for entry in found] == marks[:before]


@given(st.integers(0, SLOT_BYTES * 8 - 1))
def test_a_flipped_bit_with_marks_behind_it_is_damage_and_nothing_is_concluded(bit: int) -> None:
    image = bytearray(raw(Mark.LET_GO, Mark.ABORTED))
    image[bit // 8] ^= 1 << bit % 8
    with pytest.raises(SealiftError, match="damaged"):
        decode(bytes(image), ATTEMPT, 7)


def test_a_mark_of_another_attempt_or_a_newer_agent_is_not_passed_over() -> None:
    strange = bytearray(encode_slot(0, Mark.LET_GO, ATTEMPT, 7, 1.0))
    for attempt, fence in ((OTHER, 7), (ATTEMPT, 8)):
        with pytest.raises(SealiftError):
            decode(bytes(strange), attempt, fence)
    unknown = encode_slot(0, 99, ATTEMPT, 7, 1.0)  # type: ignore[arg-type]
    with pytest.raises(SealiftError):
        decode(unknown, ATTEMPT, 7)


@pytest.mark.parametrize("marks", PATHS[Role.SOURCE], ids=lambda marks: "-".join(m.name for m in marks) or "nothing")
def test_a_source_that_let_go_may_not_start_it(tmp_path: Path, marks: list[Mark]) -> None:
    written(tmp_path, Role.SOURCE, 5, *marks)
    gone = marks in ([Mark.LET_GO], [Mark.LET_GO, Mark.RELEASED])
    assert let_go_by(tmp_path) == (ATTEMPT if gone else None)


@pytest.mark.parametrize("marks", PATHS[Role.TARGET], ids=lambda marks: "-".join(m.name for m in marks) or "nothing")
def test_only_a_commit_brings_it_back(tmp_path: Path, marks: list[Mark]) -> None:
    """A VM that this host released, and that was on its way back."""
    written(tmp_path, Role.SOURCE, 5, Mark.LET_GO, Mark.RELEASED)
    written(tmp_path, Role.TARGET, 6, *marks, attempt=OTHER)
    assert let_go_by(tmp_path) == (None if marks == [Mark.READY, Mark.COMMITTED] else ATTEMPT)
    prune(tmp_path)
    assert let_go_by(tmp_path) == (None if marks == [Mark.READY, Mark.COMMITTED] else ATTEMPT)


def test_a_vm_that_went_and_came_many_times(tmp_path: Path) -> None:
    """The fence orders the attempts, however their ids sort."""
    fence = 0
    for _ in range(12):
        fence += 1
        written(tmp_path, Role.SOURCE, fence, Mark.LET_GO, Mark.RELEASED, attempt=UUID(int=1 << 100 | 1000 - fence))
        assert let_go_by(tmp_path) is not None
        fence += 1
        written(tmp_path, Role.TARGET, fence, Mark.READY, Mark.COMMITTED, attempt=UUID(int=1 << 100 | fence))
        assert let_go_by(tmp_path) is None
        prune(tmp_path)
        assert len(os.listdir(tmp_path)) == 1


def test_a_damaged_log_lets_nothing_be_started(tmp_path: Path) -> None:
    log = written(tmp_path, Role.SOURCE, 5, Mark.LET_GO, Mark.RELEASED)
    image = bytearray(log.path.read_bytes())
    image[100] ^= 1
    log.path.write_bytes(image)
    with pytest.raises(SealiftError, match="damaged"):
        let_go_by(tmp_path)


def test_a_host_that_never_had_a_vm_may_start_it(tmp_path: Path) -> None:
    assert let_go_by(tmp_path / "nothing") is None
    prune(tmp_path / "nothing")
