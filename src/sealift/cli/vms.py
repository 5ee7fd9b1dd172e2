"""`sealift vm`: define, start, stop and look at virtual machines."""

from __future__ import annotations

from typing import TYPE_CHECKING, TextIO

import click

from sealift.cli import quantities
from sealift.cli.credentials import connect
from sealift.cli.encryption import PROVIDER, VERIFY, provider_name
from sealift.cli.following import Interrupts
from sealift.cli.output import Output, json_option, pass_output
from sealift.errors import InvalidInput

if TYPE_CHECKING:
    from sealift.api.encryption import Conversion
    from sealift.api.schemas import Vm
    from sealift.client import Client

MODES = ("disabled", "opportunistic", "required")


@click.group()
def vm() -> None:
    """VMs: create, start, stop, list, show, set, delete; encrypt, decrypt, rekey, restore-config."""


@vm.command()
@click.argument("file", type=click.File("r", encoding="utf-8"))
@click.option("--host", required=True, metavar="NAME", help="The host to define it on.")
@click.option("--encrypt", is_flag=True, help="Encrypt it before it can start.")
@PROVIDER
@VERIFY
@json_option
@pass_output
def create(output: Output, file: TextIO, host: str, encrypt: bool, provider: str | None, verify: str | None) -> None:
    """Define a VM from the TOML text in FILE ('-': standard input).

    With --encrypt its disks are encrypted, or made encrypted where they are not there yet, and this is followed to
    its end. A VM whose encryption fails is not kept.
    """
    if not encrypt and (provider or verify):
        raise InvalidInput("--provider and --verify are for a VM that is encrypted", todo="add --encrypt")
    provider = provider_name(provider)
    try:
        text = file.read()
    except UnicodeDecodeError:
        raise InvalidInput(f"{file.name} is not UTF-8 text", todo="give the VM's TOML file") from None
    if encrypt:
        _create_encrypted(output, host, text, provider, verify or "sample")
        return
    with connect() as client:
        made = client.create_vm(host, text)
    if output.json:
        output.document(made)
    output.say(f"VM {made.name} is defined on {made.host}; `sealift vm start {made.name}` starts it.")


def _create_encrypted(output: Output, host: str, text: str, provider: str | None, verify: str) -> None:
    from sealift.cli import converting

    with connect() as client, Interrupts() as interrupts:
        made = client.create_vm(
            host, text, encrypt=True, provider=provider, verify="full" if verify == "full" else "sample"
        )
        end = converting.follow(client, _conversion_of(client, made), output, interrupts, cancel=True)
        if output.json and end.state != "done":
            output.document(end)  # there is no VM to show
        converting.check(end, creating=True)
        converting.tell(output, end)
        if output.json:
            output.document(client.vm(made.name))
    output.say(f"VM {made.name} is defined on {made.host}; `sealift vm start {made.name}` starts it.")


def _conversion_of(client: Client, made: Vm) -> Conversion:
    """The conversion that a VM was made with; it may be over already."""
    if made.conversion is not None:
        return client.conversion(made.conversion)
    return next(one for one in client.conversions() if one.vm == made.uuid)


@vm.command()
@click.argument("name")
@json_option
@pass_output
def start(output: Output, name: str) -> None:
    """Start a VM on the host it is placed on."""
    with connect() as client:
        found = client.start_vm(name)
    if output.json:
        output.document(found)
    output.say(f"VM {found.name} is {_state(found)} on {found.host}.")


@vm.command()
@click.argument("name")
@click.option("--force", is_flag=True, help="Kill it, rather than ask the guest to power down.")
@json_option
@pass_output
def stop(output: Output, name: str, force: bool) -> None:
    """Stop a VM."""
    with connect() as client:
        found = client.stop_vm(name, force=force)
    if output.json:
        output.document(found)
    elif found.state is not None and found.state.value == "running":
        output.say(f"VM {found.name} on {found.host} was asked to power down.")
    else:
        output.say(f"VM {found.name} is {_state(found)} on {found.host}.")


@vm.command("list")
@json_option
@pass_output
def list_vms(output: Output) -> None:
    """List all VMs."""
    with connect() as client:
        vms = client.vms()
    if output.json:
        output.document(vms)
    elif not vms:
        output.say("There is no VM yet; `sealift vm create FILE --host HOST` defines one.")
    else:
        titles = ("NAME", "STATE", "ENCRYPTION", "HOST", "MIGRATE ENCRYPTION", "VCPUS", "MEMORY", "MESSAGE")
        output.table(titles, (_row(one) for one in vms))


def _row(one: Vm) -> tuple[str, ...]:
    return (
        one.name,
        _state(one),
        _at_rest(one),
        one.host,
        one.migrate_encryption.value,
        str(one.config.vcpus),
        quantities.size(one.config.memory_bytes),
        "; ".join(text for text in (one.encryption.message if one.encryption else "", one.message) if text),
    )


def _state(one: Vm) -> str:
    return one.state.value if one.state else "unknown"


def _at_rest(one: Vm) -> str:
    """Whether it is encrypted and can be used, in a word."""
    if one.conversion is not None:
        return "converting"
    if one.encryption is None:
        return "yes" if one.encrypted else "no"
    return {"ok": "ok", "locked": "LOCKED", "tampered": "TAMPERED", "unknown": "yes"}[one.encryption.state]


def _setting(one: Vm) -> str:
    """Its migration setting, and the one it had before it was encrypted."""
    before = one.migrate_encryption_before
    was = f" (was {before.value} before encryption)" if before and before is not one.migrate_encryption else ""
    return one.migrate_encryption.value + was


def _under_way(client: Client, one: Vm) -> Conversion | None:
    """The conversion under way, as of now."""
    return client.conversion(one.conversion) if one.conversion is not None else None


@vm.command()
@click.argument("name")
@json_option
@pass_output
def show(output: Output, name: str) -> None:
    """Show one VM, its configuration, and the hardware it was really started with."""
    with connect() as client:
        found = client.vm(name)
        conversion = _under_way(client, found) if not output.json else None
    if output.json:
        output.document(found)
        return
    config, hardware = found.config, found.hardware
    pairs = [
        ("name", found.name),
        ("uuid", str(found.uuid)),
        ("state", _state(found)),
        ("message", found.message),
        ("host", found.host),
        ("migrate encryption", _setting(found)),
        ("encryption", _at_rest(found)),
        *_encryption(found),
        *_conversion(conversion),
        ("vcpus", str(config.vcpus)),
        ("memory", quantities.size(config.memory_bytes)),
        ("machine", hardware.machine if hardware else config.machine),
        ("cpu", hardware.cpu if hardware else config.cpu),
        ("accelerator", (hardware.accelerator if hardware else config.accelerator).value),
        ("QEMU at start", hardware.qemu_version if hardware else ""),
        ("network", f"{config.network.kind} {config.network.bridge}".strip()),
        ("serial", config.serial),
    ]
    for number, disk in enumerate(config.disks):
        pairs.append((f"disk {number}", f"{disk.path} ({disk.format}{', LUKS' if disk.dek else ''})"))
    output.record(pairs)
    if found.encryption is not None and found.encryption.lines:
        output.say("Its configuration file differs from the one that was written for it last:")
        for line in found.encryption.lines:
            output.say(f"  {line}")


def _encryption(one: Vm) -> list[tuple[str, str]]:
    if one.encryption is None:
        return []
    return [
        ("because" if one.encryption.state in ("locked", "tampered") else "note", one.encryption.message),
        ("key provider", one.encryption.provider),
        ("key id", one.encryption.key_id),
        ("cipher", one.encryption.cipher),
        ("generation", str(one.encryption.generation)),
    ]


def _conversion(one: Conversion | None) -> list[tuple[str, str]]:
    if one is None:
        return []
    from sealift.cli.converting import figures_of, kind_of

    parts = (f"{kind_of(one)}, {one.state}", figures_of(one, 0.0), f"`sealift conversion watch {str(one.id)[:8]}`")
    return [("conversion", ", ".join(part for part in parts if part))]


@vm.command("set")
@click.argument("name")
@click.option(
    "--migrate-encryption",
    required=True,
    type=click.Choice(MODES),
    help="disabled: always plain; opportunistic: sealed where both hosts can; required: sealed or not at all, which an"
    " encrypted VM always is.",
)
@json_option
@pass_output
def change(output: Output, name: str, migrate_encryption: str) -> None:
    """Change a VM's settings."""
    from sealift.domain.policy import MigrateEncryption

    with connect() as client:
        found = client.change_vm(name, MigrateEncryption(migrate_encryption))
    if output.json:
        output.document(found)
    output.say(f"VM {found.name} now has migrate encryption {_setting(found)}.")


@vm.command()
@click.argument("name")
@click.option("--force", is_flag=True, help="Also an encrypted one, whose disks nobody can read afterwards.")
@json_option
@pass_output
def delete(output: Output, name: str, force: bool) -> None:
    """Forget a stopped VM; its disks are left as they are."""
    with connect() as client:
        client.delete_vm(name, force=force)
    if output.json:
        output.values(deleted=name)
    output.say(f"VM {name} is forgotten; its disks are left as they are.")
