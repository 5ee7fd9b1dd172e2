"""Markers of shared datastores, on real files; and what an image's first bytes say of it."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealift.domain.vm import Disk
from sealift.errors import DatastoreNotShared, HypervisorError, InvalidInput
from sealift.hypervisor.disks import check_header, check_image, read_marker, remove_marker, write_marker
from sealift.hypervisor.image_header import HEAD_BYTES, parse


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


# --- headers -------------------------------------------------------------------------------------------------------


def qcow2(
    *, version: int = 3, backing: int = 0, size: int = 1 << 20, crypt: int = 0, snapshots: int = 0, features: int = 0
) -> bytes:
    """A header by QEMU docs/interop/qcow2."""
    head = struct.pack(">IIQIIQI", 0x514649FB, version, backing, 0, 16, size, crypt)
    return (head.ljust(60, b"\0") + struct.pack(">IQQ", snapshots, 0, features)).ljust(HEAD_BYTES, b"\0")


def luks(*, version: int = 1, payload: int = 4040) -> bytes:
    """A header by the LUKS1 on-disk format, section 2.2."""
    head = b"LUKS\xba\xbe" + struct.pack(">H", version)
    return (head.ljust(104, b"\0") + struct.pack(">I", payload)).ljust(HEAD_BYTES, b"\0")


def test_a_qcow2_header_says_what_an_image_is() -> None:
    plain = parse(qcow2(), "qcow2", 0)
    assert (plain.virtual_bytes, plain.encrypted, plain.refers, plain.snapshots) == (1 << 20, False, False, 0)
    assert parse(qcow2(crypt=2), "qcow2", 0).encrypted
    old = parse(qcow2(crypt=1), "qcow2", 0)
    assert (old.encrypted, old.other_cipher) == (False, True)
    assert parse(qcow2(backing=512), "qcow2", 0).refers
    assert parse(qcow2(features=4), "qcow2", 0).refers
    assert not parse(qcow2(version=2, features=4), "qcow2", 0).refers, "version 2 has no such field"
    assert parse(qcow2(snapshots=3), "qcow2", 0).snapshots == 3
    for wrong in (b"", b"QFI", qcow2(version=4), luks()):
        with pytest.raises(HypervisorError, match="not a qcow2 image"):
            parse(wrong, "qcow2", len(wrong))


def test_a_raw_image_is_encrypted_when_it_looks_as_qemu_makes_it() -> None:
    size = 4040 * 512 + (1 << 20)
    mine = parse(luks(), "raw", size)
    assert (mine.encrypted, mine.virtual_bytes) == (True, 1 << 20)
    # A guest may encrypt its whole disk by itself, with cryptsetup: that is data like any other.
    for guests in (luks(version=2), luks(payload=4096), b"LUKS\xba\xbe"):
        theirs = parse(guests, "raw", size)
        assert (theirs.encrypted, theirs.virtual_bytes) == (False, size)
    assert not parse(luks(), "raw", HEAD_BYTES).encrypted, "cut off within its header"
    assert parse(b"", "raw", 1).virtual_bytes == 512


@given(st.binary(max_size=HEAD_BYTES), st.integers(0, 1 << 62))
def test_any_bytes_are_a_raw_image(head: bytes, size: int) -> None:
    assert size <= parse(head, "raw", size).virtual_bytes < size + 512 or head.startswith(b"LUKS")


@given(st.binary(max_size=HEAD_BYTES).map(lambda tail: qcow2()[:8] + tail) | st.binary(max_size=HEAD_BYTES))
def test_no_qcow2_header_breaks_the_parser(head: bytes) -> None:
    try:
        found = parse(head, "qcow2", len(head))
    except HypervisorError:
        assert head[:8] not in (qcow2()[:8], qcow2(version=2)[:8])
    else:
        assert found.virtual_bytes % 512 == 0


@pytest.mark.parametrize(("format", "clear", "secret"), [("qcow2", qcow2(), qcow2(crypt=2)), ("raw", b"", luks())])
def test_an_image_must_be_encrypted_exactly_when_its_disk_is(
    tmp_path: Path, format: str, clear: bytes, secret: bytes
) -> None:
    known = "qcow2" if format == "qcow2" else "raw"
    for name, head, encrypted in (("clear", clear, False), ("secret", secret, True)):
        path = tmp_path / name
        path.write_bytes(head)
        os.truncate(path, 4 << 20)
        assert check_header(str(path), known, encrypted=encrypted).encrypted is encrypted  # type: ignore[arg-type]
        with pytest.raises(HypervisorError, match=f"{path} is to be"):
            check_header(str(path), known, encrypted=not encrypted)  # type: ignore[arg-type]
    if format == "qcow2":
        path.write_bytes(qcow2(crypt=1))
        for encrypted in (True, False):
            with pytest.raises(HypervisorError, match="a way that Sealift does not use"):
                check_header(str(path), "qcow2", encrypted=encrypted)
