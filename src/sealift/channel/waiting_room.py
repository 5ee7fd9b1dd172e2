"""Who may wait while nothing is known of them but where they come from. Pure: times are handed in, in seconds.

An **origin** is an IPv4 address, or the /64 of an IPv6 address, since whoever has one address of it has them all. Who
waits has completed a TCP connection, so an origin is not one that anybody just claims.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from collections.abc import Iterator
from typing import Generic, TypeVar

Visitor = TypeVar("Visitor")


def origin(host: str) -> str:
    """The origin of a peer's address, as ``getpeername`` has it; an address of no known form is its own origin."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Network((int(address) >> 64 << 64, 64)))


class WaitingRoom(Generic[Visitor]):
    """Visitors by origin, in the order in which they came. When all seats are taken, the most crowded origin gives way.

    So one origin, however many connections it makes, takes no seat from others that have no more than their share.
    """

    def __init__(self, seats: int) -> None:
        self._seats = seats
        self._came = 0
        self._origins: OrderedDict[Visitor, str] = OrderedDict()
        self._crowds: dict[str, OrderedDict[Visitor, int]] = {}

    def __len__(self) -> int:
        return len(self._origins)

    def __contains__(self, visitor: Visitor) -> bool:
        return visitor in self._origins

    def __iter__(self) -> Iterator[Visitor]:
        """Whoever has waited longest comes first."""
        return iter(self._origins)

    def enter(self, visitor: Visitor, origin: str, *, at_most: int) -> list[Visitor]:
        """Take a seat. Who has lost theirs by it: the origin's oldest beyond ``at_most`` (1 and up), and the oldest of
        the most crowded origin if all seats were taken. Never the one who enters."""
        self._came += 1
        self._origins[visitor] = origin
        crowd = self._crowds.setdefault(origin, OrderedDict())
        crowd[visitor] = self._came
        lost = [self.give_way(origin) for _ in range(len(crowd) - at_most)]
        if len(self._origins) > self._seats:
            lost.append(self.give_way())
        return lost

    def leave(self, visitor: Visitor) -> None:
        """Free the seat."""
        where = self._origins.pop(visitor)
        crowd = self._crowds[where]
        del crowd[visitor]
        if not crowd:
            del self._crowds[where]

    def give_way(self, origin: str | None = None) -> Visitor:
        """Free the seat of the oldest of ``origin``, by default of the most crowded one (of equals, the oldest's)."""
        if origin is None:
            origin = max(self._crowds, key=lambda o: (len(self._crowds[o]), -next(iter(self._crowds[o].values()))))
        oldest = next(iter(self._crowds[origin]))
        self.leave(oldest)
        return oldest


class Credit:
    """How often an origin may come with what leads nowhere before it is limited: a token bucket for each.

    One that goes on owes, up to a whole burst: it is limited until it has been quiet for as long as that takes.
    """

    def __init__(self, burst: int, per_second: float, most: int) -> None:
        """Remembers at most the ``most`` origins that spent last."""
        self._burst = float(burst)
        self._per_second = per_second
        self._most = most
        self._accounts: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._accounts)

    def spend(self, origin: str, now: float) -> bool:
        """Take one; whether that was the last one."""
        before = self._left(origin, now)
        left = max(-self._burst, before - 1.0)
        self._accounts[origin] = (left, now)
        self._accounts.move_to_end(origin)
        if len(self._accounts) > self._most:
            self._accounts.popitem(last=False)
        return before >= 1.0 > left

    def spent(self, origin: str, now: float) -> bool:
        """Whether none is left at the moment."""
        return self._left(origin, now) < 1.0

    def _left(self, origin: str, now: float) -> float:
        left, since = self._accounts.get(origin, (self._burst, now))
        return min(self._burst, left + (now - since) * self._per_second)
