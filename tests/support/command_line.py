"""The command line as a person uses it: in this process, with a home of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from sealift.cli.main import cli


class CommandLine:
    """Runs `sealift` with its configuration in ``home``."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self._runner = CliRunner(env={"XDG_CONFIG_HOME": str(home), "TZ": "UTC"})

    @property
    def credentials(self) -> Path:
        """Where a login is kept."""
        return self.home / "sealift" / "credentials.json"

    def __call__(self, *words: str, stdin: str | None = None) -> Result:
        """Carry out a command line; a defect of ours surfaces as the exception it is."""
        return self._runner.invoke(cli, list(words), input=stdin, catch_exceptions=False)

    def says(self, *words: str) -> str:
        """The output of a command that must succeed."""
        result = self(*words)
        assert result.exit_code == 0, result.output
        return result.stdout

    def json(self, *words: str) -> Any:
        """The JSON of a command that must succeed."""
        return json.loads(self.says(*words, "--json"))

    def fails(self, code: int, *words: str) -> str:
        """What a command that must fail with ``code`` says on standard error."""
        result = self(*words)
        assert result.exit_code == code, (result.exit_code, result.output)
        return result.stderr


@pytest.fixture
def sealift(tmp_path: Path) -> CommandLine:
    """A command line that nobody has logged in with yet."""
    return CommandLine(tmp_path / "home")
