"""Of an agent without QEMU: the keys it holds, configuration files, disks, and conversions as a test writes them.

Keys are plain bytes here, so that a test can look for them where they must not be.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import UUID

from fastapi import FastAPI, Request
from pydantic import BaseModel, TypeAdapter

from sealift.domain.conversion import (
    CONVERSION_FINAL,
    ConversionOrder,
    ConversionState,
    ConversionStatus,
    DiskFacts,
)
from sealift.domain.deks import Deks, decode_frame, decode_keys
from sealift.domain.move import MoveOrder
from sealift.domain.vm import VmConfig, VmState, VmStatus
from sealift.errors import Conflict, KeysNotHeld, NotFound, SealiftError, VmTampered
from sealift.keys import bundle

ConversionScript = Callable[[ConversionOrder], list[dict[str, object]]]

C = ConversionState
_ORDER = TypeAdapter(ConversionOrder)


class Lost(Exception):
    """The answer gets lost on its way, or the order did."""


def straight(order: ConversionOrder) -> list[dict[str, object]]:
    """A conversion for which all goes well."""
    return [
        {"state": C.COPYING, "done_bytes": 400, "total_bytes": 1000},
        {"state": C.VERIFYING, "done_bytes": 1000, "total_bytes": 1000},
        {"state": C.SWAPPING},
        {"state": C.DONE},
    ]


def failing(state: ConversionState = C.FAILED, **facts: object) -> ConversionScript:
    """A conversion that ends with the old images in place."""
    said = {"error_slug": "datastore_full", "error": "there is no room", "todo": "make room"}
    return lambda order: [{"state": C.COPYING, "total_bytes": 1000}, {"state": state, **said, **facts}]


def stuck(state: ConversionState = C.COPYING) -> ConversionScript:
    """A conversion that stays in one state."""
    return lambda order: [{"state": state, "done_bytes": 300, "total_bytes": 1000}]


@dataclass
class FakeConversion:
    """One conversion: each time the controller looks, the next line of the script becomes true; the last one stays."""

    order: ConversionOrder
    keys: dict[UUID, bytes]
    status: ConversionStatus
    script: list[dict[str, object]]


class _File(BaseModel):
    file: str


class _Held(BaseModel):
    vm: UUID
    deks: list[UUID]


class _Image(BaseModel):
    path: str
    format: str


class _Look(BaseModel):
    disks: list[_Image]


@dataclass
class FakeVault:
    """See the module.

    ``images`` are what it says of disks, by path; one that is not in there is a raw image of 1 GiB with room for more.
    An order named in ``drop`` does not arrive, one in ``lose`` does, and its answer gets lost.
    """

    held: dict[UUID, dict[UUID, bytes]] = field(default_factory=dict)
    files: dict[UUID, bytes] = field(default_factory=dict)
    newest: dict[UUID, int] = field(default_factory=dict)
    images: dict[str, DiskFacts] = field(default_factory=dict)
    conversions: dict[UUID, FakeConversion] = field(default_factory=dict)
    ended_before: set[UUID] = field(default_factory=set)
    made_by_conversion: dict[UUID, bool] = field(default_factory=dict)
    script: ConversionScript = straight
    refuse: SealiftError | None = None
    drop: set[str] = field(default_factory=set)
    lose: set[str] = field(default_factory=set)
    orders: list[tuple[ConversionOrder, dict[UUID, bytes]]] = field(default_factory=list)
    came_with_orders: list[dict[UUID, bytes]] = field(default_factory=list)
    handed_out: list[UUID] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    looked: asyncio.Event = field(default_factory=asyncio.Event)

    # What happens on the way

    def about_to(self, what: str) -> None:
        """An order is here, or was lost."""
        if what in self.drop:
            raise Lost

    def answer(self, what: str) -> None:
        """Its answer leaves, or is lost."""
        if what in self.lose:
            raise Lost

    # Keys and files

    def restart(self) -> None:
        """The agent is another process now: no keys, and nothing half done."""
        self.held.clear()
        for each in self.conversions.values():
            if each.status.state in (C.COPYING, C.VERIFYING):
                each.script = []
                each.status = replace(
                    each.status, state=C.FAILED, error_slug="conversion_failed", error="the agent was restarted"
                )

    async def until(self, done: Callable[[], bool]) -> None:
        """Wait until ``done`` holds; looks again whenever keys were handed out."""
        async with asyncio.timeout(10):
            while not done():
                self.changed.clear()
                await self.changed.wait()

    def seen(self, status: VmStatus) -> VmStatus:
        """The status with what is known of keys and file."""
        file = self.files.get(status.uuid, b"") if status.config.deks else b""
        return replace(status, file=file.decode("latin-1"), held=tuple(self.held.get(status.uuid, ())))

    def to_start_from(self, config: VmConfig, file_hash: str) -> VmConfig:
        """The configuration that an encrypted VM starts with."""
        if not config.deks:
            assert file_hash == "", "a VM in clear has no configuration file"
            return config
        file = self.files.get(config.uuid, b"")
        if hashlib.sha256(file).hexdigest() != file_hash:
            raise VmTampered("the file is another one")
        if not set(config.deks) <= set(self.held.get(config.uuid, {})):
            raise KeysNotHeld("the keys are not here")
        return bundle.read(file)[1]

    def write(self, vm: UUID, file: bytes) -> None:
        """Put a file in its place; raises Conflict for one older than the newest ever written."""
        generation = bundle.read(file)[0].generation
        if generation < self.newest.get(vm, 0):
            raise Conflict(f"generation {generation} is older than {self.newest[vm]}")
        self.newest[vm], self.files[vm] = generation, file

    def take_order(self, order: MoveOrder, deks: Deks | None) -> None:
        """Keys that come with an order to move: given to the target, or it has them already; None at the source."""
        needed = set(order.hardware.config.deks)
        assert bool(needed) == bool(order.file), "an encrypted VM moves with its file, and no other does"
        if deks:
            self.held[order.vm] = {dek_id: dek.reveal() for dek_id, dek in deks.items()}
        elif deks is not None and not needed <= set(self.held.get(order.vm, {})):
            raise KeysNotHeld("the target has not got them")

    def take_in(self, order: MoveOrder) -> None:
        """The VM is this host's."""
        if order.file:
            self.write(order.vm, order.file.encode("latin-1"))

    # Orders

    def add(self, app: FastAPI, agent: Any) -> None:
        """The routes."""

        def fenced(vm: UUID, request: Request) -> None:
            agent.check_fence(vm, int(request.headers["sealift-fence"]))

        @app.put("/v1/vms/{vm}/keys", status_code=204)
        async def hold(vm: UUID, request: Request) -> None:
            fenced(vm, request)
            self.held[vm] = {dek_id: dek.reveal() for dek_id, dek in decode_keys(await request.body()).items()}
            self.handed_out.append(vm)
            self.changed.set()

        @app.post("/v1/vms/{vm}/keys/forget", status_code=204)
        async def forget_keys(vm: UUID, request: Request) -> None:
            fenced(vm, request)
            self.held.pop(vm, None)

        @app.post("/v1/keys/held")
        async def holds(question: _Held) -> dict[str, bool]:
            return {"held": set(question.deks) <= set(self.held.get(question.vm, {}))}

        @app.put("/v1/vms/{vm}/file")
        async def put_file(vm: UUID, order: _File, request: Request) -> VmStatus:
            self.about_to("file")
            fenced(vm, request)
            status: VmStatus = agent._vm(vm)
            if self.refuse is not None:
                raise self.refuse
            self.write(vm, order.file.encode("latin-1"))
            self.answer("file")
            return self.seen(status)

        @app.post("/v1/disks/look")
        async def look(order: _Look) -> list[DiskFacts]:
            room = DiskFacts("", True, 1 << 30, 1 << 30, 8 << 30, "ext4")
            return [replace(self.images.get(disk.path, room), path=disk.path) for disk in order.disks]

        self._add_conversions(app, agent)

    def _add_conversions(self, app: FastAPI, agent: Any) -> None:
        @app.put("/v1/conversions/{conversion}")
        async def take(conversion: UUID, request: Request) -> ConversionStatus:
            self.about_to("convert")
            public, deks = decode_frame(await request.body())
            order = _ORDER.validate_json(public)
            assert order.id == conversion
            if conversion in self.ended_before:
                raise Conflict(f"conversion {conversion} was ended before this order came")
            agent.check_fence(order.vm, order.fence)
            keys = {dek_id: dek.reveal() for dek_id, dek in deks.items()}
            self.orders.append((order, keys))
            if self.refuse is not None:
                raise self.refuse
            now: VmStatus = agent._vm(order.vm)
            assert now.state is VmState.STOPPED
            assert set(keys) == {*now.config.deks, *order.config.deks}
            status = ConversionStatus(conversion, order.vm, C.COPYING)
            self.conversions[conversion] = FakeConversion(order, keys, status, self.script(order))
            self.answer("convert")
            return status

        @app.get("/v1/conversions/{conversion}")
        async def look(conversion: UUID) -> ConversionStatus:
            found = self._conversion(conversion)
            if found.script and found.status.state not in CONVERSION_FINAL:
                line = found.script.pop(0) if len(found.script) > 1 else found.script[0]
                found.status = replace(found.status, **line)  # type: ignore[arg-type]
                if found.status.state is C.DONE:
                    self._finish(found, agent)
            self.looked.set()
            self.looked = asyncio.Event()
            return found.status

        @app.post("/v1/conversions/{conversion}/cancel")
        async def cancel(conversion: UUID) -> ConversionStatus:
            if conversion not in self.conversions:
                self.ended_before.add(conversion)
            found = self._conversion(conversion)
            if found.status.state in (C.COPYING, C.VERIFYING):
                found.status = replace(found.status, state=C.CANCELLED)
            return found.status

        @app.post("/v1/conversions/{conversion}/forget", status_code=204)
        async def forget(conversion: UUID) -> None:
            if self._conversion(conversion).status.state not in CONVERSION_FINAL:
                raise Conflict(f"conversion {conversion} is not over")
            del self.conversions[conversion]

    def _conversion(self, conversion: UUID) -> FakeConversion:
        if conversion not in self.conversions:
            raise NotFound(f"there is no conversion {conversion}")
        return self.conversions[conversion]

    def _finish(self, found: FakeConversion, agent: Any) -> None:
        order = found.order
        agent.vms[order.vm] = replace(agent.vms[order.vm], config=order.config)
        if order.file:
            self.write(order.vm, order.file.encode("latin-1"))
        else:
            self.files.pop(order.vm, None)
        self.held[order.vm] = {dek: found.keys[dek] for dek in order.config.deks}


def forms_of(key: bytes) -> Iterable[bytes]:
    """How a key could stand in a file: as it is, in hex, in base64."""
    import base64

    yield from (key, key.hex().encode(), key.hex().upper().encode(), base64.b64encode(key))
    yield base64.urlsafe_b64encode(key)
