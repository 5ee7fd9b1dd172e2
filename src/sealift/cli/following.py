"""Following a migration or a conversion to its end: Ctrl-C, a controller that is away, and where it is shown.

Ctrl-C while following: the first asks the controller to cancel (or, for an onlooker, stops following), the second stops
following at once. Neither interrupts a request half way: the handler only counts and wakes the loop, except that the
second one raises KeyboardInterrupt, since then nobody waits for an answer any more.
"""

from __future__ import annotations

import os
import select
import signal
import sys
from types import FrameType, TracebackType
from typing import Protocol, TypeVar

import click

from sealift.cli.output import clean
from sealift.errors import ControllerUnreachable, SealiftError

POLL_S = 0.3

DETACHED = 130
"""Exit code when Ctrl-C ended the following, not what was followed."""

_T = TypeVar("_T")
_Now = TypeVar("_Now", contravariant=True)


class Interrupts:
    """Counts Ctrl-C while it is entered; the second one raises KeyboardInterrupt."""

    def __enter__(self) -> Interrupts:
        self.count = 0
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._before = signal.signal(signal.SIGINT, self._interrupted)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._before)
        os.close(self._reader)
        os.close(self._writer)

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        os.write(self._writer, b"\0")
        if self.count > 1:
            raise KeyboardInterrupt

    def wait(self, seconds: float) -> None:
        """Wait so long, or until Ctrl-C."""
        if select.select([self._reader], [], [], seconds)[0]:
            os.read(self._reader, 64)


class View(Protocol[_Now]):
    """Shows a migration or a conversion while it runs."""

    def show(self, now: _Now) -> None:
        """It stands like this now."""

    def note(self, text: str) -> None:
        """Something to tell between."""

    def close(self) -> None:
        """No more."""


class Course(Protocol[_T]):
    """What is followed, and the words for it."""

    opening: str
    """What is being done, said first."""
    alone: str
    """Who goes on while the controller cannot be reached."""
    again: str
    """The command that follows it anew."""

    def look(self) -> _T:
        """How it stands. Raises SealiftError."""

    def cancel(self) -> _T:
        """Ask the controller to cancel it; answers how it stands then. Raises SealiftError."""

    def over(self, now: _T) -> bool:
        """Whether ``now``, which was just shown, is its end."""


def follow(course: Course[_T], now: _T, view: View[_T], interrupts: Interrupts, *, cancel: bool) -> _T:
    """Show ``now`` and what comes after it; answers the end.

    ``cancel``: whether Ctrl-C asks the controller to cancel. Once somebody only stops following, exits with DETACHED.
    """
    left = going_on = "following; it goes on"
    try:
        view.note(course.opening)
        seen, silent = 0, False
        while True:
            view.show(now)
            if course.over(now):
                return now
            if interrupts.count > seen:
                seen = interrupts.count
                if not cancel:
                    raise KeyboardInterrupt
                view.note("asking the controller to cancel; Ctrl-C again stops waiting for the end")
                left = "waiting; the controller may have been asked to cancel"
                try:
                    now = course.cancel()
                    left = "waiting; the controller was asked to cancel"
                except SealiftError as error:
                    left = going_on
                    view.note(f"not cancelled: {error}")
                continue
            interrupts.wait(POLL_S)
            try:
                now = course.look()
            except ControllerUnreachable as error:
                if not silent:
                    view.note(f"{error.what}; {course.alone} goes on without it, and we wait")
                silent = True
            else:
                silent = False
    except KeyboardInterrupt:
        view.close()
        click.echo(f"\nsealift: no longer {left}, see `{course.again}`", err=True)
        raise click.exceptions.Exit(DETACHED) from None
    finally:
        view.close()


class Silence:
    """For scripts that wait for the record."""

    def show(self, now: object) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """On standard error, where it is in nobody's way."""
        click.echo(f"sealift: {clean(text)}", err=True)

    def close(self) -> None:
        """Nothing."""


class Bar:
    """A live bar on a terminal: phase, how far it is, and figures beside it."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[figures]}"),
            console=Console(file=sys.stdout, highlight=False),
            transient=True,
        )
        self._task = self._progress.add_task("", total=None, figures="")
        self._progress.start()

    def draw(self, phase: str, figures: str, done: float, total: float | None, *, cancelling: bool) -> None:
        """Draw it anew; without ``total`` it only shows that something goes on."""
        description = f"[bold]{phase}[/]" + (" (cancelling)" if cancelling else "")
        self._progress.update(self._task, description=description, figures=figures, completed=done, total=total)

    def note(self, text: str) -> None:
        """Above the bar."""
        self._progress.console.print(clean(text), markup=False)

    def close(self) -> None:
        """Wipe the bar away."""
        self._progress.stop()
