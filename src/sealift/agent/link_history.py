"""How the link between the hosts has fared, from the relay's numbered events; the same again for an agent that is new.

A link is down from the moment that its first channel loses its connection until none is without one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sealift.domain.move import OUTAGES_TOLD, LinkDown, LinkReport, Outage


@dataclass
class LinkHistory:
    """Feed it every ``interrupted`` and ``resumed`` event of a relay, in order."""

    interrupted: dict[int, str] = field(default_factory=dict)
    """The channels that have no connection now, and why; the relays see to it, and nothing is broken by it."""
    _outages: list[Outage] = field(default_factory=list)
    _count: int = 0
    _lasted_ms: int = 0
    _longest_ms: int = 0

    def interrupt(self, channel: int, slug: str, what: str) -> None:
        """A channel has lost its connection."""
        if not self.interrupted:
            self._count += 1
            self._lasted_ms = 0
            if self._count <= OUTAGES_TOLD:
                self._outages.append(Outage(slug, what))
        self.interrupted[channel] = what

    def resume(self, channel: int, outage_ms: int) -> None:
        """A channel goes on, after so long without a connection."""
        if self.interrupted.pop(channel, None) is None:
            return
        self._lasted_ms = max(self._lasted_ms, outage_ms)
        if not self.interrupted:
            self._longest_ms = max(self._longest_ms, self._lasted_ms)
            if self._count <= OUTAGES_TOLD:
                self._outages[-1] = replace(self._outages[-1], lasted_ms=self._lasted_ms)

    def report(self, relay: Mapping[str, Any]) -> LinkReport:
        """The history, with what the relay's ``status`` says of this moment."""
        down = relay.get("outage") if not relay.get("broken") else None
        return LinkReport(
            tuple(self._outages),
            self._count,
            self._longest_ms,
            int(relay.get("reconnects", 0)),
            LinkDown(down["down_s"], down["left_s"], down["slug"], down["what"]) if down else None,
        )
