"""Ports of loopback for servers that are started a moment after their port was chosen."""

from __future__ import annotations

import secrets
import socket
from itertools import chain
from typing import Final

from sealift.errors import SealiftError

_FIRST: Final = 10_000
_END: Final = 30_000
"""Below the ports, by default from 32768, that the kernel gives to whoever asks for none in particular."""

_START: Final = _FIRST + secrets.randbelow(_END - _FIRST)
_left = chain(range(_START, _END), range(_FIRST, _START))


def free_port() -> int:
    """A TCP port of loopback that nobody uses now, and that this process was not given before."""
    for port in _left:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise SealiftError(f"this process was given every port of loopback from {_FIRST} to {_END - 1}")
