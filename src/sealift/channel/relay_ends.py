"""The two ends of a move's channels, sealed or plain: who listens, who dials, in which order.

Source: dials the control channel at once; accepts exactly the planned number of local connections, whose order is the
order of the channels; dials one connection for each. Target: takes connections from the doorman, lets each prove
itself in a thread of its own while at most eight are unproven, and opens its local connections strictly in the order of
the channels, main first, however they arrive (QEMU takes the first connection for the main stream).
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Final, cast

from sealift.channel.local_sockets import ExpectedPeer, SourceListener, dial_target
from sealift.channel.protocol import PREFACE_BYTES, CloseReason, Preface
from sealift.channel.relay_move import Move
from sealift.channel.relay_spec import split_address
from sealift.channel.wire import ControlWire, DataWire, Wire, prepare_tcp, shut
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

Join = Callable[[socket.socket, int, int, float], Wire]
"""(connection, channel, epoch, deadline) -> wire; raises OSError when the target just closes, ChannelError."""

Admit = Callable[[socket.socket, Preface, float], tuple[Wire, bytes]]
"""(connection, preface, deadline) -> wire that counts from now on, and what to send first; raises ChannelError."""


class SourceEnd:
    """The source's side."""

    def __init__(self, move: Move, join: Join) -> None:
        """Binds the local socket; raises LocalPeerRefused if the process to serve does not exist, OSError."""
        self._move = move
        self._join = join
        self._address = split_address(move.spec.target)
        self._epochs: Counter[int] = Counter()
        self._peer = ExpectedPeer(move.spec.qemu_pid)
        self._listener = SourceListener(move.spec.directory, self._peer, move.spec.spec.channels)
        move.listening(self._listener.close)

    def start(self) -> None:
        """Begin to connect and to accept."""
        self._move.spawn("connect", self._connect_control)
        self._move.spawn("accept", self._accept)

    def _connect_control(self) -> None:
        self._move.start_control(cast("ControlWire", self._dial(0)))

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
        self._move.start_tunnel(channel, cast("DataWire", self._dial(channel)), local)

    def _dial(self, channel: int) -> Wire:
        """A confirmed connection; a target that refuses or just closes is tried again for a while."""
        deadline = time.monotonic() + self._move.spec.patience_s
        while True:
            sock = socket.socket(self._family(), socket.SOCK_STREAM)
            self._move.hold_wire(sock)
            answered = False
            try:
                prepare_tcp(sock, data=channel > 0)
                sock.settimeout(max(0.001, deadline - time.monotonic()))
                sock.connect(self._address)
                answered = True
                self._epochs[channel] += 1
                wire = self._join(sock, channel, self._epochs[channel], deadline)
                sock.settimeout(None)
                return wire
            except OSError as error:
                self._move.drop_wire(sock)
                if time.monotonic() + _RETRY_S >= deadline or self._move.over.wait(_RETRY_S):
                    raise self._refused(answered, error) from None

    def _family(self) -> socket.AddressFamily:
        return socket.AF_INET6 if ":" in self._address[0] else socket.AF_INET

    def _refused(self, answered: bool, error: OSError) -> ChannelError:
        where = self._move.spec.target
        if answered:
            return HandshakeFailed(
                f"the doorman or relay at {where} took the connection and closed it again: {error}",
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
        self._unconfirmed: OrderedDict[int, socket.socket] = OrderedDict()
        self._epochs: dict[int, int] = {}
        self._dial_lock = threading.Lock()
        self._next_channel = 1
        self._waiting: dict[int, DataWire] = {}
        move.listening(self._close)

    def start(self) -> None:
        """Begin to take connections from the doorman."""
        self._move.spawn("door", self._watch_door)

    def _close(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._move.spec.door)
        shut(self._door)
        with self._lock:
            for sock in self._unconfirmed.values():
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
            self._unconfirmed[id(sock)] = sock
            if len(self._unconfirmed) > MAX_UNCONFIRMED:
                _, oldest = self._unconfirmed.popitem(last=False)
                shut(oldest)  # its thread then finds the connection ended, and reports it
        self._move.spawn(f"admit-{preface.channel}", lambda: self._prove(preface, sock))

    def _prove(self, preface: Preface, sock: socket.socket) -> None:
        try:
            sock.setblocking(True)
            prepare_tcp(sock, data=preface.channel > 0)
            wire, first = self._admit(sock, preface, time.monotonic() + self._move.spec.patience_s)
            self._confirm(preface)
        except (ChannelError, OSError) as error:
            sock.close()
            refusal = error if isinstance(error, ChannelError) else HandshakeFailed(f"a connection broke: {error}")
            self._move.events.refuse(refusal)
            return
        finally:
            with self._lock:
                self._unconfirmed.pop(id(sock), None)
        self._move.hold_wire(sock)
        self._take(preface, wire, first)

    def _check_epoch(self, preface: Preface) -> None:
        if preface.epoch <= self._epochs.get(preface.channel, 0):
            raise EpochStale(f"channel {preface.channel} was confirmed before with this or a later epoch")

    def _confirm(self, preface: Preface) -> None:
        with self._lock:
            self._check_epoch(preface)
            again = preface.channel in self._epochs
            self._epochs[preface.channel] = preface.epoch
        if again:
            # Only the peer itself can come this far. Its old stream is lost, and this version cannot resume it.
            error = StreamTruncated(f"the other host's relay connected channel {preface.channel} anew")
            self._move.fail(error)
            raise error

    def _take(self, preface: Preface, wire: Wire, first: bytes) -> None:
        try:
            wire.sock.sendall(first)
        except OSError:
            raise StreamTruncated(f"the connection of channel {preface.channel} broke as soon as it stood") from None
        if preface.channel == 0:
            self._move.start_control(cast("ControlWire", wire))
            return
        with self._dial_lock:
            self._waiting[preface.channel] = cast("DataWire", wire)
            while (following := self._waiting.pop(self._next_channel, None)) is not None:
                self._open_local(self._next_channel, following)
                self._next_channel += 1

    def _open_local(self, channel: int, wire: DataWire) -> None:
        try:
            local = dial_target(self._move.spec.directory, self._peer)
        except ChannelError as error:
            self._move.fail(error)
            wire.give_up(CloseReason.LOCAL_BROKEN)
            raise
        self._move.hold_local(local)
        self._move.start_tunnel(channel, wire, local)
