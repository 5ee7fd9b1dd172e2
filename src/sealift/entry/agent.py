"""Composition root of the agent: `sealift agent join` and `sealift agent run`."""

from __future__ import annotations

import asyncio
import fcntl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog
import uvicorn

from sealift.agent.agent import Agent
from sealift.agent.app import make_app
from sealift.agent.capabilities import cipher_facts
from sealift.agent.conversions import Conversions
from sealift.agent.join import Identity, join, load_identity
from sealift.agent.journal import Journal
from sealift.agent.moves import Moves
from sealift.agent.settings import AgentSettings
from sealift.agent.vault import Vault
from sealift.agent.vms import Vms
from sealift.channel.doorman import doorman_pid
from sealift.channel.relay_client import start_doorman
from sealift.channel.relay_spec import split_address
from sealift.domain.token import parse_token
from sealift.entry.logs import log_to_stderr
from sealift.errors import Conflict, SealiftError
from sealift.hypervisor.images import Images
from sealift.hypervisor.process import ProcessRef
from sealift.hypervisor.qemu import QemuHypervisor
from sealift.process import forbid_dumps, lock_memory

log = structlog.get_logger()

_DOORMAN_AGAIN_S = 5.0


def join_controller(url: str, token: str, settings: AgentSettings) -> Identity:
    """Join; raises what ``agent.join.join`` raises, and TokenInvalid for something that is no token."""
    return asyncio.run(join(url, parse_token(token), settings))


def run(settings: AgentSettings) -> None:
    """Serve until SIGTERM or SIGINT; raises Conflict when not joined, or when an agent runs already.

    Running VMs and moves go on when this returns, and when it is killed.
    """
    identity = load_identity(settings.identity)
    settings = settings.at(identity.own_address)
    for directory in (settings.run_directory, settings.doors, settings.run_directory / "moves"):
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (settings.state_directory / "agent.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(f"an agent already runs on {settings.state_directory}") from None
        forbid_dumps()  # one-time keys pass through this process
        log_to_stderr()
        if not lock_memory():
            log.info("memory.swappable", todo="allow RLIMIT_MEMLOCK unlimited or CAP_IPC_LOCK, or have no clear swap")
        asyncio.run(_serve(settings, identity))


async def _serve(settings: AgentSettings, identity: Identity) -> None:
    doorman = asyncio.create_task(_keep_doorman(settings, await _start_doorman(settings)))
    async with _agent(settings, identity) as agent:
        host, port = split_address(settings.listen)
        config = uvicorn.Config(
            make_app(agent),
            host=host,
            port=port,
            ssl_context_factory=lambda _config, _default: identity.server_context(),
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=1,
        )
        log.info("agent.started", host=settings.name, listen=settings.listen, doorman=settings.migration_listen)
        await uvicorn.Server(config).serve()
    doorman.cancel()


@asynccontextmanager
async def _agent(settings: AgentSettings, identity: Identity) -> AsyncIterator[Agent]:
    """The agent's parts, with everything found again that an earlier one left running."""
    cipher = await asyncio.to_thread(lambda: cipher_facts(enabled=settings.sealed_channel))
    hypervisor = QemuHypervisor(settings.qemu, settings.accelerator)
    journal, vault, images = Journal(settings.database), Vault(settings.name), Images()
    vms = Vms(settings, journal, hypervisor, vault, images)
    moves = Moves(settings, identity.host, journal, hypervisor, vms, can_seal=not cipher.refusal)
    conversions = Conversions(settings, journal, vms, images)
    try:
        await vms.adopt()
        await moves.recover()
        await conversions.recover()
        if not cipher.refusal:
            moves.relays.keep_one()
        yield Agent(settings, identity, cipher, hypervisor, images, journal, vms, moves, conversions)
    finally:
        await conversions.close()
        await moves.close()
        await vms.close()
        vault.close()
        journal.close()


async def _start_doorman(settings: AgentSettings) -> int:
    """The pid of the host's doorman: one that an earlier agent started and that still holds its lock, or a new one."""
    lock = str(settings.run_directory / "doorman.lock")
    if (pid := doorman_pid(lock)) is not None:
        return pid
    pid, port = await start_doorman(
        settings.migration_listen, str(settings.doors), lock, str(settings.state_directory / "doorman.log")
    )
    log.info("doorman.started", pid=pid, port=port)
    return pid


async def _keep_doorman(settings: AgentSettings, pid: int) -> None:
    """Start another doorman whenever this one ends; moves under way do not need it."""
    while True:
        try:
            await ProcessRef.of(pid).wait_exit()
            log.warning("doorman.ended", pid=pid)
            pid = await _start_doorman(settings)
        except SealiftError as error:
            log.error("doorman.missing", what=str(error))
            await asyncio.sleep(_DOORMAN_AGAIN_S)
