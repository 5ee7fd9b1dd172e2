"""The control channel in a relay: messages of the agents both ways, a heartbeat each second, and the judgement of
silence, in two threads that never touch QEMU's sockets. A data channel under back-pressure cannot delay it."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections import deque
from typing import Final

from sealift.channel.control_frames import Message, encode_frame
from sealift.channel.liveness import Beat, Liveness, PeerClock
from sealift.channel.protocol import CloseReason
from sealift.channel.relay_control import EventList
from sealift.channel.tunnel import LAST_WORDS_S, TunnelOwner
from sealift.channel.wire import ControlWire, shut
from sealift.errors import ChannelError, Conflict, PeerClosed, PeerSilent, RecordUnexpected, StreamTruncated

BEAT_S: Final = 1.0
MAX_MESSAGES: Final = 256
"""A move has less than ten; what is kept of a peer that sends more must not grow for ever."""
_EARLY_BEATS: Final = 5
_EARLY_BEAT_S: Final = 0.1
"""The first heartbeats come quickly, so that the clock offset is known before a short move is over."""


class Outbox:
    """Messages on their way to the peer, and then the order to stop. For any thread; exists before the link does."""

    def __init__(self) -> None:
        self._messages: deque[Message] = deque()
        self._changed = threading.Condition()
        self._finished = False
        self._reason: CloseReason | None = None

    def put(self, message: Message) -> None:
        """Queue a message; raises InvalidInput for one that cannot be sent, Conflict when the link is over."""
        encode_frame(message)
        with self._changed:
            if self._finished:
                raise Conflict("the control channel of this move is closed")
            self._messages.append(message)
            self._changed.notify()

    def finish(self, reason: CloseReason | None) -> None:
        """Send what is queued and end the stream, or with a reason: drop what is queued and close."""
        with self._changed:
            if self._finished:
                return
            self._finished, self._reason = True, reason
            if reason is not None:
                self._messages.clear()
            self._changed.notify()

    def take(self, timeout: float) -> tuple[Message | None, bool, CloseReason | None]:
        """(message, stop, reason): the next message, else whether to stop; waits ``timeout`` seconds for either."""
        with self._changed:
            if not self._messages and not self._finished:
                self._changed.wait(max(0.0, timeout))
            if self._messages:
                return self._messages.popleft(), False, None
            return None, self._finished, self._reason


class ControlLink:
    """Both threads of the control channel."""

    def __init__(
        self, wire: ControlWire, outbox: Outbox, owner: TunnelOwner, events: EventList, silence_s: float
    ) -> None:
        self.wire = wire
        self.clock = PeerClock()
        self.outward_done = threading.Event()
        self.inward_done = threading.Event()
        self._outbox = outbox
        self._owner = owner
        self._events = events
        self._silence_s = silence_s
        self._beat_s = min(BEAT_S, silence_s / 5)

    def start(self) -> None:
        """Start both threads."""
        self._owner.spawn("control-out", self._outward)
        self._owner.spawn("control-in", self._inward)

    def _outward(self) -> None:
        try:
            self._send_until_told()
            shut(self.wire.sock, socket.SHUT_WR)
        except ChannelError as error:
            self._owner.fail(error)
        except OSError:
            self.inward_done.wait(LAST_WORDS_S)
            self._owner.fail(self._cut())
        finally:
            self.outward_done.set()

    def _send_until_told(self) -> None:
        beats, next_beat = 0, time.monotonic()
        while True:
            message, stop, reason = self._outbox.take(next_beat - time.monotonic())
            if message is not None:
                self.wire.send_message(message)
            elif stop and reason is None:
                self.wire.end()
                return
            elif stop and reason is not None:
                self.wire.give_up(reason)
                return
            if time.monotonic() >= next_beat:
                self.wire.send_beat(self.clock.next_beat(_clock_us()))
                beats += 1
                next_beat = time.monotonic() + (self._beat_s if beats >= _EARLY_BEATS else _EARLY_BEAT_S)

    def _inward(self) -> None:
        try:
            self._receive_until_ended()
            self._owner.fail(PeerClosed("the other host's relay ended the control channel"))
        except ChannelError as error:
            self._owner.fail(error)
        except OSError:
            self._owner.fail(self._cut())
        finally:
            self.inward_done.set()

    def _receive_until_ended(self) -> None:
        liveness, messages = Liveness(self._silence_s, time.monotonic()), 0
        while True:
            _wake_receive_after(self.wire.sock, liveness.remaining(time.monotonic()))
            try:
                items = self.wire.receive()
            except BlockingIOError:
                # Judged only after a receive came back empty: this process may itself have been stopped for a while.
                if liveness.remaining(time.monotonic()) <= 0:
                    raise PeerSilent(
                        f"nothing was heard from the other host's relay for {self._silence_s:g} s",
                        todo="look at the network between the two hosts and at the other host",
                    ) from None
                continue
            if items:
                liveness.heard(time.monotonic())
            for item in items:
                if item is None:
                    return
                if isinstance(item, Beat):
                    self.clock.hear(item, _clock_us())
                else:
                    messages += 1
                    if messages > MAX_MESSAGES:
                        raise RecordUnexpected("the peer sent more messages than any move has")
                    self._events.add("message", message=item)

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
