"""Following one migration: a live bar on a terminal, a line per phase elsewhere, and one line at the end.

What is the same for a conversion is in ``cli.following``.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import click

from sealift.cli import quantities
from sealift.cli.following import Bar, Interrupts, Silence, View, follow
from sealift.cli.identifiers import short
from sealift.cli.output import Output, clean
from sealift.errors import (
    MigrationCancelled,
    MigrationFailed,
    OutcomeUnknown,
    PlanRefused,
    SealiftError,
    VmCrashed,
)

if TYPE_CHECKING:
    from sealift.api.schemas import Migration
    from sealift.client import Client

UNSETTLED_S = 10.0
"""How long an outcome may be unknown before we stop waiting for it to be settled."""

DOWN_AGAIN_S = 10.0
"""How often it is said again, line by line, that the link is down."""

ENDS: dict[str, type[SealiftError]] = {
    "refused": PlanRefused,
    "failed": MigrationFailed,
    "cancelled": MigrationCancelled,
    "crashed": VmCrashed,
    "outcome_unknown": OutcomeUnknown,
}
"""The error that each end other than done is shown as, and exits with."""


class Lines:
    """A line for each phase, and for what befalls the link, for what is not a terminal."""

    def __init__(self) -> None:
        self._shown = 0
        self._outages = 0
        self._down_told_s: float | None = None

    def show(self, now: Migration) -> None:
        """Print the phases not printed yet, and what is new of the link."""
        for phase in now.phases[self._shown :]:
            after = (phase.at - now.phases[0].at).total_seconds()
            click.echo(f"{after:8.1f} s  {phase.state.value}")
        self._shown = len(now.phases)
        if text := self._link(now):
            click.echo(f"{now.total_s or 0:8.1f} s  {clean(text)}")

    def _link(self, now: Migration) -> str:
        down, told = now.link_down, self._down_told_s
        before, self._outages = self._outages, now.outages
        if down is not None:
            if told is not None and 0 <= down.down_s - told < DOWN_AGAIN_S:
                return ""
            self._down_told_s = down.down_s
            return f"{down_text(now)}: {down.what} [{down.slug}]"
        self._down_told_s = None
        if told is not None or now.outages > before:
            return f"{link_of(now)}; it is up"
        return ""

    def note(self, text: str) -> None:
        """On a line of its own."""
        click.echo(clean(text), err=True)

    def close(self) -> None:
        """Nothing."""


class MigrationBar(Bar):
    """The live bar: phase, bytes, rate, how long still."""

    def show(self, now: Migration) -> None:
        """Draw it anew."""
        figures, done, total = figures_of(now)
        self.draw(now.state.value, figures, done, total, cancelling=now.cancel_requested)


def figures_of(now: Migration) -> tuple[str, float, float | None]:
    """What stands beside the bar, and how far the bar is: bytes done, and of how many (None: not known)."""
    state = now.progress
    if state is None or not state.total_bytes:
        return "", 0, None
    parts = [quantities.size(state.transferred_bytes)]
    if now.link_down is not None:
        parts.append(down_text(now))
        return ", ".join(parts), max(0, state.total_bytes - state.remaining_bytes), state.total_bytes
    if state.rate > 0:
        parts.append(quantities.rate(state.rate))
    copying = now.state.value == "precopy"
    if copying and now.eta_s is not None:
        parts.append(f"{quantities.duration(now.eta_s)} left")
    elif copying and state.passes > 1:
        parts.append(f"pass {state.passes}, the guest writes {quantities.rate(state.dirty_rate)}")
    return ", ".join(parts), max(0, state.total_bytes - state.remaining_bytes), state.total_bytes


def down_text(now: Migration) -> str:
    """How long the link is down by now, and how long that may go on."""
    down = now.link_down
    assert down is not None
    end = "not giving up" if down.left_s is None else f"giving up in {quantities.duration(down.left_s)}"
    return f"link to {now.target} down for {quantities.duration(down.down_s)}, {end}"


def link_of(one: Migration) -> str:
    """What befell the link between the hosts, in words; empty when nothing did."""
    parts = [down_text(one)] if one.link_down is not None else []
    if one.outages:
        times = {1: "once", 2: "twice"}.get(one.outages, f"{one.outages} times")
        parts.append(f"link interrupted {times}, {quantities.count(one.reconnects, 'reconnect')}")
    if one.longest_outage_ms:
        parts.append(f"for {quantities.duration(one.longest_outage_ms / 1000)} at most")
    return ", ".join(parts)


def protection(one: Migration) -> str:
    """How it is or was protected, in words: sealed with what, or plain, loudly, and why."""
    if one.protection == "sealed":
        return f"sealed with {one.cipher or 'AES-256-GCM'}, since {one.reason}"
    return f"PLAIN, neither secret nor authentic, because {one.reason}"


def conclusion(one: Migration, moved_bytes: int) -> str:
    """The one line that ends a migration that is done. ``moved_bytes`` is QEMU's count, for what was not sealed."""
    sealed = one.protection == "sealed"
    if sealed:
        how = click.style("sealed", fg="green", bold=True) + f" with {one.cipher}"
    else:
        how = click.style("PLAIN - NOT ENCRYPTED, NOT AUTHENTICATED", fg="red", bold=True) + f" ({clean(one.reason)})"
    parts = [how, quantities.count(one.channels, "channel")]
    if moved := one.sealed_out if sealed else moved_bytes:
        parts.append(quantities.size(moved))
    if one.total_s is not None:
        parts.append(quantities.duration(one.total_s))
    down = "not known" if one.downtime_ms is None else quantities.duration(one.downtime_ms / 1000)
    return f"VM {clean(one.vm_name)} runs on {clean(one.target)}: {', '.join(parts)}, downtime {down}"


def watch(client: Client, made: Migration, output: Output, interrupts: Interrupts, *, cancel: bool) -> None:
    """Follow ``made`` to its end and say it; any end but done is raised as its error.

    ``cancel``: whether Ctrl-C asks the controller to cancel. Once somebody only stops following, exits with DETACHED.
    """
    view: View[Migration] = Silence() if output.json else MigrationBar() if sys.stdout.isatty() else Lines()
    course = _Course(client, made, view)
    end = follow(course, made, view, interrupts, cancel=cancel)
    if output.json:
        output.document(end)
    error = ENDS.get(end.state.value)
    if error is not None:
        what = end.error or f"the migration of VM {end.vm_name} ended as {end.state.value}"
        if end.state.value == "failed":
            what = f"VM {end.vm_name} stays at {end.source}: {what}"
        raise error(what, todo=end.todo or f"see `sealift migration show {end.id}`")
    if not output.json:
        if end.cancel_requested:
            click.echo("sealift: the cancellation came too late", err=True)
        click.echo(conclusion(end, course.moved_bytes))


class _Course:
    """A migration that is followed; says once how it is protected."""

    alone = "the move"

    def __init__(self, client: Client, made: Migration, view: View[Migration]) -> None:
        self.opening = f"moving VM {made.vm_name} from {made.source} to {made.target}"
        self.again = f"sealift migration watch {short(made.id)}"
        self.moved_bytes = 0
        """QEMU's count."""
        self._client, self._id, self._view = client, made.id, view
        self._told = False
        self._unsettled_since: float | None = None

    def look(self) -> Migration:
        return self._client.migration(self._id)

    def cancel(self) -> Migration:
        return self._client.cancel(self._id)

    def over(self, now: Migration) -> bool:
        """Also when nobody has known the outcome for a while."""
        if now.progress is not None:
            self.moved_bytes = now.progress.transferred_bytes
        if now.protection and not self._told:
            self._view.note(protection(now))
            self._told = True
        if now.state.value != "outcome_unknown":
            self._unsettled_since = None
            return now.finished
        self._unsettled_since = self._unsettled_since or time.monotonic()
        return now.finished or time.monotonic() - self._unsettled_since >= UNSETTLED_S
