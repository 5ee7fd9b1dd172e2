"""From a configuration to a hardware record, and from a record to QEMU's command line; pure.

The command line is a function of the record, the paths and the direction alone, so the target of a migration gets the
same machine as the source although the configuration file, the installed QEMU or its defaults changed meanwhile:

- the machine type is versioned, PCI addresses are explicit, no default devices, no user configuration files;
- ``enforce``: a CPU that cannot be built as named ends the start instead of losing features in silence;
- no option ROMs for the network card, whose sizes differ between packages.

The command line holds no secret and no address of another host: encrypted disks are added over QMP later, and the
migration goes through a UNIX socket that is named over QMP, too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from sealift.domain.vm import Accelerator, Disk, HardwareRecord, VmConfig
from sealift.errors import AcceleratorUnavailable, HardwareMismatch, InvalidInput
from sealift.hypervisor.base import VmPaths

RECORD_VERSION, ENCRYPTED_RECORD_VERSION = 1, 2
"""Formats of a record: 2 as soon as a disk is encrypted, so that an agent that knows nothing of keys refuses it."""

RECORD_VERSIONS = frozenset({RECORD_VERSION, ENCRYPTED_RECORD_VERSION})
MAX_SOCKET_PATH = 107
"""Bytes in a UNIX socket's path; ``sun_path`` has 108 with its closing zero."""

_FIRST_SLOT, _LAST_SLOT = 0x2, 0x1E
"""Slots 0 and (q35) 0x1f, (pc) 1 are the chipset's."""

_SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


def bus_of(machine: str) -> str:
    """The root bus of a versioned machine type; raises HardwareMismatch for what is neither q35 nor pc."""
    if machine.startswith("pc-q35-"):
        return "pcie.0"
    if machine.startswith("pc-i440fx-"):
        return "pci.0"
    raise HardwareMismatch(f"machine type {machine} is not one we build", todo='use "q35" or "pc"')


def record(
    config: VmConfig, *, machines: Mapping[str, str], qemu_version: str, accelerator: Accelerator
) -> HardwareRecord:
    """Freeze ``config`` into the hardware it gets on this host.

    ``machines`` maps every word for a machine type to its versioned name. Raises HardwareMismatch when this QEMU has
    no such machine type, InvalidInput when there are more devices than slots, AcceleratorUnavailable when
    ``accelerator`` was not decided.
    """
    if accelerator is Accelerator.AUTO:
        raise AcceleratorUnavailable(f"VM {config.name}: the accelerator was not decided")
    machine = machines.get(config.machine)
    if machine is None:
        raise HardwareMismatch(
            f"VM {config.name}: QEMU {qemu_version} here has no machine type {config.machine}",
            todo='use "q35" or "pc", or a name from `qemu-system-x86_64 -machine help`',
        )
    bus_of(machine)
    devices = [f"disk{number}" for number in range(len(config.disks))]
    if config.network.kind != "none":
        devices.insert(0, "net0")
    if len(devices) > _LAST_SLOT - _FIRST_SLOT + 1:
        raise InvalidInput(f"VM {config.name} has {len(devices)} devices", todo="give at most 28 disks")
    cpu = config.cpu or ("host" if accelerator is Accelerator.KVM else "max")
    return HardwareRecord(
        version=ENCRYPTED_RECORD_VERSION if config.deks else RECORD_VERSION,
        config=config,
        machine=machine,
        cpu=f"{cpu},enforce",
        accelerator=accelerator,
        pci={device: _FIRST_SLOT + number for number, device in enumerate(devices)},
        qemu_version=qemu_version,
    )


def check_socket(path: Path) -> None:
    """Raise InvalidInput when ``path`` is too long for a UNIX socket."""
    if len(str(path).encode()) > MAX_SOCKET_PATH:
        raise InvalidInput(
            f"the socket path {path} has more than {MAX_SOCKET_PATH} bytes", todo="choose a shorter run directory"
        )


def _quoted(path: object) -> str:
    """A value within a comma-separated option."""
    return str(path).replace(",", ",,")


def argv(
    record: HardwareRecord, paths: VmPaths, *, incoming: bool, binary: str, tap_fd: int | None = None
) -> list[str]:
    """QEMU's command line for ``record``; the guest does not run until told to.

    With encrypted disks QEMU waits before it builds the machine (``-preconfig``), which has devices for them already
    but not what they stand on: ``disk_nodes`` are to be added over QMP, with their keys.
    ``tap_fd`` is the inherited descriptor of the tap, for a bridged network card. Raises HardwareMismatch for a record
    of a newer format, InvalidInput for paths too long.
    """
    if record.version not in RECORD_VERSIONS:
        raise HardwareMismatch(
            f"VM {record.config.name}: its hardware record has format {record.version}, not known here",
            todo="upgrade this host's agent",
        )
    for socket in (paths.qmp, paths.rescue):
        check_socket(socket)
    config = record.config
    bus = bus_of(record.machine)
    memory = config.memory_bytes // 1024
    args = [
        binary,
        *("-name", f"guest={config.name},debug-threads=on"),
        *("-uuid", str(config.uuid)),
        *("-accel", "tcg,thread=multi" if record.accelerator is Accelerator.TCG else record.accelerator.value),
        *("-machine", f"{record.machine},usb=off,dump-guest-core=off,memory-backend=ram0"),
        *("-cpu", record.cpu),
        *("-smp", f"cpus={config.vcpus},sockets=1,cores={config.vcpus},threads=1,maxcpus={config.vcpus}"),
        *("-object", f"memory-backend-ram,id=ram0,size={memory}K,dump=off"),
        *("-m", f"size={memory}K"),
        *("-nodefaults", "-no-user-config", "-display", "none"),
        *("-rtc", "base=utc"),
        *("-boot", "strict=on"),
        *("-sandbox", _SANDBOX),
    ]
    for name, path in (("qmp", paths.qmp), ("rescue", paths.rescue)):
        args += ["-chardev", f"socket,id={name},path={_quoted(path)},server=on,wait=off"]
        args += ["-mon", f"chardev={name},mode=control"]
    args += ["-chardev", f"file,id=serial0,path={_quoted(config.serial or paths.serial)},append=on"]
    args += ["-device", "isa-serial,chardev=serial0"]
    if config.network.kind != "none":
        args += _network(record, bus, tap_fd)
    for number, disk in enumerate(config.disks):
        args += _disk(record, bus, number, disk)
    if config.boot:
        args += ["-kernel", config.boot.kernel]
        args += ["-initrd", config.boot.initrd] if config.boot.initrd else []
        args += ["-append", config.boot.cmdline] if config.boot.cmdline else []
    args.append("-S")
    if config.deks:
        args.append("-preconfig")
    if incoming:
        args += ["-incoming", "defer"]
    return args


def _device(record: HardwareRecord, bus: str, name: str, driver: str, **properties: object) -> list[str]:
    device = {"driver": driver, "id": name, "bus": bus, "addr": f"0x{record.pci[name]:x}"} | properties
    return ["-device", json.dumps(device)]


def _network(record: HardwareRecord, bus: str, tap_fd: int | None) -> list[str]:
    network = record.config.network
    if network.kind == "user":
        backend = "user,id=net0-host"
    elif tap_fd is None:
        raise InvalidInput(f"VM {record.config.name}: no tap was opened on bridge {network.bridge}")
    else:
        # The agent opens the tap, since the sandbox lets QEMU start no helper.
        backend = f"tap,id=net0-host,fd={tap_fd}"
    card = _device(record, bus, "net0", "virtio-net-pci", netdev="net0-host", mac=network.mac, romfile="")
    return ["-netdev", backend, *card]


def _disk(record: HardwareRecord, bus: str, number: int, disk: Disk) -> list[str]:
    # Boot index 0 is taken by a kernel that is booted directly.
    device = _device(record, bus, f"disk{number}", "virtio-blk-pci", drive=f"disk{number}-image", bootindex=number + 1)
    if disk.dek is not None:
        return device
    nodes = disk_nodes(number, disk)
    return [*(word for node in nodes for word in ("-blockdev", json.dumps(node))), *device]


def disk_nodes(number: int, disk: Disk, *, secret_id: str = "") -> tuple[dict[str, object], dict[str, object]]:
    """The two block nodes of disk ``number``: its file, and the image in it.

    ``secret_id`` names the secret object that holds an encrypted disk's passphrase while they are added.
    """
    # An explicit graph: nothing is probed. Not even a backing file that the image names is opened
    # (``disks.check_image`` refuses such an image beforehand, as the guest would see holes).
    name = f"disk{number}"
    cache = {"direct": True, "no-flush": False}
    file: dict[str, object] = {
        "driver": "file",
        "node-name": f"{name}-file",
        "filename": disk.path,
        "cache": cache,
        "discard": "unmap",
    }
    image: dict[str, object] = {
        "driver": "luks" if disk.dek is not None and disk.format == "raw" else disk.format,
        "node-name": f"{name}-image",
        "file": f"{name}-file",
        "cache": cache,
        "discard": "unmap",
    }
    if disk.format == "qcow2":
        image["backing"] = None
    if disk.dek is not None and disk.format == "raw":
        image["key-secret"] = secret_id
    elif disk.dek is not None:
        image["encrypt"] = {"format": "luks", "key-secret": secret_id}
    return file, image
