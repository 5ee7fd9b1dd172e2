"""A real guest and somebody between the hosts, or on the target, who does harm: it never costs more than the move."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest

from sealift.demo.cluster import Cluster, Host
from sealift.demo.ports import free_port
from sealift.errors import SealiftError
from support.cutter import Cutter
from support.running_guest import Guest, left_behind

pytestmark = pytest.mark.qemu

FLIP_EVERY = 10 << 20
SEEN = {"record_forged", "record_oversize", "record_unexpected", "stream_truncated"}
"""What a flipped bit can be met as: the header is judged before the tag."""
SLUGS = SEEN | {"peer_silent", "offset_invalid", "bytes_not_retained", "local_closed"}


@pytest.fixture(scope="module")
def behind_a_flipper(cluster: Cluster) -> Iterator[Host]:
    """A host on the way to which one bit is flipped every 10 MiB."""
    listen = free_port()
    with Cutter(listen, flip_every=FLIP_EVERY) as flipper:
        yield cluster.add_host("d", migration_port=flipper.port, migration_listen=f"127.0.0.1:{listen}")


def test_flipped_bits_cost_reconnects_and_not_the_move(guest: Guest, behind_a_flipper: Host) -> None:
    source, target = guest.host, behind_a_flipper
    guest.follow(target)
    lost_before = guest.console.ticks.lost()
    record = guest.migrate(target, "--channels", "2")
    assert (record["state"], record["protection"]) == ("done", "sealed")
    assert record["sealed_out"] > 3 * FLIP_EVERY
    assert record["reconnects"] >= 2
    named = interruptions(target)
    assert "record_forged" in named
    assert named <= SEEN
    events = guest.cluster.sealift("events", "--json").stdout.splitlines()
    assert any('"migration.interrupted"' in event for event in events)
    assert guest.copies() == [target.name]
    assert guest.nothing_left(source)
    assert guest.unharmed()
    assert guest.console.ticks.lost() == lost_before
    assert guest.migrate(source)["state"] == "done"
    assert guest.nothing_left(target)


def interruptions(host: Host) -> set[str]:
    """What a host's agent wrote down as causes of broken connections."""
    lines = [line for line in host.log.read_text().splitlines() if "relay.interrupted" in line]
    return {slug for line in lines for slug in SLUGS if slug in line}


@contextlib.contextmanager
def first_at_incoming(host: Host) -> Iterator[threading.Event]:
    """Within the block somebody dials the socket of a QEMU that a VM comes to; the event says that they could."""
    found, over = threading.Event(), threading.Event()
    taken: list[socket.socket] = []

    def intrude() -> None:
        while not over.wait(0.002):
            for path in host.run.glob("moves/*/incoming.sock"):
                sock = socket.socket(socket.AF_UNIX)
                taken.append(sock)
                with contextlib.suppress(OSError):
                    sock.connect(str(path))
                    sock.sendall(b"QEVM" + bytes(64))
                    found.set()
                    return

    thread = threading.Thread(target=intrude, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join(20)
        for sock in taken:
            sock.close()


def test_who_is_first_at_the_socket_of_the_receiving_qemu_costs_the_move_and_nothing_else(guest: Guest) -> None:
    """Not promised against, since it takes the agent's own user; but not even that makes a second copy."""
    for _ in range(5):  # the socket is there for less than half a second: they may come too late
        source, target = guest.host, guest.other()
        with first_at_incoming(target) as found:
            try:
                guest.migrate(target)
            except SealiftError:
                break
    else:
        pytest.fail("they came too late each time")
    assert found.is_set()
    assert guest.nothing_left(target)
    assert not left_behind(source)
    assert guest.copies() == [source.name]
    assert guest.unharmed()
