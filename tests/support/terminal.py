"""The command line on a terminal: bars, prompts and Ctrl-C."""

from __future__ import annotations

import contextlib
import errno
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from support.command_line import CommandLine


class Terminal:
    """`sealift` as a process of its own on a terminal."""

    def __init__(self, home: Path, *words: str) -> None:
        self.text = ""
        self._ours, theirs = pty.openpty()
        environment = {**os.environ, "XDG_CONFIG_HOME": str(home), "TERM": "xterm-256color", "COLUMNS": "120"}
        # As from a terminal: what a shell runs in its background it starts with Ctrl-C ignored, and so are we perhaps.
        heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
        program = f"{heed}; from sealift.cli.main import cli, run; run(cli)"
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, theirs)
            self.process = subprocess.Popen(
                [sys.executable, "-c", program, *words], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
            )

    def until(self, pattern: str) -> None:
        """Read until ``pattern`` was shown; the test's timeout bounds it."""
        while not re.search(pattern, self.text):
            assert self._read(), f"ended without {pattern}: {self.text}"

    def type(self, text: str) -> None:
        """As from the keyboard."""
        os.write(self._ours, text.encode())

    def press_ctrl_c(self) -> None:
        """Interrupt it."""
        self.process.send_signal(signal.SIGINT)

    def end(self) -> int:
        """Read to the end; the exit code."""
        while self._read():
            pass
        return self.process.wait()

    def _read(self) -> bool:
        try:
            found = os.read(self._ours, 65536)
        except OSError as error:
            if error.errno != errno.EIO:  # how a terminal says that the other end is closed
                raise
            return False
        self.text += found.decode()
        return bool(found)

    def close(self) -> None:
        """End it, whatever it does."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._ours)


@contextlib.contextmanager
def terminal(sealift: CommandLine, *words: str) -> Iterator[Terminal]:
    """A command line with the credentials of ``sealift``, ended whatever happens."""
    made = Terminal(sealift.home, *words)
    try:
        yield made
    finally:
        made.close()
