"""One TCP connection of one channel, as the pumps and the control link see it: sealed in a relay, plain in a splice.

Also what all connections between the hosts have in common: socket options, and reading with a deadline.
"""

from __future__ import annotations

import contextlib
import socket
import time
from dataclasses import dataclass
from typing import Final, Protocol

from sealift.channel.liveness import Beat
from sealift.channel.protocol import CloseReason

SOCKET_BUFFER_BYTES: Final = 4 << 20
"""Asked for at every data socket, TCP and local; the kernel gives what its limits allow."""

RETURN_PATH_BYTES: Final = 16 << 10
"""Payload of a record against the direction of the move: QEMU's return path is a few bytes now and then."""


CONTROL_RECORD_BYTES: Final = 16 << 10
"""Payload of a record of the control channel; room for any control frame."""

CONTROL_WINDOW: Final = 256 << 10
"""Bytes of control messages that may wait for their acknowledgement."""


@dataclass
class Counters:
    """What went over one or more connections: plaintext bytes of the streams, records of every type."""

    bytes_out: int = 0
    bytes_in: int = 0
    records_out: int = 0
    records_in: int = 0
    rekeys_out: int = 0
    rekeys_in: int = 0

    def add(self, other: Counters) -> None:
        """Sum up."""
        self.bytes_out += other.bytes_out
        self.bytes_in += other.bytes_in
        self.records_out += other.records_out
        self.records_in += other.records_in
        self.rekeys_out += other.rekeys_out
        self.rekeys_in += other.rekeys_in


class Wire(Protocol):
    """A connection that counts: preface, handshake and first record are behind it.

    One thread sends, another receives; what there is to send is in the channel's ledger. Every method that sends or
    receives raises OSError when TCP does.
    """

    @property
    def sock(self) -> socket.socket: ...
    def push(self) -> None:
        """Send what the ledger has to send: bytes, the end of the stream, an acknowledgement that is due.

        Blocks while the peer does not take it. Raises Replaced when another connection carries the channel by now.
        """

    def acknowledge(self) -> None:
        """Acknowledge what was delivered, due or not."""

    def give_up(self, reason: CloseReason) -> None:
        """Tell the peer why we stop, if it can still be told."""

    def counters(self) -> Counters: ...
    def release(self) -> None:
        """Drop the buffers; both threads are done."""


class DataWire(Wire, Protocol):
    """Carries QEMU's bytes, out of and into the ledger of its channel."""

    def receive(self) -> memoryview | None:
        """The next bytes of the stream, good until the next call and the caller's to deliver; None at its end.

        Empty when only an acknowledgement came.

        Raises ChannelError, and Replaced when another connection carries the channel by now.
        """


class ControlWire(Wire, Protocol):
    """Carries messages, as bytes of the stream, and heartbeats."""

    def send_beat(self, beat: Beat) -> None: ...
    def receive(self) -> list[memoryview | Beat | None]:
        """What one receive brought, perhaps nothing; None stands for the end. Raises ChannelError, Replaced."""


def prepare_tcp(sock: socket.socket, *, data: bool) -> None:
    """Options of a TCP connection between two hosts."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
    if data:
        widen(sock)


def widen(sock: socket.socket) -> None:
    """Ask for large socket buffers."""
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)


def set_remaining(sock: socket.socket, deadline: float) -> None:
    """Let the next call on ``sock`` take until ``deadline`` (monotonic seconds); raises TimeoutError if it is past."""
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise TimeoutError("the deadline has passed")
    sock.settimeout(remaining)


def receive_exactly(sock: socket.socket, count: int, deadline: float) -> bytes:
    """``count`` bytes, not one more; raises TimeoutError, ConnectionError at an early end, and OSError."""
    data = bytearray(count)
    view, have = memoryview(data), 0
    while have < count:
        set_remaining(sock, deadline)
        got = sock.recv_into(view[have:])
        if got == 0:
            raise ConnectionError("the peer closed the connection")
        have += got
    return bytes(data)


def shut(sock: socket.socket, how: int = socket.SHUT_RDWR) -> None:
    """Shut a socket down, which wakes every thread that waits at it; a socket that is gone already is fine."""
    with contextlib.suppress(OSError):
        sock.shutdown(how)
