"""The test guest: the distribution's cloud kernel, a busybox initramfs of ours, and ``guest.c`` in it.

Nothing is installed: packages are downloaded into a cache directory and unpacked there, as any user. The cache holds

    kernel/    vmlinuz and modules/*.ko, plain
    busybox/   a statically linked busybox
    image-<digest>/   initrd.gz, vmlinuz and guest; the digest is over guest.c and the init script
    lock       locked with flock by whoever is preparing

Each directory appears by a rename, complete or not at all.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import lzma
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sealift.errors import InvalidInput, ToolMissing

MARKER_BYTES = 32
"""Length of the marker at the beginning of each page that the guest fills."""

CONSOLE = "console=ttyS0 quiet mitigations=off tsc=unstable panic=-1"
"""What the kernel is always told; the rest of the command line is for guest.c."""

RAM_BYTES = 131064 << 10
"""RAM that suffices for the default 32 MB of pattern. Like any RAM size for this guest under QEMU 7.2's TCG it is not
a multiple of 256 KiB: with such a size, dirty pages get lost and guests die after a migration (fixed in QEMU 9.0)."""

KERNELS = ("linux-image-cloud-amd64", "linux-image-virtual", "linux-image-generic", "linux-image-amd64")
"""Kernel packages of Debian and Ubuntu that stand for the newest real one; the first that apt knows is taken."""

MODULES = (
    *("virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci", "virtio_blk"),
    *("button", "evdev"),
)
"""Modules the guest loads, in this order; one that is not there is built into the kernel, or not needed."""

INIT = """\
#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
for module in {modules}; do
  [ -e /modules/$module.ko ] && /bin/busybox insmod /modules/$module.ko
done
exec /guest </dev/console >/dev/console 2>&1
"""

_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class GuestImage:
    """What QEMU boots the guest from, with ``-kernel`` and ``-initrd``."""

    kernel: Path
    initrd: Path


def marker(secret: bytes) -> bytes:
    """The 32 bytes that begin every page and every block of its disk that the guest fills from ``secret`` (guest.c)."""
    folded = 0xCBF29CE484222325  # FNV-1a
    for byte in secret:
        folded = (folded ^ byte) * 0x100000001B3 & _MASK
    return b"".join(_splitmix(folded + i + 1).to_bytes(8, "little") for i in range(MARKER_BYTES // 8))


def _splitmix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)


def command_line(
    secret: bytes,
    *,
    memory_mb: int = 32,
    dirty_mb_s: int = 0,
    hot_mb: int = 0,
    check_mb_s: int = 32,
    tick_ms: int = 50,
    disk: bool = False,
) -> str:
    """The kernel command line for the guest; ``secret`` is 1 to 64 bytes and no secret of Sealift's.

    ``memory_mb`` must leave the kernel some 70 MB; ``hot_mb`` bounds what is rewritten (0: all of it).
    """
    if not 1 <= len(secret) <= 64:
        raise InvalidInput(f"the guest's secret has {len(secret)} bytes", todo="give 1 to 64")
    words = [CONSOLE, f"sl.secret={secret.hex()}", f"sl.mem={memory_mb}", f"sl.dirty={dirty_mb_s}", f"sl.hot={hot_mb}"]
    return " ".join([*words, f"sl.check={check_mb_s}", f"sl.tick={tick_ms}", f"sl.disk={int(disk)}"])


def prepare(cache: Path, say: Callable[[str], None] = lambda line: None) -> GuestImage:
    """The guest's image, made in ``cache`` if it is not there yet (about 30 MB to download); ``say`` takes progress.

    Parallel callers wait for one another. Raises ToolMissing when a program or package cannot be had, and InvalidInput
    on a machine that is not x86-64.
    """
    if platform.machine() != "x86_64":
        raise InvalidInput(f"the test guest is for x86-64, this machine is {platform.machine()}")
    cache.mkdir(parents=True, exist_ok=True)
    cache = cache.resolve()
    source = Path(__file__).with_name("guest.c")
    init = INIT.format(modules=" ".join(MODULES))
    digest = hashlib.sha256(source.read_bytes() + init.encode()).hexdigest()[:16]
    image = cache / f"image-{digest}"
    made = GuestImage(image / "vmlinuz", image / "initrd.gz")
    if made.kernel.is_file() and made.initrd.is_file():
        return made
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (cache / "kernel").is_dir():
            _fetch_kernel(cache, say)
        if not (cache / "busybox").is_dir():
            _fetch_busybox(cache, say)
        if not image.is_dir():
            say("building the guest's image")
            with _appears_as(image) as new:
                _compile(source, new / "guest")
                _write_initrd(cache, init, new)
                shutil.copyfile(cache / "kernel" / "vmlinuz", new / "vmlinuz")
    return made


@contextmanager
def _appears_as(final: Path) -> Iterator[Path]:
    new = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
    try:
        yield new
        new.chmod(0o755)
        if final.exists():  # incomplete: somebody removed files from it by hand
            shutil.rmtree(final)
        new.rename(final)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _run(package: str, argv: list[str], cwd: Path | None = None) -> str:
    """Run a tool of ``package`` and return its output; raises ToolMissing with the tool's last words."""
    try:
        done = subprocess.run(
            argv,
            cwd=cwd,
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        raise ToolMissing(f"{argv[0]} is not installed", todo=f"install the package {package}") from None
    if done.returncode:
        words = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise ToolMissing(f"{argv[0]} failed: {words[-1] if words else done.returncode}", todo=f"see {package}")
    return done.stdout


def _dependencies(package: str, prefixes: tuple[str, ...]) -> list[str]:
    """The real packages that ``package`` depends on and whose names begin with one of ``prefixes``."""
    answer = _run("apt", ["apt-cache", "depends", "--important", package])
    found = re.findall(r"^ *\|?(?:Pre)?Depends: ([a-z0-9][a-z0-9.+-]*)$", answer, re.MULTILINE)
    return [name for name in found if name.startswith(prefixes)]


def _unpack(package: str, into: Path) -> None:
    """Download a package and unpack it below ``into``; nothing is installed."""
    sandbox = ["-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else []  # else a warning: _apt cannot write here
    _run("apt", ["apt-get", *sandbox, "download", package], cwd=into)
    for archive in into.glob("*.deb"):
        _run("dpkg", ["dpkg-deb", "-x", str(archive), str(into)])
        archive.unlink()


def _fetch_kernel(cache: Path, say: Callable[[str], None]) -> None:
    real: list[str] = []
    for name in KERNELS:
        try:
            real = [dep for dep in _dependencies(name, ("linux-image-",)) if any(char.isdigit() for char in dep)]
        except ToolMissing:
            if shutil.which("apt-cache") is None:
                raise
        if real:
            break
    else:
        raise ToolMissing(f"apt knows none of the kernel packages {', '.join(KERNELS)}", todo="run `apt-get update`")
    with _appears_as(cache / "kernel") as new, tempfile.TemporaryDirectory(dir=cache) as scratch:
        # Ubuntu keeps the modules in a package of their own, newer Debian kernels the image as well.
        for package in (real[0], *_dependencies(real[0], ("linux-modules-", "linux-binary-"))):
            say(f"downloading {package}")
            _unpack(package, Path(scratch))
        kernels = sorted(Path(scratch).glob("boot/vmlinuz-*")) + sorted(Path(scratch).glob("**/modules/*/vmlinuz"))
        if not kernels:
            raise ToolMissing(f"the package {real[0]} holds no kernel", todo="report this with the distribution's name")
        shutil.copyfile(kernels[0], new / "vmlinuz")
        (new / "modules").mkdir()
        for module in MODULES:
            for found in Path(scratch).glob(f"**/lib/modules/**/{module}.ko*"):
                (new / "modules" / f"{module}.ko").write_bytes(_plain(found))


def _plain(module: Path) -> bytes:
    match module.suffix:
        case ".xz":
            return lzma.decompress(module.read_bytes())
        case ".gz":
            return gzip.decompress(module.read_bytes())
        case ".zst":
            plain = module.with_suffix("")
            _run("zstd", ["zstd", "-dqf", str(module), "-o", str(plain)])
            return plain.read_bytes()
        case _:
            return module.read_bytes()


def _fetch_busybox(cache: Path, say: Callable[[str], None]) -> None:
    with _appears_as(cache / "busybox") as new:
        installed = Path("/bin/busybox")
        if installed.is_file() and _is_static(installed.read_bytes()):
            shutil.copyfile(installed, new / "busybox")
            return
        say("downloading busybox-static")
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            _unpack("busybox-static", Path(scratch))
            for path in ("usr/bin/busybox", "bin/busybox"):
                if (Path(scratch) / path).is_file():
                    shutil.copyfile(Path(scratch) / path, new / "busybox")
                    return
        raise ToolMissing("the package busybox-static holds no busybox", todo="install busybox-static")


def _is_static(program: bytes) -> bool:
    """Whether a 64-bit ELF program asks for no dynamic loader (has no PT_INTERP header, type 3)."""
    if program[:5] != b"\x7fELF\x02":
        return False
    start, size = int.from_bytes(program[32:40], "little"), int.from_bytes(program[54:56], "little")
    count = int.from_bytes(program[56:58], "little")
    return all(int.from_bytes(program[at : at + 4], "little") != 3 for at in range(start, start + size * count, size))


def _compile(source: Path, program: Path) -> None:
    _run("gcc and libc6-dev", ["gcc", "-O2", "-static", "-pthread", "-o", str(program), str(source)])


def _write_initrd(cache: Path, init: str, new: Path) -> None:
    """The initramfs: a gzipped cpio archive in the `newc` format (the kernel's buffer-format.rst)."""
    archive = bytearray()
    for directory in ("bin", "dev", "modules", "proc", "sys"):
        _entry(archive, directory, 0o040755)
    _entry(archive, "dev/console", 0o020600, device=(5, 1))  # where the init script's own words go
    _entry(archive, "init", 0o100755, init.encode())
    _entry(archive, "guest", 0o100755, (new / "guest").read_bytes())
    _entry(archive, "bin/busybox", 0o100755, (cache / "busybox" / "busybox").read_bytes())
    for module in sorted((cache / "kernel" / "modules").iterdir()):
        _entry(archive, f"modules/{module.name}", 0o100644, module.read_bytes())
    _entry(archive, "TRAILER!!!", 0)
    (new / "initrd.gz").write_bytes(gzip.compress(bytes(archive), compresslevel=6, mtime=0))


def _entry(archive: bytearray, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
    raw = name.encode() + b"\0"
    links = 2 if mode & 0o040000 else 1
    # inode, mode, uid, gid, links, mtime, size, device (major, minor), special file (major, minor), name length, check
    numbers = (len(archive), mode, 0, 0, links, 0, len(data), 0, 0, *device, len(raw), 0)
    archive += b"070701" + b"".join(b"%08x" % number for number in numbers) + raw
    archive += bytes(-len(archive) % 4)
    archive += data
    archive += bytes(-len(archive) % 4)
