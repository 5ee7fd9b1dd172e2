"""`sealift settings`: what holds for all VMs."""

from __future__ import annotations

import click

from sealift.cli.credentials import connect
from sealift.cli.output import Output, json_option, pass_output


@click.group()
def settings() -> None:
    """Settings of the controller: list, set."""


@settings.command("list")
@json_option
@pass_output
def list_settings(output: Output) -> None:
    """List all settings and what they mean now."""
    with connect() as client:
        found = client.settings()
    if output.json:
        output.document(found)
        return
    output.table(("NAME", "VALUE", "MEANING"), ((one.name, one.value, one.meaning) for one in found))


@settings.command("set")
@click.argument("name")
@click.argument("value")
@json_option
@pass_output
def change(output: Output, name: str, value: str) -> None:
    """Change a setting, such as `migration-encryption-floor required`."""
    from sealift.domain.quoting import quoted
    from sealift.errors import InvalidInput, NotFound

    if len(value) > 200:
        raise InvalidInput("the value is longer than 200 characters", todo="see `sealift settings list`")
    with connect() as client:
        try:
            found = client.set_setting(name, value)
        except (InvalidInput, NotFound) as error:  # which quote nothing
            what = f"{quoted(name)} cannot be set to {quoted(value)}: {error.what}"
            raise type(error)(what, todo=error.todo) from error
    if output.json:
        output.document(found)
    output.say(f"{found.name} is {found.value}: {found.meaning}.")
