"""One conversion from its order to its end: deliver, watch, promote or drop, tidy.

After a restart of the controller the same ``carry_out`` goes on from the record. The keys of an order are in memory
only; an order that did not reach the host is therefore never sent a second time, and its conversion ends as failed.

A record may be an old one, from a database that was put back from a backup: the conversion may be long done, and the VM
may have moved since. So its new KEK is destroyed only if the host says how this very conversion came to nothing, or if
this process knows that the host never took the order. That a host knows nothing of it is not enough.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import UUID

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
    again,
)
from sealift.domain.deks import Deks, wipe
from sealift.domain.vm import VmState, VmStatus
from sealift.errors import (
    ConversionCancelled,
    ConversionFailed,
    NotFound,
    SealiftError,
    StaleFence,
    Unreachable,
    from_slug,
)

log = structlog.get_logger("sealift.conversion")

_SILENT = "host {host} does not answer"


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
    """The work on one conversion. One task calls ``carry_out``, which may be cancelled anywhere and begun anew.

    ``never_sent``: it is certain that its order did not leave this controller, and will not.
    """

    def __init__(self, tools: ConversionTools, row: ConversionRow, *, never_sent: bool) -> None:
        self._tools = tools
        self._barred = self._cancel_sent = False
        self._unused = never_sent  # whether it is certain that no image is under the new keys
        self._failure: SealiftError | None = None
        self._said = ""
        self._pause = tools.pace.poll_s
        self.row = row
        self.cancel_requested = row.cancel_requested
        self.report: ConversionStatus | None = None
        self.silence = ""
        """That the host does not answer, in words for a person; empty while it does."""

    async def carry_out(self, delivery: Delivery | None) -> None:
        """Bring the conversion to its end and tidy up. ``delivery``: its order, if it is to be sent now."""
        self.row = await self._tools.records.get(self.row.id)
        self.cancel_requested |= self.row.cancel_requested
        if self.row.finished_at is None:
            host = next(host for host in await self._tools.records.hosts() if host.id == self.row.host)
            await self._bring_to_end(self._tools.inventory.link(host), delivery)
        await self._tidy()

    async def _bring_to_end(self, link: AgentLink, delivery: Delivery | None) -> None:
        if delivery is not None:
            await self._deliver(link, delivery)
        while self.row.finished_at is None:
            try:
                await self._look(link)
            except SealiftError as error:
                self._say("a conversion's host did not answer", error)
                self._hears_nothing(error)
                self._pause = min(self._pause * 2, self._tools.pace.tidy_s)
            else:
                self.silence = ""
                self._pause = self._tools.pace.poll_s
            if self.row.finished_at is None:
                await asyncio.sleep(self._pause)

    def _hears_nothing(self, error: SealiftError) -> None:
        host = self.row.host_name
        if not isinstance(error, Unreachable):
            self.silence = f"host {host} answers with an error, and the controller asks again: {error.what}"
        elif not self.silence.startswith(_SILENT.format(host=host)):
            since = datetime.now(UTC)
            self.silence = (
                f"{_SILENT.format(host=host)} since {since:%Y-%m-%d %H:%M:%S} UTC; the controller asks again; "
                "see that its agent runs"
            )

    async def _deliver(self, link: AgentLink, delivery: Delivery) -> None:
        try:
            self.report = await link.convert(delivery.order, delivery.deks)
        except SealiftError as error:
            # The frames it came through hold the order.
            self._failure = error.with_traceback(None)
            # One that nobody answered has perhaps arrived all the same; the host itself will tell.
            self._unused = not isinstance(error, Unreachable)
        finally:
            wipe(delivery.deks)

    async def _look(self, link: AgentLink) -> None:
        found = await link.conversion(self.row.id)
        if found is None:
            await self._settle_unknown(link)
            return
        self.report = found
        # One that was decided and failed all the same may have left an image under the new keys.
        self._unused = found.state in (ConversionState.FAILED, ConversionState.CANCELLED) and not found.decided
        if found.state is ConversionState.DONE:
            self.row = await self._tools.records.promote(self.row.id, {"tidied": False, **_figures(found)})
        elif found.state in CONVERSION_FINAL:
            asked = found.state is not ConversionState.CANCELLED or self.cancel_requested
            state = found.state if asked else ConversionState.FAILED
            await self._drop(link, state, self._error_of(found), _figures(found))
        else:
            if found.state.value != self.row.state:
                self.row = await self._tools.records.note(self.row.id, {"state": found.state.value, **_figures(found)})
            if self.cancel_requested and not self._cancel_sent:
                await self._cancel(link)

    async def _settle_unknown(self, link: AgentLink) -> None:
        """The host knows nothing of it. An order still under way is to be refused when it comes; then that is final.

        A host that has the VM under the new keys had the order once, and lost or was told to forget it: it is done.
        """
        if not self._barred:
            with suppress(NotFound):  # as expected; and what it does not know, it refuses from now on
                await link.cancel_conversion(self.row.id)
            self._barred = True
            return  # and look once more: it may have come in between
        there = await self._at_host(link)
        deks = CONFIG.validate_python(self.row.after_config).deks
        if there is not None and there.config.deks == deks and not self._unused:
            self.row = await self._tools.records.promote(self.row.id, {"tidied": False})
            return
        error = self._unheard() if isinstance(self._failure, Unreachable) else self._failure or self._unheard()
        await self._drop(link, ConversionState.FAILED, error, {})

    def _unheard(self) -> ConversionFailed:
        return ConversionFailed(
            f"host {self.row.host_name} has no order to {what(self.row)} VM {self.row.vm_name}: the controller was "
            "restarted, or the order got lost",
            todo=self._again(),
        )

    def _again(self) -> str:
        return again(ConversionKind(self.row.kind), self.row.vm_name, is_new=self.row.with_vm)

    async def _at_host(self, link: AgentLink) -> VmStatus | None:
        with suppress(NotFound):
            return await link.vm(self.row.vm)
        return None

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
        vm_at = await self._what_became_of_vm(link) if self.row.with_vm else None
        self.row = await self._tools.records.end(
            self.row.id, state, error, {"tidied": False, **figures}, key_unused=self._unused, vm_at=vm_at
        )

    async def _what_became_of_vm(self, link: AgentLink) -> UUID | None:
        """Rid the host of the VM that was made for this; the host that is to keep it, None when there is none.

        The one that was made is in clear and was never started. One that is encrypted, or has been started, or has had
        a later order (so that this one's fence is stale), has a life of its own since, of which this database knows
        nothing; so has one that is at another host.
        """
        there = await self._at_host(link)
        if there is None:
            return await self._elsewhere()
        if there.config.deks or there.state is not VmState.STOPPED:
            return self.row.host
        try:
            await link.delete(self.row.vm, self.row.fence)
        except NotFound:
            return None
        except StaleFence:
            return self.row.host
        return None

    async def _elsewhere(self) -> UUID | None:
        """Where the VM is that its host does not have; a host that does not answer may have it."""
        if self.report is not None or self._unused:
            return None  # it was never defined, or an earlier life of ours removed it
        keeper: UUID | None = None
        for host in await self._tools.records.hosts():
            if host.id == self.row.host:
                continue
            try:
                if await self._at_host(self._tools.inventory.link(host)) is not None:
                    return host.id
            except SealiftError as error:
                self._say("a host could not be asked for a VM", error)
                keeper = self.row.host
        return keeper

    async def _tidy(self) -> None:
        """What is left when the record is final; the host is asked again until it forgot, or is none of ours."""
        pause = self._tools.pace.poll_s
        self.row = await destroy_unused_key(self._tools, self.row)
        while not self.row.tidied:
            try:
                await self._tidy_hosts(self.row, await self._tools.records.hosts())
            except SealiftError as error:
                self._say("a conversion is not forgotten by its host", error)
                await asyncio.sleep(pause)
                pause = min(pause * 2, self._tools.pace.tidy_s)
                continue
            self.row = await self._tools.records.note(self.row.id, {"tidied": True})

    async def _tidy_hosts(self, row: ConversionRow, hosts: Sequence[HostRow]) -> None:
        if row.state == ConversionState.DONE.value and row.kind != ConversionKind.ENCRYPT.value:
            # The keys of the old images open nothing any more; hosts where the VM has been may hold them still. One to
            # which it has moved again since refuses: the fence is an old one then.
            await self._tools.inventory.forget_keys([host for host in hosts if host.id != row.host], row.vm, row.fence)
        for host in hosts:
            if host.id == row.host:
                await self._tools.inventory.link(host).forget_conversion(row.id)

    def _error_of(self, found: ConversionStatus) -> SealiftError:
        if found.state is ConversionState.CANCELLED and not self.cancel_requested:
            return self._failure or self._unheard()
        if found.state is ConversionState.CANCELLED:
            return ConversionCancelled(found.error or "it was cancelled", todo=self._again())
        said = found.error or f"host {self.row.host_name} gave no reason"
        return from_slug(found.error_slug or ConversionFailed.slug, said, found.todo)

    def _say(self, event: str, error: SealiftError) -> None:
        if str(error) != self._said:
            self._said = str(error)
            log.warning(event, conversion=str(self.row.id), vm=self.row.vm_name, error=str(error))


async def destroy_unused_key(tools: ConversionTools, row: ConversionRow) -> ConversionRow:
    """Destroy the new key of a record that came to nothing, if that is not done yet; the record as it is then.

    Only a final record says ``key_unused``, so none that could still be promoted loses its key. It may be done twice.
    """
    if not row.key_unused:
        return row
    await tools.inventory.keys.keyring.abandon(row.provider, row.key_id)
    return await tools.records.note(row.id, {"key_unused": False})


def _figures(found: ConversionStatus) -> dict[str, object]:
    return {"done_bytes": found.done_bytes, "total_bytes": found.total_bytes}
