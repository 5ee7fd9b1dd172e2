"""What holds if nobody says how long to wait for a broken link."""

from __future__ import annotations

from sealift.channel.relay_spec import GIVE_UP_S, SWITCHOVER_TIMEOUT_S
from sealift.domain.move import MoveOptions


def test_a_relay_started_by_hand_waits_as_long_as_one_of_a_migration() -> None:
    """The channel knows nothing of migrations, so it has figures of its own; they must not drift apart."""
    options = MoveOptions()
    assert (options.give_up_ms, options.switchover_timeout_ms) == (GIVE_UP_S * 1000, SWITCHOVER_TIMEOUT_S * 1000)
