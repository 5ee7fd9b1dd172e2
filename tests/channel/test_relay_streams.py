"""A pair of relays carries streams whole, both ways, in order, and ends them as they were ended."""

from __future__ import annotations

import hashlib
import os
import random
import select
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from support.relays import PATIENCE, ByHand, Relay, Site, TargetSide, channel_spec, dial_local, proc, read_all


@pytest.fixture
def site():
    with Site() as made:
        yield made


def pump(sock: socket.socket, data: bytes) -> threading.Thread:
    """Send and half-close in a thread."""

    def run() -> None:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


@pytest.mark.parametrize("channels", [1, 5])
def test_bytes_flow_both_ways_identical(site: Site, channels: int) -> None:
    with site.pair(channel_spec(channels, rekey_records=7, rekey_bytes=1 << 20)) as pair:
        ends = [pair.connect() for _ in range(channels)]
        forth = [random.Random(n).randbytes(3_000_000 + n) for n in range(channels)]
        back = [random.Random(-n).randbytes(100_000 + n) for n in range(channels)]
        got_forth, got_back = [b""] * channels, [b""] * channels

        def take(into: list[bytes], n: int, sock: socket.socket) -> None:
            into[n] = read_all(sock)

        threads = [pump(near, forth[n]) for n, (near, _) in enumerate(ends)]
        threads += [pump(far, back[n]) for n, (_, far) in enumerate(ends)]
        threads += [threading.Thread(target=take, args=(got_forth, n, far)) for n, (_, far) in enumerate(ends)]
        threads += [threading.Thread(target=take, args=(got_back, n, near)) for n, (near, _) in enumerate(ends)]
        for thread in threads[2 * channels :]:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert [hashlib.sha256(d).digest() for d in got_forth] == [hashlib.sha256(d).digest() for d in forth]
        assert got_back == back
        for relay in (pair.source, pair.target):
            relay.event("drained")
            assert [e["type"] for e in relay.events()] == ["connected", "drained"]
        status = pair.source.status()
        assert status["state"] == "drained"
        assert (status["sealed_out"], status["sealed_in"]) == (sum(map(len, forth)), sum(map(len, back)))
        assert status["cipher"] == "AES-256-GCM"
        assert status["channels"] == channels
        assert status["rekeys_out"] > channels
        assert status["rekeys_in"] >= channels
        assert status["refused"] == {}
        assert pair.target.status()["sealed_in"] == status["sealed_out"] == status["acked_out"]
        assert {"connected", "local", "first_byte"} <= status["marks"].keys()
        assert status["marks"]["first_byte"] >= status["marks"]["connected"]


def test_half_close_passes_through_and_the_other_way_stays_open(site: Site) -> None:
    with site.pair() as pair:
        near, far = pair.connect()
        near.sendall(b"all there is")
        near.shutdown(socket.SHUT_WR)
        assert read_all(far) == b"all there is"
        assert not select.select([near], [], [], 0)[0], "the way back must still be open"
        far.sendall(b"understood")
        assert near.recv(64) == b"understood"
        assert pair.source.status()["state"] == "flowing"
        far.close()
        assert near.recv(64) == b""
        pair.source.event("drained")
        pair.target.event("drained")


def test_small_writes_are_not_held_back(site: Site) -> None:
    with site.pair() as pair:
        near, far = pair.connect()
        for n in range(50):
            near.sendall(b"%d" % n)
            assert far.recv(16) == b"%d" % n


def test_target_opens_local_connections_in_channel_order_however_they_arrive(site: Site) -> None:
    spec, secret = channel_spec(4), os.urandom(40)
    target = TargetSide(site, spec, secret)
    hands: dict[int, ByHand] = {}
    try:
        for n in (3, 4, 2):
            hands[n] = ByHand(site.port, spec, secret, n)
            hands[n].hello()
            hands[n].prove()
            hands[n].write(b"channel %d" % n)
        assert target.relay.status()["state"] == "listening"
        assert target.nothing_came(), "nothing may be opened before the main stream's turn"
        hands[1] = ByHand(site.port, spec, secret, 1)
        hands[1].hello()
        hands[1].prove()
        hands[1].write(b"channel 1")
        for n in (1, 2, 3, 4):
            with target.accept() as local:
                assert local.recv(64) == b"channel %d" % n
    finally:
        for hand in hands.values():
            hand.sock.close()
        target.close()


def test_messages_pass_both_ways_and_are_waited_for(site: Site) -> None:
    with site.pair() as pair:
        pair.target.event("connected")
        assert pair.source.ask("send", message={"type": "READY", "text": "grüße", "n": [1, 2]})["sent"]
        ready = pair.target.event("message")
        assert ready["message"] == {"type": "READY", "text": "grüße", "n": [1, 2]}
        later = pair.target.ask("wait", after=ready["seq"], timeout=0)
        assert later["events"] == []
        for n in range(100):
            pair.target.ask("send", message={"type": "COMMIT", "n": n})
        assert pair.source.event("message", nth=100)["message"]["n"] == 99
        assert [e["seq"] for e in pair.source.events()] == list(range(1, 102))


def test_a_wait_is_answered_when_the_event_comes_and_blocks_nobody(site: Site) -> None:
    with site.pair() as pair:
        pair.source.event("connected")
        seen = len(pair.target.events())
        answers: list[dict] = []
        waiting = Relay(os.getpid(), pair.target.directory, "")
        thread = threading.Thread(
            target=lambda: answers.append(waiting.ask("wait", after=seen, timeout=PATIENCE)), daemon=True
        )
        thread.start()
        assert pair.target.status()["relay"] == 1
        pair.source.ask("send", message={"type": "RUNNING"})
        thread.join(PATIENCE)
        assert [e["message"] for e in answers[0]["events"]] == [{"type": "RUNNING"}]
        waiting._steering.close()
        os.close(waiting.pidfd)


def test_messages_sent_before_the_peer_is_there_arrive_when_it_is(site: Site) -> None:
    spec, secret = channel_spec(), os.urandom(40)
    target = TargetSide(site, spec, secret)
    target.relay.ask("send", message={"type": "READY"})
    source = site.start_source(spec, secret)
    assert source.event("message")["message"] == {"type": "READY"}
    target.close()


@pytest.mark.parametrize(
    ("request_fields", "slug"),
    [
        ({"op": "send", "message": {"no": "type"}}, "invalid_input"),
        ({"op": "send", "message": {"type": "X", "long": "x" * 5000}}, "invalid_input"),
        ({"op": "send"}, "invalid_input"),
        ({"op": "dance"}, "invalid_input"),
        ({"op": "wait", "after": "x"}, "invalid_input"),
    ],
)
def test_wrong_requests_are_refused_and_harm_nothing(site: Site, request_fields: dict, slug: str) -> None:
    with site.pair() as pair:
        answer = pair.source.ask(**request_fields)
        assert answer["error"] == slug
        assert pair.source.status()["state"] in ("listening", "connected")


def test_heartbeats_tell_the_clock_offset(site: Site) -> None:
    with site.pair() as pair:
        status = pair.source.until(lambda status: status["rtt_us"] is not None and status["rtt_us"] < 100_000)
        assert status["rtt_us"] >= 0
        assert abs(status["clock_offset_us"]) < 50_000, "it is half a round trip off at most"


def test_a_back_pressured_data_channel_delays_no_message(site: Site) -> None:
    with site.pair(silence_s=1.0) as pair:
        near, far = pair.connect()
        near.setblocking(False)
        chunk = bytes(1 << 20)
        while select.select([], [near], [], 0.5)[1]:  # until nothing more fits anywhere
            near.send(chunk)
        pair.source.until(lambda status: status["sealed_out"] > 0)
        for n in range(3):
            pair.source.ask("send", message={"type": "COMMIT", "n": n})
        assert pair.target.event("message", nth=3)["message"]["n"] == 2
        for _ in range(5):  # this machine may stand still as if the other one were silent, but not again and again
            seen = len(pair.source.events())
            if not (came := pair.source.ask("wait", after=seen, timeout=2.0)["events"]):
                break
        assert came == [], "back-pressure is not silence"
        assert "broken" not in {event["type"] for event in pair.source.events()}
        assert far.recv(16)


def test_close_removes_everything_and_ends_both_processes(site: Site) -> None:
    with site.pair() as pair:
        near, far = pair.connect()
        near.close()
        assert far.recv(1) == b""
        far.close()
        pair.source.event("drained")
        pair.target.event("drained")
        pair.target.ask("send", message={"type": "RUNNING"})
        assert pair.target.close() == 0
        assert pair.source.event("message")["message"] == {"type": "RUNNING"}, "the last message must not be lost"
        assert pair.source.event("broken")["slug"] == "peer_closed"
        assert pair.source.close() == 0
        assert os.listdir(pair.source.directory) == []
        assert os.listdir(pair.target.directory) == ["incoming.sock"]
        assert os.listdir(site.doors) == []


def test_sigterm_ends_a_relay_cleanly(site: Site) -> None:
    with site.pair() as pair:
        near, far = pair.connect()
        pair.source.signal(signal.SIGTERM)
        assert pair.source.exit_status() == 0
        assert read_all(near) == b""
        assert read_all(far) == b""
        assert pair.target.event("broken")["slug"] == "peer_closed"
        assert os.listdir(pair.source.directory) == []


def test_a_relay_outlives_the_process_that_started_it(site: Site) -> None:
    spec, secret = channel_spec(), os.urandom(40)
    target = TargetSide(site, spec, secret)
    directory = site.directory()
    starter = (
        "import asyncio, os, sys; sys.path.insert(0, 'tests')\n"
        "from sealift.channel.relay_client import start_relay\n"
        "from sealift.channel.relay_spec import RelaySpec\n"
        "from sealift.channel.protocol import ChannelSpec\n"
        "raw = sys.stdin.buffer.read(); fields = [raw[n * 16:n * 16 + 16] for n in range(4)]\n"
        f"spec = ChannelSpec(*fields, *{(spec.plan.value, spec.version, 1, spec.window, 1 << 24, 1 << 36)!r})\n"
        f"spec = RelaySpec('source', spec, {directory!r}, {os.getpid()}, target='127.0.0.1:{site.port}')\n"
        f"print(asyncio.run(start_relay('relay', spec, raw[64:], {directory + '.log'!r})), flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    given = spec.attempt + spec.subject + spec.source + spec.target + secret
    done = subprocess.run([sys.executable, "-c", starter], input=given, capture_output=True, timeout=60)
    assert done.returncode == -9, done.stderr
    pid = int(done.stdout)
    relay = Relay(pid, directory, "")
    try:
        relay.event("connected")
        with dial_local(directory) as near:
            near.sendall(b"still here")
            with target.accept() as far:
                assert far.recv(64) == b"still here"
        assert os.getsid(pid) == pid, "the relay must have a session of its own"
        assert relay.ask("close")["closed"]
        assert relay.ended()
    finally:
        relay._steering.close()
        os.close(relay.pidfd)
        target.close()


def test_the_key_is_nowhere_to_be_seen(site: Site) -> None:
    key = os.urandom(40)
    with site.pair(secret=key) as pair:
        pair.source.event("connected")
        for relay in (pair.source, pair.target):
            public = proc(relay.pid, "cmdline") + proc(relay.pid, "environ") + Path(relay.log).read_bytes()
            for secret in (key, key[:32], key[32:]):
                assert secret not in public
                assert secret.hex().encode() not in public.lower()
            assert b"--spec-fd" in public


def test_wrong_process_at_the_local_socket_is_refused_and_the_right_one_still_let_in(site: Site) -> None:
    with site.pair() as pair:
        code = (
            "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])\n"
            "s.settimeout(20); print(s.recv(1) == b'')"
        )
        path = f"{pair.source.directory}/migrate.sock"
        stranger = subprocess.run([sys.executable, "-c", code, path], capture_output=True, timeout=60)
        assert stranger.stdout == b"True\n"
        assert pair.source.event("refused")["slug"] == "local_peer_refused"
        near, far = pair.connect()
        near.sendall(b"x")
        assert far.recv(1) == b"x"
        assert not os.path.exists(path), "the listener must be gone once every planned connection is there"


def test_wrong_process_at_the_targets_socket_ends_the_move(site: Site) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        spec, secret = channel_spec(), os.urandom(40)
        target = TargetSide(site, spec, secret, qemu_pid=other.pid)
        source = site.start_source(spec, secret)
        with dial_local(source.directory) as near:
            assert target.relay.event("broken")["slug"] == "local_peer_refused"
            assert source.event("broken")["slug"] == "peer_closed"
            assert read_all(near) == b""
        target.close()
        other.communicate(b"\n", timeout=PATIENCE)


def test_one_target_memory_stays_small_with_four_data_channels(site: Site) -> None:
    with site.pair(channel_spec(4, window=16 << 20)) as pair:
        ends = [pair.connect() for _ in range(4)]
        data = os.urandom(16 << 20)
        threads = [pump(near, data) for near, _ in ends]
        for _, far in ends:
            assert read_all(far) == data
        for thread in threads:
            thread.join(PATIENCE)
        for relay in (pair.source, pair.target):
            peak = next(line for line in proc(relay.pid, "status").splitlines() if line.startswith(b"VmHWM:"))
            assert int(peak.split()[1]) <= 64 << 10
