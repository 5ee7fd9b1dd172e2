"""A controller and hosts on this machine, each a process of its own on loopback, driven through the command line.

Used by the demonstration, by the end-to-end tests and by the benchmarks. Everything lies in one directory; ``close``
ends every process that was started in it, found by what each left there, never by name.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sealift.agent.journal import Journal
from sealift.demo.ports import free_port
from sealift.errors import SealiftError, from_slug

_START_S = 20.0


@dataclass
class Host:
    """One host: its directories, address and ports, and agent; ``prefix`` begins the agent's command line."""

    name: str
    directory: Path
    port: int
    migration_port: int
    configuration: Path
    address: str
    prefix: tuple[str, ...]
    process: subprocess.Popen[bytes] | None = None

    @property
    def state(self) -> Path:
        return self.directory / "state"

    @property
    def run(self) -> Path:
        return self.directory / "run"

    @property
    def log(self) -> Path:
        return self.directory / "agent.log"


class Cluster:
    """A controller and its hosts in ``directory``, whose path should be short: UNIX sockets lie below it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.hosts: dict[str, Host] = {}
        self.port = free_port()
        self._controller: subprocess.Popen[bytes] | None = None
        self._environment = {**os.environ, "XDG_CONFIG_HOME": str(directory / "config")}

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def sealift(self, *arguments: str, input: str = "", check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run the command line; with ``check`` a failure raises SealiftError with what it printed."""
        done = subprocess.run(
            self.argv(*arguments), input=input, capture_output=True, text=True, env=self._environment, check=False
        )
        if check and done.returncode:
            raise SealiftError(
                f"sealift {' '.join(arguments)} ended with {done.returncode}: {done.stderr or done.stdout}"
            )
        return done

    def ask(self, *arguments: str) -> Any:  # noqa: ANN401 - as many shapes as commands
        """Run a command with ``--json`` and return what it answers; its error is raised as its own class."""
        done = self.sealift(*arguments, "--json", check=False)
        if done.returncode:
            text = done.stderr.strip() or done.stdout.strip()
            try:
                problem = json.loads(text.splitlines()[-1])
            except (ValueError, IndexError):
                raise SealiftError(f"sealift {' '.join(arguments)} ended with {done.returncode}: {text}") from None
            raise from_slug(problem["slug"], problem["what"], problem["todo"])
        return json.loads(done.stdout)

    @staticmethod
    def argv(*arguments: str) -> list[str]:
        """The command line as a list, under the very Python that runs us."""
        return [sys.executable, "-m", "sealift.entry.main", *arguments]

    @property
    def environment(self) -> dict[str, str]:
        """What a command needs to find this cluster's credentials."""
        return self._environment

    # controller

    def start(self) -> None:
        """Make and start the controller, and log in."""
        self.directory.mkdir(parents=True, exist_ok=True)
        listen = f"127.0.0.1:{self.port}"
        made = self.ask(
            *("controller", "init", "--state", str(self.directory / "controller")),
            *("--listen", listen, "--address", "127.0.0.1"),
        )
        self.start_controller()
        self.sealift("login", self.url, "--token", "-", input=made["admin_token"])

    def start_controller(self) -> None:
        """Start the controller's process and wait until it answers."""
        argv = self.argv("controller", "run", "--state", str(self.directory / "controller"))
        self.take_controller(self._spawn(argv, self.directory / "controller.log"))

    def take_controller(self, process: subprocess.Popen[bytes]) -> None:
        """Use a controller that somebody else started on our state directory; returns when it listens."""
        self._controller = process
        self._until_listening(process, "127.0.0.1", self.port, self.directory / "controller.log")

    def kill_controller(self, number: int = signal.SIGKILL) -> None:
        """End the controller's process by a signal and wait until it is gone."""
        if self._controller is not None:
            self._controller.send_signal(number)
            self._controller.wait()
            self._controller = None

    @property
    def controller_runs(self) -> bool:
        """Whether the controller's process is there."""
        return self._controller is not None and self._controller.poll() is None

    @property
    def controller_pid(self) -> int:
        """The controller's process."""
        assert self._controller is not None
        return self._controller.pid

    # hosts

    def add_host(
        self,
        name: str,
        *,
        migration_port: int = 0,
        replaces: str = "",
        address: str = "127.0.0.1",
        prefix: Sequence[str] = (),
        **settings: object,
    ) -> Host:
        """Join a new host and start its agent, which listens at the IP ``address``.

        ``migration_port`` is what others are told, when it is not its own; ``prefix`` comes before the agent's command
        line, and may take it to another network namespace.
        """
        directory = self.directory / name
        directory.mkdir(parents=True)
        host = Host(name, directory, free_port(), free_port(), directory / "agent.toml", address, tuple(prefix))
        values: dict[str, object] = {
            "name": name,
            "listen": f"{address}:{host.port}",
            "migration_listen": f"{address}:{host.migration_port}",
            "address": f"{address}:{host.port}",
            "migration_address": f"{address}:{migration_port or host.migration_port}",
            "accelerator": "tcg",
            "run_directory": str(host.run),
            **settings,
        }
        host.configuration.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
        token = self.ask("host", "token", *(["--replaces", replaces] if replaces else []))["token"]
        self.sealift("agent", "join", self.url, "--token", "-", *self._where(host), input=token)
        self.hosts[name] = host
        self.start_agent(host)
        return host

    def start_agent(self, host: Host) -> None:
        """Start a host's agent and wait until it listens."""
        host.process = self._spawn([*host.prefix, *self.argv("agent", "run", *self._where(host))], host.log)
        self._until_listening(host.process, host.address, host.port, host.log)

    def kill_agent(self, host: Host, number: int = signal.SIGKILL) -> None:
        """End a host's agent by a signal; its VMs and moves go on."""
        if host.process is not None:
            host.process.send_signal(number)
            host.process.wait()
            host.process = None

    def lose_power(self, host: Host) -> None:
        """End everything of a host at once; its state directory stays, its run directory is gone, as after a boot."""
        self.kill_agent(host)
        processes = list(_qemus(host))
        for process in processes:
            process.kill()
        _end_rest(host)
        for process in processes:
            while process.alive():
                time.sleep(0.01)
        shutil.rmtree(host.run, ignore_errors=True)

    @staticmethod
    def _where(host: Host) -> list[str]:
        return ["--config", str(host.configuration), "--state", str(host.state)]

    def _spawn(self, argv: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        with log.open("ab") as out:
            return subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=self._environment, start_new_session=True
            )

    @staticmethod
    def _until_listening(process: subprocess.Popen[bytes], address: str, port: int, log: Path) -> None:
        end = time.monotonic() + _START_S
        while time.monotonic() < end:
            if process.poll() is not None:
                raise SealiftError(f"it ended with {process.returncode}: {log.read_text()[-2000:]}")
            with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=1):
                return
            time.sleep(0.05)
        raise SealiftError(f"it does not listen after {_START_S:g} s: {log.read_text()[-2000:]}")

    # the end

    def close(self) -> None:
        """End everything: controller, agents, QEMUs, relays, doormen."""
        self.kill_controller(signal.SIGTERM)
        for host in self.hosts.values():
            self.kill_agent(host, signal.SIGTERM)
            for process in _qemus(host):
                process.kill()
            _end_rest(host)


def _end_rest(host: Host) -> None:
    for path in host.run.glob("moves/*/relay.sock"):
        _close_relay(path)
    _end_doorman(host.run / "doorman.lock")


def _qemus(host: Host) -> Iterator[Any]:
    if not (host.state / "agent.db").exists():
        return
    journal = Journal(host.state / "agent.db")
    try:
        yield from [row.process for row in journal.vms().values() if row.process]
        yield from [move.process for move in journal.moves() if move.process]
    finally:
        journal.close()


def _close_relay(path: Path) -> None:
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as link:
        link.settimeout(10)
        link.connect(str(path))
        link.sendall(b'{"op": "close"}\n')
        link.recv(4096)


def _end_doorman(lock: Path) -> None:
    """The doorman holds its lock while it runs, and its pid is in it."""
    with contextlib.suppress(FileNotFoundError, ValueError, ProcessLookupError), lock.open("r+") as file:
        pid = int(file.read())
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.kill(pid, signal.SIGTERM)
            fcntl.flock(file, fcntl.LOCK_EX)  # released when it has ended
