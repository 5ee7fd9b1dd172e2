"""The test guest itself, booted by QEMU under TCG: it ticks, checks, and its pattern can be found and computed."""

import json
import os
import re
import shutil
import socket
import subprocess
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import RawIOBase
from itertools import pairwise
from pathlib import Path
from statistics import median

import pytest

from sealift.demo.guest import MARKER_BYTES, RAM_BYTES, GuestImage, command_line, marker, prepare
from sealift.errors import InvalidInput, ToolMissing

pytestmark = pytest.mark.qemu

SECRET = bytes.fromhex("00ff10c3a95577")
MEMORY_MB = 24
PAGES = MEMORY_MB * 256
BLOCK_BUFFERS = 3
"""What the disk's blocks are written from, read into and compared with begins with the marker, too."""


class Guest:
    """One QEMU with the guest in it, its console as lines, and a QMP socket."""

    def __init__(self, image: GuestImage, directory: Path, words: str, *extra: str) -> None:
        ours, theirs = socket.socketpair()
        self.directory = directory
        self.console: list[str] = []
        with theirs:
            argv = [
                "qemu-system-x86_64",
                "-accel",
                "tcg",
                "-machine",
                "q35",
                "-cpu",
                "max",
                "-m",
                f"{RAM_BYTES >> 10}K",
            ]
            argv += ["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", *extra]
            argv += ["-chardev", f"socket,id=qmp,fd={theirs.fileno()}", "-mon", "chardev=qmp,mode=control"]
            argv += ["-kernel", str(image.kernel), "-initrd", str(image.initrd), "-append", words]
            self.process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                text=True,
                cwd=directory,
                pass_fds=[theirs.fileno()],
            )
        self._socket = ours
        self._qmp = ours.makefile("rw", encoding="utf-8")
        self._qmp.readline()
        self.qmp("qmp_capabilities")

    def qmp(self, command: str, **arguments: object) -> object:
        self._qmp.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._qmp.flush()
        while "event" in (answer := json.loads(self._qmp.readline())):
            pass
        return answer["return"]

    def until(self, pattern: str, count: int = 1) -> list[re.Match[str]]:
        """Read the console until ``count`` more lines match; fails at its end (the test's timeout guards the rest)."""
        assert self.process.stdout
        found: list[re.Match[str]] = []
        for line in self.process.stdout:
            self.console.append(line.rstrip("\n"))
            assert "FATAL" not in line, line
            if match := re.fullmatch(pattern, self.console[-1]):
                found.append(match)
                if len(found) == count:
                    return found
        raise AssertionError(f"the console ended without {pattern}: {self.console[-5:]}")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout
        self.process.stdout.close()
        self._qmp.close()
        self._socket.close()


@pytest.fixture(scope="module")
def guest(guest_image: GuestImage, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    directory = tmp_path_factory.mktemp("guest")
    (directory / "disk").write_bytes(bytes(1 << 20))
    words = command_line(SECRET, memory_mb=MEMORY_MB, dirty_mb_s=8, tick_ms=20, disk=True)
    guest = Guest(
        guest_image, directory, words, "-drive", f"file={directory / 'disk'},format=raw,if=virtio,cache=writeback"
    )
    try:
        guest.until("READY")
        yield guest
    finally:
        guest.end()


def test_it_ticks_without_a_gap_in_numbers_and_close_to_the_asked_rate(guest: Guest) -> None:
    ticks = [(int(match[1]), int(match[2])) for match in guest.until(r"TICK (\d+) (\d+)", 100)]
    assert [n for n, _ in ticks] == list(range(ticks[0][0], ticks[0][0] + 100))
    gaps = [later - earlier for (_, earlier), (_, later) in pairwise(ticks)]
    assert median(gaps) == pytest.approx(20, rel=0.5), "however long the machine stood still in one of them"


def test_it_finds_its_own_pages_right_while_it_rewrites_them(guest: Guest) -> None:
    for match in guest.until(r"CHECK pass=(\d+) pages=(\d+) bad=(\d+)", 3):
        assert match[2] == str(PAGES)
        assert match[3] == "0"


def test_the_disk_returns_what_was_written(guest: Guest) -> None:
    numbers = [int(match[1]) for match in guest.until(r"DISK (\d+) ok", 20)]
    assert numbers == list(range(numbers[0], numbers[0] + 20))
    assert not [line for line in guest.console if line.startswith("DISK") and line.endswith("bad")]
    assert "FOUND blocks=0 bad=0 last=0" in guest.console


def test_every_block_on_the_disk_begins_with_the_marker(guest: Guest) -> None:
    last = int(guest.until(r"DISK (\d+) ok")[0][1])
    disk = (guest.directory / "disk").read_bytes()
    slots = len(disk) // 4096
    found = {at // 4096 for at in range(0, len(disk), 4096) if disk.startswith(marker(SECRET), at)}
    assert found >= {n % slots for n in range(max(1, last - slots + 1), last + 1)}


def test_every_page_begins_with_the_marker_and_does_not_compress(guest: Guest, tmp_path: Path) -> None:
    dump = tmp_path / "memory"
    guest.qmp("stop")  # no page is half rewritten
    guest.qmp("pmemsave", val=0, size=RAM_BYTES, filename=str(dump))
    memory = dump.read_bytes()
    wanted = marker(SECRET)
    pages = [at for at in range(0, len(memory), 4096) if memory.startswith(wanted, at)]
    assert PAGES <= len(pages) <= PAGES + BLOCK_BUFFERS
    sample = b"".join(memory[at + MARKER_BYTES : at + 4096] for at in pages[::16])
    assert len(zlib.compress(sample)) > 0.999 * len(sample)
    bodies = {memory[at + MARKER_BYTES : at + 4096] for at in pages}
    assert len(bodies) >= PAGES


def test_a_damaged_page_is_found(guest: Guest, tmp_path: Path) -> None:
    """The check can fail: pages are altered from outside, through QEMU's debugger stub."""
    guest.qmp("stop")
    dump, stub = tmp_path / "memory", tmp_path / "gdb"
    guest.qmp("pmemsave", val=0, size=RAM_BYTES, filename=str(dump))
    memory, wanted = dump.read_bytes(), marker(SECRET)
    pages = [at for at in range(0, len(memory), 4096) if memory.startswith(wanted, at)]
    guest.qmp("human-monitor-command", **{"command-line": f"gdbserver unix:{stub},server=on,wait=off"})
    with socket.socket(socket.AF_UNIX) as debugger:
        debugger.connect(str(stub))
        with debugger.makefile("rwb", buffering=0) as wire:
            _debugger(wire, b"Qqemu.PhyMemMode:1")
            for at in pages[:: PAGES // 8]:
                _debugger(wire, b"M%x,8:%s" % (at + 2048, bytes(8).hex().encode()))
    guest.qmp("cont")
    assert guest.until(r"BAD page=(\d+) version=(\d+)")
    assert int(guest.until(r"CHECK pass=(\d+) pages=(\d+) bad=(\d+)")[0][3]) > 0


def _debugger(wire: RawIOBase, command: bytes) -> None:
    wire.write(b"$%s#%02x" % (command, sum(command) % 256))
    answer = b""
    while not answer.endswith(b"$OK#9a"):
        byte = wire.read(1)
        assert byte, answer
        answer += byte
    wire.write(b"+")


def test_the_power_button_ends_it(guest: Guest) -> None:
    guest.qmp("system_powerdown")
    assert guest.process.wait(30) == 0


def test_parallel_callers_get_one_image_made_once(guest_image: GuestImage, tmp_path: Path) -> None:
    for name in ("kernel", "busybox"):
        shutil.copytree(guest_image.initrd.parents[1] / name, tmp_path / name)
    said: list[str] = []
    with ThreadPoolExecutor(4) as pool:
        images = {made.result() for made in [pool.submit(prepare, tmp_path, said.append) for _ in range(4)]}
    assert len(images) == 1
    assert len(said) == 1
    assert images.pop().initrd.read_bytes() == guest_image.initrd.read_bytes()
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


@pytest.mark.parametrize(("tools", "named"), [(["gcc"], "apt"), (["apt-cache", "apt-get", "dpkg-deb"], "gcc")])
def test_a_missing_tool_is_named_with_its_package_and_leaves_nothing_half_made(
    guest_image: GuestImage, tools: list[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for tool in tools:
        found = shutil.which(tool)
        assert found
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / tool).symlink_to(found)
    cache = tmp_path / "cache"
    if named == "gcc":
        for name in ("kernel", "busybox"):
            shutil.copytree(guest_image.initrd.parents[1] / name, cache / name)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(ToolMissing) as caught:
        prepare(cache)
    assert f"the package {named}" in caught.value.todo
    assert not [path for path in cache.iterdir() if path.name.startswith((".", "image"))]


@pytest.mark.parametrize("secret", [b"", bytes(65)])
def test_a_secret_the_guest_could_not_take_is_refused(secret: bytes) -> None:
    with pytest.raises(InvalidInput):
        command_line(secret)
