"""A key provider is tried out with a key that is made for it, and thrown away."""

from __future__ import annotations

import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from sealift.errors import KeyProviderError
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
    """Make, activate, read and destroy a key at ``provider``; steps are named after ``member``. Raises nothing.

    What was made is destroyed whatever failed in between.
    """
    trial = Trial()
    made: list[str] = []

    async def create() -> None:
        made.append(await provider.create(LABEL + secrets.token_hex(8)))

    async def read() -> None:
        key = await provider.get(made[0])
        try:
            if len(key.reveal()) != KEK_BYTES:
                raise KeyProviderError(f"key provider {provider.name} gave a key that is not {KEK_BYTES} bytes long")
        finally:
            key.wipe()

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
    _ = await step("activate", lambda: provider.activate(made[0])) and await step("get", read)
    if not await step("destroy", lambda: provider.destroy(made[0])):
        trial.left = made[0]
    return trial
