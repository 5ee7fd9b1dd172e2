"""Records, and the stream of them on one connection."""

from __future__ import annotations

from collections.abc import Callable

from fuzz.choices import Choices, altered
from sealift.channel.protocol import (
    HEADER_BYTES,
    MAX_RECORD,
    OPEN_RECORD_BYTES,
    PAYLOAD_BYTES,
    RECORD_OVERHEAD,
    CloseReason,
    RecordType,
    RekeyLimits,
)
from sealift.channel.records import RecordOpener, RecordSealer
from sealift.channel.said import Acknowledged, Data, Event, Heartbeat, PeerClosed, PeerEnded, PeerOpened
from sealift.channel.session import ReceiveHalf
from sealift.errors import (
    ChannelError,
    RecordForged,
    RecordOversize,
    RecordUnexpected,
    StreamTruncated,
)
from sealift.errors import PeerClosed as PeerClosedError
from support.channel_pair import NONCE, secret

_KEY = bytes(range(32, 64))
_OFFSETS = (0, 0, 0, 1, 255, 1 << 32, (1 << 64) - 1)


def _limits(choices: Choices) -> RekeyLimits:
    return RekeyLimits(1 + choices.number(7), 1 + choices.number(255)) if choices.flag() else RekeyLimits()


def _payload(kind: RecordType, choices: Choices) -> bytes:
    """A payload of a length that the type may have."""
    match kind:
        case RecordType.DATA:
            length = 1 + choices.number(1023)
            return (bytes([choices.number(255)]) + bytes(range(1, 200))) * 6 if length > 1000 else bytes(length)
        case RecordType.OPEN | RecordType.RESUME | RecordType.ACK | RecordType.HEARTBEAT:
            return b"".join(choices.one_of(_OFFSETS).to_bytes(8, "big") for _ in range(PAYLOAD_BYTES[kind][0] // 8))
        case RecordType.CLOSE:
            return bytes([choices.number(9)])
        case _:
            return b""


def _seal(sealer: RecordSealer, kind: RecordType, payload: bytes) -> bytes:
    record = bytearray(len(payload) + RECORD_OVERHEAD)
    sealer.seal_into(kind, payload, memoryview(record))
    return bytes(record)


def records(data: bytes) -> None:
    """An opener takes the sealed records in order and nothing else; what it took, sealed again, is what came."""
    choices = Choices(data)
    limits = _limits(choices)
    key, nonce = secret(_KEY), secret(NONCE)
    sealer, opener, again = (kind(key, nonce, limits) for kind in (RecordSealer, RecordOpener, RecordSealer))
    spent, since = False, [0, 0, 0]
    while not choices.over:
        kind = choices.one_of(tuple(RecordType))
        payload = _payload(kind, choices)
        genuine = _seal(sealer, kind, payload)
        record = choices.take(choices.number(80)) if choices.number(7) == 7 else altered(genuine, choices)
        if len(record) < HEADER_BYTES:
            return
        try:
            header = opener.header(record)
        except (RecordUnexpected, RecordOversize):
            assert record[:HEADER_BYTES] != genuine[:HEADER_BYTES]
            return
        assert (header.type << 24 | header.length).to_bytes(4, "big") == record[:HEADER_BYTES]
        if len(record) < RECORD_OVERHEAD + header.length:
            return
        whole = record[: RECORD_OVERHEAD + header.length]
        out = bytearray(b"\xa5" * (header.length + 3))
        try:
            opened = opener.open_into(header, memoryview(whole)[HEADER_BYTES:], memoryview(out))
        except RecordForged:
            assert spent or whole != genuine
            spent = True
            assert out[header.length :] == b"\xa5" * 3
            assert not any(out[: header.length]) or out[: header.length] == b"\xa5" * header.length
            assert _refuses(opener, kind, genuine)
        else:
            assert not spent
            assert whole == genuine
            assert out == payload + b"\xa5" * 3
            assert _seal(again, header.type, bytes(out[:opened])) == whole
            assert opener.rekeys == _rekeys(since, limits, opened)


def _refuses(opener: RecordOpener, kind: RecordType, genuine: bytes) -> bool:
    """Whether an opener that met a forgery does not even take the record that it waited for."""
    length = len(genuine) - RECORD_OVERHEAD
    try:
        opener.open_into((kind, length), memoryview(genuine)[HEADER_BYTES:], memoryview(bytearray(length)))
    except RecordForged:
        return True
    return False


def _rekeys(since: list[int], limits: RekeyLimits, length: int) -> int:
    """Section 7 of channel.md once more; ``since`` has the records and bytes under this key, and the changes so far."""
    since[:2] = since[0] + 1, since[1] + length
    if since[0] >= limits.records or since[1] >= limits.bytes:
        since[:] = 0, 0, since[2] + 1
    return since[2]


class _Rules:
    """Section 9 of channel.md once more: which records may come when, and what each says."""

    def __init__(self, control: bool) -> None:
        self.state = "nothing"
        self._control = control

    def allows(self, kind: RecordType) -> bool:
        match self.state:
            case "nothing":
                return kind in (RecordType.OPEN, RecordType.RESUME)
            case "open":
                if kind is RecordType.HEARTBEAT:
                    return self._control
                return kind not in (RecordType.OPEN, RecordType.RESUME)
            case "end":
                return kind in (RecordType.ACK, RecordType.CLOSE)
            case _:
                return False

    def take(self, kind: RecordType, payload: bytes) -> Event | bytes | None:
        """What the record says; None when it says what may not be said."""
        numbers = [int.from_bytes(payload[at : at + 8], "big") for at in range(0, len(payload), 8)]
        match kind:
            case RecordType.OPEN:
                self.state = "open"
                return None if any(numbers) else PeerOpened(0, 0)
            case RecordType.RESUME:
                self.state = "open"
                return PeerOpened(numbers[0], numbers[1], True)
            case RecordType.DATA:
                return payload
            case RecordType.ACK:
                return Acknowledged(numbers[0])
            case RecordType.HEARTBEAT:
                return Heartbeat(*numbers)
            case RecordType.END:
                self.state = "end"
                return PeerEnded()
            case _:
                self.state = "close"
                return PeerClosed(CloseReason(payload[0])) if 1 <= payload[0] <= 7 else None


def receive_half(data: bytes) -> None:
    """However the stream is cut, changed or cut off: exactly what arrived whole, in order and in its place is heard."""
    choices = Choices(data)
    control, limits = choices.flag(), _limits(choices)
    half = ReceiveHalf(
        RecordOpener(secret(_KEY), secret(NONCE), limits), control=control, buffer_bytes=36 + choices.number(1200)
    )
    pieces = [1 + choices.number(700) for _ in range(4)]
    sealer = RecordSealer(secret(_KEY), secret(NONCE), limits)
    sealed: list[tuple[RecordType, bytes, int]] = []
    honest, arriving = b"", b""
    for _ in range(1 + choices.number(11)):
        # Most streams begin as they should, or nothing behind the beginning would ever be reached.
        kind = choices.one_of(tuple(RecordType)) if sealed or choices.number(3) == 3 else RecordType.RESUME
        payload = _payload(kind, choices)
        record = _seal(sealer, kind, payload)
        sealed.append((kind, payload, len(record)))
        honest += record
        arriving += altered(record, choices) if choices.number(7) == 7 else record
    if choices.number(3) == 3:
        arriving = altered(arriving, choices)
    arriving += choices.rest()

    heard, error = _drive(half, arriving, pieces)
    expected, why = _expected(sealed, honest, arriving, control)
    assert heard == expected
    assert type(error) in why, (error, why)
    if error is not None and not isinstance(error, PeerClosedError):
        assert not half._sealed.tobytes().strip(b"\0")
        assert not half._opened.tobytes().strip(b"\0")
        for call in (half.next_event, half.space, half.eof):
            assert _error_of(call) is error


def _error_of(call: Callable[[], object]) -> ChannelError | None:
    try:
        call()
    except ChannelError as error:
        return error
    return None


def _drive(half: ReceiveHalf, stream: bytes, pieces: list[int]) -> tuple[list[Event | bytes], ChannelError | None]:
    heard: list[Event | bytes] = []
    at, number = 0, 0
    try:
        while True:
            while (event := half.next_event()) is not None:
                heard.append(bytes(event.view) if isinstance(event, Data) else event)
            if at == len(stream):
                half.eof()
                return heard, None
            space = half.space()
            assert len(space)
            assert heard or len(space) <= OPEN_RECORD_BYTES
            assert len(half._sealed) <= max(OPEN_RECORD_BYTES, half._buffer_bytes) or len(half._sealed) == MAX_RECORD
            assert len(half._opened) <= len(half._sealed)
            piece = stream[at : at + min(len(space), pieces[number % len(pieces)])]
            space[: len(piece)] = piece
            half.received(len(piece))
            at, number = at + len(piece), number + 1
    except ChannelError as error:
        return heard, error


_Ways = tuple[type[ChannelError] | type[None], ...]


def _expected(
    sealed: list[tuple[RecordType, bytes, int]], honest: bytes, arriving: bytes, control: bool
) -> tuple[list[Event | bytes], _Ways]:
    """What must be heard, and the ways in which it may end."""
    same = next((i for i, (a, b) in enumerate(zip(honest, arriving, strict=False)) if a != b), None)
    good = min(len(honest), len(arriving)) if same is None else same
    rules, heard, at = _Rules(control), [], 0
    for kind, payload, length in sealed:
        if at + HEADER_BYTES <= good and not rules.allows(kind):
            return heard, (RecordUnexpected,)
        if at + length > good:
            break
        said = rules.take(kind, payload)
        if said is None:
            return heard, (RecordUnexpected,)
        heard.append(said)
        at += length
    if at == len(arriving):
        return heard, ({"end": type(None), "close": PeerClosedError}.get(rules.state, StreamTruncated),)
    if good == len(arriving):  # cut off within a record
        return heard, (PeerClosedError,) if rules.state == "close" else (StreamTruncated,)
    closed = (PeerClosedError,) if rules.state == "close" else ()
    return heard, (RecordForged, RecordOversize, RecordUnexpected, StreamTruncated, *closed)


def receive_raw(data: bytes) -> None:
    """Bytes of somebody without the key: whatever they are and whatever was said before, nothing of them is heard."""
    choices = Choices(data)
    control, state = choices.flag(), choices.number(3)
    half = ReceiveHalf(
        RecordOpener(secret(_KEY), secret(NONCE), RekeyLimits()), control=control, buffer_bytes=36 + choices.number(300)
    )
    sealer = RecordSealer(secret(_KEY), secret(NONCE), RekeyLimits())
    before = [(RecordType.OPEN, bytes(16)), (RecordType.END, b""), (RecordType.CLOSE, b"\x01")][:state]
    honest = b"".join(_seal(sealer, kind, payload) for kind, payload in before)
    pieces = [1 + choices.number(80) for _ in range(3)]
    heard, error = _drive(half, honest + choices.rest(), pieces)
    assert len(heard) == state
    assert isinstance(error, RecordForged | RecordOversize | RecordUnexpected | StreamTruncated | PeerClosedError) or (
        state == 2 and error is None
    )
