"""Somebody on the path between two hosts: forwards TCP to a doorman, reads along, and does harm when told to.

It sees what an attacker sees: prefaces, handshakes, record headers in clear. ``Harm`` is called with each record of one
direction of one channel and says which bytes go on.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable

from sealift.channel.protocol import HEADER_BYTES, MESSAGE_BYTES, PREFACE_BYTES, TAG_BYTES, Preface

Harm = Callable[["Passing", int, bytes], "bytes | None"]
"""(connection, number of the record in its direction, record) -> bytes to pass on; None cuts the connection."""


class Passing:
    """One connection through the middle. ``seen`` holds what the source sent, ``answered`` what the target sent."""

    def __init__(self, source: socket.socket, target: socket.socket) -> None:
        self.source = source
        self.target = target
        self.preface = b""
        self.seen = bytearray()
        self.answered = bytearray()

    @property
    def channel(self) -> int:
        return Preface.decode(self.preface).channel

    def cut(self) -> None:
        for sock in (self.source, self.target):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


class Middle:
    """The listener; use it in a ``with`` block."""

    def __init__(
        self, port: int, *, channel: int = 1, forward: Harm | None = None, backward: Harm | None = None
    ) -> None:
        self._target = ("127.0.0.1", port)
        self._channel = channel
        self._forward = forward
        self._backward = backward
        self.connections: list[Passing] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]

    def __enter__(self) -> Middle:
        self._start(self._accept)
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for passing in self.connections:
            passing.cut()
        for thread in self._threads:
            thread.join(10)
        for passing in self.connections:
            passing.source.close()
            passing.target.close()

    def _start(self, run: Callable[[], None]) -> None:
        thread = threading.Thread(target=run, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                source, _ = self._listener.accept()
            except OSError:
                return
            passing = Passing(source, socket.create_connection(self._target))
            self.connections.append(passing)
            self._start(lambda p=passing: self._carry_forward(p))
            self._start(lambda p=passing: self._carry_backward(p))

    def _carry_forward(self, passing: Passing) -> None:
        with contextlib.suppress(OSError, EOFError):
            passing.preface = _exactly(passing.source, PREFACE_BYTES)
            first = _exactly(passing.source, MESSAGE_BYTES)
            passing.seen += passing.preface + first
            harm = self._forward if passing.channel == self._channel else None
            passing.target.sendall(passing.preface + first)
            self._records(passing, passing.source, passing.target, passing.seen, harm)

    def _carry_backward(self, passing: Passing) -> None:
        with contextlib.suppress(OSError, EOFError):
            answer = _exactly(passing.target, MESSAGE_BYTES)
            passing.answered += answer
            passing.source.sendall(answer)
            harm = self._backward if passing.channel == self._channel else None
            self._records(passing, passing.target, passing.source, passing.answered, harm)

    @staticmethod
    def _records(
        passing: Passing, origin: socket.socket, onward: socket.socket, seen: bytearray, harm: Harm | None
    ) -> None:
        number = 0
        try:
            while True:
                header = _exactly(origin, HEADER_BYTES)
                record = header + _exactly(origin, int.from_bytes(header[1:], "big") + TAG_BYTES)
                seen += record
                onto = harm(passing, number, record) if harm else record
                if onto is None:
                    passing.cut()
                    return
                onward.sendall(onto)
                number += 1
        finally:
            with contextlib.suppress(OSError):
                onward.shutdown(socket.SHUT_WR)


def _exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = sock.recv(count - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data
