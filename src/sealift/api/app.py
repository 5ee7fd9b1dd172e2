"""The API as an ASGI application."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sealift import __version__
from sealift.api.problems import install, problem
from sealift.api.routes import conversions, hosts, key_providers, migrations, settings, vms
from sealift.controller.services import Services
from sealift.errors import InvalidInput

MAX_BODY_BYTES = 1 << 20
"""No request of ours comes near; the door of ``join`` is open to everyone."""


class BodyLimit:
    """Refuses a body above the limit, before it is in memory."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        taken = 0

        async def limited() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > MAX_BODY_BYTES:
                raise _TooLarge
            return message

        try:
            await self._app(scope, limited, send)
        except _TooLarge:
            await problem(InvalidInput(f"the request is larger than {MAX_BODY_BYTES} bytes"))(scope, receive, send)


class _TooLarge(BaseException):
    """Passes through every handler on its way to ``BodyLimit``."""


def create_app(services: Services) -> FastAPI:
    """The application over a controller, which it starts and closes with its own life."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        await services.start()
        try:
            yield
        finally:
            await services.close()

    app = FastAPI(
        title="Sealift",
        version=__version__,
        description="Moves running virtual machines between QEMU/KVM hosts, every byte sealed under a one-time key.",
        openapi_url="/api/openapi.json",
        docs_url=None,  # FastAPI's pages load scripts from elsewhere
        redoc_url=None,
        lifespan=life,
    )
    app.state.services = services
    for routes in (hosts, vms, conversions, migrations, key_providers, settings):
        app.include_router(routes.router)
    install(app)
    app.add_middleware(BodyLimit)
    return app
