"""The VM file: what is read, what is refused, and that the example of the documentation is true."""

from __future__ import annotations

import contextlib
import re
import tomllib
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

from sealift.domain.vm import NAME, Accelerator, Boot, Disk, Network, VmConfig
from sealift.domain.vm_file import dump_vm_toml, parse_size, parse_vm_table, parse_vm_toml
from sealift.errors import InvalidInput

DRAWN = UUID("11111111-2222-4333-8444-555555555555")
MAC = "52:54:00:aa:bb:cc"
LEAST = 'name = "web1"\nvcpus = 2\nmemory = "512MiB"\n'
DISK = '[[disks]]\npath = "/d"\nformat = "raw"\n'


def parse(text: str) -> VmConfig:
    return parse_vm_toml(text, new_uuid=DRAWN, mac=MAC)


def test_the_least_file_has_the_documented_defaults() -> None:
    assert parse(LEAST) == VmConfig("web1", DRAWN, 2, 512 << 20)


def test_every_key_is_read() -> None:
    text = """
        name = "web1"
        uuid = "99999999-2222-4333-8444-555555555555"
        vcpus = 4
        memory = "524280KiB"
        machine = "pc"
        cpu = "qemu64,-sse4.1"
        accelerator = "tcg"
        serial = "/var/log/web1"
        role = "controller"
        [[disks]]
        path = "/srv/a.qcow2"
        format = "qcow2"
        size = "10GiB"
        [[disks]]
        path = "/srv/b"
        format = "raw"
        [network]
        kind = "bridge"
        bridge = "br0"
        mac = "52:54:00:12:34:56"
        [boot]
        kernel = "/boot/vmlinuz"
        initrd = "/boot/initrd"
        cmdline = "console=ttyS0 quiet, with a comma"
    """
    assert parse(text) == VmConfig(
        name="web1",
        uuid=UUID("99999999-2222-4333-8444-555555555555"),
        vcpus=4,
        memory_bytes=524280 << 10,
        machine="pc",
        cpu="qemu64,-sse4.1",
        accelerator=Accelerator.TCG,
        disks=(Disk("/srv/a.qcow2", "qcow2", size_bytes=10 << 30), Disk("/srv/b", "raw")),
        network=Network("bridge", "br0", "52:54:00:12:34:56"),
        boot=Boot("/boot/vmlinuz", "/boot/initrd", "console=ttyS0 quiet, with a comma"),
        serial="/var/log/web1",
        role="controller",
    )


def test_a_card_without_address_gets_the_drawn_one() -> None:
    assert parse(LEAST + '[network]\nkind = "user"').network == Network("user", "", MAC)
    assert parse(LEAST + '[network]\nkind = "none"').network == Network()


def test_the_example_of_the_documentation_is_read() -> None:
    document = (Path(__file__).parents[2] / "docs" / "vm-file.md").read_text()
    (example,) = re.findall(r"```toml\n(.*?)```", document, re.DOTALL)
    assert parse(example).memory_bytes == 2 << 30


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (LEAST + "colour = 1", "colour"),
        (LEAST + '[boot]\nkernel = "/k"\ninitrds = "/i"', "boot.initrds"),
        (LEAST + '[[disks]]\npath = "/d"\nformat = "raw"\ncache = "none"', r"disks\[0\].cache"),
        (LEAST + '[[disks]]\npath = "/d"', r"disks\[0\].format"),
        (LEAST + '[[disks]]\npath = "/d"\nformat = "vmdk"', r"disks\[0\].format"),
        (LEAST + DISK + 'size = "0G"', r"disks\[0\].size"),
        (LEAST + DISK + "size = 512", r"disks\[0\].size"),
        (LEAST + DISK + 'size = "513B"', "size of a disk"),
        (LEAST + DISK + 'size = "2000T"', "size of a disk"),
        (LEAST + DISK + f'dek = "{DRAWN}"', r"disks\[0\].dek.*Sealift chooses"),
        (LEAST + 'role = "host"', "role"),
        (LEAST + "[tpm]\n", "tpm.*UEFI variables and vTPM state are not supported until they can be encrypted too"),
        (LEAST + 'firmware = "/usr/share/OVMF/OVMF_CODE.fd"', "firmware.*until they can be encrypted"),
        (LEAST + "nvram = true", "nvram.*until they can be encrypted"),
        (LEAST + '[disks]\npath = "/d"', "disks"),
        (LEAST + "network = 1", "network"),
        (LEAST + '[network]\nbridge = "br0"', "network.kind"),
        (LEAST + '[network]\nkind = "user"\nbridge = "br0"', "bridge"),
        (LEAST + '[network]\nkind = "bridge"', "bridge"),
        (LEAST + '[network]\nkind = "user"\nmac = "01:00:5e:00:00:01"', "mac"),
        (LEAST + '[network]\nkind = "user"\nmac = "nonsense"', "MAC"),
        (LEAST + '[network]\nkind = "none"\nmac = "52:54:00:12:34:56"', "mac"),
        (LEAST + 'accelerator = "xen"', "accelerator"),
        (LEAST + 'uuid = "12"', "uuid"),
        (LEAST + 'serial = "relative"', "path"),
        (LEAST + '[boot]\nkernel = "/k"\ncmdline = "a\\u0000b"', "boot.cmdline"),
        ('vcpus = 1\nmemory = "512MiB"', "name"),
        ('name = "a"\nmemory = "512MiB"', "vcpus"),
        ('name = "a"\nvcpus = true\nmemory = "512MiB"', "vcpus"),
        ('name = "a"\nvcpus = 0\nmemory = "512MiB"', "vcpus"),
        ('name = "a"\nvcpus = 1\nmemory = 512', "memory"),
        ('name = "a"\nvcpus = 1\nmemory = "512MB"', "memory"),
        ('name = "a"\nvcpus = 1\nmemory = "16388KiB"', "memory"),
        ('name = "a"\nvcpus = 1\nmemory = "1025T"', "memory"),
        ('name = "../a"\nvcpus = 1\nmemory = "512MiB"', "name"),
        ("name = ", "TOML"),
        ("a = " + "[" * 2000, "nests too deep"),
        ("vcpus = " + "9" * 5000, "too long a number"),
        (LEAST.replace("2", "0x" + "f" * 4000, 1), "vcpus"),
    ],
)
def test_what_is_wrong_is_named(text: str, named: str) -> None:
    with pytest.raises(InvalidInput, match=named):
        parse(text)


def test_a_quoted_key_cannot_break_a_line() -> None:
    with pytest.raises(InvalidInput) as refused:
        parse(LEAST + '"evil\\nkey" = 1')
    assert "\n" not in str(refused.value)


@given(
    st.integers(1, 1 << 30),
    st.sampled_from(["KiB", "K", "MiB", "M", "GiB", "G", "TiB", "T", "B"]),
    st.sampled_from(["", " "]),
)
def test_sizes_are_powers_of_1024(number: int, unit: str, space: str) -> None:
    assert parse_size(f"{number}{space}{unit}") == number * 1024 ** "BKMGT".index(unit[0])


TEXTS = st.text(st.characters(exclude_categories=["Cc", "Cs"]) | st.sampled_from("\"\\'#=[]\u2028\x85"), max_size=12)
PATHS = TEXTS.map(lambda text: "/" + text)
CONFIGS = st.builds(
    VmConfig,
    name=st.from_regex(NAME, fullmatch=True),
    uuid=st.uuids(),
    vcpus=st.integers(1, 512),
    memory_bytes=st.integers(2048, 1 << 37).map(lambda units: units * 8192),
    machine=st.sampled_from(["q35", "pc", "pc-q35-7.2"]),
    cpu=st.sampled_from(["", "max", "qemu64,-sse4.1"]),
    accelerator=st.sampled_from(Accelerator),
    disks=st.lists(
        st.builds(
            Disk,
            path=PATHS,
            format=st.sampled_from(["qcow2", "raw"]),
            dek=st.none() | st.uuids(),
            size_bytes=st.integers(0, 1 << 41).map(lambda sectors: sectors * 512) | st.sampled_from([0, 10 << 30]),
        ),
        max_size=3,
    ).map(tuple),
    network=st.builds(Network, st.sampled_from(["none", "user"]), mac=st.sampled_from(["", MAC]))
    | st.builds(Network, st.just("bridge"), st.from_regex(r"[A-Za-z0-9._-]{1,15}", fullmatch=True), st.just(MAC)),
    boot=st.none() | st.builds(Boot, PATHS, PATHS | st.just(""), TEXTS | st.text()),
    serial=st.just("") | PATHS,
    role=st.sampled_from(["", "controller"]),
)
"""Configurations, and some that ``VmConfig`` refuses to be: those raise as they are drawn."""


@given(st.data())
def test_what_sealift_writes_it_reads_back(data: st.DataObject) -> None:
    try:
        config = data.draw(CONFIGS)
    except InvalidInput:
        reject()
    text = dump_vm_toml(config)
    assert all(line.isprintable() for line in text.split("\n"))
    assert text.endswith("\n")
    assert parse_vm_table(tomllib.loads(text)["vm"]) == config
    nested = dump_vm_toml(config, under="a.b")
    assert parse_vm_table(tomllib.loads(nested)["a"]["b"]) == config


def test_what_sealift_writes_says_sizes_as_people_do() -> None:
    disks = tuple(Disk("/d", "raw", DRAWN, size) for size in (10 << 30, 3 << 9, 0))
    text = dump_vm_toml(VmConfig("web1", DRAWN, 2, 524280 << 10, disks=disks))
    assert re.findall(r'(?:memory|size) = "(.*)"', text) == ["524280KiB", "10GiB", "1536B"]


def test_what_sealift_writes_is_read_as_strictly() -> None:
    table = tomllib.loads(dump_vm_toml(VmConfig("web1", DRAWN, 2, 512 << 20, disks=(Disk("/d", "raw", DRAWN),))))["vm"]
    with pytest.raises(InvalidInput, match=r"vm\.colour"):
        parse_vm_table({**table, "colour": 1})
    with pytest.raises(InvalidInput, match="uuid"):
        parse_vm_table({key: value for key, value in table.items() if key != "uuid"})
    with pytest.raises(InvalidInput, match=r"vm\.disks\[0\]\.dek"):
        parse_vm_table({**table, "disks": [{**table["disks"][0], "dek": "12"}]})


@pytest.mark.parametrize(
    "change",
    [
        {"memory_bytes": (1 << 50) + 8192},
        {"disks": (Disk("/d", "raw", size_bytes=-512),)},
        {"disks": (Disk("/d", "raw", size_bytes=100),)},
        {"boot": Boot("/k", cmdline="a\nb")},
        {"boot": Boot("/k\x7f")},
        {"serial": "/\ud800"},
        {"network": Network("user", "br0")},
        {"network": Network(mac=MAC)},
    ],
)
def test_a_configuration_that_no_file_can_say_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(InvalidInput):
        replace(VmConfig("web1", DRAWN, 2, 512 << 20), **change)  # type: ignore[arg-type]


@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    for complete in (text, LEAST + text):
        with contextlib.suppress(InvalidInput):
            assert isinstance(parse(complete), VmConfig)


@given(st.dictionaries(st.text(min_size=1), st.one_of(st.text(), st.integers(), st.booleans()), min_size=1))
def test_a_key_that_is_not_known_is_never_ignored(extra: dict[str, str | int | bool]) -> None:
    known = {
        "name",
        "uuid",
        "vcpus",
        "memory",
        "machine",
        "cpu",
        "accelerator",
        "serial",
        "disks",
        "network",
        "boot",
        "role",
    }
    unknown = [key for key in extra if key not in known]
    lines = "".join(f'"{"".join(f"{chr(92)}U{ord(char):08x}" for char in key)}" = 1\n' for key in unknown)
    if unknown:
        with pytest.raises(InvalidInput):
            parse(LEAST + lines)
