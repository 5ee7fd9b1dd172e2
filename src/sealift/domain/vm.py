"""A VM as its owner describes it, and as it was built: configuration and hardware record."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal
from uuid import UUID

from sealift.domain.quoting import quoted
from sealift.errors import InvalidInput

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
"""Names of VMs and hosts: they become file names and host names, so only what is safe in both."""

MAX_BYTES = 1 << 50
"""Of memory and of a disk: 1 PiB, beyond what QEMU runs, and short enough to be written in any unit of a VM file."""


def check_name(kind: str, name: str, *, quote: bool = False) -> str:
    """``name`` itself; raises InvalidInput when it is not a name of 1-63 letters, digits, dots, dashes, underscores.

    The error quotes it only with ``quote``: towards who wrote it, as a secret may have been given in its place.
    """
    if not NAME.fullmatch(name):
        raise InvalidInput(
            f"the {kind} name {quoted(name)} is not valid" if quote else f"the {kind} name is not valid",
            todo="use 1-63 letters, digits, '.', '-' or '_', beginning with a letter or digit",
        )
    return name


class Accelerator(Enum):
    """What runs the virtual CPUs."""

    KVM = "kvm"
    TCG = "tcg"
    AUTO = "auto"  # KVM if a probe really ran a virtual CPU on it within 2 s, else TCG


@dataclass(frozen=True)
class Disk:
    """One disk image; ``path`` is absolute and, to migrate, on a datastore both hosts see.

    ``dek`` names the data-encryption key of an encrypted one: the image is LUKS (within qcow2, or in place of raw),
    opened with that key. None: the image is in clear. With ``size_bytes`` an image that is not there is made, empty,
    when the VM is defined; 0: it must be there.
    """

    path: str
    format: Literal["qcow2", "raw"]
    dek: UUID | None = None
    size_bytes: int = 0


@dataclass(frozen=True)
class Network:
    """The network card: none, QEMU's user-mode network, or a tap on ``bridge``."""

    kind: Literal["none", "user", "bridge"] = "none"
    bridge: str = ""
    mac: str = ""  # drawn once at define when empty


@dataclass(frozen=True)
class Boot:
    """Direct kernel boot; without it the VM boots from its first disk. Paths must exist on both hosts."""

    kernel: str
    initrd: str = ""
    cmdline: str = ""


@dataclass(frozen=True)
class VmConfig:
    """A VM's configuration, as in its TOML file. ``memory_bytes`` is a multiple of 8 KiB, as QEMU rounds it."""

    name: str
    uuid: UUID
    vcpus: int
    memory_bytes: int
    machine: str = "q35"
    cpu: str = ""  # empty: "host" under KVM, "max" under TCG
    accelerator: Accelerator = Accelerator.AUTO
    disks: tuple[Disk, ...] = ()
    network: Network = field(default_factory=Network)
    boot: Boot | None = None
    serial: str = ""  # file that takes the serial console's output; empty: one in the VM's state directory
    role: Literal["", "controller"] = ""  # "controller": it runs Sealift's controller, and is never encrypted

    @property
    def deks(self) -> tuple[UUID, ...]:
        """The data-encryption keys that its disks need, in the order of the disks; empty for a VM in clear."""
        return tuple(disk.dek for disk in self.disks if disk.dek is not None)

    def __post_init__(self) -> None:
        check_name("VM", self.name)
        if not 1 <= self.vcpus <= 512:
            # Not quoted: Python refuses to write a number of more than 4300 digits.
            raise InvalidInput(f"VM {self.name}: the number of vcpus is out of range", todo="give 1 to 512")
        if not 16 << 20 <= self.memory_bytes <= MAX_BYTES or self.memory_bytes % 8192:
            raise InvalidInput(
                f"VM {self.name}: memory is {self.memory_bytes} bytes",
                todo="give 16 MiB or more, a multiple of 8 KiB, at most 1 PiB",
            )
        if any(not 0 <= disk.size_bytes <= MAX_BYTES or disk.size_bytes % 512 for disk in self.disks):
            raise InvalidInput(
                f"VM {self.name}: the size of a disk is not valid", todo="give a multiple of 512 bytes, at most 1 PiB"
            )
        paths = [disk.path for disk in self.disks]
        if self.boot:
            paths += [path for path in (self.boot.kernel, self.boot.initrd) if path]
            if not _on_one_line(self.boot.cmdline):
                raise InvalidInput(f"VM {self.name}: the kernel's command line has a control character")
        if self.serial:
            paths.append(self.serial)
        for path in paths:
            # A comma separates options on QEMU's command line.
            if not path.startswith("/") or "," in path or not _on_one_line(path):
                raise InvalidInput(
                    f"VM {self.name}: a path is not absolute or has a comma or control character",
                    todo="give absolute paths without commas",
                )
        for word, value in (("machine", self.machine), ("cpu", self.cpu or "max")):
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*(,[+-]?[A-Za-z0-9._-]+(=[A-Za-z0-9._-]+)?)*", value):
                raise InvalidInput(f"VM {self.name}: the {word} is not valid", todo=f"see `qemu -{word} help`")
        if self.network.kind == "bridge" and not re.fullmatch(r"[A-Za-z0-9._-]{1,15}", self.network.bridge):
            raise InvalidInput(f"VM {self.name}: the network names no valid bridge", todo='set bridge = "br0"')
        if self.network.mac and not re.fullmatch(r"([0-9a-f]{2}:){5}[0-9a-f]{2}", self.network.mac):
            raise InvalidInput(f"VM {self.name}: the MAC address is not valid", todo="write it as 52:54:00:12:34:56")
        if self.network.bridge and self.network.kind != "bridge":
            raise InvalidInput(
                f"VM {self.name}: a bridge is named for another kind of network", todo='set kind = "bridge"'
            )
        if self.network.mac and self.network.kind == "none":
            raise InvalidInput(
                f"VM {self.name}: network.mac is set without a network", todo="choose a kind, or remove it"
            )
        if re.match(r"[0-9a-f][13579bdf]", self.network.mac):
            raise InvalidInput(f"VM {self.name}: network.mac is a group address", todo="begin it with 52:54:00")


def _on_one_line(text: str) -> bool:
    """Whether ``text`` can stand in a file, a log and an argument: no control character, nothing beyond UTF-8."""
    return not any(ord(char) < 32 or ord(char) == 127 or 0xD800 <= ord(char) < 0xE000 for char in text)


@dataclass(frozen=True)
class HardwareRecord:
    """The hardware a VM was really started with; the target of a migration is built from this, not from the file.

    ``version`` is this record's format. ``machine`` is versioned (aliases resolved), ``cpu`` is what was handed to
    QEMU, ``pci`` maps a device id to its slot on bus ``pcie.0`` or ``pci.0``. ``config`` is the configuration at the
    time of the start.
    """

    version: int
    config: VmConfig
    machine: str
    cpu: str
    accelerator: Accelerator
    pci: dict[str, int]
    qemu_version: str


class VmState(Enum):
    """What a host says of one of its VMs."""

    STOPPED = "stopped"
    RUNNING = "running"
    PAUSED = "paused"
    INCOMING = "incoming"  # being received; it has never run here
    MIGRATED = "migrated"  # let go: it runs elsewhere, or its fate is being settled
    CRASHED = "crashed"  # its QEMU ended without being told to


@dataclass(frozen=True)
class VmStatus:
    """One VM on one host."""

    uuid: UUID
    name: str
    state: VmState
    config: VmConfig
    hardware: HardwareRecord | None  # None until first started
    accelerator: Accelerator | None = None
    message: str = ""  # why it is crashed or paused, when known
    file: str = ""  # of an encrypted VM: its configuration file as it lies on the host now, byte for byte (latin-1)
    held: tuple[UUID, ...] = ()  # data-encryption keys of this VM that the host has in memory
