"""Where an image lies: the file system, what it does to data, and how much room there is.

Sources: proc(5) for /proc/PID/mountinfo and the ``mnt_id`` in /proc/PID/fdinfo; Linux Documentation/ABI sysfs-block-dm
for ``dm/uuid``. The kernel says by ``mnt_id`` through which mount a file was opened, so bind mounts, and mounts that
hide others, need no thought.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_SHRINKING: Final = frozenset({"btrfs", "zfs"})
"""File systems that can compress or deduplicate; whether they do is not looked at."""

_OCTAL = re.compile(r"\\([0-3][0-7]{2})")


@dataclass(frozen=True)
class Mount:
    """One line of mountinfo. ``device`` is ``major:minor`` of the file system; one without a device has ``0:N``."""

    id: int
    device: str
    point: str
    filesystem: str
    source: str


@dataclass(frozen=True)
class Datastore:
    """``filesystem`` is its type, empty for a block device, ``device`` its number. ``shrinks``: it can compress or
    deduplicate.

    Encrypted data does neither, so an image that becomes encrypted may need much more room there.
    """

    filesystem: str
    shrinks: bool
    free_bytes: int
    block_device: bool = False
    device: int = 0


def _plain(word: str) -> str:
    """A field without its escapes: space, tab, newline, backslash and ``#`` are octal in mountinfo."""
    return _OCTAL.sub(lambda found: chr(int(found[1], 8)), word)


def parse_mountinfo(text: str) -> dict[int, Mount]:
    """All mounts by their ids; lines that are not mountinfo's are left out."""
    mounts: dict[int, Mount] = {}
    for line in text.split("\n"):
        before, dash, after = line.partition(" - ")
        fields, kind = before.split(" "), after.split(" ")
        if dash and len(fields) >= 6 and len(kind) >= 2 and re.fullmatch(r"[0-9]{1,18}", fields[0]):
            number = int(fields[0])
            mounts[number] = Mount(number, fields[2], _plain(fields[4]), _plain(kind[0]), _plain(kind[1]))
    return mounts


def is_vdo(device: str, sysfs: Path) -> bool:
    """Whether a block device (``major:minor``) is a VDO one, or a device-mapper volume that lies on one.

    The device mapper's uuid begins with ``VDO-`` when vdo made it, and ends in ``-vpool`` when LVM did (lvmvdo(7)).
    """
    waiting, seen = [sysfs / "dev" / "block" / device], set()
    while waiting:
        directory = Path(os.path.realpath(waiting.pop()))
        if directory in seen:
            continue
        seen.add(directory)
        try:
            uuid = (directory / "dm" / "uuid").read_text(errors="replace").strip()
        except OSError:
            uuid = ""  # not the device mapper's
        if uuid.startswith("VDO") or uuid.endswith("-vpool"):
            return True
        slaves = directory / "slaves"
        if slaves.is_dir():
            waiting.extend(slaves.iterdir())
    return False


def may_shrink(mount: Mount, sysfs: Path) -> bool:
    """Whether what lies there may be compressed or deduplicated: by the file system, or by VDO below it."""
    return mount.filesystem in _SHRINKING or is_vdo(mount.device, sysfs)


def datastore_of(path: str, *, sysfs: Path = Path("/sys")) -> Datastore:
    """The datastore of an image, or of the directory where it is to be; raises OSError when neither is there."""
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        fd = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        if stat.S_ISBLK(status.st_mode):
            device = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
            return Datastore("", is_vdo(device, sysfs), 0, block_device=True)
        mounts = parse_mountinfo(Path("/proc/self/mountinfo").read_text(errors="surrogateescape"))
        info = Path(f"/proc/self/fdinfo/{fd}").read_text()
        found = re.search(r"^mnt_id:\s*([0-9]+)$", info, re.MULTILINE)
        mount = mounts.get(int(found[1])) if found else None
        room = os.statvfs(fd)
    finally:
        os.close(fd)
    filesystem = mount.filesystem if mount else ""
    shrinks = mount is not None and may_shrink(mount, sysfs)
    return Datastore(filesystem, shrinks, room.f_bavail * room.f_frsize, device=status.st_dev)
