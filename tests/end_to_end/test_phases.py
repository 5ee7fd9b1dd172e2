"""Faults of the link at every step of a real guest's move. `./dev bench faults` has each kind at each step."""

from __future__ import annotations

import time

import pytest

from sealift.agent.commitlog import Mark
from support.faults import (
    HELD,
    CutCluster,
    RelayLine,
    at_mark,
    carried_by_controller,
    held_before_switchover,
    settled,
    strike,
)
from support.running_guest import Guest
from support.step_cutter import MESSAGES, SETUP_POINTS, Where

pytestmark = pytest.mark.qemu


@pytest.mark.parametrize("channels", [1, 4])
def test_resets_in_every_phase_of_one_move(cut_guest: Guest, behind_cutters: CutCluster, channels: int) -> None:
    """Each handshake at three points; everything in precopy, at pre-switchover, at LET_GO; then at each message."""
    source, target = cut_guest.host, cut_guest.other()
    cutter, lost = behind_cutters.cutters[target.name], cut_guest.console.ticks.lost()
    log = source.log.stat().st_size
    cutter.cut_setup(SETUP_POINTS)
    steps = [cutter.cut_at("READY", "after"), cutter.cut_at("COMMIT", "inside"), cutter.cut_at("RUNNING", "before")]
    with at_mark(source, cut_guest, Mark.LET_GO, cutter.reset) as let_go:
        ident = cut_guest.begin(target, "--channels", str(channels), "--bandwidth", HELD, state=None)
        with held_before_switchover(cut_guest, source) as stopped, RelayLine(source) as relay:
            while not relay.ask("status")["acked_out"]:
                time.sleep(0.05)
            cutter.reset()
            stopped()
            cutter.reset()
        record = settled(cut_guest, ident, source, target, lost_before=lost)
        assert let_go.is_set()
    assert record["state"] == "done"
    missed = [step.message for step in steps if not step.hit.is_set()]
    assert not missed or carried_by_controller(source, log)
    data_streams = channels if channels == 1 else 1 + channels
    assert cutter.cut_in_setup == dict.fromkeys(range(1 + data_streams), SETUP_POINTS)


@pytest.mark.parametrize(("where", "channels"), [("before", 1), ("after", 4)])
def test_a_reset_exactly_at_each_message(
    cut_guest: Guest, behind_cutters: CutCluster, where: Where, channels: int
) -> None:
    source, target = cut_guest.host, cut_guest.other()
    cutter, lost = behind_cutters.cutters[target.name], cut_guest.console.ticks.lost()
    log = source.log.stat().st_size
    steps = [cutter.cut_at(message, where) for message in MESSAGES]
    ident = cut_guest.begin(target, "--channels", str(channels), state=None)
    record = settled(cut_guest, ident, source, target, lost_before=lost)
    assert record["state"] == "done"
    missed = [step.message for step in steps if not step.hit.is_set()]
    assert not missed or carried_by_controller(source, log)


def test_a_precopy_with_a_half_open_link_an_outage_a_black_hole_and_a_stopped_relay(
    cut_guest: Guest, behind_cutters: CutCluster
) -> None:
    """The source's agent waits meanwhile, so that all of it happens while the move is on its way."""
    source, target = cut_guest.host, cut_guest.other()
    cutter, lost = behind_cutters.cutters[target.name], cut_guest.console.ticks.lost()
    ident = cut_guest.begin(target, "--channels", "4", "--bandwidth", HELD, state=None)
    with held_before_switchover(cut_guest, source), RelayLine(source) as relay:
        strike("half-open", cutter, source, target)
        assert relay.hear("resumed", channel=0)
        strike("down", cutter, source, target, seconds=5.0)
        assert relay.hear("interrupted", channel=0)
        assert relay.hear("resumed", channel=0)
        strike("hole", cutter, source, target)
        assert relay.hear("interrupted", channel=0, slug="peer_silent")
        assert relay.hear("resumed", channel=0)
        strike("frozen", cutter, source, target, seconds=3.0)
    assert settled(cut_guest, ident, source, target, lost_before=lost)["state"] == "done"


def test_a_link_that_breaks_at_pre_switchover_and_stays_down_gives_the_guest_back(
    cut_guest: Guest, behind_cutters: CutCluster
) -> None:
    """No device state has left, so the target cannot be complete: after 5 s the guest goes on where it was."""
    source, target = cut_guest.host, cut_guest.other()
    cutter, lost = behind_cutters.cutters[target.name], cut_guest.console.ticks.lost()
    ident = cut_guest.begin(target, "--bandwidth", HELD, state=None)
    with held_before_switchover(cut_guest, source) as stopped:
        stopped()
        cutter.down()
    record = settled(cut_guest, ident, source, target, lost_before=lost)
    assert record["state"] == "failed"
    assert "could not be resumed in time" in record["error"]
