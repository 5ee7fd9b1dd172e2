"""How much of a stream may be on the way, from what the peer acknowledges. Pure: every time is handed in, in seconds.

QEMU takes its local socket for the network: what waits in the relays and on the wire looks sent to it, and makes the
downtime longer than it forecast. So the window is bounded in time, at most ``TIME_S`` of the rate at which the peer
acknowledges, or two round trips where that is more, since less would leave a long link idle; and in bytes.

    rate     raised at once by a faster sample, lowered by half of the difference by a slower one, and then only if the
             window had been full: a stream that had nothing to send says nothing of the link
    sample   what was acknowledged in at least ``SAMPLE_S`` and two round trips
"""

from __future__ import annotations

from typing import Final

TIME_S: Final = 0.030
SAMPLE_S: Final = 0.050
LEAST: Final = 1 << 20
"""So much may always be on the way: enough for the rate to grow from."""

FIRST: Final = 4 << 20
"""So much before anything was measured."""


class Window:
    """The window of one direction of one channel, in bytes."""

    def __init__(self, ceiling: int) -> None:
        self._ceiling = ceiling
        self._rate = 0.0
        self._since: float | None = None
        self._from = 0
        self.bytes = min(FIRST, ceiling)

    def acknowledged(self, offset: int, now: float, round_trip: float, *, was_full: bool) -> bool:
        """Take in that the peer acknowledged the stream up to ``offset``; whether a sample was complete.

        ``was_full``: whether the window kept anything back since the last complete sample.
        """
        if self._since is None:
            self._since, self._from = now, offset
            return False
        elapsed = now - self._since
        if elapsed < max(SAMPLE_S, 2 * round_trip):
            return False
        rate = (offset - self._from) / elapsed
        self._since, self._from = now, offset
        if rate >= self._rate:
            self._rate = rate
        elif was_full:
            self._rate = (self._rate + rate) / 2
        wanted = int(self._rate * max(TIME_S, 2 * round_trip))
        self.bytes = min(max(wanted, LEAST), self._ceiling)
        return True
