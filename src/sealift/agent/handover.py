"""What a move's relay is told, and what of a move is kept when it is over."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Literal

from sealift.agent.commitlog import CommitLog, Mark, prune
from sealift.agent.journal import MoveRow
from sealift.agent.settings import AgentSettings
from sealift.channel.doorman import door_path
from sealift.channel.protocol import ChannelSpec, Plan
from sealift.channel.relay_spec import RelaySpec
from sealift.domain.move import MoveSecret, Role, SealedSecret
from sealift.errors import PlanRefused


async def handover(
    settings: AgentSettings, row: MoveRow, secret: MoveSecret, qemu_pid: int
) -> tuple[Literal["relay", "splice"], RelaySpec, bytes]:
    """The kind of process, its specification, and its secret as raw bytes.

    Raises InvalidInput for numbers that no channel has, PlanRefused for a migration address that names nobody.
    """
    order, role = row.order, row.status.role
    sealed = isinstance(secret, SealedSecret)
    channel = ChannelSpec(
        attempt=order.attempt.bytes,
        subject=order.vm.bytes,
        source=order.source.bytes,
        target=order.target.bytes,
        plan=Plan.SEALED if sealed else Plan.PLAIN,
        version=order.channel_version,
        channels=1 + order.options.multifd_channels,
        window=order.limits.window_bytes,
        rekey_records=order.limits.rekey_records,
        rekey_bytes=order.limits.rekey_bytes,
    )
    raw = _raw(secret)
    route = order.attempt.bytes if sealed else raw
    spec = RelaySpec(
        role=role.value,
        spec=channel,
        directory=str(row.directory),
        qemu_pid=qemu_pid,
        target=order.target_address if role is Role.SOURCE else "",
        door=door_path(str(settings.doors), route) if role is Role.TARGET else "",
        source_address="" if sealed or role is Role.SOURCE else await _ip_address(order.source_address),
        give_up_s=order.options.give_up_ms / 1000,
        switchover_timeout_s=order.options.switchover_timeout_ms / 1000,
    )
    return "relay" if sealed else "splice", spec, raw


async def _ip_address(host: str) -> str:
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise PlanRefused(
            f"the source's migration address {host} cannot be resolved here: {error}",
            todo="give the source an IP address as migration_address",
        ) from None
    return str(found[0][4][0])


def _raw(secret: MoveSecret) -> bytes:
    match secret:
        case SealedSecret(key, nonce):
            return key.reveal() + nonce.reveal()
        case _:
            return secret.token.reveal()


def put_away(directory: Path, row: MoveRow) -> None:
    """Keep of a VM's commit logs what can still decide: not that of a target which aborted."""
    log = CommitLog(directory, row.status.role, row.order.attempt, row.order.fence)
    if row.status.role is Role.TARGET and log.last in (None, Mark.ABORTED, Mark.REVOKED):
        log.path.unlink()
    prune(directory)
    if not any(directory.iterdir()):
        directory.rmdir()
