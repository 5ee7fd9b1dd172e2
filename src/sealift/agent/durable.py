"""Making a change of a directory durable: a rename counts only when the directory itself is on the disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def sync_directory(directory: Path) -> None:
    """Wait until the entries of ``directory`` are on the disk; raises OSError."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)


def link_into_place(made: str, path: str) -> None:
    """Rename a file, but never over another one: raises FileExistsError then, and OSError. Not durable by itself.

    By link(2), which does not overwrite. Cut off between link and unlink, both names are left. A file system without
    hard links gets a rename after a look, between which another file could come.
    """
    try:
        os.link(made, path, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path) from None
        os.rename(made, path)
    else:
        os.unlink(made)
