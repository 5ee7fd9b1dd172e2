"""10,000 connections to a host's migration port while a real guest comes there: it comes, and notices nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from sealift.channel.doorman import doorman_pid
from support.faults import HELD, held_before_switchover
from support.flood import Flood
from support.running_guest import Guest, relay_pids

pytestmark = pytest.mark.qemu

CONNECTIONS = 10_000


def test_a_guest_moves_under_a_flood(guest: Guest) -> None:
    source, target = guest.host, guest.other()
    lost_before = guest.console.ticks.lost()
    doorman = doorman_pid(str(target.run / "doorman.lock"))
    assert doorman is not None
    before = peak_kib(doorman)
    with Flood(target.migration_port, CONNECTIONS) as flood:
        ident = guest.begin(target, "--bandwidth", HELD, state=None)
        with held_before_switchover(guest, source):  # its connections have come through beside the flood
            (relay,) = relay_pids(target)
            flood.swells(CONNECTIONS // 4)
            assert peak_kib(relay) <= 96 << 10
    assert flood.made >= CONNECTIONS
    assert peak_kib(doorman) - before <= 4 << 10
    assert guest.wait(ident)["state"] == "done"
    assert guest.copies() == [target.name]
    assert guest.nothing_left(source)
    assert guest.unharmed()
    assert guest.console.ticks.lost() == lost_before


def peak_kib(pid: int) -> int:
    """The most memory that a process has ever had."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1])
