"""A key provider is tried out with a key that is made for it, and thrown away."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sealift.errors import KeyProviderError
from sealift.keys.kinds import open_provider
from sealift.keys.provider import KEK_BYTES, KeyProvider

LABEL = "sealift-test-"
"""What the labels of throw-away keys begin with, so that one that was left can be told from a VM's."""


@dataclass(frozen=True)
class TrialStep:
    """One thing that was tried, and how long it took in milliseconds; ``message`` says why it failed."""

    name: str
    ok: bool
    message: str
    ms: float


@dataclass
class Trial:
    """What came of trying one provider, or one member of it; ``left`` is the key that could not be destroyed."""

    steps: list[TrialStep] = field(default_factory=list)
    left: str = ""

    @property
    def ok(self) -> bool:
        """Whether every step went well."""
        return all(step.ok for step in self.steps)


async def try_out(provider: KeyProvider, member: str) -> Trial:
    """Make, activate, read, find and destroy a key at ``provider``; steps are named after ``member``. Raises nothing.

    What was made is destroyed whatever failed in between.
    """
    trial = Trial()
    made: list[str] = []
    label = LABEL + secrets.token_hex(8)

    async def create() -> None:
        made.append(await provider.create(label))

    async def read() -> None:
        key = await provider.get(made[0])
        try:
            if len(key.reveal()) != KEK_BYTES:
                raise KeyProviderError(f"key provider {provider.name} gave a key that is not {KEK_BYTES} bytes long")
        finally:
            key.wipe()

    async def find() -> None:
        if await provider.locate(label) != made:
            raise KeyProviderError(
                f"key provider {provider.name} does not find the one key that has a label by that label",
                todo="see whether its servers, or a proxy before them, look for keys by the attribute Name",
            )

    async def step(name: str, action: Callable[[], Awaitable[None]]) -> bool:
        begun = time.monotonic()
        message = ""
        try:
            await action()
        except KeyProviderError as error:
            message = str(error)
        milliseconds = (time.monotonic() - begun) * 1000
        trial.steps.append(TrialStep(f"{member}: {name}", not message, message, milliseconds))
        return not message

    if not await step("create", create):
        return trial
    _ = (
        await step("activate", lambda: provider.activate(made[0]))
        and await step("get", read)
        and await step("locate", find)
    )
    if not await step("destroy", lambda: provider.destroy(made[0])):
        trial.left = made[0]
    return trial


async def try_members(name: str, directory: Path, members: Sequence[str]) -> list[Trial]:
    """Try out each server of a kmip provider by itself, all at the same time."""

    async def alone(member: str) -> Trial:
        provider = await asyncio.to_thread(open_provider, "kmip", name, directory, [member])
        try:
            return await try_out(provider, member)
        finally:
            await provider.close()

    return list(await asyncio.gather(*map(alone, members)))
