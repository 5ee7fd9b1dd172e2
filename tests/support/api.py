"""A client of the API: it trusts only the controllers' authority, and looks at every answer's status."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass

import httpx2

from sealift.api.app import create_app
from sealift.api.schemas import Problem
from sealift.controller.services import Services
from support.serving import serving


@dataclass
class ApiClient:
    """An admin's client of one controller's API."""

    services: Services
    client: httpx2.AsyncClient

    async def call(self, method: str, path: str, body: object = None, *, status: int = 200) -> httpx2.Response:
        """A request that ends with ``status``."""
        response = await self.client.request(method, f"/api/v1/{path}", json=body)
        assert response.status_code == status, response.text
        if status >= 400:
            assert response.headers["content-type"] == "application/problem+json"
        return response

    async def problem(self, method: str, path: str, body: object = None, *, status: int) -> Problem:
        """A request that is refused."""
        return Problem.model_validate_json((await self.call(method, path, body, status=status)).content)


@contextlib.asynccontextmanager
async def an_admin_of(services: Services) -> AsyncIterator[httpx2.AsyncClient]:
    """Serve the API of a controller, which this starts and closes; yields a client with an admin's token."""
    context = services.authority.server_context(services.settings.addresses)
    trust = ssl.create_default_context(cadata=services.authority.controllers.pem)
    token = await services.access.new_admin_token("ann")
    headers = {"authorization": f"Bearer {token.text()}"}
    async with serving(create_app(services), context) as port:
        url = f"https://127.0.0.1:{port}"
        client = httpx2.AsyncClient(base_url=url, verify=trust, headers=headers, trust_env=False, timeout=60)
        async with client:
            yield client
