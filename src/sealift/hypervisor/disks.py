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
from pathlib import Path
from typing import Literal

from sealift.domain.vm import Disk
from sealift.errors import DatastoreNotShared, HypervisorError, InvalidInput
from sealift.hypervisor.image_header import HEAD_BYTES, ImageHeader, parse

_MARKER = re.compile(r"\.sealift-marker-[0-9a-f]{16}")
_CONTENT_BYTES = 64  # hex digits


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


def _check_kind(path: str, mode: int) -> None:
    if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
        raise HypervisorError(
            f"{path} is not a disk: neither a file nor a block device", todo="correct its path in the VM file"
        )


def check_image(disk: Disk) -> None:
    """Whether QEMU can open ``disk`` as we will: directly, and from this one file.

    Raises HypervisorError: no such file, a file system without O_DIRECT (tmpfs), not a qcow2 image, one that refers
    to another file, one in clear where it must be encrypted, or the other way round.
    """
    try:
        _check_kind(disk.path, os.stat(disk.path).st_mode)
        # Non-blocking, should it be another one by now.
        os.close(os.open(disk.path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise HypervisorError(
                f"the file system of {disk.path} does not allow direct I/O (O_DIRECT), which migration needs",
                todo="put the disk on another file system; tmpfs has none before Linux 6.6",
            ) from error
        raise HypervisorError(f"the disk {disk.path} cannot be opened: {error.strerror}") from error
    check_header(disk.path, disk.format, encrypted=disk.dek is not None)


def check_header(path: str, format: Literal["qcow2", "raw"], *, encrypted: bool) -> ImageHeader:
    """What an image says of itself, when that is what it must be: whole, and encrypted by us or in clear.

    Raises HypervisorError, naming the disk, when it is not.
    """
    try:
        header = read_header(path, format)
    except OSError as error:
        raise HypervisorError(f"the disk {path} cannot be read: {error.strerror}") from error
    if header.refers:
        raise HypervisorError(
            f"the disk {path} refers to another file", todo="make it whole: qemu-img convert -O qcow2 OLD NEW"
        )
    if header.other_cipher:
        raise HypervisorError(
            f"the disk {path} is encrypted in a way that Sealift does not use",
            todo="decrypt it with qemu-img convert",
        )
    if header.encrypted and not encrypted:
        raise HypervisorError(
            f"the disk {path} is to be in clear, but its image is encrypted",
            todo="the image or the VM's configuration is not the one that belongs here: find the right one",
        )
    if encrypted and not header.encrypted:
        # What the guest wrote would lie there for all to read.
        raise HypervisorError(
            f"the disk {path} is to be encrypted, but its image is in clear",
            todo="the image or the VM's configuration is not the one that belongs here: find the right one",
        )
    return header


def read_header(path: str, format: Literal["qcow2", "raw"]) -> ImageHeader:
    """What an image says of itself; raises OSError, HypervisorError for what is no disk or no qcow2 image."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        _check_kind(path, os.fstat(fd).st_mode)
        size = os.lseek(fd, 0, os.SEEK_END)  # a block device's too
        head = os.pread(fd, HEAD_BYTES, 0)
    finally:
        os.close(fd)
    try:
        return parse(head, format, size)
    except HypervisorError as error:
        raise HypervisorError(f"the disk {path} cannot be used: {error.what}", todo=error.todo) from None
