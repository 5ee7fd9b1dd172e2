"""A data connection that died, told from one whose reader is slow, and from one with nothing to say."""

from __future__ import annotations

import contextlib
import socket

import pytest

from sealift.channel.stalls import Flight, Stall, flight


def judged(*seen: tuple[float, Flight]) -> list[bool]:
    """The verdicts of a judge with a limit of 5 s, at these times."""
    stall = Stall(5.0)
    return [stall.dead(what, now) for now, what in seen]


def test_what_is_on_the_way_and_unanswered_for_five_seconds_is_dead() -> None:
    assert judged(
        (0, Flight(3, 100, 10)), (1, Flight(3, 1100, 10)), (4.9, Flight(3, 5000, 10)), (5, Flight(3, 5100, 10))
    ) == [False, False, False, True]


@pytest.mark.parametrize(
    "at_the_end",
    [
        pytest.param(Flight(0, 9000, 10), id="nothing is on the way"),
        pytest.param(Flight(3, 9000, 11), id="some of it has arrived"),
        pytest.param(Flight(3, 200, 10), id="the peer's kernel answers, though it takes nothing"),
    ],
)
def test_what_is_not_dead(at_the_end: Flight) -> None:
    assert not any(judged((0, Flight(3, 100, 10)), (9, at_the_end)))


def test_a_connection_that_sends_again_after_a_long_rest_is_given_its_time() -> None:
    """The peer last answered long ago, when it was last told something."""
    assert judged((0, Flight(0, 100, 10)), (60, Flight(1, 60_000, 10)), (61, Flight(1, 61_000, 10))) == [False] * 3


def test_the_kernel_says_of_a_slow_reader_that_nothing_is_on_the_way() -> None:
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        near = stack.enter_context(socket.create_connection(listener.getsockname()))
        stack.enter_context(listener.accept()[0])
        near.sendall(b"x" * 1000)
        while flight(near).segments:
            pass
        assert flight(near).acked == 1001  # the SYN counts for one
        near.settimeout(0.3)
        with contextlib.suppress(TimeoutError):
            while True:
                near.sendall(bytes(1 << 16))
        assert flight(near).segments == 0
