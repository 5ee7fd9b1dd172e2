"""Whatever is done to the wire: a named error, not one wrong byte for QEMU, and other moves do not notice."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Iterator

import pytest

from sealift.channel.protocol import PREFACE_BYTES, Kind, Preface
from support.middle import Middle, Passing
from support.relays import PATIENCE, ByHand, Pair, Site, TargetSide, channel_spec, dial_local, exactly, read_all

DATA = bytes(range(256)) * 4096  # 1 MiB, so that it takes several records
RECORD = 64 << 10


@pytest.fixture
def site():
    with Site() as made:
        yield made


def meant(number: int, record: bytes) -> bool:
    """The fourth record of each connection, if it carries enough of the stream that more will follow."""
    return number == 3 and len(record) > 1000


def flip(offset: int, least: int = 1000):
    """Flip one bit of the fourth record, if it has ``least`` bytes."""

    def harm(passing: Passing, number: int, record: bytes) -> bytes:
        if number != 3 or len(record) < least:
            return record
        changed = bytearray(record)
        changed[offset] ^= 1
        return bytes(changed)

    return harm


def truncate(passing: Passing, number: int, record: bytes) -> bytes | None:
    return None if meant(number, record) else record


def half_a_record(passing: Passing, number: int, record: bytes) -> bytes | None:
    if not meant(number, record):
        return record
    passing.target.sendall(record[: len(record) // 2])
    return None


def drop(passing: Passing, number: int, record: bytes) -> bytes:
    return b"" if meant(number, record) else record


def replay(passing: Passing, number: int, record: bytes) -> bytes:
    return record * 2 if meant(number, record) else record


def oversize(passing: Passing, number: int, record: bytes) -> bytes:
    return record[:1] + b"\xff\xff\xff" + record[4:] if meant(number, record) else record


def unknown_type(passing: Passing, number: int, record: bytes) -> bytes:
    return b"\x63" + record[1:] if meant(number, record) else record


def reserved_type(passing: Passing, number: int, record: bytes) -> bytes:
    return b"\x02\x00\x00\x10" + record[4:] if meant(number, record) else record


def forged_end(passing: Passing, number: int, record: bytes) -> bytes:
    return b"\x05\x00\x00\x00" + bytes(16) if meant(number, record) else record


def make_reorder():
    kept = b""

    def harm(passing: Passing, number: int, record: bytes) -> bytes:
        nonlocal kept
        if meant(number, record):
            kept = record
            return b""
        follows, kept = record + kept, b""
        return follows

    return harm


@pytest.mark.parametrize(
    ("harm", "slug"),
    [
        pytest.param(flip(100), "record_forged", id="flipped in the ciphertext"),
        pytest.param(flip(-1), "record_forged", id="flipped in the tag"),
        pytest.param(truncate, "stream_truncated", id="truncated between records"),
        pytest.param(half_a_record, "stream_truncated", id="truncated in a record"),
        pytest.param(drop, "record_forged", id="record dropped"),
        pytest.param(replay, "record_forged", id="record replayed"),
        pytest.param(make_reorder(), "record_forged", id="records swapped"),
        pytest.param(oversize, "record_oversize", id="oversize length"),
        pytest.param(unknown_type, "record_unexpected", id="unknown type"),
        pytest.param(reserved_type, "record_unexpected", id="reserved type"),
        pytest.param(forged_end, "record_forged", id="forged end of stream"),
    ],
)
def test_harm_to_a_record_costs_connections_and_not_one_byte(site: Site, harm, slug: str) -> None:
    """Every connection of the channel is harmed anew; what was sound before the harm is progress all the same."""
    with (
        Middle(site.port, forward=harm) as middle,
        site.pair(port=middle.port, record_bytes=RECORD) as pair,
        site.pair() as other,
    ):
        other_near, other_far = other.connect()
        near, far = pair.connect()
        near.sendall(DATA)
        near.shutdown(socket.SHUT_WR)
        assert read_all(far) == DATA
        far.close()
        assert read_all(near) == b""
        for relay in (pair.source, pair.target):
            relay.event("drained")
            assert "broken" not in [e["type"] for e in relay.events()]
        if slug == "stream_truncated":  # either side may see the cut first
            assert slug in pair.source.status()["interrupted"] | pair.target.status()["interrupted"]
        else:
            assert slug in pair.target.status()["interrupted"]
            assert slug in {e["slug"] for e in pair.target.events() if e["type"] == "interrupted"}
        assert pair.source.status()["reconnects"] > 0
        check_alive(other, other_near, other_far)


def check_alive(pair: Pair, near: socket.socket, far: socket.socket) -> None:
    """The move goes on, both ways, messages too."""
    near.sendall(b"forth")
    assert far.recv(16) == b"forth"
    far.sendall(b"back")
    assert near.recv(16) == b"back"
    pair.source.ask("send", message={"type": "COMMIT"})
    assert pair.target.event("message")["message"] == {"type": "COMMIT"}
    assert [e["type"] for e in pair.source.events()] == ["connected"]
    assert pair.target.status()["refused"] == {}


@pytest.mark.parametrize("channel", [0, 1])
def test_flipped_bit_on_the_way_back_is_found_by_the_source(site: Site, channel: int) -> None:
    with Middle(site.port, channel=channel, backward=flip(10, least=21)) as middle, site.pair(port=middle.port) as pair:
        near, far = pair.connect()
        for n in range(10):
            pair.target.ask("send", message={"type": "READY", "n": n})
            far.sendall(b"%08d" % n)
            assert exactly(near, 8) == b"%08d" % n  # so that each is a record of its own
            assert pair.source.event("message", nth=n + 1)["message"]["n"] == n
        assert pair.source.event("interrupted")["slug"] == "record_forged"
        messages = [e["message"]["n"] for e in pair.source.events() if e["type"] == "message"]
        assert messages == list(range(10)), "no message may be lost or doubled"


def test_a_record_reflected_to_its_sender_is_refused(site: Site) -> None:
    def reflect(passing: Passing, number: int, record: bytes) -> bytes:
        if number == 2:
            passing.source.sendall(record)
        return record

    with Middle(site.port, forward=reflect) as middle, site.pair(port=middle.port, record_bytes=RECORD) as pair:
        near, far = pair.connect()
        near.sendall(DATA[: 4 * RECORD])
        assert pair.source.event("interrupted")["slug"] == "record_forged"
        assert exactly(far, 4 * RECORD) == DATA[: 4 * RECORD]
        near.setblocking(False)
        with pytest.raises(BlockingIOError):  # the reflected bytes must not come back to the source's QEMU
            near.recv(1)


@pytest.mark.parametrize("changed", ["psk", "nonce", "subject"])
def test_wrong_key_nonce_or_spec_is_refused_and_counted_and_the_right_one_let_in(site: Site, changed: str) -> None:
    spec, secret = channel_spec(), os.urandom(40)
    target = TargetSide(site, spec, secret)
    wrong, wrong_secret = spec, bytearray(secret)
    if changed == "subject":
        wrong = channel_spec(attempt=spec.attempt)
    else:
        wrong_secret[0 if changed == "psk" else -1] ^= 1
    bad = site.start_source(wrong, bytes(wrong_secret), patience_s=0.3)
    assert bad.event("broken")["slug"] == "handshake_failed"
    assert target.relay.event("refused")["slug"] == "handshake_failed"
    good = site.start_source(spec, secret)
    good.event("connected")
    target.relay.event("connected")
    assert set(target.relay.status()["refused"]) == {"handshake_failed"}
    target.close()


def test_a_recorded_connection_replayed_against_the_live_one_does_nothing(site: Site) -> None:
    with Middle(site.port) as middle, site.pair(port=middle.port) as pair:
        near, far = pair.connect()
        near.sendall(b"secret")
        assert far.recv(16) == b"secret"
        recorded = {p.channel: bytes(p.seen) for p in middle.connections}
        assert len(recorded[1]) > PREFACE_BYTES + 48 + 36 + 20
        for n, channel in enumerate((0, 1), start=1):
            with socket.create_connection(("127.0.0.1", site.port), timeout=PATIENCE) as again:
                again.sendall(recorded[channel])
                assert read_all(again) == b""
            assert pair.target.event("refused", nth=n)["slug"] == "epoch_stale"
        near.sendall(b"still")
        assert far.recv(16) == b"still"
        pair.source.ask("send", message={"type": "COMMIT"})
        pair.target.event("message")
        assert pair.target.status()["state"] == "flowing"
        assert pair.target.status()["refused"] == {"epoch_stale": 2}


def test_a_fresh_message_1_replayed_gets_an_answer_but_never_a_connection(site: Site) -> None:
    """Recorded before it was confirmed, so its epoch is not stale: the reason why the first record must verify."""
    with site.pair() as pair:
        near, far = pair.connect()
        near.sendall(b"before")
        assert far.recv(16) == b"before"
        hand = ByHand(site.port, pair.spec, pair.secret, channel=1, epoch=7)
        hand.hello()
        exactly(hand.sock, 48)
        hand.sock.close()
        assert pair.target.event("refused")["slug"] == "open_missing"
        with socket.create_connection(("127.0.0.1", site.port), timeout=PATIENCE) as replayed:
            replayed.sendall(hand.sent)
            assert len(exactly(replayed, 48)) == 48
            replayed.sendall(bytes(36))
            assert read_all(replayed) == b""
        assert pair.target.event("refused", nth=2)["slug"] in ("record_unexpected", "record_forged")
        near.sendall(b"after")
        assert far.recv(16) == b"after"
        assert pair.target.status()["channels"] == 1


def test_silence_after_the_handshake_is_given_up_and_disturbs_nothing(site: Site) -> None:
    with site.pair(at_target={"patience_s": 0.5}) as pair:
        near, far = pair.connect()
        hand = ByHand(site.port, pair.spec, pair.secret, channel=1, epoch=7)
        hand.hello()
        assert len(exactly(hand.sock, 48)) == 48
        assert hand.refused()
        hand.sock.close()
        pair.target.refusal("open_missing")
        near.sendall(b"x")
        assert far.recv(1) == b"x"


@pytest.mark.parametrize(
    ("kind", "channel", "plain"),
    [
        (Kind.MAIN, 2, False),
        (Kind.MULTIFD, 1, False),
        (Kind.DISK, 1, False),
        (Kind.MULTIFD, 9, False),
        (Kind.MAIN, 1, True),
    ],
)
def test_wrong_channel_kind_or_number_is_refused(site: Site, kind: Kind, channel: int, plain: bool) -> None:
    with site.pair(channel_spec(2)) as pair:
        pair.target.event("connected")
        preface = Preface(plain, 1, kind, channel, pair.spec.attempt, 1)
        with socket.create_connection(("127.0.0.1", site.port), timeout=PATIENCE) as sock:
            sock.sendall(preface.encode() + bytes(48))
            assert read_all(sock) == b""
        assert pair.target.event("refused")["slug"] == "channel_unexpected"
        assert pair.target.status()["state"] == "connected"


def test_only_eight_unproven_connections_are_kept_and_the_oldest_goes_first(site: Site) -> None:
    with site.pair(patience_s=3 * PATIENCE) as pair:
        pair.target.event("connected")
        hands = []
        for epoch in range(1, 11):
            hand = ByHand(site.port, pair.spec, pair.secret, channel=1, epoch=epoch)
            hand.hello()
            assert len(exactly(hand.sock, 48)) == 48
            hands.append(hand)
        assert hands[0].refused()
        assert hands[1].refused()
        pair.target.event("refused", nth=2)
        assert pair.target.status()["refused"] == {"open_missing": 2}
        for hand in hands:
            hand.sock.close()


def test_a_flood_of_refusals_is_counted_and_listed_only_in_part(site: Site) -> None:
    with site.pair() as pair:
        pair.target.event("connected")
        preface = Preface(False, 1, Kind.MAIN, 9, pair.spec.attempt, 1).encode()
        for _ in range(100):
            with socket.create_connection(("127.0.0.1", site.port), timeout=PATIENCE) as sock:
                sock.sendall(preface)
                assert read_all(sock) == b""
        assert pair.target.status()["refused"] == {"channel_unexpected": 100}
        assert len(pair.target.events()) == 65


@contextlib.contextmanager
def stopped(pair: Pair) -> Iterator[None]:
    """The target's relay stands still, and each side has the time of a switchover for the outage that comes of it."""
    pair.target.signal(signal.SIGSTOP)
    try:
        pair.source.ask("phase", phase="switchover")
        yield
    finally:
        pair.target.signal(signal.SIGCONT)
    pair.target.ask("phase", phase="switchover")


def test_silent_peer_closes_the_local_sockets(site: Site) -> None:
    with site.pair(silence_s=0.6, switchover_timeout_s=0.5) as pair:
        near, far = pair.connect()
        near.sendall(b"x")
        assert far.recv(1) == b"x"
        with stopped(pair):
            assert read_all(near) == b""
            broken = pair.source.event("broken")
        assert broken["slug"] == "peer_silent"
        assert "0.6" in broken["what"]
        assert pair.target.event("broken")["slug"] in ("peer_closed", "peer_silent", "stream_truncated")
        assert read_all(far) == b""


def test_silent_peer_behind_full_sockets_still_ends_the_move(site: Site) -> None:
    with site.pair(silence_s=0.6, switchover_timeout_s=0.5) as pair:
        near, far = pair.connect()
        near.settimeout(None)
        with stopped(pair):
            with contextlib.suppress(ConnectionError):
                while True:  # until the relay closes the socket
                    near.sendall(bytes(1 << 20))
            assert pair.source.event("broken")["slug"] == "peer_silent"
        assert set(read_all(far)) <= {0}
        pair.target.event("broken")


def test_a_killed_relay_is_given_up(site: Site) -> None:
    with site.pair(give_up_s=0.5) as pair:
        near, far = pair.connect()
        pair.target.signal(signal.SIGKILL)
        assert read_all(near) == b""
        assert pair.source.event("broken")["slug"] == "stream_truncated"
        assert "could not be resumed" in pair.source.event("broken")["what"]
        assert read_all(far) == b""


def test_local_process_gone_at_the_target_closes_the_source_side(site: Site) -> None:
    with site.pair() as pair:
        near, far = pair.connect()
        far.close()
        with contextlib.suppress(ConnectionError):
            while True:  # until the relay closes the socket
                near.sendall(bytes(1 << 16))
        assert pair.target.event("broken")["slug"] == "local_closed"
        assert pair.source.event("broken")["slug"] == "peer_closed"
        assert "closed its socket" in pair.source.event("broken")["what"]


def test_nobody_listens_at_the_target(site: Site) -> None:
    spec, secret = channel_spec(), os.urandom(40)
    target = TargetSide(site, spec, secret, listens=False)
    source = site.start_source(spec, secret)
    with dial_local(source.directory) as near:
        assert target.relay.event("broken")["slug"] == "local_closed"
        assert source.event("broken")["slug"] == "peer_closed"
        assert read_all(near) == b""
    target.close()


def test_abort_closes_local_sockets_and_stays_to_report(site: Site) -> None:
    with site.pair() as pair:
        near, far = pair.connect()
        assert pair.source.ask("abort", reason="cancelled by a person")["aborted"]
        assert read_all(near) == b""
        assert read_all(far) == b""
        broken = pair.source.event("broken")
        assert broken["slug"] == "channel_aborted"
        assert "cancelled by a person" in broken["what"]
        assert pair.target.event("broken")["slug"] == "peer_closed"
        assert pair.source.ask("send", message={"type": "READY"})["error"] == "conflict"
        assert pair.source.status()["state"] == "broken"
        assert pair.source.close() == 0
        assert pair.target.close() == 0


def test_unreachable_target_is_named(site: Site) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    source = site.start_source(channel_spec(), os.urandom(40), port=port, patience_s=0.3)
    with contextlib.suppress(FileNotFoundError, ConnectionRefusedError), dial_local(source.directory) as near:
        assert read_all(near) == b""  # unless it had given up before there was anybody to tell
    assert source.event("broken")["slug"] == "peer_unreachable"
    assert str(port) in source.event("broken")["what"]


def test_a_source_waits_a_while_for_the_target_to_come(site: Site) -> None:
    spec, secret = channel_spec(), os.urandom(40)
    source = site.start_source(spec, secret)
    target = TargetSide(site, spec, secret)
    source.event("connected")
    target.close()
