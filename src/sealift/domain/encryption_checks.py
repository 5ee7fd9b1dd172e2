"""What stands against encrypting, decrypting or deep-rekeying a VM's disks: all of it at once (promise P7). Pure.

A conversion is a full copy beside each old image, which stays until the copy was verified. So there must be room for
both, and nothing else may refer to the old image or live in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from sealift.domain.checks import Finding
from sealift.domain.conversion import ConversionKind, DiskFacts
from sealift.domain.host import HostCapabilities
from sealift.domain.vm import Disk, VmConfig, VmState

LUKS_ROOM_BYTES = 4 << 20
"""For a LUKS header (QEMU writes 2 MiB for one with AES-256-XTS) and a little metadata; also that of an empty image."""

_NAMED = 5
"""As many dirty bitmaps are named in a finding."""


@dataclass(frozen=True)
class ConversionFacts:
    """What was seen for one planned conversion.

    ``config`` is the VM's configuration as it is, ``images`` what its host says of each of its disks, in their order.
    ``state`` is None when the host does not know the VM. ``runs_controller``: this controller was found to run in it.
    ``is_new``: the VM was never defined before, so its images may be made. ``guard_blind``: the controller runs in some
    VM, and could not find out in which.
    """

    vm_name: str
    host_name: str
    kind: ConversionKind
    config: VmConfig
    encrypted: bool
    state: VmState | None
    images: tuple[DiskFacts, ...]
    host: HostCapabilities
    runs_controller: bool
    is_new: bool
    guard_blind: bool = False


def check_conversion(facts: ConversionFacts, others: Sequence[Finding] = ()) -> list[Finding]:
    """Every finding about a conversion, errors first, with ``others`` that were made elsewhere.

    Of a VM that is already what it is to become nothing else matters.
    """
    if done := [*_already(facts)]:
        return done
    found = [*_vm(facts), *_guard(facts)]
    for disk, image in zip(facts.config.disks, facts.images, strict=True):
        found += _image(facts, disk, image)
    found += [*_room(facts), *others, *_datastores(facts), *_speed(facts)]
    if not any(finding.severity == "error" for finding in found):
        found += _remains(facts)
    return sorted(found, key=lambda finding: finding.severity != "error")


def _error(text: str, todo: str) -> Finding:
    return Finding("error", text, todo)


def _warning(text: str, todo: str) -> Finding:
    return Finding("warning", text, todo)


def _already(facts: ConversionFacts) -> Iterable[Finding]:
    name, kind = facts.vm_name, facts.kind
    if kind is ConversionKind.ENCRYPT and facts.encrypted:
        yield _error(f"VM {name} is encrypted already", f"`sealift vm rekey {name}` gives it new keys")
    if kind is not ConversionKind.ENCRYPT and not facts.encrypted:
        yield _error(f"VM {name} is not encrypted", f"`sealift vm encrypt {name}` encrypts it")


def _vm(facts: ConversionFacts) -> Iterable[Finding]:
    name = facts.vm_name
    if facts.state is None:
        yield _error(f"host {facts.host_name} does not know VM {name}", "define it there again")
    elif facts.state not in (VmState.STOPPED, VmState.CRASHED):
        yield _error(
            f"VM {name} is {facts.state.value}; only the disks of a stopped VM can be copied",
            f"`sealift vm stop {name}` first",
        )
    if not facts.config.disks:
        yield _error(f"VM {name} has no disk, so there is nothing to encrypt", "give it a disk")


def _guard(facts: ConversionFacts) -> Iterable[Finding]:
    if facts.kind is not ConversionKind.ENCRYPT:
        return
    todo = "leave it in clear, or encrypt the datastore below it"
    if facts.config.role == "controller":
        yield _error(
            f'VM {facts.vm_name} has role = "controller": encrypted, the controller in it could not unlock itself', todo
        )
    elif facts.runs_controller:
        yield _error(
            f"VM {facts.vm_name} runs this very controller (its uuid is this machine's), which could not unlock itself",
            todo,
        )
    elif facts.guard_blind:
        yield _warning(
            f"it could not be checked whether VM {facts.vm_name} runs this very controller, which could not unlock "
            "itself then: the controller's machine is virtual, and its UUID cannot be read",
            "be sure that it does not; with its systemd unit the controller can read that UUID",
        )


def _image(facts: ConversionFacts, disk: Disk, image: DiskFacts) -> Iterable[Finding]:
    where = f"disk {disk.path} of VM {facts.vm_name}"
    if image.error:
        yield _error(
            f"host {facts.host_name} cannot look at {where}: {image.error}",
            image.todo or "see that the agent can read and write it",
        )
        return
    if not image.exists:
        # One that was there and is not now lies most likely on a datastore that is away: never another in its place.
        if not facts.is_new:
            yield _error(f"{where} is not there on host {facts.host_name}", "is its datastore mounted? put it back")
        elif facts.kind is not ConversionKind.ENCRYPT or not disk.size_bytes:
            yield _error(
                f"{where} is not there on host {facts.host_name}", "put it there, or give it a size to have it made"
            )
        return
    if image.block_device:
        yield _error(
            f"{where} is a block device; there is nowhere to put its copy beside it",
            "copy it to an image file, or encrypt the device below it",
        )
    if image.snapshots:
        yield _error(
            f"{where} has {_number(image.snapshots, 'internal snapshot')}, which a copy would lose",
            "delete them with `qemu-img snapshot -d`, or keep them in a copy of the image",
        )
    if image.backing:
        yield _error(
            f"{where} refers to another file, which would stay as it is",
            "merge both into one image with `qemu-img convert`",
        )
    if image.bitmaps:
        left = len(image.bitmaps) - _NAMED
        names = ", ".join(image.bitmaps[:_NAMED]) + (f" and {left} more" if left > 0 else "")
        yield _warning(
            f"{where} has dirty bitmaps, which a copy loses: {names}",
            "have a full backup made afterwards; an incremental one has nothing to go by until then",
        )
    if image.links > 1 and facts.kind is ConversionKind.ENCRYPT:
        yield _warning(
            f"{where} is a file with {image.links} names; under the others the image in clear stays",
            f"find them with `find -samefile {disk.path}`, and remove them when nothing needs them",
        )


def needed_bytes(kind: ConversionKind, disk: Disk, image: DiskFacts) -> int:
    """What a new image may occupy beside the old one, at most: for the plan, and for the host that carries it out.

    Within qcow2 only what was ever written is copied. A raw image has no map: as LUKS every block of it is written,
    and decrypted it may have no holes.
    """
    if not image.exists:
        return LUKS_ROOM_BYTES if disk.size_bytes else 0
    if disk.format == "qcow2":
        full = image.virtual_bytes + image.virtual_bytes // 4096  # with tables, which take less than that
        return (full if image.content_bytes is None else image.content_bytes) + LUKS_ROOM_BYTES
    return image.virtual_bytes + (0 if kind is ConversionKind.DECRYPT else LUKS_ROOM_BYTES)


@dataclass
class _Place:
    """Where images share the room: known by its device, a directory, or a type and a figure that are the same."""

    directory: str
    free_bytes: int
    marks: set[object]
    wanted: int = 0
    unknown: list[str] = field(default_factory=list)
    """Disks of which it is not known how much they hold, so that all of them was reckoned with."""


def _room(facts: ConversionFacts) -> Iterable[Finding]:
    """Images on one file system share its room. Two places that cannot be told apart count as one."""
    places: list[_Place] = []
    for disk, image in zip(facts.config.disks, facts.images, strict=True):
        if image.error or image.block_device:
            continue
        directory = str(PurePosixPath(disk.path).parent)
        marks: set[object] = {directory, (image.filesystem, image.free_bytes), image.device or directory}
        place = next((place for place in places if place.marks & marks), None)
        if place is None:
            places.append(place := _Place(directory, image.free_bytes, set()))
        place.marks |= marks
        place.wanted += needed_bytes(facts.kind, disk, image)
        if image.exists and disk.format == "qcow2" and image.content_bytes is None:
            place.unknown.append(disk.path)
    for place in places:
        if place.wanted > place.free_bytes:
            yield _error(
                f"{place.directory} on host {facts.host_name} has {_mib(place.free_bytes)} free; "
                f"the new images may need {_mib(place.wanted)} beside the old ones{_whole(place.unknown)}",
                "make room there; the old images go only when the new ones were verified",
            )


def _whole(unknown: list[str]) -> str:
    if not unknown:
        return ""
    return f" (reckoned with all of {', '.join(unknown)}: how much is in it could not be read in time)"


def _datastores(facts: ConversionFacts) -> Iterable[Finding]:
    if facts.kind is ConversionKind.DECRYPT:
        return
    for disk, image in zip(facts.config.disks, facts.images, strict=True):
        if image.shrinks:
            yield _warning(
                f"disk {disk.path} lies on a datastore ({image.filesystem}) that can compress or deduplicate; "
                "encrypted data does not shrink",
                "expect it to occupy its full size; encrypt below that datastore instead if room is short",
            )


def _speed(facts: ConversionFacts) -> Iterable[Finding]:
    if facts.kind is not ConversionKind.DECRYPT and not facts.host.aes_instructions:
        yield _warning(
            f"host {facts.host_name} has no AES instructions, so encrypted disks will be slow there: "
            f"{facts.host.aes_gcm_gb_per_s:.2f} GB/s of AES-256-GCM measured, for the AES-256-XTS of the disks",
            "expect it, or move the VM to another host first",
        )


def _remains(facts: ConversionFacts) -> Iterable[Finding]:
    if facts.kind is ConversionKind.ENCRYPT and any(image.exists for image in facts.images):
        yield _warning(
            f"what VM {facts.vm_name} has stored so far was in clear; on SSDs and copy-on-write storage the remains of "
            "the old image cannot be erased for sure",
            "treat that storage, its snapshots and its backups as holding the VM in clear until they are destroyed",
        )


def _number(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")


def _mib(size_bytes: int) -> str:
    return f"{size_bytes >> 20} MiB"
