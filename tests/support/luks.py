"""Encrypted images for tests. qemu-img spends seconds on each new one, timing its PBKDF2, so one of each is copied."""

from __future__ import annotations

import functools
import json
import secrets
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Literal

from sealift.hypervisor.passphrase import Passphrase
from sealift.secret import Secret

DISK_BYTES = 4 << 20
Format = Literal["qcow2", "raw"]


def new_key() -> Secret:
    """A key that opens nothing yet."""
    return Secret(secrets.token_bytes(32), length=32)


@functools.cache
def _made(format: Format) -> tuple[bytes, Secret]:
    """The bytes of an empty encrypted image of ``DISK_BYTES``, and its key."""
    key = new_key()
    with tempfile.TemporaryDirectory(prefix="sll-") as directory, Passphrase() as passphrase:
        passphrase.fill(key)
        path = f"{directory}/image"
        driver, prefix = ("qcow2", "encrypt.format=luks,encrypt.") if format == "qcow2" else ("luks", "")
        options = f"{prefix}key-secret=k,{prefix.rpartition(',')[2]}iter-time=10"
        secret = f"secret,id=k,file={passphrase.path}"
        words = ["qemu-img", "create", "-q", "--object", secret, "-f", driver, "-o", options, path, str(DISK_BYTES)]
        while subprocess.run(words, pass_fds=[passphrase.fd], capture_output=True).returncode:
            assert shutil.which("qemu-img")  # it fails now and then: "Unable to get accurate CPU usage"
        return Path(path).read_bytes(), key


def encrypted_image(path: Path, format: Format) -> Secret:
    """An empty encrypted image at ``path``; its key, which is that of every other one of this format too."""
    content, key = _made(format)
    path.write_bytes(content)
    return Secret(key.reveal(), length=32)


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
