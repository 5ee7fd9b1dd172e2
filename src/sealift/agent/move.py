"""What both sides of a move have in common: its facts, its record, its end."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from sealift.agent.commitlog import CommitLog
from sealift.agent.journal import Journal, MoveRow
from sealift.agent.relays import relay_log
from sealift.agent.settings import AgentSettings
from sealift.agent.vms import Vms
from sealift.agent.watch import Watch
from sealift.channel.doorman import remove_dead_doors
from sealift.channel.relay_client import RelayClient
from sealift.domain.move import MOVE_FINAL, MoveOrder, MoveState, MoveStatus, Progress, Role
from sealift.errors import ChannelError, SealiftError
from sealift.hypervisor.base import Vm

log = structlog.get_logger()

_FOLDED_BYTES = 2000


@dataclass
class Parts:
    """What a move works with. ``relay`` is None when it was found dead after a restart of the agent."""

    row: MoveRow
    vm: Vm
    relay: RelayClient | None
    log: CommitLog
    journal: Journal
    vms: Vms
    settings: AgentSettings
    recovered: bool
    brought_keys: bool = False  # target: the order's keys of disks are held for this move alone, until it succeeds


def marked(row: MoveRow, step: str) -> MoveRow:
    """``row`` with ``step`` done now."""
    timeline = (*row.status.timeline, (step, time.time()))
    return replace(row, status=replace(row.status, timeline=timeline))


class Move:
    """One side of one attempt; ``SourceMove`` and ``TargetMove`` say what it does."""

    def __init__(self, parts: Parts, *, now: Callable[[], float] = time.time) -> None:
        self.order: MoveOrder = parts.row.order
        self.directory: Path = parts.row.directory
        self.vm, self.vms, self.log = parts.vm, parts.vms, parts.log
        self.recovered, self.brought_keys, self.now = parts.recovered, parts.brought_keys, now
        self.watch = Watch(parts.vm, parts.relay)
        self._row, self._relay, self._journal, self._settings = parts.row, parts.relay, parts.journal, parts.settings

    @property
    def status(self) -> MoveStatus:
        """How this side stands; the record of a move that has ended says what the relay last counted."""
        status, seen = self._row.status, self.watch.relay_status
        if not seen:
            return status
        offset, acked, marks = seen.get("clock_offset_us"), seen.get("acked_out"), dict(status.timeline)
        if status.role is Role.SOURCE:
            marks |= seen.get("marks", {})
        return replace(
            status,
            progress=status.progress.taken(int(acked)) if acked is not None else status.progress,
            link=self.watch.link.report(seen),
            timeline=tuple(marks.items()),
            sealed_out=int(seen.get("sealed_out", 0)),
            sealed_in=int(seen.get("sealed_in", 0)),
            clock_offset_s=offset / 1e6 if offset is not None else status.clock_offset_s,
        )

    @property
    def ended(self) -> bool:
        return self._row.status.state in MOVE_FINAL

    def note(self, state: MoveState, *, error: SealiftError | None = None, **facts: object) -> None:
        """Record a state, durably, before what it stands for is done.

        A journal that cannot be written, because the disk is full, stops no move: what must not be lost is in the
        commit log, which has its room, and an agent that is restarted meanwhile finds the rest by looking again.
        """
        if error is not None:
            facts |= {"error_slug": error.slug, "error": str(error)}
        status = replace(self.status, state=state, **facts)  # type: ignore[arg-type]
        if status == self._row.status:
            return
        if status.state is not self._row.status.state:
            log.info("move.state", attempt=str(self.order.attempt), vm=self.order.vm_name, state=state.value)
        self._row = replace(self._row, status=status)
        try:
            self._journal.put_move(self._row)
        except SealiftError as failure:
            log.error("move.not_journaled", attempt=str(self.order.attempt), state=state.value, what=str(failure))
        self.watch.touch()

    def mark(self, step: str) -> None:
        """Keep when a step of setting up was done; the next state that is noted takes it to the disk."""
        self._row = marked(self._row, step)

    def progress(self, progress: Progress) -> None:
        """Keep QEMU's latest figures; they are not worth a write to the disk."""
        if progress.total_bytes:
            self._row = replace(self._row, status=replace(self._row.status, progress=progress))

    async def finish(self, state: MoveState, error: SealiftError | None = None) -> None:
        """End this side: counters read, relay closed, its directory removed, and only then the final state."""
        await self.watch.look_at_relay()
        await self.watch.close()
        if self._relay is not None:
            try:
                await self._relay.close()
            except ChannelError as failure:  # it has ended by itself, which is what we want of it
                log.info("relay.gone", attempt=str(self.order.attempt), what=str(failure))
        shutil.rmtree(self.directory, ignore_errors=True)
        remove_dead_doors(str(self._settings.doors))
        self.fold(relay_log(self._settings.relay_logs, self.order, self._row.status.role))
        await self.settle(state)
        self.note(state, error=error)
        if error is not None:
            log.warning("move.ended", vm=self.order.vm_name, state=state.value, slug=error.slug, what=error.what)

    def fold(self, path: Path) -> None:
        """Take a log file of this move into the agent's own, and remove it: a move leaves no file behind."""
        with contextlib.suppress(FileNotFoundError):
            tail = path.read_bytes()[-_FOLDED_BYTES:].decode(errors="replace").strip()
            if tail:
                log.info("move.log", attempt=str(self.order.attempt), file=path.name, tail=tail)
            path.unlink()

    async def settle(self, state: MoveState) -> None:
        """What else is this side's to put in order before the final state is said."""

    async def run(self) -> None:
        """Go on from wherever the facts stand to a final state, or to UNKNOWN."""
        raise NotImplementedError
