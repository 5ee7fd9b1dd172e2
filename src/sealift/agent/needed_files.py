"""The files that a VM needs on its host: whether they can be read, whether they are its own, and images made that are
not there yet. To look may take as long as the datastore does, so ``check_files`` and ``refuse_taken`` are to be called
in a thread."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from uuid import UUID

from sealift.agent.durable import link_into_place, sync_directory
from sealift.agent.new_images import Seen
from sealift.domain.vm import Disk, VmConfig
from sealift.errors import AlreadyExists, Conflict, HypervisorError, NotFound
from sealift.hypervisor.images import Images
from sealift.hypervisor.own_thread import in_own_thread


def check_files(config: VmConfig, host: str, *, but: Collection[str] = ()) -> None:
    """Raises NotFound for a file that the VM needs and this host cannot read; those in ``but`` may be missing."""
    wanted = [disk.path for disk in config.disks if disk.path not in but]
    if config.boot:
        wanted += [path for path in (config.boot.kernel, config.boot.initrd) if path]
    for path in wanted:
        if not os.access(path, os.R_OK):
            raise NotFound(
                f"VM {config.name}: host {host} cannot read {path}",
                todo="create it there, or put it on a datastore that the host sees",
            )


def refuse_taken(config: VmConfig, others: Iterable[VmConfig], host: str) -> None:
    """Raises AlreadyExists for a VM whose name another of this host has, Conflict for a disk that another has."""
    own = {os.path.realpath(disk.path) for disk in config.disks}
    for other in others:
        if other.name == config.name:
            raise AlreadyExists(f"host {host} has a VM named {config.name} already")
        for disk in other.disks:
            if os.path.realpath(disk.path) in own:
                raise Conflict(
                    f"VM {config.name}: the disk {disk.path} is VM {other.name}'s on host {host}",
                    todo="give each VM its own images",
                )


def to_be_made(config: VmConfig) -> frozenset[str]:
    """Paths of images that need not be there: their size is known."""
    return frozenset(disk.path for disk in config.disks if disk.size_bytes)


async def make_images(config: VmConfig, images: Images) -> None:
    """Make, empty and in clear, each image in clear that has a size and is not there; all of them or none.

    One that somebody has written to since is not removed again: another host may have taken it for its own VM's.
    Raises what ``Images.create`` raises, AlreadyExists too for a file that came meanwhile.
    """
    made: dict[str, Seen] = {}
    try:
        for disk in await in_own_thread(_missing, config):
            made[disk.path] = await _make(disk, config.uuid, images)
    except BaseException:
        await in_own_thread(_unlink_unchanged, made)
        raise


async def _make(disk: Disk, vm: UUID, images: Images) -> Seen:
    """Under another name, the VM's own: what an agent leaves that ends meanwhile is never taken for the image."""
    new = os.path.join(os.path.dirname(disk.path), f".sealift-{vm.hex}")
    await in_own_thread(_unlink, [new])
    await images.create(new, disk.format, disk.size_bytes, None)
    try:
        return await in_own_thread(_put, new, disk.path)
    except FileExistsError:
        raise AlreadyExists(f"there is a file at {disk.path} already", todo="look who made it") from None
    except OSError as error:
        raise HypervisorError(f"the image {disk.path} cannot be made: {error.strerror}") from error
    finally:
        await in_own_thread(_unlink, [new])


def _put(new: str, path: str) -> Seen:
    seen = Seen.of(os.lstat(new))
    link_into_place(new, path)
    sync_directory(Path(path).parent)
    return seen


def _unlink(paths: list[str]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):  # not there, or a later definition removes it
            os.unlink(path)


def _unlink_unchanged(made: Mapping[str, Seen]) -> None:
    for path, seen in made.items():
        with contextlib.suppress(OSError):
            if Seen.of(os.lstat(path)) == seen:
                os.unlink(path)


def _missing(config: VmConfig) -> list[Disk]:
    return [disk for disk in config.disks if disk.size_bytes and disk.dek is None and not os.path.lexists(disk.path)]
