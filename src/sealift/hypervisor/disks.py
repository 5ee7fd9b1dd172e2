"""Disk images on datastores: what is checked before QEMU opens one, and the marker that proves a datastore shared.

A marker is a small file of random content beside the disk, made by the source. A target that reads the same content
back sees the same datastore; equal paths and sizes prove nothing. The agent's orders name a marker by path, so every
function here refuses a path that does not look like a marker's: they are no way to read or remove other files.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
import struct
from pathlib import Path

from sealift.domain.vm import Disk
from sealift.errors import DatastoreNotShared, HypervisorError, InvalidInput

_MARKER = re.compile(r"\.sealift-marker-[0-9a-f]{16}")
_CONTENT_BYTES = 64  # hex digits

_QCOW2_MAGIC = 0x514649FB
_QCOW2_EXTERNAL_DATA = 1 << 2  # incompatible feature bit (QEMU docs/interop/qcow2)


def _check_marker(path: Path) -> None:
    if not path.is_absolute() or "\0" in str(path) or not _MARKER.fullmatch(path.name):
        raise InvalidInput("the path is not a marker's")


def write_marker(disk_path: str) -> tuple[str, str]:
    """Write a marker beside a disk; its path and content.

    Raises HypervisorError when the directory takes no file, InvalidInput for what is no path.
    """
    if not Path(disk_path).is_absolute() or "\0" in disk_path:
        raise InvalidInput("the path is not a disk's")
    path = Path(disk_path).parent / f".sealift-marker-{secrets.token_hex(8)}"
    content = secrets.token_hex(_CONTENT_BYTES // 2)
    try:
        # Readable by all: over NFS the target's agent may be another user. The content is no secret.
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            os.write(fd, content.encode())
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise HypervisorError(
            f"no marker can be written beside {disk_path}: {error.strerror}",
            todo="the agent must be able to write to the datastore",
        ) from error
    return str(path), content


def read_marker(path: str) -> str:
    """The content of a marker; raises DatastoreNotShared when there is none, InvalidInput for another path."""
    _check_marker(Path(path))
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            content = os.read(fd, _CONTENT_BYTES + 1)
        finally:
            os.close(fd)
    except OSError as error:
        raise DatastoreNotShared(
            f"this host does not see the marker in {Path(path).parent}: {error.strerror}",
            todo="mount the same datastore at the same path on both hosts",
        ) from error
    if len(content) != _CONTENT_BYTES or not re.fullmatch(rb"[0-9a-f]+", content):
        raise DatastoreNotShared(f"what this host sees as marker in {Path(path).parent} is not one")
    return content.decode()


def remove_marker(path: str) -> None:
    """Remove a marker; nothing happens when it is gone already. Raises InvalidInput for another path."""
    _check_marker(Path(path))
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
    except OSError as error:
        raise HypervisorError(f"the marker {path} cannot be removed: {error.strerror}", todo="remove it") from error


def check_image(disk: Disk) -> None:
    """Whether QEMU can open ``disk`` as we will: directly, and from this one file.

    Raises HypervisorError: no such file, a file system without O_DIRECT (tmpfs), not a qcow2 image, or one that
    refers to another file.
    """
    try:
        mode = os.stat(disk.path).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise HypervisorError(f"{disk.path} is not a disk: neither a file nor a block device")
        # Non-blocking, should it be another one by now.
        os.close(os.open(disk.path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise HypervisorError(
                f"the file system of {disk.path} does not allow direct I/O (O_DIRECT), which migration needs",
                todo="put the disk on another file system; tmpfs has none before Linux 6.6",
            ) from error
        raise HypervisorError(f"the disk {disk.path} cannot be opened: {error.strerror}") from error
    if disk.format == "qcow2":
        _check_qcow2(disk.path)


def _check_qcow2(path: str) -> None:
    with open(path, "rb") as file:
        head = file.read(80).ljust(80, b"\0")
    magic, version, backing = struct.unpack_from(">IIQ", head)
    if magic != _QCOW2_MAGIC:
        raise HypervisorError(f"the disk {path} is not a qcow2 image", todo="correct its format in the VM file")
    features = struct.unpack_from(">Q", head, 72)[0] if version >= 3 else 0
    if backing or features & _QCOW2_EXTERNAL_DATA:
        raise HypervisorError(
            f"the disk {path} refers to another file", todo="make it whole: qemu-img convert -O qcow2 OLD NEW"
        )
