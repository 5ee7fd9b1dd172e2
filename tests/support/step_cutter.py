"""A cutter that breaks the link exactly at a step of a sealed move.

It holds no key and needs none: preface, record types and lengths are in clear, and of the few messages on the control
channel each is known by its direction and length (docs/protocol/channel.md, sections 2, 5 and 11).
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from sealift.channel.control_frames import encode_frame
from sealift.channel.protocol import HEADER_BYTES, MESSAGE_BYTES, PREFACE_BYTES, RECORD_OVERHEAD, Preface, RecordType
from support.cutter import Cutter, Link

Message = Literal["READY", "COMMIT", "RUNNING"]
MESSAGES: tuple[Message, ...] = ("READY", "COMMIT", "RUNNING")
Where = Literal["before", "inside", "after"]
WHERES: tuple[Where, ...] = ("before", "inside", "after")
"""Nothing of the message arrives; half of its record does; all of it does, and what acknowledges it does not."""

SETUP_POINTS = 3
"""A handshake is cut after the preface, in message 2, and in the first record."""

_READY_BYTES, _RUNNING_BYTES = (len(encode_frame(m)) for m in ({"type": "READY"}, {"type": "RUNNING", "reason": ""}))
_TARGETS_WORDS: dict[int, tuple[Message, ...]] = {
    _READY_BYTES: ("READY",),
    _RUNNING_BYTES: ("RUNNING",),
    _READY_BYTES + _RUNNING_BYTES: ("READY", "RUNNING"),
}
"""What the target says, by the length of its record. After an outage one record may carry both."""


class _Records:
    """One direction of a connection: which records go by, from the clear parts alone."""

    def __init__(self, opening: int) -> None:
        """``opening``: bytes before the first record."""
        self.passed = 0
        self._next = opening
        self._tail = b""

    def see(self, data: bytes) -> Iterator[tuple[int, int, int]]:
        """(position of its first byte, type, length of its plaintext) of each record whose header is there now."""
        buffer, base = self._tail + data, self.passed - len(self._tail)
        while (at := self._next - base) + HEADER_BYTES <= len(buffer):
            length = int.from_bytes(buffer[at + 1 : at + HEADER_BYTES], "big")
            yield self._next, buffer[at], length
            self._next += length + RECORD_OVERHEAD
        self._tail = buffer[at:] if at < len(buffer) else b""


@dataclass
class _StepLink(Link):
    forth: _Records = field(default_factory=lambda: _Records(PREFACE_BYTES + MESSAGE_BYTES))
    back: _Records = field(default_factory=lambda: _Records(MESSAGE_BYTES))
    preface: bytes = b""
    channel: int | None = None
    cuts: dict[bool, tuple[int, Callable[[], None]]] = field(default_factory=dict)
    """By direction: after how many bytes to do what."""


@dataclass(eq=False)
class Step:
    """A cut that is to come; ``hit`` is set when it came."""

    message: Message
    where: Where
    act: Callable[[], None]
    hit: threading.Event = field(default_factory=threading.Event)


class StepCutter(Cutter):
    """A Cutter that can be told to break the link in handshakes and at messages."""

    def __init__(self, port: int, *, reset_every: int = 0) -> None:
        super().__init__(port, reset_every=reset_every)
        self._steps: list[Step] = []
        self._setups: Counter[int] = Counter()
        self._setup_cuts = 0
        self.cut_in_setup: Counter[int] = Counter()
        """How often a connection of each channel was reset before it counted, since ``cut_setup``."""

    def cut_at(self, message: Message, where: Where, act: Callable[[], None] | None = None) -> Step:
        """Once, when the next ``message`` goes by, do ``act``: unless given, reset everything."""
        step = Step(message, where, act or self.reset)
        with self._lock:
            self._steps.append(step)
        return step

    def cut_setup(self, times: int) -> None:
        """Reset the next so many connections of each channel before they count, each at another point."""
        with self._lock:
            self._setups.clear()
            self.cut_in_setup.clear()
            self._setup_cuts = times

    def reset_channel(self, channel: int) -> None:
        """Reset the connections of one channel."""
        with self._lock:
            links = [link for link in self._links if isinstance(link, _StepLink) and link.channel == channel]
        for link in links:
            link.reset()

    def calm(self) -> None:
        """Forget every cut that is still to come, and let everything through."""
        with self._lock:
            self._steps.clear()
            self._setup_cuts = self.resets_left = self._flips_left = 0
        self.up()

    def _link(self, source: socket.socket, target: socket.socket) -> Link:
        return _StepLink(source, target)

    def _pass(self, link: Link, data: bytes, forth: bool) -> bool:
        assert isinstance(link, _StepLink)
        records = link.forth if forth else link.back
        if forth and link.channel is None:
            self._read_preface(link, data)
        for start, kind, length in records.see(data):
            if link.channel == 0 and kind == RecordType.DATA:
                self._meet(link, forth, start, length)
        position, act = link.cuts.get(forth, (0, None))
        if act is not None and position <= records.passed + len(data):
            with contextlib.suppress(OSError):  # another cut was quicker; this one is due all the same
                (link.target if forth else link.source).sendall(data[: max(0, position - records.passed)])
            act()
            return False
        records.passed += len(data)
        return super()._pass(link, data, forth)

    def _read_preface(self, link: _StepLink, data: bytes) -> None:
        link.preface += data[: PREFACE_BYTES - len(link.preface)]
        if len(link.preface) < PREFACE_BYTES:
            return
        channel = link.channel = Preface.decode(link.preface).channel
        with self._lock:
            nth = self._setups[channel]
            if nth >= self._setup_cuts:
                return
            self._setups[channel] += 1

        def act() -> None:
            self.cut_in_setup[channel] += 1
            link.reset()

        match nth % SETUP_POINTS:
            case 0:
                link.cuts[True] = PREFACE_BYTES, act
            case 1:
                link.cuts[False] = MESSAGE_BYTES // 2, act
            case _:
                link.cuts[True] = PREFACE_BYTES + MESSAGE_BYTES + RECORD_OVERHEAD, act

    def _meet(self, link: _StepLink, forth: bool, start: int, length: int) -> None:
        """A message goes by, or two: arrange the cut if this is its step."""
        names: tuple[Message, ...] = ("COMMIT",) if forth else _TARGETS_WORDS.get(length, ())
        with self._lock:
            steps = [step for name in names for step in [s for s in self._steps if s.message == name][:1]]
        if not steps:
            return

        def act() -> None:
            with self._lock:
                due = [step for step in steps if step in self._steps]
                self._steps = [other for other in self._steps if other not in due]
            for step in due:
                step.act()
                step.hit.set()
            link.reset()

        whole = length + RECORD_OVERHEAD
        at = start + {"before": 0, "inside": whole // 2, "after": whole}[steps[0].where]
        link.cuts.setdefault(forth, (at, act))  # what comes after a cut that is to come does not go by here
