"""A key provider is tried out with a key that is made for it, and thrown away."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sealift.controller.left_keys import UsedKeys, destroy_by_label
from sealift.errors import KeyProviderError
from sealift.keys.kinds import open_provider
from sealift.keys.provider import KEK_BYTES, KeyProvider

LABEL = "sealift-test-"
"""What the labels of throw-away keys begin with, so that one that was left can be told from a VM's."""

Left = Callable[[str], Awaitable[None]]
"""Told of a key that was left, in a sentence."""


@dataclass(frozen=True)
class TrialStep:
    """One thing that was tried, and how long it took in milliseconds; ``message`` says why it failed."""

    name: str
    ok: bool
    message: str
    ms: float


async def try_out(provider: KeyProvider, member: str, *, used: UsedKeys, left: Left) -> list[TrialStep]:
    """Make, activate, read, find and destroy a key at ``provider``; steps are named after ``member``.

    What was made, or perhaps was, is destroyed whatever failed in between, or whoever waited for this was cancelled;
    where that fails, ``left`` is told.
    """
    steps: list[TrialStep] = []
    made: list[str] = []
    failure: KeyProviderError | None = None
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
        nonlocal failure
        begun = time.monotonic()
        failure = None
        try:
            await action()
        except KeyProviderError as error:
            failure = error
        milliseconds = (time.monotonic() - begun) * 1000
        steps.append(TrialStep(f"{member}: {name}", failure is None, _message(failure, member), milliseconds))
        return failure is None

    async def clear() -> str:
        """Destroy the key; what is, or may be, left of it in words."""
        what = f"key {made[0]} of a test was" if made else f"a key of a test, label {label}, was perhaps"
        why = ""
        try:
            if made:
                await provider.destroy(made[0])
            else:
                why = await destroy_by_label(provider, label, used)
        except KeyProviderError as error:
            why = error.what
        if not why:
            return ""
        await left(f"{what} left unused at key provider {provider.name}: {why}")
        return f"{what} left there"

    try:
        if await step("create", create):
            _ = (
                await step("activate", lambda: provider.activate(made[0]))
                and await step("get", read)
                and await step("locate", find)
            )
            await step("destroy", lambda: provider.destroy(made[0]))
    except BaseException:
        await clear()
        raise
    if failure is not None and not failure.nothing_asked and (said := await clear()):
        steps[-1] = replace(steps[-1], message=f"{steps[-1].message}; {said}")
    return steps


def _message(failure: KeyProviderError | None, member: str) -> str:
    """Why a step failed, without what its name says."""
    if failure is None:
        return ""
    reason = failure.reason.removeprefix(f"{member}: ")
    return f"{reason} ({failure.todo})" if failure.todo else reason


async def try_members(
    name: str, directory: Path, members: Sequence[str], *, used: UsedKeys, left: Left
) -> list[TrialStep]:
    """Try out each server of a kmip provider by itself, all at the same time."""

    async def alone(member: str) -> list[TrialStep]:
        provider = await asyncio.to_thread(open_provider, "kmip", name, directory, [member])
        try:
            return await try_out(provider, member, used=used, left=left)
        finally:
            await provider.close()

    return [step for steps in await asyncio.gather(*map(alone, members)) for step in steps]
