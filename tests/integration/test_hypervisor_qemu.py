"""The conformance suite on real QEMU, and what is QEMU's own. Everything here fails, not skips, without QEMU."""

# ruff: noqa: ASYNC220, ASYNC221, ASYNC240
# The checks below look at files and start short programs between steps; nothing else waits for their loop.

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from contract.check_hypervisor import CHECKS, Bench, check_hypervisor, move, until
from sealift.domain.move import Answer, MoveOptions
from sealift.domain.vm import Accelerator, Disk, Network
from sealift.errors import (
    AcceleratorUnavailable,
    HypervisorError,
    QemuGone,
    QemuMissing,
    QmpRefused,
    QmpTimeout,
    SealiftError,
)
from sealift.hypervisor import qemu
from sealift.hypervisor.base import RECONNECTED, Hypervisor
from sealift.hypervisor.probe import PROBE_S, Probed, runs_vcpu
from sealift.hypervisor.process import ProcessRef
from sealift.hypervisor.qemu import QemuHypervisor
from sealift.hypervisor.qmp import Qmp
from support import ticker

pytestmark = pytest.mark.qemu


@pytest.fixture
def root() -> Iterator[Path]:
    """A short directory: pytest's own are too long for UNIX sockets."""
    with tempfile.TemporaryDirectory(prefix="slh-") as directory:
        yield Path(directory)


@pytest.fixture(scope="module")
def hypervisor() -> Hypervisor:
    return QemuHypervisor("qemu-system-x86_64", Accelerator.TCG)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_conformance(check: Callable[[Bench], Awaitable[None]], hypervisor: Hypervisor, root: Path) -> None:
    asyncio.run(check_hypervisor(hypervisor, root, (check,)))


def run(check: Callable[[Bench], Awaitable[None]], hypervisor: Hypervisor, root: Path) -> None:
    asyncio.run(check_hypervisor(hypervisor, root, (check,)))


# --- accelerators --------------------------------------------------------------------------------------------------


def qemus_of_ours() -> set[int]:
    """Pids of this process's children that are QEMU."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[1]) == os.getpid() and b"qemu-system" in (entry / "cmdline").read_bytes():
                    found.add(int(entry.name))
    return found


def test_the_probe_runs_a_virtual_cpu_of_tcg() -> None:
    assert asyncio.run(runs_vcpu("qemu-system-x86_64", Accelerator.TCG)) is Probed.RAN
    assert not qemus_of_ours()


def test_the_probe_tells_the_truth_of_kvm_in_time() -> None:
    before = time.monotonic()
    answer = asyncio.run(runs_vcpu("qemu-system-x86_64", Accelerator.KVM))
    assert time.monotonic() - before < PROBE_S[Accelerator.KVM] + 10
    assert not qemus_of_ours()
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        assert answer is Probed.FAILED, "there is no KVM here at all"


def test_a_probe_that_hangs_is_ended(root: Path) -> None:
    """A program that takes QEMU's arguments and never ends stands for an accelerator that hangs."""
    hanging = root / "qemu"
    hanging.write_text("#!/bin/sh\nexec sleep 600\n")
    hanging.chmod(0o755)
    before = time.monotonic()
    assert asyncio.run(runs_vcpu(str(hanging), Accelerator.KVM, timeout=0.5)) is Probed.FAILED
    assert time.monotonic() - before < 5


def test_an_accelerator_is_slow_at_first_or_found_at_a_later_look(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU itself, but only once it is said to be well, and slowly then."""
    binary, well = root / "qemu", root / "well"
    binary.write_text(f'#!/bin/sh\ntest -e {well} && sleep 2.2 && exec qemu-system-x86_64 "$@"\n')
    binary.chmod(0o755)

    async def check() -> None:
        hypervisor = QemuHypervisor(str(binary), Accelerator.TCG)
        assert await hypervisor.accelerators() == ()
        well.touch()
        assert await hypervisor.accelerators() == (), "it is not probed at every question"
        monkeypatch.setattr(qemu, "_AGAIN_S", 0.0)
        assert await hypervisor.accelerators() == (Accelerator.TCG,)
        well.unlink()
        assert await hypervisor.accelerators() == (Accelerator.TCG,), "what ran once is not asked again"

    asyncio.run(check())


def test_a_probe_that_could_not_be_ended_is_not_made_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    async def stuck(binary: str, accelerator: Accelerator) -> Probed:
        made.append(accelerator)
        return Probed.STUCK

    async def check() -> None:
        hypervisor = QemuHypervisor("qemu-system-x86_64", Accelerator.KVM)
        for _ in range(3):
            assert await hypervisor.accelerators() == ()

    monkeypatch.setattr(qemu, "_AGAIN_S", 0.0)
    monkeypatch.setattr(qemu, "runs_vcpu", stuck)
    asyncio.run(check())
    assert made == [Accelerator.KVM]


def test_a_probe_that_only_ends_proves_nothing(root: Path) -> None:
    assert asyncio.run(runs_vcpu("/bin/true", Accelerator.KVM)) is Probed.FAILED


def test_the_hosts_configuration_limits_the_accelerators(hypervisor: Hypervisor, root: Path) -> None:
    async def check(bench: Bench) -> None:
        assert await bench.hypervisor.accelerators() == (Accelerator.TCG,)
        record = await bench.hypervisor.freeze(bench.config(accelerator=Accelerator.AUTO))
        assert record.accelerator is Accelerator.TCG
        with pytest.raises(AcceleratorUnavailable, match="kvm"):
            await bench.hypervisor.freeze(bench.config(accelerator=Accelerator.KVM))
        with pytest.raises(AcceleratorUnavailable):
            await bench.incoming(replace(record, accelerator=Accelerator.KVM))

    run(check, hypervisor, root)


def test_a_missing_qemu_says_so(root: Path) -> None:
    with pytest.raises(QemuMissing, match="qemu-system-nowhere"):
        asyncio.run(QemuHypervisor("qemu-system-nowhere", Accelerator.TCG).version())


# --- the machine ---------------------------------------------------------------------------------------------------


def test_a_pc_machine_moves_too(hypervisor: Hypervisor, root: Path) -> None:
    async def check(bench: Bench) -> None:
        record, source = await bench.running(machine="pc", network=Network("user", mac="52:54:00:12:34:56"))
        assert record.machine.startswith("pc-i440fx-")
        target = await bench.incoming(record)
        await move(bench, source, target, MoveOptions(multifd_channels=2))
        await target.cont_at_target()
        await bench.ticks("b")
        ticker.check(bench.console("a") + bench.console("b"))

    run(check, hypervisor, root)


def test_the_sandbox_is_on(hypervisor: Hypervisor, root: Path) -> None:
    async def check(bench: Bench) -> None:
        _, vm = await bench.running(network=Network("user", mac="52:54:00:12:34:56"))
        status = Path(f"/proc/{vm.process.pid}/status").read_text()
        assert "Seccomp:\t2" in status
        assert "NoNewPrivs:\t1" in status
        environment = Path(f"/proc/{vm.process.pid}/environ").read_bytes()
        assert {entry.partition(b"=")[0] for entry in environment.split(b"\0") if entry} == {b"PATH", b"LANG"}

    run(check, hypervisor, root)


def test_a_bridged_card_hangs_on_its_bridge(hypervisor: Hypervisor, root: Path) -> None:
    bridge = f"slt{os.getpid() % 100000}"
    made = subprocess.run(["ip", "link", "add", bridge, "type", "bridge"], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no bridge can be made here: {made.stderr.strip()}")
    ports = Path(f"/sys/class/net/{bridge}/brif")

    async def check(bench: Bench) -> None:
        network = Network("bridge", bridge, "52:54:00:12:34:56")
        record, source = await bench.running(network=network)
        assert len(list(ports.iterdir())) == 1
        target = await bench.incoming(record)
        assert len(list(ports.iterdir())) == 2
        await move(bench, source, target, MoveOptions())
        await target.cont_at_target()
        await source.kill()
        assert len(list(ports.iterdir())) == 1, "a tap goes with its QEMU"
        await bench.ticks("b")
        await target.kill()
        with pytest.raises(HypervisorError, match="slnone"):
            await bench.start(replace(record, config=bench.config(network=replace(network, bridge="slnone"))))
        assert not list(ports.iterdir())

    try:
        run(check, hypervisor, root)
    finally:
        subprocess.run(["ip", "link", "del", bridge], check=True)


# --- disks ---------------------------------------------------------------------------------------------------------


def make_image(path: Path, format: str, *more: str) -> Disk:
    subprocess.run(["qemu-img", "create", "-q", "-f", format, *more, str(path), "8M"], check=True)
    return Disk(str(path), "qcow2" if format == "qcow2" else "raw")


def writable(disk: Disk) -> bool:
    """Whether a second writer gets the image's lock."""
    flags = ["-f", disk.format, "-t", "none", "-c", "write -P 1 0 512", disk.path]
    return subprocess.run(["qemu-io", *flags], capture_output=True).returncode == 0


def test_shared_disks_change_hands_with_the_guest(hypervisor: Hypervisor, root: Path) -> None:
    async def check(bench: Bench) -> None:
        disks = (make_image(root / "one.qcow2", "qcow2"), make_image(root / "two.raw", "raw"))
        assert all(writable(disk) for disk in disks)
        record, source = await bench.running(disks=disks)
        assert not any(writable(disk) for disk in disks), "the running VM holds its disks"
        target = await bench.incoming(record)
        await move(bench, source, target, MoveOptions())
        await target.cont_at_target()
        assert not any(writable(disk) for disk in disks)
        # What protects us last: QEMU itself refuses the source its disks once the target has them.
        with pytest.raises(SealiftError):
            await source.cont_at_source(aborted=Answer.ABORTED)
        assert await source.status() == "postmigrate"
        await source.quit()
        await bench.ticks("b")
        ticker.check(bench.console("a") + bench.console("b"))
        assert not any(writable(disk) for disk in disks)
        await target.quit()
        assert all(writable(disk) for disk in disks)

    run(check, hypervisor, root)


def test_an_aborted_move_gives_the_disks_back(hypervisor: Hypervisor, root: Path) -> None:
    async def check(bench: Bench) -> None:
        disks = (make_image(root / "one.qcow2", "qcow2"),)
        record, source = await bench.running(disks=disks)
        target = await bench.incoming(record)
        await move(bench, source, target, MoveOptions())
        await target.kill()
        await source.cont_at_source(aborted=Answer.ABORTED)
        await bench.ticks("a")
        assert not writable(disks[0])

    run(check, hypervisor, root)


def test_a_disk_in_use_is_not_started_twice(hypervisor: Hypervisor, root: Path) -> None:
    async def check(bench: Bench) -> None:
        disks = (make_image(root / "one.qcow2", "qcow2"),)
        await bench.running(disks=disks)
        with pytest.raises(HypervisorError, match="lock"):
            await bench.running("b", disks=disks)
        await bench.ticks("a")

    run(check, hypervisor, root)


def test_images_are_opened_by_themselves_and_directly(hypervisor: Hypervisor, root: Path) -> None:
    async def check(bench: Bench) -> None:
        base = make_image(root / "base.qcow2", "qcow2")
        overlay = root / "overlay.qcow2"
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", "-b", base.path, "-F", "qcow2", str(overlay)], check=True
        )
        split = make_image(root / "split.qcow2", "qcow2", "-o", f"data_file={root}/data")
        for disk in (Disk(str(overlay), "qcow2"), split):
            with pytest.raises(HypervisorError, match="refers to another file"):
                await bench.running(disks=(disk,))
        with pytest.raises(HypervisorError, match="not a qcow2 image"):
            await bench.running(disks=(replace(make_image(root / "raw", "raw"), format="qcow2"),))
        # A file of /proc stands for a file system without O_DIRECT, as tmpfs was before Linux 6.6.
        with pytest.raises(HypervisorError, match="O_DIRECT"):
            await bench.running(disks=(Disk("/proc/self/comm", "raw"),))

    run(check, hypervisor, root)


def test_a_vm_without_kernel_boots_from_its_first_disk(hypervisor: Hypervisor, root: Path) -> None:
    # 16-bit: mov al, letter; mov dx, 0x3f8; out dx, al; then hlt for ever.
    def sector(letter: bytes) -> bytes:
        return (b"\xb0" + letter + b"\xba\xf8\x03\xee\xf4\xeb\xfd").ljust(510, b"\0") + b"\x55\xaa"

    def printed(bench: Bench, side: str, text: bytes) -> bool:
        return bench.console(side) == text

    async def check(bench: Bench) -> None:
        for letter, format in ((b"r", "raw"), (b"q", "qcow2")):
            raw = root / f"{format}.raw"
            raw.write_bytes(sector(letter).ljust(1 << 20, b"\0"))
            disk = root / f"{format}.img"
            subprocess.run(["qemu-img", "convert", "-O", format, str(raw), str(disk)], check=True)
            second = make_image(root / f"{format}.second", "raw")
            disks = (Disk(str(disk), "qcow2" if format == "qcow2" else "raw"), second)
            vm = await bench.start(await bench.hypervisor.freeze(bench.config(boot=None, disks=disks)), format)
            await vm.cont_fresh()
            await until(partial(printed, bench, format, letter), "the boot sector did not run")
            await vm.kill()

    run(check, hypervisor, root)


# --- QMP -----------------------------------------------------------------------------------------------------------


def cut_connection(path: Path) -> None:
    """Break this process's connection to a QMP socket from underneath."""
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(entry))) as link:
            if link.family == socket.AF_UNIX and link.getpeername() == str(path):
                link.shutdown(socket.SHUT_RDWR)


def test_a_broken_connection_is_made_again(hypervisor: Hypervisor, root: Path) -> None:
    async def check(bench: Bench) -> None:
        _, vm = await bench.running()
        stream = vm.events()
        for _ in range(3):
            cut_connection(bench.paths("a").qmp)
            assert await vm.status() == "running"
            async with asyncio.timeout(10):
                async for event in stream:
                    if event.name == RECONNECTED:
                        break
        await vm.pause()
        async with asyncio.timeout(10):
            async for event in stream:
                if event.name == "STOP":
                    break

    run(check, hypervisor, root)


def test_a_qemu_that_hangs_is_a_timeout(hypervisor: Hypervisor, root: Path) -> None:
    async def check(bench: Bench) -> None:
        _, vm = await bench.running()
        qmp = await Qmp.connect(bench.paths("a").rescue, process=vm.process, name="ticker")
        try:
            vm.process.kill(signal.SIGSTOP)
            with pytest.raises(QmpTimeout, match="query-status"):
                await qmp.execute("query-status", timeout=0.2)
            vm.process.kill(signal.SIGCONT)
            assert (await qmp.query("query-status"))["status"] == "running", "the connection is of use afterwards"
            with pytest.raises(QmpRefused, match="no-such-command"):
                await qmp.execute("no-such-command")
            with pytest.raises(QmpTimeout, match="greeting"):
                await Qmp.connect(bench.paths("a").rescue, process=vm.process, name="ticker", timeout=0.2)
            vm.process.kill()
            with pytest.raises(QemuGone):
                await qmp.execute("stop")
        finally:
            await qmp.close()
        with pytest.raises(QemuGone):
            await qmp.execute("query-status")

    run(check, hypervisor, root)


def test_a_command_under_way_when_qemu_dies_is_answered(hypervisor: Hypervisor, root: Path) -> None:
    async def check(bench: Bench) -> None:
        _, vm = await bench.running()
        vm.process.kill(signal.SIGSTOP)
        waiting = asyncio.create_task(vm.pause())
        await asyncio.sleep(0)
        vm.process.kill()
        with pytest.raises(QemuGone):
            async with asyncio.timeout(5):
                await waiting

    run(check, hypervisor, root)


def test_a_cancelled_start_leaves_nothing(hypervisor: Hypervisor, root: Path) -> None:
    async def check(bench: Bench) -> None:
        record = await bench.hypervisor.freeze(bench.config())
        for wait_ms in (5, 20, 50, 100):
            start = asyncio.create_task(bench.start(record))
            done, _ = await asyncio.wait([start], timeout=wait_ms / 1000)
            start.cancel()
            if not done:
                with contextlib.suppress(asyncio.CancelledError):
                    await start
            for vm in bench.vms:
                await vm.kill()
            assert not qemus_of_ours()

    run(check, hypervisor, root)


# --- processes -----------------------------------------------------------------------------------------------------

SPAWNER = """
import asyncio, dataclasses, json, os, sys
from pathlib import Path
from sealift.domain.vm import *
from sealift.hypervisor.base import VmPaths
from sealift.hypervisor.qemu import QemuHypervisor
from uuid import UUID

async def main():
    root = Path(sys.argv[1])
    hypervisor = QemuHypervisor("qemu-system-x86_64", Accelerator.TCG)
    config = VmConfig("ticker", UUID(sys.argv[2]), 1, int(sys.argv[4]), boot=Boot(sys.argv[3]))
    paths = VmPaths(root / "a", root / "a.log", root / "a.console")
    vm = await hypervisor.start(await hypervisor.freeze(config), paths, {})
    await vm.cont_fresh()
    print(json.dumps(dataclasses.asdict(vm.process)), flush=True)
    await asyncio.sleep(600)

# Descriptors that a careless spawn would hand down.
leak = os.open(sys.argv[3], os.O_RDONLY)
os.set_inheritable(leak, True)
asyncio.run(main())
"""


def test_a_vm_outlives_the_process_that_started_it(hypervisor: Hypervisor, root: Path) -> None:
    async def check(bench: Bench) -> None:
        config = bench.config()
        words = [str(bench.root), str(config.uuid), str(bench.kernel), str(config.memory_bytes)]
        with subprocess.Popen([sys.executable, "-c", SPAWNER, *words], stdout=subprocess.PIPE, text=True) as spawner:
            try:
                assert spawner.stdout is not None
                process = ProcessRef(**json.loads(spawner.stdout.readline()))
            finally:
                spawner.kill()
        try:
            assert process.alive()
            assert os.getsid(process.pid) == process.pid, "it leads its own session"
            links = {os.readlink(entry) for entry in Path(f"/proc/{process.pid}/fd").iterdir()}
            assert str(bench.kernel) not in links, "a descriptor of the spawner was inherited"
            vm = await bench.hypervisor.attach(bench.paths("a"), process, config.uuid)
            bench.vms.append(vm)
            await bench.ticks("a")
            assert await vm.status() == "running"
            await vm.kill()
            assert not process.alive()
        finally:
            process.kill()

    run(check, hypervisor, root)
