"""An encrypted VM that runs: it moves sealed, outlives its key provider, and its keys are nowhere to be found."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from sealift.controller.services import open_services
from sealift.demo.cluster import Cluster, Host
from sealift.demo.guest import GuestImage
from sealift.errors import Conflict, PlanRefused, VmLocked
from support.encrypted import PATIENCE_S, Home, Keys, encryption_of, is_luks, keys_of
from support.running_guest import Guest, make_disk

pytestmark = pytest.mark.qemu


@pytest.fixture(scope="module")
def the_vm(cluster: Cluster, home: Home, datastore: Path, guest_image: GuestImage) -> Iterator[Guest]:
    """It was made in clear, with moves encrypted never, and then encrypted."""
    image = make_disk(datastore / "encrypted.qcow2")
    guest = Guest(cluster, guest_image, "encrypted", host="a", disk=image, filled=16, dirty=2)
    cluster.sealift("vm", "set", guest.name, "--migrate-encryption", "disabled")
    cluster.sealift("vm", "encrypt", guest.name, "--provider", home.name)
    assert is_luks(image)
    yield guest
    guest.close()
    cluster.sealift("vm", "stop", guest.name, "--force", check=False)
    cluster.sealift("vm", "delete", guest.name, "--force", check=False)


@pytest.fixture
def vm(cluster: Cluster, home: Home, the_vm: Guest) -> Guest:
    """The VM, running, its key provider and all agents there."""
    home.bring_back()
    for host in cluster.hosts.values():
        if host.process is None:
            cluster.start_agent(host)
    the_vm.make_run()
    return the_vm


def _writes(vm: Guest) -> bool:
    """Whether the guest goes on writing to its disk and reads back what it wrote."""
    assert vm.console.wait_for("DISK", 90, count=vm.console.count("DISK") + 5)
    return not any(re.fullmatch(r"DISK \d+ bad", line) for line in vm.console.lines)


def _key_id(vm: Guest) -> str:
    found: str = vm.show()["encryption"]["key_id"]
    return found


def _holds(vm: Guest, host: Host) -> bool:
    """Whether a host has the keys of the VM's disks in memory, whether the VM is there or not."""
    deks = [UUID(disk["dek"]) for disk in vm.show()["config"]["disks"]]

    async def ask() -> bool:
        services = await open_services(vm.cluster.directory / "controller")
        try:
            link = services.inventory.link(await services.inventory.host_row(host.name))
            return await link.holds(UUID(vm.uuid), deks)
        finally:
            await services.close()

    return asyncio.run(ask())


def test_it_moves_sealed_although_its_setting_was_disabled(vm: Guest) -> None:
    shown = vm.show()
    assert (shown["migrate_encryption"], shown["migrate_encryption_before"]) == ("required", "disabled")
    for setting in ("disabled", "opportunistic"):
        with pytest.raises(Conflict, match="encrypted"):
            vm.cluster.ask("vm", "set", vm.name, "--migrate-encryption", setting)
    source, target = vm.host, vm.other()
    lost_before = vm.console.ticks.lost()
    record = vm.migrate(target)
    assert (record["state"], record["protection"], record["cipher"]) == ("done", "sealed", "AES-256-GCM")
    assert _writes(vm)
    assert vm.copies() == [target.name]
    assert vm.nothing_left(source)
    assert vm.console.ticks.lost() == lost_before


def test_plain_is_refused_by_a_host_that_cannot_seal(vm: Guest) -> None:
    with pytest.raises(PlanRefused, match="c cannot seal"):
        vm.migrate(vm.cluster.hosts["c"])
    assert _writes(vm)


def test_without_its_provider_it_runs_on_and_moves_where_its_keys_are_held(vm: Guest, home: Home) -> None:
    first, second = vm.host, vm.other()
    if not _holds(vm, second):
        vm.migrate(second)
        first, second = second, first
    assert home.take_away()["locks"] == [vm.name]
    assert _writes(vm)
    record = vm.migrate(second)
    assert (record["state"], record["protection"]) == ("done", "sealed")
    assert _writes(vm)
    # A host whose agent was restarted holds no keys any more.
    vm.cluster.kill_agent(first)
    vm.cluster.start_agent(first)
    with pytest.raises(PlanRefused) as refused:
        vm.migrate(first)
    assert home.name in str(refused.value)
    assert _key_id(vm) in str(refused.value)
    assert vm.copies() == [second.name]
    home.bring_back()
    planned = vm.cluster.ask("migrate", vm.name, "--to", first.name, "--dry-run")
    assert planned["state"] == "planned", planned


def test_a_new_agent_finds_it_running_and_gets_its_keys_back(vm: Guest) -> None:
    host = vm.host
    vm.cluster.kill_agent(host)
    lost_before = vm.console.ticks.lost()
    vm.cluster.start_agent(host)
    assert _writes(vm)
    end = time.monotonic() + PATIENCE_S
    while not _holds(vm, host):
        assert time.monotonic() < end, "the host did not get the keys back"
    assert vm.show()["encryption"]["state"] == "ok"
    assert vm.console.ticks.lost() == lost_before


def test_rekeyed_while_it_runs(vm: Guest) -> None:
    before, disks = _key_id(vm), vm.show()["config"]["disks"]
    vm.cluster.sealift("vm", "rekey", vm.name)
    assert _key_id(vm) != before
    assert vm.show()["config"]["disks"] == disks
    assert _writes(vm)


def test_its_keys_are_in_no_argument_environment_file_or_log(vm: Guest, datastore: Path) -> None:
    cluster, keys = vm.cluster, keys_of(vm.cluster, vm.name)
    forms = _spellings(keys)
    pids = {"qemu at the source": vm.qemu(vm.host)}
    seen = _arguments_and_environment(pids)
    assert vm.migrate(vm.other())["state"] == "done"
    pids = {"controller": cluster.controller_pid, "qemu": vm.qemu(vm.host)}
    for host in cluster.hosts.values():
        assert host.process is not None
        pids[f"agent {host.name}"] = host.process.pid
    seen |= _arguments_and_environment(pids)
    for role, text in seen.items():
        assert not [form for form in forms if form in text], f"a key is in the arguments or environment of {role}"
    files = [path for place in (cluster.directory, datastore) for path in place.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"agent.db", "agent.log", "controller.log", "vm.toml", "encrypted.qcow2"}
    for path in files:
        content = path.read_bytes()
        assert not [form for form in forms if form in content], f"a key is in {path}"


def _arguments_and_environment(pids: dict[str, int]) -> dict[str, bytes]:
    return {
        role: b"".join((Path("/proc") / str(pid) / name).read_bytes() for name in ("cmdline", "environ"))
        for role, pid in pids.items()
    }


def _spellings(keys: Keys) -> list[bytes]:
    """How keys may be written: raw, hex (which is also the passphrase of LUKS), base64."""
    found = []
    for raw in (keys.kek, *keys.deks.values()):
        found += [raw, raw.hex().encode(), raw.hex().upper().encode()]
        found += [base64.b64encode(raw).rstrip(b"="), base64.urlsafe_b64encode(raw).rstrip(b"=")]
    return found


def test_after_a_power_cut_without_its_provider_it_is_locked_and_unlocks_by_itself(vm: Guest, home: Home) -> None:
    host, key_id = vm.host, _key_id(vm)
    assert _writes(vm)
    told_before = len(_events_of(vm))
    home.take_away()
    vm.cluster.lose_power(host)
    written = max(int(line.split()[1]) for line in vm.console.lines if re.fullmatch(r"DISK \d+ ok", line))
    vm.cluster.start_agent(host)
    locked = encryption_of(vm.cluster, vm.name, "locked")
    assert home.name in locked["message"]
    assert key_id in locked["message"]
    assert "locked" in vm.cluster.sealift("vm", "list").stdout.lower()
    with pytest.raises(VmLocked, match=f"{re.escape(key_id)} of key provider {home.name}"):
        vm.cluster.ask("vm", "start", vm.name)
    home.bring_back()
    encryption_of(vm.cluster, vm.name, "ok")
    found_before = vm.console.count("FOUND")
    vm.cluster.sealift("vm", "start", vm.name)
    assert vm.console.wait_for("FOUND", 90, count=found_before + 1)
    (*_, line) = (line for line in vm.console.lines if line.startswith("FOUND"))
    found = re.fullmatch(r"FOUND blocks=(\d+) bad=0 last=(\d+)", line)
    assert found, line
    assert int(found[1]) > 0
    assert int(found[2]) >= written
    told = _events_of(vm)[told_before:]
    assert [event["type"] for event in told if event["type"] in ("vm.locked", "vm.unlocked")] == [
        "vm.locked",
        "vm.unlocked",
    ]
    (locking,) = [event["text"] for event in told if event["type"] == "vm.locked"]
    assert key_id in locking


def _events_of(vm: Guest) -> list[dict[str, Any]]:
    lines = vm.cluster.sealift("events", "--json").stdout.splitlines()
    return [event for event in map(json.loads, lines) if event["vm"] == vm.name]
