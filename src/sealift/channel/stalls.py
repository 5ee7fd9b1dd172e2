"""Has a data connection died while the control channel lives?

A firewall that forgot one connection, or one dead path of several, drops packets without a word, and TCP alone would
repeat them for a quarter of an hour. So the kernel is asked what it sees: bytes are on the way, and the peer's kernel
has answered nothing and taken none of them for as long as silence may last. Back-pressure looks different: a receiver
that takes nothing closes its window, nothing is on the way then, and its kernel goes on answering. A connection with
nothing on the way is TCP keep-alive's business.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

from sealift.channel.carrier import Carrier
from sealift.channel.wire import Wire
from sealift.errors import PeerSilent

_INFO: Final = struct.Struct("=8B24I3Q")
"""``struct tcp_info`` of linux/tcp.h as far as ``tcpi_bytes_acked``."""
_UNACKED, _LAST_ACK_RECEIVED, _BYTES_ACKED = 8 + 4, 8 + 12, 8 + 24 + 2


@dataclass(frozen=True, slots=True)
class Flight:
    """What a kernel says of one connection: segments on the way, milliseconds since the peer's kernel last answered,
    bytes it has taken."""

    segments: int
    quiet_ms: int
    acked: int


def flight(sock: socket.socket) -> Flight:
    """Ask the kernel. Raises OSError for a socket that is closed."""
    words = _INFO.unpack(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO.size))
    return Flight(words[_UNACKED], words[_LAST_ACK_RECEIVED], words[_BYTES_ACKED])


class Stall:
    """Judges one connection, looked at again and again. Pure: times are seconds of a clock that never jumps."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._since: float | None = None
        self._acked = -1

    def dead(self, seen: Flight, now: float) -> bool:
        """Whether nothing that was on the way has arrived for as long as the limit."""
        if seen.segments == 0:
            self._since = None
            return False
        if seen.acked != self._acked or self._since is None:
            self._since, self._acked = now, seen.acked
            return False
        return now - self._since >= self._limit and seen.quiet_ms >= 1000 * self._limit


def watch(carriers: Callable[[], Iterable[Carrier[Any]]], limit: float, over: threading.Event) -> None:
    """Take connections that died for broken, until ``over``; a thread of its own runs this. ``limit``: seconds."""
    judges: dict[int, tuple[Wire, Stall]] = {}
    while not over.wait(limit / 5):
        for carrier in carriers():
            wire = carrier.current
            if wire is None:
                continue
            if carrier.channel not in judges or judges[carrier.channel][0] is not wire:
                judges[carrier.channel] = wire, Stall(limit)
            try:
                dead = judges[carrier.channel][1].dead(flight(wire.sock), time.monotonic())
            except OSError:
                continue  # closed meanwhile
            if dead:
                what = f"the other host acknowledged nothing on channel {carrier.channel} for {limit:g} s"
                carrier.lost(wire, PeerSilent(what, todo="look for a firewall or a path that drops this connection"))
