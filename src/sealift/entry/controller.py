"""Composition root of the controller: `sealift controller init` and `sealift controller run`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import structlog
import uvicorn

from sealift.api.app import create_app
from sealift.controller.authority import Authority, check_names, create_authority, write_private
from sealift.controller.conversion_plan import UNREADABLE, machine_uuid
from sealift.controller.services import Services, Settings, load_settings, open_services, settings_path
from sealift.domain.token import fingerprint_text
from sealift.entry.logs import log_to_stderr
from sealift.errors import AlreadyExists, InvalidInput


@dataclass(frozen=True)
class Initialised:
    """What ``init`` made; the two tokens are secret and shown once."""

    address: str  # https://host:port
    fingerprint: str
    admin_token: str
    join_token: str  # good for one host within the hour
    join_command: str  # takes the join token on its standard input


def init(state: Path, *, listen: str, addresses: Sequence[str]) -> Initialised:
    """Make a new controller in the directory ``state``.

    ``listen`` is host:port, ``addresses`` the names and IP addresses it is called by, the first one by agents.
    Raises AlreadyExists when ``state`` is there and not empty, InvalidInput for bad addresses.
    """
    host, _, port = listen.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise InvalidInput(f"'{listen}' is not an address to listen at", todo="write it as host:port")
    if not addresses:
        raise InvalidInput("the controller needs a name it is called by", todo="give --address NAME")
    check_names(addresses)
    if state.exists() and any(state.iterdir()):
        raise AlreadyExists(f"{state} is not empty", todo="name another directory; nothing here was changed")
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    state.chmod(0o700)
    settings = Settings(uuid4(), listen, tuple(addresses))
    authority = create_authority(state, settings.controller)
    write_private(settings_path(state), settings.dump())
    admin, join = asyncio.run(_first_tokens(state))
    return Initialised(
        address=settings.url,
        fingerprint=fingerprint_text(authority.controllers.fingerprint),
        admin_token=admin,
        join_token=join,
        join_command=f"sealift agent join {settings.url} --token -",
    )


async def _first_tokens(state: Path) -> tuple[str, str]:
    services = await open_services(state)
    try:
        admin = await services.access.new_admin_token("admin")
        join, _ = await services.access.new_join_token(replaces=None, asked_by="admin")
    finally:
        await services.close()
    return admin.text(), join.text()


def run(state: Path) -> None:
    """Serve until SIGTERM or SIGINT; raises NotFound when ``state`` holds no controller."""
    from sealift.process import forbid_dumps, lock_memory

    load_settings(state)
    forbid_dumps()  # one-time keys and keys of encrypted VMs pass through this process
    log_to_stderr()
    if not lock_memory():
        log = structlog.get_logger("sealift.controller")
        log.info("memory.swappable", todo="allow RLIMIT_MEMLOCK unlimited or CAP_IPC_LOCK, or have no clear swap")
    asyncio.run(_serve(state))


async def _serve(state: Path) -> None:
    services = await open_services(state)
    log = structlog.get_logger("sealift.controller")
    if machine_uuid() == UNREADABLE:
        log.warning("this machine is virtual and its UUID cannot be read: no plan can tell which VM it is")
    log.info("the controller listens", listen=services.settings.listen, url=services.settings.url)
    await server(services).serve()


def server(services: Services) -> uvicorn.Server:
    """The API's server over TLS 1.3, at the address of the settings."""
    host, _, port = services.settings.listen.rpartition(":")
    authority: Authority = services.authority
    context = authority.server_context(services.settings.addresses)
    return uvicorn.Server(
        uvicorn.Config(
            create_app(services),
            host=host.strip("[]"),
            port=int(port),
            ssl_context_factory=lambda _config, _default: context,
            timeout_graceful_shutdown=1,  # an open event stream would keep it alive for ever
            log_config=None,
            access_log=False,
            server_header=False,
            ws="none",
        )
    )
