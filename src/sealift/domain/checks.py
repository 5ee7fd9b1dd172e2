"""What stands against a move, found before a byte has moved: all of it at once (promise P7). Pure.

Policy is not here but in ``policy.decide``; whether the kernel files of a direct boot exist at the target is looked
at by the target's agent when it gets its order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from sealift.domain.host import HostCapabilities
from sealift.domain.move import MoveOptions
from sealift.domain.patience import GIVE_UP_BOUNDS_MS, SWITCHOVER_TIMEOUT_BOUNDS_MS
from sealift.domain.vm import Accelerator, HardwareRecord, VmState, VmStatus

MAX_CHANNELS = 64
"""More streams than this only cost: one relay side saturates a core long before."""

HOST_CPUS = ("host", "max")
"""CPU models that stand for "whatever this machine has" under KVM."""

_MULTIFD_WAITS = (8, 1)
"""The first version whose migration thread waits for a free channel (commit d2026ee117); before, it looks in a loop."""


@dataclass(frozen=True)
class Finding:
    """One thing found; an error refuses the move, a warning does not."""

    severity: Literal["error", "warning"]
    text: str
    todo: str


@dataclass(frozen=True)
class KeyFacts:
    """What was found of an encrypted VM's keys, just now.

    ``trouble`` is why the keys could not be unwrapped, or may not be given to another host, naming key provider and key
    id, and ``todo`` what to do about it; empty when they were unwrapped under an active key. ``away``: they could not
    be unwrapped. ``held``: the target holds the keys of all its disks already. ``file`` and ``file_todo``: what is
    wrong with the configuration file at the source; empty when it is the last one written.
    """

    trouble: str = ""
    todo: str = ""
    away: bool = False
    held: bool = False
    file: str = ""
    file_todo: str = ""


@dataclass(frozen=True)
class Facts:
    """What was seen for one planned move. None means that the host did not answer, which the policy refuses.

    ``shared`` tells for the path of each disk whether the target read back what the source had just written there; it
    is tried only for a VM that runs, and that the target does not have.
    ``keys`` is None for a VM in clear.
    """

    vm_name: str
    source: HostCapabilities | None
    target: HostCapabilities | None
    status: VmStatus | None  # at the source
    at_target: VmState | None  # the target's own state for this VM's uuid; None: it does not know it
    target_address: str
    options: MoveOptions
    channels: int
    same_host: bool = False
    shared: Mapping[str, bool] = field(default_factory=dict)
    keys: KeyFacts | None = None


def check(facts: Facts) -> list[Finding]:
    """Every finding about a move, errors first."""
    found = [*_vm(facts), *_options(facts), *_target(facts), *_disks(facts), *_keys(facts), *_speed(facts)]
    return sorted(found, key=lambda finding: finding.severity != "error")


def _error(text: str, todo: str) -> Finding:
    return Finding("error", text, todo)


def _warning(text: str, todo: str) -> Finding:
    return Finding("warning", text, todo)


def _vm(facts: Facts) -> list[Finding]:
    found = []
    if facts.same_host:
        found.append(_error(f"VM {facts.vm_name} is at that host already", "name another host"))
    elif facts.at_target is not None:
        found.append(
            _error(
                f"the target already has VM {facts.vm_name}, {facts.at_target.value}",
                "look what it is: two copies must never run",
            )
        )
    if facts.status is None:
        if facts.source is not None:
            found.append(_error(f"the source does not know VM {facts.vm_name}", "define it there again"))
    elif facts.status.state is not VmState.RUNNING:
        found.append(
            _error(
                f"VM {facts.vm_name} is {facts.status.state.value}; only a running VM is moved live",
                f"`sealift vm start {facts.vm_name}` first",
            )
        )
    return found


def _options(facts: Facts) -> list[Finding]:
    found = []
    if not 1 <= facts.channels <= MAX_CHANNELS:
        found.append(_error(f"{facts.channels} channels were asked for", f"ask for 1 to {MAX_CHANNELS}"))
    if facts.options.bandwidth < 0 or facts.options.max_downtime_ms < 1:
        found.append(_error("bandwidth or downtime limit is not sane", "give a bandwidth >= 0 and a downtime >= 1 ms"))
    elif 0 < facts.options.bandwidth < 1 << 20:
        found.append(_warning("the bandwidth limit is below 1 MiB/s; the move may never converge", "raise --bandwidth"))
    return found + _patience(facts.options)


def _patience(options: MoveOptions) -> list[Finding]:
    return [
        _error(
            f"the {name} of {value / 1000:g} s is not between {least // 1000} s and {most // 1000} s",
            f"give another {option}, or leave it out",
        )
        for name, option, value, (least, most) in (
            ("give-up time", "--give-up", options.give_up_ms, GIVE_UP_BOUNDS_MS),
            (
                "switchover timeout",
                "--switchover-timeout",
                options.switchover_timeout_ms,
                SWITCHOVER_TIMEOUT_BOUNDS_MS,
            ),
        )
        if not least <= value <= most
    ]


def _target(facts: Facts) -> list[Finding]:
    target, hardware = facts.target, facts.status.hardware if facts.status else None
    found: list[Finding] = []
    if target is None:
        return found
    if not _is_address(facts.target_address):
        found.append(
            _error(f"host {target.name} has no migration address", "set it in the agent's configuration and join again")
        )
    if hardware is None:
        return found
    room, needed = target.memory_free_bytes, hardware.config.memory_bytes
    if needed > room:
        found.append(
            _error(
                f"host {target.name} has {room >> 20} MiB of memory free, the VM has {needed >> 20} MiB",
                "free memory there, or choose another host",
            )
        )
    if hardware.machine not in target.machine_types:
        found.append(
            _error(
                f"QEMU on {target.name} does not have machine type {hardware.machine}",
                "install a QEMU there that has it",
            )
        )
    if hardware.accelerator not in target.accelerators:
        found.append(
            _error(
                f"host {target.name} cannot run {hardware.accelerator.value}, which the VM runs on",
                "choose a host with the same accelerator",
            )
        )
    if _version(target.qemu_version) < _version(hardware.qemu_version):
        found.append(
            _error(
                f"QEMU on {target.name} is {target.qemu_version}, older than the VM's {hardware.qemu_version}",
                "upgrade QEMU there; moving to an older one loses state it does not know",
            )
        )
    return found + _cpu(facts, hardware, target)


def _cpu(facts: Facts, hardware: HardwareRecord, target: HostCapabilities) -> list[Finding]:
    model = hardware.cpu.split(",")[0]
    if model not in HOST_CPUS or facts.source is None:
        return []
    if hardware.accelerator is Accelerator.TCG:
        # Emulated: what "max" has depends on QEMU, not on the machine.
        if _version(target.qemu_version) == _version(hardware.qemu_version):
            return []
        return [
            _warning(
                f"the VM's CPU model is '{model}', and the two QEMUs may not emulate the same",
                'give the VM a named CPU model, as in `cpu = "qemu64"`',
            )
        ]
    if facts.source.cpu_model == target.cpu_model:
        return []
    return [
        _error(
            f"the VM's CPU model is '{model}', and {facts.source.name} ({facts.source.cpu_model}) "
            f"and {target.name} ({target.cpu_model}) have different CPUs",
            "choose a host with the same CPU, or give the VM a named CPU model and start it again",
        )
    ]


def _disks(facts: Facts) -> list[Finding]:
    if facts.status is None or facts.status.hardware is None or facts.same_host:
        return []
    if facts.status.state is not VmState.RUNNING or facts.at_target is not None:
        return []  # not tried, since it is refused for that
    return [
        _error(
            f"the target did not see what the source had just written beside disk {disk.path}",
            "put the disk on a datastore that both hosts mount, and mount it at the same path",
        )
        for disk in facts.status.hardware.config.disks
        if not facts.shared.get(disk.path, False)
    ]


def _keys(facts: Facts) -> list[Finding]:
    found: list[Finding] = []
    keys = facts.keys
    if keys is None:
        return found
    if keys.file:
        found.append(_error(keys.file, keys.file_todo))
    if keys.trouble and keys.held:
        until = "; until then the VM cannot be started again once its host's agent was restarted" if keys.away else ""
        found.append(
            _warning(
                f"{keys.trouble}; the target holds the keys of its disks already, so VM {facts.vm_name} can move there",
                keys.todo + until,
            )
        )
    elif keys.trouble:
        found.append(
            _error(
                f"{keys.trouble}; the target does not hold the keys of its disks either",
                f"{keys.todo}; or choose a host where VM {facts.vm_name} has been",
            )
        )
    return found


def _speed(facts: Facts) -> list[Finding]:
    found = []
    hardware = facts.status.hardware if facts.status else None
    if hardware and 1 < facts.channels <= MAX_CHANNELS and _version(hardware.qemu_version) < _MULTIFD_WAITS:
        found.append(
            _warning(
                f"QEMU {hardware.qemu_version} keeps a core of the source busy while several channels are open",
                "use one channel unless the host has a core to spare; QEMU 8.1 waits instead",
            )
        )
    return found + [
        _warning(
            f"host {host.name} has no AES instructions; sealing will be slow "
            f"({host.aes_gcm_gb_per_s:.2f} GB/s measured)",
            "expect a longer move, or choose another host",
        )
        for host in (facts.source, facts.target)
        if host is not None and host.sealed_channel and not host.aes_instructions
    ]


def _is_address(address: str) -> bool:
    host, _, port = address.rpartition(":")
    return bool(host) and port.isdigit() and 0 < int(port) < 65536


def _version(text: str) -> tuple[int, ...]:
    """The numbers a QEMU version begins with, so that 7.2.22 (Debian ...) < 10.0.0."""
    found = re.match(r"\d+(\.\d+)*", text.strip())
    return tuple(int(part) for part in found.group().split(".")) if found else ()
