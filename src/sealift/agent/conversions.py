"""Takes the controllers' orders to encrypt, decrypt and rekey disks, keeps one task per conversion, and settles what an
earlier agent left.

The old images stay where they are until every new one is complete, verified and on the disk. Then the journal says
SWAPPING, which decides: from there on it goes forward only, also after a crash, and needs no keys for that. Before, a
crash leaves the old images, and the new ones are removed: their keys were in memory and went with the agent. Both ways
wait for a datastore that is away, the VM with them: a copy in clear that came back with it would lie there for ever.

A datastore may hang. So whatever touches one is done in a thread, each conversion has a task of its own, and nobody
waits for one that is not asked after.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from dataclasses import replace
from uuid import UUID
from weakref import WeakValueDictionary

import structlog

from sealift.agent import new_images
from sealift.agent.conversion_plan import Step, check_keys, check_order, check_room, plan
from sealift.agent.conversion_work import Work
from sealift.agent.journal import ConversionRow, Journal
from sealift.agent.new_images import CLEAR_MODE, NewImage, place_for, real_paths
from sealift.agent.settings import AgentSettings
from sealift.agent.vm_files import from_order
from sealift.agent.vms import Vms
from sealift.domain.conversion import (
    CONVERSION_FINAL,
    ConversionKind,
    ConversionOrder,
    ConversionState,
    ConversionStatus,
)
from sealift.domain.deks import DEK_BYTES, Deks, wipe
from sealift.domain.vm import VmConfig
from sealift.errors import Conflict, ConversionCancelled, ConversionFailed, NotFound, SealiftError
from sealift.hypervisor.images import FileId, ImageRef, Images
from sealift.hypervisor.own_thread import in_own_thread
from sealift.secret import Secret

log = structlog.get_logger()

_AGAIN_S = 1.0
_ANSWER_S = 45.0
_CLOSE_S = 10.0
_ANY_MODE = 0o7777

S = ConversionState


class Conversions:
    """Every conversion this host was ordered to make and not yet told to forget."""

    def __init__(self, settings: AgentSettings, journal: Journal, vms: Vms, images: Images) -> None:
        self._settings, self._journal, self._vms, self._images = settings, journal, vms, images
        self._works: dict[UUID, Work] = {}
        self._tasks: dict[UUID, asyncio.Task[None]] = {}
        self._turns: WeakValueDictionary[UUID, asyncio.Lock] = WeakValueDictionary()
        self._stop = asyncio.Event()

    # orders

    async def take(self, order: ConversionOrder, deks: Deks) -> ConversionStatus:
        """Begin a conversion; returns once it is certain that it may, the rest goes on by itself.

        ``deks``: keys of the old and the new images; copies are made. An order carried out already is answered with its
        status. Raises StaleFence, NotFound, Conflict, InvalidInput, BundleInvalid, KeysNotHeld, DatastoreFull,
        ConversionFailed: nothing was changed then.
        """
        async with self._turn(order.id):
            if order.id in self._works:
                return self.status(order.id)
            if self._journal.attempt_refused(order.id):
                raise Conflict(f"conversion {order.id} was ended before this order came")
            self._journal.check_fence(order.vm, order.fence)
            vm = await self._vms.reserve_for_conversion(order.vm, order.id)
            try:
                work = await self._prepare(order, vm.config, deks)
                self._journal.put_conversion(work.row)
            except BaseException:
                self._vms.unreserve(order.vm)
                raise
            log.info("conversion.began", id=str(order.id), vm=vm.config.name, kind=order.kind.value)
            work.making = asyncio.create_task(self._make(work))
            self._begin(work, self._run(work))
            return work.row.status

    def _turn(self, conversion: UUID) -> asyncio.Lock:
        """Orders about one conversion come one after the other; those about others do not wait for them."""
        return self._turns.setdefault(conversion, asyncio.Lock())

    async def _prepare(self, order: ConversionOrder, now: VmConfig, deks: Deks) -> Work:
        file = check_order(order, now)
        if file is not None:
            self._vms.files.refuse_older(order.vm, file)
        check_keys(order, now, deks)
        facts = await asyncio.gather(*(self._images.look(disk.path, disk.format) for disk in now.disks))
        real = await in_own_thread(real_paths, [disk.path for disk in now.disks])
        steps = plan(order, now, facts, real)
        places = [await in_own_thread(place_for, step.path, step.new, make=step.make) for step in steps]
        free = {path: fact.free_bytes for path, fact in zip(real, facts, strict=True)}
        room = [(step, place.directory.device, free[step.path]) for step, place in zip(steps, places, strict=True)]
        check_room(now.name, room)
        total = sum(step.virtual_bytes for step in steps)
        wanted = {*now.deks, *order.config.deks}
        keys = {dek: Secret(deks[dek].reveal(), length=DEK_BYTES) for dek in wanted}
        status = ConversionStatus(order.id, order.vm, S.COPYING, 0, total)
        return Work(ConversionRow(order, status, places=tuple(places)), steps, keys)

    def _begin(self, work: Work, run: Coroutine[None, None, None]) -> None:
        self._works[work.order.id] = work
        self._tasks[work.order.id] = asyncio.create_task(run)

    async def _run(self, work: Work) -> None:
        assert work.making is not None
        error: SealiftError
        try:
            images = await work.making
            if work.cancel_asked:  # a moment too late to stop the work, and before the decision
                raise ConversionCancelled("it was cancelled")
            self._note(work, S.SWAPPING, images=images)  # the decision
        except asyncio.CancelledError:
            error = ConversionFailed("the agent was stopped", todo=work.again)
            if work.cancel_asked:
                error = ConversionCancelled("it was cancelled")
        except SealiftError as failure:
            error = failure
        except OSError as failure:
            error = ConversionFailed(f"{failure.filename}: {failure.strerror}")
        except Exception as failure:
            log.exception("conversion.defect", id=str(work.order.id))
            error = SealiftError(f"a defect in the agent: {type(failure).__name__}")
        else:
            await self._finish(work)
            return
        await self._undo(work, S.CANCELLED if isinstance(error, ConversionCancelled) else S.FAILED, error)

    async def _make(self, work: Work) -> tuple[NewImage, ...]:
        """Every new image, complete and compared with the old one, which is as it was."""
        before, made = 0, list[FileId]()
        mask = CLEAR_MODE if work.order.kind is ConversionKind.DECRYPT else _ANY_MODE
        for step in work.steps:
            source, target = self._refs(work, step)
            if step.make:
                made.append(await self._images.create(step.new, step.format, step.virtual_bytes, target.dek))
            else:
                made.append(await self._images.convert(source, target, work.count(before, step)))
                await in_own_thread(new_images.dress, step.path, step.new, made[-1], mask)
            before += step.virtual_bytes
        self._note(work, S.VERIFYING, done_bytes=0)
        before = 0
        for step in work.steps:
            if not step.make:
                source, target = self._refs(work, step)
                full = work.order.verify == "full"
                await self._images.verify(source, target, full=full, on_bytes=work.count(before, step))
            before += step.virtual_bytes
        places = work.row.places
        images = [await in_own_thread(new_images.complete, *each) for each in zip(places, made, strict=True)]
        try:
            await in_own_thread(new_images.refuse_changed, places)
        except (SealiftError, OSError):
            work.old_changed = True
            raise
        return tuple(images)

    def _refs(self, work: Work, step: Step) -> tuple[ImageRef, ImageRef]:
        old, dek = (work.keys[dek] if dek is not None else None for dek in (step.old, step.dek))
        return ImageRef(step.path, step.format, old), ImageRef(step.new, step.format, dek)

    def _note(
        self,
        work: Work,
        state: ConversionState,
        *,
        error: SealiftError | None = None,
        images: tuple[NewImage, ...] | None = None,
        done_bytes: int | None = None,
    ) -> None:
        """Record a state, durably; raises SealiftError, and then it is not so."""
        row = work.next(state, error, done_bytes)
        if images is not None:
            row = replace(row, images=images)
        self._journal.put_conversion(row)
        work.row = row

    async def _undo(self, work: Work, state: ConversionState, error: SealiftError) -> None:
        """The old images are in place: leave nothing of the new ones, and say how it ended."""
        if not work.old_changed and any(place.old is not None for place in work.row.places):
            error = type(error)(f"{error.what}; the old images are in place", todo=error.todo)
        order = work.order
        told = {"id": str(order.id), "vm": order.config.name, "kind": order.kind.value, "state": state.value}
        log.warning("conversion.ended", **told, slug=error.slug, what=error.what)
        wipe(work.keys)
        if not await self._persist(work, self._try_to_remove):
            return
        try:
            self._note(work, state, error=error)
        except SealiftError as failure:  # after a restart it is settled anew, to the same end
            log.error("conversion.not_journaled", id=str(work.order.id), what=str(failure))
            work.row = work.next(state, error, None)
        self._vms.unreserve(work.order.vm)

    async def _try_to_remove(self, work: Work) -> bool:
        try:
            await in_own_thread(new_images.remove, work.row.places)
        except OSError as failure:
            work.say("conversion.not_removed", _left_behind(failure))
            return False
        return True

    async def _persist(self, work: Work, attempt: Callable[[Work], Coroutine[None, None, bool]]) -> bool:
        """Try until it is done: nobody gives up here. False when the agent stops first; then the next one goes on."""
        while not await attempt(work):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), _AGAIN_S)
                return False
        return True

    async def _finish(self, work: Work) -> None:
        """From the decision to the end."""
        try:
            await self._persist(work, self._try_to_finish)
        except Exception as error:  # a defect: the VM stays reserved, for a person to look at
            log.exception("conversion.defect", id=str(work.order.id))
            work.say("conversion.unfinished", SealiftError(f"a defect in the agent: {type(error).__name__}"))

    async def _try_to_finish(self, work: Work) -> bool:
        order, files = work.order, self._vms.files
        try:
            found_again = work.making is None
            if not await in_own_thread(new_images.swap, work.row.images, found_again=found_again):
                what = "the new images were removed before they were in place; the old ones are as they were"
                gone = ConversionFailed(what, todo=work.again)
                self._note(work, S.FAILED, error=gone)
                self._vms.unreserve(order.vm)
                wipe(work.keys)
                return True
            if order.file:
                files.write(order.vm, from_order(order.file, order.vm))
            else:
                files.remove(order.vm)
            vm = replace(self._vms.row(order.vm), config=order.config)
            row = work.next(S.DONE, None, work.row.status.total_bytes)
            self._journal.finish_conversion(row, vm)
        except (SealiftError, OSError) as failure:
            error = failure if isinstance(failure, SealiftError) else ConversionFailed(str(failure))
            work.say("conversion.unfinished", error)
            return False
        self._vms.converted(vm)
        if work.keys:
            self._vms.vault.hold(order.vm, {dek: work.keys[dek] for dek in order.config.deks})
            wipe(work.keys)
        elif set(self._vms.vault.held(order.vm)) != set(order.config.deks):
            self._vms.vault.forget(order.vm)  # those of the old images
        work.row = row
        log.info("conversion.done", id=str(order.id), vm=vm.config.name)
        return True

    # questions and further orders

    def status(self, conversion: UUID) -> ConversionStatus:
        """How a conversion stands; raises NotFound."""
        return self._work(conversion).row.status

    def _work(self, conversion: UUID) -> Work:
        if conversion not in self._works:
            raise NotFound(f"host {self._settings.name} knows no conversion {conversion}")
        return self._works[conversion]

    async def cancel(self, conversion: UUID) -> ConversionStatus:
        """End a conversion and wait until nothing of its new images is left; without effect once it is decided.

        While a datastore is away it is answered before. Raises NotFound for one never seen, and an order for it is
        refused from now on.
        """
        async with self._turn(conversion):
            if conversion not in self._works:
                self._journal.refuse_attempt(conversion)
            work = self._work(conversion)
            if work.undecided and work.making is not None:
                work.cancel_asked = True
                work.making.cancel()
        if work.undecided:
            await asyncio.wait([self._tasks[conversion]], timeout=_ANSWER_S)
        return work.row.status

    async def forget(self, conversion: UUID) -> None:
        """Drop a conversion that has ended; raises NotFound, and Conflict while it has not, or has left something."""
        work = self._work(conversion)
        if work.state not in CONVERSION_FINAL:
            raise Conflict(f"conversion {conversion} is {work.state.value}", todo="wait, or cancel it")
        if work.state is not S.DONE:
            try:
                await in_own_thread(new_images.remove, work.row.places)
            except OSError as failure:
                error = _left_behind(failure)
                raise Conflict(f"conversion {conversion} is not forgotten: {error.what}", todo=error.todo) from failure
        self._journal.drop_conversion(conversion)
        self._works.pop(conversion, None)
        self._tasks.pop(conversion, None)

    # restarts

    async def recover(self) -> None:
        """Take up what an earlier agent left, a task each; to be called after ``Vms.adopt``, before any order comes."""
        for row in self._journal.conversions():
            work = Work(row)
            if work.state is S.DONE:
                self._works[row.order.id] = work
            elif work.state in CONVERSION_FINAL:  # once more: its datastore may have been away
                self._begin(work, self._remove_again(work))
            else:
                self._vms.converting[row.order.vm] = row.order.id
                decided = work.state is S.SWAPPING
                self._begin(work, self._finish(work) if decided else self._undo(work, S.FAILED, _without_keys(work)))

    async def _remove_again(self, work: Work) -> None:
        try:
            await in_own_thread(new_images.remove, work.row.places)
        except OSError as failure:  # an order to forget it is refused meanwhile
            log.error("conversion.not_removed", id=str(work.order.id), what=str(_left_behind(failure)))

    async def close(self) -> None:
        """Stop converting: one that is not decided is undone, one that is goes on in the next agent."""
        self._stop.set()
        for work in self._works.values():
            if work.making is not None:
                work.making.cancel()
        if self._tasks:  # what hangs is left to the next agent
            await asyncio.wait(self._tasks.values(), timeout=_CLOSE_S)
        for work in self._works.values():
            wipe(work.keys)


def _without_keys(work: Work) -> ConversionFailed:
    return ConversionFailed("the agent was restarted, and with it the keys were gone", todo=work.again)


def _left_behind(failure: OSError) -> ConversionFailed:
    return ConversionFailed(
        f"a new image cannot be removed at {failure.filename}: {failure.strerror}",
        todo="is the datastore mounted? it is tried again until it is gone",
    )
