"""Two pure sessions joined in memory: whatever one sends in order, the other gives out, however the bytes are cut."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sealift.channel.protocol import MAX_PAYLOAD, OPEN_RECORD_BYTES, CloseReason, RecordType, RekeyLimits
from sealift.channel.session import (
    _RECEIVING,
    _SENDING,
    Acknowledged,
    Data,
    Heartbeat,
    PeerClosed,
    PeerEnded,
    PeerOpened,
    Receiving,
    SendHalf,
    Sending,
)
from sealift.errors import PeerClosed as PeerClosedError
from sealift.errors import RecordUnexpected, StreamTruncated
from support.channel_pair import SPEC, data, deliver, opened, pair, payloads


@settings(max_examples=150)
@given(
    chunks=st.lists(st.binary(min_size=1, max_size=300), max_size=12),
    cuts=st.lists(st.integers(0, 4000), max_size=40),
    records=st.integers(1, 5),
    buffer_bytes=st.integers(OPEN_RECORD_BYTES, 700),
)
def test_any_cut_of_the_stream_gives_the_same_stream(chunks, cuts, records, buffer_bytes):
    both = pair(RekeyLimits(records, 400), buffer_bytes=buffer_bytes)
    both.source.send.peer_opened()
    stream = both.source.send.open() + b"".join(data(both.source.send, c) for c in chunks) + both.source.send.end()
    events = deliver(both.target.receive, stream, [c for c in cuts if c < len(stream)])
    assert events == [PeerOpened(0, 0), *chunks, PeerEnded()]
    both.target.receive.eof()
    assert both.target.receive.plaintext_bytes == both.source.send.plaintext_bytes == sum(map(len, chunks))
    assert both.target.receive.records == both.source.send.records == len(chunks) + 2
    assert both.target.receive.rekeys == both.source.send.rekeys


@settings(max_examples=25)
@given(cuts=st.lists(st.integers(1, 3 * MAX_PAYLOAD), max_size=6), buffer_bytes=st.sampled_from([64, 1 << 18, 1 << 21]))
def test_longest_records_pass_through_any_buffer(cuts, buffer_bytes):
    both = opened(buffer_bytes=buffer_bytes)
    sent = [b"x", bytes(MAX_PAYLOAD), b"y" * (MAX_PAYLOAD - 1)]
    stream = b"".join(data(both.source.send, chunk) for chunk in sent)
    assert deliver(both.target.receive, stream, [c for c in cuts if c < len(stream)]) == sent


def test_both_directions_flow_and_end_one_after_the_other():
    both = opened()
    assert deliver(both.target.receive, data(both.source.send, b"memory") + both.source.send.end()) == [
        b"memory",
        PeerEnded(),
    ]
    both.target.receive.eof()
    assert payloads(deliver(both.source.receive, data(both.target.send, b"return path"))) == b"return path"
    with pytest.raises(StreamTruncated):
        both.source.receive.eof()


def test_the_open_record_is_all_there_is_room_for_before_it_has_verified():
    both = pair(buffer_bytes=1 << 20)
    assert len(both.target.receive.space()) == OPEN_RECORD_BYTES <= 64
    deliver(both.target.receive, both.source.send.open())
    assert len(both.target.receive.space()) == 1 << 20


def test_several_records_come_out_of_one_receive():
    both = opened()
    stream = b"".join(data(both.source.send, b"%d" % i) for i in range(100))
    space = both.target.receive.space()
    space[: len(stream)] = stream
    both.target.receive.received(len(stream))
    seen = []
    while isinstance(event := both.target.receive.next_event(), Data):
        seen.append(bytes(event.view))
    assert seen == [b"%d" % i for i in range(100)]


def test_receiving_more_while_events_wait_is_a_mistake_of_the_caller():
    both = opened()
    record = data(both.source.send, b"waiting")
    both.target.receive.space()[: len(record)] = record
    both.target.receive.received(len(record))
    with pytest.raises(ValueError, match="take every event"):
        both.target.receive.space()
    with pytest.raises(ValueError, match="more bytes"):
        both.target.receive.received(1 << 20)
    event = both.target.receive.next_event()
    assert isinstance(event, Data)
    assert bytes(event.view) == b"waiting"


def test_heartbeats_carry_their_clocks():
    both = opened(control=True)
    both_ways = both.source.send.heartbeat(2**64 - 1, 0, 7) + data(both.source.send, b"frame")
    assert deliver(both.target.receive, both_ways) == [Heartbeat(2**64 - 1, 0, 7), b"frame"]
    assert both.target.receive.plaintext_bytes == 5


@pytest.mark.parametrize("reason", CloseReason)
def test_close_says_why_and_is_no_end_of_stream(reason):
    both = opened()
    stream = data(both.source.send, b"before") + both.source.send.close(reason)
    assert deliver(both.target.receive, stream) == [b"before", PeerClosed(reason)]
    with pytest.raises(PeerClosedError):
        both.target.receive.eof()


def test_a_close_after_the_end_is_still_heard():
    both = opened()
    stream = both.source.send.end() + both.source.send.close(CloseReason.MOVE_ENDED)
    assert deliver(both.target.receive, stream) == [PeerEnded(), PeerClosed(CloseReason.MOVE_ENDED)]


def test_the_tables_name_every_state():
    assert set(_SENDING) == set(Sending)
    assert set(_RECEIVING) == set(Receiving)
    for table in (_SENDING, _RECEIVING):
        assert set().union(*(set(row) for row in table.values())) == set(RecordType)


def _in(state: Sending) -> SendHalf:
    """A sender that got into ``state`` in the way a relay gets there."""
    half = pair(control=True).source.send
    if state in (Sending.HEARD, Sending.FLOWING, Sending.ENDED):
        half.peer_opened()
    if state not in (Sending.NEW, Sending.HEARD):
        half.open()
    if state is Sending.ENDED:
        half.end()
    if state is Sending.CLOSED:
        half.close(CloseReason.INTERNAL)
    assert half.state is state
    return half


@pytest.mark.parametrize("state", Sending)
@pytest.mark.parametrize("kind", RecordType)
def test_a_sender_does_what_its_table_says_and_nothing_else(state, kind):
    half = _in(state)
    acts = {
        RecordType.OPEN: half.open,
        RecordType.RESUME: lambda: half.resume(5, 6),
        RecordType.ACK: lambda: half.ack(7),
        RecordType.DATA: lambda: data(half, b"payload"),
        RecordType.END: half.end,
        RecordType.HEARTBEAT: lambda: half.heartbeat(1, 2, 3),
        RecordType.CLOSE: lambda: half.close(CloseReason.INTERNAL),
    }
    records, out = half.records, _SENDING[state].get(kind)
    if out is None:
        with pytest.raises(RecordUnexpected):
            acts[kind]()
        assert (half.state, half.records, half.plaintext_bytes) == (state, records, 0)
    else:
        acts[kind]()
        assert (half.state, half.records) == (out, records + 1)


def test_data_waits_for_the_opens_of_both_sides():
    half = pair().source.send
    out = memoryview(bytearray(100))
    with pytest.raises(RecordUnexpected):
        half.data_into(b"too early", out)
    half.open()
    with pytest.raises(RecordUnexpected):
        half.data_into(b"too early", out)
    assert bytes(out) == bytes(100)
    half.peer_opened()
    half.peer_opened()
    assert half.data_into(b"now", out) == 23


def test_data_is_sealed_from_the_callers_buffer_into_the_callers_buffer():
    both = opened()
    payload, out = memoryview(bytearray(b"...stream...")), memoryview(bytearray(64))
    written = both.source.send.data_into(payload[3:9], out[10:])
    assert bytes(payload) == b"...stream..."
    assert bytes(out[:10]) == bytes(10)
    assert bytes(out[10 + written :]) == bytes(64 - 10 - written)
    assert payloads(deliver(both.target.receive, bytes(out[10 : 10 + written]))) == b"stream"


def test_resume_stands_in_for_open_and_carries_both_offsets():
    both = pair()
    assert deliver(both.target.receive, both.source.send.resume(7, 2**64 - 1)) == [PeerOpened(7, 2**64 - 1, True)]
    both.target.send.peer_opened()
    assert deliver(both.source.receive, both.target.send.resume(0, 0)) == [PeerOpened(0, 0, True)]
    both.source.send.peer_opened()
    assert deliver(both.target.receive, data(both.source.send, b"on we go")) == [b"on we go"]


def test_acknowledgements_go_on_after_the_end():
    both = opened()
    stream = both.source.send.ack(3) + both.source.send.end() + both.source.send.ack(2**64 - 1)
    assert deliver(both.target.receive, stream) == [Acknowledged(3), PeerEnded(), Acknowledged(2**64 - 1)]


def test_wiping_a_receiver_overwrites_what_it_held():
    both = opened()
    record = data(both.source.send, b"memory of a guest")
    half = both.target.receive
    space = half.space()
    space[: len(record)] = record
    half.received(len(record))
    event = half.next_event()
    assert isinstance(event, Data)
    half.wipe()
    assert bytes(event.view) == bytes(17)
    assert not any(space)
    with pytest.raises(RecordUnexpected):
        half.next_event()


def test_the_spec_of_the_pair_is_the_one_the_documents_describe():
    assert len(SPEC.encode()) == 92
