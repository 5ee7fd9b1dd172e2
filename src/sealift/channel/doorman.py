"""The doorman: one TCP port for every move of a host. Reads 28 bytes, hands the connection to the move's relay.

It knows no key, reads not one byte beyond the preface, waits for nobody, and never answers: a connection it does not
like is closed. What is not a preface within two seconds, names a route without a door, or finds its door's queue full,
is closed. At most 256 prefaces may be unread; one more drops the oldest. So a flood meets this process, not the one
that must commit a move.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import os
import selectors
import signal
import socket
import time
from collections import OrderedDict
from typing import Final

from sealift.channel.protocol import PREFACE_BYTES, Preface
from sealift.channel.relay_spec import split_address
from sealift.errors import AlreadyExists, PrefaceInvalid

PREFACE_S: Final = 2.0
MAX_UNREAD: Final = 256
_BACKLOG: Final = 512


def door_path(doors: str, route: bytes) -> str:
    """Where a move's relay waits for connections of this route (attempt id, or token of a plain move)."""
    return os.path.join(doors, route.hex() + ".sock")


def remove_dead_doors(doors: str) -> None:
    """Remove the doors whose relay was killed before it could; a door that anybody holds stays."""
    for name in os.listdir(doors):
        path = os.path.join(doors, name)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as visitor:
            try:
                visitor.connect(path)
            except ConnectionRefusedError:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
            except FileNotFoundError:
                pass  # its relay was quicker


class _Visitor:
    """A connection whose preface is not complete."""

    __slots__ = ("deadline", "preface", "sock")

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self.sock = sock
        self.deadline = deadline
        self.preface = b""


class Doorman:
    """One listener, one thread, no blocking call but the select."""

    def __init__(self, listen: str, doors: str, lock: str) -> None:
        """Take the lock and bind; raises AlreadyExists if another doorman holds the lock, OSError."""
        self._doors = doors
        self._lock_fd = _take_lock(lock)
        self._selector = selectors.DefaultSelector()
        self._visitors: OrderedDict[socket.socket, _Visitor] = OrderedDict()
        self._stopping = False
        host, port = split_address(listen)
        self._listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind((host, port))
        self._listener.listen(_BACKLOG)
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._postman = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._woken, self._wake = socket.socketpair()
        self._woken.setblocking(False)
        self._wake.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ)

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self._listener.getsockname()[1])

    def obey_signals(self) -> None:
        """Let SIGTERM and SIGINT end ``serve``; main thread only."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)

    def serve(self) -> None:
        """Work until stopped."""
        try:
            while not self._stopping:
                for key, _ in self._selector.select(self._until_next_deadline()):
                    if key.fileobj is self._listener:
                        self._accept()
                    elif key.fileobj is not self._woken and isinstance(key.fileobj, socket.socket):
                        self._read(key.fileobj)
                self._drop_late()
        finally:
            self._close()

    def _on_signal(self, number: int, frame: object) -> None:
        self._stopping = True

    def _until_next_deadline(self) -> float | None:
        for visitor in self._visitors.values():  # oldest first, and all wait equally long
            return max(0.0, visitor.deadline - time.monotonic())
        return None

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE) and self._visitors:
                self._drop(next(iter(self._visitors)))
            return
        sock.setblocking(False)
        self._visitors[sock] = _Visitor(sock, time.monotonic() + PREFACE_S)
        self._selector.register(sock, selectors.EVENT_READ)
        if len(self._visitors) > MAX_UNREAD:
            self._drop(next(iter(self._visitors)))

    def _read(self, sock: socket.socket) -> None:
        visitor = self._visitors.get(sock)
        if visitor is None:
            return  # dropped while this round's events were handled
        try:
            data = sock.recv(PREFACE_BYTES - len(visitor.preface))
        except BlockingIOError:
            return
        except OSError:
            data = b""
        visitor.preface += data
        if not data:
            self._drop(sock)
        elif len(visitor.preface) == PREFACE_BYTES:
            self._pass_on(visitor)
            self._drop(sock)

    def _pass_on(self, visitor: _Visitor) -> None:
        try:
            route = Preface.decode(visitor.preface).route
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [visitor.sock.fileno()]))
            # Not socket.send_fds, which drops the address up to Python 3.12.
            self._postman.sendmsg([visitor.preface], [rights], 0, door_path(self._doors, route))
        except (PrefaceInvalid, OSError):
            return  # garbage, nobody there, or the door's queue is full: closing is all the answer there is

    def _drop_late(self) -> None:
        now = time.monotonic()
        while self._visitors:
            sock, visitor = next(iter(self._visitors.items()))
            if visitor.deadline > now:
                return
            self._drop(sock)

    def _drop(self, sock: socket.socket) -> None:
        del self._visitors[sock]
        self._selector.unregister(sock)
        sock.close()

    def _close(self) -> None:
        for sock in list(self._visitors):
            self._drop(sock)
        for own in (self._listener, self._postman, self._woken, self._wake):
            with contextlib.suppress(KeyError):
                self._selector.unregister(own)
            own.close()
        self._selector.close()
        os.close(self._lock_fd)


def _take_lock(path: str) -> int:
    """Hold the lock for as long as this process lives, and write its pid into the file."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise AlreadyExists("another doorman holds the lock of this host") from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def doorman_pid(lock: str) -> int | None:
    """The pid of the doorman that holds the lock, or None if none runs; for an agent that was restarted."""
    try:
        fd = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        text = os.pread(fd, 32, 0).decode(errors="replace").strip()
        return int(text) if text.isdecimal() else None
    finally:
        os.close(fd)
    return None
