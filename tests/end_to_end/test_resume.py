"""A real guest is moved over a link that is reset again and again: the move is done and the guest notices nothing."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from sealift.channel.relay_client import RelayClient
from sealift.channel.window import LEAST
from sealift.errors import MigrationFailed
from support.faults import CutCluster, RelayLine, settled
from support.limited_controller import limited
from support.running_guest import SLOW, Guest, left_behind

pytestmark = pytest.mark.qemu

RESETS = 20
UNDER_WAY = frozenset({"listening", "connected", "flowing"})


@pytest.mark.parametrize("channels", [1, 4])
def test_twenty_resets_in_one_move_cost_no_tick(cut_guest: Guest, behind_cutters: CutCluster, channels: int) -> None:
    source = cut_guest.host
    target = cut_guest.other()
    cutter = behind_cutters.cutters[target.name]
    cutter.resets_left = RESETS
    record = cut_guest.migrate(target, "--channels", str(channels))
    assert record["state"] == "done"
    assert record["protection"] == "sealed"
    assert cutter.resets_left == 0
    assert record["reconnects"] >= record["outages"] > 0
    assert cut_guest.copies() == [target.name]
    assert cut_guest.nothing_left(source)
    assert cut_guest.unharmed()
    assert cut_guest.console.ticks.lost() == 0


def test_a_link_that_stays_down_is_given_up_after_the_time_that_was_asked_for(
    cut_guest: Guest, behind_cutters: CutCluster
) -> None:
    source, target = cut_guest.host, cut_guest.other()
    cutter = behind_cutters.cutters[target.name]
    cutter.resets_left = 0
    ident = cut_guest.begin(target, "--bandwidth", SLOW, "--give-up", "3s")
    cutter.down()
    try:
        record = cut_guest.wait(ident, "failed")
    finally:
        cutter.up()
    assert record["error_slug"] == MigrationFailed.slug
    assert "it could not be resumed in time [" in record["error"]
    assert record["give_up_ms"] == 3_000
    assert record["outages"] == 1
    assert cut_guest.show()["host"] == source.name
    assert cut_guest.copies() == [source.name]
    assert cut_guest.nothing_left(target)
    assert not left_behind(source)
    assert cut_guest.unharmed()
    told = cut_guest.cluster.sealift("events", "--json").stdout.splitlines()
    events = [event for event in map(json.loads, told) if event["migration"] == ident]
    assert [event["type"] for event in events if event["slug"]] == ["migration.interrupted"]


def test_what_is_shown_as_sent_is_never_more_than_the_target_has(cut_guest: Guest, behind_cutters: CutCluster) -> None:
    """The target's QEMU is stopped in the middle: the relays fill up, and QEMU counts that as transferred."""
    source, target = cut_guest.host, cut_guest.other()
    behind_cutters.cutters[target.name].resets_left = 0
    ident = cut_guest.begin(target, "--bandwidth", SLOW)
    pid = cut_guest.qemu(target)
    assert pid is not None
    directory = next(source.run.glob("moves/*"))
    shown, held = 0, 0
    os.kill(pid, signal.SIGSTOP)
    try:
        end = time.monotonic() + 60
        while held < LEAST // 2:
            assert time.monotonic() < end, f"the source's relay holds only {held} bytes"
            sample = cut_guest.record(ident)["progress"]
            relay = asyncio.run(_status(directory))
            shown = max(shown, sample["transferred_bytes"])
            assert sample["transferred_bytes"] <= relay["acked_out"], "shown before it was there"
            held = relay["sealed_out"] - relay["acked_out"]
    finally:
        os.kill(pid, signal.SIGCONT)
    assert shown > 0
    cut_guest.cluster.sealift("migration", "cancel", ident)
    assert cut_guest.wait(ident)["state"] == "cancelled"
    assert cut_guest.copies() == [source.name]
    assert cut_guest.nothing_left(target)


def test_keys_change_in_both_directions_in_the_middle_of_a_move(cut_guest: Guest, behind_cutters: CutCluster) -> None:
    """Towards the target by bytes and records; back by records, which are acknowledgements, answers and heartbeats."""
    with limited(behind_cutters.cluster, records=4, size=1 << 20):
        source, target = cut_guest.host, cut_guest.other()
        lost = cut_guest.console.ticks.lost()
        ident = cut_guest.begin(target, "--bandwidth", SLOW)
        with RelayLine(source) as near, RelayLine(target) as far:
            while True:
                counted = [line.ask("status") for line in (near, far)]
                assert all(status.get("state") in UNDER_WAY for status in counted), "it ended with the first keys"
                if all(status["rekeys_out"] >= 2 and status["rekeys_in"] >= 2 for status in counted):
                    break
                time.sleep(0.05)
        behind_cutters.cutters[target.name].reset()  # what is sent again goes under other keys than before
        record = settled(cut_guest, ident, source, target, lost_before=lost)
        assert (record["state"], record["protection"]) == ("done", "sealed")


async def _status(directory: Path) -> dict[str, Any]:
    """What a relay says of itself, without asking the agent."""
    client = RelayClient(str(directory))
    try:
        return await client.status()
    finally:
        client.hang_up()
