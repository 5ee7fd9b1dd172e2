"""What stands against a move: one fact wrong at a time, and everything wrong at once."""

from __future__ import annotations

from dataclasses import replace
from uuid import UUID

import pytest

from sealift.domain.checks import MAX_CHANNELS, Facts, KeyFacts, check
from sealift.domain.host import HostCapabilities
from sealift.domain.move import MoveOptions
from sealift.domain.vm import Accelerator, Disk, HardwareRecord, VmConfig, VmState, VmStatus

GIB = 1 << 30


def host(name: str, **changes: object) -> HostCapabilities:
    good = HostCapabilities(
        host=UUID(int=1),
        name=name,
        agent_version="0.1.0",
        sealed_channel=True,
        sealed_channel_reason="",
        channel_versions=(1,),
        aes_instructions=True,
        aes_gcm_gb_per_s=5.0,
        qemu_version="7.2.22 (Debian 1:7.2+dfsg-7)",
        machine_types=("pc-q35-7.2",),
        accelerators=(Accelerator.KVM, Accelerator.TCG),
        memory_free_bytes=4 * GIB,
        migration_address="10.0.0.2:7421",
        cpu_model="Xeon",
    )
    return replace(good, **changes)  # type: ignore[arg-type]


def status(*, state: VmState = VmState.RUNNING, disks: tuple[Disk, ...] = (), **changes: object) -> VmStatus:
    config = VmConfig("vm1", UUID(int=7), 2, 2 * GIB, disks=disks)
    good = HardwareRecord(1, config, "pc-q35-7.2", "qemu64", Accelerator.KVM, {}, "7.2.22")
    record = replace(good, **changes)  # type: ignore[arg-type]
    return VmStatus(config.uuid, "vm1", state, config, record)


GOOD = Facts(
    vm_name="vm1",
    source=host("a"),
    target=host("b"),
    status=status(),
    at_target=None,
    target_address="10.0.0.2:7421",
    options=MoveOptions(),
    channels=1,
)
DISK = Disk("/data/vm1.raw", "raw")
HOST_CPU = status(cpu="host,migratable=on")
TCG_MAX = status(cpu="max", accelerator=Accelerator.TCG)
NEW_QEMU: dict[str, object] = {
    "status": status(qemu_version="8.1.0"),
    "source": host("a", qemu_version="8.1.0"),
    "target": host("b", qemu_version="8.1.0"),
}

ERRORS = [
    ("not running", {"status": status(state=VmState.STOPPED)}, "is stopped"),
    ("not running, a disk", {"status": status(state=VmState.STOPPED, disks=(DISK,))}, "is stopped"),
    ("there already, a disk", {"at_target": VmState.STOPPED, "status": status(disks=(DISK,))}, "already has"),
    ("paused", {"status": status(state=VmState.PAUSED)}, "is paused"),
    ("unknown at the source", {"status": None}, "does not know"),
    ("the same host", {"same_host": True}, "at that host already"),
    ("there already", {"at_target": VmState.RUNNING}, "already has"),
    ("left over there", {"at_target": VmState.STOPPED}, "already has"),
    ("no channel", {"channels": 0}, "0 channels"),
    ("too many channels", {"channels": MAX_CHANNELS + 1}, "channels"),
    ("negative bandwidth", {"options": MoveOptions(bandwidth=-1)}, "not sane"),
    ("no downtime at all", {"options": MoveOptions(max_downtime_ms=0)}, "not sane"),
    ("no key to be had", {"keys": KeyFacts("key k is away", "bring it back")}, "key k is away; the target does not"),
    ("a changed file", {"keys": KeyFacts(file="the file was changed", file_todo="restore it")}, "file was changed"),
    ("given up at once", {"options": MoveOptions(give_up_ms=999)}, "give-up time of 0.999 s"),
    ("given up never", {"options": MoveOptions(give_up_ms=86_400_001)}, "between 1 s and 86400 s"),
    ("a switchover without patience", {"options": MoveOptions(switchover_timeout_ms=0)}, "switchover timeout of 0 s"),
    ("a switchover without end", {"options": MoveOptions(switchover_timeout_ms=60_001)}, "between 1 s and 60 s"),
    ("no migration address", {"target_address": ""}, "no migration address"),
    ("half a migration address", {"target_address": "10.0.0.2"}, "no migration address"),
    ("no room", {"target": host("b", memory_free_bytes=2 * GIB - 1)}, "memory free"),
    ("machine missing", {"target": host("b", machine_types=("pc-q35-6.2",))}, "pc-q35-7.2"),
    ("accelerator missing", {"target": host("b", accelerators=(Accelerator.TCG,))}, "cannot run kvm"),
    ("older QEMU", {"target": host("b", qemu_version="7.2.9")}, "older than"),
    ("host CPU, another CPU", {"status": HOST_CPU, "target": host("b", cpu_model="EPYC")}, "different CPUs"),
    ("disk not shared", {"status": status(disks=(DISK,)), "shared": {DISK.path: False}}, DISK.path),
    ("disk not proved", {"status": status(disks=(DISK,))}, DISK.path),
]
WARNINGS = [
    ("keys held already", {"keys": KeyFacts("key k is away", "bring it back", held=True)}, "holds the keys"),
    ("no AES at the source", {"source": host("a", aes_instructions=False)}, "host a has no AES"),
    ("no AES at the target", {"target": host("b", aes_instructions=False)}, "host b has no AES"),
    ("a trickle", {"options": MoveOptions(bandwidth=1000)}, "never converge"),
    ("a busy loop", {"channels": 2}, "keeps a core of the source busy"),
    ("max under TCG", {"status": TCG_MAX, "target": host("b", qemu_version="10.0.0")}, "may not emulate"),
]
FINE = [
    ("nothing", {}),
    ("keys at hand", {"keys": KeyFacts()}),
    ("newer QEMU", {"target": host("b", qemu_version="10.0.0")}),
    ("host CPU, the same CPU", {"status": HOST_CPU}),
    ("max under TCG, the same QEMU", {"status": TCG_MAX}),
    ("disk proved", {"status": status(disks=(DISK,)), "shared": {DISK.path: True}}),
    ("just enough room", {"target": host("b", memory_free_bytes=2 * GIB)}),
    ("as many channels as allowed", {"channels": MAX_CHANNELS, **NEW_QEMU}),
    ("the least patience", {"options": MoveOptions(give_up_ms=1000, switchover_timeout_ms=1000)}),
    ("the most patience", {"options": MoveOptions(give_up_ms=86_400_000, switchover_timeout_ms=60_000)}),
    ("an IPv6 address", {"target_address": "[fd00::2]:7421"}),
    ("no AES where nothing is sealed", {"target": host("b", aes_instructions=False, sealed_channel=False)}),
]


@pytest.mark.parametrize(("facts", "words"), [row[1:] for row in ERRORS], ids=[row[0] for row in ERRORS])
def test_an_error(facts: dict[str, object], words: str) -> None:
    [finding] = check(replace(GOOD, **facts))  # type: ignore[arg-type]
    assert finding.severity == "error"
    assert words in finding.text
    assert finding.todo


@pytest.mark.parametrize(("facts", "words"), [row[1:] for row in WARNINGS], ids=[row[0] for row in WARNINGS])
def test_a_warning(facts: dict[str, object], words: str) -> None:
    [finding] = check(replace(GOOD, **facts))  # type: ignore[arg-type]
    assert finding.severity == "warning"
    assert words in finding.text
    assert finding.todo


@pytest.mark.parametrize("facts", [row[1] for row in FINE], ids=[row[0] for row in FINE])
def test_nothing_to_say(facts: dict[str, object]) -> None:
    assert check(replace(GOOD, **facts)) == []  # type: ignore[arg-type]


def test_hosts_that_did_not_answer_are_the_policys_business() -> None:
    assert check(replace(GOOD, source=None, target=None, status=None)) == []


def test_everything_at_once_and_errors_first() -> None:
    found = check(
        replace(
            GOOD,
            source=host("a", aes_instructions=False),
            target=host("b", memory_free_bytes=1, machine_types=(), accelerators=(), qemu_version="1.0"),
            status=status(state=VmState.PAUSED, disks=(DISK,)),
            at_target=VmState.INCOMING,
            target_address="",
            channels=0,
        )
    )
    severities = [finding.severity for finding in found]
    assert severities == ["error"] * 8 + ["warning"]
