"""The relays alone: bytes pumped from a local socket through source and target relay into a sink.

Feeding and draining are done by this process and not counted.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import threading
import time
from pathlib import Path

from parts.measure import Processes, Run, peak_rss_mib
from parts.relays import Kind, connected_pair
from sealift.channel.local_sockets import SOURCE_SOCKET, TARGET_SOCKET
from sealift.channel.wire import SOCKET_BUFFER_BYTES

_CHUNK = 256 << 10
_PATIENCE_S = 30


def _feed(path: str, count: int) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
        sock.settimeout(_PATIENCE_S)
        sock.connect(path)
        data = memoryview(secrets.token_bytes(_CHUNK))
        while count > 0:
            sock.sendall(data[:count])
            count -= _CHUNK
        sock.shutdown(socket.SHUT_WR)
        sock.recv(1)


def _drain(listener: socket.socket, counts: list[int]) -> None:
    sock, _ = listener.accept()
    buffer = bytearray(_CHUNK)
    total = 0
    with sock:
        sock.settimeout(_PATIENCE_S)
        while got := sock.recv_into(buffer):
            total += got
    counts.append(total)


async def pair_run(kind: Kind, channels: int, total: int, record_bytes: int, root: Path) -> Run:
    """Pump ``total`` bytes over ``channels`` channels; raises RuntimeError when not all of them arrive."""
    pid = os.getpid()
    async with connected_pair(
        kind, root, channels, source_pid=pid, target_pid=pid, record_bytes=record_bytes
    ) as relays:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(relays.target.directory / TARGET_SOCKET))
            listener.listen(channels)
            listener.settimeout(_PATIENCE_S)
            each, counts = total // channels, list[int]()
            local = str(relays.source.directory / SOURCE_SOCKET)
            drains = [threading.Thread(target=_drain, args=(listener, counts), daemon=True) for _ in range(channels)]
            feeds = [threading.Thread(target=_feed, args=(local, each), daemon=True) for _ in range(channels)]
            processes = Processes(relays.roles)
            began = time.monotonic()
            for thread in drains + feeds:
                thread.start()
            for thread in drains + feeds:
                await asyncio.to_thread(thread.join)
            seconds = time.monotonic() - began
            if counts != [each] * channels:
                raise RuntimeError(f"of {each} bytes on each of {channels} channels there arrived {counts}")
            cpu = processes.cpu()
        rss = max(peak_rss_mib(pid) for pid in relays.roles.values())
    return Run(seconds, each * channels / 1e9, cpu, rss)
