"""Work that hangs keeps no other work waiting, nor the end of the program."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest

from sealift.hypervisor.own_thread import in_own_thread

MANY = 64  # more than the threads that asyncio keeps
LIMIT_S = 10.0


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """What everything hangs on, until the test is over."""
    event = threading.Event()
    yield event
    event.set()


def test_many_that_hang_keep_nobody_waiting(gate: threading.Event) -> None:
    async def main() -> list[bool]:
        hung = [asyncio.create_task(in_own_thread(gate.wait)) for _ in range(MANY)]
        async with asyncio.timeout(LIMIT_S):
            assert await in_own_thread(divmod, 7, 3) == (2, 1)
            assert await asyncio.to_thread(divmod, 7, 3) == (2, 1)
        gate.set()
        return await asyncio.gather(*hung)

    assert asyncio.run(main()) == [True] * MANY


def test_a_program_ends_while_something_hangs(gate: threading.Event) -> None:
    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await in_own_thread(gate.wait, LIMIT_S)

    began = time.monotonic()
    asyncio.run(main())
    assert time.monotonic() - began < LIMIT_S / 2


def test_what_is_raised_arrives() -> None:
    with pytest.raises(ZeroDivisionError):
        asyncio.run(in_own_thread(divmod, 1, 0))
