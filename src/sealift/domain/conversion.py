"""Encrypting, decrypting and deep-rekeying the disks of a stopped VM: each is a full copy into new images.

Both the order of a conversion and what a host reports of it. The keys travel behind the order (``domain.deks``).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal
from uuid import UUID

from sealift.domain.vm import VmConfig


class ConversionKind(Enum):
    """What is done to the disks."""

    ENCRYPT = "encrypt"
    DECRYPT = "decrypt"
    REKEY = "rekey"  # deep: new data-encryption keys, a new LUKS master key, a full copy


def again(kind: ConversionKind, vm_name: str, *, is_new: bool = False) -> str:
    """What to do to have it anew; ``is_new``: the VM was to be created for it, and is not kept."""
    if is_new:
        return "run the same `sealift vm create` again"
    return f"run `sealift vm {kind.value} {vm_name}{' --deep' if kind is ConversionKind.REKEY else ''}` again"


@dataclass(frozen=True)
class ConversionOrder:
    """One conversion. Disk n of ``config`` becomes the image that disk n of the VM is now, under the key it names.

    ``config`` is the VM's configuration afterwards: the same disks at the same paths, other ``dek``s. ``file`` is its
    configuration file afterwards, byte for byte (latin-1); empty when it is in clear then. ``verify``: read back a
    sample of each new image, or all of it, and compare with the old one before the swap. ``is_new``: the VM was defined
    for this and has never run, so a disk with a ``size_bytes`` whose image is not there is made anew.
    """

    id: UUID
    vm: UUID
    fence: int
    kind: ConversionKind
    config: VmConfig
    file: str
    verify: Literal["sample", "full"]
    is_new: bool = False


class ConversionState(Enum):
    """Where a conversion stands at its host. The old images are in place until SWAPPING, which is durable."""

    COPYING = "copying"
    VERIFYING = "verifying"
    SWAPPING = "swapping"  # decided: after a crash the host goes on from here, never back
    DONE = "done"
    FAILED = "failed"  # old images in place, nothing of the new ones left
    CANCELLED = "cancelled"  # the same, because somebody asked


CONVERSION_FINAL = frozenset({ConversionState.DONE, ConversionState.FAILED, ConversionState.CANCELLED})


@dataclass(frozen=True)
class ConversionStatus:
    """A host's report of a conversion; bytes of virtual disk copied so far and in all.

    ``decided``: it has been SWAPPING. One that failed all the same may have left an image under the new keys.
    """

    id: UUID
    vm: UUID
    state: ConversionState
    done_bytes: int = 0
    total_bytes: int = 0
    error_slug: str = ""
    error: str = ""
    todo: str = ""
    decided: bool = False


@dataclass(frozen=True)
class DiskFacts:
    """What a host says of one image and of where it lies, for a plan. Bytes; ``error`` says why the rest is not known.

    ``todo`` what to do about that. ``virtual_bytes`` is the size the guest sees, ``content_bytes`` (qcow2) how much a
    copy without compression occupies at most, a LUKS header aside; None when that is not known. ``filesystem`` is the
    type in /proc/self/mountinfo; ``shrinks``: the datastore can compress or deduplicate (btrfs, zfs, vdo).
    """

    path: str
    exists: bool = False
    virtual_bytes: int = 0
    content_bytes: int | None = None
    free_bytes: int = 0
    filesystem: str = ""
    shrinks: bool = False
    block_device: bool = False
    snapshots: int = 0
    backing: bool = False  # refers to another file
    links: int = 1  # names of the image's file; with more than one, another keeps what is replaced here
    error: str = ""
    todo: str = ""
    device: int = 0  # number of the file system, where its room is counted
    bitmaps: tuple[str, ...] = ()  # names of the dirty bitmaps that incremental backups keep in a qcow2 image
