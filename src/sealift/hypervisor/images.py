"""Disk images by qemu-img: looked at, made, copied from under one key to under another, compared.

Every image is opened by a description of its own (driver, key, no backing file), never by probing. Keys reach the
programs as ``passphrase`` says. Encrypted means LUKS1 with AES-256-XTS: within qcow2, or in place of raw.

How ``convert`` became fast (QEMU 7.2, ext4 on a virtual disk, 1 GiB of random data): the target is made beforehand and
known to read as zeros, is written with O_DIRECT instead of through the page cache, and out of order, so that several
threads encrypt at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from sealift.domain.conversion import DiskFacts
from sealift.errors import AlreadyExists, ConversionFailed, DatastoreFull, HypervisorError, SealiftError
from sealift.hypervisor import image_facts
from sealift.hypervisor.disks import check_header
from sealift.hypervisor.image_header import ImageHeader
from sealift.hypervisor.own_thread import in_own_thread
from sealift.hypervisor.passphrase import LUKS_ITER_TIME_MS
from sealift.hypervisor.qemu_img import Ended, key_id, run
from sealift.secret import Secret

T = TypeVar("T")
Format = Literal["qcow2", "raw"]
OnBytes = Callable[[int, int], None]
"""Hears of progress: bytes of virtual disk done, and all of them."""

MIB = 1 << 20
SAMPLE_RANGES = 64
_ALIGNMENT = 4096

_CIPHER = {"cipher-alg": "aes-256", "cipher-mode": "xts", "ivgen-alg": "plain64", "hash-alg": "sha256"}

_NO_CPU_TIME = "Unable to get accurate CPU usage"
_CREATE_TRIES = 20
"""qemu-img times its PBKDF2 with the kernel's CPU accounting and gives up when that says nothing: try again."""

_FULL = ("No space left on device", "Disk quota exceeded")


@dataclass(frozen=True)
class ImageRef:
    """An image, and the key it is encrypted with; None: it is in clear."""

    path: str
    format: Format
    dek: Secret | None


@dataclass(frozen=True)
class FileId:
    """A file, whatever its name: device and inode, as stat(2) says."""

    device: int
    inode: int


def sample(size: int, below: Callable[[int], int]) -> list[tuple[int, int]]:
    """Offsets and lengths that a sample of ``size`` bytes reads: the first MiB, the last, 64 elsewhere; ascending.

    All of it when that is not more. ``below(n)`` draws a number from 0 to n - 1.
    """
    if size <= (SAMPLE_RANGES + 2) * MIB:
        return [(start, min(MIB, size - start)) for start in range(0, size, MIB)]
    places = (size - MIB) // _ALIGNMENT
    drawn = {below(places) * _ALIGNMENT for _ in range(SAMPLE_RANGES)}
    return [(start, MIB) for start in sorted({0, size - MIB, *drawn})]


def _node(ref: ImageRef, key: int) -> dict[str, object]:
    """How QEMU is to open an image; ``key`` is the number of its key (``qemu_img.key_id``)."""
    file = {"driver": "file", "filename": ref.path}
    if ref.format == "qcow2":
        encrypt = {"encrypt": {"format": "luks", "key-secret": key_id(key)}} if ref.dek is not None else {}
        return {"driver": "qcow2", "file": file, "backing": None, **encrypt}
    if ref.dek is not None:
        return {"driver": "luks", "file": file, "key-secret": key_id(key)}
    return {"driver": "raw", "file": file}


def _options(node: Mapping[str, object], prefix: str = "") -> str:
    """A node in the words of ``--image-opts``; what is null there has no words."""
    words: list[str] = []
    for name, value in node.items():
        if isinstance(value, Mapping):
            words.append(_options(value, f"{prefix}{name}."))
        elif value is not None:
            words.append(f"{prefix}{name}={str(value).replace(',', ',,')}")
    return ",".join(words)


def _json(node: Mapping[str, object]) -> str:
    return f"json:{json.dumps(node)}"


def _two(source: ImageRef, target: ImageRef) -> tuple[dict[str, object], dict[str, object], list[Secret]]:
    """The nodes of both, and their keys."""
    keys = [ref.dek for ref in (source, target) if ref.dek is not None]
    return _node(source, 0), _node(target, 0 if source.dek is None else 1), keys


def _failed(what: str, path: str, ended: Ended) -> SealiftError:
    if any(word in ended.said for word in _FULL):
        return _full(path)
    return ConversionFailed(f"{what}: {ended.said or f'it ended with code {ended.code}'}")


def _full(path: str) -> DatastoreFull:
    return DatastoreFull(f"there is no room for {path}", todo="make room on that datastore")


def _header(ref: ImageRef) -> ImageHeader:
    return check_header(ref.path, ref.format, encrypted=ref.dek is not None)


class Images:
    """See the module. ``below(n)`` draws the places of a sample, from 0 to n - 1."""

    def __init__(self, below: Callable[[int], int] = secrets.randbelow) -> None:
        self._below = below

    async def look(self, path: str, format: Format) -> DiskFacts:
        """What can be said of an image and its datastore without its key; never raises: see ``DiskFacts.error``."""
        return await image_facts.look(path, format)

    async def create(self, path: str, format: Format, size_bytes: int, dek: Secret | None) -> FileId:
        """Make an image (0600) that the guest sees with ``size_bytes``, encrypted with ``dek``, or in clear for None.

        It reads as zeros, except a raw encrypted one, which reads as noise. On return it is on the disk; answers which
        file was made for it. Raises AlreadyExists, DatastoreFull, HypervisorError; then nothing of it is there.
        """
        made = await self._make(path, format, size_bytes, dek)
        await self._durable(path)
        return made

    async def _make(self, path: str, format: Format, size_bytes: int, dek: Secret | None) -> FileId:
        options: list[str] = []
        if dek is not None:
            prefix = "encrypt." if format == "qcow2" else ""
            words = {"key-secret": key_id(0), "iter-time": LUKS_ITER_TIME_MS, **_CIPHER}
            words |= {"format": "luks"} if prefix else {}
            options = ["-o", ",".join(f"{prefix}{name}={value}" for name, value in words.items())]
        kind = "luks" if dek is not None and format == "raw" else format
        arguments = ["create", "-q", "-f", kind, *options, path, str(size_bytes)]
        for _ in range(_CREATE_TRIES):
            # Anew each time: QEMU removes what it failed to make, and would make the next one readable by all.
            made = await _new_file(path)
            try:
                ended = await run("qemu-img", arguments, [] if dek is None else [dek])
                if ended.code == 0:
                    return made
            except BaseException:
                await _to_the_end(lambda: _remove(path))
                raise
            await _to_the_end(lambda: _remove(path))
            if _NO_CPU_TIME not in ended.said:
                break
        failed = _failed(f"the image {path} cannot be made", path, ended)
        raise failed if isinstance(failed, DatastoreFull) else HypervisorError(failed.what)

    async def _durable(self, path: str) -> None:
        try:
            await _to_the_end(lambda: _flush(path))
        except BaseException as error:
            await _to_the_end(lambda: _remove(path))
            if isinstance(error, OSError):
                raise _os_error("cannot be written", path, error) from error
            raise

    async def convert(self, source: ImageRef, target: ImageRef, on_bytes: OnBytes) -> FileId:
        """Copy what the guest sees of ``source`` into a new image (0600); on return it is on the disk. Answers which
        file was made for it.

        What reads as zeros stays a hole, except in a raw encrypted image, which is written in full. Nobody may write
        to ``source`` meanwhile; QEMU's lock is asked for. Raises AlreadyExists, DatastoreFull, ConversionFailed,
        HypervisorError for a source that is not what it is said to be; then, and when cancelled, no target is there.
        """
        header = await in_own_thread(_header, source)
        if header.snapshots:
            raise ConversionFailed(
                f"{source.path} has internal snapshots ({header.snapshots}), which a copy would lose",
                todo="delete them: qemu-img snapshot -d",
            )
        size = header.virtual_bytes
        made = await self._make(target.path, target.format, size, target.dek)
        old, new, keys = _two(source, target)
        # Holes of a raw encrypted image read as noise: zeros must be written there.
        holes = [] if target.format == "raw" and target.dek is not None else ["--target-is-zero"]
        try:
            ended = await run(
                "qemu-img",
                [
                    *("convert", "-p", "-n", *holes, "-W", "-t", "none"),
                    *("--target-image-opts", _json(old), _options(new)),
                ],
                keys,
                lambda percent: on_bytes(round(size * percent / 100), size),
            )
            if ended.code:
                raise _failed(f"{source.path} cannot be copied to {target.path}", target.path, ended)
        except BaseException:
            await _to_the_end(lambda: _remove(target.path))
            raise
        await self._durable(target.path)
        on_bytes(size, size)
        return made

    async def verify(self, source: ImageRef, target: ImageRef, *, full: bool, on_bytes: OnBytes) -> None:
        """Whether the guest would see the same in both images, as they are on the disk.

        ``full``: all of it; else the first MiB, the last, and 64 that are drawn. The structure of a qcow2 target is
        checked in any case. Raises ConversionFailed when they differ or cannot be read.
        """
        sizes = [(await in_own_thread(_header, ref)).virtual_bytes for ref in (source, target)]
        if sizes[0] != sizes[1]:
            raise ConversionFailed(f"{target.path} has {sizes[1]} bytes for the guest, {source.path} has {sizes[0]}")
        if target.format == "qcow2":
            checked = [] if target.dek is None else [target.dek]
            ended = await run("qemu-img", ["check", "-q", _json(_node(target, 0))], checked)
            if ended.code:
                raise _failed(f"{target.path} is damaged", target.path, ended)
        compare = self._compare if full else self._compare_sample
        await compare(source, target, sizes[0], on_bytes)
        on_bytes(sizes[0], sizes[0])

    async def _compare(self, source: ImageRef, target: ImageRef, size: int, on_bytes: OnBytes) -> None:
        old, new, keys = _two(source, target)
        ended = await run(
            "qemu-img",
            ["compare", "-p", "-T", "none", _json(old), _json(new)],
            keys,
            lambda percent: on_bytes(round(size * percent / 100), size),
        )
        if ended.code == 1:
            raise ConversionFailed(f"{target.path} does not hold what {source.path} does")
        if ended.code:
            raise _failed(f"{target.path} cannot be compared with {source.path}", target.path, ended)

    async def _compare_sample(self, source: ImageRef, target: ImageRef, size: int, on_bytes: OnBytes) -> None:
        # QEMU's blkverify reads from two images at once and ends the program when they differ: one process, and each
        # key is derived once only.
        old, new, keys = _two(source, target)
        reads = [word for start, length in sample(size, self._below) for word in ("-c", f"read -q {start} {length}")]
        both = _json({"driver": "blkverify", "test": new, "raw": old})
        ended = await run("qemu-io", [*("-r", "-t", "none"), *reads, both], keys)
        if ended.code and "blkverify" in ended.said and "mismatch" in ended.said:
            raise ConversionFailed(f"{target.path} does not hold what {source.path} does")
        if ended.code:
            raise _failed(f"{target.path} cannot be compared with {source.path}", target.path, ended)


def _os_error(what: str, path: str, error: OSError) -> SealiftError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _full(path)
    return HypervisorError(f"the image {path} {what}: {error.strerror}")


async def _to_the_end(act: Callable[[], T], undo: Callable[[], None] | None = None) -> T:
    """Do this in a thread, for the datastore may hang; cancelled, wait until it is done all the same, then undo it."""
    doing = asyncio.ensure_future(in_own_thread(act))
    try:
        return await asyncio.shield(doing)
    except asyncio.CancelledError:
        await asyncio.wait([doing])
        if doing.exception() is None and undo is not None:
            await in_own_thread(undo)
        raise


async def _new_file(path: str) -> FileId:
    """Make an empty file, ours alone from the first moment; qemu-img keeps the mode of what is there."""
    try:
        return await _to_the_end(lambda: _open_new(path), lambda: _remove(path))
    except FileExistsError:
        raise AlreadyExists(f"there is a file at {path} already", todo="remove it, if nothing needs it") from None
    except OSError as error:
        raise _os_error("cannot be made", path, error) from error


def _open_new(path: str) -> FileId:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        found = os.fstat(fd)
    finally:
        os.close(fd)
    return FileId(found.st_dev, found.st_ino)


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _flush(path: str) -> None:
    for each, kind in ((path, 0), (os.path.dirname(path), os.O_DIRECTORY)):
        fd = os.open(each, os.O_RDONLY | os.O_CLOEXEC | kind)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
