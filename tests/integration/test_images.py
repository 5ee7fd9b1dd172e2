"""Images by real qemu-img: made, copied from key to key, compared, cancelled, and out of room."""

# ruff: noqa: ASYNC240
# The checks below look at files between steps; nothing else waits for their loop.

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sealift.domain.conversion import ConversionKind
from sealift.domain.encryption_checks import needed_bytes
from sealift.domain.vm import Disk
from sealift.errors import AlreadyExists, ConversionFailed, DatastoreFull, HypervisorError, QemuMissing
from sealift.hypervisor import image_facts
from sealift.hypervisor.images import MIB, FileId, ImageRef, Images
from sealift.hypervisor.passphrase import Passphrase
from sealift.hypervisor.process import ProcessRef
from support.luks import DISK_BYTES, encrypted_image, new_key, qemu_io

pytestmark = pytest.mark.qemu

SIZE = 8 * MIB + 512
PATTERN = random.Random(1).randbytes(MIB + 512)


def nobody(done: int, total: int) -> None:
    """Who does not want to hear of progress."""


def write_source(path: Path) -> ImageRef:
    """A raw image with data at its begin, its end, and holes between."""
    with path.open("wb") as file:
        file.write(PATTERN)
        file.seek(5 * MIB)
        file.write(PATTERN)
        file.seek(SIZE - len(PATTERN))
        file.write(PATTERN)
    return ImageRef(str(path), "raw", None)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory before all others on PATH; ``around`` puts scripts there that become the tool in the end."""
    directory = tmp_path / "tools"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    return directory


def around(tools: Path, program: str, script: str) -> None:
    real = shutil.which(program)
    assert real is not None
    path = tools / program
    path.write_text(f'#!/bin/sh\nREAL={real}\n{script}\nexec "$REAL" "$@"\n')
    path.chmod(0o755)


def test_a_disk_keeps_its_content_from_key_to_key(tmp_path: Path, tools: Path) -> None:
    said = tmp_path / "said"
    for program in ("qemu-img", "qemu-io"):
        around(tools, program, f'printf "%s\\n" "$@" >>{said}; env >>{said}; pwd >>{said}')
    images, first = Images(), write_source(tmp_path / "source,with a comma")
    before = Path(first.path).read_bytes()
    keys = [new_key(), new_key()]
    targets = [
        ImageRef(str(tmp_path / "encrypted,qcow2"), "qcow2", keys[0]),
        ImageRef(str(tmp_path / "encrypted.raw"), "raw", keys[1]),
        ImageRef(str(tmp_path / "clear.qcow2"), "qcow2", None),
        ImageRef(str(tmp_path / "clear.raw"), "raw", None),
    ]

    async def check() -> None:
        source = first
        for target in targets:
            heard: list[tuple[int, int]] = []
            await images.convert(source, target, lambda *bytes, heard=heard: heard.append(bytes))
            assert heard[-1] == (SIZE, SIZE)
            assert heard == sorted(heard)
            assert {total for _, total in heard} == {SIZE}
            assert stat.S_IMODE(os.stat(target.path).st_mode) == 0o600
            facts = await images.look(target.path, target.format)
            assert (facts.virtual_bytes, facts.error) == (SIZE, "")
            full = target is not targets[1]
            await images.verify(source, target, full=full, on_bytes=lambda *bytes, heard=heard: heard.append(bytes))
            assert heard[-1] == (SIZE, SIZE)
            if target.dek is not None:
                assert PATTERN[:64] not in Path(target.path).read_bytes()
            source = target

    asyncio.run(check())
    assert Path(targets[-1].path).read_bytes() == before == Path(first.path).read_bytes()
    assert os.stat(targets[-1].path).st_blocks * 512 < 5 * MIB, "holes stay holes"
    assert os.stat(targets[0].path).st_blocks * 512 < 8 * MIB, "in an encrypted qcow2 image too"
    text = said.read_bytes()
    assert text.count(b"\nconvert\n") == len(targets), "the listening listens"
    for key in keys:
        assert key.reveal().hex().encode() not in text
        assert key.reveal() not in text
    left = {
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{fd}")
    }
    assert not any("memfd" in link for link in left)


@pytest.mark.parametrize("full", [True, False])
def test_a_difference_is_found(tmp_path: Path, full: bool) -> None:
    source = write_source(tmp_path / "source")
    other = ImageRef(str(tmp_path / "other"), "raw", None)
    for offset in (0, 6 * MIB, SIZE - 1):
        shutil.copy(source.path, other.path)
        with open(other.path, "r+b") as file:
            file.seek(offset)
            was = file.read(1)
            file.seek(offset)
            file.write(bytes([was[0] ^ 1]))
        with pytest.raises(ConversionFailed, match="does not hold what"):
            asyncio.run(Images().verify(source, other, full=full, on_bytes=nobody))
    os.truncate(other.path, SIZE + 512)
    with pytest.raises(ConversionFailed, match=f"{SIZE + 512} bytes"):
        asyncio.run(Images().verify(source, other, full=full, on_bytes=nobody))


def test_a_sample_looks_where_it_was_drawn(tmp_path: Path) -> None:
    """Of 128 MiB, in which one byte differs: found if drawn, and only then."""
    old, new = tmp_path / "old", tmp_path / "new"
    for path in (old, new):
        path.touch()
        os.truncate(path, 128 * MIB)
    with new.open("r+b") as file:
        file.seek(64 * MIB + 1)
        file.write(b"x")
    refs = [ImageRef(str(path), "raw", None) for path in (old, new)]
    asyncio.run(Images(lambda places: places // 4).verify(*refs, full=False, on_bytes=nobody))
    with pytest.raises(ConversionFailed):
        asyncio.run(Images(lambda places: places // 2).verify(*refs, full=False, on_bytes=nobody))


def test_keys_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    async def check() -> None:
        images, target = Images(), ImageRef(str(tmp_path / "target"), "raw", None)
        path = tmp_path / "encrypted"
        key = encrypted_image(path, "qcow2")
        plain = ImageRef(str(tmp_path / "plain"), "qcow2", None)
        await images.create(plain.path, "qcow2", DISK_BYTES, None)
        with pytest.raises(ConversionFailed, match="Invalid password"):
            await images.convert(ImageRef(str(path), "qcow2", new_key()), target, nobody)
        with pytest.raises(ConversionFailed, match="Invalid password"):
            await images.verify(plain, ImageRef(str(path), "qcow2", new_key()), full=True, on_bytes=nobody)
        with pytest.raises(HypervisorError, match="to be in clear"):
            await images.convert(ImageRef(str(path), "qcow2", None), target, nobody)
        with pytest.raises(HypervisorError, match="to be encrypted"):
            await images.convert(ImageRef(plain.path, "qcow2", key), target, nobody)
        assert not Path(target.path).exists()

    asyncio.run(check())


def test_what_a_copy_would_lose_is_refused(tmp_path: Path) -> None:
    async def check() -> None:
        images, target = Images(), ImageRef(str(tmp_path / "target"), "raw", None)
        path = tmp_path / "disk.qcow2"
        await images.create(str(path), "qcow2", MIB, None)
        subprocess.run(["qemu-img", "snapshot", "-c", "before", str(path)], check=True)  # noqa: ASYNC221
        assert (await images.look(str(path), "qcow2")).snapshots == 1
        with pytest.raises(ConversionFailed, match=r"internal snapshots \(1\)"):
            await images.convert(ImageRef(str(path), "qcow2", None), target, nobody)
        overlay = tmp_path / "overlay"
        words = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(path), "-F", "qcow2", str(overlay)]
        subprocess.run(words, check=True)  # noqa: ASYNC221
        assert (await images.look(str(overlay), "qcow2")).backing
        with pytest.raises(HypervisorError, match="refers to another file"):
            await images.convert(ImageRef(str(overlay), "qcow2", None), target, nobody)
        assert not Path(target.path).exists()

    asyncio.run(check())


def test_a_damaged_qcow2_image_does_not_pass(tmp_path: Path) -> None:
    async def check() -> None:
        images = Images()
        refs = [ImageRef(str(tmp_path / name), "qcow2", None) for name in ("old", "new")]
        for ref in refs:
            await images.create(ref.path, "qcow2", MIB, None)
        await images.verify(*refs, full=False, on_bytes=nobody)
        with open(refs[1].path, "r+b") as file:  # noqa: ASYNC230
            file.seek(2 << 16)  # the first refcounts (QEMU docs/interop/qcow2), for images with clusters of 64 KiB
            file.write(bytes(64))
        with pytest.raises(ConversionFailed, match="damaged"):
            await images.verify(*refs, full=False, on_bytes=nobody)

    asyncio.run(check())


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    source, target = write_source(tmp_path / "source"), tmp_path / "target"
    target.write_bytes(b"precious")
    with pytest.raises(AlreadyExists):
        asyncio.run(Images().convert(source, ImageRef(str(target), "qcow2", None), nobody))
    with pytest.raises(AlreadyExists):
        asyncio.run(Images().create(str(target), "raw", MIB, None))
    assert target.read_bytes() == b"precious"


def test_a_program_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(QemuMissing, match="qemu-img"):
        asyncio.run(Images().create(str(tmp_path / "disk"), "raw", MIB, None))
    assert not list(tmp_path.iterdir())


def test_a_creation_that_could_not_be_timed_is_tried_again(tmp_path: Path, tools: Path) -> None:
    """QEMU's own failure, which no input brings about and which removes the file, is acted the first two times."""
    tried, disk = tmp_path / "tried", tmp_path / "disk"
    failing = f'{{ rm {disk}; echo "Unable to get accurate CPU usage" >&2; exit 1; }}'
    around(tools, "qemu-img", f"umask 0; echo >>{tried}; [ $(wc -l <{tried}) -gt 2 ] || {failing}")
    made = asyncio.run(Images().create(str(disk), "raw", MIB, None))
    assert len(tried.read_text()) == 3
    found = disk.stat()
    assert (found.st_size, stat.S_IMODE(found.st_mode)) == (MIB, 0o600)
    assert made == FileId(found.st_dev, found.st_ino)


# --- ends ----------------------------------------------------------------------------------------------------------


def slow(tools: Path, pid_file: Path) -> None:
    """A real copy that takes longer than any test; its pid is noted."""
    around(tools, "qemu-img", f'echo $$ >{pid_file}; [ "$1" != convert ] || {{ shift; set -- convert -r 64K "$@"; }}')


def test_a_cancelled_copy_leaves_nothing(tmp_path: Path, tools: Path) -> None:
    pid_file = tmp_path / "pid"
    slow(tools, pid_file)
    source, target = write_source(tmp_path / "source"), ImageRef(str(tmp_path / "target"), "qcow2", None)
    before = Path(source.path).read_bytes()

    async def check() -> None:
        under_way = asyncio.Event()
        copying = asyncio.create_task(Images().convert(source, target, lambda done, total: under_way.set()))
        async with asyncio.timeout(30):
            await under_way.wait()
            child = ProcessRef.of(int(pid_file.read_text()))
            assert Path(target.path).exists()
            copying.cancel()
            with pytest.raises(asyncio.CancelledError):
                await copying
        assert not child.alive()
        assert not Path(f"/proc/{child.pid}").exists(), "it was reaped"
        assert not Path(target.path).exists()

    asyncio.run(check())
    assert Path(source.path).read_bytes() == before


COPIER = """
import asyncio, sys
from sealift.hypervisor.images import ImageRef, Images
refs = [ImageRef(path, "raw", None) for path in sys.argv[1:]]
asyncio.run(Images().convert(*refs, lambda done, total: print(done, flush=True)))
"""


def test_a_copy_dies_with_its_agent(tmp_path: Path, tools: Path) -> None:
    pid_file = tmp_path / "pid"
    slow(tools, pid_file)
    source = write_source(tmp_path / "source")
    words = [sys.executable, "-c", COPIER, source.path, str(tmp_path / "target")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as agent:
        try:
            assert agent.stdout is not None
            assert agent.stdout.readline(), "it copies"
            child = ProcessRef.of(int(pid_file.read_text()))
            assert child.alive()
        finally:
            agent.kill()
    try:
        assert asyncio.run(child.wait_exit(10)), "it outlives its agent"
    finally:
        child.kill(signal.SIGKILL)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    directory = tmp_path / "small"
    directory.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(directory)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"nothing can be mounted here: {mounted.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True)


@pytest.mark.parametrize("format", ["qcow2", "raw"])
def test_a_full_datastore_is_named(tmp_path: Path, small: Path, format: str) -> None:
    source = write_source(tmp_path / "source")
    target = ImageRef(str(small / "target"), "qcow2" if format == "qcow2" else "raw", None)

    async def check() -> None:
        facts = await Images().look(target.path, target.format)
        assert (facts.filesystem, facts.exists) == ("tmpfs", False)
        assert 0 < facts.free_bytes <= 2 * MIB
        with pytest.raises(DatastoreFull, match=target.path):
            await Images().convert(source, target, nobody)

    asyncio.run(check())
    assert not list(small.iterdir())
    assert Path(source.path).stat().st_size == SIZE


def test_keys_are_out_of_a_copys_reach_while_it_copies(tmp_path: Path) -> None:
    """They were in anonymous files, which are empty as soon as QEMU has read them."""

    def kept() -> list[int]:
        links = {fd: os.readlink(fd) for fd in Path("/proc/self/fd").iterdir() if fd.exists()}
        return [fd.stat().st_size for fd, link in links.items() if "sealift-passphrase" in link]

    async def check() -> None:
        images, source, key = Images(), write_source(tmp_path / "source"), new_key()
        target = ImageRef(str(tmp_path / "target"), "qcow2", key)
        seen: list[list[int]] = []

        def look(done: int, total: int) -> None:
            seen.append(kept())

        await images.convert(source, target, look)
        assert seen[0] == [0], "one key, already emptied"
        await images.verify(source, target, full=True, on_bytes=look)
        assert set(map(tuple, seen)) <= {(0,), ()}

    asyncio.run(check())


# --- facts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["qcow2", "raw"])
def test_an_encrypted_image_tells_its_size_without_a_key(tmp_path: Path, format: str) -> None:
    path, known = tmp_path / "disk", "qcow2" if format == "qcow2" else "raw"
    key = encrypted_image(path, known)  # type: ignore[arg-type]
    facts = asyncio.run(Images().look(str(path), known))  # type: ignore[arg-type]
    assert (facts.exists, facts.virtual_bytes, facts.error) == (True, DISK_BYTES, "")
    assert facts.content_bytes == (path.stat().st_blocks * 512 if known == "qcow2" else None)
    assert qemu_io(path, known, key, "length").strip() == "4 MiB"  # type: ignore[arg-type]


def test_what_cannot_be_looked_at_says_so(tmp_path: Path) -> None:
    async def check() -> None:
        images = Images()
        missing = await images.look(str(tmp_path / "absent"), "raw")
        assert (missing.exists, missing.error) == (False, "")
        assert missing.free_bytes > 0
        assert "cannot be seen" in (await images.look("/no/such/directory/disk", "raw")).error
        os.mkfifo(tmp_path / "fifo")
        for nothing in (tmp_path, tmp_path / "fifo"):
            assert "is not a disk" in (await images.look(str(nothing), "raw")).error
        (tmp_path / "raw").write_bytes(b"no image")
        assert (await images.look(str(tmp_path / "raw"), "raw")).links == 1
        os.link(tmp_path / "raw", tmp_path / "other name")
        assert (await images.look(str(tmp_path / "raw"), "raw")).links == 2
        wrong = await images.look(str(tmp_path / "raw"), "qcow2")
        assert wrong.exists
        assert "not a qcow2 image" in wrong.error
        assert (await images.look(str(tmp_path / "raw"), "raw")).virtual_bytes == 512, "QEMU fills a sector up"

    asyncio.run(check())


def qemu_img(*words: str | Path) -> None:
    subprocess.run(["qemu-img", *words], check=True, timeout=30, stdin=subprocess.DEVNULL, capture_output=True)


@pytest.mark.parametrize("how", ["compressed", "small clusters", "preallocated", "sparse"])
def test_no_copy_of_a_qcow2_image_occupies_more_than_was_foretold(tmp_path: Path, how: str) -> None:
    raw, path, target = tmp_path / "raw", tmp_path / "old", tmp_path / "new"
    with raw.open("wb") as file:
        for offset in range(0, 64 * MIB, MIB):
            file.seek(offset)
            file.write(PATTERN[:4096])
        file.write(b"compressible" * (MIB // 3))
    options = {
        "compressed": ["-c"],
        "small clusters": ["-o", "cluster_size=4k"],
        "preallocated": ["-o", "preallocation=metadata"],
        "sparse": [],
    }
    qemu_img("convert", "-f", "raw", "-O", "qcow2", *options[how], raw, path)
    disk, images = Disk(str(path), "qcow2"), Images()

    async def check() -> None:
        facts = await images.look(str(path), "qcow2")
        foretold = needed_bytes(ConversionKind.DECRYPT, disk, facts)
        await images.convert(ImageRef(str(path), "qcow2", None), ImageRef(str(target), "qcow2", None), nobody)
        assert os.stat(target).st_blocks * 512 <= foretold < facts.virtual_bytes

    asyncio.run(check())


def test_what_is_in_an_image_is_not_known_when_nobody_says_so(
    tmp_path: Path, tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "disk"
    qemu_img("create", "-q", "-f", "qcow2", path, "64M")
    looked = asyncio.run(Images().look(str(path), "qcow2"))
    assert looked.content_bytes is not None
    for script in ("exit 1", "echo '['; exit 0", "exec sleep 60"):
        monkeypatch.setattr(image_facts, "ASK_S", 0.2 if "sleep" in script else 30.0)
        around(tools, "qemu-img", script)
        now = asyncio.run(Images().look(str(path), "qcow2"))
        assert replace(now, free_bytes=0) == replace(looked, free_bytes=0, content_bytes=None)


def test_dirty_bitmaps_are_told_without_a_key(tmp_path: Path) -> None:
    clear, encrypted = tmp_path / "clear", tmp_path / "encrypted"
    qemu_img("create", "-q", "-f", "qcow2", clear, "64M")
    key = encrypted_image(encrypted, "qcow2")
    for path in (clear, encrypted):
        assert asyncio.run(Images().look(str(path), "qcow2")).bitmaps == ()
    qemu_img("bitmap", "--add", clear, "daily")
    qemu_img("bitmap", "--add", clear, "weekly, with a comma")
    assert asyncio.run(Images().look(str(clear), "qcow2")).bitmaps == ("daily", "weekly, with a comma")
    with Passphrase() as passphrase:
        passphrase.fill(key)
        node = f"driver=qcow2,file.driver=file,file.filename={encrypted},encrypt.format=luks,encrypt.key-secret=k"
        secret = f"secret,id=k,file={passphrase.path}"
        words = ["qemu-img", "bitmap", "--object", secret, "--image-opts", "--add", node, "daily"]
        subprocess.run(words, check=True, timeout=30, pass_fds=[passphrase.fd], capture_output=True)
    assert asyncio.run(Images().look(str(encrypted), "qcow2")).bitmaps == ("daily",)
