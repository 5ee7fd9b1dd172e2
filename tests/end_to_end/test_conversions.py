"""Disks of stopped VMs encrypted, rekeyed and decrypted through the command line; their files, and the floor."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import pytest

from sealift.demo.cluster import Cluster
from sealift.errors import PlanRefused, VmTampered
from support.encrypted import PATIENCE_S, Home, encryption_of, is_luks, keys_of, same_content

pytestmark = pytest.mark.qemu

_MEMORY_KIB = 16392  # the guest is its firmware; no multiple of 256 KiB
_KILLS = 20


@pytest.fixture(scope="module")
def original(datastore: Path) -> Path:
    """A raw image of random data, with a hole in the middle and an end that is no whole cluster."""
    path = datastore / "original.raw"
    source = random.Random(1)
    with path.open("wb") as file:
        file.write(source.randbytes(12 << 20))
        file.seek(20 << 20)
        file.write(source.randbytes((4 << 20) + 512))
    return path


class _Vm:
    """A VM on host a, defined and not started."""

    def __init__(
        self, cluster: Cluster, name: str, image: Path, image_format: Literal["qcow2", "raw"], *options: str, size: str
    ) -> None:
        self.cluster, self.name, self.image, self.format = cluster, name, image, image_format
        text = f'name = "{name}"\nvcpus = 1\nmemory = "{_MEMORY_KIB}KiB"\n'
        text += f'[[disks]]\npath = {json.dumps(str(image))}\nformat = "{image_format}"\n'
        text += f'size = "{size}"\n' if size else ""
        file = cluster.directory / f"{name}.toml"
        file.write_text(text)
        self.uuid: str = cluster.ask("vm", "create", str(file), "--host", "a", *options)["uuid"]

    @property
    def file(self) -> Path:
        """Its configuration file at its host."""
        return self.cluster.hosts["a"].state / "vms" / self.uuid / "vm.toml"

    def show(self) -> dict[str, Any]:
        found: dict[str, Any] = self.cluster.ask("vm", "show", self.name)
        return found

    def dek(self) -> bytes | None:
        """The key of its disk; None for a VM in clear."""
        (dek,) = keys_of(self.cluster, self.name).deks.values() if self.show()["encrypted"] else (None,)
        return dek

    def holds(self, original: Path) -> bool:
        """Whether its disk, encrypted or not as the controller has it, reads like a raw image."""
        dek = self.dek()
        assert is_luks(self.image) is (dek is not None)
        return same_content(self.image, self.format, dek, original)

    def forget(self) -> None:
        self.cluster.sealift("vm", "stop", self.name, "--force", check=False)
        self.cluster.sealift("vm", "delete", self.name, "--force")
        self.image.unlink()


@pytest.fixture(scope="module")
def sized(cluster: Cluster, home: Home, datastore: Path) -> Iterator[_Vm]:
    """A VM whose image was made for it, encrypted."""
    vm = _Vm(cluster, "sized", datastore / "sized.qcow2", "qcow2", "--encrypt", size="64MiB")
    yield vm
    vm.forget()


def test_an_existing_image_is_encrypted_rekeyed_and_decrypted(
    cluster: Cluster, home: Home, datastore: Path, original: Path
) -> None:
    image = datastore / "existing.raw"
    shutil.copyfile(original, image)
    vm = _Vm(cluster, "existing", image, "raw", "--encrypt", "--provider", home.name, size="")
    first = vm.show()["encryption"]
    assert (first["provider"], first["state"]) == (home.name, "ok")
    dek = vm.dek()
    assert vm.holds(original)
    cluster.sealift("vm", "rekey", vm.name, "--deep")
    assert vm.show()["encryption"]["key_id"] != first["key_id"]
    assert vm.dek() != dek
    assert vm.holds(original)
    told = cluster.sealift("vm", "decrypt", vm.name, "--verify", "full").stdout
    assert "decrypted" in told
    shown = vm.show()
    assert (shown["migrate_encryption"], shown["migrate_encryption_before"]) == ("required", "opportunistic")
    assert "was opportunistic before encryption" in cluster.sealift("vm", "show", vm.name).stdout
    assert vm.holds(original)
    assert sorted(path.name for path in datastore.glob("existing*")) == ["existing.raw"]
    assert not vm.file.exists()
    vm.forget()


def test_an_image_with_a_size_is_made_encrypted_and_opened(sized: _Vm) -> None:
    assert is_luks(sized.image)
    sized.cluster.sealift("vm", "start", sized.name)
    assert sized.show()["state"] == "running"
    sized.cluster.sealift("vm", "stop", sized.name, "--force")
    assert sized.file.stat().st_mode & 0o777 == 0o600


def test_a_changed_configuration_file_is_shown_refused_and_put_back(sized: _Vm) -> None:
    written = sized.file.read_bytes()
    sized.file.write_bytes(written.replace(b"vcpus = 1\n", b"vcpus = 2\n"))
    tampered = encryption_of(sized.cluster, sized.name, "tampered")
    assert {"- vcpus = 1", "+ vcpus = 2"} <= set(tampered["lines"])
    with pytest.raises(VmTampered, match="vcpus"):
        sized.cluster.ask("vm", "start", sized.name)
    assert "tampered" in sized.cluster.sealift("vm", "list").stdout.lower()
    sized.cluster.sealift("vm", "restore-config", sized.name)
    assert sized.file.read_bytes() == written
    assert sized.show()["encryption"]["state"] == "ok"


def test_an_older_copy_of_the_configuration_file_is_called_one(sized: _Vm) -> None:
    older = sized.file.read_bytes()
    sized.cluster.sealift("vm", "rekey", sized.name)
    newer = sized.file.read_bytes()
    sized.file.write_bytes(older)
    tampered = encryption_of(sized.cluster, sized.name, "tampered")
    assert "older" in tampered["message"]
    with pytest.raises(VmTampered, match="older"):
        sized.cluster.ask("vm", "start", sized.name)
    sized.cluster.sealift("vm", "restore-config", sized.name)
    assert sized.file.read_bytes() == newer


def test_no_vm_undercuts_the_floor(cluster: Cluster, datastore: Path) -> None:
    vm = _Vm(cluster, "undercutting", datastore / "undercutting.raw", "raw", size="1MiB")
    cluster.sealift("vm", "set", vm.name, "--migrate-encryption", "disabled")
    cluster.sealift("vm", "start", vm.name)

    def plan(target: str) -> dict[str, Any]:
        planned: dict[str, Any] = cluster.ask("migrate", vm.name, "--to", target, "--dry-run")
        return planned

    try:
        assert plan("b")["protection"] == "plain"
        cluster.sealift("settings", "set", "migration-encryption-floor", "required")
        sealed = plan("b")
        assert sealed["protection"] == "sealed"
        assert "floor" in sealed["reason"]
        with pytest.raises(PlanRefused, match="floor"):
            cluster.ask("migrate", vm.name, "--to", "c")
    finally:
        cluster.sealift("settings", "set", "migration-encryption-floor", "none")
        vm.forget()


@pytest.fixture
def small_store(cluster: Cluster) -> Iterator[Path]:
    """A file system of 24 MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system to fill")
    directory = cluster.directory / "small"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", directory], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", directory], check=True)


def test_the_plan_refuses_what_a_copy_would_lose_and_what_would_not_fit(
    cluster: Cluster, home: Home, datastore: Path, original: Path, small_store: Path
) -> None:
    def refusal(vm: _Vm) -> str:
        done = cluster.sealift("vm", "encrypt", vm.name, "--dry-run", check=False)
        assert done.returncode == PlanRefused.exit_code == 3
        assert str(vm.image) in done.stderr
        return done.stderr

    keys = _active_keys(cluster)
    image, base = datastore / "kept.qcow2", datastore / "kept.base"
    _qemu_img("convert", "-f", "raw", "-O", "qcow2", original, image)
    vm = _Vm(cluster, "kept", image, "qcow2", size="")
    _qemu_img("snapshot", "-c", "before", image)
    assert "1 internal snapshot" in refusal(vm)
    _qemu_img("snapshot", "-d", "before", image)
    image.rename(base)
    _qemu_img("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, image)
    assert "refers to another file" in refusal(vm)
    vm.forget()
    full = datastore / "full.raw"
    full.write_bytes(b"compressible" * (30 << 18) + bytes(1 << 20))
    image = small_store / "compressed.qcow2"
    _qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", full, image)
    vm = _Vm(cluster, "compressed", image, "qcow2", size="")
    done = cluster.sealift("vm", "encrypt", vm.name, check=False)
    assert done.returncode == PlanRefused.exit_code
    assert f"{small_store} on host a has" in done.stderr
    assert _active_keys(cluster) == keys
    vm.forget()


@pytest.mark.timeout(900)
def test_a_conversion_survives_the_agents_death_at_any_moment(
    cluster: Cluster, home: Home, datastore: Path, original: Path
) -> None:
    """Two of the deaths come in a state that is waited for, the others at random."""
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)
    image, host = datastore / "killed.qcow2", cluster.hosts["a"]
    _qemu_img("convert", "-f", "raw", "-O", "qcow2", original, image)
    vm = _Vm(cluster, "killed", image, "qcow2", size="")
    first = cluster.ask("vm", "encrypt", vm.name)
    lasts = dict.fromkeys(("encrypt", "rekey", "decrypt"), _lasted(first))
    made = {first["key_id"]}
    kills: list[tuple[str, str, str]] = []
    encrypted, aims = True, ["copying", "verifying"]  # states in which one kill at least is to come
    for number in range(_KILLS):
        if kills[-2:] and all(kill[::2] == ("encrypt", "failed") for kill in kills[-2:]):  # the others have their turn
            made.add(cluster.ask("vm", "encrypt", vm.name)["key_id"])
            encrypted = True
        command = ("rekey" if aims or number % 2 else "decrypt") if encrypted else "encrypt"
        words = ["--deep"] if command == "rekey" else []
        ident = cluster.ask("vm", command, vm.name, *words, "--detach")["id"]
        if aims:
            _until_at_host(cluster, ident, aims[0])
        else:
            time.sleep(chance.uniform(0, lasts[command]))  # the random moment
        cluster.kill_agent(host)
        at = _at_host(cluster, ident)
        cluster.start_agent(host)
        record = _ended(cluster, ident)
        kills.append((command, at, record["state"]))
        told = (seed, kills, record)
        assert record["state"] in ("done", "failed"), told
        if record["state"] == "done":
            encrypted = command != "decrypt"
            lasts[command] = min(lasts[command], _lasted(record))  # QEMU may take seconds more for a LUKS header
            made |= {record["key_id"]} - {""}
        if aims and (at, record["state"]) == (aims[0], "failed"):
            del aims[0]
        assert _who_names(image) == [], told
        assert vm.holds(original), told
        assert is_luks(image) is encrypted, told
        assert sorted(path.name for path in datastore.glob("killed*")) == ["killed.qcow2"], told
        assert _names_in(vm.file.parent) - {"qemu.log", "serial.log"} == ({"vm.toml"} if encrypted else set()), told
        _until_keys_are(cluster, vm, made, told)
        cluster.sealift("vm", "start", vm.name)
        cluster.sealift("vm", "stop", vm.name, "--force")
    print(f"seed {seed}: {kills}")
    assert not aims, (seed, kills)
    vm.forget()


def _lasted(record: dict[str, Any]) -> float:
    began, ended = (datetime.fromisoformat(record[name]) for name in ("created_at", "finished_at"))
    return (ended - began).total_seconds()


def _qemu_img(*words: str | Path) -> None:
    subprocess.run(["qemu-img", *words], check=True, timeout=PATIENCE_S, stdin=subprocess.DEVNULL)


def _names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()} if directory.exists() else set()


def _who_names(image: Path) -> list[str]:
    """The command lines of processes that have to do with an image or a copy of it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return [words for words in found if str(image) in words]


def _at_host(cluster: Cluster, ident: str) -> str:
    """The state of a conversion in the journal of its agent; empty when it is not there, or not any more."""
    database = cluster.hosts["a"].state / "agent.db"
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as journal:
        row = journal.execute("select status from conversion where id = ?", (ident,)).fetchone()
    return str(json.loads(row[0])["state"]) if row else ""


def _until_at_host(cluster: Cluster, ident: str, state: str) -> None:
    """Until a conversion is in this state, which may be over before it was seen; a journal tells nobody of itself."""
    before = ("", "copying", "verifying")[: ("copying", "verifying").index(state) + 1]
    end, seen = time.monotonic() + PATIENCE_S, False
    while (at := _at_host(cluster, ident)) in before and (at or not seen) and time.monotonic() < end:
        seen = seen or bool(at)
        time.sleep(0.002)


def _active_keys(cluster: Cluster, uuid: str = "") -> set[str]:
    """The keys that the provider has and that were not destroyed: those of one VM, or all."""
    book = cluster.directory / "controller" / "providers" / Home.name / "keys.db"
    with contextlib.closing(sqlite3.connect(f"file:{book}?mode=ro", uri=True)) as database:
        rows = database.execute("select key_id from keys where label like ? and state != 'destroyed'", (f"%{uuid}%",))
        return {key_id for (key_id,) in rows}


def _until_keys_are(cluster: Cluster, vm: _Vm, made: set[str], told: object) -> None:
    """Each conversion that was done has left its key at the provider; none that was not, unless an event says so."""
    end = time.monotonic() + PATIENCE_S
    while True:
        database = cluster.directory / "controller" / "controller.db"
        with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as controller:
            events = controller.execute("select text from events where type = 'key.left_over'").fetchall()
        left = " ".join(text for (text,) in events)
        others = {key for key in _active_keys(cluster, vm.uuid) ^ made if key not in left}
        if not others:
            return
        assert time.monotonic() < end, (told, others)


def _ended(cluster: Cluster, ident: str) -> dict[str, Any]:
    """A conversion's record once it has ended; every look is a command of its own."""
    end = time.monotonic() + PATIENCE_S
    while True:
        record: dict[str, Any] = cluster.ask("conversion", "show", ident)
        if record["finished"]:
            return record
        assert time.monotonic() < end, record
