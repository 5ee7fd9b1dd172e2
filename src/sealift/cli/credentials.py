"""Where the command line keeps what `sealift login` gave it, and how it reads tokens.

The file is ``$XDG_CONFIG_HOME/sealift/credentials.json`` (``~/.config`` without that variable), mode 0600 in a
directory of mode 0700: ``{"version": 1, "url": ..., "authority": PEM, "token": ...}``.
"""

from __future__ import annotations

import json
import os
import stat
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sealift.errors import InvalidInput, NotAuthenticated, TokenInvalid

if TYPE_CHECKING:
    from sealift.client import Client, Credentials

VERSION = 1


def path() -> Path:
    """Where the credentials are kept."""
    base = os.environ.get("XDG_CONFIG_HOME") or ""
    return (Path(base) if base.startswith("/") else Path.home() / ".config") / "sealift" / "credentials.json"


def save(credentials: Credentials) -> Path:
    """Keep the credentials; they replace older ones in one step. Raises InvalidInput when they cannot be written."""
    file = path()
    text = json.dumps(
        {
            "version": VERSION,
            "url": credentials.url,
            "authority": credentials.authority,
            "token": credentials.token.text(),
        }
    )
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file.parent.chmod(0o700)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=".credentials-", delete=False) as new:
            try:
                os.fchmod(new.fileno(), 0o600)
                new.write(text)
                new.flush()
                Path(new.name).replace(file)
            except BaseException:
                Path(new.name).unlink()
                raise
    except OSError as error:
        raise InvalidInput(f"{file} cannot be written: {error.strerror}", todo="set XDG_CONFIG_HOME") from None
    return file


def load() -> Credentials:
    """The credentials; raises NotAuthenticated when there are none, InvalidInput when others can read or edit them."""
    from sealift.client import Credentials
    from sealift.domain.token import parse_token

    file = path()
    try:
        with file.open() as opened:
            mode = os.fstat(opened.fileno()).st_mode
            text = opened.read()
    except FileNotFoundError:
        raise NotAuthenticated("nobody is logged in", todo="run `sealift login https://CONTROLLER:7443`") from None
    except OSError as error:
        raise InvalidInput(f"{file} cannot be read: {error.strerror}") from None
    if stat.S_IMODE(mode) & 0o077:
        raise InvalidInput(f"other users can get at {file}", todo=f"run `chmod 600 {file}`, and consider a new token")
    try:
        found = json.loads(text)
        if found["version"] != VERSION:
            raise InvalidInput(f"{file} is from another version of Sealift", todo="run `sealift login` again")
        return Credentials(str(found["url"]), str(found["authority"]), parse_token(str(found["token"])))
    except (ValueError, KeyError, TypeError, TokenInvalid):
        raise InvalidInput(f"{file} is damaged", todo="run `sealift login` again") from None


def connect() -> Client:
    """A client with the kept credentials; raises as ``load``."""
    from sealift.client import Client

    return Client(load())


def read_token(given: str | None) -> str:
    """A token's text as ``--token`` says: ``-`` standard input, ``@FILE`` a file, none a prompt, else the text itself.

    The text itself is taken with a warning, since a command line is no place for a secret. Raises InvalidInput.
    """
    if given is None:
        if not sys.stdin.isatty():
            raise InvalidInput("there is no terminal to ask for the token", todo="give --token - and pipe it in")
        prompted: str = click.prompt("Token", hide_input=True, err=True)
        return prompted.strip()
    if given == "-":
        return sys.stdin.readline(4096).strip()
    if given.startswith("@"):
        try:
            return Path(given[1:]).read_text()[:4096].strip()
        except (OSError, UnicodeDecodeError):
            raise InvalidInput(f"the file {given[1:]} cannot be read", todo="give --token @FILE") from None
    click.echo(
        "sealift: warning: a token on the command line can be read in the process list and the shell's history;\n"
        "  -> use --token -, --token @FILE or the prompt",
        err=True,
    )
    return given.strip()


TOKEN_HELP = "Where the token is: '-' standard input, '@FILE' a file; without it you are asked."  # noqa: S105
