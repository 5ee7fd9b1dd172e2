"""One QMP connection that is kept up: a timeout on every command, events with QEMU's time, reconnection.

``qemu.qmp`` speaks the protocol (it negotiates ``oob`` by itself where QEMU offers it). What is added here:

- its exceptions become ours. A command whose answer was lost is a QmpTimeout: it may or may not have been carried out;
- it knows no reconnecting. When the connection breaks and the process lives on, a task here connects again, and
  commands that come meanwhile wait for it within their own timeout;
- its listeners keep every event for ever; ours keep the last ``RETAINED_EVENTS``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from weakref import WeakSet

from qemu.qmp import EventListener, ExecInterruptedError, ExecuteError, Message, QMPClient, QMPError, StateError

from sealift.errors import HypervisorError, QemuGone, QmpRefused, QmpTimeout
from sealift.hypervisor.base import RECONNECTED, QmpEvent
from sealift.hypervisor.process import ProcessRef

RETAINED_EVENTS = 1000
_FIRST_RETRY_S, _LAST_RETRY_S = 0.02, 0.5
"""Pauses between attempts to connect, growing; there is no event that says QEMU has bound its socket."""

# What qemu.qmp would log is raised from here in our words.
_quiet = logging.getLogger("sealift.hypervisor.qmp.wire")
_quiet.setLevel(logging.CRITICAL + 1)


class _Feed(EventListener):
    """Hands every event on and keeps none."""

    def __init__(self, qmp: Qmp) -> None:
        super().__init__()
        self._qmp = qmp

    async def put(self, event: Message) -> None:
        stamp = event.get("timestamp")
        data = event.get("data")
        assert isinstance(stamp, dict)
        self._qmp._publish(
            QmpEvent(
                name=str(event["event"]),
                data=data if isinstance(data, dict) else {},
                time=stamp["seconds"] + stamp["microseconds"] / 1e6,
            )
        )


class _Reader:
    """One iteration over events; ends with the connection. Forgotten by ``Qmp`` as soon as nobody holds it."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[QmpEvent | None] = asyncio.Queue()

    def put(self, event: QmpEvent | None) -> None:
        self._queue.put_nowait(event)

    def __aiter__(self) -> _Reader:
        return self

    async def __anext__(self) -> QmpEvent:
        event = await self._queue.get()
        if event is None:
            self._queue.put_nowait(None)  # asked once more, it has still ended
            raise StopAsyncIteration
        return event


class Qmp:
    """A kept-up QMP connection to one process. Made by ``connect``, ended by ``close``."""

    def __init__(self, path: Path, process: ProcessRef, name: str) -> None:
        self._path = path
        self._process = process
        self.name = name
        self._client: QMPClient | None = None
        self._up = asyncio.Event()
        self._ended = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._retained: deque[QmpEvent] = deque(maxlen=RETAINED_EVENTS)
        self._readers: WeakSet[_Reader] = WeakSet()
        self._end: HypervisorError | None = None
        self._dropping: asyncio.Task[None] | None = None

    @classmethod
    async def connect(cls, path: Path, *, process: ProcessRef, name: str, timeout: float = 10) -> Qmp:
        """Connect to the QMP socket that ``process`` serves (and no other); ``name`` is the VM's, for messages.

        Tries until the socket is there. Raises QemuGone when the process has ended, QmpTimeout when it gave no
        greeting in time, HypervisorError when another process serves the socket.
        """
        qmp = cls(path, process, name)
        try:
            async with asyncio.timeout(timeout):
                qmp._client = await qmp._dial()
        except TimeoutError:
            raise QmpTimeout(
                f"QEMU of VM {name} (pid {process.pid}) gave no greeting within {timeout:g} s",
                todo=f"look whether another program holds {path}",
            ) from None
        qmp._up.set()
        qmp._keeper = asyncio.create_task(qmp._keep(), name=f"qmp-{name}")
        return qmp

    @property
    def version(self) -> str:
        """The version of the running QEMU, e.g. ``7.2.22``: the installed one may be another by now."""
        greeting = self._client.greeting if self._client else None
        numbers = greeting.QMP.version.get("qemu") if greeting else None
        if not isinstance(numbers, dict):
            return "0.0.0"
        return ".".join(str(numbers.get(part, 0)) for part in ("major", "minor", "micro"))

    async def _dial(self) -> QMPClient:
        """Connect and negotiate, trying until it works; raises QemuGone."""
        pause = _FIRST_RETRY_S
        while True:
            if not self._process.alive():
                raise self._gone()
            link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                link.setblocking(False)
                # A full backlog is EAGAIN on a UNIX socket; it passes like a socket that is not there yet.
                link.connect(str(self._path))
                pid, _, _ = struct.unpack("3i", link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
                if pid != self._process.pid:
                    raise HypervisorError(
                        f"{self._path} is served by process {pid}, not by VM {self.name}'s {self._process.pid}"
                    )
                client = QMPClient()
                client.logger = _quiet
                client.events.event_filter = lambda _: False
                client.register_listener(_Feed(self))
                await client.connect(link)
                return client
            except (OSError, QMPError):
                link.close()
                await asyncio.sleep(pause)
                pause = min(pause * 1.2, _LAST_RETRY_S)
            except BaseException:
                link.close()
                raise

    async def _keep(self) -> None:
        """Watch the connection and make it again, until the process has ended."""
        try:
            while True:
                client = self._client
                assert client is not None
                while client.runstate.name == "RUNNING":
                    await client.runstate_changed()
                self._up.clear()
                self._client = None
                # Shielded: a disconnect that is cancelled half-way leaves qemu.qmp's tasks with nobody to ask them.
                self._dropping = asyncio.create_task(self._drop(client))
                await asyncio.shield(self._dropping)
                self._client = await self._dial()
                self._publish(QmpEvent(RECONNECTED, {}, time.time()))
                self._up.set()
        except HypervisorError as error:
            self._end = error  # the process has ended, or its socket is another's now: nothing more will come
        finally:
            self._finish()

    @staticmethod
    async def _drop(client: QMPClient) -> None:
        # It raises whatever ended the connection: EOFError, ConnectionResetError, a protocol error. Bounded, because
        # it first writes out what a QEMU that hangs may never read.
        with contextlib.suppress(Exception):
            async with asyncio.timeout(2):
                await client.disconnect()

    def _finish(self) -> None:
        # Before anybody is woken: one who finds neither a connection nor an end would ask for ever.
        if self._end is None:
            closed = HypervisorError(f"the handle on VM {self.name} was closed")
            self._end = closed if self._process.alive() else self._gone()
        self._ended.set()
        self._up.set()  # wakes those who wait, to find that it has ended
        for reader in self._readers:
            reader.put(None)

    def _gone(self) -> QemuGone:
        return QemuGone(f"the QEMU of VM {self.name} (pid {self._process.pid}) has ended")

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None, timeout: float = 10) -> object:
        """Carry out one command; its ``return`` value.

        Raises QmpRefused with QEMU's words, QemuGone when the process has ended, QmpTimeout when no answer came within
        ``timeout`` seconds or the connection broke first; queries are asked again instead.
        """
        try:
            async with asyncio.timeout(timeout):
                while True:
                    await self._up.wait()
                    if self._end is not None:
                        raise type(self._end)(self._end.what, todo=self._end.todo)
                    if self._client is None:
                        continue  # it broke again before we were woken
                    try:
                        return await self._client.execute(command, arguments)
                    except ExecuteError as error:
                        raise QmpRefused(f"QEMU of VM {self.name} refused {command}: {error}") from None
                    except StateError:
                        self._up.clear()  # not sent; the keeper has not noticed yet
                    except (ExecInterruptedError, QMPError):
                        if not await self._process.wait_exit(0.2) and not command.startswith("query-"):
                            raise QmpTimeout(
                                f"the connection to QEMU of VM {self.name} broke before it answered {command}"
                            ) from None
                    if not self._process.alive():
                        raise self._gone()
        except TimeoutError:
            if not self._process.alive():
                raise self._gone() from None
            raise QmpTimeout(f"QEMU of VM {self.name} did not answer {command} within {timeout:g} s") from None

    async def query(self, command: str, timeout: float = 10) -> dict[str, object]:
        """A command that answers with an object."""
        answer = await self.execute(command, timeout=timeout)
        if not isinstance(answer, dict):
            raise HypervisorError(f"QEMU of VM {self.name} answered {command} with something else than an object")
        return answer

    def _publish(self, event: QmpEvent) -> None:
        self._retained.append(event)
        for reader in self._readers:
            reader.put(event)

    def events(self, since: float | None = None) -> AsyncIterator[QmpEvent]:
        """See ``base.Vm.events``."""
        reader = _Reader()
        if since is not None:
            for event in self._retained:
                if event.time >= since:
                    reader.put(event)
        if self._ended.is_set():
            reader.put(None)
        self._readers.add(reader)
        return reader

    def last_event(self, name: str) -> QmpEvent | None:
        """See ``base.Vm.last_event``."""
        return next((event for event in reversed(self._retained) if event.name == name), None)

    async def close(self) -> None:
        """End the connection; QEMU goes on."""
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
            self._keeper = None
        if self._dropping is not None:
            await self._dropping
        if self._client is not None:
            await self._drop(self._client)
            self._client = None
        self._finish()
