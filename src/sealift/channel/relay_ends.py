"""The two ends of a move's channels, sealed or plain: who listens, who dials, in which order.

Source: dials the control channel at once; accepts exactly the planned number of local connections, whose order is the
order of the channels; dials one connection for each. Target: takes connections from the doorman, lets each prove
itself in a thread of its own while at most eight are unproven, or as many as there are channels, which may all resume
at once (one more drops the oldest of the address that has most), and opens its local connections strictly in the order
of the channels, main first, however they arrive (QEMU takes the first connection for the main stream).
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

from sealift.channel.carrier import FATAL, Carrier, replaced
from sealift.channel.local_sockets import ExpectedPeer, SourceListener, dial_target
from sealift.channel.outages import delay_before
from sealift.channel.protocol import PREFACE_BYTES, Preface
from sealift.channel.relay_move import Move
from sealift.channel.relay_spec import split_address
from sealift.channel.stalls import watch
from sealift.channel.waiting_room import WaitingRoom, origin
from sealift.channel.wire import Wire, prepare_tcp, shut
from sealift.errors import (
    ChannelError,
    EpochStale,
    HandshakeFailed,
    LocalPeerRefused,
    PeerUnreachable,
    StreamTruncated,
)

MAX_UNCONFIRMED: Final = 8
_RETRY_S: Final = 0.1
_FIRST_RECORD_S: Final = 1.0
_WASTE_BYTES: Final = 64 << 10

Join = Callable[[socket.socket, int, int, Carrier[Any], float], Wire]
"""(connection, channel, epoch, carrier, deadline) -> wire; raises OSError when the target just closes, ChannelError."""

Accept = Callable[[Carrier[Any]], tuple[Wire, bytes]]
"""(carrier without a connection) -> wire, and what to send on it first; raises ChannelError."""

Admit = Callable[[socket.socket, Preface, float], Accept]
"""(connection, preface, deadline) -> how to take it, now that it has proved itself; raises ChannelError."""


class SourceEnd:
    """The source's side."""

    def __init__(self, move: Move, join: Join) -> None:
        """Binds the local socket; raises LocalPeerRefused if the process to serve does not exist, OSError."""
        self._move = move
        self._join = join
        self._address = split_address(move.spec.target)
        self._epochs: Counter[int] = Counter()
        self._attempts: Counter[int] = Counter()
        self._peer = ExpectedPeer(move.spec.qemu_pid)
        self._listener = SourceListener(move.spec.directory, self._peer, move.spec.spec.channels)
        move.listening(to_locals=self._listener.close)
        move.reconnect_with(self._connect_again)

    def start(self) -> None:
        """Begin to connect and to accept."""
        self._move.spawn("outages", self._move.watch_outages)
        self._move.spawn("connect", self._connect_control)
        self._move.spawn("accept", self._accept)
        if self._move.resumes:
            carriers, limit, over = self._move.data_carriers, self._move.spec.silence_s, self._move.over
            self._move.spawn("stalls", lambda: watch(carriers, limit, over))

    def _connect_control(self) -> None:
        """The first connection of all: a target that refuses or just closes is tried again for a while only."""
        deadline = time.monotonic() + self._move.spec.patience_s
        while not self._dial(0, deadline, last=lambda: time.monotonic() + _RETRY_S >= deadline):
            if self._move.over.wait(_RETRY_S):
                return
        self._move.start_control()

    def _accept(self) -> None:
        for channel in range(1, self._move.spec.spec.channels + 1):
            local = self._accept_one()
            self._move.hold_local(local)
            self._move.spawn(f"dial-{channel}", lambda c=channel, s=local: self._open(c, s))  # type: ignore[misc]
        self._listener.close()
        self._peer.close()

    def _accept_one(self) -> socket.socket:
        while True:
            try:
                return self._listener.accept()
            except LocalPeerRefused as error:
                self._move.events.refuse(error)

    def _open(self, channel: int, local: socket.socket) -> None:
        self._move.connected.wait()
        if not self._dial(channel, self._attempt_ends()):
            self._move.outage(channel, StreamTruncated(f"no connection for channel {channel} could be made"))
        self._move.start_tunnel(channel, local)

    def _connect_again(self, channel: int, new: bool) -> None:
        if new:
            self._attempts[channel] = 0
        self._move.spawn(f"again-{channel}", lambda: self._resume(channel))

    def _resume(self, channel: int) -> None:
        """Connect a channel again; only the move's own end stops this."""
        while not self._move.over.wait(delay_before(self._attempts[channel])):
            self._attempts[channel] += 1
            if self._dial(channel, self._attempt_ends()):
                return

    def _attempt_ends(self) -> float:
        return time.monotonic() + self._move.spec.patience_s

    def _dial(self, channel: int, deadline: float, *, last: Callable[[], bool] = lambda: False) -> bool:
        """One attempt; whether a confirmed connection carries the channel now.

        Raises ChannelError for what no further attempt can change, and for anything in the ``last`` one.
        """
        carrier = self._move.carrier(channel)
        sock = socket.socket(self._family(), socket.SOCK_STREAM)
        self._move.hold_wire(sock)
        answered = False
        try:
            prepare_tcp(sock, data=channel > 0)
            sock.settimeout(max(0.001, deadline - time.monotonic()))
            sock.connect(self._address)
            answered = True
            self._epochs[channel] += 1
            wire = self._join(sock, channel, self._epochs[channel], carrier, deadline)
            sock.settimeout(None)
        except (ChannelError, OSError) as error:
            self._move.drop_wire(sock)
            if isinstance(error, FATAL):
                raise
            if last():
                raise (error if isinstance(error, ChannelError) else self._refused(answered, error)) from None
            return False
        carrier.attach(wire, self._epochs[channel])
        return True

    def _family(self) -> socket.AddressFamily:
        return socket.AF_INET6 if ":" in self._address[0] else socket.AF_INET

    def _refused(self, answered: bool, error: OSError) -> ChannelError:
        where = self._move.spec.target
        if answered:
            then = "did not answer in time" if isinstance(error, TimeoutError) else f"closed it again: {error}"
            return HandshakeFailed(
                f"the doorman or relay at {where} took the connection and {then}",
                todo="look at the log of the target's relay",
            )
        return PeerUnreachable(
            f"no connection to the target's migration address {where}: {error}",
            todo="check that the target's agent runs, and that its migration port is reachable from the source",
        )


class TargetEnd:
    """The target's side."""

    def __init__(self, move: Move, admit: Admit, *, check: Callable[[Preface, socket.socket], None]) -> None:
        """``check`` refuses a preface or its origin, with a ChannelError, before anything is read or written."""
        self._move = move
        self._admit = admit
        self._check = check
        self._peer = ExpectedPeer(move.spec.qemu_pid)
        self._door = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._door.bind(move.spec.door)
        os.chmod(move.spec.door, 0o600)
        self._lock = threading.Lock()
        self._places = max(MAX_UNCONFIRMED, 1 + move.spec.spec.channels)
        self._unconfirmed: WaitingRoom[socket.socket] = WaitingRoom(self._places)
        self._epochs: dict[int, int] = {}
        self._begun: set[int] = set()
        self._confirm_lock = threading.Lock()
        self._dial_lock = threading.Lock()
        self._next_channel = 1
        self._waiting: set[int] = set()
        move.listening(to_peer=self._close)

    def start(self) -> None:
        """Begin to take connections from the doorman."""
        self._move.spawn("outages", self._move.watch_outages)
        self._move.spawn("door", self._watch_door)

    def _close(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._move.spec.door)
        shut(self._door)
        with self._lock:
            for sock in self._unconfirmed:
                shut(sock)

    def _watch_door(self) -> None:
        while True:
            data, fds, _, _ = socket.recv_fds(self._door, PREFACE_BYTES + 1, 1)
            if not data and not fds:
                return  # the door was shut
            for sock in [socket.socket(fileno=fd) for fd in fds]:
                self._receive(data, sock)

    def _receive(self, data: bytes, sock: socket.socket) -> None:
        try:
            preface = Preface.decode(data)
            self._check(preface, sock)
            self._check_epoch(preface)
        except ChannelError as error:
            sock.close()
            self._move.events.refuse(error)
            return
        with self._lock:
            for lost in self._unconfirmed.enter(sock, _origin(sock), at_most=self._places):
                shut(lost)  # its thread then finds the connection ended, and reports it
        self._move.spawn(f"admit-{preface.channel}", lambda: self._prove(preface, sock))

    def _prove(self, preface: Preface, sock: socket.socket) -> None:
        try:
            sock.setblocking(True)
            prepare_tcp(sock, data=preface.channel > 0)
            accept = self._admit(sock, preface, time.monotonic() + self._move.spec.patience_s)
            if self._move.over.is_set():
                self._dismiss(preface, sock, accept)
                return
            self._move.hold_wire(sock)
            self._confirm(preface, accept)
        except (ChannelError, OSError) as error:
            self._move.drop_wire(sock)
            if isinstance(error, FATAL):
                raise
            refusal = error if isinstance(error, ChannelError) else HandshakeFailed(f"a connection broke: {error}")
            self._move.events.refuse(refusal)
            return
        finally:
            with self._lock:
                if sock in self._unconfirmed:
                    self._unconfirmed.leave(sock)

    def _dismiss(self, preface: Preface, sock: socket.socket, accept: Accept) -> None:
        """The move is over, and this connection, made since, shows that the peer was not told: it is told now."""
        carrier = self._move.carrier(preface.channel)
        with self._confirm_lock:
            self._check_epoch(preface)
            carrier.retire(replaced(preface.channel))
            wire, first = accept(carrier)
        try:
            sock.settimeout(_FIRST_RECORD_S)
            sock.sendall(first)
            wire.give_up(self._move.close_reason)
            shut(sock, socket.SHUT_WR)
            while sock.recv(_WASTE_BYTES):
                pass  # closing with bytes unread would reset the connection under our last record
        finally:
            wire.release()
            sock.close()

    def _check_epoch(self, preface: Preface) -> None:
        if preface.epoch <= self._epochs.get(preface.channel, 0):
            raise EpochStale(f"channel {preface.channel} was confirmed before with this or a later epoch")

    def _confirm(self, preface: Preface, accept: Accept) -> None:
        """The connection is the peer's: it takes the channel over, whatever carried it before."""
        channel = preface.channel
        carrier = self._move.carrier(channel)
        with self._confirm_lock:
            self._check_epoch(preface)
            self._epochs[channel] = preface.epoch
            carrier.retire(replaced(channel))
            wire, first = accept(carrier)
            wire.sock.settimeout(_FIRST_RECORD_S)
            wire.sock.sendall(first)
            wire.sock.settimeout(None)
            carrier.attach(wire, preface.epoch)
            first_of_all = channel not in self._begun
            self._begun.add(channel)
        if first_of_all:
            self._begin(channel)

    def _begin(self, channel: int) -> None:
        if channel == 0:
            self._move.start_control()
            return
        with self._dial_lock:
            self._waiting.add(channel)
            while self._next_channel in self._waiting:
                self._open_local(self._next_channel)
                self._next_channel += 1

    def _open_local(self, channel: int) -> None:
        try:
            local = dial_target(self._move.spec.directory, self._peer)
        except ChannelError as error:
            self._move.fail(error)
            raise
        self._move.hold_local(local)
        self._move.start_tunnel(channel, local)


def _origin(sock: socket.socket) -> str:
    try:
        return origin(str(sock.getpeername()[0]))
    except OSError:
        return ""  # it is gone already
