"""The file of an exported key provider: for its owner alone, never over another file, read back from the disk."""

from __future__ import annotations

import os
from pathlib import Path

from sealift.errors import InvalidInput

MAX_BYTES = 65536
ARMOUR = b"-----BEGIN AGE ENCRYPTED FILE-----"


def check_free(path: Path) -> None:
    """Raise InvalidInput when ``path`` cannot become a new file, before anything is asked of the controller."""
    if str(path) == "-":
        raise InvalidInput(
            "an export is not written to standard output: it is read back from where it was written",
            todo="give --output the name of a new file",
        )
    if os.path.lexists(path):
        raise InvalidInput(f"{path} is there already, and is not overwritten", todo="give --output another name")
    if not path.parent.is_dir():
        raise InvalidInput(f"{path.parent} is not a directory", todo="give --output a name in one that is there")


def write(path: Path, text: str) -> None:
    """Make ``path``, mode 0600, and bring it to the disk; on an error nothing of it is left. Raises InvalidInput."""
    try:
        made = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        check_free(path)
        raise
    except OSError as error:
        raise InvalidInput(f"{path} cannot be written: {error.strerror}", todo="give --output another place") from None
    try:
        with open(made, "wb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except BaseException as error:
        path.unlink()
        if isinstance(error, OSError):
            raise InvalidInput(
                f"{path} cannot be written: {error.strerror}", todo="give --output another place"
            ) from None
        raise


def read_back(path: Path) -> str:
    """What lies at ``path`` on the disk, not what the kernel remembers of writing it.

    Raises InvalidInput, also for what is no export at first sight.
    """
    if str(path) == "-":
        raise InvalidInput("an export is not read from standard input", todo="give the name of its file")
    try:
        with path.open("rb") as file:
            # The page cache would answer what was written even if the disk lost it. Its pages are clean after the
            # fsync, so the kernel can drop them (posix_fadvise(2)).
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InvalidInput(
            f"{path} cannot be read: {error.strerror}", todo="give the file that `sealift key-provider export` wrote"
        ) from None
    if len(raw) > MAX_BYTES:
        raise InvalidInput(f"{path} is larger than {MAX_BYTES} bytes", todo="give the file that was exported")
    if ARMOUR not in raw or not raw.isascii():
        raise InvalidInput(f"{path} is not an exported key provider", todo="give the file that was exported")
    return raw.decode()
