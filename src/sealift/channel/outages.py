"""How long may a channel be without a connection? Pure: every time is handed in, in seconds of a monotonic clock.

The budget depends on how far the move is. A channel whose new connection breaks again without having moved anything is
still in the same outage: somebody who lets each connection stand for a moment gains no time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from sealift.channel.relay_spec import Phase
from sealift.errors import ChannelError

STOOD_S: Final = 5.0
"""A connection that stood this long ended the outage before it, whether or not it had anything to carry."""

_FIRST_DELAY_S: Final = 0.1
_LONGEST_DELAY_S: Final = 2.0


@dataclass(slots=True)
class _Outage:
    since: float
    mark: int
    cause: ChannelError
    ended: float | None = None


class Outages:
    """The broken channels of one move."""

    def __init__(self, give_up_s: float, switchover_s: float, now: float) -> None:
        self._budgets: dict[Phase, float | None] = {
            "running": give_up_s,
            "switchover": switchover_s,
            "committed": None,
        }
        self._phase: Phase = "running"
        self._entered = now
        self._outages: dict[int, _Outage] = {}

    @property
    def phase(self) -> Phase:
        """How far the move is."""
        return self._phase

    def enter(self, phase: Phase, now: float) -> None:
        """The move has come further; an outage under way gets the new budget from now on."""
        if phase != self._phase:
            self._phase, self._entered = phase, now

    def begin(self, channel: int, mark: int, cause: ChannelError, now: float) -> bool:
        """A channel lost its connection; ``mark`` grows with everything it carries. Whether this is a new outage."""
        before = self._outages.get(channel)
        if before is not None and before.mark == mark and (before.ended is None or now - before.ended < STOOD_S):
            before.cause, before.ended = cause, None
            return False
        self._outages[channel] = _Outage(now, mark, cause)
        return True

    def end(self, channel: int, now: float) -> float:
        """A channel has a connection again; how long it had none, or none that was good for anything."""
        outage = self._outages.get(channel)
        if outage is None or outage.ended is not None:
            return 0.0
        outage.ended = now
        return now - outage.since

    def forget(self, channel: int) -> None:
        """A channel needs no connection any more."""
        self._outages.pop(channel, None)

    def deadline(self) -> float | None:
        """When to give up, if nothing changes; None: never."""
        budget = self._budgets[self._phase]
        starts = [max(o.since, self._entered) for o in self._outages.values() if o.ended is None]
        return min(starts) + budget if starts and budget is not None else None

    def cause(self) -> ChannelError | None:
        """Why the channel that has been broken longest is."""
        longest = self._longest()
        return longest.cause if longest else None

    def report(self, now: float) -> dict[str, Any] | None:
        """For people: seconds that a channel has been broken, and is given still (None: for ever), and why it is."""
        longest, deadline = self._longest(), self.deadline()
        if longest is None:
            return None
        left = None if deadline is None else max(0.0, deadline - now)
        return {"down_s": now - longest.since, "left_s": left, "slug": longest.cause.slug, "what": longest.cause.what}

    def _longest(self) -> _Outage | None:
        return min((o for o in self._outages.values() if o.ended is None), key=lambda o: o.since, default=None)


def delay_before(attempt: int) -> float:
    """Seconds to wait before the nth attempt (from 0) to connect a channel again."""
    return 0.0 if attempt == 0 else float(min(_LONGEST_DELAY_S, _FIRST_DELAY_S * 2.0 ** min(attempt - 1, 10)))
