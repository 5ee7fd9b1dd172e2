"""What a host is and what it says it can do."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from sealift.domain.vm import Accelerator


@dataclass(frozen=True)
class HostCapabilities:
    """An agent's report, asked for over mutual TLS for each attempt. Memory in bytes, speed in GB/s."""

    host: UUID
    name: str
    agent_version: str
    sealed_channel: bool  # false: switched off in the configuration, or the cipher's self-test failed
    sealed_channel_reason: str  # why not, else empty
    channel_versions: tuple[int, ...]
    aes_instructions: bool
    aes_gcm_gb_per_s: float
    qemu_version: str
    machine_types: tuple[str, ...]
    accelerators: tuple[Accelerator, ...]
    memory_free_bytes: int
    migration_address: str  # host:port of the doorman
    cpu_model: str
