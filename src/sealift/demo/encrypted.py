"""The demonstration of encrypted VMs: keys from a key server with two members, and proofs that can fail."""

from __future__ import annotations

import json
import re
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from sealift.demo.cluster import Cluster, Host
from sealift.demo.guest import GuestImage, command_line, marker
from sealift.demo.keys import spellings
from sealift.demo.kmip import KmipServers
from sealift.demo.ports import free_port
from sealift.demo.stage import Stage, cache_directory, perform, say, screen, step
from sealift.demo.tap import Tap
from sealift.errors import Conflict, PlanRefused, SealiftError, VmLocked, VmTampered
from sealift.keys.kinds import open_provider

# Not a multiple of 256 KiB: under TCG, QEMU 7.2 loses writes of guests whose memory is one (fixed in 9.0).
RAM_KIB = 131064
FILLED_MB, DIRTY_MB_S = 32, 5
PROVIDER = "vault"
_BLOCKS, _BLOCKS_S = 10, 90.0  # each is flushed to a disk that others may keep busy
_UNLOCK_S = 60.0
_FOUND = re.compile(r"FOUND blocks=(\d+) bad=(\d+) last=(\d+)")


@dataclass
class Row:
    """One thing that was done to the VM, and how it went."""

    what: str
    went: str
    seconds: float
    provider: str
    key_id: str
    marker: int  # how often the guest's marker is in the image afterwards


def show(*, keep: bool, as_json: bool) -> int:
    """Run the demonstration; 0 when every proof held."""
    return perform(_Encrypted, keep=keep, as_json=as_json)


class _Encrypted(Stage):
    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster)
        self._secret = secrets.token_bytes(16)
        cache_directory().mkdir(parents=True, exist_ok=True)
        # Not below the cluster's directory: that may be a tmpfs, which has no O_DIRECT.
        self._datastore = Path(tempfile.mkdtemp(prefix="datastore-", dir=cache_directory()))
        self._servers: KmipServers | None = None
        self._taps: dict[str, Tap] = {}
        self._rows: list[Row] = []
        self._uuid = ""

    # the set-up

    def set_up(self, image: GuestImage) -> None:
        """Controller, two hosts behind taps, a key server with two members, and an encrypted guest that is ready."""
        step("A controller and two hosts, each a process of its own on loopback")
        self.cluster.start()
        for name in ("alpha", "beta"):
            doorman = free_port()
            tap = self._taps[name] = Tap(doorman)
            self.cluster.add_host(name, migration_port=tap.port, migration_listen=f"127.0.0.1:{doorman}")
        say(self.cluster.sealift("host", "list").stdout)
        step(f"A KMIP key server with two members is the key provider {PROVIDER}")
        self._servers = KmipServers(self.cluster.directory / "kmip", members=2)
        self._servers.start()
        self._add_provider()
        say(self.cluster.sealift("key-provider", "list").stdout)
        tested = self.cluster.ask("key-provider", "test", PROVIDER)
        self.prove("a key was made, activated, read, found and destroyed on each member", tested["ok"])
        step("1. A VM that is encrypted from the start; its guest writes blocks that begin with a secret marker")
        words = command_line(self._secret, memory_mb=FILLED_MB, dirty_mb_s=DIRTY_MB_S, disk=True)
        disk = f'[[disks]]\npath = {json.dumps(str(self._disk))}\nformat = "qcow2"\nsize = "64MiB"\n'
        began = time.monotonic()
        options = ("--host", "alpha", "--encrypt", "--provider", PROVIDER)
        self._uuid = self.define(image, words, *options, memory_kib=RAM_KIB, extra=disk)["uuid"]
        self._note("vm create --encrypt", "made", time.monotonic() - began)
        self.boot()
        say(self.cluster.sealift("vm", "show", "guest").stdout)
        self.prove("the guest writes its blocks", self._goes_on())

    def _add_provider(self) -> dict[str, Any]:
        added: dict[str, Any] = self.cluster.ask("key-provider", "add", PROVIDER, *self._servers_().options)
        return added

    def _servers_(self) -> KmipServers:
        assert self._servers is not None
        return self._servers

    # the parts

    def run(self) -> None:
        """One part after the other, each on what the one before left."""
        self._moved_sealed()
        self._one_member_gone()
        self._both_gone()
        self._back_under_its_name()
        self._rekeyed()
        self._tampered()
        self._decrypted()

    def _moved_sealed(self) -> None:
        step("2. It moves sealed, whatever its setting; and plain is refused")
        self._migrate_sealed("beta")
        self.prove("the guest goes on writing on beta", self._goes_on())
        refused = self._refused(Conflict, "vm", "set", "guest", "--migrate-encryption", "disabled")
        self.prove("disabled is refused while the VM is encrypted", "encrypted" in refused)
        self.prove("its setting is required", self._vm()["migrate_encryption"] == "required")

    def _one_member_gone(self) -> None:
        step("3. One member of the key server is killed: nothing happens")
        self._servers_().kill(0)
        say(self.cluster.sealift("key-provider", "list").stdout)
        before = self._vm()["encryption"]["key_id"]
        self._convert("rekey, one member gone", "vm", "rekey", "guest")
        self.prove("the VM has a new key from the other member", self._vm()["encryption"]["key_id"] != before)
        self._migrate_sealed("alpha")
        self.prove("the guest goes on writing on alpha", self._goes_on())

    def _both_gone(self) -> None:
        step("4. The other member is killed, too, and then alpha loses power")
        self._servers_().kill(1)
        self.prove("the guest goes on writing without a key server", self._goes_on())
        alpha = self.cluster.hosts["alpha"]
        self.cluster.lose_power(alpha)
        self.cluster.start_agent(alpha)
        encryption = self._wait_for("locked")
        say(self.cluster.sealift("vm", "list").stdout)
        self.prove("the VM is locked", encryption["state"] == "locked")
        reason, key_id = encryption["message"], encryption["key_id"]
        self.prove("and says which key of which key provider is missing", PROVIDER in reason and key_id in reason)
        refused = self._refused(VmLocked, "vm", "start", "guest")
        self.prove("it cannot be started, for that reason", PROVIDER in refused and key_id in refused)

    def _back_under_its_name(self) -> None:
        step(f"5. The provider is removed; then there is one named {PROVIDER} again, at other addresses")
        removed = self.cluster.ask("key-provider", "remove", PROVIDER, "--force")
        self.prove("removing it named the VM that it locks", removed["locks"] == ["guest"])
        self._servers_().move()
        self._servers_().start()
        added = self._add_provider()
        self.prove("adding it named the VM that refers to it", added["unlocks"] == ["guest"])
        unlocked = self._wait_for("ok")
        say(self.cluster.sealift("vm", "list").stdout)
        self.prove("the VM unlocked without anybody doing anything to it", unlocked["state"] == "ok")
        written = self._written()
        self.boot()
        blocks, bad, last = self._found()
        self.prove(f"the guest found its {blocks} blocks, none bad", blocks > 0 and bad == 0)
        self.prove("the last it wrote among them", last >= written)

    def _rekeyed(self) -> None:
        step("6. Rekeyed while it runs: a new key from the provider, in front of the same disk")
        before = self._vm()
        self._convert("rekey (shallow)", "vm", "rekey", "guest")
        after = self._vm()
        self.prove("the VM has another key", before["encryption"]["key_id"] != after["encryption"]["key_id"])
        self.prove("the disk has the key it had", _deks(before) == _deks(after))
        self.prove("the guest did not stop", self._goes_on() and after["state"] == "running")
        step("7. Rekeyed deeply: a new key for the disk as well, and a new image under it")
        self.cluster.sealift("vm", "stop", "guest")
        self._convert("rekey --deep", "vm", "rekey", "guest", "--deep")
        deep = self._vm()
        self.prove("the VM has another key again", deep["encryption"]["key_id"] != after["encryption"]["key_id"])
        self.prove("the disk has another key", not set(_deks(deep)) & set(_deks(after)))

    def _tampered(self) -> None:
        step("8. Somebody changes the VM's configuration file at its host")
        host: Host = self.cluster.hosts[self._vm()["host"]]
        file = host.state / "vms" / self._uuid / "vm.toml"
        text = file.read_text()
        file.write_text(text.replace("vcpus = 1", "vcpus = 2"))
        encryption = self._wait_for("tampered")
        say("\n".join(f"    {line}" for line in encryption["lines"]))
        self.prove("the lines that differ are shown", {"- vcpus = 1", "+ vcpus = 2"} <= set(encryption["lines"]))
        self._refused(VmTampered, "vm", "start", "guest")
        self.prove("it is not started", self._vm()["state"] == "stopped")
        self.cluster.sealift("vm", "restore-config", "guest")
        self.prove("the file is as it was, to the byte", file.read_text() == text)
        written = self._written()
        self.boot()
        blocks, bad, last = self._found()
        self.prove(f"it starts, and the guest found its {blocks} blocks, none bad", blocks > 0 and bad == 0)
        self.prove("the last it wrote among them", last >= written)

    def _decrypted(self) -> None:
        step("9. Decrypted: a check that can fail")
        self.prove("the guest writes its blocks", self._goes_on())
        self.cluster.sealift("vm", "stop", "guest")
        sealed = self._markers()
        self.prove("the encrypted image nowhere shows the guest's marker", sealed == 0)
        self._convert("vm decrypt", "vm", "decrypt", "guest")
        self.prove("the decrypted image shows it", self._rows[-1].marker >= _BLOCKS)
        shown = self.cluster.sealift("vm", "show", "guest").stdout
        say(shown)
        vm = self._vm()
        kept = (vm["migrate_encryption"], vm["migrate_encryption_before"])
        self.prove("it still moves sealed or not at all, until somebody says otherwise", kept[0] == "required")
        words = "was opportunistic before encryption"
        self.prove(f'and says "{words}"', kept[1] == "opportunistic" and words in shown)
        self.cluster.sealift("vm", "set", "guest", "--migrate-encryption", "disabled")
        self.boot()
        record, found, _ = self._migrate("beta", marker(self._secret))
        self.prove("told to, it moves plain", record["protection"] == "plain")
        self.prove("and the tap finds the marker when nothing hides it", found > 0)

    # what the parts do

    def _migrate_sealed(self, target: str) -> None:
        file = self.cluster.hosts[self._vm()["host"]].state / "vms" / self._uuid / "vm.toml"
        ours = self.cluster.directory / "controller" / "providers" / PROVIDER
        keys = spellings(file.read_bytes(), open_provider("kmip", PROVIDER, ours, self._servers_().members))
        record, found, seen = self._migrate(target, marker(self._secret), *keys)
        self.prove("the record says sealed", record["protection"] == "sealed")
        self.prove("a tap on the wire saw all that the guest filled pass", seen > FILLED_MB << 20)
        self.prove("and in it neither the guest's marker nor a key of the VM or its disk", found == 0)

    def _migrate(self, target: str, *patterns: bytes) -> tuple[dict[str, Any], int, int]:
        """The record; how often the wire showed one of the patterns, and how many bytes passed."""
        tap = self._taps[target]
        tap.look_for(*patterns)
        tap.counts()
        done = subprocess.run(
            self.cluster.argv("migrate", "guest", "--to", target), env=self.cluster.environment, check=False
        )
        if done.returncode:
            raise SealiftError(f"the migration to {target} ended with {done.returncode}")
        record: dict[str, Any] = max(self.cluster.ask("migration", "list"), key=lambda row: row["created_at"])
        went = f"{record['protection']}, {record['cipher']}" if record["cipher"] else record["protection"]
        self._note(f"migrate {record['source']} → {target}", went, record["total_s"])
        return record, *tap.counts()

    def _convert(self, title: str, *command: str) -> None:
        began = time.monotonic()
        done = subprocess.run(self.cluster.argv(*command), env=self.cluster.environment, check=False)
        if done.returncode:
            raise SealiftError(f"sealift {' '.join(command)} ended with {done.returncode}")
        self._note(title, "done", time.monotonic() - began)

    def _refused(self, kind: type[SealiftError], *command: str) -> str:
        """What a command says that must be refused with this error; empty when it was not."""
        try:
            self.cluster.ask(*command)
        except kind as refusal:
            say(f"  refused: {refusal}")
            return str(refusal)
        except PlanRefused as refusal:
            say(f"  refused otherwise: {refusal}")
        self.prove(f"sealift {' '.join(command)} was refused", False)
        return ""

    def _note(self, what: str, went: str, seconds: float) -> None:
        encryption = self._vm()["encryption"] or {"provider": "", "key_id": ""}
        row = Row(what, went, seconds, encryption["provider"], encryption["key_id"], self._markers())
        self._rows.append(row)

    # what is true

    @property
    def _disk(self) -> Path:
        return self._datastore / "guest.qcow2"

    def _vm(self) -> dict[str, Any]:
        found: dict[str, Any] = self.cluster.ask("vm", "show", "guest")
        return found

    def _wait_for(self, state: str) -> dict[str, Any]:
        """What encrypts the VM, once its state is this or it has taken too long; each look is a command of its own."""
        end = time.monotonic() + _UNLOCK_S
        while True:
            encryption: dict[str, Any] = self._vm()["encryption"]
            if encryption["state"] == state or time.monotonic() > end:
                return encryption

    def _goes_on(self) -> bool:
        """Whether the guest writes more blocks, and none was bad so far."""
        wanted = self.console.count("DISK") + _BLOCKS
        went_on = self.console.wait_for("DISK", _BLOCKS_S, count=wanted)
        bad = [line for line in self.console.lines if re.fullmatch(r"DISK \d+ bad", line)]
        if bad or not went_on:
            say(f"  the guest said {', '.join(bad or self.console.lines[-3:])}")
        return went_on and not bad

    def _written(self) -> int:
        """The number of the last block that the guest has written and read back."""
        return max(int(line.split()[1]) for line in self.console.lines if re.fullmatch(r"DISK \d+ ok", line))

    def _found(self) -> tuple[int, int, int]:
        """Right blocks, bad ones, and the number of the last, as the guest found its disk when it was booted last."""
        self._goes_on()
        found = [match for line in self.console.lines if (match := _FOUND.fullmatch(line))]
        if not found:  # it did not say; whoever wants to prove something with that fails
            return 0, 0, 0
        blocks, bad, last = (int(word) for word in found[-1].groups())
        return blocks, bad, last

    def _markers(self) -> int:
        """How often the guest's marker is in the image."""
        return self._disk.read_bytes().count(marker(self._secret))

    # the end

    def table(self, *, as_json: bool) -> None:
        """What was done."""
        if as_json:
            screen.print_json(json.dumps([vars(row) for row in self._rows]))
            return
        table = Table(title="What was done")
        for heading in ("what", "went", "took", "key provider", "key", "marker in the image"):
            table.add_column(heading, justify="right" if heading.startswith(("took", "marker")) else "left")
        for row in self._rows:
            took, seen = f"{row.seconds:.1f} s", f"{row.marker} times"
            table.add_row(row.what, row.went, took, row.provider, row.key_id, seen)
        screen.print(table)

    @property
    def hints(self) -> Sequence[str]:
        """What may be tried in the end."""
        return "vm show guest", f"vm encrypt guest --provider {PROVIDER}", f"key-provider show {PROVIDER}"

    def close(self) -> None:
        """End everything that was started."""
        super().close()
        for tap in self._taps.values():
            tap.close()
        if self._servers is not None:
            self._servers.close()
        shutil.rmtree(self._datastore, ignore_errors=True)


def _deks(vm: dict[str, Any]) -> list[str]:
    return [disk["dek"] for disk in vm["config"]["disks"]]
