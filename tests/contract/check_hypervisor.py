"""Every promise of ``sealift.hypervisor.base``, checked on an implementation with real guests.

``CHECKS`` lists them; each takes a ``Bench`` and may be run alone. A bench ends every process started through it, by
its own pid, also when a check fails. The guest is ``support.ticker``: its two consoles put end to end show whether a
move lost or doubled a single step.
"""

from __future__ import annotations

import asyncio
import os
import stat
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from sealift.domain.deks import Deks
from sealift.domain.move import Answer, MoveOptions
from sealift.domain.vm import Accelerator, Boot, Disk, HardwareRecord, VmConfig
from sealift.errors import (
    Conflict,
    ContRefused,
    HardwareMismatch,
    HypervisorError,
    KeysNotHeld,
    QemuGone,
    QmpRefused,
    SealiftError,
)
from sealift.hypervisor.base import Hypervisor, MigrationInfo, Vm, VmPaths
from sealift.hypervisor.process import ProcessRef
from sealift.secret import Secret
from support import ticker

OVER = {"completed", "failed", "cancelled"}


class Bench:
    """Directories, a guest, and a list of what must be ended."""

    def __init__(self, hypervisor: Hypervisor, root: Path) -> None:
        self.hypervisor = hypervisor
        self.root = root
        self.kernel = ticker.write(root / "ticker")
        self.vms: list[Vm] = []

    def config(self, **changes: object) -> VmConfig:
        plain = VmConfig(
            name="ticker",
            uuid=uuid4(),
            vcpus=2,
            memory_bytes=ticker.MEMORY_BYTES,
            boot=Boot(str(self.kernel)),
        )
        return replace(plain, **changes)  # type: ignore[arg-type]

    def paths(self, side: str) -> VmPaths:
        return VmPaths(self.root / side, self.root / f"{side}.log", self.root / f"{side}.console")

    async def start(self, record: HardwareRecord, side: str = "a", deks: Deks | None = None) -> Vm:
        vm = await self.hypervisor.start(record, self.paths(side), deks or {})
        self.vms.append(vm)
        return vm

    async def incoming(self, record: HardwareRecord, side: str = "b", deks: Deks | None = None) -> Vm:
        vm = await self.hypervisor.prepare_incoming(record, self.paths(side), deks or {})
        self.vms.append(vm)
        return vm

    async def attach(self, vm: Vm, side: str) -> Vm:
        self.vms.append(await self.hypervisor.attach(self.paths(side), vm.process, vm.uuid))
        return self.vms[-1]

    async def running(self, side: str = "a", **changes: object) -> tuple[HardwareRecord, Vm]:
        """A guest that has ticked."""
        record = await self.hypervisor.freeze(self.config(**changes))
        vm = await self.start(record, side)
        await vm.cont_fresh()
        await self.ticks(side)
        return record, vm

    def console(self, side: str) -> bytes:
        path = self.paths(side).serial
        return path.read_bytes() if path.exists() else b""

    async def ticks(self, side: str, count: int = 30) -> None:
        """Wait until the guest has ticked ``count`` times more."""
        seen = len(self.console(side))
        await until(lambda: len(self.console(side)) >= seen + count, f"{side} does not tick")

    async def end(self) -> None:
        for vm in self.vms:
            vm.process.kill()
        for vm in self.vms:
            assert await vm.process.wait_exit(10), f"process {vm.process.pid} does not end"
            await vm.close()


async def until(true: Callable[[], bool], otherwise: str, timeout: float = 30) -> None:
    """Wait for something that only a look can tell, such as a file's length."""
    deadline = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < deadline, otherwise
        await asyncio.sleep(0.005)


async def until_migration(vm: Vm, *statuses: str, timeout: float = 60) -> MigrationInfo:
    deadline = time.monotonic() + timeout
    while (info := await vm.migration()).status not in statuses:
        assert info.status not in OVER, f"{info.status} instead of {statuses}: {info.error}"
        assert time.monotonic() < deadline, f"{info.status}, not {statuses}"
        await asyncio.sleep(0.005)
    return info


async def until_status(vm: Vm, runstate: str, timeout: float = 30) -> None:
    deadline = time.monotonic() + timeout
    while (now := await vm.status()) != runstate:
        assert time.monotonic() < deadline, f"{now}, not {runstate}"
        await asyncio.sleep(0.005)


async def begin_move(bench: Bench, source: Vm, target: Vm, options: MoveOptions) -> Path:
    """A migration over one UNIX socket, without anything in between."""
    path = bench.root / f"move-{uuid4().hex[:8]}"
    await target.configure_target(options)
    await source.configure_source(options)
    await target.listen(path)
    assert path.is_socket(), "not listening when listen returned"
    await source.migrate(path)
    return path


async def move(bench: Bench, source: Vm, target: Vm, options: MoveOptions) -> None:
    """Up to the moment at which the source is completed and the target holds a paused copy."""
    await begin_move(bench, source, target, options)
    await until_migration(source, "pre-switchover")
    assert await target.status() == "inmigrate"
    await source.continue_switchover()
    await until_migration(source, "completed")
    await until_migration(target, "completed")
    assert await source.status() == "postmigrate"
    assert await target.status() == "paused"


@asynccontextmanager
async def bench_of(hypervisor: Hypervisor, root: Path) -> AsyncIterator[Bench]:
    bench = Bench(hypervisor, root)
    try:
        yield bench
    finally:
        await bench.end()


async def refuses_every_cont(vm: Vm) -> None:
    before = await vm.status()
    with pytest.raises(ContRefused):
        await vm.cont_fresh()
    with pytest.raises(ContRefused):
        await vm.cont_at_target()
    with pytest.raises(ContRefused):
        await vm.cont_at_source(aborted=Answer.ABORTED)
    assert await vm.status() == before


# --- facts and records ---------------------------------------------------------------------------------------------


async def facts_are_known(bench: Bench) -> None:
    hypervisor = bench.hypervisor
    assert all(part.isdigit() for part in (await hypervisor.version()).split("."))
    machines = await hypervisor.machines()
    assert machines["q35"].startswith("pc-q35-")
    assert machines["pc"].startswith("pc-i440fx-")
    assert all(machines[name] == name for name in machines.values()), "a versioned name is a word for itself"
    working = await hypervisor.accelerators()
    assert working
    assert Accelerator.AUTO not in working
    assert await hypervisor.cpu_model()


async def a_record_is_frozen_and_checked(bench: Bench) -> None:
    hypervisor = bench.hypervisor
    machines = await hypervisor.machines()
    record = await hypervisor.freeze(bench.config())
    assert record.machine == machines["q35"]
    assert record.accelerator in await hypervisor.accelerators()
    assert record.qemu_version == await hypervisor.version()
    await hypervisor.check_record(record)
    for changed in (
        replace(record, machine="pc-q35-99.0"),
        replace(record, qemu_version="99.0.0"),
        replace(record, version=99),
    ):
        with pytest.raises(HardwareMismatch):
            await hypervisor.check_record(changed)
        with pytest.raises(HardwareMismatch):
            await bench.incoming(changed)
    with pytest.raises(HardwareMismatch):
        await hypervisor.freeze(bench.config(machine="pc-q35-99.0"))


# --- start, find again, end ----------------------------------------------------------------------------------------


async def a_start_waits_for_cont(bench: Bench) -> None:
    config = bench.config()
    vm = await bench.start(await bench.hypervisor.freeze(config))
    paths = bench.paths("a")
    assert vm.process.alive()
    assert vm.uuid == config.uuid
    assert await vm.status() == "prelaunch"
    assert (await vm.migration()).status == "none"
    assert stat.S_IMODE(paths.directory.stat().st_mode) == 0o700
    assert paths.qmp.is_socket()
    assert paths.rescue.is_socket()
    with pytest.raises(ContRefused):
        await vm.cont_at_target()
    with pytest.raises(ContRefused):
        await vm.cont_at_source(aborted=Answer.ABORTED)
    assert bench.console("a") == b""
    await vm.cont_fresh()
    assert await vm.status() == "running"
    await bench.ticks("a")
    await refuses_every_cont(vm)


async def a_second_start_is_refused(bench: Bench) -> None:
    record, vm = await bench.running()
    with pytest.raises(Conflict):
        await bench.start(record)
    await bench.ticks("a")
    assert await vm.status() == "running", "the first one's connection still works"


async def a_failed_start_says_why_and_leaves_nothing(bench: Bench) -> None:
    record = await bench.hypervisor.freeze(bench.config())
    paths = bench.paths("a")
    # Found wanting by the hypervisor itself, so the message must be from its log.
    with pytest.raises(HypervisorError, match="no-such-cpu"):
        await bench.start(replace(record, cpu="no-such-cpu"))
    assert not paths.qmp.exists()
    missing = bench.config(boot=Boot("/no/such/kernel"))
    with pytest.raises(HypervisorError, match="/no/such/kernel"):
        await bench.start(await bench.hypervisor.freeze(missing))
    absent = bench.config(disks=(Disk(str(bench.root / "absent"), "raw"),))
    with pytest.raises(HypervisorError, match="absent"):
        await bench.start(await bench.hypervisor.freeze(absent))
    await bench.start(record)  # nothing in the way


async def missing_keys_are_told_before_anything_is_started(bench: Bench) -> None:
    held, missing = uuid4(), uuid4()
    disks = (Disk(str(bench.root / "one"), "qcow2", dek=held), Disk(str(bench.root / "two"), "raw", dek=missing))
    record = await bench.hypervisor.freeze(bench.config(disks=disks))
    await bench.hypervisor.check_record(record)
    for begin in (bench.start, bench.incoming):
        with pytest.raises(KeysNotHeld, match="two"):
            await begin(record, "a", {held: Secret(bytes(32), length=32)})
    assert not bench.paths("a").log.exists()


async def a_vm_is_found_again(bench: Bench) -> None:
    _, first = await bench.running()
    await first.close()
    await bench.ticks("a")
    paths = bench.paths("a")
    with pytest.raises(HypervisorError, match="not"):
        await bench.hypervisor.attach(paths, first.process, UUID(int=1))
    stale = replace(first.process, start_time=first.process.start_time + 1)
    with pytest.raises(QemuGone):
        await bench.hypervisor.attach(paths, stale, first.uuid)
    with pytest.raises(HypervisorError):
        await bench.hypervisor.attach(paths, ProcessRef.of(os.getpid()), first.uuid)
    again = await bench.attach(first, "a")
    assert again.process == first.process
    assert await again.status() == "running"
    await bench.ticks("a")
    await again.quit()
    with pytest.raises(QemuGone):
        await bench.hypervisor.attach(paths, first.process, first.uuid)


async def a_stray_that_never_ran_is_ended_and_no_other(bench: Bench) -> None:
    config = bench.config()
    record = await bench.hypervisor.freeze(config)
    paths = bench.paths("a")
    assert not await bench.hypervisor.end_stray(paths, config.uuid)
    for begin in (bench.start, bench.incoming):
        stray = await begin(record, "a")
        await stray.close()  # as when its agent died
        assert await bench.hypervisor.end_stray(paths, config.uuid)
        assert not stray.process.alive()
        assert not paths.qmp.exists()
        assert not await bench.hypervisor.end_stray(paths, config.uuid)
    vm = await bench.start(record)
    await vm.cont_fresh()
    await vm.close()
    for uuid in (config.uuid, uuid4()):  # one that runs, and another VM's
        with pytest.raises(HypervisorError):
            await bench.hypervisor.end_stray(paths, uuid)
    assert await (await bench.attach(vm, "a")).status() == "running"


async def a_vm_ends_when_told(bench: Bench) -> None:
    paths = bench.paths("a")
    for end in ("quit", "kill"):
        _, vm = await bench.running()
        seen: list[str] = []

        async def listen(vm: Vm = vm, seen: list[str] = seen) -> None:
            async for event in vm.events():
                seen.append(event.name)

        listener = asyncio.create_task(listen())
        await vm.powerdown()  # the guest does not care
        await getattr(vm, end)()
        assert not vm.process.alive()
        assert not paths.qmp.exists()
        assert not paths.rescue.exists()
        async with asyncio.timeout(5):
            await listener
        for command in (vm.status, vm.migration, vm.pause, vm.cont_fresh):
            with pytest.raises(QemuGone):
                await command()
        await vm.kill()
        await vm.quit()


async def a_death_is_noticed(bench: Bench) -> None:
    _, vm = await bench.running()
    vm.process.kill()
    assert await vm.process.wait_exit(10)
    with pytest.raises(QemuGone):
        await vm.status()
    await vm.kill()


async def events_carry_their_time(bench: Bench) -> None:
    _, vm = await bench.running()
    before = time.time()
    stream = vm.events()
    await vm.pause()
    assert await vm.status() == "paused"
    after = time.time()
    async with asyncio.timeout(5):
        async for event in stream:
            if event.name == "STOP":
                break
    assert before - 0.01 <= event.time <= after + 0.01
    assert vm.last_event("STOP") == event
    async with asyncio.timeout(5):
        async for late in vm.events(since=event.time):
            assert late == event, "a later iterator sees what is retained"
            break
    assert vm.last_event("NO_SUCH") is None


async def a_paused_guest_is_not_a_received_one(bench: Bench) -> None:
    _, vm = await bench.running()
    await vm.pause()
    stopped = vm.last_event("STOP")
    for refused in (vm.cont_fresh, vm.cont_at_target):
        with pytest.raises(ContRefused):
            await refused()
    with pytest.raises(ContRefused):
        await vm.cont_at_source(aborted=Answer.RUNNING)
    assert await vm.status() == "paused"
    await vm.cont_at_source(aborted=Answer.ABORTED)
    assert await vm.status() == "running"
    resumed = vm.last_event("RESUME")
    assert stopped is not None
    assert resumed is not None
    assert resumed.time >= stopped.time


# --- migration -----------------------------------------------------------------------------------------------------


async def an_incoming_vm_is_never_let_run_before_it_is_whole(bench: Bench) -> None:
    record = await bench.hypervisor.freeze(bench.config())
    vm = await bench.incoming(record)
    assert await vm.status() == "inmigrate"
    await refuses_every_cont(vm)
    await vm.configure_target(MoveOptions())
    await vm.listen(bench.root / "move")
    await refuses_every_cont(vm)
    assert bench.console("b") == b""


async def _a_move_loses_nothing(bench: Bench, channels: int) -> None:
    record, source = await bench.running()
    target = await bench.incoming(record)
    await move(bench, source, target, MoveOptions(multifd_channels=channels))
    at_source = bench.console("a")
    assert bench.console("b") == b"", "the target runs without a commit"
    with pytest.raises(ContRefused):
        await source.cont_at_source(aborted=Answer.RUNNING)
    with pytest.raises(ContRefused):
        await source.cont_fresh()
    with pytest.raises(ContRefused):
        await source.cont_at_target()
    await target.cont_at_target()
    assert await target.status() == "running"
    # Two laps through the memory it dirties: every page is checked by the guest after the move.
    await bench.ticks("b", 2 * 4096)
    with pytest.raises(ContRefused):
        await target.cont_at_target()
    assert bench.console("a") == at_source
    ticker.check(at_source + bench.console("b"))
    stopped, resumed = source.last_event("STOP"), target.last_event("RESUME")
    assert stopped is not None
    assert resumed is not None
    assert 0 < resumed.time - stopped.time < 30
    info = await source.migration()
    assert info.downtime_ms is not None
    assert info.progress.total_bytes >= record.config.memory_bytes
    assert info.progress.transferred_bytes > 0
    assert info.progress.remaining_bytes == 0
    assert info.progress.passes >= 1
    assert info.error == ""
    await source.quit()
    await bench.ticks("b")


async def a_move_loses_nothing(bench: Bench) -> None:
    await _a_move_loses_nothing(bench, 0)


async def a_move_over_2_channels_loses_nothing(bench: Bench) -> None:
    await _a_move_loses_nothing(bench, 2)


async def a_move_over_4_channels_loses_nothing(bench: Bench) -> None:
    await _a_move_loses_nothing(bench, 4)


async def a_received_vm_moves_on(bench: Bench) -> None:
    """The record builds the same machine again, and a handle found again serves for a move."""
    record, source = await bench.running()
    target = await bench.incoming(record)
    await move(bench, source, target, MoveOptions(multifd_channels=2))
    await target.close()
    target = await bench.attach(target, "b")
    await target.cont_at_target()
    await source.kill()
    third = await bench.incoming(record, "c")
    await move(bench, target, third, MoveOptions())
    await third.cont_at_target()
    await bench.ticks("c")
    ticker.check(bench.console("a") + bench.console("b") + bench.console("c"))


async def a_move_is_cancelled_while_copying(bench: Bench) -> None:
    record, source = await bench.running()
    target = await bench.incoming(record)
    await begin_move(bench, source, target, MoveOptions(bandwidth=2 << 20, max_downtime_ms=1))
    await until_migration(source, "active")
    info = await source.cancel()
    assert info.status == "cancelled"
    assert await source.status() == "running"
    await target.kill()
    await bench.ticks("a")
    ticker.check(bench.console("a"))
    assert (await source.cancel()).status == "cancelled", "cancelling again does nothing"


async def a_move_is_cancelled_at_the_switchover(bench: Bench) -> None:
    record, source = await bench.running()
    target = await bench.incoming(record)
    await begin_move(bench, source, target, MoveOptions())
    await until_migration(source, "pre-switchover")
    assert await source.status() != "running"
    assert (await source.cancel()).status == "cancelled"
    assert await source.status() == "running", "the guest goes on by itself"
    await target.kill()
    await bench.ticks("a")
    assert bench.console("b") == b""
    # What the first attempt set does not disturb the next, with other options.
    again = await bench.incoming(record)
    await move(bench, source, again, MoveOptions(multifd_channels=2))
    await again.cont_at_target()
    await bench.ticks("b")
    ticker.check(bench.console("a") + bench.console("b"))


async def cancel_without_a_move_is_harmless(bench: Bench) -> None:
    _, vm = await bench.running()
    assert (await vm.cancel()).status in {"none", "cancelled"}
    assert await vm.status() == "running"
    with pytest.raises(QmpRefused):
        await vm.continue_switchover()


async def _a_dead_target_leaves_the_source_running(bench: Bench, channels: int) -> tuple[HardwareRecord, Vm]:
    record, source = await bench.running()
    target = await bench.incoming(record)
    await begin_move(
        bench, source, target, MoveOptions(bandwidth=2 << 20, max_downtime_ms=1, multifd_channels=channels)
    )
    await until_migration(source, "active")
    await target.kill()
    info = await until_migration(source, "failed")
    assert info.error
    await until_status(source, "running")
    await bench.ticks("a")
    return record, source


async def a_dead_target_over_2_channels_leaves_the_source_running(bench: Bench) -> None:
    # No second migration here: QEMU 7.2 cannot always begin one after this (see ``Vm.migrate``).
    await _a_dead_target_leaves_the_source_running(bench, 2)
    ticker.check(bench.console("a"))


async def a_dead_target_leaves_the_source_able_to_try_again(bench: Bench) -> None:
    record, source = await _a_dead_target_leaves_the_source_running(bench, 0)
    again = await bench.incoming(record)
    await move(bench, source, again, MoveOptions())
    await again.cont_at_target()
    await bench.ticks("b")
    ticker.check(bench.console("a") + bench.console("b"))


async def an_aborted_move_is_taken_back(bench: Bench) -> None:
    record, source = await bench.running()
    target = await bench.incoming(record)
    await move(bench, source, target, MoveOptions())
    await target.kill()
    await source.cont_at_source(aborted=Answer.ABORTED)
    assert await source.status() == "running"
    await bench.ticks("a", 2 * 4096)
    assert bench.console("b") == b""
    ticker.check(bench.console("a"))


async def limits_change_under_way(bench: Bench) -> None:
    record, source = await bench.running()
    target = await bench.incoming(record)
    await begin_move(bench, source, target, MoveOptions(bandwidth=1 << 20, max_downtime_ms=1))
    await until_migration(source, "active")
    await source.set_max_downtime(5000)
    await source.set_bandwidth(0)
    await until_migration(source, "pre-switchover")
    assert (await source.cancel()).status == "cancelled"
    await target.kill()


async def a_socket_path_too_long_is_refused(bench: Bench) -> None:
    record = await bench.hypervisor.freeze(bench.config())
    long = bench.root / ("x" * 110)
    with pytest.raises(SealiftError, match="107"):
        await bench.hypervisor.start(record, replace(bench.paths("a"), directory=long), {})
    vm = await bench.incoming(record)
    await vm.configure_target(MoveOptions())
    with pytest.raises(SealiftError, match="107"):
        await vm.listen(long)


CHECKS: tuple[Callable[[Bench], Awaitable[None]], ...] = (
    facts_are_known,
    a_record_is_frozen_and_checked,
    a_start_waits_for_cont,
    a_second_start_is_refused,
    a_failed_start_says_why_and_leaves_nothing,
    missing_keys_are_told_before_anything_is_started,
    a_vm_is_found_again,
    a_stray_that_never_ran_is_ended_and_no_other,
    a_vm_ends_when_told,
    a_death_is_noticed,
    events_carry_their_time,
    a_paused_guest_is_not_a_received_one,
    an_incoming_vm_is_never_let_run_before_it_is_whole,
    a_move_loses_nothing,
    a_move_over_2_channels_loses_nothing,
    a_move_over_4_channels_loses_nothing,
    a_received_vm_moves_on,
    a_move_is_cancelled_while_copying,
    a_move_is_cancelled_at_the_switchover,
    cancel_without_a_move_is_harmless,
    a_dead_target_over_2_channels_leaves_the_source_running,
    a_dead_target_leaves_the_source_able_to_try_again,
    an_aborted_move_is_taken_back,
    limits_change_under_way,
    a_socket_path_too_long_is_refused,
)


async def check_hypervisor(
    hypervisor: Hypervisor, root: Path, checks: tuple[Callable[[Bench], Awaitable[None]], ...] = CHECKS
) -> None:
    """Run the checks, each in a fresh directory under ``root`` (keep it short: sockets are made in there)."""
    for number, check in enumerate(checks):
        directory = root / f"c{number}"
        directory.mkdir()
        async with bench_of(hypervisor, directory) as bench:
            await check(bench)
