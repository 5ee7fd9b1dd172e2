"""A real process that converts a real image, killed at moments that nobody chose.

``test_conversion_crashes`` visits every point between two effects; here qemu-img, kernel and SQLite are real.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import secrets
import select
import shutil
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from pydantic import TypeAdapter

from sealift.agent.journal import Journal, VmRow
from sealift.domain.conversion import CONVERSION_FINAL, ConversionKind, ConversionOrder, ConversionState
from sealift.domain.deks import encode_frame
from sealift.domain.vm import Disk, VmConfig
from support.converting import agent_on, content_of, convert, die_beside_a_child, files_in, image_with
from support.vm_files import file_of, keys

KILLS = 4
IMAGE_BYTES, DATA_BYTES = 64 << 20, 16 << 20
ENDS_S = 60.0
VM = UUID(int=7)


class Store:
    """A VM with one qcow2 image, its agent's state, and what must be true of both."""

    def __init__(self, directory: Path) -> None:
        self.state, self.store = directory / "state", directory / "store"
        self.state.mkdir()
        self.store.mkdir()
        self.content = os.urandom(DATA_BYTES) + bytes(IMAGE_BYTES - DATA_BYTES)
        self.config = VmConfig("web", VM, 1, 64 << 20, disks=(Disk(str(self.store / "disk"), "qcow2"),))
        self.generation, self.file, self.read_s = 0, b"", 0.0
        asyncio.run(image_with(self.store / "disk", "qcow2", self.content, None))
        journal = Journal(self.state / "agent.db")
        journal.put_vm(VmRow(self.config))
        journal.close()

    def order(self, kind: ConversionKind) -> ConversionOrder:
        """The next one."""
        self.generation += 1
        dek = None if kind is ConversionKind.DECRYPT else uuid4()
        after = replace(self.config, disks=(replace(self.config.disks[0], dek=dek),))
        file = file_of(after, self.generation).decode("latin-1") if dek else ""
        return ConversionOrder(uuid4(), VM, self.generation, kind, after, file, "sample")

    def frame(self, order: ConversionOrder) -> bytes:
        deks = keys(*self.config.deks, *order.config.deks)
        return encode_frame(TypeAdapter(ConversionOrder).dump_json(order), deks)

    async def settled(self, order: ConversionOrder) -> ConversionState | None:
        """Let an agent come back; how the order ended, None when it never began. All else must be as promised."""
        async with agent_on(self.state) as (vms, conversions):
            works = conversions._works
            state = works[order.id].row.status.state if order.id in works else None
            assert state is None or state in CONVERSION_FINAL
            assert vms.converting == {}
            now = vms.row(VM).config
            assert now == (order.config if state is ConversionState.DONE else self.config)
            assert files_in(self.store) == ["disk"]
            assert vms.files.read(VM) == (order.file.encode("latin-1") if now == order.config else self.file)
            if state is not None:
                await conversions.forget(order.id)
        [dek], began = [disk.dek for disk in now.disks], time.monotonic()
        assert await content_of(now.disks[0].path, "qcow2", keys(dek)[dek] if dek else None) == self.content
        self.read_s = time.monotonic() - began
        if now == order.config:
            self.config, self.file = now, order.file.encode("latin-1")
        return state


@pytest.fixture
def context(monkeypatch: pytest.MonkeyPatch) -> ForkServerContext:
    """Processes that begin in milliseconds, since what they import is there."""
    tests = Path(__file__).parent.parent
    monkeypatch.setenv("PYTHONPATH", str(tests))
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["support.converting"])
    return made


def begin(context: ForkServerContext, store: Store, order: ConversionOrder) -> tuple[ForkServerProcess, Connection]:
    """A process that carries the order out; it has settled what there was."""
    hear, tell = context.Pipe(duplex=False)
    process = context.Process(target=convert, args=(store.state, store.frame(order), tell), daemon=True)
    process.start()
    tell.close()
    assert hear.poll(ENDS_S)
    assert hear.recv() == "settled"
    return process, hear


def whole(context: ForkServerContext, store: Store, kind: ConversionKind) -> float:
    """A conversion that nobody disturbs; how many seconds it took."""
    order, began = store.order(kind), time.monotonic()
    process, hear = begin(context, store, order)
    assert hear.poll(ENDS_S)
    assert hear.recv() == "taken"
    assert hear.poll(ENDS_S)
    assert hear.recv() == "done"
    lasted = time.monotonic() - began
    process.join(ENDS_S)
    assert process.exitcode == 0
    assert asyncio.run(store.settled(order)) is ConversionState.DONE
    return lasted


def test_a_conversion_killed_at_random_moments(tmp_path: Path, context: ForkServerContext) -> None:
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    draw, store = random.Random(seed), Store(tmp_path)
    lasts = {ConversionKind.ENCRYPT: whole(context, store, ConversionKind.ENCRYPT)}
    lasts[ConversionKind.REKEY] = lasts[ConversionKind.ENCRYPT]
    lasts[ConversionKind.DECRYPT] = 2 * store.read_s
    ends = []
    for number in range(KILLS):
        # QEMU spends a second of computing on each new LUKS header, so most of these need none.
        kind = ConversionKind.REKEY if number % 5 == 0 else ConversionKind.DECRYPT
        if not store.config.deks:
            kind = ConversionKind.ENCRYPT
        order = store.order(kind)
        process, _ = begin(context, store, order)
        process.join(draw.uniform(0, lasts[kind]))  # the moment, or its end, whichever is first
        process.kill()
        process.join(ENDS_S)
        ends.append((kind.value, asyncio.run(store.settled(order))))
    print(ends)
    whole(context, store, ConversionKind.DECRYPT if store.config.deks else ConversionKind.ENCRYPT)


def test_a_process_that_dies_as_it_starts_qemu_img_leaves_none(tmp_path: Path, context: ForkServerContext) -> None:
    """Not even one that had no time yet to ask that it be killed with its parent."""
    path, gate, slow = tmp_path / "image", tmp_path / "gate", tmp_path / "setpriv"
    os.mkfifo(gate)
    slow.write_text(f'#!/bin/sh\nread _ < {gate}\nexec {shutil.which("setpriv")} "$@"\n')
    slow.chmod(0o700)
    hear, tell = context.Pipe(duplex=False)
    process = context.Process(target=die_beside_a_child, args=(str(path), str(tmp_path), tell), daemon=True)
    process.start()
    tell.close()
    child = os.pidfd_open(hear.recv())
    process.join(ENDS_S)
    gate.write_text("go on\n")
    assert select.select([child], [], [], ENDS_S)[0]
    os.close(child)
    assert not path.exists()
