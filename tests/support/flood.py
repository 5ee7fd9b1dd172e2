"""A flood of connections to one port, from a process of its own: garbage, halves, silence, moves that do not exist.

    python flood.py PORT LEAST

makes at least LEAST connections from several addresses of loopback, and goes on until its standard input ends. It
prints how many it has made, a number a line, now and then and at the end.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import subprocess
import sys
from collections import deque
from pathlib import Path

ORIGINS = ("127.0.0.1", "127.0.0.2", "127.0.0.3")
"""The first of them is where tests have their relays: it is where the flood comes from, too."""
_HELD = 200
_TELL_EVERY = 500


class Flood:
    """Use it in a ``with`` block, in which the flood never ceases."""

    def __init__(self, port: int, least: int) -> None:
        self._least = least
        self._made = 0
        argv = [sys.executable, str(Path(__file__)), str(port), str(least)]
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __enter__(self) -> Flood:
        self.swells(1)
        return self

    def __exit__(self, *exc: object) -> None:
        with self._process:
            assert self._process.stdin is not None
            self._process.stdin.close()
            assert self._process.stdout is not None
            for line in self._process.stdout:
                self._made = int(line)

    def swells(self, connections: int) -> int:
        """Return when so many more were made; how many it has been in all."""
        until = self._made + connections
        assert self._process.stdout is not None
        while self._made < until:
            line = self._process.stdout.readline()
            assert line, "the flood has ceased"
            self._made = int(line)
        return self._made

    @property
    def made(self) -> int:
        """Connections that were made; all of them only after the block."""
        return self._made


def _pour(port: int, least: int) -> None:
    words = itertools.cycle([_unknown_move, _garbage, _half, _unknown_plain_move, _nothing])
    held: deque[socket.socket] = deque()
    os.set_blocking(0, False)
    for made, (origin, word) in enumerate(zip(itertools.cycle(ORIGINS), words, strict=False)):
        if made % _TELL_EVERY == 0:
            print(made, flush=True)
            if made >= least and _told_to_stop():
                break
        sock = socket.socket()
        with contextlib.suppress(OSError):
            sock.bind((origin, 0))
            sock.connect(("127.0.0.1", port))
            sock.sendall(word())
        held.append(sock)
        if len(held) > _HELD:
            held.popleft().close()
    for sock in held:
        sock.close()


def _told_to_stop() -> bool:
    try:
        return os.read(0, 1) == b""
    except BlockingIOError:
        return False


def _unknown_move() -> bytes:
    return b"SLFT\x01\x02\x00\x01" + os.urandom(16) + b"\x00\x00\x00\x01" + os.urandom(48)


def _unknown_plain_move() -> bytes:
    return b"SLFP\x01\x01\x00\x00" + os.urandom(16) + b"\x00\x00\x00\x01"


def _garbage() -> bytes:
    return os.urandom(200)


def _half() -> bytes:
    return b"SLFT\x01\x02\x00\x01" + os.urandom(6)


def _nothing() -> bytes:
    return b""


if __name__ == "__main__":
    _pour(int(sys.argv[1]), int(sys.argv[2]))
