"""Whether an accelerator really runs a virtual CPU here, at a speed that is of use.

That ``/dev/kvm`` exists and opens proves nothing: on some machines, nested ones above all, guests on it hang, or run
forty times slower than without, while a handful of instructions still passes. So QEMU's own firmware is booted (real
and protected mode, PCI, timers, interrupts) up to a boot sector of ours, which prints a word to the debug console port
and then ends QEMU. Only the word, printed in time, counts. Measured with TCG: 0.1 s; it does not hang, so it is given
a time that a host which stands still for a moment keeps as well.
"""

from __future__ import annotations

import asyncio
import json
import os
import struct
import tempfile
from enum import Enum
from pathlib import Path

from sealift.domain.vm import Accelerator
from sealift.hypervisor.process import spawn

PROBE_S = {Accelerator.KVM: 2.0, Accelerator.TCG: 20.0}
"""Seconds that the probe's guest has."""

_WORD = b"sealift"
_SECTOR_BYTES, _DISK_BYTES = 512, 1 << 20
_CONSOLE_PORT, _EXIT_PORT = 0xE9, 0xF4


def boot_sector() -> bytes:
    """The boot sector: 16-bit code that prints the word and ends QEMU."""
    code = struct.pack("<BH", 0xBA, _CONSOLE_PORT)  # mov dx, port
    for letter in _WORD:
        code += bytes((0xB0, letter, 0xEE))  # mov al, letter; out dx, al
    code += struct.pack("<BH", 0xBA, _EXIT_PORT) + b"\xee"  # mov dx, port; out dx, al
    code += b"\xf4\xeb\xfd"  # again: hlt; jmp again
    return code.ljust(_SECTOR_BYTES - 2, b"\0") + b"\x55\xaa"


def _printed(console: Path) -> bool:
    return console.exists() and console.read_bytes() == _WORD


class Probed(Enum):
    """What came of a probe."""

    RAN = "ran"
    FAILED = "failed"
    STUCK = "stuck"  # in the kernel, where it cannot even be killed: another one would be too


async def runs_vcpu(binary: str, accelerator: Accelerator, *, timeout: float | None = None) -> Probed:
    """Whether ``accelerator`` (KVM or TCG) ran the probe's guest within ``timeout`` seconds, by default ``PROBE_S``.

    The QEMU started for it has ended on return, unless it is stuck. Raises QemuMissing.
    """
    limit = PROBE_S[accelerator] if timeout is None else timeout
    with tempfile.TemporaryDirectory(prefix="sealift-probe-", ignore_cleanup_errors=True) as directory:
        disk, console = Path(directory, "disk"), Path(directory, "console")
        with open(disk, "wb") as file:  # noqa: ASYNC230 - a megabyte of nothing
            file.write(boot_sector())
            file.truncate(_DISK_BYTES)
        process = spawn(
            [
                binary,
                *("-accel", accelerator.value, "-machine", "q35", "-m", "32M"),
                *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
                *("-chardev", f"file,id=console,path={str(console).replace(',', ',,')}"),
                *("-blockdev", json.dumps({"driver": "file", "filename": str(disk), "node-name": "disk"})),
                *("-device", "virtio-blk-pci,drive=disk"),
                *("-device", f"isa-debugcon,iobase={_CONSOLE_PORT:#x},chardev=console"),
                *("-device", f"isa-debug-exit,iobase={_EXIT_PORT:#x},iosize=1"),
            ],
            log_path=os.devnull,
        )
        try:
            ended = await process.wait_exit(limit)
        finally:
            process.kill()
            # Shielded: a cancelled caller must not leave a virtual CPU spinning. Bounded: one that hangs in the
            # kernel may not even die.
            gone = await asyncio.shield(process.wait_exit(limit))
        if not gone:
            return Probed.STUCK
        return Probed.RAN if ended and _printed(console) else Probed.FAILED
