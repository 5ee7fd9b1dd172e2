"""`sealift login`: keep the address, authority and token of a controller."""

from __future__ import annotations

import click

from sealift.cli import credentials
from sealift.cli.output import Output, json_option, pass_output
from sealift.errors import InvalidInput


@click.command()
@click.argument("url")
@click.option("--token", metavar="-|@FILE", help=credentials.TOKEN_HELP)
@json_option
@pass_output
def login(output: Output, url: str, token: str | None) -> None:
    """Log in to the controller at URL with an admin token.

    The token names the controller's authority: whoever else answers there is refused before the token is sent.
    """
    from sealift.client import login as log_in
    from sealift.client import normal_url
    from sealift.domain.token import TokenKind, parse_token

    url = normal_url(url)
    parsed = parse_token(credentials.read_token(token))
    if parsed.kind is not TokenKind.ADMIN:
        raise InvalidInput(
            "this token is for a host to join with, not for a person to log in with",
            todo="use the admin token that `sealift controller init` printed",
        )
    kept, who = log_in(url, parsed)
    file = credentials.save(kept)
    if output.json:
        output.values(url=kept.url, name=who.name, version=who.version, fingerprint=who.fingerprint, file=str(file))
    output.say(f"Logged in to {kept.url} as {who.name}; the controller's authority is {who.fingerprint}.")
