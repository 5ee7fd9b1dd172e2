"""Ports that are free at the moment of asking."""

from __future__ import annotations

import socket


def free_port() -> int:
    """A free TCP port of loopback."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
