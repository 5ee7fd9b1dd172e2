"""Following one conversion, which encrypts, decrypts or rekeys a VM's disks: a live bar on a terminal, lines elsewhere.

What is the same for a migration is in ``cli.following``. The controller tells only how many bytes are done, so how
fast it goes is measured here.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from sealift.cli import following, quantities
from sealift.cli.following import Bar, Interrupts, Silence, View
from sealift.cli.identifiers import short
from sealift.cli.output import Output, clean
from sealift.domain.conversion import ConversionKind, again
from sealift.errors import ConversionCancelled, ConversionFailed, PlanRefused, from_slug

if TYPE_CHECKING:
    from uuid import UUID

    from sealift.api.encryption import Conversion
    from sealift.client import Client

PACE_OVER_S = 10.0
"""Over how long a time the rate is measured."""

MODES = {
    "encrypt": ("encrypting", "encrypted"),
    "decrypt": ("decrypting", "decrypted"),
    "rekey": ("rekeying", "rekeyed"),
}
"""For each kind of conversion, what is being done and what was done."""


class Pace:
    """How fast a conversion goes, from looks at it; ``at`` is in seconds of any one clock."""

    def __init__(self) -> None:
        self._state = ""
        self._seen: deque[tuple[float, int]] = deque()

    def look(self, state: str, done_bytes: int, at: float) -> float:
        """Bytes per second in this state over the last ten seconds; 0 while that is not known."""
        if state != self._state or (self._seen and done_bytes < self._seen[-1][1]):
            self._state, self._seen = state, deque()
        self._seen.append((at, done_bytes))
        while len(self._seen) > 2 and at - self._seen[1][0] >= PACE_OVER_S:
            self._seen.popleft()
        first_at, first_bytes = self._seen[0]
        return (done_bytes - first_bytes) / (at - first_at) if at > first_at else 0.0


def id_of(made: Conversion) -> UUID:
    """The id of a conversion that is recorded, as all are but a rehearsal."""
    assert made.id is not None
    return made.id


def phase_of(now: Conversion) -> str:
    """What is being done, in a word or two."""
    makes = now.state == "copying" and now.total_bytes and not now.done_bytes
    return "making the new image" if makes else now.state  # a LUKS header takes QEMU seconds


def figures_of(now: Conversion, rate: float) -> str:
    """What stands beside the bar: bytes done and in all, the rate, how long still."""
    if not now.total_bytes or phase_of(now) != now.state:
        return ""
    parts = [f"{quantities.size(now.done_bytes)} of {quantities.size(now.total_bytes)}"]
    if rate > 0:
        parts.append(quantities.rate(rate))
        if (left := now.total_bytes - now.done_bytes) > 0:
            parts.append(f"{quantities.duration(left / rate)} left")
    return ", ".join(parts)


class ConversionLines:
    """A line for each state and for each tenth of it, for what is not a terminal. ``clock`` tells seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._started, self._pace = clock, clock(), Pace()
        self._shown: tuple[str, int] | None = None

    def show(self, now: Conversion) -> None:
        """Print a line if there is something new."""
        at = self._clock()
        rate = self._pace.look(now.state, now.done_bytes, at)
        phase = phase_of(now)
        tenths = now.done_bytes * 10 // now.total_bytes if now.total_bytes and not now.finished else 0
        if (phase, tenths) == self._shown:
            return
        self._shown = (phase, tenths)
        figures = f"  {figures_of(now, rate)}" if tenths else ""
        click.echo(f"{at - self._started:8.1f} s  {phase}{figures}")

    def note(self, text: str) -> None:
        """On a line of its own."""
        click.echo(clean(text), err=True)

    def close(self) -> None:
        """Nothing."""


class ConversionBar(Bar):
    """The live bar: state, bytes, rate, how long still."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__()
        self._clock, self._pace = clock, Pace()
        self.cancelling = False

    def show(self, now: Conversion) -> None:
        """Draw it anew."""
        rate = self._pace.look(now.state, now.done_bytes, self._clock())
        total = now.total_bytes or None
        self.draw(phase_of(now), figures_of(now, rate), now.done_bytes, total, cancelling=self.cancelling)


def follow(client: Client, made: Conversion, output: Output, interrupts: Interrupts, *, cancel: bool) -> Conversion:
    """Follow ``made`` to its end, whatever that is.

    ``cancel``: whether Ctrl-C asks the controller to cancel. Once somebody only stops following, exits with DETACHED.
    """
    if made.finished:
        return made
    clock = time.monotonic
    view: View[Conversion] = (
        Silence() if output.json else ConversionBar(clock) if sys.stdout.isatty() else ConversionLines(clock)
    )
    return following.follow(_Course(client, made, view), made, view, interrupts, cancel=cancel)


class _Course:
    """A conversion that is followed."""

    alone = "the host"

    def __init__(self, client: Client, made: Conversion, view: View[Conversion]) -> None:
        self.opening = f"{MODES[made.kind][0]} VM {made.vm_name} on {made.host}"
        self.again = f"sealift conversion watch {short(made.id)}"
        self._client, self._id, self._view = client, id_of(made), view
        self._cancelling, self._told = False, ""

    def look(self) -> Conversion:
        return self._client.conversion(self._id)

    def cancel(self) -> Conversion:
        now = self._client.cancel_conversion(self._id)
        self._cancelling, self._told = True, ""
        if isinstance(self._view, ConversionBar):
            self._view.cancelling = True
        return now

    def over(self, now: Conversion) -> bool:
        if self._cancelling and now.state == "done":
            self._view.note("the cancellation came too late")
        if now.message != self._told:
            self._told = now.message
            if now.message:
                self._view.note(now.message)
        return now.finished


def check(end: Conversion, *, creating: bool = False) -> None:
    """Raise the error that ``end`` is, unless it is done. ``creating``: a VM was made for it, which is not kept."""
    if end.state == "done":
        return
    todo = end.todo or f"see `sealift conversion show {short(end.id)}`"
    lead = f"VM {end.vm_name} on {end.host} was not {'created' if creating else MODES[end.kind][1]}"
    if end.state == "refused":
        raise PlanRefused(f"{lead}: {end.error or 'the plan was refused'}", todo=todo)
    if end.state == "cancelled":
        left = "nothing of it is left" if creating else "its old images are in place, nothing of the new ones is left"
        todo = end.todo or again(ConversionKind(end.kind), end.vm_name, is_new=creating)
        raise ConversionCancelled(f"{lead}: it was cancelled; {left}", todo=todo)
    if not end.error_slug:
        raise ConversionFailed(f"{lead}: {end.error or 'the host did not say why'}", todo=todo)
    raise from_slug(end.error_slug, f"{lead}: {end.error}", todo)


def conclusion(end: Conversion) -> list[str]:
    """What a conversion that is done has done, and what that means; one sentence an element."""
    name, key = end.vm_name, f"key {end.key_id} of key provider {end.provider}"
    old = f"key {end.old_key_id} of key provider {end.old_provider}"
    took = ""
    if end.total_bytes and end.finished_at is not None:
        seconds = (end.finished_at - end.created_at).total_seconds()
        took = f", {quantities.size(end.total_bytes)} in {quantities.duration(seconds)}"
    if end.kind == "encrypt":
        return [
            f"VM {name} on {end.host} is encrypted under {key}{took}.",
            "From now on it is always moved sealed.",
        ]
    if end.kind == "decrypt":
        return [
            f"VM {name} on {end.host} is decrypted, its disks are in clear{took}.",
            f"It still moves sealed or not at all, until `sealift vm set {name} --migrate-encryption` changes that.",
        ]
    if end.deep:
        return [
            f"VM {name} on {end.host} has new disk keys, under {key}{took}.",
            f"Copies of the old images and of the old configuration file are still opened by {old}.",
        ]
    return [
        f"VM {name} on {end.host} is now under {key}.",
        f"Old copies of its configuration file are still opened by {old}.",
    ]


def tell(output: Output, end: Conversion) -> None:
    """Say what a conversion that is done has done, and what its plan warned of."""
    if output.json:
        return
    for sentence in conclusion(end):
        output.say(sentence)
    output.findings(end.findings)


def watch(client: Client, made: Conversion, output: Output, interrupts: Interrupts, *, cancel: bool) -> None:
    """Follow ``made`` to its end and say it; any end but done is raised as its error."""
    end = follow(client, made, output, interrupts, cancel=cancel)
    if output.json:
        output.document(end)
    elif end.state == "refused":
        output.findings(end.findings, err=True)
    check(end)
    tell(output, end)


def show_plan(output: Output, made: Conversion) -> None:
    """Show what a dry run found; raises PlanRefused when it would be refused."""
    done = MODES[made.kind][1]
    refused = made.state == "refused"
    if output.json:
        output.document(made)
    else:
        output.say(f"VM {made.vm_name} on {made.host}, {kind_of(made)}:")
        output.findings(made.findings)
        if not refused:
            under = f" with a new key of key provider {made.provider}" if made.provider else ""
            copied = f", {quantities.size(made.total_bytes)} to copy" if made.total_bytes else ""
            output.say(f"It would be {done}{under}{copied}.")
    if refused:
        raise PlanRefused(
            f"VM {made.vm_name} would not be {done}: {made.error or 'the plan was refused'}", todo=made.todo
        )


def kind_of(one: Conversion) -> str:
    """``encrypt``, ``decrypt``, ``rekey`` or ``deep rekey``."""
    return "deep rekey" if one.kind == "rekey" and one.deep else one.kind
