"""Looking at a move: nobody waits for what nobody looks at any more."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from doubles.hosts import Fuse, PlayedRelay, PlayedRelayClient, PlayedVm, Qemu, World
from sealift.agent.watch import Watch
from sealift.errors import RelayGone, SealiftError


def watching(world: World) -> tuple[Watch, PlayedRelay, PlayedVm]:
    relay = PlayedRelay("a")
    vm = PlayedVm(Qemu(world, "a", world.config, incoming=False), Fuse())
    client: Any = PlayedRelayClient(relay, Fuse())
    return Watch(vm, client), relay, vm  # type: ignore[arg-type]


def test_a_task_that_looks_and_dies_is_not_waited_for(world: World) -> None:
    async def main() -> None:
        watch, _, vm = watching(world)
        await watch.start()

        async def broken() -> Any:
            raise ZeroDivisionError

        vm.migration = broken  # type: ignore[method-assign]
        try:
            async with asyncio.timeout(5):
                with pytest.raises(RuntimeError, match="defect"):
                    await watch.until(lambda: False)
                with pytest.raises(RuntimeError, match="defect"):
                    await watch.until(lambda: False, 1.0)
        finally:
            await watch.close()

    asyncio.run(main())


def test_whatever_a_relay_says_wrong_breaks_the_link(world: World) -> None:
    async def main() -> None:
        watch, _, _ = watching(world)

        async def refuse(after: int, timeout: float) -> Any:
            raise SealiftError("no such thing")

        watch._relay.wait = refuse  # type: ignore[union-attr, method-assign]
        await watch.start()
        try:
            async with asyncio.timeout(5):
                await watch.until(lambda: watch.broken is not None)
        finally:
            await watch.close()

    asyncio.run(main())


def test_facts_that_came_before_one_looked_are_seen(world: World) -> None:
    async def main() -> None:
        watch, relay, vm = watching(world)
        relay.add("connected")
        relay.add("message", message={"type": "ABORTED", "reason": "it is full"})
        relay.add("broken", slug="peer_silent", what="nothing was heard")
        vm.qemu.status = "active"
        await watch.start()
        try:
            async with asyncio.timeout(5):
                await watch.until(lambda: watch.broken is not None)
            assert watch.connected
            assert watch.messages["ABORTED"]["reason"] == "it is full"
            assert watch.broken is not None
            assert watch.broken.slug == "peer_silent"
            assert watch.info.status == "active"
            assert not await watch.send("READY")
        finally:
            await watch.close()

    asyncio.run(main())


def test_a_move_without_a_relay_is_broken_from_the_start(world: World) -> None:
    vm = PlayedVm(Qemu(world, "a", world.config, incoming=False), Fuse())
    assert isinstance(Watch(vm, None).broken, RelayGone)  # type: ignore[arg-type]
