"""The measured window: bounded in time and in bytes, and never what holds a link back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sealift.channel.window import FIRST, LEAST, SAMPLE_S, TIME_S, Window

CEILING = 64 << 20


def measured(
    window: Window, rate: float, round_trip: float, seconds: float, *, was_full: bool, start: float = 0.0
) -> int:
    """Let the peer acknowledge ``rate`` bytes per second, every 10 ms, for so long; the window that comes of it."""
    for n in range(int(seconds * 100) + 1):
        window.acknowledged(int((start + n / 100) * rate), start + n / 100, round_trip, was_full=was_full)
    return window.bytes


def test_before_anything_is_measured() -> None:
    assert Window(CEILING).bytes == FIRST
    assert Window(1 << 20).bytes == 1 << 20


def test_a_single_acknowledgement_measures_nothing() -> None:
    window = Window(CEILING)
    assert not window.acknowledged(1 << 30, 0.0, 0.0, was_full=True)
    assert not window.acknowledged(2 << 30, SAMPLE_S / 2, 0.0, was_full=True)
    assert window.bytes == FIRST


def test_near_hosts_get_thirty_milliseconds() -> None:
    assert abs(measured(Window(CEILING), 1e9, 0.0001, 1, was_full=True) - 1e9 * TIME_S) < 1e6


def test_far_hosts_get_two_round_trips() -> None:
    assert abs(measured(Window(CEILING), 1e8, 0.1, 2, was_full=True) - 1e8 * 0.2) < 1e6


def test_it_stays_between_the_least_and_the_ceiling() -> None:
    assert measured(Window(CEILING), 1e10, 0.1, 2, was_full=True) == CEILING
    assert measured(Window(CEILING), 1e4, 0.001, 2, was_full=True) == LEAST


def test_a_stream_with_nothing_to_send_does_not_make_it_smaller() -> None:
    window = Window(CEILING)
    large = measured(window, 1e9, 0.001, 1, was_full=True)
    assert measured(window, 1e6, 0.001, 1, was_full=False, start=2000.0) == large


def test_a_link_that_became_slower_does() -> None:
    window = Window(CEILING)
    measured(window, 1e9, 0.001, 1, was_full=True)
    assert measured(window, 1e8, 0.001, 3, was_full=True, start=20.0) < 1e8 * TIME_S * 1.1


@given(st.floats(1e6, 2e9), st.floats(0.0001, 0.2), st.integers(16 << 20, 256 << 20))
def test_it_grows_until_the_link_is_the_limit(link: float, round_trip: float, ceiling: int) -> None:
    """A stream that is sent as fast as window and link allow; acknowledgements take the round trip and 10 ms."""
    window, now, offset = Window(ceiling), 0.0, 0.0
    turn = round_trip + 0.01
    for _ in range(400):
        rate = min(link, window.bytes / turn)
        offset += rate * turn
        now += turn
        window.acknowledged(int(offset), now, round_trip, was_full=rate < link)
    assert window.bytes == ceiling or window.bytes / turn >= 0.98 * link
