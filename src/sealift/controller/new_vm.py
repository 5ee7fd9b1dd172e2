"""A VM that is not there yet: read from its file, named once, in clear."""

from __future__ import annotations

import secrets
import time
from uuid import UUID, uuid4

from pydantic import TypeAdapter
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from sealift.controller.models import HostRow, VmRow
from sealift.domain.policy import MigrateEncryption
from sealift.domain.vm import VmConfig
from sealift.domain.vm_file import parse_vm_toml
from sealift.errors import AlreadyExists

CONFIG = TypeAdapter(VmConfig)
"""A configuration as the database has it, as JSON."""


def parse_new(text: str) -> VmConfig:
    """The configuration of a new VM from its TOML file; raises InvalidInput."""
    return parse_vm_toml(text, new_uuid=uuid4(), mac=_draw_mac())


def new_vm(config: VmConfig, host: HostRow) -> VmRow:
    """The row of a new VM in clear, not stored yet."""
    return VmRow(
        uuid=config.uuid,
        name=config.name,
        host=host.id,
        migrate_encryption=MigrateEncryption.OPPORTUNISTIC.value,
        encrypted=False,
        fence=1,
        config=CONFIG.dump_python(config, mode="json"),
        created_at=time.time(),
        generation=0,
        lock_reason="",
    )


async def require_new(session: AsyncSession, name: str, uuid: UUID) -> None:
    """Raise AlreadyExists when a VM has that name or uuid."""
    taken = await session.scalar(select(VmRow.name).where((VmRow.name == name) | (VmRow.uuid == uuid)))
    if taken is not None:
        raise AlreadyExists(f"VM {taken} is there already, with that name or uuid", todo="choose another")


def _draw_mac() -> str:
    """A random address in the range that QEMU uses for its cards."""
    return "52:54:00:" + ":".join(f"{byte:02x}" for byte in secrets.token_bytes(3))
