"""The agent's half: start a relay, splice or doorman so that it outlives the agent, and talk to a relay."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import struct
import sys
from typing import Any, Final, Literal

from sealift.channel.control_frames import Message
from sealift.channel.relay_control import RELAY_PROTOCOL, SOCKET_NAME, Event
from sealift.channel.relay_spec import Phase, RelaySpec, encode_handover
from sealift.errors import RelayGone, from_slug

_START_S: Final = 10.0
_REQUEST_S: Final = 3.0
"""Limit of a request that a guest may stand still for: what a relay does not pass on, a controller carries."""
_PATIENCE_S: Final = 10.0
"""Limit of one without whose answer the move is given up: a host that is only busy must not lose it."""
_CLOSE_S: Final = 8.0
_MAX_LINE: Final = 16 << 20
_SPEC_FD: Final = 3


async def start_relay(
    kind: Literal["relay", "splice"], spec: RelaySpec, secret: bytes | bytearray, log_path: str
) -> int:
    """Start the process of one side of one move and hand over its specification; returns its pid.

    When this returns, everything is bound and the control socket answers. ``secret`` is 40 bytes (key, nonce) for a
    relay, 16 (token) for a splice. Raises what the process reports, or RelayGone if it ends without a word or is not
    ready within ten seconds; it is dead then.
    """
    return await PreparedRelay(kind, log_path).begin(spec, secret)


class PreparedRelay:
    """The process of a relay or splice that has no move yet, and ends without one when whoever started it ends.

    Loading its code takes longer than everything else at the start of a move, and can be done before.
    """

    def __init__(self, kind: Literal["relay", "splice"], log_path: str) -> None:
        self._ours, theirs = socket.socketpair()
        self._ours.setblocking(False)
        with theirs:
            self.pid = spawn_detached(f"sealift.entry.{kind}", ["--spec-fd", str(_SPEC_FD)], theirs.fileno(), log_path)
        reap_when_ended(self.pid)

    async def begin(self, spec: RelaySpec, secret: bytes | bytearray) -> int:
        """Hand over its specification, once; see ``start_relay``."""
        with self._ours:
            try:
                async with asyncio.timeout(_START_S):
                    await _hand_over(self._ours, spec, secret)
            except BaseException:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGKILL)
                raise
        return self.pid

    def discard(self) -> None:
        """It is not needed; it ends by itself."""
        self._ours.close()


async def start_doorman(listen: str, doors: str, lock: str, log_path: str) -> tuple[int, int]:
    """Start the host's doorman; returns its pid and port. Raises RelayGone if it does not come up (see its log)."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            arguments = ["--listen", listen, "--doors", doors, "--lock", lock, "--ready-fd", str(_SPEC_FD)]
            pid = spawn_detached("sealift.entry.doorman", arguments, theirs.fileno(), log_path)
        reap_when_ended(pid)
        ours.setblocking(False)
        try:
            async with asyncio.timeout(_START_S):
                line = await _line(ours)
        except TimeoutError:
            line = b""
    if not line.strip().isdigit():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        raise RelayGone(f"the doorman did not come up at {listen}", todo=f"read {log_path}")
    return pid, int(line)


def spawn_detached(module: str, arguments: list[str], fd: int, log_path: str) -> int:
    """Start a module of ours in a session of its own, with ``fd`` as its descriptor 3 and its output appended to a log.

    posix_spawn, because asyncio's and subprocess's objects want to see their processes end; this one may outlive us.
    """
    log_flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    return os.posix_spawn(
        sys.executable,
        [sys.executable, "-I", "-m", module, *arguments],
        os.environ,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, log_path, log_flags, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
            (os.POSIX_SPAWN_DUP2, fd, _SPEC_FD),
        ],
        setsid=True,
        setsigmask=[],
        setsigdef=[signal.SIGPIPE, signal.SIGINT, signal.SIGTERM],
    )


def reap_when_ended(pid: int) -> None:
    """Let the running loop collect a child of ours when it ends, so that it does not stay as a zombie."""
    loop = asyncio.get_running_loop()
    pidfd = os.pidfd_open(pid)

    def reap() -> None:
        loop.remove_reader(pidfd)
        os.close(pidfd)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)

    loop.add_reader(pidfd, reap)


async def _hand_over(ours: socket.socket, spec: RelaySpec, secret: bytes | bytearray) -> None:
    loop = asyncio.get_running_loop()
    try:
        await loop.sock_sendall(ours, encode_handover(spec, secret))
        ours.shutdown(socket.SHUT_WR)
        line = await _line(ours)
    except OSError:
        line = b""
    if not line:
        raise RelayGone("the relay ended before it was ready", todo="read the relay's log")
    answer = json.loads(line)
    if "error" in answer:
        raise from_slug(answer["error"], answer["what"])


async def _line(sock: socket.socket) -> bytes:
    loop = asyncio.get_running_loop()
    line = b""
    while not line.endswith(b"\n"):
        data = await loop.sock_recv(sock, 4096)
        if not data:
            break
        line += data
    return line


class _Line:
    """One connection to a control socket; one request at a time."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = asyncio.Lock()
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        async with self._lock:
            try:
                async with asyncio.timeout(timeout):
                    answer = await self._exchange(request)
            except (OSError, ValueError, TimeoutError) as error:
                self.hang_up()
                raise RelayGone(f"the relay does not answer: {type(error).__name__}") from None
            except BaseException:
                self.hang_up()  # the answer would be taken for that of the next request
                raise
        if answer.get("relay") != RELAY_PROTOCOL:
            raise RelayGone("the relay speaks another version of the control protocol")
        if "error" in answer and "what" in answer:
            raise from_slug(str(answer["error"]), str(answer["what"]))
        return answer

    async def _exchange(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._streams is None:
            self._streams = await asyncio.open_unix_connection(self._path, limit=_MAX_LINE)
        reader, writer = self._streams
        writer.write(json.dumps(request).encode() + b"\n")
        await writer.drain()
        line = await reader.readline()
        if not line:
            raise ConnectionError("the relay has closed its control socket")
        answer = json.loads(line)
        if not isinstance(answer, dict):
            raise ValueError("the relay's answer is no object")
        return answer

    def hang_up(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


async def _kill_listener(path: str) -> None:
    """Kill the process that listens at a UNIX socket, if there is one; on return it and its sockets are gone."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
        link.setblocking(False)
        try:
            link.connect(path)  # the kernel answers for a process that is stopped, and says which it is
            pid, _, _ = struct.unpack("3i", link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            pidfd = os.pidfd_open(pid)
        except OSError:
            return
    gone = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(pidfd, gone.set)
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        async with asyncio.timeout(_CLOSE_S):
            await gone.wait()
    except (ProcessLookupError, TimeoutError):
        return
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)


class RelayClient:
    """Talks to the relay (or splice) of one move; usable again and again, also by an agent that did not start it.

    Every method raises RelayGone when the process is not there (any more), and InvalidInput or Conflict when it
    refuses. ``wait`` uses a connection of its own, so that it delays nothing else.
    """

    def __init__(self, directory: str) -> None:
        self._path = os.path.join(directory, SOCKET_NAME)
        self._asking = _Line(self._path)
        self._waiting = _Line(self._path)

    @classmethod
    async def connect(cls, directory: str) -> RelayClient:
        """A client whose relay has just answered."""
        client = cls(directory)
        await client._asking.ask({"op": "status"}, _PATIENCE_S)
        return client

    async def status(self) -> dict[str, Any]:
        """State and counters; see ``relay_move.Move.status``."""
        return await self._asking.ask({"op": "status"}, _REQUEST_S)

    async def send(self, message: Message) -> None:
        """Send a message to the other host's agent; queued until the control channel stands."""
        await self._asking.ask({"op": "send", "message": message}, _REQUEST_S)

    async def wait(self, after: int, timeout: float) -> list[Event]:
        """The events with a higher ``seq`` than ``after``: at once if there are any, else within ``timeout`` s."""
        answer = await self._waiting.ask({"op": "wait", "after": after, "timeout": timeout}, timeout + _PATIENCE_S)
        events: list[Event] = answer["events"]
        return events

    async def abort(self, reason: str) -> None:
        """Close the local sockets, then the channels; the process stays to report."""
        await self._asking.ask({"op": "abort", "reason": reason}, _REQUEST_S)

    async def enter(self, phase: Phase) -> None:
        """Say how far the move is, which decides how long a broken link may last."""
        await self._asking.ask({"op": "phase", "phase": phase}, _REQUEST_S)

    async def close(self) -> None:
        """Let the process shut everything, remove its sockets and end; fine if it has ended already.

        One that does not answer is killed: it holds a key, and must not outlive its move.
        """
        try:
            await self._asking.ask({"op": "close"}, _CLOSE_S)
        except RelayGone:
            await _kill_listener(self._path)
        finally:
            self.hang_up()

    def hang_up(self) -> None:
        """Close our connections; the relay goes on."""
        self._asking.hang_up()
        self._waiting.hang_up()
