"""A real guest on a cluster: where it is, what it says, and what a move of it left behind."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

from sealift.agent.journal import Journal
from sealift.demo.cluster import Cluster, Host
from sealift.demo.console import Console
from sealift.demo.guest import GuestImage, command_line

RAM_KIB = 196600  # not a multiple of 256: see the trap of QEMU 7.2 under TCG
FILLED_MB, DIRTY_MB_S = 48, 5
SLOW = "12M"
"""A bandwidth at which a move of the guest takes some ten seconds: time to interfere."""


class Guest:
    """The VM ``name``; ``disk`` is a qcow2 image on a datastore that all hosts see.

    It fills ``filled`` MB with its pattern and rewrites ``dirty`` MB/s of them.
    """

    def __init__(
        self,
        cluster: Cluster,
        image: GuestImage,
        name: str,
        *,
        host: str,
        disk: Path | None = None,
        filled: int = FILLED_MB,
        dirty: int = DIRTY_MB_S,
    ) -> None:
        self.cluster, self.name = cluster, name
        words = command_line(name.encode(), memory_mb=filled, dirty_mb_s=dirty, disk=disk is not None)
        text = (
            f"name = {json.dumps(name)}\nvcpus = 1\nmemory = '{RAM_KIB}KiB'\n"
            f"[boot]\nkernel = {json.dumps(str(image.kernel))}\ninitrd = {json.dumps(str(image.initrd))}\n"
            f"cmdline = {json.dumps(words)}\n"
        )
        if disk is not None:
            text += f"[[disks]]\npath = {json.dumps(str(disk))}\nformat = 'qcow2'\n"
        file = cluster.directory / f"{name}.toml"
        file.write_text(text)
        self.uuid: str = cluster.ask("vm", "create", str(file), "--host", host)["uuid"]
        self.console = Console([])
        for known in cluster.hosts.values():
            self.follow(known)

    def follow(self, host: Host) -> None:
        """Hear it on this host too."""
        self.console.follow(host.state / "vms" / self.uuid / "serial.log")

    def close(self) -> None:
        self.console.close()

    def make_run(self) -> None:
        """Start it if it does not run, and see it tick."""
        if self.show()["state"] != "running":
            self.cluster.sealift("vm", "start", self.name)
        assert self.console.wait_for("READY", 90), self.console.lines[-5:]
        assert self.ticks(), f"the guest does not tick: {self.console.lines[-5:]}"

    def show(self) -> dict[str, Any]:
        """`sealift vm show`."""
        found: dict[str, Any] = self.cluster.ask("vm", "show", self.name)
        return found

    @property
    def host(self) -> Host:
        """Where the controller says it is."""
        return self.cluster.hosts[self.show()["host"]]

    def other(self) -> Host:
        """A capable host on which it is not."""
        return self.cluster.hosts["b" if self.host.name == "a" else "a"]

    def ticks(self, count: int = 10) -> bool:
        """Whether it goes on ticking."""
        return self.console.wait_for_ticks(count, 20)

    def unharmed(self) -> bool:
        """Whether a fresh check of all its memory finds nothing, and it ticks."""
        return self.console.wait_for_check(60) == 0 and self.ticks()

    # moves

    def migrate(self, to: Host, *options: str) -> dict[str, Any]:
        """Move it and wait for the end; the record. Raises the error that the command ends with."""
        record: dict[str, Any] = self.cluster.ask("migrate", self.name, "--to", to.name, *options)
        return record

    def begin(self, to: Host, *options: str, state: str | None = "precopy") -> str:
        """Begin a move and wait until it is in ``state``, if any is given; its id."""
        ident: str = self.cluster.ask("migrate", self.name, "--to", to.name, "--detach", *options)["id"]
        if state is not None:
            self.wait(ident, state)
        return ident

    def record(self, ident: str) -> dict[str, Any]:
        """`sealift migration show`."""
        found: dict[str, Any] = self.cluster.ask("migration", "show", ident)
        return found

    def wait(self, ident: str, *states: str, timeout: float = 60) -> dict[str, Any]:
        """Wait until a move has reached one of ``states``, or has ended if none is given; its record."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            record = self.record(ident)
            reached = {phase["state"] for phase in record["phases"]}
            if (reached & set(states)) if states else record["finished"]:
                return record
            assert not record["finished"], f"it ended as {record['state']}: {record['error']}"
            time.sleep(0.05)
        raise AssertionError(f"the move is {record['state']} after {timeout} s: {record['error']}")

    # processes

    def qemu(self, host: Host) -> int | None:
        """The pid of its QEMU on a host, by that host's journal, if it is alive."""
        return next((p.pid for p in self._processes(host) if p.alive()), None)

    def _processes(self, host: Host) -> list[Any]:
        journal = Journal(host.state / "agent.db")
        try:
            found = [row.process for row in journal.vms().values() if str(row.config.uuid) == self.uuid]
            found += [move.process for move in journal.moves() if str(move.order.vm) == self.uuid]
            return [process for process in found if process is not None]
        finally:
            journal.close()

    def copies(self) -> list[str]:
        """The hosts on which a QEMU of it is alive, found in /proc without asking anybody."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if self.uuid.encode() in words:
                text = b" ".join(words).decode()
                found += [host.name for host in self.cluster.hosts.values() if f"{host.run}/" in text]
        return found

    def nothing_left(self, host: Host, timeout: float = 15) -> bool:
        """Whether no process, socket or directory of a move is left on a host."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if not left_behind(host) and host.name not in self.copies():
                return True
            time.sleep(0.05)
        raise AssertionError(f"left on {host.name}: {left_behind(host)}, QEMU on {self.copies()}")


def left_behind(host: Host) -> list[str]:
    """What moves have left on a host: sockets, directories, logs of relays and of QEMUs that never were a VM's."""
    places = [host.run / "moves", host.run / "doors", host.state / "relays"]
    found = [str(path) for place in places for path in place.rglob("*")]
    journal = Journal(host.state / "agent.db")
    try:
        here = {str(uuid) for uuid in journal.vms()}
    finally:
        journal.close()
    found += [str(path) for path in host.state.glob("vms/*/qemu.log") if path.parent.name not in here]
    return found


def relay_pids(host: Host) -> list[int]:
    """The relay processes of a host, by their control sockets."""
    import socket
    import struct

    pids = []
    for path in host.run.glob("moves/*/relay.sock"):
        with socket.socket(socket.AF_UNIX) as link:
            link.connect(str(path))
            credentials = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            pids.append(struct.unpack("3i", credentials)[0])
    return pids


def make_disk(path: Path, size: str = "64M") -> Path:
    """A new qcow2 image."""
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), size], check=True, env=dict(os.environ))
    return path
