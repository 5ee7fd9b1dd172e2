"""What can be said of an image and of where it lies without its key, for the plan of a copy.

How much of a qcow2 image in clear is content is asked of `qemu-img measure`, which reads the image's tables, not its
data: what a file occupies says little of an image with compressed clusters, or on a file system that compresses. Nor
does it open an encrypted one without the key; but those have no compressed clusters, and do not shrink.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from sealift.domain.conversion import DiskFacts
from sealift.errors import HypervisorError, SealiftError
from sealift.hypervisor.datastore import datastore_of
from sealift.hypervisor.disks import read_header
from sealift.hypervisor.own_thread import in_own_thread
from sealift.hypervisor.qemu_img import run

ASK_S = 10.0
"""How long an image's header may be read."""

MEASURE_S = 40.0
"""How long its tables may be read, one for each 512 MiB, before how much is in it counts as not known. Whoever asked
waits for a minute."""


async def look(path: str, format: Literal["qcow2", "raw"]) -> DiskFacts:
    """What there is to say; never raises, see ``DiskFacts.error``."""
    facts = await in_own_thread(_look, path, format)
    if format != "qcow2" or not facts.exists or facts.backing or facts.error:
        return facts
    node = {"driver": "qcow2", "file": {"driver": "file", "filename": path}, "backing": None}
    about = ("--output", "json", f"json:{json.dumps(node)}")
    info = await _ask(["info", "-U", *about], ASK_S)
    facts = replace(facts, bitmaps=_names(info))
    if facts.content_bytes is not None:
        return facts
    measured = await _ask(["measure", "-U", "-O", "qcow2", *about], MEASURE_S)
    return replace(facts, content_bytes=measured.get("required"))


async def _ask(arguments: Sequence[str], within_s: float) -> dict[str, Any]:
    """What qemu-img answers; nothing when it fails or does not come to an end."""
    try:
        async with asyncio.timeout(within_s):
            ended = await run("qemu-img", arguments, [])
        answer = json.loads(ended.printed) if ended.code == 0 else {}
    except (SealiftError, OSError, ValueError):  # TimeoutError is an OSError
        return {}
    return answer if isinstance(answer, dict) else {}


def _names(info: dict[str, Any]) -> tuple[str, ...]:
    bitmaps = info.get("format-specific", {}).get("data", {}).get("bitmaps", [])
    return tuple(str(bitmap.get("name", "")) for bitmap in bitmaps)


def _look(path: str, format: Literal["qcow2", "raw"]) -> DiskFacts:
    try:
        store = datastore_of(path)
    except OSError as error:
        return DiskFacts(path, error=f"{os.path.dirname(path)} cannot be seen: {error.strerror}")
    known = DiskFacts(
        path,
        free_bytes=store.free_bytes,
        filesystem=store.filesystem,
        shrinks=store.shrinks,
        block_device=store.block_device,
        device=store.device,
    )
    try:
        found = os.stat(path)
        header = read_header(path, format)
    except FileNotFoundError:
        return known
    except OSError as error:
        return replace(known, exists=True, error=f"{path} cannot be read: {error.strerror}")
    except HypervisorError as error:
        return replace(known, exists=True, error=error.what, todo=error.todo)
    known = replace(
        known,
        exists=True,
        virtual_bytes=header.virtual_bytes,
        snapshots=header.snapshots,
        backing=header.refers,
        links=found.st_nlink,
    )
    if header.other_cipher:
        return replace(
            known,
            error=f"{path} is encrypted in a way that Sealift does not use",
            todo="decrypt it with `qemu-img convert`",
        )
    if format == "raw" or not header.encrypted or store.block_device:
        return known
    # What a file occupies is told late there (zfs), or for less than it is.
    return replace(known, content_bytes=found.st_size if store.shrinks else found.st_blocks * 512)
