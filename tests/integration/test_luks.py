"""Encrypted disks of real VMs: opened with their keys, unreadable without, and no key where it could be read back."""

# ruff: noqa: ASYNC220, ASYNC240
# The checks below look at files and start short programs between steps; nothing else waits for their loop.

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import secrets
import subprocess
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from contract.check_hypervisor import Bench, check_hypervisor, move, until
from sealift.domain.move import Answer, MoveOptions
from sealift.domain.vm import Accelerator, Disk, HardwareRecord
from sealift.errors import Conflict, ConversionFailed, HypervisorError, KeysNotHeld, SealiftError
from sealift.hypervisor.base import Vm
from sealift.hypervisor.images import ImageRef, Images
from sealift.hypervisor.qemu import QemuHypervisor
from sealift.hypervisor.qmp import Qmp
from sealift.secret import Secret
from support import ticker
from support.luks import DISK_BYTES, Format, encrypted_image, new_key, qemu_io, read_plain

pytestmark = pytest.mark.qemu

FORMATS: tuple[Format, ...] = ("qcow2", "raw")
WRITTEN_AT = 2 * 512  # cylinder 0, head 0, sector 3


@pytest.fixture
def root() -> Iterator[Path]:
    """A short directory: pytest's own are too long for UNIX sockets."""
    with tempfile.TemporaryDirectory(prefix="sll-") as directory:
        yield Path(directory)


def run(check: Callable[[Bench], Awaitable[None]], root: Path) -> None:
    asyncio.run(check_hypervisor(QemuHypervisor("qemu-system-x86_64", Accelerator.TCG), root, (check,)))


def encrypted(root: Path) -> tuple[tuple[Disk, ...], dict[UUID, Secret]]:
    """An empty encrypted disk of each format, and their keys."""
    disks, deks = [], {}
    for format in FORMATS:
        dek, path = uuid4(), root / f"disk.{format}"
        deks[dek] = encrypted_image(path, format)
        disks.append(Disk(str(path), format, dek=dek))
    return tuple(disks), deks


def boot_sector(marker: bytes) -> bytes:
    """16-bit code that writes its own sector, with the marker in it, to both disks, and prints ``w`` when it could.

    int 0x13, function 3: one sector from 0:7c00 to cylinder 0, head 0, sector 3.
    """

    def write(drive: int, to_fail: int) -> bytes:
        call = b"\xb8\x01\x03" + b"\xb9\x03\x00" + bytes((0xBA, drive, 0)) + b"\xbb\x00\x7c" + b"\xcd\x13"
        return call + bytes((0x72, to_fail))  # jc

    one = len(write(0, 0))
    code = b"\x31\xc0\x8e\xc0"  # xor ax, ax; mov es, ax
    code += write(0x80, one + 4) + write(0x81, 4)
    code += b"\xb0w\xeb\x02\xb0E" + b"\xba\xf8\x03\xee\xf4\xeb\xfd"  # out 0x3f8, al; hlt for ever
    return (code.ljust(128, b"\0") + marker).ljust(510, b"\0") + b"\x55\xaa"


async def everything_qmp_tells(vm: Vm, socket: Path, control: str) -> str:
    """All that QMP answers about block nodes, objects and the command line.

    Meanwhile QEMU has one secret more, ``control``, given to it in a way in which it can be read back.
    """
    qmp = await Qmp.connect(socket, process=vm.process, name="reader")
    try:
        await qmp.execute("object-add", {"qom-type": "secret", "id": "control", "data": control})
        told: list[object] = []
        for command in (
            "query-named-block-nodes",
            "query-block",
            "query-blockstats",
            "query-chardev",
            "query-iothreads",
        ):
            told.append(await qmp.execute(command))
        objects = await qmp.execute("qom-list", {"path": "/objects"})
        assert isinstance(objects, list)
        for each in objects:
            if not str(each["type"]).startswith("child<"):
                continue
            path = f"/objects/{each['name']}"
            properties = await qmp.execute("qom-list", {"path": path})
            assert isinstance(properties, list)
            for one in properties:
                if not str(one["type"]).startswith("child<"):
                    told.append(await qmp.execute("qom-get", {"path": path, "property": one["name"]}))
        told.append(objects)
        await qmp.execute("object-del", {"id": "control"})
        return json.dumps(told)
    finally:
        await qmp.close()


def spellings(key: bytes) -> list[bytes]:
    """How a key may be written: raw, hex (which is also the passphrase of LUKS), each of them in base64 as well."""
    forms = [key, key.hex().encode(), key.hex().upper().encode()]
    forms += [encode(form).rstrip(b"=") for form in forms for encode in (base64.b64encode, base64.urlsafe_b64encode)]
    return forms


def memfds(pid: int) -> list[Path]:
    """The descriptors of a process that are passphrases' anonymous files."""
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the directory's own descriptor, for one
            if "memfd:sealift-passphrase" in os.readlink(entry):
                found.append(entry)
    return found


def test_a_guest_uses_encrypted_disks_as_any_other(root: Path) -> None:
    async def check(bench: Bench) -> None:
        disks, deks = encrypted(root)
        marker = b"plain text " + secrets.token_hex(24).encode()
        sector = root / "sector"
        sector.write_bytes(boot_sector(marker))
        first, _ = deks.values()
        qemu_io(root / "disk.qcow2", "qcow2", first, f"write -s {sector} 0 512")
        record = await bench.hypervisor.freeze(bench.config(boot=None, disks=disks))
        assert record.version == 2
        vm = await bench.start(record, deks=deks)
        assert await vm.status() == "prelaunch"
        await vm.cont_fresh()
        await until(lambda: bench.console("a") != b"", "the boot sector on the encrypted disk did not run")
        assert bench.console("a") == b"w"

        control = secrets.token_bytes(32)
        told = await everything_qmp_tells(vm, bench.paths("a").rescue, control.hex())
        assert "disk1-image" in told, "the reading reads"
        assert [form for form in spellings(control) if form in told.encode()], "and finds a secret that can be read"
        assert '"dek0"' in told, "QEMU needs it to open the image anew"
        process = Path(f"/proc/{vm.process.pid}")
        readable = told.encode() + (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        readable += bench.paths("a").log.read_bytes()
        for dek in deks.values():
            assert not [form for form in spellings(dek.reveal()) if form in readable]
        (memfd,) = memfds(vm.process.pid)
        assert memfd.read_bytes() == b"", "the passphrase was left where others could read it"
        assert not memfds(os.getpid()), "and this process keeps none"
        copy = ImageRef(str(root / "copy"), "raw", None)
        with pytest.raises(ConversionFailed, match="lock"):
            await Images().convert(ImageRef(disks[0].path, "qcow2", first), copy, lambda done, total: None)
        await vm.quit()

        for disk in disks:
            assert disk.dek is not None
            assert marker in read_plain(Path(disk.path), disk.format, deks[disk.dek], WRITTEN_AT, 512)
            assert marker not in Path(disk.path).read_bytes()

    run(check, root)


def test_an_encrypted_vm_moves_on_a_shared_datastore(root: Path) -> None:
    async def check(bench: Bench) -> None:
        disks, deks = encrypted(root)
        record: HardwareRecord = await bench.hypervisor.freeze(bench.config(disks=disks))
        source = await bench.start(record, deks=deks)
        await source.cont_fresh()
        await bench.ticks("a")
        with pytest.raises(KeysNotHeld):
            await bench.incoming(record)
        target = await bench.incoming(record, deks=deks)
        assert await target.status() == "inmigrate"
        await move(bench, source, target, MoveOptions(multifd_channels=2))
        await target.cont_at_target()
        with pytest.raises(SealiftError):
            await source.cont_at_source(aborted=Answer.ABORTED)  # QEMU's locks hold for these images too
        await source.quit()
        await bench.ticks("b")
        ticker.check(bench.console("a") + bench.console("b"))
        (memfd,) = memfds(target.process.pid)
        assert memfd.read_bytes() == b""
        with pytest.raises(Conflict):
            await bench.start(record, "b", deks=deks)
        assert await target.status() == "running"

    run(check, root)


def test_an_encrypted_vm_goes_on_at_its_source_after_an_aborted_move(root: Path) -> None:
    """QEMU closed the images as it handed the guest over, and opens them anew by itself, whoever has the keys now."""

    async def check(bench: Bench) -> None:
        disks, deks = encrypted(root)
        record = await bench.hypervisor.freeze(bench.config(disks=disks))
        source = await bench.start(record, deks=deks)
        await source.cont_fresh()
        await bench.ticks("a")
        target = await bench.incoming(record, deks=deks)
        await move(bench, source, target, MoveOptions())
        await target.kill()
        await source.cont_at_source(aborted=Answer.ABORTED)
        await bench.ticks("a")
        ticker.check(bench.console("a"))

    run(check, root)


def test_a_start_without_the_right_keys_leaves_nothing(root: Path) -> None:
    async def check(bench: Bench) -> None:
        disks, deks = encrypted(root)
        first, second = deks
        record = await bench.hypervisor.freeze(bench.config(disks=disks))
        with pytest.raises(KeysNotHeld, match=disks[1].path):
            await bench.start(record, deks={first: deks[first]})
        assert not bench.paths("a").log.exists(), "no process was started"
        wrong = {first: deks[first], second: new_key()}
        for begin in (bench.start, bench.incoming):
            with pytest.raises(HypervisorError, match=f"{disks[1].path} of VM ticker .*{second}"):
                await begin(record, "a", wrong)
            assert not bench.paths("a").qmp.exists()
            assert not qemus_of(str(record.config.uuid))
            assert not memfds(os.getpid())
        await bench.start(record, deks=deks)  # nothing in the way

    run(check, root)


def qemus_of(uuid: str) -> list[str]:
    """Processes whose command line names this VM."""
    lines = [(entry.name, entry / "cmdline") for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [pid for pid, line in lines if line.exists() and uuid.encode() in line.read_bytes()]


def test_an_image_must_be_encrypted_exactly_when_its_disk_is(root: Path) -> None:
    """Else the guest's data would be written in clear, or it would read noise."""

    async def check(bench: Bench) -> None:
        disks, deks = encrypted(root)
        for disk in disks:
            clear = replace(disk, path=f"{disk.path}.clear")
            await Images().create(clear.path, clear.format, DISK_BYTES, None)
            for wrong, what in ((replace(disk, dek=None), "to be in clear"), (clear, "to be encrypted")):
                record = await bench.hypervisor.freeze(bench.config(disks=(wrong,)))
                with pytest.raises(HypervisorError, match=f"{wrong.path} is {what}"):
                    await bench.start(record, deks=deks)
                with pytest.raises(HypervisorError, match=f"{wrong.path} is {what}"):
                    await bench.incoming(record, deks=deks)

    run(check, root)


def test_a_qemu_that_still_waits_for_its_keys_is_a_stray(root: Path) -> None:
    """An agent that dies between the start and the last key leaves such a one."""

    async def check(bench: Bench) -> None:
        disks, deks = encrypted(root)
        record = await bench.hypervisor.freeze(bench.config(disks=disks))
        vm = await bench.start(record, deks=deks)
        line = Path(f"/proc/{vm.process.pid}/cmdline").read_bytes().decode().split("\0")[:-1]
        await vm.kill()
        waiting = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            await until(bench.paths("a").qmp.is_socket, "it does not come up")
            assert await bench.hypervisor.end_stray(bench.paths("a"), record.config.uuid)
            assert waiting.wait(10) != 0
        finally:
            waiting.kill()
            waiting.wait()

    run(check, root)
