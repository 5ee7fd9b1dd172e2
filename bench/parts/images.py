"""Disk images for the benchmark at rest: full of random data, and copied by a plain `qemu-img convert`.

The copies are what an administrator would do without us: the same formats, the same LUKS parameters (a random key as
passphrase, so that it needs no stretching), flushed to the disk in the end. QEMU's documentation, "Disk image file
formats" and `qemu-img convert`, has the options.
"""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from parts.measure import Run

ITER_TIME_MS = 10
_BLOCK = 16 << 20


@dataclass(frozen=True)
class Image:
    """A qcow2 image; ``key`` is the passphrase of its LUKS header, None when it is in clear."""

    path: Path
    key: bytes | None


def new_key() -> bytes:
    """A passphrase of 256 bits, as the product uses them."""
    return os.urandom(32).hex().encode()


def make_full(path: Path, size: int) -> None:
    """A qcow2 image whose every cluster holds random data."""
    room = os.statvfs(path.parent)
    if room.f_bavail * room.f_frsize < 4 * size:
        raise RuntimeError(f"{path.parent} has less than {4 * size >> 20} MiB free")
    raw = path.with_suffix(".raw")
    try:
        with raw.open("xb") as file:
            for at in range(0, size, _BLOCK):
                file.write(os.urandom(min(_BLOCK, size - at)))
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, path], check=True)
    finally:
        raw.unlink(missing_ok=True)
    flush(path)


def convert(source: Image, target: Image) -> Run:
    """Copy one image into another, which must not be there, and flush it; what that took."""
    size = _virtual_size(source)
    argv: list[str | Path] = ["qemu-img", "convert"]
    options = f"driver=qcow2,file.driver=file,file.filename={source.path}"
    with contextlib.ExitStack() as stack:
        numbers = []
        for name, key in (("source", source.key), ("target", target.key)):
            if key is not None:
                numbers.append(stack.enter_context(_in_memory(key)))
                argv += ["--object", f"secret,id={name},format=raw,file=/proc/self/fd/{numbers[-1]}"]
        if source.key is not None:
            options += ",encrypt.format=luks,encrypt.key-secret=source"
        argv += ["--image-opts", "-O", "qcow2"]
        if target.key is not None:
            luks = f"encrypt.format=luks,encrypt.key-secret=target,encrypt.iter-time={ITER_TIME_MS}"
            argv += ["-o", luks]
        began, usage = _run([*argv, options, target.path], numbers)
    flush(target.path)
    seconds = time.monotonic() - began
    return Run(seconds, size / 1e9, {"qemu-img": usage.ru_utime + usage.ru_stime}, usage.ru_maxrss / 1024)


def _run(argv: list[str | Path], numbers: list[int]) -> tuple[float, resource.struct_rusage]:
    """Run it with these descriptors; when it was started, and what it used. Raises RuntimeError.

    Making a LUKS header, QEMU 7.2 measures how fast PBKDF2 is and gives up when the kernel's accounting of processor
    time says it took none; such an attempt is made again and not counted.
    """
    while True:
        began = time.monotonic()
        child = subprocess.Popen(argv, pass_fds=numbers, stderr=subprocess.PIPE, text=True)
        assert child.stderr is not None
        said = child.stderr.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        child.stderr.close()
        if not child.returncode:
            return began, usage
        if "Unable to get accurate CPU usage" not in said:
            raise RuntimeError(f"qemu-img convert ended with {child.returncode}: {said.strip()}")


def flush(path: Path) -> None:
    """What was written to the file, and its name, is on the disk; nothing of it stays in the page cache."""
    for place, flags in ((path, os.O_RDWR), (path.parent, os.O_RDONLY)):
        number = os.open(place, flags)
        try:
            os.fsync(number)
            if place is path:
                os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(number)


@contextlib.contextmanager
def _in_memory(content: bytes) -> Iterator[int]:
    number = os.memfd_create("key")
    try:
        os.write(number, content)
        yield number
    finally:
        os.close(number)


def _virtual_size(image: Image) -> int:
    """Bytes, from the header of qcow2 (QEMU, docs/interop/qcow2.txt: big-endian at offset 24)."""
    with image.path.open("rb") as file:
        return int.from_bytes(file.read(32)[24:], "big")
