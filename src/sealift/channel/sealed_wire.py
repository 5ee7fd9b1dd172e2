"""A sealed connection: the handshake of either role over a TCP socket, and the wires that come out of it."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from typing import Any, Final

from sealift.channel.carrier import Carrier, Replaced
from sealift.channel.liveness import Beat
from sealift.channel.noise import Initiator, Responder, TransportKeys
from sealift.channel.protocol import MESSAGE_BYTES, RECORD_OVERHEAD, ChannelSpec, CloseReason, Kind, Preface
from sealift.channel.relay_spec import SealedSecrets
from sealift.channel.said import Acknowledged, Data, Event, Heartbeat, PeerClosed, PeerEnded, PeerOpened
from sealift.channel.session import ReceiveHalf, SendHalf, bind, halves
from sealift.channel.wire import (
    CONTROL_RECORD_BYTES,
    RETURN_PATH_BYTES,
    Counters,
    receive_exactly,
    set_remaining,
)
from sealift.errors import ChannelError, HandshakeFailed, OpenMissing, RecordUnexpected, StreamTruncated
from sealift.errors import PeerClosed as PeerClosedError

_CONTROL_BUFFER_BYTES: Final = CONTROL_RECORD_BYTES + RECORD_OVERHEAD
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

    def __init__(
        self, sock: socket.socket, sending: SendHalf, receiving: ReceiveHalf, carrier: Carrier[Any], out_bytes: int
    ) -> None:
        self.sock = sock
        self._sending = sending
        self._receiving = receiving
        self._carrier = carrier
        self._sealed = memoryview(bytearray(out_bytes + RECORD_OVERHEAD))

    def push(self) -> None:
        """Acknowledgements that are due, retained bytes from the cursor on, the authenticated end."""
        carrier, out = self._carrier, self._carrier.ledger.out
        while True:
            with carrier.lock:
                carrier.check(self)
                due = carrier.ledger.into.ack_is_due
                view = out.unsent()
                ends = out.owes_end
            if due:
                self.acknowledge()
            if len(view):
                record: bytes | memoryview = self._sealed[: self._sending.data_into(view, self._sealed)]
            elif ends:
                record = self._sending.end()
            else:
                return
            with carrier.lock:
                carrier.check(self)
                out.advance(len(view) or 1)
            self.sock.sendall(record)

    def acknowledge(self) -> None:
        """One ACK record."""
        carrier = self._carrier
        with carrier.lock:
            carrier.check(self)
            offset = carrier.ledger.into.ack()
        self.sock.sendall(self._sending.ack(offset))

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
            sent.rekeys,
            received.rekeys,
        )

    def release(self) -> None:
        """Overwrite the receive buffers."""
        self._receiving.wipe()

    def _heard(self, event: Event) -> None:
        """Raise what an event that is neither data, heartbeat nor end means."""
        if isinstance(event, PeerClosed):
            raise PeerClosedError(f"the other host's relay closed the channel: {_REASONS[event.reason]}")
        raise RecordUnexpected("the peer sent a record that has no place here")

    def _accept(self, event: Event) -> bool:
        """Take what concerns the ledger; whether it was that. Nothing of a connection that was replaced is taken."""
        carrier = self._carrier
        ledger = carrier.ledger
        with carrier.lock:
            carrier.check(self)
            match event:
                case Data(view):
                    ledger.into.accept(len(view))
                case PeerEnded():
                    ledger.into.end()
                case Acknowledged(offset):
                    carrier.acknowledged(offset)
                case _:
                    return False
        if isinstance(event, Acknowledged):
            carrier.waker.wake()
        return True

    def _receive(self) -> None:
        """Bring more bytes; raises StreamTruncated at an end that is none, ConnectionError at one that may be."""
        count = self.sock.recv_into(self._receiving.space())
        if not count:
            self._receiving.eof()
            raise ConnectionError("the connection ended after both streams")
        self._receiving.received(count)


class SealedData(_Sealed):
    """A data channel's connection."""

    def receive(self) -> memoryview | None:
        """Verified plaintext, or None at the authenticated end."""
        half = self._receiving
        while True:
            event = half.next_event()
            if event is None:
                self._receive()
            elif not self._accept(event):
                self._heard(event)
            elif isinstance(event, Data):
                return event.view
            else:
                return None if isinstance(event, PeerEnded) else memoryview(b"")


class SealedControl(_Sealed):
    """The control channel's connection."""

    _failed: ChannelError | Replaced | None = None

    def send_beat(self, beat: Beat) -> None:
        """One HEARTBEAT record."""
        self.sock.sendall(self._sending.heartbeat(beat.clock, beat.heard, beat.held))

    def receive(self) -> list[memoryview | Beat | None]:
        """What one receive brought."""
        found = self._take()
        if not found:  # else it came together with the peer's first record
            self._receive()
            found = self._take()
        return found

    def _take(self) -> list[memoryview | Beat | None]:
        if self._failed is not None:
            raise self._failed
        found: list[memoryview | Beat | None] = []
        try:
            while (event := self._receiving.next_event()) is not None:
                self._sort(event, found)
        except (ChannelError, Replaced) as error:
            if not found:
                raise
            self._failed = error  # for the next call: what was accepted before is this side's to deliver
        return found

    def _sort(self, event: Event, found: list[memoryview | Beat | None]) -> None:
        if isinstance(event, Heartbeat):
            found.append(Beat(event.clock_us, event.heard_us, event.held_us))
        elif not self._accept(event):
            self._heard(event)
        elif isinstance(event, Data):
            found.append(memoryview(bytes(event.view)))
        elif isinstance(event, PeerEnded):
            found.append(None)


Accept = Callable[[Carrier[Any]], "tuple[SealedData | SealedControl, bytes]"]
"""(carrier without a connection) -> wire, and the first record that is still to be sent on it.

Raises what ``Ledger.meet`` raises.
"""


class Handshaker:
    """Makes wires of connections for one sealed move, in one role. For any thread."""

    def __init__(self, spec: ChannelSpec, secrets: SealedSecrets, *, initiator: bool, record_bytes: int) -> None:
        self.spec = spec
        self._secrets = secrets
        self._initiator = initiator
        self._record_bytes = record_bytes

    def initiate(
        self, sock: socket.socket, preface: Preface, carrier: Carrier[Any], deadline: float
    ) -> SealedData | SealedControl:
        """The source's part, preface included; ``carrier`` has no connection now.

        Raises OSError (also TimeoutError) when the peer just goes away, which is all it does when it refuses;
        HandshakeFailed and other channel errors, those of ``Ledger.meet`` among them.
        """
        exchange = Initiator(self._secrets.key, bind(self.spec, preface, self._secrets.nonce), _ephemeral())
        set_remaining(sock, deadline)
        sock.sendall(preface.encode() + exchange.message1())
        keys = exchange.message2(receive_exactly(sock, MESSAGE_BYTES, deadline))
        sending, receiving = self._halves(keys, preface)
        sock.sendall(self._first(sending, carrier))
        opened = self._await_open(sock, receiving, deadline)
        self._meet(opened, sending, carrier)
        return self._wire(sock, sending, receiving, preface, carrier)

    def respond(self, sock: socket.socket, preface: Preface, deadline: float) -> Accept:
        """The target's part, after the preface, until the peer has proved itself; what is left to do is returned.

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
            opened = self._await_open(sock, receiving, deadline)
        except (OSError, StreamTruncated):
            raise OpenMissing("a connection did not prove itself with a first record in time") from None

        def accept(carrier: Carrier[Any]) -> tuple[SealedData | SealedControl, bytes]:
            first = self._first(sending, carrier)
            self._meet(opened, sending, carrier)
            return self._wire(sock, sending, receiving, preface, carrier), first

        return accept

    @staticmethod
    def _first(sending: SendHalf, carrier: Carrier[Any]) -> bytes:
        with carrier.lock:
            ledger = carrier.ledger
            if not ledger.confirmed:
                return sending.open()
            return sending.resume(ledger.into.expected, ledger.out.acked)

    @staticmethod
    def _meet(opened: PeerOpened, sending: SendHalf, carrier: Carrier[Any]) -> None:
        with carrier.lock:
            carrier.ledger.meet(opened.next_expected, opened.first_retained, resumes=opened.resumes)
        sending.peer_opened()

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
    def _await_open(sock: socket.socket, receiving: ReceiveHalf, deadline: float) -> PeerOpened:
        while (event := receiving.next_event()) is None:
            set_remaining(sock, deadline)
            count = sock.recv_into(receiving.space())
            if count == 0:
                raise ConnectionError("the peer closed the connection before it proved itself")
            receiving.received(count)
        assert isinstance(event, PeerOpened)  # the half lets nothing else be first
        sock.settimeout(None)
        return event

    def _wire(
        self,
        sock: socket.socket,
        sending: SendHalf,
        receiving: ReceiveHalf,
        preface: Preface,
        carrier: Carrier[Any],
    ) -> SealedData | SealedControl:
        if preface.kind is Kind.CONTROL:
            return SealedControl(sock, sending, receiving, carrier, CONTROL_RECORD_BYTES)
        out_bytes = self._record_bytes if self._initiator else RETURN_PATH_BYTES
        return SealedData(sock, sending, receiving, carrier, out_bytes)


def _ephemeral() -> bytes:
    return os.urandom(_EPHEMERAL_BYTES)
