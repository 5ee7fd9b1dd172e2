"""Moves of a real guest through the whole of Sealift: what goes well, and what the record says of it."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from sealift.demo.cluster import Cluster
from sealift.demo.guest import GuestImage
from sealift.errors import MigrationCancelled, PlanRefused
from support.running_guest import SLOW, Guest, left_behind, make_disk

pytestmark = pytest.mark.qemu


@pytest.mark.parametrize("channels", [1, 4])
def test_a_sealed_move_loses_nothing_and_leaves_nothing(guest: Guest, channels: int) -> None:
    source, target = guest.host, guest.other()
    lost_before = guest.console.ticks.lost()
    record = guest.migrate(target, "--channels", str(channels))
    assert record["state"] == "done"
    assert (record["protection"], record["cipher"], record["channels"]) == ("sealed", "AES-256-GCM", channels)
    assert record["sealed_out"] == record["target_sealed_in"] > 0
    assert record["sealed_in"] == record["target_sealed_out"] > 0
    states = [phase["state"] for phase in record["phases"]]
    assert states == [
        "requested", "planned", "preparing", "precopy", "switchover", "committing", "cleaning", "done",
    ]  # fmt: skip
    assert record["downtime_ms"] > 0
    assert record["total_s"] > record["downtime_ms"] / 1000
    assert guest.show()["host"] == target.name
    assert guest.copies() == [target.name]
    assert guest.nothing_left(source)
    assert guest.unharmed()
    assert guest.console.ticks.lost() == lost_before


def test_the_target_is_built_from_the_hardware_record(guest: Guest) -> None:
    before = guest.show()["hardware"]
    assert before["machine"].startswith("pc-q35-")
    guest.migrate(guest.other())
    assert guest.show()["hardware"] == before


def test_dry_run_moves_nothing(guest: Guest) -> None:
    host = guest.host
    planned = guest.cluster.ask("migrate", guest.name, "--to", guest.other().name, "--dry-run")
    assert planned["state"] == "planned"
    assert planned["protection"] == "sealed"
    assert guest.copies() == [host.name]


def test_required_against_an_incapable_host_is_refused_before_anything_moves(guest: Guest) -> None:
    guest.cluster.sealift("vm", "set", guest.name, "--migrate-encryption", "required")
    with pytest.raises(PlanRefused, match="c cannot seal"):
        guest.migrate(guest.cluster.hosts["c"])
    assert guest.copies() == [guest.host.name]
    assert not left_behind(guest.cluster.hosts["c"])


def test_opportunistic_falls_back_to_plain_and_says_so_everywhere(guest: Guest) -> None:
    home, incapable = guest.host, guest.cluster.hosts["c"]
    told = guest.cluster.sealift("migrate", guest.name, "--to", "c")
    assert "PLAIN" in told.stdout + told.stderr
    record = guest.cluster.ask("migration", "list")[0]
    assert (record["protection"], record["cipher"], record["sealed_out"]) == ("plain", None, 0)
    assert "c cannot seal" in record["reason"]
    events = guest.cluster.sealift("events", "--json").stdout.splitlines()
    plain = [json.loads(line) for line in events if '"migration.plain"' in line]
    assert any("c cannot seal" in json.dumps(event) for event in plain)
    assert guest.unharmed()
    assert guest.nothing_left(home)
    guest.migrate(home)
    assert guest.nothing_left(incapable)


def test_cancel_keeps_the_vm_at_the_source(guest: Guest) -> None:
    source, target = guest.host, guest.other()
    ident = guest.begin(target, "--bandwidth", SLOW)
    guest.cluster.sealift("migration", "cancel", ident)
    record = guest.wait(ident)
    assert record["state"] == "cancelled"
    assert guest.copies() == [source.name]
    assert guest.nothing_left(target)
    assert guest.unharmed()


def test_ctrl_c_cancels_and_says_where_the_vm_is(guest: Guest) -> None:
    source, target = guest.host, guest.other()
    command = subprocess.Popen(
        guest.cluster.argv("migrate", guest.name, "--to", target.name, "--bandwidth", SLOW),
        env=guest.cluster.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with command:
        assert command.stdout is not None
        for line in command.stdout:
            if "precopy" in line:
                break
        command.send_signal(signal.SIGINT)
        rest = command.stdout.read()
        assert command.wait(60) == MigrationCancelled.exit_code
    assert source.name in rest
    assert guest.copies() == [source.name]


def test_progress_and_bandwidth_are_honoured(guest: Guest) -> None:
    ident = guest.begin(guest.other(), "--bandwidth", SLOW)
    end = time.monotonic() + 10
    while not (progress := guest.record(ident)["progress"]) or not progress["transferred_bytes"]:
        assert time.monotonic() < end, "no progress is reported"
    assert progress["rate"] < 30e6
    assert progress["remaining_bytes"] > 0
    guest.cluster.sealift("migration", "cancel", ident)
    guest.wait(ident)


def test_a_vm_with_a_disk_on_a_shared_datastore(cluster: Cluster, guest_image: GuestImage) -> None:
    datastore = Path(guest_image.kernel).parent / "test-datastore"  # on a real file system: tmpfs has no O_DIRECT
    datastore.mkdir(exist_ok=True)
    image = make_disk(datastore / f"{time.time_ns()}.qcow2")
    guest = Guest(cluster, guest_image, "with-disk", host="a", disk=image)
    try:
        guest.make_run()
        assert guest.console.wait_for("DISK 5 ok", 30)
        for host in ("b", "a"):
            assert guest.migrate(cluster.hosts[host])["state"] == "done"
            assert guest.ticks()
        written = sum(line.startswith("DISK") for line in guest.console.lines)
        assert guest.console.wait_for(f"DISK {written + 5} ok", 30)
        assert not [line for line in guest.console.lines if line.startswith("DISK") and not line.endswith("ok")]
        assert list(datastore.glob(".sealift-marker-*")) == []
    finally:
        guest.close()
        cluster.sealift("vm", "stop", "with-disk", "--force", check=False)
        cluster.sealift("vm", "delete", "with-disk", check=False)
        image.unlink()
