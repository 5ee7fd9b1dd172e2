"""A sealed connection: the handshake of either role over a TCP socket, and the wires that come out of it."""

from __future__ import annotations

import contextlib
import os
import socket
from typing import Final

from sealift.channel.control_frames import FrameReader, Message, encode_frame
from sealift.channel.liveness import Beat
from sealift.channel.noise import Initiator, Responder, TransportKeys
from sealift.channel.protocol import MESSAGE_BYTES, RECORD_OVERHEAD, ChannelSpec, CloseReason, Kind, Preface
from sealift.channel.relay_spec import SealedSecrets
from sealift.channel.session import (
    Data,
    Event,
    Heartbeat,
    PeerClosed,
    PeerEnded,
    PeerOpened,
    ReceiveHalf,
    SendHalf,
    bind,
    halves,
)
from sealift.channel.wire import Counters, receive_exactly, set_remaining
from sealift.errors import HandshakeFailed, OpenMissing, RecordUnexpected, StreamTruncated
from sealift.errors import PeerClosed as PeerClosedError

_CONTROL_BUFFER_BYTES: Final = 8 << 10
_EPHEMERAL_BYTES: Final = 32

_REASONS: Final = {
    CloseReason.MOVE_ENDED: "the move was ended there by order",
    CloseReason.RECORD_REFUSED: "a record it received did not authenticate or was out of place",
    CloseReason.LOCAL_BROKEN: "the process it serves closed its socket too early",
    CloseReason.PEER_SILENT: "it heard nothing from this side any more",
    CloseReason.REPLACED: "a newer connection took this one's place",
    CloseReason.OTHER_CHANNEL: "another channel of the move ended badly",
    CloseReason.INTERNAL: "something failed inside it",
}


class _Sealed:
    """What data and control connections have in common."""

    def __init__(self, sock: socket.socket, sending: SendHalf, receiving: ReceiveHalf) -> None:
        self.sock = sock
        self._sending = sending
        self._receiving = receiving

    def end(self) -> None:
        """Authenticated half-close."""
        self.sock.sendall(self._sending.end())

    def give_up(self, reason: CloseReason) -> None:
        """CLOSE with the reason; a connection on which nothing can be sent any more is left alone."""
        with contextlib.suppress(RecordUnexpected, OSError):
            self.sock.sendall(self._sending.close(reason))

    def counters(self) -> Counters:
        """What went over this connection so far."""
        sent, received = self._sending, self._receiving
        return Counters(
            sent.plaintext_bytes,
            received.plaintext_bytes,
            sent.records,
            received.records,
            sent.rekeys + received.rekeys,
        )

    def release(self) -> None:
        """Overwrite the receive buffers."""
        self._receiving.wipe()

    def _heard(self, event: Event) -> None:
        """Raise what an event that is neither data, heartbeat nor end means."""
        if isinstance(event, PeerClosed):
            raise PeerClosedError(f"the other host's relay closed the channel: {_REASONS[event.reason]}")
        raise RecordUnexpected("the peer sent a record that has no place here")


class SealedData(_Sealed):
    """A data channel's connection. Buffers are allocated here, once."""

    def __init__(self, sock: socket.socket, sending: SendHalf, receiving: ReceiveHalf, out_bytes: int) -> None:
        super().__init__(sock, sending, receiving)
        self._plain = memoryview(bytearray(out_bytes))
        self._sealed = memoryview(bytearray(out_bytes + RECORD_OVERHEAD))

    def space(self) -> memoryview:
        """Where plaintext to be sent goes."""
        return self._plain

    def send(self, count: int) -> None:
        """Seal and send one DATA record."""
        size = self._sending.data_into(self._plain[:count], self._sealed)
        self.sock.sendall(self._sealed[:size])

    def receive(self) -> memoryview | None:
        """Verified plaintext, or None at the authenticated end."""
        half = self._receiving
        while True:
            event = half.next_event()
            if isinstance(event, Data):
                return event.view
            if isinstance(event, PeerEnded):
                return None
            if event is not None:
                self._heard(event)
            count = self.sock.recv_into(half.space())
            if count:
                half.received(count)
            else:
                half.eof()
                return None

    def release(self) -> None:
        """Overwrite and drop every buffer."""
        super().release()
        self._plain[:] = bytes(len(self._plain))
        self._plain = self._sealed = memoryview(bytearray())


class SealedControl(_Sealed):
    """The control channel's connection."""

    def __init__(self, sock: socket.socket, sending: SendHalf, receiving: ReceiveHalf) -> None:
        super().__init__(sock, sending, receiving)
        self._frames = FrameReader()
        self._out = memoryview(bytearray(_CONTROL_BUFFER_BYTES))

    def send_message(self, message: Message) -> None:
        """One DATA record with one frame."""
        size = self._sending.data_into(encode_frame(message), self._out)
        self.sock.sendall(self._out[:size])

    def send_beat(self, beat: Beat) -> None:
        """One HEARTBEAT record."""
        self.sock.sendall(self._sending.heartbeat(beat.clock, beat.heard, beat.held))

    def receive(self) -> list[Message | Beat | None]:
        """What one receive brought."""
        half = self._receiving
        found: list[Message | Beat | None] = []
        self._take(found)
        if found:
            return found  # came together with the peer's OPEN
        count = self.sock.recv_into(half.space())
        if count:
            half.received(count)
            self._take(found)
        else:
            half.eof()
            found.append(None)
        return found

    def _take(self, found: list[Message | Beat | None]) -> None:
        while (event := self._receiving.next_event()) is not None:
            match event:
                case Data(view):
                    found += self._frames.feed(view)
                case Heartbeat(clock, heard, held):
                    found.append(Beat(clock, heard, held))
                case PeerEnded():
                    if self._frames.midway:
                        raise StreamTruncated("the control stream ended in the middle of a message")
                    found.append(None)
                case _:
                    self._heard(event)


class Handshaker:
    """Makes wires of connections for one sealed move, in one role. For any thread."""

    def __init__(self, spec: ChannelSpec, secrets: SealedSecrets, *, initiator: bool, record_bytes: int) -> None:
        self.spec = spec
        self._secrets = secrets
        self._initiator = initiator
        self._record_bytes = record_bytes

    def initiate(
        self, sock: socket.socket, preface: Preface, out_bytes: int, deadline: float
    ) -> SealedData | SealedControl:
        """The source's part, preface included.

        Raises HandshakeFailed and other channel errors; OSError (also TimeoutError) when the peer just goes away,
        which is all it does when it refuses.
        """
        exchange = Initiator(self._secrets.key, bind(self.spec, preface, self._secrets.nonce), _ephemeral())
        set_remaining(sock, deadline)
        sock.sendall(preface.encode() + exchange.message1())
        keys = exchange.message2(receive_exactly(sock, MESSAGE_BYTES, deadline))
        sending, receiving = self._halves(keys, preface)
        sock.sendall(sending.open())
        self._await_open(sock, receiving, deadline)
        sending.peer_opened()
        return self._wire(sock, sending, receiving, preface, out_bytes)

    def respond(
        self, sock: socket.socket, preface: Preface, out_bytes: int, deadline: float
    ) -> tuple[SealedData | SealedControl, bytes]:
        """The target's part, after the preface: a wire and the OPEN record that is still to be sent on it.

        The connection counts from here on, and not before. Raises HandshakeFailed, OpenMissing and other channel
        errors, never OSError.
        """
        responder = Responder(self._secrets.key, bind(self.spec, preface, self._secrets.nonce), _ephemeral())
        try:
            responder.message1(receive_exactly(sock, MESSAGE_BYTES, deadline))
            answer, keys = responder.message2()
            set_remaining(sock, deadline)
            sock.sendall(answer)
        except OSError as error:
            raise HandshakeFailed(f"a connection gave up in the handshake: {error}") from None
        sending, receiving = self._halves(keys, preface)
        try:
            self._await_open(sock, receiving, deadline)
        except (OSError, StreamTruncated):
            raise OpenMissing("a connection did not prove itself with a first record in time") from None
        sending.peer_opened()
        return self._wire(sock, sending, receiving, preface, out_bytes), sending.open()

    def _halves(self, keys: TransportKeys, preface: Preface) -> tuple[SendHalf, ReceiveHalf]:
        control = preface.kind is Kind.CONTROL
        if control:
            buffer_bytes = _CONTROL_BUFFER_BYTES
        elif self._initiator:
            buffer_bytes = 4 * RECORD_OVERHEAD + 64 * 1024
        else:
            buffer_bytes = 2 * (self._record_bytes + RECORD_OVERHEAD)
        made = halves(
            keys,
            self._secrets.nonce,
            self.spec.limits,
            initiator=self._initiator,
            control=control,
            buffer_bytes=buffer_bytes,
        )
        keys.initiator_to_responder.wipe()
        keys.responder_to_initiator.wipe()
        return made

    @staticmethod
    def _await_open(sock: socket.socket, receiving: ReceiveHalf, deadline: float) -> None:
        while (event := receiving.next_event()) is None:
            set_remaining(sock, deadline)
            count = sock.recv_into(receiving.space())
            if count == 0:
                raise ConnectionError("the peer closed the connection before it proved itself")
            receiving.received(count)
        assert isinstance(event, PeerOpened)  # the half lets nothing else be first
        sock.settimeout(None)

    @staticmethod
    def _wire(
        sock: socket.socket, sending: SendHalf, receiving: ReceiveHalf, preface: Preface, out_bytes: int
    ) -> SealedData | SealedControl:
        if preface.kind is Kind.CONTROL:
            return SealedControl(sock, sending, receiving)
        return SealedData(sock, sending, receiving, out_bytes)


def _ephemeral() -> bytes:
    return os.urandom(_EPHEMERAL_BYTES)
