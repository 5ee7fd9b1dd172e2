"""The doorman: one TCP port for every move of a host. Reads 28 bytes, hands the connection to the move's relay.

It knows no key, reads not one byte beyond the preface, waits for nobody, and never answers: a connection it does not
like is reset, which leaves nothing behind in the kernel either. What is not a preface within two seconds, names a route
without a door, or finds its door's queue full, is such a one. So a flood meets this process, not the one that must
commit a move.

At most 256 prefaces may be unread; one more drops the oldest of the address that has most. An address whose connections
led nowhere too often has only eight of them until it kept quiet for a while. A preface that is there with its
connection, as a source's is, needs no place at all: a known route is never limited, whoever else floods from there.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import itertools
import os
import selectors
import signal
import socket
import struct
import sys
import time
from typing import Final

from sealift.channel.protocol import PREFACE_BYTES, Preface
from sealift.channel.relay_spec import split_address
from sealift.channel.waiting_room import Credit, WaitingRoom, origin
from sealift.errors import AlreadyExists, PrefaceInvalid

PREFACE_S: Final = 2.0
MAX_UNREAD: Final = 256
LIMITED_UNREAD: Final = 8
"""How many of them may be of one address that came too often with what led nowhere."""
STRAYS: Final = 64
"""How often that is: so many at once,"""
STRAYS_PER_S: Final = 4.0
"""and so many again each second. A source that waits for its target's relay to come makes at most ten in one."""
_ADDRESSES: Final = 1024
_BACKLOG: Final = 4096
_BATCH: Final = 64
_COMPLAIN_EVERY_S: Final = 60.0
_RESET: Final = struct.pack("ii", 1, 0)


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

    __slots__ = ("came", "origin", "preface", "sock")

    def __init__(self, sock: socket.socket, host: str, came: float) -> None:
        self.sock = sock
        self.origin = origin(host)
        self.came = came
        self.preface = b""


class Doorman:
    """One listener, one thread, no blocking call but the select."""

    def __init__(self, listen: str, doors: str, lock: str) -> None:
        """Take the lock and bind; raises AlreadyExists if another doorman holds the lock, OSError."""
        self._doors = doors
        self._lock_fd = _take_lock(lock)
        self._selector = selectors.DefaultSelector()
        self._unread: WaitingRoom[_Visitor] = WaitingRoom(MAX_UNREAD)
        self._credit = Credit(STRAYS, STRAYS_PER_S, _ADDRESSES)
        self._complain_at = 0.0
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
                    elif isinstance(key.data, _Visitor) and key.data in self._unread:
                        self._go_on(key.data)  # else it was dropped while this round's events were handled
                self._drop_late()
        finally:
            self._close()

    def _on_signal(self, number: int, frame: object) -> None:
        self._stopping = True

    def _until_next_deadline(self) -> float | None:
        for visitor in self._unread:  # oldest first, and all wait equally long
            return max(0.0, visitor.came + PREFACE_S - time.monotonic())
        return None

    def _accept(self) -> None:
        for _ in range(_BATCH):
            try:
                sock, address = self._listener.accept()
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE) and len(self._unread):
                    self._let_go(self._unread.give_way())
                return
            sock.setblocking(False)
            visitor = _Visitor(sock, address[0], time.monotonic())
            if not self._is_done(visitor):
                self._seat(visitor)

    def _seat(self, visitor: _Visitor) -> None:
        self._selector.register(visitor.sock, selectors.EVENT_READ, visitor)
        limited = self._credit.spent(visitor.origin, visitor.came)
        for lost in self._unread.enter(visitor, visitor.origin, at_most=LIMITED_UNREAD if limited else MAX_UNREAD):
            self._let_go(lost)

    def _go_on(self, visitor: _Visitor) -> None:
        self._selector.unregister(visitor.sock)
        if self._is_done(visitor):
            self._unread.leave(visitor)
        else:
            self._selector.register(visitor.sock, selectors.EVENT_READ, visitor)

    def _is_done(self, visitor: _Visitor) -> bool:
        """Read what there is; whether that settled it: the connection was passed on, or turned away."""
        try:
            data = visitor.sock.recv(PREFACE_BYTES - len(visitor.preface))
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        visitor.preface += data
        if not data:
            self._turn_away(visitor)
        elif len(visitor.preface) == PREFACE_BYTES:
            self._pass_on(visitor)
        else:
            return False
        return True

    def _pass_on(self, visitor: _Visitor) -> None:
        try:
            route = Preface.decode(visitor.preface).route
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [visitor.sock.fileno()]))
            # Not socket.send_fds, which drops the address up to Python 3.12.
            self._postman.sendmsg([visitor.preface], [rights], 0, door_path(self._doors, route))
        except BlockingIOError:
            _reset(visitor.sock)  # somebody is there, but has its hands full: no fault of the visitor's
        except (PrefaceInvalid, OSError):
            self._turn_away(visitor)  # garbage, or nobody there
        else:
            visitor.sock.close()

    def _turn_away(self, visitor: _Visitor) -> None:
        """Closing is all the answer there is; it costs the visitor's address some of its credit."""
        _reset(visitor.sock)
        now = time.monotonic()
        if self._credit.spend(visitor.origin, now) and now >= self._complain_at:
            self._complain_at = now + _COMPLAIN_EVERY_S
            text = f"too many connections from {visitor.origin} lead nowhere; it is limited while that goes on"
            print(f"sealift-doorman: {text}", file=sys.stderr, flush=True)

    def _drop_late(self) -> None:
        now = time.monotonic()
        late = list(itertools.takewhile(lambda visitor: visitor.came + PREFACE_S <= now, self._unread))
        for visitor in late:
            self._unread.leave(visitor)
            self._let_go(visitor)

    def _let_go(self, visitor: _Visitor) -> None:
        """A visitor that has lost its place."""
        self._selector.unregister(visitor.sock)
        self._turn_away(visitor)

    def _close(self) -> None:
        for visitor in self._unread:
            self._selector.unregister(visitor.sock)
            _reset(visitor.sock)
        for own in (self._listener, self._postman, self._woken, self._wake):
            with contextlib.suppress(KeyError):
                self._selector.unregister(own)
            own.close()
        self._selector.close()
        os.close(self._lock_fd)


def _reset(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    sock.close()


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
