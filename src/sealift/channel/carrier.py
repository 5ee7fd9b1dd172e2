"""The connection that carries a channel at the moment, and the change from one to the next.

A channel outlives its connections. Its two threads take whichever is current, leave it when it breaks, and wait for the
next. Only the current connection may touch the channel's ledger: one that was replaced or broke finds out at the next
record, under the carrier's lock, and nothing it still brings is taken.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable
from typing import Final, Generic, Protocol, TypeVar

from sealift.channel.ledger import Ledger
from sealift.channel.window import Window
from sealift.channel.wire import Counters, Wire, shut
from sealift.errors import (
    BytesNotRetained,
    ChannelError,
    LocalClosed,
    LocalPeerRefused,
    OffsetInvalid,
    PeerClosed,
    StreamTruncated,
)

AnyWire = TypeVar("AnyWire", bound=Wire)

FATAL: Final = (OffsetInvalid, BytesNotRetained, PeerClosed, LocalClosed, LocalPeerRefused)
"""What ends the move at once: said by the peer under its keys, or about this side. All else costs a connection."""


class Replaced(ConnectionError):
    """This connection does not carry its channel any more."""


class Waker:
    """Wakes one thread out of its wait for a local socket."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def wake(self) -> None:
        """From any thread, any number of times."""
        os.eventfd_write(self._fd, 1)

    def poller(self, fd: int | None = None) -> select.poll:
        """Something to poll this, and ``fd`` for reading, with."""
        poller = select.poll()
        poller.register(self._fd, select.POLLIN)
        if fd is not None:
            poller.register(fd, select.POLLIN)
        return poller

    def clear(self) -> None:
        """What woke us has been seen."""
        try:
            os.eventfd_read(self._fd)
        except BlockingIOError:
            return


class CarrierOwner(Protocol):
    """The move that a channel belongs to."""

    @property
    def over(self) -> threading.Event:
        """Set when the move has failed or is being ended: nothing may be handed on any more."""

    @property
    def round_trip(self) -> float:
        """To the other host and back, in seconds; 0 while it is not known."""

    def interrupted(self, channel: int, error: ChannelError) -> None:
        """A channel has lost its connection. Ends the move where it cannot be resumed."""

    def carried(self, channel: int, epoch: int, *, again: bool) -> None:
        """A channel has a connection, for the first time or ``again``."""


class Carrier(Generic[AnyWire]):
    """One channel's current connection. For any thread."""

    def __init__(self, channel: int, ledger: Ledger, owner: CarrierOwner) -> None:
        self.channel = channel
        self.ledger = ledger
        self.window = Window(ledger.out.limit)
        ledger.out.limit = self.window.bytes
        self.waker = Waker()
        self.lock = threading.Lock()
        self._changed = threading.Condition(self.lock)
        self._owner = owner
        self._wire: AnyWire | None = None
        self._users: dict[int, int] = {}
        self._before = Counters()
        self._connections = 0
        self._settled = False

    @property
    def current(self) -> AnyWire | None:
        """The connection that carries the channel now; another may by the time it is looked at."""
        return self._wire

    @property
    def connections(self) -> int:
        """How many connections have carried this channel."""
        return self._connections

    @property
    def settled(self) -> bool:
        """Whether this side needs no connection for the channel any more."""
        return self._settled

    def settle(self) -> None:
        """Both directions are done as far as this side is concerned: losing the connection is no interruption now."""
        self._settled = True

    def attach(self, wire: AnyWire, epoch: int) -> None:
        """Let a confirmed connection carry the channel from here on."""
        self.retire(replaced(self.channel))
        with self._changed:
            self._wire = wire
            self._connections += 1
            again = self._connections > 1
            self._changed.notify_all()
        self.waker.wake()
        self._owner.carried(self.channel, epoch, again=again)
        if self._owner.over.is_set():
            shut(wire.sock)

    def retire(self, error: ChannelError) -> None:
        """Take the current connection, if there is one, out of service; its threads will find out."""
        with self._changed:
            wire = self._wire
        if wire is not None:
            self.lost(wire, error)

    def lost(self, wire: AnyWire, error: ChannelError) -> None:
        """Note that a connection broke; only the first word on the current one counts."""
        with self._changed:
            if self._wire is not wire:
                return
            self._wire = None
            self._before.add(wire.counters())
            self._changed.notify_all()
            unused = id(wire) not in self._users
        if not self._owner.over.is_set():
            shut(wire.sock)
        if unused:
            wire.sock.close()
            wire.release()
        self.waker.wake()
        if not self._settled:
            self._owner.interrupted(self.channel, error)

    def check(self, wire: Wire) -> None:
        """To be called with ``lock`` held, before a step in the ledger; raises Replaced for any other connection."""
        if self._wire is not wire:
            raise Replaced("a newer connection carries the channel")

    def acknowledged(self, offset: int) -> None:
        """The peer has the stream up to here; to be called with ``lock`` held. Raises OffsetInvalid."""
        out, window = self.ledger.out, self.window
        out.acknowledge(offset)
        if window.acknowledged(offset, time.monotonic(), self._owner.round_trip, was_full=out.was_full):
            out.limit, out.was_full = window.bytes, False

    def await_lost(self, wire: AnyWire, seconds: float) -> None:
        """Wait until somebody else has noted that this connection broke."""
        with self._changed:
            self._changed.wait_for(lambda: self._wire is not wire or self._owner.over.is_set(), seconds)

    def use(self, done: Callable[[], bool], *, even_over: bool = False) -> AnyWire | None:
        """The current connection, as soon as there is one; None when the move is over or ``done``. ``leave`` it.

        ``even_over``: also when the move is over, for a last word.
        """
        over = self._owner.over
        with self._changed:
            self._changed.wait_for(lambda: self._wire is not None or over.is_set() or done())
            wire = self._wire
            if wire is None or (over.is_set() and not even_over) or done():
                return None
            self._users[id(wire)] = self._users.get(id(wire), 0) + 1
            return wire

    def leave(self, wire: AnyWire) -> None:
        """A thread is done with a connection; the last one closes it, once it carries nothing any more."""
        with self._changed:
            left = self._users[id(wire)] - 1
            if left:
                self._users[id(wire)] = left
                return
            del self._users[id(wire)]
            if self._wire is wire:
                return
        wire.sock.close()
        wire.release()

    def stir(self) -> None:
        """Let every thread that waits here look again."""
        with self._changed:
            self._changed.notify_all()
        self.waker.wake()

    def counters(self) -> Counters:
        """What went over all connections of this channel."""
        with self.lock:
            total = Counters()
            total.add(self._before)
            if self._wire is not None:
                total.add(self._wire.counters())
            return total


def replaced(channel: int) -> ChannelError:
    """What a connection is told that a newer one has taken the place of."""
    return StreamTruncated(f"the other host's relay connected channel {channel} anew")
