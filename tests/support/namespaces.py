"""Two hosts in network namespaces of their own, with a long, lossy cable between them.

    controller, this process     x.1 ── veth ── x.2  host a  x.9  ─┐
    (the machine's namespace)                                      │  delay.py carries, both ways
                                 x.5 ── veth ── x.6  host b  x.10 ─┘

Migrations go over the cable alone. The kernels this must run on have no netem, so packets are lost by nftables and
late by a process of ours. Needs root; ``Unavailable`` says what is missing otherwise.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CABLE = "cable"
_SIDES = {"a": (1, 2, 9), "b": (5, 6, 10)}
"""Last octets: ours, the host's towards us, the host's on the cable."""


class Unavailable(Exception):
    """This machine lets us make no such network; the text says why."""


@dataclass(frozen=True)
class Site:
    """One host's namespace."""

    namespace: str
    address: str
    """Where the controller reaches it."""
    cable: str
    """Where the other host does."""

    @property
    def prefix(self) -> tuple[str, ...]:
        """What a command line begins with that is to run there."""
        return ("ip", "netns", "exec", self.namespace)

    def run(self, *argv: str, input: str = "") -> str:
        """Run a command there; its output."""
        return _run(*self.prefix, *argv, input=input)

    def lose(self, percent: int) -> None:
        """Drop so many percent of what comes over the cable, at random."""
        rules = (
            "table inet faults {\n"
            f"  chain input {{\n    type filter hook input priority 0;\n"
            f"    iifname {CABLE} numgen random mod 100 < {percent} counter drop\n  }}\n"
            "  chain hole {\n    type filter hook input priority 1;\n  }\n"
            "}\n"
        )
        self.run("nft", "-f", "-", input=rules)

    def swallow(self) -> None:
        """Drop everything that comes over the cable, without a word, until ``heal``."""
        self.run("nft", "add", "rule", "inet", "faults", "hole", "iifname", CABLE, "counter", "drop")

    def swallow_one(self, port: int) -> int:
        """Drop one connection's packets alone: of those to our ``port``, the one that brought most. Its other port."""
        lines = self.run("ss", "-Htni", "state", "established", "sport", "=", f":{port}").splitlines()
        found = []
        for peer, figures in itertools.pairwise(lines):
            if received := re.search(r"bytes_received:(\d+)", figures):
                found.append((int(received[1]), int(peer.split()[3].rpartition(":")[2])))
        (_, other) = max(found)
        self.run("nft", "add", "rule", "inet", "faults", "hole", "tcp", "sport", str(other), "counter", "drop")
        return other

    def heal(self) -> None:
        """End ``swallow`` and ``swallow_one``."""
        self.run("nft", "flush", "chain", "inet", "faults", "hole")

    def lost(self) -> int:
        """How many packets ``lose`` has dropped."""
        words = self.run("nft", "list", "chain", "inet", "faults", "input").split()
        return int(words[words.index("packets") + 1])


@contextmanager
def two_sites(*, delay_s: float, loss_percent: int) -> Iterator[dict[str, Site]]:
    """Sites a and b; a packet between them takes ``delay_s`` and so many percent are lost, each way."""
    missing = [tool for tool in ("ip", "nft", "ss") if shutil.which(tool) is None]
    if missing:  # ./dev installs them: their absence is no reason to skip
        raise FileNotFoundError(f"these programs are needed: {', '.join(missing)}")
    if os.geteuid() != 0 or not Path("/dev/net/tun").exists():
        raise Unavailable("needs root and /dev/net/tun")
    tag = secrets.token_bytes(3)
    # Of the block that RFC 2544 sets aside for measuring networks: nobody's real address.
    network = f"198.{18 + tag[0] % 2}.{tag[1]}"
    with contextlib.ExitStack() as stack:
        sites = {}
        for name, (ours, theirs, cable) in _SIDES.items():
            site = Site(f"sl-{tag.hex()}-{name}", f"{network}.{theirs}", f"{network}.{cable}")
            _make(site, f"sl{tag.hex()}{name}", f"{network}.{ours}", stack)
            sites[name] = site
        ends = [word for site in sites.values() for word in (site.namespace, CABLE)]
        carrier = subprocess.Popen(
            [sys.executable, "-m", "support.delay", *ends, str(delay_s)],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        stack.callback(_end, carrier)
        assert carrier.stdout is not None
        if not carrier.stdout.readline():
            raise Unavailable("no TUN device can be made in a network namespace")
        for site, other in zip(sites.values(), reversed(sites.values()), strict=True):
            site.run("ip", "address", "add", site.cable, "peer", other.cable, "dev", CABLE)
            site.run("ip", "link", "set", CABLE, "up")
            site.lose(loss_percent)
            with contextlib.suppress(subprocess.CalledProcessError):
                # Older ones take each loss for congestion and come to 0.1 MB/s here: where it is missing, this is slow.
                site.run("sysctl", "-qw", "net.ipv4.tcp_congestion_control=bbr")
        yield sites


def _make(site: Site, link: str, ours: str, stack: contextlib.ExitStack) -> None:
    try:
        _run("ip", "netns", "add", site.namespace)
        stack.callback(_run, "ip", "netns", "delete", site.namespace)
        _run("ip", "link", "add", link, "type", "veth", "peer", "name", "office", "netns", site.namespace)
    except subprocess.CalledProcessError as error:
        raise Unavailable(f"no network namespace can be made: {error.stderr}") from None
    # Before the namespace, which lives on for as long as the kernel keeps one of its connections.
    stack.callback(_run, "ip", "link", "delete", link)
    _run("ip", "address", "add", f"{ours}/30", "dev", link)
    _run("ip", "link", "set", link, "up")
    site.run("ip", "link", "set", "lo", "up")
    site.run("ip", "address", "add", f"{site.address}/30", "dev", "office")
    site.run("ip", "link", "set", "office", "up")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _run(*argv: str, input: str = "") -> str:
    return subprocess.run(argv, input=input, capture_output=True, text=True, check=True).stdout
