"""A tap on the wire between two hosts: forwards TCP connections to a doorman and counts a pattern as it passes."""

from __future__ import annotations

import contextlib
import socket
import threading

_CHUNK = 1 << 20


class Tap:
    """Listens on loopback at ``port`` and forwards both ways to ``forward_to``, a port there, until closed."""

    def __init__(self, forward_to: int, pattern: bytes) -> None:
        self._forward_to, self._pattern = forward_to, pattern
        self._lock = threading.Lock()
        self._found = self._seen = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def counts(self) -> tuple[int, int]:
        """Times the pattern appeared, and bytes that passed, since the last call."""
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
                for pair in ((inward, outward), (outward, inward)):
                    threading.Thread(target=self._pump, args=pair, daemon=True).start()

    def _pump(self, reader: socket.socket, writer: socket.socket) -> None:
        overlap = len(self._pattern) - 1
        kept = b""  # the end of the last piece, where a pattern may have begun
        with contextlib.suppress(OSError):
            while data := reader.recv(_CHUNK):
                window = kept + data
                found, kept = window.count(self._pattern), window[-overlap:]
                with self._lock:
                    self._found += found
                    self._seen += len(data)
                writer.sendall(data)
        with contextlib.suppress(OSError):
            writer.shutdown(socket.SHUT_WR)
