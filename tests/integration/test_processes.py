"""Spawned processes: recognised again, signalled, waited for; on real ones."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import stat
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from sealift.errors import HypervisorError, QemuMissing
from sealift.hypervisor.process import ProcessRef, spawn


@pytest.fixture
def sleeper(tmp_path: Path) -> Iterator[ProcessRef]:
    process = spawn(["sleep", "600"], log_path=tmp_path / "log")
    yield process
    process.kill()
    asyncio.run(process.wait_exit(10))


def test_a_process_is_recognised_by_its_record(sleeper: ProcessRef) -> None:
    assert sleeper.alive()
    assert ProcessRef.of(sleeper.pid) == sleeper
    assert ProcessRef(**json.loads(json.dumps(asdict(sleeper)))) == sleeper
    assert ProcessRef(sleeper.pid, sleeper.start_time).alive()


def test_another_process_of_the_same_pid_is_left_alone(sleeper: ProcessRef) -> None:
    for other in (replace(sleeper, start_time=sleeper.start_time + 1), replace(sleeper, boot="another boot")):
        assert not other.alive()
        assert not other.kill()
        assert asyncio.run(other.wait_exit(10))
    assert sleeper.alive()


def test_an_end_is_waited_for_and_reaped(sleeper: ProcessRef) -> None:
    async def main() -> None:
        assert not await sleeper.wait_exit(0.05)
        waiting = [asyncio.create_task(sleeper.wait_exit(10)) for _ in range(3)]
        await asyncio.sleep(0)
        assert sleeper.kill(signal.SIGTERM)
        assert await asyncio.gather(*waiting) == [True, True, True]

    asyncio.run(main())
    assert not Path(f"/proc/{sleeper.pid}").exists(), "a zombie is left"
    assert not sleeper.alive()
    assert not sleeper.kill()
    assert asyncio.run(sleeper.wait_exit(0))


def test_an_end_at_once_is_an_end(tmp_path: Path) -> None:
    process = spawn(["true"], log_path=tmp_path / "log")
    assert asyncio.run(process.wait_exit(10))
    assert not process.alive()


def test_a_process_lives_as_long_as_any_thread(tmp_path: Path) -> None:
    """As a QEMU that was killed, whose first thread is gone and whose virtual CPU is not yet."""
    code = (
        "import ctypes, platform, threading, time; threading.Thread(target=time.sleep, args=(600,)).start(); "
        "ctypes.CDLL(None).syscall({'x86_64': 60, 'aarch64': 93}[platform.machine()], 0)"
    )
    process = spawn([sys.executable, "-I", "-c", code], log_path=tmp_path / "log")
    try:
        stat = Path(f"/proc/{process.pid}/stat")
        while ") Z " not in stat.read_text():
            assert process.alive()
        assert process.alive()
        assert not asyncio.run(process.wait_exit(0.05))
    finally:
        assert process.kill()
        assert asyncio.run(process.wait_exit(10))


def test_a_process_gets_what_it_is_given_and_no_more(tmp_path: Path) -> None:
    given, kept = os.pipe()
    os.set_inheritable(kept, True)  # as by a library that does not care
    log = tmp_path / "log"
    log.write_text("before\n")
    code = (
        "import os; print(sorted(int(fd) for fd in os.listdir('/proc/self/fd')), os.getcwd(), "
        "os.getsid(0) == os.getpid(), os.readlink('/proc/self/fd/0'), sorted(os.environ))"
    )
    try:
        process = spawn([sys.executable, "-I", "-c", code], log_path=log, pass_fds=(given,), env={"ONE": "1"})
        assert asyncio.run(process.wait_exit(10))
    finally:
        os.close(given)
        os.close(kept)
    first, second = log.read_text().splitlines()
    listed, _, rest = second.partition("]")
    fds = set(json.loads(listed + "]"))
    # The last one is the listing itself.
    assert first == "before"
    assert given in fds
    assert kept not in fds
    assert len(fds) == 5
    assert rest.startswith(" / True /dev/null")
    assert "'ONE'" in rest
    assert "PATH" not in rest


def test_the_log_is_private(tmp_path: Path) -> None:
    process = spawn(["true"], log_path=tmp_path / "log")
    assert asyncio.run(process.wait_exit(10))
    assert stat.S_IMODE((tmp_path / "log").stat().st_mode) == 0o600


def test_what_cannot_be_started_says_so(tmp_path: Path) -> None:
    with pytest.raises(QemuMissing, match="no-such-program"):
        spawn(["/no-such-program"], log_path=tmp_path / "log")
    plain = tmp_path / "plain"
    plain.write_text("")
    with pytest.raises(HypervisorError, match="plain"):
        spawn([str(plain)], log_path=tmp_path / "log")
    with pytest.raises(HypervisorError, match="no process"):
        ProcessRef.of(2**22 + 1)
