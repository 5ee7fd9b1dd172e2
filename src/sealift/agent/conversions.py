"""Takes the controllers' orders to encrypt, decrypt and rekey disks, keeps one task per conversion, and settles what an
earlier agent left.

The old images stay where they are until every new one is complete, verified and on the disk. Then the journal says
SWAPPING, which decides: from there on it goes forward only, also after a crash, and needs no keys for that. Before, a
crash leaves the old images, and the new ones are removed: their keys were in memory and went with the agent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from uuid import UUID

import structlog

from sealift.agent import new_images
from sealift.agent.conversion_plan import Step, check_keys, check_order, check_room, plan
from sealift.agent.journal import ConversionRow, Journal
from sealift.agent.new_images import NewImage, filesystem_of, new_path, real_path, refuse_existing
from sealift.agent.settings import AgentSettings
from sealift.agent.vm_files import from_order
from sealift.agent.vms import Vms
from sealift.domain.conversion import CONVERSION_FINAL, ConversionOrder, ConversionState, ConversionStatus
from sealift.domain.deks import DEK_BYTES, Deks, wipe
from sealift.domain.vm import VmConfig
from sealift.errors import Conflict, ConversionCancelled, ConversionFailed, IllegalTransition, NotFound, SealiftError
from sealift.hypervisor.images import ImageRef, Images
from sealift.secret import Secret

log = structlog.get_logger()

_AGAIN_S = 1.0

S = ConversionState
_UNDECIDED = frozenset({S.COPYING, S.VERIFYING})
_AFTER = {
    S.COPYING: frozenset({S.VERIFYING, S.FAILED, S.CANCELLED}),
    S.VERIFYING: frozenset({S.SWAPPING, S.FAILED, S.CANCELLED}),
    S.SWAPPING: frozenset({S.DONE, S.FAILED}),  # failed only when somebody removed every new image
}


@dataclass
class Work:
    """One conversion under way. ``keys``: of the old and the new images; empty for one that was found swapping."""

    row: ConversionRow
    steps: list[Step] = field(default_factory=list)
    keys: dict[UUID, Secret] = field(default_factory=dict)
    cancel_asked: bool = False

    @property
    def order(self) -> ConversionOrder:
        return self.row.order

    @property
    def state(self) -> ConversionState:
        return self.row.status.state

    def count(self, before: int, step: Step) -> Callable[[int, int], None]:
        """Takes progress of one step; the steps before it have ``before`` bytes of virtual disk."""

        def on_bytes(done: int, total: int) -> None:
            share = min(1.0, done / total) if total else 1.0
            status = replace(self.row.status, done_bytes=before + int(share * step.virtual_bytes))
            self.row = replace(self.row, status=status)

        return on_bytes


class Conversions:
    """Every conversion this host was ordered to make and not yet told to forget."""

    def __init__(self, settings: AgentSettings, journal: Journal, vms: Vms, images: Images) -> None:
        self._settings, self._journal, self._vms, self._images = settings, journal, vms, images
        self._works: dict[UUID, Work] = {}
        self._tasks: dict[UUID, asyncio.Task[None]] = {}
        self._lock = asyncio.Lock()

    # orders

    async def take(self, order: ConversionOrder, deks: Deks) -> ConversionStatus:
        """Begin a conversion; returns once it is certain that it may, the rest goes on by itself.

        ``deks``: keys of the old and the new images; copies are made. An order carried out already is answered with its
        status. Raises StaleFence, NotFound, Conflict, InvalidInput, BundleInvalid, KeysNotHeld, DatastoreFull,
        ConversionFailed: nothing was changed then.
        """
        async with self._lock:
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
            self._begin(work, self._run(work))
            return work.row.status

    async def _prepare(self, order: ConversionOrder, now: VmConfig, deks: Deks) -> Work:
        file = check_order(order, now)
        if file is not None:
            self._vms.files.refuse_older(order.vm, file)
        check_keys(order, now, deks)
        facts = [await self._images.look(disk.path, disk.format) for disk in now.disks]
        steps = plan(order, now, facts, [real_path(disk.path) for disk in now.disks])
        free = {real_path(fact.path): fact.free_bytes for fact in facts}
        check_room(now.name, [(step, filesystem_of(step.path), free[step.path]) for step in steps])
        refuse_existing([step.new for step in steps])
        total = sum(step.virtual_bytes for step in steps)
        wanted = {*now.deks, *order.config.deks}
        keys = {dek: Secret(deks[dek].reveal(), length=DEK_BYTES) for dek in wanted}
        return Work(ConversionRow(order, ConversionStatus(order.id, order.vm, S.COPYING, 0, total)), steps, keys)

    def _begin(self, work: Work, run: Coroutine[None, None, None]) -> None:
        self._works[work.order.id] = work
        self._tasks[work.order.id] = asyncio.create_task(run)

    async def _run(self, work: Work) -> None:
        try:
            images = await self._make(work)
            self._note(work, S.SWAPPING, images=images)  # the decision
        except asyncio.CancelledError:
            if work.cancel_asked:
                await self._undo(work, S.CANCELLED, ConversionCancelled("it was cancelled"))
            else:
                await self._undo(work, S.FAILED, ConversionFailed("the agent was stopped", todo="ask for it again"))
            return
        except SealiftError as error:
            await self._undo(work, S.FAILED, error)
            return
        except OSError as error:
            await self._undo(work, S.FAILED, ConversionFailed(f"{error.filename}: {error.strerror}"))
            return
        except Exception as error:
            log.exception("conversion.defect", id=str(work.order.id))
            await self._undo(work, S.FAILED, SealiftError(f"a defect in the agent: {type(error).__name__}"))
            return
        await self._finish(work)

    async def _make(self, work: Work) -> tuple[NewImage, ...]:
        """Every new image, complete and compared with the old one."""
        before = 0
        for step in work.steps:
            source, target = self._refs(work, step)
            if step.make:
                await self._images.create(step.new, step.format, step.virtual_bytes, target.dek)
            else:
                await self._images.convert(source, target, work.count(before, step))
                await asyncio.to_thread(new_images.dress, step.path, step.new)
            before += step.virtual_bytes
        self._note(work, S.VERIFYING, done_bytes=0)
        before = 0
        for step in work.steps:
            if not step.make:
                source, target = self._refs(work, step)
                full = work.order.verify == "full"
                await self._images.verify(source, target, full=full, on_bytes=work.count(before, step))
            else:
                refuse_existing([step.path])
            before += step.virtual_bytes
        return tuple([await asyncio.to_thread(new_images.complete, step.path, step.new) for step in work.steps])

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
        row = self._next(work, state, error, done_bytes)
        if images is not None:
            row = replace(row, images=images)
        self._journal.put_conversion(row)
        work.row = row

    def _next(
        self, work: Work, state: ConversionState, error: SealiftError | None, done_bytes: int | None
    ) -> ConversionRow:
        if state not in _AFTER.get(work.state, frozenset()):
            raise IllegalTransition(f"conversion {work.order.id}: {work.state.value} cannot become {state.value}")
        status = replace(work.row.status, state=state, error_slug="", error="", todo="")
        if done_bytes is not None:
            status = replace(status, done_bytes=done_bytes)
        return replace(work.row, status=_saying(status, error) if error else status)

    async def _undo(self, work: Work, state: ConversionState, error: SealiftError) -> None:
        """The old images are in place: leave nothing of the new ones, and say how it ended."""
        what = f"the disks of VM {work.order.config.name} on {self._settings.name} were not converted: {error.what}"
        error = type(error)(what, todo=error.todo)
        log.warning("conversion.ended", id=str(work.order.id), state=state.value, slug=error.slug, what=what)
        wipe(work.keys)
        error = await self._removed(work.order, error)
        try:
            self._note(work, state, error=error)
        except SealiftError as failure:  # after a restart it is settled anew, to the same end
            log.error("conversion.not_journaled", id=str(work.order.id), what=str(failure))
            work.row = self._next(work, state, error, None)
        self._vms.unreserve(work.order.vm)

    async def _removed(self, order: ConversionOrder, error: SealiftError) -> SealiftError:
        paths = [new_path(real_path(disk.path), order.id) for disk in order.config.disks]
        try:
            await asyncio.to_thread(new_images.remove, paths)
        except OSError as failure:
            error.todo = f"remove {failure.filename} by hand: {failure.strerror}"
        return error

    async def _finish(self, work: Work) -> None:
        """From the decision to the end: nobody gives up here."""
        try:
            while True:
                if await self._try_to_finish(work):
                    return
                await asyncio.sleep(_AGAIN_S)
        except Exception as error:  # a defect: the VM stays reserved, for a person to look at
            log.exception("conversion.defect", id=str(work.order.id))
            defect = SealiftError(f"a defect in the agent: {type(error).__name__}")
            work.row = replace(work.row, status=_saying(work.row.status, defect))

    async def _try_to_finish(self, work: Work) -> bool:
        order, files = work.order, self._vms.files
        try:
            if not await asyncio.to_thread(new_images.swap, work.row.images):
                gone = ConversionFailed(
                    "the new images were removed before they were in place", todo="ask for it again"
                )
                self._note(work, S.FAILED, error=gone)
                self._vms.unreserve(order.vm)
                wipe(work.keys)
                return True
            if order.file:
                files.write(order.vm, from_order(order.file, order.vm))
            else:
                files.remove(order.vm)
            vm = replace(self._vms.row(order.vm), config=order.config)
            row = self._next(work, S.DONE, None, work.row.status.total_bytes)
            self._journal.finish_conversion(row, vm)
        except (SealiftError, OSError) as failure:
            error = failure if isinstance(failure, SealiftError) else ConversionFailed(str(failure))
            log.error("conversion.unfinished", id=str(order.id), what=str(error))
            work.row = replace(work.row, status=_saying(work.row.status, error))
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

        Raises NotFound for one never seen, and an order for it is refused from now on.
        """
        async with self._lock:
            if conversion not in self._works:
                self._journal.refuse_attempt(conversion)
            work = self._work(conversion)
            if work.state in _UNDECIDED and not work.cancel_asked:
                work.cancel_asked = True
                self._tasks[conversion].cancel()
            if work.cancel_asked:
                await asyncio.wait([self._tasks[conversion]])
                if work.state in _UNDECIDED:  # its task was cancelled before it began, or while it undid
                    await self._undo(work, S.CANCELLED, ConversionCancelled("it was cancelled"))
            return work.row.status

    async def forget(self, conversion: UUID) -> None:
        """Drop a conversion that has ended; raises NotFound, and Conflict while it has not."""
        work = self._work(conversion)
        if work.state not in CONVERSION_FINAL:
            raise Conflict(f"conversion {conversion} is {work.state.value}", todo="wait, or cancel it")
        if work.state is not S.DONE:  # once more: the datastore may have been away when this agent came
            await self._removed(work.order, ConversionFailed(""))
        self._journal.drop_conversion(conversion)
        self._works.pop(conversion, None)
        self._tasks.pop(conversion, None)

    # restarts

    async def recover(self) -> None:
        """Settle what an earlier agent left; to be called after ``Vms.adopt`` and before any order is taken."""
        for row in self._journal.conversions():
            work = self._works[row.order.id] = Work(row)
            if work.state is S.SWAPPING:
                self._vms.converting[row.order.vm] = row.order.id
                if not await self._try_to_finish(work):
                    self._begin(work, self._finish(work))
            elif work.state not in CONVERSION_FINAL:
                error = ConversionFailed(
                    "the agent was restarted, and with it the keys were gone", todo="ask for it again"
                )
                await self._undo(work, S.FAILED, error)

    async def close(self) -> None:
        """Stop converting: one that is not decided is undone, one that is goes on in the next agent."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for work in self._works.values():
            wipe(work.keys)


def _saying(status: ConversionStatus, error: SealiftError) -> ConversionStatus:
    return replace(status, error_slug=error.slug, error=error.what, todo=error.todo)
