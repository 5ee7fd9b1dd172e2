"""The two hosts of a bench, both on this machine: side by side, or in network namespaces with a link between them.

The namespaces have no name: they, the link and its shaping are gone with the descriptors that hold them, or with this
process. Making them needs root (CAP_SYS_ADMIN and CAP_NET_ADMIN).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

_CLONE_NEWNET = 0x40000000


@dataclass(frozen=True)
class End:
    """One host: the address it has on the link, and its network namespace (None: that of this process)."""

    address: str = "127.0.0.1"
    namespace: int | None = None

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Have what is started meanwhile, and sockets that are made, in this host's network.

        To be used from the thread in which processes are started. UNIX sockets with a path work across namespaces.
        """
        if self.namespace is None:
            yield
            return
        with _own_namespace() as own:
            _setns(self.namespace)
            try:
                yield
            finally:
                _setns(own)


@dataclass(frozen=True)
class Ends:
    """Source and target."""

    source: End = End()
    target: End = End()


LOOPBACK = Ends()


@contextlib.contextmanager
def shaped_link(bits_per_second: int) -> Iterator[Ends]:
    """Two hosts with a link of this rate each way: a veth pair with a token bucket filter (tc-tbf) at each end.

    ``burst`` holds 2 ms of the rate and no less than 256 KiB: the sending side hands over packets of 64 KiB (GSO), and
    a bucket that cannot hold one would have it cut up. ``limit`` is a queue of 5 ms more; what does not fit in is
    dropped, as a switch would.
    """
    with contextlib.ExitStack() as stack:
        names = ("source", "target")
        ends = [End(f"192.0.2.{n + 1}", stack.enter_context(_new_namespace())) for n in range(2)]  # RFC 5737
        there = f"/proc/{os.getpid()}/fd/{ends[1].namespace}"
        with ends[0].inside():
            _run(f"ip link add {names[0]} type veth peer name {names[1]} netns {there}")
        bytes_per_second = bits_per_second // 8
        burst = max(256 << 10, bytes_per_second * 2 // 1000)
        limit = burst + bytes_per_second * 5 // 1000
        for name, end in zip(names, ends, strict=True):
            with end.inside():
                _run(f"ip address add {end.address}/24 dev {name}")
                _run(f"ip link set {name} up")
                _run("ip link set lo up")
                _run(f"tc qdisc add dev {name} root tbf rate {bits_per_second}bit burst {burst} limit {limit}")
        yield Ends(*ends)


@contextlib.contextmanager
def _own_namespace() -> Iterator[int]:
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield own
    finally:
        os.close(own)


@contextlib.contextmanager
def _new_namespace() -> Iterator[int]:
    with _own_namespace() as own:
        _checked(ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET), "unshare")
        new = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        _setns(own)
    try:
        yield new
    finally:
        os.close(new)


def _setns(descriptor: int) -> None:
    # os.setns is there from Python 3.12 on.
    _checked(ctypes.CDLL(None, use_errno=True).setns(descriptor, _CLONE_NEWNET), "setns")


def _checked(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def _run(command: str) -> None:
    subprocess.run(command.split(), check=True)
