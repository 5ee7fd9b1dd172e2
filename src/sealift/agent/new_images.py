"""The new images of a conversion: made beside the old ones, then put in their place or removed.

Both are idempotent, so that they may be cut off anywhere and begun anew. An image is found again by its inode, or, on
file systems that have no lasting ones, by size and time of its last change, which a rename leaves alone.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from sealift.agent.durable import sync_directory
from sealift.errors import Conflict, ConversionFailed, NotFound


@dataclass(frozen=True)
class NewImage:
    """An image that is complete: where it is to be, where it was made, and what to know it by."""

    path: str
    new: str
    inode: int
    size: int
    changed_ns: int


def real_path(path: str) -> str:
    """Where an image really lies: a symbolic link is not replaced, what it points to is."""
    return os.path.realpath(path)


def new_path(path: str, conversion: UUID) -> str:
    """Where the new image of ``path`` (real) is made: beside it, on the same file system."""
    return f"{path}.sealift-{conversion.hex[:8]}"


def filesystem_of(path: str) -> int:
    """Which file system an image is on, or would be; raises NotFound when its directory cannot be seen."""
    directory = Path(path).parent
    try:
        return directory.stat().st_dev
    except OSError as error:
        raise NotFound(f"{directory} cannot be seen: {error.strerror}", todo="is the datastore mounted?") from error


def refuse_existing(paths: Sequence[str]) -> None:
    """Raises Conflict for one that is there: it is somebody's, and would be overwritten."""
    for path in paths:
        if os.path.lexists(path):
            raise Conflict(f"{path} is there already", todo="remove it if nothing needs it, then ask again")


def dress(old: str, new: str) -> None:
    """Give the new image owner, group and mode of the old one, durably; raises OSError."""
    was, fd = os.stat(old), os.open(new, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        now = os.fstat(fd)
        if (was.st_uid, was.st_gid) != (now.st_uid, now.st_gid):
            os.fchown(fd, was.st_uid, was.st_gid)
        os.fchmod(fd, stat.S_IMODE(was.st_mode))
        os.fsync(fd)
    finally:
        os.close(fd)


def complete(path: str, new: str) -> NewImage:
    """The image at ``new`` as it is now, after which nobody writes to it; raises OSError."""
    seen = os.stat(new)
    return NewImage(path, new, seen.st_ino, seen.st_size, seen.st_mtime_ns)


def swap(images: Sequence[NewImage]) -> bool:
    """Put every new image in its place, durably. False when none is there and none was put in its place: the old
    images are as they were.

    Raises ConversionFailed when that is true of some only, or an image cannot be seen now; OSError.
    """
    lost = [image.path for image in images if not _put(image)]
    if lost and len(lost) == len(images):
        return False
    if lost:
        raise ConversionFailed(f"the new image of {lost[0]} has disappeared", todo="look who removed it")
    for directory in {Path(image.path).parent for image in images}:
        sync_directory(directory)
    return True


def _put(image: NewImage) -> bool:
    try:
        os.replace(image.new, image.path)
        return True
    except FileNotFoundError:
        pass
    try:
        seen = os.stat(image.path)
    except FileNotFoundError:
        raise ConversionFailed(
            f"neither {image.path} nor its new image is there", todo="is the datastore mounted?"
        ) from None
    return seen.st_ino == image.inode or (seen.st_size, seen.st_mtime_ns) == (image.size, image.changed_ns)


def remove(paths: Sequence[str]) -> None:
    """Remove new images that are not to be; raises OSError."""
    for path in paths:
        Path(path).unlink(missing_ok=True)
