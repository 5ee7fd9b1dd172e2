"""A real controller over HTTPS, with two agent doubles that have joined it, in a thread beside the test.

For what is synchronous itself: the client and the command line.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import TypeVar

from doubles.agent import FakeAgent, two_hosts
from sealift.api.app import create_app
from sealift.controller.services import open_services
from sealift.demo.ports import free_port
from support.controllers import FAST, make_state
from support.serving import serving

_T = TypeVar("_T")

PACE = dataclasses.replace(FAST, patience_s=30.0)
"""As fast as other tests' controllers, but no host is given up because the machine is busy."""


class Deployment:
    """A controller at ``url`` with the admin token ``token``, and its hosts a and b, whose scripts a test may set."""

    a: FakeAgent
    b: FakeAgent
    token: str
    join_token: str

    def __init__(self, directory: Path, loop: asyncio.AbstractEventLoop) -> None:
        self._directory, self._loop = directory, loop
        self._hosts, self._controller = contextlib.AsyncExitStack(), contextlib.AsyncExitStack()
        self.port = free_port()
        self.state = make_state(directory)

    @property
    def url(self) -> str:
        """Where the controller answers."""
        return f"https://127.0.0.1:{self.port}"

    def up(self) -> None:
        """Start the controller."""
        self._do(self._up())

    def down(self) -> None:
        """Stop the controller; its hosts stay."""
        self._do(self._controller.aclose())

    def make(self) -> None:
        """Join the hosts, and start everything."""
        self._do(self._make())

    def close(self) -> None:
        """End everything."""
        self.down()
        self._do(self._hosts.aclose())

    def _do(self, work: Coroutine[object, object, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _make(self) -> None:
        services = await open_services(self.state, pace=PACE)
        try:
            self.token = (await services.access.new_admin_token("ada")).text()
            join, _ = await services.access.new_join_token(replaces=None, asked_by="ada")
            self.join_token = join.text()
            self.a, self.b = await self._hosts.enter_async_context(two_hosts(services, self._directory))
        finally:
            await services.close()
        await self._up()

    async def _up(self) -> None:
        services = await open_services(self.state, pace=PACE)
        context = services.authority.server_context(services.settings.addresses)
        await self._controller.enter_async_context(serving(create_app(services), context, port=self.port))


@contextlib.contextmanager
def a_deployment(directory: Path) -> Iterator[Deployment]:
    """A deployment in ``directory``, ended whatever happens."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="deployment")
    thread.start()
    try:
        deployment = Deployment(directory, loop)
        try:
            deployment.make()
            yield deployment
        finally:
            deployment.close()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
