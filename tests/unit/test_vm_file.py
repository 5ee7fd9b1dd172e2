"""The VM file: what is read, what is refused, and that the example of the documentation is true."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealift.domain.vm import Accelerator, Boot, Disk, Network, VmConfig
from sealift.domain.vm_file import parse_size, parse_vm_toml
from sealift.errors import InvalidInput

DRAWN = UUID("11111111-2222-4333-8444-555555555555")
MAC = "52:54:00:aa:bb:cc"
LEAST = 'name = "web1"\nvcpus = 2\nmemory = "512MiB"\n'


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
        [[disks]]
        path = "/srv/a.qcow2"
        format = "qcow2"
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
        disks=(Disk("/srv/a.qcow2", "qcow2"), Disk("/srv/b", "raw")),
        network=Network("bridge", "br0", "52:54:00:12:34:56"),
        boot=Boot("/boot/vmlinuz", "/boot/initrd", "console=ttyS0 quiet, with a comma"),
        serial="/var/log/web1",
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
    st.integers(1, 1 << 30), st.sampled_from(["K", "M", "G"]), st.sampled_from(["", "iB"]), st.sampled_from(["", " "])
)
def test_sizes_are_powers_of_1024(number: int, unit: str, end: str, space: str) -> None:
    assert parse_size(f"{number}{space}{unit}{end}") == number * 1024 ** ("KMG".index(unit) + 1)


@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    for complete in (text, LEAST + text):
        with contextlib.suppress(InvalidInput):
            assert isinstance(parse(complete), VmConfig)


@given(st.dictionaries(st.text(min_size=1), st.one_of(st.text(), st.integers(), st.booleans()), min_size=1))
def test_a_key_that_is_not_known_is_never_ignored(extra: dict[str, str | int | bool]) -> None:
    known = {"name", "uuid", "vcpus", "memory", "machine", "cpu", "accelerator", "serial", "disks", "network", "boot"}
    unknown = [key for key in extra if key not in known]
    lines = "".join(f'"{"".join(f"{chr(92)}U{ord(char):08x}" for char in key)}" = 1\n' for key in unknown)
    if unknown:
        with pytest.raises(InvalidInput):
            parse(LEAST + lines)
