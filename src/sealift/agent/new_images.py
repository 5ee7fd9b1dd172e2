"""The new images of a conversion: made beside the old ones, then put in their place or removed.

Both are idempotent, so that they may be cut off anywhere and begun anew. All of it may take as long as the datastore
does, so it is to be called in a thread.

Others may be able to write to a datastore's directory. So a file is what it is known by (``Seen``), never its name
alone, and no symbolic link is followed.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from sealift.agent.durable import link_into_place, sync_directory
from sealift.errors import Conflict, ConversionFailed, NotFound
from sealift.hypervisor.images import FileId

CLEAR_MODE = 0o660
"""What of an encrypted image's mode one in clear may keep: nothing for those who could read the former, useless to
them."""


@dataclass(frozen=True)
class Seen:
    """What a file is known by, and whether it was written to; sizes in bytes."""

    device: int
    inode: int
    size: int
    changed_ns: int

    @classmethod
    def of(cls, found: os.stat_result) -> Seen:
        """What stat(2) says."""
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


@dataclass(frozen=True)
class Place:
    """Where a disk's new image is made, noted before it is. ``path`` is that of the old one (real).

    ``old``: what the old image was then; None for a disk that has none, whose image is made.
    """

    path: str
    new: str
    directory: Seen
    old: Seen | None

    def there(self) -> bool:
        """Whether what is seen now is the datastore, and not the empty directory on which it is to be mounted.

        After a restart a device may have another number. A disk that is made has no old image, and its new one is
        empty: there either mark of the directory will do.
        """
        if os.path.lexists(self.path):
            return True
        try:
            now = Seen.of(os.stat(os.path.dirname(self.path)))
        except OSError:
            return False
        same = (now.device == self.directory.device, now.inode == self.directory.inode)
        return all(same) or (self.old is None and any(same))


@dataclass(frozen=True)
class NewImage:
    """An image that is complete: where it is to be, where it was made, and what to know it by.

    ``made``: there was no old one, so whatever lies at ``path`` is somebody else's.
    """

    path: str
    new: str
    inode: int
    size: int
    changed_ns: int
    device: int = 0
    made: bool = False

    def is_it(self, found: os.stat_result, *, found_again: bool) -> bool:
        """Whether this file is the image, as it was when it was complete.

        ``found_again``: by another agent, perhaps after a restart of the host. Then a device may have another number,
        and there are file systems without lasting inodes, where size and time of the last change must do.
        """
        if not stat.S_ISREG(found.st_mode):
            return False
        unchanged = (found.st_size, found.st_mtime_ns) == (self.size, self.changed_ns)
        if found_again:
            return unchanged or found.st_ino == self.inode
        return unchanged and (found.st_dev, found.st_ino) == (self.device, self.inode)


def real_paths(paths: Sequence[str]) -> list[str]:
    """Where images really lie: a symbolic link is not replaced, what it points to is."""
    return [os.path.realpath(path) for path in paths]


def new_path(path: str, conversion: UUID) -> str:
    """Where the new image of ``path`` (real) is made: beside it, on the same file system."""
    return f"{path}.sealift-{conversion.hex[:8]}"


def place_for(path: str, new: str, *, make: bool) -> Place:
    """Note where a new image is to be made; raises NotFound when that cannot be seen, Conflict for a file there."""
    directory = os.path.dirname(path)
    try:
        place = Seen.of(os.stat(directory))
        old = None if make else Seen.of(os.lstat(path))
    except OSError as error:
        what = f"{error.filename} cannot be seen: {error.strerror}"
        raise NotFound(what, todo="is the datastore mounted?") from error
    refuse_existing(new)
    return Place(path, new, place, old)


def refuse_existing(path: str) -> None:
    """Raises Conflict for a file that is there: it is somebody's, and would be overwritten."""
    if os.path.lexists(path):
        raise Conflict(f"{path} is there already", todo="remove it if nothing needs it, then ask again")


def refuse_changed(places: Sequence[Place]) -> None:
    """Raises ConversionFailed for an old image that is not what it was, or for one that has appeared; OSError."""
    for place in places:
        if place.old is None:
            refuse_existing(place.path)
        elif Seen.of(os.lstat(place.path)) != place.old:
            raise ConversionFailed(
                f"the image {place.path} was changed while it was copied",
                todo="find out what else writes to it: another VM, or a VM of another host",
            )


def dress(old: str, new: str, made: FileId, mask: int) -> None:
    """Give the new image owner, group and mode of the old one, of the mode what is in ``mask``, durably.

    Raises ConversionFailed when either is another file by now, OSError.
    """
    was, fd = os.lstat(old), os.open(new, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        now = os.fstat(fd)
        _refuse_other(old, stat.S_ISREG(was.st_mode))
        _refuse_other(new, _is_made(now, made))
        if (was.st_uid, was.st_gid) != (now.st_uid, now.st_gid):
            os.fchown(fd, was.st_uid, was.st_gid)
        os.fchmod(fd, stat.S_IMODE(was.st_mode) & mask)
        os.fsync(fd)
    finally:
        os.close(fd)


def complete(place: Place, made: FileId) -> NewImage:
    """The image of ``place`` as it is now, after which nobody writes to it; ``made``: by what it was made as.

    Raises ConversionFailed when it is another file by now, OSError.
    """
    found = os.lstat(place.new)
    _refuse_other(place.new, _is_made(found, made))
    seen = Seen.of(found)
    return NewImage(place.path, place.new, seen.inode, seen.size, seen.changed_ns, seen.device, made=place.old is None)


def _is_made(found: os.stat_result, made: FileId) -> bool:
    return stat.S_ISREG(found.st_mode) and (found.st_dev, found.st_ino) == (made.device, made.inode)


def _refuse_other(path: str, same: bool) -> None:
    if not same:
        raise ConversionFailed(f"{path} was replaced by another file", todo="look who else writes to that directory")


def swap(images: Sequence[NewImage], *, found_again: bool) -> bool:
    """Put every new image in its place, durably. False when none is there and none was put in its place: the old
    images are as they were.

    ``found_again``: see ``NewImage``. Raises ConversionFailed when that is true of some only, when an image cannot be
    seen now, or another file is in its place; OSError.
    """
    lost = [image.path for image in images if not _put(image, found_again)]
    if lost and len(lost) == len(images):
        return False
    if lost:
        raise ConversionFailed(f"the new image of {lost[0]} has disappeared", todo="look who removed it")
    for directory in {Path(image.path).parent for image in images}:
        sync_directory(directory)
    return True


def _put(image: NewImage, found_again: bool) -> bool:
    try:
        new = os.lstat(image.new)
    except FileNotFoundError:
        return _was_put(image)
    _refuse_other(image.new, image.is_it(new, found_again=found_again))
    if image.made:
        _put_where_nothing_is(image)
    else:
        os.replace(image.new, image.path)
    return True


def _was_put(image: NewImage) -> bool:
    try:
        return image.is_it(os.lstat(image.path), found_again=True)
    except FileNotFoundError:
        raise ConversionFailed(
            f"neither {image.path} nor its new image is there", todo="is the datastore mounted?"
        ) from None


def _put_where_nothing_is(image: NewImage) -> None:
    try:
        link_into_place(image.new, image.path)
    except FileExistsError:
        if not os.path.samestat(os.lstat(image.new), os.lstat(image.path)):
            raise ConversionFailed(
                f"a file has appeared at {image.path}, where the new image is to be", todo="move it away"
            ) from None
        os.unlink(image.new)  # an agent ended between the two


def remove(places: Sequence[Place]) -> None:
    """Remove new images that are not to be, durably. Raises OSError, also when a datastore is not there: what is not
    seen now may come back with it."""
    for place in places:
        try:
            os.unlink(place.new)
        except FileNotFoundError:
            if not place.there():
                raise OSError(errno.ENOENT, "the datastore is not there", place.path) from None
    for directory in {Path(place.new).parent for place in places}:
        sync_directory(directory)
