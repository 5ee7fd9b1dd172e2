"""What happens to a real guest when parts die in the middle of a move: never lost, never doubled."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sealift.channel.doorman import doorman_pid
from sealift.demo.cluster import Host
from sealift.domain.move import MoveState
from support.running_guest import SLOW, Guest, left_behind, relay_pids

pytestmark = pytest.mark.qemu


def until(condition: Callable[[], object], what: str, timeout: float = 30) -> None:
    """Wait for something that has no event outside of the processes under test."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"not within {timeout} s: {what}"
        time.sleep(0.02)


def failed_at_the_source(guest: Guest, ident: str, source: Host, target: Host) -> str:
    """The move failed, the guest goes on at the source unharmed, nothing is at the target; the error's text."""
    record = guest.wait(ident)
    assert record["state"] == "failed", record["error"]
    assert guest.show()["host"] == source.name
    assert guest.copies() == [source.name]
    assert guest.nothing_left(target)
    assert not left_behind(source)
    assert guest.unharmed()
    return str(record["error"])


@pytest.mark.parametrize("side", ["source", "target"])
def test_a_killed_relay_fails_the_move_and_the_next_one_works(guest: Guest, side: str) -> None:
    source, target = guest.host, guest.other()
    ident = guest.begin(target, "--bandwidth", SLOW)
    (pid,) = relay_pids(source if side == "source" else target)
    os.kill(pid, signal.SIGKILL)
    failed_at_the_source(guest, ident, source, target)
    assert guest.migrate(target)["state"] == "done"


def test_a_killed_target_qemu_fails_the_move(guest: Guest) -> None:
    source, target = guest.host, guest.other()
    ident = guest.begin(target, "--bandwidth", SLOW)
    pid = guest.qemu(target)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    failed_at_the_source(guest, ident, source, target)


def test_a_frozen_target_relay_is_given_up(guest: Guest) -> None:
    source, target = guest.host, guest.other()
    ident = guest.begin(target, "--bandwidth", SLOW)
    (pid,) = relay_pids(target)
    os.kill(pid, signal.SIGSTOP)
    try:
        record = guest.wait(ident, "failed", timeout=110)
        # Its own agent notices before the source gives up.
        assert "peer_silent" in record["error"] or "relay_gone" in record["error"]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    until(lambda: not Path(f"/proc/{pid}").exists(), "a relay that does not answer is ended, with its key")
    failed_at_the_source(guest, ident, source, target)


def test_a_source_qemu_that_dies_before_it_let_go_is_crashed_at_the_source(guest: Guest) -> None:
    source, target = guest.host, guest.other()
    ident = guest.begin(target, "--bandwidth", SLOW)
    pid = guest.qemu(source)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    record = guest.wait(ident)
    assert record["state"] == "crashed"
    assert guest.show()["host"] == source.name
    assert guest.show()["state"] == "crashed"
    assert guest.nothing_left(target)
    assert guest.copies() == []
    booted = len([line for line in guest.console.lines if "READY" in line])
    guest.cluster.sealift("vm", "start", guest.name)
    until(lambda: len([line for line in guest.console.lines if "READY" in line]) > booted, "it boots again", 90)
    assert guest.copies() == [source.name]


@pytest.mark.parametrize("sides", [["source"], ["target"], ["source", "target"]], ids="-".join)
def test_an_agent_killed_in_precopy_finds_its_move_and_its_relay_again(guest: Guest, sides: list[str]) -> None:
    source, target = guest.host, guest.other()
    ident = guest.begin(target, "--bandwidth", SLOW)
    relays = [*relay_pids(source), *relay_pids(target)]
    killed = [source if side == "source" else target for side in sides]
    for host in killed:
        guest.cluster.kill_agent(host, signal.SIGKILL)
    assert guest.ticks()
    for host in killed:
        guest.cluster.start_agent(host)
    assert [*relay_pids(source), *relay_pids(target)] == relays
    record = guest.wait(ident)
    assert record["state"] == "done", record["error"]
    assert (record["protection"], record["reconnects"]) == ("sealed", 0)
    assert guest.copies() == [target.name]
    assert guest.nothing_left(source)
    assert guest.unharmed()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_vm_outlives_its_agent(guest: Guest, number: signal.Signals) -> None:
    host, pid = guest.host, guest.qemu(guest.host)
    guest.cluster.kill_agent(host, number)
    assert guest.ticks()
    guest.cluster.start_agent(host)
    until(lambda: guest.show()["state"] == "running", "the restarted agent finds the VM")
    assert guest.qemu(host) == pid


@pytest.mark.parametrize("state", ["preparing", "precopy", "switchover"])
def test_a_controller_killed_in_a_move_comes_back_to_one_copy(guest: Guest, state: str) -> None:
    source, target = guest.host, guest.other()
    slow = ["--bandwidth", SLOW] if state != "switchover" else []
    ident = guest.begin(target, *slow, state=state)
    guest.cluster.kill_controller()
    assert guest.ticks()
    guest.cluster.start_controller()
    record = guest.wait(ident)
    assert record["state"] in ("done", "failed"), record["error"]
    here = target if record["state"] == "done" else source
    assert guest.show()["host"] == here.name
    until(lambda: guest.copies() == [here.name], "one copy is left")
    assert guest.nothing_left(target if here is source else source)
    assert guest.unharmed()


def _held_in_commit(guest: Guest) -> tuple[str, Host, Host]:
    """A move whose source has let go and sent COMMIT, while the target's agent is frozen and has not answered."""
    source, target = guest.host, guest.other()
    ident = guest.begin(target, "--bandwidth", SLOW)
    assert target.process is not None
    os.kill(target.process.pid, signal.SIGSTOP)
    until(lambda: _state_at(guest, source, ident) == MoveState.COMMITTING.value, "the source waits for RUNNING", 60)
    return ident, source, target


def _state_at(guest: Guest, host: Host, ident: str) -> str:
    from sealift.agent.journal import Journal

    journal = Journal(host.state / "agent.db")
    try:
        found = [row.status.state.value for row in journal.moves() if str(row.order.vm) == guest.uuid]
        return found[0] if found else ""
    finally:
        journal.close()


def _says_nothing(guest: Guest) -> bool:
    """Whether no copy of it writes to its console for a second; seen at the files, since we may read them later."""
    consoles = [host.state / "vms" / guest.uuid / "serial.log" for host in guest.cluster.hosts.values()]
    before = [path.stat().st_size for path in consoles if path.exists()]
    time.sleep(1)
    return before == [path.stat().st_size for path in consoles if path.exists()]


def test_a_link_lost_after_commit_is_settled_by_the_targets_answer(guest: Guest) -> None:
    """Crash cell (b): the source's QEMU waits in postmigrate, the relays are gone, the controller carries COMMIT."""
    ident, source, target = _held_in_commit(guest)
    for pid in (*relay_pids(source), *relay_pids(target)):
        os.kill(pid, signal.SIGKILL)
    until(lambda: _state_at(guest, source, ident) == "awaiting_answer", "the source notices")
    assert _says_nothing(guest), "a copy runs although nobody has committed"
    assert target.process is not None
    os.kill(target.process.pid, signal.SIGCONT)
    record = guest.wait(ident)
    assert record["state"] == "done", record["error"]
    assert guest.copies() == [target.name]
    assert guest.nothing_left(source)
    assert guest.unharmed()


def test_a_target_that_dies_before_it_commits_gives_the_guest_back(guest: Guest) -> None:
    """Crash cell (b), the other answer: ABORTED, durable, and only then does the source's guest run again."""
    ident, source, target = _held_in_commit(guest)
    pid = guest.qemu(target)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert _says_nothing(guest), "the source ran on before the target had aborted"
    assert target.process is not None
    os.kill(target.process.pid, signal.SIGCONT)
    failed_at_the_source(guest, ident, source, target)


def test_a_source_agent_killed_after_it_let_go_hands_over_all_the_same(guest: Guest) -> None:
    ident, source, target = _held_in_commit(guest)
    guest.cluster.kill_agent(source, signal.SIGKILL)
    assert target.process is not None
    os.kill(target.process.pid, signal.SIGCONT)
    guest.cluster.start_agent(source)
    record = guest.wait(ident)
    assert record["state"] == "done", record["error"]
    assert guest.copies() == [target.name]
    assert guest.unharmed()


def test_a_doorman_that_dies_is_replaced_and_no_move_needs_it(guest: Guest) -> None:
    source, target = guest.host, guest.other()
    ident = guest.begin(target, "--bandwidth", SLOW)
    lock = str(target.run / "doorman.lock")
    pid = doorman_pid(lock)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    until(lambda: doorman_pid(lock) not in (None, pid), "the agent starts another")
    assert guest.wait(ident)["state"] == "done"
    guest.migrate(source)
    assert guest.migrate(target)["state"] == "done"
