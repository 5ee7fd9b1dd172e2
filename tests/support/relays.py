"""Real doormen, relays and splices over loopback, and a stand-in for the QEMUs they serve: this process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import select
import shutil
import signal
import socket
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from sealift.channel.doorman import door_path
from sealift.channel.local_sockets import SOURCE_SOCKET, TARGET_SOCKET
from sealift.channel.noise import Initiator
from sealift.channel.protocol import (
    CHANNEL_VERSION,
    MAX_REKEY_BYTES,
    MAX_REKEY_RECORDS,
    MESSAGE_BYTES,
    ChannelSpec,
    Plan,
)
from sealift.channel.relay_client import start_doorman, start_relay
from sealift.channel.relay_spec import RelaySpec
from sealift.channel.session import bind, halves
from sealift.secret import Secret

PATIENCE = 20.0
"""Seconds after which a test gives up waiting for an event; nothing is ever slept for."""


def channel_spec(channels: int = 1, plan: Plan = Plan.SEALED, **changes: Any) -> ChannelSpec:
    fields: dict[str, Any] = {name: uuid.uuid4().bytes for name in ("attempt", "subject", "source", "target")}
    fields |= {"plan": plan, "version": CHANNEL_VERSION, "channels": channels, "window": 64 << 20}
    fields |= {"rekey_records": MAX_REKEY_RECORDS, "rekey_bytes": MAX_REKEY_BYTES}
    return ChannelSpec(**fields | changes)


class Steering:
    """The control socket of one relay, synchronously."""

    def __init__(self, directory: str) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(PATIENCE)
        self._sock.connect(f"{directory}/relay.sock")
        self._file = self._sock.makefile("rb")

    def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        self._sock.sendall(json.dumps({"op": op, **fields}).encode() + b"\n")
        return json.loads(self._file.readline() or b"{}")

    def close(self) -> None:
        self._file.close()
        self._sock.close()


class Running:
    """A process that a test started."""

    def __init__(self, pid: int, directory: str, log: str) -> None:
        self.pid = pid
        self.directory = directory
        self.log = log
        self.pidfd = os.pidfd_open(pid)
        self._status: int | None = None

    def ended(self, timeout: float = PATIENCE) -> bool:
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(timeout * 1000))

    def raw_status(self) -> int:
        assert self.ended(), "the process did not end"
        if self._status is None:
            self._status = os.waitpid(self.pid, 0)[1]
        return self._status

    def exit_status(self) -> int:
        return os.waitstatus_to_exitcode(self.raw_status())

    def signal(self, number: int) -> None:
        signal.pidfd_send_signal(self.pidfd, number)

    def destroy(self) -> None:
        if self._status is None:
            with contextlib.suppress(ProcessLookupError):
                self.signal(signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.pid, 0)
        os.close(self.pidfd)


class Relay(Running):
    """A relay or splice with its control socket."""

    def __init__(self, pid: int, directory: str, log: str) -> None:
        super().__init__(pid, directory, log)
        self._steering: Steering | None = None

    def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        if self._steering is None:
            self._steering = Steering(self.directory)
        return self._steering.ask(op, **fields)

    def status(self) -> dict[str, Any]:
        return self.ask("status")

    def event(self, kind: str, *, nth: int = 1) -> dict[str, Any]:
        """The nth event of a kind, waited for; a relay that broke instead fails the test with its reason."""
        seen: list[dict[str, Any]] = []
        while True:
            found = [e for e in seen if e["type"] == kind]
            if len(found) >= nth:
                return found[nth - 1]
            answer = self.ask("wait", after=len(seen), timeout=PATIENCE)
            assert answer.get("events"), f"no {kind!r} event came; there were {seen}"
            seen += answer["events"]

    def until(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The status, as soon as it is as wanted: not every change is an event."""
        ends = time.monotonic() + PATIENCE
        while not wanted(status := self.status()):
            assert time.monotonic() < ends, f"the status stayed as it was: {status}"
            self.ask("wait", after=1 << 30, timeout=0.05)
        return status

    def refusal(self, slug: str) -> dict[str, Any]:
        """The first refusal for this reason, waited for; a busy machine may have others before it."""
        nth = 1
        while (event := self.event("refused", nth=nth))["slug"] != slug:
            nth += 1
        return event

    def events(self) -> list[dict[str, Any]]:
        return self.ask("wait", after=0, timeout=0)["events"]

    def close(self) -> int:
        """Tell it to close; returns its exit status."""
        assert self.ask("close").get("closed")
        return self.exit_status()

    def destroy(self) -> None:
        if self._steering is not None:
            self._steering.close()
        super().destroy()


AnyRunning = TypeVar("AnyRunning", bound=Running)


class Site:
    """A doorman and any number of moves on this machine. Everything is gone after the ``with`` block."""

    def __init__(self) -> None:
        self.root = tempfile.mkdtemp(prefix="slt-")
        self.doors = f"{self.root}/doors"
        os.mkdir(self.doors, 0o700)
        self._running: list[Running] = []
        self._count = 0
        self.doorman, self.port = self.start_doorman()

    def __enter__(self) -> Site:
        return self

    def __exit__(self, *exc: object) -> None:
        for running in self._running:
            running.destroy()
        shutil.rmtree(self.root, ignore_errors=True)

    def start_doorman(self, lock: str = "lock") -> tuple[Running, int]:
        log = f"{self.root}/doorman.log"
        pid, port = asyncio.run(start_doorman("127.0.0.1:0", self.doors, f"{self.root}/{lock}", log))
        return self.adopt(Running(pid, self.root, log)), port

    def adopt(self, running: AnyRunning) -> AnyRunning:
        self._running.append(running)
        return running

    def directory(self) -> str:
        self._count += 1
        path = f"{self.root}/{self._count}"
        os.mkdir(path, 0o700)
        return path

    def start(self, spec: RelaySpec, secret: bytes) -> Relay:
        kind = "relay" if spec.spec.plan is Plan.SEALED else "splice"
        log = f"{spec.directory}.log"
        pid = asyncio.run(start_relay(kind, spec, secret, log))
        return self.adopt(Relay(pid, spec.directory, log))

    def pair(
        self,
        spec: ChannelSpec | None = None,
        *,
        port: int = 0,
        secret: bytes = b"",
        at_source: dict[str, Any] | None = None,
        at_target: dict[str, Any] | None = None,
        **fields: Any,
    ) -> Pair:
        """Target and source of one move, target first; ``port`` is a man in the middle instead of the doorman."""
        spec = spec or channel_spec()
        secret = secret or secrets.token_bytes(40 if spec.plan is Plan.SEALED else 16)
        target = TargetSide(self, spec, secret, **fields | (at_target or {}))
        source = self.start_source(spec, secret, port=port, **fields | (at_source or {}))
        return Pair(spec, secret, source, target)

    def pair_in_time(self, spec: ChannelSpec, **fields: Any) -> Pair:
        """A pair that found together, though its source has too little patience for a machine that stands still."""
        for _ in range(10):
            pair = self.pair(spec, **fields)
            (first, *_) = pair.source.ask("wait", after=0, timeout=PATIENCE)["events"]
            if first["type"] == "connected":
                return pair
            pair.target_side.close()
            spec = replace(spec, attempt=uuid.uuid4().bytes)
        raise AssertionError(f"this machine never did it in time: {first}")

    def start_source(self, spec: ChannelSpec, secret: bytes, *, port: int = 0, **fields: Any) -> Relay:
        fields.setdefault("qemu_pid", os.getpid())
        address = f"127.0.0.1:{port or self.port}"
        return self.start(RelaySpec("source", spec, self.directory(), target=address, **fields), secret)


class TargetSide:
    """A target's relay, and the listening socket of the QEMU it serves."""

    def __init__(self, site: Site, spec: ChannelSpec, secret: bytes, *, listens: bool = True, **fields: Any) -> None:
        fields.setdefault("qemu_pid", os.getpid())
        directory = site.directory()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.settimeout(PATIENCE)
        if listens:
            self._listener.bind(f"{directory}/{TARGET_SOCKET}")
            self._listener.listen(64)
        self.door = door_path(site.doors, spec.attempt if spec.plan is Plan.SEALED else secret)
        fields.setdefault("source_address", "127.0.0.1")
        self.relay = site.start(RelaySpec("target", spec, directory, door=self.door, **fields), secret)

    def accept(self) -> socket.socket:
        """The next local connection of the relay."""
        sock, _ = self._listener.accept()
        sock.settimeout(PATIENCE)
        return sock

    def nothing_came(self) -> bool:
        """Whether the relay has opened no (further) local connection."""
        return not select.select([self._listener], [], [], 0)[0]

    def close(self) -> None:
        self._listener.close()


class Pair:
    """Both sides of one move; use it in a ``with`` block."""

    def __init__(self, spec: ChannelSpec, secret: bytes, source: Relay, target: TargetSide) -> None:
        self.spec = spec
        self.secret = secret
        self.source = source
        self.target_side = target
        self.target = target.relay
        self._open: list[socket.socket] = []

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *exc: object) -> None:
        for sock in self._open:
            sock.close()
        self.target_side.close()

    def dial(self) -> socket.socket:
        """A local connection at the source."""
        sock = dial_local(self.source.directory)
        self._open.append(sock)
        return sock

    def accept(self) -> socket.socket:
        """The next local connection at the target."""
        sock = self.target_side.accept()
        self._open.append(sock)
        return sock

    def connect(self) -> tuple[socket.socket, socket.socket]:
        """One channel, both local ends."""
        return self.dial(), self.accept()


class ByHand:
    """A source that is driven by hand, with all the keys: preface and handshake in separate steps."""

    def __init__(self, port: int, spec: ChannelSpec, secret: bytes, channel: int, epoch: int = 1) -> None:
        key, nonce = Secret(secret[:32], length=32), Secret(secret[32:], length=8)
        self._preface = spec.preface(channel, epoch)
        self._initiator = Initiator(key, bind(spec, self._preface, nonce), os.urandom(32))
        self._spec, self._nonce = spec, nonce
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
        self.sent = b""

    def hello(self) -> None:
        self.sent = self._preface.encode() + self._initiator.message1()
        self.sock.sendall(self.sent)

    def answered(self) -> None:
        """Take message 2."""
        keys = self._initiator.message2(exactly(self.sock, MESSAGE_BYTES))
        self.sending, self.receiving = halves(
            keys, self._nonce, self._spec.limits, initiator=True, control=False, buffer_bytes=4096
        )

    def prove(self, resume: tuple[int, int] | None = None) -> None:
        if not hasattr(self, "sending"):
            self.answered()
        self.sock.sendall(self.sending.resume(*resume) if resume else self.sending.open())
        while self.receiving.next_event() is None:
            got = self.sock.recv_into(self.receiving.space())
            assert got, "the target closed the connection"
            self.receiving.received(got)
        self.sending.peer_opened()

    def write(self, data: bytes) -> None:
        out = memoryview(bytearray(len(data) + 20))
        self.sock.sendall(out[: self.sending.data_into(data, out)])

    def refused(self) -> bool:
        """Whether the target closes the connection without another word."""
        with contextlib.suppress(ConnectionError):
            return self.sock.recv(1) == b""
        return True


def dial_local(directory: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(PATIENCE)
    sock.connect(f"{directory}/{SOURCE_SOCKET}")
    return sock


def exactly(sock: socket.socket, count: int) -> bytes:
    """So many bytes, or fewer if the stream ends."""
    data = b""
    while len(data) < count and (piece := sock.recv(count - len(data))):
        data += piece
    return data


def read_all(sock: socket.socket) -> bytes:
    """Everything until the other side ends, or breaks off."""
    data = bytearray()
    with contextlib.suppress(ConnectionError):
        while piece := sock.recv(1 << 20):
            data += piece
    return bytes(data)


def proc(pid: int, name: str) -> bytes:
    return Path(f"/proc/{pid}/{name}").read_bytes()
