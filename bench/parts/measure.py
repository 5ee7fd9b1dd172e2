"""What every bench of ours has in common: what a run measured, the rows of its report, the machine it ran on.

A report is one JSON object: ``machine``, ``date`` (ISO 8601, UTC) and ``results``, a list of rows as ``row`` makes
them. GB are 10^9 bytes of the stream, before sealing.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cryptography
from cryptography.hazmat.backends.openssl import backend
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from sealift.channel.relay_spec import RECORD_BYTES
from sealift.hypervisor.qemu import QemuHypervisor

Row = dict[str, Any]

_CIPHER_S = 0.5


@dataclass(frozen=True)
class Run:
    """One measured run. ``cpu`` is user and system time in seconds by role; what does not apply is None."""

    seconds: float
    gigabytes: float
    cpu: dict[str, float]
    peak_rss_mib: float | None
    downtime_ms: int | None = None


class Processes:
    """CPU time of several processes from the moment of construction on, by role; they must still be there when asked.

    The kernel counts in ticks of 10 ms, so runs of less than about a second of CPU time say little.
    """

    def __init__(self, roles: Mapping[str, int]) -> None:
        self._roles = dict(roles)
        self._before = {role: _cpu_seconds(pid) for role, pid in self._roles.items()}

    def cpu(self) -> dict[str, float]:
        return {role: _cpu_seconds(pid) - self._before[role] for role, pid in self._roles.items()}


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_rss_mib(pid: int) -> float:
    """The most memory the process had resident so far (VmHWM), in MiB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("the kernel does not report VmHWM")


def row(name: str, path: str, channels: int, runs: Sequence[Run]) -> Row:
    """Medians of several runs, each figure for itself."""

    def median(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return round(statistics.median(known), 4) if known else None

    return {
        "name": name,
        "path": path,
        "channels": channels,
        "runs": len(runs),
        "seconds": median([run.seconds for run in runs]),
        "gb_per_s": median([run.gigabytes / run.seconds for run in runs]),
        "cpu_s_per_gb": median([sum(run.cpu.values()) / run.gigabytes for run in runs]),
        "cpu_s_per_gb_by": {role: median([run.cpu[role] / run.gigabytes for run in runs]) for role in runs[0].cpu},
        "downtime_ms": median([run.downtime_ms for run in runs]),
        "peak_rss_mib": median([run.peak_rss_mib for run in runs]),
    }


_ROLES = ("relay_source", "relay_target", "qemu_source", "qemu_target")


def table(rows: Sequence[Row]) -> str:
    """The rows for people."""

    def cell(value: float | None, places: int) -> str:
        return "-" if value is None else f"{value:.{places}f}"

    titles = ["", "path", "channels", "s", "GB/s", "all", *(role.replace("_", " ") for role in _ROLES)]
    lines = [[*titles, "downtime ms", "RSS MiB"]]
    for line in rows:
        by = line["cpu_s_per_gb_by"]
        lines.append(
            [line["name"], line["path"], str(line["channels"]), cell(line["seconds"], 2), cell(line["gb_per_s"], 2)]
            + [cell(value, 3) for value in (line["cpu_s_per_gb"], *(by.get(role) for role in _ROLES))]
            + [cell(line["downtime_ms"], 0), cell(line["peak_rss_mib"], 1)]
        )
    widths = [max(len(text) for text in column) for column in zip(*lines, strict=True)]
    rendered = [
        "  ".join(
            text.ljust(w) if n < 2 else text.rjust(w) for n, (text, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join([*rendered, "medians; from `all` to `qemu target`: CPU-seconds per GB"])


async def machine() -> dict[str, Any]:
    """What the figures were measured on; AES-256-GCM is the bare cipher in one thread, GB per CPU-second."""
    hypervisor = QemuHypervisor()
    sealing, opening = _cipher_speed()
    return {
        "cpu": await hypervisor.cpu_model(),
        "cores": os.cpu_count(),
        "memory_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20,
        "kernel": platform.release(),
        "qemu": await hypervisor.version(),
        "python": platform.python_version(),
        "cryptography": cryptography.__version__,
        "openssl": backend.openssl_version_text(),
        "aes_256_gcm_seal_gb_per_cpu_s": round(sealing, 2),
        "aes_256_gcm_open_gb_per_cpu_s": round(opening, 2),
    }


def _cipher_speed() -> tuple[float, float]:
    """Sealing and opening in buffers that stay the same, as long as a relay's records."""
    cipher, iv = AESGCM(os.urandom(32)), bytes(12)
    plain, sealed = bytearray(os.urandom(RECORD_BYTES)), bytearray(RECORD_BYTES + 16)

    def speed(step: Callable[[], object]) -> float:
        done, began, cpu = 0, time.monotonic(), time.process_time()
        while time.monotonic() - began < _CIPHER_S:
            step()
            done += RECORD_BYTES
        return done / 1e9 / (time.process_time() - cpu)

    sealing = speed(lambda: cipher.encrypt_into(iv, plain, None, sealed))
    return sealing, speed(lambda: cipher.decrypt_into(iv, sealed, None, plain))


def write_json(path: str, machine: dict[str, Any], rows: Sequence[Row]) -> None:
    """Write the report."""
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    Path(path).write_text(json.dumps({"machine": machine, "date": date, "results": list(rows)}, indent=2) + "\n")
