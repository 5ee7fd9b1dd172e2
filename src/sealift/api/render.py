"""The controller's rows and sights as wire models."""

from __future__ import annotations

import datetime
from typing import Literal

from pydantic import TypeAdapter

from sealift.api.encryption import Conversion, ConversionFinding, Rekeyed, VmEncryption
from sealift.api.schemas import Event, Finding, Host, LinkDown, Migration, Phase, Progress, Step, Vm, VmRestored
from sealift.controller.conversions import PLANNED, REFUSED
from sealift.controller.models import ConversionRow, EventRow, MigrationRow
from sealift.controller.rekey import RekeyedVm
from sealift.controller.sights import SeenHost, SeenVm
from sealift.controller.unlocking import Restored
from sealift.controller.vm_keys import file_on_host, what_it_is, what_to_do
from sealift.domain.conversion import CONVERSION_FINAL, ConversionKind, ConversionState, ConversionStatus
from sealift.domain.lifecycle import FINAL, State
from sealift.domain.move import LinkReport, MoveStatus
from sealift.domain.policy import MigrateEncryption
from sealift.domain.vm import VmState
from sealift.keys.bundle import Verdict
from sealift.keys.envelope import CIPHER

_FINDINGS = TypeAdapter(list[Finding])
_CONVERSION_FINDINGS = TypeAdapter(list[ConversionFinding])
_STATES: dict[str, Literal["planned", "refused", "copying", "verifying", "swapping", "done", "failed", "cancelled"]] = {
    PLANNED: PLANNED,
    REFUSED: REFUSED,
    **{state.value: state.value for state in ConversionState},
}


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
    status, before = seen.status, seen.row.setting_before
    return Vm(
        uuid=seen.row.uuid,
        name=seen.row.name,
        host=seen.host,
        state=status.state if status else None,
        migrate_encryption=MigrateEncryption(seen.row.migrate_encryption),
        migrate_encryption_before=MigrateEncryption(before) if before else None,
        encrypted=seen.row.encrypted,
        encryption=vm_encryption(seen) if seen.row.encrypted else None,
        conversion=seen.conversion,
        config=seen.config,
        hardware=status.hardware if status else None,
        message=seen.error or (status.message if status else ""),
    )


def restored(seen: SeenVm, outcome: Restored) -> VmRestored:
    """A VM whose configuration file was put back, if it had to be."""
    return VmRestored(**dict(vm(seen)), outcome=outcome.value)


def vm_encryption(seen: SeenVm) -> VmEncryption:
    """What encrypts a VM, and whether it can start: a file that was changed comes before a key that is away."""
    row, status, file = seen.row, seen.status, seen.file
    state: Literal["ok", "locked", "tampered", "unknown"] = "ok" if file else "unknown"
    message, lines = seen.note, list(file.lines) if file else []
    if file and status and file.verdict is not Verdict.OK:
        state = "locked" if file.verdict is Verdict.LOCKED else "tampered"
        wrong, todo = what_it_is(file_on_host(status), file), what_to_do(row.name, file)
        message = f"its configuration file on host {seen.host} {wrong}; {todo}"
    elif row.lock_reason and (status is None or status.state in (VmState.STOPPED, VmState.CRASHED)):
        state, message = "locked", row.lock_reason
    return VmEncryption(
        provider=row.provider or "",
        key_id=row.key_id or "",
        cipher=CIPHER,
        generation=row.generation,
        state=state,
        message=message,
        lines=lines,
    )


def conversion(
    row: ConversionRow, report: ConversionStatus | None, silence: str = "", *, rehearsed: bool = False
) -> Conversion:
    """A conversion's record; while it is under way, with what its host reported last, or that it does not answer.

    ``rehearsed``: it is stored nowhere.
    """
    live = report if row.finished_at is None else None
    state = row.state
    if live is not None and live.state not in CONVERSION_FINAL:
        state = live.state.value
    return Conversion(
        id=None if rehearsed else row.id,
        vm=row.vm,
        vm_name=row.vm_name,
        host=row.host_name,
        kind=ConversionKind(row.kind).value,
        deep=row.deep and row.kind == ConversionKind.REKEY.value,
        state=_STATES[state],
        finished=row.finished_at is not None or rehearsed,
        message=silence or (_in_its_way(row, live) if live else ""),
        done_bytes=live.done_bytes if live else row.done_bytes,
        total_bytes=live.total_bytes if live else row.total_bytes,
        provider=row.provider,
        key_id=row.key_id,
        old_provider=row.old_provider,
        old_key_id=row.old_key_id,
        findings=_CONVERSION_FINDINGS.validate_python(row.findings),
        error_slug=row.error_slug,
        error=row.error,
        todo=row.todo,
        requested_by=row.requested_by,
        created_at=moment(row.created_at),
        finished_at=moment(row.finished_at) if row.finished_at is not None else None,
    )


def _in_its_way(row: ConversionRow, live: ConversionStatus) -> str:
    """What a host reports of a conversion that it has not given up."""
    if not live.error or live.state in CONVERSION_FINAL:
        return ""
    return f"host {row.host_name}: {live.error}" + (f" -> {live.todo}" if live.todo else "")


def rekeyed(found: RekeyedVm) -> Rekeyed:
    """What became of one VM of many."""
    error = found.error
    return Rekeyed(
        vm=found.vm,
        old_provider=found.old_provider,
        old_key_id=found.old_key_id,
        provider=found.provider,
        key_id=found.key_id,
        error_slug=error.slug if error else "",
        error=error.what if error else "",
        todo=error.todo if error else "",
    )


def findings(row: MigrationRow | ConversionRow) -> list[Finding]:
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
