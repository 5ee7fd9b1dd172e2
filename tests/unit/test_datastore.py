"""Where an image lies: mountinfo, the device mapper's words in sysfs, and real mounts."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealift.hypervisor.datastore import Mount, datastore_of, is_vdo, may_shrink, parse_mountinfo

# The example of proc(5), a bind mount with escapes, one without optional fields, one with two of them.
MOUNTINFO = r"""36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue
60 28 0:45 /images /srv/my\040vms\011\134a\043 rw - nfs4 server:/images rw,vers=4.2
61 28 0:46 / /data rw,relatime shared:5 master:2 - btrfs /dev/sdb rw,space_cache=v2
62 28 0:47 / /fuse rw - fuse.sshfs host:/a\040-\040b rw
"""


def test_mountinfo_is_parsed() -> None:
    mounts = parse_mountinfo(MOUNTINFO)
    assert mounts[36] == Mount(36, "98:0", "/mnt2", "ext3", "/dev/root")
    assert mounts[60] == Mount(60, "0:45", "/srv/my vms\t\\a#", "nfs4", "server:/images")
    assert mounts[61].filesystem == "btrfs"
    assert mounts[62] == Mount(62, "0:47", "/fuse", "fuse.sshfs", "host:/a - b")
    assert len(mounts) == 4


@given(st.text() | st.lists(st.sampled_from(["36", "-", " - ", "98:0", "\\040", "\n", " "])).map(" ".join))
def test_what_is_no_mountinfo_is_left_out(text: str) -> None:
    assert all(str(number) in text for number in parse_mountinfo(text))


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_an_escaped_path_comes_back(path: str) -> None:
    escaped = "".join(f"\\{ord(char):03o}" if char in " \t\n\\#" else char for char in path)
    line = f"36 35 98:0 / {escaped} rw - ext4 /dev/root rw"
    assert parse_mountinfo(line)[36].point == path


def device(sysfs: Path, name: str, number: str, *, uuid: str = "", slaves: tuple[str, ...] = ()) -> None:
    """A block device as sysfs shows it."""
    directory = sysfs / "devices" / name
    (directory / "slaves").mkdir(parents=True)
    if uuid:
        (directory / "dm").mkdir()
        (directory / "dm" / "uuid").write_text(f"{uuid}\n")
    for slave in slaves:
        (directory / "slaves" / slave).symlink_to(sysfs / "devices" / slave)
    (sysfs / "dev" / "block").mkdir(parents=True, exist_ok=True)
    (sysfs / "dev" / "block" / number).symlink_to(directory)


def test_vdo_is_found_beneath_what_lies_on_it(tmp_path: Path) -> None:
    device(tmp_path, "sda", "8:0")
    device(tmp_path, "dm-0", "253:0", uuid="VDO-0123", slaves=("sda",))
    device(tmp_path, "dm-1", "253:1", uuid="LVM-abc-vpool", slaves=("sda",))
    device(tmp_path, "dm-2", "253:2", uuid="LVM-def", slaves=("dm-1",))
    device(tmp_path, "dm-3", "253:3", uuid="LVM-ghi", slaves=("sda",))
    device(tmp_path, "dm-4", "253:4", uuid="CRYPT-LUKS2-x", slaves=("dm-4", "dm-0"))  # and a circle
    assert [is_vdo(f"253:{minor}", tmp_path) for minor in range(5)] == [True, True, True, False, True]
    assert not is_vdo("8:0", tmp_path)
    assert not is_vdo("0:45", tmp_path), "no device at all"


def test_file_systems_that_compress_and_those_upon_vdo_may_shrink(tmp_path: Path) -> None:
    mounts = parse_mountinfo(MOUNTINFO)
    assert [may_shrink(mounts[number], tmp_path) for number in (36, 60, 61)] == [False, False, True]
    zfs, plain = parse_mountinfo(
        "63 28 0:48 / /tank rw - zfs tank rw\n64 28 253:9 / /vdo rw - xfs /dev/dm-9 rw\n"
    ).values()
    assert may_shrink(zfs, tmp_path)
    assert not may_shrink(plain, tmp_path)
    device(tmp_path, "dm-9", "253:9", uuid="VDO-1234")
    assert may_shrink(plain, tmp_path)


def test_a_real_mount_is_told_from_what_it_hides(tmp_path: Path) -> None:
    below = datastore_of(str(tmp_path / "not there yet"))
    assert below.filesystem
    assert not below.block_device
    directory = tmp_path / "a mount, with a # in it"
    directory.mkdir()
    (directory / "inner").mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(directory)]
    mounted = subprocess.run(words, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"nothing can be mounted here: {mounted.stderr.strip()}")
    try:
        store = datastore_of(str(directory / "disk"))
        assert (store.filesystem, store.shrinks) == ("tmpfs", False)
        assert 0 < store.free_bytes <= 1 << 20
        os.symlink(directory, tmp_path / "link")
        assert datastore_of(str(tmp_path / "link" / "disk")) == store
        with pytest.raises(FileNotFoundError):
            datastore_of(str(directory / "inner" / "disk"))  # hidden now
    finally:
        subprocess.run(["umount", str(directory)], check=True)
    assert datastore_of(str(directory / "inner" / "disk")).filesystem == below.filesystem
