"""How the command line reads passphrases: never from the command line itself, which others can read."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from sealift.errors import InvalidInput
from sealift.secret import Secret

MAX_CHARACTERS = 1024
PROMPT = "prompt"
METAVAR = "-|@FILE|prompt"


def read(given: str, *, again: bool) -> Secret:
    """A passphrase (UTF-8) as ``--passphrase`` says: ``-`` a line of standard input, ``@FILE`` a file's first line,
    ``prompt`` a prompt, which asks twice with ``again``.

    Everything else is refused without being quoted. Raises InvalidInput.
    """
    if given == "-":
        text = sys.stdin.readline(MAX_CHARACTERS + 2)
    elif given.startswith("@"):
        try:
            with Path(given[1:]).open(encoding="utf-8") as file:
                text = file.readline(MAX_CHARACTERS + 2)
        except OSError as error:
            raise InvalidInput(
                f"the file {given[1:]} cannot be read: {error.strerror}",
                todo="give --passphrase @FILE with a file whose first line is the passphrase",
            ) from None
        except UnicodeDecodeError:
            raise InvalidInput(f"the file {given[1:]} is not UTF-8 text", todo="give another file") from None
    elif given == PROMPT:
        if not sys.stdin.isatty():
            raise InvalidInput(
                "there is no terminal to ask for the passphrase", todo="give --passphrase - and pipe it in"
            )
        text = click.prompt("Passphrase", hide_input=True, confirmation_prompt=again, err=True)
    else:
        raise InvalidInput(
            "a passphrase on the command line can be read in the process list and the shell's history",
            todo="use --passphrase -, --passphrase @FILE or --passphrase prompt, and consider this one known",
        )
    text = text.rstrip("\r\n")
    if not text:
        raise InvalidInput("the passphrase is empty", todo="see that its first line is the passphrase")
    if len(text) > MAX_CHARACTERS:
        raise InvalidInput(
            f"the passphrase is longer than {MAX_CHARACTERS} characters",
            todo="see what its first line is",
        )
    try:
        raw = text.encode()
    except UnicodeEncodeError:
        raise InvalidInput("the passphrase is not UTF-8 text", todo="see what encoding it is in") from None
    return Secret(raw, length=len(raw))
