"""``init`` and ``run`` as they are used: a directory, a process, a signal."""

from __future__ import annotations

import contextlib
import resource
import signal
import ssl
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from sealift.controller.services import load_settings
from sealift.demo.ports import free_port
from sealift.domain.token import TokenKind, fingerprint_text, parse_token
from sealift.entry.controller import Initialised, init
from sealift.errors import AlreadyExists, InvalidInput, NotFound

LIMIT_S = 30.0
RUN = "import sys; from pathlib import Path; from sealift.entry.controller import run; run(Path(sys.argv[1]))"


def test_init_makes_a_private_directory_and_two_tokens(tmp_path: Path) -> None:
    state = tmp_path / "new" / "state"
    made = init(state, listen="0.0.0.0:7443", addresses=["sealift.example", "10.0.0.1"])
    assert made.address == "https://sealift.example:7443"
    assert made.join_command == "sealift agent join https://sealift.example:7443 --token -"
    admin, join = parse_token(made.admin_token), parse_token(made.join_token)
    assert (admin.kind, join.kind) == (TokenKind.ADMIN, TokenKind.JOIN)
    assert made.fingerprint == fingerprint_text(join.fingerprint) == fingerprint_text(admin.fingerprint)
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    for path in state.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    content = b"".join(path.read_bytes() for path in state.iterdir())
    for token in (admin, join):
        assert token.secret.reveal() not in content
    before = {path: path.read_bytes() for path in state.iterdir()}
    with pytest.raises(AlreadyExists):
        init(state, listen="0.0.0.0:7443", addresses=["sealift.example"])
    assert {path: path.read_bytes() for path in state.iterdir()} == before


@pytest.mark.parametrize(
    ("listen", "addresses"),
    [("7443", ["a"]), (":7443", ["a"]), ("0.0.0.0:x", ["a"]), ("0.0.0.0:7443", []), ("0.0.0.0:7443", ["a b"])],
)
def test_init_refuses_before_it_has_made_anything(tmp_path: Path, listen: str, addresses: list[str]) -> None:
    with pytest.raises(InvalidInput):
        init(tmp_path / "state", listen=listen, addresses=addresses)
    assert not (tmp_path / "state").exists()


def test_an_address_of_ipv6_is_written_in_brackets(tmp_path: Path) -> None:
    assert init(tmp_path / "state", listen="[::]:7443", addresses=["fd00::1"]).address == "https://[fd00::1]:7443"


def test_there_is_nothing_to_run_in_an_empty_directory(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="holds no controller"):
        load_settings(tmp_path)


@contextlib.contextmanager
def running(state: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The controller as a process of its own."""
    with (state / "log").open("ab") as log:
        process = subprocess.Popen([sys.executable, "-c", RUN, str(state)], stderr=log, stdin=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def client(made: Initialised, state: Path) -> httpx2.Client:
    """A client with the admin's token."""
    trust = ssl.create_default_context(cafile=state / "controllers-authority.pem")
    headers = {"authorization": f"Bearer {made.admin_token}"}
    return httpx2.Client(base_url=made.address, verify=trust, headers=headers, trust_env=False, timeout=60)


def wait_for(ask: httpx2.Client, process: subprocess.Popen[bytes]) -> None:
    """Return once it answers."""
    deadline = time.monotonic() + LIMIT_S
    while True:
        try:
            ask.get("/api/v1/whoami").raise_for_status()
        except httpx2.ConnectError:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        else:
            return


def test_it_runs_until_it_is_told_to_stop_also_with_a_stream_open(tmp_path: Path) -> None:
    state, port = tmp_path / "state", free_port()
    made = init(state, listen=f"127.0.0.1:{port}", addresses=["127.0.0.1"])
    with running(state) as process, client(made, state) as ask:
        wait_for(ask, process)
        assert resource.prlimit(process.pid, resource.RLIMIT_CORE) == (0, 0)
        with ask.stream("GET", "/api/v1/events", headers={"accept": "text/event-stream"}) as stream:
            assert next(stream.iter_lines()).startswith(":")
            process.send_signal(signal.SIGTERM)
            assert process.wait(LIMIT_S) in (0, -signal.SIGTERM)
    log = (state / "log").read_text()
    assert "the controller listens" in log
    for token in (made.admin_token, made.join_token):
        assert token not in log
        assert token.rpartition(".")[2] not in log
    # A second life has the same authority and the same tokens.
    with running(state) as process, client(made, state) as ask:
        wait_for(ask, process)
