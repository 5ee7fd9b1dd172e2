"""What every demonstration stands on: a cluster in a directory of its own, a guest, proofs, and a clean end."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console as Screen

from sealift.demo.cluster import Cluster
from sealift.demo.console import Console
from sealift.demo.guest import GuestImage, prepare
from sealift.errors import SealiftError

_BOOT_S = 90.0

screen = Screen(highlight=False, width=None if sys.stdout.isatty() else 120)
"""Where demonstrations speak."""


def cache_directory() -> Path:
    """Where the guest's image is kept: SEALIFT_CACHE, or the user's cache directory."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("SEALIFT_CACHE") or home / "sealift")


def perform(make: Callable[[Cluster], Stage], *, keep: bool, as_json: bool) -> int:
    """Run a demonstration; 0 when every proof held. With ``keep`` everything stays up until Ctrl-C."""
    image = prepare(cache_directory(), lambda line: screen.print(f"  {line}"))
    directory = Path(tempfile.mkdtemp(prefix="sealift-"))  # short: UNIX sockets lie below it
    stage = make(Cluster(directory / "c"))
    try:
        stage.set_up(image)
        stage.run()
        stage.table(as_json=as_json)
        if keep:
            stage.explain()
    finally:
        stage.close()
        shutil.rmtree(directory, ignore_errors=True)
    for failure in stage.failures:
        screen.print(f"[bold red]NOT PROVED[/] {failure}")
    return 1 if stage.failures else 0


class Stage(ABC):
    """A demonstration: ``set_up``, ``run``, ``table``, and whatever happened ``close``."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.failures: list[str] = []
        self._console: Console | None = None

    @abstractmethod
    def set_up(self, image: GuestImage) -> None:
        """Start everything; the guest is ready afterwards."""

    @abstractmethod
    def run(self) -> None:
        """The parts of the demonstration."""

    @abstractmethod
    def table(self, *, as_json: bool) -> None:
        """The figures."""

    @property
    @abstractmethod
    def hints(self) -> Sequence[str]:
        """Commands to play with when everything is left running; ``sealift`` is left out."""

    @property
    def console(self) -> Console:
        """What the guest says; ``define`` begins it."""
        assert self._console is not None
        return self._console

    def define(self, image: GuestImage, words: str, *options: str, memory_kib: int, extra: str = "") -> dict[str, Any]:
        """Create the VM ``guest``, which boots the image with the kernel command line ``words``, and listen to it.

        ``options`` go to `vm create`; ``extra`` is more of the VM file, such as a disk. Answers what was created.
        """
        file = self.cluster.directory / "guest.toml"
        file.write_text(
            f'name = "guest"\nvcpus = 1\nmemory = "{memory_kib}KiB"\n'
            f"[boot]\nkernel = {json.dumps(str(image.kernel))}\ninitrd = {json.dumps(str(image.initrd))}\n"
            f"cmdline = {json.dumps(words)}\n{extra}"
        )
        made: dict[str, Any] = self.cluster.ask("vm", "create", str(file), *options)
        paths = [host.state / "vms" / made["uuid"] / "serial.log" for host in self.cluster.hosts.values()]
        self._console = Console(paths)
        return made

    def boot(self) -> None:
        """Start the guest and wait until it is ready."""
        before = self.console.count("READY")
        self.cluster.sealift("vm", "start", "guest")
        if not self.console.wait_for("READY", _BOOT_S, count=before + 1):
            raise SealiftError(f"the guest did not boot within {_BOOT_S:g} s: {self.console.lines[-5:]}")

    def prove(self, what: str, held: bool) -> None:
        """Say whether it held; the demonstration fails in the end when it did not."""
        screen.print(f"  [green]proved[/]  {what}" if held else f"  [bold red]FAILED[/]  {what}")
        if not held:
            self.failures.append(what)

    def explain(self) -> None:
        """Say what to play with, and wait for Ctrl-C."""
        command = " ".join(self.cluster.argv())
        step("Everything is left running. To play with it:")
        lines = [f"export XDG_CONFIG_HOME={self.cluster.environment['XDG_CONFIG_HOME']}"]
        lines += [f"{command} {hint}" for hint in self.hints]
        lines.append(f"tail -F {self.cluster.directory}/*/state/vms/*/serial.log")
        say("\n".join(f"  {line}" for line in lines) + "\nCtrl-C here ends it.")
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()

    def close(self) -> None:
        """End everything that was started."""
        if self._console is not None:
            self._console.close()
        self.cluster.close()


def step(text: str) -> None:
    """Say what comes now."""
    screen.print(f"\n[bold]{text}[/]")


def say(text: str) -> None:
    """Say it as it is."""
    screen.print(text.rstrip(), markup=False)
