"""What a relay or splice process knows of its one move: channels, sockets, how it stands, and how it ends.

A sealed channel that loses its connection is interrupted, not broken: it has until the give-up time of the move's phase
to get another. A plain one cannot be resumed, so there every interruption is the end.

However a move ends badly, the order is the same: the local sockets first, so that no QEMU is left half-dead behind a
socket that neither moves nor closes; then the channels, with the reason; then the event. Nothing here knows whether the
channels are sealed.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any, Final

from sealift.channel.carrier import Carrier
from sealift.channel.control_frames import Message
from sealift.channel.control_link import ControlLink, Outbox
from sealift.channel.last_word import close_reason
from sealift.channel.ledger import Ledger
from sealift.channel.outages import Outages
from sealift.channel.protocol import CloseReason
from sealift.channel.relay_control import EventList
from sealift.channel.relay_spec import PHASES, RelaySpec
from sealift.channel.tunnel import LAST_WORDS_S, Tunnel
from sealift.channel.wire import CONTROL_RECORD_BYTES, CONTROL_WINDOW, RETURN_PATH_BYTES, Counters, shut
from sealift.errors import ChannelAborted, ChannelError, InvalidInput, LocalClosed, PeerClosed, PeerSilent, SealiftError

_LAST_RECORDS_S: Final = 0.5
"""How long senders that may be stuck behind a full socket have to say goodbye."""
_FLUSH_S: Final = 2.0
"""How long an orderly close waits for the peer to have taken the last message."""


class Move:
    """One move. Everything may be called from any thread."""

    def __init__(self, spec: RelaySpec, events: EventList, *, cipher: str | None, wipe: Callable[[], None]) -> None:
        """``wipe`` drops the move's secrets; ``cipher`` is None for a plain move."""
        self.spec = spec
        self.events = events
        self.outbox = Outbox()
        self.over = threading.Event()
        self.connected = threading.Event()
        self._cipher = cipher
        self._wipe = wipe
        self._lock = threading.Lock()
        self._error: SealiftError | None = None
        self._listening = False
        self._drained = False
        self._link: ControlLink | None = None
        self._tunnels: dict[int, Tunnel] = {}
        self._carriers: dict[int, Carrier[Any]] = {}
        self._outages = Outages(spec.give_up_s, spec.switchover_timeout_s, time.monotonic())
        self._outages_changed = threading.Condition(self._lock)
        self._reconnect: Callable[[int, bool], None] | None = None
        self._drained_channels: set[int] = set()
        self._locals: list[socket.socket] = []
        self._wires: list[socket.socket] = []
        self._peer_knows = threading.Event()
        self._close_to_locals: Callable[[], None] | None = None
        self._close_to_peer: Callable[[], None] | None = None
        self._buried = threading.Event()
        self._marks: dict[str, float] = {}

    # Taking part

    def mark(self, step: str) -> None:
        """Note when a step of setting up was first reached, on this host's clock."""
        self._marks.setdefault(step, time.time())

    def spawn(self, name: str, run: Callable[[], None]) -> None:
        """Run something in a thread of its own; a defect in it fails the move instead of passing unseen."""

        def guarded() -> None:
            try:
                run()
            except SealiftError as error:
                self.fail(error)
            except Exception as error:
                traceback.print_exc(file=sys.stderr)
                self.fail(SealiftError(f"a defect in the relay's {name} thread: {type(error).__name__}"))

        threading.Thread(target=guarded, name=name, daemon=True).start()

    def listening(
        self, *, to_locals: Callable[[], None] | None = None, to_peer: Callable[[], None] | None = None
    ) -> None:
        """Everything is bound. What listens to the local process is closed as soon as the move is over; what listens to
        the other host only when that host had time to hear why."""
        with self._lock:
            self._close_to_locals, self._close_to_peer = to_locals, to_peer
            self._listening = True

    def hold_local(self, sock: socket.socket) -> None:
        """Close this local socket when the move fails, and at once if it has; raises LocalClosed then."""
        self.mark("local")
        self._hold(self._locals, sock)

    def hold_wire(self, sock: socket.socket) -> None:
        """The same for a connection to the other host."""
        self._hold(self._wires, sock)

    def drop_wire(self, sock: socket.socket) -> None:
        """A connection that came to nothing."""
        with self._lock, contextlib.suppress(ValueError):
            self._wires.remove(sock)
        sock.close()

    def carrier(self, channel: int) -> Carrier[Any]:
        """What carries a channel; made when it is first asked for, without a connection yet."""
        with self._lock:
            if channel not in self._carriers:
                if channel == 0:
                    ledger = Ledger(CONTROL_WINDOW, CONTROL_RECORD_BYTES)
                else:
                    outward = self.spec.record_bytes if self.spec.role == "source" else RETURN_PATH_BYTES
                    ledger = Ledger(self.spec.spec.window // self.spec.spec.channels, outward)
                self._carriers[channel] = Carrier(channel, ledger, self)
            return self._carriers[channel]

    def data_carriers(self) -> list[Carrier[Any]]:
        """Those of the data channels there are by now."""
        with self._lock:
            return [carrier for channel, carrier in self._carriers.items() if channel]

    def start_control(self) -> None:
        """The control channel is confirmed on both sides."""
        link = ControlLink(self.carrier(0), self.outbox, self, self.events, self.spec.silence_s)
        with self._lock:
            self._link = link
        self.mark("connected")
        self.events.add("connected")
        link.start()
        self.connected.set()

    def start_tunnel(self, channel: int, local: socket.socket) -> None:
        """A data channel is confirmed and has its local socket."""
        reconnects = self.resumes and self.spec.role == "source"
        tunnel = Tunnel(self.carrier(channel), local, self, resumes=self.resumes, reconnects=reconnects)
        with self._lock:
            self._tunnels[channel] = tunnel
        tunnel.start()

    def reconnect_with(self, reconnect: Callable[[int, bool], None]) -> None:
        """What to do when a channel has lost its connection: given its number, and whether the outage is a new one."""
        self._reconnect = reconnect

    # Interruptions

    @property
    def resumes(self) -> bool:
        """Whether a channel may lose its connection and get another: a plain one may not."""
        return self._cipher is not None

    @property
    def round_trip(self) -> float:
        """To the other host and back, in seconds; 0 while it is not known."""
        link = self._link
        return (link.clock.round_trip_us or 0) / 1e6 if link else 0.0

    def interrupted(self, channel: int, error: ChannelError) -> None:
        """A channel has lost its connection; the source makes another, the target waits for it."""
        if self.over.is_set():
            return
        if not self.resumes:
            self.fail(error)
            return
        self.events.interrupt(channel, error)
        self.outage(channel, error)

    def outage(self, channel: int, error: ChannelError) -> None:
        """A channel has no connection from now on, and perhaps had none before."""
        ledger = self.carrier(channel).ledger
        with self._outages_changed:
            mark = ledger.out.acked + ledger.into.expected
            new = self._outages.begin(channel, mark, error, time.monotonic())
            self._outages_changed.notify_all()
        if self._reconnect is not None:
            self._reconnect(channel, new)

    def carried(self, channel: int, epoch: int, *, again: bool) -> None:
        """A channel has a connection, for the first time or ``again``."""
        with self._outages_changed:
            lasted = self._outages.end(channel, time.monotonic())
            self._outages_changed.notify_all()
        if again:
            self.events.resume(channel, epoch, round(lasted * 1000))
        if channel == 0 and lasted >= self.spec.silence_s:
            # Nobody judged the data channels meanwhile: a black hole may have taken connections made since.
            self.silent(PeerSilent("the control channel was cut off for long"), but=0)

    def silent(self, error: PeerSilent, *, but: int | None = None) -> None:
        """The other host is not heard: every connection to it counts as broken, or all ``but`` one channel's."""
        with self._lock:
            carriers = [carrier for channel, carrier in self._carriers.items() if channel != but]
        for carrier in carriers:
            carrier.retire(error)

    def enter(self, phase: str) -> None:
        """The move has come further; raises InvalidInput for what is no phase."""
        for known in PHASES:
            if phase == known:
                with self._outages_changed:
                    self._outages.enter(known, time.monotonic())
                    self._outages_changed.notify_all()
                return
        raise InvalidInput("the relay does not know this phase")

    def watch_outages(self) -> None:
        """Give up when a channel was broken for too long; runs in a thread of its own until the move is over."""
        with self._outages_changed:
            while self._error is None:
                deadline = self._outages.deadline()
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    break
                self._outages_changed.wait(left)
            cause = self._outages.cause()
        if cause is not None:
            self.fail(type(cause)(f"{cause.what}; it could not be resumed in time", todo=cause.todo))

    def channel_drained(self, channel: int) -> None:
        """Both directions of a data channel have ended in order."""
        with self._lock:
            self._outages.forget(channel)
            self._drained_channels.add(channel)
            if len(self._drained_channels) < self.spec.spec.channels or self._error is not None:
                return
            self._drained = True
        self.events.add("drained")

    # Ending

    @property
    def close_reason(self) -> CloseReason:
        """What the peer is told of the move's end."""
        return close_reason(self._error)

    def fail(self, error: SealiftError) -> None:
        """End the move badly; only the first error counts. Returns when the local sockets are closed."""
        if isinstance(error, PeerClosed):
            self._peer_knows.set()
        if self._begin_end(error):
            threading.Thread(target=self._bury, name="undertaker", daemon=True).start()

    def abort(self, reason: str) -> None:
        """End the move by order; the process stays to report."""
        self.fail(ChannelAborted(f"the move's channels were closed by order: {reason or 'no reason was given'}"))

    def close(self) -> None:
        """End everything, in order if every data channel has drained; returns when it is done."""
        with self._lock:
            orderly = self._error is None and (self._drained or not self._tunnels)
        if orderly:
            self._flush_control()
        self.abort("the relay was told to close")
        self._buried.wait(_LAST_RECORDS_S + LAST_WORDS_S + 1.0)

    def send(self, message: Message) -> None:
        """Queue a message for the other host's agent; raises InvalidInput or Conflict."""
        self.outbox.put(message)

    def status(self) -> dict[str, Any]:
        """The answer to the control socket's ``status``.

        ``acked_out`` counts the plaintext bytes of the data channels that the peer's local sockets have taken (of a
        plain move: that TCP has). ``outage`` is None unless a channel has no connection now (``Outages.report``).
        ``marks`` holds seconds since the epoch: ``connected``, ``local`` (the first local socket), ``first_byte``.
        """
        with self._lock:
            link, tunnels, error = self._link, list(self._tunnels.values()), self._error
            carriers, phase = list(self._carriers.values()), self._outages.phase
            outage = self._outages.report(time.monotonic())
        total = Counters()
        for carrier in carriers:
            total.add(carrier.counters())
        sealed, plain = (total, Counters()) if self._cipher else (Counters(), total)
        return {
            "state": self._state(),
            "sealed_out": sealed.bytes_out,
            "sealed_in": sealed.bytes_in,
            "plain_out": plain.bytes_out,
            "plain_in": plain.bytes_in,
            "records_out": sealed.records_out,
            "records_in": sealed.records_in,
            "rekeys_out": sealed.rekeys_out,
            "rekeys_in": sealed.rekeys_in,
            "clock_offset_us": link.clock.offset_us if link else None,
            "rtt_us": link.clock.round_trip_us if link else None,
            "refused": self.events.refused,
            "interrupted": self.events.interrupted,
            "acked_out": sum(min(c.ledger.out.acked, c.ledger.out.filled) for c in carriers if c.channel),
            "reconnects": self.events.resumed,
            "outage": outage,
            "marks": dict(self._marks),
            "phase": phase,
            "cipher": self._cipher,
            "channels": len(tunnels),
            "broken": {"slug": error.slug, "what": error.what} if error else None,
        }

    def _state(self) -> str:
        with self._lock:
            if self._error is not None:
                return "broken"
            if self._drained:
                return "drained"
            if self._tunnels:
                return "flowing"
            if self._link is not None:
                return "connected"
            return "listening" if self._listening else "starting"

    def _hold(self, held: list[socket.socket], sock: socket.socket) -> None:
        with self._lock:
            if self._error is None:
                held[:] = [s for s in held if s.fileno() >= 0]
                held.append(sock)
                return
        sock.close()
        raise LocalClosed("the move is over")

    def _begin_end(self, error: SealiftError) -> bool:
        with self._lock:
            if self._error is not None:
                return False
            self._error = error
            held, carriers = list(self._locals), list(self._carriers.values())
            self._outages_changed.notify_all()
        self.over.set()
        for sock in held:
            shut(sock)
        for carrier in carriers:
            carrier.stir()
        return True

    def _bury(self) -> None:
        error = self._error
        assert error is not None
        with self._lock:
            connected = 0 in self._carriers and self._carriers[0].connections > 0
        if connected:
            self.connected.wait(_LAST_RECORDS_S)  # its threads, which say goodbye, may be just about to start
        with self._lock:
            to_locals, to_peer = self._close_to_locals, self._close_to_peer
            link, tunnels, wires = self._link, list(self._tunnels.values()), list(self._wires)
            drained = self._drained
        if to_locals is not None:
            to_locals()
        self.outbox.finish(self.close_reason)
        _wait_all(
            [t.outward_done for t in tunnels] + ([link.outward_done] if link else []),
            time.monotonic() + _LAST_RECORDS_S,
        )
        for sock in wires:
            shut(sock, socket.SHUT_WR)
        self.events.add("broken", slug=error.slug, what=error.what)
        last_words = time.monotonic() + LAST_WORDS_S
        _wait_all([t.inward_done for t in tunnels] + ([link.inward_done] if link else []), last_words)
        if to_peer is not None:
            if link is not None and not drained:
                _wait_all([self._peer_knows], last_words)
            to_peer()
        for sock in wires:
            shut(sock)
        with self._lock:
            carriers = list(self._carriers.values())
        for carrier in carriers:
            carrier.ledger.out.wipe()
        self._wipe()
        self._buried.set()

    def _flush_control(self) -> None:
        """Say END after everything queued, and give the peer time to take it: closing at once could reset it away."""
        self.outbox.finish(None)
        if self._link is not None:
            deadline = time.monotonic() + _FLUSH_S
            self._link.outward_done.wait(_FLUSH_S)
            self._link.inward_done.wait(max(0.0, deadline - time.monotonic()))


def _wait_all(events: Iterable[threading.Event], deadline: float) -> None:
    for event in events:
        event.wait(max(0.0, deadline - time.monotonic()))
