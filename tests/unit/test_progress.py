"""What is shown of a move's progress: never more than the target has."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sealift.domain.move import Progress

SENT = Progress(total_bytes=1000, remaining_bytes=300, transferred_bytes=700, rate=50.0, passes=1)


def test_what_the_relays_hold_is_still_to_come() -> None:
    shown = SENT.taken(450)
    assert (shown.transferred_bytes, shown.remaining_bytes, shown.total_bytes) == (450, 550, 1000)
    assert (shown.rate, shown.passes) == (50.0, 1)


def test_what_was_acknowledged_beyond_qemus_own_count_is_not_shown() -> None:
    """Device state and stream headers are no memory of the guest."""
    assert SENT.taken(800) == SENT


@given(*[st.integers(0, 1 << 50)] * 4)
def test_nothing_is_shown_as_sent_that_was_not_acknowledged(total: int, left: int, sent: int, acked: int) -> None:
    before = Progress(total_bytes=total, remaining_bytes=left, transferred_bytes=sent)
    shown = before.taken(acked)
    assert 0 <= shown.transferred_bytes <= min(sent, acked)
    assert shown.remaining_bytes <= total
    assert shown.taken(acked) == shown
