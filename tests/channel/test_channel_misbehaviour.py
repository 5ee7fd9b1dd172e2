"""One test for each way in which the wire, or whoever is on it, can misbehave.

Each asserts the error's class and that nothing was delivered but what had verified before.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sealift.channel.protocol import (
    LAST_SEQUENCE,
    MAX_PAYLOAD,
    PAYLOAD_BYTES,
    RECORD_OVERHEAD,
    CloseReason,
    RecordType,
    RekeyLimits,
)
from sealift.channel.records import RecordOpener, RecordSealer
from sealift.channel.session import PeerClosed, PeerEnded, PeerOpened, ReceiveHalf, Receiving
from sealift.errors import (
    ChannelError,
    RecordForged,
    RecordOversize,
    RecordUnexpected,
    SequenceExhausted,
    StreamTruncated,
)
from support.channel_pair import (
    NONCE,
    Pair,
    data,
    deliver,
    feed_to_eof,
    opened,
    pair,
    raw_sealer,
    seal,
    secret,
)


def refused(half: ReceiveHalf, stream: bytes, expected: type[ChannelError]) -> list[object]:
    """Assert that ``stream``, and then its end, meets ``expected``, for good; what was delivered before."""
    events: list[object] = []
    with pytest.raises(expected) as caught:
        feed_to_eof(half, stream, events)
    assert type(caught.value) is expected
    assert caught.value.slug == expected.slug
    for again in (half.next_event, half.space, half.eof):
        with pytest.raises(expected):
            again()
    return events


def _stream(both: Pair) -> list[bytes]:
    """OPEN, two DATA, END, as the source sends them."""
    send = both.source.send
    send.peer_opened()
    return [send.open(), data(send, b"first page"), data(send, b"second page"), send.end()]


EVENTS = [PeerOpened(0, 0), b"first page", b"second page", PeerEnded()]


def _positions() -> list[tuple[int, int]]:
    lengths = [len(record) for record in _stream(pair())]
    return [(number, offset) for number, length in enumerate(lengths) for offset in range(length)]


@pytest.mark.parametrize(("number", "offset"), _positions())
def test_a_flipped_bit_anywhere_in_a_record(number, offset):
    for bit in range(8):
        both = pair()
        records = _stream(both)
        flipped = bytearray(records[number])
        flipped[offset] ^= 1 << bit
        records[number] = bytes(flipped)
        events: list[object] = []
        with pytest.raises(ChannelError) as caught:
            feed_to_eof(both.target.receive, b"".join(records), events)
        assert events == EVENTS[:number]
        # The header is judged before the tag: another type or length may be refused as such, or never be complete.
        in_header = {RecordForged, RecordOversize, RecordUnexpected, StreamTruncated}
        assert type(caught.value) in (in_header if offset < 4 else {RecordForged})


def test_wrong_key():
    both = pair()
    sealer = RecordSealer(secret(bytes(32)), secret(NONCE), RekeyLimits(1 << 24, 1 << 36))
    assert refused(both.target.receive, seal(sealer, RecordType.OPEN, bytes(16)), RecordForged) == []


def test_wrong_nonce():
    both = pair()
    key = both.source.keys.initiator_to_responder
    sealer = RecordSealer(key, secret(b"another!"), RekeyLimits(1 << 24, 1 << 36))
    assert refused(both.target.receive, seal(sealer, RecordType.OPEN, bytes(16)), RecordForged) == []


@pytest.mark.parametrize("number", range(4))
def test_a_replayed_record(number):
    both = pair()
    records = _stream(both)
    before = records if number == 3 else records[:3]
    # A second OPEN or END is out of place, which is seen before that it is forged.
    expected = RecordForged if number in (1, 2) else RecordUnexpected
    assert refused(both.target.receive, b"".join(before) + records[number], expected) == EVENTS[: len(before)]


def test_reordered_records():
    both = pair()
    opening, first, second, end = _stream(both)
    assert refused(both.target.receive, opening + second + first + end, RecordForged) == EVENTS[:1]


@pytest.mark.parametrize("number", range(4))
def test_a_dropped_record(number):
    both = pair()
    records = _stream(both)
    del records[number]
    expected = {0: RecordUnexpected, 3: StreamTruncated}.get(number, RecordForged)
    assert refused(both.target.receive, b"".join(records), expected) == EVENTS[:number]


def test_reflected_records():
    both = opened()
    assert refused(both.source.receive, data(both.source.send, b"to the target"), RecordForged) == []


def test_a_reflected_open():
    both = pair()
    assert refused(both.source.receive, both.source.send.open(), RecordForged) == []


def test_records_of_another_connection_of_the_same_move():
    both, other = pair(), pair(source_private=b"\x77" * 32)
    assert refused(both.target.receive, other.source.send.open(), RecordForged) == []


def test_truncated_at_every_byte():
    whole = b"".join(_stream(pair()))
    edges = [sum(len(r) for r in _stream(pair())[:n]) for n in range(1, 5)]
    for length in range(len(whole)):
        both = pair()
        complete = sum(edge <= length for edge in edges)
        stream = b"".join(_stream(both))[:length]
        assert refused(both.target.receive, stream, StreamTruncated) == EVENTS[:complete]


def test_bytes_after_the_end_that_are_no_whole_record():
    both = pair()
    assert refused(both.target.receive, b"".join(_stream(both)) + b"\x07\x00\x00", StreamTruncated) == EVENTS


@pytest.mark.parametrize("kind", RecordType)
def test_a_length_that_the_type_does_not_have(kind):
    shortest, longest = PAYLOAD_BYTES[kind]
    for length in {shortest - 1, longest + 1, 0xFFFFFF} - {-1}:
        # Only the header is there: it is refused before anything behind it is waited for or kept.
        header = bytes([kind]) + length.to_bytes(3, "big")
        both = opened(control=True)
        assert refused(both.target.receive, header, RecordOversize) == []


@pytest.mark.parametrize("kind", sorted(set(range(256)) - set(RecordType)))
def test_an_unknown_type(kind):
    both = opened()
    assert refused(both.target.receive, bytes([kind, 0, 0, 16]), RecordUnexpected) == []


PAYLOADS = {kind: bytes(PAYLOAD_BYTES[kind][0]) for kind in RecordType} | {
    RecordType.DATA: b"page",
    RecordType.CLOSE: bytes([CloseReason.INTERNAL]),
}
LEAD_IN = {
    Receiving.WAITING: [],
    Receiving.FLOWING: [RecordType.OPEN],
    Receiving.ENDED: [RecordType.OPEN, RecordType.END],
    Receiving.CLOSED: [RecordType.OPEN, RecordType.CLOSE],
}
ALLOWED = {
    (Receiving.WAITING, RecordType.OPEN),
    (Receiving.WAITING, RecordType.RESUME),
    (Receiving.FLOWING, RecordType.ACK),
    (Receiving.ENDED, RecordType.ACK),
    (Receiving.FLOWING, RecordType.DATA),
    (Receiving.FLOWING, RecordType.END),
    (Receiving.FLOWING, RecordType.CLOSE),
    (Receiving.ENDED, RecordType.CLOSE),
}


@pytest.mark.parametrize("control", [True, False])
@pytest.mark.parametrize("kind", RecordType)
@pytest.mark.parametrize("state", Receiving)
def test_an_authentic_record_out_of_place(state, kind, control):
    """DATA before OPEN or after END, RESUME in the middle, a second OPEN, HEARTBEAT on a data channel, and others."""
    both = pair(control=control)
    sealer = raw_sealer(both.source)
    before = deliver(both.target.receive, b"".join(seal(sealer, k, PAYLOADS[k]) for k in LEAD_IN[state]))
    assert len(before) == len(LEAD_IN[state])
    assert both.target.receive.state is state
    record = seal(sealer, kind, PAYLOADS[kind])
    if (state, kind) in ALLOWED or (control and (state, kind) == (Receiving.FLOWING, RecordType.HEARTBEAT)):
        assert len(deliver(both.target.receive, record)) == 1
    else:
        # Nothing of its payload is even waited for.
        assert refused(both.target.receive, record[:4], RecordUnexpected) == []


def test_data_before_open():
    both = pair()
    assert refused(both.target.receive, seal(raw_sealer(both.source), RecordType.DATA, b"page"), RecordUnexpected) == []


def test_data_after_end():
    both = pair()
    sealer = raw_sealer(both.source)
    stream = b"".join(seal(sealer, k, PAYLOADS[k]) for k in (RecordType.OPEN, RecordType.END, RecordType.DATA))
    assert refused(both.target.receive, stream, RecordUnexpected) == [PeerOpened(0, 0), PeerEnded()]


@pytest.mark.parametrize("offsets", [(1, 0), (0, 1), (2**64 - 1, 2**64 - 1)])
def test_an_open_at_another_offset_than_0(offsets):
    both = pair()
    payload = b"".join(o.to_bytes(8, "big") for o in offsets)
    assert refused(both.target.receive, seal(raw_sealer(both.source), RecordType.OPEN, payload), RecordUnexpected) == []


@pytest.mark.parametrize("reason", [0, 8, 255])
def test_a_close_for_an_unknown_reason(reason):
    both = opened()
    sealer = raw_sealer(both.source)
    seal(sealer, RecordType.OPEN, bytes(16))
    assert refused(both.target.receive, seal(sealer, RecordType.CLOSE, bytes([reason])), RecordUnexpected) == []


def test_anything_after_a_close():
    both = opened()
    stream = both.source.send.close(CloseReason.LOCAL_BROKEN) + b"\x03\x00\x00\x01"
    expected = [PeerClosed(CloseReason.LOCAL_BROKEN)]
    assert refused(both.target.receive, stream, RecordUnexpected) == expected


def test_the_plaintext_of_a_forged_record_does_not_stay_in_memory():
    both = opened()
    record = bytearray(data(both.source.send, b"secret of the guest"))
    record[-1] ^= 1
    opener = RecordOpener(both.source.keys.initiator_to_responder, secret(NONCE), RekeyLimits(1 << 24, 1 << 36))
    out = memoryview(bytearray(100))
    opener.open_into(opener.header(seal(raw_sealer(both.source), 1, bytes(16))), _opening(both), out)
    out[:] = b"\xaa" * 100
    for _ in range(2):
        with pytest.raises(RecordForged):
            opener.open_into(opener.header(record), memoryview(record)[4:], out)
        assert bytes(out) == bytes(19) + b"\xaa" * 81
    record[-1] ^= 1  # it would verify now, but the opener is spent
    with pytest.raises(RecordForged):
        opener.open_into(opener.header(record), memoryview(record)[4:], out)
    assert opener.records == 1


def _opening(both: Pair) -> memoryview:
    return memoryview(seal(raw_sealer(both.source), RecordType.OPEN, bytes(16)))[4:]


def test_a_receiver_that_met_a_forged_record_forgets_its_buffers():
    both = opened()
    record = bytearray(data(both.source.send, b"secret of the guest"))
    record[-1] ^= 1
    space = both.target.receive.space()
    assert refused(both.target.receive, bytes(record), RecordForged) == []
    assert not any(space)
    assert b"secret" not in bytes(both.target.receive._opened)


@settings(max_examples=200)
@given(garbage=st.binary(max_size=200), late=st.booleans())
def test_garbage_is_never_delivered(garbage, late):
    both = opened() if late else pair()
    events: list[object] = []
    with pytest.raises(ChannelError):
        feed_to_eof(both.target.receive, garbage, events)
    assert events == []


@given(word=st.binary(min_size=4, max_size=12))
def test_any_four_bytes_are_a_header_or_refused(word):
    opener = RecordOpener(secret(bytes(32)), secret(NONCE), RekeyLimits())
    length = int.from_bytes(word[1:4], "big")
    try:
        header = opener.header(word)
    except RecordUnexpected:
        assert word[0] not in list(RecordType)
    except RecordOversize:
        shortest, longest = PAYLOAD_BYTES[RecordType(word[0])]
        assert not shortest <= length <= longest
    else:
        assert header == (word[0], length)
        assert length <= MAX_PAYLOAD


@pytest.mark.parametrize("kind", RecordType)
def test_a_sealer_refuses_lengths_that_a_type_does_not_have(kind):
    sealer = RecordSealer(secret(bytes(32)), secret(NONCE), RekeyLimits())
    shortest, longest = PAYLOAD_BYTES[kind]
    for length in {shortest - 1, longest + 1} - {-1}:
        out = memoryview(bytearray(length + RECORD_OVERHEAD))
        with pytest.raises(RecordOversize):
            sealer.seal_into(kind, bytes(length), out)
        assert not any(out)
    with pytest.raises(ValueError, match="needed to seal"):
        sealer.seal_into(kind, bytes(longest), memoryview(bytearray(longest + RECORD_OVERHEAD - 1)))
    assert sealer.records == 0


def test_buffers_of_the_wrong_size_open_nothing():
    opener = RecordOpener(secret(bytes(32)), secret(NONCE), RekeyLimits())
    for body, out in ((19, 4), (21, 4), (20, 3)):
        with pytest.raises(ValueError, match="size"):
            opener.open_into((RecordType.DATA, 4), memoryview(bytes(body)), memoryview(bytearray(out)))
    assert opener.records == 0


def test_sequence_exhaustion_when_sending():
    both = opened()
    both.source.send._sealer._sequence = LAST_SEQUENCE
    record = data(both.source.send, b"the last one")
    out = memoryview(bytearray(64))
    for act in (lambda: both.source.send.data_into(b"x", out), both.source.send.end):
        with pytest.raises(SequenceExhausted):
            act()
    assert not any(out)
    assert both.source.send.plaintext_bytes == len(b"the last one")
    both.target.receive._opener._sequence = LAST_SEQUENCE
    assert deliver(both.target.receive, record) == [b"the last one"]


def test_sequence_exhaustion_when_receiving():
    both = opened()
    record = data(both.source.send, b"one too many")
    both.target.receive._opener._sequence = LAST_SEQUENCE + 1
    assert refused(both.target.receive, record, SequenceExhausted) == []


def _rekeys(limits: RekeyLimits, chunks: list[bytes]) -> list[int]:
    """How many key changes there were after each DATA record, both directions alike and in step."""
    both = opened(limits)
    seen = []
    for chunk in chunks:
        for mine, theirs in ((both.source, both.target), (both.target, both.source)):
            assert deliver(theirs.receive, data(mine.send, chunk)) == [chunk]
            assert theirs.receive.rekeys == mine.send.rekeys
        seen.append(both.source.send.rekeys)
        assert both.target.send.rekeys == both.source.send.rekeys
    return seen


def test_rekey_by_records():
    assert _rekeys(RekeyLimits(3, 1 << 36), [b"x"] * 8) == [0, 1, 1, 1, 2, 2, 2, 3]


def test_rekey_by_bytes():
    # OPEN's 16 bytes count as well; what goes beyond the limit is not carried over.
    assert _rekeys(RekeyLimits(1 << 24, 100), [bytes(83), b"x", bytes(99), b"x", bytes(500), b"x"]) == [
        0,
        1,
        1,
        2,
        3,
        3,
    ]


def test_rekey_after_every_record():
    assert _rekeys(RekeyLimits(1, 1 << 36), [b"x"] * 4) == [2, 3, 4, 5]


def test_the_sequence_goes_on_across_a_rekey():
    both = opened(RekeyLimits(2, 1 << 36))
    for number in range(1, 6):
        assert both.source.send.records == number
        data(both.source.send, b"x")
    assert both.source.send.rekeys == 3


def test_a_side_that_forgets_to_rekey_is_refused():
    both = opened(RekeyLimits(2, 1 << 36))
    sealer = raw_sealer(both.source)  # with the highest limits
    seal(sealer, RecordType.OPEN, bytes(16))
    stream = seal(sealer, RecordType.DATA, b"old key") + seal(sealer, RecordType.DATA, b"old key again")
    assert refused(both.target.receive, stream, RecordForged) == [b"old key"]


def test_a_record_from_before_a_rekey_is_refused_after_it():
    both = opened(RekeyLimits(2, 1 << 36))
    record = data(both.source.send, b"x")
    assert refused(both.target.receive, record + record, RecordForged) == [b"x"]
