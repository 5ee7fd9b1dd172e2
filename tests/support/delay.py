"""Carries IP packets between two network namespaces, each packet late by the same time: a long cable.

Run as a module: NAMESPACE DEVICE NAMESPACE DEVICE SECONDS. It makes a TUN device in each namespace, prints a line when
both are there, and carries until it is ended. What is more than the cable holds is dropped, as a router's queue would.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import struct
import sys
import time
from collections import deque
from pathlib import Path

_CLONE_NEWNET = 0x40000000
_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_PACKET_BYTES = 1 << 16
_QUEUE_PACKETS = 20_000


def _device(namespace: str, name: str) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    there = os.open(Path("/run/netns") / namespace, os.O_RDONLY)
    try:
        if libc.setns(there, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
    finally:
        os.close(there)
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return fd


def main() -> None:
    """Carry."""
    near, far = _device(*sys.argv[1:3]), _device(*sys.argv[3:5])
    delay = float(sys.argv[5])
    print("carrying", flush=True)
    other = {near: far, far: near}
    queue: deque[tuple[float, int, bytes]] = deque()  # in order, since all wait equally long
    while True:
        wait = max(0.0, queue[0][0] - time.monotonic()) if queue else None
        for fd in select.select([near, far], [], [], wait)[0]:
            try:
                packet = os.read(fd, _PACKET_BYTES)
            except BlockingIOError:
                continue
            if len(queue) < _QUEUE_PACKETS:
                queue.append((time.monotonic() + delay, other[fd], packet))
        now = time.monotonic()
        while queue and queue[0][0] <= now:
            _, fd, packet = queue.popleft()
            try:
                os.write(fd, packet)
            except OSError:
                continue  # the device is down, or its queue is full: lost, as on any cable


if __name__ == "__main__":
    main()
