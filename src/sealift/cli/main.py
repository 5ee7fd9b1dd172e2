"""The root command ``cli``, and ``run``, which carries out a command line to its exit code."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from sealift import __version__
from sealift.cli.conversions import conversion
from sealift.cli.encryption import decrypt, encrypt, rekey, restore_config
from sealift.cli.events import events
from sealift.cli.hosts import host
from sealift.cli.key_providers import key_provider
from sealift.cli.login import login
from sealift.cli.migrations import migrate, migration
from sealift.cli.output import Output
from sealift.cli.settings import settings
from sealift.cli.vms import vm
from sealift.errors import InvalidInput, SealiftError

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it; `migrate` has its own (see ``cli.following``)."""

_NO_OUTPUT = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF}
"""How a write to standard output fails; those to files of ours are told of by who writes them."""


class Root(click.Group):
    """A group that shows Sealift's errors and exits with their exit codes."""

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401  # as click's own
        output = ctx.ensure_object(Output)
        try:
            return super().invoke(ctx)
        except SealiftError as error:
            output.error(error)
            ctx.exit(error.exit_code)


@click.group(cls=Root, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="sealift")
def cli() -> None:
    """Move running virtual machines between QEMU/KVM hosts, every byte sealed."""


for command in (login, host, vm, migrate, migration, key_provider, conversion, settings, events):
    cli.add_command(command)
for command in (encrypt, decrypt, rekey, restore_config):
    vm.add_command(command)


def run(group: click.Group, arguments: Sequence[str] | None = None) -> NoReturn:
    """Carry out ``arguments`` (default: those of this process) and exit.

    0 when done, a SealiftError's own exit code, 2 for a command line that is wrong, 130 after Ctrl-C, 1 when nobody can
    read what was done.
    """
    given = [*(sys.argv[1:] if arguments is None else arguments)]
    try:
        code = group.main(given, prog_name="sealift", standalone_mode=False)
        if sys.stdout is not None:  # as it is when it was closed before we began
            sys.stdout.flush()
    except click.ClickException as error:
        _show(error, as_json="--json" in given)
        sys.exit(error.exit_code)
    except click.Abort as abort:
        notes = getattr(abort.__cause__, "__notes__", [])  # of the request that was interrupted
        click.echo("; ".join(["sealift: interrupted", *notes]), err=True)
        sys.exit(INTERRUPTED)
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # after which whoever reads our output has seen enough
            if error.errno not in _NO_OUTPUT or error.filename is not None:
                raise
            why = f"{error.strerror}; what was asked for may have been done"
            click.echo(f"sealift: the output cannot be written: {why}", err=True)
        # Nor must the interpreter flush it at exit.
        if sys.stdout is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)


def _show(error: click.ClickException, *, as_json: bool) -> None:
    """What is wrong with a command line; click's words, also as a JSON object."""
    if not as_json:
        error.show()
        return
    output = Output()
    output.json = True
    context = error.ctx if isinstance(error, click.UsageError) else None
    todo = f"see `{context.command_path} --help`" if context is not None else ""
    output.error(InvalidInput(error.format_message(), todo=todo))
