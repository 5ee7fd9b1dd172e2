"""`sealift vm encrypt`, `decrypt`, `rekey` and `restore-config`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from sealift.cli.credentials import connect
from sealift.cli.following import Interrupts
from sealift.cli.identifiers import short
from sealift.cli.output import Output, json_option, pass_output
from sealift.errors import EncryptionError, HostUnreachable, InvalidInput

if TYPE_CHECKING:
    from sealift.api.encryption import Conversion, Rekeyed
    from sealift.client import Client

_F = TypeVar("_F", bound=Callable[..., Any])

PROVIDER = click.option("--provider", metavar="NAME", help="The key provider; without it the default one.")
VERIFY = click.option(
    "--verify",
    type=click.Choice(["sample", "full"]),
    help="How much of each new image is read back and compared before it takes the old one's place; sample is what"
    " you get without it, full takes about twice as long.",
)
DETACH = click.option("--detach", is_flag=True, help="Begin it, and do not wait for the end.")
DRY_RUN = click.option("--dry-run", is_flag=True, help="Only plan it, and say what would be done.")


def _carry_out(output: Output, begin: Callable[[Client], Conversion], *, dry_run: bool, detach: bool) -> None:
    from sealift.cli import converting

    if dry_run and detach:
        raise InvalidInput("--dry-run begins nothing, so there is no end to wait for", todo="leave --detach out")
    with connect() as client, Interrupts() as interrupts:
        made = begin(client)
        if dry_run:
            converting.show_plan(output, made)
        elif detach and not made.finished:
            if output.json:
                output.document(made)
            output.say(f"Conversion {made.id} has begun; `sealift conversion watch {short(made.id)}` follows it.")
        else:
            converting.watch(client, made, output, interrupts, cancel=True)


@click.command()
@click.argument("name", metavar="VM")
@PROVIDER
@VERIFY
@DRY_RUN
@DETACH
@json_option
@pass_output
def encrypt(output: Output, name: str, provider: str | None, verify: str | None, dry_run: bool, detach: bool) -> None:
    """Encrypt the disks and the configuration of a stopped VM.

    Each disk is copied into a new image, which takes the old one's place once it was verified. Ctrl-C asks for it to
    be cancelled, and waits to hear what is left; a second Ctrl-C stops waiting.
    """
    from sealift.api.encryption import EncryptRequest

    fields = {"provider": provider_name(provider), "verify": verify or "sample", "dry_run": dry_run}
    wish = EncryptRequest.model_validate(fields)
    _carry_out(output, lambda client: client.encrypt_vm(name, wish), dry_run=dry_run, detach=detach)


@click.command()
@click.argument("name", metavar="VM")
@VERIFY
@DRY_RUN
@DETACH
@json_option
@pass_output
def decrypt(output: Output, name: str, verify: str | None, dry_run: bool, detach: bool) -> None:
    """Decrypt the disks of a stopped VM; Ctrl-C as with encrypt."""
    from sealift.api.encryption import DecryptRequest

    wish = DecryptRequest.model_validate({"verify": verify or "sample", "dry_run": dry_run})
    _carry_out(output, lambda client: client.decrypt_vm(name, wish), dry_run=dry_run, detach=detach)


@click.command()
@click.argument("name", metavar="[VM]", required=False)
@click.option("--deep", is_flag=True, help="New disk keys too: each disk of the stopped VM is copied.")
@click.option("--provider", metavar="NAME", help="The key provider of the new key; without it the one it has now.")
@click.option("--from", "source", metavar="NAME", help="Rekey every VM whose key is at this key provider ...")
@click.option("--to", "target", metavar="NAME", help="... with new keys at that one.")
@VERIFY
@DRY_RUN
@DETACH
@json_option
@pass_output
def rekey(
    output: Output,
    name: str | None,
    deep: bool,
    provider: str | None,
    source: str | None,
    target: str | None,
    verify: str | None,
    dry_run: bool,
    detach: bool,
) -> None:
    """Give an encrypted VM a new key, while it runs too; or, with --from and --to, all VMs of a key provider.

    Only with --deep are the disks copied under new keys; the VM must be stopped then, and Ctrl-C is as with encrypt.
    """
    if source is not None or target is not None:
        if source is None or target is None:
            given, missing = ("--from", "--to") if target is None else ("--to", "--from")
            raise InvalidInput(f"{given} needs {missing} as well", todo=f"add {missing} with a key provider's name")
        if name is not None:
            raise InvalidInput(
                "--from and --to rekey all VMs of a key provider, and a VM is named too",
                todo=f"leave VM {name} out, or rekey just that one with `sealift vm rekey {name} --provider {target}`",
            )
        if deep or provider is not None or verify or dry_run or detach:
            raise InvalidInput("with --from and --to nothing else can be chosen", todo="see `sealift vm rekey --help`")
        _rekey_many(output, source, target)
        return
    if name is None:
        raise InvalidInput("nothing says which VM to rekey", todo="name a VM, or give --from and --to")
    if not deep and (verify or dry_run or detach):
        raise InvalidInput(
            "--verify, --dry-run and --detach are for --deep: nothing is copied without it", todo="leave it out"
        )
    from sealift.api.encryption import RekeyRequest

    fields = {"provider": provider_name(provider), "deep": deep, "verify": verify or "sample", "dry_run": dry_run}
    wish = RekeyRequest.model_validate(fields)
    _carry_out(output, lambda client: client.rekey_vm(name, wish), dry_run=dry_run, detach=detach)


def _rekey_many(output: Output, source: str, target: str) -> None:
    with connect() as client:
        became = client.rekey_many(source, target)
        if output.json:
            output.document(became)
        under_way = _under_way(client, became)
    if not output.json and not became:
        output.say(f"No VM has its key at key provider {source}.")
    elif not output.json:
        output.table(("VM", "RESULT", "OLD KEY", "NEW KEY", "MESSAGE"), (_row(one, under_way) for one in became))
    failed = [one for one in became if one.error_slug and one.vm not in under_way]
    waits = ""
    if under_way:
        vms = ", ".join(sorted(under_way))
        waits = f"the rekey of VM {vms} is under way: its host did not answer, and it settles by itself once it does"
    if failed:
        for todo in dict.fromkeys(one.todo for one in failed if one.todo):
            output.say(f"  -> {todo}")
        raise EncryptionError(
            f"{len(failed)} of {len(became)} VMs were not rekeyed and still have their key at key provider {source}"
            + (f"; {waits}" if waits else ""),
            todo=f"do what is said above, then run `sealift vm rekey --from {source} --to {target}` again",
        )
    if waits:
        raise HostUnreachable(waits, todo="`sealift conversion list` shows it")
    if became:
        output.say(f"Old copies of these VMs' configuration files are still opened by the old keys at {source}.")
        output.say(f"Leave {source} in place while you need such copies, as from a backup.")


def _under_way(client: Client, became: Sequence[Rekeyed]) -> frozenset[str]:
    """The VMs whose host was given a new file and did not answer: they are neither rekeyed nor not rekeyed yet."""
    silent = frozenset(one.vm for one in became if one.error_slug == HostUnreachable.slug)
    if not silent:
        return silent
    return silent & {one.vm_name for one in client.conversions() if one.kind == "rekey" and not one.finished}


def _row(one: Rekeyed, under_way: frozenset[str]) -> tuple[str, ...]:
    result = f"FAILED [{one.error_slug}]" if one.error_slug else "rekeyed"
    if one.vm in under_way:
        result = "UNDER WAY"
    return one.vm, result, one.old_key_id, one.key_id, one.error


@click.command("restore-config")
@click.argument("name", metavar="VM")
@json_option
@pass_output
def restore_config(output: Output, name: str) -> None:
    """Put back the last authentic copy of an encrypted VM's configuration file on its host.

    If the file there is authentic and newer than the controller's copy, it is taken over instead.
    """
    with connect() as client:
        found = client.restore_config(name)
    if output.json:
        output.document(found)
    now = found.encryption
    which = f"its configuration file of generation {now.generation}" if now else "its configuration file"
    done = {
        "unchanged": f"has {which} already, the last authentic one; nothing was changed",
        "restored": f"has {which} again, the last authentic one: it was put back",
        "adopted": f"has {which}, authentic and newer than the controller's copy: it was taken over from there",
    }
    output.say(f"VM {found.name} on {found.host} {done[found.outcome]}.")
    if now is not None and now.state in ("locked", "tampered"):
        output.say(f"It is still {now.state.upper()}: {now.message}")


def provider_name(name: str | None) -> str | None:
    """A provider's name as it was given; raises InvalidInput for what could not be one."""
    from sealift.domain.vm import check_name

    return None if name is None else check_name("key provider", name, quote=True)
