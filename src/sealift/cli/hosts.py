"""`sealift host`: the machines that VMs run on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from sealift.cli import quantities
from sealift.cli.credentials import connect
from sealift.cli.output import Output, json_option, pass_output

if TYPE_CHECKING:
    from sealift.api.schemas import Host

SEALS = {"capable": "yes", "incapable": "NO", "lost": "NO LONGER", "unknown": "unknown"}


@click.group()
def host() -> None:
    """Hosts: list, show, admit, remove."""


@host.command("list")
@json_option
@pass_output
def list_hosts(output: Output) -> None:
    """List all hosts."""
    with connect() as client:
        hosts = client.hosts()
    if output.json:
        output.document(hosts)
    elif not hosts:
        output.say("There is no host yet; `sealift host token` gives one a way to join.")
    else:
        titles = ("NAME", "STATE", "SEALS MOVES", "QEMU", "FREE MEMORY", "ADDRESS")
        output.table(titles, (_row(one) for one in hosts))


def _row(one: Host) -> tuple[str, ...]:
    can = one.capabilities
    return (
        one.name,
        one.state,
        SEALS[one.capability.value],
        can.qemu_version if can else "",
        quantities.size(can.memory_free_bytes) if can else "",
        one.address,
    )


@host.command()
@click.argument("name")
@json_option
@pass_output
def show(output: Output, name: str) -> None:
    """Show one host and what it says it can do."""
    with connect() as client:
        found = client.host(name)
    if output.json:
        output.document(found)
        return
    can = found.capabilities
    pairs = [
        ("name", found.name),
        ("id", str(found.id)),
        ("state", found.state),
        ("message", found.message),
        ("address", found.address),
        ("migration address", found.migration_address),
        ("joined", quantities.moment(found.joined_at)),
        ("seals moves", SEALS[found.capability.value]),
    ]
    if can is not None:
        pairs += [
            ("because", can.sealed_channel_reason),
            ("channel versions", ", ".join(map(str, can.channel_versions))),
            ("AES-GCM", f"{can.aes_gcm_gb_per_s:.1f} GB/s" + ("" if can.aes_instructions else ", no AES instructions")),
            ("agent", can.agent_version),
            ("QEMU", can.qemu_version),
            ("accelerators", ", ".join(one.value for one in can.accelerators)),
            ("CPU", can.cpu_model),
            ("free memory", quantities.size(can.memory_free_bytes)),
        ]
    output.record(pairs)


@host.command()
@click.argument("name")
@json_option
@pass_output
def remove(output: Output, name: str) -> None:
    """Remove a host that has no VMs; it can join again with a new token."""
    with connect() as client:
        client.remove_host(name)
    if output.json:
        output.values(removed=name)
    output.say(f"Host {name} is removed.")


@host.command()
@click.argument("name")
@json_option
@pass_output
def accept(output: Output, name: str) -> None:
    """Accept a host that could seal moves once and says now that it cannot."""
    with connect() as client:
        found = client.accept_host(name)
    if output.json:
        output.document(found)
    output.say(f"Host {found.name} is accepted as it is; seals moves: {SEALS[found.capability.value]}.")


@host.command()
@click.option("--replaces", metavar="NAME", help="Let the new host take the place of this one.")
@json_option
@pass_output
def token(output: Output, replaces: str | None) -> None:
    """Make a token that lets one host join, within an hour."""
    with connect() as client:
        made = client.join_token(replaces)
    if output.json:
        output.document(made)
        return
    click.echo(made.token)
    output.say(f"Shown once, and valid until {quantities.moment(made.expires_at)}. On the new host run:")
    output.say(f"  {made.join_command}")
