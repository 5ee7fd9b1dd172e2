"""One conversion under way: what it works with, how far it is, and which state may follow which."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from uuid import UUID

import structlog

from sealift.agent.conversion_plan import Step
from sealift.agent.journal import ConversionRow
from sealift.agent.new_images import NewImage
from sealift.domain.conversion import ConversionOrder, ConversionState, ConversionStatus, again
from sealift.errors import IllegalTransition, SealiftError
from sealift.secret import Secret

log = structlog.get_logger()

S = ConversionState
_UNDECIDED = frozenset({S.COPYING, S.VERIFYING})
_AFTER = {
    S.COPYING: frozenset({S.VERIFYING, S.FAILED, S.CANCELLED}),
    S.VERIFYING: frozenset({S.SWAPPING, S.FAILED, S.CANCELLED}),
    S.SWAPPING: frozenset({S.DONE, S.FAILED}),  # failed only when somebody removed every new image
}


@dataclass
class Work:
    """One conversion. ``keys``: of the old and the new images. ``making``: the making of the new ones; None for a
    conversion that an earlier agent left. ``old_changed``: it ended because the old images are not what they were."""

    row: ConversionRow
    steps: list[Step] = field(default_factory=list)
    keys: dict[UUID, Secret] = field(default_factory=dict)
    cancel_asked: bool = False
    old_changed: bool = False
    making: asyncio.Task[tuple[NewImage, ...]] | None = None

    @property
    def order(self) -> ConversionOrder:
        """What was ordered."""
        return self.row.order

    @property
    def again(self) -> str:
        """What to do to have it anew."""
        return again(self.order.kind, self.order.config.name, is_new=self.order.is_new)

    @property
    def state(self) -> ConversionState:
        """Where it stands."""
        return self.row.status.state

    @property
    def undecided(self) -> bool:
        """Whether it may still end with the old images."""
        return self.state in _UNDECIDED

    def count(self, before: int, step: Step) -> Callable[[int, int], None]:
        """Takes progress of one step; the steps before it have ``before`` bytes of virtual disk."""

        def on_bytes(done: int, total: int) -> None:
            share = min(1.0, done / total) if total else 1.0
            status = replace(self.row.status, done_bytes=before + int(share * step.virtual_bytes))
            self.row = replace(self.row, status=status)

        return on_bytes

    def next(self, state: ConversionState, error: SealiftError | None, done_bytes: int | None) -> ConversionRow:
        """The row of another state; raises IllegalTransition when that cannot follow."""
        if state not in _AFTER.get(self.state, frozenset()):
            raise IllegalTransition(f"conversion {self.order.id}: {self.state.value} cannot become {state.value}")
        decided = self.row.status.decided or S.SWAPPING in (state, self.state)
        status = replace(self.row.status, state=state, error_slug="", error="", todo="", decided=decided)
        if done_bytes is not None:
            status = replace(status, done_bytes=done_bytes)
        return replace(self.row, status=_saying(status, error) if error else status)

    def say(self, event: str, error: SealiftError) -> None:
        """Have the status say what is in the way, and the log once."""
        if self.row.status.error != error.what:
            log.error(event, id=str(self.order.id), what=str(error))
        self.row = replace(self.row, status=_saying(self.row.status, error))


def _saying(status: ConversionStatus, error: SealiftError) -> ConversionStatus:
    return replace(status, error_slug=error.slug, error=error.what, todo=error.todo)
