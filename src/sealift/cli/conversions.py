"""`sealift conversion`: look at what encrypts, decrypts and rekeys VMs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from sealift.cli import quantities
from sealift.cli.credentials import connect
from sealift.cli.following import Interrupts
from sealift.cli.identifiers import find, short
from sealift.cli.output import Output, json_option, pass_output

if TYPE_CHECKING:
    from sealift.api.encryption import Conversion
    from sealift.client import Client


@click.group()
def conversion() -> None:
    """Conversions (encrypt, decrypt, rekey): list, show, watch, cancel."""


@conversion.command("list")
@json_option
@pass_output
def list_conversions(output: Output) -> None:
    """List conversions, newest first."""
    with connect() as client:
        found = client.conversions()
    if output.json:
        output.document(found)
    elif not found:
        output.say("Nothing was encrypted, decrypted or rekeyed yet; `sealift vm encrypt VM` begins.")
    else:
        titles = ("ID", "VM", "HOST", "KIND", "STATE", "DONE", "KEY PROVIDER", "TOOK", "ASKED")
        output.table(titles, (_row(one) for one in found))
        for one in found:
            if one.message:
                output.say(f"{short(one.id)}: {one.message}")


def _row(one: Conversion) -> tuple[str, ...]:
    from sealift.cli.converting import kind_of

    return (
        short(one.id),
        one.vm_name,
        one.host,
        kind_of(one),
        one.state,
        _done(one),
        one.provider or one.old_provider,
        _took(one),
        quantities.moment(one.created_at),
    )


def _done(one: Conversion) -> str:
    if not one.total_bytes:
        return ""
    return f"{one.done_bytes * 100 // one.total_bytes} % of {quantities.size(one.total_bytes)}"


def _took(one: Conversion) -> str:
    return quantities.duration((one.finished_at - one.created_at).total_seconds()) if one.finished_at else ""


@conversion.command()
@click.argument("identifier", metavar="ID")
@json_option
@pass_output
def show(output: Output, identifier: str) -> None:
    """Show a conversion's record; ID may be shortened."""
    from sealift.cli.converting import kind_of

    with connect() as client:
        found = _find(client, identifier)
    if output.json:
        output.document(found)
        return
    output.record(
        [
            ("id", str(found.id)),
            ("VM", f"{found.vm_name} ({found.vm})"),
            ("host", found.host),
            ("kind", kind_of(found)),
            ("state", found.state),
            ("done", _done(found)),
            ("in its way", found.message),
            ("error", f"{found.error} [{found.error_slug}]" if found.error_slug else found.error),
            ("what to do", found.todo),
            ("key provider", found.provider),
            ("key id", found.key_id),
            ("old key provider", found.old_provider),
            ("old key id", found.old_key_id),
            ("asked for by", found.requested_by),
            ("asked", quantities.moment(found.created_at)),
            ("ended", quantities.moment(found.finished_at) if found.finished_at else ""),
            ("took", _took(found)),
        ]
    )
    output.findings(found.findings)


@conversion.command()
@click.argument("identifier", metavar="ID")
@json_option
@pass_output
def watch(output: Output, identifier: str) -> None:
    """Follow a conversion to its end; Ctrl-C only stops following."""
    from sealift.cli import converting

    with connect() as client, Interrupts() as interrupts:
        converting.watch(client, _find(client, identifier), output, interrupts, cancel=False)


@conversion.command()
@click.argument("identifier", metavar="ID")
@json_option
@pass_output
def cancel(output: Output, identifier: str) -> None:
    """Ask for a conversion to end with the old images in place."""
    from sealift.cli import converting

    with connect() as client:
        found = client.cancel_conversion(converting.id_of(_find(client, identifier)))
    if output.json:
        output.document(found)
    output.say(f"The controller was asked to cancel; `sealift conversion watch {short(found.id)}` says the end.")


def _find(client: Client, identifier: str) -> Conversion:
    return find("conversion", identifier, client.conversion, client.conversions)
