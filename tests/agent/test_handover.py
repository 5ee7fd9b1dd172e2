"""What a relay is told of its move."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from doubles.hosts import World, secret
from sealift.agent.handover import handover
from sealift.agent.journal import MoveRow
from sealift.domain.move import MoveOptions, MoveState, MoveStatus, Role, decode_spec, encode_spec


@pytest.mark.parametrize("role", Role)
def test_both_sides_wait_for_a_broken_link_as_long_as_the_order_says(world: World, role: Role) -> None:
    order = replace(world.order(), options=MoveOptions(give_up_ms=120_500, switchover_timeout_ms=7_000))
    order, _, _ = decode_spec(encode_spec(order, secret(), {}))
    row = MoveRow(order, MoveStatus(order.attempt, role, MoveState.PREPARING), Path("/nowhere"))
    kind, spec, _ = asyncio.run(handover(world.a.settings, row, secret(), 1))
    assert (kind, spec.role) == ("relay", role.value)
    assert (spec.give_up_s, spec.switchover_timeout_s) == (120.5, 7.0)
