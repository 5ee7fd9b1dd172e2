"""KEKs between their making and the record that names them: until it is written, nothing else says whose they are.

A row per key says so from before its provider is asked until the transaction that stores the record, or until the key
was destroyed or told of. A row on which nobody works is what an interruption left; ``Keyring.settle`` looks into it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncSession

from sealift.controller.events import EventLog, Happening
from sealift.controller.models import FreshKeyRow


@dataclass
class _Fresh:
    provider: str
    vm_name: str
    key_id: str = ""  # not known yet


@dataclass(frozen=True)
class Interrupted:
    """A key whose making was interrupted, if it was made. ``ours``: in this life of the controller."""

    label: str
    provider: str
    vm_name: str
    ours: bool


class FreshKeys:
    """Fresh keys of one controller, by their labels. Whoever makes one says so before its provider is looked for."""

    def __init__(self, events: EventLog) -> None:
        self._events = events
        self._by_label: dict[str, _Fresh] = {}  # those that somebody works on
        self._written: set[str] = set()  # labels whose rows are of this life

    def begin(self, label: str, provider: str, vm_name: str) -> None:
        """A key of that label is to be made: its provider is in use from now on."""
        self._by_label[label] = _Fresh(provider, vm_name)

    async def write(self, label: str) -> None:
        """Write that down, so that the key is found again whatever happens from now on."""
        fresh = self._by_label[label]
        self._written.add(label)
        async with self._events.transaction() as session:
            session.add(FreshKeyRow(label=label, provider=fresh.provider, vm_name=fresh.vm_name))

    def made(self, label: str, key_id: str) -> None:
        """It was made, and is to be recorded or given up."""
        self._by_label[label].key_id = key_id

    def label_of(self, provider: str, key_id: str) -> str:
        """The label of a key that was made and is neither recorded nor given up; empty for any other."""
        for label, fresh in self._by_label.items():
            if key_id and (fresh.provider, fresh.key_id) == (provider, key_id):
                return label
        return ""

    async def recorded(self, session: AsyncSession, provider: str, key_id: str) -> str:
        """A record names the key when this transaction is committed; its label, to ``forget`` after that."""
        label = self.label_of(provider, key_id)
        await _drop(session, label)
        return label

    def let_go(self, label: str) -> None:
        """Nobody works on it any more. Where its row is still there, it is one whose making was interrupted."""
        self._by_label.pop(label, None)

    def forget(self, label: str) -> None:
        """It is in a record, or settled, and its row is gone."""
        self.let_go(label)
        self._written.discard(label)

    async def settled(self, label: str) -> None:
        """Nothing of it is left at its provider."""
        if label:
            async with self._events.transaction() as session:
                await _drop(session, label)
            self.forget(label)

    async def left_over(self, text: str, *, vm: str | None = None, label: str = "") -> None:
        """Say of a key that it was left unused at its provider; with that it is settled."""
        async with self._events.transaction() as session:
            self._events.add(session, Happening("key.left_over", text, vm=vm))
            await _drop(session, label)
        self.forget(label)

    def vms_of(self, provider: str) -> set[str]:
        """The names of the VMs for which a key is being made at a provider, or was just made."""
        return {fresh.vm_name for fresh in self._by_label.values() if fresh.provider == provider}

    async def interrupted(self) -> Sequence[Interrupted]:
        """Every key whose making was interrupted."""
        async with self._events.reading() as session:
            rows = list(await session.scalars(select(FreshKeyRow)))
            # In the transaction: no record of one that was seen can be stored, and the key let go, before this.
            return [
                Interrupted(row.label, row.provider, row.vm_name, row.label in self._written)
                for row in rows
                if row.label not in self._by_label
            ]

    async def provider_removed(self, session: AsyncSession, provider: str) -> None:
        """Nobody can look for interrupted ones there any more: tell of each in the transaction of the removal."""
        for row in await session.scalars(select(FreshKeyRow).where(FreshKeyRow.provider == provider)):
            if row.label not in self._by_label:
                text = f"{may_be_left(row.label, provider, row.vm_name)}: its making was interrupted"
                self._events.add(session, Happening("key.left_over", text, vm=row.vm_name))
                await session.delete(row)


def may_be_left(label: str, provider: str, vm_name: str) -> str:
    """What is said of a key of which it is not known whether it is still there."""
    return f"a key for VM {vm_name}, label {label}, may have been left unused at key provider {provider}"


async def _drop(session: AsyncSession, label: str) -> None:
    if label:
        await session.execute(delete(FreshKeyRow).where(FreshKeyRow.label == label))
