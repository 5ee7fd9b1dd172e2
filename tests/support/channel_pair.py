"""Two pure sessions joined in memory, and the ways to bring bytes from the one to the other."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from sealift.channel.noise import Initiator, Responder, TransportKeys
from sealift.channel.protocol import RECORD_OVERHEAD, ChannelSpec, Plan, Preface, RecordType, RekeyLimits
from sealift.channel.records import RecordSealer
from sealift.channel.session import Data, Event, ReceiveHalf, SendHalf, bind, halves
from sealift.secret import Secret

PSK = bytes(range(32))
NONCE = b"\x80nonce\x00\x01"
SPEC = ChannelSpec(
    attempt=b"attempt of 16 by",
    subject=b"VM uuid 16 bytes",
    source=b"the source host.",
    target=b"the target host.",
    plan=Plan.SEALED,
    version=1,
    channels=3,
    window=1 << 20,
    rekey_records=1 << 24,
    rekey_bytes=1 << 36,
)
SOURCE_PRIVATE = b"\x11" * 32
TARGET_PRIVATE = b"\x22" * 32


def secret(raw: bytes) -> Secret:
    return Secret(raw, length=len(raw))


def prologue(spec: ChannelSpec = SPEC, preface: Preface | None = None, nonce: bytes = NONCE) -> bytes:
    return bind(spec, preface or spec.preface(1, 1), secret(nonce))


def initiator(psk: bytes = PSK, bound: bytes | None = None, private: bytes = SOURCE_PRIVATE) -> Initiator:
    return Initiator(secret(psk), prologue() if bound is None else bound, private)


def responder(psk: bytes = PSK, bound: bytes | None = None, private: bytes = TARGET_PRIVATE) -> Responder:
    return Responder(secret(psk), prologue() if bound is None else bound, private)


@dataclass
class Side:
    """One end of a connection."""

    keys: TransportKeys
    send: SendHalf
    receive: ReceiveHalf


@dataclass
class Pair:
    """A connection whose handshake is done; ``opened`` has both OPEN records exchanged too."""

    source: Side
    target: Side


def pair(
    limits: RekeyLimits | None = None,
    *,
    control: bool = False,
    buffer_bytes: int = 4096,
    source_private: bytes = SOURCE_PRIVATE,
    target_private: bytes = TARGET_PRIVATE,
) -> Pair:
    limits = limits or RekeyLimits(1 << 24, 1 << 36)
    spec = replace(SPEC, rekey_records=limits.records, rekey_bytes=limits.bytes)
    bound = prologue(spec, spec.preface(0 if control else 1, 1))
    ours, theirs = initiator(bound=bound, private=source_private), responder(bound=bound, private=target_private)
    theirs.message1(ours.message1())
    answer, target_keys = theirs.message2()
    source_keys = ours.message2(answer)

    def side(keys: TransportKeys, first: bool) -> Side:
        made = halves(keys, secret(NONCE), limits, initiator=first, control=control, buffer_bytes=buffer_bytes)
        return Side(keys, *made)

    return Pair(side(source_keys, True), side(target_keys, False))


def opened(limits: RekeyLimits | None = None, *, control: bool = False, buffer_bytes: int = 4096) -> Pair:
    both = pair(limits, control=control, buffer_bytes=buffer_bytes)
    deliver(both.target.receive, both.source.send.open())
    both.target.send.peer_opened()
    deliver(both.source.receive, both.target.send.open())
    both.source.send.peer_opened()
    return both


def data(half: SendHalf, payload: bytes) -> bytes:
    """One DATA record."""
    out = bytearray(len(payload) + RECORD_OVERHEAD)
    return bytes(out[: half.data_into(payload, memoryview(out))])


def raw_sealer(side: Side, *, source: bool = True, limits: RekeyLimits | None = None) -> RecordSealer:
    """A sealer with a side's sending key that obeys no state table: what a malicious holder of the spec can send."""
    key = side.keys.initiator_to_responder if source else side.keys.responder_to_initiator
    return RecordSealer(key, secret(NONCE), limits or RekeyLimits(1 << 24, 1 << 36))


def seal(sealer: RecordSealer, kind: int, payload: bytes) -> bytes:
    out = bytearray(len(payload) + RECORD_OVERHEAD)
    sealer.seal_into(RecordType(kind), payload, memoryview(out))
    return bytes(out)


def feed(half: ReceiveHalf, stream: bytes, events: list[Event | bytes], cuts: Iterable[int] = ()) -> None:
    """Bring ``stream`` to ``half`` in the pieces that ``cuts`` make; DATA is noted in ``events`` as bytes.

    What was delivered before an error stays in ``events``.
    """
    edges = [0, *sorted(set(cuts)), len(stream)]
    for start, stop in itertools.pairwise(edges):
        piece = memoryview(stream)[start:stop]
        while len(piece):
            space = half.space()
            count = min(len(space), len(piece))
            space[:count] = piece[:count]
            half.received(count)
            piece = piece[count:]
            while (event := half.next_event()) is not None:
                events.append(bytes(event.view) if isinstance(event, Data) else event)


def feed_to_eof(half: ReceiveHalf, stream: bytes, events: list[Event | bytes]) -> None:
    """``feed``, and then the end of the connection."""
    feed(half, stream, events)
    half.eof()


def deliver(half: ReceiveHalf, stream: bytes, cuts: Iterable[int] = ()) -> list[Event | bytes]:
    events: list[Event | bytes] = []
    feed(half, stream, events, cuts)
    return events


def payloads(events: Sequence[Event | bytes]) -> bytes:
    """The stream that was delivered."""
    return b"".join(e for e in events if isinstance(e, bytes))
