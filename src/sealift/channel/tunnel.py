"""One data channel in a relay: a local socket, a connection to the other host, and a thread for each direction.

    QEMU -- local socket --> outward thread --> wire --> the other host
    QEMU <-- local socket -- inward thread <--- wire <-- the other host

The end of either stream passes through by itself (local end of file -> authenticated end -> half-close of the local
socket there). Anything else that ends a stream ends the move: ``Move.fail`` closes the local sockets first.
Nothing here knows whether the wire is sealed.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from typing import Final, Protocol

from sealift.channel.protocol import CloseReason
from sealift.channel.wire import DataWire, shut
from sealift.errors import ChannelError, LocalClosed, StreamTruncated

LAST_WORDS_S: Final = 1.0
"""How long a side that cannot send any more listens for why."""


class TunnelOwner(Protocol):
    """The move that a tunnel belongs to."""

    @property
    def over(self) -> threading.Event:
        """Set when the move has failed or is being ended: nothing may be handed on any more."""

    @property
    def close_reason(self) -> CloseReason: ...
    def fail(self, error: ChannelError) -> None: ...
    def channel_drained(self, channel: int) -> None: ...
    def spawn(self, name: str, run: Callable[[], None]) -> None: ...


class Tunnel:
    """Pumps until both directions have ended; then both sockets are closed and the buffers dropped."""

    def __init__(self, channel: int, wire: DataWire, local: socket.socket, owner: TunnelOwner) -> None:
        self.channel = channel
        self.wire = wire
        self.outward_done = threading.Event()
        self.inward_done = threading.Event()
        self._local = local
        self._owner = owner
        self._lock = threading.Lock()
        self._left = 2
        self._in_order = True

    def start(self) -> None:
        """Start both threads."""
        self._owner.spawn(f"out-{self.channel}", self._outward)
        self._owner.spawn(f"in-{self.channel}", self._inward)

    def _outward(self) -> None:
        in_order = False
        try:
            self._pump_out()
            in_order = not self._owner.over.is_set()
        except ChannelError as error:
            self._owner.fail(error)
        except OSError:
            # The peer may have said why on its way out; the other thread hears that.
            self.inward_done.wait(LAST_WORDS_S)
            self._owner.fail(self._cut())
        finally:
            self.outward_done.set()
            self._finish(in_order)

    def _pump_out(self) -> None:
        wire, over = self.wire, self._owner.over
        space = wire.space()
        receive, send = self._local.recv_into, wire.send
        while True:
            try:
                count = receive(space)
            except OSError:
                count = 0  # closed with bytes of ours unread; whether they mattered, the other thread finds out
            if count == 0 or over.is_set():
                break
            send(count)
        if over.is_set():
            wire.give_up(self._owner.close_reason)
        else:
            wire.end()

    def _inward(self) -> None:
        in_order = False
        try:
            self._pump_in()
            in_order = True
        except ChannelError as error:
            self._owner.fail(error)
        except OSError:
            self._owner.fail(self._cut())
        finally:
            self.inward_done.set()
            if not in_order:
                self._discard()
            self._finish(in_order)

    def _pump_in(self) -> None:
        receive, deliver = self.wire.receive, self._local.sendall
        while (data := receive()) is not None:
            try:
                deliver(data)
            except OSError:
                raise LocalClosed(
                    f"the process served here closed channel {self.channel} before it had taken everything"
                ) from None
        shut(self._local, socket.SHUT_WR)

    def _discard(self) -> None:
        """Read on without looking, so that closing does not reset the connection under our own last record."""
        waste = bytearray(64 << 10)
        with contextlib.suppress(OSError):
            while self.wire.sock.recv_into(waste):
                pass

    def _finish(self, in_order: bool) -> None:
        with self._lock:
            self._left -= 1
            self._in_order = self._in_order and in_order
            if self._left:
                return
        self._local.close()
        self.wire.sock.close()
        self.wire.release()
        if self._in_order:
            self._owner.channel_drained(self.channel)

    def _cut(self) -> StreamTruncated:
        return StreamTruncated(f"the connection of channel {self.channel} broke before its authenticated end of stream")
