"""A process that has an agent's conversions and nothing else, to be killed; and what a guest would see in an image."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from sealift.agent.conversions import Conversions
from sealift.agent.journal import Journal
from sealift.agent.settings import AgentSettings
from sealift.agent.vault import Vault
from sealift.agent.vms import Vms
from sealift.domain.conversion import ConversionOrder
from sealift.domain.deks import decode_frame
from sealift.hypervisor import qemu_img
from sealift.hypervisor.images import ImageRef, Images
from sealift.secret import Secret


@asynccontextmanager
async def agent_on(state: Path) -> AsyncIterator[tuple[Vms, Conversions]]:
    """An agent's parts on this state directory, with what an earlier one left settled; it has no hypervisor."""
    settings = AgentSettings("a", state, run_directory=state / "run")
    journal, images = Journal(settings.database), Images()
    hypervisor: Any = None
    vms = Vms(settings, journal, hypervisor, Vault(settings.name), images)
    conversions = Conversions(settings, journal, vms, images)
    await vms.adopt()
    await conversions.recover()
    await asyncio.gather(*conversions._tasks.values())
    try:
        yield vms, conversions
    finally:
        await conversions.close()
        journal.close()


def convert(state: Path, frame: bytes, told: Connection) -> None:
    """Settle what there is, carry out an order (``domain.deks.encode_frame``), and tell of each step that is done."""

    async def main() -> None:
        async with agent_on(state) as (_, conversions):
            told.send("settled")
            public, deks = decode_frame(frame)
            order = TypeAdapter(ConversionOrder).validate_json(public)
            await conversions.take(order, deks)
            told.send("taken")
            await asyncio.gather(*conversions._tasks.values())
            told.send(conversions.status(order.id).state.value)

    asyncio.run(main())


def die_beside_a_child(path: str, programs: str, told: Connection) -> None:
    """Start qemu-img, say its pid, and be killed at that very moment; programs are looked for in ``programs`` first."""
    start = asyncio.create_subprocess_exec

    async def start_and_die(*arguments: Any, **words: Any) -> Any:
        child = await start(*arguments, **words)
        told.send(child.pid)
        os.kill(os.getpid(), signal.SIGKILL)

    os.environ["PATH"] = f"{programs}:{os.environ['PATH']}"
    asyncio.create_subprocess_exec = start_and_die
    asyncio.run(qemu_img.run("qemu-img", ["create", "-q", "-f", "raw", path, "1M"], []))


async def content_of(path: str, format: Literal["qcow2", "raw"], dek: Secret | None) -> bytes:
    """What a guest would see; ``dek`` opens the image, None is for one in clear."""
    beside = f"{path}.seen"
    await Images().convert(ImageRef(path, format, dek), ImageRef(beside, "raw", None), lambda *_: None)
    try:
        return await asyncio.to_thread(Path(beside).read_bytes)
    finally:
        os.unlink(beside)


async def image_with(path: Path, format: Literal["qcow2", "raw"], content: bytes, dek: Secret | None) -> None:
    """An image in which a guest sees this."""
    plain = path.with_name(f"{path.name}.plain")
    plain.write_bytes(content)
    if format == "raw" and dek is None:
        plain.rename(path)
        return
    await Images().convert(ImageRef(str(plain), "raw", None), ImageRef(str(path), format, dek), lambda *_: None)
    plain.unlink()


def files_in(directory: Path) -> list[str]:
    """The names of what is in it, in order."""
    return sorted(path.name for path in directory.iterdir())
