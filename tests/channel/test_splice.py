"""Plain moves: same sockets and same control as sealed ones, admitted by token, address and once; nothing is sealed."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest

from sealift.channel.control_frames import encode_frame
from sealift.channel.protocol import CHANNEL_VERSION, Kind, Plan, Preface, kind_of
from sealift.channel.relay_client import start_relay
from sealift.channel.relay_spec import RelaySpec
from sealift.errors import InvalidInput
from support.relays import PATIENCE, Site, TargetSide, channel_spec, exactly, proc, read_all


@pytest.fixture
def site():
    with Site() as made:
        yield made


def plain_spec(channels: int = 1):
    return channel_spec(channels, Plan.PLAIN)


def offer(site: Site, token: bytes, channel: int, *, kind: Kind | None = None, plain: bool = True) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", site.port), timeout=PATIENCE)
    sock.sendall(Preface(plain, CHANNEL_VERSION, kind or kind_of(channel), channel, token, 1).encode())
    return sock


@pytest.mark.parametrize("channels", [1, 3])
def test_bytes_flow_both_ways_and_half_close_passes(site: Site, channels: int) -> None:
    with site.pair(plain_spec(channels)) as pair:
        ends = [pair.connect() for _ in range(channels)]
        for n, (near, far) in enumerate(ends):
            near.sendall(b"forth %d" % n)
            near.shutdown(socket.SHUT_WR)
            assert read_all(far) == b"forth %d" % n
            far.sendall(b"back")
            far.close()
            assert read_all(near) == b"back"
        pair.source.event("drained")
        pair.target.event("drained")
        status = pair.target.status()
        assert status["cipher"] is None
        assert (status["sealed_in"], status["sealed_out"], status["records_in"]) == (0, 0, 0)
        assert status["plain_in"] == 7 * channels
        assert status["plain_out"] == 4 * channels
        assert pair.source.close() == 0
        assert pair.target.close() == 0
        assert os.listdir(site.doors) == []


def test_a_lot_of_bytes_arrive_identical(site: Site) -> None:
    data = os.urandom(20 << 20)
    with site.pair(plain_spec()) as pair:
        near, far = pair.connect()

        def write() -> None:
            near.sendall(data)
            near.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=write)
        thread.start()
        assert read_all(far) == data
        thread.join(PATIENCE)


def test_what_moves_is_in_clear_on_the_wire(site: Site) -> None:
    """The counterpart of every test that finds nothing on a sealed wire: here it must be found."""
    spec, token = plain_spec(), os.urandom(16)
    with TargetListener() as listener:
        source = site.start_source(spec, token, port=listener.port)
        control = listener.accept()
        assert exactly(control, 28) == Preface(True, 1, Kind.CONTROL, 0, token, 1).encode()
        control.sendall(encode_frame({"type": "HEARTBEAT", "clock": 5, "heard": 0, "held": 0}))
        source.event("connected")
        near = socket.socket(socket.AF_UNIX)
        near.connect(f"{source.directory}/migrate.sock")
        near.sendall(b"memory of the guest")
        main = listener.accept()
        assert exactly(main, 28 + 19)[28:] == b"memory of the guest"
        for sock in (near, main, control):
            sock.close()


class TargetListener:
    """A host without a doorman: the test itself takes the connections."""

    def __init__(self) -> None:
        self._sock = socket.create_server(("127.0.0.1", 0))
        self._sock.settimeout(PATIENCE)
        self.port = self._sock.getsockname()[1]

    def __enter__(self) -> TargetListener:
        return self

    def __exit__(self, *exc: object) -> None:
        self._sock.close()

    def accept(self) -> socket.socket:
        sock, _ = self._sock.accept()
        sock.settimeout(PATIENCE)
        return sock


def test_wrong_token_never_reaches_the_splice(site: Site) -> None:
    with site.pair(plain_spec()) as pair:
        with offer(site, os.urandom(16), 1) as stranger:
            assert read_all(stranger) == b""
        assert pair.target.status()["refused"] == {}


def test_wrong_token_at_the_very_door_is_refused_too(site: Site) -> None:
    spec, token = plain_spec(), os.urandom(16)
    target = TargetSide(site, spec, token)
    other = os.urandom(16)
    os.symlink(target.door, f"{site.doors}/{other.hex()}.sock")
    with offer(site, other, 1) as stranger:
        assert read_all(stranger) == b""
    assert target.relay.event("refused")["slug"] == "channel_unexpected"
    assert target.nothing_came()
    target.close()


def test_wrong_address_is_refused(site: Site) -> None:
    spec, token = plain_spec(), os.urandom(16)
    target = TargetSide(site, spec, token, source_address="192.0.2.7")
    with offer(site, token, 1) as stranger:
        assert read_all(stranger) == b""
    refused = target.relay.event("refused")
    assert refused["slug"] == "channel_unexpected"
    assert "address" in refused["what"]
    assert target.nothing_came()
    target.close()


def test_each_channel_is_admitted_once(site: Site) -> None:
    with site.pair(plain_spec()) as pair:
        near, far = pair.connect()
        for channel in (0, 1):
            with offer(site, pair.secret, channel) as again:
                assert read_all(again) == b""
        pair.target.event("refused", nth=2)
        assert pair.target.status()["refused"] == {"epoch_stale": 2}
        near.sendall(b"x")
        assert far.recv(1) == b"x"
        pair.source.ask("send", message={"type": "COMMIT"})
        pair.target.event("message")


@pytest.mark.parametrize(
    ("channel", "kind", "plain"), [(1, Kind.MULTIFD, True), (9, Kind.MULTIFD, True), (1, Kind.MAIN, False)]
)
def test_wrong_channel_kind_or_sealed_preface_is_refused(site: Site, channel: int, kind: Kind, plain: bool) -> None:
    with site.pair(plain_spec()) as pair:
        pair.target.event("connected")
        with offer(site, pair.secret, channel, kind=kind, plain=plain) as stranger:
            assert read_all(stranger) == b""
        assert pair.target.event("refused")["slug"] == "channel_unexpected"


def test_messages_clock_and_abort_work_as_in_a_relay(site: Site) -> None:
    with site.pair(plain_spec()) as pair:
        near, far = pair.connect()
        pair.source.ask("send", message={"type": "COMMIT", "n": 1})
        assert pair.target.event("message")["message"] == {"type": "COMMIT", "n": 1}
        status = pair.source.until(lambda status: status["rtt_us"] is not None and status["rtt_us"] < 100_000)
        assert abs(status["clock_offset_us"]) < 50_000
        pair.target.ask("abort", reason="cancelled")
        assert read_all(near) == b""
        assert read_all(far) == b""
        assert pair.source.event("broken")["slug"] == "peer_closed"
        assert pair.target.event("broken")["slug"] == "channel_aborted"


def test_silent_peer_closes_the_local_sockets(site: Site) -> None:
    with site.pair(plain_spec(), at_source={"silence_s": 0.6}) as pair:
        near = pair.dial()
        pair.source.event("connected")
        pair.target.signal(signal.SIGSTOP)
        try:
            assert read_all(near) == b""
            assert pair.source.event("broken")["slug"] == "peer_silent"
        finally:
            pair.target.signal(signal.SIGCONT)


def test_reset_of_a_data_connection_ends_the_move(site: Site) -> None:
    with site.pair(plain_spec()) as pair:
        near, far = pair.connect()
        near.sendall(b"x")
        assert far.recv(1) == b"x"
        pair.target.signal(signal.SIGKILL)
        assert pair.source.event("broken")["slug"] in ("stream_truncated", "peer_closed")
        assert read_all(near) == b""


def test_a_relay_refuses_a_plain_order_and_a_splice_a_sealed_one(site: Site) -> None:
    for kind, spec, size in (("relay", plain_spec(), 16), ("splice", channel_spec(), 40)):
        order = RelaySpec("source", spec, site.directory(), os.getpid(), target="127.0.0.1:1")
        with pytest.raises(InvalidInput, match="plan"):
            asyncio.run(start_relay(kind, order, os.urandom(size), f"{site.root}/log"))
        assert os.listdir(order.directory) == []


def test_splice_contains_no_cipher_code(site: Site) -> None:
    with site.pair(plain_spec()) as pair:
        near, far = pair.connect()
        near.sendall(b"x")
        assert far.recv(1) == b"x"
        for splice in (pair.source, pair.target):
            maps = proc(splice.pid, "maps")
            assert b"python" in maps
            assert b"cryptography" not in maps
    code = "import sys, sealift.entry.splice, sealift.entry.doorman; print([m for m in sys.modules if 'crypto' in m])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).stdout == b"[]\n"
