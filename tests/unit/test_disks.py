"""Markers of shared datastores, on real files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sealift.domain.vm import Disk
from sealift.errors import DatastoreNotShared, HypervisorError, InvalidInput
from sealift.hypervisor.disks import check_image, read_marker, remove_marker, write_marker


def test_a_marker_is_read_back_and_removed(tmp_path: Path) -> None:
    disk = tmp_path / "disk.qcow2"
    path, content = write_marker(str(disk))
    other, other_content = write_marker(str(disk))
    assert Path(path).parent == tmp_path
    assert path != other
    assert content != other_content
    assert read_marker(path) == content
    remove_marker(path)
    remove_marker(path)
    with pytest.raises(DatastoreNotShared):
        read_marker(path)
    remove_marker(other)
    assert not list(tmp_path.iterdir())


def test_a_marker_needs_a_directory_that_takes_it(tmp_path: Path) -> None:
    with pytest.raises(HypervisorError, match="marker"):
        write_marker(str(tmp_path / "absent" / "disk"))


def test_other_files_are_neither_read_nor_removed(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s" * 64)
    nested = tmp_path / ".sealift-marker-0123456789abcdef" / "secret"
    for path in (secret, nested, Path("relative/.sealift-marker-0123456789abcdef")):
        with pytest.raises(InvalidInput):
            read_marker(str(path))
        with pytest.raises(InvalidInput):
            remove_marker(str(path))
    link = tmp_path / ".sealift-marker-0123456789abcdef"
    link.symlink_to(secret)
    with pytest.raises(DatastoreNotShared):
        read_marker(str(link))
    assert secret.exists()


@pytest.mark.parametrize("content", [b"", b"0" * 63, b"0" * 65, b"z" * 64, b"\xff" * 64])
def test_what_is_not_a_marker_is_not_taken_for_one(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / ".sealift-marker-0123456789abcdef"
    path.write_bytes(content)
    with pytest.raises(DatastoreNotShared):
        read_marker(str(path))


def test_a_disk_must_be_there_and_allow_direct_io(tmp_path: Path) -> None:
    with pytest.raises(HypervisorError, match="cannot be opened"):
        check_image(Disk(str(tmp_path / "absent"), "raw"))
    # A file of /proc stands for a file system without O_DIRECT, as tmpfs was before Linux 6.6.
    with pytest.raises(HypervisorError, match="O_DIRECT"):
        check_image(Disk("/proc/self/comm", "raw"))
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(HypervisorError, match="not a disk"):
        check_image(Disk(str(fifo), "raw"))
