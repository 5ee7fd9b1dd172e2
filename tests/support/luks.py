"""Encrypted images for tests: qemu-img spends seconds on each new one, timing its PBKDF2, so one of each is kept."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Literal

from sealift.hypervisor.passphrase import Passphrase
from sealift.secret import Secret
from support.guest import CACHE

DISK_BYTES = 4 << 20
Format = Literal["qcow2", "raw"]


def new_key() -> Secret:
    """A key that opens nothing yet."""
    return Secret(secrets.token_bytes(32), length=32)


def _key(format: Format) -> Secret:
    return Secret(hashlib.sha256(f"key of the kept {format} image".encode()).digest(), length=32)


def _kept(format: Format) -> Path:
    """An empty encrypted image of ``DISK_BYTES``, made at first use in the cache of the test guest."""
    kept = CACHE / f"luks-{DISK_BYTES}.{format}"
    if kept.exists():
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="luks-", dir=kept.parent) as directory, Passphrase() as passphrase:
        passphrase.fill(_key(format))
        path = f"{directory}/image"
        driver, prefix = ("qcow2", "encrypt.") if format == "qcow2" else ("luks", "")
        options = f"{prefix}key-secret=k,{prefix}iter-time=10" + (",encrypt.format=luks" if prefix else "")
        secret = f"secret,id=k,file={passphrase.path}"
        words = ["qemu-img", "create", "-q", "--object", secret, "-f", driver, "-o", options, path, str(DISK_BYTES)]
        for _ in range(20):  # now and then: "Unable to get accurate CPU usage"
            if subprocess.run(words, pass_fds=[passphrase.fd], capture_output=True).returncode == 0:
                break
        os.replace(path, kept)
    return kept


def encrypted_image(path: Path, format: Format) -> Secret:
    """An empty encrypted image at ``path``; its key, which is that of every other one of this format too."""
    shutil.copyfile(_kept(format), path)
    return _key(format)


def qemu_io(path: Path, format: Format, key: Secret, command: str) -> str:
    """What one command of qemu-io on an encrypted image prints."""
    node: dict[str, object] = {"driver": "file", "filename": str(path)}
    if format == "qcow2":
        node = {"driver": "qcow2", "file": node, "encrypt": {"format": "luks", "key-secret": "k"}}
    else:
        node = {"driver": "luks", "file": node, "key-secret": "k"}
    with Passphrase() as passphrase:
        passphrase.fill(key)
        words = ["--object", f"secret,id=k,file={passphrase.path}", "-c", command, f"json:{json.dumps(node)}"]
        ended = subprocess.run(
            ["qemu-io", *words], pass_fds=[passphrase.fd], capture_output=True, text=True, check=True
        )
    return ended.stdout


def read_plain(path: Path, format: Format, key: Secret, offset: int, length: int) -> bytes:
    """What the guest would read there."""
    lines = qemu_io(path, format, key, f"read -v {offset} {length}").splitlines()
    return bytes.fromhex("".join(line[11:].split("  ")[0] for line in lines if line[8:9] == ":"))
