"""Work that may hang, in a thread of its own.

What touches a datastore takes as long as the datastore does, which may be for ever (NFS). The threads that asyncio
keeps for ``to_thread`` are few, and others need them at once: a migration's switchover writes its commit records there,
while the guest stands still. And a process cannot end before they do.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def in_own_thread(act: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What ``act`` answers or raises. Cancelled, nobody waits for it any more; it goes on, or ends with the process."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()
    context = contextvars.copy_context()

    def answer(result: T) -> None:
        if not done.done():
            done.set_result(result)

    def fail(error: BaseException) -> None:
        if not done.done():
            done.set_exception(error)

    def work() -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile: nobody waits
            try:
                result = context.run(act, *args, **kwargs)
            except BaseException as error:
                loop.call_soon_threadsafe(fail, error)
            else:
                loop.call_soon_threadsafe(answer, result)

    threading.Thread(target=work, name=f"own-{getattr(act, '__name__', 'work')}", daemon=True).start()
    return await done
