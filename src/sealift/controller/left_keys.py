"""A key that was made, or perhaps was, and came to no use is destroyed by its label, if it is certainly the one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from sealift.keys.provider import KeyProvider

UsedKeys = Callable[[str], Awaitable[frozenset[str]]]
"""The ids of a provider's keys that are in use."""


async def destroy_by_label(provider: KeyProvider, label: str, used: UsedKeys) -> str:
    """Destroy the key of ``label``; why that was not done, empty when nothing of it is left. Raises KeyProviderError.

    A label is one key's. More than one are not destroyed, nor one that is in use: whoever looked for the label may
    have answered with other keys.
    """
    found = await provider.locate(label)
    why = not_ours(found, await used(provider.name))
    if not why:
        for key_id in found:
            await provider.destroy(key_id)
    return why


def not_ours(found: Sequence[str], used: frozenset[str]) -> str:
    """Why what was found for the label of one key must not be destroyed; empty when it may be."""
    in_use = used.intersection(found)
    if in_use:
        return f"key {min(in_use)}, which is in use, was found for that label, and nothing was destroyed"
    if len(found) > 1:
        return f"{len(found)} keys were found for that label, and none was destroyed"
    return ""
