"""What a move looks at: QEMU's migration, the relay's events, and what people and controllers have asked.

Everything is level, not edge: a fact once seen stays true, so a move that begins to look late, after a restart of the
agent, sees the same as one that looked all the time. ``until`` waits for a condition over these facts.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any

import structlog

from sealift.agent.link_history import LinkHistory
from sealift.channel.relay_client import RelayClient
from sealift.channel.relay_spec import Phase
from sealift.domain.move import Answer
from sealift.errors import ChannelError, Conflict, HypervisorError, QemuGone, RelayGone, SealiftError, from_slug
from sealift.hypervisor.base import RECONNECTED, MigrationInfo, QmpEvent, Vm

log = structlog.get_logger()

CONTROL = 0
_POLL_S = 0.2
_WAIT_S = 30.0
_TELLING = frozenset({"MIGRATION", "STOP", "RESUME", "SHUTDOWN", RECONNECTED})


class Watch:
    """The facts of one side of one move. Owns two tasks from ``start`` to ``close``; neither changes anything."""

    def __init__(self, vm: Vm, relay: RelayClient | None) -> None:
        self._vm, self._relay = vm, relay
        self._changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.info = MigrationInfo("none")
        self.runstate = ""
        self.qemu_gone = False
        self.connected = False
        self.broken: ChannelError | None = None if relay else RelayGone("the relay of this move has ended")
        self.link = LinkHistory()
        self.messages: dict[str, Mapping[str, Any]] = {}
        self.relay_status: Mapping[str, Any] = {}
        self.cancel_asked = False
        self.abort_asked = False
        self.commit_asked = False
        self.answer: Answer | None = None

    async def start(self) -> None:
        """Look once, then go on looking."""
        events = self._vm.events()
        await self.look()
        self._go(self._watch_events(events))
        self._go(self._poll())
        if self._relay is not None:
            self._go(self._watch_relay(self._relay))

    def _go(self, looking: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(looking)
        task.add_done_callback(lambda _: self._changed.set())
        self._tasks.append(task)

    async def close(self) -> None:
        """Stop looking."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def touch(self) -> None:
        """Say that a fact was set from outside."""
        self._changed.set()

    async def until(self, condition: Callable[[], bool], timeout: float | None = None) -> bool:
        """Wait until ``condition`` holds, at most ``timeout`` seconds; whether it does.

        Raises what ended one of the tasks that look, which is a defect: nobody may wait for what nobody looks at.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while not condition():
                    for task in self._tasks:
                        if task.done() and not task.cancelled() and (defect := task.exception()) is not None:
                            raise RuntimeError("a defect in a task that looks") from defect
                    self._changed.clear()
                    await self._changed.wait()
        return condition()

    async def send(self, kind: str, **members: object) -> bool:
        """Send a control message to the other host; False when the link is gone."""
        if self._relay is None or self.broken is not None:
            return False
        try:
            await self._relay.send({"type": kind, **members})
        except ChannelError as error:
            self._break(error)
            return False
        except Conflict as error:  # its channels are closed, and its word on why is still under way to us
            self._break(ChannelError(error.what))
            return False
        return True

    async def enter(self, phase: Phase) -> None:
        """Tell the relay how far the move is; one that is gone need not know."""
        if self._relay is not None:
            with contextlib.suppress(ChannelError):
                await self._relay.enter(phase)

    @property
    def unheard(self) -> bool:
        """Whether the other host's messages cannot come now."""
        return self.broken is not None or CONTROL in self.link.interrupted

    async def look_at_relay(self) -> None:
        """Ask the relay for its counters."""
        if self._relay is not None:
            with contextlib.suppress(SealiftError):  # a relay that is gone keeps its last counters here
                self.relay_status = await self._relay.status()

    def _break(self, error: ChannelError) -> None:
        if self.broken is None:
            self.broken = error
        self._changed.set()

    async def look(self) -> None:
        """Ask QEMU now."""
        try:
            self.info = await self._vm.migration()
            self.runstate = await self._vm.status()
        except QemuGone:
            self.qemu_gone = True
        except HypervisorError:
            pass  # no answer this time: what was last seen stands, and the next look is near
        self._changed.set()

    async def _poll(self) -> None:
        while not self.qemu_gone:
            await asyncio.sleep(_POLL_S)
            await self.look()
            if not isinstance(self.broken, RelayGone):  # one that does not answer is not asked again and again
                await self.look_at_relay()

    async def _watch_events(self, events: AsyncIterator[QmpEvent]) -> None:
        async for event in events:
            if event.name in _TELLING:
                await self.look()
        await self.look()

    async def _watch_relay(self, relay: RelayClient) -> None:
        seen = 0
        while self.broken is None:
            try:
                events = await relay.wait(after=seen, timeout=_WAIT_S)
            except SealiftError as error:
                self._break(error if isinstance(error, ChannelError) else ChannelError(error.what))
                return
            for event in events:
                seen = max(seen, int(event["seq"]))
                self._take(event)

    def _take(self, event: Mapping[str, Any]) -> None:
        match event["type"]:
            case "connected":
                self.connected = True
            case "message":
                message = event["message"]
                self.messages[str(message.get("type"))] = message
            case "interrupted":
                self.link.interrupt(int(event["channel"]), str(event["slug"]), str(event["what"]))
                log.info("relay.interrupted", channel=event["channel"], slug=event["slug"], what=event["what"])
            case "resumed":
                self.link.resume(int(event["channel"]), int(event["outage_ms"]))
                log.info("relay.resumed", channel=event["channel"], outage_ms=event["outage_ms"])
            case "broken":
                error = from_slug(str(event["slug"]), str(event["what"]))
                self._break(error if isinstance(error, ChannelError) else ChannelError(error.what))
        self._changed.set()
