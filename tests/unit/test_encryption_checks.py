"""The plan of a conversion: each thing that stands against it, and nothing where nothing does."""

from __future__ import annotations

from dataclasses import replace
from uuid import UUID

import pytest

from sealift.domain.checks import Finding
from sealift.domain.conversion import ConversionKind, DiskFacts
from sealift.domain.encryption_checks import LUKS_ROOM_BYTES, ConversionFacts, check_conversion, needed_bytes
from sealift.domain.host import HostCapabilities
from sealift.domain.vm import Accelerator, Disk, VmConfig, VmState

GIB = 1 << 30
ENCRYPT, DECRYPT, REKEY = ConversionKind.ENCRYPT, ConversionKind.DECRYPT, ConversionKind.REKEY
HOST = HostCapabilities(
    UUID(int=1), "a", "0.1.0", True, "", (1,), True, 5.0, "7.2.22", ("pc-q35-7.2",), (Accelerator.TCG,), GIB, "a:1", "T"
)
RAW, QCOW2 = Disk("/store/0", "raw"), Disk("/store/1", "qcow2")
IMAGE = DiskFacts("", True, GIB, GIB // 4, 8 * GIB, "ext4")
CONFIG = VmConfig("vm1", UUID(int=2), 1, 64 << 20, disks=(RAW, QCOW2))
GOOD = ConversionFacts("vm1", "a", ENCRYPT, CONFIG, False, VmState.STOPPED, (IMAGE, IMAGE), HOST, False, False)


def found(facts: ConversionFacts, severity: str) -> list[str]:
    """The texts of the findings of one severity."""
    return [finding.text for finding in check_conversion(facts) if finding.severity == severity]


@pytest.mark.parametrize(
    "facts",
    [
        GOOD,
        replace(GOOD, state=VmState.CRASHED),
        replace(GOOD, guard_blind=True),
        replace(GOOD, kind=DECRYPT, encrypted=True),
        replace(GOOD, kind=REKEY, encrypted=True, runs_controller=True),
        replace(
            GOOD,
            config=replace(CONFIG, disks=(replace(RAW, size_bytes=GIB), QCOW2)),
            images=(DiskFacts("", free_bytes=GIB, filesystem="ext4"), IMAGE),
            is_new=True,
        ),
    ],
)
def test_nothing_stands_against_it(facts: ConversionFacts) -> None:
    assert found(facts, "error") == []


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (replace(GOOD, encrypted=True), "is encrypted already"),
        (replace(GOOD, kind=DECRYPT), "is not encrypted"),
        (replace(GOOD, kind=REKEY), "is not encrypted"),
        (replace(GOOD, state=None), "does not know VM vm1"),
        (replace(GOOD, state=VmState.RUNNING), "vm1 is running"),
        (replace(GOOD, state=VmState.MIGRATED), "vm1 is migrated"),
        (replace(GOOD, config=replace(CONFIG, disks=()), images=()), "has no disk"),
        (replace(GOOD, config=replace(CONFIG, role="controller")), "could not unlock itself"),
        (replace(GOOD, runs_controller=True), "could not unlock itself"),
        (replace(GOOD, images=(replace(IMAGE, snapshots=1), IMAGE)), "1 internal snapshot,"),
        (replace(GOOD, images=(replace(IMAGE, snapshots=3), IMAGE)), "3 internal snapshots,"),
        (replace(GOOD, images=(IMAGE, replace(IMAGE, backing=True))), "refers to another file"),
        (replace(GOOD, images=(replace(IMAGE, block_device=True), IMAGE)), "is a block device"),
        (replace(GOOD, images=(replace(IMAGE, error="it is gone"), IMAGE)), "it is gone"),
        (replace(GOOD, images=(replace(IMAGE, exists=False), IMAGE)), "is not there"),
        (replace(GOOD, images=(replace(IMAGE, free_bytes=GIB), replace(IMAGE, free_bytes=GIB))), "1024 MiB free"),
    ],
)
def test_each_thing_that_stands_against_it(facts: ConversionFacts, words: str) -> None:
    [text] = found(facts, "error")
    assert words in text
    assert all(finding.todo for finding in check_conversion(facts))


def test_a_disk_that_is_not_there_is_made_only_for_a_new_vm_that_is_encrypted() -> None:
    """That of another may lie on a datastore that is away just now."""
    disks = (replace(RAW, size_bytes=GIB), QCOW2)
    gone = replace(GOOD, config=replace(CONFIG, disks=disks), images=(replace(IMAGE, exists=False), IMAGE), is_new=True)
    assert found(gone, "error") == []
    for other in (
        replace(gone, is_new=False),
        replace(gone, kind=REKEY, encrypted=True),
        replace(gone, kind=DECRYPT, encrypted=True, is_new=False),
        replace(gone, config=CONFIG),
    ):
        [text] = found(other, "error")
        assert "is not there" in text


def test_of_an_image_whose_content_is_not_known_all_is_reckoned_and_that_is_said() -> None:
    one = replace(GOOD, config=replace(CONFIG, disks=(QCOW2,)))
    tight = replace(IMAGE, content_bytes=None, free_bytes=1 << 20)
    [text] = found(replace(one, images=(tight,)), "error")
    assert f"(reckoned with all of {QCOW2.path}: how much is in it could not be read in time)" in text
    [text] = found(replace(one, images=(replace(tight, content_bytes=GIB),)), "error")
    assert "reckoned" not in text


def test_images_on_one_file_system_share_its_room() -> None:
    """One image fits, two do not; on two file systems both do."""
    room = GIB + LUKS_ROOM_BYTES
    tight = replace(IMAGE, content_bytes=GIB, free_bytes=room)
    assert len(found(replace(GOOD, images=(tight, tight)), "error")) == 1
    # Another directory with another figure is another place.
    disks = (RAW, replace(QCOW2, path="/other/1"))
    apart = replace(GOOD, config=replace(CONFIG, disks=disks), images=(tight, replace(tight, free_bytes=room + 4096)))
    assert found(apart, "error") == []
    # In one directory a figure that moved meanwhile makes no difference.
    together = replace(GOOD, images=(tight, replace(tight, free_bytes=room + 4096)))
    assert len(found(together, "error")) == 1
    # Nor on one device, whatever the directories.
    same = (replace(tight, device=7), replace(tight, device=7, free_bytes=room + 4096))
    assert len(found(replace(apart, images=same), "error")) == 1


@pytest.mark.parametrize(
    ("kind", "disk", "image", "needed"),
    [
        (ENCRYPT, RAW, IMAGE, GIB + LUKS_ROOM_BYTES),
        (REKEY, RAW, IMAGE, GIB + LUKS_ROOM_BYTES),
        (DECRYPT, RAW, IMAGE, GIB),
        (ENCRYPT, QCOW2, IMAGE, GIB // 4 + LUKS_ROOM_BYTES),
        (ENCRYPT, QCOW2, replace(IMAGE, content_bytes=None), GIB + GIB // 4096 + LUKS_ROOM_BYTES),
        (ENCRYPT, replace(RAW, size_bytes=GIB), replace(IMAGE, exists=False), LUKS_ROOM_BYTES),
        (ENCRYPT, RAW, replace(IMAGE, exists=False), 0),
    ],
)
def test_the_room_that_a_new_image_needs(kind: ConversionKind, disk: Disk, image: DiskFacts, needed: int) -> None:
    assert needed_bytes(kind, disk, image) == needed


@pytest.mark.parametrize(("kind", "encrypted"), [(ENCRYPT, True), (DECRYPT, False), (REKEY, False)])
def test_of_a_vm_that_is_already_what_it_is_to_become_nothing_else_is_said(
    kind: ConversionKind, encrypted: bool
) -> None:
    other = Finding("error", "the provider is away", "bring it back")
    much = replace(GOOD, kind=kind, encrypted=encrypted, state=VmState.RUNNING, images=(replace(IMAGE, links=2),) * 2)
    [finding] = check_conversion(much, [other])
    assert finding.severity == "error"
    assert finding.text.endswith("encrypted already" if encrypted else "not encrypted")


def test_what_remains_is_said_when_nothing_stands_against_it() -> None:
    other = Finding("error", "the provider is away", "bring it back")
    assert any("was in clear" in text for text in found(GOOD, "warning"))
    assert check_conversion(GOOD, [other]) == [other]
    assert found(replace(GOOD, state=VmState.RUNNING), "warning") == []


def test_the_hint_of_an_image_that_says_itself_what_to_do() -> None:
    for todo, said in (("correct its path", "correct its path"), ("", "see that the agent can read and write it")):
        bad = replace(IMAGE, error="it is a directory", todo=todo)
        [finding] = check_conversion(replace(GOOD, images=(bad, IMAGE)))
        assert (finding.severity, finding.todo) == ("error", said)


def test_dirty_bitmaps_are_named() -> None:
    marked = replace(IMAGE, bitmaps=tuple(f"day{number}" for number in range(7)))
    for kind, encrypted in ((ENCRYPT, False), (DECRYPT, True), (REKEY, True)):
        texts = found(replace(GOOD, kind=kind, encrypted=encrypted, images=(IMAGE, marked)), "warning")
        assert sum("/store/1" in text and "day0, day1, day2, day3, day4 and 2 more" in text for text in texts) == 1


def test_warnings() -> None:
    slow = replace(GOOD, host=replace(HOST, aes_instructions=False, aes_gcm_gb_per_s=0.12))
    shrinking = replace(IMAGE, filesystem="btrfs", shrinks=True)
    texts = found(replace(slow, images=(shrinking, IMAGE)), "warning")
    assert [any(words in text for text in texts) for words in ("btrfs", "0.12 GB/s", "erased for sure")] == [True] * 3
    assert found(replace(slow, kind=DECRYPT, encrypted=True, images=(shrinking, IMAGE)), "warning") == []
    assert found(replace(GOOD, kind=REKEY, encrypted=True), "warning") == []
    linked = replace(GOOD, images=(IMAGE, replace(IMAGE, links=3)))
    assert any("/store/1" in text and "3 names" in text for text in found(linked, "warning"))
    assert found(replace(linked, kind=REKEY, encrypted=True), "warning") == []
    made = replace(CONFIG, disks=(replace(RAW, size_bytes=GIB),))
    assert found(replace(GOOD, config=made, images=(replace(IMAGE, exists=False),)), "warning") == []
