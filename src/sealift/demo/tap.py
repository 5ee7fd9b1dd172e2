"""A tap on the wire between two hosts: forwards TCP connections to a doorman and counts patterns as they pass."""

from __future__ import annotations

import contextlib
import socket
import threading

_CHUNK = 1 << 20
_LONGEST = 256


class Tap:
    """Listens on loopback at ``port`` and forwards both ways to ``forward_to``, a port there, until closed."""

    def __init__(self, forward_to: int, *patterns: bytes) -> None:
        self._forward_to = forward_to
        self.look_for(*patterns)
        self._lock = threading.Lock()
        self._found = self._seen = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def look_for(self, *patterns: bytes) -> None:
        """Count these from now on, each of 1 to 256 bytes, and no others."""
        if not all(1 <= len(pattern) <= _LONGEST for pattern in patterns):
            raise ValueError(f"a pattern to look for has 1 to {_LONGEST} bytes")
        self._patterns = patterns

    def counts(self) -> tuple[int, int]:
        """Times that a pattern appeared, and bytes that passed, since the last call."""
        with self._lock:
            counted = self._found, self._seen
            self._found = self._seen = 0
        return counted

    def close(self) -> None:
        """Take no more connections; those that are open go on until their ends close."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                inward, _ = self._listener.accept()
                try:
                    outward = socket.create_connection(("127.0.0.1", self._forward_to))
                except OSError:
                    inward.close()
                    continue
                threading.Thread(target=self._forward, args=(inward, outward), daemon=True).start()

    def _forward(self, inward: socket.socket, outward: socket.socket) -> None:
        with inward, outward:
            back = threading.Thread(target=self._pump, args=(outward, inward), daemon=True)
            back.start()
            self._pump(inward, outward)
            back.join()

    def _pump(self, reader: socket.socket, writer: socket.socket) -> None:
        kept = b""  # the end of what came before, where a pattern may have begun
        with contextlib.suppress(OSError):
            while data := reader.recv(_CHUNK):
                window = kept + data
                found = sum(window.count(each, max(0, len(kept) - len(each) + 1)) for each in self._patterns)
                kept = window[-_LONGEST:]
                with self._lock:
                    self._found += found
                    self._seen += len(data)
                writer.sendall(data)
        with contextlib.suppress(OSError):
            writer.shutdown(socket.SHUT_WR)
