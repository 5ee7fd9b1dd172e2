"""`sealift migrate` and `sealift migration`: move VMs, and look at moves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from sealift.cli import quantities
from sealift.cli.credentials import connect
from sealift.cli.following import Interrupts
from sealift.cli.identifiers import find, short
from sealift.cli.output import Output, json_option, pass_output
from sealift.domain.patience import GIVE_UP_MS, SWITCHOVER_TIMEOUT_MS
from sealift.errors import InvalidInput, PlanRefused

if TYPE_CHECKING:
    from sealift.api.schemas import Migration, MigrationCreate
    from sealift.client import Client


@click.command()
@click.argument("name", metavar="VM")
@click.option("--to", "target", required=True, metavar="HOST", help="The host to move it to.")
@click.option("--dry-run", is_flag=True, help="Only plan it, and say what would be done.")
@click.option("--bandwidth", default="0", metavar="RATE", help="At most so much each second, such as 2G or 10Gbit.")
@click.option("--max-downtime", default="300ms", metavar="TIME", show_default=True, help="How long it may stand still.")
@click.option("--channels", default=1, type=click.IntRange(1, 64), show_default=True, help="Data streams in parallel.")
@click.option(
    "--give-up",
    default=f"{GIVE_UP_MS // 1000}s",
    metavar="TIME",
    show_default=True,
    help="How long the link between the hosts may be down before the VM is kept where it is.",
)
@click.option(
    "--switchover-timeout",
    default=f"{SWITCHOVER_TIMEOUT_MS // 1000}s",
    metavar="TIME",
    show_default=True,
    help="The same while the VM stands still.",
)
@click.option("--detach", is_flag=True, help="Begin it, and do not wait for the end.")
@json_option
@pass_output
def migrate(
    output: Output,
    name: str,
    target: str,
    dry_run: bool,
    bandwidth: str,
    max_downtime: str,
    channels: int,
    give_up: str,
    switchover_timeout: str,
    detach: bool,
) -> None:
    """Move the running VM to another host.

    Ctrl-C asks for it to be cancelled, and waits to hear what became of the VM; a second Ctrl-C stops waiting.
    """
    figures = {
        "bandwidth": quantities.parse_rate(bandwidth),
        "max_downtime_ms": quantities.parse_duration_ms(max_downtime),
        "give_up_ms": quantities.parse_duration_ms(give_up),
        "switchover_timeout_ms": quantities.parse_duration_ms(switchover_timeout),
    }
    from sealift.cli import watching

    wish = _wish(vm=name, to=target, dry_run=dry_run, channels=channels, **figures)
    with connect() as client, Interrupts() as interrupts:
        made = client.migrate(wish)
        if dry_run:
            _show_plan(output, made)
        elif detach:
            if output.json:
                output.document(made)
            output.say(f"Migration {made.id} has begun; `sealift migration watch {short(made.id)}` follows it.")
        else:
            watching.watch(client, made, output, interrupts, cancel=True)


def _wish(**fields: object) -> MigrationCreate:
    """The request; raises InvalidInput for a figure that no controller takes."""
    from pydantic import ValidationError

    from sealift.api.schemas import MigrationCreate

    try:
        return MigrationCreate.model_validate(fields)
    except ValidationError as error:
        names = sorted({f"--{str(found['loc'][0]).removesuffix('_ms').replace('_', '-')}" for found in error.errors()})
        raise InvalidInput(f"{' and '.join(names)}: out of all bounds", todo="see `sealift migrate --help`") from None


def _show_plan(output: Output, made: Migration) -> None:
    from sealift.cli import watching

    refused = made.state.value == "refused"
    if output.json:
        output.document(made)
    else:
        output.say(f"VM {made.vm_name}, from {made.source} to {made.target}:")
        output.findings(made.findings)
        if not refused:
            output.say(f"It would move {watching.protection(made)}.")
    if refused:
        why = made.error or made.reason or "the plan was refused"
        raise PlanRefused(f"VM {made.vm_name} would not be moved: {why}", todo=made.todo)


@click.group()
def migration() -> None:
    """Migrations: list, show, watch, cancel."""


@migration.command("list")
@json_option
@pass_output
def list_migrations(output: Output) -> None:
    """List migrations, newest first."""
    with connect() as client:
        found = client.migrations()
    if output.json:
        output.document(found)
    elif not found:
        output.say("Nothing was moved yet; `sealift migrate VM --to HOST` does.")
    else:
        titles = ("ID", "VM", "FROM", "TO", "STATE", "PROTECTION", "SEALED", "TOOK", "DOWNTIME", "ASKED")
        output.table(titles, (_row(one) for one in found))


def _row(one: Migration) -> tuple[str, ...]:
    return (
        short(one.id),
        one.vm_name,
        one.source,
        one.target,
        one.state.value,
        {"sealed": "sealed", "plain": "PLAIN", None: ""}[one.protection],
        quantities.size(one.sealed_out) if one.protection == "sealed" else "",
        quantities.duration(one.total_s) if one.total_s is not None else "",
        quantities.duration(one.downtime_ms / 1000) if one.downtime_ms is not None else "",
        quantities.moment(one.created_at),
    )


@migration.command()
@click.argument("identifier", metavar="ID")
@json_option
@pass_output
def show(output: Output, identifier: str) -> None:
    """Show a migration's record; ID may be shortened."""
    from sealift.cli import watching

    with connect() as client:
        found = _find(client, identifier)
    if output.json:
        output.document(found)
        return
    took = quantities.duration(found.total_s) if found.total_s is not None else ""
    sealed = found.protection == "sealed"
    pairs = [
        ("id", str(found.id)),
        ("VM", f"{found.vm_name} ({found.vm})"),
        ("from", found.source),
        ("to", found.target),
        ("state", found.state.value),
        ("error", f"{found.error} [{found.error_slug}]" if found.error_slug else ""),
        ("what to do", found.todo),
        ("asked for by", found.requested_by),
        ("policy asked", found.asked_policy.value),
        ("protection", watching.protection(found) if found.protection else found.reason),
        ("channels", str(found.channels)),
        ("sealed at source", quantities.size(found.sealed_out) if sealed else ""),
        ("opened at target", quantities.size(found.target_sealed_in) if sealed else ""),
        ("sealed at target", quantities.size(found.target_sealed_out) if sealed else ""),
        ("opened at source", quantities.size(found.sealed_in) if sealed else ""),
        ("bandwidth", quantities.rate(found.bandwidth) if found.bandwidth else "not limited"),
        ("downtime asked", quantities.duration(found.max_downtime_ms / 1000)),
        ("gives up after", quantities.duration(found.give_up_ms / 1000)),
        ("in switchover", quantities.duration(found.switchover_timeout_ms / 1000)),
        ("link", watching.link_of(found)),
        ("downtime", quantities.duration(found.downtime_ms / 1000) if found.downtime_ms is not None else ""),
        ("took", took),
        ("asked", quantities.moment(found.created_at)),
        ("ended", quantities.moment(found.finished_at) if found.finished_at else ""),
    ]
    output.record(pairs)
    for phase in found.phases:
        after = (phase.at - found.phases[0].at).total_seconds()
        output.say(f"  {after:9.3f} s  {phase.state.value}")
    output.findings(found.findings)


@migration.command()
@click.argument("identifier", metavar="ID")
@json_option
@pass_output
def watch(output: Output, identifier: str) -> None:
    """Follow a migration to its end; Ctrl-C only stops following."""
    from sealift.cli import watching

    with connect() as client, Interrupts() as interrupts:
        watching.watch(client, _find(client, identifier), output, interrupts, cancel=False)


@migration.command()
@click.argument("identifier", metavar="ID")
@json_option
@pass_output
def cancel(output: Output, identifier: str) -> None:
    """Ask for a migration to end with the VM where it was."""
    with connect() as client:
        found = client.cancel(_find(client, identifier).id)
    if output.json:
        output.document(found)
    output.say(f"The controller was asked to cancel; `sealift migration watch {short(found.id)}` says the end.")


def _find(client: Client, identifier: str) -> Migration:
    return find("migration", identifier, client.migration, client.migrations)
