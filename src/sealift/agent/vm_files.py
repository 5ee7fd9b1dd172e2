"""Configuration files of encrypted VMs on this host: ``vms/VM/vm.toml`` in the state directory, mode 0600.

The agent has no key to tell a true file from a changed one. It knows a file by its SHA-256, which the controller's
order to start the VM names, and parses the configuration from those very bytes. That no older file comes back by an
order is its own to see to: the journal keeps the highest generation written for each VM.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from sealift.agent.durable import sync_directory
from sealift.agent.journal import Journal
from sealift.agent.settings import AgentSettings
from sealift.domain.vm import VmConfig
from sealift.errors import Conflict, InvalidInput, SealiftError, VmTampered
from sealift.keys import bundle

_NAME = "vm.toml"


@dataclass(frozen=True)
class VmFile:
    """A configuration file that was parsed: its bytes, and what stands in them."""

    raw: bytes
    generation: int
    config: VmConfig


def parse(raw: bytes, vm: UUID) -> VmFile:
    """The file of ``vm``; raises BundleInvalid for what is none, InvalidInput for another VM's, or for one in clear."""
    found, config = bundle.read(raw)
    if found.vm != vm or config.uuid != vm:
        raise InvalidInput(f"the configuration file in the order for VM {vm} is another VM's")
    if not config.deks:
        raise InvalidInput(f"the configuration file of VM {vm} names no encrypted disk")
    return VmFile(raw, found.generation, config)


def from_order(text: str, vm: UUID) -> VmFile:
    """The same, of a file as orders carry it: its bytes as latin-1."""
    try:
        raw = text.encode("latin-1")
    except UnicodeEncodeError:
        raise InvalidInput(f"the configuration file in the order for VM {vm} is not bytes as latin-1") from None
    return parse(raw, vm)


def sha256(raw: bytes) -> str:
    """The hash by which an order to start names a file, in lower-case hex digits."""
    return hashlib.sha256(raw).hexdigest()


class VmFiles:
    """The files of every encrypted VM here."""

    def __init__(self, settings: AgentSettings, journal: Journal) -> None:
        self._settings, self._journal = settings, journal

    def path(self, vm: UUID) -> Path:
        """Where a VM's file lies."""
        return self._settings.state_directory / "vms" / str(vm) / _NAME

    def read(self, vm: UUID) -> bytes:
        """The file as it is now; empty when there is none. Of one longer than any of ours only the beginning.

        Raises SealiftError when it cannot be read, or is something else than a file.
        """
        path = self.path(vm)
        try:
            # Non-blocking, should somebody have put a pipe in its place.
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise self._unreadable(path, error.strerror) from error
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise self._unreadable(path, "it is no file")
            with open(fd, "rb", closefd=False) as file:
                return file.read(bundle.MAX_FILE_BYTES + 1)
        except OSError as error:
            raise self._unreadable(path, error.strerror) from error
        finally:
            os.close(fd)

    def _unreadable(self, path: Path, why: str | None) -> SealiftError:
        return SealiftError(
            f"host {self._settings.name} cannot read {path}: {why}",
            todo="remove what is there, then put the file back with `sealift vm restore-config`",
        )

    def to_start_from(self, config: VmConfig, named: str) -> VmConfig:
        """The configuration to start a VM from, which the journal knows as ``config``: an encrypted one's is parsed
        from the very bytes whose SHA-256 the order to start it names.

        Raises VmTampered when the file here is another one, InvalidInput for an order with a hash for a VM in clear.
        """
        vm, name, here = config.uuid, config.name, self._settings.name
        if not config.deks:
            if named:
                raise InvalidInput(f"the order to start VM {name} names a configuration file; on {here} it is in clear")
            return config
        raw = self.read(vm)
        if not named or sha256(raw) != named:
            if not raw:
                what = "is missing"
            elif sha256(raw) == self._journal.file_sha256(vm):
                what = "is not the one that the order to start it names"
            else:
                what = "was changed since it was written"
            raise VmTampered(
                f"the configuration file of the encrypted VM {name} on {here} {what}",
                todo=f"`sealift vm show {name}` says what differs; `sealift vm restore-config {name}` puts it back",
            )
        return parse(raw, vm).config

    def refuse_older(self, vm: UUID, file: VmFile) -> None:
        """Raises Conflict for a file older than the newest that this host has written for the VM."""
        highest = self._journal.file_generation(vm)
        if file.generation < highest:
            raise Conflict(
                f"the configuration file in the order for VM {vm} has generation {file.generation}; "
                f"host {self._settings.name} has written {highest}",
                todo="the order comes from the past; look with `sealift vm show`",
            )

    def write(self, vm: UUID, file: VmFile) -> None:
        """Put the file in its place, whole or not at all, durable on return; raises SealiftError."""
        path = self.path(vm)
        new = path.with_name(f"{_NAME}.new")
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with contextlib.suppress(FileNotFoundError):
                new.unlink()  # what an agent left that died here
            fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with open(fd, "wb") as out:
                out.write(file.raw)
                out.flush()
                os.fsync(fd)
            os.replace(new, path)
            sync_directory(path.parent)
        except OSError as error:
            with contextlib.suppress(OSError):
                new.unlink()
            raise SealiftError(
                f"host {self._settings.name} cannot write {path}: {error.strerror}", todo="look at its disk"
            ) from error
        self._journal.note_file(vm, file.generation, sha256(file.raw))

    def remove(self, vm: UUID) -> None:
        """Remove the file, if there is one; the highest generation stays known. Raises SealiftError."""
        path = self.path(vm)
        try:
            for each in (path, path.with_name(f"{_NAME}.new")):
                each.unlink(missing_ok=True)
        except OSError as error:
            raise SealiftError(f"host {self._settings.name} cannot remove {path}: {error.strerror}") from error
