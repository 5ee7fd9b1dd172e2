"""What a channel remembers from one connection to the next: what the peer may still ask for, and what we have had.

Offsets are 64-bit counts of the plaintext bytes of one direction of a channel. They never start again; the end of the
stream occupies one, directly after the last byte.

    Retention   acked <= cursor <= sent, filled      bytes we sent or shall send, kept until acknowledged
    Receipt     acked <= delivered <= expected       what came and verified, and what the local socket has taken

A connection that is no longer the channel's current one must not touch its ledger; who drives it sees to that, and to
one thread at a time in each call. Source: docs/protocol/channel.md, section 10.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

from sealift.errors import BytesNotRetained, OffsetInvalid, RecordUnexpected

LEAST_WINDOW: Final = 64 << 10
"""A channel keeps up to this much however small its share of the window is."""

MAX_BLOCK: Final = 512 << 10
_ACK_BYTES: Final = 1 << 20


@dataclass(slots=True)
class _Block:
    buffer: memoryview
    start: int
    filled: int = 0

    @property
    def end(self) -> int:
        return self.start + self.filled


class Retention:
    """The bytes of our stream that the peer has not acknowledged, in blocks that are used again, the warmest first.

    Never holds more than ``window`` bytes of blocks (at least ``LEAST_WINDOW``); none before the first byte. The stream
    is received straight into ``space()``, and sealed straight from ``unsent()``.
    """

    def __init__(self, window: int, record_bytes: int) -> None:
        window = max(window, LEAST_WINDOW)
        self.limit = window
        """How many bytes may wait for their acknowledgement; whoever measures the link lowers it below ``window``."""
        self.was_full = False
        """Whether ``limit`` has kept anything back."""
        self._block_bytes = min(MAX_BLOCK, window // 4)
        self._record_bytes = min(record_bytes, self._block_bytes)
        self._most = window // self._block_bytes
        self._blocks: deque[_Block] = deque()
        self._free: list[memoryview] = []
        self._made = 0
        self._at = 0  # index of the block that the cursor is in
        self.acked = 0
        self.cursor = 0
        """The next offset to send on the current connection."""
        self.sent = 0
        """One above the highest offset ever sent."""
        self.filled = 0
        """One above the last byte that was put in."""
        self.ended = False

    @property
    def ended_and_acked(self) -> bool:
        """Whether the peer has acknowledged the whole stream, its end included."""
        return self.acked > self.filled

    @property
    def held_bytes(self) -> int:
        """Memory in use, at most the window."""
        return self._made * self._block_bytes

    def space(self) -> memoryview:
        """Where the next bytes of the stream go, up to a full record; empty while the window is full."""
        room = self.limit - (self.filled - self.acked)
        if room < min(self._record_bytes, self.limit) // 4:  # a few bytes at a time would make small records
            self.was_full = True
            return memoryview(b"")
        self._drop()
        last = self._blocks[-1] if self._blocks else None
        if last is not None and self.acked >= last.end:
            last.start, last.filled = last.end, 0
        if last is None or self._block_bytes - last.filled < (self._record_bytes + 1) // 2:
            last = self._another()
            if last is None:
                self.was_full = True
                return memoryview(b"")
        return last.buffer[last.filled : last.filled + min(self._record_bytes, room)]

    def fill(self, count: int) -> None:
        """Note that ``count`` bytes were put into ``space()``."""
        if self.ended or not 0 <= count <= self._block_bytes:
            raise ValueError("nothing can be added to the stream here")
        self._blocks[-1].filled += count
        self.filled += count

    def put(self, data: bytes) -> bool:
        """Add all of ``data``, or nothing if there is no room for it in one piece."""
        space = self.space()
        if len(space) < len(data):
            return False
        space[: len(data)] = data
        self.fill(len(data))
        return True

    def end(self) -> None:
        """Note that the stream is complete."""
        self.ended = True

    def unsent(self) -> memoryview:
        """The next bytes to seal, at most a record; empty when there are none (the end may still be owed)."""
        while self._at < len(self._blocks):
            block = self._blocks[self._at]
            if self.cursor < block.end:
                start = self.cursor - block.start
                return block.buffer[start : min(block.filled, start + self._record_bytes)]
            if self._at + 1 == len(self._blocks):
                break
            self._at += 1
        return memoryview(b"")

    @property
    def owes_end(self) -> bool:
        """Whether the end of the stream is the next thing to send."""
        return self.ended and self.cursor == self.filled

    def advance(self, count: int) -> None:
        """Note that ``count`` offsets after the cursor are being sent."""
        self.cursor += count
        self.sent = max(self.sent, self.cursor)

    def acknowledge(self, offset: int) -> None:
        """Forget what comes before ``offset``. Raises OffsetInvalid if the peer cannot mean that."""
        if not self.acked <= offset <= self.cursor:
            raise OffsetInvalid(f"the peer acknowledged offset {offset}, but {self.acked} to {self.cursor} were open")
        self.acked = offset
        self._drop()

    def resume(self, offset: int) -> None:
        """Go on from where the peer is. Raises OffsetInvalid for an offset it cannot be at."""
        if not self.acked <= offset <= self.sent:
            raise OffsetInvalid(f"the peer wants to go on at offset {offset}, but {self.acked} to {self.sent} are open")
        self.cursor = offset
        self._at = 0
        if offset > self.filled:
            self.acked = offset  # it has our end, which it takes only when everything before was delivered

    def wipe(self) -> None:
        """Overwrite every block."""
        for buffer in [*(block.buffer for block in self._blocks), *self._free]:
            buffer[:] = bytes(len(buffer))

    def _drop(self) -> None:
        # Never the last one: ``space`` may be receiving into it.
        while len(self._blocks) > 1 and self._blocks[0].end <= self.acked:
            self._free.append(self._blocks.popleft().buffer)
            self._at = max(0, self._at - 1)

    def _another(self) -> _Block | None:
        if self._free:
            buffer = self._free.pop()
        elif self._made < self._most:
            buffer = memoryview(bytearray(self._block_bytes))
            self._made += 1
        else:
            return None
        block = _Block(buffer, self.filled)
        self._blocks.append(block)
        return block


class Receipt:
    """What came of the peer's stream."""

    def __init__(self, window: int) -> None:
        self._quantum = min(_ACK_BYTES, max(window, LEAST_WINDOW) // 8)
        self.expected = 0
        """The next offset that may be accepted; everything before it verified and will be delivered."""
        self.delivered = 0
        """One above the last offset that the local socket has taken."""
        self.acked = 0
        self.ended = False

    def accept(self, count: int) -> None:
        """Note that the next ``count`` bytes verified and are now this side's to deliver."""
        self.expected += count

    def end(self) -> None:
        """Note the authenticated end of the stream, and that everything before it was delivered."""
        self.ended = True
        self.expected += 1
        self.delivered = self.expected

    def deliver(self, count: int) -> None:
        """Note that the local socket has taken ``count`` bytes."""
        self.delivered += count

    @property
    def owes_ack(self) -> bool:
        """Whether there is something to acknowledge at all."""
        return self.delivered > self.acked

    @property
    def ack_is_due(self) -> bool:
        """Whether it should be acknowledged now rather than soon."""
        return self.delivered - self.acked >= self._quantum or (self.ended and self.owes_ack)

    def ack(self) -> int:
        """The offset to acknowledge now; the caller sends it."""
        self.acked = self.delivered
        return self.acked


class Ledger:
    """Both directions of one channel."""

    def __init__(self, window: int, record_bytes: int) -> None:
        self.out = Retention(window, record_bytes)
        self.into = Receipt(window)
        self.confirmed = False
        """Whether a connection was confirmed before, as this side saw it: from then on it says RESUME."""

    def meet(self, next_expected: int, first_retained: int, *, resumes: bool) -> None:
        """Judge the peer's first record, OPEN or RESUME, and go on from where it is.

        Raises RecordUnexpected for an OPEN when the peer must know better, OffsetInvalid, BytesNotRetained; nothing
        has changed then.
        """
        if not resumes and (self.into.expected or self.out.acked):
            raise RecordUnexpected("the peer opened a channel from the beginning that had gone on before")
        if first_retained > self.into.expected:
            raise BytesNotRetained(
                f"the peer holds its stream only from offset {first_retained} on, and {self.into.expected} comes next"
            )
        self.out.resume(next_expected)
        self.into.acked = 0  # the last acknowledgement may have been lost with its connection: it is said again
        self.confirmed = True
