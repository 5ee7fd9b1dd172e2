"""The splice of a plain move, source or target: the same sockets, events and control channel as a relay, no cipher.

A connection is admitted once per channel, only from the source's migration address, and only with the one-time token as
its route. That is access control, not secrecy: a plain move is neither secret nor authentic. Control messages are on
the wire in clear (``control_frames``), heartbeats among them as ``{"type": "HEARTBEAT", "clock", "heard", "held"}``
and the last word as ``{"type": "CLOSE", "reason"}``. The end of a stream is TCP's.
"""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import socket
from typing import Any, Final

from sealift.channel.carrier import Carrier
from sealift.channel.control_frames import FrameReader, Message, encode_frame
from sealift.channel.liveness import Beat
from sealift.channel.protocol import CloseReason, Kind, Preface, kind_of
from sealift.channel.relay_control import EventList
from sealift.channel.relay_ends import Accept, SourceEnd, TargetEnd
from sealift.channel.relay_move import Move
from sealift.channel.relay_spec import RelaySpec, read_plain
from sealift.channel.wire import RETURN_PATH_BYTES, Counters, Wire, set_remaining, shut
from sealift.errors import ChannelUnexpected, EpochStale, PeerClosed, RecordUnexpected, StreamTruncated
from sealift.secret import Secret

_CONTROL_BUFFER_BYTES: Final = 8 << 10


class _Plain:
    """What data and control connections have in common.

    The ledger of a plain channel forgets at once what was sent: nothing is acknowledged, and nothing can be resumed.
    """

    def __init__(self, sock: socket.socket, in_bytes: int, carrier: Carrier[Any]) -> None:
        self.sock = sock
        self._in = memoryview(bytearray(in_bytes))
        self._counted = Counters()
        self._carrier = carrier

    def push(self) -> None:
        """Send bytes as they are; the end is a half-close."""
        carrier, out = self._carrier, self._carrier.ledger.out
        while True:
            with carrier.lock:
                carrier.check(self)
                view = out.unsent()
                ends = out.owes_end
            if len(view):
                self.sock.sendall(view)
                self._counted.bytes_out += len(view)
            elif ends:
                shut(self.sock, socket.SHUT_WR)
            else:
                return
            with carrier.lock:
                out.advance(len(view) or 1)
                out.acknowledge(out.cursor)

    def acknowledge(self) -> None:
        """Nobody is told."""
        with self._carrier.lock:
            self._carrier.ledger.into.ack()

    def give_up(self, reason: CloseReason) -> None:
        """The control channel says it; a data connection just ends."""

    def counters(self) -> Counters:
        """What data went over this connection so far; there are no records."""
        return self._counted

    def release(self) -> None:
        """Drop the buffer."""
        self._in = memoryview(bytearray())

    def _accept(self, count: int) -> None:
        with self._carrier.lock:
            self._carrier.check(self)
            if count:
                self._carrier.ledger.into.accept(count)
            else:
                self._carrier.ledger.into.end()


class PlainData(_Plain):
    """A data channel's connection."""

    def receive(self) -> memoryview | None:
        """Whatever one receive brings, or None at the end."""
        count = self.sock.recv_into(self._in)
        self._accept(count)
        self._counted.bytes_in += count
        return self._in[:count] if count else None


class PlainControl(_Plain):
    """The control channel's connection."""

    def __init__(self, sock: socket.socket, carrier: Carrier[Any]) -> None:
        super().__init__(sock, _CONTROL_BUFFER_BYTES, carrier)
        self._frames = FrameReader()

    def send_beat(self, beat: Beat) -> None:
        """One heartbeat frame, between others."""
        self.sock.sendall(
            encode_frame({"type": "HEARTBEAT", "clock": beat.clock, "heard": beat.heard, "held": beat.held})
        )

    def give_up(self, reason: CloseReason) -> None:
        """The last frame."""
        with contextlib.suppress(OSError):
            self.sock.sendall(encode_frame({"type": "CLOSE", "reason": int(reason)}))

    def receive(self) -> list[memoryview | Beat | None]:
        """What one receive brought: the frames of messages, without those of ours between them."""
        count = self.sock.recv_into(self._in)
        if count == 0:
            if self._frames.midway:
                raise StreamTruncated("the control stream ended in the middle of a message")
            self._accept(0)
            return [None]
        items: list[memoryview | Beat | None] = []
        for message in self._frames.feed(self._in[:count]):
            item = self._item(message)
            if isinstance(item, Beat):
                items.append(item)
            else:
                frame = memoryview(encode_frame(item))
                self._accept(len(frame))
                items.append(frame)
        return items

    @staticmethod
    def _item(message: Message) -> Message | Beat:
        if message["type"] == "CLOSE":
            raise PeerClosed("the other host's splice closed the move's channels")
        if message["type"] != "HEARTBEAT":
            return message
        figures = [message.get(name) for name in ("clock", "heard", "held")]
        clock, heard, held = (f if isinstance(f, int) and 0 <= f < 1 << 64 else None for f in figures)
        if clock is None or heard is None or held is None:
            raise RecordUnexpected("the peer sent a heartbeat without its figures")
        return Beat(clock, heard, held)


class _Gate:
    """What the target of a plain move lets in: the right token, from the right address, each channel once."""

    def __init__(self, spec: RelaySpec, token: Secret) -> None:
        self._spec = spec
        self._token = token
        self._used: set[int] = set()

    def check(self, preface: Preface, sock: socket.socket) -> None:
        """Raises ChannelUnexpected or EpochStale; uses the channel up otherwise. Called by one thread only."""
        if not preface.plain or not hmac.compare_digest(preface.route, self._token.reveal()):
            raise ChannelUnexpected("a connection does not carry the token of this plain move")
        if preface.kind is not kind_of(preface.channel) or preface.channel > self._spec.spec.channels:
            raise ChannelUnexpected(f"this move has no channel {preface.channel} of kind {preface.kind.name.lower()}")
        if not self._from_source(sock):
            raise ChannelUnexpected("a connection does not come from the source's migration address")
        if preface.channel in self._used:
            raise EpochStale(f"channel {preface.channel} of this plain move was used already")
        self._used.add(preface.channel)

    def _from_source(self, sock: socket.socket) -> bool:
        try:
            address = ipaddress.ip_address(str(sock.getpeername()[0]).partition("%")[0])
        except (OSError, ValueError, IndexError):
            return False
        mapped = getattr(address, "ipv4_mapped", None)
        return (mapped or address) == ipaddress.ip_address(self._spec.source_address)


def open_splice(handover: socket.socket, events: EventList) -> tuple[Move, SourceEnd | TargetEnd]:
    """Receive the specification and bind everything; nothing is connected or accepted before ``start``.

    Raises InvalidInput, LocalPeerRefused, OSError.
    """
    spec, token = read_plain(handover)
    move = Move(spec, events, cipher=None, wipe=token.wipe)

    def join(sock: socket.socket, channel: int, epoch: int, carrier: Carrier[Any], deadline: float) -> Wire:
        preface = Preface(True, spec.spec.version, kind_of(channel), channel, token.reveal(), epoch)
        set_remaining(sock, deadline)
        sock.sendall(preface.encode())
        if preface.kind is not Kind.CONTROL:
            return PlainData(sock, RETURN_PATH_BYTES, carrier)
        # A doorman that does not know the token just closes. The first heartbeat shows that somebody is there.
        if not sock.recv(1, socket.MSG_PEEK):
            raise ConnectionError("the peer closed the connection")
        return PlainControl(sock, carrier)

    def admit(sock: socket.socket, preface: Preface, deadline: float) -> Accept:
        def accept(carrier: Carrier[Any]) -> tuple[Wire, bytes]:
            if preface.kind is Kind.CONTROL:
                return PlainControl(sock, carrier), b""
            return PlainData(sock, spec.record_bytes, carrier), b""

        return accept

    if spec.role == "source":
        return move, SourceEnd(move, join)
    return move, TargetEnd(move, admit, check=_Gate(spec, token).check)
