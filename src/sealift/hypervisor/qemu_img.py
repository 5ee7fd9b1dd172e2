"""Running qemu-img and its like: children that get their keys through anonymous files, and that never outlive us.

A child is started through setpriv(1) of util-linux, which asks the kernel to kill it when its parent dies
(PR_SET_PDEATHSIG, prctl(2)), and a shell that ends when the parent has died before that, and else becomes the program.
So nothing of ours runs between fork and exec, where a process with threads may do next to nothing. The parent is, for
the kernel, the thread that started the child, so these are to be called from a loop that runs in the main thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sealift.errors import QemuMissing
from sealift.hypervisor.passphrase import Passphrase
from sealift.secret import Secret

_PROGRESS = re.compile(rb"\(([0-9]{1,3}\.[0-9]{2})/100%\)\r")
_PROGRESS_BYTES = 64  # more than one line of progress
_KEPT_BYTES = 4096
_PRINTED_BYTES = 1 << 20
_READ_BYTES = 1 << 16

_IF_PARENT_LIVES = '[ "$PPID" = "$1" ] || exit 1; shift; exec "$@"'
"""The kernel kills only for a death that comes after it was asked to."""


@dataclass(frozen=True)
class Ended:
    """How a program ended; ``said`` is the end of what it wrote to stderr, on one line, ``printed`` the beginning of
    what it wrote to stdout."""

    code: int
    said: str
    printed: bytes = b""


def key_id(number: int) -> str:
    """Under which id a program knows the ``number``-th key it was given."""
    return f"key{number}"


def parse_progress(text: bytes) -> tuple[float | None, bytes]:
    """The last complete ``(12.34/100%)\\r`` in a piece of output, 0 to 100, and what may be the begin of another."""
    found, end = None, 0
    for match in _PROGRESS.finditer(text):
        found, end = min(float(match[1]), 100.0), match.end()
    return found, text[end:][-_PROGRESS_BYTES:]


def _program(name: str, todo: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise QemuMissing(f"there is no {name} on this host", todo=todo)
    return path


async def run(
    program: str, arguments: Sequence[str], keys: Sequence[Secret], on_percent: Callable[[float], None] | None = None
) -> Ended:
    """Run a program with ``--object`` for each of ``keys`` (``key_id``) behind its first argument, until it ends.

    ``on_percent`` hears of the progress it prints, 0 to 100. With the first of it the keys have been read, since QEMU's
    tools make their objects as they read their options, and are taken from the child's reach. Cancelled, it is killed,
    and gone on return. Raises QemuMissing when it, or setpriv, is not installed.
    """
    found = _program(program, "install QEMU's tools (Debian: apt install qemu-utils)")
    setpriv = _program("setpriv", "install util-linux")
    with contextlib.ExitStack() as stack:
        objects: list[str] = []
        passphrases: list[Passphrase] = []
        for number, key in enumerate(keys):
            passphrase = stack.enter_context(Passphrase())
            passphrase.fill(key)
            passphrases.append(passphrase)
            objects += ["--object", f"secret,id={key_id(number)},file={passphrase.path},format=raw"]
        child = await asyncio.create_subprocess_exec(
            *(setpriv, "--pdeathsig", "KILL", "--", "/bin/sh", "-c", _IF_PARENT_LIVES, "sh", str(os.getpid()), found),
            *(*arguments[:1], *objects, *arguments[1:]),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            pass_fds=[passphrase.fd for passphrase in passphrases],
            env={"PATH": os.environ.get("PATH", os.defpath), "LANG": "C"},
            cwd="/",
        )
        assert child.stdout is not None
        assert child.stderr is not None
        try:
            async with asyncio.TaskGroup() as reading:
                printed = reading.create_task(_follow(child.stdout, passphrases, on_percent))
                said = reading.create_task(_last(child.stderr))
            code = await child.wait()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await asyncio.shield(child.wait())
            raise
    return Ended(code, said.result(), printed.result())


async def _follow(
    stream: asyncio.StreamReader, passphrases: list[Passphrase], on_percent: Callable[[float], None] | None
) -> bytes:
    rest, printed = b"", b""
    while piece := await stream.read(_READ_BYTES):
        printed = (printed + piece)[:_PRINTED_BYTES]
        percent, rest = parse_progress(rest + piece)
        if percent is None:
            continue
        while passphrases:
            passphrases.pop().empty()
        if on_percent is not None:
            on_percent(percent)
    return printed


async def _last(stream: asyncio.StreamReader) -> str:
    kept = b""
    while piece := await stream.read(_READ_BYTES):
        kept = (kept + piece)[-_KEPT_BYTES:]
    lines = kept.decode(errors="replace").splitlines()
    return " | ".join(line.strip() for line in lines if line.strip())
