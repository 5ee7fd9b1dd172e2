"""The pure pieces of a relay: frames of the control stream, the judgement of silence, the peer's clock."""

from __future__ import annotations

import json
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sealift.channel.control_frames import MAX_DEPTH, FrameReader, encode_frame
from sealift.channel.control_link import MAX_MESSAGES, ControlLink, Outbox
from sealift.channel.ledger import Ledger
from sealift.channel.liveness import Beat, Liveness, PeerClock
from sealift.channel.protocol import CONTROL_FRAME_BYTES
from sealift.channel.relay_control import EventList
from sealift.errors import InvalidInput, RecordUnexpected

values = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=20), st.lists, max_leaves=5)
messages = st.dictionaries(st.text(max_size=8), values, max_size=4).map(lambda m: m | {"type": "READY"})


@settings(max_examples=50)
@given(st.lists(messages, max_size=5), st.integers(1, 50))
def test_frames_survive_any_cutting(sent: list[dict], size: int) -> None:
    stream = b"".join(encode_frame(m) for m in sent)
    reader = FrameReader()
    received = [m for start in range(0, len(stream), size) for m in reader.feed(stream[start : start + size])]
    assert received == sent
    assert not reader.midway


def test_a_peer_that_never_stops_talking_is_given_up() -> None:
    """What it says is kept until the process ends."""

    class Line:
        ledger, lock = Ledger(1 << 20, 1 << 16), threading.Lock()

    class Owner:
        failed: Exception | None = None

        def fail(self, error: Exception) -> None:
            self.failed = error

    events, owner = EventList(), Owner()
    with events.waker:
        link = ControlLink(Line(), Outbox(), owner, events, 5.0)  # type: ignore[arg-type]
        batch = memoryview(encode_frame({"type": "READY"}) * 10)
        for _ in range(MAX_MESSAGES // 10):
            link._deliver(batch)
        with pytest.raises(RecordUnexpected, match="messages"):
            link._deliver(batch)
        assert isinstance(owner.failed, RecordUnexpected)
        assert len(events.after(0)) <= MAX_MESSAGES
        events._wake.close()


def test_longest_frame_is_allowed_and_one_more_byte_is_not() -> None:
    room = CONTROL_FRAME_BYTES - len(json.dumps({"type": "X", "t": ""}, separators=(",", ":")))
    assert len(encode_frame({"type": "X", "t": "x" * room})) == CONTROL_FRAME_BYTES + 2
    with pytest.raises(InvalidInput):
        encode_frame({"type": "X", "t": "x" * (room + 1)})


def nested(depth: int) -> dict:
    """A message that nests so deep."""
    inner: object = []
    for _ in range(depth - 2):
        inner = [inner]
    return {"type": "X", "deep": inner}


@pytest.mark.parametrize("message", [{}, {"type": 1}, {"type": "X", "bad": object()}, nested(MAX_DEPTH + 1)])
def test_what_is_no_message_is_not_sent(message: dict) -> None:
    with pytest.raises(InvalidInput):
        encode_frame(message)


@pytest.mark.parametrize(
    "text",
    [b"", b"[]", b"{}", b'{"type":1}', b"\xff\xff", b"[" * 4000, b'{"type":"X"', json.dumps(nested(900)).encode()],
)
def test_what_is_no_message_is_not_taken(text: bytes) -> None:
    with pytest.raises(RecordUnexpected):
        FrameReader().feed(len(text).to_bytes(2, "big") + text)


def test_the_deepest_message_is_taken_and_one_deeper_is_not() -> None:
    assert FrameReader().feed(encode_frame(nested(MAX_DEPTH))) == [nested(MAX_DEPTH)]
    text = json.dumps(nested(MAX_DEPTH + 1)).encode()
    with pytest.raises(RecordUnexpected):
        FrameReader().feed(len(text).to_bytes(2, "big") + text)


def test_too_long_a_frame_is_refused_before_it_is_buffered() -> None:
    with pytest.raises(RecordUnexpected):
        FrameReader().feed((CONTROL_FRAME_BYTES + 1).to_bytes(2, "big"))


def test_a_stream_that_ends_in_a_frame_is_known() -> None:
    reader = FrameReader()
    assert reader.feed(b"\x00") == []
    assert reader.midway


def test_silence_is_judged_by_what_was_heard() -> None:
    liveness = Liveness(5.0, now=100.0)
    assert liveness.remaining(104.0) == pytest.approx(1.0)
    liveness.heard(104.0)
    assert liveness.remaining(108.0) == pytest.approx(1.0)
    assert liveness.remaining(109.5) < 0


@given(st.integers(-(10**12), 10**12), st.integers(0, 10**5), st.integers(0, 10**5), st.integers(0, 10**6))
def test_offset_and_round_trip_are_found(offset: int, there: int, back: int, held: int) -> None:
    """The error of the offset is half the difference of the two ways, as NTP has it."""
    ours, theirs = PeerClock(), PeerClock()
    now = 10**15
    first = ours.next_beat(now)
    assert first == Beat(now, 0, 0)
    theirs.hear(first, now + there + offset)
    answer = theirs.next_beat(now + there + held + offset)
    assert (answer.heard, answer.held) == (now, held)
    ours.hear(answer, now + there + held + back)
    assert ours.round_trip_us == there + back
    assert ours.offset_us == pytest.approx(offset + (there - back) / 2)


def test_the_quickest_sample_counts_and_impossible_ones_do_not() -> None:
    clock = PeerClock()
    clock.hear(Beat(5_000, 100, 0), 900)
    clock.hear(Beat(5_500, 1_000, 0), 1_010)
    clock.hear(Beat(9_000, 5_000, 0), 2_000)
    assert clock.round_trip_us == 10
    assert clock.offset_us == 5_500 + 5 - 1_010


def test_nothing_is_known_before_an_answer() -> None:
    clock = PeerClock()
    clock.hear(Beat(5_000, 0, 0), 900)
    assert clock.offset_us is None
    assert clock.round_trip_us is None
