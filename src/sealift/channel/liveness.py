"""Is the peer still there, and how far is its clock from ours? Pure: every time is handed in.

Clocks on the wire are microseconds since the epoch. Offsets follow NTP: of a heartbeat that answers one of ours, the
round trip is what passed here minus what the peer says it held it, and the offset assumes that both ways took equally
long. Of the last samples the one with the shortest round trip counts.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

SAMPLES: Final = 16


@dataclass(frozen=True, slots=True)
class Beat:
    """One heartbeat: the sender's clock, the receiver's clock the sender last heard (0: none), and how long ago."""

    clock: int
    heard: int
    held: int


class Liveness:
    """Judges silence. Times are seconds of a clock that never jumps."""

    def __init__(self, limit: float, now: float) -> None:
        self._limit = limit
        self._last = now

    def heard(self, now: float) -> None:
        """Something authentic came from the peer."""
        self._last = now

    def remaining(self, now: float) -> float:
        """Seconds until the peer counts as silent; zero or less: it does."""
        return self._last + self._limit - now


class PeerClock:
    """The heartbeats both ways, and what they say of the peer's clock. All times are microseconds of our clock."""

    def __init__(self) -> None:
        self._heard_clock = 0
        self._heard_at = 0
        self._samples: deque[tuple[int, float]] = deque(maxlen=SAMPLES)

    def next_beat(self, now: int) -> Beat:
        """What to send now."""
        held = max(0, now - self._heard_at) if self._heard_clock else 0
        return Beat(now, self._heard_clock, held)

    def hear(self, beat: Beat, now: int) -> None:
        """Take in a heartbeat of the peer; impossible figures (a clock was set meanwhile) are passed over."""
        self._heard_clock, self._heard_at = beat.clock, now
        if beat.heard:
            round_trip = now - beat.heard - beat.held
            if round_trip >= 0:
                self._samples.append((round_trip, beat.clock + round_trip / 2 - now))

    @property
    def round_trip_us(self) -> int | None:
        """The shortest of the last round trips."""
        return min(self._samples)[0] if self._samples else None

    @property
    def offset_us(self) -> float | None:
        """The peer's clock minus ours."""
        return min(self._samples)[1] if self._samples else None
