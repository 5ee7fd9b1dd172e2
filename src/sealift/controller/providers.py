"""The key providers of one controller, by name."""

from __future__ import annotations

import asyncio
from pathlib import Path

from sealift.controller.events import EventLog
from sealift.keys.provider import KeyProvider


class Providers:
    """The key providers of one controller. What they keep secret lies below ``directory``, one directory each."""

    def __init__(self, events: EventLog, directory: Path) -> None:
        self._events, self._directory = events, directory
        self.changed = asyncio.Event()
        """Set, and replaced by a new one, whenever keys may be had that could not be had before, or no more."""

    async def open(self, name: str) -> KeyProvider:
        """The provider of that name; raises NotFound."""
        raise NotImplementedError

    async def require_usable(self, name: str) -> None:
        """Raise NotFound or ProviderNotExported unless new keys may be made there."""
        raise NotImplementedError

    async def default(self) -> str:
        """The name of the default provider; raises NotFound when there is none."""
        raise NotImplementedError

    async def close(self) -> None:
        """Close connections."""
