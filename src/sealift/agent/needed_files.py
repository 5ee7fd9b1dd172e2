"""The files that a VM needs on its host: whether they can be read, and images made that are not there yet."""

from __future__ import annotations

import os
from collections.abc import Collection

from sealift.domain.vm import Disk, VmConfig
from sealift.errors import NotFound
from sealift.hypervisor.images import Images


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


def to_be_made(config: VmConfig) -> frozenset[str]:
    """Paths of images that need not be there: their size is known."""
    return frozenset(disk.path for disk in config.disks if disk.size_bytes)


async def make_images(config: VmConfig, images: Images) -> None:
    """Make, empty and in clear, each image in clear that has a size and is not there; all of them or none.

    Raises what ``Images.create`` raises.
    """
    made: list[str] = []
    try:
        for disk in _missing(config):
            await images.create(disk.path, disk.format, disk.size_bytes, None)
            made.append(disk.path)
    except BaseException:
        for path in made:
            os.unlink(path)
        raise


def _missing(config: VmConfig) -> list[Disk]:
    return [disk for disk in config.disks if disk.size_bytes and disk.dek is None and not os.path.lexists(disk.path)]
