"""The doorman passes on what has a door, closes everything else, waits for nobody, and outlives the agent."""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sealift.channel.doorman import LIMITED_UNREAD, MAX_UNREAD, PREFACE_S, STRAYS, door_path, doorman_pid
from sealift.channel.protocol import CHANNEL_VERSION, PREFACE_BYTES, Kind, Preface
from support.relays import PATIENCE, Site, proc, read_all


@pytest.fixture
def site():
    with Site() as made:
        yield made


@pytest.fixture
def door(site: Site):
    """A route and the socket of the relay that waits for it."""
    route = os.urandom(16)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(door_path(site.doors, route))
        sock.settimeout(PATIENCE)
        yield route, sock


def preface(route: bytes, *, plain: bool = False, epoch: int = 1) -> bytes:
    return Preface(plain, CHANNEL_VERSION, Kind.MAIN, 1, route, epoch).encode()


def visit(site: Site, origin: str = "127.0.0.1") -> socket.socket:
    return socket.create_connection(("127.0.0.1", site.port), timeout=PATIENCE, source_address=(origin, 0))


def taken(door: socket.socket) -> tuple[bytes, socket.socket]:
    data, fds, _, _ = socket.recv_fds(door, 64, 4)
    (fd,) = fds
    return data, socket.socket(fileno=fd)


def in_time(trial: Callable[[], None]) -> None:
    """Run what must be through before a preface is late; on a machine that was too slow for that it says nothing."""
    for _ in range(50):
        began = time.monotonic()
        try:
            trial()
        except (AssertionError, OSError, ValueError):
            if time.monotonic() - began < PREFACE_S:
                raise
        else:
            return
    raise AssertionError("this machine never did it within the time that a preface has")


@pytest.mark.parametrize("plain", [False, True])
def test_passes_preface_and_connection_and_not_one_byte_more(site: Site, door, plain: bool) -> None:
    route, waiting = door
    with visit(site) as visitor:
        hello = preface(route, plain=plain)
        visitor.sendall(hello + b"first message")
        data, passed = taken(waiting)
        with passed:
            assert data == hello
            passed.setblocking(True)
            assert passed.recv(64) == b"first message"
            passed.sendall(b"answer")
            assert visitor.recv(64) == b"answer"


def test_a_preface_in_pieces_is_put_together(site: Site, door) -> None:
    route, waiting = door

    def trial() -> None:
        with visit(site) as visitor:
            visitor.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for byte in preface(route):
                visitor.sendall(bytes([byte]))
            data, passed = taken(waiting)
            passed.close()
            assert data == preface(route)

    in_time(trial)


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: sealift\r\n\r\n",
        bytes(28),
        b"SLFT" + bytes(24),
        b"SLFT\x02\x02" + bytes(22),
        b"SLFT\x01\x63" + bytes(22),
    ],
    ids=["http", "zeros", "no version", "other version", "unknown kind"],
)
def test_garbage_is_closed_without_a_word(site: Site, door, garbage: bytes) -> None:
    _, waiting = door
    with visit(site) as visitor:
        visitor.sendall(garbage)
        assert read_all(visitor) == b""
    assert not select.select([waiting], [], [], 0)[0]


def test_unknown_route_is_closed(site: Site, door) -> None:
    with visit(site) as visitor:
        visitor.sendall(preface(os.urandom(16)))
        assert read_all(visitor) == b""


def test_route_whose_relay_is_gone_is_closed(site: Site) -> None:
    route = os.urandom(16)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as dead:
        dead.bind(door_path(site.doors, route))
    with visit(site) as visitor:
        visitor.sendall(preface(route))
        assert read_all(visitor) == b""


@pytest.mark.parametrize("said", [b"", b"SLFT\x01\x02"])
def test_silent_visitor_is_closed_after_two_seconds(site: Site, door, said: bytes) -> None:
    route, waiting = door
    silent, began = None, 0.0

    def trial() -> None:
        nonlocal silent, began
        began = time.monotonic()
        silent = stack.enter_context(visit(site))
        silent.sendall(said)
        with visit(site) as prompt:  # a silent visitor keeps nobody waiting
            prompt.sendall(preface(route))
            taken(waiting)[1].close()
        assert time.monotonic() - began < PREFACE_S

    with contextlib.ExitStack() as stack:
        in_time(trial)
        assert silent is not None
        assert read_all(silent) == b""
        assert PREFACE_S - 0.1 < time.monotonic() - began < PREFACE_S + 5


def test_a_full_door_closes_the_surplus_and_nothing_else(site: Site, door) -> None:
    route, waiting = door
    other = os.urandom(16)
    visitors = []
    with contextlib.ExitStack() as stack:
        second = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        second.bind(door_path(site.doors, other))
        second.settimeout(PATIENCE)
        closed: list[socket.socket] = []
        while not closed:
            assert len(visitors) < 600, "the door never became full"
            visitor = stack.enter_context(visit(site))
            visitors.append(visitor)
            visitor.sendall(preface(route, epoch=len(visitors)))
            neighbour = stack.enter_context(visit(site))  # handled after the visitor, and to another door
            neighbour.sendall(preface(other))
            taken(second)[1].close()
            closed = select.select(visitors, [], [], 0)[0]
        assert closed == [visitors[-1]]
        assert read_all(closed[0]) == b""
        for epoch in range(1, len(visitors)):
            data, passed = taken(waiting)
            passed.close()
            assert Preface.decode(data).epoch == epoch


def test_at_most_256_unread_prefaces_the_oldest_goes_first(site: Site, door) -> None:
    route, waiting = door

    origins = (f"127.0.1.{n}" for n in itertools.count(1))

    def trial() -> None:
        began, where = time.monotonic(), next(origins)  # one that is not limited for an earlier trial
        with contextlib.ExitStack() as stack:
            silent = [stack.enter_context(visit(site, where)) for _ in range(MAX_UNREAD)]
            one_more = stack.enter_context(visit(site, where))
            assert read_all(silent[0]) == b""
            assert time.monotonic() - began < PREFACE_S, "later it would have been for its silence"
            one_more.sendall(preface(route))
            taken(waiting)[1].close()

    in_time(trial)


def test_a_crowd_from_one_address_pushes_out_nobody_elses_visitor(site: Site, door) -> None:
    route, waiting = door

    def trial() -> None:
        with contextlib.ExitStack() as stack:
            half = stack.enter_context(visit(site))
            half.sendall(preface(route)[:20])
            crowd = [stack.enter_context(visit(site, "127.0.0.2")) for _ in range(MAX_UNREAD)]
            assert read_all(crowd[0]) == b"", "the crowd's oldest goes, although another came before it"
            half.sendall(preface(route)[20:])
            taken(waiting)[1].close()

    in_time(trial)


def test_an_address_whose_connections_lead_nowhere_is_limited_and_others_are_not(site: Site, door) -> None:
    route, waiting = door
    hello = preface(route)
    for n in range(3 * STRAYS):
        with visit(site, "127.0.0.2") as stray:
            stray.sendall(preface(os.urandom(16)) if n % 2 else b"garbage of 28 bytes in a row")
            assert read_all(stray) == b""

    def trial() -> None:
        with contextlib.ExitStack() as stack:
            others = [stack.enter_context(visit(site)) for _ in range(LIMITED_UNREAD + 1)]
            limited = [stack.enter_context(visit(site, "127.0.0.2")) for _ in range(LIMITED_UNREAD + 1)]
            assert read_all(limited[0]) == b""  # as soon as the last of them was there
            for half in [*others, *limited[1:]]:
                half.sendall(hello[:27])
            for half in [*others, *limited[1:]]:
                half.sendall(hello[27:])
                taken(waiting)[1].close()

    in_time(trial)
    with visit(site, "127.0.0.2") as known:  # it is where the flood came from, and gets through all the same
        known.sendall(hello)
        taken(waiting)[1].close()
    said = Path(site.doorman.log).read_text().splitlines()
    assert [line for line in said if "127.0.0.2" in line] == said, "one line, whatever comes"
    assert len(said) == 1


def test_who_is_turned_away_is_reset_so_that_nothing_stays_behind(site: Site) -> None:
    with visit(site) as stranger:
        stranger.sendall(preface(os.urandom(16)))
        with pytest.raises(ConnectionResetError):
            stranger.recv(1)


def test_resets_and_strangers_at_once_do_no_harm(site: Site, door) -> None:
    route, waiting = door
    for n in range(50):
        with visit(site) as rude:
            rude.sendall(preface(route)[: n % PREFACE_BYTES])
            rude.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with visit(site) as visitor:
        visitor.sendall(preface(route))
        taken(waiting)[1].close()
    assert site.doorman.ended(0) is False


def test_a_second_doorman_does_not_start_and_the_first_is_found(site: Site) -> None:
    lock = f"{site.root}/lock"
    assert doorman_pid(lock) == site.doorman.pid
    assert doorman_pid(f"{site.root}/nothing") is None
    command = ["-I", "-m", "sealift.entry.doorman", "--listen", "127.0.0.1:0", "--doors", site.doors, "--lock", lock]
    second = subprocess.run([sys.executable, *command], capture_output=True, timeout=60, text=True)
    assert second.returncode == 4
    assert "another doorman" in second.stderr
    assert doorman_pid(lock) == site.doorman.pid


def test_sigterm_ends_it_and_frees_the_lock_without_touching_what_was_passed_on(site: Site, door) -> None:
    route, waiting = door
    with visit(site) as visitor:
        visitor.sendall(preface(route))
        _, passed = taken(waiting)
        with passed:
            site.doorman.signal(signal.SIGTERM)
            assert site.doorman.exit_status() == 0
            assert doorman_pid(f"{site.root}/lock") is None
            passed.setblocking(True)
            visitor.sendall(b"still")
            assert passed.recv(16) == b"still"
    again, port = site.start_doorman()
    assert doorman_pid(f"{site.root}/lock") == again.pid
    assert port


def test_it_has_a_session_of_its_own_and_no_code_of_ciphers(site: Site) -> None:
    assert os.getsid(site.doorman.pid) == site.doorman.pid
    assert b"cryptography" not in proc(site.doorman.pid, "maps")


def test_port_in_use_is_said_in_one_line(site: Site) -> None:
    command = ["--listen", f"127.0.0.1:{site.port}", "--doors", site.doors, "--lock", f"{site.root}/lock2"]
    failed = subprocess.run(
        [sys.executable, "-I", "-m", "sealift.entry.doorman", *command], capture_output=True, timeout=60, text=True
    )
    assert failed.returncode == 1
    assert str(site.port) in failed.stderr
    assert failed.stderr.count("\n") == 1
