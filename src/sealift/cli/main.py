"""The root command ``cli``, and ``run``, which carries out a command line to its exit code."""

from __future__ import annotations

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
from sealift.errors import SealiftError

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it; `migrate` has its own (see ``cli.following``)."""


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

    0 when done, a SealiftError's own exit code, 2 for a command line that is wrong, 130 after Ctrl-C.
    """
    try:
        code = group.main(arguments, prog_name="sealift", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        click.echo("sealift: interrupted", err=True)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # whoever read our output has seen enough; nor must the interpreter flush it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)
