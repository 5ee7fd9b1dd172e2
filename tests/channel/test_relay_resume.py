"""Links that break under real relays: the stream goes on, exactly; when it cannot, local sockets close first."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from support.cutter import Cutter
from support.relays import PATIENCE, ByHand, Pair, Site, channel_spec, exactly, proc, read_all
from support.step_cutter import StepCutter

MB = 1 << 20


@pytest.fixture
def site():
    with Site() as made:
        yield made


def carry(pair: Pair, channels: int, data: list[bytes]) -> list[bytes]:
    """Send ``data`` through every channel at once, with an answer of a few bytes; what arrived."""
    ends = [pair.connect() for _ in range(channels)]

    def give(n: int) -> None:
        near = ends[n][0]
        near.settimeout(60)
        near.sendall(data[n])
        near.shutdown(socket.SHUT_WR)

    def take(n: int) -> bytes:
        far = ends[n][1]
        far.settimeout(60)
        arrived = read_all(far)
        far.sendall(b"thanks")
        far.shutdown(socket.SHUT_WR)
        return arrived

    with ThreadPoolExecutor(2 * channels) as pool:
        gives = [pool.submit(give, n) for n in range(channels)]
        takes = [pool.submit(take, n) for n in range(channels)]
        arrived = [t.result(100) for t in takes]
        for given in gives:
            given.result(100)
    for near, _ in ends:
        assert read_all(near) == b"thanks"
    pair.source.event("drained")
    pair.target.event("drained")
    return arrived


@pytest.mark.parametrize("channels", [1, 4])
def test_twenty_resets_in_one_transfer_lose_and_double_nothing(site: Site, channels: int) -> None:
    data = [random.Random(n).randbytes(48 * MB // channels + n) for n in range(channels)]
    with (
        Cutter(site.port, reset_every=2 * MB, resets=20) as cutter,
        site.pair(channel_spec(channels), port=cutter.port, record_bytes=64 << 10) as pair,
    ):
        for n in range(20):
            pair.source.ask("send", message={"type": "READY", "n": n})
        assert carry(pair, channels, data) == data
        assert cutter.resets_left == 0
        messages = [pair.target.event("message", nth=n + 1)["message"]["n"] for n in range(20)]
        assert messages == list(range(20))
        assert pair.source.status()["reconnects"] >= 15
        assert "broken" not in [e["type"] for e in pair.source.events()]
        resumed = pair.source.event("resumed")
        assert resumed["epoch"] >= 2
        assert resumed["outage_ms"] >= 0


def test_sixteen_channels_resume_at_once(site: Site) -> None:
    """More than the places for strangers: none pushes out another."""
    data = [random.Random(n).randbytes(MB + n) for n in range(16)]
    with (
        Cutter(site.port, reset_every=6 * MB, resets=1) as cutter,
        site.pair(channel_spec(16), port=cutter.port, record_bytes=64 << 10) as pair,
    ):
        assert carry(pair, 16, data) == data
        assert cutter.resets_left == 0
        refused = [e for e in pair.target.events() if e["type"] == "refused"]
        assert not refused, refused


def test_a_link_that_is_down_for_a_while_costs_only_that_while(site: Site) -> None:
    data = random.Random(1).randbytes(8 * MB)
    with Cutter(site.port) as cutter, site.pair(port=cutter.port) as pair:
        near, far = pair.connect()
        near.sendall(data[:MB])
        assert exactly(far, MB) == data[:MB]
        cutter.down()
        pair.source.event("interrupted", nth=2)
        feeder = threading.Thread(target=near.sendall, args=(data[MB:],))
        feeder.start()
        threading.Timer(5.0, cutter.up).start()
        far.settimeout(60)
        assert exactly(far, 7 * MB) == data[MB:]
        feeder.join(PATIENCE)
        outage = [e for e in pair.source.events() if e["type"] == "resumed" and e["channel"] == 1]
        assert max(e["outage_ms"] for e in outage) >= 4_500


def interruptions(pair: Pair) -> int:
    """How many the source has told of: on a machine that stood still there may be some before the one that is meant."""
    return len([e for e in pair.source.events() if e["type"] == "interrupted"])


def test_a_black_hole_is_found_by_silence_and_every_channel_connects_anew(site: Site) -> None:
    with (
        Cutter(site.port) as cutter,
        site.pair_in_time(channel_spec(2), port=cutter.port, at_source={"silence_s": 1.0, "patience_s": 1.0}) as pair,
    ):
        (near, far), (near_2, far_2) = pair.connect(), pair.connect()
        for one, other in ((near, far), (near_2, far_2)):
            one.sendall(b"before")
            assert other.recv(16) == b"before"
        before = interruptions(pair)
        cutter.swallow()
        near.sendall(b"into the hole")
        near_2.sendall(b"also")
        for n in (1, 2, 3):
            assert pair.source.event("interrupted", nth=before + n)["slug"] == "peer_silent"
        cutter.up()
        assert exactly(far, 13) == b"into the hole"
        assert exactly(far_2, 4) == b"also"
        far.sendall(b"back")
        assert near.recv(16) == b"back"


def test_a_black_hole_is_found_when_the_control_channel_has_no_connection_either(site: Site) -> None:
    """Its silence cannot be judged then; that it was cut off for as long says the same of the other channels."""
    with (
        StepCutter(site.port) as cutter,
        site.pair_in_time(channel_spec(), port=cutter.port, at_source={"silence_s": 1.0, "patience_s": 1.0}) as pair,
    ):
        near, far = pair.connect()
        near.sendall(b"before")
        assert far.recv(16) == b"before"
        before = interruptions(pair)
        cutter.swallow()
        cutter.reset_channel(0)
        pair.source.event("interrupted", nth=before + 1)
        near.sendall(b"into the hole")
        cutter.await_connections(2, timeout=60)  # each attempt takes a second
        cutter.up()
        assert exactly(far, 13) == b"into the hole"
        assert pair.source.event("interrupted", nth=before + 2)["channel"] == 1


def test_a_half_open_connection_is_replaced_by_a_higher_epoch(site: Site) -> None:
    """The source's end was reset, the target heard nothing of it."""
    with Cutter(site.port) as cutter, site.pair(port=cutter.port) as pair:
        near, far = pair.connect()
        near.sendall(b"before")
        assert far.recv(16) == b"before"
        cutter.reset_source_only()
        pair.source.event("resumed", nth=2)
        near.sendall(b"after")
        assert far.recv(16) == b"after"
        assert pair.target.event("interrupted")["slug"] == "stream_truncated"


def test_a_target_relay_stopped_for_three_seconds_breaks_nothing(site: Site) -> None:
    with site.pair(silence_s=10.0) as pair:
        near, far = pair.connect()
        pair.target.signal(signal.SIGSTOP)
        near.sendall(b"meanwhile")
        threading.Timer(3.0, pair.target.signal, (signal.SIGCONT,)).start()
        assert far.recv(16) == b"meanwhile"
        assert pair.source.status()["reconnects"] == 0


def test_a_side_that_ended_while_the_link_was_down_says_so_when_it_is_back(site: Site) -> None:
    with Cutter(site.port) as link, site.pair(port=link.port) as pair:
        near, _ = pair.connect()
        pair.source.event("connected")
        link.down()
        pair.source.event("interrupted")
        pair.target.ask("abort", reason="nobody needs it any more")
        link.up()
        assert pair.source.event("broken")["slug"] == "peer_closed"
        assert read_all(near) == b""


def test_after_the_give_up_time_the_local_sockets_are_closed_first(site: Site) -> None:
    with Cutter(site.port) as cutter, site.pair(port=cutter.port, give_up_s=1.0) as pair:
        near, far = pair.connect()
        pair.source.event("connected")
        cutter.down()
        assert read_all(near) == b""
        assert read_all(far) == b""
        for relay in (pair.source, pair.target):
            broken = relay.event("broken")
            assert broken["slug"] == "stream_truncated"
            assert "could not be resumed" in broken["what"]
            assert relay.events()[-1]["type"] == "broken"


def test_the_phase_decides_how_long_to_try(site: Site) -> None:
    with (
        Cutter(site.port) as cutter,
        site.pair(port=cutter.port, give_up_s=1.0, switchover_timeout_s=0.5) as pair,
    ):
        near, far = pair.connect()
        near.sendall(b"before")
        assert exactly(far, 6) == b"before"
        for relay in (pair.source, pair.target):
            assert relay.ask("phase", phase="committed")["entered"]
        assert pair.source.ask("phase", phase="resting")["error"] == "invalid_input"
        cutter.down()
        pair.source.event("interrupted", nth=2)
        seen = len(pair.source.events())
        assert pair.source.ask("wait", after=seen, timeout=2.5)["events"] == [], "nobody gives up after the commit"
        cutter.up()
        pair.source.event("resumed", nth=2)
        near.sendall(b"on")
        assert far.recv(2) == b"on"
        pair.source.ask("phase", phase="switchover")
        cutter.down()
        assert read_all(near) == b""
        pair.source.event("broken")


def test_a_bit_flipper_costs_reconnects_only(site: Site) -> None:
    data = [random.Random(5).randbytes(40 * MB)]
    with Cutter(site.port, flip_every=5 * MB) as cutter, site.pair(port=cutter.port) as pair:
        assert carry(pair, 1, data) == data
        seen = pair.target.status()["interrupted"]
        assert set(seen) & {"record_forged", "record_oversize", "record_unexpected"}
        assert pair.source.status()["reconnects"] >= 3


def test_memory_stays_bounded_while_the_target_stalls(site: Site) -> None:
    window = 8 * MB
    with Cutter(site.port) as cutter, site.pair(channel_spec(window=window), port=cutter.port) as pair:
        near, far = pair.connect()
        before = peak_kib(pair.source.pid)
        data = os.urandom(64 * MB)
        feeder = threading.Thread(target=near.sendall, args=(data,))
        near.settimeout(60)
        feeder.start()
        seen = -1
        while seen != (seen := pair.source.status()["sealed_out"]):
            pair.source.ask("wait", after=99, timeout=0.5)
        for n in range(3):
            cutter.reset()
            pair.source.event("resumed", nth=2 * n + 2)
        assert peak_kib(pair.source.pid) - before <= (window >> 10) + (8 << 10)
        assert peak_kib(pair.target.pid) <= 64 << 10
        far.settimeout(60)
        assert exactly(far, len(data)) == data
        feeder.join(PATIENCE)


def peak_kib(pid: int) -> int:
    line = next(line for line in proc(pid, "status").splitlines() if line.startswith(b"VmHWM:"))
    return int(line.split()[1])


def test_two_resumes_at_once_leave_one_connection_and_an_exact_stream(site: Site) -> None:
    with site.pair() as pair:
        near, far = pair.connect()
        near.sendall(b"before")
        assert far.recv(16) == b"before"
        hands = []
        for epoch in (50, 51):
            hands.append(ByHand(site.port, pair.spec, pair.secret, 1, epoch))
            hands[-1].hello()
        for hand in reversed(hands):  # the higher one is confirmed first
            with pytest.raises((AssertionError, OSError)) if hand is hands[0] else contextlib.nullcontext():
                hand.prove(resume=(0, 6))
        assert pair.target.event("refused")["slug"] == "epoch_stale"
        for hand in hands:
            hand.sock.close()


@pytest.mark.parametrize("offset", [7, 2**63])
def test_a_resume_at_an_offset_never_sent_ends_the_move(site: Site, offset: int) -> None:
    with site.pair() as pair:
        near, far = pair.connect()
        near.sendall(b"before")
        assert far.recv(16) == b"before"
        hand = ByHand(site.port, pair.spec, pair.secret, 1, epoch=50)
        hand.hello()
        with pytest.raises((AssertionError, OSError)):
            hand.prove(resume=(offset, 0))
        assert pair.target.event("broken")["slug"] == "offset_invalid"
        assert read_all(far) == b""
        hand.sock.close()
