"""What outlives a connection: the ledger of one end, and two ends that resume."""

from __future__ import annotations

from random import Random

from fuzz.choices import Choices
from sealift.channel.ledger import LEAST_WINDOW, Ledger, Retention
from sealift.channel.protocol import RECORD_OVERHEAD, RekeyLimits
from sealift.channel.records import RecordOpener, RecordSealer
from sealift.channel.said import Acknowledged, Data, Event, PeerEnded, PeerOpened
from sealift.channel.session import ReceiveHalf, SendHalf
from sealift.errors import BytesNotRetained, OffsetInvalid, RecordForged, RecordOversize, RecordUnexpected
from support.channel_pair import NONCE, secret

_PERIOD = 65_521
_PATTERN = Random(1).randbytes(_PERIOD) * 2


def _stream(start: int, stop: int) -> bytes:
    """The bytes of a stream at these offsets, which are at most one period apart."""
    at = start % _PERIOD
    return _PATTERN[at : at + stop - start]


def _fill(out: Retention, choices: Choices) -> None:
    space = out.space()
    if count := min(len(space), choices.number(20_000)):
        space[:count] = _stream(out.filled, out.filled + count)
        out.fill(count)


def ledger(data: bytes) -> None:
    """One end against a peer that names any offsets: what is kept is exact and bounded, what cannot be is refused."""
    choices = Choices(data)
    window = 1 + choices.number(4) * 40_000
    book = Ledger(window, 1 + choices.number(20_000))
    out, into = book.out, book.into
    while not choices.over:
        before = (out.acked, out.cursor, out.sent, out.filled, into.expected, into.delivered, into.acked)
        match choices.number(9):
            case 0 | 1 if not out.ended:
                _fill(out, choices)
            case 2 if choices.number(3) == 3:
                out.end()
            case 3 | 4:
                unsent = out.unsent()
                assert bytes(unsent) == _stream(out.cursor, out.cursor + len(unsent))
                assert bool(unsent) == (out.cursor < out.filled)
                out.advance(len(unsent) or int(out.owes_end))
            case 5:
                offset = _offset(choices, out.acked, out.cursor)
                try:
                    out.acknowledge(offset)
                except OffsetInvalid:
                    assert not before[0] <= offset <= before[1]
                    _unchanged(book, before)
                else:
                    assert before[0] <= offset <= before[1]
            case 6:
                _meet(book, choices, before)
            case 7 if not into.ended:
                into.accept(choices.number(5000))
            case 8 if not into.ended:
                into.deliver(choices.number(into.expected - into.delivered))
                if into.delivered == into.expected and choices.flag():
                    into.end()
            case 9 if into.owes_ack:
                assert into.ack() == into.delivered
        assert out.acked <= out.cursor <= out.sent <= out.filled + out.ended
        assert into.acked <= into.delivered <= into.expected
        assert out.held_bytes <= max(window, LEAST_WINDOW)
        assert out.filled - min(out.acked, out.filled) <= max(window, LEAST_WINDOW)


def _offset(choices: Choices, low: int, high: int) -> int:
    if choices.number(3):
        return low + choices.number(max(0, high - low))
    return choices.one_of((0, max(0, low - 1), high + 1, (1 << 64) - 1))


def _unchanged(book: Ledger, before: tuple[int, ...]) -> None:
    out, into = book.out, book.into
    assert before == (out.acked, out.cursor, out.sent, out.filled, into.expected, into.delivered, into.acked)


def _meet(book: Ledger, choices: Choices, before: tuple[int, ...]) -> None:
    acked, _, sent, _, expected, *_ = before
    resumes = choices.number(3) != 0
    wants = _offset(choices, acked, sent) if resumes else 0
    keeps = _offset(choices, 0, expected) if resumes else 0
    try:
        book.meet(wants, keeps, resumes=resumes)
    except RecordUnexpected:
        assert not resumes
        assert expected or acked
        _unchanged(book, before)
    except BytesNotRetained:
        assert keeps > expected
        _unchanged(book, before)
    except OffsetInvalid:
        assert not acked <= wants <= sent
        _unchanged(book, before)
    else:
        assert acked <= wants <= sent
        assert keeps <= expected
        assert book.out.cursor == wants
        assert book.out.ended_and_acked == (wants > book.out.filled)
        unsent = book.out.unsent()
        assert bytes(unsent) == _stream(wants, wants + len(unsent))


class _End:
    """One end of a channel that is resumed, driven as ``sealed_wire`` and ``tunnel`` drive it."""

    def __init__(self) -> None:
        self.book = Ledger(LEAST_WINDOW, 6000)
        self.got = 0
        self.flight = b""
        self.sending: SendHalf
        self.receiving: ReceiveHalf
        self.met = False

    def connect(self, mine: bytes, theirs: bytes) -> None:
        limits = RekeyLimits(5, 20_000)
        self.sending = SendHalf(RecordSealer(secret(mine), secret(NONCE), limits))
        opener = RecordOpener(secret(theirs), secret(NONCE), limits)
        self.receiving = ReceiveHalf(opener, control=False, buffer_bytes=4096)
        self.met, self.flight = False, b""

    def first(self) -> None:
        book = self.book
        opening = self.sending.resume(book.into.expected, book.out.acked) if book.confirmed else self.sending.open()
        self.flight += opening

    def push(self) -> None:
        """One record, if there is something to say."""
        out = self.book.out
        unsent = out.unsent()
        if len(unsent):
            record = memoryview(bytearray(len(unsent) + RECORD_OVERHEAD))
            self.sending.data_into(unsent, record)
            self.flight += bytes(record)
        elif out.owes_end:
            self.flight += self.sending.end()
        else:
            return
        out.advance(len(unsent) or 1)

    def hear(self, other: _End, count: int) -> None:
        """Take up to ``count`` bytes off the wire."""
        piece, other.flight = other.flight[:count], other.flight[count:]
        while piece:
            space = self.receiving.space()
            fits = min(len(space), len(piece))
            space[:fits] = piece[:fits]
            self.receiving.received(fits)
            piece = piece[fits:]
            while (event := self.receiving.next_event()) is not None:
                self._take(event, answers=not self.met and self.sending.records == 0)

    def _take(self, event: Event, *, answers: bool) -> None:
        into = self.book.into
        match event:
            case PeerOpened(next_expected, first_retained, resumes):
                if answers:
                    self.first()
                self.book.meet(next_expected, first_retained, resumes=resumes)
                self.sending.peer_opened()
                self.met = True
            case Data(view):
                assert view == _stream(self.got, self.got + len(view))
                into.accept(len(view))
                self.got += len(view)
                into.deliver(len(view))
            case PeerEnded():
                into.end()
            case Acknowledged(offset):
                self.book.out.acknowledge(offset)


def resume(data: bytes) -> None:
    """Two honest ends over a link cut and altered anywhere: neither refuses the other, no byte is lost or doubled."""
    choices = Choices(data)
    source, target = _End(), _End()
    connections = 0

    def connect() -> None:
        nonlocal connections
        connections += 1
        one, two = (bytes([connections % 256, connections // 256, side]) + bytes(29) for side in (1, 2))
        source.connect(one, two)
        target.connect(two, one)
        source.first()

    def hear(end: _End, other: _End, count: int) -> None:
        try:
            end.hear(other, count)
        except (RecordForged, RecordOversize, RecordUnexpected):
            assert broken  # between honest ends nothing is out of place unless the link altered it
            connect()

    connect()
    broken = False
    while not choices.over:
        end, other = (source, target) if choices.flag() else (target, source)
        out, into = end.book.out, end.book.into
        match choices.number(7):
            case 0 | 1 if not out.ended:
                _fill(out, choices)
            case 2 if end.met:
                end.push()
            case 3:
                hear(end, other, 1 + choices.number(9000))
            case 4 if end.met and into.owes_ack:
                end.flight += end.sending.ack(into.ack())
            case 5 if choices.number(3) == 3:
                out.end()
            case 6:
                connect()
                broken = False
            case 7 if end.flight:
                at = choices.number(len(end.flight) - 1)
                end.flight = end.flight[:at] + bytes([end.flight[at] ^ (1 << choices.number(7))]) + end.flight[at + 1 :]
                broken = True
        _exact(source, target)
    broken = False
    connect()
    _settle(source, target)
    for end in (source, target):
        assert end.book.out.acked == end.book.out.filled + end.book.out.ended
        end.book.out.end()
    _settle(source, target)
    assert source.book.out.ended_and_acked
    assert target.book.out.ended_and_acked
    _exact(source, target)
    assert target.got == source.book.out.filled
    assert source.got == target.book.out.filled


def _settle(source: _End, target: _End) -> None:
    """Let both say and hear everything, on a link that holds."""
    while True:
        for end, other in ((source, target), (target, source)):
            end.hear(other, 1 << 30)
            if end.met:
                end.push()
                if end.book.into.owes_ack:
                    end.flight += end.sending.ack(end.book.into.ack())
        if not source.flight and not target.flight:
            return


def _exact(source: _End, target: _End) -> None:
    for end, other in ((source, target), (target, source)):
        assert end.got <= other.book.out.filled
        assert end.book.into.expected == end.got + end.book.into.ended
        assert other.book.out.acked <= end.book.into.delivered
