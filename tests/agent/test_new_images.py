"""New images put in their place and removed, in a directory that others may write to and that may be away."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from sealift.agent import new_images
from sealift.agent.new_images import NewImage, Place, complete, dress, place_for, swap
from sealift.errors import Conflict, ConversionFailed
from sealift.hypervisor.images import FileId


def identity(path: Path) -> FileId:
    found = path.lstat()
    return FileId(found.st_dev, found.st_ino)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """An old image; its new one lies beside it."""
    (tmp_path / "store").mkdir()
    path = tmp_path / "store" / "disk"
    path.write_text("old")
    return path


@pytest.fixture
def new(old: Path) -> Path:
    path = old.with_name("disk.sealift-0")
    path.write_text("new")
    return path


def completed(old: Path, new: Path) -> NewImage:
    place = Place(str(old), str(new), *(new_images.Seen.of(path.stat()) for path in (old.parent, old)))
    return complete(place, identity(new))


def put_another(new: Path, how: str) -> None:
    """Somebody else's file under the new image's name."""
    if how == "written to":
        new.write_text("other content")
        return
    new.rename(new.with_name("taken away"))
    if how == "a symbolic link":
        new.symlink_to("taken away")
    elif how == "a file that looks the same":
        new.write_text("not")
        times = new.with_name("taken away").stat()
        os.utime(new, ns=(times.st_atime_ns, times.st_mtime_ns))
    else:
        os.mkfifo(new)


@pytest.mark.parametrize("how", ["a symbolic link", "a file that looks the same", "a pipe"])
def test_another_file_is_neither_dressed_nor_taken_for_the_new_image(old: Path, new: Path, how: str) -> None:
    made, place = identity(new), Place(str(old), str(new), *[new_images.Seen.of(old.stat())] * 2)
    old.chmod(0o666)
    mode = new.stat().st_mode
    put_another(new, how)
    with pytest.raises((ConversionFailed, OSError)):
        dress(str(old), str(new), made, 0o7777)
    assert new.with_name("taken away").stat().st_mode == mode
    with pytest.raises(ConversionFailed, match="replaced by another file"):
        complete(place, made)


@pytest.mark.parametrize("how", ["a symbolic link", "a file that looks the same", "a pipe", "written to"])
def test_another_file_does_not_take_an_images_place(old: Path, new: Path, how: str) -> None:
    image = completed(old, new)
    put_another(new, how)
    with pytest.raises(ConversionFailed, match="replaced by another file"):
        swap([image], found_again=False)
    assert old.read_text() == "old"


def test_an_image_is_found_again_on_a_device_with_another_number(old: Path, new: Path) -> None:
    """As after a restart of the host; the agent that made it knows better."""
    image = replace(completed(old, new), device=0)
    with pytest.raises(ConversionFailed):
        swap([image], found_again=False)
    for _ in range(2):  # the second time it is in its place
        assert swap([image], found_again=True)
        assert old.read_text() == "new"


def test_a_file_that_appeared_is_not_overwritten(old: Path, new: Path) -> None:
    image = replace(completed(old, new), made=True)
    with pytest.raises(ConversionFailed, match="has appeared"):
        swap([image], found_again=False)
    assert old.read_text() == "old"
    old.unlink()
    os.link(new, old)  # an agent ended here
    for _ in range(2):
        assert swap([image], found_again=True)
    assert [path.name for path in old.parent.iterdir()] == ["disk"]
    assert old.read_text() == "new"


def test_what_is_in_the_way_of_a_new_image_is_left_alone(old: Path, new: Path) -> None:
    with pytest.raises(Conflict):
        place_for(str(old), str(new), make=False)
    new.unlink()
    new.symlink_to("nowhere")
    with pytest.raises(Conflict):
        place_for(str(old), str(new), make=False)


@pytest.mark.parametrize("make", [True, False])
def test_an_image_is_removed_only_where_it_was_made(old: Path, new: Path, tmp_path: Path, make: bool) -> None:
    content = new.read_text()
    new.unlink()
    if make:
        old.unlink()
    place = place_for(str(old), str(new), make=make)
    new.write_text(content)
    old.parent.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError):
        new_images.remove([place])
    (tmp_path / "elsewhere").rename(old.parent)
    for _ in range(2):
        new_images.remove([place])
        assert not new.exists()
    if not make:  # the VM's disks were removed since
        old.unlink()
        new_images.remove([place])
