"""One server of a KMIP key provider: its connections, whether it is well, and when to ask it again after it failed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from sealift.errors import KeyMissing, KeyProviderError, ProviderRefused, ProviderUnreachable
from sealift.keys.kmip_link import Address, Link, connect
from sealift.keys.kmip_trust import load

MAX_LINKS: Final = 8
FIRST_PAUSE_S: Final = 1.0
LONGEST_PAUSE_S: Final = 30.0

_T = TypeVar("_T")


@dataclass(frozen=True)
class Pace:
    """How long a member is left alone: not at all while it is well, and twice as long after each failure. Pure."""

    pause_s: float = 0.0
    until: float = 0.0
    """On the clock whose time ``failed`` is given."""

    def failed(self, now: float) -> Pace:
        """After a failure at ``now``; one of several at about the same time counts once."""
        if self.rests(now):
            return Pace(self.pause_s, now + self.pause_s)
        pause = min(max(FIRST_PAUSE_S, 2 * self.pause_s), LONGEST_PAUSE_S)
        return Pace(pause, now + pause)

    def rests(self, now: float) -> bool:
        """Whether it is to be left alone at ``now``."""
        return now < self.until


class MemberFailed(Exception):
    """A member could not be asked, or did not answer as it must; ``why`` says how. Never leaves this package."""

    def __init__(self, why: KeyProviderError) -> None:
        super().__init__(why.what)
        self.why = why


class Member:
    """One server; keeps its connections open, at most ``MAX_LINKS``."""

    def __init__(self, address: Address, directory: Path, *, connect_s: float, answer_s: float) -> None:
        self.address = address
        self.pace = Pace()
        self.message = ""
        """What was wrong with it when it was asked last; empty when nothing was."""
        self._directory = directory
        self._connect_s = connect_s
        self._answer_s = answer_s
        self._idle: list[Link] = []
        self._slots = asyncio.Semaphore(MAX_LINKS)
        self._closed = False

    async def run(self, step: Callable[[Link], Awaitable[_T]]) -> _T:
        """Run ``step`` on a connection to this server.

        Where a kept connection turns out to have been closed, ``step`` is run once more on a new one: it must be such
        that this does no harm. KeyMissing and ProviderRefused of ``step`` are the server's answer and come through;
        everything else is raised as MemberFailed.
        """
        try:
            async with self._slots:
                result = await self._run(step)
        except MemberFailed as failed:
            self.pace = self.pace.failed(asyncio.get_running_loop().time())
            self.message = failed.why.what
            raise
        except (KeyMissing, ProviderRefused):
            self._is_well()
            raise
        self._is_well()
        return result

    async def close(self) -> None:
        """Close the connections; those in use are closed after it."""
        self._closed = True
        while self._idle:
            await self._idle.pop().close()

    async def _run(self, step: Callable[[Link], Awaitable[_T]]) -> _T:
        link = self._take()
        if link is not None:
            try:
                return await self._step(link, step)
            except MemberFailed as failed:
                if link.silent or not isinstance(failed.why, ProviderUnreachable):
                    raise
        try:
            link = await connect(
                self.address, load(self._directory), connect_s=self._connect_s, answer_s=self._answer_s
            )
        except KeyProviderError as why:
            raise MemberFailed(why) from None
        return await self._step(link, step)

    async def _step(self, link: Link, step: Callable[[Link], Awaitable[_T]]) -> _T:
        try:
            return await step(link)
        except (KeyMissing, ProviderRefused):
            raise
        except KeyProviderError as why:
            raise MemberFailed(why) from None
        finally:
            if link.usable and not self._closed:
                self._idle.append(link)
            else:
                await link.close()

    def _take(self) -> Link | None:
        """The connection that was used last, so that those that are not needed grow old."""
        while self._idle:
            link = self._idle.pop()
            if link.usable:
                return link
        return None

    def _is_well(self) -> None:
        self.pace = Pace()
        self.message = ""
