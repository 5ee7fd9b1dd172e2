"""What a conversion has to do, and whether it may begin: decided from the order, the VM's configuration and facts of
its images; pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal
from uuid import UUID

from sealift.agent.new_images import new_path
from sealift.agent.vm_files import VmFile, from_order
from sealift.domain.conversion import ConversionKind, ConversionOrder, DiskFacts, again
from sealift.domain.deks import Deks
from sealift.domain.encryption_checks import needed_bytes
from sealift.domain.vm import Disk, VmConfig
from sealift.errors import Conflict, ConversionFailed, DatastoreFull, InvalidInput, KeysNotHeld, NotFound


@dataclass(frozen=True)
class Step:
    """One disk: the image at ``path`` (real), opened with ``old``, becomes that at ``new``, opened with ``dek``.

    ``make``: there is no old image, an empty one of ``virtual_bytes`` is made.
    """

    path: str
    new: str
    format: Literal["qcow2", "raw"]
    old: UUID | None
    dek: UUID | None
    make: bool
    virtual_bytes: int
    needed_bytes: int


def check_order(order: ConversionOrder, now: VmConfig) -> VmFile | None:
    """The VM's configuration file afterwards, None when it is in clear then.

    Raises InvalidInput or BundleInvalid when the order contradicts itself or the VM as it is now.
    """
    after = order.config
    bad = InvalidInput(
        f"the order to convert the disks of VM {now.name} does not fit the VM or itself",
        todo=again(order.kind, now.name, is_new=order.is_new),
    )
    disks = [(disk.path, disk.format) for disk in now.disks]
    if after.uuid != order.vm or now.uuid != order.vm or [(disk.path, disk.format) for disk in after.disks] != disks:
        raise bad
    encrypted = 0 if order.kind is ConversionKind.DECRYPT else len(disks)
    if not disks or len(after.deks) != encrypted or bool(order.file) is not bool(encrypted):
        raise bad
    if not order.file:
        return None
    file = from_order(order.file, order.vm)
    if file.config != after:
        raise bad
    return file


def check_keys(order: ConversionOrder, now: VmConfig, deks: Deks) -> None:
    """Raises KeysNotHeld when a key of the old or the new images did not come with the order."""
    if missing := {*now.deks, *order.config.deks} - set(deks):
        raise KeysNotHeld(
            f"the order to convert the disks of VM {now.name} came without {len(missing)} of their keys",
            todo=again(order.kind, now.name, is_new=order.is_new),
        )


def plan(order: ConversionOrder, now: VmConfig, facts: Sequence[DiskFacts], real: Sequence[str]) -> list[Step]:
    """The steps; disks that stay as they are have none. ``facts`` and ``real`` (real paths) are those of its disks.

    Raises NotFound, Conflict or ConversionFailed for an image that cannot be converted, with the reason.
    """
    steps = []
    for before, after, fact, path in zip(now.disks, order.config.disks, facts, real, strict=True):
        make = not fact.exists and _may_make(order, before, after)
        if not make and before.dek == after.dek:
            continue
        if not make:
            _refuse_image(now.name, fact)
        size = after.size_bytes if make else fact.virtual_bytes
        steps.append(
            Step(
                path=path,
                new=new_path(path, order.id),
                format=before.format,
                old=before.dek,
                dek=after.dek,
                make=make,
                virtual_bytes=size,
                needed_bytes=needed_bytes(order.kind, after, fact),
            )
        )
    return steps


def _may_make(order: ConversionOrder, before: Disk, after: Disk) -> bool:
    """Whether an image that is not there is none yet, and does not lie on a datastore that is away."""
    is_first = order.is_new and order.kind is ConversionKind.ENCRYPT and before.dek is None and after.dek is not None
    return is_first and bool(after.size_bytes)


def _refuse_image(name: str, fact: DiskFacts) -> None:
    if not fact.exists:
        raise NotFound(f"VM {name}: there is no image {fact.path}", todo="is its datastore mounted?")
    whys = (
        (bool(fact.snapshots), "has snapshots, which would be lost", "delete them first"),
        (fact.backing, "refers to another file", "make it whole first: qemu-img convert -O qcow2 OLD NEW"),
        (fact.block_device, "is a block device, beside which no new image can be made", "move it into a file first"),
    )
    for true, why, todo in whys:
        if true:
            raise Conflict(f"VM {name}: the image {fact.path} {why}", todo=todo)
    if fact.error:
        raise ConversionFailed(f"VM {name}: the image {fact.path} cannot be read: {fact.error}", todo=fact.todo)


def check_room(name: str, steps: Sequence[tuple[Step, int, int]]) -> None:
    """Each with the file system it is on and how many bytes are free there; raises DatastoreFull.

    All new images lie beside the old ones at the same time, until the last one is complete.
    """
    needed: dict[int, int] = {}
    for step, filesystem, free in steps:
        needed[filesystem] = needed.get(filesystem, 0) + step.needed_bytes
        if needed[filesystem] > free:
            raise DatastoreFull(
                f"VM {name}: its new images need {needed[filesystem]} bytes beside {step.path}, where {free} are free",
                todo="make room there; the old images are in place and unchanged",
            )
