"""What every bench of ours has in common: what a run measured, the rows of its report, the machine it ran on.

A report is one JSON object: ``machine``, ``date`` (ISO 8601, UTC) and ``results``, a list of rows as ``row`` makes
them. GB are 10^9 bytes of the stream, before sealing.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
    """One measured run. What does not apply is None, or empty.

    ``cpu`` is user and system time in seconds by role, ``peak_rss_mib`` the largest of the processes between the QEMUs
    and ``peak_rss_mib_by`` that of each role. ``downtime_ms`` is QEMU's own figure, ``stop_to_resume_ms`` the time from
    the source's STOP to the target's RESUME. ``others_cores`` is what everybody else on the machine used meanwhile.
    """

    seconds: float
    gigabytes: float
    cpu: dict[str, float]
    peak_rss_mib: float | None
    downtime_ms: float | None = None
    stop_to_resume_ms: float | None = None
    peak_rss_mib_by: dict[str, float] = field(default_factory=dict)
    others_cores: float | None = None


class Processes:
    """CPU time of several processes and their children from construction on, by role; they must still be there.

    The threads in which a QEMU runs its guest are left out: what the guest does with its time is not the migration's.
    The kernel counts in ticks of 10 ms, so runs of less than about a second of CPU time say little.
    """

    def __init__(self, roles: Mapping[str, int]) -> None:
        self._roles = dict(roles)
        self._began = time.monotonic()
        self._busy = _machine_seconds()
        self._before = {role: _role_seconds(pid) for role, pid in self._roles.items()}
        self._own = time.process_time()

    def cpu(self) -> dict[str, float]:
        now = {role: _role_seconds(pid) for role, pid in self._roles.items()}
        return {role: spent.counted - self._before[role].counted for role, spent in now.items()}

    def others_cores(self) -> float:
        """Cores that were busy, or taken away by the hypervisor, with what is neither these processes nor this one."""
        ours = time.process_time() - self._own
        for role, pid in self._roles.items():
            now, before = _role_seconds(pid), self._before[role]
            ours += now.counted - before.counted + now.guest - before.guest
        return max(0.0, _machine_seconds() - self._busy - ours) / (time.monotonic() - self._began)


@dataclass(frozen=True)
class _Spent:
    counted: float
    guest: float


def _role_seconds(pid: int) -> _Spent:
    """What a process, its children and theirs have used, in seconds, and apart from it their guests' threads."""
    counted, guest = 0, 0
    for member in _family(pid):
        counted += sum(_stat(f"/proc/{member}/stat")[11:15])  # its own and its ended children's
        for thread in Path(f"/proc/{member}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
                if (thread / "comm").read_text().startswith("CPU "):
                    guest += sum(_stat(f"{thread}/stat")[11:13])
    tick = os.sysconf("SC_CLK_TCK")
    return _Spent((counted - guest) / tick, guest / tick)


def _machine_seconds() -> float:
    """What all processors of the machine have been busy for: user, nice, system, irq, softirq, steal."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split(maxsplit=9)[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def _stat(path: str) -> list[int]:
    """The fields of a process or thread from its state on (which is given as 0), as proc(5) numbers them from 3."""
    return [0, *map(int, Path(path).read_text().rpartition(")")[2].split()[1:])]


def _family(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                children.setdefault(_stat(f"{entry}/stat")[1], []).append(int(entry.name))
    family = [pid]
    for member in family:
        family += children.get(member, [])
    return family


def peak_rss_mib_of_family(pid: int) -> float:
    """The most memory that the process, or one of its children, had resident so far, in MiB."""
    return max(peak_rss_mib(member) for member in _family(pid))


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
        "stop_to_resume_ms": median([run.stop_to_resume_ms for run in runs]),
        "peak_rss_mib": median([run.peak_rss_mib for run in runs]),
        "peak_rss_mib_by": {
            role: median([run.peak_rss_mib_by[role] for run in runs]) for role in runs[0].peak_rss_mib_by
        },
        "others_cores": median([run.others_cores for run in runs]),
    }


def side(by: Mapping[str, float], end: str, *, qemu: bool) -> float | None:
    """Of figures by role, that of QEMU, or of what stands before it, at ``end`` (``source`` or ``target``)."""
    found = [by[role] for role in by if role.endswith(f"_{end}") and (role == f"qemu_{end}") is qemu]
    return found[0] if found else None


def table(rows: Sequence[Row]) -> str:
    """The rows for people."""

    def cell(value: float | None, places: int) -> str:
        return "-" if value is None else f"{value:.{places}f}"

    titles = ["", "path", "channels", "s", "GB/s", "all", "source", "target", "source QEMU", "target QEMU"]
    lines = [[*titles, "downtime ms", "STOP-RESUME ms", "RSS MiB"]]
    for line in rows:
        by = line["cpu_s_per_gb_by"]
        lines.append(
            [line["name"], line["path"], str(line["channels"]), cell(line["seconds"], 2), cell(line["gb_per_s"], 2)]
            + [cell(line["cpu_s_per_gb"], 3)]
            + [cell(side(by, end, qemu=qemu), 3) for qemu in (False, True) for end in ("source", "target")]
            + [cell(line["downtime_ms"], 0), cell(line["stop_to_resume_ms"], 0), cell(line["peak_rss_mib"], 1)]
        )
    widths = [max(len(text) for text in column) for column in zip(*lines, strict=True)]
    rendered = [
        "  ".join(
            text.ljust(w) if n < 2 else text.rjust(w) for n, (text, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join(
        [
            *rendered,
            "medians; from `all` to `target QEMU`: CPU-seconds per GB; source, target: what stands between the QEMUs",
        ]
    )


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
