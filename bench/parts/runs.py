"""Runs in a file, one JSON object a line as they come, so that hours of measuring can be interrupted and continued.

The first line holds the settings and the machine; a file is continued only with the settings it was begun with. Each
other line is one run under its key, or an attempt that failed: ``{"key": [...], "failed": "why"}``.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from parts.measure import Run

Key = tuple[str, str, int, int]
"""Name of what is measured (a guest, a link), path, channels, number of the round."""


class Runs:
    """All runs so far; ``path`` None keeps them in memory only. Raises ValueError for a file of other settings."""

    def __init__(self, path: Path | None, settings: dict[str, Any], machine: dict[str, Any]) -> None:
        self._path = path
        self._found: dict[Key, Run] = {}
        self._failures: list[tuple[Key, str]] = []
        self.machine = machine
        if path is None:
            return
        if not path.exists():
            self._append({"settings": settings, "machine": machine})
            return
        with path.open() as lines:
            head = json.loads(next(lines))
            if head["settings"] != settings:
                raise ValueError(f"{path} was measured with {head['settings']}, not {settings}")
            self.machine = head["machine"]
            for line in lines:
                self._take(json.loads(line))

    def _take(self, line: dict[str, Any]) -> None:
        name, path, channels, number = line["key"]
        key = (name, path, channels, number)
        if "failed" in line:
            self._failures.append((key, line["failed"]))
        else:
            self._found[key] = Run(**line["run"])

    def _append(self, line: dict[str, Any]) -> None:
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def __contains__(self, key: Key) -> bool:
        return key in self._found

    def add(self, key: Key, run: Run) -> None:
        self._found[key] = run
        self._append({"key": key, "run": dataclasses.asdict(run)})

    def add_failure(self, key: Key, why: str) -> None:
        self._failures.append((key, why))
        self._append({"key": key, "failed": why})

    def of(self, name: str, path: str, channels: int) -> list[Run]:
        return [run for key, run in self._found.items() if key[:3] == (name, path, channels)]

    def failures(self, name: str, path: str, channels: int) -> list[str]:
        """Attempts that failed, in words."""
        return [why for key, why in self._failures if key[:3] == (name, path, channels)]
