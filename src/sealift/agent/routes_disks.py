"""The agent's interface: disks, that is what they are, markers beside them, and conversions of them."""

from __future__ import annotations

import asyncio
from typing import Literal
from uuid import UUID

from fastapi import FastAPI, Request
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from sealift.agent.agent import Agent
from sealift.agent.requests import raw_body
from sealift.domain.conversion import ConversionOrder, ConversionStatus, DiskFacts
from sealift.domain.deks import MAX_FRAME_BYTES, decode_frame, wipe
from sealift.errors import InvalidInput
from sealift.hypervisor import disks
from sealift.hypervisor.own_thread import in_own_thread

_ORDER = TypeAdapter(ConversionOrder)
_MOST_DISKS = 64


class MarkerPath(BaseModel):
    """A disk's or a marker's path."""

    path: str


class Image(BaseModel):
    """An image to look at."""

    path: str = Field(max_length=4095, pattern=r"^/[^\x00-\x1f,]*$")
    format: Literal["qcow2", "raw"]


class Look(BaseModel):
    """Images to look at."""

    disks: list[Image] = Field(max_length=_MOST_DISKS)


def add_disks(app: FastAPI, agent: Agent) -> None:
    """What a plan asks of disks, and the proof that a datastore is shared."""

    @app.post("/v1/disks/look")
    async def look(order: Look) -> list[DiskFacts]:
        return await asyncio.gather(*(agent.images.look(disk.path, disk.format) for disk in order.disks))

    @app.post("/v1/markers")
    async def write(disk: MarkerPath) -> dict[str, str]:
        path, content = await in_own_thread(disks.write_marker, disk.path)
        return {"path": path, "content": content}

    @app.post("/v1/markers/read")
    async def read(marker: MarkerPath) -> dict[str, str]:
        return {"content": await in_own_thread(disks.read_marker, marker.path)}

    @app.post("/v1/markers/remove", status_code=204)
    async def remove(marker: MarkerPath) -> None:
        await in_own_thread(disks.remove_marker, marker.path)


def add_conversions(app: FastAPI, agent: Agent) -> None:
    """Orders to encrypt, decrypt and rekey; each carries its fence inside, as an order to move does."""
    conversions = agent.conversions

    @app.put("/v1/conversions/{conversion}")
    async def take(conversion: UUID, request: Request) -> ConversionStatus:
        public, deks = decode_frame(await raw_body(request, MAX_FRAME_BYTES))
        try:
            order = _read_order(public)
            if order.id != conversion:
                raise InvalidInput("the order's path and content name different conversions")
            return await conversions.take(order, deks)
        finally:
            wipe(deks)

    @app.get("/v1/conversions/{conversion}")
    async def status(conversion: UUID) -> ConversionStatus:
        return conversions.status(conversion)

    @app.post("/v1/conversions/{conversion}/cancel")
    async def cancel(conversion: UUID) -> ConversionStatus:
        return await conversions.cancel(conversion)

    @app.post("/v1/conversions/{conversion}/forget", status_code=204)
    async def forget(conversion: UUID) -> None:
        await conversions.forget(conversion)


def _read_order(public: bytes) -> ConversionOrder:
    bad = InvalidInput("the conversion order is malformed", todo="controller and agent must be of matching versions")
    try:
        order = _ORDER.validate_json(public)
    except (ValidationError, InvalidInput):
        raise bad from None  # the cause would quote the input
    if not 0 <= order.fence < 10**18:
        raise bad
    return order
