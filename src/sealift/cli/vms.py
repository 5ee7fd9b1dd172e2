"""`sealift vm`: define, start, stop and look at virtual machines."""

from __future__ import annotations

from typing import TYPE_CHECKING, TextIO

import click

from sealift.cli import quantities
from sealift.cli.credentials import connect
from sealift.cli.output import Output, json_option, pass_output
from sealift.errors import InvalidInput

if TYPE_CHECKING:
    from sealift.api.schemas import Vm

MODES = ("disabled", "opportunistic", "required")


@click.group()
def vm() -> None:
    """VMs: create, start, stop, list, show, set, delete."""


@vm.command()
@click.argument("file", type=click.File("r", encoding="utf-8"))
@click.option("--host", required=True, metavar="NAME", help="The host to define it on.")
@json_option
@pass_output
def create(output: Output, file: TextIO, host: str) -> None:
    """Define a VM from the TOML text in FILE ('-': standard input)."""
    try:
        text = file.read()
    except UnicodeDecodeError:
        raise InvalidInput(f"{file.name} is not UTF-8 text", todo="give the VM's TOML file") from None
    with connect() as client:
        made = client.create_vm(host, text)
    if output.json:
        output.document(made)
    output.say(f"VM {made.name} is defined on {made.host}; `sealift vm start {made.name}` starts it.")


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
        titles = ("NAME", "STATE", "HOST", "MIGRATE ENCRYPTION", "VCPUS", "MEMORY", "MESSAGE")
        output.table(titles, (_row(one) for one in vms))


def _row(one: Vm) -> tuple[str, ...]:
    memory = quantities.size(one.config.memory_bytes)
    return one.name, _state(one), one.host, _encryption(one), str(one.config.vcpus), memory, one.message


def _state(one: Vm) -> str:
    return one.state.value if one.state else "unknown"


def _encryption(one: Vm) -> str:
    return one.migrate_encryption.value


@vm.command()
@click.argument("name")
@json_option
@pass_output
def show(output: Output, name: str) -> None:
    """Show one VM, its configuration, and the hardware it was really started with."""
    with connect() as client:
        found = client.vm(name)
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
        ("migrate encryption", _encryption(found)),
        ("encrypted", "yes" if found.encrypted else "no"),
        ("vcpus", str(config.vcpus)),
        ("memory", quantities.size(config.memory_bytes)),
        ("machine", hardware.machine if hardware else config.machine),
        ("cpu", hardware.cpu if hardware else config.cpu),
        ("accelerator", (hardware.accelerator if hardware else config.accelerator).value),
        ("QEMU at start", hardware.qemu_version if hardware else ""),
        ("network", f"{config.network.kind} {config.network.bridge}".strip()),
        ("serial", config.serial),
    ]
    pairs += [(f"disk {number}", f"{disk.path} ({disk.format})") for number, disk in enumerate(config.disks)]
    output.record(pairs)


@vm.command("set")
@click.argument("name")
@click.option(
    "--migrate-encryption",
    required=True,
    type=click.Choice(MODES),
    help="disabled: always plain; opportunistic: sealed where both hosts can; required: sealed or not at all.",
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
    output.say(f"VM {found.name} now has migrate encryption {_encryption(found)}.")


@vm.command()
@click.argument("name")
@json_option
@pass_output
def delete(output: Output, name: str) -> None:
    """Forget a stopped VM; its disks are left as they are."""
    with connect() as client:
        client.delete_vm(name)
    if output.json:
        output.values(deleted=name)
    output.say(f"VM {name} is forgotten; its disks are left as they are.")
