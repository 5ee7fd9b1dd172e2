"""The `sealift` command: the command line of the public API, and the commands that start its own processes.

What a command needs is imported when it runs, so that `sealift vm list` does not wait for a web server to load.
"""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import click

from sealift.cli.main import cli, run

STATE = Path("/var/lib/sealift")
CONFIGURATION = Path("/etc/sealift/agent.toml")


@cli.group()
def controller() -> None:
    """Make and run the controller."""


@controller.command("init")
@click.option("--state", type=click.Path(path_type=Path), default=STATE / "controller", show_default=True)
@click.option("--listen", default="0.0.0.0:7443", show_default=True, help="Address and port to listen on.")
@click.option("--address", "addresses", multiple=True, help="Name or IP that people and hosts use; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def controller_init(state: Path, listen: str, addresses: tuple[str, ...], as_json: bool) -> None:
    """Make a new controller and print how to log in and how hosts join."""
    from sealift.entry.controller import init

    made = init(state, listen=listen, addresses=addresses or (socket.getfqdn(),))
    if as_json:
        click.echo(json.dumps(vars(made)))
        return
    click.echo(f"controller    {made.address}\nfingerprint   {made.fingerprint}\nadmin token   {made.admin_token}")
    click.echo(f"join token    {made.join_token}\n")
    click.echo("Both tokens are shown this once. Run the controller, log in, and join a host:\n")
    click.echo(f"  sealift controller run --state {state}")
    click.echo(f"  sealift login {made.address} --token -")
    click.echo(f"  {made.join_command}")


@controller.command("run")
@click.option("--state", type=click.Path(path_type=Path), default=STATE / "controller", show_default=True)
def controller_run(state: Path) -> None:
    """Run the controller until SIGTERM."""
    from sealift.entry.controller import run as serve

    serve(state)


@cli.group()
def agent() -> None:
    """Join this host to a controller, and run its agent."""


_config = click.option(
    "--config", type=click.Path(path_type=Path), default=CONFIGURATION, show_default=True, help="TOML file, optional."
)
_state = click.option("--state", type=click.Path(path_type=Path), default=STATE / "agent", show_default=True)


@agent.command("join")
@click.argument("url")
@click.option("--token", help="'-' reads standard input, '@FILE' a file; asked for when not given.")
@_config
@_state
def agent_join(url: str, token: str | None, config: Path, state: Path) -> None:
    """Join the controller at URL with a one-time token."""
    from sealift.cli.credentials import read_token
    from sealift.entry.agent import join_controller

    identity = join_controller(url, read_token(token), _settings(config, state))
    click.echo(f"joined {url} as host {identity.host}; now run `sealift agent run`")


@agent.command("run")
@_config
@_state
def agent_run(config: Path, state: Path) -> None:
    """Run the agent until SIGTERM; VMs and migrations go on without it."""
    from sealift.entry.agent import run as serve

    serve(_settings(config, state))


def _settings(config: Path, state: Path):  # type: ignore[no-untyped-def]  # noqa: ANN202 - imported inside
    from sealift.agent.settings import parse_settings
    from sealift.errors import NotFound

    if not config.exists() and config != CONFIGURATION:
        raise NotFound(f"there is no configuration file {config}")
    text = config.read_text() if config.exists() else ""
    return parse_settings(text, hostname=socket.getfqdn(), state_directory=state)


@cli.command()
@click.argument("what", type=click.Choice(("moves", "encrypted")), default="moves")
@click.option("--keep", is_flag=True, help="Leave everything running at the end and print what to try.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON at the end.")
def demo(what: str, keep: bool, as_json: bool) -> None:
    """Show on a real Linux guest and hosts on this machine what Sealift does, and prove it.

    moves (the default): the guest moves between two hosts, sealed. encrypted: its disk is encrypted, under a key from
    a key server.
    """
    from sealift.demo import encrypted, show

    shown = encrypted if what == "encrypted" else show
    sys.exit(shown.show(keep=keep, as_json=as_json))


def main() -> None:
    """The console script."""
    run(cli)


if __name__ == "__main__":
    main()
