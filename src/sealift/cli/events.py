"""`sealift events`: what happened."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from sealift.cli import quantities
from sealift.cli.credentials import connect
from sealift.cli.output import Output, clean, json_option, pass_output

if TYPE_CHECKING:
    from sealift.api.schemas import Event


@click.command()
@click.option("--follow", is_flag=True, help="Go on with what happens from now on, until Ctrl-C.")
@click.option("--after", default=0, type=click.IntRange(min=0), metavar="N", help="Only events with a higher number.")
@json_option
@pass_output
def events(output: Output, follow: bool, after: int) -> None:
    """Show events, oldest first; with --json one object a line."""
    with connect() as client:
        for event in client.follow(after) if follow else client.events(after):
            if output.json:
                output.line(event)
            else:
                click.echo(_line(event))


def _line(event: Event) -> str:
    return clean(f"{event.seq:>6}  {quantities.moment(event.at)}  {event.type:<24}  {event.text}")
