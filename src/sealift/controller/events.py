"""What happened, in order: an append-only table, and a way to wait for the next row.

An event is added inside the transaction that makes it true, so nobody ever reads of something that was rolled back;
writers are serialised by the database, so sequence numbers become visible in order.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from sealift.controller.models import EventRow
from sealift.controller.store import Store

PAGE = 500
"""Most events in one answer; ask again after the last one's number."""


@dataclass(frozen=True)
class Happening:
    """An event before it has a number and a time."""

    type: str
    text: str
    host: str | None = None
    vm: str | None = None
    migration: UUID | None = None
    state: str | None = None
    slug: str | None = None


class EventLog:
    """The events of one controller."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._changed = asyncio.Event()

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncSession]:
        """A transaction of the store after which those who wait for events look again."""
        async with self._store.transaction() as session:
            yield session
        self._changed.set()
        self._changed = asyncio.Event()

    def reading(self) -> AbstractAsyncContextManager[AsyncSession]:
        """A transaction that only reads, and wakes nobody."""
        return self._store.transaction()

    def add(self, session: AsyncSession, happening: Happening) -> None:
        """Add an event to the transaction of ``session``, which must come from ``transaction`` above."""
        session.add(EventRow(at=time.time(), **vars(happening)))

    async def after(self, seq: int) -> list[EventRow]:
        """Events with a higher number, oldest first, at most ``PAGE``."""
        async with self._store.transaction() as session:
            found = await session.scalars(select(EventRow).where(EventRow.seq > seq).order_by(EventRow.seq).limit(PAGE))
            return list(found)

    async def last(self) -> int:
        """The highest number so far; 0 when nothing has happened."""
        async with self._store.transaction() as session:
            return (await session.scalar(select(func.max(EventRow.seq)))) or 0

    async def follow(self, seq: int, *, idle_s: float) -> AsyncIterator[list[EventRow]]:
        """Events with a higher number as they come, for ever; an empty list after ``idle_s`` without one."""
        while True:
            changed = self._changed  # taken before the look, so that nothing slips in between
            rows = await self.after(seq)
            if not rows:
                try:
                    async with asyncio.timeout(idle_s):
                        await changed.wait()
                except TimeoutError:
                    yield []
                continue
            yield rows
            seq = rows[-1].seq
