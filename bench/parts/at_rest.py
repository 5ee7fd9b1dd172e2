"""Encryption at rest, measured from outside: each figure is what a person waits for who gives the command.

Rows have the operation as their ``path``. Those of conversions come in pairs, ``sealift`` and ``qemu-img`` by name, in
GB of virtual disk; starts in pairs as well, ``encrypted`` and ``plain``, on a host that has the keys and on one whose
agent has just been restarted, so that it has none.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from parts.goals import START, START_FETCHED, judge
from parts.images import Image, convert, flush, make_full, new_key
from parts.measure import Processes, Row, Run, peak_rss_mib_of_family, row
from sealift.cli.credentials import connect
from sealift.client import Client
from sealift.demo.cluster import Cluster
from sealift.demo.kmip import KmipServers

PARTS = ("start", "rekey", "convert")
OPERATIONS = ("encrypt", "rekey --deep", "decrypt")

_KINDS: dict[str, tuple[str, ...]] = {"encrypted": ("--encrypt", "--provider", "old"), "plain": ()}
_TINY = 1 << 20
_MEMORY_KIB = 16392  # the least there is, and no multiple of 256 KiB


class Bench:
    """A running controller, its host ``a`` and its KMIP server; images lie in ``datastore``."""

    def __init__(self, cluster: Cluster, servers: KmipServers, datastore: Path) -> None:
        self._cluster, self._servers, self._datastore = cluster, servers, datastore
        for name in ("old", "new"):
            cluster.ask("key-provider", "add", name, *servers.options)

    # conversions

    def conversions(self, size: int, runs: int) -> list[Row]:
        """Encryption, deep rekey and decryption of a full image of ``size`` bytes, by us and by qemu-img in turn."""
        tell(f"an image of {size >> 20} MiB of random data")
        ours, theirs = self._datastore / "ours.qcow2", Image(self._datastore / "theirs-0.qcow2", None)
        make_full(ours, size)
        shutil.copyfile(ours, theirs.path)
        flush(theirs.path)
        self._define("full", ours)
        measured: dict[tuple[str, str], list[Run]] = {}
        for number in range(runs):
            for place, operation in enumerate(OPERATIONS):
                tell(f"{operation}, run {number + 1}")
                key = None if operation == "decrypt" else new_key()
                target = Image(self._datastore / f"theirs-{number * len(OPERATIONS) + place + 1}.qcow2", key)
                steps: dict[str, Callable[[], Run]] = {
                    "sealift": lambda operation=operation: self._convert(operation, ours, size),  # type: ignore[misc]
                    "qemu-img": lambda source=theirs, target=target: convert(source, target),  # type: ignore[misc]
                }
                for name in steps if (number + place) % 2 == 0 else reversed(steps):
                    measured.setdefault((name, operation), []).append(steps[name]())
                theirs.path.unlink()
                theirs = target
        rows = [row(name, operation, 1, measured[name, operation]) for operation in OPERATIONS for name in steps]
        for ours_row, theirs_row in zip(rows[::2], rows[1::2], strict=True):
            ours_row["gib"] = theirs_row["gib"] = round(size / 2**30, 3)
            ours_row["throughput_ratio"] = round(ours_row["gb_per_s"] / theirs_row["gb_per_s"], 3)
        self._forget("full", ours)
        theirs.path.unlink()
        return rows

    def _convert(self, operation: str, image: Path, size: int) -> Run:
        options = ["--provider", "old"] if operation == "encrypt" else []
        host = self._cluster.hosts["a"].process
        assert host is not None
        roles = {"agent": host.pid, "controller": self._cluster.controller_pid}
        processes = Processes(roles)
        began = time.monotonic()
        self._cluster.ask("vm", *operation.split(), "full", *options)
        seconds = time.monotonic() - began
        cpu, others = processes.cpu(), processes.others_cores()
        peak = max(peak_rss_mib_of_family(pid) for pid in roles.values())
        flush(image)  # it is on the disk already; this empties the page cache, as for qemu-img
        return Run(seconds, size / 1e9, cpu, peak, others_cores=others)

    # many at once

    def rekeys(self, vms: int, runs: int) -> list[Row]:
        """A new key for each of so many VMs, in one command, from one provider name to the other and back."""
        tell(f"{vms} encrypted VMs")
        names = [f"many{number}" for number in range(vms)]

        def define(name: str) -> None:
            self._define(name, self._disk(name), "--encrypt", "--provider", "old", size=_TINY)

        with ThreadPoolExecutor(os.cpu_count()) as pool:  # each is seconds of QEMU's looking how fast PBKDF2 is
            list(pool.map(define, names))
        seconds = []
        for number in range(runs):
            source, target = ("old", "new") if number % 2 == 0 else ("new", "old")
            tell(f"rekey of {vms} VMs, run {number + 1}")
            began = time.monotonic()
            became = self._cluster.ask("vm", "rekey", "--from", source, "--to", target)
            seconds.append(time.monotonic() - began)
            failed = [one for one in became if one["error_slug"]]
            if failed or len(became) != vms:
                raise RuntimeError(f"{len(failed)} of {len(became)} VMs were not rekeyed: {failed[:1]}")
        for name in names:
            self._forget(name, self._disk(name))
        return [_timed("sealift", "rekey --from --to", seconds) | {"vms": vms}]

    # starts

    def starts(self, count: int) -> list[Row]:
        """The start of a VM with an encrypted disk and of one with a plain one, in turn; the guest is its firmware."""
        tell("two VMs that differ in their disk")
        for name, options in _KINDS.items():
            self._define(name, self._disk(name), *options, size=64 << 20)
        with self._client() as client:
            rows = _in_turn(START, count, lambda name: self._start(client, name))
            tell("the same, the agent restarted before each start")
            rows += _in_turn(START_FETCHED, count, lambda name: self._start_without_keys(client, name))
        for name in _KINDS:
            self._forget(name, self._disk(name))
        return rows

    def _start(self, client: Client, name: str) -> float:
        began = time.monotonic()
        client.start_vm(name)
        took = time.monotonic() - began
        client.stop_vm(name, force=True)
        return took

    def _start_without_keys(self, client: Client, name: str) -> float:
        """As ``_start``, with a host that has forgotten every key: they are fetched within the time that is taken."""
        host = self._cluster.hosts["a"]
        while True:
            handed_out = self._handed_out()
            self._cluster.kill_agent(host, signal.SIGTERM)
            self._cluster.start_agent(host)
            took = self._start(client, name)
            if self._handed_out() == handed_out:  # else the keeper, which looks every 5 s, was faster
                return took

    def _handed_out(self) -> int:
        """How often the controller gave keys to the host by itself, by its log."""
        return (self._cluster.directory / "controller.log").read_bytes().count(b"keys were handed out")

    @contextlib.contextmanager
    def _client(self) -> Iterator[Client]:
        before = os.environ.get("XDG_CONFIG_HOME")
        os.environ["XDG_CONFIG_HOME"] = self._cluster.environment["XDG_CONFIG_HOME"]
        try:
            with connect() as client:
                yield client
        finally:
            del os.environ["XDG_CONFIG_HOME"]
            if before is not None:
                os.environ["XDG_CONFIG_HOME"] = before

    # VMs

    def _disk(self, name: str) -> Path:
        return self._datastore / f"{name}.qcow2"

    def _define(self, name: str, disk: Path, *options: str, size: int = 0) -> None:
        text = f'name = "{name}"\nvcpus = 1\nmemory = "{_MEMORY_KIB}KiB"\n'
        text += f'[[disks]]\npath = {json.dumps(str(disk))}\nformat = "qcow2"\n'
        text += f'size = "{size >> 20}MiB"\n' if size else ""
        file = self._cluster.directory / f"{name}.toml"
        file.write_text(text)
        self._cluster.ask("vm", "create", str(file), "--host", "a", *options)

    def _forget(self, name: str, disk: Path) -> None:
        self._cluster.sealift("vm", "delete", name, "--force")
        disk.unlink()


def tell(text: str) -> None:
    """Say how far it is."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


def _in_turn(path: str, count: int, start: Callable[[str], float]) -> list[Row]:
    """The rows of so many starts of each kind of VM."""
    seconds: dict[str, list[float]] = {name: [] for name in _KINDS}
    for number in range(count + 1):
        for name in _KINDS if number % 2 == 0 else reversed(_KINDS):
            took = start(name)
            if number:  # the first of each warms up caches
                seconds[name].append(took)
    return [_timed(name, path, seconds[name]) for name in _KINDS]


def _timed(name: str, path: str, seconds: Sequence[float]) -> Row:
    return {
        "name": name,
        "path": path,
        "channels": 1,
        "runs": len(seconds),
        "seconds": round(statistics.median(seconds), 4),
        "least_seconds": round(min(seconds), 4),
        "most_seconds": round(max(seconds), 4),
    }


def table(rows: Sequence[Row]) -> str:
    """The rows and what they say of the goals, for people."""
    lines = [f"{'':<12}{'path':<20}{'runs':>5}{'s':>10}{'GB/s':>8}{'CPU-s/GB':>10}{'others':>8}"]
    for line in rows:
        cells = (_cell(line.get(key), places) for key, places in (("gb_per_s", 3), ("cpu_s_per_gb", 2)))
        speed, cpu = cells
        others = _cell(line.get("others_cores"), 2)
        name = f"{line['name']:<12}{line['path']:<20}{line['runs']:>5}"
        lines.append(f"{name}{line['seconds']:>10.3f}{speed:>8}{cpu:>10}{others:>8}")
    words = {True: "met", False: "NOT MET", None: "not judged at this size"}
    lines += ["", *(f"{one.goal}: {one.measured}, {words[one.met]}" for one in judge(rows))]
    return "\n".join([*lines, "medians; others: cores that everybody else on the machine used"])


def _cell(value: float | None, places: int) -> str:
    return "-" if value is None else f"{value:.{places}f}"
