"""KEKs between their making and the record that names them: until it is written, nothing else says whose they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from sealift.controller.models import ConversionRow


@dataclass
class _Fresh:
    provider: str
    vm_name: str
    key_id: str = ""  # not known yet


class FreshKeys:
    """Fresh keys of one controller, by their labels. Whoever makes one says so before its provider is looked for."""

    def __init__(self) -> None:
        self._by_label: dict[str, _Fresh] = {}

    def begin(self, label: str, provider: str, vm_name: str) -> None:
        """A key of that label is about to be made."""
        self._by_label[label] = _Fresh(provider, vm_name)

    def made(self, label: str, key_id: str) -> None:
        """It was made, and is to be recorded or abandoned."""
        self._by_label[label].key_id = key_id

    def drop(self, label: str) -> None:
        """It was not made."""
        self._by_label.pop(label, None)

    def abandon(self, provider: str, key_id: str) -> None:
        """It came to no use."""
        self._keep(lambda fresh: (fresh.provider, fresh.key_id) != (provider, key_id))

    async def forget_recorded(self, session: AsyncSession) -> None:
        """Forget those that a conversion's record names, whatever became of it."""
        ids = {fresh.key_id for fresh in self._by_label.values() if fresh.key_id}
        if not ids:
            return
        found = await session.execute(
            select(ConversionRow.provider, ConversionRow.key_id).where(ConversionRow.key_id.in_(ids))
        )
        recorded = {(provider, key_id) for provider, key_id in found}
        self._keep(lambda fresh: (fresh.provider, fresh.key_id) not in recorded)

    def vms_of(self, provider: str) -> set[str]:
        """The names of the VMs for which a key is being made at a provider, or was just made."""
        return {fresh.vm_name for fresh in self._by_label.values() if fresh.provider == provider}

    def _keep(self, wanted: Callable[[_Fresh], bool]) -> None:
        self._by_label = {label: fresh for label, fresh in self._by_label.items() if wanted(fresh)}
