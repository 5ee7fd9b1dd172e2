"""The controller's rows and sights as wire models."""

from __future__ import annotations

import datetime

from pydantic import TypeAdapter

from sealift.api.schemas import Event, Finding, Host, LinkDown, Migration, Phase, Progress, Step, Vm
from sealift.controller.inventory import SeenHost, SeenVm
from sealift.controller.models import EventRow, MigrationRow
from sealift.domain.lifecycle import FINAL, State
from sealift.domain.move import LinkReport, MoveStatus
from sealift.domain.policy import MigrateEncryption

_FINDINGS = TypeAdapter(list[Finding])


def moment(seconds: float) -> datetime.datetime:
    """Seconds since the epoch as a time in UTC."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC)


def host(seen: SeenHost) -> Host:
    """A host as it was just seen."""
    return Host(
        id=seen.row.id,
        name=seen.row.name,
        address=seen.row.address,
        migration_address=seen.row.migration_address,
        state="reachable" if seen.capabilities else "unreachable",
        capability=seen.capability,
        capabilities=seen.capabilities,
        message=seen.error,
        joined_at=moment(seen.row.joined_at),
    )


def vm(seen: SeenVm) -> Vm:
    """A VM as it was just seen."""
    status = seen.status
    return Vm(
        uuid=seen.row.uuid,
        name=seen.row.name,
        host=seen.host,
        state=status.state if status else None,
        migrate_encryption=MigrateEncryption(seen.row.migrate_encryption),
        encrypted=seen.row.encrypted,
        config=seen.config,
        hardware=status.hardware if status else None,
        message=seen.error or (status.message if status else ""),
    )


def findings(row: MigrationRow) -> list[Finding]:
    """What the plan found."""
    return _FINDINGS.validate_python(row.findings)


def migration(
    row: MigrationRow, source: MoveStatus | None, target: MoveStatus | None, *, now: float, dry_run: bool = False
) -> Migration:
    """A record; while it runs, with what the hosts reported last."""
    state = State(row.state)
    live = source if source is not None and state not in FINAL else None
    progress = live.progress if live else None
    link = live.link if live else LinkReport()
    return Migration(
        id=row.id,
        dry_run=dry_run,
        vm=row.vm,
        vm_name=row.vm_name,
        source=row.source_name,
        target=row.target_name,
        state=state,
        finished=row.finished_at is not None,
        asked_policy=MigrateEncryption(row.asked_policy),
        protection={"sealed": "sealed", "plain": "plain"}.get(row.protection or ""),  # type: ignore[arg-type]
        reason=row.reason,
        cipher=row.cipher,
        channels=row.channels,
        bandwidth=row.bandwidth,
        max_downtime_ms=row.max_downtime_ms,
        give_up_ms=row.give_up_ms,
        switchover_timeout_ms=row.switchover_timeout_ms,
        sealed_out=max(row.sealed_out, live.sealed_out if live else 0),
        sealed_in=max(row.sealed_in, live.sealed_in if live else 0),
        target_sealed_out=max(row.target_sealed_out, target.sealed_out if live and target else 0),
        target_sealed_in=max(row.target_sealed_in, target.sealed_in if live and target else 0),
        outages=max(row.outages, link.count),
        longest_outage_ms=max(row.longest_outage_ms, link.longest_ms),
        reconnects=max(row.reconnects, link.reconnects),
        link_down=LinkDown(**vars(link.down)) if link.down else None,
        timeline=[Step(where=where, step=step, at=moment(at)) for where, step, at in row.timeline],
        phases=[Phase(state=State(name), at=moment(at)) for name, at in row.phases],
        total_s=(row.finished_at or now) - row.created_at,
        downtime_ms=row.downtime_ms,
        requested_by=row.requested_by,
        cancel_requested=row.cancel_requested,
        progress=Progress(**vars(progress)) if progress else None,
        eta_s=progress.eta_s if progress else None,
        error_slug=row.error_slug,
        error=row.error,
        todo=row.todo,
        created_at=moment(row.created_at),
        finished_at=moment(row.finished_at) if row.finished_at is not None else None,
        findings=findings(row),
    )


def event(row: EventRow) -> Event:
    """One thing that happened."""
    return Event(
        seq=row.seq,
        at=moment(row.at),
        type=row.type,
        text=row.text,
        host=row.host,
        vm=row.vm,
        migration=row.migration,
        state=row.state,
        slug=row.slug,
    )
