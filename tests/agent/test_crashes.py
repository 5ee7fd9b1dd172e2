"""Promise P4 under every crash of an agent: killed before and after each of its effects, alone, with its relay, or with
everything on its host, and begun anew. A controller carries questions as the real one would."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest

from doubles.carrier import Carrier, move
from doubles.hosts import World
from sealift.domain.move import MoveState, MoveStatus
from sealift.domain.vm import Disk
from support.vm_files import file_of, keys


def test_a_move_that_nothing_disturbs(world: World) -> None:
    carrier, (did_a, did_b) = move(world)
    assert [report.state for report in carrier.outcome] == [MoveState.DONE, MoveState.DONE], carrier.outcome
    assert world.running() == ["b"]
    assert world.wrongs == []
    assert did_a.index("after LET_GO") < did_a.index("before continue") < did_a.index("before sending COMMIT")
    assert did_a.index("after RELEASED") < did_a.index("before quit")
    assert did_b.index("after READY") < did_b.index("after COMMITTED") < did_b.index("before cont")


def judge_world(world: World, carrier: Carrier, lose: str) -> list[str]:
    """What is not as promised."""
    found = list(world.wrongs)
    source, target = (report.state if isinstance(report, MoveStatus) else None for report in carrier.outcome)
    told = f"source {source}, target {target}"
    running, alive = world.running(), [qemu.host for qemu in world.qemus if qemu.alive]
    if carrier.waits_for_somebody():
        return found  # who finds a complete copy that waits
    if not carrier.over():
        found.append(f"it is not settled: {told}")
    if lose != "everything" and len(running) != 1:
        found.append(f"it runs at {running}; {told}")
    if sorted(alive) != sorted(running):
        found.append(f"there are QEMUs at {alive}; it runs at {running}")
    if any(relay.alive for relay in world.relays.values()):
        found.append(f"a relay was left; {told}")
    for host in (world.a, world.b):
        known = [row.config.name for row in host.vms._rows.values()]
        if running and bool(known) is not (host.name == running[0]):
            found.append(f"it runs at {running[0]}, and host {host.name} has {known}; {told}")
        left = list((host.settings.run_directory / "moves").glob("*"))
        if left:
            found.append(f"host {host.name} has leftovers {left}")
    for host in (world.a, world.b):
        if carrier.over() and bool(host.vms.files.read(world.config.uuid)) is not (
            host.vms.has(world.config.uuid) and bool(world.file)
        ):
            found.append(f"host {host.name} has the VM and not its file, or its file and not the VM; {told}")
    if MoveState.CRASHED not in (source, target):
        if running == ["b"] and target is not MoveState.DONE:
            found.append(f"it runs at b; {told}")
        if running == ["a"] and (source is MoveState.DONE or target is MoveState.DONE):
            found.append(f"it runs at a; {told}")
        crashed = [row for host in (world.a, world.b) for row in host.vms._rows.values() if row.wanted]
        if not running and carrier.over() and len(crashed) != 1:
            found.append(f"it runs nowhere, and nobody says that it crashed: {told}")
    return found


def encrypt(world: World, directory: Path) -> World:
    """The same with an encrypted VM."""
    disk = Disk(str(directory / "disk"), "qcow2", uuid4())
    Path(disk.path).touch()
    world.config = replace(world.config, disks=(disk,))
    world.hardware = replace(world.hardware, config=world.config)
    world.file, world.deks = file_of(world.config, 1), keys(*world.config.deks)
    return world


@pytest.mark.parametrize("lose", ["", "relays", "everything"])
@pytest.mark.parametrize("killed", [0, 1], ids=["source", "target"])
def test_an_agent_killed_at_any_moment(worlds: Callable[[], World], tmp_path: Path, killed: int, lose: str) -> None:
    """Of an encrypted VM where there is least else to see, since that is a VM in clear and more."""

    def made() -> World:
        return worlds() if lose else encrypt(worlds(), tmp_path)

    _, did = move(made())
    wrong = {}
    for number, what in enumerate(did[killed], start=1):
        world = made()
        carrier, _ = move(world, at=(number, 0) if killed == 0 else (0, number), lose=lose)
        if found := judge_world(world, carrier, lose):
            wrong[f"{number}: {what}"] = found
        if len(wrong) == 3:
            break  # one that does not settle takes a while
    assert not wrong, "\n".join(f"{where}: {what}" for where, what in wrong.items())
