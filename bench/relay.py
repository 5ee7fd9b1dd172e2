"""Measure a pair of relays alone: pump bytes from a local socket through source and target relay into a sink.

    python bench/relay.py [--gib 2] [--runs 3] [--channels 1 4] [--json FILE]

Everything runs on this machine over loopback. CPU-seconds are those of each relay process (user and system), from
/proc, divided by 10^9 plaintext bytes; the peak of resident memory is VmHWM of the larger relay. Feeding and draining
is done by this process and not counted.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import json
import os
import platform
import secrets
import shutil
import signal
import socket
import statistics
import tempfile
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from sealift.channel.doorman import door_path
from sealift.channel.local_sockets import SOURCE_SOCKET, TARGET_SOCKET
from sealift.channel.protocol import CHANNEL_VERSION, MAX_REKEY_BYTES, MAX_REKEY_RECORDS, ChannelSpec, Plan
from sealift.channel.relay_client import RelayClient, start_doorman, start_relay
from sealift.channel.relay_spec import RECORD_BYTES, RelaySpec

CHUNK = 256 << 10
SOCKET_BUFFER = 4 << 20


@dataclass
class Run:
    seconds: float
    gigabytes: float
    cpu: dict[str, float]
    peak_rss_mib: float


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    model = "unknown"
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "memory_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20,
    }


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_rss_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("the kernel does not report VmHWM")


def feed(path: str, count: int) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER)
        sock.connect(path)
        data = memoryview(secrets.token_bytes(CHUNK))
        while count > 0:
            sock.sendall(data[:count])
            count -= CHUNK
        sock.shutdown(socket.SHUT_WR)
        sock.recv(1)


def drain(listener: socket.socket, counts: list[int]) -> None:
    sock, _ = listener.accept()
    buffer = bytearray(CHUNK)
    total = 0
    with sock:
        while got := sock.recv_into(buffer):
            total += got
    counts.append(total)


async def one_run(kind: str, channels: int, total: int, record_bytes: int) -> Run:
    root = tempfile.mkdtemp(prefix="slb-")
    pids: list[int] = []
    try:
        for name in ("doors", "a", "b"):
            os.mkdir(f"{root}/{name}", 0o700)
        pid, port = await start_doorman("127.0.0.1:0", f"{root}/doors", f"{root}/lock", f"{root}/doorman.log")
        pids.append(pid)
        plan = Plan.SEALED if kind == "relay" else Plan.PLAIN
        ids = [uuid.uuid4().bytes for _ in range(4)]
        spec = ChannelSpec(*ids, plan, CHANNEL_VERSION, channels, 64 << 20, MAX_REKEY_RECORDS, MAX_REKEY_BYTES)
        secret = secrets.token_bytes(40 if kind == "relay" else 16)
        route = spec.attempt if kind == "relay" else secret
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"{root}/b/{TARGET_SOCKET}")
            listener.listen(channels)
            listener.settimeout(30)
            common = {
                "spec": spec,
                "qemu_pid": os.getpid(),
                "record_bytes": record_bytes,
            }
            target = RelaySpec(
                "target",
                directory=f"{root}/b",
                door=door_path(f"{root}/doors", route),
                source_address="127.0.0.1",
                **common,
            )
            target_pid = await start_relay(kind, target, secret, f"{root}/target.log")
            pids.append(target_pid)
            source = RelaySpec("source", directory=f"{root}/a", target=f"127.0.0.1:{port}", **common)
            source_pid = await start_relay(kind, source, secret, f"{root}/source.log")
            pids.append(source_pid)
            at_source, at_target = await RelayClient.connect(f"{root}/a"), await RelayClient.connect(f"{root}/b")
            events = await at_source.wait(0, 10)
            if not events or events[0]["type"] != "connected":
                raise RuntimeError(f"the relays did not connect: {events}, {await at_target.wait(0, 1)}")
            roles = {"relay_source": source_pid, "relay_target": target_pid}
            before = {role: cpu_seconds(pid) for role, pid in roles.items()}
            counts: list[int] = []
            drains = [threading.Thread(target=drain, args=(listener, counts), daemon=True) for _ in range(channels)]
            feeds = [
                threading.Thread(target=feed, args=(f"{root}/a/{SOURCE_SOCKET}", total // channels), daemon=True)
                for _ in range(channels)
            ]
            began = time.monotonic()
            for thread in drains + feeds:
                thread.start()
            for thread in drains + feeds:
                await asyncio.to_thread(thread.join)
            seconds = time.monotonic() - began
            assert sum(counts) == total // channels * channels, "bytes were lost"
            cpu = {role: cpu_seconds(pid) - before[role] for role, pid in roles.items()}
            rss = max(peak_rss_mib(pid) for pid in roles.values())
            await at_source.close()
            await at_target.close()
        return Run(seconds, sum(counts) / 1e9, cpu, rss)
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        shutil.rmtree(root, ignore_errors=True)


def row(kind: str, channels: int, runs: list[Run]) -> dict[str, object]:
    """Medians of several runs, in the format every bench of ours writes."""

    def median(values: list[float]) -> float:
        return round(statistics.median(values), 4)

    return {
        "name": "relay pair" if kind == "relay" else "splice pair",
        "path": "sealift" if kind == "relay" else "sealift-plain",
        "channels": channels,
        "runs": len(runs),
        "seconds": median([r.seconds for r in runs]),
        "gb_per_s": median([r.gigabytes / r.seconds for r in runs]),
        "cpu_s_per_gb": median([sum(r.cpu.values()) / r.gigabytes for r in runs]),
        "cpu_s_per_gb_by": {role: median([r.cpu[role] / r.gigabytes for r in runs]) for role in runs[0].cpu},
        "downtime_ms": None,
        "peak_rss_mib": median([r.peak_rss_mib for r in runs]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=2.0, help="GiB pumped in each run")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--channels", type=int, nargs="+", default=[1, 4], help="numbers of data channels to measure")
    parser.add_argument("--record-bytes", type=int, default=RECORD_BYTES)
    parser.add_argument("--kind", choices=["relay", "splice"], default="relay")
    parser.add_argument("--json", metavar="FILE", help="write the figures here as well")
    options = parser.parse_args()
    measured: dict[int, list[Run]] = {n: [] for n in options.channels}
    for _ in range(options.runs):  # alternating, so that a slow minute hits every row
        for channels, runs in measured.items():
            runs.append(asyncio.run(one_run(options.kind, channels, int(options.gib * 2**30), options.record_bytes)))
    results = [row(options.kind, channels, runs) for channels, runs in measured.items()]
    print(
        f"{'channels':>8} {'GB/s':>7} {'source':>8} {'target':>8} {'RSS MiB':>8}    CPU-seconds per GB, median of runs"
    )
    for line in results:
        by = line["cpu_s_per_gb_by"]
        assert isinstance(by, dict)
        figures = f"{line['gb_per_s']:7.2f} {by['relay_source']:8.3f} {by['relay_target']:8.3f}"
        print(f"{line['channels']:>8} {figures} {line['peak_rss_mib']:8.1f}")
    if options.json:
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        report = {"machine": machine(), "date": date, "results": results}
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
