"""What the agent reads of a request by hand: the fence of an order, and a body with keys in it."""

from __future__ import annotations

import re
from uuid import UUID

from fastapi import Request

from sealift.agent.journal import Journal
from sealift.errors import InvalidInput

FENCE = "Sealift-Fence"


def check_fence(journal: Journal, vm: UUID, request: Request) -> None:
    """Raises StaleFence for an order from the past, InvalidInput for one without a valid fence."""
    text = request.headers.get(FENCE, "")
    if not re.fullmatch("[0-9]{1,18}", text):
        raise InvalidInput(f"the order has no valid {FENCE} header")
    journal.check_fence(vm, int(text))


async def raw_body(request: Request, most: int) -> bytes:
    """The body, which no parser has seen; raises InvalidInput when it has more than ``most`` bytes."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise InvalidInput("the order is too long")
    return bytes(body)
