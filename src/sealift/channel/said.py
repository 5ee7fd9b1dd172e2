"""What a peer can say on a connection, once it has verified: the events of ``session.ReceiveHalf``."""

from __future__ import annotations

from dataclasses import dataclass

from sealift.channel.protocol import CloseReason


@dataclass(frozen=True, slots=True)
class PeerOpened:
    """The peer holds the keys: its first record, OPEN or RESUME, verified."""

    next_expected: int
    first_retained: int
    resumes: bool = False


@dataclass(frozen=True, slots=True)
class Data:
    """Verified bytes of the stream. ``view`` is good until the next call on the half that gave it."""

    view: memoryview


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """Everything of our stream before ``next_expected`` was written in full to the peer's local socket."""

    next_expected: int


@dataclass(frozen=True, slots=True)
class PeerEnded:
    """The peer's stream ended where the peer ended it."""


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The peer's clock when it sent, the last clock of ours it had heard (0: none), how long it held it; all in us."""

    clock_us: int
    heard_us: int
    held_us: int


@dataclass(frozen=True, slots=True)
class PeerClosed:
    """The peer gave the channel up."""

    reason: CloseReason


Event = PeerOpened | Data | Acknowledged | PeerEnded | Heartbeat | PeerClosed
