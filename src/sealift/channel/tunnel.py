"""One data channel in a relay: a local socket, a connection to the other host, and a thread for each direction.

    QEMU -- local socket --> outward thread --> ledger --> wire --> the other host
    QEMU <-- local socket -- inward thread <------------- wire <-- the other host

The end of either stream passes through by itself (local end of file -> authenticated end -> half-close of the local
socket there). A connection that breaks is left, and both threads wait for the next; the local socket stays open and is
not read meanwhile, nor while the ledger is full. What ends the move is ``Move.fail``, which closes the local sockets
first. Nothing here knows whether the wire is sealed.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Final, Protocol

from sealift.channel.carrier import FATAL, Carrier, CarrierOwner, Replaced
from sealift.channel.protocol import CloseReason
from sealift.channel.wire import DataWire, shut
from sealift.errors import ChannelError, LocalClosed, StreamTruncated

LAST_WORDS_S: Final = 1.0
"""How long a side that cannot send any more listens for why."""

ACK_S: Final = 0.01
"""What was delivered is acknowledged after this long at the latest, if nothing else is being sent."""


class TunnelOwner(CarrierOwner, Protocol):
    """The move that a tunnel belongs to."""

    @property
    def close_reason(self) -> CloseReason: ...
    def fail(self, error: ChannelError) -> None: ...
    def channel_drained(self, channel: int) -> None: ...
    def mark(self, step: str) -> None: ...
    def spawn(self, name: str, run: Callable[[], None]) -> None: ...


class Tunnel:
    """Pumps until both directions have ended and were acknowledged; then both sockets are closed."""

    def __init__(
        self,
        carrier: Carrier[DataWire],
        local: socket.socket,
        owner: TunnelOwner,
        *,
        resumes: bool,
        reconnects: bool,
    ) -> None:
        """``resumes``: whether the wires acknowledge, so that another one can go on where one broke.

        ``reconnects``: whether it is this side that makes the others, and so must know when none is needed.
        """
        self.carrier = carrier
        self.outward_done = threading.Event()
        self.inward_done = threading.Event()
        self._ledger = carrier.ledger
        self._local = local
        self._owner = owner
        self._resumes = resumes
        self._reconnects = reconnects
        self._drained = False
        self._asleep = False
        self._seen = 0

    def start(self) -> None:
        """Start both threads."""
        self._owner.spawn(f"out-{self.carrier.channel}", self._outward)
        self._owner.spawn(f"in-{self.carrier.channel}", self._inward)

    def _outward(self) -> None:
        try:
            while (wire := self.carrier.use(self._all_said)) is not None:
                try:
                    self._pump_out(wire)
                except Replaced:
                    pass
                except OSError:
                    # The peer may have said why on its way out; the other thread hears that.
                    self.carrier.await_lost(wire, LAST_WORDS_S)
                    self.carrier.lost(wire, self._cut())
                except ChannelError as error:
                    self._broke(wire, error)
                finally:
                    self.carrier.leave(wire)
        finally:
            self.outward_done.set()
            self._finish()

    def _pump_out(self, wire: DataWire) -> None:
        over, out = self._owner.over, self._ledger.out
        poller = self.carrier.waker.poller()
        with_local = self.carrier.waker.poller(self._local.fileno())
        acknowledge_at: float | None = None
        receive = self._local.recv_into
        begun = out.filled > 0
        while not over.is_set():
            wire.push()
            if not begun and out.sent > 0:
                begun = True
                self._owner.mark("first_byte")
            if out.ended:
                self._progressed()
                if self._all_said():
                    return
            with self.carrier.lock:
                space = memoryview(b"") if out.ended else out.space()
            if len(space):
                try:
                    count = receive(space, 0, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    count = -1
                except OSError:
                    count = 0  # closed with bytes of ours unread; whether they mattered, the other thread finds out
                if count > 0:
                    with self.carrier.lock:
                        out.fill(count)
                    continue
                if count == 0 and not over.is_set():
                    out.end()
                    continue
            acknowledge_at = self._rest(wire, with_local if len(space) else poller, acknowledge_at)
        wire.give_up(self._owner.close_reason)

    def _rest(self, wire: DataWire, poller: select.poll, acknowledge_at: float | None) -> float | None:
        """Wait for something to do; when what is owed must be acknowledged, if anything is."""
        into = self._ledger.into
        now = time.monotonic()
        wait = ACK_S
        if not into.owes_ack:
            acknowledge_at = None
            # While bytes keep coming, looking now and then costs less than being woken for the first of them.
            self._asleep = into.delivered == self._seen
            self._seen = into.delivered
        elif acknowledge_at is None:
            acknowledge_at = now + ACK_S
        elif acknowledge_at <= now:
            wire.acknowledge()
            return None
        if self._asleep and into.owes_ack:
            self._asleep = False  # it came just now, and its thread may not have seen us lie down
            return acknowledge_at
        if acknowledge_at is not None:
            wait = acknowledge_at - now
        poller.poll(None if self._asleep else 1 + int(wait * 1000))
        self._asleep = False
        self.carrier.waker.clear()
        return acknowledge_at

    def _inward(self) -> None:
        try:
            while (wire := self.carrier.use(self._all_heard)) is not None:
                try:
                    self._pump_in(wire)
                except Replaced:
                    pass
                except OSError:
                    self.carrier.lost(wire, self._cut())
                except ChannelError as error:
                    self._broke(wire, error)
                    if self._owner.over.is_set():
                        self._discard(wire)
                finally:
                    self.carrier.leave(wire)
        finally:
            self.inward_done.set()
            self._finish()

    def _pump_in(self, wire: DataWire) -> None:
        into, lock, waker = self._ledger.into, self.carrier.lock, self.carrier.waker
        receive, deliver = wire.receive, self._local.sendall
        while not self._all_heard():
            data = receive()
            if data is None:
                shut(self._local, socket.SHUT_WR)
                self._progressed()
                waker.wake()
                continue
            if not len(data):
                continue
            try:
                deliver(data)
            except OSError:
                raise LocalClosed(
                    f"the process served here closed channel {self.carrier.channel} before it had taken everything"
                ) from None
            with lock:
                into.deliver(len(data))
            if self._asleep or into.ack_is_due:
                waker.wake()

    def _broke(self, wire: DataWire, error: ChannelError) -> None:
        if isinstance(error, FATAL):
            self._owner.fail(error)
        else:
            self.carrier.lost(wire, error)

    def _all_said(self) -> bool:
        """Nothing is left to send: our stream and all acknowledgements of theirs are out."""
        ledger = self._ledger
        return ledger.out.ended_and_acked and ledger.into.ended and not ledger.into.owes_ack

    def _all_heard(self) -> bool:
        """Nothing is left to hear: their stream, and that they have all of ours."""
        return self._ledger.into.ended and (self._ledger.out.ended_and_acked or not self._resumes)

    def _progressed(self) -> None:
        """One direction has ended: see whether that was all.

        Who accepts connections is done when it has said its end: if that does not arrive, the other will connect again.
        """
        out = self._ledger.out
        said = out.ended_and_acked if self._reconnects else out.ended and out.cursor > out.filled
        if not (self._ledger.into.ended and said) or self._owner.over.is_set():
            return
        with self.carrier.lock:
            first, self._drained = not self._drained, True
        if first:
            self.carrier.settle()
            self._owner.channel_drained(self.carrier.channel)

    def _discard(self, wire: DataWire) -> None:
        """Read on without looking, so that closing does not reset the connection under our own last record."""
        waste = bytearray(64 << 10)
        with contextlib.suppress(OSError):
            while wire.sock.recv_into(waste):
                pass

    def _finish(self) -> None:
        if not (self.outward_done.is_set() and self.inward_done.is_set()):
            return
        self._progressed()
        self._local.close()
        if self._drained:
            self.carrier.retire(self._cut())

    def _cut(self) -> StreamTruncated:
        return StreamTruncated(
            f"the connection of channel {self.carrier.channel} broke before its authenticated end of stream"
        )
