"""Starting relays, one of them before it is needed: a move then does not wait for a process to load its code."""

from __future__ import annotations

import contextlib
from pathlib import Path

import structlog

from sealift.agent.handover import handover
from sealift.agent.journal import MoveRow
from sealift.agent.settings import AgentSettings
from sealift.channel.relay_client import PreparedRelay, RelayClient, start_relay
from sealift.domain.move import MoveOrder, MoveSecret, Role
from sealift.errors import RelayGone

log = structlog.get_logger()


def relay_log(directory: Path, order: MoveOrder, role: Role) -> Path:
    """Where one relay's complaints go while it lives."""
    return directory / f"{order.attempt}-{role.value}.log"


class Relays:
    """The relays of one host's moves; they outlive the agent, all but the one that is kept for the next move."""

    def __init__(self, settings: AgentSettings) -> None:
        self._settings = settings
        self._spare_log = settings.state_directory / "next-relay.log"
        self._spare: PreparedRelay | None = None
        self._keeps = False

    def keep_one(self) -> None:
        """From now on have one relay ready for the next sealed move; it holds no secret until then."""
        self._keeps = True
        self.prepare()

    def prepare(self) -> None:
        """See that one is ready, if one is kept."""
        if self._keeps and self._spare is None:
            try:
                self._spare = PreparedRelay("relay", str(self._spare_log))
            except OSError as error:  # the next move starts its own
                log.warning("relay.not_prepared", what=error.strerror)

    async def start(self, row: MoveRow, secret: MoveSecret, qemu_pid: int) -> RelayClient:
        """A relay (or splice) that carries out a move. Raises ``start_relay``'s errors and ``handover``'s."""
        self._settings.relay_logs.mkdir(exist_ok=True, mode=0o700)
        kind, spec, raw = await handover(self._settings, row, secret, qemu_pid)
        log_path = relay_log(self._settings.relay_logs, row.order, row.status.role)
        spare = None
        if kind == "relay":
            spare, self._spare = self._spare, None
        if spare is not None:
            with contextlib.suppress(FileNotFoundError):
                self._spare_log.rename(log_path)
            try:
                await spare.begin(spec, raw)
            except RelayGone as error:  # it had ended meanwhile
                log.warning("relay.prepared_in_vain", what=error.what)
                spare = None
        if spare is None:
            await start_relay(kind, spec, raw, str(log_path))
        return await RelayClient.connect(str(row.directory))

    def close(self) -> None:
        """Let the one that was kept go."""
        self._keeps = False
        if self._spare is not None:
            self._spare.discard()
            self._spare = None
