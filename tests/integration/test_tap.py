"""The tap of the demonstrations: what passes it is counted, wherever the pieces of a stream happen to end."""

from __future__ import annotations

import os
import socket

import pytest

from sealift.demo.tap import Tap

FIRST, SECOND = os.urandom(32), os.urandom(200)


def test_patterns_are_counted_once_in_both_directions_wherever_a_piece_ends() -> None:
    with socket.create_server(("127.0.0.1", 0)) as doorman:
        tap = Tap(doorman.getsockname()[1], FIRST)
        try:
            with socket.create_connection(("127.0.0.1", tap.port)) as one, doorman.accept()[0] as other:
                _send(one, other, FIRST)
                assert tap.counts() == (1, 32)
                _send(other, one, FIRST[:20])
                assert tap.counts() == (0, 20)
                _send(other, one, FIRST[20:] + bytes(9) + FIRST[:5])
                assert tap.counts() == (1, 26)
                _send(one, other, FIRST[5:])
                assert tap.counts() == (0, 27), "the other direction is another stream"
                tap.look_for(FIRST, SECOND)
                _send(one, other, SECOND[:199])
                _send(one, other, SECOND[199:] + FIRST)
                assert tap.counts() == (2, 232)
                _send(one, other, bytes(100))
                assert tap.counts() == (0, 100), "what was counted once is not counted again"
        finally:
            tap.close()


def _send(sender: socket.socket, receiver: socket.socket, data: bytes) -> None:
    sender.sendall(data)
    left = len(data)
    while left:
        left -= len(receiver.recv(left))


@pytest.mark.parametrize("pattern", [b"", bytes(257)])
def test_a_pattern_it_could_not_find_is_refused(pattern: bytes) -> None:
    with pytest.raises(ValueError, match="1 to 256 bytes"):
        Tap(1, pattern)
