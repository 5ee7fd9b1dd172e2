"""Peers that are slow, silent, many, or say what was said before: a channel in use notices none of them."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import socket
import threading
from collections.abc import Iterator

import pytest

from sealift.channel.protocol import MESSAGE_BYTES, PREFACE_BYTES, RECORD_OVERHEAD
from support.flow import Flow
from support.middle import Middle, Passing
from support.relays import PATIENCE, ByHand, Pair, Site, channel_spec, exactly, read_all

RESUME_BYTES = 16 + RECORD_OVERHEAD
ACK_BYTES = 8 + RECORD_OVERHEAD
FRESH = 1000
"""An epoch above all that a source gets to."""


@pytest.fixture(scope="module", autouse=True)
def many_descriptors() -> Iterator[None]:
    """A test holds a thousand connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def site() -> Iterator[Site]:
    with Site() as made:
        yield made


def visit(site: Site, origin: str = "127.0.0.1") -> socket.socket:
    return socket.create_connection(("127.0.0.1", site.port), timeout=PATIENCE, source_address=(origin, 0))


def test_peers_that_say_one_byte_a_second_are_given_up(site: Site) -> None:
    """To the doorman, and to the relay in the handshake and in the first record after it."""
    with site.pair(at_target={"patience_s": 3.0}) as pair, Flow(pair), contextlib.ExitStack() as stack:
        preface = pair.spec.preface(1, FRESH).encode()
        at_the_door, in_message_1 = (stack.enter_context(visit(site)) for _ in range(2))
        in_message_1.sendall(preface)
        hand = ByHand(site.port, pair.spec, pair.secret, channel=1, epoch=FRESH)
        in_first_record = stack.enter_context(hand.sock)
        hand.hello()
        hand.answered()
        rests = {
            at_the_door: preface,
            in_message_1: hand.sent[PREFACE_BYTES:],
            in_first_record: bytes(hand.sending.resume(0, 0)),
        }
        slow = dict(rests)
        while slow:
            for sock, rest in slow.items():
                with contextlib.suppress(ConnectionError):
                    sock.sendall(rest[:1])
                assert rest, "one that is this slow was waited for"
                slow[sock] = rest[1:]
            for sock in select.select(list(slow), [], [], 1.0)[0]:
                assert read_all(sock) == b"", "nobody is told anything"
                del slow[sock]
        pair.target.event("refused", nth=2)
        assert pair.target.status()["refused"] == {"handshake_failed": 1, "open_missing": 1}


def test_a_thousand_connections_that_say_nothing(site: Site) -> None:
    with site.pair() as pair, Flow(pair) as flow, contextlib.ExitStack() as stack:
        silent = [stack.enter_context(visit(site, f"127.0.0.{1 + n % 4}")) for n in range(1000)]
        flow.goes_on()
        with site.pair() as other:  # and there is a way in beside them
            near, far = other.connect()
            near.sendall(b"through")
            assert exactly(far, 7) == b"through"
        for sock in silent:
            assert read_all(sock) == b""


def test_hundreds_of_connections_that_say_no_more_than_which_move_they_mean(site: Site) -> None:
    with site.pair() as pair, Flow(pair) as flow, contextlib.ExitStack() as stack:
        for n in range(300):
            stack.enter_context(visit(site)).sendall(pair.spec.preface(1, FRESH + n).encode())
        flow.goes_on()
        refused = pair.target.event("refused")
        assert refused["slug"] == "handshake_failed"
        assert set(pair.target.status()["refused"]) == {"handshake_failed"}


def test_unproven_connections_of_one_address_push_out_nobody_elses(site: Site) -> None:
    """Somebody who saw a move's route on the wire, but is not on the path, keeps its source from nothing."""
    with site.pair(patience_s=3 * PATIENCE) as pair, contextlib.ExitStack() as stack:
        pair.target.event("connected")
        hand = ByHand(site.port, pair.spec, pair.secret, channel=1, epoch=1)
        stack.enter_context(hand.sock)
        hand.hello()
        hand.answered()
        strangers = []
        for n in range(20):
            strangers.append(stack.enter_context(visit(site, "127.0.0.2")))
            strangers[-1].sendall(pair.spec.preface(1, FRESH + n).encode())
            if n >= 7:
                assert read_all(strangers[n - 7]) == b""
        hand.prove()
        far = pair.accept()
        hand.write(b"in all the same")
        assert exactly(far, 15) == b"in all the same"


@pytest.mark.parametrize("channel", [0, 1])
def test_a_resume_by_a_peer_without_the_key(site: Site, channel: int) -> None:
    with site.pair() as pair, Flow(pair):
        for n in range(5):
            hand = ByHand(site.port, pair.spec, os.urandom(40), channel, epoch=FRESH + n)
            with hand.sock:
                hand.hello()
                with contextlib.suppress(ConnectionError):
                    hand.sock.sendall(os.urandom(RESUME_BYTES))
                assert hand.refused()
        pair.target.event("refused", nth=5)
        assert pair.target.status()["refused"] == {"handshake_failed": 5}


def newest(middle: Middle, channel: int) -> Passing:
    """The last connection of a channel that has said which it is."""
    return [p for p in middle.connections if len(p.preface) == PREFACE_BYTES and p.channel == channel][-1]


@pytest.mark.parametrize("at", [4, 11, 12, 19, 35], ids=["expected", "expected", "kept", "kept", "tag"])
def test_a_resume_with_offsets_changed_on_the_way(site: Site, at: int) -> None:
    """One channel is kept from resuming; the other does not notice, and the first loses nothing."""
    to_harm = 0

    def harm(passing: Passing, number: int, record: bytes) -> bytes:
        nonlocal to_harm
        if number or not to_harm:
            return record
        to_harm -= 1
        return record[:at] + bytes([record[at] ^ 1]) + record[at + 1 :]

    with Middle(site.port, forward=harm) as middle, site.pair(channel_spec(2), port=middle.port) as pair:
        near, far = pair.connect()
        near.sendall(b"before")
        assert exactly(far, 6) == b"before"
        with Flow(pair, interruptions=True):
            to_harm = 2
            newest(middle, 1).cut()
            assert pair.target.event("refused", nth=2)["slug"] == "record_forged"
            near.sendall(b"after")
            assert exactly(far, 5) == b"after"
            assert {e["channel"] for e in pair.source.events() if e["type"] == "interrupted"} == {1}


def test_a_recorded_resume_played_back(site: Site) -> None:
    """Once when it has done its work, and once when it never arrived, so that nobody has seen its epoch."""
    held_up = threading.Event()
    kept: list[bytes] = []
    arrived = threading.Event()

    def harm(passing: Passing, number: int, record: bytes) -> bytes | None:
        if not held_up.is_set():
            return record
        kept.append(bytes(passing.seen))
        arrived.set()
        return None

    with Middle(site.port, forward=harm) as middle, site.pair(channel_spec(2), port=middle.port) as pair:
        near, far = pair.connect()
        near.sendall(b"before")
        assert exactly(far, 6) == b"before"
        with Flow(pair, interruptions=True) as flow:
            newest(middle, 1).cut()
            pair.source.event("resumed")
            near.sendall(b"resumed")
            assert exactly(far, 7) == b"resumed"
            recorded = bytes(newest(middle, 1).seen)
            assert len(recorded) > PREFACE_BYTES + MESSAGE_BYTES + RESUME_BYTES
            with visit(site) as again:
                again.sendall(recorded)
                assert read_all(again) == b""
            flow.goes_on()
            pair.target.refusal("epoch_stale")  # it closes first, and tells then
            assert pair.target.status()["refused"] == {"epoch_stale": 1}

            held_up.set()
            newest(middle, 1).cut()
            assert arrived.wait(PATIENCE)
            lost = kept[0]
            assert len(lost) == PREFACE_BYTES + MESSAGE_BYTES + RESUME_BYTES
            with visit(site) as again:
                again.sendall(lost)
                assert len(read_all(again)) == MESSAGE_BYTES, "message 2, which nobody without the key can use"
            flow.goes_on()
            pair.target.refusal("record_forged")
            assert pair.target.status()["refused"]["record_forged"] == 1
            held_up.clear()
            near.sendall(b"after")
            assert exactly(far, 5) == b"after"


def talked(site: Site, pair: Pair) -> ByHand:
    """A move whose target had acknowledgements of what it sent, and a hand with the key that comes to resume."""
    near, far = pair.connect()
    near.sendall(b"before")
    assert exactly(far, 6) == b"before"
    answer = os.urandom(1 << 20)
    giver = threading.Thread(target=far.sendall, args=(answer,))
    giver.start()
    assert exactly(near, len(answer)) == answer, "more than a window: what came first was acknowledged"
    giver.join(PATIENCE)
    hand = ByHand(site.port, pair.spec, pair.secret, 1, epoch=FRESH)
    hand.hello()
    return hand


@pytest.mark.parametrize(
    ("resume", "slug"),
    [((0, 6), "offset_invalid"), (((1 << 20) + 1, 6), "offset_invalid"), ((1 << 20, 7), "bytes_not_retained")],
    ids=["older than acknowledged", "never sent", "nothing kept of what comes next"],
)
def test_a_peer_that_has_the_key_and_another_offset_ends_its_own_move_only(
    site: Site, resume: tuple[int, int], slug: str
) -> None:
    with site.pair() as neighbour, Flow(neighbour), site.pair(channel_spec(window=64 << 10)) as pair:
        hand = talked(site, pair)
        with hand.sock, pytest.raises((AssertionError, OSError)):
            hand.prove(resume=resume)
        assert pair.target.event("broken")["slug"] == slug
        assert pair.source.event("broken")["slug"] == "peer_closed"


def test_two_resumes_at_once_and_the_source_has_its_channel_back(site: Site) -> None:
    with site.pair(channel_spec(2)) as pair:
        near, far = pair.connect()
        with Flow(pair, interruptions=True):
            near.sendall(b"before")
            assert exactly(far, 6) == b"before"
            hands = []
            for epoch in (2, 3):
                hands.append(ByHand(site.port, pair.spec, pair.secret, 1, epoch))
                hands[-1].hello()
                hands[-1].answered()
            hands[1].prove(resume=(0, 6))
            with pytest.raises((AssertionError, OSError)):
                hands[0].prove(resume=(0, 6))
            near.sendall(b"after")  # the source comes again until its epoch is the highest
            assert exactly(far, 5) == b"after"
            assert len(read_all(hands[1].sock)) <= ACK_BYTES, "an acknowledgement at most, no reason, then closed"
            assert set(pair.target.status()["refused"]) == {"epoch_stale"}
            for hand in hands:
                hand.sock.close()
