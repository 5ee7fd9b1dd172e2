"""The control channel in a relay: messages of the agents both ways, a heartbeat each second, and the judgement of
silence, in two threads that never touch QEMU's sockets. A data channel under back-pressure cannot delay it. Messages
are bytes of a stream that is resumed like every other, so a broken connection neither loses nor doubles one."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections import deque
from typing import Final, Protocol

from sealift.channel.carrier import FATAL, Carrier, Replaced
from sealift.channel.control_frames import FrameReader, Message, encode_frame
from sealift.channel.liveness import Beat, Liveness, PeerClock
from sealift.channel.protocol import CloseReason
from sealift.channel.relay_control import EventList
from sealift.channel.tunnel import ACK_S, LAST_WORDS_S, TunnelOwner
from sealift.channel.wire import ControlWire, shut
from sealift.errors import ChannelError, Conflict, PeerClosed, PeerSilent, RecordUnexpected, StreamTruncated

BEAT_S: Final = 1.0
MAX_MESSAGES: Final = 256
"""A move has less than ten; what is kept of a peer that sends more must not grow for ever."""
_EARLY_BEATS: Final = 5
_EARLY_BEAT_S: Final = 0.1
"""The first heartbeats come quickly, so that the clock offset is known before a short move is over."""


class LinkOwner(TunnelOwner, Protocol):
    """The move that the control channel belongs to."""

    def silent(self, error: PeerSilent) -> None:
        """Nothing is heard from the other host: no connection to it is worth anything any more."""


class Outbox:
    """Messages on their way to the peer, and then the order to stop. For any thread; exists before the link does."""

    def __init__(self) -> None:
        self._messages: deque[Message] = deque()
        self._changed = threading.Condition()
        self._finished = False
        self._reason: CloseReason | None = None
        self._stirred = False

    def put(self, message: Message) -> None:
        """Queue a message; raises InvalidInput for one that cannot be sent, Conflict when the link is over."""
        encode_frame(message)
        with self._changed:
            if self._finished:
                raise Conflict("the control channel of this move is closed")
            self._messages.append(message)
            self._stirred = True
            self._changed.notify()

    def finish(self, reason: CloseReason | None) -> None:
        """Send what is queued and end the stream, or with a reason: drop what is queued and close."""
        with self._changed:
            if self._finished and reason is None:
                return
            self._finished, self._reason = True, reason
            if reason is not None:
                self._messages.clear()
            self._stirred = True
            self._changed.notify()

    def stir(self) -> None:
        """Let ``wait`` return, now or the next time."""
        with self._changed:
            self._stirred = True
            self._changed.notify()

    def wait(self, timeout: float) -> None:
        """Wait until there may be something to do, at most ``timeout`` seconds."""
        with self._changed:
            if not self._stirred:
                self._changed.wait(max(0.0, timeout))
            self._stirred = False

    def first(self) -> Message | None:
        """The message whose turn it is; ``sent`` removes it."""
        with self._changed:
            return self._messages[0] if self._messages else None

    def sent(self) -> None:
        """The first message is the ledger's now."""
        with self._changed:
            if self._messages:
                self._messages.popleft()

    @property
    def ends(self) -> bool:
        """Whether nothing more will come after what is queued."""
        return self._finished

    @property
    def reason(self) -> CloseReason | None:
        """Why to close at once."""
        return self._reason


class ControlLink:
    """Both threads of the control channel."""

    def __init__(
        self, carrier: Carrier[ControlWire], outbox: Outbox, owner: LinkOwner, events: EventList, silence_s: float
    ) -> None:
        self.carrier = carrier
        self.clock = PeerClock()
        self.outward_done = threading.Event()
        self.inward_done = threading.Event()
        self._ledger = carrier.ledger
        self._outbox = outbox
        self._owner = owner
        self._events = events
        self._silence_s = silence_s
        self._beat_s = min(BEAT_S, silence_s / 5)
        self._beats = 0
        self._last_word = False
        self._frames = FrameReader()
        self._messages = 0

    def start(self) -> None:
        """Start both threads."""
        self._owner.spawn("control-out", self._outward)
        self._owner.spawn("control-in", self._inward)

    def _outward(self) -> None:
        try:
            while not self._said_last() and (wire := self.carrier.use(self._said_last, even_over=True)) is not None:
                try:
                    self._send_until_told(wire)
                    shut(wire.sock, socket.SHUT_WR)
                except Replaced:
                    pass
                except OSError:
                    self.carrier.await_lost(wire, LAST_WORDS_S)
                    self.carrier.lost(wire, self._cut())
                except ChannelError as error:
                    self._broke(wire, error)
                finally:
                    self.carrier.leave(wire)
        finally:
            self.outward_done.set()

    def _said_last(self) -> bool:
        return self._last_word

    def _send_until_told(self, wire: ControlWire) -> None:
        """Return when the last word was said."""
        next_beat = time.monotonic()
        acknowledge_at: float | None = None
        while True:
            self._queue()
            if (reason := self._outbox.reason) is not None:
                self._last_word = True
                wire.give_up(reason)
                return
            wire.push()
            if self._ledger.out.ended_and_acked:
                self._last_word = True
                return
            now = time.monotonic()
            if now >= next_beat:
                wire.send_beat(self.clock.next_beat(_clock_us()))
                self._beats += 1
                next_beat = now + (self._beat_s if self._beats >= _EARLY_BEATS else min(self._beat_s, _EARLY_BEAT_S))
            if not self._ledger.into.owes_ack:
                acknowledge_at = None
            elif acknowledge_at is None:
                acknowledge_at = now + ACK_S
            elif acknowledge_at <= now:
                wire.acknowledge()
                acknowledge_at = None
            self._outbox.wait(min(next_beat, acknowledge_at or next_beat) - now)

    def _queue(self) -> None:
        """Hand messages to the ledger while it has room; it keeps them until they are acknowledged."""
        out = self._ledger.out
        while (message := self._outbox.first()) is not None:
            with self.carrier.lock:
                if not out.put(encode_frame(message)):
                    return
            self._outbox.sent()
        if self._outbox.ends and not out.ended:
            out.end()

    def _inward(self) -> None:
        try:
            while (wire := self.carrier.use(self.inward_done.is_set)) is not None:
                try:
                    self._receive_until_ended(wire)
                    self.inward_done.set()
                    self._owner.fail(PeerClosed("the other host's relay ended the control channel"))
                except Replaced:
                    pass
                except PeerSilent as error:
                    self._owner.silent(error)
                except OSError:
                    self.carrier.lost(wire, self._cut())
                except ChannelError as error:
                    self._broke(wire, error)
                finally:
                    self.carrier.leave(wire)
        finally:
            self.inward_done.set()

    def _receive_until_ended(self, wire: ControlWire) -> None:
        liveness = Liveness(self._silence_s, time.monotonic())
        while True:
            _wake_receive_after(wire.sock, liveness.remaining(time.monotonic()))
            try:
                items = wire.receive()
            except BlockingIOError:
                # Judged only after a receive came back empty: this process may itself have been stopped for a while.
                if liveness.remaining(time.monotonic()) <= 0:
                    raise PeerSilent(
                        f"nothing was heard from the other host's relay for {self._silence_s:g} s",
                        todo="look at the network between the two hosts and at the other host",
                    ) from None
                continue
            liveness.heard(time.monotonic())
            self._outbox.stir()  # there may be something to acknowledge, or room for a message
            for item in items:
                if item is None:
                    if self._frames.midway:
                        self._owner.fail(StreamTruncated("the control stream ended in the middle of a message"))
                    return
                if isinstance(item, Beat):
                    self.clock.hear(item, _clock_us())
                else:
                    self._deliver(item)

    def _deliver(self, data: memoryview) -> None:
        try:
            messages = self._frames.feed(data)
            self._messages += len(messages)
            if self._messages > MAX_MESSAGES:
                raise RecordUnexpected("the peer sent more messages than any move has")
        except RecordUnexpected as error:
            self._owner.fail(error)  # it was authentic: to hear it again would not help
            raise
        for message in messages:
            self._events.add("message", message=message)
        with self.carrier.lock:
            self._ledger.into.deliver(len(data))
        self._outbox.stir()

    def _broke(self, wire: ControlWire, error: ChannelError) -> None:
        if isinstance(error, FATAL):
            self._owner.fail(error)
        else:
            self.carrier.lost(wire, error)

    @staticmethod
    def _cut() -> StreamTruncated:
        return StreamTruncated("the connection of the control channel broke before its authenticated end of stream")


def _wake_receive_after(sock: socket.socket, seconds: float) -> None:
    """Bound the next blocking receive in the kernel; a timeout of the Python object would bind the sender as well."""
    microseconds = max(1000, int(seconds * 1e6))
    timeval = struct.pack("@ll", *divmod(microseconds, 1_000_000))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)


def _clock_us() -> int:
    return time.time_ns() // 1000
