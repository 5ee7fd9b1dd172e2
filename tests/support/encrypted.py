"""Encrypted VMs seen from outside: a key provider that can be taken away, the keys themselves, images under them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

from sealift.demo.cluster import Cluster
from sealift.keys import bundle
from sealift.keys.envelope import unwrap
from sealift.keys.kinds import open_provider

PATIENCE_S = 60.0


class Home:
    """The native key provider ``home`` of a cluster, exported and the default."""

    name = "home"

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._file = cluster.directory / "home.age"
        cluster.ask("key-provider", "add", self.name, "--kind", "native", "--default")
        export = cluster.ask("key-provider", "export", self.name, "--output", str(self._file))
        self._passphrase: str = export["passphrase"]
        self.there = True

    def take_away(self) -> dict[str, Any]:
        """Remove it; what was said of that."""
        removed: dict[str, Any] = self._cluster.ask("key-provider", "remove", self.name, "--force")
        self.there = False
        return removed

    def bring_back(self) -> None:
        """Import its export, if it is away."""
        if not self.there:
            words = ("key-provider", "import", str(self._file), "--passphrase", "-", "--default")
            self._cluster.sealift(*words, input=self._passphrase + "\n")
            self.there = True


@dataclass(frozen=True)
class Keys:
    """The keys of one VM in clear: what must be nowhere."""

    kek: bytes
    deks: dict[UUID, bytes]


def keys_of(cluster: Cluster, vm: str) -> Keys:
    """The keys of an encrypted VM at a native provider, out of what the controller keeps and with its own code."""
    state = cluster.directory / "controller"
    with contextlib.closing(sqlite3.connect(f"file:{state / 'controller.db'}?mode=ro", uri=True)) as database:
        (file,) = database.execute("select config_file from vms where name = ?", (vm,)).fetchone()
    found, _ = bundle.read(file)
    names = {"vm": found.vm, "provider": found.provider, "key_id": found.key_id}

    async def open_it() -> Keys:
        provider = open_provider("native", found.provider, state / "providers" / found.provider, [])
        try:
            kek = await provider.get(found.key_id)
        finally:
            await provider.close()
        assert bundle.authentic(file, kek)
        deks = {one.dek: unwrap(one.wrapped, kek=kek, dek_id=one.dek, **names).reveal() for one in found.deks}
        return Keys(kek.reveal(), deks)

    return asyncio.run(open_it())


def encryption_of(cluster: Cluster, vm: str, state: str) -> dict[str, Any]:
    """What `vm show` says of a VM's encryption, once its state is this; every look is a command of its own."""
    end = time.monotonic() + PATIENCE_S
    while True:
        found: dict[str, Any] = cluster.ask("vm", "show", vm)["encryption"]
        if found["state"] == state:
            return found
        assert time.monotonic() < end, f"the VM is not {state}: {found}"


def same_content(image: Path, image_format: str, dek: bytes | None, original: Path) -> bool:
    """Whether a guest would read the same from an image, opened with its key if it has one, and from a raw one."""
    with contextlib.ExitStack() as stack:
        argv, numbers = ["qemu-img", "compare"], []
        if dek is None:
            options = f"driver={image_format},file.driver=file,file.filename={image}"
        else:
            numbers.append(stack.enter_context(_in_memory(dek.hex().encode())))
            argv += ["--object", f"secret,id=dek,format=raw,file=/proc/self/fd/{numbers[0]}"]
            place = f"file.driver=file,file.filename={image}"
            luks = "driver=luks,key-secret=dek" if image_format == "raw" else "driver=qcow2,encrypt.format=luks"
            options = f"{luks},{place}" + (",encrypt.key-secret=dek" if image_format == "qcow2" else "")
        other = f"driver=raw,file.driver=file,file.filename={original}"
        done = subprocess.run(
            [*argv, "--image-opts", options, other], pass_fds=numbers, capture_output=True, text=True, check=False
        )
    assert done.returncode in (0, 1), done.stderr
    return done.returncode == 0


@contextlib.contextmanager
def _in_memory(content: bytes) -> Iterator[int]:
    number = os.memfd_create("dek")
    try:
        os.write(number, content)
        yield number
    finally:
        os.close(number)


def is_luks(image: Path) -> bool:
    """Whether there is a LUKS header in the image: all of a raw one, or within qcow2."""
    with image.open("rb") as file:
        return b"LUKS\xba\xbe" in file.read(16 << 20)
