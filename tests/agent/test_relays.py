"""Relays as an agent starts them: one is ready before it is needed, and nothing depends on it."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from doubles.hosts import World, secret
from sealift.agent.journal import MoveRow
from sealift.agent.relays import Relays
from sealift.agent.settings import AgentSettings
from sealift.channel.relay_client import RelayClient
from sealift.domain.move import MoveState, MoveStatus, Role
from sealift.hypervisor.process import ProcessRef

LIMIT_S = 60.0


@pytest.fixture
def settings() -> Iterator[AgentSettings]:
    """Short paths, because UNIX sockets lie below them."""
    directory = Path(tempfile.mkdtemp(prefix="slt-"))
    made = AgentSettings("b", directory, run_directory=directory)
    made.doors.mkdir()
    yield made
    shutil.rmtree(directory)


def play(relays: Relays, scene: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        try:
            async with asyncio.timeout(LIMIT_S):
                await scene()
        finally:
            relays.close()

    asyncio.run(main())


def a_move(world: World, settings: AgentSettings) -> MoveRow:
    order = world.order()
    directory = settings.run_directory / "move"
    directory.mkdir(mode=0o700)
    return MoveRow(order, MoveStatus(order.attempt, Role.TARGET, MoveState.PREPARING), directory)


async def carried_out(relays: Relays, row: MoveRow) -> None:
    """A relay for a move is there and ends when it is told to."""
    client: RelayClient = await relays.start(row, secret(), os.getpid())
    assert (await client.status())["state"] == "listening"
    assert (relays._settings.relay_logs / f"{row.order.attempt}-target.log").exists()
    await client.close()


def test_the_one_that_was_kept_carries_out_the_next_move(world: World, settings: AgentSettings) -> None:
    relays = Relays(settings)

    async def scene() -> None:
        relays.keep_one()
        assert relays._spare is not None
        kept = ProcessRef.of(relays._spare.pid)
        await carried_out(relays, a_move(world, settings))
        assert await kept.wait_exit(LIMIT_S), "it was another one"
        relays.prepare()
        assert relays._spare is not None
        assert relays._spare.pid != kept.pid

    play(relays, scene)


def test_one_that_died_in_waiting_costs_nothing_but_time(world: World, settings: AgentSettings) -> None:
    relays = Relays(settings)

    async def scene() -> None:
        relays.keep_one()
        assert relays._spare is not None
        kept = ProcessRef.of(relays._spare.pid)
        kept.kill(signal.SIGKILL)
        assert await kept.wait_exit(LIMIT_S)
        await carried_out(relays, a_move(world, settings))

    play(relays, scene)


def test_one_that_is_not_needed_ends_without_a_word(settings: AgentSettings) -> None:
    """Its end of the socket is all it has of the agent; it closes however the agent ends."""
    relays = Relays(settings)

    async def scene() -> None:
        relays.keep_one()
        assert relays._spare is not None
        kept = ProcessRef.of(relays._spare.pid)
        relays.close()
        assert await kept.wait_exit(LIMIT_S)
        assert (settings.state_directory / "next-relay.log").read_text() == ""
        relays.prepare()
        assert relays._spare is None

    play(relays, scene)
