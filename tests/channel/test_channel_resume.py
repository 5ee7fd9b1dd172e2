"""A channel outlives its connections: whatever is cut wherever, the stream arrives exactly once."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sealift.channel.ledger import LEAST_WINDOW, Ledger, Retention
from sealift.channel.outages import Outages, delay_before
from sealift.channel.session import Acknowledged, PeerEnded, PeerOpened
from sealift.errors import (
    BytesNotRetained,
    ChannelError,
    OffsetInvalid,
    RecordForged,
    RecordUnexpected,
    StreamTruncated,
)
from support.channel_pair import Pair, Side, data, deliver, pair

RECORD = 1000


class End:
    """One side of a channel: its ledger, what it has still to send, and what was delivered to it."""

    def __init__(self, stream: bytes) -> None:
        self.ledger = Ledger(LEAST_WINDOW, RECORD)
        self.stream = stream
        self.taken = 0
        self.delivered = b""
        self.ended = False

    def first(self, side: Side) -> bytes:
        if not self.ledger.confirmed:
            return side.send.open()
        return side.send.resume(self.ledger.into.expected, self.ledger.out.acked)

    def take_in(self, most: int) -> None:
        """Some of the local stream, as far as there is room; at its end, the end."""
        out = self.ledger.out
        while most and not out.ended and len(space := out.space()[:most]):
            piece = self.stream[self.taken : self.taken + len(space)]
            if not piece:
                break
            space[: len(piece)] = piece
            out.fill(len(piece))
            self.taken += len(piece)
            most -= len(piece)
        if self.taken == len(self.stream) and not out.ended:
            out.end()

    def say(self, side: Side) -> bytes:
        """Everything that can be sent now."""
        out, said = self.ledger.out, b""
        while len(view := out.unsent()):
            said += data(side.send, bytes(view))
            out.advance(len(view))
        if out.owes_end:
            out.advance(1)
            said += side.send.end()
        return said

    def acknowledge(self, side: Side) -> bytes:
        return side.send.ack(self.ledger.into.ack()) if self.ledger.into.owes_ack else b""

    def hear(self, side: Side, stream: bytes) -> None:
        """What arrives of a connection, a truncated record at the end included."""
        for event in deliver(side.receive, stream):
            match event:
                case bytes():
                    self.ledger.into.accept(len(event))
                    self.delivered += event
                    self.ledger.into.deliver(len(event))
                case PeerOpened(expected, retained, resumes):
                    self.ledger.meet(expected, retained, resumes=resumes)
                    side.send.peer_opened()
                case Acknowledged(offset):
                    self.ledger.out.acknowledge(offset)
                case PeerEnded():
                    assert not self.ended, "the end came twice"
                    self.ended = True
                    self.ledger.into.end()

    @property
    def done(self) -> bool:
        return self.ended and self.ledger.out.ended_and_acked


def connect(number: int) -> Pair:
    return pair(source_private=number.to_bytes(32, "big"), target_private=(number + 1).to_bytes(32, "little"))


cuts = st.lists(
    st.tuples(
        st.integers(0, 6000), st.integers(0, 6000), st.integers(0, 3000), st.booleans(), st.booleans(), st.booleans()
    ),
    max_size=25,
)


@settings(max_examples=60)
@given(forth=st.integers(0, 90_000), back=st.integers(0, 5_000), cuts=cuts)
def test_cut_at_any_byte_both_ways_with_any_acknowledgements_the_stream_is_exact(forth, back, cuts) -> None:
    """Each cut: how many bytes arrive forth and back, how much is read locally, and who acknowledges."""
    source = End(bytes(n * 7 % 251 for n in range(forth)))
    target = End(bytes(n * 11 % 241 for n in range(back)))
    # When the list is at an end nothing is cut any more, and everything must get through.
    endless = [(1 << 30, 1 << 30, RECORD * 30, True, True, False)] * 60
    for number, (keep_forth, keep_back, most, ack_forth, ack_back, lost_open) in enumerate([*cuts, *endless], start=1):
        if source.done and target.done:
            break
        both = connect(number)
        first = source.first(both.source)
        target.hear(both.target, first)
        answer = (
            target.first(both.target)
            if not target.ledger.confirmed
            else both.target.send.resume(target.ledger.into.expected, target.ledger.out.acked)
        )
        if lost_open:  # the target counts the connection, the source never hears of it
            continue
        source.hear(both.source, answer)
        for end, side in ((source, both.source), (target, both.target)):
            end.take_in(most)
            assert end.ledger.out.held_bytes <= LEAST_WINDOW, side
        there = source.say(both.source) + (source.acknowledge(both.source) if ack_forth else b"")
        target.hear(both.target, there[:keep_forth])
        here = target.say(both.target) + (target.acknowledge(both.target) if ack_back else b"")
        source.hear(both.source, here[:keep_back])
        if keep_forth >= len(there) and keep_back >= len(here):  # it lives on for one more word each
            last = source.acknowledge(both.source)
            target.hear(both.target, last)
        assert source.stream.startswith(target.delivered)
        assert target.stream.startswith(source.delivered)
    assert target.delivered == source.stream
    assert source.delivered == target.stream
    assert source.ended
    assert target.ended


def filled(sent: int = 3000, acked: int = 1000) -> Ledger:
    ledger = Ledger(LEAST_WINDOW, RECORD)
    while ledger.out.filled < sent:
        assert ledger.out.put(bytes(RECORD))
    while len(view := ledger.out.unsent()):
        ledger.out.advance(len(view))
    ledger.out.acknowledge(acked)
    return ledger


@pytest.mark.parametrize("offset", [0, 999, 3001, 2**64 - 1])
def test_a_resume_at_an_offset_the_peer_cannot_be_at(offset: int) -> None:
    ledger = filled()
    with pytest.raises(OffsetInvalid):
        ledger.meet(offset, 0, resumes=True)
    assert (ledger.out.acked, ledger.out.cursor) == (1000, 3000), "nothing may have changed"


@pytest.mark.parametrize("offset", [1000, 1500, 3000])
def test_a_resume_anywhere_between_acknowledged_and_sent(offset: int) -> None:
    ledger = filled()
    ledger.meet(offset, 0, resumes=True)
    left = 0
    while len(view := ledger.out.unsent()):
        ledger.out.advance(len(view))
        left += len(view)
    assert left == 3000 - offset


@pytest.mark.parametrize("offset", [999, 3001])
def test_an_acknowledgement_that_cannot_be_meant(offset: int) -> None:
    ledger = filled()
    with pytest.raises(OffsetInvalid):
        ledger.out.acknowledge(offset)


def test_what_was_not_sent_on_this_connection_is_not_acknowledged_on_it() -> None:
    ledger = filled()
    ledger.meet(1500, 0, resumes=True)
    with pytest.raises(OffsetInvalid):
        ledger.out.acknowledge(1501)


def test_bytes_that_the_peer_does_not_hold_any_more_are_not_skipped() -> None:
    ledger = Ledger(LEAST_WINDOW, RECORD)
    ledger.into.accept(10)
    with pytest.raises(BytesNotRetained):
        ledger.meet(0, 11, resumes=True)
    ledger.meet(0, 10, resumes=True)


def test_a_peer_that_must_know_better_cannot_open_from_the_beginning() -> None:
    ledger = Ledger(LEAST_WINDOW, RECORD)
    ledger.meet(0, 0, resumes=False)
    ledger.meet(0, 0, resumes=False)  # it never heard our answer: nothing came of the first one
    ledger.into.accept(1)
    with pytest.raises(RecordUnexpected):
        ledger.meet(0, 0, resumes=False)


def test_a_resume_recorded_earlier_is_nothing_on_another_connection() -> None:
    first, second = connect(1), connect(2)
    recorded = first.source.send.resume(5, 0)
    with pytest.raises(RecordForged):
        deliver(second.target.receive, recorded)


def test_a_resume_by_a_peer_without_the_key() -> None:
    both, stranger = connect(1), connect(9)
    with pytest.raises(ChannelError):
        deliver(both.target.receive, stranger.source.send.resume(0, 0))
    assert both.target.receive.plaintext_bytes == 0


def test_a_full_window_has_no_room_and_gets_it_back_by_acknowledgement() -> None:
    out = Retention(0, RECORD)
    while out.put(bytes(RECORD)):
        pass
    full = out.filled
    assert LEAST_WINDOW * 3 // 4 <= full <= LEAST_WINDOW
    assert out.held_bytes <= LEAST_WINDOW
    while len(view := out.unsent()):
        out.advance(len(view))
    out.acknowledge(full // 2)
    assert out.put(bytes(RECORD))
    assert out.held_bytes <= LEAST_WINDOW


def test_what_was_acknowledged_at_once_uses_the_same_memory_again() -> None:
    out = Retention(64 << 20, RECORD)
    for _ in range(10_000):
        assert out.put(bytes(RECORD))
        out.advance(len(out.unsent()))
        out.acknowledge(out.cursor)
    assert out.held_bytes <= 2 << 20


def test_the_end_is_acknowledged_by_a_resume_behind_it() -> None:
    ledger = filled()
    ledger.out.end()
    ledger.out.advance(1)
    ledger.meet(3001, 0, resumes=True)
    assert ledger.out.ended_and_acked
    assert not ledger.out.owes_end


def test_wiping_overwrites_what_is_held() -> None:
    out = Retention(0, RECORD)
    space = out.space()
    assert out.put(b"memory of a guest")
    out.wipe()
    assert not any(space)


def outages() -> Outages:
    return Outages(60.0, 5.0, now=100.0)


CAUSE = StreamTruncated("cut")


def test_the_budget_follows_the_phase() -> None:
    broken = outages()
    assert broken.deadline() is None
    assert broken.begin(1, 0, CAUSE, 110.0)
    assert broken.deadline() == 170.0
    broken.enter("switchover", 130.0)
    assert broken.deadline() == 135.0
    broken.enter("committed", 132.0)
    assert broken.deadline() is None
    assert broken.cause() is CAUSE


def test_an_outage_that_ends_is_forgotten() -> None:
    broken = outages()
    broken.begin(1, 0, CAUSE, 110.0)
    broken.begin(2, 0, CAUSE, 120.0)
    assert broken.end(1, 125.0) == 15.0
    assert broken.deadline() == 180.0
    broken.forget(2)
    assert broken.deadline() is None


def test_connections_that_bring_nothing_and_break_at_once_are_one_outage() -> None:
    broken = outages()
    assert broken.begin(1, 7, CAUSE, 110.0)
    broken.end(1, 111.0)
    assert not broken.begin(1, 7, CAUSE, 112.0)
    assert broken.deadline() == 170.0
    broken.end(1, 113.0)
    assert broken.begin(1, 8, CAUSE, 114.0), "something was carried"
    broken.end(1, 115.0)
    assert broken.begin(1, 8, CAUSE, 125.0), "it stood for a while"
    assert broken.deadline() == 185.0


def test_an_outage_is_reported_as_long_as_it_lasts() -> None:
    broken = outages()
    assert broken.report(100.0) is None
    broken.begin(1, 0, CAUSE, 110.0)
    told = {"down_s": 12.0, "left_s": 48.0, "slug": "stream_truncated", "what": "cut"}
    assert broken.report(122.0) == told
    broken.enter("committed", 123.0)
    assert broken.report(124.0) == told | {"down_s": 14.0, "left_s": None}
    broken.end(1, 125.0)
    assert broken.report(126.0) is None


def test_attempts_become_rarer() -> None:
    delays = [delay_before(n) for n in range(9)]
    assert delays == [0.0, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 2.0]
