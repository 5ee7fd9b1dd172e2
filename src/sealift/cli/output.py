"""What commands print: tables for people, JSON for scripts, and errors on standard error."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from sealift.errors import SealiftError

if TYPE_CHECKING:
    from pydantic import BaseModel

    from sealift.api.encryption import ConversionFinding
    from sealift.api.schemas import Finding, Problem

_F = TypeVar("_F", bound=Callable[..., Any])

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")


def clean(text: str) -> str:
    """``text`` without control characters: what a host or guest said must not steer the terminal."""
    return _CONTROL.sub(" ", text)


class Output:
    """How one command speaks; ``json`` once ``--json`` was given. It is the root context's ``obj``."""

    def __init__(self) -> None:
        self.json = False

    def document(self, document: BaseModel | Sequence[BaseModel]) -> None:
        """Print an answer, or a list of them, as one JSON value."""
        if isinstance(document, Sequence):
            value: object = [one.model_dump(mode="json") for one in document]
        else:
            value = document.model_dump(mode="json")
        click.echo(json.dumps(value, indent=2))

    def line(self, document: BaseModel) -> None:
        """Print an answer as one line of JSON."""
        click.echo(document.model_dump_json())

    def values(self, **values: object) -> None:
        """Print a few values as one JSON object."""
        click.echo(json.dumps(values, indent=2))

    def say(self, text: str) -> None:
        """A sentence for people; scripts do not get it."""
        if not self.json:
            click.echo(clean(text))

    def table(self, titles: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """A table for people. On something else than a terminal no cell is ever cut or wrapped."""
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 10_000, highlight=False)
        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
        for title in titles:
            table.add_column(title)
        for row in rows:
            table.add_row(*(Text(clean(cell)) for cell in row))
        console.print(table)

    def record(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Names and values for people, one pair a line; empty values are left out."""
        shown = [(name, clean(value)) for name, value in pairs if value]
        width = max((len(name) for name, _ in shown), default=0)
        for name, value in shown:
            click.echo(f"{click.style(name.ljust(width), bold=True)}  {value}")

    def block(self, text: str) -> None:
        """Lines for people as they are, such as a certificate."""
        for line in text.splitlines():
            self.say(line)

    def findings(self, findings: Iterable[Finding | ConversionFinding], *, err: bool = False) -> None:
        """What a plan found, errors in red."""
        for found in findings:
            colour = "red" if found.severity == "error" else "yellow"
            click.echo(f"  {click.style(found.severity, fg=colour)}: {clean(found.text)}", err=err)
            if found.todo:
                click.echo(f"    -> {clean(found.todo)}", err=err)

    def error(self, error: SealiftError) -> None:
        """An error on standard error: what, and what to do; with ``--json`` as an object with its slug."""
        problem = _problem(error)
        if self.json:
            told: dict[str, object] = {"slug": error.slug, "what": error.what, "todo": error.todo}
            told["exit_code"] = error.exit_code
            if problem is not None:
                told["migration"] = str(problem.migration) if problem.migration else None
                told["findings"] = [found.model_dump() for found in problem.findings]
            click.echo(json.dumps(told), err=True)
            return
        click.echo(f"sealift: {clean(error.what)}", err=True)
        if error.todo:
            click.echo(f"  -> {clean(error.todo)}", err=True)
        if problem is not None:
            rest = [found for found in problem.findings if found.text not in error.what]
            self.findings(rest, err=True)


def _problem(error: SealiftError) -> Problem | None:
    cause = error.__cause__
    if cause is None:
        return None
    from sealift.client import ProblemAnswer

    return cause.problem if isinstance(cause, ProblemAnswer) else None


def json_option(command: _F) -> _F:
    """The option ``--json`` of a command."""

    def choose(context: click.Context, parameter: click.Parameter, value: bool) -> None:
        if value:
            context.ensure_object(Output).json = True

    return click.option(
        "--json",
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=choose,
        help="Print JSON for scripts instead of text for people.",
    )(command)


pass_output = click.make_pass_decorator(Output, ensure=True)
