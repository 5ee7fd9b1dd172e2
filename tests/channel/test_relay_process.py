"""A process that holds keys is not dumped, and says so when that cannot be had."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import subprocess
import sys

import pytest

from sealift.channel import relay_client
from sealift.channel.protocol import Plan
from sealift.channel.relay_client import RelayClient, start_relay
from sealift.channel.relay_spec import RelaySpec, encode_handover, split_address
from sealift.errors import InvalidInput, LocalPeerRefused, RelayGone
from support.relays import PATIENCE, Pair, Site, channel_spec, proc


@pytest.fixture
def site():
    with Site() as made:
        yield made


def core_limit(pid: int) -> tuple[int, int]:
    return resource.prlimit(pid, resource.RLIMIT_CORE)


KEEP_LIMIT = "import resource; resource.setrlimit = lambda *a: None\n"
FORBID = "from sealift.process import forbid_dumps; forbid_dumps()\n"


def dumps_core(code: str, directory) -> bool:
    """Run a program that may dump core as far as limits go, kill it, and see whether it did."""
    arguments = [sys.executable, "-c", f"import resource\n{code}print(flush=True); input()"]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=directory) as process:
        assert process.stdout
        process.stdout.readline()
        resource.prlimit(process.pid, resource.RLIMIT_CORE, (core_limit(process.pid)[1],) * 2)
        process.send_signal(signal.SIGABRT)
        status = os.waitpid(process.pid, 0)[1]
        process.returncode = os.waitstatus_to_exitcode(status)
        return os.WCOREDUMP(status)


def test_a_process_that_forbade_dumps_does_not_dump_even_where_the_limit_lets_it(tmp_path) -> None:
    assert dumps_core("", tmp_path), "an ordinary process must dump core here, or this test shows nothing"
    assert not dumps_core(KEEP_LIMIT + FORBID, tmp_path)


def test_relays_have_forbidden_dumps(site: Site) -> None:
    with site.pair() as pair:
        for relay in (pair.source, pair.target):
            assert core_limit(relay.pid) == (0, 0)
            assert core_limit(os.getpid())[1] != 0, "inherited, not set"
            if os.geteuid():
                with pytest.raises(PermissionError):
                    proc(relay.pid, "environ")


def test_forbidding_dumps_fails_loudly_where_the_kernel_does_not_let_us() -> None:
    """RLIMIT_CORE cannot be lowered below nothing; a refused prctl is played by a libc without it."""
    code = (
        "import ctypes, sealift.process as p, sealift.errors as e\n"
        "class Deaf:\n"
        "    def prctl(self, *a): ctypes.set_errno(1); return -1\n"
        "p.ctypes = type('c', (), {'CDLL': lambda *a, **k: Deaf(), 'get_errno': ctypes.get_errno})\n"
        "try: p.forbid_dumps()\n"
        "except e.MemoryUnprotected as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "PR_SET_DUMPABLE was refused" in done.stdout, done.stderr


@pytest.mark.parametrize("kind", ["relay", "splice"])
def test_what_keeps_a_relay_from_starting_is_reported_and_nothing_is_left(site: Site, kind: str) -> None:
    plan, size = (Plan.SEALED, 40) if kind == "relay" else (Plan.PLAIN, 16)
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait(PATIENCE)
    spec = RelaySpec("source", channel_spec(1, plan), site.directory(), gone.pid, target="127.0.0.1:1")
    with pytest.raises(LocalPeerRefused, match=str(gone.pid)):
        asyncio.run(start_relay(kind, spec, os.urandom(size), f"{site.root}/log"))
    missing = RelaySpec("source", channel_spec(1, plan), f"{site.root}/nowhere", os.getpid(), target="127.0.0.1:1")
    with pytest.raises(Exception, match="No such file"):
        asyncio.run(start_relay(kind, missing, os.urandom(size), f"{site.root}/log"))
    assert os.listdir(spec.directory) == []


def test_a_client_without_a_relay_says_so(tmp_path) -> None:
    with pytest.raises(RelayGone):
        asyncio.run(RelayClient.connect(str(tmp_path)))


def test_client_speaks_with_a_relay_it_did_not_start(site: Site) -> None:
    async def talk(source: str, target: str) -> None:
        one, two = await RelayClient.connect(source), await RelayClient.connect(target)
        assert (await one.wait(0, PATIENCE))[0]["type"] == "connected"
        seen = await two.wait(0, PATIENCE)
        waiting = asyncio.create_task(two.wait(seen[-1]["seq"], PATIENCE))
        await one.send({"type": "COMMIT"})
        assert [e["message"] for e in await waiting] == [{"type": "COMMIT"}]
        cancelled = asyncio.create_task(two.wait(99, PATIENCE))
        await asyncio.sleep(0)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        assert await two.wait(99, 0) == []
        with pytest.raises(InvalidInput):
            await one.send({"no": "type"})
        await one.abort("over")
        assert (await one.wait(1, PATIENCE))[0]["slug"] == "channel_aborted"
        await one.close()
        await two.close()
        with pytest.raises(RelayGone):
            await one.status()
        await one.close()
        one.hang_up()

    with site.pair() as pair:
        asyncio.run(talk(pair.source.directory, pair.target.directory))
        assert pair.source.exit_status() == 0
        assert pair.target.exit_status() == 0


def test_a_relay_that_stands_still_is_waited_for_and_keeps_nobody_else(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay_client, "_REQUEST_S", 0.2)

    async def talk(pair: Pair) -> None:
        client = await RelayClient.connect(pair.source.directory)
        pair.source.signal(signal.SIGSTOP)
        try:
            waiting = asyncio.create_task(client.wait(99, 0))
            found = asyncio.create_task(RelayClient.connect(pair.source.directory))
            with pytest.raises(RelayGone):
                await client.send({"type": "COMMIT"})
            with pytest.raises(RelayGone):
                await client.status()
        finally:
            pair.source.signal(signal.SIGCONT)
        assert await waiting == []
        (await found).hang_up()
        client.hang_up()

    with site.pair() as pair:
        asyncio.run(talk(pair))


def test_a_relay_that_does_not_answer_is_killed_however_often_it_was_asked(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each question that was given up leaves a connection that the relay has not taken."""
    monkeypatch.setattr(relay_client, "_REQUEST_S", 0.01)

    async def talk(pair: Pair) -> None:
        client = await RelayClient.connect(pair.source.directory)
        pair.source.signal(signal.SIGSTOP)
        for _ in range(40):
            with pytest.raises(RelayGone):
                await client.status()
        monkeypatch.setattr(relay_client, "_CLOSE_S", 0.1)
        await client.close()

    with site.pair() as pair:
        asyncio.run(talk(pair))
        assert pair.source.exit_status() == -signal.SIGKILL


def test_a_secret_of_the_wrong_length_is_not_handed_over() -> None:
    spec = RelaySpec("source", channel_spec(), "d", 1)
    with pytest.raises(ValueError, match="does not fit"):
        encode_handover(spec, bytes(39))


@pytest.mark.parametrize(
    ("text", "address"),
    [("10.0.0.1:7421", ("10.0.0.1", 7421)), ("[::1]:1", ("::1", 1)), ("host.example:65535", ("host.example", 65535))],
)
def test_addresses_are_split(text: str, address: tuple[str, int]) -> None:
    assert split_address(text) == address


@pytest.mark.parametrize("text", ["", "host", "host:", ":7421", "host:x", "host:65536", "host:-1"])
def test_other_addresses_are_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        split_address(text)
