"""How the agent steers a relay: a UNIX stream socket with JSON lines, and the numbered list of what happened.

One request is one line, one answer is one line, in turn; any number of connections may come and go, and an agent that
was restarted finds the relay here again. Requests (``op``): ``status``; ``send`` with ``message``; ``wait`` with
``after`` and ``timeout`` (seconds), answered as soon as there are events with a higher ``seq``; ``abort`` with
``reason``; ``phase`` with ``phase`` (``running``, ``switchover``, ``committed``), which says how long a broken link may
last; ``close``, answered when everything is shut, after which the process ends. Every answer has
``"relay": 1``, the version of this protocol; a refused request has ``error`` (a slug) and ``what``.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from sealift.channel.control_frames import Message
from sealift.errors import InvalidInput, SealiftError

RELAY_PROTOCOL: Final = 1
SOCKET_NAME: Final = "relay.sock"
_MAX_LINE: Final = 64 << 10
_BACKLOG: Final = 128
"""Room for every question that an agent gave up while this process stood still: who kills it must find it here."""
_MAX_REFUSALS: Final = 64
_MAX_INTERRUPTIONS: Final = 1024
_LONGEST_WAIT_S: Final = 3600.0

Event = dict[str, Any]


class EventList:
    """Everything worth telling the agent, numbered from 1, kept until the process ends. For any thread."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._lock = threading.Lock()
        self._refused: Counter[str] = Counter()
        self._interrupted: Counter[str] = Counter()
        self._resumed = 0
        self._woken, self._wake = socket.socketpair()
        self._woken.setblocking(False)
        self._wake.setblocking(False)

    @property
    def waker(self) -> socket.socket:
        """Becomes readable when an event was added."""
        return self._woken

    @property
    def wake_fd(self) -> int:
        """Write a byte here to make ``waker`` readable (for signal handlers)."""
        return self._wake.fileno()

    def add(self, kind: str, **fields: object) -> None:
        """Append an event."""
        with self._lock:
            self._events.append({"seq": len(self._events) + 1, "type": kind, **fields})
        with contextlib.suppress(BlockingIOError):
            self._wake.send(b"\0")

    def refuse(self, error: SealiftError) -> None:
        """Count a connection that was turned away; the first few are events too, a flood is only counted."""
        with self._lock:
            self._refused[error.slug] += 1
            worth_telling = self._refused.total() <= _MAX_REFUSALS
        if worth_telling:
            self.add("refused", slug=error.slug, what=error.what)

    def interrupt(self, channel: int, error: SealiftError) -> None:
        """Count a channel's lost connection by its cause; what an attacker can repeat for ever is only counted."""
        with self._lock:
            self._interrupted[error.slug] += 1
            worth_telling = self._interrupted.total() <= _MAX_INTERRUPTIONS
        if worth_telling:
            self.add("interrupted", channel=channel, slug=error.slug, what=error.what)

    def resume(self, channel: int, epoch: int, outage_ms: int) -> None:
        """A channel goes on, on a new connection."""
        with self._lock:
            self._resumed += 1
            worth_telling = self._resumed <= _MAX_INTERRUPTIONS
        if worth_telling:
            self.add("resumed", channel=channel, epoch=epoch, outage_ms=outage_ms)

    @property
    def interrupted(self) -> dict[str, int]:
        """How often a connection was lost, by slug."""
        with self._lock:
            return dict(self._interrupted)

    @property
    def resumed(self) -> int:
        """How often a channel has gone on, on a new connection."""
        with self._lock:
            return self._resumed

    def after(self, seq: int) -> list[Event]:
        """The events with higher numbers than ``seq``."""
        with self._lock:
            return self._events[max(0, seq) :]

    @property
    def refused(self) -> dict[str, int]:
        """How many connections were turned away, by slug."""
        with self._lock:
            return dict(self._refused)


class Steered(Protocol):
    """What the control socket steers."""

    def status(self) -> dict[str, Any]: ...
    def send(self, message: Message) -> None: ...
    def abort(self, reason: str) -> None: ...
    def enter(self, phase: str) -> None: ...
    def close(self) -> None: ...


@dataclass
class _Client:
    sock: socket.socket
    unread: bytearray = field(default_factory=bytearray)
    waits_after: int | None = None
    deadline: float = 0.0


class ControlServer:
    """Serves the control socket in the main thread until ``close`` was asked for or SIGTERM came."""

    def __init__(self, directory: str, events: EventList, steered: Steered) -> None:
        """Bind the socket; from here on the relay can be found."""
        self._path = os.path.join(directory, SOCKET_NAME)
        self._events = events
        self._steered = steered
        self._clients: dict[int, _Client] = {}
        self._stopping = False
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._listener.bind(self._path)
        os.chmod(self._path, 0o600)
        self._listener.listen(_BACKLOG)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(events.waker, selectors.EVENT_READ)

    def obey_signals(self) -> None:
        """Let SIGTERM and SIGINT mean ``close``; main thread only."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        signal.set_wakeup_fd(self._events.wake_fd, warn_on_full_buffer=False)

    def serve(self) -> None:
        """Answer until told to stop; then everything is shut and the socket is gone."""
        try:
            while not self._stopping:
                for key, _ in self._selector.select(self._until_next_deadline()):
                    self._handle(key.fileobj)
                self._answer_waits()
        finally:
            self._shut()

    def _on_signal(self, number: int, frame: object) -> None:
        self._stopping = True

    def _shut(self) -> None:
        if self._listener.fileno() < 0:
            return
        self._steered.close()
        self._listener.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)

    def _until_next_deadline(self) -> float | None:
        deadlines = [c.deadline for c in self._clients.values() if c.waits_after is not None]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _handle(self, ready: object) -> None:
        if ready is self._listener:
            with contextlib.suppress(OSError):
                sock, _ = self._listener.accept()
                sock.settimeout(5.0)  # answers are short; an agent that does not read them is dropped
                self._clients[sock.fileno()] = _Client(sock)
                self._selector.register(sock, selectors.EVENT_READ)
        elif ready is self._events.waker:
            with contextlib.suppress(BlockingIOError):
                while self._events.waker.recv(4096):
                    pass
        elif isinstance(ready, socket.socket) and (client := self._clients.get(ready.fileno())):
            self._read(client)

    def _read(self, client: _Client) -> None:
        try:
            data = client.sock.recv(_MAX_LINE)
        except OSError:
            data = b""
        client.unread += data
        if not data or len(client.unread) > _MAX_LINE:
            self._drop(client)
        else:
            self._take_requests(client)

    def _take_requests(self, client: _Client) -> None:
        while client.waits_after is None and (end := client.unread.find(b"\n")) >= 0 and not self._stopping:
            line = bytes(client.unread[:end])
            del client.unread[: end + 1]
            self._carry_out(client, line)

    def _drop(self, client: _Client) -> None:
        if client.sock.fileno() >= 0:
            self._clients.pop(client.sock.fileno(), None)
            self._selector.unregister(client.sock)
            client.sock.close()

    def _carry_out(self, client: _Client, line: bytes) -> None:
        try:
            answer = self._obey(client, line)
        except SealiftError as error:
            answer = {"error": error.slug, "what": error.what}
        if answer is not None:
            self._answer(client, answer)

    def _obey(self, client: _Client, line: bytes) -> dict[str, Any] | None:
        request = _request(line)
        match request.get("op"):
            case "status":
                return self._steered.status()
            case "send":
                message = request.get("message")
                if not isinstance(message, dict):
                    raise InvalidInput("there is no message to send")
                self._steered.send(message)
                return {"sent": True}
            case "wait":
                after, timeout = request.get("after", 0), request.get("timeout", 0)
                if not isinstance(after, int) or not isinstance(timeout, int | float):
                    raise InvalidInput("a wait needs numbers for after and timeout")
                client.waits_after = after
                client.deadline = time.monotonic() + min(max(0.0, timeout), _LONGEST_WAIT_S)
                return None
            case "abort":
                self._steered.abort(str(request.get("reason", "")))
                return {"aborted": True}
            case "phase":
                self._steered.enter(str(request.get("phase", "")))
                return {"entered": True}
            case "close":
                self._stopping = True
                self._shut()
                return {"closed": True}
            case _:
                raise InvalidInput("the relay does not know this request")

    def _answer_waits(self) -> None:
        now = time.monotonic()
        for client in list(self._clients.values()):
            if client.waits_after is None:
                continue
            events = self._events.after(client.waits_after)
            if events or client.deadline <= now:
                client.waits_after = None
                self._answer(client, {"events": events, "state": self._steered.status()["state"]})
                self._take_requests(client)

    def _answer(self, client: _Client, answer: dict[str, Any]) -> None:
        try:
            client.sock.sendall(json.dumps({"relay": RELAY_PROTOCOL, **answer}).encode() + b"\n")
        except OSError:
            self._drop(client)


def _request(line: bytes) -> dict[str, Any]:
    try:
        request = json.loads(line)
    except (ValueError, RecursionError):
        request = None
    if not isinstance(request, dict):
        raise InvalidInput("a request to a relay is a JSON object")
    return request
