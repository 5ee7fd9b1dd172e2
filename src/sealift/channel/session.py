"""The two halves of one connection after the handshake: what may be sent when, and what was received.

    SendHalf       NEW --open--> OPENED --peer_opened--> FLOWING --end--> ENDED --close--> CLOSED
                    \\--peer_opened--> HEARD --open--------^   (the responder hears the initiator's OPEN first)

    ReceiveHalf    WAITING --OPEN--> FLOWING --END--> ENDED --CLOSE--> CLOSED

RESUME stands in for OPEN on later connections; ACK may follow END. What the offsets in them mean for the channel, which
outlives its connections, is ``ledger``'s business.

Both tables are data below (``_SENDING``, ``_RECEIVING``); what they do not name is refused and changes nothing. The
halves share no state, so that one thread may drive each; ``SendHalf.peer_opened`` is how the one tells the other.

A ReceiveHalf is driven so:

    while True:
        while (event := half.next_event()) is not None:
            ...                                             # Data.view is good until the next call on the half
        received = socket.recv_into(half.space())
        half.received(received) if received else half.eof()

Nothing is handed on before it has verified. A channel error is final: the half forgets what it had buffered and
raises the same error from then on. Source: docs/protocol/channel.md, sections 5 to 10.
"""

from __future__ import annotations

import hashlib
import struct
from enum import Enum
from typing import Final

from sealift import errors
from sealift.channel.noise import TransportKeys
from sealift.channel.protocol import (
    HEADER_BYTES,
    MAX_PAYLOAD,
    MAX_RECORD,
    NONCE_BYTES,
    OPEN_RECORD_BYTES,
    PROLOGUE_LABEL,
    RECORD_OVERHEAD,
    ChannelSpec,
    CloseReason,
    Preface,
    RecordType,
    RekeyLimits,
)
from sealift.channel.records import RecordHeader, RecordOpener, RecordSealer
from sealift.channel.said import Acknowledged, Data, Event, Heartbeat, PeerClosed, PeerEnded, PeerOpened
from sealift.secret import Secret

_OFFSETS: Final = struct.Struct(">QQ")
_OFFSET: Final = struct.Struct(">Q")
_HEARTBEAT: Final = struct.Struct(">QQQ")


class Sending(Enum):
    """How far a SendHalf is."""

    NEW = "new"
    HEARD = "heard"
    OPENED = "opened"
    FLOWING = "flowing"
    ENDED = "ended"
    CLOSED = "closed"


class Receiving(Enum):
    """How far a ReceiveHalf is."""

    WAITING = "waiting"
    FLOWING = "flowing"
    ENDED = "ended"
    CLOSED = "closed"


_SENDING: Final[dict[Sending, dict[RecordType, Sending]]] = {
    Sending.NEW: {RecordType.OPEN: Sending.OPENED, RecordType.RESUME: Sending.OPENED},
    Sending.HEARD: {RecordType.OPEN: Sending.FLOWING, RecordType.RESUME: Sending.FLOWING},
    Sending.OPENED: {RecordType.CLOSE: Sending.CLOSED},
    Sending.FLOWING: {
        RecordType.DATA: Sending.FLOWING,
        RecordType.ACK: Sending.FLOWING,
        RecordType.HEARTBEAT: Sending.FLOWING,
        RecordType.END: Sending.ENDED,
        RecordType.CLOSE: Sending.CLOSED,
    },
    Sending.ENDED: {RecordType.ACK: Sending.ENDED, RecordType.CLOSE: Sending.CLOSED},
    Sending.CLOSED: {},
}

_RECEIVING: Final[dict[Receiving, dict[RecordType, Receiving]]] = {
    Receiving.WAITING: {RecordType.OPEN: Receiving.FLOWING, RecordType.RESUME: Receiving.FLOWING},
    Receiving.FLOWING: {
        RecordType.DATA: Receiving.FLOWING,
        RecordType.ACK: Receiving.FLOWING,
        RecordType.HEARTBEAT: Receiving.FLOWING,
        RecordType.END: Receiving.ENDED,
        RecordType.CLOSE: Receiving.CLOSED,
    },
    Receiving.ENDED: {RecordType.ACK: Receiving.ENDED, RecordType.CLOSE: Receiving.CLOSED},
    Receiving.CLOSED: {},
}


class _Half:
    """What was counted in one direction."""

    def __init__(self, direction: RecordSealer | RecordOpener) -> None:
        self._direction = direction
        self._plaintext_bytes = 0

    @property
    def plaintext_bytes(self) -> int:
        """Bytes of the stream (payload of DATA) so far."""
        return self._plaintext_bytes

    @property
    def records(self) -> int:
        """Records of every type so far."""
        return self._direction.records

    @property
    def rekeys(self) -> int:
        """How often this direction has changed its key."""
        return self._direction.rekeys


class SendHalf(_Half):
    """What we send on one connection. Not for two threads at once; never blocks, never buffers.

    Records must go out in the order in which they were made. Methods raise RecordUnexpected when the record is not
    allowed now, RecordOversize for a payload its type does not have, SequenceExhausted; nothing was sealed then.
    """

    def __init__(self, sealer: RecordSealer) -> None:
        super().__init__(sealer)
        self._sealer = sealer
        self._state = Sending.NEW

    @property
    def state(self) -> Sending:
        """How far this half is."""
        return self._state

    def peer_opened(self) -> None:
        """Note that the peer's OPEN has verified: from here on, and after our own OPEN, DATA may flow."""
        if self._state is Sending.NEW:
            self._state = Sending.HEARD
        elif self._state is Sending.OPENED:
            self._state = Sending.FLOWING

    def open(self) -> bytes:
        """The OPEN record, the first each way while nothing has come: both offsets are 0."""
        return self._small(RecordType.OPEN, _OFFSETS.pack(0, 0))

    def resume(self, next_expected: int, first_retained: int) -> bytes:
        """The RESUME record, in place of OPEN: the offset we want to hear next, and the first we still hold."""
        return self._small(RecordType.RESUME, _OFFSETS.pack(next_expected, first_retained))

    def ack(self, next_expected: int) -> bytes:
        """An ACK record: everything before this offset was written in full to our local socket."""
        return self._small(RecordType.ACK, _OFFSET.pack(next_expected))

    def data_into(self, payload: bytes | bytearray | memoryview, out: memoryview) -> int:
        """Seal bytes of the stream straight from ``payload`` into ``out``; the number of bytes to send."""
        following = self._following(RecordType.DATA)
        written = self._sealer.seal_into(RecordType.DATA, payload, out)
        self._state = following
        self._plaintext_bytes += written - RECORD_OVERHEAD
        return written

    def end(self) -> bytes:
        """The END record: the stream is complete in this direction, and only ACK and CLOSE may follow."""
        return self._small(RecordType.END, b"")

    def heartbeat(self, clock_us: int, heard_us: int, held_us: int) -> bytes:
        """A HEARTBEAT record, for the control channel (the peer refuses it on any other)."""
        return self._small(RecordType.HEARTBEAT, _HEARTBEAT.pack(clock_us, heard_us, held_us))

    def close(self, reason: CloseReason) -> bytes:
        """The CLOSE record: the last one, once something was opened."""
        return self._small(RecordType.CLOSE, bytes([reason]))

    def _small(self, kind: RecordType, payload: bytes) -> bytes:
        following = self._following(kind)
        record = bytearray(RECORD_OVERHEAD + len(payload))
        self._sealer.seal_into(kind, payload, memoryview(record))
        self._state = following
        return bytes(record)

    def _following(self, kind: RecordType) -> Sending:
        following = _SENDING[self._state].get(kind)
        if following is None:
            raise errors.RecordUnexpected(f"a {kind.name} record cannot be sent when {self._state.value}")
        return following


class ReceiveHalf(_Half):
    """What we receive on one connection. Not for two threads at once.

    ``buffer_bytes`` is how much one receive may bring. Until the peer's OPEN has verified there is room for nothing
    but that record; a record longer than ``buffer_bytes`` makes the buffer grow once, to the longest record there is.
    A multiple of the peer's usual record length is best: then records rarely straddle the end and are never moved.
    """

    def __init__(self, opener: RecordOpener, *, control: bool, buffer_bytes: int) -> None:
        if buffer_bytes < OPEN_RECORD_BYTES:
            raise ValueError(f"a receive buffer has at least {OPEN_RECORD_BYTES} bytes")
        super().__init__(opener)
        self._opener = opener
        self._control = control
        self._buffer_bytes = buffer_bytes
        self._state = Receiving.WAITING
        self._broken: errors.ChannelError | None = None
        # Ciphertext as received: [_start:_end] is not opened yet. Plaintext is opened into a buffer of its own.
        self._sealed = memoryview(bytearray(OPEN_RECORD_BYTES))
        self._opened = memoryview(bytearray(OPEN_RECORD_BYTES))
        self._start = 0
        self._end = 0
        # The record at _start once its header was judged, and the state it leads to.
        self._pending: tuple[RecordHeader, Receiving] | None = None

    @property
    def state(self) -> Receiving:
        """How far this half is."""
        return self._state

    def space(self) -> memoryview:
        """Where to receive the next bytes; never empty. Raises ValueError while events are waiting to be taken."""
        self._check()
        if self._start == self._end:
            self._start = self._end = 0
        elif (needed := self._needed()) <= self._end - self._start:
            raise ValueError("take every event before receiving more")
        elif self._start + needed > len(self._sealed) or self._pending is None:
            self._make_room(needed)
        return self._sealed[self._end :]

    def received(self, count: int) -> None:
        """Note that ``count`` bytes were received into ``space()``."""
        if not 0 <= count <= len(self._sealed) - self._end:
            raise ValueError("more bytes were received than there was space for")
        self._end += count

    def next_event(self) -> Event | None:
        """The next thing the peer said, or None when more bytes are needed.

        Raises RecordForged, RecordOversize, RecordUnexpected or SequenceExhausted; each is final.
        """
        self._check()
        try:
            return self._next_event()
        except errors.ChannelError as error:
            self._break(error)
            raise

    def eof(self) -> None:
        """Note that the connection has no more bytes.

        Raises StreamTruncated unless the peer's END came before and nothing after it; PeerClosed after a CLOSE.
        """
        self._check()
        if self._state is Receiving.CLOSED:
            raise errors.PeerClosed("the other host's relay closed the channel")
        if self._state is not Receiving.ENDED or self._start != self._end:
            error = errors.StreamTruncated("a sealed channel's connection ended before its authenticated end of stream")
            self._break(error)
            raise error

    def wipe(self) -> None:
        """Overwrite the buffers; the half is of no more use."""
        self._break(self._broken or errors.RecordUnexpected("this half of a channel was dropped"))

    def _next_event(self) -> Event | None:
        if self._pending is None:
            if self._end - self._start < HEADER_BYTES:
                return None
            header = self._opener.header(self._sealed[self._start : self._end])
            self._pending = header, self._following(header.type)
        header, following = self._pending
        end = self._start + RECORD_OVERHEAD + header.length
        if end > self._end:
            return None
        if len(self._opened) < header.length:
            usual = self._buffer_bytes - RECORD_OVERHEAD
            self._opened = memoryview(bytearray(usual if header.length <= usual else MAX_PAYLOAD))
        self._opener.open_into(header, self._sealed[self._start + HEADER_BYTES : end], self._opened)
        event = self._event(header)
        self._state = following
        self._start = end
        self._pending = None
        if header.type in (RecordType.OPEN, RecordType.RESUME):
            self._make_room(self._buffer_bytes)
        return event

    def _event(self, header: RecordHeader) -> Event:
        payload = self._opened[: header.length]
        match header.type:
            case RecordType.DATA:
                self._plaintext_bytes += header.length
                return Data(payload)
            case RecordType.OPEN:
                opened = PeerOpened(*_OFFSETS.unpack(payload))
                if opened.next_expected or opened.first_retained:
                    raise errors.RecordUnexpected("the peer opened a channel at another offset than 0")
                return opened
            case RecordType.RESUME:
                next_expected, first_retained = _OFFSETS.unpack(payload)
                return PeerOpened(next_expected, first_retained, True)
            case RecordType.ACK:
                return Acknowledged(*_OFFSET.unpack(payload))
            case RecordType.END:
                return PeerEnded()
            case RecordType.HEARTBEAT:
                return Heartbeat(*_HEARTBEAT.unpack(payload))
            case _:
                try:
                    return PeerClosed(CloseReason(payload[0]))
                except ValueError:
                    raise errors.RecordUnexpected("the peer closed the channel for an unknown reason") from None

    def _following(self, kind: RecordType) -> Receiving:
        following = _RECEIVING[self._state].get(kind)
        if following is None or (kind is RecordType.HEARTBEAT and not self._control):
            where = "control" if self._control else "data"
            raise errors.RecordUnexpected(f"the peer sent {kind.name} on a {where} channel when {self._state.value}")
        return following

    def _needed(self) -> int:
        """How long the record at the start of the buffer is, as far as its header is there."""
        return HEADER_BYTES if self._pending is None else RECORD_OVERHEAD + self._pending[0].length

    def _make_room(self, needed: int) -> None:
        """Let the waiting bytes begin a buffer of at least ``needed`` bytes."""
        waiting = self._sealed[self._start : self._end]
        if needed > len(self._sealed):
            self._sealed = memoryview(bytearray(needed if needed <= self._buffer_bytes else MAX_RECORD))
        self._sealed[: len(waiting)] = waiting
        self._start, self._end = 0, len(waiting)

    def _check(self) -> None:
        if self._broken is not None:
            raise self._broken

    def _break(self, error: errors.ChannelError) -> None:
        self._broken = error
        self._start = self._end = 0
        self._sealed[:] = bytes(len(self._sealed))
        self._opened[:] = bytes(len(self._opened))


def bind(spec: ChannelSpec, preface: Preface, nonce: Secret) -> bytes:
    """The prologue of a connection's handshake: label, preface as sent, nonce, SHA-256 of the specification.

    Raises HandshakeFailed for a move that is not sealed: a plain one has no handshake.
    """
    try:
        spec.admit(preface)
    except errors.ChannelUnexpected as error:
        raise errors.HandshakeFailed("a connection and the move it is for do not belong together") from error
    raw = nonce.reveal()
    if len(raw) != NONCE_BYTES:
        raise ValueError(f"a nonce has {NONCE_BYTES} bytes")
    return PROLOGUE_LABEL + preface.encode() + raw + hashlib.sha256(spec.encode()).digest()


def halves(
    keys: TransportKeys, nonce: Secret, limits: RekeyLimits, *, initiator: bool, control: bool, buffer_bytes: int
) -> tuple[SendHalf, ReceiveHalf]:
    """Both halves of a connection for one role; the keys may be wiped afterwards."""
    mine, theirs = keys.initiator_to_responder, keys.responder_to_initiator
    if not initiator:
        mine, theirs = theirs, mine
    opener = RecordOpener(theirs, nonce, limits)
    return SendHalf(RecordSealer(mine, nonce, limits)), ReceiveHalf(opener, control=control, buffer_bytes=buffer_bytes)
