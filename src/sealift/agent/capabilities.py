"""What this host can do, looked at anew for each question except what cannot change while the agent runs."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

import sealift
from sealift.agent.settings import AgentSettings
from sealift.channel import selftest
from sealift.channel.protocol import CHANNEL_VERSION
from sealift.domain.host import HostCapabilities
from sealift.errors import SelfTestFailed
from sealift.hypervisor.base import Hypervisor

_MEASURE_BYTES, _MEASURE_S = 1 << 20, 0.05


@dataclass(frozen=True)
class CipherFacts:
    """The cipher on this host: why sealing is not to be had (empty: it is), AES instructions, GB/s of one core."""

    refusal: str
    aes_instructions: bool
    gb_per_s: float


def cipher_facts(*, enabled: bool) -> CipherFacts:
    """Run the known-answer test and a short measurement; a failed test makes the host incapable, not the agent dead."""
    refusal = "" if enabled else "sealed_channel is false in the agent's configuration"
    try:
        selftest.run()
    except SelfTestFailed as error:
        refusal = str(error)
    return CipherFacts(refusal, _cpu_has_aes(), _measure())


async def capabilities(
    settings: AgentSettings, host: UUID, cipher: CipherFacts, hypervisor: Hypervisor
) -> HostCapabilities:
    """The report; raises HypervisorError when QEMU does not answer."""
    return HostCapabilities(
        host=host,
        name=settings.name,
        agent_version=sealift.__version__,
        sealed_channel=not cipher.refusal,
        sealed_channel_reason=cipher.refusal,
        channel_versions=() if cipher.refusal else (CHANNEL_VERSION,),
        aes_instructions=cipher.aes_instructions,
        aes_gcm_gb_per_s=cipher.gb_per_s,
        qemu_version=await hypervisor.version(),
        machine_types=tuple(sorted(set((await hypervisor.machines()).values()))),
        accelerators=await hypervisor.accelerators(),
        memory_free_bytes=memory_available(),
        migration_address=settings.migration_address,
        cpu_model=_cpu_field("model name"),
    )


def memory_available() -> int:
    """Bytes the kernel believes it can give without swapping (proc(5), MemAvailable)."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _cpu_field(name: str) -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def _cpu_has_aes() -> bool:
    return "aes" in _cpu_field("flags").split()


def _measure() -> float:
    cipher, data, out = AESGCM(os.urandom(32)), bytes(_MEASURE_BYTES), bytearray(_MEASURE_BYTES + 16)
    sealed, began = 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < _MEASURE_S:
        cipher.encrypt_into(sealed.to_bytes(12, "big"), data, None, out)
        sealed += 1
    return round(sealed * _MEASURE_BYTES / spent / 1e9, 2)
