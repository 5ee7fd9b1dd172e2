"""A link between two hosts that breaks by script: resets, goes down, swallows, flips bits. It knows no protocol."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from dataclasses import dataclass, field

_CHUNK = 64 << 10
_RESET = struct.pack("ii", 1, 0)


@dataclass
class Link:
    """One connection through a cutter."""

    source: socket.socket
    target: socket.socket
    dead: threading.Event = field(default_factory=threading.Event)

    @property
    def open(self) -> bool:
        """Whether an end of it is not closed yet: it may be half open."""
        return self.source.fileno() >= 0 or self.target.fileno() >= 0

    def reset(self) -> None:
        """Reset both ends; nothing passes any more."""
        self.dead.set()
        _reset(self.source)
        _reset(self.target)


class Cutter:
    """Forwards TCP to a port of this machine; use it in a ``with`` block.

    ``reset_every``: bytes (both ways, all connections together) after which every connection is reset, ``resets``
    times. ``flip_every``: bytes towards the target after which one bit is flipped, again and again.
    """

    def __init__(self, port: int, *, reset_every: int = 0, resets: int = 0, flip_every: int = 0) -> None:
        self._target = ("127.0.0.1", port)
        self._reset_every, self.resets_left = reset_every, resets
        self._flip_every, self._flips_left = flip_every, 0
        self._lock = threading.Lock()
        self._passed = self._since_flip = 0
        self._links: list[Link] = []
        self._down = self._swallowing = self._closed = False
        self._accepted = 0
        self._knocked = threading.Condition()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]

    def __enter__(self) -> Cutter:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.reset()

    def await_connections(self, count: int, timeout: float) -> None:
        """Wait until so many more were made, whether or not anything passes; raises TimeoutError."""
        with self._knocked:
            wanted = self._accepted + count
            if not self._knocked.wait_for(lambda: self._accepted >= wanted, timeout):
                raise TimeoutError(f"{count} connections were not made in {timeout} s")

    def reset(self) -> None:
        """Reset every connection, towards both hosts."""
        with self._lock:
            links, self._links = self._links, []
        for link in links:
            link.reset()

    def reset_source_only(self) -> None:
        """Reset the source's ends; the target hears nothing."""
        with self._lock:
            links = list(self._links)
        for link in links:
            link.dead.set()
            _reset(link.source)

    def down(self) -> None:
        """Reset everything and let nothing new through until ``up``."""
        self._down = True
        self.reset()

    def swallow(self) -> None:
        """Take every byte and pass on none, without a reset, also of new connections, until ``up``."""
        self._swallowing = True

    def up(self) -> None:
        """Let new connections through; those that lost bytes stay dead."""
        self._down = self._swallowing = False

    def flip(self) -> None:
        """Flip one bit in what goes to the target next."""
        with self._lock:
            self._flips_left += 1

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                source, _ = self._listener.accept()
                with self._knocked:
                    self._accepted += 1
                    self._knocked.notify_all()
                if self._down or self._closed:
                    _reset(source)
                    continue
                try:
                    target = socket.create_connection(self._target)
                except OSError:  # nobody listens there now; the next one may be luckier
                    _reset(source)
                    continue
                link = self._link(source, target)
                with self._lock:
                    self._links = [known for known in self._links if known.open] + [link]
                if self._down:  # since it was accepted
                    link.reset()
                for forth in (True, False):
                    threading.Thread(target=self._pump, args=(link, forth), daemon=True).start()

    def _link(self, source: socket.socket, target: socket.socket) -> Link:
        return Link(source, target)

    def _pump(self, link: Link, forth: bool) -> None:
        reader, writer = (link.source, link.target) if forth else (link.target, link.source)
        with contextlib.suppress(OSError):
            while data := reader.recv(_CHUNK):
                if self._swallowing or link.dead.is_set():
                    link.dead.set()
                    continue
                if not self._pass(link, self._flipped(data) if forth else data, forth):
                    return
            if not link.dead.is_set():
                writer.shutdown(socket.SHUT_WR)

    def _pass(self, link: Link, data: bytes, forth: bool) -> bool:
        """Pass on what has come, or what of it may; whether the connection goes on."""
        if self._cut(len(data)):
            self.reset()
            return False
        (link.target if forth else link.source).sendall(data)
        return True

    def _cut(self, count: int) -> bool:
        with self._lock:
            self._passed += count
            if not self.resets_left or self._passed < self._reset_every:
                return False
            self._passed = 0
            self.resets_left -= 1
            return True

    def _flipped(self, data: bytes) -> bytes:
        if not self._flip_every and not self._flips_left:
            return data
        with self._lock:
            if self._flips_left:
                self._flips_left -= 1
            else:
                self._since_flip += len(data)
                if not self._flip_every or self._since_flip < self._flip_every:
                    return data
                self._since_flip = 0
        changed = bytearray(data)
        changed[len(changed) // 2] ^= 0x10
        return bytes(changed)


def _reset(sock: socket.socket) -> None:
    """Close with a RST, whoever is reading it; what was not sent yet is lost."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        sock.shutdown(socket.SHUT_RD)
    with contextlib.suppress(OSError):
        sock.close()
