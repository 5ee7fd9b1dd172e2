"""Where a native key provider's key derivation key (KDK) lies: sealed by systemd-creds, or in a file of its own.

    kdk.cred    systemd-creds(1) sealed it to this machine: to its TPM where it has one, and to the host's secret in
                /var/lib/systemd. A backup of Sealift's state does not open it; with a TPM a stolen disk does not
                either. Root on the machine does.
    kdk         32 raw bytes, mode 0600: whoever reads the file, or a backup of it, has the key

With a TPM the seal is bound to no PCR: an update of the firmware must not lock every VM. The key goes to and from
systemd-creds through pipes. It is never in the database, on a command line or in the environment.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from enum import Enum
from pathlib import Path
from typing import Final

from sealift.errors import AlreadyExists, ProviderUnreachable
from sealift.secret import Secret

KDK_BYTES: Final = 32
TOOL: Final = "systemd-creds"
_TIMEOUT_S: Final = 30
_BOOTED: Final = Path("/run/systemd/system")  # sd_booted(3)


class KeyStorage(Enum):
    """How the KDK is kept; the value is the name of its file."""

    SYSTEMD_CREDS = "kdk.cred"
    FILE = "kdk"


def choose_storage(*, booted: bool, seals: bool) -> KeyStorage:
    """systemd-creds where systemd is this machine's init and it just sealed and opened something, else a file.

    In a container without systemd the host's secret would be thrown away with the container, and the KDK with it.
    """
    return KeyStorage.SYSTEMD_CREDS if booted and seals else KeyStorage.FILE


def find_storage() -> KeyStorage:
    """What is to be had on this machine; may take seconds (TPM)."""
    booted = _BOOTED.is_dir()
    return choose_storage(booted=booted, seals=booted and seals_here())


def seals_here() -> bool:
    """Whether systemd-creds seals a trial value here and opens it again; False where it is not there.

    It makes the host's secret when there is none yet.
    """
    trial = Secret(bytes(KDK_BYTES), length=KDK_BYTES)
    try:
        return _open("trial", _seal("trial", trial)).reveal() == trial.reveal()
    except ProviderUnreachable:
        return False


def stored(directory: Path) -> KeyStorage | None:
    """How the KDK in ``directory`` is kept; None when there is none."""
    return next((each for each in KeyStorage if (directory / each.value).exists()), None)


def describe(directory: Path) -> str:
    """The same for people: where it lies, and who could get it."""
    match stored(directory):
        case KeyStorage.SYSTEMD_CREDS:
            path = directory / KeyStorage.SYSTEMD_CREDS.value
            return f"sealed to this machine by systemd-creds, in {path}; root on this machine can open it"
        case KeyStorage.FILE:
            path = directory / KeyStorage.FILE.value
            return f"unsealed, in {path} (mode 0600); whoever can read that file, or a backup of it, has every key"
        case None:
            return f"missing: there is none in {directory}"


def store(name: str, directory: Path, kdk: Secret, storage: KeyStorage) -> None:
    """Keep the KDK of provider ``name``, on the disk when this returns, all of it or nothing.

    Raises AlreadyExists when there is one already, and ProviderUnreachable when systemd-creds fails.
    """
    content = kdk.reveal() if storage is KeyStorage.FILE else _seal(name, kdk)
    path, new = directory / storage.value, directory / f"{storage.value}.new"
    new.unlink(missing_ok=True)  # of a make that was cut off
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(new, path)
    except FileExistsError:
        raise AlreadyExists(f"key provider {name} has its key already", todo="give another name") from None
    finally:
        new.unlink()
    sync_directory(directory)


def sync_directory(directory: Path) -> None:
    """Wait until the entries of ``directory`` are on the disk; raises OSError."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load(name: str, directory: Path) -> Secret:
    """The KDK of provider ``name``; raises ProviderUnreachable. May take seconds (TPM)."""
    storage = stored(directory)
    if storage is None:
        raise _unreachable(name, f"there is no key in {directory}")
    try:
        content = (directory / storage.value).read_bytes()
    except OSError as error:
        raise _unreachable(name, f"{directory / storage.value} cannot be read: {error.strerror}") from None
    if storage is KeyStorage.SYSTEMD_CREDS:
        return _open(name, content)
    if len(content) != KDK_BYTES:
        raise _unreachable(name, f"{directory / storage.value} does not have {KDK_BYTES} bytes")
    return Secret(content, length=KDK_BYTES)


def _seal(name: str, kdk: Secret) -> bytes:
    # --with-key=auto is the default, named because it is what the module promises.
    return _creds(
        name, ["encrypt", f"--name=sealift-{name}", "--with-key=auto", "--tpm2-pcrs=", "-", "-"], kdk.reveal()
    )


def _open(name: str, sealed: bytes) -> Secret:
    content = _creds(name, ["decrypt", f"--name=sealift-{name}", "-", "-"], sealed)
    if len(content) != KDK_BYTES:
        raise _unreachable(name, f"{TOOL} gave {len(content)} bytes")
    return Secret(content, length=KDK_BYTES)


def _creds(name: str, arguments: list[str], stdin: bytes) -> bytes:
    tool = shutil.which(TOOL)
    if tool is None:
        raise _unreachable(name, f"{TOOL} is not on this machine")
    try:
        done = subprocess.run([tool, *arguments], input=stdin, capture_output=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        if isinstance(error, subprocess.TimeoutExpired):
            error.output = None  # it would be the key
        raise _unreachable(name, f"{TOOL} did not run to its end ({type(error).__name__})") from None
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["without a word"]
        raise _unreachable(name, f"{TOOL} failed: {said[-1]!a}")
    return done.stdout


def _unreachable(name: str, why: str) -> ProviderUnreachable:
    return ProviderUnreachable(
        f"key provider {name} cannot get its key derivation key: {why}",
        todo="mend that, or remove the provider and import it again under the same name from its export",
    )
