"""10,000 connections that lead nowhere while a transfer runs: it completes exactly, and others still get in."""

from __future__ import annotations

import hashlib
import os
import socket
import threading

import pytest

from support.cutter import Cutter
from support.flood import Flood
from support.flow import Flow
from support.relays import PATIENCE, Pair, Site, proc

CONNECTIONS = 10_000
MB = 1 << 20


@pytest.fixture
def site():
    with Site() as made:
        yield made


def peak_kib(pid: int) -> int:
    line = next(line for line in proc(pid, "status").splitlines() if line.startswith(b"VmHWM:"))
    return int(line.split()[1])


class Transfer:
    """As many bytes as go through until told to stop, as fast as they go; both ends' sums must be the same."""

    def __init__(self, pair: Pair) -> None:
        self._near, self._far = pair.connect()
        for sock in (self._near, self._far):
            sock.settimeout(3 * PATIENCE)
        self._enough = threading.Event()
        self._sent, self._received = hashlib.sha256(), hashlib.sha256()
        self.bytes = 0
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._give, self._take)]
        for thread in self._threads:
            thread.start()

    def _give(self) -> None:
        block = os.urandom(MB)
        while not self._enough.is_set() or self.bytes < 16 * MB:
            self._near.sendall(block)
            self._sent.update(block)
            block = block[1:] + block[:1]
        self._near.shutdown(socket.SHUT_WR)

    def _take(self) -> None:
        while data := self._far.recv(MB):
            self._received.update(data)
            self.bytes += len(data)

    def arrived_exactly(self) -> bool:
        self._enough.set()
        for thread in self._threads:
            thread.join(4 * PATIENCE)
        self._far.shutdown(socket.SHUT_WR)
        assert self._near.recv(1) == b""
        return self._sent.digest() == self._received.digest() and self.bytes >= 16 * MB


def test_a_flood_costs_no_byte_no_way_in_and_little_memory(site: Site) -> None:
    with Cutter(site.port) as link, site.pair(port=link.port) as pair:
        transfer = Transfer(pair)
        pair.source.event("connected")
        before = peak_kib(site.doorman.pid)
        with Flood(site.port, CONNECTIONS) as flood:
            with site.pair() as other, Flow(other):
                pass  # another move begins, and works, while the flood goes on
            flood.swells(CONNECTIONS // 4)
            link.reset()
            pair.source.event("resumed")
            flood.swells(CONNECTIONS // 4)
        assert flood.made >= CONNECTIONS
        assert transfer.arrived_exactly()
        pair.source.event("drained")
        pair.target.event("drained")
        assert peak_kib(site.doorman.pid) - before <= 4 << 10
        assert peak_kib(site.doorman.pid) <= 48 << 10
        for relay in (pair.source, pair.target):
            assert peak_kib(relay.pid) <= 96 << 10
            assert relay.status()["refused"] == {}
            assert "broken" not in {e["type"] for e in relay.events()}
