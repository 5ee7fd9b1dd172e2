"""One conversion from its order to its end: deliver, watch, promote or drop, tidy.

After a restart of the controller the same ``carry_out`` goes on from the record. The keys of an order are in memory
only; an order that did not reach the host is therefore never sent a second time, and its conversion ends as failed.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass

import structlog

from sealift.controller.conversions import Conversions, what
from sealift.controller.inventory import Inventory
from sealift.controller.link import AgentLink
from sealift.controller.models import ConversionRow, HostRow
from sealift.controller.new_vm import CONFIG
from sealift.controller.watch import Pace
from sealift.domain.conversion import (
    CONVERSION_FINAL,
    ConversionKind,
    ConversionOrder,
    ConversionState,
    ConversionStatus,
)
from sealift.domain.deks import Deks, wipe
from sealift.errors import (
    ConversionCancelled,
    ConversionFailed,
    NotFound,
    SealiftError,
    Unreachable,
    from_slug,
)

log = structlog.get_logger("sealift.conversion")


@dataclass(frozen=True)
class ConversionTools:
    """What every conversion needs of the controller."""

    records: Conversions
    inventory: Inventory
    pace: Pace


@dataclass(frozen=True)
class Delivery:
    """An order and the keys that go with it, to be sent once and wiped."""

    order: ConversionOrder
    deks: Deks


class ConversionRun:
    """The work on one conversion. One task calls ``carry_out``, which may be cancelled anywhere and begun anew."""

    def __init__(self, tools: ConversionTools, row: ConversionRow) -> None:
        self._tools = tools
        self._barred = self._cancel_sent = False
        self._unused = False  # whether it is certain that no image is under the new keys
        self._failure: SealiftError | None = None
        self._said = ""
        self._pause = tools.pace.poll_s
        self.row = row
        self.cancel_requested = row.cancel_requested
        self.report: ConversionStatus | None = None

    async def carry_out(self, delivery: Delivery | None) -> None:
        """Bring the conversion to its end. ``delivery``: its order, if it is to be sent now."""
        host = next(host for host in await self._tools.records.hosts() if host.id == self.row.host)
        link = self._tools.inventory.link(host)
        if delivery is not None:
            await self._deliver(link, delivery)
        while self.row.finished_at is None:
            try:
                await self._look(link)
            except SealiftError as error:
                self._say("a conversion's host did not answer", error)
                self._pause = min(self._pause * 2, self._tools.pace.tidy_s)
            else:
                self._pause = self._tools.pace.poll_s
            if self.row.finished_at is None:
                await asyncio.sleep(self._pause)
        await self._tidy(host)

    async def _deliver(self, link: AgentLink, delivery: Delivery) -> None:
        try:
            self.report = await link.convert(delivery.order, delivery.deks)
        except SealiftError as error:
            # Perhaps it arrived all the same; the host itself will tell. The frames it came through hold the order.
            self._failure = error.with_traceback(None)
        finally:
            wipe(delivery.deks)

    async def _look(self, link: AgentLink) -> None:
        found = await link.conversion(self.row.id)
        if found is None:
            await self._settle_unknown(link)
            return
        self.report = found
        if found.state is ConversionState.DONE:
            self.row = await self._tools.records.promote(self.row.id, _figures(found))
        elif found.state in CONVERSION_FINAL:
            self._unused = True
            asked = found.state is not ConversionState.CANCELLED or self.cancel_requested
            state = found.state if asked else ConversionState.FAILED
            await self._drop(link, state, self._error_of(found), _figures(found))
        else:
            if found.state.value != self.row.state:
                self.row = await self._tools.records.note(self.row.id, {"state": found.state.value, **_figures(found)})
            if self.cancel_requested and not self._cancel_sent:
                await self._cancel(link)

    async def _settle_unknown(self, link: AgentLink) -> None:
        """The host knows nothing of it. An order still under way is to be refused when it comes; then that is final."""
        if not self._barred:
            with suppress(NotFound):  # as expected; and what it does not know, it refuses from now on
                await link.cancel_conversion(self.row.id)
            self._barred = True
            return  # and look once more: it may have come in between
        self._unused = await self._has_old_images(link)
        error = self._unheard() if isinstance(self._failure, Unreachable) else self._failure or self._unheard()
        await self._drop(link, ConversionState.FAILED, error, {})

    def _unheard(self) -> ConversionFailed:
        return ConversionFailed(
            f"host {self.row.host_name} has no order to {what(self.row)} VM {self.row.vm_name}: the controller was "
            "restarted, or the order got lost; nothing was changed",
            todo="ask for it again",
        )

    async def _has_old_images(self, link: AgentLink) -> bool:
        """Whether a host without the order says that the VM is as before; its journal may have been lost instead."""
        try:
            return (await link.vm(self.row.vm)).config.deks != CONFIG.validate_python(self.row.after_config).deks
        except NotFound:
            return self.row.with_vm  # it goes too, and was never started

    async def _cancel(self, link: AgentLink) -> None:
        try:
            await link.cancel_conversion(self.row.id)
        except Unreachable:
            raise
        except SealiftError as error:
            text = f"VM {self.row.vm_name}: it is too late to cancel the {self.row.kind}: {error.what}"
            await self._tools.records.note(self.row.id, {}, ("conversion.cancel_refused", text))
        self._cancel_sent = True

    async def _drop(
        self, link: AgentLink, state: ConversionState, error: SealiftError, figures: dict[str, object]
    ) -> None:
        """Nothing came of it: record that, after the host was rid of a VM that was made for it."""
        if self.row.with_vm:
            with suppress(NotFound):  # it was never defined, or an earlier life of ours removed it
                await link.delete(self.row.vm, await self._tools.records.raise_fence(self.row))
        self.row = await self._tools.records.end(self.row.id, state, error, figures)

    async def _tidy(self, host: HostRow) -> None:
        """What is left when the record is final; all of it can fail without harm."""
        row, inventory = self.row, self._tools.inventory
        if row.state != ConversionState.DONE.value:
            if row.key_id and self._unused:
                await inventory.keys.keyring.abandon(row.provider, row.key_id)
            elif row.key_id:
                text = (
                    f"key {row.key_id} of key provider {row.provider}, made for VM {row.vm_name}, was left there: host "
                    f"{row.host_name} could not say whether an image is under it"
                )
                await self._tools.records.note(row.id, {}, ("conversion.key_left", text))
        elif row.kind != ConversionKind.ENCRYPT.value:
            # The keys of the old images open nothing any more; hosts where the VM has been may hold them still.
            others = [each for each in await self._tools.records.hosts() if each.id != host.id]
            await inventory.forget_keys(others, row.vm, row.fence)
        try:
            await inventory.link(host).forget_conversion(row.id)
        except SealiftError as error:
            self._say("a conversion is not forgotten by its host", error)

    def _error_of(self, found: ConversionStatus) -> SealiftError:
        if found.state is ConversionState.CANCELLED and not self.cancel_requested:
            return self._failure or self._unheard()
        if found.state is ConversionState.CANCELLED:
            return ConversionCancelled(
                f"to {what(self.row)} VM {self.row.vm_name} was cancelled; its old images are in place"
            )
        said = found.error or "it gave no reason"
        return from_slug(found.error_slug or ConversionFailed.slug, f"{self.row.host_name}: {said}", found.todo)

    def _say(self, event: str, error: SealiftError) -> None:
        if str(error) != self._said:
            self._said = str(error)
            log.warning(event, conversion=str(self.row.id), vm=self.row.vm_name, error=str(error))


def _figures(found: ConversionStatus) -> dict[str, object]:
    return {"done_bytes": found.done_bytes, "total_bytes": found.total_bytes}
