"""A real uvicorn over TLS on a port of its own, in the test's event loop, stopped whatever happens."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Iterator

import uvicorn
from starlette.types import ASGIApp


class _Quiet(uvicorn.Server):
    """Leaves the test's signal handlers alone, and stops at once."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.stop = asyncio.Event()

    async def main_loop(self) -> None:
        """Until ``stop``; uvicorn's own loop looks at a flag ten times a second."""
        await self.on_tick(0)
        await self.stop.wait()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def serving(app: ASGIApp, context: ssl.SSLContext, *, port: int = 0) -> AsyncIterator[int]:
    """Serve ``app`` on loopback; yields the port."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", port))
    config = uvicorn.Config(
        app,
        ssl_context_factory=lambda _config, _default: context,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=1,
        ws="none",
    )
    server = _Quiet(config)
    task = asyncio.create_task(server.serve(sockets=[sock]))
    try:
        while not server.started:
            if task.done():
                task.result()
                raise RuntimeError("the server ended before it had started")
            await asyncio.sleep(0.005)
        yield sock.getsockname()[1]
    finally:
        for connection in list(server.server_state.connections):
            connection.transport.abort()  # idle connections of clients would hold it up
        await asyncio.sleep(0)
        server.should_exit = True
        server.stop.set()
        await task
        sock.close()
