"""Ports for servers of the demonstration and of tests."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from sealift.demo import ports


def test_no_port_is_given_twice_by_us_or_the_kernel() -> None:
    given = {ports.free_port() for _ in range(100)}
    assert len(given) == 100
    kernel_from = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    if kernel_from < ports._END:
        pytest.skip(f"the kernel of this machine gives ports from {kernel_from} to anybody")
    assert max(given) < kernel_from


def test_a_port_in_use_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    free = ports.free_port()
    with socket.create_server(("127.0.0.1", 0)) as somebody:
        monkeypatch.setattr(ports, "_left", iter([somebody.getsockname()[1], free]))
        assert ports.free_port() == free
