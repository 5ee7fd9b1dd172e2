"""Who calls, and the parts of the controller that a route asks."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from sealift.controller.services import Services

_bearer = HTTPBearer(auto_error=False, description="An admin token: slft1.admin....")


def services(request: Request) -> Services:
    """The controller behind this application."""
    found = request.app.state.services
    assert isinstance(found, Services)
    return found


Controller = Annotated[Services, Depends(services)]


async def caller(
    controller: Controller, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> str:
    """The name behind the request's token; raises NotAuthenticated."""
    return await controller.access.who(credentials.credentials if credentials else "")


Caller = Annotated[str, Depends(caller)]
