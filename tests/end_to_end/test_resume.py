"""A real guest is moved over a link that is reset again and again: the move is done and the guest notices nothing."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sealift.channel.relay_client import RelayClient
from sealift.demo.cluster import Cluster
from sealift.demo.guest import GuestImage
from sealift.domain.move import ChannelLimits
from sealift.errors import MigrationFailed
from support.cutter import Cutter
from support.ports import free_port
from support.running_guest import SLOW, Guest, left_behind

pytestmark = pytest.mark.qemu

RESETS, RESET_EVERY = 20, 1 << 20
WINDOW = ChannelLimits().window_bytes


@pytest.fixture(scope="module")
def behind_cutters() -> Iterator[tuple[Cluster, dict[str, Cutter]]]:
    """Two hosts; what others are told of their migration ports is a cutter's."""
    directory = Path(tempfile.mkdtemp(prefix="sl-"))
    cluster, cutters = Cluster(directory / "c"), {}
    try:
        cluster.start()
        for name in "ab":
            doorman = free_port()
            cutters[name] = Cutter(doorman, reset_every=RESET_EVERY)
            cutters[name].__enter__()
            listen = f"127.0.0.1:{doorman}"
            cluster.add_host(name, migration_port=cutters[name].port, migration_listen=listen)
        yield cluster, cutters
    finally:
        cluster.close()
        for cutter in cutters.values():
            cutter.__exit__()
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="module")
def cut_guest(behind_cutters: tuple[Cluster, dict[str, Cutter]], guest_image: GuestImage) -> Iterator[Guest]:
    guest = Guest(behind_cutters[0], guest_image, "cut", host="a")
    yield guest
    guest.close()


@pytest.mark.parametrize("channels", [1, 4])
def test_twenty_resets_in_one_move_cost_no_tick(
    cut_guest: Guest, behind_cutters: tuple[Cluster, dict[str, Cutter]], channels: int
) -> None:
    cut_guest.make_run()
    source = cut_guest.host
    target = cut_guest.other()
    cutter = behind_cutters[1][target.name]
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
    cut_guest: Guest, behind_cutters: tuple[Cluster, dict[str, Cutter]]
) -> None:
    cut_guest.make_run()
    source, target = cut_guest.host, cut_guest.other()
    cutter = behind_cutters[1][target.name]
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


def test_what_is_shown_as_sent_is_never_more_than_the_target_has(
    cut_guest: Guest, behind_cutters: tuple[Cluster, dict[str, Cutter]]
) -> None:
    """The target's QEMU is stopped in the middle: the relays fill up, and QEMU counts that as transferred."""
    cut_guest.make_run()
    source, target = cut_guest.host, cut_guest.other()
    behind_cutters[1][target.name].resets_left = 0
    ident = cut_guest.begin(target, "--bandwidth", SLOW)
    pid = cut_guest.qemu(target)
    assert pid is not None
    directory = next(source.run.glob("moves/*"))
    shown, held = 0, 0
    os.kill(pid, signal.SIGSTOP)
    try:
        end = time.monotonic() + 60
        while held < WINDOW // 4:
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


async def _status(directory: Path) -> dict[str, Any]:
    """What a relay says of itself, without asking the agent."""
    client = RelayClient(str(directory))
    try:
        return await client.status()
    finally:
        client.hang_up()
