"""Hardware records and the command line made of them."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from sealift.domain.vm import Accelerator, Boot, Disk, HardwareRecord, Network, VmConfig
from sealift.errors import AcceleratorUnavailable, HardwareMismatch, InvalidInput
from sealift.hypervisor.base import VmPaths
from sealift.hypervisor.hardware import MAX_SOCKET_PATH, argv, disk_nodes, record

UUID_1 = UUID("11111111-2222-4333-8444-555555555555")
MACHINES = {"q35": "pc-q35-7.2", "pc-q35-7.2": "pc-q35-7.2", "pc": "pc-i440fx-7.2", "pc-i440fx-7.2": "pc-i440fx-7.2"}
PATHS = VmPaths(Path("/run/vm"), Path("/log/vm"), Path("/state/console"))

paths_of_files = st.from_regex(r"/[a-z0-9 ._-]{1,20}", fullmatch=True)
configs = st.builds(
    VmConfig,
    name=st.from_regex(r"[a-z][a-z0-9.-]{0,10}", fullmatch=True),
    uuid=st.uuids(),
    vcpus=st.integers(1, 16),
    memory_bytes=st.integers(2048, 1 << 20).map(lambda units: units * 8192),
    machine=st.sampled_from(sorted(MACHINES)),
    cpu=st.sampled_from(["", "max", "qemu64", "Nehalem,-avx"]),
    disks=st.lists(
        st.builds(Disk, paths_of_files, st.sampled_from(["qcow2", "raw"]), dek=st.none() | st.uuids()), max_size=28
    ).map(tuple),
    network=st.sampled_from(
        [Network(), Network("user", mac="52:54:00:00:00:01"), Network("bridge", "br0", "52:54:00:00:00:02")]
    ),
    boot=st.one_of(
        st.none(),
        st.builds(
            Boot, paths_of_files, paths_of_files, st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=10)
        ),
    ),
    serial=st.one_of(st.just(""), paths_of_files),
)


def frozen(config: VmConfig, accelerator: Accelerator = Accelerator.TCG) -> HardwareRecord:
    return record(config, machines=MACHINES, qemu_version="7.2.22", accelerator=accelerator)


def line(hardware: HardwareRecord, *, incoming: bool = False, paths: VmPaths = PATHS) -> list[str]:
    return argv(hardware, paths, incoming=incoming, binary="qemu", tap_fd=7)


def after(args: list[str], option: str) -> list[str]:
    return [value for before, value in pairwise(args) if before == option]


def devices(args: list[str]) -> list[dict[str, object]]:
    return [json.loads(value) for value in after(args, "-device") if value.startswith("{")]


PLAIN = VmConfig("web1", UUID_1, 2, 524280 << 10)


def test_the_record_holds_what_was_decided() -> None:
    tcg, kvm = frozen(PLAIN), frozen(PLAIN, Accelerator.KVM)
    assert (tcg.machine, tcg.cpu, tcg.accelerator, tcg.qemu_version) == (
        "pc-q35-7.2",
        "max,enforce",
        Accelerator.TCG,
        "7.2.22",
    )
    assert kvm.cpu == "host,enforce"
    assert frozen(replace(PLAIN, cpu="qemu64,-sse3")).cpu == "qemu64,-sse3,enforce"


def test_what_cannot_be_built_is_refused() -> None:
    with pytest.raises(HardwareMismatch, match="microvm"):
        frozen(replace(PLAIN, machine="microvm"))
    with pytest.raises(AcceleratorUnavailable):
        frozen(PLAIN, Accelerator.AUTO)
    with pytest.raises(InvalidInput, match="28"):
        frozen(replace(PLAIN, disks=(Disk("/d", "raw"),) * 30))
    with pytest.raises(HardwareMismatch, match="format 3"):
        line(replace(frozen(PLAIN), version=3))
    bridged = replace(PLAIN, network=Network("bridge", "br0", "52:54:00:00:00:02"))
    with pytest.raises(InvalidInput, match="br0"):
        argv(frozen(bridged), PATHS, incoming=False, binary="qemu")


def test_the_whole_command_line_of_a_small_vm() -> None:
    assert line(frozen(PLAIN)) == [
        "qemu",
        *("-name", "guest=web1,debug-threads=on"),
        *("-uuid", "11111111-2222-4333-8444-555555555555"),
        *("-accel", "tcg,thread=multi"),
        *("-machine", "pc-q35-7.2,usb=off,dump-guest-core=off,memory-backend=ram0"),
        *("-cpu", "max,enforce"),
        *("-smp", "cpus=2,sockets=1,cores=2,threads=1,maxcpus=2"),
        *("-object", "memory-backend-ram,id=ram0,size=524280K,dump=off"),
        *("-m", "size=524280K"),
        *("-nodefaults", "-no-user-config", "-display", "none"),
        *("-rtc", "base=utc"),
        *("-boot", "strict=on"),
        *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
        *("-chardev", "socket,id=qmp,path=/run/vm/qmp.sock,server=on,wait=off", "-mon", "chardev=qmp,mode=control"),
        *("-chardev", "socket,id=rescue,path=/run/vm/rescue.sock,server=on,wait=off"),
        *("-mon", "chardev=rescue,mode=control"),
        *("-chardev", "file,id=serial0,path=/state/console,append=on", "-device", "isa-serial,chardev=serial0"),
        "-S",
    ]


@given(configs)
def test_the_target_gets_the_sources_machine(config: VmConfig) -> None:
    """Only the direction differs, so nothing a guest can see does."""
    hardware = frozen(config)
    source, target = line(hardware), line(hardware, incoming=True)
    assert target == [*source, "-incoming", "defer"]
    elsewhere = VmPaths(Path("/other/vm"), Path("/other/log"), Path("/other/console"))
    moved = line(hardware, paths=elsewhere)
    differing = [pair for pair in zip(source, moved, strict=True) if pair[0] != pair[1]]
    assert all("path=" in before for before, _ in differing), "only chardevs name the host's paths"


@given(configs)
def test_every_device_has_an_address_of_its_own(config: VmConfig) -> None:
    hardware = frozen(config)
    args = line(hardware)
    bus = "pcie.0" if hardware.machine.startswith("pc-q35") else "pci.0"
    built = devices(args)
    assert len(built) == len(config.disks) + (config.network.kind != "none")
    assert {device["bus"] for device in built} <= {bus}
    slots = [int(str(device["addr"]), 16) for device in built]
    assert len(set(slots)) == len(slots)
    assert all(2 <= slot <= 0x1E for slot in slots)
    assert {str(device["id"]): slot for device, slot in zip(built, slots, strict=True)} == hardware.pci


@given(configs)
def test_disks_are_opened_directly_and_unprobed(config: VmConfig) -> None:
    graph = [json.loads(value) for value in after(line(frozen(config)), "-blockdev")]
    clear = [(number, disk) for number, disk in enumerate(config.disks) if disk.dek is None]
    assert len(graph) == 2 * len(clear)
    for (number, disk), file, image in zip(clear, graph[::2], graph[1::2], strict=True):
        assert (file, image) == disk_nodes(number, disk)
        assert file["filename"] == disk.path
        assert image["driver"] == disk.format
        assert file["cache"]["direct"] is image["cache"]["direct"] is True
        assert disk.format == "raw" or image["backing"] is None


@given(configs)
def test_only_a_vm_with_encrypted_disks_waits_for_its_keys(config: VmConfig) -> None:
    hardware = frozen(config)
    args = line(hardware)
    assert hardware.version == (2 if config.deks else 1)
    assert ("-preconfig" in args) is bool(config.deks)
    assert not any(disk.dek is not None and str(disk.dek) in word for disk in config.disks for word in args)
    assert not any("secret" in word for word in args)
    for number, disk in enumerate(config.disks):
        file, image = disk_nodes(number, disk, secret_id="s")
        assert f"disk{number}-image" in {device.get("drive") for device in devices(args)}
        assert file["filename"] == disk.path
        if disk.dek is not None and disk.format == "qcow2":
            assert (image["driver"], image["encrypt"]) == ("qcow2", {"format": "luks", "key-secret": "s"})
            assert image["backing"] is None
        elif disk.dek is not None:
            assert (image["driver"], image["key-secret"]) == ("luks", "s")
        else:
            assert "encrypt" not in image
            assert "key-secret" not in image


@given(configs)
def test_memory_is_exactly_what_was_asked_for(config: VmConfig) -> None:
    args = line(frozen(config))
    (memory,) = after(args, "-m")
    kib = int(memory.removeprefix("size=").removesuffix("K"))
    assert kib * 1024 == config.memory_bytes
    assert any(f"size={kib}K" in value for value in after(args, "-object"))


@given(configs)
def test_the_record_survives_the_wire(config: VmConfig) -> None:
    adapter = TypeAdapter(HardwareRecord)
    hardware = frozen(config)
    assert line(adapter.validate_json(adapter.dump_json(hardware))) == line(hardware)


def test_a_comma_in_our_own_paths_is_not_an_option() -> None:
    paths = replace(PATHS, directory=Path("/run/a,server=off"), serial=Path("/state/b,append=off"))
    args = line(frozen(PLAIN), paths=paths)
    assert "socket,id=qmp,path=/run/a,,server=off/qmp.sock,server=on,wait=off" in args
    assert "file,id=serial0,path=/state/b,,append=off,append=on" in args


def test_a_socket_path_has_its_limit() -> None:
    fits = Path("/" + "x" * (MAX_SOCKET_PATH - len("//rescue.sock")))
    line(frozen(PLAIN), paths=replace(PATHS, directory=fits))
    with pytest.raises(InvalidInput, match="107"):
        line(frozen(PLAIN), paths=replace(PATHS, directory=Path(f"{fits}x")))
